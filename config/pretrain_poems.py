# Tang poems, the first of five stages: what verse is. About 8 minutes on two CPU cores.

out_dir = 'out-poems'
eval_interval = 300
eval_iters = 20
log_interval = 50
always_save_checkpoint = False  # the next stage starts from the best checkpoint
sample_interval = 300
sample_prompts = '春夜喜雨\n'

dataset = 'tang_poems'
data_order = 'epochs'
gradient_accumulation_steps = 1
batch_size = 16
block_size = 256

n_layer = 6
n_head = 6
n_embd = 192
dropout = 0.1
rope_theta = 10000.0
norm = 'rmsnorm'
activation = 'swiglu'
qk_norm = True
tied = True  # the vocabulary is most of the network

optimizer = 'muon'
learning_rate = 1e-2
muon_lr = 0.02
min_lr = 0.0
max_iters = 1200
lr_decay_iters = -1
warmup_iters = 100
schedule = 'wsd'
cooldown = 0.6
beta2 = 0.99
