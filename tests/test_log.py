"""core/training/log.py and progress.py: columns of log.csv, the spike detector, what is printed while one waits."""
import io
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, losses_of, run_script

from core.training import progress
from core.training.log import Log, spike_detector


def test_a_number_with_a_new_name(tmp_path):
    """It is a new column in the same file. A resumed run keeps it, and its order of the columns does not matter."""
    config = {'wandb_log': False, 'tensorboard_log': False, 'ema': 0.0}
    log = Log(str(tmp_path), ['loss'], 0, config, 'x')
    log(0, {'val_loss': 3.0})
    log(0, {'loss': 2.0, 'lr': 0.1})
    log(1, {'loss': 1.5, 'lr': 0.1, 'entropy': 0.75, 'other': 4})
    log.sync()
    log.close()
    assert losses_of(tmp_path) == [(0, 2.0), (1, 1.5)]
    log = Log(str(tmp_path), ['loss'], 2, config, 'x')
    log(2, {'val_loss': 2.5})
    log(2, {'other': 5, 'loss': 1.0, 'lr': 0.1})
    log.close()
    assert losses_of(tmp_path) == [(0, 2.0), (1, 1.5), (2, 1.0)]
    assert losses_of(tmp_path, 'entropy') == [(1, 0.75)]
    assert losses_of(tmp_path, 'other') == [(1, 4), (2, 5)]
    assert losses_of(tmp_path, 'val_loss') == [(0, 3.0), (2, 2.5)]


def test_ordinary_losses_do_not_jump():
    noise = torch.randn(5000, generator=torch.Generator().manual_seed(0)).mul(0.05)
    exponential = 2 + 8 * torch.exp(-torch.arange(5000) / 300)
    for trend in (torch.linspace(5, 2, 5000), exponential, torch.full((5000,), 3.0)):
        spike = spike_detector()
        assert [spike(loss) for loss in (trend + noise).tolist()].count(None) == 5000


@pytest.mark.parametrize('seconds, steps', [(0, [0, 1, 2, 3, 4, 5]), (3600, [0, 4])])
def test_something_is_printed_after_ten_seconds(seconds, steps, tiny_data, tmp_path, monkeypatch):
    """A line about a step, though log_interval is larger, and one about an evaluation that is not done yet."""
    monkeypatch.setattr(progress, 'SILENCE', seconds)
    result = run_script('train.py', *TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path}', '--max_iters=6',
                        '--log_interval=4', '--eval_iters=-1', '--block_size=8', '--n_head=1')
    assert [int(step) for step in re.findall(r'(?m)^iter (\d+): loss', result.out)] == steps
    assert [step for step, _ in losses_of(tmp_path)] == steps
    assert ('evaluation, val: 100%, left 0:00:00' in result.out) == (seconds == 0)
    assert '\r' not in result.out


def test_the_status_line_of_a_terminal(tiny_data, tmp_path, monkeypatch):
    """What is printed takes its place; nothing of it remains."""
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    monkeypatch.setattr('conftest.io', SimpleNamespace(StringIO=Terminal))
    args = *TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path}', '--log_interval=10'
    out = run_script('train.py', *args).out
    assert re.search(r'\niter 0 of 4: loss 2\.\d{4}, left 0:00:0\d\r\033\[Kstep 4: ', out)
    lines = [line.rpartition('\r\033[K')[2] for line in out.split('\n')]
    assert not any(' of 4: loss' in line for line in lines)
