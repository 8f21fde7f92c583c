# Tang poems, the second stage, instruction tuning: a poem for a title. Start from the pretrained model: --init_from=out-poems/best.pt

init_from = 'out-poems/best.pt'
out_dir = 'out-poems-sft'
eval_interval = 150
eval_iters = 20
log_interval = 50
always_save_checkpoint = False
sample_interval = 150
sample_prompts = '春夜喜雨'

dataset = 'tang_poems/sft'  # rows of whole conversations, which do not see each other
gradient_accumulation_steps = 1
batch_size = 16
block_size = 256
dropout = 0.1

optimizer = 'muon'
learning_rate = 3e-3  # a third of that of pretraining, whose last steps went down to 0
muon_lr = 0.006
min_lr = 0.0
max_iters = 600  # a little more than twice through the 12,813 conversations
lr_decay_iters = -1  # equal to max_iters
warmup_iters = 30
schedule = 'wsd'
cooldown = 0.8
beta2 = 0.99
