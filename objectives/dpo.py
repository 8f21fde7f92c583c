"""
Direct preference optimisation (Rafailov et al. 2023: https://arxiv.org/abs/2305.18290), without a
reward model and without sampling. The logistic loss raises the log-probability of the chosen answer
against that of the rejected one, both relative to a reference model. An answer's log-probability is the
sum over its tokens.

A batch is (X, Y, document, reference_logps): the first three as in objectives/reward.py, and the
log-probabilities of the answers by the reference model (pairs, 2), chosen and rejected.
"""
import sys
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F

from core.device import to_device
from core.distributed import all_reduce
from core.training.progress import show_progress
from core.weights.checkpoint import load_reference, refuse_reward_model
from objectives import reward
from objectives.reward import draw, fixed, ranked_right  # noqa: F401  # part of this objective

beta = 0.1  # how strongly the model is held to the reference: higher stays closer
label_smoothing = 0.0  # share of pairs assumed to be labelled the wrong way round (https://ericmitchell.ai/cdpo.pdf)
reference = ''  # the reference model, a checkpoint or the folder of a run; '': the model of --init_from

MEASURES = ('loss', 'accuracy', 'margin', 'kl')
TOKENS_AT_ONCE = 2**14  # of the answers whose log-probabilities by the reference model are computed together


def start(model, data, env, config, saved):
    """
    Load the reference model and compute its log-probabilities of all answers, {split: (pairs, 2)}. They
    never change, so they are computed once and saved in the checkpoints.
    """
    refuse_reward_model(model, config['init_from'])
    reward.check_pairs(data, config)
    if beta <= 0 or not 0 <= label_smoothing < 0.5:
        sys.exit(f'beta={beta}, label_smoothing={label_smoothing}: '
                 'expected beta above 0 and label_smoothing at least 0 and less than 0.5')
    path = reference or saved.get('reference') or config['init_from']
    reference_model = load_reference(path, data, env, model, quiet=path == config['init_from'])  # loaded before
    refuse_reward_model(reference_model, path)
    logps = saved.get('logps') if path == saved.get('reference') else None
    if not logps:
        logps = {split: reference_logps(reference_model, data, split, config, env) for split in data.splits}
    return SimpleNamespace(reference_path=path, reference_model=reference_model, logps=logps)


def state(context):
    return {'reference': context.reference_path, 'logps': context.logps}


@torch.no_grad()
def reference_logps(model, data, split, config, env):
    """Return the log-probabilities (pairs, 2) of all answers of a split; the ranks share the work."""
    batch_size = max(config['batch_size'], TOKENS_AT_ONCE // (2 * data.longest))  # pairs; no gradients, so many fit
    pairs = np.arange(len(data.starts[split]) // 2)
    logps = torch.zeros(len(pairs), 2)
    print(f'the log-probabilities of {2 * len(pairs):,} answers ({split}) by the reference model ...', flush=True)
    begins = range(env.rank * batch_size, len(pairs), env.world_size * batch_size)
    for i in show_progress(begins, f'reference, {split}'):
        numbers = pairs[i:i + batch_size]
        X, Y, document, _ = reward.load(data, split, numbers, config['block_size'])
        with env.ctx():
            part = answer_logps(model, *to_device((X, Y, document), env), len(numbers))
        logps[i:i + batch_size] = part.cpu()
    return all_reduce(logps, env).float()


def answer_logps(model, X, Y, document, n_pairs):
    """Return the log-probabilities (n_pairs, 2) of the packed answers of a batch."""
    token_logps = -model(X, Y, document)  # (rows, T), 0 where there is no target
    sums = torch.zeros(2 * n_pairs + 1, device=X.device)  # the last one is padding
    sums = sums.index_add(0, document.flatten(), token_logps.flatten())
    return sums[:-1].view(-1, 2)


def load(data, split, pairs, block_size, context):
    """Return the batch (X, Y, document, reference_logps) of the pairs with these indices (n,)."""
    X, Y, document, _ = reward.load(data, split, pairs, block_size)
    return X, Y, document, context.logps[split][pairs]


def divisor(batch):
    """Return the number of pairs."""
    return len(batch[3])


def margins(logps, reference_logps):
    """
    Return how much more log-probability the chosen answer has gained since the reference than the
    rejected one, (pairs,), in nats. logps, reference_logps (pairs, 2): by the model and by the reference.
    """
    chosen, rejected = (logps - reference_logps).unbind(dim=1)
    return chosen - rejected


def losses(margin):
    """Return the loss of each pair (pairs,)."""
    right_way = -F.logsigmoid(beta * margin)
    wrong_way = -F.logsigmoid(-beta * margin)
    return (1 - label_smoothing) * right_way + label_smoothing * wrong_way


def loss(model, batch):
    """Return the summed loss of the pairs."""
    X, Y, document, reference_logps = batch
    logps = answer_logps(model, X, Y, document, len(reference_logps))
    return losses(margins(logps, reference_logps)).sum()


def measure(model, batch, data, context):
    """
    Return sum and divisor of each of MEASURES, (4, 2): the loss; the share of pairs with a positive
    margin; the margin of the implicit rewards, beta times that of the log-probabilities; KL(model ||
    reference) in nats per token, computed from the full distributions at every token of the chosen
    answers.
    The reference's log-probabilities are computed anew: those of the batch were computed in other rows
    and differ by rounding, so that a model that equals the reference would not have margins of 0.
    """
    X, Y, document, saved_logps = batch
    n_pairs = len(saved_logps)
    reference_logps = answer_logps(context.reference_model, X, Y, document, n_pairs)
    margin = margins(answer_logps(model, X, Y, document, n_pairs), reference_logps)
    is_chosen = is_last_answer(Y, document) & (document % 2 == 0)
    logps = next_token_logps(model, X, document, is_chosen)
    kl = (logps.exp() * (logps - next_token_logps(context.reference_model, X, document, is_chosen))).sum()
    sums = torch.stack([losses(margin).sum(), ranked_right(margin), beta * margin.sum(), kl]).cpu().double()
    divisors = torch.tensor([n_pairs, n_pairs, n_pairs, is_chosen.sum()], dtype=torch.float64)
    return torch.stack([sums, divisors], dim=1)


def is_last_answer(Y, document):
    """Return a mask (rows, T) of the targets of each document's last answer: a conversation has earlier ones too."""
    is_target = (Y != -1).flatten()
    begins = is_target & ~F.pad(is_target, (1, 0))[:-1]
    answer = begins.cumsum(0)  # the number of the answer that a target belongs to
    last = torch.zeros(int(document.max()) + 1, dtype=answer.dtype, device=Y.device)
    last.scatter_reduce_(0, document.flatten(), answer * is_target, 'amax')
    return (is_target & (answer == last[document.flatten()])).view(Y.shape)


def next_token_logps(model, X, document, where):
    """Return the log-probabilities (n, V) of all tokens at the n positions that `where` (rows, T) marks."""
    hidden = model.hidden(X, documents=document)[where]
    return model.lm_head(hidden).float().log_softmax(dim=-1)
