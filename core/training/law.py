"""
The law of losses: what a network of Qwen3's kind, trained with Muon as in config/speedrun_shakespeare_char.py, can be
expected to reach, and the weight decay that suits it. benchmarks/sizes.py fits the constants to the runs of
docs/sizes.csv; docs/sizes.md says how well they agree.
"""
import math

import numpy as np

from core.text.dataset import read_tokens

# Parameters and tokens are in millions, losses relative to entropy().
CONSTANTS = {
    'floor': 0.384,
    'params_factor': 0.102, 'params_power': 0.255,  # a larger network
    'tokens_factor': 0.349, 'tokens_power': 0.195,  # more tokens
    'room': 4.35,  # parameters for each token of the text that are of use
    'repeats': 2.52,  # passes after the first that are worth a new text, however many there are (Muennighoff et al. 2023)
    'decay_params_power': 1.07, 'decay_power': 1.37, 'decay_factor': 0.0379, 'decay_first': 0.142,  # the best weight decay
    'decay_penalty': 0.00702,  # for a weight decay that is e times too large or too small
    'dropout_decay': 11.4,  # the weight decay that dropout=1 would replace
    'dropout_cost': 0.19,  # for dropout=1
    'context_power': 0.0295,  # a longer context
    'critical_batch': 16400,  # tokens of a step that teach half as much as in small steps (McCandlish et al. 2018)
}
LARGEST_DECAY = 2.0  # larger ones were not better at any number of passes


def expected_loss(n_params, tokens, unique_tokens, vocab_size, dropout, weight_decay, entropy, block_size=128,
                  batch_tokens=2048, constants=CONSTANTS):
    """
    Return the loss on new text to expect after training, in nats per token.

    n_params: parameters that multiply, model.num_params(lookups=False)
    tokens: that are trained on, all passes together; unique_tokens: of the training text
    entropy: of the text, see entropy(); block_size: the context; batch_tokens: tokens of a step
    All but vocab_size, which has no influence beyond n_params and entropy, may be arrays.
    """
    c = constants
    n, u = n_params / 1e6, unique_tokens / 1e6
    d = tokens / 1e6 * (1 + 2048 / c['critical_batch']) / (1 + batch_tokens / c['critical_batch'])
    passes = np.maximum(tokens / unique_tokens, 1)
    new_passes = 1 + c['repeats'] * (1 - np.exp((1 - passes) / c['repeats']))  # worth the same without repetition
    d = d * new_passes / passes
    n = 1 / (1 / n + 1 / (c['room'] * u))
    loss = c['floor'] + c['params_factor'] * n**-c['params_power'] + c['tokens_factor'] * d**-c['tokens_power']
    too_large = np.log((weight_decay + c['dropout_decay'] * dropout)
                       / best_decay(n_params, unique_tokens, passes, c))
    loss = loss * (1 + c['decay_penalty'] * too_large**2) * (1 + c['dropout_cost'] * dropout)
    return entropy * loss * (block_size / 128)**-c['context_power']


def best_decay(n_params, unique_tokens, passes, c=CONSTANTS):
    """Return the best weight decay without dropout: it grows with the times that each parameter could be memorising."""
    repeated = np.maximum(passes - 1, 0) * (n_params / 1e6)**c['decay_params_power'] / (unique_tokens / 1e6)
    return c['decay_first'] + c['decay_factor'] * repeated**c['decay_power']


def regularisation(n_params, unique_tokens, passes):
    """
    Return the dropout and the weight decay that suit so many parameters and passes over so many tokens. In the measured
    runs weight decay did all that dropout does, and cost less, so dropout is 0.
    """
    return 0.0, float(f'{min(best_decay(n_params, unique_tokens, passes), LARGEST_DECAY):.2g}')


SAMPLE_TOKENS = 2**17  # the entropy is that of so many training tokens: more would take longer
ORDERS = 4  # of the n-gram models
DISCOUNT = 0.75  # absolute discounting (Ney et al. 1994)


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
        n_train = max(1, len(train) * 9 // 10)
        train, val = train[:n_train], train[n_train:]
    if not len(val):
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
