# Fine-tune a GPT-2 on Shakespeare's plays, in GPT-2's own tokens.

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = 'shakespeare'
wandb_run_name = 'ft'

dataset = 'shakespeare'
init_from = 'gpt2-xl'  # the largest GPT-2; on less than a data-centre GPU: --init_from=gpt2

always_save_checkpoint = False  # only the best validation loss counts

# 1 row * 32 micro-batches * 1024 tokens = 32,768 tokens a step; the text has 301,966, so an epoch is about 9.2 steps
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

# constant, because 20 steps leave no room for a schedule
learning_rate = 3e-5
decay_lr = False
