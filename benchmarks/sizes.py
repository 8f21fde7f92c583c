"""
The measurements behind core/training/law.py: how the loss depends on the network, the tokens, the passes over the text
and the regularisation. Runs of train.py on one core, and the fit of the law's constants.

    python benchmarks/sizes.py list     # the commands of the grid
    python benchmarks/sizes.py run      # those that docs/sizes.csv has no line of; each adds one
    python benchmarks/sizes.py fit      # the constants, and the tables of docs/sizes.md

All runs decay the learning rate linearly to 0. The loss is that of the whole validation text, in windows of the
context. The datasets must be prepared, xiyou_char by data/any_text/prepare.py from data/classics_bbpe/input/xiyou.txt.
Parts of a text are written to the folder --out.
"""
import argparse
import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from core.text.dataset import open_dataset  # noqa: E402
from core.training import law  # noqa: E402
from core.weights.vocabulary import padded_vocab_size  # noqa: E402

CONFIG = 'config/speedrun_shakespeare_char.py'
HEADS = {96: (3, 1), 128: (4, 2), 160: (5, 1), 192: (6, 2)}  # width: heads of queries, of keys and values
SETTINGS = {'dataset': str, 'part': float, 'n_layer': int, 'n_embd': int, 'tokens': int, 'block_size': int,
            'batch_size': int, 'dropout': float, 'weight_decay': float, 'learning_rate': float, 'muon_lr': float}
MEASURED = {'n_params': int, 'unique_tokens': int, 'vocab_size': int, 'entropy': float, 'loss': float,
            'bits_per_character': float}
DEFAULTS = {'part': 1.0, 'block_size': 128, 'batch_size': 16, 'dropout': 0.0, 'weight_decay': 0.1,
            'learning_rate': 0.03, 'muon_lr': 0.02}
PIECE = 2048  # tokens; of a part of a text, every so many pieces one is kept
NOISE = 0.005  # of a loss, relative: runs that differ in the seed only
LEVEL = 0.05  # of the losses of a text, relative to its entropy
# The data leave some constants open: (expected value, how far from it is likely) of their logarithms.
LIKELY = {
    'floor': (0.4, 0.5), 'params_factor': (0.1, 0.7), 'params_power': (0.34, 0.3), 'tokens_factor': (0.25, 0.7),
    'tokens_power': (0.34, 0.3), 'room': (20, 1.5), 'repeats': (10, 1.0), 'decay_params_power': (0.7, 0.4),
    'decay_factor': (0.05, 1.0), 'decay_first': (0.12, 0.3), 'decay_penalty': (0.014, 0.5), 'dropout_decay': (5, 1.0),
    'dropout_cost': (0.1, 1.0), 'context_power': (0.02, 1.0), 'critical_batch': (16384, 1.0),
}


def grid():
    """Return the runs, {setting: value} each."""
    english, by_character, bbpe = 'shakespeare_char', 'hongloumeng_char', 'hongloumeng_bbpe'
    jobs = []

    def add(dataset, n_layer, n_embd, thousands, **changes):
        jobs.append({**DEFAULTS, 'dataset': dataset, 'n_layer': n_layer, 'n_embd': n_embd, 'tokens': thousands * 1000,
                     **changes})

    add(english, 2, 96, 500)
    add(english, 2, 96, 1000)
    add(english, 2, 96, 1000, weight_decay=0.5)
    add(english, 2, 96, 1000, batch_size=32)
    add(english, 2, 96, 1000, batch_size=8)
    add(english, 2, 96, 1000, block_size=256, batch_size=8)
    add(english, 2, 96, 1000, muon_lr=0.04)
    add(english, 2, 96, 1000, batch_size=64)
    add(english, 2, 96, 1000, block_size=64, batch_size=32)
    add(english, 2, 96, 1000, muon_lr=0.01)
    add(english, 2, 96, 1000, batch_size=4)
    add(english, 2, 96, 2000)
    add(english, 2, 96, 4000)
    add(english, 4, 128, 500)
    add(english, 4, 128, 1000)
    add(english, 4, 128, 1000, batch_size=8)
    add(english, 4, 128, 2000)
    add(english, 6, 192, 500)
    add(english, 6, 192, 1000)
    add(english, 2, 96, 2000, part=1 / 4, weight_decay=0.4)
    add(english, 2, 96, 2000, part=1 / 4, weight_decay=1.0)
    add(english, 4, 128, 1000, part=1 / 4, weight_decay=0.4)
    add(english, 4, 128, 1000, part=1 / 4)
    add(english, 4, 128, 1000, part=1 / 4, weight_decay=1.0)
    add(english, 2, 96, 500, part=1 / 8)
    add(english, 2, 96, 500, part=1 / 8, weight_decay=1.0)
    add(english, 2, 96, 1000, part=1 / 8)
    add(english, 2, 96, 1000, part=1 / 8, dropout=0.2)
    add(english, 2, 96, 1000, part=1 / 8, dropout=0.1)
    add(english, 2, 96, 1000, part=1 / 8, weight_decay=1.0)
    add(english, 2, 96, 1000, part=1 / 8, weight_decay=3.0)
    add(english, 2, 96, 1000, part=1 / 8, dropout=0.1, weight_decay=1.0)
    add(english, 2, 96, 1000, part=1 / 8, batch_size=8, weight_decay=1.0)
    add(english, 2, 96, 2000, part=1 / 8, dropout=0.2)
    add(english, 2, 96, 4000, part=1 / 8, weight_decay=1.0)
    add(english, 2, 96, 4000, part=1 / 8, dropout=0.1, weight_decay=1.0)
    add(english, 4, 128, 1000, part=1 / 8, weight_decay=1.0)
    add(english, 4, 128, 1000, part=1 / 8, dropout=0.2, weight_decay=1.0)
    add(english, 4, 128, 1000, part=1 / 8, weight_decay=3.0)
    add(by_character, 2, 96, 500)
    add(by_character, 2, 96, 500, weight_decay=0.5)
    add(by_character, 2, 96, 500, learning_rate=0.01)
    add(by_character, 2, 96, 500, batch_size=8)
    add(by_character, 2, 96, 1000)
    add(by_character, 4, 128, 500)
    add(by_character, 4, 128, 1000)
    add(by_character, 2, 96, 800, part=1 / 4)
    add(by_character, 2, 96, 800, part=1 / 4, dropout=0.2)
    add(by_character, 2, 96, 800, part=1 / 4, weight_decay=1.0)
    add(by_character, 2, 96, 1600, part=1 / 4, dropout=0.1, weight_decay=1.0)
    add(by_character, 2, 96, 1600, part=1 / 4, weight_decay=1.0)
    add(bbpe, 2, 96, 500)
    add(bbpe, 2, 96, 1000)
    add(bbpe, 2, 96, 2000, weight_decay=0.4)
    add(bbpe, 4, 128, 500)
    add('tang_poems', 2, 96, 500)
    add('xiyou_char', 2, 96, 500)
    return jobs


def read(path):
    """Return the rows of the table as dicts of numbers."""
    if not os.path.exists(path):
        return []
    with open(path, encoding='utf-8', newline='') as f:
        return [{key: kind(row[key]) for key, kind in {**SETTINGS, **MEASURED}.items()} for row in csv.DictReader(f)]


def folder_of(settings, out):
    """
    Return the dataset's name. Of a part 1 / n: a folder below `out` with every n-th PIECE of its training text, so that
    this is no further from the validation text than the whole is.
    """
    if settings['part'] == 1:
        return settings['dataset']
    source = os.path.join(ROOT, 'data', settings['dataset'])
    target = os.path.join(out, f'{settings["dataset"]}-{settings["part"]}')
    if os.path.exists(os.path.join(target, 'meta.json')):
        return target
    os.makedirs(target, exist_ok=True)
    for name in ('val.bin', 'tokenizer.json'):
        shutil.copy(os.path.join(source, name), target)
    with open(os.path.join(source, 'meta.json'), encoding='utf-8') as f:
        meta = json.load(f)
    tokens = np.fromfile(os.path.join(source, 'train.bin'), '<u2')
    tokens = tokens[np.arange(len(tokens)) // PIECE % round(1 / settings['part']) == 0]
    tokens.tofile(os.path.join(target, 'train.bin'))
    meta['train']['tokens'] = len(tokens)
    with open(os.path.join(target, 'meta.json'), 'w', encoding='utf-8') as f:
        json.dump(meta, f)
    return target


def command(settings, out):
    """Return the arguments of train.py as a list of texts, ready to be printed."""
    n_head, n_kv_head = HEADS[settings['n_embd']]
    keys = [key for key in SETTINGS if key not in ('dataset', 'part', 'tokens')]
    folder = settings['dataset'] if settings['part'] == 1 else f'{out}/{settings["dataset"]}-{settings["part"]}'
    steps = round(settings['tokens'] / settings['block_size'] / settings['batch_size'])
    return [CONFIG, '--optimizer=muon', '--short_rows=0', f'--dataset={folder}',
            *(f'--{key}={settings[key]}' for key in keys), f'--n_head={n_head}', f'--n_kv_head={n_kv_head}',
            f'--max_iters={steps}', '--eval_interval=1000000', '--eval_iters=1', '--compile=False',
            f'--out_dir={out}/run']


def measure(settings, out):
    """Train and evaluate a network. Returns the row of the table."""
    def run(*arguments):
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, encoding='utf-8',
                              env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONUTF8': '1'})
        if done.returncode:
            sys.exit(f'{" ".join(arguments)}: {done.stderr.strip()[-500:]}')
        return done.stdout

    trained_on = open_dataset(folder_of(settings, out))
    data = open_dataset(settings['dataset'])  # whose entropy is that of its parts too
    run('train.py', *command(settings, out))
    evaluated = run('evaluate.py', f'--out_dir={out}/run', '--batch_size=16', '--dtype=float32')
    shutil.rmtree(f'{out}/run')
    return {
        **settings,
        'n_params': count_params(settings, data.vocab_size),
        'unique_tokens': trained_on.splits['train'],
        'vocab_size': data.vocab_size,
        'entropy': round(law.entropy(data), 4),
        'loss': float(re.search(r'float32: loss ([\d.]+)', evaluated)[1]),
        'bits_per_character': float(re.search(r'bits per character ([\d.]+)', evaluated)[1]),
    }


def count_params(settings, vocab_size):
    """Return the number of parameters that multiply of a network of the grid."""
    C = settings['n_embd']
    n_head, n_kv_head = HEADS[C]
    inner = 64 * math.ceil(C * 8 / 3 / 64)
    layer = C * (2 * C + 2 * C * n_kv_head // n_head) + 3 * C * inner + 2 * C + 2 * C // n_head
    return settings['n_layer'] * layer + C + padded_vocab_size(vocab_size) * C

# --- the fit


def fit(rows):
    """
    Return the law's constants that agree best with these rows, weighed against LIKELY (Levenberg-Marquardt), and
    {text: loss / law}. These ratios are fitted too, so that what entropy() misses does not disturb the constants.
    """
    texts = sorted({row['dataset'] for row in rows})
    text = np.array([texts.index(row['dataset']) for row in rows])
    losses = np.array([row['loss'] for row in rows])
    centres = np.append(np.log([centre for centre, _ in LIKELY.values()]), np.zeros(len(texts)))
    widths = np.append([width for _, width in LIKELY.values()], np.full(len(texts), LEVEL))

    def constants_of(logs):
        return dict(zip(LIKELY, np.exp(logs[:len(LIKELY)]).tolist()))

    def residuals(logs):
        errors = (np.log(predict(rows, constants_of(logs)) / losses) + logs[len(LIKELY) + text]) / NOISE
        return np.concatenate([errors, (logs - centres) / widths])

    logs, damping, before = centres, 1e-2, residuals(centres)
    for _ in range(500):
        slopes = np.stack([(residuals(logs + h) - before) / 1e-5 for h in np.eye(len(logs)) * 1e-5], axis=1)
        hessian = slopes.T @ slopes
        step = np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), -slopes.T @ before)
        after = residuals(logs + step)
        if after @ after < before @ before:
            logs, before, damping = logs + step, after, max(damping / 3, 1e-9)
        else:
            damping *= 4
    return constants_of(logs), dict(zip(texts, np.exp(logs[len(LIKELY):]).tolist()))


def predict(rows, constants):
    """Return the losses that the law expects of these rows (n,)."""
    columns = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    return law.expected_loss(
        columns['n_params'], columns['tokens'], columns['unique_tokens'], columns['vocab_size'], columns['dropout'],
        columns['weight_decay'], columns['entropy'], columns['block_size'],
        columns['block_size'] * columns['batch_size'], constants)


def fitted(rows):
    """Return the rows that the constants are fitted to: those with the learning rates and steps that the law is for."""
    return [row for row in rows if row['learning_rate'] == DEFAULTS['learning_rate'] and
            row['muon_lr'] == DEFAULTS['muon_lr'] and row['block_size'] * row['batch_size'] >= 1024]


def table(rows, expected):
    """Return the lines of a table in Markdown: the rows, and what the law expects of each."""
    lines = ['| text, part | network, parameters | tokens, passes | context × rows, learning rates '
             '| dropout, weight decay | loss | law | difference |', '|---|---|---|---|---|---|---|---|']
    for row, loss in zip(rows, expected):
        part = '' if row['part'] == 1 else f', 1/{round(1 / row["part"])}'
        default = all(row[key] == DEFAULTS[key] for key in ('learning_rate', 'muon_lr'))
        rates = '' if default else f', {row["learning_rate"]:g} and {row["muon_lr"]:g}'
        lines.append(
            f'| {row["dataset"]}{part} | {row["n_layer"]} × {row["n_embd"]}, {row["n_params"] / 1e6:.2f}M '
            f'| {row["tokens"] / 1e6:.1f}M, {row["tokens"] / row["unique_tokens"]:.1f} '
            f'| {row["block_size"]} × {row["batch_size"]}{rates} | {row["dropout"]:g}, {row["weight_decay"]:g} '
            f'| {row["loss"]:.4f} | {loss:.4f} | {100 * (loss / row["loss"] - 1):+.1f} % |')
    return lines


def main():
    parser = argparse.ArgumentParser(description='See the top of the file.')
    parser.add_argument('what', choices=('list', 'run', 'fit'))
    parser.add_argument('--csv', default=os.path.join(ROOT, 'docs', 'sizes.csv'), help='the measurements')
    parser.add_argument('--out', default='out-sizes', help='folder of parts of texts and the run')
    args = parser.parse_args()
    rows = read(args.csv)
    if args.what == 'list':
        for settings in grid():
            print('python train.py', ' '.join(command(settings, args.out)))
    elif args.what == 'run':
        done = [{key: row[key] for key in SETTINGS} for row in rows]
        for settings in grid():
            if settings in done:
                continue
            row = measure(settings, os.path.abspath(args.out))
            with open(args.csv, 'a', encoding='utf-8', newline='') as f:
                writer = csv.DictWriter(f, [*SETTINGS, *MEASURED], lineterminator='\n')
                if not f.tell():
                    writer.writeheader()
                writer.writerow(row)
            print(row, flush=True)
    else:
        constants, ratios = fit(fitted(rows))
        for name, value in constants.items():
            print(f'    {name!r}: {value:.3g},')
        for text, ratio in ratios.items():
            print(f'{text}: {ratio:.3f} of the law')
        expected = predict(rows, constants) * [ratios[row['dataset']] for row in rows]
        errors = np.abs(np.log(expected / [row['loss'] for row in rows]))
        print(f'{len(rows)} runs, mean absolute error {errors.mean():.2%}, largest {errors.max():.2%}', end='\n\n')
        print('\n'.join(table(rows, expected)))


if __name__ == '__main__':
    main()
