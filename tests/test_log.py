"""core/training/log.py: the spike detector. test_train.py reads log.csv."""
import torch

from core.training.log import spike_detector


def test_ordinary_losses_do_not_jump():
    noise = torch.randn(5000, generator=torch.Generator().manual_seed(0)).mul(0.05)
    exponential = 2 + 8 * torch.exp(-torch.arange(5000) / 300)
    for trend in (torch.linspace(5, 2, 5000), exponential, torch.full((5000,), 3.0)):
        spike = spike_detector()
        assert [spike(loss) for loss in (trend + noise).tolist()].count(None) == 5000
