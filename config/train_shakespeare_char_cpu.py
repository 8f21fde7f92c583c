# A small GPT on Shakespeare's plays, letter by letter, in about two minutes on two CPU cores: what `make demo` trains.

out_dir = 'out-shakespeare-char-cpu'
eval_interval = 300
eval_iters = 40  # 640 rows: a short look on the way
log_interval = 50

always_save_checkpoint = False  # sample from the best checkpoint

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 16
block_size = 128  # a few lines of context

n_layer = 4
n_head = 4
n_embd = 160
dropout = 0.0  # two and a half times through the text are too little to overfit with this few parameters

learning_rate = 3e-3  # small networks bear a high one
max_iters = 1200
lr_decay_iters = 1200  # equal to max_iters
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99  # a step sees few tokens

compile = False  # a newcomer's machine may have no C++ compiler, and three minutes do not earn the minute back
