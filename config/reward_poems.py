# Tang poems: a reward model that ranks poems in verses of five characters above others.

init_from = 'out-poems-sft/best.pt'
out_dir = 'out-poems-reward'
eval_interval = 50
eval_iters = -1  # all validation pairs, and as many training pairs
log_interval = 10
always_save_checkpoint = False

objective = 'reward'
dataset = 'tang_poems/pairs'
gradient_accumulation_steps = 1
batch_size = 16  # pairs
block_size = 256

learning_rate = 3e-4
min_lr = 0.0
max_iters = 100  # a third of an epoch
lr_decay_iters = -1
warmup_iters = 10
weight_decay = 0.1
compile = False  # pairs differ in length, and each new length compiles again
