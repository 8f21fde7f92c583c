# Tang poems, second stage: instruction tuning, write a poem for a title.
# Starts from the pretrained model, --init_from=out-poems/best.pt.

init_from = 'out-poems/best.pt'
out_dir = 'out-poems-sft'
eval_interval = 150
eval_iters = 20
log_interval = 50
always_save_checkpoint = False
sample_interval = 150
sample_prompts = '春夜喜雨'

dataset = 'tang_poems/sft'  # several conversations per row; attention does not cross them
gradient_accumulation_steps = 1
batch_size = 16
block_size = 256
dropout = 0.1

optimizer = 'muon'
learning_rate = 3e-3  # a third of the peak rate of pretraining
muon_lr = 0.006
min_lr = 0.0
max_iters = 600  # a little more than two epochs of the 12,813 conversations
lr_decay_iters = -1  # equal to max_iters
warmup_iters = 30
schedule = 'wsd'
cooldown = 0.8
beta2 = 0.99
