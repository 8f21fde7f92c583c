# Deep and narrow: the four classics with 24 layers of width 256, as many parameters in the layers as 6 of width 512.
# MobileLLM (Liu et al. 2024) found that small networks gain from depth. On one GPU.

out_dir = 'out-classics-deep'
dataset = 'classics_bbpe'
wandb_project = 'classics'
wandb_run_name = 'deep'

eval_interval = 200
eval_iters = 20
log_interval = 10
always_save_checkpoint = False  # it overfits in the end: sample from the best checkpoint

batch_size = 64
gradient_accumulation_steps = 1
block_size = 512  # tokens, about 720 characters

n_layer = 24
n_head = 4  # heads of 64 channels, as in GPT-2
n_embd = 256
dropout = 0.1  # lower than in the wide network: it is applied to the residual stream 48 times

learning_rate = 1e-3
max_iters = 2000  # 34 epochs
lr_decay_iters = 2000  # equal to max_iters
min_lr = 1e-4  # learning_rate / 10
warmup_iters = 300  # deep networks need a longer warm-up
beta2 = 0.99  # a step sees few tokens
