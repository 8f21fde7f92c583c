"""
A reward model: which of two answers is better, learned from pairs by the logistic loss (Bradley & Terry
1952; InstructGPT, Ouyang et al. 2022: https://arxiv.org/abs/2203.02155). A head with one output
replaces the one for the vocabulary. The reward of an answer is this output at the token that ends it.
Only differences are learned, so the zero point means nothing.

A batch is (X, Y, document, ends). The first three are (rows, T) int64: whole answers with their prompts, several
packed into a row. `document` says which answer of the batch a token belongs to. Even numbers are chosen answers,
the odd number after each is the rejected one of the same pair, and padding has the number of answers. `ends` (answers,)
says where in the flattened rows each answer ends.
"""
import sys

import numpy as np
import torch
from torch.nn import functional as F

from core.text.dataset import pack_documents, shuffled
from core.weights.vocabulary import new_reward_head
from objectives import evenly_spaced

MEASURES = ('loss', 'accuracy', 'margin')


def start(model, data, env, config, saved):
    """Give a base model a reward head, which starts at 0. A reward model keeps its head."""
    check_pairs(data, config)
    if not model.config.reward:
        new_reward_head(model)


def check_pairs(data, config):
    """Exit if the dataset has no pairs, or if a pair does not fit into the context."""
    if data.kind != 'pairs':
        sys.exit(f'dataset={config["dataset"]} has {data.kind or "text"}; '
                 f'objective={config["objective"]} learns from pairs: data/chat/prepare.py makes a folder of them')
    if data.longest > config['block_size']:
        sys.exit(f'block_size={config["block_size"]}: the longest answer with its prompt has {data.longest} tokens; '
                 'prepare the pairs with a lower --max_tokens')


def state(context):
    return {}


def draw(data, rows, block_size, seed, step, order=''):
    """Return the indices (rows,) of a step's pairs: each pair once, in random order, before any comes again."""
    return shuffled(len(data.starts['train']) // 2, rows, seed, step)


def fixed(data, split, rows, block_size):
    """Return the indices of `rows` evenly spaced pairs of a split; of all if that is fewer or rows is negative."""
    return evenly_spaced(len(data.starts[split]) // 2, rows)


def load(data, split, pairs, block_size, context=None):
    """Return the batch (X, Y, document, ends) of the pairs with these indices (n,)."""
    documents = np.stack([2 * pairs, 2 * pairs + 1], axis=1).ravel()  # chosen, rejected, chosen, ...
    return with_ends(*pack_documents(data, split, documents, block_size))


def with_ends(X, Y, document):
    """Return the packed answers (X, Y, document) and `ends` (answers,)."""
    where = (Y != -1).flatten().nonzero().squeeze(1)  # positions of targets, in ascending order
    last_target = torch.zeros(int(document.max()) + 1, dtype=torch.int64)
    last_target.scatter_reduce_(0, document.flatten()[where], where, 'amax')
    n = int(document.flatten()[where].max()) + 1  # answers; padding has no target
    return X, Y, document, last_target[:n] + 1  # as an input the token that ends an answer stands one position later


def divisor(batch):
    """Return the number of pairs."""
    return len(batch[3]) // 2


def rewards(model, X, Y, document, ends):
    """Return the rewards (answers,) of the packed answers of a batch."""
    return model(X, None, document).float().flatten()[ends]


def margins(model, batch):
    """Return reward of the chosen answer minus reward of the rejected one, (pairs,)."""
    chosen, rejected = rewards(model, *batch).view(-1, 2).unbind(dim=1)
    return chosen - rejected


def loss(model, batch):
    """Return the summed -log sigmoid(margin)."""
    return -F.logsigmoid(margins(model, batch)).sum()


def ranked_right(margin):
    """Return how many of the pairs have a positive margin (pairs,). One without a margin counts half."""
    return (margin > 0).sum() + 0.5 * (margin == 0).sum()


def measure(model, batch, data, context=None):
    """Return sum and divisor of each of MEASURES, (3, 2): the loss; the share of pairs ranked right; the margin."""
    margin = margins(model, batch)
    sums = torch.stack([-F.logsigmoid(margin).sum(), ranked_right(margin), margin.sum()])
    return torch.stack([sums, margin.new_full((3,), len(margin))], dim=1)
