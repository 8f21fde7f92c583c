# A network of GPT-2's size (12 layers of 768) in Qwen3 style, by Muon, on web text: one GPU.
# python data/fineweb_edu/prepare.py --limit=3000000; python train.py config/speedrun_1gpu.py
#
# n_layer determines the rest, so --n_layer=16 is enough for a larger one (nanochat's rule: one dial):
#   width          64 * n_layer, in heads of 64: depth and width grow together, as in the families of GPT-3 and Llama
#   learning rate  learning_rate * (768 / width)**0.5: a wider layer sums over more inputs, so each weight may move less
#   muon_lr        the same at any width, because Muon's updates have the same spectral norm at any width
#   steps          20 tokens for each parameter (Hoffmann et al. 2022): the cost grows with the square of the parameters

out_dir = 'out-speedrun'
eval_interval = 250
eval_iters = 20
log_interval = 10

dataset = 'fineweb_edu'
batch_size = 32  # rows in a micro-batch; with less than 80 GB, lower it and raise the next in proportion
gradient_accumulation_steps = 16  # half a million tokens a step
block_size = 1024

n_layer = 12
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
