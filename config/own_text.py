# Your own text, prepared by data/any_text/prepare.py: a small network of Qwen3's kind and Muon, for a CPU or a GPU, for
# those who set things by hand. config/auto.py sets them by the text, the machine and the minutes that there are.
#
#     python train.py config/own_text.py --dataset=my --out_dir=out-my
#
# How long to train and how large a network depends on the text:
#
#     training text                       add                                                     on two CPU cores
#     each id 1,000 times on average,
#       but below 300,000 tokens          --n_layer=4 --n_head=4 --n_embd=128 --dropout=0.2 --epochs=10      3 minutes
#       below 2 million tokens            --epochs=3                                              up to 12 minutes
#     rarer ids, as in Chinese or a BBPE,
#       below 3 million tokens            --epochs=2: a third pass overfits                       up to 15 minutes
#     more than that                      nothing: 3,000 steps read 6 million tokens              12 to 15 minutes
#     above 20 million tokens             --max_iters=20000; with a GPU rather config/train_novels.py        an hour
#
# Vocabulary: characters (--tokenizer=char) learn best where they suffice, from some hundred thousand of them on. A BBPE
# can write any character, which a chat needs; give it about one id for 100 bytes of text, at most 8,192.

out_dir = 'out-own-text'
eval_interval = 250
eval_iters = 10  # 80 rows: an evaluation takes a second
log_interval = 50
always_save_checkpoint = False  # sample from the best checkpoint, not the last

data_order = 'epochs'  # every token equally often
gradient_accumulation_steps = 1
batch_size = 8  # small, so that some minutes are enough for many steps
block_size = 256  # tokens, a paragraph

# 3 million parameters, and those of the vocabulary
n_layer = 6
n_head = 6
n_embd = 192
dropout = 0.0  # two or three passes are few enough
rope_theta = 10000.0
norm = 'rmsnorm'
activation = 'swiglu'
qk_norm = True
tied = False  # a separate head learns faster

optimizer = 'muon'
learning_rate = 3e-2  # of embeddings and norm gains
muon_lr = 0.02
min_lr = 0.0
max_iters = 3000
lr_decay_iters = -1  # equal to max_iters
warmup_iters = 0
schedule = 'wsd'
cooldown = 1.0  # decay from the first step on: shorter decays end at a higher loss
beta2 = 0.95

compile = True  # 1.6 times as fast; the first start takes a quarter of a minute longer, later ones five seconds
