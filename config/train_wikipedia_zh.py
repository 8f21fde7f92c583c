# Chinese web text with build_llm_from_scratch's network, 12 layers of 1,024 with 8 heads, on one GPU or several:
# torchrun --standalone --nproc_per_node=8 train.py config/train_wikipedia_zh.py

out_dir = 'out-wikipedia-zh'
dataset = 'wikipedia_zh'
wandb_project = 'wikipedia-zh'
wandb_run_name = '12x1024'

eval_interval = 1000
eval_iters = 100
log_interval = 10

# 262,144 tokens a step on any number of GPUs that divides 32
batch_size = 8
gradient_accumulation_steps = 32
block_size = 1024

n_layer = 12
n_head = 8  # heads of 128 channels
n_embd = 1024  # 185 million parameters with 32,768 tokens
dropout = 0.0  # only a few epochs

learning_rate = 4e-4  # between the rates of GPT-2 124M and 350M
max_iters = 15000  # 3.9 billion tokens, about 20 for each parameter (Hoffmann et al. 2022)
lr_decay_iters = 15000  # equal to max_iters
min_lr = 4e-5  # learning_rate / 10
warmup_iters = 500
