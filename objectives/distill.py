"""
Distillation (Hinton et al. 2015: https://arxiv.org/abs/1503.02531): learn the distribution of the next token that other
networks, the teachers, compute, instead of only the token that follows in the text. It learns from texts and, like
next_token, from the assistant's tokens in conversations. The probabilities of several teachers are averaged.

On texts the loss of a token is KL(teachers || student). A share of the rows (on_policy) has a text that the student
writes itself, after a prompt from the data; there it is KL(student || teachers). The student then learns to correct
its own mistakes (generalised knowledge distillation, Agarwal et al. 2023: https://arxiv.org/abs/2306.13649; MiniLLM,
Gu et al. 2023: https://arxiv.org/abs/2306.08543). All distributions are compared in full, and the sampled tokens are
constants: no gradient passes through the sampling.

draw() and fixed() return (start, serial) pairs: the start position of a row, and a number of a row that the student
writes, by which it is seeded; -1 for a row of the data. A batch is (X, Y, by_student), or (X, Y, document, by_student)
for conversations, each (rows, T): the first three as in objectives/next_token.py, and whether the student writes the
row.
"""
import sys
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F

from core.inference.generation import continue_prompts
from core.text.chat_template import end_of_turn
from core.weights.checkpoint import load_model, refuse_reward_model
from core.weights.ensemble import Ensemble, at_least_fp32, split_names
from core.weights.vocabulary import fit_vocabulary
from objectives import next_token
from objectives.next_token import divisor  # noqa: F401  # part of this objective

teachers = ''  # checkpoints, or folders of runs or Hugging Face models, separated by commas; all with one tokenizer
temperature = 1.0  # divides the logits of student and teachers; higher counts unlikely tokens more
hard_weight = 0.0  # share of the usual cross-entropy in the loss of a token of the data; 0: only the teachers count
on_policy = 0.0  # share of the rows whose text the student writes itself; in conversations, the last answers
own_tokens = 0  # how many tokens of such a row of a text it writes; 0: half of block_size

MEASURES = ('loss', 'kl', 'bpb', 'bpc')  # cross-entropy and KL(teachers || student), both at temperature 1
LOGITS_AT_ONCE = 2**22  # logits in fp32 at a time, of the student and of one teacher; four times that on GPUs

_ensemble = None  # the teachers: start() sets it, because loss() gets no context

# ----------------------------------------------------------------------------- set-up


def start(model, data, env, config, saved):
    """Load the teachers."""
    global _ensemble
    check_settings(data, env, config)
    refuse_reward_model(model, config['init_from'])
    names = teachers or saved.get('teachers', '')
    networks = [load_teacher(name, data, env, config) for name in split_names('teachers', names)]
    _ensemble = Ensemble(networks, model.config.vocab_size)
    load.ahead = on_policy == 0  # the student as it is at the step writes
    return SimpleNamespace(policy=model, teachers=names, env=env, seed=config['seed'])


def check_settings(data, env, config):
    """Exit if the dataset, the settings or the way of running do not fit this objective."""
    if data.kind not in ('', 'conversations'):
        sys.exit(f'dataset={config["dataset"]} has {data.kind}; objective=distill learns from texts and conversations')
    for name, value in (('on_policy', on_policy), ('hard_weight', hard_weight)):
        if not 0 <= value <= 1:
            sys.exit(f'{name}={value}: expected a number in [0, 1]')
    if not 0 < temperature < float('inf'):
        sys.exit(f'temperature={temperature}: expected a number above 0')
    if not 0 <= own_tokens <= config['block_size']:
        sys.exit(f'own_tokens={own_tokens}: expected at least 0, and at most block_size={config["block_size"]}')
    if on_policy and env.sharded:
        sys.exit(f'parallel=fsdp: with on_policy={on_policy} every process writes text by itself, which takes the '
                 'whole network; use --parallel=ddp')
    if on_policy and data.tokenizer is None:
        sys.exit(f'on_policy={on_policy}: {data.folder} has no tokenizer, without which no text is written; '
                 'use --on_policy=0')


def load_teacher(name, data, env, config):
    """Load a teacher onto the device. Exits if it cannot teach the rows of this dataset."""
    model, source = load_model(name)
    refuse_reward_model(model, name)
    if fit_vocabulary(model, source, data, name) < model.config.vocab_size:
        sys.exit(f'{name}: it has no role tokens, so it has not learned to answer; take a teacher that is '
                 'instruction-tuned')
    if model.config.block_size < config['block_size']:
        sys.exit(f'{name}: this teacher has a context of {model.config.block_size}, less than '
                 f'block_size={config["block_size"]}; use --block_size={model.config.block_size}')
    return model.to(env.device).eval().requires_grad_(False)


def state(context):
    return {'teachers': context.teachers}

# ----------------------------------------------------------------------------- batches


def draw(data, rows, block_size, seed, step, order='random'):
    """Return (start, serial) pairs (rows, 2): rows as next_token draws them. The student's are spread evenly."""
    starts = next_token.draw(data, rows, block_size, seed, step, order)
    serials = np.arange(step * rows, (step + 1) * rows)
    by_student = np.floor((serials + 1) * on_policy) > np.floor(serials * on_policy)
    return np.stack([starts, np.where(by_student, serials, -1)], axis=1)


def fixed(data, split, rows, block_size):
    """Return (start, serial) pairs of rows of the data, as next_token does."""
    starts = next_token.fixed(data, split, rows, block_size)
    return np.stack([starts, np.full(len(starts), -1)], axis=1)


def load(data, split, rows, block_size, context):
    """Return the batch of these (start, serial) pairs. Rows with a serial are written by the student, as it is now."""
    starts, serials = rows.T  # (rows,) each
    X, Y, *document = next_token.load(data, split, starts, block_size)
    if (serials >= 0).any():
        write_own(X, Y, document[0] if document else None, serials, data.tokenizer, context)
    by_student = torch.from_numpy(np.repeat(serials[:, None] >= 0, block_size, axis=1))
    return X, Y, *document, by_student


@torch.no_grad()
def write_own(X, Y, document, serials, tokenizer, context):
    """Let the student write into the rows of X and Y that have a serial. Only what it writes is a target there."""
    places, prompts, seeds = [], [], []
    for row in np.flatnonzero(serials >= 0):
        here = None if document is None else document[row].numpy()
        for i, (start, first, end) in enumerate(own_places(Y[row].numpy(), here)):
            places.append((row, first, end))
            prompts.append(X[row, start:first + 1].tolist())
            seeds.append([context.seed, int(serials[row]), i])
        Y[row] = -1
    if not places:
        return
    was_training = context.policy.training
    context.policy.eval()
    with context.env.ctx():
        *_, written = continue_prompts(
            context.policy, tokenizer, prompts, max(end - first for _, first, end in places), seeds,
            end_ids=() if document is None else [end_of_turn(tokenizer)])
    context.policy.train(was_training)
    for (row, first, end), text in zip(places, written):
        ids = torch.tensor(text.ids[:end - first])
        Y[row, first:first + len(ids)] = ids
        X[row, first + 1:first + 1 + len(ids)] = ids[:X.size(1) - first - 1]


def own_places(targets, document=None):
    """
    Return where the student writes in a row, [(start of the prompt, first target, end of the targets)]: the last
    own_tokens targets of a text, or the last answer in each conversation, where it may be shorter. targets, document
    (T,).
    """
    positions = np.flatnonzero(targets != -1)
    if not len(positions):
        return []
    if document is None:
        n = own_tokens or (len(targets) + 1) // 2
        return [(0, positions[-n:][0], positions[-1] + 1)]
    places = []
    for number in np.unique(document[positions]):
        start = np.flatnonzero(document == number)[0]
        answers = positions[document[positions] == number]
        last = answers[np.r_[True, np.diff(answers) > 1]][-1]  # target that begins the last answer
        places.append((start, last, answers[-1] + 1))
    return places

# ----------------------------------------------------------------------------- loss


def divergence(logits, teacher_logps, by_student=None):
    """
    Return KL(teachers || student) of each token (n,) in nats, and where by_student (n,) KL(student || teachers).

    logits (n, V): the student's. teacher_logps (n, W): the teachers' log-probabilities of the first W <= V ids, which
    all have. The probability of the others, m, adds -log(1 - m) to both, which is 0 if the student gives them none.
    """
    common = logits[:, :teacher_logps.size(1)]
    logps = common.log_softmax(dim=-1)  # (n, W)
    p, q = teacher_logps, logps
    if by_student is not None:
        p = torch.where(by_student[:, None], logps, teacher_logps)
        q = torch.where(by_student[:, None], teacher_logps, logps)
    kl = (p.exp() * (p - q)).sum(dim=-1)
    if common.size(1) < logits.size(1):
        kl = kl + logits.logsumexp(dim=-1) - common.logsumexp(dim=-1)
    return kl


def losses(logits, teacher_logps, targets, by_student):
    """Return the loss of each token (n,), 0 where there is no target. The factor keeps gradients as large at any T."""
    loss = temperature**2 * divergence(logits / temperature, teacher_logps, by_student if on_policy else None)
    if hard_weight:
        mixed = (1 - hard_weight) * loss + hard_weight * F.cross_entropy(
            logits, targets, ignore_index=-1, reduction='none')
        loss = torch.where(by_student, loss, mixed)
    return loss * (targets != -1)


def loss(model, batch):
    """Return the summed loss of the targets."""
    X, Y, *document, by_student = batch
    targets, by_student = Y.flatten(), by_student.flatten()
    hidden = _ensemble.hidden(X, *document)
    logits = model(X, None, *document).flatten(0, 1)  # (N, V)

    def sum_of(part, rows):
        return losses(part, _ensemble.log_probs(hidden, rows, temperature), targets[rows], by_student[rows]).sum()
    return SumOverRows.apply(logits, sum_of)


loss.logits = True  # it calls the model without targets


def chunks(logits):
    """Return slices of the rows of logits (N, V), for LOGITS_AT_ONCE."""
    n = max(1, LOGITS_AT_ONCE * (4 if logits.is_cuda else 1) // logits.size(1))
    return [slice(i, i + n) for i in range(0, len(logits), n)]


class SumOverRows(torch.autograd.Function):
    """
    The sum over chunks of rows of function(logits[rows] in fp32, rows), a scalar. The gradient of a chunk is computed
    with it and saved in the dtype of the logits, so that fp32 numbers are only there for one chunk.
    """

    @staticmethod
    def forward(ctx, logits, function):
        total = 0.0
        ctx.gradient = torch.empty_like(logits)
        for rows in chunks(logits):
            with torch.enable_grad():
                part = at_least_fp32(logits[rows].detach()).requires_grad_()
                loss = function(part, rows)
            total = total + loss.detach()
            ctx.gradient[rows] = torch.autograd.grad(loss, part)[0]
        return total

    @staticmethod
    def backward(ctx, dtotal):
        return ctx.gradient.mul_(dtotal), None


def measure(model, batch, data, context):
    """
    Return sum and divisor of each of MEASURES, (4, 2): next_token's, and KL(teachers || student) in nats per token.
    """
    X, Y, *document, _ = batch
    hidden = _ensemble.hidden(X, *document)
    logits = model(X, None, *document).flatten(0, 1)
    token_losses, kls = [], []
    for rows in chunks(logits):
        part = at_least_fp32(logits[rows])
        token_losses.append(F.cross_entropy(part, Y.flatten()[rows], ignore_index=-1, reduction='none'))
        kls.append(divergence(part, _ensemble.log_probs(hidden, rows)))
    loss, *bits = next_token.measures_of(torch.cat(token_losses).view(Y.shape), Y, data)
    kl = (torch.cat(kls).view(Y.shape) * (Y != -1)).sum()
    return torch.stack([loss, torch.stack([kl, loss[1]]), *bits])
