"""
Train a GPT: on a CPU, on one GPU, or on many.

    python train.py config/train_shakespeare_char.py                            # whatever this machine has
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py      # 8 GPUs of one machine

On two machines, on the first and on the second (prepend NCCL_IB_DISABLE=1 where there is no InfiniBand):

    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=123.456.123.456 --master_port=1234 train.py
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=1 --master_addr=123.456.123.456 --master_port=1234 train.py
"""
import datetime
import importlib
import math
import os
import signal
import sys
import time
import uuid

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

from core.device import catch_signals, check_memory, reseed, setup, try_compile, warn_if_slow
from core.distributed import all_reduce, check_same_on_all_ranks, full_tensor, shard, shutdown
from core.files import find
from core.text.dataset import fingerprint, open_dataset
from core.training.log import Log, spike_detector
from core.training.optimizer import OPTIMIZERS, configure_optimizer
from core.training.run_folder import check_disk, has_checkpoint, lock_run_folder, resolve_init_from, write_run_json
from core.training.samples import encode_prompts, show_batch, show_samples
from core.training.saver import Saver, save_weights
from core.weights.checkpoint import build_model, describe, load_last, load_model
from core.weights.lora import add_lora, check_lora, describe_adapters, trained_weights, used_settings
from core.weights.vocabulary import fit_vocabulary, padded_vocab_size
from model import ACTIVATIONS, GPT, NORMS, GPTConfig

# ---------------------------------------------------------------------------------------------------------------------------------------
# The defaults train GPT-2 (124M) on OpenWebText
# I/O
out_dir = 'out'  # folder of the checkpoints ckpt.pt (last) and best.pt, of log.csv, and of weights.pt at the end
eval_interval = 2000  # evaluate and save every so many steps
log_interval = 1  # print and log every so many steps
eval_iters = 200  # evaluate on eval_iters * batch_size evenly spaced windows of each split; -1: on all of the validation split, and as much of the other
eval_only = False  # evaluate once, then stop
always_save_checkpoint = True  # sample from the last checkpoint; False: from the one with the best validation loss
init_from = 'scratch'  # 'scratch', 'resume' (the run in out_dir), 'auto' (resume if it has saved, else from scratch), 'gpt2' (-medium, -large, -xl), a checkpoint, a run's folder, or a GPT-2, Llama or Qwen3 (folder or hub)
seed = 1337  # of the weights, the batches and dropout
# samples, printed and kept in out_dir/samples.jsonl
sample_interval = 0  # write something every so many steps, and show what is learned from; 0: never
sample_prompts = '\n'  # texts to continue, or what a user says to a network that answers ('': the first prompt of the dataset); several are separated by |
sample_tokens = 100  # length of each at most
# checkpoints, beside those at evaluations
save_interval = 0  # a crash loses at most so many steps: one is begun at every half of it; 0: no more than evaluations and save_minutes ask for
save_minutes = 10.0  # save when so many minutes have gone by since the last one; 0: do not look at the clock
keep_last = 1  # earlier ones that are kept as ckpt_STEP.pt; should ckpt.pt be damaged, the newest of them is resumed
background_save = True  # write them beside training, for which they are copied to this machine's memory; False: training waits
# logging, beside out_dir/log.csv
wandb_log = False  # to wandb; offline where nobody is logged in
wandb_project = 'owt'  # wandb's project
wandb_run_name = 'gpt2'  # wandb's name of this run
tensorboard_log = False  # to out_dir/tensorboard
# data
objective = 'next_token'  # what a step minimises: a file in objectives/
dataset = 'openwebtext'  # a folder in data/
data_order = 'random'  # rows from anywhere, as nanoGPT; 'epochs': every token once before any comes again, which learns more from a small text; 'documents': every document whole, in rows that begin with one
gradient_accumulation_steps = 5 * 8  # micro-batches in a step, shared out over the processes
batch_size = 12  # rows in a micro-batch; a step sees batch_size * gradient_accumulation_steps rows on any number of processes
block_size = 1024  # tokens in a row: the context
# model
n_layer = 12  # layers
n_head = 12  # attention heads in a layer; 0: heads of 64 channels
n_embd = 768  # width; 0: 64 * n_layer, and learning_rate is taken for a width of 768 and multiplied by (768 / n_embd)**0.5
dropout = 0.0  # for pretraining 0 is good, for fine-tuning try 0.1 and more
bias = False  # biases in LayerNorm and Linear layers; without them it is a bit better and faster
# GPT-2 style by these defaults; Qwen3 style, which learns faster, by rope_theta = 10000.0, norm = 'rmsnorm', activation = 'swiglu', qk_norm = True
rope_theta = 0.0  # rotary positions (RoPE) with frequencies of this base; 0: learned positions
norm = 'layernorm'  # or 'rmsnorm'
activation = 'gelu'  # inside the MLP: 'gelu' (exact), 'gelu_tanh', or 'swiglu', which has a gate
qk_norm = False  # normalise the queries and keys of each head: attention stays calm at high learning rates
tied = True  # the embedding of tokens is the output head as well; False: each has its own matrix
n_kv_head = 0  # grouped-query attention (GQA): heads of keys and values, a divisor of n_head; 0: as many as n_head
head_size = 0  # channels of a head; 0: n_embd / n_head
n_inner = 0  # width inside the MLP; 0: 4 * n_embd, for swiglu 8/3 * n_embd
gradient_checkpointing = False  # True: less memory for activations, a third more time
parallel = 'ddp'  # of several processes each has all of the network; 'fsdp': a part of it, for networks larger than one GPU
# optimizer
optimizer = 'adamw'  # 'adamw', or 'muon': Muon for the matrices of the blocks, AdamW for the rest; needs fewer steps
learning_rate = 6e-4  # the highest it gets
muon_lr = 0.02  # likewise, of what Muon updates
max_iters = 600000  # steps in all; -1: until 20 tokens per parameter are seen (Hoffmann et al. 2022)
weight_decay = 1e-1  # of matrices and embeddings
beta1 = 0.9  # AdamW's, for the mean of the gradient
beta2 = 0.95  # AdamW's, for its square; 0.99 where a step sees few tokens
grad_clip = 1.0  # clip the gradient's norm at this value; 0: do not
skip_nonfinite = 0  # leave out so many steps whose loss or gradient is not finite; after them, stop
# learning rate
decay_lr = True  # warm up, then decay; False: constant
schedule = 'cosine'  # 'cosine', or 'wsd': warm-up, stable, then a linear decay
cooldown = 0.4  # the share of lr_decay_iters that wsd decays in
warmup_iters = 2000  # steps of warm-up
lr_decay_iters = 600000  # the step at which it has decayed to min_lr; about max_iters (Hoffmann et al. 2022); -1: max_iters
min_lr = 6e-5  # about learning_rate / 10; muon_lr decays by the same ratio
# system
backend = 'auto'  # of torch.distributed: nccl on CUDA, else gloo
device = 'auto'  # cuda, then mps, then cpu, whichever there is; or say which, e.g. 'cpu', 'cuda:1'
dtype = 'auto'  # bfloat16 where the hardware multiplies it, else float16 on CUDA and float32 elsewhere; or say which
compile = True  # torch.compile: takes a minute to start, then runs faster; falls back where it cannot work
# ---------------------------------------------------------------------------------------------------------------------------------------
_settings = 'core.weights.lora'  # LoRA's, which are settings of this script, too
config, config_given = {}, {}  # filled by the next line: every setting with its value, and what the command line set
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())

for key in ('batch_size', 'gradient_accumulation_steps', 'block_size', 'n_layer', 'eval_interval', 'log_interval'):
    if config[key] < 1:
        sys.exit(f'{key}={config[key]}: expected at least 1')
for key in ('save_interval', 'save_minutes', 'keep_last', 'skip_nonfinite', 'learning_rate', 'muon_lr', 'min_lr', 'weight_decay', 'grad_clip', 'warmup_iters', 'n_head', 'n_embd', 'n_kv_head', 'head_size', 'n_inner', 'rope_theta'):
    if config[key] < 0:
        sys.exit(f'{key}={config[key]}: expected at least 0')
for key, choices in (('data_order', ('random', 'epochs', 'documents')), ('parallel', ('ddp', 'fsdp')), ('optimizer', OPTIMIZERS), ('schedule', ('cosine', 'wsd')), ('norm', NORMS), ('activation', ACTIVATIONS)):
    if config[key] not in choices:
        sys.exit(f'{key}={config[key]}: expected {" or ".join(choices)}')
if not 0 <= seed < 2**32:
    sys.exit(f'seed={seed}: expected at least 0 and less than 2**32')
if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
    sys.exit(f'beta1={beta1}, beta2={beta2}: expected numbers in [0, 1)')
if optimizer == 'muon' and learning_rate == 0 < muon_lr:
    sys.exit(f'learning_rate=0: muon_lr={muon_lr} rises and falls with it, so give it a value above 0, however small')
n_embd = n_embd or 64 * n_layer  # depth alone: width, heads and learning rate follow (nanochat's rule)
n_head = n_head or max(1, n_embd // (head_size or 64))
if not head_size and n_embd % n_head:
    sys.exit(f'n_embd={n_embd} is not divisible by n_head={n_head}' + ', the heads of about 64 channels that n_head=0 stands for' * (config['n_head'] == 0))
if n_head % (n_kv_head or n_head):
    sys.exit(f'n_head={n_head} is not divisible by n_kv_head={n_kv_head}: each head of keys and values serves as many heads of queries')
if rope_theta and (head_size or n_embd // n_head) % 2:
    sys.exit(f'rope_theta={rope_theta} rotates pairs of channels, and a head has {head_size or n_embd // n_head}; choose n_embd / n_head, or head_size, even')
if max_iters < -1 or lr_decay_iters < -1 or not 0 <= cooldown <= 1:
    sys.exit(f'max_iters={max_iters}, lr_decay_iters={lr_decay_iters}, cooldown={cooldown}: expected at least 0 or -1 (see --help), and cooldown in [0, 1]')
if eval_iters == 0 or not 0 <= dropout < 1:
    sys.exit(f'eval_iters={eval_iters}, dropout={dropout}: expected eval_iters above 0 or -1 (all), and dropout in [0, 1)')

# --- device, processes, and this process's share of a step
run = setup(device, dtype, backend, seed, training=True)  # from here on only the first process prints
run.sharded = parallel == 'fsdp' and run.world_size > 1
if run.sharded and run.dtype == 'float16':
    sys.exit('parallel=fsdp: the loss is not scaled for float16 there; use --dtype=bfloat16 or float32')
total_rows = batch_size * gradient_accumulation_steps
if total_rows % run.world_size:
    sys.exit(f'batch_size={batch_size} * gradient_accumulation_steps={gradient_accumulation_steps} = {total_rows} rows '
             f'cannot be shared out evenly over {run.world_size} processes; change one of the three')
rows = total_rows // run.world_size
micro_steps = next(n for n in range(-(-rows // batch_size), rows + 1) if rows % n == 0)  # micro-batches of at most batch_size rows
micro_rows = rows // micro_steps

# --- data
task = importlib.import_module(f'objectives.{objective}')
data = open_dataset(dataset)
if data_order != 'random' and len(data.weights) > 1:
    sys.exit(f'data_order={data_order}: {dataset} is a mixture, drawn by weights, so it has no epochs; use --data_order=random')

out_dir = find(out_dir) if init_from in ('resume', 'auto') else os.path.expanduser(out_dir)
init_from, launch = resolve_init_from(init_from, out_dir, run)

# --- model: new, from a checkpoint, or from the weights of a GPT-2, Llama or Qwen3
iter_num, best_val_loss, skipped, measured, run_id = 0, float('inf'), 0, {}, uuid.uuid4().hex[:8]
checkpoint, path, source, origin = {}, None, {}, init_from
GPT.gradient_checkpointing = gradient_checkpointing
shape = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'rope_theta', 'norm', 'activation', 'qk_norm', 'tied', 'n_kv_head', 'head_size', 'n_inner')
if init_from == 'scratch':
    model_config = GPTConfig(vocab_size=padded_vocab_size(data.vocab_size), dropout=dropout, **{key: globals()[key] for key in shape})
    with torch.device('meta'):
        check_memory(GPT(model_config), micro_rows, block_size, run)
    model = GPT(model_config)
    print(f'new model: {describe(model)}')
elif init_from == 'resume':
    lock = lock_run_folder(out_dir) if os.path.isdir(out_dir) and run.master and not eval_only else None  # nobody changes it from here on
    checkpoint, path = load_last(out_dir)
    missing = [key for key in ('optimizer', 'iter_num', 'best_val_loss') if key not in checkpoint]
    if missing:
        sys.exit(f'{path}: no {", ".join(missing)} in it, so it cannot be resumed; to start from its weights: --init_from={path}')
    model, source, origin = build_model(checkpoint, path, run.device, dropout=dropout), checkpoint, path
    iter_num, best_val_loss = checkpoint['iter_num'], float(checkpoint['best_val_loss'])
    skipped, measured, run_id = checkpoint.get('skipped', 0), checkpoint.get('measured', {}), checkpoint.get('run_id', run_id)
    print(f'resuming {path} at step {iter_num}' + f': {describe(model)}' * (not model.lora))
else:
    model, source = load_model(init_from, dropout=dropout)
    if block_size > model.config.block_size and 'block_size' in config_given:
        sys.exit(f'--block_size={block_size}: {init_from} was trained with a context of {model.config.block_size}; lower it')
    model.crop_block_size(min(block_size, model.config.block_size))
block_size = model.config.block_size
if init_from != 'scratch':
    for key in shape:
        derived = config[key] == 0 and key in ('n_head', 'n_embd', 'n_kv_head', 'head_size', 'n_inner')
        if key in config_given and not derived and config[key] != getattr(model.config, key):
            sys.exit(f'--{key}={config[key]} contradicts {origin}, which has {key}={getattr(model.config, key)}; '
                     'leave it out, or train another network with --init_from=scratch and another --out_dir')
if config['n_embd'] == 0:  # Muon's own rate is the same at any width
    learning_rate, min_lr = (rate * (768 / model.config.n_embd)**0.5 for rate in (learning_rate, min_lr))
tokens_per_iter = total_rows * block_size
if max_iters == -1:
    max_iters = math.ceil(20 * model.num_params() / tokens_per_iter)
if lr_decay_iters == -1:
    lr_decay_iters = max_iters
config.update({key: getattr(model.config, key) for key in shape}, learning_rate=learning_rate, min_lr=min_lr, max_iters=max_iters, lr_decay_iters=lr_decay_iters)  # what is saved is what was used
if data.shortest <= block_size and not data.kind:
    sys.exit(f'block_size={block_size} needs more than {block_size} tokens to train on, and {data.folder} has {data.shortest}; use --block_size={max(data.shortest - 1, 1)} or less')
known = fit_vocabulary(model, source, data, origin)
check_lora(model, origin, bool(path), optimizer, parallel, config_given)
if not path:
    add_lora(model, origin, known, run.device)
config.update(used_settings(model))  # a resumed run keeps the adapters that it has
if model.lora:
    print(describe_adapters(model))
if init_from != 'scratch' and not eval_only:
    check_memory(model, micro_rows, block_size, run)
data_hash = fingerprint(data)
if checkpoint.get('data', data_hash) != data_hash and not eval_only:
    sys.exit(f'dataset={dataset}: its tokens are not those that {path} was trained on so far, so this would be no exact continuation; '
             f'for another dataset: --init_from={path} and another --out_dir')
data.vocab_size = min(data.vocab_size, model.config.vocab_size)  # larger ids are refused when they are met
check_same_on_all_ranks({f'dataset={dataset}': data_hash, f'out_dir={out_dir}': f'{path} {iter_num}', 'the settings': f'{run.dtype} {config}'}, run)
if path:
    before = checkpoint.get('config', {})
    changed = [f'{key} {before[key]} -> {value}' for key, value in config.items() if before.get(key, value) != value and key not in ('init_from', 'out_dir')]
    changed += [f'processes {n} -> {run.world_size}, which share the same {total_rows} rows a step' for n in [checkpoint.get('world_size')] if n not in (None, run.world_size)]
    print('not as before: ' + '; '.join(changed) if changed else 'all settings as before')
    if iter_num >= max_iters and not eval_only:
        print(f'nothing is left to do: {iter_num} steps are done, and max_iters={max_iters}; raise --max_iters to go on')
context = task.start(model.to('cpu' if run.sharded else run.device), data, run, config, checkpoint.get('objective', {}))
prompts = encode_prompts(sample_prompts, data, run) if sample_interval and not eval_only and not model.config.reward else []  # a reward model writes nothing
if not eval_only:
    task.draw(data, total_rows, block_size, seed, iter_num, data_order)  # what cannot be drawn from is refused before anything is written
model = shard(model, run) if run.sharded else model.to(run.device)
opt = configure_optimizer(model, optimizer, weight_decay, learning_rate, (beta1, beta2), muon_lr) if not eval_only else None
scaler = torch.amp.GradScaler(run.device_type, enabled=run.dtype == 'float16')  # does nothing unless enabled
if path and opt:
    try:
        opt.load_state_dict(checkpoint['optimizer'])
    except (KeyError, ValueError) as error:
        sys.exit(f'{path}: its optimizer is not {optimizer} for these weights ({error}); to start from the weights: --init_from={path} and another --out_dir')
    if scaler.is_enabled() and checkpoint.get('scaler'):
        scaler.load_state_dict(checkpoint['scaler'])
checkpoint = source = None  # free the memory
if run.master and not eval_only:
    lock = lock_run_folder(out_dir)
    if not path and has_checkpoint(out_dir):
        print(f'warning: {out_dir} has checkpoints of another run, which the first of this one will replace; to go on with that one: --init_from=resume', flush=True)
    check_disk(out_dir, sum(x.numel() * x.element_size() for x in (*opt.params, *(x for state in opt.state for x in state.values()))), keep_last)
    write_run_json(out_dir, run_id=run_id, launch=launch, config=config)

network = try_compile(model, micro_rows, block_size, run, bool(data.kind)) if compile and not eval_only else model  # computes the losses that are differentiated
if run.ddp and not run.sharded:
    network = DDP(network, device_ids=[run.device] if run.device_type == 'cuda' else None, broadcast_buffers=False)  # and averages gradients over the processes
params = list(model.parameters())


def to_device(batch):
    if run.device_type == 'cuda':  # from pinned memory the copy overlaps with computing
        batch = [x.pin_memory() for x in batch]
    return [x.to(run.device, non_blocking=True) for x in batch]


@torch.no_grad()
def evaluate():
    """{'train_loss': ..., 'val_loss': ..., 'train_bpb': ...} on fixed rows, shared out over the processes. Touches no random state."""
    model.eval()
    sums = {}
    longest = len(task.fixed(data, 'val', -1, block_size)) if data.splits.get('val', 0) > 1 else -1  # rows, pairs or prompts
    for split, length in data.splits.items():
        if length > 1:  # a folder without validation tokens trains too
            starts = task.fixed(data, split, eval_iters * batch_size if eval_iters > 0 else longest, block_size)
            sums[split] = torch.zeros(len(task.MEASURES), 2, dtype=torch.float64)  # of each measure: sum, divisor
            # a small network takes many rows at once, as long as their logits stay small
            at_once = max(micro_rows, 2**18 // (block_size * model.config.vocab_size)) * run.world_size
            for i in range(0, len(starts), at_once):
                mine = starts[i + run.rank:i + at_once:run.world_size]
                with run.ctx():  # where nothing is left for this process it computes all the same: a sharded network needs them all
                    numbers = task.measure(model, to_device(task.load(data, split, mine if len(mine) else starts[:1], block_size, context)), data, context).cpu()
                sums[split] += numbers * (len(mine) > 0)
            sums[split] = all_reduce(sums[split], run).tolist()
    model.train()
    return {f'{split}_{name}': sums[split][i][0] / sums[split][i][1]
            for i, name in enumerate(task.MEASURES) for split in sums if sums[split][i][1]}


def get_lr(it):
    """Linear warm-up; then down to min_lr by half a cosine, or constant at first and then linearly (wsd, Hu et al. 2024)."""
    if not decay_lr:
        return learning_rate
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    if schedule == 'wsd':
        coeff = min(1.0, (lr_decay_iters - it) / max(1, cooldown * lr_decay_iters))
    else:
        decay_ratio = (it - warmup_iters) / max(1, lr_decay_iters - warmup_iters)
        coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
    return min_lr + coeff * (learning_rate - min_lr)


def state():
    """Everything that sampling or going on needs. The random state is (seed, step), see below, so it needs no room of its own."""
    return {'model': trained_weights(model), 'model_args': vars(model.config), 'lora': model.lora, 'optimizer': opt.state_dict(), 'scaler': scaler.state_dict(), 'iter_num': iter_num,
            'best_val_loss': best_val_loss, 'measured': measured, 'skipped': skipped, 'config': config, 'tokenizer': data.tokenizer.json if data.tokenizer else '',
            'run_id': run_id, 'data': data_hash, 'world_size': run.world_size, 'objective': task.state(context)}


# --- the loop
per_iter, unit = (total_rows, data.kind) if data.kind in ('pairs', 'prompts') else (tokens_per_iter, 'tokens')
times = max_iters * total_rows / len(task.fixed(data, 'train', -1, block_size)) if data.kind else max_iters * tokens_per_iter / data.splits['train']
print(f'{run.device} {run.dtype}, {run.world_size} process{"es" * (run.world_size > 1)} x {micro_steps} micro-batches x {micro_rows} '
      + (unit if unit != 'tokens' else f'rows x {block_size}') + f' = {per_iter:,} {unit} per iteration; {data.folder}: {data.splits["train"]:,} tokens'
      + f', {max_iters:,} steps see them {times:.3g} times' * (not eval_only))
if run.device_type == 'cpu':
    warn_if_slow(model.flops_per_token() * tokens_per_iter * (0 if eval_only else max_iters - iter_num), run)
columns = ['iter', 'loss', 'lr', 'grad_norm', 'ms', 'tokens_per_s', 'mfu', *(f'{split}_{name}' for name in task.MEASURES for split in ('train', 'val'))]
log = Log(out_dir, columns, iter_num, config, run_id) if run.master and not eval_only else None
saver = Saver(out_dir, run, log, keep_last, background_save, resumed_from=path, step=iter_num)
caught, jumped = catch_signals(eval_only), spike_detector()
if not eval_only:
    saver.reserve(state())
first_iter = iter_num
started = t0 = saved_at = time.perf_counter()  # of a clock that is never set back
logged_iter = iter_num  # up to here the time of the steps has been printed
while True:
    if iter_num % eval_interval == 0 or iter_num >= max_iters or eval_only:
        numbers = evaluate()
        measured = {'iter': iter_num, **numbers}
        print(f'step {iter_num}: ' + ', '.join(f'{name.replace("_", " ")} {value:.4f}' for name, value in numbers.items()), flush=True)
        if log:
            log(iter_num, numbers)
        best = numbers.get('val_loss', math.inf) < best_val_loss
        if not eval_only and (iter_num > first_iter or best and init_from == 'resume'):  # what a run starts from is not its own best
            best_val_loss = numbers['val_loss'] if best else best_val_loss
            saver(state(), best)
            saved_at = time.perf_counter()
        t0, logged_iter = time.perf_counter(), iter_num
    if prompts and run.master and (iter_num % sample_interval == 0 or iter_num in (first_iter, max_iters)):
        show_samples(model, data, prompts, sample_tokens, iter_num, out_dir, run)
        t0, logged_iter = time.perf_counter(), iter_num
    if iter_num >= max_iters or eval_only:
        break

    # The batch is that of the seed and the step, the same on any number of processes, and dropout that of the process too: nothing
    # random is left over from the steps before, so a resumed run goes on exactly as the uninterrupted one.
    starts = task.draw(data, total_rows, block_size, seed, iter_num, data_order)
    if dropout:
        reseed((seed * 1_000_003 + iter_num) * 1009 + 1 + run.rank, run)
    batches = [task.load(data, 'train', starts[i:i + micro_rows], block_size, context) for i in range(run.rank * rows, (run.rank + 1) * rows, micro_rows)]
    if prompts and iter_num == first_iter:
        show_batch(batches[0], data.tokenizer)
    counts = [sum(int(task.divisor(batch)) for batch in batches), sum(batch[0].numel() for batch in batches)]
    divisor, tokens = all_reduce(counts, run).tolist()  # targets in the whole step, on all processes, and the tokens that are computed
    divisor = max(divisor, 1)  # a step without targets has loss 0
    for group in opt.param_groups:
        group['lr'] = get_lr(iter_num) * group['lr_scale']
        if 'momentum' in group:
            group['momentum'] = 0.85 + 0.1 * min(1.0, iter_num / 300)  # Muon's warms up: early gradients are soon out of date
    total_loss = 0.0
    for i, batch in enumerate(batches):
        if isinstance(network, DDP):
            network.require_backward_grad_sync = i == len(batches) - 1  # average gradients once a step
        with run.ctx():
            loss = task.loss(network, to_device(batch))
        scaler.scale(loss * (run.world_size / divisor)).backward()  # DDP averages over processes; the sum over them is wanted
        total_loss += loss.detach()
    scaler.unscale_(opt)
    grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf)).item()
    due = run.master and 0 < save_minutes * 60 < time.perf_counter() - saved_at
    lossf, stop, due = all_reduce([total_loss.item() / divisor, caught.signal or 0, due], run).tolist()
    if math.isfinite(lossf) and (scaler.is_enabled() or math.isfinite(grad_norm)):  # fp16 overflows now and then: the scaler skips those
        scaler.step(opt)
    elif skipped < skip_nonfinite:
        skipped += 1
        print(f'warning: step {iter_num} is left out: the loss is {lossf}, the gradient norm {grad_norm} ({skipped} of skip_nonfinite={skip_nonfinite})', flush=True)
    else:
        saver.wait()
        there = f'The checkpoint in {out_dir} is from before' if saver.saved or path else 'Nothing has been saved yet'
        sys.exit(f'step {iter_num}: the loss is {lossf}, the gradient norm {grad_norm}. {there}; try a lower --learning_rate, '
                 'a longer --warmup_iters, --dtype=float32, or --skip_nonfinite=10' if run.master else 1)
    scaler.update()
    opt.zero_grad()

    if iter_num % log_interval == 0:
        now = time.perf_counter()
        dt = (now - t0) / (iter_num + 1 - logged_iter)
        t0, logged_iter = now, iter_num + 1
        numbers = {'loss': lossf, 'lr': opt.param_groups[0]['lr'], 'grad_norm': grad_norm, 'ms': dt * 1000, 'tokens_per_s': tokens / dt}
        if run.peak_flops and not model.lora:  # whose FLOPs are others
            numbers['mfu'] = model.flops_per_token() * tokens / dt / run.peak_flops / run.world_size
        left = str(datetime.timedelta(seconds=round(dt * (max_iters - iter_num - 1))))
        print(f'iter {iter_num}: loss {lossf:.4f}, time {dt * 1000:.2f}ms' + (f', mfu {numbers["mfu"] * 100:.2f}%' if 'mfu' in numbers else '')
            + f', lr {numbers["lr"]:.2e}, norm {numbers["grad_norm"]:.3f}, {numbers["tokens_per_s"]:,.0f} tok/s, left {left}', flush=True)
        if log:
            log(iter_num, numbers)
    usual = jumped(lossf)
    if usual is not None:
        print(f'warning: step {iter_num}: the loss jumped to {lossf:.4f}, from {usual:.4f} in the steps before', flush=True)
    iter_num += 1
    evaluates = iter_num % eval_interval == 0 or iter_num >= max_iters  # and saves
    if stop or not evaluates and (due or save_interval and iter_num % max(1, save_interval // 2) == 0):
        saver(state(), wait=save_interval == 1)
        saved_at = time.perf_counter()
    if stop:
        print(f'stopping at step {iter_num}; to go on: the same command' + ' with --init_from=resume' * (config['init_from'] not in ('resume', 'auto')))
        break

saver.wait(last=True)
if log:
    log.close()
if run.master and iter_num >= max_iters and not eval_only:
    save_weights(out_dir)
if iter_num > first_iter:
    print(f'{iter_num - first_iter} steps in {datetime.timedelta(seconds=round(time.perf_counter() - started))}'
          + f', {skipped} left out' * (skipped > 0)
          + f', {saver.saved} saved (written in {saver.written:.1f}s, for which training waited {saver.waited:.1f}s)' * (saver.saved > 0)
          + f', best validation loss {best_val_loss:.4f}' * math.isfinite(best_val_loss)
          + f', checkpoints in {out_dir}' + f'; now: python {"chat" if data.kind else "sample"}.py --out_dir={out_dir}' * (not model.config.reward))
shutdown(run, 130 if caught.signal == signal.SIGINT else 0)
