"""train.py --auto: what it may choose, and that it chooses what the law of losses says is best."""
import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import clock_of_steps, exit_line, make_dataset, run_script, write

from core.text.dataset import open_dataset
from core.training import law, plan
from core.training.plan import Network, Task, Timing
from model import GPT, GPTConfig

CPU = SimpleNamespace(device='cpu', device_type='cpu', dtype='float32', ddp=False, master=True, world_size=1,
                      sharded=False, ctx=contextlib.nullcontext)
CONFIG = {
    'minutes': 10.0, 'auto': True, 'compile': True, 'dataset': 'text', 'seed': 1, 'n_layer': 12, 'n_head': 12,
    'n_embd': 768, 'block_size': 1024, 'bias': False, 'rope_theta': 10000.0, 'norm': 'rmsnorm', 'activation': 'swiglu',
    'qk_norm': True, 'tied': False, 'n_kv_head': 0, 'head_size': 0, 'n_inner': 0, 'window': 0,
    'window_pattern': 'SSSL', 'batch_size': 12, 'gradient_accumulation_steps': 40, 'dropout': 0.0,
    'weight_decay': 0.1, 'optimizer': 'muon', 'beta1': 0.9, 'beta2': 0.95,
}
DATA = SimpleNamespace(vocab_size=65, shortest=10**6, splits={'train': 10**6, 'val': 10**5}, weights=[1.0], kind='',
                       tokenizer=None)


def task(kind='cpu', env=(), data=(), **given):
    """Return a Task; given: settings of the command line."""
    env = SimpleNamespace(**{**vars(CPU), **dict(env)})
    data = SimpleNamespace(**{**vars(DATA), **dict(data)})
    return Task(CONFIG | given, {key: [str(value)] for key, value in given.items()}, data, kind, env)


def shapes(networks):
    return [(n.config.n_layer, n.config.n_embd) for n in networks]


def fast_timings(networks):
    """As if every network computed 10**11 FLOPs a second, and its optimizer took 200 tokens' time."""
    timings = []
    for network in networks[::3]:
        flops = plan.flops_per_token(network, 256)
        timings.append(Timing(network, flops, 200 * flops / 1e11, flops / 1e11))
    return timings


def test_networks():
    networks = plan.list_networks(task())
    assert sorted(shapes(networks)) == sorted(plan.NETWORKS)
    assert [n.n_params for n in networks] == sorted(n.n_params for n in networks)
    for network in networks:
        c = network.config
        assert c.n_embd == c.n_head * c.head_size
        assert c.head_size == 32
        assert c.n_head % c.n_kv_head == 0
        assert c.n_kv_head < c.n_head
    for network in networks[:3]:
        model = GPT(network.config)
        assert network.n_params == model.num_params(lookups=False)
        model.crop_block_size(128)
        assert plan.flops_per_token(network, 128) == model.flops_per_token()
    wide = [n.config.head_size for n in plan.list_networks(task('gpu')) if n.config.n_embd >= 512]
    assert set(wide) == {64}


def test_given_networks():
    assert {layers for layers, _ in shapes(plan.list_networks(task(n_layer=5)))} == {5}
    assert {width for _, width in shapes(plan.list_networks(task(n_embd=100)))} == {100}
    network, = plan.list_networks(task(n_layer=3, n_embd=100))
    assert (network.config.n_layer, network.config.n_embd, network.config.n_head) == (3, 100, 2)
    network, = plan.list_networks(task(n_layer=3, n_embd=96, n_head=6, n_kv_head=0))
    assert (network.config.n_head, network.config.n_kv_head) == (6, 6)
    assert {width for _, width in shapes(plan.list_networks(task(n_head=5)))} == {160, 320}
    assert exit_line(plan.list_networks, task(n_head=7)).endswith('is not divisible by n_head=7')


@pytest.mark.parametrize('n_embd, channels, expected', [(96, 32, 3), (100, 32, 2), (512, 64, 8), (7, 32, 1)])
def test_heads(n_embd, channels, expected):
    assert plan.count_heads(n_embd, channels) == expected


@pytest.mark.parametrize('n_head, expected', [
    (1, 1), (2, 1), (3, 1), (4, 2), (5, 1), (6, 2), (8, 2), (10, 2), (12, 4), (24, 8),
])
def test_heads_of_keys(n_head, expected):
    assert plan.count_kv_heads(n_head) == expected


@pytest.mark.parametrize('shortest, expected', [
    (10**6, [64, 128, 256, 512, 1024]), (2100, [64, 128, 256]), (512, [64]), (511, [32]), (33, [32]),
])
def test_contexts(shortest, expected):
    assert plan.list_contexts(task(data={'shortest': shortest})) == expected


def test_a_text_that_is_too_short():
    line = exit_line(plan.list_contexts, task(data={'shortest': 32}))
    assert line == ('dataset=text has 32 tokens to train on, and auto=True needs more than 32, the shortest context; '
                    'prepare a longer text')
    assert plan.list_contexts(task(data={'shortest': 20}, block_size=16)) == [16]


@pytest.mark.parametrize('given, world_size, rows, batches', [
    ({}, 1, [8, 16, 32, 64, 128, 256], [(64, 4), (8, 1)]),
    ({}, 3, [12, 24, 48, 96, 192], [(64, 3), (4, 3)]),
    ({'batch_size': 6}, 1, [6], [(6, 1)]),
    ({'batch_size': 6, 'gradient_accumulation_steps': 3}, 1, [18], [(6, 3)]),
    ({'gradient_accumulation_steps': 3}, 1, [12, 24, 48, 96, 192], [(64, 3), (4, 3)]),
])
def test_batches(given, world_size, rows, batches):
    """batches: of the most rows, and of the fewest."""
    t = task(env={'world_size': world_size}, **given)
    assert plan.list_rows(256, t) == rows
    most, few = batches[0], batches[-1]
    assert plan.split_batch(rows[-1], 256, t) == most
    n = few[0] * few[1]
    assert n in rows
    assert plan.split_batch(n, 256, t) == few
    for n in rows:
        batch_size, parts = plan.split_batch(n, 256, t)
        assert batch_size * parts == n
        assert n % world_size == 0


def test_interpolation():
    networks = plan.list_networks(task())
    timings = [Timing(networks[0], 1e6, 0.001, 1e-6), Timing(networks[1], 1e8, 0.01, 1e-4)]
    for timing in timings:
        assert plan.interpolate(timing.flops, timings) == pytest.approx([timing.fixed, timing.per_token])
    assert plan.interpolate(1e7, timings) == pytest.approx([0.001 * 10**0.5, 1e-5])
    assert plan.interpolate(1e9, timings) == pytest.approx([0.1, 1e-3])  # in proportion to FLOPs
    assert plan.interpolate(1e5, timings) == pytest.approx([0.0001, 1e-7])


def test_timing_in_a_short_time():
    """At least the smallest network is timed, and the random numbers of the run are those without it."""
    networks = plan.list_networks(task())
    torch.manual_seed(1)
    expected = torch.rand(3)
    timing, = plan.time_networks(networks, [64], 0.0, task())
    assert torch.equal(torch.rand(3), expected)
    assert timing.network is networks[0]
    assert timing.fixed > 0
    assert timing.per_token > 0


def choose(monkeypatch, expected_loss, **kwargs):
    monkeypatch.setattr(plan, 'time_networks', lambda networks, *_: fast_timings(networks))
    monkeypatch.setattr(plan.startup, 'seconds_since_start', lambda: 30.0)
    monkeypatch.setattr(law, 'entropy', lambda data: 2.5)
    monkeypatch.setattr(law, 'regularisation', lambda n_params, unique, passes: (0.125, 0.25))
    monkeypatch.setattr(law, 'expected_loss', expected_loss)
    return plan.make_plan(task(**kwargs))


def test_the_network_with_the_least_loss(monkeypatch, capsys):
    """If nothing but the parameters counts, the largest; if nothing but the tokens, the smallest."""
    large = choose(monkeypatch, lambda n_params, *_, **__: 1 / n_params)
    assert (large['n_layer'], large['n_embd']) == (16, 1024)
    capsys.readouterr()
    small = choose(monkeypatch, lambda n_params, tokens, *_, **__: 1e6 / tokens)
    assert (small['n_layer'], small['n_embd'], small['n_head'], small['n_kv_head']) == (2, 96, 3, 1)
    assert (small['dropout'], small['weight_decay'], small['data_order']) == (0.125, 0.25, 'epochs')
    assert set(small) == set(plan.CHOSEN)
    out = capsys.readouterr().out
    tokens = small['batch_size'] * small['gradient_accumulation_steps'] * small['block_size']
    assert f'plan: 2 layers of 96, {small["max_iters"]:,} steps of {tokens:,} tokens' in out
    assert 'rather than 3 layers of 128' in out
    flops = plan.flops_per_token(plan.list_networks(task())[0], small['block_size'])
    seconds = (small['max_iters'] * (200 + tokens)) * flops / 1e11
    assert seconds / plan.COMPILE_SPEEDUP < 570 < seconds  # compiled, the optimizer not


def test_what_the_command_line_gives(monkeypatch):
    chosen = choose(monkeypatch, lambda n_params, *_, **__: 1 / n_params, n_layer=4, block_size=128, batch_size=10,
                    gradient_accumulation_steps=1, dropout=0.5, compile=False)
    assert (chosen['n_layer'], chosen['n_embd'], chosen['block_size'], chosen['batch_size']) == (4, 1024, 128, 10)
    assert (chosen['dropout'], chosen['compile']) == (0.5, False)


def test_a_mixture_is_drawn_at_random(monkeypatch):
    assert choose(monkeypatch, lambda *_, **__: 1.0, data={'weights': [1.0, 2.0]})['data_order'] == 'random'


def test_too_little_time(monkeypatch):
    assert exit_line(choose, monkeypatch, lambda *_, **__: 1.0, minutes=0.5) == (
        'minutes=0.5: too short for a step of any network that may be chosen, because 30.0 s are spent already; '
        'give it more minutes')


@pytest.mark.parametrize('minutes, given, tools, expected', [
    (10.0, {}, True, True), (10.0, {}, False, False), (1.0, {}, True, False), (1.0, {'compile': True}, False, True),
    (10.0, {'compile': False}, True, False),
])
def test_compiling(minutes, given, tools, expected, monkeypatch):
    monkeypatch.setattr(plan.shutil, 'which', lambda name: '/usr/bin/c++' if tools else None)
    t = task(**given)
    t.config['minutes'] = minutes
    assert plan.will_compile(t) == expected


def test_bits_per_character(tmp_path):
    """Every id of a text by character is a character; of a BBPE it is several."""
    text = write(tmp_path / 'text.txt', 'the lazy dog jumps over the quick brown fox\n' * 200)
    make_dataset(tmp_path / 'char', text)
    make_dataset(tmp_path / 'bbpe', text, tokenizer='bbpe', vocab_size=280)
    assert plan.describe_loss(np.log(2), open_dataset(str(tmp_path / 'char'))) == 'bits per character about 1.00'
    data = open_dataset(str(tmp_path / 'bbpe'))
    bits = float(plan.describe_loss(np.log(2), data).split()[-1])
    assert 0.1 < bits < 0.9
    data.tokenizer = None
    assert plan.describe_loss(np.log(2), data) == 'loss about 0.69'

# --- train.py


AUTO = ['config/auto.py', '--device=cpu', '--dtype=float32', '--n_layer=2', '--n_embd=32']


def test_a_run_and_its_continuation(tiny_data, tmp_path, monkeypatch):
    """The continuation takes the network and all else from the checkpoint, and times nothing."""
    now = clock_of_steps(monkeypatch, 10.0)
    first = run_script('train.py', *AUTO, '--minutes=2', f'--dataset={tiny_data}', f'--out_dir={tmp_path}')
    assert first.code == 0, first.err
    assert 'auto: plan: 2 layers of 32, ' in first.out
    checkpoint = torch.load(tmp_path / 'weights.pt')
    now[0] = 0.0
    second = run_script('train.py', *AUTO, '--minutes=3', f'--dataset={tiny_data}', f'--out_dir={tmp_path}',
                        '--init_from=resume')
    assert second.code == 0, second.err
    assert 'auto: ' not in second.out
    config = torch.load(tmp_path / 'weights.pt')['config']
    chosen = set(plan.CHOSEN) - {'max_iters'}
    assert config['max_iters'] > checkpoint['config']['max_iters'] > 5
    assert {key: config[key] for key in chosen} == {key: checkpoint['config'][key] for key in chosen}
    assert config['batch_size'] * config['gradient_accumulation_steps'] * config['block_size'] >= 1024


@pytest.mark.parametrize('arguments, line', [
    (['--init_from=gpt2'], 'init_from=gpt2: auto=True chooses a new network; to train this one, give --minutes to '
                           'another config\n'),
    (['--n_head=5', '--n_embd=64'], 'n_embd=64 is not divisible by n_head=5\n'),
])
def test_bad_input(arguments, line, tiny_data, tmp_path):
    result = run_script('train.py', *AUTO, f'--dataset={tiny_data}', f'--out_dir={tmp_path / "out"}', *arguments)
    assert (result.code, result.err) == (1, line)
    assert list(tmp_path.iterdir()) == []


def test_texts_only(tmp_path):
    data = SimpleNamespace(**{**vars(DATA), 'kind': 'conversations'})
    assert exit_line(plan.make_plan, Task(CONFIG, {}, data, 'cpu', CPU)) == (
        'dataset=text has conversations, and auto=True is for texts; give --minutes to another config')


def test_a_network_of_shapes_needs_no_memory():
    config = GPTConfig(vocab_size=65, n_layer=16, n_embd=1024, n_head=32, norm='rmsnorm', rope_theta=1e4)
    assert plan.fits_into_memory(Network(config, 0), 1, 64, CPU)
    assert not plan.fits_into_memory(Network(config, 0), 10**9, 64, CPU)
