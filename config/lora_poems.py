# Tang poems, instruction tuning by LoRA: write a poem for a title. Trains 6 % of the parameters.
# Starts from the pretrained model, --init_from=out-poems/best.pt.

init_from = 'out-poems/best.pt'
out_dir = 'out-poems-lora'
eval_interval = 150
eval_iters = 20
log_interval = 50
always_save_checkpoint = False
sample_interval = 150
sample_prompts = '春夜喜雨'

dataset = 'tang_poems/sft'
gradient_accumulation_steps = 1
batch_size = 16
block_size = 256
dropout = 0.1

lora_rank = 16
lora_alpha = 32.0

learning_rate = 5e-3
min_lr = 0.0
max_iters = 600  # as in config/sft_poems.py, which trains all parameters
lr_decay_iters = -1  # equal to max_iters
warmup_iters = 30
weight_decay = 0.0
beta2 = 0.99
