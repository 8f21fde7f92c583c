# Reinforcement learning with a reward model (config/reward_chat.py) or a function of your own: --reward=rewards.py:name

init_from = 'out-chat'
out_dir = 'out-chat-grpo'
eval_interval = 20
eval_iters = 4
log_interval = 1
sample_interval = 20
sample_prompts = ''  # the first prompt of the dataset

objective = 'grpo'
reference = 'out-chat'
reward = 'out-chat-reward'
group_size = 8
updates = 2
max_new_tokens = 128
dataset = 'chat/prompts'
gradient_accumulation_steps = 4
batch_size = 4  # prompts
block_size = 1024

learning_rate = 1e-5
min_lr = 1e-6
max_iters = 100
lr_decay_iters = -1
warmup_iters = 5
weight_decay = 0.0
compile = False
