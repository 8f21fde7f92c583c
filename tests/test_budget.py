"""train.py --minutes: the number of steps follows a clock. Here that is a simulated one, except in the slow tests."""
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, clock_of_steps, exit_line, run_script

from core import startup
from core.training.budget import Budget, duration, steps_within

CONFIG = {'minutes': 10.0, 'auto': False, 'compile': False, 'max_iters': 2000, 'lr_decay_iters': 2000,
          'warmup_iters': 100, 'eval_interval': 250}
CPU = SimpleNamespace(device_type='cpu', ddp=False, master=True, world_size=1)
BUDGETED = [setting for setting in TINY if not setting.startswith(('--max_iters', '--lr_decay'))]


def brute_force(seconds, step, step_seconds, evaluation_seconds, eval_interval):
    """Return how many steps can be done, by doing them: before each one, the evaluation that is due."""
    n = 0
    while True:
        if n and (step + n) % eval_interval == 0:
            seconds -= evaluation_seconds
        seconds -= step_seconds
        if seconds < 0:
            return n
        n += 1


@pytest.mark.parametrize('step, interval', [(0, 10), (7, 10), (10, 10), (3, 1), (0, 1000)])
@pytest.mark.parametrize('seconds', [0.0, 0.5, 1.0, 9.0, 33.0, 100.0])
def test_steps_within(seconds, step, interval):
    assert steps_within(seconds, step, 1.0, 4.0, interval) == brute_force(seconds, step, 1.0, 4.0, interval)


def test_duration():
    assert duration(0, 10, 1.0, 4.0, 10) == 0
    assert duration(10, 0, 1.0, 4.0, 10) == 10  # the evaluation after the last step is counted elsewhere
    assert duration(11, 0, 1.0, 4.0, 10) == 15
    assert duration(10, 5, 1.0, 4.0, 10) == 14


class Clock:
    """Simulated time, and a run on it that calls a Budget as train.py's loop does."""

    def __init__(self, monkeypatch, start=20.0, evaluation=3.0, writing=1.0):
        self.now = start
        self.evaluation, self.writing = evaluation, writing
        monkeypatch.setattr(startup, 'seconds_since_start', lambda: self.now)
        monkeypatch.setattr('core.training.budget.evaluate', self.evaluate)

    def evaluate(self, objective_module, model, average, data, context, rows, *_):
        self.now += self.evaluation * (rows if rows > 0 else 100) / 100
        return {'val_loss': 1.0}

    def budget(self, config=(), given=(), checkpoint=None):
        self.config = CONFIG | dict(config)
        self.b = Budget(self.config, given, checkpoint or {}, CPU)
        return self.b

    def run(self, step_seconds, step=0, stop_at=None):
        """step_seconds(step): how long a step takes. Returns the last step."""
        budget = self.b
        objective = SimpleNamespace(fixed=lambda data, split, rows, block_size: range(100))
        saver = SimpleNamespace(saved=0, written=0.0)
        max_iters, _, _, eval_interval = budget.schedule()
        self.rows = budget.start(step, -1, objective, None, None, SimpleNamespace(splits={'val': 100}), None, 4, 32)
        self.evaluated = []
        self.schedules = []
        while True:
            last = step >= max_iters
            if step % eval_interval == 0 or last:
                self.evaluate(None, None, None, None, None, self.rows)
                self.evaluated.append(step)
                if step:
                    saver.saved += 1
                    saver.written += self.writing
                budget.evaluated(step, saver)
            if last or step == stop_at:
                break
            self.now += step_seconds(step)
            step += 1
            max_iters, decay, warm_up, eval_interval = budget.replan(step)
            assert max_iters == decay == self.config['max_iters']
            self.schedules.append((step, max_iters, warm_up, eval_interval))
        self.now += 3 * self.writing + 0.5  # until the checkpoint, weights.pt and the process are at their ends
        return step


SPEEDS = {
    'constant': lambda step: 0.3,
    'a slow first step': lambda step: 0.3 if step else 20.0,
    'throttled': lambda step: 0.3 if step < 700 else 0.5,
    'busy for a while': lambda step: 0.9 if 300 < step < 450 else 0.3,
    'unequal steps': lambda step: 0.2 + 0.4 * (step * 7919 % 13) / 13,
    'few long steps': lambda step: 25.0,
    'many short steps': lambda step: 0.004,
    'slower and slower': lambda step: 0.2 + step / 10_000,
}


@pytest.mark.parametrize('name', SPEEDS)
def test_ends_when_the_minutes_are_over(name, monkeypatch, capsys):
    clock = Clock(monkeypatch)
    clock.budget()
    clock.run(SPEEDS[name])
    tolerance = 0.025 if name == 'few long steps' else 0.015
    assert abs(clock.now - 600) < tolerance * 600
    changes = {max_iters for _, max_iters, _, _ in clock.schedules[9:]}
    out = capsys.readouterr().out
    if name == 'constant':
        assert len(changes) == 1  # planned once
        assert re.search(r'budget: [\d,]+ steps of 300 ms, to end after 0:10:00; 0:00:\d\d are spent\n', out)
    assert ('budget: now ' in out) == (len(changes) > 1)


def test_writing_and_evaluating_take_long(monkeypatch):
    clock = Clock(monkeypatch, evaluation=30.0, writing=20.0)
    clock.budget()
    clock.run(lambda step: 0.3)
    assert abs(clock.now - 600) < 30


@pytest.mark.parametrize('auto, expected', [(False, 10), (True, 5)])
def test_evaluations_and_warm_up_follow_the_steps(auto, expected, monkeypatch):
    clock = Clock(monkeypatch, evaluation=0.01)
    clock.budget({'auto': auto, 'eval_interval': 10**6, 'warmup_iters': 2000})
    steps = clock.run(lambda step: 1.0)
    assert 550 < steps < 580
    assert len(clock.evaluated) in (expected, expected + 1)
    warm_up, eval_interval = clock.schedules[-1][2:]
    assert 0.045 * steps < warm_up <= 0.05 * steps
    assert {interval for step, _, _, interval in clock.schedules if step > 9} == {eval_interval}


def test_settings_of_the_command_line_and_low_ones_stay(monkeypatch):
    clock = Clock(monkeypatch, evaluation=0.01)
    given = {'eval_interval': 3000, 'warmup_iters': 2000}
    clock.budget(given, given)
    clock.run(lambda step: 1.0)
    assert {schedule[2:] for schedule in clock.schedules} == {(2000, 3000)}
    clock = Clock(monkeypatch, evaluation=0.01)
    clock.budget({'eval_interval': 7, 'warmup_iters': 0})
    clock.run(lambda step: 1.0)
    assert {schedule[2:] for schedule in clock.schedules} == {(0, 7)}


def test_expensive_evaluations_have_fewer_rows(monkeypatch, capsys):
    """All 100 rows would take 60 s; a hundredth of the budget is 6."""
    clock = Clock(monkeypatch, evaluation=60.0)
    clock.budget()
    clock.run(lambda step: 1.0)
    assert clock.rows == 10
    assert 'evaluating on 10 rows instead of 100, which would take 60.0 s each time' in capsys.readouterr().out
    clock = Clock(monkeypatch, evaluation=60.0)
    clock.budget(given={'eval_iters': ['-1']})
    clock.run(lambda step: 1.0)
    assert clock.rows == -1


def test_the_whole_text_at_the_end(monkeypatch, capsys):
    """With auto: 100 rows of validation text take 15 s, of which 18 are allowed; of both splits they take 30."""
    clock = Clock(monkeypatch, evaluation=30.0)
    budget = clock.budget({'auto': True})
    clock.run(lambda step: 1.0)
    assert (clock.rows, budget.whole_rows) == (12, -1)
    assert budget.whole_seconds == pytest.approx(15.0)
    assert abs(clock.now + budget.whole_seconds - 600) < 9


def test_a_resumed_run_follows_the_plan(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    before = clock.budget({'eval_interval': 10**6, 'warmup_iters': 2000})
    clock.run(lambda step: 0.3, stop_at=500)
    planned = clock.schedules[-1][1:]
    checkpoint = {'iter_num': 500, 'config': dict(clock.config), 'budget': before.state()}
    rows, spent = clock.rows, clock.now
    capsys.readouterr()

    clock.now = 5.0  # the clock of the next process; a night between them does not count
    clock.budget({'eval_interval': 10**6, 'warmup_iters': 2000, 'minutes': 10.0}, checkpoint=checkpoint)
    assert capsys.readouterr().out.startswith(f'as the checkpoint plans: {planned[0]:,} steps; 0:03:')
    assert clock.b.schedule() == (planned[0], planned[0], *planned[1:])
    clock.run(lambda step: 0.3, step=500)
    assert clock.rows == rows
    assert abs(spent + clock.now - 600) < 9
    assert abs(clock.schedules[-1][1] / planned[0] - 1) < 0.03


def test_other_minutes_on_resuming(monkeypatch):
    clock = Clock(monkeypatch)
    before = clock.budget()
    step = clock.run(lambda step: 0.3)
    checkpoint = {'iter_num': step, 'config': dict(clock.config), 'budget': before.state()}
    spent, clock.now = clock.now, 5.0
    clock.budget({'minutes': 20.0}, checkpoint=checkpoint)
    assert 1.9 * step < clock.b.schedule()[0] < 2.1 * step
    clock.run(lambda step: 0.3, step=step)
    assert abs(spent + clock.now - 1200) < 18


def test_nothing_is_left(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    before = clock.budget()
    clock.run(lambda step: 0.3, stop_at=500)
    clock.now = 599.0
    checkpoint = {'iter_num': 500, 'config': dict(clock.config), 'budget': before.state()}
    clock.now = 5.0
    clock.budget(checkpoint=checkpoint)
    assert clock.b.schedule()[:2] == (500, 500)
    assert 'the budget of 0:10:00 is spent\n' in capsys.readouterr().out


def test_a_run_without_minutes_gets_some(monkeypatch):
    """The schedule of the checkpoint's run counts until the first steps are timed."""
    clock = Clock(monkeypatch)
    clock.budget(checkpoint={'iter_num': 1000, 'config': CONFIG | {'minutes': 0.0}, 'budget': {}})
    assert clock.b.schedule()[0] == 2000
    last = clock.run(lambda step: 1.0, step=1000)
    assert 1500 < last < 1580
    assert abs(clock.now - 600) < 9


def test_a_start_that_takes_too_long(monkeypatch):
    clock = Clock(monkeypatch, start=700.0)
    assert exit_line(clock.budget) == (
        'minutes=10: too short, because the start took 700.0 s; give it more minutes')
    clock.now = 500.0
    clock.budget({'compile': True})
    clock.now = 650.0
    assert exit_line(clock.run, lambda step: 1.0) == (
        'minutes=10: too short, because 650.0 s were spent before the first step; give it more minutes, '
        'or --compile=False')


def test_without_minutes_nothing_changes(monkeypatch):
    clock = Clock(monkeypatch)
    budget = clock.budget({'minutes': 0.0})
    assert budget.start(0, 17, None, None, None, None, None, 4, 32) == 17
    budget.evaluated(0, None)
    assert budget.replan(1) == budget.schedule() == (2000, 2000, 100, 250)
    assert budget.state() == {}
    budget.finish(1)


def test_all_ranks_do_as_rank_0(monkeypatch):
    """Rank 1 has other times, and hears those of rank 0."""
    clock = Clock(monkeypatch)
    said = []

    def all_reduce(numbers, env):
        if env.master:
            said.append(torch.tensor(numbers))
            return said[-1]
        assert set(numbers) == {0.0}
        return said.pop(0)
    monkeypatch.setattr('core.training.budget.all_reduce', all_reduce)
    clock.budget()
    clock.run(lambda step: 0.3)
    schedules, evaluated = clock.schedules, clock.evaluated

    clock = Clock(monkeypatch, start=3.0, evaluation=1.0)
    monkeypatch.setattr(CPU, 'master', False)
    clock.budget()
    clock.run(lambda step: 0.2)
    assert (clock.schedules, clock.evaluated) == (schedules, evaluated)

# --- train.py


def test_a_run(tiny_data, tmp_path, monkeypatch):
    """Steps of two seconds in a minute; what is saved fits what was done. A resumed run has nothing left to do."""
    now = clock_of_steps(monkeypatch, 2.0)
    result = run_script('train.py', *BUDGETED, f'--dataset={tiny_data}', f'--out_dir={tmp_path}', '--minutes=1')
    assert result.code == 0, result.err
    steps = int(re.search(r'(\d+) steps in', result.out)[1])
    assert 20 < steps < 30  # writing a checkpoint takes real time, for which some is reserved
    assert re.search(r'budget: \d\d steps of 2000 ms, to end after 0:01:00; 0:00:1\d are spent', result.out)
    assert 'left 0:00:0' in result.out
    assert 8 < result.out.count(', val loss') < 13  # before, in, and after the run
    checkpoint = torch.load(tmp_path / 'weights.pt')
    assert checkpoint['iter_num'] == steps
    assert checkpoint['config']['max_iters'] == checkpoint['config']['lr_decay_iters'] == steps
    assert checkpoint['budget']['spent_before'] == 2 * steps
    now[0] = 60.0 - 2 * steps
    again = run_script('train.py', *BUDGETED, f'--dataset={tiny_data}', f'--out_dir={tmp_path}', '--minutes=1',
                       '--init_from=resume')
    assert again.code == 0, again.err
    assert 'raise --minutes to go on' in again.out


@pytest.mark.parametrize('arguments, line', [
    (['--minutes=0'], 'minutes=0: expected a number above 0, the minutes to train; leave it out to train for max_iters '
                      'steps'),
    (['--minutes=-1'], 'minutes=-1: expected a number above 0'),
    (['--minutes=1e999'], 'minutes=inf: expected a number above 0'),
    (['--auto=True'], 'minutes=0: expected a number above 0, the minutes to train\n'),
    (['--auto=True', '--minutes=0'], 'minutes=0: expected a number above 0, the minutes to train\n'),
    (['--minutes=1', '--max_iters=9'], 'minutes=1, max_iters=9: both give the length; leave one out'),
    (['--minutes=1', '--epochs=2'], 'minutes=1, epochs=2.0: both give the length; leave one out'),
    (['--minutes=1', '--lr_decay_iters=9'], 'minutes=1, lr_decay_iters=9: both give the length; leave one out'),
    (['--minutes=1', '--eval_only=True'], 'minutes=1, eval_only=True: nothing is trained then; leave one out'),
    (['--minutes=1', '--dry_run=True'], 'minutes=1, dry_run=True: nothing is trained then; leave one out'),
])
def test_bad_input(arguments, line, tiny_data, tmp_path):
    result = run_script('train.py', *BUDGETED, f'--dataset={tiny_data}', f'--out_dir={tmp_path / "out"}', *arguments)
    assert result.code == 1
    assert result.err.startswith(line) and result.err.count('\n') == 1, result.err
    assert list(tmp_path.iterdir()) == []


def test_too_little_time(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(startup, 'seconds_since_start', lambda: 2.5)
    result = run_script('train.py', *BUDGETED, f'--dataset={tiny_data}', f'--out_dir={tmp_path / "out"}',
                        '--minutes=0.04')
    assert (result.code, result.err) == (
        1, 'minutes=0.04: too short, because the start took 2.5 s; give it more minutes\n')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize('arguments', [
    ['--minutes=0.4'],
    ['config/auto.py', '--minutes=0.4'],
    ['--minutes=0.4', '--eval_iters=50', '--eval_interval=40', '--save_interval=10'],
])
def test_the_time_of_a_whole_command(arguments, tiny_data, tmp_path):
    """A wide band, because other tests run beside this one. On a busy machine the start alone may take as long."""
    if os.getloadavg()[0] > os.cpu_count():
        pytest.skip('the machine is busy')
    given = BUDGETED if 'config/auto.py' not in arguments else ['--device=cpu']
    started = time.perf_counter()
    subprocess.run([sys.executable, 'train.py', *arguments, *given, f'--dataset={tiny_data}', f'--out_dir={tmp_path}'],
                   cwd=ROOT, check=True)
    assert 20 < time.perf_counter() - started < 30


@pytest.mark.slow
def test_two_processes(tiny_data, tmp_path):
    if os.getloadavg()[0] > os.cpu_count():
        pytest.skip('the machine is busy')
    subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'train.py',
         'config/auto.py', '--minutes=0.4', '--device=cpu', f'--dataset={tiny_data}', f'--out_dir={tmp_path}'],
        cwd=ROOT, check=True)
    config = torch.load(tmp_path / 'weights.pt')['config']
    assert config['batch_size'] * config['gradient_accumulation_steps'] % 2 == 0
