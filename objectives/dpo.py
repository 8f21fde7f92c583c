"""
Direct preference optimisation (Rafailov et al. 2023: https://arxiv.org/abs/2305.18290): the log-probability of the chosen answer rises against that of the
rejected one, each measured from a reference model, by the logistic loss; no reward model, no sampling. An answer's log-probability is the sum over its tokens.
"""
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from core.checkpoint import check_writes, load_reference
from core.device import all_reduce
from objectives import reward
from objectives.reward import divisor, draw, fixed  # noqa: F401  # the loop takes them from here

beta = 0.1  # how dear the distance from the reference is: higher stays closer
label_smoothing = 0.0  # the share of pairs that are taken to be the wrong way round (Mitchell 2023: https://ericmitchell.ai/cdpo.pdf)
reference = ''  # the model to measure from, a checkpoint or a run's folder; '': that of --init_from

MEASURES = ('loss', 'accuracy', 'margin', 'kl')


def start(model, data, run, config, saved):
    """The reference model and its log-probabilities of all answers {split: (pairs, 2)}: they never change, so they are computed once and kept with the checkpoints."""
    check_writes(model, config['init_from'])
    reward.check_pairs(data, config)
    path = reference or saved.get('reference') or config['init_from']
    context = SimpleNamespace(path=path, model=load_reference(path, data, run), logps=saved.get('logps'))
    if not context.logps:
        context.logps = {split: reference_logps(context.model, data, split, config, run) for split in data.splits}
    return context


@torch.no_grad()
def reference_logps(model, data, split, config, run):
    pairs = np.arange(len(data.starts[split]) // 2)
    logps = torch.zeros(len(pairs), 2)
    at_once = config['batch_size']
    for i in tqdm(range(run.rank * at_once, len(pairs), run.world_size * at_once), desc=f'reference, {split}', leave=False, disable=None):
        with run.ctx():
            batch = [x.to(run.device) for x in reward.load(data, split, pairs[i:i + at_once], config['block_size'])]
            logps[i:i + at_once] = -model(*batch).sum(dim=1).view(-1, 2).cpu()
    return all_reduce(logps, run).float()


def state(context):
    return {'reference': context.path, 'logps': context.logps}


def load(data, split, pairs, block_size, context):
    """Tokens and targets (2 * pairs, T), chosen and rejected by turns; the reference's log-probabilities (pairs, 2)."""
    return *reward.load(data, split, pairs, block_size), context.logps[split][pairs]


def margins(model, batch):
    """By how much the chosen answer's log-probability has risen above the rejected one's since the reference (pairs,), in nats."""
    X, Y, reference_logps = batch
    logps = -model(X, Y).sum(dim=1).view(-1, 2)  # (pairs, 2)
    chosen, rejected = (logps - reference_logps).unbind(dim=1)
    return chosen - rejected


def losses(margin):
    return -(1 - label_smoothing) * F.logsigmoid(beta * margin) - label_smoothing * F.logsigmoid(-beta * margin)


def loss(model, batch):
    return losses(margins(model, batch)).sum()


def measure(model, batch, data, context):
    """
    Sum and divisor of each of MEASURES, (4, 2): the loss; the share of pairs whose margin is positive; the margin of the implicit rewards, beta times that of
    the log-probabilities; the divergence KL(model || reference) in nats per token, exact at every token of the chosen answers.
    """
    X, Y, _ = batch
    margin, count = margins(model, batch), len(X) // 2
    told = Y[::2] != -1
    ours, theirs = (network(X[::2]).float()[told].log_softmax(dim=-1) for network in (model, context.model))  # (tokens, V)
    kl = (ours.exp() * (ours - theirs)).sum()
    return torch.stack([torch.stack([losses(margin).sum(), (margin > 0).sum(), beta * margin.sum(), kl]).double().cpu(),
                        torch.tensor([count, count, count, told.sum()], dtype=torch.float64)], dim=1)
