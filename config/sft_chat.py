# Instruction tuning on your own conversations (data/chat/prepare.py), from a model of yours: --init_from=out-my, or from Qwen's or GPT-2's weights.

out_dir = 'out-chat'
eval_interval = 100
eval_iters = 20
log_interval = 10
always_save_checkpoint = False
sample_interval = 100
sample_prompts = ''  # what a user says; several are separated by |; '': the first prompt of the dataset

dataset = 'chat/sft'  # rows of whole conversations, which do not see each other
gradient_accumulation_steps = 4
batch_size = 4
block_size = 1024  # at most the model's context
dropout = 0.1

learning_rate = 2e-5  # for weights of some hundred million parameters; a small model of yours wants ten to fifty times as much
min_lr = 0.0
max_iters = 500  # two or three times through the conversations: train.py says how often that is
lr_decay_iters = -1
warmup_iters = 20
weight_decay = 0.0
