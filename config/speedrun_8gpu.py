# 20 layers of 1,280, 460M parameters, in Qwen3 style, by Muon, on web text: one machine with 8 GPUs.
# python data/fineweb_edu/prepare.py; torchrun --standalone --nproc_per_node=8 train.py config/speedrun_8gpu.py
#
# n_layer determines the rest (config/speedrun_1gpu.py has the rule): --n_layer=12 is GPT-2's size,
# --n_layer=26 has 950M parameters.

out_dir = 'out-speedrun-8gpu'
eval_interval = 250
eval_iters = 20
log_interval = 10

dataset = 'fineweb_edu'
batch_size = 16  # rows in a micro-batch
gradient_accumulation_steps = 32  # half a million tokens a step: 4 micro-batches for each GPU
block_size = 1024

n_layer = 20
n_head = 0  # derived from the width
n_embd = 0  # derived from n_layer
rope_theta = 10000.0
norm = 'rmsnorm'
activation = 'swiglu'
qk_norm = True

optimizer = 'muon'
learning_rate = 3e-3  # at a width of 768; of embeddings and norm gains
muon_lr = 0.02
min_lr = 0.0  # a decay to 0 gives the lowest final loss
max_iters = -1  # derived from the parameters
lr_decay_iters = -1  # equal to max_iters
warmup_iters = 0  # not needed with these norms
schedule = 'wsd'  # constant, then linear decay
cooldown = 0.4
weight_decay = 0.1
