"""
Pretraining: predict the next token.

An objective is a module with these functions; the loop in train.py knows nothing else about it. Its public globals are its settings.
    draw       which rows make up a step's batch, the same on every process
    fixed      which rows a split is evaluated on, always the same
    load       the tensors of some of these rows
    divisor    over how many things (tokens, pairs) the loss of a batch is averaged
    loss       their summed loss, to be differentiated
    measure    what evaluation reports: sum and divisor of each of MEASURES, which begin with the loss
"""
import functools
import math

import numpy as np
import torch

from core.tokens import windows

MEASURES = ('loss', 'bpb', 'bpc')


def draw(data, rows, block_size, seed, step, order='random'):
    """
    Places (rows,) in the training tokens, those of this step of a run with this seed. 'random': with replacement, as nanoGPT draws them; of a
    mixture, first the folder by its weight. 'epochs' (of one folder): every token once before any comes again.
    """
    ends = torch.tensor(data.ends['train'])
    if order == 'epochs':
        per_epoch = len(epoch(int(ends[0]), block_size, seed, 0))
        return np.array([epoch(int(ends[0]), block_size, seed, row // per_epoch)[row % per_epoch] for row in range(step * rows, (step + 1) * rows)])
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    if len(ends) == 1:
        return torch.randint(ends[0] - block_size, (rows,), generator=generator).numpy()
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1]])
    folder = torch.multinomial(torch.tensor(data.weights), rows, replacement=True, generator=generator)  # (rows,)
    room = (ends - starts - block_size)[folder].clamp(min=1)
    place = (torch.rand(rows, generator=generator, dtype=torch.float64) * room).long()
    return (starts[folder] + place).numpy()


@functools.lru_cache(maxsize=2)  # a step may begin in one epoch and end in the next
def epoch(tokens, block_size, seed, number):
    """The places of all windows of a text of so many tokens, end to end and in random order; where the first one begins is random as well."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    count = max(1, tokens // block_size - 1)
    first = torch.randint(min(block_size, tokens - count * block_size), (1,), generator=generator)
    return (first + block_size * torch.randperm(count, generator=generator)).numpy()


def fixed(data, split, rows, block_size):
    """
    `rows` evenly spaced places in a split; the whole split, end to end, if that is fewer or rows is negative. In a mixture each folder has
    its weight's share of the rows.
    """
    places, begin = [], 0
    weights = [weight * (end > start) for weight, start, end in zip(data.weights, [0, *data.ends[split]], data.ends[split])]
    for weight, end in zip(weights, data.ends[split]):
        last = end - begin - 1  # the last token is only ever a target
        whole = np.arange(0, max(last, 0), block_size)
        share = round(rows * weight / sum(weights)) if weight else 0
        places.append(begin + (whole if rows < 0 or share >= len(whole) else np.linspace(0, last - block_size, share).astype(np.int64)))
        begin = end
    return np.concatenate(places)


def load(data, split, starts, block_size):
    return windows(data, split, starts, block_size)  # X, Y: (rows, T)


def divisor(batch):
    return (batch[1] != -1).sum()


def loss(model, batch):
    return model(*batch).sum()


def measure(model, batch, data):
    """
    Sum and divisor of each of MEASURES, (3, 2): loss in nats per token; bits per byte and bits per character, which can be compared between
    tokenizers.
    """
    X, Y = batch
    losses = model(X, Y)  # (B, T)
    told = (Y != -1).sum()
    size, characters = ((count.to(Y.device)[Y.clamp(min=0)] * (Y != -1)).sum() for count in (data.token_bytes, data.token_chars))
    bits = losses.sum() / math.log(2)
    return torch.stack([losses.sum(), told, bits, size, bits, characters]).view(3, 2)
