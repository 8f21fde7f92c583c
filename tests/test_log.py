"""core/training/log.py: columns of log.csv, and the spike detector. test_train.py reads the log of runs."""
import torch
from conftest import losses_of

from core.training.log import Log, spike_detector


def test_a_number_with_a_new_name(tmp_path):
    """It is a new column in the same file. A resumed run keeps it, and its order of the columns does not matter."""
    config = {'wandb_log': False, 'tensorboard_log': False}
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
