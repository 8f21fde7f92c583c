# Direct preference optimisation on your own preferences (data/chat/readme.md).

init_from = 'out-chat'
out_dir = 'out-chat-dpo'
eval_interval = 50
eval_iters = 10
log_interval = 10
sample_interval = 50
sample_prompts = ''  # the first prompt of the dataset

objective = 'dpo'
reference = 'out-chat'
beta = 0.1
dataset = 'chat/pairs'
gradient_accumulation_steps = 4
batch_size = 4  # pairs
block_size = 1024

learning_rate = 5e-6
min_lr = 0.0
max_iters = 150
lr_decay_iters = -1
warmup_iters = 15
weight_decay = 0.0
compile = False
