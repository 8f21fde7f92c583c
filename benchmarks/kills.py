"""
Kill a small run again and again (kill -9) at random moments, also while it writes a checkpoint, start it anew each time, and compare what it ends with
with a run that nobody disturbed:

    python benchmarks/kills.py 100                               # so many kills
    python benchmarks/kills.py 100 --optimizer=muon --dtype=bfloat16     # with these settings of train.py

After every kill there must be a checkpoint to resume, not more than save_interval steps old; in the end losses and weights must be the same, bit for bit.
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

SAVE_INTERVAL = 6  # so a checkpoint of 9 MB is begun at every third step, and there is nearly always one being written
SETTINGS = ['--device=cpu', '--dtype=float32', '--compile=False', '--n_layer=4', '--n_head=2', '--n_embd=128', '--block_size=32', '--batch_size=4',
            '--gradient_accumulation_steps=1', '--eval_iters=1', '--eval_interval=50', '--warmup_iters=0', '--dropout=0.1', '--init_from=auto',
            f'--save_interval={SAVE_INTERVAL}']


def start(folder, out_dir, steps, settings):
    command = [sys.executable, 'train.py', *SETTINGS, f'--dataset={folder}', f'--out_dir={out_dir}', f'--max_iters={steps}', *settings]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding='utf-8')


def last_logged(out_dir):
    """Steps that are done, by the log."""
    try:
        return max((step + 1 for step, _ in losses_of(out_dir)), default=0)
    except (OSError, ValueError):
        return 0


def log_of(out_dir):
    """The file itself: every start makes another."""
    return os.stat(out_dir / 'log.csv').st_ino if (out_dir / 'log.csv').exists() else None


def last_saved(out_dir):
    if not any(out_dir.glob('ckpt*.pt')):
        return 0
    return load_last(str(out_dir))[0]['iter_num']


def kill_and_compare(folder, kills, settings=(), seed=1):
    """Do all that. Returns a line with what happened; AssertionError where something was lost."""
    folder, draw, steps = Path(folder), random.Random(seed), 30 * kills
    digits_dataset(folder / 'data')
    process = start(folder / 'data', folder / 'whole', steps, settings)
    assert process.wait() == 0, process.stderr.read()
    killed, writing, most_lost, alive, out_dir = 0, 0, 0, 0, folder / 'killed'
    while killed < kills:
        log, before, deadline = log_of(out_dir), last_saved(out_dir), time.monotonic() + 60
        process = start(folder / 'data', out_dir, steps, settings)
        if draw.random() < 0.9:  # else while it is starting
            while process.poll() is None and (log_of(out_dir) == log or last_logged(out_dir) <= before):  # until it has written a log of its own, and a step
                assert time.monotonic() < deadline, 'it does not get on'
                time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr.read()
            break  # it was faster
        process.kill()
        process.wait()
        killed += 1
        writing += any(out_dir.glob(f'ckpt.pt.tmp{process.pid}'))
        alive += log_of(out_dir) != log and last_logged(out_dir) > before
        most_lost = max(most_lost, last_logged(out_dir) - last_saved(out_dir))
        assert most_lost <= SAVE_INTERVAL, f'{most_lost} steps lost at step {last_logged(out_dir)}'
    process = start(folder / 'data', out_dir, steps, settings)
    assert process.wait() == 0, process.stderr.read()
    for column in ('loss', 'grad_norm', 'val_loss'):
        assert losses_of(folder / 'whole', column) == losses_of(out_dir, column), f'{column}: not as in the run that was not killed'
    whole, parts = (load_last(str(path))[0] for path in (folder / 'whole', out_dir))
    assert whole['iter_num'] == parts['iter_num'] == steps
    assert all(torch.equal(whole['model'][key], parts['model'][key]) for key in whole['model']), 'other weights'
    assert not list(out_dir.glob('*.tmp*')), 'something half-written is left'
    return (f'{killed} kills in {steps} steps, {alive} of them while it trained and {writing} while a checkpoint was written: always resumed, at most {most_lost} steps lost '
            f'(save_interval={SAVE_INTERVAL}), the same losses and weights bit for bit')


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as temporary:
        print(kill_and_compare(temporary, int(sys.argv[1]), sys.argv[2:]))
