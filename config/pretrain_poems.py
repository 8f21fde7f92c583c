# Tang poems, first of five stages: pretraining. About 8 minutes on two CPU cores.

out_dir = 'out-poems'
eval_interval = 300
eval_iters = 20
log_interval = 50
always_save_checkpoint = False  # the next stage starts from the best checkpoint
sample_interval = 300
sample_prompts = '春夜喜雨\n'  # a title and the newline after it

dataset = 'tang_poems'
data_order = 'epochs'  # the text is read three times, every token equally often
gradient_accumulation_steps = 1
batch_size = 16
block_size = 256

n_layer = 6  # 4.3M parameters, 8,576 vocabulary rows included; the poems are too few for more
n_head = 6
n_embd = 192
dropout = 0.1  # the text is small and read more than once
rope_theta = 10000.0  # this and the next three settings: Qwen3's network, which learns faster
norm = 'rmsnorm'
activation = 'swiglu'
qk_norm = True
tied = True  # the embedding is a large part of the network

optimizer = 'muon'  # needs fewer steps
learning_rate = 1e-2
muon_lr = 0.02
min_lr = 0.0  # a decay to 0 gives the lowest final loss
max_iters = 1200  # 4.9 million tokens
lr_decay_iters = -1  # equal to max_iters
warmup_iters = 100
schedule = 'wsd'
cooldown = 0.6
beta2 = 0.99
