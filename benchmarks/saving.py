"""
What saving costs. How long training waits for a checkpoint of GPT-2 124M that is written in the background:

    python bench.py --what=save

A line is a pair of checkpoints: milliseconds of a step, then the seconds of a blocking save, those that training waited
for a save in the background, and the steps that ran meanwhile. The last two lines have ratios of background / blocking:
of the waiting, and of the waiting with what the steps lost because they were slower.

And how much of a step everything costs that protects a run: a checkpoint every 100 steps, the watch over jumps of the
loss, and signal handlers:

    python bench.py --what=trust --steps=600

A line is a run of nanoGPT's laptop network: mean milliseconds per step with or without all this. The last line has the
ratio of every pair.
"""
import os
import statistics
import tempfile
from types import SimpleNamespace

import torch

from benchmarks.common import duration, median_ms, print_ratios, time_train
from benchmarks.laptop import LAPTOP
from core.device import setup
from core.files import ROOT
from core.training.optimizer import configure_optimizer
from core.training.saver import Saver
from model import GPT, GPTConfig


def time_saving(runs):
    env = setup(training=True)
    model = GPT(GPTConfig()).to(env.device)
    opt = configure_optimizer(model, 'adamw', 0.1, 6e-4, (0.9, 0.95))
    idx = torch.randint(50257, (1, 257), device=env.device)

    def step():
        with env.ctx():
            model(idx[:, :-1], idx[:, 1:]).mean().backward()
        opt.step()
        opt.zero_grad()
        next(model.parameters()).flatten()[0].item()  # waits for a GPU

    usual = median_ms(step, 20) / 1000
    checkpoint = {'model': model.state_dict(), 'optimizer': opt.state_dict(), 'iter_num': 0}
    log = SimpleNamespace(sync=lambda: None)
    blocking = []  # seconds of a blocking save
    waited = []  # seconds that training waits for a save in the background
    lost = []  # the same, and what the slower steps lost meanwhile
    with tempfile.TemporaryDirectory(dir='.') as out:
        background_saver = Saver(out, env, log, 1, background=True)
        blocking_saver = Saver(out, env, log, 1, background=False)
        background_saver.reserve(checkpoint)
        background_saver.wait()
        for _ in range(runs):
            blocking.append(duration(lambda: blocking_saver.save(checkpoint)))
            waited.append(duration(lambda: background_saver.save(checkpoint)))
            times = []
            while background_saver.thread.is_alive():
                times.append(duration(step))
            lost.append(waited[-1] + sum(times) - usual * len(times))
            print(f'a step {usual:.2f} s; blocking {blocking[-1]:.2f} s; beside training: waited {waited[-1]:.2f} s, '
                  f'and {len(times)} steps took {sum(times):.2f} s', flush=True)
    print_ratios('training waits, beside / blocking', waited, blocking)
    print_ratios('waited, and lost by slower steps, beside / blocking', lost, blocking)


def time_trust(steps, seconds, runs):
    """Each pair runs in the other order than the one before."""
    means = {True: [], False: []}  # of bare runs and of usual runs: ms per step
    with tempfile.TemporaryDirectory() as out:
        arguments = [*LAPTOP, '--eval_interval=1000000000', '--eval_iters=1', '--save_interval=200',
                     f'--out_dir={os.path.join(out, "run")}']
        for i in range(runs):
            for bare in (True, False) if i % 2 else (False, True):
                result = time_train(ROOT, arguments, out, steps, seconds, bare=bare)
                means[bare].append(statistics.mean(result['times']))
                print(f'{means[bare][-1]:.2f} ms a step {"without" if bare else "with"}', flush=True)
    print_ratios('ms per step, looked after / not', means[False], means[True])
