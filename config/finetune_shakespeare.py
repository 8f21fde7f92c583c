# Fine-tune a GPT-2 on Shakespeare's plays, with GPT-2's tokenizer.

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = 'shakespeare'
wandb_run_name = 'ft'

dataset = 'shakespeare'
init_from = 'gpt2-xl'  # the largest GPT-2; on a smaller GPU: --init_from=gpt2

always_save_checkpoint = False  # save only when the validation loss improves

# 1 row * 32 micro-batches * 1024 tokens = 32,768 tokens a step; the text has 301,966, so an epoch is about 9.2 steps
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

# constant: 20 steps are too few for a schedule
learning_rate = 3e-5
decay_lr = False
