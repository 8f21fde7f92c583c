"""
Plot the curves of one or more runs, from their log.csv, to a picture.

    python plot.py out-a out-b                                      # validation loss over steps, to curves.png
    python plot.py out-a out-b --x=time --y=loss --log=y --out=loss.png
    python plot.py out-a nanogpt.txt --x=time                       # also the saved output of nanoGPT's train.py
    python plot.py out-dpo out-grpo --y=val_loss,val_reward,val_kl  # a panel per column, with the runs that have it
    python plot.py out-a --reference                                # dashed: the run that its configuration should give

A run is its folder, its log.csv, or a file with the printed output of train.py or of nanoGPT's train.py.
Needs matplotlib.
"""
import core.startup  # noqa: F401  first: it catches Ctrl-C and missing packages in the imports below

import difflib
import math
import os
import re
import statistics
import sys
import warnings

import numpy as np

from core.files import find
from core.training.log import read_columns

# -----------------------------------------------------------------------------
x = 'iter'  # 'iter'; 'tokens' (trained on so far); 'time' (seconds of the steps so far, without evaluations)
y = 'val_loss'  # columns of log.csv, separated by commas, a panel each: loss, train_loss, val_loss, lr, grad_norm, ms
log = ''  # axes with a logarithmic scale: 'x', 'y' or 'xy'
out = 'curves.png'  # the picture; .pdf and .svg work too
reference = False  # also draw, dashed, the reference run of each run's config files (docs/training.md)
# -----------------------------------------------------------------------------
OTHER_ARGUMENTS = 'positional'  # the runs; the configurator puts them into other_arguments
other_arguments = []
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())

REFERENCE = ' (reference)'  # ends the names of reference runs
LABELS = {'iter': 'step', 'tokens': 'tokens', 'time': 'seconds of training, evaluations left out'}
CJK = ('Noto Sans CJK SC', 'Noto Sans SC', 'Source Han Sans SC', 'Source Han Sans CN', 'WenQuanYi Micro Hei',
       'WenQuanYi Zen Hei', 'PingFang SC', 'Hiragino Sans GB', 'Microsoft YaHei', 'SimHei', 'Arial Unicode MS')

# ----------------------------------------------------------------------------- reading


def read(run):
    """Return (columns, name for the legend) of a run; columns are {name: [(step, number), ...]}."""
    path = find(run)
    if os.path.isdir(path):
        path = os.path.join(path, 'log.csv')
    try:
        with open(path, encoding='utf-8', errors='replace', newline='') as f:
            lines = f.read().splitlines()
    except OSError as error:
        sys.exit(f'{path}: cannot be read: {error.strerror}; '
                 'expected the folder of a run, its log.csv, or the printed lines of a training')
    if lines and lines[0].split(',')[0] == 'iter':
        try:
            columns = read_columns(path, lines)
        except ValueError as error:
            sys.exit(str(error))
    else:
        columns = read_printed(lines)
    if not any(columns.values()):
        sys.exit(f'{path}: neither a log.csv with a step in it nor the printed lines of a training')
    folder, file = os.path.split(os.path.abspath(path))
    name = os.path.basename(folder) if file == 'log.csv' else os.path.splitext(file)[0]
    return columns, name


def read_printed(lines):
    """Return the columns in the printed lines of train.py, and 'tokens_per_iter' with the tokens of a step."""
    columns = {}
    evaluated = set()  # steps
    for line in lines:
        tokens = re.search(r'tokens per iteration will be: ([\d,]+)|([\d,]+) tokens per iteration', line)
        if tokens:
            columns['tokens_per_iter'] = [(0, float((tokens[1] or tokens[2]).replace(',', '')))]
        match = re.match(r'(step|iter) (\d+): (.*)', line)
        if not match:
            continue
        kind, step, numbers = match[1], int(match[2]), match[3]
        for name, value in re.findall(r'([a-z ]+?) (-?[\d.]+(?:e-?\d+)?|nan|inf)(?:ms|%)?(?:,|$)', numbers):
            name = name.strip().replace(' ', '_')
            if name == 'time':
                name = 'ms'
            columns.setdefault(name, []).append((step, float(value)))
        if kind == 'step':
            evaluated.add(step)
    if 'ms' in columns:  # nanoGPT's time of a step includes the evaluation before it
        median = statistics.median([ms for step, ms in columns['ms'] if step not in evaluated] or [0])
        columns['ms'] = [(step, min(ms, median) if step in evaluated else ms) for step, ms in columns['ms']]
    return columns


def read_reference(run):
    """Return the columns of a run's reference run; {}, and say why on stderr, if it cannot be drawn."""
    from core.training.reference_runs import find_reference, summary  # here, because it imports torch
    path = find(run)
    folder, changes = find_reference(path if os.path.isdir(path) else os.path.dirname(path))
    if changes:
        print(f'{run}: its reference run had other settings: {summary(changes)}', file=sys.stderr)
    if folder and x != 'time':
        return read(folder)[0]
    why = 'no reference run has its config files; python benchmarks/reference.py makes one of a finished run'
    if folder:
        why = 'its reference run is from another machine and has no times; use --x=iter or --x=tokens'
    print(f'{run}: {why}', file=sys.stderr)
    return {}

# ----------------------------------------------------------------------------- curves


def numbers_of(columns, name, run, why):
    """Return steps and numbers of a column, (2, n). Exits if the run has none."""
    if not columns.get(name):
        near = [close for close in difflib.get_close_matches(name, columns, 1) if close != name]
        hint = f' (did you mean {near[0]}?)' if near else ''
        available = ', '.join(key for key in columns if columns[key] and key != 'tokens_per_iter')
        sys.exit(f'{why}: {run} has no numbers of {name}{hint}; it has {available}')
    return np.array(columns[name]).T


def curve(columns, run, y):
    """Return (xs, ys) of a run's column y."""
    steps, ys = numbers_of(columns, y, run, f'y={y}')
    if x == 'tokens':
        return steps * tokens_per_step(columns, run), ys
    if x == 'time':
        return seconds_at(steps, columns, run), ys
    return steps, ys


def tokens_per_step(columns, run):
    if 'tokens_per_iter' in columns:
        return columns['tokens_per_iter'][0][1]
    _, ms = numbers_of(columns, 'ms', run, 'x=tokens')
    _, rate = numbers_of(columns, 'tokens_per_s', run, 'x=tokens')
    n = min(len(ms), len(rate))
    return round(np.median(ms[:n] * rate[:n] / 1000))


def seconds_at(steps, columns, run):
    """Return the seconds of training before each of these steps. A logged ms is the mean since the row before."""
    logged, ms = numbers_of(columns, 'ms', run, 'x=time')
    steps_since = np.diff(logged, prepend=logged[0] - 1)
    seconds = np.cumsum(ms * steps_since) / 1000  # when the logged step has ended
    return np.interp(steps, [logged[0], *(logged + 1)], [0, *seconds])

# ----------------------------------------------------------------------------- the picture


def draw(panels):
    """Draw and save the picture. panels: {column: [(xs, ys, name), ...]}."""
    try:
        from matplotlib import font_manager, rcParams
        from matplotlib.figure import Figure
    except ImportError:
        sys.exit('plot.py needs matplotlib: pip install matplotlib')
    warnings.filterwarnings('ignore', 'Glyph')  # no installed font has it
    installed = {font.name for font in font_manager.fontManager.ttflist}
    rcParams['font.family'] = ['DejaVu Sans', *(name for name in CJK if name in installed)]

    n_columns = min(3, len(panels))
    n_rows = math.ceil(len(panels) / 3)
    size = (8, 5) if len(panels) == 1 else (4.5 * n_columns, 3.2 * n_rows)
    figure = Figure(figsize=size, layout='constrained')
    names = [name.removesuffix(REFERENCE) for curves in panels.values() for _, _, name in curves]
    colours = {name: f'C{i}' for i, name in enumerate(dict.fromkeys(names))}  # each once, in order
    grid = figure.subplots(n_rows, n_columns, squeeze=False).flat
    for axes, (column, curves) in zip(grid, panels.items()):
        draw_panel(axes, column, curves, colours)
    for axes in figure.axes[len(panels):]:
        axes.remove()
    try:
        figure.savefig(os.path.expanduser(out), dpi=150)
    except (OSError, ValueError) as error:  # no such folder, no such format
        sys.exit(f'out={out}: cannot be written: {error}')


def draw_panel(axes, column, curves, colours):
    from matplotlib.ticker import LogFormatter
    lines = []
    for xs, ys, name in curves:
        run = name.removesuffix(REFERENCE)
        marker = 'o' if len(xs) <= 40 and run == name else ''
        style = '-' if run == name else '--'
        lines += axes.plot(xs, ys, style, linewidth=1.5, color=colours[run], marker=marker, markersize=3)
    axes.set(xlabel=LABELS[x], ylabel=column.replace('_', ' '))
    axes.set(xscale='log' if 'x' in log else 'linear', yscale='log' if 'y' in log else 'linear')
    if 'y' in log:
        axes.yaxis.set_major_formatter(LogFormatter())  # 3, not 3 * 10^0
        axes.yaxis.set_minor_formatter(LogFormatter())
    axes.grid(alpha=0.3, which='both')
    axes.spines[['top', 'right']].set_visible(False)
    labels = [name.replace('$', r'\$') for _, _, name in curves]  # $ would begin a formula
    axes.legend(lines, labels, frameon=False)


if not other_arguments:
    sys.exit('plot.py: which run? python plot.py out-a out-b --x=time (python plot.py --help lists the settings)')
if x not in LABELS or log not in ('', 'x', 'y', 'xy'):
    sys.exit(f'x={x}, log={log}: expected x to be {", ".join(LABELS)}, and log x, y or xy')
if not y.strip(','):
    sys.exit(f'y={y}: expected a column of log.csv, for example val_loss')

runs = [(run, *read(run)) for run in other_arguments]  # (argument, columns, name)
names = [name for _, _, name in runs]
references = {run: read_reference(run) for run in other_arguments} if reference else {}  # columns by run
panels = {}
for column in filter(None, y.split(',')):
    panels[column] = []
    for run, columns, name in runs:
        if ',' in y and not columns.get(column):
            continue  # of several columns a run need not have all
        label = name if names.count(name) == 1 else run
        panels[column].append((*curve(columns, run, column), label))
        if references.get(run, {}).get(column):
            panels[column].append((*curve(references[run], run, column), label + REFERENCE))
        elif references.get(run):
            print(f'{run}: its reference run has no {column}', file=sys.stderr)
    if not panels[column]:
        sys.exit(f'y={y}: no run here has numbers of {column}')
draw(panels)
for column, curves in panels.items():
    plural = '' if len(curves) == 1 else 's'
    last = ', '.join(f'{name} {ys[-1]:.4g}' for _, ys, name in curves)
    print(f'{out}: {column.replace("_", " ")} of {len(curves)} run{plural}: {last} at the end')
