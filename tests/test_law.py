"""core/training/law.py against the measurements in docs/sizes.csv, its entropy against known ones, and its extremes."""
import math
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import sizes
from core.files import ROOT
from core.training import law

ROWS = sizes.read(f'{ROOT}/docs/sizes.csv')


def expected(n_params=2e6, tokens=1e6, unique_tokens=1e6, vocab_size=66, dropout=0.0, weight_decay=0.1, entropy=2.0,
             **others):
    return law.expected_loss(n_params, tokens, unique_tokens, vocab_size, dropout, weight_decay, entropy, **others)


def ratios_to_law(rows):
    return np.array([row['loss'] for row in rows]) / sizes.predict(rows, law.CONSTANTS)


def test_the_law_agrees_with_the_measurements():
    rows = sizes.fitted(ROWS)
    assert len(rows) >= 30
    ratios = ratios_to_law(rows)
    assert abs(ratios - 1).max() < 0.05  # the level of each text, from its entropy alone
    texts = np.array([row['dataset'] for row in rows])
    errors = np.concatenate([np.log(ratios[texts == text] / ratios[texts == text].mean()) for text in set(texts)])
    assert abs(errors).mean() < 0.01  # the differences, on which the choice of a network depends


def test_the_constants_are_those_of_the_fit():
    constants, _ = sizes.fit(sizes.fitted(ROWS))
    assert set(constants) == set(law.CONSTANTS)
    for name, value in constants.items():
        assert law.CONSTANTS[name] == pytest.approx(value, rel=0.02), name


def test_parameters_of_the_table():
    model = pytest.importorskip('model')
    for row in ROWS[:4]:
        n_head, n_kv_head = sizes.HEADS[row['n_embd']]
        network = model.GPT(model.GPTConfig(
            vocab_size=row['vocab_size'], n_layer=row['n_layer'], n_embd=row['n_embd'], n_head=n_head,
            n_kv_head=n_kv_head, bias=False, rope_theta=10000.0, norm='rmsnorm', activation='swiglu', qk_norm=True,
            tied=False, block_size=128))
        assert network.num_params(lookups=False) == row['n_params']


def test_tokens_and_passes():
    tokens = np.array([1e5, 3e5, 1e6, 1e7, 1e8])
    new = expected(tokens=tokens, unique_tokens=1e9)
    assert (np.diff(new) < 0).all()  # more text is better
    passes = np.array([1, 2, 3, 4, 6, 8])
    decay = np.array([law.regularisation(1e6, 1e6, p)[1] for p in passes])
    repeated = expected(1e6, passes * 1e6, weight_decay=decay)
    gains = -np.diff(repeated) / np.diff(passes)
    assert (gains > 0).all() and (np.diff(gains) < 0).all()  # every pass helps, each less than the one before
    assert (expected(1e6, passes[1:] * 1e6, 1e9) < repeated[1:]).all()  # and less than a new text


def test_regularisation():
    assert law.regularisation(2e6, 1e6, 1) == (0.0, pytest.approx(0.1, abs=0.1))
    decays = [law.regularisation(2e6, 1e6, passes)[1] for passes in (1, 2, 4, 8, 1000)]
    assert decays == sorted(decays) and decays[-1] == law.LARGEST_DECAY
    # what it returns is the best, as the law sees it
    for n_params, unique, passes in ((2e5, 1.3e5, 8), (2e6, 1e6, 3)):
        dropout, decay = law.regularisation(n_params, unique, passes)
        best = expected(n_params, passes * unique, unique, dropout=dropout, weight_decay=decay)
        for other in ((0.1, decay), (0, decay / 2), (0, decay * 2)):
            assert best < expected(n_params, passes * unique, unique, dropout=other[0], weight_decay=other[1])


@pytest.mark.parametrize('unique', [2e4, 5e4, 1e6, 1e9])  # 50 KB of Chinese, 50 KB and 1 MB by character, 1 GB
@pytest.mark.parametrize('tokens', [2e3, 3e5, 1e9, 1e12])  # 30 s and 8 hours, on a CPU and on a large GPU
@pytest.mark.parametrize('n_params', [1e5, 2e6, 3e8])
def test_extremes(unique, tokens, n_params):
    dropout, decay = law.regularisation(n_params, unique, tokens / unique)
    assert 0 <= dropout < 0.5 and 0 <= decay <= 2
    for weight_decay in (decay, 0.0):
        loss = expected(n_params, tokens, unique, dropout=dropout, weight_decay=weight_decay)
        assert 0.3 < loss <= math.log(66)


def dataset(train, val, vocab_size, monkeypatch):
    splits = {'train': np.asarray(train), 'val': np.asarray(val)}
    monkeypatch.setattr(law, 'read_tokens', lambda data, split, positions: (splits[split][positions], None))
    return SimpleNamespace(splits={name: len(tokens) for name, tokens in splits.items()}, vocab_size=vocab_size)


def test_entropy_of_known_sources(monkeypatch):
    rng = np.random.default_rng(0)
    uniform = rng.integers(16, size=300_000)
    assert law.entropy(dataset(uniform, uniform[:10], 16, monkeypatch)) == pytest.approx(math.log(16), abs=0.3)
    data = dataset(uniform[:200_000], uniform[200_000:], 16, monkeypatch)
    assert law.entropy(data) == pytest.approx(math.log(16), rel=0.01)
    coins = rng.choice(3, size=300_000, p=(0.5, 0.25, 0.25))
    data = dataset(coins[:200_000], coins[200_000:], 3, monkeypatch)
    assert law.entropy(data) == pytest.approx(1.5 * math.log(2), rel=0.01)
    steps = np.cumsum(rng.choice([1, 2], size=100_000)) % 11  # one bit for each token, seen only in pairs
    data = dataset(steps[:50_000], steps[50_000:], 11, monkeypatch)
    assert law.entropy(data) == pytest.approx(math.log(2), rel=0.03)


def test_entropy_without_validation_text(monkeypatch):
    coins = np.random.default_rng(1).integers(2, size=20_000)
    for tokens in (coins, coins[:10], coins[:1], coins[:0]):
        found = law.entropy(dataset(tokens, [], 2, monkeypatch))
        assert 0 < found < 3
    assert law.entropy(dataset(coins, [], 2, monkeypatch)) == pytest.approx(math.log(2), rel=0.03)
