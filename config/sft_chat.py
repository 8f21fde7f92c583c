# Instruction tuning on your own conversations (data/chat/readme.md). Start from your model, --init_from=out-my, or from
# Qwen's or GPT-2's weights.

out_dir = 'out-chat'
eval_interval = 100
eval_iters = 20
log_interval = 10
always_save_checkpoint = False
sample_interval = 100
sample_prompts = ''  # messages of a user, separated by |; '': the first prompt of the dataset

dataset = 'chat/sft'  # several conversations per row; attention does not cross them
gradient_accumulation_steps = 4
batch_size = 4
block_size = 1024  # at most the model's context
dropout = 0.1

learning_rate = 2e-5  # for some hundred million parameters; a small model needs 10 to 50 times as much
min_lr = 0.0
max_iters = 500  # or --epochs=3, if there are thousands of conversations; train.py prints how many epochs this is
lr_decay_iters = -1
warmup_iters = 20
weight_decay = 0.0
