# 红楼梦 by character, on one GPU. On a CPU add config/laptop.py:
# python train.py config/train_hongloumeng_char.py config/laptop.py

out_dir = 'out-hongloumeng-char'
dataset = 'hongloumeng_char'
wandb_project = 'hongloumeng'
wandb_run_name = 'char'

eval_interval = 100  # often, because it will overfit
eval_iters = 20
log_interval = 10
always_save_checkpoint = False  # sample from the best checkpoint, not the last

batch_size = 64
gradient_accumulation_steps = 1
block_size = 256  # a paragraph or two

# nanoGPT's network for Shakespeare's plays
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2  # 788 thousand characters are few for 12 million parameters

learning_rate = 1e-3  # small networks train well at a high rate
max_iters = 2000  # 42 epochs
lr_decay_iters = 2000  # equal to max_iters
min_lr = 1e-4  # learning_rate / 10
warmup_iters = 100
beta2 = 0.99  # a step sees few tokens
