"""
Train a GPT: on a CPU, on one GPU, or on many (several machines: docs/operations.md).

    python train.py config/train_shakespeare_char.py                            # whatever this machine has
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py      # 8 GPUs of one machine
"""
import core.startup  # noqa: F401  first: it catches Ctrl-C and missing packages in the imports below

import gc
import importlib
import math
import os
import signal
import uuid

import torch

from core.device import catch_signals, reseed, setup, to_device, try_compile
from core.device_check import check_device
from core.distributed import average_gradients, check_same_on_all_ranks, full_tensor, shard, shutdown, sum_on_device
from core.estimates import check_memory, warn_if_slow
from core.files import find
from core.text.dataset import fingerprint, open_dataset
from core.training import plan, progress, reference_runs, run_folder, settings
from core.training.averaging import Average
from core.training.budget import Budget
from core.training.dry_run import MICRO_BATCHES, DryRun
from core.training.evaluation import evaluate
from core.training.log import Log
from core.training.optimizer import configure_optimizer, step_unless, warm_up_momentum
from core.training.pipeline import Unread, load_ahead, pin
from core.training.samples import encode_prompts, show_batch, show_samples
from core.training.saver import Saver, save_weights
from core.weights.checkpoint import best_loss, load_model, new_model
from core.weights.lora import set_up_lora, trained_weights
from core.weights.vocabulary import fit_vocabulary, padded_vocab_size
from model import GPTConfig

# ---------------------------------------------------------------------------------------------------------------------
# The defaults train GPT-2 (124M) on OpenWebText
# I/O
out_dir = 'out'  # folder of the checkpoints ckpt.pt (last) and best.pt, of log.csv, and of weights.pt at the end
eval_interval = 2000  # evaluate and save every so many steps
log_interval = 1  # print and log every so many steps, and after ten seconds
eval_iters = 200  # evaluate on this many batches per split, evenly spaced; -1: on all of the validation split
eval_only = False  # evaluate once, then stop
dry_run = False  # print the memory, speed and hours that the run would take, from a few steps; write nothing
always_save_checkpoint = True  # sample.py uses the last checkpoint, ckpt.pt; False: best.pt (best validation loss)
init_from = 'scratch'  # 'scratch', 'resume', 'auto' (resume if possible), 'gpt2*', a checkpoint, a run or a hub model
seed = 1337  # of the weights, the batches and dropout
# samples, printed and kept in out_dir/samples.jsonl
sample_interval = 0  # print samples, and once a training row, every so many steps; 0: never
sample_prompts = '\n'  # prompts, separated by |; for chat models what the user says; '': the dataset's first prompt
sample_tokens = 100  # maximum number of tokens in a sample
# checkpoints, beside those at evaluations
save_interval = 0  # a crash loses at most so many steps: saves every half of it; 0: do not count steps
save_minutes = 10.0  # save when this many minutes have passed since the last checkpoint; 0: ignore the clock
keep_last = 1  # keep this many earlier checkpoints, ckpt_STEP.pt, in case ckpt.pt is damaged
background_save = True  # copy the state to CPU memory and write it in a thread; False: training waits
# logging, beside out_dir/log.csv
wandb_log = False  # to wandb; offline where nobody is logged in
wandb_project = 'owt'  # wandb's project
wandb_run_name = 'gpt2'  # wandb's name of this run
tensorboard_log = False  # to out_dir/tensorboard
# data
objective = 'next_token'  # the loss: the name of a file in objectives/
dataset = 'openwebtext'  # a folder in data/
data_order = 'random'  # or 'epochs' (each token once per epoch) or 'documents' (rows start at documents; some repeat)
gradient_accumulation_steps = 5 * 8  # micro-batches in a step, divided among all processes
batch_size = 12  # rows in a micro-batch; a step has batch_size * gradient_accumulation_steps rows in all
block_size = 1024  # tokens in a row: the context
short_rows = 0.0  # cut the rows in two during this first fraction of the steps: a model learns short contexts first
# model
n_layer = 12  # layers
n_head = 12  # attention heads in a layer; 0: heads of 64 channels
n_embd = 768  # width; 0: 64 * n_layer, and learning_rate and min_lr are multiplied by (768 / n_embd)**0.5
dropout = 0.0  # for pretraining 0 is good, for fine-tuning try 0.1 and more
bias = False  # biases in LayerNorm and Linear layers; without them it is a bit better and faster
# The defaults are GPT-2 style. Qwen3 style learns faster:
# rope_theta = 10000.0, norm = 'rmsnorm', activation = 'swiglu', qk_norm = True
rope_theta = 0.0  # rotary positions (RoPE) with frequencies of this base; 0: learned positions
norm = 'layernorm'  # or 'rmsnorm'
activation = 'gelu'  # inside the MLP: 'gelu' (exact), 'gelu_tanh', or 'swiglu', which has a gate
qk_norm = False  # normalise the queries and keys of each head: attention stays calm at high learning rates
tied = True  # share one matrix between the token embedding and the output head
n_kv_head = 0  # grouped-query attention (GQA): heads of keys and values, a divisor of n_head; 0: as many as n_head
head_size = 0  # channels of a head; 0: n_embd / n_head
n_inner = 0  # width inside the MLP; 0: 4 * n_embd, with a gate 8/3 * n_embd
window = 0  # sliding window: a token attends to itself and the window - 1 tokens before it; 0: to all before it
window_pattern = 'SSSL'  # layers with that window (S) and without (L), repeated over the layers
gradient_checkpointing = False  # True: less memory for activations, a third more time
parallel = 'ddp'  # each process has the full model; 'fsdp': shards, for models larger than one GPU
# optimizer
optimizer = 'adamw'  # or, for the matrices of the blocks, 'muon', or 'normuon': these need fewer steps
learning_rate = 6e-4  # maximum learning rate
muon_lr = 0.02  # maximum learning rate of the matrices that Muon or NorMuon updates
max_iters = 600000  # steps in all; 0: evaluate and save; -1: see 20 tokens per parameter (Hoffmann et al. 2022)
epochs = 0.0  # passes over the training data, instead of max_iters and lr_decay_iters; 0: those count
minutes = 0.0  # train for so many minutes, the start and the saving included, instead of max_iters; 0: that counts
auto = False  # with minutes: choose network, context, batch and regularisation, too (config/auto.py)
weight_decay = 1e-1  # of matrices and embeddings
beta1 = 0.9  # AdamW's, for the mean of the gradient
beta2 = 0.95  # AdamW's, for its square; 0.99 where a step sees few tokens
grad_clip = 1.0  # clip the gradient's norm at this value; 0: do not
skip_nonfinite = 0  # skip this many steps with a non-finite loss or gradient, then stop
ema = 0.0  # also keep averaged weights, whose mean age is this fraction of the steps so far, e.g. 0.1; 0: do not
# learning rate
decay_lr = True  # warm up, then decay; False: constant
schedule = 'cosine'  # 'cosine', or 'wsd': warm-up, stable, then a linear decay
cooldown = 0.4  # wsd decays during this last fraction of lr_decay_iters
warmup_iters = 2000  # steps of warm-up
lr_decay_iters = 600000  # step at which min_lr is reached; about max_iters (Hoffmann et al. 2022); -1: max_iters
min_lr = 6e-5  # about learning_rate / 10; muon_lr decays by the same ratio
# system
backend = 'auto'  # of torch.distributed: nccl on CUDA, else gloo
device = 'auto'  # cuda, else mps, else cpu; or a name, e.g. 'cpu', 'cuda:1'
dtype = 'auto'  # bfloat16 if the hardware is fast at it, else float16 on CUDA, float32 elsewhere; or a name
compile = True  # use torch.compile: slower to start, then faster; falls back to eager with a warning
# ---------------------------------------------------------------------------------------------------------------------
EXTRA_SETTINGS = ('core.weights.lora',)  # modules whose settings are settings of this script too
config, config_given = {}, {}  # filled by the next line: all settings; those of the command line alone
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())

settings.check_settings(config, config_given)
training = not (eval_only or dry_run)
out_dir = find(out_dir) if init_from in ('resume', 'auto') else os.path.expanduser(out_dir)
if training:
    run_folder.check_writable(out_dir)

# --- 1. device and precision
env = setup(device, dtype, backend, seed, training=True)  # from here on only rank 0 prints
env.sharded = settings.is_sharded(parallel, env)
check_device(env)

# --- 2. objective, data and this rank's share of a step
objective_module = importlib.import_module(f'objectives.{objective}')
data = open_dataset(dataset)
data_hash = fingerprint(data)
start_from, launch = run_folder.resolve_init_from(init_from, out_dir, env)  # 'auto' becomes 'resume' or 'scratch'
if auto:
    plan.choose_settings(globals(), start_from, data, env)
n_embd = n_embd or 64 * n_layer  # nanochat's rule: depth determines width, heads and learning rate
n_head = n_head or max(1, n_embd // (head_size or 64))
settings.check_heads(n_embd, n_head, n_kv_head, head_size, rope_theta, derived=config['n_head'] == 0)
total_rows = batch_size * gradient_accumulation_steps
micro_steps, micro_rows = settings.split_rows(batch_size, gradient_accumulation_steps, env.world_size)
rows = (min(micro_steps, MICRO_BATCHES) if dry_run else micro_steps) * micro_rows  # of this rank

# --- 3. model: new, resumed, or from the weights of another run, a GPT-2, Llama or Qwen3
resuming = start_from == 'resume'
checkpoint = {}
checkpoint_path = None
weights_name = start_from  # for messages
weights_source = {}  # where the weights' tokenizer is found
if start_from == 'scratch':
    architecture = {key: globals()[key] for key in settings.ARCHITECTURE}
    model_config = GPTConfig(vocab_size=padded_vocab_size(data.vocab_size), dropout=dropout, **architecture)
    model = new_model(model_config, micro_rows, block_size, gradient_checkpointing, env, ema)
elif resuming:
    if training and env.master and os.path.isdir(out_dir):
        lock = run_folder.lock_run_folder(out_dir)  # this name keeps the lock until the process ends
    model, checkpoint, checkpoint_path = run_folder.load_to_resume(out_dir, env.device, dropout)
    weights_name = checkpoint_path
    weights_source = checkpoint
else:
    model, weights_source = load_model(start_from, dropout=dropout)
    model.crop_block_size(settings.fit_block_size(block_size, model, start_from, config_given))
iter_num = checkpoint.get('iter_num', 0)
best_val_loss = float(checkpoint.get('best_val_loss', math.inf))
measured = checkpoint.get('measured', {})  # the last evaluation
skipped = checkpoint.get('skipped', 0)  # steps with a loss or gradient that was not finite
hub = weights_source.get('hub', '')  # 'repo@commit' of the Hugging Face model that the weights came from at first
run_id = checkpoint.get('run_id') or uuid.uuid4().hex[:8]
model.gradient_checkpointing = gradient_checkpointing
block_size = model.config.block_size
if start_from != 'scratch':
    settings.check_against_checkpoint(model, weights_name, config, config_given)

# --- 4. settings that follow from the model
width_factor = (768 / model.config.n_embd)**0.5 if config['n_embd'] == 0 else 1.0  # Muon's is the same at any width
learning_rate *= width_factor
min_lr *= width_factor
tokens_per_iter = total_rows * block_size
epoch_rows = settings.count_rows(data, objective_module, block_size)
max_iters, lr_decay_iters = settings.run_length(config, config_given, model, tokens_per_iter, epoch_rows / total_rows)
config.update({key: getattr(model.config, key) for key in settings.ARCHITECTURE})  # save the values that are used
config.update(learning_rate=learning_rate, min_lr=min_lr, max_iters=max_iters, lr_decay_iters=lr_decay_iters)
budget = Budget(config, config_given, checkpoint, env)  # of minutes
max_iters, lr_decay_iters, warmup_iters, eval_interval = budget.schedule()

# --- 5. vocabulary, LoRA, and what must agree with the checkpoint and between ranks
settings.check_data(data, dataset, data_order, block_size, short_rows)
base_vocab_size = fit_vocabulary(model, weights_source, data, weights_name)
config.update(set_up_lora(model, weights_name, base_vocab_size, resuming, config, config_given, env.device))
if start_from != 'scratch' and not eval_only:
    check_memory(model, micro_rows, block_size, env, ema)
if training:
    settings.check_same_data(checkpoint, checkpoint_path, dataset, data_hash)
data.vocab_size = min(data.vocab_size, model.config.vocab_size)  # reading a larger id exits
check_same_on_all_ranks({
    f'dataset={dataset}': data_hash,
    f'out_dir={out_dir}': f'{checkpoint_path} {iter_num}',
    'the settings': f'{env.dtype} {config}',
}, env)
if resuming:
    print(settings.describe_changes(checkpoint, config, env.world_size, total_rows))

# --- 6. objective, optimizer, run folder
model = model.to('cpu' if env.sharded else env.device)  # shards move to the device below
context = objective_module.start(model, data, env, config, checkpoint.get('objective', {}))
prompts = encode_prompts(sample_prompts, data, model, env) if sample_interval and training else []
if training:  # exits before anything is written if the data cannot be drawn from
    objective_module.draw(data, total_rows, block_size, seed, iter_num, data_order)
if env.sharded:
    model = shard(model, env)
scaler = torch.amp.GradScaler(env.device_type, enabled=env.dtype == 'float16')  # does nothing unless enabled
average = Average(model, ema, checkpoint.get('ema'))  # of the weights; empty if ema is 0
opt = None
if not eval_only:
    opt = configure_optimizer(model, optimizer, weight_decay, learning_rate, (beta1, beta2), muon_lr)
    if resuming:
        run_folder.load_optimizer_state(opt, scaler, checkpoint, checkpoint_path, optimizer)
    if env.master and not dry_run:
        lock = run_folder.open_run_folder(
            out_dir, opt, average, keep_last, resuming,
            run_id=run_id, launch=launch, data=data_hash, config=config)
checkpoint = weights_source = None  # free the memory

# --- 7. compile, and average gradients over the ranks
if compile and not eval_only:
    shapes = [(micro_rows, block_size)] + [(2 * micro_rows, block_size // 2)] * (short_rows > 0)
    network = try_compile(model, shapes, env, bool(data.kind), hasattr(objective_module.loss, 'logits'))
else:
    network = average_gradients(model, env)  # does nothing unless there are several ranks with full models
# `network` computes the training loss; evaluation and samples use `model`


def get_lr(it):
    """Return the learning rate of step `it`: linear warm-up, then cosine or wsd (Hu et al. 2024) decay to min_lr."""
    if not decay_lr:
        return learning_rate
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    if schedule == 'wsd':  # constant, then linear
        coeff = min(1.0, (lr_decay_iters - it) / max(1, cooldown * lr_decay_iters))
    else:  # cosine
        decay_ratio = (it - warmup_iters) / max(1, lr_decay_iters - warmup_iters)
        coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
    return min_lr + coeff * (learning_rate - min_lr)


def load_batches(step):
    """
    Return this rank's micro-batches of a step. They depend only on (seed, step), so a resumed run repeats exactly what
    an uninterrupted one would have done, and a step is the same on any number of ranks.
    """
    starts = objective_module.draw(data, total_rows, block_size, seed, step, data_order)
    batches = [objective_module.load(data, 'train', starts[i:i + micro_rows], block_size, context)
               for i in range(env.rank * rows, (env.rank + 1) * rows, micro_rows)]
    if step < short_rows * max_iters and not dry_run:  # which shall tell what whole rows need
        batches = [[x.view(-1, block_size // 2) for x in batch] for batch in batches]
    return [pin(batch, env) for batch in batches]


def state():
    """Return the contents of a checkpoint. Random state is a function of (seed, step), so it is not saved."""
    return {
        'model': trained_weights(model),
        'ema': average.state(),
        'model_args': vars(model.config),
        'lora': model.lora,
        'optimizer': opt.state_dict(),
        'scaler': scaler.state_dict(),
        'iter_num': iter_num,
        'best_val_loss': best_val_loss,
        'measured': measured,
        'skipped': skipped,
        'config': config,
        'tokenizer': data.tokenizer.json if data.tokenizer else '',
        'run_id': run_id,
        'hub': hub,
        'data': data_hash,
        'world_size': env.world_size,
        'objective': objective_module.state(context),
        'budget': budget.state(),
    }


# --- 8. the training loop
print(progress.describe_run(env, data, micro_steps, micro_rows, block_size, total_rows,
                            None if minutes or not training else max_iters, epoch_rows))
log = Log(out_dir, objective_module.MEASURES, iter_num, config, run_id) if training and env.master else None
saver = Saver(out_dir, env, log, keep_last, background_save, resumed_from=checkpoint_path, step=iter_num)
signals = catch_signals(not training)
if not eval_only:
    saver.reserve(state())
    if not minutes:
        warn_if_slow(model.flops_per_token() * tokens_per_iter * (max_iters - iter_num), env)
rehearsal = DryRun(model, data, config, env, micro_rows, micro_steps, iter_num) if dry_run else None
first_iter = iter_num
eval_windows = eval_iters * batch_size if eval_iters > 0 else -1
eval_windows = budget.start(
    iter_num, eval_windows, objective_module, model, average, data, context, micro_rows, block_size)
# targets and tokens of a step differ between ranks, unless the rows of a text are drawn at random
same_divisor = env.world_size == 1 or (objective == 'next_token' and not data.kind and data_order == 'random')
ahead = env.device_type != 'cpu' and getattr(objective_module.load, 'ahead', True)  # on a CPU all cores compute
steps = load_ahead(load_batches, iter_num, ahead)
unread = Unread(env)  # the numbers of steps that a GPU may still be computing
gc.freeze()  # Python's garbage collector need not look at all this again
report = progress.StepReports(iter_num, log_interval, short_rows, log, env, model)
while True:
    last = iter_num >= max_iters
    if (iter_num % eval_interval == 0 or last or eval_only) and not dry_run:
        numbers = evaluate(objective_module, model, average, data, context, eval_windows, micro_rows, block_size, env)
        measured = {'iter': iter_num, **numbers}
        print(progress.describe_evaluation(iter_num, numbers), flush=True)
        if log:
            log(iter_num, numbers)
        best = best_loss(numbers) < best_val_loss
        # initial weights are saved only if they are the final ones, too
        if training and (iter_num > first_iter or (best if resuming else last)):
            if best:
                best_val_loss = best_loss(numbers)
            saver.save(state(), best)
        budget.evaluated(iter_num, saver)
        report.clock.restart(iter_num)
    if prompts and env.master and (iter_num % sample_interval == 0 or iter_num == first_iter or last):
        show_samples(model, data, prompts, sample_tokens, iter_num, out_dir, env)
        report.clock.restart(iter_num)
    if last or eval_only:
        break

    batches = next(steps)
    if dropout or config['lora_dropout']:
        reseed((seed * 1_000_003 + iter_num) * 1009 + 1 + env.rank, env)
    if prompts and iter_num == first_iter:
        show_batch(batches[0], data.tokenizer)
    divisor = sum(int(objective_module.divisor(batch)) for batch in batches)
    tokens = sum(batch[0].numel() for batch in batches)
    if same_divisor:
        divisor, tokens = max(1, divisor * env.world_size), tokens * env.world_size  # of the step, over all ranks
    else:
        divisor, tokens = sum_on_device([divisor, tokens], env).clamp(min=1)  # a step without targets has loss 0
    for group in opt.param_groups:
        group['lr'] = get_lr(iter_num) * group.get('lr_scale', 1.0)
    warm_up_momentum(opt, iter_num)

    total_loss = 0.0
    for i, batch in enumerate(batches):
        if env.ddp and not env.sharded:
            network.require_backward_grad_sync = i == len(batches) - 1  # average gradients once a step
        with env.ctx():
            loss = objective_module.loss(network, to_device(batch, env))
        scaler.scale(loss * (env.world_size / divisor)).backward()  # DDP averages over ranks, and we want the sum
        total_loss += loss.detach()
    scaler.unscale_(opt)
    grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf))
    save_due = env.master and saver.minutes_passed(save_minutes)
    # over all ranks: the loss (sum), a signal (any rank), a save that is due (rank 0)
    loss, any_signal, any_save = sum_on_device([total_loss / divisor, signals.signal or 0, save_due], env)
    step_unless(~(loss.isfinite() & grad_norm.isfinite()), opt)
    average.update(iter_num)
    scaler.update()
    opt.zero_grad()
    if rehearsal and rehearsal.step(tokens):
        break
    line_due = report.is_line_due(iter_num)
    unread.add((iter_num, line_due, opt.param_groups[0]['lr']), [loss, grad_norm, tokens, any_signal, any_save],
               needed=env.ddp or line_due or report.status.is_due())
    iter_num += 1
    max_iters, lr_decay_iters, warmup_iters, eval_interval = budget.replan(iter_num)

    evaluates = iter_num % eval_interval == 0 or iter_num >= max_iters
    saves = save_interval and iter_num % max(1, save_interval // 2) == 0  # so a crash loses at most save_interval
    samples = prompts and iter_num % sample_interval == 0
    asked = not env.ddp and (signals.signal or save_due)  # several ranks agree by any_signal and any_save, read below
    stops = False
    while unread.is_ready(evaluates or saves or samples or asked or stops):
        step, line_due, lr, lossf, grad_norm, tokens, any_signal, any_save = unread.read()
        stops, saves = stops or any_signal, saves or any_save
        if not math.isfinite(lossf) or not (scaler.is_enabled() or math.isfinite(grad_norm)):  # fp16 may overflow
            skipped = saver.leave_out(step, lossf, grad_norm, skipped, skip_nonfinite, resuming)
        numbers = {'loss': lossf, 'lr': lr, 'grad_norm': grad_norm}
        report(step, line_due, numbers, tokens, max_iters)
    if training and (stops or (saves and not evaluates)):
        saver.save(state(), wait=save_interval == 1)
    if stops:
        option = '' if init_from in ('resume', 'auto') else ' with --init_from=resume'
        print(f'stopping at step {iter_num}; to go on: the same command{option}')
        break

# --- 9. the end
budget.finish(iter_num)
saver.wait(last=True)
if log:
    log.close()
if training and env.master and iter_num >= max_iters:
    save_weights(out_dir)
if saver.saved:
    reference_runs.print_comparison(out_dir)
    script = '' if model.config.reward else 'chat.py' if data.kind else 'sample.py'
    print(progress.describe_end(iter_num - first_iter, report.clock.elapsed(), skipped, saver, best_val_loss, script))
shutdown(env, 130 if signals.signal == signal.SIGINT else 0)
