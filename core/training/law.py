"""
The law of losses: what a network of Qwen3's kind, trained with Muon as in benchmarks/sizes.py, can be
expected to reach, and the weight decay that suits it. benchmarks/sizes.py fits the constants to the runs of
docs/sizes.csv; docs/sizes.md says how well they agree.
"""
import math

import numpy as np

from core.text.dataset import read_tokens

# Parameters and tokens are in millions, losses relative to entropy().
CONSTANTS = {
    'floor': 0.297,
    'params_factor': 0.138, 'params_power': 0.198,  # a larger network
    'tokens_factor': 0.395, 'tokens_power': 0.169,  # more tokens
    'room': 2.54,  # parameters for each token of the text that are of use
    'repeats': 2.5,  # all passes after the first are worth at most so many (Muennighoff et al. 2023: arXiv 2305.16264)
    'decay_first': 0.131, 'decay_factor': 0.0373, 'decay_params_power': 0.653,  # see best_decay()
    'decay_penalty': 0.00646,  # for a weight decay that is e times too large or too small
    'dropout_decay': 17,  # the weight decay that dropout=1 would replace
    'dropout_cost': 0.107,  # of dropout=1
    'context_power': 0.0129,  # a longer context
    'critical_batch': 6200,  # a step of so many tokens learns half as much from each (McCandlish et al. 2018)
}
CRITICAL_POWER = 0.47  # longer runs bear larger steps (Zhang et al. 2024: https://arxiv.org/abs/2410.21676)
LEAST_DECAY, LARGEST_DECAY = 0.01, 2.0  # less does as little as none; more is outside of what was measured
MOST_WANTED = 10.0  # beyond it the law says nothing
DROPOUT_FROM, DROPOUT = 3.0, 0.1  # where weight decay alone was not enough: 32 passes over an eighth of Shakespeare

SAMPLE_TOKENS = 2**17  # the entropy is that of so many training tokens: more would take longer
ORDERS = 4  # of the n-gram models
DISCOUNT = 0.75  # absolute discounting (Ney et al. 1994)


def expected_loss(n_params, tokens, unique_tokens, vocab_size, dropout, weight_decay, entropy, block_size=128,
                  batch_tokens=2048, constants=CONSTANTS):
    """
    Return the loss on new text to expect after training, in nats per token; at most that of guessing.

    n_params: parameters that multiply, model.num_params(lookups=False)
    tokens: that are trained on, all passes together; unique_tokens: of the training text
    entropy: of the text, see entropy(); block_size: the context; batch_tokens: tokens of a step, 1,024
        at least: smaller steps were worse, at these learning rates; with NorMuon 2,048
    All may be arrays.
    """
    c = constants
    n, u = n_params / 1e6, unique_tokens / 1e6
    d = tokens / 1e6
    critical = c['critical_batch'] * d**CRITICAL_POWER
    d = d * (1 + 2048 / critical) / (1 + batch_tokens / critical)
    passes = np.maximum(tokens / unique_tokens, 1)
    new_passes = 1 + c['repeats'] * (1 - np.exp((1 - passes) / c['repeats']))  # worth the same without repetition
    d = d * new_passes / passes
    n = 1 / (1 / n + 1 / (c['room'] * u))
    loss = c['floor'] + c['params_factor'] * n**-c['params_power'] + c['tokens_factor'] * d**-c['tokens_power']
    decay = np.maximum(weight_decay + c['dropout_decay'] * dropout, LEAST_DECAY)
    too_large = np.log(decay / best_decay(n_params, unique_tokens, passes, c))
    loss = loss * (1 + c['decay_penalty'] * too_large**2) * (1 + c['dropout_cost'] * dropout)
    loss = entropy * loss * (block_size / 128)**-c['context_power']
    return np.minimum(loss, np.log(vocab_size))


def best_decay(n_params, unique_tokens, passes, c=CONSTANTS):
    """Return the best weight decay without dropout: it grows with the times that each parameter could be memorising."""
    repeated = np.maximum(passes - 1, 0) * (n_params / 1e6)**c['decay_params_power'] / (unique_tokens / 1e6)
    return np.minimum(c['decay_first'] + c['decay_factor'] * repeated, MOST_WANTED)


def regularisation(n_params, unique_tokens, passes):
    """
    Return the dropout and the weight decay that suit so many parameters and passes over so many tokens. In the measured
    runs weight decay alone was better than dropout, except where the text came many times.
    """
    wanted = float(best_decay(n_params, unique_tokens, passes))
    return DROPOUT if wanted > DROPOUT_FROM else 0.0, float(f'{min(wanted, LARGEST_DECAY):.2g}')


def entropy(data):
    """
    Return the nats per token that n-gram models leave, learned from a sample of the training tokens and measured on
    one of the validation tokens; without those, on the end of the first. It takes less than a second. The losses of
    networks on different texts differ by about this factor.
    """
    train = sample(data, 'train', SAMPLE_TOKENS)
    if data.splits['val'] > 1:
        val = sample(data, 'val', SAMPLE_TOKENS // 4)
    else:
        n_train = len(train) * 9 // 10
        train, val = train[:n_train], train[n_train:]
    if not len(train):  # a text of one token
        return math.log(data.vocab_size)
    return ngram_loss(train, val, data.vocab_size)


def sample(data, split, count, block=512):
    """Return about so many tokens of a split, in evenly spaced blocks."""
    length = data.splits[split]
    if length <= count:
        return read_tokens(data, split, np.arange(length))[0]
    starts = np.linspace(0, length - block, count // block).astype(np.int64)
    return read_tokens(data, split, (starts[:, None] + np.arange(block)).ravel())[0]


def ngram_loss(train, val, vocab_size):
    """
    Return the cross-entropy of val (n,) in nats, by the best of the interpolated n-gram models of train (m,) up to
    ORDERS. A context is the number of the n-gram that it is, among those of the order below.
    """
    p = np.full(len(val), 1 / vocab_size)
    context = np.zeros(len(train), np.int64)
    val_context = np.zeros(len(val), np.int64)  # -1: does not occur in train
    n_contexts = 1
    best = math.inf
    for _ in range(ORDERS):
        ngrams, ngram, counts = np.unique(context * vocab_size + train, return_inverse=True, return_counts=True)
        totals = np.bincount(context, minlength=n_contexts)
        continuations = np.bincount(ngrams // vocab_size, minlength=n_contexts)
        c = np.maximum(val_context, 0)
        wanted = c * vocab_size + val
        i = np.minimum(np.searchsorted(ngrams, wanted), len(ngrams) - 1)
        seen = (ngrams[i] == wanted) & (val_context >= 0)
        discounted = np.where(seen, counts[i] - DISCOUNT, 0) + DISCOUNT * continuations[c] * p
        p = np.where((val_context >= 0) & (totals[c] > 0), discounted / np.maximum(totals[c], 1), p)
        best = min(best, -np.log(p).mean())
        context = np.append(0, ngram[:-1])  # of the next token
        val_context = np.append(-1, np.where(seen, i, -1)[:-1])
        n_contexts = len(ngrams)
    return float(best)
