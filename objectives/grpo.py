"""
Group relative policy optimisation (Shao et al. 2024: https://arxiv.org/abs/2402.03300): the model answers each prompt several times, every answer gets a reward, and
those better than their group's mean become more likely, the others less; how far in one go is bounded by clipping (PPO, Schulman et al. 2017), how
far in all by the divergence from a reference model. The loss is averaged over all tokens of the step's answers (DAPO, Yu et al. 2025).
"""
import importlib.util
import math
import os
import sys
from types import SimpleNamespace

import numpy as np
import torch

from core.distributed import gather
from core.files import find
from core.inference.generation import continue_prompts
from core.text.chat_template import answer_text, end_of_turn
from core.text.dataset import pack, read_document, shuffled
from core.weights.checkpoint import load_reference, refuse_reward_model
from objectives import reward as reward_model

group_size = 8  # answers to each prompt; a row of the batch is a prompt
updates = 1  # steps made of the same answers; more make fewer answers do, each step the further from the model that gave them
clip = 0.2  # a token's probability counts up to 1 - clip and 1 + clip times what it was when it was drawn
kl_coef = 0.04  # how dear the divergence from the reference is, in reward per nat and token
max_new_tokens = 128  # length of an answer at most
temperature = 1.0  # of the answers in training; at 1 they are drawn as the model has them
reward = ''  # a reward model (a checkpoint or a run's folder), or a Python function in a file, 'rewards.py:name', of the prompt (as the template has it), the answer and whether that ended: a number
reference = ''  # the model to stay near to, a checkpoint or a run's folder; '': that of --init_from

MEASURES = ('loss', 'reward', 'kl', 'length', 'finished')


def start(model, data, run, config, saved):
    """What answers are judged and measured by; kept: the answers in use, {number: tensors}, where they serve several steps."""
    if run.sharded:
        sys.exit('parallel=fsdp: objective=grpo lets every process write answers by itself, which takes the whole network; use --parallel=ddp')
    if data.kind != 'prompts':
        sys.exit(f'dataset={config["dataset"]} has {data.kind or "text"}; objective=grpo needs prompts: data/chat/prepare.py makes a folder of them')
    if data.longest + max_new_tokens > config['block_size']:
        sys.exit(f'max_new_tokens={max_new_tokens}: the longest prompt has {data.longest} tokens, which leaves {config["block_size"] - data.longest} of block_size={config["block_size"]} for an answer')
    for key, least in {'group_size': 2, 'updates': 1, 'max_new_tokens': 1, 'kl_coef': 0, 'clip': 0, 'temperature': 1e-5}.items():
        if config[key] < least:
            sys.exit(f'{key}={config[key]}: expected at least {least}')
    refuse_reward_model(model, config['init_from'])
    path = reference or saved.get('reference') or config['init_from']
    context = SimpleNamespace(path=path, policy=model, model=load_reference(path, data, run, model), judge=make_judge(data, run, config['block_size']), data=data, run=run,
                              seed=config['seed'], rows=config['batch_size'] * config['gradient_accumulation_steps'], kept=saved.get('kept', {}))
    refuse_reward_model(context.model, path)
    return context


def make_judge(data, run, block_size):
    """A function (prompts, answers, finished) -> rewards, each a list: by a reward model, or by a function of the user's."""
    path, colon, name = reward.rpartition(':')
    if not reward:
        sys.exit("reward='': expected a reward model, or a function as rewards.py:name")
    if colon and path.endswith('.py'):
        if not os.path.isfile(find(path)):
            sys.exit(f'reward={reward}: there is no file {path}')
        spec = importlib.util.spec_from_file_location('reward', find(path))
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # it is the user's
            sys.exit(f'reward={reward}: {path} cannot be read: {type(error).__name__}: {error}')
        function = getattr(module, name, None) or sys.exit(f'reward={reward}: {path} has no {name}')
        tokenizer = data.tokenizer

        def judge(prompts, rows, finished):
            texts = [(tokenizer.decode(prompt), answer_text(tokenizer, row), done) for prompt, row, done in zip(prompts, rows, finished)]
            try:
                return [float(function(*text)) for text in texts]
            except Exception as error:
                sys.exit(f'reward={reward}: {type(error).__name__}: {error}')
        return judge
    model = load_reference(reward, data, run)
    if not model.config.reward:
        sys.exit(f'reward={reward}: this is no reward model; train one by --objective=reward')

    @torch.no_grad()
    def judge_by_model(prompts, rows, finished):
        batch = pack(with_targets(prompts, rows), block_size)
        with run.ctx():
            return reward_model.rewards(model, *(x.to(run.device) for x in batch)).tolist()
    return judge_by_model


def state(context):
    kept = {serial: list(answers) for part in gather(context.kept, context.run) for serial, answers in part.items()}  # of all processes, as it is now
    return {'reference': context.path, 'kept': kept}


def draw(data, rows, block_size, seed, step, order=''):
    """Prompts (rows, 2): number of the document, and a serial number, which says which draw of it this is. Steps that share answers have the same rows."""
    step //= updates
    return np.stack([shuffled(len(data.starts['train']) - 1, rows, seed, step), np.arange(step * rows, (step + 1) * rows)], axis=1)


def fixed(data, split, rows, block_size):
    """`rows` evenly spaced prompts of a split, all if that is fewer or rows is negative; their serial numbers are below 0, so these draws are no training's."""
    count = len(data.starts[split]) - 1
    numbers = np.arange(count) if rows < 0 or rows >= count else np.linspace(0, count - 1, rows).astype(np.int64)
    return np.stack([numbers, -1 - np.arange(len(numbers))], axis=1)


def with_targets(prompts, rows):
    """Prompts with their answers, as tokens and targets (length,) each; the targets are -1 where they are no answer."""
    return [(torch.tensor([*prompt, *row]), torch.tensor([-1] * (len(prompt) - 1) + row + [-1])) for prompt, row in zip(prompts, rows)]


def advantages(rewards):
    """By how many standard deviations each reward is above its group's mean, (groups, group_size); 0 where all of a group are equal."""
    return (rewards - rewards.mean(dim=1, keepdim=True)) / (rewards.std(dim=1, keepdim=True) + 1e-4)


@torch.no_grad()
def respond(context, split, numbers, copies, block_size):
    """
    Answers to prompts (rows, 2), `copies` each: of each answer its tokens, with the prompt, targets, and the log-probabilities of these by the model and by the
    reference, (length,) each; of all the rewards and whether they ended by themselves, (rows * copies,).
    """
    data, run, model = context.data, context.run, context.policy
    prompts = [prompt for number, _ in numbers for prompt in [read_document(data, split, number)[0].tolist()] * copies]
    seeds = [[context.seed, abs(serial), int(serial < 0), copy] for _, serial in numbers.tolist() for copy in range(copies)]
    was_training = model.training
    model.eval()
    with run.ctx():
        *_, rows = continue_prompts(model, data.tokenizer, prompts, max_new_tokens, seeds,
                                    end_ids=[end_of_turn(data.tokenizer)], temperature=temperature)
        rows = [row.ids for row in rows]
        texts = with_targets(prompts, rows)
        batch = pack(texts, block_size)
        ours, theirs = (-network(*(x.to(run.device) for x in batch)).cpu() for network in (model, context.model))  # (rows, T)
    model.train(was_training)
    finished = [row[-1] == end_of_turn(data.tokenizer) for row in rows]
    rewards = context.judge(prompts, rows, finished)
    if not all(map(math.isfinite, rewards)):
        sys.exit(f'reward={reward}: a reward is {next(r for r in rewards if not math.isfinite(r))}, of {answer_text(data.tokenizer, rows[[*map(math.isfinite, rewards)].index(False)])[:60]!r}')
    return [(*text, ours[batch[2] == i], theirs[batch[2] == i]) for i, text in enumerate(texts)], torch.tensor(rewards), torch.tensor(finished)


def load(data, split, numbers, block_size, context):
    """
    Answers, packed: tokens, targets, the log-probabilities of these when they were drawn and by the reference, in training also how much better each is than its
    group, and which answer a token belongs to; (rows, T) each. In evaluation, where each prompt gets one answer, their rewards and whether they ended follow, (answers,).
    """
    serials, kept = numbers[:, 1].tolist(), context.kept
    if serials[0] < 0:
        texts, rewards, finished = respond(context, split, numbers, 1, block_size)
        return *pack(texts, block_size), rewards, finished
    for serial in [serial for serial in kept if serial // context.rows < serials[0] // context.rows]:
        del kept[serial]  # a resumed run's, which other processes have used
    if not all(serial in kept for serial in serials):
        texts, rewards, _ = respond(context, split, numbers, group_size, block_size)
        better = advantages(rewards.view(-1, group_size)).flatten().tolist()
        texts = [(*text, torch.full(text[0].shape, advantage)) for text, advantage in zip(texts, better)]
        kept.update((serial, [updates, texts[i * group_size:(i + 1) * group_size]]) for i, serial in enumerate(serials))
    batch = pack([text for serial in serials for text in kept[serial][1]], block_size)
    for serial in serials:
        kept[serial][0] -= 1
        if kept[serial][0] == 0:
            del kept[serial]
    return batch


def divisor(batch):
    return (batch[1] != -1).sum()


def surrogate(logps, old, theirs, advantage):
    """What each token adds to the loss (rows, T): the clipped ratio times the advantage, against the divergence from the reference (Schulman 2020: http://joschu.net/blog/kl-approx.html)."""
    ratio, away = (logps - old).exp(), theirs - logps
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return kl_coef * (away.exp() - away - 1) - gain


def loss(model, batch):
    X, Y, old, theirs, advantage, document = batch
    return (surrogate(-model(X, Y, document), old, theirs, advantage) * (Y != -1)).sum()


def measure(model, batch, data, context):
    """
    Sum and divisor of each of MEASURES, (5, 2), of the model's own answers: the loss, which is the divergence's price less the reward; the reward; the divergence from
    the reference in nats per token; the answer's length in tokens; the share of answers that ended by themselves.
    """
    _, Y, ours, theirs, document, rewards, finished = (x.cpu() for x in batch)
    count, told = len(rewards), Y != -1

    def of_each(x):
        return torch.zeros(count + 1, dtype=torch.float64).index_add(0, document.flatten(), x.double().flatten())[:count]
    length = of_each(told)  # at least 1
    kl = (of_each((ours - theirs) * told) / length).sum()  # of each answer its mean, so that it does not matter which are in one batch
    numbers = [kl_coef * kl - rewards.sum(), rewards.sum(), kl, length.sum(), finished.sum()]
    return torch.tensor([[number, count] for number in numbers], dtype=torch.float64)
