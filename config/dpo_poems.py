# Tang poems, last stage: direct preference optimisation towards verses of five characters, without a reward model.

init_from = 'out-poems-sft/best.pt'
out_dir = 'out-poems-dpo'
eval_interval = 50
eval_iters = 4
log_interval = 10
sample_interval = 50
sample_prompts = '春夜喜雨'

objective = 'dpo'
reference = 'out-poems-sft/best.pt'
beta = 0.3
label_smoothing = 0.1  # all pairs differ in one way: at 0 the margin grows and the verse falls apart (docs/LOG.md)
dataset = 'tang_poems/pairs'
gradient_accumulation_steps = 1
batch_size = 32  # pairs
block_size = 256

learning_rate = 5e-5
min_lr = 0.0
max_iters = 150  # about one epoch of the pairs
lr_decay_iters = -1
warmup_iters = 15
weight_decay = 0.0  # the model should stay close to the reference, not to 0
compile = False  # pairs differ in length, and each new length compiles again
