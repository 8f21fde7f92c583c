# Dozens of your own novels with a BBPE tokenizer trained on them, on one GPU. On a CPU add config/laptop.py.

out_dir = 'out-novels'
dataset = 'novels'
wandb_project = 'novels'
wandb_run_name = 'bbpe'

eval_interval = 500
eval_iters = 50
log_interval = 10
always_save_checkpoint = False  # sample from the best checkpoint

# 65,536 tokens a step
batch_size = 32
gradient_accumulation_steps = 4
block_size = 512  # tokens, about 800 characters

n_layer = 12
n_head = 12
n_embd = 768  # GPT-2's network: 98 million parameters with 16,384 tokens
dropout = 0.1  # the text has less than 100 million tokens

learning_rate = 6e-4  # GPT-2's
max_iters = 10000  # 655 million tokens
lr_decay_iters = 10000  # equal to max_iters
min_lr = 6e-5  # learning_rate / 10
warmup_iters = 500
