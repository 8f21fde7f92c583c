"""Several networks with one tokenizer as one: the mean of their probabilities (not of their logits)."""
import math
import os
import sys
from types import SimpleNamespace

import torch
from torch.nn import functional as F

from core.files import find


def split_names(key, value):
    """Return the networks that the setting `key` names, separated by commas. Exits if one is empty or named twice."""
    if value and os.path.exists(find(value)):  # perhaps with a comma in its name
        return [value]
    names = [name.strip() for name in value.split(',')]
    if not all(names):
        what = 'none is given' if not any(names) else 'one of them is empty'
        sys.exit(f'{key}={value}: {what}; expected checkpoints or folders of runs or Hugging Face models, '
                 'separated by commas')
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        sys.exit(f'{key}={value}: {twice[0]} is named twice')
    return names


def mean_logps(logps):
    """Return the log of the mean of probabilities. logps: the logs of each network's, an iterable of tensors (...)."""
    logps = iter(logps)
    total, n = next(logps), 1
    for logp in logps:  # one after another: an iterator need not hold all of them
        total, n = torch.logaddexp(total, logp), n + 1
    return total - math.log(n)


class Ensemble(torch.nn.Module):
    """
    Several models as one, which returns the log of the mean of their probabilities. Their vocabularies may be padded to
    different sizes: only the ids that all have count, at most vocab_size.
    """

    def __init__(self, models, vocab_size=math.inf):
        super().__init__()
        self.models = torch.nn.ModuleList(models)
        self.config = SimpleNamespace(
            block_size=min(model.config.block_size for model in models),
            vocab_size=min(vocab_size, *(model.config.vocab_size for model in models)))

    def forward(self, idx):
        """Return log-probabilities (B, T, V) for token ids idx (B, T)."""
        return mean_logps(log_softmax(model(idx)[..., :self.config.vocab_size]) for model in self.models)

    @torch.no_grad()
    def hidden(self, idx, documents=None):
        """Return the activations (B * T, C) of each model, with the weights (V, C) of its head, for log_probs()."""
        pairs = []
        for model in self.models:
            x = model.hidden(idx, documents=documents).flatten(0, 1)
            if torch.is_autocast_enabled(x.device.type):
                x = x.to(torch.get_autocast_dtype(x.device.type))
            pairs.append((x, model.lm_head.weight[:self.config.vocab_size].to(x.dtype)))  # converted once for all rows
        return pairs

    @torch.no_grad()
    def log_probs(self, hidden, rows, temperature=1.0):
        """
        Return the log-probabilities (n, V) of these rows, a slice, of what hidden() returned; the logits of each model
        are divided by the temperature first. So the logits of all rows are never there at once.
        """
        return mean_logps(log_softmax(F.linear(x[rows], weight), temperature) for x, weight in hidden)


def log_softmax(logits, temperature=1.0):
    return (at_least_fp32(logits) / temperature).log_softmax(dim=-1)


def at_least_fp32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))
