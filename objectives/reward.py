"""
A reward model: which of two answers is better, learned from pairs by the logistic loss (Bradley & Terry 1952; InstructGPT, Ouyang et al. 2022:
https://arxiv.org/abs/2203.02155). The network gets a head of one number in the place of that for the vocabulary; an answer's reward is the number at the
token that ends it. Only differences are learned, so where 0 is means nothing.
"""
import sys

import numpy as np
import torch
from torch.nn import functional as F

from core.text.dataset import pack_documents, shuffled
from core.weights.vocabulary import new_reward_head

MEASURES = ('loss', 'accuracy', 'margin')


def start(model, data, run, config, saved):
    """A base model gets a new head, which starts at 0, in the place of that for the vocabulary; a reward model keeps what it has."""
    check_pairs(data, config)
    if not model.config.reward:
        new_reward_head(model)


def check_pairs(data, config):
    """End the script with one line unless these are pairs, and fit into the context."""
    if data.kind != 'pairs':
        sys.exit(f'dataset={config["dataset"]} has {data.kind or "text"}; objective={config["objective"]} learns from pairs: data/chat/prepare.py makes a folder of them')
    if data.longest > config['block_size']:
        sys.exit(f'block_size={config["block_size"]}: the longest answer with its prompt has {data.longest} tokens; prepare the pairs with a lower --max_tokens')


def state(context):
    return {}


def draw(data, rows, block_size, seed, step, order=''):
    """Numbers of pairs (rows,): each comes once, in random order, before any comes again."""
    return shuffled(len(data.starts['train']) // 2, rows, seed, step)


def fixed(data, split, rows, block_size):
    """`rows` evenly spaced pairs of a split; all if that is fewer or rows is negative."""
    count = len(data.starts[split]) // 2
    return np.arange(count) if rows < 0 or rows >= count else np.linspace(0, count - 1, rows).astype(np.int64)


def load(data, split, pairs, block_size, context=None):
    """Tokens, targets, and which answer of the batch each is of (rows, T): what was chosen has the even numbers, what was rejected the odd ones."""
    return pack_documents(data, split, np.stack([2 * pairs, 2 * pairs + 1], axis=1).ravel(), block_size)


def divisor(batch):
    _, Y, document = batch[:3]
    return (document[Y != -1].max() + 1) // 2


def rewards(model, X, Y, document):
    """The rewards (n,) of n answers: tokens X, targets Y, which are -1 where they are no answer, and which answer each is of (rows, T)."""
    n = int(document[Y != -1].max()) + 1
    places = torch.where(Y.flatten() != -1, torch.arange(Y.numel(), device=Y.device), -1)
    last = places.new_zeros(int(document.max()) + 1).scatter_reduce(0, document.flatten(), places, 'amax')[:n] + 1  # the last target is the token that ends it, one place on
    return model(X, None, document).float().flatten()[last]


def margins(model, batch):
    """By how much the rewards of the chosen answers are higher (pairs,)."""
    chosen, rejected = rewards(model, *batch).view(-1, 2).unbind(dim=1)
    return chosen - rejected


def loss(model, batch):
    return -F.logsigmoid(margins(model, batch)).sum()


def measure(model, batch, data, context=None):
    """Sum and divisor of each of MEASURES, (3, 2): the loss; the share of pairs ranked right; the margin."""
    margin = margins(model, batch)
    return torch.stack([torch.stack([-F.logsigmoid(margin).sum(), (margin > 0).sum(), margin.sum()]), margin.new_full((3,), len(margin))], dim=1)
