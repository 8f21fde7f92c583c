# Placeholder: a small network for your own text.
# python train.py config/own_text.py --dataset=my --out_dir=out-my


eval_interval = 1000
eval_iters = 40
log_interval = 50

batch_size = 8  # small, so that ten minutes are enough for many steps
gradient_accumulation_steps = 1
block_size = 128  # tokens, a few sentences

n_layer = 4
n_head = 4
n_embd = 256
dropout = 0.0  # it slows learning, and ten minutes are too short to overfit much

learning_rate = 1e-3
max_iters = 4000
lr_decay_iters = 4000  # equal to max_iters
min_lr = 1e-4
warmup_iters = 300  # with fewer, the loss stays long at the level of token frequencies
beta2 = 0.95  # learns faster here than 0.99

compile = False  # training starts at once, and no C++ compiler is needed
