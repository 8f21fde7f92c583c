# Overlay for another config: Qwen3's network instead of GPT-2's, and Muon. On Shakespeare's plays it learns much faster
# (docs/LOG.md).
# python train.py config/train_hongloumeng_char.py config/laptop.py config/qwen3.py

rope_theta = 10000.0  # rotary positions instead of learned ones: the largest part of the gain
norm = 'rmsnorm'
activation = 'swiglu'
qk_norm = True

optimizer = 'muon'
learning_rate = 1.5e-2  # of embeddings and norm gains; the norms keep activations in scale, so a high rate works
muon_lr = 0.02
min_lr = 0.0
weight_decay = 0.1
warmup_iters = 0  # not needed with these norms
beta2 = 0.95
schedule = 'wsd'  # constant, then linear decay
cooldown = 0.5
lr_decay_iters = -1  # equal to max_iters
