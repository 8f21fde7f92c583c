# Evaluate OpenAI's gpt2-large (774M parameters) on OpenWebText.
init_from = 'gpt2-large'
eval_only = True
batch_size = 8
eval_iters = 500  # many windows, for a precise estimate
wandb_log = False
