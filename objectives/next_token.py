"""
Pretraining: predict the next token. Also instruction tuning: in conversations only the assistant's tokens count.

A batch is (X, Y), or (X, Y, document) for conversations, each (rows, T) int64. `document` says which
conversation of the dataset a token belongs to; attention does not cross conversations.
"""
import functools
import math
import sys

import numpy as np
import torch

from core.text.dataset import document_starts, windows
from core.weights.checkpoint import refuse_reward_model
from objectives import evenly_spaced

see_across = False  # True: a conversation attends to those before it in its row, as documents of a text do

MEASURES = ('loss', 'bpb', 'bpc')


def start(model, data, env, config, saved):
    refuse_reward_model(model, config['init_from'])
    if data.kind not in ('', 'conversations'):
        sys.exit(f'dataset={config["dataset"]} has {data.kind}; '
                 'objective=next_token learns from texts and conversations')


def state(context):
    return {}


def draw(data, rows, block_size, seed, step, order='random'):
    """
    Return the start positions (rows,) in the training tokens of a step's rows.

    'random': with replacement, as nanoGPT does; in a mixture, first the folder by its weight. 'epochs'
    (of one folder): every token once before any comes again. 'documents': every document once, uncut if
    it fits into a row, see document_rows(); the beginning of one that is cut comes twice. Conversations
    are always drawn by 'documents'.
    """
    if data.kind:
        order = 'documents'
    if order == 'random':
        return draw_at_random(data, rows, block_size, seed, step)
    per_epoch = len(epoch_starts(data, block_size, seed, 0, order))
    starts = []
    for row in range(step * rows, (step + 1) * rows):
        epoch, i = divmod(row, per_epoch)
        starts.append(epoch_starts(data, block_size, seed, epoch, order)[i])
    return np.array(starts)


def draw_at_random(data, rows, block_size, seed, step):
    """Return start positions (rows,) drawn with replacement; in a mixture, first the folder by its weight."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    ends = torch.tensor(data.ends['train'])  # of each folder
    if len(ends) == 1:
        return torch.randint(ends[0] - block_size, (rows,), generator=generator).numpy()
    begins = torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1]])
    folder = torch.multinomial(torch.tensor(data.weights), rows, replacement=True, generator=generator)  # (rows,)
    n_starts = (ends - begins - block_size)[folder].clamp(min=1)
    offset = (torch.rand(rows, generator=generator, dtype=torch.float64) * n_starts).long()
    return (begins[folder] + offset).numpy()


@functools.lru_cache(maxsize=2)  # a step may begin in one epoch and end in the next
def epoch_starts(data, block_size, seed, epoch, order):
    """
    Return the start positions of all rows of an epoch, in random order. With order='epochs' the rows
    stand end to end and every token but the first is a target once. Where the rows are cut is random
    too, so the first and the last one may be shorter: see windows().
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    if order == 'documents':
        starts = document_rows(data, block_size)
        return starts[torch.randperm(len(starts), generator=generator).numpy()]
    n_targets = data.splits['train'] - 1
    # targets of the first row: at least so many that the number of rows is the same in every epoch
    least = max(1, n_targets % block_size)
    first = int(torch.randint(least, max(block_size, least + 1), (1,), generator=generator))
    starts = torch.arange(first - block_size, n_targets, block_size)
    return starts[torch.randperm(len(starts), generator=generator)].numpy()


@functools.lru_cache(maxsize=2)
def document_rows(data, block_size, split='train'):
    """
    Return the start positions of rows that cut no document which fits into a row.

    A row begins with a document. One that would be cut at the end of the row begins the next row
    instead. A document that is longer than a row takes several rows. Exits if the text is one document.
    """
    starts = document_starts(data, split) if data.tokenizer else np.zeros(1)
    if len(starts) == 1 and not data.kind:
        sys.exit(f'data_order=documents: {data.folder} is one text without document ends; use --data_order=epochs')
    ends = np.append(starts[1:], data.splits[split])
    n_targets = ends - starts - 1  # the first token of a row is only an input
    n_rows = np.maximum(1, (n_targets + block_size - 1) // block_size)  # that each document needs, rounded up

    # greedy: the next row begins with the first document that is not complete at the end of this one
    next_document = np.searchsorted(ends, starts + n_rows * block_size + 1, side='right').tolist()
    chosen = []
    i = 0
    while i < len(starts):
        chosen.append(i)
        i = next_document[i]

    # a chosen document of n rows: its start, + block_size, ..., + (n - 1) * block_size
    n_rows = n_rows[chosen]
    row_in_document = np.arange(n_rows.sum()) - np.repeat(n_rows.cumsum() - n_rows, n_rows)
    return np.repeat(starts[chosen], n_rows) + block_size * row_in_document


def fixed(data, split, rows, block_size):
    """
    Return `rows` evenly spaced start positions in a split. If there are not that many, or rows is
    negative, return those of the whole split, end to end. In a mixture each folder gets its weight's
    share of the rows. Conversations: some of document_rows().
    """
    if data.kind:
        starts = document_rows(data, block_size, split)
        return starts[evenly_spaced(len(starts), rows)]
    ends = data.ends[split]
    begins = [0, *ends[:-1]]
    weights = [weight if end > begin else 0 for weight, begin, end in zip(data.weights, begins, ends)]
    starts = []
    for weight, begin, end in zip(weights, begins, ends):
        last = end - begin - 1  # the last token is only a target
        offsets = np.arange(0, max(last, 0), block_size)
        share = round(rows * weight / sum(weights)) if weight else 0
        if 0 <= rows and share < len(offsets):
            offsets = np.linspace(0, last - block_size, share).astype(np.int64)
        starts.append(begin + offsets)
    return np.concatenate(starts)


def load(data, split, starts, block_size, context=None):
    """
    Return the batch (X, Y), or (X, Y, document) for conversations, of rows that start at `starts`; each
    (rows, T).
    """
    X, Y = windows(data, split, starts, block_size)
    if not data.kind:
        return X, Y
    begins = data.starts[split]  # of every conversation, and the end of the last
    positions = np.minimum(starts[:, None] + np.arange(block_size), begins[-1] - 1)  # (rows, T)
    document = np.searchsorted(begins, positions, side='right')  # 1 for the first: begins[document] is where it ends

    # Only the first conversation of a row may continue beyond the row. Any other that is cut begins the next row and
    # counts there.
    is_complete = begins[document] <= starts[:, None] + block_size + 1
    is_first = document == document[:, :1]
    Y = Y.masked_fill_(torch.from_numpy(~(is_complete | is_first)), -1)
    if see_across:
        return X, Y
    return X, Y, torch.from_numpy(document)


def divisor(batch):
    """Return the number of targets."""
    return (batch[1] != -1).sum()


def loss(model, batch):
    """Return the summed cross-entropy of the targets, in nats."""
    return model(*batch).sum()


def measure(model, batch, data, context=None):
    """
    Return sum and divisor of each of MEASURES, (3, 2): loss in nats per token; bits per byte and bits
    per character, which are comparable between tokenizers.
    """
    return measures_of(model(*batch), batch[1], data)


def measures_of(losses, Y, data):
    """Return what measure() does. losses (rows, T): of the targets Y, 0 where there is none."""
    is_target = Y != -1
    targets = Y.clamp(min=0)
    total = losses.sum()
    total_bits = total / math.log(2)
    n_bytes = (on_device(data.token_bytes, Y.device)[targets] * is_target).sum()
    n_chars = (on_device(data.token_chars, Y.device)[targets] * is_target).sum()
    return torch.stack([total, is_target.sum(), total_bits, n_bytes, total_bits, n_chars]).view(3, 2)


@functools.lru_cache(maxsize=4)
def on_device(table, device):
    """Return this table on the device. It is copied once, not for every batch."""
    return table.to(device)
