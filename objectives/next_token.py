"""
Pretraining: predict the next token. Instruction tuning as well: of conversations only the tokens count that the assistant says.

An objective is a module with these functions; the loop in train.py knows nothing else about it. Its public globals are its settings.
    start      called once with the network, before it is shared out; what it returns is `context` to the others
    draw       which rows make up a step's batch, the same on every process
    fixed      which rows a split is evaluated on, always the same
    load       the tensors of some of these rows, tokens first
    divisor    over how many things (tokens, pairs) the loss of a batch is averaged
    loss       their summed loss, to be differentiated
    measure    what evaluation reports: sum and divisor of each of MEASURES, which begin with the loss
    state      what of the context a checkpoint must hold, for start() to get it back
"""
import functools
import math
import sys

import numpy as np
import torch

from core.text.dataset import document_starts, windows
from core.weights.checkpoint import refuse_reward_model

see_across = False  # in a row of several conversations a token sees its own only; True: those before, too, as the documents of a text do

MEASURES = ('loss', 'bpb', 'bpc')


def start(model, data, run, config, saved):
    refuse_reward_model(model, config['init_from'])
    if data.kind not in ('', 'conversations'):
        sys.exit(f'dataset={config["dataset"]} has {data.kind}; objective=next_token learns from texts and conversations')


def state(context):
    return {}


def draw(data, rows, block_size, seed, step, order='random'):
    """
    Places (rows,) in the training tokens, those of this step of a run with this seed. 'random': with replacement, as nanoGPT draws them; of a
    mixture, first the folder by its weight. 'epochs' (of one folder): every token once before any comes again. 'documents': every document
    whole before any comes again, see document_rows(); conversations come always so.
    """
    order = 'documents' if data.kind else order
    if order != 'random':
        per_epoch = len(epoch(data, block_size, seed, 0, order))
        return np.array([epoch(data, block_size, seed, row // per_epoch, order)[row % per_epoch] for row in range(step * rows, (step + 1) * rows)])
    ends = torch.tensor(data.ends['train'])
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    if len(ends) == 1:
        return torch.randint(ends[0] - block_size, (rows,), generator=generator).numpy()
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1]])
    folder = torch.multinomial(torch.tensor(data.weights), rows, replacement=True, generator=generator)  # (rows,)
    room = (ends - starts - block_size)[folder].clamp(min=1)
    place = (torch.rand(rows, generator=generator, dtype=torch.float64) * room).long()
    return (starts[folder] + place).numpy()


@functools.lru_cache(maxsize=2)  # a step may begin in one epoch and end in the next
def epoch(data, block_size, seed, number, order):
    """The places of all rows of an epoch, in random order. Of 'epochs' they stand end to end, and where the first one begins is random as well."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    if order == 'documents':
        places = document_rows(data, block_size)
        return places[torch.randperm(len(places), generator=generator).numpy()]
    tokens = data.splits['train']
    count = max(1, tokens // block_size - 1)
    first = torch.randint(min(block_size, tokens - count * block_size), (1,), generator=generator)
    return (first + block_size * torch.randperm(count, generator=generator)).numpy()


@functools.lru_cache(maxsize=2)
def document_rows(data, block_size, split='train'):
    """
    Places of rows that begin with a document, or go on with one that is longer than a row, so that only such a document is cut: a document that would not
    be whole at the end of a row begins the next one. Ends the script with one line when the text has no documents.
    """
    starts = document_starts(data, split) if data.tokenizer else np.zeros(1)
    if len(starts) == 1 and not data.kind:
        sys.exit(f'data_order=documents: {data.folder} is one text without document ends; use --data_order=epochs')
    ends = np.append(starts[1:], data.splits[split])
    rows = np.maximum(1, -(-(ends - starts - 1) // block_size))  # that each document takes by itself; its last token is only a target
    following = np.searchsorted(ends, starts + rows * block_size + 1, side='right').tolist()  # the first document that is not whole by then
    chosen, i = [], 0
    while i < len(starts):
        chosen.append(i)
        i = following[i]
    rows, first = rows[chosen], starts[chosen]
    return np.repeat(first, rows) + block_size * (np.arange(rows.sum()) - np.repeat(rows.cumsum() - rows, rows))


def fixed(data, split, rows, block_size):
    """
    `rows` evenly spaced places in a split; the whole split, end to end, if that is fewer or rows is negative. In a mixture each folder has
    its weight's share of the rows. Of conversations likewise rows as document_rows() has them.
    """
    if data.kind:
        places = document_rows(data, block_size, split)
        return places if rows < 0 or rows >= len(places) else places[np.linspace(0, len(places) - 1, rows).astype(np.int64)]
    places, begin = [], 0
    weights = [weight * (end > start) for weight, start, end in zip(data.weights, [0, *data.ends[split]], data.ends[split])]
    for weight, end in zip(weights, data.ends[split]):
        last = end - begin - 1  # the last token is only ever a target
        whole = np.arange(0, max(last, 0), block_size)
        share = round(rows * weight / sum(weights)) if weight else 0
        places.append(begin + (whole if rows < 0 or share >= len(whole) else np.linspace(0, last - block_size, share).astype(np.int64)))
        begin = end
    return np.concatenate(places)


def load(data, split, starts, block_size, context=None):
    X, Y = windows(data, split, starts, block_size)  # (rows, T)
    if not data.kind:
        return X, Y
    begins = data.starts[split]
    at = np.minimum(starts[:, None] + np.arange(block_size), begins[-1] - 1)  # (rows, T)
    document = np.searchsorted(begins, at, side='right')  # which one each token is in, and where that ends in `begins`
    whole = (begins[document] <= starts[:, None] + block_size + 1) | (document == document[:, :1])  # those cut off begin the next row, and count there
    return X, Y.masked_fill_(torch.from_numpy(~whole), -1), *[torch.from_numpy(document)] * (not see_across)


def divisor(batch):
    return (batch[1] != -1).sum()


def loss(model, batch):
    return model(*batch).sum()


def measure(model, batch, data, context=None):
    """
    Sum and divisor of each of MEASURES, (3, 2): loss in nats per token; bits per byte and bits per character, which can be compared between
    tokenizers.
    """
    Y, losses = batch[1], model(*batch)  # (B, T)
    told = (Y != -1).sum()
    size, characters = ((count.to(Y.device)[Y.clamp(min=0)] * (Y != -1)).sum() for count in (data.token_bytes, data.token_chars))
    bits = losses.sum() / math.log(2)
    return torch.stack([losses.sum(), told, bits, size, bits, characters]).view(3, 2)
