"""
Reference runs, which say whether a loss is normal. Each is a folder in docs/reference with a run's run.json and its
log.csv, thinned out. benchmarks/reference.py makes them.
"""
import glob
import math
import os

import numpy as np

from core.files import ROOT
from core.training.log import read_columns
from core.training.run_folder import read_run_json

FOLDER = os.path.join(ROOT, 'docs', 'reference')
BAND = 0.02  # a relative difference that is normal; docs/operations.md has the spread between seeds that it comes from
FEWEST_ROWS = 5  # of the training loss, to know how much it depends on the batches
HELP = 'docs/operations.md#when-a-loss-is-higher-than-the-reference'
# settings that do not change what is learned in a step; the dataset is compared by its hash
NEUTRAL = (
    'out_dir', 'eval_interval', 'log_interval', 'eval_only', 'dry_run', 'always_save_checkpoint', 'seed',
    'sample_interval', 'sample_prompts', 'sample_tokens', 'save_interval', 'save_minutes', 'keep_last',
    'background_save', 'wandb_log', 'wandb_project', 'wandb_run_name', 'tensorboard_log', 'dataset', 'max_iters',
    'epochs', 'minutes', 'ema', 'skip_nonfinite', 'gradient_checkpointing', 'parallel', 'backend', 'device', 'dtype',
    'compile', 'init_from', 'reference',
)


def config_files(run_json):
    """Return the names of the config files that a run was started with, without folder and ending."""
    names = [word for word in run_json.get('command', [])[1:] if word.endswith('.py') and not word.startswith('-')]
    return [os.path.splitext(os.path.basename(name))[0] for name in names]


def read_run(folder):
    """Return the columns of a run's log.csv. Raises OSError or ValueError if it cannot be read."""
    path = os.path.join(folder, 'log.csv')
    with open(path, encoding='utf-8', newline='') as f:
        return read_columns(path, f.read().splitlines())


def find_reference(out_dir):
    """
    Return the folder of the reference run with the same config files as the run in out_dir, and what differs in its
    settings, ['key before -> after', ...]. Of several, the one with the fewest differences. None, [] if there is none.
    """
    run_json = read_run_json(out_dir)
    best = None, []
    for folder in sorted(glob.glob(os.path.join(glob.escape(FOLDER), '*', ''))):
        reference = read_run_json(folder)
        if config_files(reference) and config_files(reference) == config_files(run_json):
            changes = differences(reference, run_json)
            if best[0] is None or len(changes) < len(best[1]):
                best = folder, changes
    return best


def differences(reference, run_json):
    """Return the settings that change what is learned and differ between two run.json: ['key before -> after', ...]."""
    before, after = reference['config'], run_json['config']
    changes = [f'{key} {before[key]} -> {value}' for key, value in after.items()
               if key not in NEUTRAL and before.get(key, value) != value]
    starts = before['init_from'], after['init_from']  # a resumed run does not know what it started from
    if 'scratch' in starts and not {'scratch', 'resume', 'auto'}.issuperset(starts):
        changes.append(f'init_from {starts[0]} -> {starts[1]}')
    if reference['data'] != run_json['data']:
        changes.append(f'other text or tokenizer: {before["dataset"]} -> {after["dataset"]}')
    return changes


def summary(changes):
    """Return the first four changes, and how many more there are."""
    more = f' and {len(changes) - 4} more' if len(changes) > 4 else ''
    return '; '.join(changes[:4]) + more


def interpolate(column, steps):
    """Return the numbers of a column, [(step, number), ...], at these steps: linear between its rows."""
    return np.interp(steps, *np.array(column).T)


def compare(run, reference):
    """
    Compare two runs at the last step of the first one, by their columns. Return the name of the loss, the text 'at step
    ...', both numbers and the relative difference that is normal; None if one of them has no numbers there.

    It is the last validation loss, if the run ends with an evaluation or has few logged steps. Otherwise it is the mean
    training loss over the last fifth of the steps, or over the last five logged steps if these are more. BAND is then
    widened by two standard errors of the difference between the two means.
    """
    losses = run.get('loss', [])
    last_step = losses[-1][0] if losses else -1
    evaluation = [point for point in run.get('val_loss', []) if point[0] > 0][-1:]
    if evaluation and (evaluation[0][0] > last_step or len(losses) < FEWEST_ROWS):
        column, name, points = 'val_loss', 'validation loss', evaluation
        where = f'at step {points[0][0]}'
    elif len(losses) >= FEWEST_ROWS:
        column, name = 'loss', 'training loss'
        recent = sum(step >= 0.8 * last_step for step, _ in losses)
        points = losses[-max(recent, FEWEST_ROWS):]
        where = f'over steps {points[0][0]} to {last_step}'
    else:
        return None
    end = max((step for numbers in reference.values() for step, _ in numbers), default=-1)
    if not reference.get(column) or points[-1][0] > end:
        return None
    steps, ours = np.array(points).T
    theirs = interpolate(reference[column], steps)
    error = np.std(ours - theirs) / len(steps)**0.5  # 0 for a single evaluation
    return name, where, ours.mean(), theirs.mean(), BAND + 2 * error / theirs.mean()


def describe_comparison(out_dir):
    """Return the line about a run's loss and that of its reference run, or None."""
    folder, changes = find_reference(out_dir)
    if not folder:
        return None
    run = read_run(out_dir)
    run_json = read_run_json(folder)
    if run_json['config']['objective'] != read_run_json(out_dir)['config']['objective']:
        run.pop('loss', None)  # only the validation losses are of one kind
    found = compare(run, read_run(folder))
    if not found or not math.isfinite(found[2]):
        return None
    name, where, ours, theirs, band = found
    names = ' '.join(word for word in run_json['command'][1:] if word.endswith('.py'))
    line = f'{name} {ours:.4f} {where}; the reference run of {names} had {theirs:.4f}'
    if changes:
        return f'{line} with other settings: {summary(changes)}'
    if run_json['config']['objective'] != 'next_token':
        return line  # how far the seeds differ is known for this objective only
    higher = 100 * (ours / theirs - 1)
    if abs(higher) <= 100 * band:
        return f'{line}: normal (within {100 * band:.0f} %)'
    if higher > 0:
        return f'{line}: {higher:.1f} % higher; what to check: {HELP}'
    return f'{line}: {-higher:.1f} % lower'


def print_comparison(out_dir):
    """Print describe_comparison(), at the end of a run, which a damaged file must not break."""
    try:
        line = describe_comparison(out_dir)
    except (OSError, ValueError, KeyError) as error:
        line = f'warning: no comparison with the reference run: {error}'
    if line:
        print(line)
