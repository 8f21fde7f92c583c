# Your own text, prepared by data/any_text/prepare.py: Qwen3's network and Muon, in a size for ten minutes on two CPU
# cores.
#
#     python train.py config/own_text.py --dataset=my --out_dir=out-my

out_dir = 'out-own-text'
eval_interval = 250
eval_iters = 10
log_interval = 50
always_save_checkpoint = False  # sample from the best checkpoint

data_order = 'epochs'  # every token equally often
gradient_accumulation_steps = 1
batch_size = 8
block_size = 256

n_layer = 6
n_head = 6
n_embd = 192
dropout = 0.0
rope_theta = 10000.0
norm = 'rmsnorm'
activation = 'swiglu'
qk_norm = True
tied = False

optimizer = 'muon'
learning_rate = 3e-2  # of embeddings and norm gains
muon_lr = 0.02
min_lr = 0.0
max_iters = 3000
lr_decay_iters = -1  # equal to max_iters
warmup_iters = 0
schedule = 'wsd'
cooldown = 1.0  # decay from the first step on: shorter decays end at a higher loss
beta2 = 0.95

compile = True  # 1.6 times as fast; the first start takes a minute longer, later ones five seconds
