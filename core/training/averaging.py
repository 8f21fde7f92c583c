"""Averaged weights: a copy beside the trained ones, which often has a lower validation loss."""
from contextlib import contextmanager

import torch

from core.distributed import reshard, shard_like, to_local
from core.weights.lora import trained_weights


class Average:
    """
    The average of the trained weights over the steps so far; without any weights if ema is 0. It is a copy on the same
    device, of the adapters alone for LoRA, and under FSDP of each rank's shards.

    After step t, which is 1 for the first, average += (weights - average) / (1 + (t - 1) * ema / (1 - ema)).
    With g = 1 / ema - 2, the weights after step s then count in proportion to Γ(s + g) / Γ(s), about s**g, and their
    mean age is exactly ema * (t - 1) steps, however long the run is; ema=0.5 is the plain mean (g = 0). This is the
    polynomial-decay average of Shamir & Zhang 2013 (https://arxiv.org/abs/1212.1824), and for many steps the
    power-function EMA of Karras et al. 2024 (https://arxiv.org/abs/2312.02696) with gamma = g.
    A step that is left out changes no weights, and they count once more.
    """

    def __init__(self, model, ema, saved=None):
        """saved: what state() returned in the run that is resumed. Without it the average starts as a copy."""
        self.model = model
        self.ema = ema
        names = trained_weights(model) if ema else []
        self.parameters = {name: model.get_parameter(name) for name in names}
        copies = {p: p.detach().clone() for p in self.parameters.values()}  # tied matrices have one
        self.averages = {name: copies[p] for name, p in self.parameters.items()}
        self.pairs = list(copies.items())
        for name in names if saved else ():
            average = self.averages[name]
            to_local(average).copy_(shard_like(saved[name], average))

    def state(self):
        """Return the averages for a checkpoint, {name: tensor}, with the names that the trained weights have there."""
        return self.averages

    @torch.no_grad()
    def update(self, step):
        """Take in the weights after a step, which is 0 for the first. The host does not wait for a GPU."""
        if self.pairs:
            parameters, averages = zip(*((to_local(p), to_local(average)) for p, average in self.pairs))
            torch._foreach_lerp_(averages, parameters, 1 / (1 + step * self.ema / (1 - self.ema)))

    @contextmanager
    def in_model(self):
        """In this context the model has the averaged weights. Afterwards it has the trained ones again, bit for bit."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self):
        """Exchange trained and averaged weights, one tensor at a time, so that this takes little memory."""
        for pair in self.pairs:
            p, average = map(to_local, pair)
            trained = p.clone()
            p.copy_(average)
            average.copy_(trained)
        reshard(self.model)
