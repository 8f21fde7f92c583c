# Reach nanoGPT's best loss on Shakespeare's plays (three minutes on an A100) in 75 seconds on two cores of a Zen 5.

out_dir = 'out-speedrun-shakespeare-char'
eval_interval = 650
eval_iters = 10  # 80 rows: an evaluation takes a second
log_interval = 50

always_save_checkpoint = False  # sample from the best checkpoint

dataset = 'shakespeare_char'
data_order = 'epochs'  # every character equally often
gradient_accumulation_steps = 1
batch_size = 8
block_size = 256  # a longer context predicts each character better
short_rows = 0.7  # contexts of 128 are enough at first: less time, and a lower loss in the end

# Qwen3's network with 1.1 million parameters, a tenth of nanoGPT's. One of 2.4 million took 4.5 minutes
n_layer = 4
n_head = 5
n_kv_head = 1  # a step takes a tenth less time, with the same loss
n_embd = 160
dropout = 0.0  # less than three epochs: weight decay is enough
rope_theta = 10000.0
norm = 'rmsnorm'
activation = 'swiglu'
qk_norm = True
tied = False  # a separate head costs little with so few characters, and learns faster

optimizer = 'normuon'  # learns a little more in a step than muon
learning_rate = 3e-2  # of embeddings and norm gains
muon_lr = 0.02
min_lr = 0.0
max_iters = 1300
lr_decay_iters = -1  # equal to max_iters
warmup_iters = 0
schedule = 'wsd'
cooldown = 1.0  # decay from the first step on: shorter decays end at a higher loss
beta2 = 0.95

compile = True  # 1.2 times as fast; the first start takes a quarter of a minute longer, later ones five seconds
