# Tang poems, another last stage: reinforcement learning. The model writes poems, and those that the reward model
# prefers become more likely.
# With a rule instead of the reward model: --reward=data/tang_poems/poems.py:reward --out_dir=out-poems-grpo-rule

init_from = 'out-poems-sft/best.pt'
out_dir = 'out-poems-grpo'
eval_interval = 20
eval_iters = 4
log_interval = 1
sample_interval = 20
sample_prompts = '春夜喜雨'

objective = 'grpo'
reference = 'out-poems-sft/best.pt'
reward = 'out-poems-reward'
group_size = 8
updates = 2  # steps per set of answers: generation takes most of the time
kl_coef = 0.06  # with the paper's 0.04 the poems become a fifth shorter
max_new_tokens = 128  # a poem of four lines has 52; longer answers are cut off and count as not finished
dataset = 'tang_poems/prompts'
gradient_accumulation_steps = 1
batch_size = 24  # prompts: 192 poems a step
block_size = 256

learning_rate = 1e-4
min_lr = 1e-5
max_iters = 40  # 20 sets of new poems; after half of them, nine in ten poems have the form
lr_decay_iters = -1
warmup_iters = 5
weight_decay = 0.0
compile = False
