"""
Direct preference optimisation (Rafailov et al. 2023: https://arxiv.org/abs/2305.18290): the log-probability of the chosen answer rises against that of the
rejected one, each measured from a reference model, by the logistic loss; no reward model, no sampling. An answer's log-probability is the sum over its tokens.
"""
import sys
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from core.distributed import all_reduce
from core.weights.checkpoint import load_reference, refuse_reward_model
from objectives import reward
from objectives.reward import divisor, draw, fixed  # noqa: F401  # the loop takes them from here

beta = 0.1  # how dear the distance from the reference is: higher stays closer
label_smoothing = 0.0  # the share of pairs that are taken to be the wrong way round (Mitchell 2023: https://ericmitchell.ai/cdpo.pdf)
reference = ''  # the model to measure from, a checkpoint or a run's folder; '': that of --init_from

MEASURES = ('loss', 'accuracy', 'margin', 'kl')


def start(model, data, run, config, saved):
    """The reference model and its log-probabilities of all answers {split: (pairs, 2)}: they never change, so they are computed once and kept with the checkpoints."""
    refuse_reward_model(model, config['init_from'])
    reward.check_pairs(data, config)
    if beta <= 0 or not 0 <= label_smoothing < 0.5:
        sys.exit(f'beta={beta}, label_smoothing={label_smoothing}: expected beta above 0 and label_smoothing at least 0 and less than 0.5')
    path = reference or saved.get('reference') or config['init_from']
    context = SimpleNamespace(path=path, model=load_reference(path, data, run, model), logps=saved.get('logps') if path == saved.get('reference') else None)
    refuse_reward_model(context.model, path)
    if not context.logps:
        context.logps = {split: reference_logps(context.model, data, split, config, run) for split in data.splits}
    return context


@torch.no_grad()
def reference_logps(model, data, split, config, run):
    pairs = np.arange(len(data.starts[split]) // 2)
    logps = torch.zeros(len(pairs), 2)
    at_once = config['batch_size']
    print(f'the log-probabilities of {2 * len(pairs):,} answers ({split}) by the reference model ...', flush=True)
    for i in tqdm(range(run.rank * at_once, len(pairs), run.world_size * at_once), desc=f'reference, {split}', leave=False, disable=None):
        with run.ctx():
            batch = [x.to(run.device) for x in reward.load(data, split, pairs[i:i + at_once], config['block_size'])]
            logps[i:i + at_once] = answer_logps(model, *batch).cpu()
    return all_reduce(logps, run).float()


def state(context):
    return {'reference': context.path, 'logps': context.logps}


def answer_logps(model, X, Y, document):
    """The log-probabilities (pairs, 2) of answers: tokens, targets and which answer each is of (rows, T)."""
    sums = torch.zeros(int(document.max()) + 1, device=X.device).index_add(0, document.flatten(), -model(X, Y, document).flatten())
    return sums[:2 * int(reward.divisor((X, Y, document)))].view(-1, 2)


def load(data, split, pairs, block_size, context):
    """Tokens, targets, and which answer each is of (rows, T); the reference's log-probabilities (pairs, 2)."""
    return *reward.load(data, split, pairs, block_size), context.logps[split][pairs]


def margins(model, batch):
    """By how much the chosen answer's log-probability has risen above the rejected one's since the reference (pairs,), in nats."""
    *batch, reference_logps = batch
    chosen, rejected = (answer_logps(model, *batch) - reference_logps).unbind(dim=1)
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
    X, Y, document, _ = batch
    margin, told = margins(model, batch), (Y != -1) & (document % 2 == 0)
    ours, theirs = (network.lm_head(network.hidden(X, documents=document)[told]).float().log_softmax(dim=-1) for network in (model, context.model))  # (tokens, V)
    kl = (ours.exp() * (ours - theirs)).sum()
    count = len(margin)
    return torch.stack([torch.stack([losses(margin).sum(), (margin > 0).sum(), beta * margin.sum(), kl]).double().cpu(),
                        torch.tensor([count, count, count, told.sum()], dtype=torch.float64)], dim=1)
