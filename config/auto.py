# Your own text, as well as some minutes on this machine allow. Nothing else has to be chosen:
#
#     python train.py config/auto.py --dataset=my --minutes=10 --out_dir=out-my
#
# It times a few steps, chooses network, context, batch, passes, dropout and weight decay, says what and why, and ends
# when the minutes are over. What you add, e.g. --n_layer=4 or --dropout=0.1, stays as you say. The same command with
# --init_from=resume goes on after Ctrl-C, with the rest of the minutes.

out_dir = 'out-auto'
auto = True
minutes = 10.0
eval_iters = -1  # the whole validation text if there is time for it, else as much as there is time for
log_interval = 50
always_save_checkpoint = False  # sample from the best checkpoint, not the last

# Qwen3's network, NorMuon and rows that are short at first learn most in a short time:
# config/speedrun_shakespeare_char.py
rope_theta = 10000.0
norm = 'rmsnorm'
activation = 'swiglu'
qk_norm = True
tied = False  # a separate head learns faster
short_rows = 0.7

optimizer = 'normuon'
learning_rate = 3e-2  # of embeddings and norm gains
muon_lr = 0.02
min_lr = 0.0
warmup_iters = 0
schedule = 'wsd'
cooldown = 1.0  # decay from the first step on: shorter decays end at a higher loss
beta2 = 0.95
