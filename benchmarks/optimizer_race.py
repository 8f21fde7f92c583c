"""
Steps that optimizers need to reach a validation loss, with a network of 2.4M parameters and the data, the context
and the schedule of config/speedrun_shakespeare_char.py:

    python benchmarks/optimizer_race.py --factors=0.5,0.7,1,1.4,2     # first: tune the learning rates
    python benchmarks/optimizer_race.py                               # all optimizers, five seeds, to a loss of 1.46
    python benchmarks/optimizer_race.py --optimizers=muon,soap --seeds=1,2 --target=1.5 --dropout=0.1

The learning rate falls from its maximum to 0 during a run, so a run of another length is another run. Therefore each
try trains anew, for start * 1.15**k steps, until two neighbouring k lie above and below the target. The steps between
them are interpolated: the loss is taken as linear in the logarithm of the steps. The loss is that of the last step on
the whole validation text, in windows of block_size that do not overlap.

Every run is a line of the file `results`; runs that are in it are not repeated, so the command can be interrupted. At
the end it prints a table in Markdown. Arguments that are not settings of this script go to train.py.
"""
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import core.startup  # noqa: F401, E402  first: it catches Ctrl-C and missing packages in the imports below

import json  # noqa: E402
import math  # noqa: E402
import runpy  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402

import torch  # noqa: E402

import core.training.optimizer  # noqa: E402
from core.training.optimizer import Optimizer  # noqa: E402
from core.training.reference_runs import read_run  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
optimizers = ''  # names in CONTENDERS, separated by commas; '': all
target = 1.46  # validation loss
seeds = '1,2,3,4,5'  # separated by commas
start = 1200  # steps of the first try
factors = ''  # instead of the race: train `start` steps with the first seed and the learning rate times each of these
results = 'optimizer_race.jsonl'  # file with a line for every run
# ---------------------------------------------------------------------------------------------------------------------
CONFIG = 'config/speedrun_shakespeare_char.py'
NETWORK = ['--n_layer=6', '--n_head=6', '--n_kv_head=2', '--n_embd=192', '--short_rows=0']
RATIO = 1.15  # between the steps of two tries
MOST_TRIES = 8  # in each direction

# ----------------------------------------------------------------------------- update rules of matrices
# A rule returns the update of a matrix (m, n), which is multiplied by the learning rate. state: a dict that it keeps.
# progress: the share of the run that is done, in (0, 1].


def average(state, name, value, beta):
    """Update and return a moving average of `value`, which begins at 0."""
    if name not in state:
        state[name] = torch.zeros_like(value)
    return state[name].lerp_(value, 1 - beta)


def adam(state, grad, step, beta1=0.9, beta2=0.99):
    """Kingma & Ba 2015: https://arxiv.org/abs/1412.6980"""
    mean = average(state, 'mean', grad, beta1) / (1 - beta1**step)
    square = average(state, 'square', grad.square(), beta2) / (1 - beta2**step)
    return mean / (square.sqrt() + 1e-8)


def adam_rule(state, grad, step, progress, momentum):
    return adam(state, grad, step)


def ademamix(state, grad, step, progress, momentum, beta1=0.9, beta2=0.99, beta3=0.999, alpha=5.0):
    """
    Pagliardini et al. 2024: https://arxiv.org/abs/2409.03137. Adds an old mean of the gradient. Its weight alpha grows
    linearly during the run, and the half-life of beta3 from that of beta1. The paper's beta3, 0.9999, is for runs that
    are a hundred times as long.
    """
    log_start, log_end = math.log(beta1), math.log(beta3)
    beta = math.exp(log_start * log_end / ((1 - progress) * log_end + progress * log_start))
    mean = average(state, 'mean', grad, beta1) / (1 - beta1**step)
    old_mean = average(state, 'old_mean', grad, beta)
    square = average(state, 'square', grad.square(), beta2) / (1 - beta2**step)
    return (mean + alpha * progress * old_mean) / (square.sqrt() + 1e-8)


def soap(state, grad, step, progress, momentum, beta=0.95, every=10):
    """
    Vyas et al. 2024: https://arxiv.org/abs/2409.11321. Adam in the eigenbasis of Shampoo's preconditioner. The basis
    follows by one step of power iteration and QR every ten steps. As in the authors' code, no gradient is projected to
    a basis that it is part of, so the first step changes nothing.
    """
    update = torch.zeros_like(grad)
    if step > 1:
        rows, columns = state['bases']
        mean = average(state, 'mean', grad, beta) / (1 - beta**(step - 1))
        square = average(state, 'square', (rows.T @ grad @ columns).square(), beta) / (1 - beta**(step - 1))
        update = rows @ (rows.T @ mean @ columns / (square.sqrt() + 1e-8)) @ columns.T
    sides = average(state, 'left', grad @ grad.T, beta), average(state, 'right', grad.T @ grad, beta)
    if step == 1:
        state['bases'] = [torch.linalg.eigh(side).eigenvectors.flip(1) for side in sides]
    elif step % every == 0:
        state['bases'] = [torch.linalg.qr(side @ basis).Q for side, basis in zip(sides, state['bases'])]
    return update


# Name: the rule of the matrices ('' for an optimizer of train.py), the setting that --factors multiplies, and settings
# of train.py. Embeddings, head and norms are AdamW's with learning_rate, in 'adamw' the matrices too.
CONTENDERS = {
    'adamw': ('', 'learning_rate', {'optimizer': 'adamw', 'learning_rate': 5e-3, 'warmup_iters': 20}),
    'adamw-beta2-0.99': ('', 'learning_rate', {
        'optimizer': 'adamw', 'learning_rate': 5e-3, 'warmup_iters': 20, 'beta2': 0.99}),
    'adamw-own-rate': ('adam_rule', 'muon_lr', {'optimizer': 'muon', 'muon_lr': 3e-3, 'warmup_iters': 20}),
    'ademamix': ('ademamix', 'muon_lr', {'optimizer': 'muon', 'muon_lr': 2e-3, 'warmup_iters': 20}),
    'soap': ('soap', 'muon_lr', {'optimizer': 'muon', 'muon_lr': 3e-3, 'warmup_iters': 20}),
    'muon': ('', 'muon_lr', {'optimizer': 'muon', 'muon_lr': 0.02}),
    'normuon': ('', 'muon_lr', {'optimizer': 'normuon', 'muon_lr': 0.02}),
}


class WithRule:
    """
    AdamW for embeddings, head and norms, and a rule for the matrices of the blocks, with the weight decay of AdamW.
    groups: those of configure_optimizer() for Muon. steps: of the whole run.
    """

    def __init__(self, groups, rule, steps):
        self.rest = Optimizer(groups[:-1])
        self.matrices = groups[-1]  # its momentum is Muon's, which train.py warms up
        self.param_groups = groups
        self.rule = rule
        self.steps = steps
        self.done = 0
        self.states = [[{} for _ in parts] for parts in self.matrices['parts']]

    @torch.no_grad()
    def step(self):
        self.rest.step()
        self.done += 1
        group = self.matrices
        progress = min(1.0, self.done / self.steps)
        for p, parts, states in zip(group['params'], group['parts'], self.states):
            p.mul_(1 - group['lr'] * group['weight_decay'])
            for matrix, grad, state in zip(p.split(parts), p.grad.split(parts), states):
                matrix.sub_(group['lr'] * self.rule(state, grad, self.done, progress, group['momentum']))

    def zero_grad(self):
        for group in self.param_groups:
            for p in group['params']:
                p.grad = None

    def state_dict(self):
        return {'state': {}, 'param_groups': []}  # runs here are not resumed


def train_with_rule(rule, steps, arguments):
    """Run train.py in this process with a rule for the matrices."""
    plain = core.training.optimizer.configure_optimizer

    def configure(*args, **kwargs):
        return WithRule(plain(*args, **kwargs).param_groups, rule, steps)
    core.training.optimizer.configure_optimizer = configure
    sys.argv = ['train.py', *arguments]
    runpy.run_path(os.path.join(ROOT, 'train.py'), run_name='__main__')

# ----------------------------------------------------------------------------- runs


def read_results(path):
    """Return the lines of the file of results, without one that was cut off."""
    found = []
    if os.path.exists(path):
        with open(path, encoding='utf-8') as f:
            for line in f:
                try:
                    found.append(json.loads(line))
                except ValueError:
                    pass
    return found


def run(name, seed, steps, factor=1.0):
    """Return the line of a run, from the file of results or by training. Its loss is inf if the run diverged."""
    rule, tuned, given = CONTENDERS[name]
    given = {**given, tuned: given[tuned] * factor, 'seed': seed, 'max_iters': steps}
    arguments = [CONFIG, *NETWORK, *(f'--{key}={value}' for key, value in given.items()), *other_arguments]
    for line in read_results(results):
        if line['arguments'] == arguments and line['optimizer'] == name:
            return line
    with tempfile.TemporaryDirectory() as out_dir:
        words = [*arguments, f'--out_dir={out_dir}', '--eval_iters=-1', f'--eval_interval={steps}', '--log_interval=1']
        done = subprocess.run([sys.executable, os.path.abspath(__file__), f'--child={rule},{steps}', *words], cwd=ROOT,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding='utf-8', errors='replace')
        if done.returncode and 'the gradient norm' not in done.stderr:
            sys.exit((done.stderr.strip() or f'train.py ended with {done.returncode}').splitlines()[-1])
        columns = {} if done.returncode else read_run(out_dir)
    line = {'optimizer': name, 'arguments': arguments, 'seed': seed, 'steps': steps, 'factor': factor, 'loss': math.inf}
    if columns:
        line['loss'] = columns['val_loss'][-1][1]
        line['ms'] = statistics.median(ms for _, ms in columns['ms'])
    with open(results, 'a', encoding='utf-8') as f:
        f.write(json.dumps(line) + '\n')
    print(f'{name}, seed {seed}, {steps} steps, rate x {factor:g}: {line["loss"]:.4f}', flush=True)
    return line


def steps_to_target(name, seed, k):
    """
    Return the interpolated number of steps, None if MOST_TRIES tries do not reach the target; and the k of the shortest
    run that did, from which the search for the next seed begins.
    """
    def steps_of(k):
        return round(start * RATIO**k)

    def loss_of(k):
        return run(name, seed, steps_of(k))['loss']
    down = loss_of(k) <= target
    for _ in range(MOST_TRIES):
        below = k if down else k + 1  # the longer of two neighbouring runs
        shorter, longer = loss_of(below - 1), loss_of(below)
        if longer <= target < shorter:
            share = 1.0 if shorter == math.inf else (shorter - target) / (shorter - longer)
            return steps_of(below - 1) * (steps_of(below) / steps_of(below - 1))**share, below
        k += -1 if down else 1
    return None, 0


def race(names, numbers):
    """Return the table."""
    table = [f'| optimizer | steps to {target:g}: mean | sd | n | ms a step | settings |', '|---|---|---|---|---|---|']
    for name in names:
        found, k = [], 0
        for seed in numbers:
            steps, k = steps_to_target(name, seed, k)
            found += [steps] * (steps is not None)
        lines = [line for line in read_results(results) if line['optimizer'] == name and 'ms' in line]
        ms = f'{statistics.median(line["ms"] for line in lines):.0f}' if lines else ''
        mean = f'{statistics.mean(found):,.0f}' if found else 'not reached'
        sd = f'{statistics.stdev(found):.0f}' if len(found) > 1 else ''
        n = f'{len(found)}' if len(found) == len(numbers) else f'{len(found)} of {len(numbers)}'
        settings = ', '.join(f'{key}={value}' for key, value in CONTENDERS[name][2].items() if key != 'optimizer')
        table.append(f'| {name} | {mean} | {sd} | {n} | {ms} | {settings} |')
    return table


def tune(names, seed, multiples):
    """Return a table of the losses after `start` steps, by learning rate."""
    heads = ''.join(f' rate x {factor:g} |' for factor in multiples)
    table = [f'| optimizer, {start:,} steps | setting |{heads}', '|---|---|' + '---|' * len(multiples)]
    for name in names:
        _, tuned, given = CONTENDERS[name]
        losses = ''.join(f' {run(name, seed, start, factor)["loss"]:.4f} |' for factor in multiples)
        table.append(f'| {name} | {tuned}={given[tuned]} |{losses}')
    return table


def numbers_in(name, text, kind):
    """Return the numbers in a setting, separated by commas. Exits if there is none, or something else."""
    try:
        return [kind(word) for word in text.split(',')]
    except ValueError:
        sys.exit(f'{name}={text}: expected numbers, separated by commas')


def main():
    chosen = optimizers.split(',') if optimizers else list(CONTENDERS)
    for name in chosen:
        if name not in CONTENDERS:
            sys.exit(f'optimizers={name}: expected {", ".join(CONTENDERS)}')
    numbers = numbers_in('seeds', seeds, int)
    if start < 1 or not 0 < target < math.inf:
        sys.exit(f'start={start}, target={target}: expected at least 1, and a loss above 0')
    table = tune(chosen, numbers[0], numbers_in('factors', factors, float)) if factors else race(chosen, numbers)
    print('\n'.join(['', *table]))


if __name__ == '__main__':
    child = [word for word in sys.argv[1:2] if word.startswith('--child=')]
    if child:
        rule, _, steps = child[0].partition('=')[2].partition(',')
        if rule:
            train_with_rule(globals()[rule], int(steps), sys.argv[2:])
        else:
            sys.argv = ['train.py', *sys.argv[2:]]
            runpy.run_path(os.path.join(ROOT, 'train.py'), run_name='__main__')
    else:
        OTHER_ARGUMENTS = 'all'  # the arguments of train.py; the configurator puts them into other_arguments
        other_arguments = []
        exec(open(os.path.join(ROOT, 'configurator.py'), encoding='utf-8').read())
        main()
