# A small GPT on Shakespeare's plays, letter by letter, in about a minute on two CPU cores: what `make demo` trains.
# With --max_iters=110 it is where nanoGPT's command for a laptop ends, in a seventh of the time.

out_dir = 'out-shakespeare-char-cpu'
eval_interval = 300
eval_iters = 20  # 320 rows: a short look on the way
log_interval = 50

always_save_checkpoint = False  # sample from the best checkpoint

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 16
block_size = 128  # a few lines of context

# Qwen3's network: with it a few hundred steps are enough (docs/LOG.md)
n_layer = 3  # small operations cost more than arithmetic here: few layers, many rows
n_head = 4
n_embd = 128
dropout = 0.0  # once through the text is too little to overfit
rope_theta = 10000.0  # rotary positions: the greatest part of the gain
norm = 'rmsnorm'
activation = 'swiglu'
qk_norm = True
tied = False  # a head of its own costs little with so few letters, and learns faster

optimizer = 'muon'
learning_rate = 2e-2  # of the embeddings: the norms keep everything in scale, so they bear much
muon_lr = 0.02
min_lr = 0.0  # down to nothing at the end gives the last bit of loss
max_iters = 600
lr_decay_iters = -1  # equal to max_iters
warmup_iters = 0  # the norms make it unnecessary
schedule = 'wsd'
cooldown = 0.8  # a long decay: shorter ones end higher
beta2 = 0.95

compile = False  # a newcomer's machine may have no C++ compiler, and a minute does not earn the time back
