# A small GPT on Shakespeare's plays, by character: a few minutes on a GPU. On a CPU use
# config/train_shakespeare_char_cpu.py.

out_dir = 'out-shakespeare-char'
eval_interval = 250  # often, because it will overfit
eval_iters = 200
log_interval = 10  # do not print too often

always_save_checkpoint = False  # it will overfit: sample from the best checkpoint, not the last

wandb_log = False  # --wandb_log=True on the command line if you like
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256  # context of up to 256 characters

# baby GPT
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2  # a million characters are few for 10 million parameters

learning_rate = 1e-3  # baby networks train well at a higher rate
max_iters = 5000
lr_decay_iters = 5000  # usually equal to max_iters
min_lr = 1e-4  # usually learning_rate / 10
beta2 = 0.99  # higher, because a step sees few tokens

warmup_iters = 100  # not strictly needed
