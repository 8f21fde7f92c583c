# Instruction tuning of a Qwen3 by LoRA, on one small GPU: --init_from=Qwen/Qwen3-0.6B, or a folder.
# With --quantize_base=nf4 (QLoRA) the weights of the layers take a quarter of their size in bfloat16, so larger models
# fit; embedding and head stay float32.
# Conversations: data/chat/prepare.py --tokenizer=qwen2 --name=chat_qwen

out_dir = 'out-lora'
eval_interval = 100
eval_iters = 20
log_interval = 10
always_save_checkpoint = False
sample_interval = 100
sample_prompts = ''  # the first prompt of the dataset

dataset = 'chat_qwen/sft'
gradient_accumulation_steps = 16  # 16 rows a step, one per micro-batch
batch_size = 1
block_size = 1024  # Qwen3 was trained on more, but conversations are cut to this length
dropout = 0.0
gradient_checkpointing = True  # without it, activations take more memory than the weights

lora_rank = 16
lora_alpha = 32.0
lora_dropout = 0.05

learning_rate = 2e-4  # ten times the rate for training all parameters
min_lr = 0.0
max_iters = 500  # choose it for two or three epochs: train.py prints how many epochs this is
lr_decay_iters = -1
warmup_iters = 20
weight_decay = 0.0
