# A small GPT on Shakespeare's plays, by character, in about a minute on two CPU cores: what `make demo` trains.
# With --n_layer=2 --max_iters=110 it reaches the loss of nanoGPT's command for a laptop in a thirteenth of the time.

out_dir = 'out-shakespeare-char-cpu'
eval_interval = 300
eval_iters = 20  # 320 rows: a quick evaluation
log_interval = 50

always_save_checkpoint = False  # sample from the best checkpoint

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 16
block_size = 128  # a few lines of context
short_rows = 0.7  # contexts of 64 are enough at first: less time, and a lower loss in the end

# Qwen3's network: a few hundred steps are enough (docs/LOG.md)
n_layer = 3  # at this size the overhead per operation dominates: few layers, many rows
n_head = 4
n_kv_head = 1  # less work, with the same loss
n_embd = 128
dropout = 0.0  # one epoch is too little to overfit
rope_theta = 10000.0  # rotary positions: the largest part of the gain
norm = 'rmsnorm'
activation = 'swiglu'
qk_norm = True
tied = False  # a separate head costs little with so few characters, and learns faster

optimizer = 'normuon'  # learns a little more in a step than muon
learning_rate = 3e-2  # of embeddings and norm gains; the norms keep activations in scale, so a high rate works
muon_lr = 0.03
min_lr = 0.0  # a decay to 0 gives the lowest final loss
max_iters = 600
lr_decay_iters = -1  # equal to max_iters
warmup_iters = 0  # not needed with these norms
schedule = 'wsd'
cooldown = 1.0  # decay from the first step on: shorter decays end at a higher loss
beta2 = 0.95

compile = False  # needs a C++ compiler, and in a minute of training it would not pay off
