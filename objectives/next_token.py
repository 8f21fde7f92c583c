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
import math

import numpy as np
import torch

from core.tokens import windows

MEASURES = ('loss', 'bpb')


def draw(data, rows, block_size, generator):
    """Random places (rows,) in the training tokens, with replacement, as nanoGPT draws them."""
    return torch.randint(data.splits['train'] - block_size, (rows,), generator=generator).numpy()


def fixed(data, split, rows, block_size):
    """`rows` evenly spaced places in a split; the whole split, end to end, if that is fewer or rows is negative."""
    last = data.splits[split] - 1  # the last token is only ever a target
    whole = np.arange(0, last, block_size)
    return whole if rows < 0 or rows >= len(whole) else np.linspace(0, last - block_size, rows).astype(np.int64)


def load(data, split, starts, block_size):
    return windows(data, split, starts, block_size)  # X, Y: (rows, T)


def divisor(batch):
    return (batch[1] != -1).sum()


def loss(model, batch):
    return model(*batch).sum()


def measure(model, batch, data):
    """Sum and divisor of each of MEASURES, (2, 2): loss in nats per token, and bits per byte, which can be compared between tokenizers."""
    X, Y = batch
    losses = model(X, Y)  # (B, T)
    token_bytes = data.token_bytes.to(Y.device)[Y.clamp(min=0)] * (Y != -1)  # (B, T)
    return torch.stack([losses.sum(), divisor(batch), losses.sum() / math.log(2), token_bytes.sum()]).view(2, 2)
