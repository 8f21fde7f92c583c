"""Checks of train.py's settings: their values, and their agreement with a checkpoint."""
import importlib.util
import math
import sys

from core.training.optimizer import MUONS, OPTIMIZERS
from model import ACTIVATIONS, NORMS

# settings of the network, saved in the checkpoint and restored from it
ARCHITECTURE = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'rope_theta', 'norm', 'activation', 'qk_norm',
                'tied', 'n_kv_head', 'head_size', 'n_inner', 'window', 'window_pattern')
DERIVED_IF_0 = ('n_head', 'n_embd', 'n_kv_head', 'head_size', 'n_inner')  # 0: derived from the others

AT_LEAST_1 = ('batch_size', 'gradient_accumulation_steps', 'block_size', 'n_layer', 'eval_interval', 'log_interval',
              'sample_tokens')
AT_LEAST_0 = (*DERIVED_IF_0, 'rope_theta', 'window', 'sample_interval', 'save_interval', 'save_minutes', 'keep_last',
              'skip_nonfinite', 'learning_rate', 'muon_lr', 'min_lr', 'weight_decay', 'grad_clip', 'warmup_iters',
              'epochs')
CHOICES = {
    'data_order': ('random', 'epochs', 'documents'),
    'parallel': ('ddp', 'fsdp'),
    'optimizer': OPTIMIZERS,
    'schedule': ('cosine', 'wsd'),  # each has its branch in train.py's get_lr()
    'norm': NORMS,
    'activation': ACTIVATIONS,
}


def check_settings(config, given=()):
    """Exit if a setting has an impossible value. given: those of the command line."""
    def expect(condition, key, what):
        if not condition:
            sys.exit(f'{key}={config[key]}: expected {what}')
    for keys, least in ((AT_LEAST_1, 1), (AT_LEAST_0, 0)):
        for key in keys:
            expect(config[key] >= least, key, f'at least {least}')
    for key, choices in CHOICES.items():
        expect(config[key] in choices, key, ' or '.join(choices))
    expect(0 <= config['seed'] < 2**32, 'seed', 'at least 0 and less than 2**32')
    for key in ('beta1', 'beta2', 'dropout'):
        expect(0 <= config[key] < 1, key, 'a number in [0, 1)')
    expect(set(config['window_pattern']) in ({'S'}, {'L'}, {'S', 'L'}), 'window_pattern', 'letters S and L, like SSSL')
    expect(0 <= config['cooldown'] <= 1, 'cooldown', 'a number in [0, 1]')
    expect(0 <= config['short_rows'] <= 1, 'short_rows', 'a number in [0, 1]')
    if config['short_rows'] and config['objective'] not in ('next_token', 'distill'):
        sys.exit(f'short_rows={config["short_rows"]}: it cuts rows of text in two, so it needs objective=next_token or '
                 f'distill, not {config["objective"]}; add --short_rows=0')
    expect(0 <= config['ema'] <= 0.5, 'ema', 'a number in [0, 0.5]; 0.5 is the mean over all steps')
    for key in ('max_iters', 'lr_decay_iters'):
        expect(config[key] >= -1, key, 'at least 0, or -1 (see --help)')
    expect(config['eval_iters'] != 0, 'eval_iters', 'above 0, or -1 (all)')
    expect(config['epochs'] < math.inf, 'epochs', 'a finite number')
    if config['epochs'] and {'epochs', 'max_iters'} <= set(given):
        sys.exit(f'epochs={config["epochs"]}, max_iters={config["max_iters"]}: both give the length; leave one out')
    check_budget(config, given)
    if config['dry_run'] and config['eval_only']:
        sys.exit('dry_run=True, eval_only=True: a dry run times training steps, and eval_only has none; leave one out')
    for package in ('wandb', 'tensorboard'):
        if config[f'{package}_log'] and not importlib.util.find_spec(package):
            sys.exit(f'{package}_log=True needs {package}: pip install {package}')
    if config['decay_lr'] and config['min_lr'] > config['learning_rate'] > 0:
        print(f'warning: the learning rate will rise, from {config["learning_rate"]} to min_lr={config["min_lr"]}')
    window, n_layer = config['window'], config['n_layer']
    if window >= config['block_size'] or window and 'S' not in (config['window_pattern'] * n_layer)[:n_layer]:
        print(f'warning: window={window} limits nothing: it must be less than block_size={config["block_size"]}, and '
              f'window_pattern={config["window_pattern"]} must have an S among its first {n_layer} letters')
    if config['optimizer'] in MUONS and config['learning_rate'] == 0 < config['muon_lr']:
        sys.exit(f'learning_rate=0: muon_lr={config["muon_lr"]} rises and falls with it, so give it a value above 0, '
                 'however small')


def check_budget(config, given):
    """Exit unless minutes and auto fit the other settings."""
    minutes = config['minutes']
    if not 0 <= minutes < math.inf or (minutes == 0 and (config['auto'] or 'minutes' in given)):
        sys.exit(f'minutes={minutes:g}: expected a number above 0, the minutes to train'
                 + (not config['auto']) * '; leave it out to train for max_iters steps')
    if not minutes:
        return
    for key in ('max_iters', 'lr_decay_iters', 'epochs'):
        if key in given and config[key] not in (0, -1):
            sys.exit(f'minutes={minutes:g}, {key}={config[key]}: both give the length; leave one out')
    for key in ('eval_only', 'dry_run'):
        if config[key]:
            sys.exit(f'minutes={minutes:g}, {key}=True: nothing is trained then; leave one out')


def check_heads(n_embd, n_head, n_kv_head, head_size, rope_theta, derived):
    """Exit unless n_head divides the width and n_kv_head divides n_head. derived: n_head was not given."""
    if not head_size and n_embd % n_head:
        note = ', the heads of about 64 channels that n_head=0 stands for' if derived else ''
        sys.exit(f'n_embd={n_embd} is not divisible by n_head={n_head}{note}')
    if n_head % (n_kv_head or n_head):
        sys.exit(f'n_head={n_head} is not divisible by n_kv_head={n_kv_head}: '
                 'each head of keys and values serves as many heads of queries')
    channels = head_size or n_embd // n_head
    if rope_theta and channels % 2:
        sys.exit(f'rope_theta={rope_theta} rotates pairs of channels, and a head has {channels}; '
                 'choose n_embd / n_head, or head_size, even')


def check_against_checkpoint(model, origin, config, given):
    """Exit if the command line contradicts the architecture of the loaded model."""
    for key in given.keys() & set(ARCHITECTURE):
        asked, has = config[key], getattr(model.config, key)
        if asked != has and not (asked == 0 and key in DERIVED_IF_0):
            sys.exit(f'--{key}={asked} contradicts {origin}, which has {key}={has}; '
                     'leave it out, or train another network with --init_from=scratch and another --out_dir')


def count_rows(data, objective_module, block_size):
    """Return the rows in an epoch: of tokens without a gap, or into which documents are packed."""
    if data.kind:
        return len(objective_module.fixed(data, 'train', -1, block_size))
    return data.splits['train'] / block_size


def run_length(config, given, model, tokens_per_iter, steps_in_epoch):
    """
    Return max_iters and lr_decay_iters as numbers of steps. Epochs count unless the command line gives max_iters; the
    schedule then ends with the run, unless the command line gives lr_decay_iters.
    """
    max_iters, lr_decay_iters = config['max_iters'], config['lr_decay_iters']
    if config['epochs'] and 'max_iters' not in given:
        max_iters = math.ceil(config['epochs'] * steps_in_epoch)
        if 'lr_decay_iters' not in given:
            lr_decay_iters = max_iters
    elif max_iters == -1:  # 20 tokens per parameter that multiplies: without lookup tables
        max_iters = math.ceil(20 * model.num_params(lookups=False) / tokens_per_iter)
    return max_iters, max_iters if lr_decay_iters == -1 else lr_decay_iters


def describe_changes(checkpoint, config, world_size, total_rows):
    """Return a line that says which settings differ from those in the checkpoint, and one if no step is left."""
    before = checkpoint.get('config', {})
    processes = checkpoint.get('world_size')
    changes = [f'{key} {before[key]} -> {value}' for key, value in config.items()
               if before.get(key, value) != value and key not in ('init_from', 'out_dir', 'dry_run')]
    if processes not in (None, world_size):
        changes.append(f'processes {processes} -> {world_size}, which share the same {total_rows} rows a step')
    line = 'not as before: ' + '; '.join(changes) if changes else 'all settings as before'
    done, max_iters = checkpoint['iter_num'], config['max_iters']
    if done >= max_iters and not config['eval_only']:
        line += (f'\nnothing is left to do: {done} steps are done, and max_iters={max_iters}; '
                 f'raise --{"minutes" if config["minutes"] else "max_iters"} to go on')
    return line


def check_same_data(checkpoint, path, dataset, data_hash):
    """Exit if the checkpoint was trained on other tokens."""
    if checkpoint.get('data', data_hash) != data_hash:
        sys.exit(f'dataset={dataset}: its tokens are not those that {path} was trained on so far, so this would be no '
                 f'exact continuation; for another dataset: --init_from={path} and another --out_dir')


def check_data(data, dataset, data_order, block_size, short_rows):
    """Exit if rows of block_size tokens cannot be drawn from the dataset in this order, or not be cut in two."""
    if short_rows and data.kind:
        sys.exit(f'short_rows={short_rows}: {dataset} has {data.kind}, and only rows of text may be cut; '
                 'add --short_rows=0')
    if short_rows and block_size % 2:
        sys.exit(f'short_rows={short_rows}: rows of block_size={block_size} tokens cannot be cut in two; '
                 'add --short_rows=0, or choose an even block_size')
    if data_order != 'random' and len(data.weights) > 1:
        sys.exit(f'data_order={data_order}: {dataset} is a mixture, drawn by weights, so it has no epochs; '
                 'use --data_order=random')
    if data.shortest <= block_size and not data.kind:
        sys.exit(f'block_size={block_size} needs more than {block_size} tokens to train on, and {data.folder} has '
                 f'{data.shortest}; use --block_size={max(data.shortest - 1, 1)} or less')


def fit_block_size(block_size, model, origin, given):
    """Return the context to use with loaded weights: theirs, or a shorter one. Exits if a longer one was given."""
    if block_size > model.config.block_size and 'block_size' in given:
        sys.exit(f'--block_size={block_size}: {origin} was trained with a context of {model.config.block_size}; '
                 'lower it')
    return min(block_size, model.config.block_size)


def is_sharded(parallel, env):
    """Whether the model is sharded over the ranks (FSDP). Exits for float16, whose loss is not scaled there."""
    sharded = parallel == 'fsdp' and env.world_size > 1
    if sharded and env.dtype == 'float16':
        sys.exit('parallel=fsdp: the loss is not scaled for float16 there; use --dtype=bfloat16 or float32')
    return sharded


def split_rows(batch_size, gradient_accumulation_steps, world_size):
    """
    Divide the rows of a step among the ranks. Return how many micro-batches each rank processes, and the rows in each:
    equal numbers, at most batch_size. Exits if the rows cannot be divided evenly.
    """
    rows = batch_size * gradient_accumulation_steps
    if rows % world_size:
        sys.exit(f'batch_size={batch_size} * gradient_accumulation_steps={gradient_accumulation_steps} = {rows} rows '
                 f'cannot be shared out evenly over {world_size} processes; change one of the three')
    rows //= world_size
    micro_steps = math.ceil(rows / batch_size)
    while rows % micro_steps:
        micro_steps += 1
    return micro_steps, rows // micro_steps
