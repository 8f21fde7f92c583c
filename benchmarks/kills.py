"""
Kill a small training run with kill -9 at random moments, also while it writes a checkpoint, restart it every time, and
compare the end with a run that was not killed:

    python benchmarks/kills.py 100                                      # number of kills
    python benchmarks/kills.py 100 --optimizer=muon --dtype=bfloat16    # with these settings of train.py

After every kill a checkpoint must exist that is at most save_interval steps old. At the end, losses and weights must be
equal bit for bit. The printed line says how many kills hit training and writing, and the most steps that were lost.
"""
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
from conftest import digits_dataset, losses_of  # noqa: E402

from core.weights.checkpoint import load_last  # noqa: E402

SAVE_INTERVAL = 6  # a checkpoint of 9 MB is begun at every third step, so that nearly always one is being written
SETTINGS = [
    '--device=cpu', '--dtype=float32', '--compile=False', '--init_from=auto',
    '--n_layer=4', '--n_head=2', '--n_embd=128', '--block_size=32', '--dropout=0.1',
    '--batch_size=4', '--gradient_accumulation_steps=1', '--warmup_iters=0',
    '--eval_iters=1', '--eval_interval=50', f'--save_interval={SAVE_INTERVAL}',
]


def start(dataset, out_dir, steps, settings):
    """Start train.py and return its process."""
    paths = [f'--dataset={dataset}', f'--out_dir={out_dir}']
    command = [sys.executable, 'train.py', *SETTINGS, *paths, f'--max_iters={steps}', *settings]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding='utf-8')


def finish(process):
    """Wait for a process that must succeed."""
    assert process.wait() == 0, process.stderr.read()


def last_logged(out_dir):
    """Return the number of steps in log.csv."""
    try:
        return max((step + 1 for step, _ in losses_of(out_dir)), default=0)
    except (OSError, ValueError):
        return 0


def log_inode(out_dir):
    """Return the inode of log.csv, which is new after every start; None if there is no log."""
    path = out_dir / 'log.csv'
    return os.stat(path).st_ino if path.exists() else None


def last_saved(out_dir):
    """Return the number of steps in the last checkpoint."""
    if not any(out_dir.glob('ckpt*.pt')):
        return 0
    return load_last(str(out_dir))[0]['iter_num']


def kill_and_compare(folder, kills, settings=(), seed=1):
    """Do all this in `folder`. Returns the line to print. Raises AssertionError if something is lost."""
    folder = Path(folder)
    dataset = folder / 'data'
    undisturbed = folder / 'whole'
    out_dir = folder / 'killed'
    steps = 30 * kills
    rng = random.Random(seed)
    digits_dataset(dataset)
    finish(start(dataset, undisturbed, steps, settings))

    killed = 0
    while_training = 0
    while_writing = 0
    most_lost = 0  # steps
    while killed < kills:
        log_before = log_inode(out_dir)
        saved_before = last_saved(out_dir)

        def is_training():  # this start has written its log, and a step
            return log_inode(out_dir) != log_before and last_logged(out_dir) > saved_before

        deadline = time.monotonic() + 60
        process = start(dataset, out_dir, steps, settings)
        if rng.random() < 0.9:  # the other kills hit the start
            while process.poll() is None and not is_training():
                assert time.monotonic() < deadline, 'no step within a minute'
                time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is not None:  # it finished before the kill
            finish(process)
            break
        process.kill()
        process.wait()
        killed += 1
        while_writing += any(out_dir.glob(f'ckpt.pt.tmp{process.pid}'))
        while_training += is_training()
        most_lost = max(most_lost, last_logged(out_dir) - last_saved(out_dir))
        assert most_lost <= SAVE_INTERVAL, f'{most_lost} steps lost at step {last_logged(out_dir)}'
    finish(start(dataset, out_dir, steps, settings))

    for column in ('loss', 'val_loss', 'grad_norm'):
        same = losses_of(undisturbed, column) == losses_of(out_dir, column)
        assert same, f'{column}: not as in the run that was not killed'
    expected = load_last(str(undisturbed))[0]
    found = load_last(str(out_dir))[0]
    assert expected['iter_num'] == found['iter_num'] == steps
    for part in ('model', 'ema'):
        assert expected[part].keys() == found[part].keys()
        for key, weight in expected[part].items():
            assert torch.equal(weight, found[part][key]), f'{key}: other weights'
    assert not list(out_dir.glob('*.tmp*')), 'an unfinished file is left'
    return (f'{killed} kills in {steps} steps, {while_training} of them while it trained and {while_writing} while a '
            f'checkpoint was written: always resumed, at most {most_lost} steps lost '
            f'(save_interval={SAVE_INTERVAL}), the same losses and weights bit for bit')


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as temporary:
        print(kill_and_compare(temporary, int(sys.argv[1]), sys.argv[2:]))
