# A reward model from your own preferences, written by chat.py --rate or in another form (data/chat/readme.md).

init_from = 'out-chat'
out_dir = 'out-chat-reward'
eval_interval = 50
eval_iters = -1
log_interval = 10
always_save_checkpoint = False

objective = 'reward'
dataset = 'chat/pairs'
gradient_accumulation_steps = 4
batch_size = 4  # pairs
block_size = 1024

learning_rate = 1e-5
min_lr = 0.0
max_iters = 150
lr_decay_iters = -1
warmup_iters = 10
compile = False  # pairs differ in length, and each new length compiles again
