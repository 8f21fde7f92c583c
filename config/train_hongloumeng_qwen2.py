# 红楼梦 with Qwen2's tokenizer, reduced to the tokens that occur, on one GPU. On a CPU add config/laptop.py.

out_dir = 'out-hongloumeng-qwen2'
dataset = 'hongloumeng_qwen2'
wandb_project = 'hongloumeng'
wandb_run_name = 'qwen2'

eval_interval = 100  # often, because it will overfit
eval_iters = 20
log_interval = 10
always_save_checkpoint = False  # sample from the best checkpoint, not the last

batch_size = 64
gradient_accumulation_steps = 1
block_size = 256  # tokens, about 325 characters

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2  # 623 thousand tokens are few for 14 million parameters

learning_rate = 1e-3  # small networks train well at a high rate
max_iters = 1200
lr_decay_iters = 1200  # equal to max_iters
min_lr = 1e-4  # learning_rate / 10
warmup_iters = 100
beta2 = 0.99  # a step sees few tokens
