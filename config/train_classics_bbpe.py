# 红楼梦, 三国演义, 水浒传 and 西游记 with a BBPE tokenizer trained on them, on one GPU. On a CPU add config/laptop.py.

out_dir = 'out-classics-bbpe'
dataset = 'classics_bbpe'
wandb_project = 'classics'
wandb_run_name = 'bbpe'

eval_interval = 200
eval_iters = 20
log_interval = 10
always_save_checkpoint = False  # it overfits in the end: sample from the best checkpoint

batch_size = 64
gradient_accumulation_steps = 1
block_size = 512  # tokens, about 720 characters

n_layer = 8
n_head = 8
n_embd = 512  # 29 million parameters
dropout = 0.2  # two million tokens are few for so many parameters

learning_rate = 6e-4  # lower than for the smaller networks
max_iters = 2000  # 34 epochs
lr_decay_iters = 2000  # equal to max_iters
min_lr = 6e-5  # learning_rate / 10
warmup_iters = 100
beta2 = 0.99  # a step sees few tokens
