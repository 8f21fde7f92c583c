"""
The curves of one run or several, from their log.csv, as a picture.

    python plot.py out-a out-b                                      # validation loss over steps, to curves.png
    python plot.py out-a out-b --x=time --y=loss --log=y --out=loss.png
    python plot.py out-a nanogpt.txt --x=time                       # and what nanoGPT's train.py has printed, saved to a file
    python plot.py out-dpo out-grpo --y=val_loss,val_reward,val_kl  # a picture of several, each with the runs that have it

A run is its folder, its log.csv, or a file with the printed lines of nanoGPT's train.py or ours. It needs matplotlib.
"""
import csv
import difflib
import os
import re
import statistics
import sys
import warnings

import numpy as np

from core.files import find

# ---------------------------------------------------------------------------------------------------------------------------------------
x = 'iter'  # 'iter'; 'tokens' that were trained on; 'time': the seconds that the steps took, without evaluations
y = 'val_loss'  # a column of log.csv: loss, train_loss, val_loss, lr, grad_norm, ms, ...; several, each in a panel of its own, are separated by commas
log = ''  # axes with a logarithmic scale: 'x', 'y' or 'xy'
out = 'curves.png'  # the picture; .pdf and .svg work too
# ---------------------------------------------------------------------------------------------------------------------------------------
OTHER_ARGUMENTS = 'positional'  # the runs
other_arguments = []  # filled by the configurator
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())

LABELS = {'iter': 'step', 'tokens': 'tokens', 'time': 'seconds of training, evaluations left out'}
CJK = ('Noto Sans CJK SC', 'Noto Sans SC', 'Source Han Sans SC', 'Source Han Sans CN', 'WenQuanYi Micro Hei', 'WenQuanYi Zen Hei', 'PingFang SC',
       'Hiragino Sans GB', 'Microsoft YaHei', 'SimHei', 'Arial Unicode MS')


def read_csv(path, lines):
    """{column: [(step, number)]} of a log.csv."""
    reader, columns = csv.DictReader(lines), {}
    try:
        for row in reader:
            for name, value in row.items():
                if value and name != 'iter':
                    columns.setdefault(name, []).append((int(row['iter']), float(value)))
                columns.setdefault(name, [])
    except (ValueError, TypeError, csv.Error):  # text, a row that is too long, a zero byte
        sys.exit(f'{path}: line {reader.line_num} is damaged: expected the numbers of {", ".join(reader.fieldnames)}')
    return columns


def read_printed(lines):
    """The same from lines that train.py has printed, and at 'tokens_per_iter' the tokens of a step."""
    columns, evaluated = {}, set()
    for line in lines:
        tokens = re.search(r'tokens per iteration will be: ([\d,]+)|([\d,]+) tokens per iteration', line)
        step = re.match(r'(step|iter) (\d+): (.*)', line)
        if tokens:
            columns['tokens_per_iter'] = [(0, float((tokens[1] or tokens[2]).replace(',', '')))]
        for name, value in re.findall(r'([a-z ]+?) (-?[\d.]+(?:e-?\d+)?|nan|inf)(?:ms|%)?(?:,|$)', step[3]) if step else ():
            columns.setdefault({'time': 'ms'}.get(name.strip(), name.strip().replace(' ', '_')), []).append((int(step[2]), float(value)))
        if step and step[1] == 'step':
            evaluated.add(int(step[2]))
    if 'ms' in columns:  # nanoGPT counts an evaluation to the step after it
        usual = statistics.median([ms for step, ms in columns['ms'] if step not in evaluated] or [0])
        columns['ms'] = [(step, min(ms, usual) if step in evaluated else ms) for step, ms in columns['ms']]
    return columns


def read(run):
    """(columns, name for the legend) of a run."""
    path = find(run)
    path = os.path.join(path, 'log.csv') if os.path.isdir(path) else path
    try:
        with open(path, encoding='utf-8', errors='replace', newline='') as f:
            lines = f.read().splitlines()
    except OSError as error:
        sys.exit(f'{path}: cannot be read: {error.strerror}; expected the folder of a run, its log.csv, or the printed lines of a training')
    columns = read_csv(path, lines) if lines and lines[0].split(',')[0] == 'iter' else read_printed(lines)
    if not any(columns.values()):
        sys.exit(f'{path}: neither a log.csv with a step in it nor the printed lines of a training')
    folder, file = os.path.split(os.path.abspath(path))
    return columns, os.path.basename(folder) if file == 'log.csv' else os.path.splitext(file)[0]


def needed(columns, name, run, why):
    if not columns.get(name):
        near = ''.join(f' (did you mean {near}?)' for near in difflib.get_close_matches(name, columns, 1) if near != name)
        sys.exit(f'{why}: {run} has no numbers of {name}{near}; it has {", ".join(key for key in columns if columns[key] and key != "tokens_per_iter")}')
    return np.array(columns[name]).T  # (2, n): steps, numbers


def curve(columns, run, y):
    """What is drawn of a run's column y: (xs, ys)."""
    steps, ys = needed(columns, y, run, f'y={y}')
    if x == 'tokens' and 'tokens_per_iter' in columns:
        steps = steps * columns['tokens_per_iter'][0][1]
    elif x == 'tokens':
        (_, ms), (_, rate) = (needed(columns, name, run, 'x=tokens') for name in ('ms', 'tokens_per_s'))
        n = min(len(ms), len(rate))
        steps = steps * round(np.median(ms[:n] * rate[:n] / 1000))
    elif x == 'time':  # ms is the mean of the steps since the row before; a step ends that long after the one before
        at, ms = needed(columns, 'ms', run, 'x=time')
        seconds = np.cumsum(ms * np.diff(at, prepend=at[0] - 1)) / 1000
        steps = np.interp(steps, [at[0], *(at + 1)], [0, *seconds])
    return steps, ys


def draw(panels):
    """panels: {column: [(xs, ys, name), ...]}."""
    try:
        from matplotlib import font_manager, rcParams
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogFormatter
    except ImportError:
        sys.exit('plot.py needs matplotlib: pip install matplotlib')
    warnings.filterwarnings('ignore', 'Glyph')  # no font here has it
    installed = {font.name for font in font_manager.fontManager.ttflist}
    rcParams['font.family'] = ['DejaVu Sans', *(name for name in CJK if name in installed)]
    figure = Figure(figsize=(8 if len(panels) == 1 else 4.5 * min(3, len(panels)), 5 if len(panels) == 1 else 3.2 * -(-len(panels) // 3)), layout='constrained')
    colours = {name: f'C{i}' for i, name in enumerate(dict.fromkeys(name for curves in panels.values() for *_, name in curves))}
    for axes, (y, curves) in zip(figure.subplots(-(-len(panels) // 3), min(3, len(panels)), squeeze=False).flat, panels.items()):
        lines = [axes.plot(xs, ys, linewidth=1.5, color=colours[name], marker='o' if len(xs) <= 40 else '', markersize=3)[0] for xs, ys, name in curves]
        axes.set(xlabel=LABELS[x], ylabel=y.replace('_', ' '), xscale='log' if 'x' in log else 'linear', yscale='log' if 'y' in log else 'linear')
        if 'y' in log:
            axes.yaxis.set_major_formatter(LogFormatter())  # 3, not 3 * 10^0
            axes.yaxis.set_minor_formatter(LogFormatter())
        axes.grid(alpha=0.3, which='both')
        axes.spines[['top', 'right']].set_visible(False)
        axes.legend(lines, [name.replace('$', r'\$') for *_, name in curves], frameon=False)
    for axes in figure.axes[len(panels):]:
        axes.remove()
    try:
        figure.savefig(os.path.expanduser(out), dpi=150)
    except (OSError, ValueError) as error:  # no such folder, no such format
        sys.exit(f'out={out}: cannot be written: {error}')


if not other_arguments:
    sys.exit('plot.py: which run? python plot.py out-a out-b --x=time (python plot.py --help lists the settings)')
if x not in LABELS or log not in ('', 'x', 'y', 'xy'):
    sys.exit(f'x={x}, log={log}: expected x to be {", ".join(LABELS)}, and log x, y or xy')
runs = [read(run) for run in other_arguments]
names = [name for _, name in runs]
panels, several = {}, ',' in y
for column in filter(None, y.split(',')):
    panels[column] = [(*curve(columns, run, column), name if names.count(name) == 1 else run)
                      for run, (columns, name) in zip(other_arguments, runs) if not several or columns.get(column)]
    if not panels[column]:
        sys.exit(f'y={y}: no run here has numbers of {column}')
draw(panels)
for column, curves in panels.items():
    print(f'{out}: {column.replace("_", " ")} of {len(curves)} run{"s" * (len(curves) > 1)}: ' + ', '.join(f'{name} {ys[-1]:.4g}' for _, ys, name in curves) + ' at the end')
