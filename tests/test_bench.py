"""bench.py: every benchmark prints its figures, also beside nanoGPT. No test looks at a speed."""
import json
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY, run_script

from benchmarks.common import SKIPPED_STEPS, time_train

NANOGPT = Path(os.environ.get('NANOGPT') or ROOT.parent / 'nanoGPT')
NUMBER = r'[\d,]+(?:\.\d+)?'


def figures(out, name):
    """Return the row of a train.py: parameters, ms per step, tokens per second, MFU in percent, peak memory in MB."""
    row = rf'^{name} +({NUMBER}) +({NUMBER}) +({NUMBER}) +({NUMBER})% +({NUMBER}) MB$'
    found = re.search(row, out, re.MULTILINE)
    assert found, out
    return [float(number.replace(',', '')) for number in found.groups()]


@pytest.mark.slow
def test_config_and_trace(tiny_data, tmp_path):
    """Steps with a config file that has too few of them, a trace that can be loaded, and the ten operations."""
    settings = 'max_iters = 5\ngradient_accumulation_steps = 3\nwandb_log = True\n'
    (tmp_path / 'own.py').write_text(settings, encoding='utf-8')
    tiny = [argument for argument in TINY if 'max_iters' not in argument and 'accumulation' not in argument]
    options = ['--steps', '4', '--profile', '--trace=t.json']
    result = run_script('bench.py', 'own.py', *tiny, f'--dataset={tiny_data}', *options, cwd=tmp_path)
    assert (result.code, result.err) == (0, '')
    # one micro-batch; the first two of five steps are not timed
    assert 'cpu float32, 128 tokens per step, 3 steps timed' in result.out
    parameters, ms, tokens_per_s, mfu, memory = figures(result.out, 'StoneGPT')
    assert 25_000 < parameters < 30_000
    assert ms > 0
    assert tokens_per_s == pytest.approx(128 / ms * 1000, rel=0.1)
    assert 0 <= mfu < 100
    assert 50 < memory < 5000
    assert re.search(r"MFU: % of [\d.e+]+ TFLOP/s, this CPU's float32 matrix product", result.out)

    operations = result.out.splitlines()[-10:]
    shares = [float(re.match(r' +([\d.]+)% +[\d.]+ +\d+  \S+', line)[1]) for line in operations]
    assert shares == sorted(shares, reverse=True)
    assert 30 < sum(shares) < 101  # in a network this small much of the time goes to many other operations
    assert any('aten::mm' in line for line in operations)
    with open(tmp_path / 't.json', encoding='utf-8') as f:
        assert len(json.load(f)['traceEvents']) > 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ['own.py', 't.json']


LOOP = """
import sys, time
from types import SimpleNamespace
now, tokens_per_iter = [0.0], 1
time.perf_counter = lambda: now[0]
kind, interval = sys.argv[1], int(sys.argv[2].partition('=')[2])
parameter = SimpleNamespace(device=SimpleNamespace(type=kind), numel=lambda: 1)
model = SimpleNamespace(parameters=lambda: iter([parameter]))
for i in range(100):
    now[0] += 0.5 if i < 4 else 0.004 if i == 7 else 0.001  # the first steps are slow, and one later
    if i % interval == 0:
        print(f'iter {i}: loss 1.0, time 7.00ms')
"""


@pytest.mark.parametrize('kind, interval, steps, ms, waits', [
    ('cpu', 1, 20, 1.0, 0),  # the median of single steps
    ('cuda', 10, 20, 1.0, 2),  # steps 11 to 30
    ('cuda', 5, 20, 1.15, 2),  # steps 6 to 25: the mean
])
def test_clock(kind, interval, steps, ms, waits, tmp_path, monkeypatch):
    """The clock runs between log lines, whatever they say. On a GPU it waits at both ends only, not at every line."""
    waited = []
    monkeypatch.setattr(time, 'perf_counter', time.perf_counter)  # LOOP replaces it
    monkeypatch.setattr('torch.accelerator.synchronize', lambda: waited.append(1))
    (tmp_path / 'train.py').write_text(LOOP, encoding='utf-8')
    job = {'folder': str(tmp_path), 'result': str(tmp_path / 'result.json'), 'skip': SKIPPED_STEPS, 'steps': steps,
           'seconds': 60, 'trace': '', 'bare': False}
    run_script('benchmarks/run_and_time.py', json.dumps(job), kind, f'--log_interval={interval}')
    result = json.loads((tmp_path / 'result.json').read_text(encoding='utf-8'))
    assert (result['steps'], len(waited)) == (steps, waits)
    assert result['ms'] == pytest.approx(ms)


@pytest.mark.parametrize('gpu, arguments, interval', [
    (True, [], '--log_interval=10'), (True, ['--device=cpu'], None), (False, [], None),
])
def test_log_interval(gpu, arguments, interval, monkeypatch):
    """nanoGPT waits for the GPU to print a loss, so it prints few."""
    started = []
    monkeypatch.setattr('torch.accelerator.is_available', lambda: gpu)
    failed = SimpleNamespace(returncode=1, stdout='', stderr='stopped')
    monkeypatch.setattr('subprocess.run', lambda command, **kwargs: started.append(command) or failed)
    with pytest.raises(SystemExit, match='stopped'):
        time_train(str(ROOT), arguments, 'out', 20, 60)
    options = [word for word in started[0] if word.startswith('--log_interval')]
    assert options == ([interval] if interval else [])


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='not Linux')
def test_memory(tmp_path):
    """A few seconds of it: shards are read, and what has been read does not stay in memory."""
    result = run_script('bench.py', '--what=memory', '--gigabytes=2', '--seconds=3', cwd=tmp_path)
    assert result.code == 0, result.err
    assert result.out.count(' batches of 32 rows of 1,024: ') > 1  # at most 20: one a batch on a slow disk
    assert list(tmp_path.iterdir()) == []
    low, high = map(float, re.search(r'between ([\d.]+) and ([\d.]+) MB', result.out).groups())
    assert high - low < 200  # of 2,000


@pytest.fixture
def shakespeare_char(tiny_data, tmp_path):
    """A folder where data/shakespeare_char is a small dataset."""
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'shakespeare_char').symlink_to(tiny_data)
    return tmp_path


def test_batch(shakespeare_char):
    result = run_script('bench.py', '--what=batch', cwd=shakespeare_char)
    assert result.code == 0, result.err
    assert re.search(r'^a batch of 12 x 64: \d+\.\d{3} ms$', result.out, re.MULTILINE)


def test_attention(monkeypatch):
    monkeypatch.setattr('benchmarks.attention.SHAPES', [(2, 2, 16, 8), (1, 2, 256, 8)])
    monkeypatch.setattr('benchmarks.attention.WINDOWS', [(1, 2, 16, 8, 4)])
    result = run_script('bench.py', '--what=attention', '--runs=1')
    assert (result.code, result.err) == (0, '')
    row = r'^\d+ x \d+ x \d+ x \d+ +(?:float32|bfloat16) +0\.[02](?: +[\d.]+){4}$'
    assert len(re.findall(row, result.out, re.MULTILINE)) == 2 * 2 * 2  # shapes, dtypes, dropouts
    row = r'^1 x 2 x 16 x 8 +(?:float32|bfloat16) +4 +[\d.]+ +[\d.]+$'
    assert len(re.findall(row, result.out, re.MULTILINE)) == 2


@pytest.mark.slow
def test_trust(shakespeare_char):
    result = run_script('bench.py', '--what=trust', '--steps=3', '--runs=1', cwd=shakespeare_char)
    assert (result.code, result.err) == (0, '')
    assert re.findall(r'ms a step (with|without)$', result.out, re.MULTILINE) == ['with', 'without']
    assert re.search(r'ms per step, looked after / not: \d+\.\d{3}; of the medians: ', result.out)


@pytest.mark.slow
def test_random_tokens(tmp_path):
    """A dataset that does not exist is replaced by random tokens."""
    settings = ['--max_iters=9', '--dataset=not_there', '--gradient_accumulation_steps', '2']
    result = run_script('bench.py', *TINY, *settings, '--steps=2', cwd=tmp_path)
    assert (result.code, result.err) == (0, '')
    assert result.out.count("random tokens of GPT-2's vocabulary stand in") == 1
    assert '256 tokens per step, 2 steps timed' in result.out
    assert figures(result.out, 'StoneGPT')[0] > 50304 * 32
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(not (NANOGPT / 'train.py').exists(), reason='no nanoGPT here')
def test_beside_nanogpt(tiny_data, tmp_path):
    """nanoGPT gets the same tokens and the settings that it has; both rows and the ratios are printed."""
    settings = ['--max_iters=9', '--seed=3', f'--dataset={tiny_data}']
    options = [f'--nanogpt={NANOGPT}', '--runs=1', '--steps=2']
    result = run_script('bench.py', *TINY, *settings, *options, cwd=tmp_path)
    assert (result.code, result.err) == (0, '')
    assert 'nanoGPT goes without --seed=3' in result.out
    assert 'random' not in result.out
    ours = figures(result.out, 'StoneGPT')
    theirs = figures(result.out, 'nanoGPT')
    assert abs(ours[0] - theirs[0]) <= 32  # our vocabulary has <|endoftext|>, one more row of the embedding
    last_line = r'StoneGPT / nanoGPT, ms per step: \d+\.\d{3}; of the medians: \d+\.\d{3}$'
    assert re.search(last_line, result.out.strip())


@pytest.mark.parametrize('args, parts', [
    (['--stepps=3', '--device=cpu'], ['train.py: --stepps', 'no such setting']),
    (['--steps=0'], ['steps=0', 'at least 1']),
    (['--steps=x'], ["steps='x'", 'an int']),
    (['--what=batch', '--device=cpu'], ['what=batch', '--device=cpu', '--help']),
    (['--what=laptop'], ['nanogpt=', 'data/shakespeare_char']),
    (['--what=prepare'], ['text=', 'a text file']),
    (['--what=prepare', '--text=short.py', '--tokenizer=char'], ['tokenizer=char', 'qwen2 or gpt2']),
    (['--what=nothing'], ['what=nothing', 'steps, laptop']),
    (['--nanogpt=nowhere'], ['nowhere', 'train.py']),
    (['--profile', '--trace=no/where.json'], ['no/where.json', 'no such folder']),
    (['short.py'], ['max_iters']),
    (['--sample', '--new_tokens=0'], ['new_tokens=0', 'at least 1']),
    (['--sample', '--samples=one'], ['samples=one', 'numbers']),
    (['--sample', '--dtypes=int4'], ['dtypes=int4', 'int8']),
    (['--sample', '--network=nowhere'], ['nowhere', 'gpt2, char or the folder of a run']),
])
def test_refusals(tiny_data, tmp_path, args, parts):
    """One line. Wrong arguments of train.py are refused by train.py."""
    settings = [
        'max_iters = 1', 'device = "cpu"', f'dataset = {str(tiny_data)!r}',
        'block_size = 8', 'n_embd = 8', 'n_head = n_layer = 1', 'compile = False',
    ]
    (tmp_path / 'short.py').write_text('\n'.join(settings), encoding='utf-8')
    result = run_script('bench.py', *args, cwd=tmp_path)
    assert (result.code, result.err.count('\n')) == (1, 1), result.err
    assert all(part in result.err for part in parts), result.err


def test_help(tmp_path):
    result = run_script('bench.py', 'config/train_gpt2.py', '--help', cwd=tmp_path)
    assert (result.code, result.err, list(tmp_path.iterdir())) == (0, '', [])
    assert '--nanogpt=' in result.out


def test_sample():
    """A row for each dtype and number of texts, and one of transformers. Tokens per second agree with milliseconds."""
    sizes = ['--network=char', '--new_tokens=5', '--runs=1', '--dtypes=float32,int8', '--samples=1,3']
    result = run_script('bench.py', '--sample', *sizes, '--transformers')
    assert result.code == 0, result.err
    assert re.search(rf'cpu reads {NUMBER} GB a second', result.out)
    assert re.search(rf'int8, laid out for 3: a prompt of 64 tokens at {NUMBER} tokens', result.out)
    rows = dict(re.findall(rf'^(\w+(?:, \d+)?) +({NUMBER} +{NUMBER}.*)$', result.out, re.MULTILINE))
    assert list(rows) == ['transformers', 'float32, 1', 'float32, 3', 'int8, 1', 'int8, 3']
    for name, row in rows.items():
        texts = 3 if name.endswith('3') else 1
        per_second, ms = (float(number.replace(',', '')) for number in row.split()[:2])
        assert per_second == pytest.approx(texts * 1000 / ms, rel=0.05)
        if name != 'transformers':
            ours = rf'{NUMBER} +{NUMBER} +({NUMBER}) ms +({NUMBER}) +({NUMBER})'
            first_ms, bandwidth_share, ratio = map(float, re.match(ours, row).groups())
            assert first_ms > 0
            assert 0 <= bandwidth_share < 2
            assert ratio > 0
