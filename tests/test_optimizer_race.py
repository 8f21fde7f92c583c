"""benchmarks/optimizer_race.py: its update rules, the search for the steps, and runs of a tiny network."""
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, run_script

from benchmarks import optimizer_race as race
from core.training.optimizer import configure_optimizer
from model import GPT, GPTConfig


def gradients(rows=4, columns=3, n=8):
    return list(torch.randn(n, rows, columns, generator=torch.Generator().manual_seed(0)))


def updates(rule, grads, **kwargs):
    state = {}
    return [rule(state, grad, step, step / len(grads), 0.95, **kwargs) for step, grad in enumerate(grads, 1)]


def adam_of_torch(grads, betas):
    """Return the updates of torch.optim.Adam, divided by the learning rate."""
    p = torch.nn.Parameter(torch.zeros_like(grads[0], dtype=torch.float64))
    opt = torch.optim.Adam([p], lr=1.0, betas=betas)
    found = []
    for grad in grads:
        before = p.detach().clone()
        p.grad = grad.double()
        opt.step()
        found.append((before - p.detach()).float())
    return found


def test_rules_that_are_adam():
    """Adam itself; AdEMAMix without the old mean."""
    for rule, kwargs in (race.adam_rule, {}), (race.ademamix, {'alpha': 0.0}):
        for ours, theirs in zip(updates(rule, gradients(), **kwargs), adam_of_torch(gradients(), (0.9, 0.99))):
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-5)


def test_ademamix_by_hand():
    """After two steps the schedules are done: beta3 and alpha 5. The gradient is always 1, so the old mean is known."""
    grads = [torch.ones(1, 1)] * 2
    first, second = updates(race.ademamix, grads)
    half = math.exp(math.log(0.9) * math.log(0.999) / (0.5 * math.log(0.999) + 0.5 * math.log(0.9)))
    old = [1 - half]
    old.append(0.999 * old[0] + 0.001)
    assert first.item() == pytest.approx(1 + 2.5 * old[0], rel=1e-4)
    assert second.item() == pytest.approx(1 + 5 * old[1], rel=1e-4)


def test_soap():
    """On a matrix of one number it is Adam, a step later. Rotated gradients give rotated updates, unlike Adam's."""
    grads = gradients(1, 1)
    first, *later = updates(race.soap, grads, every=2)
    assert first == 0
    for ours, theirs in zip(later, adam_of_torch(grads[1:], (0.95, 0.95))):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-5)
    grads = [grad.double() for grad in gradients(3, 3)]
    q = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).double()).Q
    plain = updates(race.soap, grads, every=3)
    rotated = updates(race.soap, [q @ grad for grad in grads], every=3)
    for ours, theirs in zip(rotated, plain):
        torch.testing.assert_close(ours, q @ theirs)


def test_matrices_and_the_rest():
    """The rest moves as in Muon's optimizer; the matrices by the rule, each part on its own, with weight decay."""
    def model():
        torch.manual_seed(0)
        return GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=16, bias=False))

    def rule(state, grad, step, progress, momentum):
        state['shapes'] = [*state.get('shapes', []), tuple(grad.shape)]
        return torch.ones_like(grad) * progress
    settings = ('muon', 0.1, 0.01, (0.9, 0.95), 0.02)
    ours, other = model(), model()
    opt, plain = race.WithRule(configure_optimizer(ours, *settings).param_groups, rule, 4), configure_optimizer(
        other, *settings)
    X = torch.arange(8)[None]
    for network, optimizer in ((ours, opt), (other, plain)):
        network(X, X).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    initial = model()
    weights = zip(ours.named_parameters(), other.parameters(), initial.parameters())
    for (name, p), of_muon, before in weights:
        if '.h.' in name and p.dim() == 2:
            torch.testing.assert_close(p, before * (1 - 0.02 * 0.1) - 0.02 / 4)
        else:
            torch.testing.assert_close(p, of_muon)
    assert [state['shapes'] for state in opt.states[0]] == [[(8, 8)]] * 3  # queries, keys, values
    assert ours.lm_head.weight.grad is None


@pytest.fixture
def losses(monkeypatch, tmp_path):
    """Runs whose loss is a function of the steps: 4 - log(steps). Returns the calls."""
    calls = []

    def run(name, seed, steps, factor=1.0):
        calls.append(steps)
        return {'loss': 4 - math.log(steps) + seed}
    monkeypatch.setattr(race, 'run', run)
    monkeypatch.setattr(race, 'results', str(tmp_path / 'none'))
    monkeypatch.setattr(race, 'start', 1000)
    return calls


@pytest.mark.parametrize('steps', [700, 999, 1001, 1400])
def test_the_search(losses, monkeypatch, steps):
    """The loss is linear in the logarithm of the steps here, so the interpolation is exact."""
    monkeypatch.setattr(race, 'target', 4 - math.log(steps))
    found, k = race.steps_to_target('muon', 0, 0)
    assert found == pytest.approx(steps) and len(set(losses)) <= 5
    losses.clear()
    assert race.steps_to_target('muon', 0, k)[0] == found and len(set(losses)) == 2  # begins where the last one ended


def test_out_of_reach(losses, monkeypatch):
    monkeypatch.setattr(race, 'target', -9.0)
    assert race.steps_to_target('muon', 0, 0) == (None, 0)
    monkeypatch.setattr(race, 'target', 4 - math.log(1100))
    table = race.race(['muon'], [0, 9])
    assert table[-1].startswith('| muon | 1,100 |  | 1 of 2 |  | muon_lr=0.02 |')


def start(tiny_data, tmp_path, *args):
    tiny = [word for word in TINY if not word.startswith(('--max', '--learning', '--warmup', '--lr_decay'))]
    words = [sys.executable, str(ROOT / 'benchmarks' / 'optimizer_race.py'), '--start=4', '--seeds=1', *tiny,
             '--n_kv_head=0', f'--dataset={tiny_data}', *args]
    return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, encoding='utf-8',
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})


@pytest.mark.slow
def test_every_optimizer_trains(tiny_data, tmp_path):
    """As a user starts it; the second time nothing is trained."""
    first = start(tiny_data, tmp_path, '--factors=0.5,1')
    assert first.returncode == 0, first.stderr
    rows = [line for line in first.stdout.splitlines() if line.startswith('| ')]
    assert len(rows) == 1 + len(race.CONTENDERS) and 'nan' not in first.stdout
    lines = [json.loads(line) for line in (tmp_path / 'optimizer_race.jsonl').read_text().splitlines()]
    assert len(lines) == 2 * len(race.CONTENDERS) and len({line['loss'] for line in lines}) == len(lines)
    with open(tmp_path / 'optimizer_race.jsonl', 'a', encoding='utf-8') as f:
        f.write('{"optimizer": "mu')  # cut off
    again = start(tiny_data, tmp_path, '--factors=0.5,1')
    assert again.stdout.splitlines()[-len(rows):] == first.stdout.splitlines()[-len(rows):]
    assert 'rate x' not in again.stdout.partition('| optimizer')[0]


@pytest.mark.parametrize('args, names', [
    (['--optimizers=adam'], ['optimizers=adam', 'adamw', 'normuon']),
    (['--seeds=1,x'], ['seeds=1,x', 'numbers']),
    (['--factors=1,'], ['factors=1,', 'numbers']),
    (['--start=0'], ['start=0', 'at least 1']),
    (['--target=-1'], ['target=-1', 'above 0']),
    pytest.param(['--optimizers=muon', '--n_head=3'], ['n_head=3'], marks=pytest.mark.slow),  # said by train.py
])
def test_refusals(tmp_path, tiny_data, args, names):
    result = run_script('benchmarks/optimizer_race.py', f'--dataset={tiny_data}', *args, cwd=tmp_path)
    assert result.code == 1 and result.err.count('\n') == 1, result.err
    assert all(name in result.err for name in names), result.err
    assert not (tmp_path / 'optimizer_race.jsonl').exists()
