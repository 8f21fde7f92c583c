"""
Group relative policy optimisation (Shao et al. 2024: https://arxiv.org/abs/2402.03300). The model
answers each prompt several times and every answer gets a reward. Answers better than the mean of their
group become more likely, the others less likely. Clipping bounds the change per set of answers (PPO,
Schulman et al. 2017), a KL penalty the distance from a reference model. The loss is averaged over all
tokens of the step's answers (DAPO, Yu et al. 2025).

The reward is a reward model (--reward=out-reward), or a Python function in a file
(--reward=rewards.py:name) which gets the prompt as the chat template renders it, the answer, and
whether the answer ended with the end-of-turn token, and returns a number.

draw() and fixed() return (prompt, serial) pairs: the index of the prompt, and a number of this draw of
it, by which its answers are seeded and stored. In training, serials count up from 0; in evaluation they
are negative. Batches: see load().
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
from objectives import evenly_spaced
from objectives import reward as reward_objective

group_size = 8  # answers to each prompt; a row of the batch is one prompt
updates = 1  # steps per set of answers; more save generation, but the answers are then of an older model
clip = 0.2  # the ratio of a token's probability to that at sampling time counts between 1 - clip and 1 + clip
kl_coef = 0.04  # weight of the KL penalty: reward lost per nat of KL per token
max_new_tokens = 128  # maximum length of an answer
temperature = 1.0  # sampling temperature of the answers; 1 is the distribution of the model itself
reward = ''  # a reward model (a checkpoint or the folder of a run), or a function in a file: 'rewards.py:name'
reference = ''  # the model of the KL penalty, a checkpoint or the folder of a run; '': the model of --init_from

MEASURES = ('loss', 'reward', 'kl', 'length', 'finished')

# ----------------------------------------------------------------------------- set-up


def start(model, data, env, config, saved):
    """Load the reference model and the reward; restore the rollouts that a resumed run still uses."""
    check_settings(data, env, config)
    refuse_reward_model(model, config['init_from'])
    path = reference or saved.get('reference') or config['init_from']
    reference_model = load_reference(path, data, env, model, quiet=path == config['init_from'])  # loaded before
    judge = make_judge(data, env, config['block_size'])
    refuse_reward_model(reference_model, path)
    return SimpleNamespace(
        data=data, env=env, seed=config['seed'], policy=model, reference_model=reference_model, reference_path=path,
        judge=judge, rows_per_step=config['batch_size'] * config['gradient_accumulation_steps'],
        rollouts=saved.get('kept', {}))  # {serial: [steps left, texts]}: this rank's answers that are still in use


def check_settings(data, env, config):
    """Exit if the dataset, the settings or the way of running do not fit this objective."""
    if env.sharded:
        sys.exit('parallel=fsdp: objective=grpo lets every process write answers by itself, which takes the whole '
                 'network; use --parallel=ddp')
    if data.kind != 'prompts':
        sys.exit(f'dataset={config["dataset"]} has {data.kind or "text"}; objective=grpo needs prompts: '
                 'data/chat/prepare.py makes a folder of them')
    if data.longest + max_new_tokens > config['block_size']:
        sys.exit(f'max_new_tokens={max_new_tokens}: the longest prompt has {data.longest} tokens, which leaves '
                 f'{config["block_size"] - data.longest} of block_size={config["block_size"]} for an answer')
    for name, value, minimum in (('group_size', group_size, 2),
                                 ('updates', updates, 1),
                                 ('max_new_tokens', max_new_tokens, 1),
                                 ('kl_coef', kl_coef, 0),
                                 ('clip', clip, 0),
                                 ('temperature', temperature, 1e-5)):
        if value < minimum:
            sys.exit(f'{name}={value}: expected at least {minimum}')


def make_judge(data, env, block_size):
    """
    Return judge(prompts, answers, finished) -> rewards, where prompts and answers are lists of lists of
    ids, finished is a list of bools and rewards a list of floats.
    """
    if not reward:
        sys.exit("reward='': expected a reward model, or a function as rewards.py:name")
    path, colon, name = reward.rpartition(':')
    if colon and path.endswith('.py'):
        return judge_by_function(load_function(path, name), data.tokenizer)
    return judge_by_model(data, env, block_size)


def load_function(path, name):
    """Return the user's function `name` from the Python file `path`."""
    if not os.path.isfile(find(path)):
        sys.exit(f'reward={reward}: there is no file {path}')
    spec = importlib.util.spec_from_file_location('reward', find(path))
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises
        sys.exit(f'reward={reward}: {path} cannot be read: {type(error).__name__}: {error}')
    function = getattr(module, name, None)
    if not function:
        sys.exit(f'reward={reward}: {path} has no {name}')
    return function


def judge_by_function(function, tokenizer):
    def judge(prompts, answers, finished):
        prompt_texts = [tokenizer.decode(prompt) for prompt in prompts]
        answer_texts = [answer_text(tokenizer, answer) for answer in answers]
        try:
            return [float(function(*arguments)) for arguments in zip(prompt_texts, answer_texts, finished)]
        except Exception as error:  # whatever the user's code raises
            sys.exit(f'reward={reward}: {type(error).__name__}: {error}')
    return judge


def judge_by_model(data, env, block_size):
    model = load_reference(reward, data, env)
    if not model.config.reward:
        sys.exit(f'reward={reward}: this is no reward model; train one by --objective=reward')

    @torch.no_grad()
    def judge(prompts, answers, finished):
        batch = reward_objective.with_ends(*pack(with_targets(prompts, answers), block_size))
        with env.ctx():
            return reward_objective.rewards(model, *(x.to(env.device) for x in batch)).tolist()
    return judge


def state(context):
    """Return the reference's path and the rollouts of all ranks, so that any number of ranks can resume."""
    rollouts = {}
    for part in gather(context.rollouts, context.env):
        for serial, (steps_left, texts) in part.items():
            rollouts[serial] = [steps_left, texts]  # a new list: load() goes on changing the old one
    return {'reference': context.reference_path, 'kept': rollouts}

# ----------------------------------------------------------------------------- batches


def draw(data, rows, block_size, seed, step, order=''):
    """Return (prompt, serial) pairs (rows, 2). The `updates` steps that share a set of answers draw the same ones."""
    draw_number = step // updates
    prompts = shuffled(len(data.starts['train']) - 1, rows, seed, draw_number)
    serials = np.arange(draw_number * rows, (draw_number + 1) * rows)
    return np.stack([prompts, serials], axis=1)


def fixed(data, split, rows, block_size):
    """
    Return (prompt, serial) pairs of `rows` evenly spaced prompts of a split; of all if that is fewer or
    rows is negative. The serials are negative, so evaluation samples by other random numbers than
    training.
    """
    prompts = evenly_spaced(len(data.starts[split]) - 1, rows)
    return np.stack([prompts, -1 - np.arange(len(prompts))], axis=1)


def load(data, split, rows, block_size, context):
    """
    Let the model answer the prompts of these (prompt, serial) pairs, and return the answers as a batch.
    In training a set of answers is generated once and used for `updates` steps.

    Training: (X, Y, old_logps, reference_logps, advantage, document), each (rows, T): tokens, targets,
    their log-probabilities at sampling time and by the reference model, the advantage of the answer,
    and which answer a token belongs to. Evaluation: (X, Y, logps, reference_logps, document, rewards,
    finished). Each prompt gets one answer; the last two are (answers,).
    """
    serials = rows[:, 1].tolist()
    if serials[0] < 0:
        texts, rewards, finished = rollout(context, split, rows, 1, block_size)
        return *pack(texts, block_size), rewards, finished
    drop_old_rollouts(context, serials[0])
    if not all(serial in context.rollouts for serial in serials):
        add_rollouts(context, split, rows, block_size)
    batch = pack([text for serial in serials for text in context.rollouts[serial][1]], block_size)
    for serial in serials:
        context.rollouts[serial][0] -= 1
        if context.rollouts[serial][0] == 0:
            del context.rollouts[serial]
    return batch


load.ahead = False  # it needs the model as it is at the step


def drop_old_rollouts(context, serial):
    """
    Drop rollouts of earlier draws. A resumed run restores those of all ranks, and those that now belong
    to another rank are never counted down here.
    """
    draw_number = serial // context.rows_per_step
    for old in [old for old in context.rollouts if old // context.rows_per_step < draw_number]:
        del context.rollouts[old]


def add_rollouts(context, split, rows, block_size):
    """
    Generate a group of answers to each prompt and store them, with their advantages, under the serial
    of the prompt.
    """
    texts, rewards, _ = rollout(context, split, rows, group_size, block_size)
    answer_advantages = advantages(rewards.view(-1, group_size)).flatten().tolist()
    texts = [(*text, torch.full(text[0].shape, advantage)) for text, advantage in zip(texts, answer_advantages)]
    for i, serial in enumerate(rows[:, 1].tolist()):
        context.rollouts[serial] = [updates, texts[i * group_size:(i + 1) * group_size]]


@torch.no_grad()
def rollout(context, split, rows, copies, block_size):
    """
    Answer each prompt of these (prompt, serial) pairs `copies` times. Returns texts: of each answer
    (tokens with the prompt, targets, log-probabilities by the model, by the reference), (length,) each
    rewards (answers,), and finished (answers,): whether the answer ended with the end-of-turn token.
    """
    prompts, seeds = [], []
    for number, serial in rows.tolist():
        prompt = read_document(context.data, split, number)[0].tolist()
        for copy in range(copies):
            prompts.append(prompt)
            seeds.append([context.seed, abs(serial), int(serial < 0), copy])

    was_training = context.policy.training
    context.policy.eval()
    with context.env.ctx():
        answers = sample_answers(context, prompts, seeds)
        texts = with_targets(prompts, answers)
        batch = pack(texts, block_size)
        on_device = [x.to(context.env.device) for x in batch]
        logps = -context.policy(*on_device).cpu()  # (rows, T)
        reference_logps = -context.reference_model(*on_device).cpu()
    context.policy.train(was_training)

    tokenizer = context.data.tokenizer
    finished = [answer[-1] == end_of_turn(tokenizer) for answer in answers]
    rewards = context.judge(prompts, answers, finished)
    for value, answer in zip(rewards, answers):
        if not math.isfinite(value):
            sys.exit(f'reward={reward}: a reward is {value}, of {answer_text(tokenizer, answer)[:60]!r}')
    document = batch[2]
    texts = [(*text, logps[document == i], reference_logps[document == i]) for i, text in enumerate(texts)]
    return texts, torch.tensor(rewards), torch.tensor(finished)


def sample_answers(context, prompts, seeds):
    """Return the ids of one answer to each prompt, by the random numbers of its seed."""
    tokenizer = context.data.tokenizer
    *_, rows = continue_prompts(context.policy, tokenizer, prompts, max_new_tokens, seeds,
                                end_ids=[end_of_turn(tokenizer)], temperature=temperature)
    return [row.ids for row in rows]


def with_targets(prompts, answers):
    """Return (tokens, targets), (length,) each, of every prompt with its answer; targets are -1 outside the answer."""
    texts = []
    for prompt, answer in zip(prompts, answers):
        targets = [-1] * (len(prompt) - 1) + answer + [-1]
        texts.append((torch.tensor([*prompt, *answer]), torch.tensor(targets)))
    return texts


def advantages(rewards):
    """
    Return by how many standard deviations each reward is above the mean of its group, (groups,
    group_size); 0 if all rewards of a group are equal.
    """
    return (rewards - rewards.mean(dim=1, keepdim=True)) / (rewards.std(dim=1, keepdim=True) + 1e-4)

# ----------------------------------------------------------------------------- loss


def divisor(batch):
    """Return the number of tokens in the answers."""
    return (batch[1] != -1).sum()


def surrogate(logps, old_logps, reference_logps, advantage):
    """
    Return the loss of each token (rows, T): the KL penalty (an unbiased estimate that is never negative, Schulman 2020:
    http://joschu.net/blog/kl-approx.html) minus the clipped ratio times the advantage.
    """
    ratio = (logps - old_logps).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    log_ratio = reference_logps - logps
    kl = log_ratio.exp() - log_ratio - 1
    return kl_coef * kl - gain


def loss(model, batch):
    """Return the summed loss of the tokens in the answers."""
    X, Y, old_logps, reference_logps, advantage, document = batch
    losses = surrogate(-model(X, Y, document), old_logps, reference_logps, advantage)
    return (losses * (Y != -1)).sum()


def measure(model, batch, data, context):
    """
    Return sum and divisor of each of MEASURES, (5, 2), over the model's own answers: the loss, which is
    kl_coef * KL - reward; the reward; KL(model || reference) in nats per token; the length in tokens;
    the share of answers that ended.
    """
    _, Y, logps, reference_logps, document, rewards, finished = (x.cpu() for x in batch)
    n_answers = len(rewards)
    is_target = Y != -1

    def sum_per_answer(x):
        sums = torch.zeros(n_answers + 1, dtype=torch.float64)  # the last one is padding
        return sums.index_add(0, document.flatten(), x.double().flatten())[:n_answers]
    lengths = sum_per_answer(is_target)  # at least 1
    # the mean over the tokens of each answer first, so that the result does not depend on how answers are batched
    kl = (sum_per_answer((logps - reference_logps) * is_target) / lengths).sum()
    sums = [kl_coef * kl - rewards.sum(), rewards.sum(), kl, lengths.sum(), finished.sum()]
    return torch.tensor([[total, n_answers] for total in sums], dtype=torch.float64)
