"""
Make the reference runs in docs/reference, with which train.py and plot.py --reference compare a run:

    python benchmarks/reference.py out-shakespeare-char-cpu                                     # of a finished run
    python benchmarks/reference.py config/train_shakespeare_char_cpu.py --n_layer=2 --max_iters=110  # trains first
    python benchmarks/reference.py --all        # all of RUNS below that are missing; some hours on two cores

docs/reference/NAME gets log.csv, thinned out, and run.json with command, date, commit, machine and settings. NAME is
the config files, with + between them, and the other settings that change what is learned; --name=NAME replaces it.
Training is in out-reference-NAME, and goes on after an interruption; the folder may be deleted afterwards. A run that
you train yourself should have --log_interval=1, so that its loss is averaged over all steps.
"""
import csv
import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import core.startup  # noqa: F401, E402  it catches Ctrl-C and missing packages in the imports below

import numpy as np  # noqa: E402
import torch  # noqa: E402

from core.files import atomic_folder, dataset_folder, find  # noqa: E402
from core.training.reference_runs import FOLDER, NEUTRAL, config_files, read_run  # noqa: E402
from core.training.run_folder import read_run_json  # noqa: E402

LOSS_ROWS = 32  # at most
EVALUATION_ROWS = 25  # at most
SHAKESPEARE = 'data/shakespeare_char/prepare.py'
POEMS = 'data/tang_poems/prepare.py'
LAPTOP = ('config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --block_size=64 '
          '--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0')
PRETRAINED = 'out-reference-pretrain_poems/best.pt'
TUNED = 'out-reference-sft_poems/best.pt'
# Dataset, the commands that prepare it if it is missing, and arguments of train.py, of all that the documentation names
# and a CPU can train. More evaluations than in the config files give a finer curve, and change nothing else.
RUNS = [
    ('shakespeare_char', [SHAKESPEARE], 'config/train_shakespeare_char_cpu.py --eval_interval=30'),
    ('shakespeare_char', [SHAKESPEARE],
     'config/train_shakespeare_char_cpu.py --n_layer=2 --max_iters=110 --eval_interval=10'),
    ('shakespeare_char', [SHAKESPEARE], f'{LAPTOP} --eval_interval=125 --name=nanogpt_laptop'),
    ('shakespeare_char', [SHAKESPEARE], 'config/speedrun_shakespeare_char.py --eval_interval=50'),
    ('shakespeare_bbpe', [SHAKESPEARE, 'data/any_text/prepare.py data/shakespeare_char/input.txt --tokenizer=bbpe '
                          '--vocab_size=4096 --name=shakespeare_bbpe'],
     'config/own_text.py --dataset=shakespeare_bbpe --epochs=2 --eval_interval=10'),
    ('hongloumeng_char', ['data/hongloumeng_char/prepare.py'],
     'config/train_hongloumeng_char.py config/laptop.py --eval_interval=200'),
    ('hongloumeng_char', ['data/hongloumeng_char/prepare.py'],
     'config/train_hongloumeng_char.py config/laptop.py config/qwen3.py --eval_interval=200'),
    ('hongloumeng_bbpe', ['data/hongloumeng_bbpe/prepare.py'],
     'config/train_hongloumeng_bbpe.py config/laptop.py --eval_interval=200'),
    ('hongloumeng_qwen2', ['data/hongloumeng_qwen2/prepare.py'],
     'config/train_hongloumeng_qwen2.py config/laptop.py --eval_interval=200'),
    ('classics_bbpe', ['data/classics_bbpe/prepare.py'],
     'config/train_classics_bbpe.py config/laptop.py --eval_interval=200'),
    ('tang_poems', [POEMS], 'config/pretrain_poems.py --eval_interval=60'),
    ('tang_poems', [POEMS], f'config/sft_poems.py --init_from={PRETRAINED} --eval_interval=30'),
    ('tang_poems', [POEMS], f'config/lora_poems.py --init_from={PRETRAINED} --eval_interval=30'),
    ('tang_poems', [POEMS], f'config/reward_poems.py --init_from={TUNED} --eval_interval=10'),
    ('tang_poems', [POEMS], f'config/dpo_poems.py --init_from={TUNED} --reference={TUNED} --eval_interval=10'),
    ('tang_poems', [POEMS], f'config/grpo_poems.py --init_from={TUNED} --reference={TUNED} '
                            '--reward=out-reference-reward_poems --eval_interval=4 --name=grpo_poems'),
]


def thin(columns, last_step):
    """
    Thin out the columns of a log.csv, {name: [(step, number), ...]}. Return rows {step: {name: number}}.
    A row of the loss is its mean over some steps, and stands at the middle of them. The rows are denser at the
    beginning, where the curve bends. Evaluations are not averaged; if there are too many, some are left out.
    """
    rows = {}
    edges = np.unique(np.round(last_step * np.linspace(0, 1, LOSS_ROWS + 1)**2))
    steps, losses = np.array(columns.get('loss') or np.empty((0, 2))).T
    for begin, end in zip(edges, edges[1:]):
        inside = (steps >= begin) & (steps < end)
        if inside.any():
            rows[round(steps[inside].mean())] = {'loss': losses[inside].mean()}
    for name in (name for name in columns if name.startswith('val_') and columns[name]):
        n = len(columns[name])
        for i in np.unique(np.round(np.linspace(0, n - 1, min(n, EVALUATION_ROWS)))).astype(int):
            step, number = columns[name][i]
            rows.setdefault(step, {})[name] = number
    return dict(sorted(rows.items()))


def make_reference(out_dir, name=''):
    """Write the reference of a finished run to FOLDER. Exits if it is not finished, or lacks what is needed."""
    run_json = read_run_json(out_dir)
    if not config_files(run_json):
        sys.exit(f'{out_dir}: expected the folder of a run that was started with a config file of this version; its '
                 'run.json names none')
    try:
        columns = read_run(out_dir)
    except (OSError, ValueError) as error:
        sys.exit(f'{out_dir}: {error}')
    max_iters = run_json['config']['max_iters']
    last_step = max((step for column in columns.values() for step, _ in column), default=0)
    by_the_clock = run_json['config'].get('minutes') and os.path.exists(os.path.join(out_dir, 'weights.pt'))
    if (last_step < max_iters and not by_the_clock) or max_iters < 1:
        sys.exit(f'{out_dir}: stopped at step {last_step} of {max_iters}; resume it first, by the same command with '
                 '--init_from=resume')
    name = name or default_name(run_json['command'])
    if len(name) > 100:
        sys.exit(f'{name}: too long for the name of a folder; give one: --name=NAME')
    rows = thin(columns, last_step)
    measures = sorted({key for row in rows.values() for key in row} - {'loss'}, key=list(columns).index)
    first, *_ = rows.values()
    if columns.get('ms') and columns.get('tokens_per_s'):  # plot.py --x=tokens reads it
        pairs = zip(columns['ms'], columns['tokens_per_s'])
        first['tokens_per_iter'] = round(np.median([ms * rate / 1000 for (_, ms), (_, rate) in pairs]))
    folder = os.path.join(FOLDER, name)
    os.makedirs(FOLDER, exist_ok=True)
    with atomic_folder(folder) as temporary:
        with open(os.path.join(temporary, 'log.csv'), 'w', encoding='utf-8', newline='') as f:
            writer = csv.DictWriter(f, ['iter', 'loss', *measures, 'tokens_per_iter'], lineterminator='\n')
            writer.writeheader()
            for step, row in rows.items():
                writer.writerow({'iter': step, **{key: f'{value:.5g}' for key, value in row.items()}})
        with open(os.path.join(temporary, 'run.json'), 'w', encoding='utf-8') as f:
            json.dump({
                'command': run_json['command'],
                'date': datetime.date.fromtimestamp(os.path.getmtime(os.path.join(out_dir, 'log.csv'))).isoformat(),
                'commit': commit(),
                'machine': f'{cpu_name()}, threads: {torch.get_num_threads()}, torch {torch.__version__}',
                'data': run_json['data'],
                'config': run_json['config'],
            }, f, indent=1, ensure_ascii=False)
            f.write('\n')
    print(f'wrote {folder}: {len(rows)} rows')


def default_name(command):
    """Return the config files of a command, joined by +, with its settings that change what is learned."""
    names = config_files({'command': command})
    for word in command[1:]:
        key = word[2:].partition('=')[0]
        if word.startswith('--') and key not in set(NEUTRAL) - {'max_iters', 'epochs'}:
            names.append(re.sub(r'[^\w.=-]', '_', word[2:]))
    return '+'.join(names)


def commit():
    """Return the short commit of the repository; '' if this is not a git repository."""
    try:
        command = ['git', 'rev-parse', '--short', 'HEAD']
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ''


def cpu_name():
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            return re.search(r'model name\s*: (.*)', f.read())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def python(*arguments):
    """Run a script of the repository. Return whether it succeeded. After Ctrl-C it saves, and this script ends, too."""
    print('$ python', shlex.join(arguments), flush=True)
    with subprocess.Popen([sys.executable, *arguments], cwd=ROOT) as process:
        try:
            return process.wait() == 0
        except KeyboardInterrupt:
            process.wait()
            raise


def train(arguments, name):
    """Train in out-reference-NAME, or resume there, and make the reference. Return whether it succeeded."""
    out_dir = f'out-reference-{name}'
    resume = ['--init_from=resume'] if os.path.exists(os.path.join(ROOT, out_dir, 'ckpt.pt')) else []
    done = python('train.py', *arguments, '--log_interval=1', f'--out_dir={out_dir}', *resume)
    if done:
        make_reference(os.path.join(ROOT, out_dir), name)
    return done


def make_all():
    """Make what is missing of RUNS. Return the names of those that fail."""
    failed = []
    for dataset, preparations, command in RUNS:
        arguments, name = split_name(command.split())
        name = name or default_name(['train.py', *arguments])
        if os.path.exists(os.path.join(FOLDER, name)):
            continue
        prepared = os.path.exists(os.path.join(dataset_folder(dataset), 'train.bin'))
        ready = prepared or all(python(*preparation.split()) for preparation in preparations)
        if not (ready and train(arguments, name)):
            failed.append(name)
    return failed


def split_name(arguments):
    """Return the arguments without --name=NAME, and NAME or ''. Exits unless it can be the name of a folder."""
    rest = [word for word in arguments if not word.startswith('--name=')]
    name = ''.join(word.partition('=')[2] for word in arguments if word not in rest)
    if name != os.path.basename(name) or name in ('.', '..'):
        sys.exit(f'--name={name}: expected the name of a folder in docs/reference, without a path')
    return rest, name


def main():
    core.startup.end_imports()
    arguments, name = split_name(sys.argv[1:])
    if not arguments or {'--help', '-h'} & set(arguments):
        print(__doc__.strip(), file=sys.stdout if arguments else sys.stderr)
        sys.exit(0 if arguments else 2)
    if arguments == ['--all']:
        failed = make_all()
        if failed:
            sys.exit(f'failed, see above: {", ".join(failed)}; the same command tries them again')
    elif config_files({'command': ['train.py', *arguments]}):
        sys.exit(0 if train(arguments, name or default_name(['train.py', *arguments])) else 1)  # train.py says why
    elif len(arguments) > 1:
        sys.exit(f'{arguments[1]}: expected a config file, or the folder of one run and perhaps --name=NAME')
    else:
        make_reference(find(arguments[0]), name)


if __name__ == '__main__':
    main()
