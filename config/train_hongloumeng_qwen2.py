# 红楼梦 in the tokens of Qwen2, cut to those that it needs, on one GPU. On a CPU lay config/laptop.py over it.

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

learning_rate = 1e-3  # small networks bear a high one
max_iters = 1200
lr_decay_iters = 1200  # equal to max_iters
min_lr = 1e-4  # learning_rate / 10
warmup_iters = 100
beta2 = 0.99  # a step sees few tokens
