# Deep and narrow: the four classics with 24 layers of 256, in the manner of MobileLLM (Liu et al. 2024), which found that small networks
# gain from depth: as many parameters in the layers as 6 of 512. On one GPU.

out_dir = 'out-classics-deep'
dataset = 'classics_bbpe'
wandb_project = 'classics'
wandb_run_name = 'deep'

eval_interval = 200
eval_iters = 20
log_interval = 10
always_save_checkpoint = False  # it will overfit in the end, so sample from the best checkpoint

batch_size = 64
gradient_accumulation_steps = 1
block_size = 512  # tokens, about 720 characters

n_layer = 24
n_head = 4  # 64 wide each, as GPT-2's
n_embd = 256
dropout = 0.1  # less than in the wide one: it falls on the residual stream 48 times

learning_rate = 1e-3
max_iters = 2000  # 34 times through the novels
lr_decay_iters = 2000  # equal to max_iters
min_lr = 1e-4  # learning_rate / 10
warmup_iters = 300  # deep networks want a longer one
beta2 = 0.99  # a step sees few tokens
