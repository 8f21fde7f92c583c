"""
nanoGPT's laptop command from start to end, in nanoGPT's folder and in this one, in turn:

    python bench.py --nanogpt=../nanoGPT
    python bench.py --nanogpt=../nanoGPT --ours='config/train_shakespeare_char_cpu.py --n_layer=2 --max_iters=110'

--ours replaces the arguments of our train.py, for example to compare the time to the same loss. nanoGPT's
data/shakespeare_char must be prepared.

A line is a run: the seconds of the whole process, and those from the first step on (after import, compilation and the
first evaluation). The last two lines have the ratios ours / nanoGPT of both.
"""
import os
import subprocess
import sys
import tempfile
import time

from benchmarks.common import print_ratios
from core.files import ROOT

# the command in nanoGPT's README, printing every step
LAPTOP = [
    'config/train_shakespeare_char.py', '--device=cpu', '--compile=False', '--eval_iters=20', '--log_interval=1',
    '--block_size=64', '--batch_size=12', '--n_layer=4', '--n_head=4', '--n_embd=128',
    '--max_iters=2000', '--lr_decay_iters=2000', '--dropout=0.0',
]


def time_laptop(nanogpt, ours, runs):
    """nanogpt: its folder. ours: arguments of our train.py in one text, '' for the same command."""
    if not nanogpt or not os.path.exists(os.path.join(nanogpt, 'data', 'shakespeare_char', 'train.bin')):
        sys.exit(f'nanogpt={nanogpt}: expected a folder with nanoGPT whose data/shakespeare_char is prepared')
    commands = {'nanoGPT': (nanogpt, LAPTOP), 'StoneGPT': (ROOT, ours.split() or LAPTOP)}
    times = {name: [] for name in commands}
    loop_times = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as out:
        for _ in range(runs):
            for name, (folder, arguments) in commands.items():
                seconds, loop_seconds = time_command(folder, arguments, os.path.join(out, name))
                times[name].append(seconds)
                loop_times[name].append(loop_seconds)
                print(f'{name}: {seconds:.1f} s, from the first step on {loop_seconds:.1f} s', flush=True)
    print_ratios('ratio of each pair', times['StoneGPT'], times['nanoGPT'])
    print_ratios('from the first step on', loop_times['StoneGPT'], loop_times['nanoGPT'])


def time_command(folder, arguments, out_dir):
    """Run folder/train.py. Returns its seconds, and its seconds after the evaluation at step 0. Exits if it fails."""
    command = [sys.executable, '-u', 'train.py', *arguments, f'--out_dir={out_dir}']
    started = time.perf_counter()
    loop_started = None
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, encoding='utf-8') as process:
        for line in process.stdout:
            if line.startswith('step 0:') and loop_started is None:
                loop_started = time.perf_counter()
    if process.returncode:
        sys.exit(f'{folder}: train.py {" ".join(arguments)} ended with {process.returncode}')
    ended = time.perf_counter()
    return ended - started, ended - loop_started
