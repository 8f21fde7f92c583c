"""
train.py --auto, with --minutes: choose network, context, batch and regularisation, by timing a few steps on this
machine and by the law of losses in law.py.
"""
import importlib.util
import math
import os
import shutil
import statistics
import sys
import time
from collections import namedtuple

import numpy as np
import torch

from core import startup
from core.device import shapes_only
from core.distributed import gather
from core.estimates import total_memory, training_memory
from core.text.dataset import read_tokens
from core.training import law
from core.training.optimizer import configure_optimizer
from core.training.settings import ARCHITECTURE, check_heads
from core.weights.checkpoint import load_last
from core.weights.vocabulary import padded_vocab_size
from model import GPT, GPTConfig

CHOSEN = ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'block_size', 'batch_size', 'gradient_accumulation_steps',
          'data_order', 'dropout', 'weight_decay', 'compile', 'max_iters')
NETWORKS = ((2, 96), (3, 128), (4, 160), (5, 192), (6, 192), (6, 256), (6, 320), (8, 384), (8, 512), (12, 768),
            (16, 1024))  # layers and width
CONTEXTS = (64, 128, 256, 512, 1024)
SHORTEST_CONTEXT = 32  # for texts that are too short for the others
# tokens on a CPU and on a GPU: in a step (least, most), in the steps that are timed, and at most in a micro-batch
STEP_TOKENS = {'cpu': (2**11, 2**16), 'gpu': (2**12, 2**19)}
TIMED_TOKENS = {'cpu': (2**10, 2**12), 'gpu': (2**12, 2**15)}
MICRO_TOKENS = {'cpu': 2**14, 'gpu': 2**16}
TIMING_SHARE, TIMING_SECONDS = 0.05, 20  # of the budget, and at most so many, for timing
OTHER_SHARE = 0.06  # of the budget, for evaluations and saving
LEAST_STEPS = 100  # of a run, if a smaller batch allows so many: in fewer the schedule cannot do its work
COMPILE_MINUTES = 2  # a shorter run is not compiled
# Assumed here; once it is compiled, the number of steps follows the clock. The optimizer is not compiled.
COMPILE_SECONDS, COMPILE_SPEEDUP = 15, 1.6

Task = namedtuple('Task', 'config given data kind env')  # what a plan is made for; kind: 'cpu' or 'gpu'
Network = namedtuple('Network', 'config n_params')  # n_params: without lookup tables
Timing = namedtuple('Timing', 'network flops fixed per_token')  # a step takes fixed + per_token * tokens seconds
Candidate = namedtuple('Candidate', 'network block_size rows steps passes dropout weight_decay loss')


def choose_settings(script, start_from, data, env):
    """
    Set the globals CHOSEN of train.py and their entries in its `config`, except those given on the command line. A
    resumed run takes them from its checkpoint. Exits if the text or the budget is too short.
    """
    config, given = script['config'], script['config_given']
    if start_from == 'resume':
        chosen = load_last(script['out_dir'], 'meta')[0].get('config', {})
    elif start_from == 'scratch':
        chosen = make_plan(Task(config, given, data, 'cpu' if env.device_type == 'cpu' else 'gpu', env))
    else:
        sys.exit(f'init_from={start_from}: auto=True chooses a new network; to train this one, '
                 'give --minutes to another config')
    chosen = {key: chosen[key] for key in CHOSEN if key in chosen and key not in given}
    config.update(chosen)
    script.update(chosen)


def make_plan(task):
    """Return CHOSEN with their values for a new run, the same on all ranks. Prints the plan and its reasons."""
    config, data, env = task.config, task.data, task.env
    if data.kind:
        sys.exit(f'dataset={config["dataset"]} has {data.kind}, and auto=True is for texts; '
                 'give --minutes to another config')
    budget = config['minutes'] * 60
    compiles = will_compile(task)
    networks = list_networks(task)
    contexts = list_contexts(task)
    timings = time_networks(networks, contexts, min(TIMING_SECONDS, TIMING_SHARE * budget), task)
    timings, spent = gather((timings, startup.seconds_since_start()), env)[0]  # every rank decides as rank 0
    left = (budget - spent - COMPILE_SECONDS * compiles) * (1 - OTHER_SHARE)
    if compiles:
        timings = [timing._replace(per_token=timing.per_token / COMPILE_SPEEDUP) for timing in timings]

    entropy = law.entropy(data)
    candidates = [best_of(network, contexts, timings, left, entropy, task) for network in networks]
    candidates = list(filter(None, candidates))
    if not candidates:
        sys.exit(f'minutes={config["minutes"]:g}: too short for a step of any network that may be chosen, because '
                 f'{spent:.1f} s are spent already; give it more minutes')
    best = min(candidates, key=lambda candidate: candidate.loss)
    print_plan(best, candidates, timings, compiles, task)
    return settings_of(best, compiles, task)


def will_compile(task):
    """Whether to compile: as the command line says; else if the run is long enough, and the tools are there."""
    config, env = task.config, task.env
    if 'compile' in task.given or not config['compile']:
        return config['compile']
    if env.device_type == 'cpu':
        has_tools = any(shutil.which(name) for name in (os.environ.get('CXX', 'c++'), 'g++', 'clang++', 'cl'))
    else:
        has_tools = importlib.util.find_spec('triton') is not None
    return has_tools and config['minutes'] >= COMPILE_MINUTES

# --- what may be chosen


def list_networks(task):
    """
    Return the networks from small to large. Layers, width and heads are those of the command line, if it has any. Exits
    if these do not fit together.
    """
    config, given = task.config, {key for key in task.given if task.config[key] != 0}
    shapes = {(config['n_layer'] if 'n_layer' in given else n_layer, config['n_embd'] if 'n_embd' in given else n_embd)
              for n_layer, n_embd in NETWORKS}
    if 'n_head' in given:
        shapes = {shape for shape in shapes if shape[1] % config['n_head'] == 0} or shapes
    networks = []
    for n_layer, n_embd in shapes:
        channels = config['head_size'] or (64 if task.kind == 'gpu' and n_embd >= 512 else 32)
        n_head = config['n_head'] if 'n_head' in given else count_heads(n_embd, channels)
        n_kv_head = config['n_kv_head'] if 'n_kv_head' in task.given else count_kv_heads(n_head)
        check_heads(n_embd, n_head, n_kv_head, config['head_size'], config['rope_theta'], derived='n_head' not in given)
        architecture = {key: config[key] for key in ARCHITECTURE}
        architecture.update(n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_kv_head=n_kv_head,
                            block_size=max(*CONTEXTS, config['block_size']))
        model_config = GPTConfig(vocab_size=padded_vocab_size(task.data.vocab_size), **architecture)
        with shapes_only():
            networks.append(Network(model_config, GPT(model_config).num_params(lookups=False)))
    return sorted(networks, key=lambda network: network.n_params)


def count_heads(n_embd, channels):
    """Return the number of heads of about so many channels: a divisor of n_embd."""
    return next(n for n in range(max(1, n_embd // channels), 0, -1) if n_embd % n == 0)


def count_kv_heads(n_head):
    """Return the largest divisor of n_head that is at most a third of it; of few heads, a half."""
    most = max(1, min(max(n_head / 3, 2), n_head / 2))
    return max(n for n in range(1, n_head + 1) if n_head % n == 0 and n <= most)


def list_contexts(task):
    """Return the contexts that the text is long enough for. Exits if there is none."""
    if 'block_size' in task.given:
        return [task.config['block_size']]
    shortest = task.data.shortest
    if shortest <= SHORTEST_CONTEXT:
        sys.exit(f'dataset={task.config["dataset"]} has {shortest} tokens to train on, and auto=True needs more than '
                 f'{SHORTEST_CONTEXT}, the shortest context; prepare a longer text')
    return [T for T in CONTEXTS if 8 * T <= shortest] or [SHORTEST_CONTEXT]


def list_rows(T, task):
    """Return the numbers of rows that a step may have."""
    parts = task.config['gradient_accumulation_steps'] if 'gradient_accumulation_steps' in task.given else 1
    if 'batch_size' in task.given:
        return [task.config['batch_size'] * parts]
    least, most = STEP_TOKENS[task.kind]
    rows = [math.lcm(parts, task.env.world_size) * 2**i for i in range(20)]
    return [n for n in rows if least <= n * T <= most] or rows[:1]


def split_batch(rows, T, task):
    """Return batch_size and gradient_accumulation_steps of a step: micro-batches of about MICRO_TOKENS, at most."""
    config, given = task.config, task.given
    if 'batch_size' in given:
        return config['batch_size'], rows // config['batch_size']
    if 'gradient_accumulation_steps' in given:
        return rows // config['gradient_accumulation_steps'], config['gradient_accumulation_steps']
    batch_size = rows // task.env.world_size
    while batch_size % 2 == 0 and batch_size * T > MICRO_TOKENS[task.kind]:
        batch_size //= 2
    return batch_size, rows // batch_size


def fits_into_memory(network, rows, T, env):
    """Whether three quarters of the memory suffice to train on (rows, T) tokens at a time."""
    available = total_memory(env)
    if available is None:
        return True
    with shapes_only():
        return sum(training_memory(GPT(network.config), rows, T, env)) < 0.75 * available

# --- how long a step takes


def flops_per_token(network, T):
    """Return the FLOPs of training on one token in a context of T. As GPT.flops_per_token(), without windows."""
    c = network.config
    return 6 * network.n_params + 12 * c.n_layer * c.n_head * c.head_size * T


def time_networks(networks, contexts, seconds, task):
    """Time some of the networks, from small to large, for about so many seconds. Return their Timings, at least one."""
    began = time.perf_counter()
    T = max([T for T in contexts if T <= 256] or contexts[:1])
    few, many = (math.ceil(tokens / T) for tokens in TIMED_TOKENS[task.kind])  # rows
    timings = []
    last = 0.0  # seconds that the last network took
    time_step(networks[0], few, T, 0.0, task)  # the first steps of a process take longer
    for network in networks:
        flops = flops_per_token(network, T)
        growth = flops / timings[-1].flops if timings else math.inf
        left = seconds - (time.perf_counter() - began)
        if growth < 3:  # near the last one
            continue
        if timings and (last * growth > left or not fits_into_memory(network, many, T, task.env)):
            break
        started = time.perf_counter()
        slow = time_step(network, many, T, seconds / 10, task)
        fast = time_step(network, few, T, seconds / 10, task) if few < many else slow
        per_token = max((slow - fast) / max(1, many - few), slow / many / 4) / T  # noise must not make it 0
        timings.append(Timing(network, flops, max(slow - per_token * many * T, slow / 100), per_token))
        last = time.perf_counter() - started
    torch.manual_seed(task.config['seed'])  # a new network has the weights that it would have had without this
    return timings


def time_step(network, rows, T, seconds, task):
    """Return the median seconds of steps on random tokens, without the first; one, or more within so many seconds."""
    config, env = task.config, task.env
    model = GPT(network.config).to(env.device)
    opt = configure_optimizer(model, config['optimizer'], 0.1, 1e-3, (config['beta1'], config['beta2']), 1e-3)
    X, Y = torch.randint(network.config.vocab_size, (2, rows, T), device=env.device)
    times = []
    while len(times) < 2 or (len(times) < 8 and sum(times) < seconds):
        started = time.perf_counter()
        with env.ctx():
            loss = model(X, Y).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        torch.get_device_module(env.device_type).synchronize()  # does nothing on the CPU
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def interpolate(flops, timings):
    """Return (fixed, per_token), see Timing, of a network with so many FLOPs per token, from those of others."""
    known = np.log([timing.flops for timing in timings])
    x = np.clip(math.log(flops), known[0], known[-1])
    outside = flops / math.exp(x)  # beyond the networks that were timed: in proportion
    return [math.exp(np.interp(x, known, np.log([getattr(timing, name) for timing in timings]))) * outside
            for name in ('fixed', 'per_token')]

# --- the choice


def best_of(network, contexts, timings, seconds, entropy, task):
    """
    Return the Candidate of this network, with the context and the batch that make the best of so many seconds. None if
    they are too few for a step.
    """
    candidates = []
    for T in contexts:
        fixed, per_token = interpolate(flops_per_token(network, T), timings)
        for rows in list_rows(T, task):
            steps = int(seconds / (fixed + per_token * rows * T / task.env.world_size))
            # A long context pays only after so many rows that the network has learned to use it.
            learns_context = T == contexts[0] or 25 * T <= steps * rows
            if steps and learns_context and fits_into_memory(network, split_batch(rows, T, task)[0], T, task.env):
                candidates.append(judge(network, T, rows, steps, entropy, task))
    most = min(LEAST_STEPS, max((candidate.steps for candidate in candidates), default=0))
    candidates = [candidate for candidate in candidates if candidate.steps >= most]
    return min(candidates, key=lambda candidate: candidate.loss, default=None)


def judge(network, T, rows, steps, entropy, task):
    """Return the Candidate with the loss to expect after so many steps of (rows, T) tokens."""
    config, given, data = task.config, task.given, task.data
    unique, tokens = data.splits['train'], steps * rows * T
    dropout, weight_decay = law.regularisation(network.n_params, unique, tokens / unique)
    dropout = config['dropout'] if 'dropout' in given else dropout
    weight_decay = config['weight_decay'] if 'weight_decay' in given else weight_decay
    loss = float(law.expected_loss(network.n_params, tokens, unique, data.vocab_size, dropout, weight_decay, entropy,
                                   block_size=T, batch_tokens=rows * T))
    return Candidate(network, T, rows, steps, tokens / unique, dropout, weight_decay, loss)


def settings_of(candidate, compiles, task):
    c = candidate.network.config
    batch_size, parts = split_batch(candidate.rows, candidate.block_size, task)
    return {
        'n_layer': c.n_layer, 'n_head': c.n_head, 'n_kv_head': c.n_kv_head, 'n_embd': c.n_embd,
        'block_size': candidate.block_size, 'batch_size': batch_size, 'gradient_accumulation_steps': parts,
        'data_order': 'epochs' if len(task.data.weights) == 1 else 'random',  # a mixture has no epochs
        'dropout': candidate.dropout, 'weight_decay': candidate.weight_decay, 'compile': compiles,
        'max_iters': candidate.steps,
    }


def print_plan(best, candidates, timings, compiles, task):
    env, data = task.env, task.data
    tokens = TIMED_TOKENS[task.kind][1]
    times = ', '.join(f'{describe(timing)}: {1000 * (timing.fixed + timing.per_token * tokens):,.0f} ms'
                      for timing in timings)
    note = f', taken to be {COMPILE_SPEEDUP} times as fast when compiled' if compiles else ''
    print(f'auto: a step of {tokens:,} tokens on {env.device} {env.dtype}{note}; {times}')
    i = candidates.index(best)
    others = candidates[max(0, i - 1):i] + candidates[i + 1:i + 2]  # the next smaller and larger ones
    for candidate in [best, *others]:
        tokens = candidate.rows * candidate.block_size
        passes = f'{candidate.passes:.2g}' if candidate.passes < 100 else f'{candidate.passes:,.0f}'
        print(f'auto: {"plan: " if candidate is best else "rather than "}{describe(candidate)}, {candidate.steps:,} '
              f'steps of {tokens:,} tokens, {passes} passes; '
              f'expected {describe_loss(candidate.loss, data)}')
    print(f'auto: {best.network.n_params:,} parameters, context {best.block_size}, dropout {best.dropout:g}, '
          f'weight decay {best.weight_decay:g}', flush=True)


def describe(timed):
    return f'{timed.network.config.n_layer} layers of {timed.network.config.n_embd}'


def describe_loss(loss, data):
    """Return 'bits per character about 5.3'; without a tokenizer the loss in nats per token."""
    characters = 0
    if data.tokenizer:
        tokens, _ = read_tokens(data, 'train', np.arange(min(data.splits['train'], 2**17)))
        characters = data.token_chars[tokens].double().mean().item()  # per token
    if not characters:
        return f'loss about {loss:.2f}'
    return f'bits per character about {loss / math.log(2) / characters:.2f}'
