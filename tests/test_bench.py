"""bench.py's figures: that they are all there, for any arguments of train.py, and beside nanoGPT. None of these tests looks at a time."""
import json
import os
import re
from pathlib import Path

import pytest
from conftest import ROOT, TINY, run_script

NANOGPT = Path(os.environ.get('NANOGPT') or ROOT.parent / 'nanoGPT')
NUMBER = r'[\d,]+(?:\.\d+)?'


def row(out, name):
    """The row of the table: parameters, ms per step, tokens/s, MFU in percent, peak memory in MB."""
    found = re.search(rf'^{name} +({NUMBER}) +({NUMBER}) +({NUMBER}) +({NUMBER})% +({NUMBER}) MB$', out, re.MULTILINE)
    assert found, out
    return [float(number.replace(',', '')) for number in found.groups()]


def test_a_config_and_a_trace(tiny_data, tmp_path):
    """train.py's own steps with its own arguments, as many as it has; a trace that can be loaded and the ten operations."""
    (tmp_path / 'own.py').write_text('max_iters = 5\ngradient_accumulation_steps = 3\nwandb_log = True\n', encoding='utf-8')
    tiny = [argument for argument in TINY if 'max_iters' not in argument and 'accumulation' not in argument]
    result = run_script('bench.py', 'own.py', *tiny, f'--dataset={tiny_data}', '--steps', '4', '--profile', '--trace=t.json', cwd=tmp_path)
    assert (result.code, result.err) == (0, '')
    parameters, ms, tokens_per_s, mfu, memory = row(result.out, 'StoneGPT')
    assert 'cpu float32, 128 tokens per step, 3 steps timed' in result.out  # one micro-batch; two of five steps do not count
    assert 25_000 < parameters < 30_000 and ms > 0 and tokens_per_s == pytest.approx(128 / ms * 1000, rel=0.1) and 0 <= mfu < 100 and 50 < memory < 5000
    assert re.search(r"MFU: % of [\d.e+]+ TFLOP/s, this CPU's float32 matrix product", result.out)
    operations = result.out.splitlines()[-10:]
    shares = [float(re.match(r' +([\d.]+)% +[\d.]+ +\d+  \S+', line)[1]) for line in operations]
    assert shares == sorted(shares, reverse=True) and 50 < sum(shares) < 101 and any('aten::mm' in line for line in operations)
    with open(tmp_path / 't.json', encoding='utf-8') as f:
        assert len(json.load(f)['traceEvents']) > 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ['own.py', 't.json']


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='not Linux')
def test_memory(tmp_path):
    """The short form of two hours: shards are read, and what has been read is not held."""
    result = run_script('bench.py', '--what=memory', '--gigabytes=2', '--seconds=4', cwd=tmp_path)
    assert result.code == 0, result.err
    assert result.out.count(' batches of 32 rows of 1,024: ') >= 15 and list(tmp_path.iterdir()) == []
    low, high = map(float, re.search(r'between ([\d.]+) and ([\d.]+) MB', result.out).groups())
    assert high - low < 200  # of 2,000


@pytest.mark.slow
def test_random_tokens(tmp_path):
    """A dataset that is not there does not matter."""
    result = run_script('bench.py', *TINY, '--max_iters=9', '--dataset=not_there', '--gradient_accumulation_steps', '2', '--steps=2', cwd=tmp_path)
    assert (result.code, result.err) == (0, '')
    assert result.out.count("random tokens of GPT-2's vocabulary stand in") == 1 and '256 tokens per step, 2 steps timed' in result.out
    assert row(result.out, 'StoneGPT')[0] > 50304 * 32
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(not (NANOGPT / 'train.py').exists(), reason='no nanoGPT here')
def test_beside_nanogpt(tiny_data, tmp_path):
    """The same settings and tokens go to nanoGPT, so far as it knows them; both rows and the ratios come out."""
    result = run_script('bench.py', *TINY, '--max_iters=9', '--seed=3', f'--dataset={tiny_data}', f'--nanogpt={NANOGPT}', '--runs=1', '--steps=2', cwd=tmp_path)
    assert (result.code, result.err) == (0, '')
    assert 'nanoGPT goes without --seed=3' in result.out and 'random' not in result.out
    ours, theirs = row(result.out, 'StoneGPT'), row(result.out, 'nanoGPT')
    assert abs(ours[0] - theirs[0]) <= 32  # a row of the embedding, for the end of a text
    assert re.search(r'StoneGPT / nanoGPT, ms per step: \d+\.\d{3}; of the medians: \d+\.\d{3}$', result.out.strip())


@pytest.mark.parametrize('args, names', [
    (['--stepps=3', '--device=cpu'], ['train.py: --stepps', 'no such setting']),
    (['--steps=0'], ['steps=0', 'at least 1']),
    (['--steps=x'], ["steps='x'", 'an int']),
    (['--what=batch', '--device=cpu'], ['what=batch', '--device=cpu', '--help']),
    (['--what=prepare'], ['text=', 'a text file']),
    (['--what=prepare', '--text=short.py', '--tokenizer=char'], ['tokenizer=char', 'qwen2 or gpt2']),
    (['--what=nothing'], ['what=nothing', 'steps, laptop']),
    (['--nanogpt=nowhere'], ['nowhere', 'train.py']),
    (['--profile', '--trace=no/where.json'], ['no/where.json', 'no such folder']),
    (['short.py'], ['max_iters']),
])
def test_refusals(tiny_data, tmp_path, args, names):
    """One line; train.py's own about its own arguments."""
    shape = 'block_size = 8\nn_embd = 8\nn_head = n_layer = 1\ncompile = False\n'
    (tmp_path / 'short.py').write_text(f'max_iters = 1\ndevice = "cpu"\ndataset = {str(tiny_data)!r}\n{shape}', encoding='utf-8')
    result = run_script('bench.py', *args, cwd=tmp_path)
    assert result.code == 1 and result.err.count('\n') == 1 and all(name in result.err for name in names), result.err


def test_help(tmp_path):
    result = run_script('bench.py', 'config/train_gpt2.py', '--help', cwd=tmp_path)
    assert (result.code, result.err, list(tmp_path.iterdir())) == (0, '', []) and '--nanogpt=' in result.out


def test_sample():
    """A row for each dtype and number of texts, and one of transformers; tokens a second are what the milliseconds say."""
    result = run_script('bench.py', '--sample', '--network=char', '--new_tokens=5', '--runs=1', '--dtypes=float32,int8', '--samples=1,3', '--transformers')
    assert result.code == 0, result.err
    rows = dict(re.findall(rf'^(\w+(?:, \d+)?) +({NUMBER} +{NUMBER}.*)$', result.out, re.MULTILINE))
    assert list(rows) == ['transformers', 'float32, 1', 'float32, 3', 'int8, 1', 'int8, 3']
    for name, line in rows.items():
        per_second, ms = (float(number.replace(',', '')) for number in line.split()[:2])
        assert per_second == pytest.approx((3 if name.endswith('3') else 1) * 1000 / ms, rel=0.05)
        if name != 'transformers':
            first, share, ratio = re.match(rf'{NUMBER} +{NUMBER} +({NUMBER}) ms +({NUMBER}) +({NUMBER})', line).groups()
            assert float(first) > 0 and 0 <= float(share) < 2 and float(ratio) > 0
    assert re.search(rf'cpu reads {NUMBER} GB a second', result.out) and re.search(rf'int8, laid out for 3: a prompt of 64 tokens at {NUMBER} tokens', result.out)


@pytest.mark.parametrize('args, names', [
    (['--new_tokens=0'], ['new_tokens=0', 'at least 1']),
    (['--samples=one'], ['samples=one', 'numbers']),
    (['--dtypes=int4'], ['dtypes=int4', 'int8']),
    (['--network=nowhere'], ['nowhere', 'no such checkpoint']),
])
def test_sample_refuses(args, names):
    result = run_script('bench.py', '--sample', *args)
    assert result.code == 1 and len(result.err.strip().splitlines()) == 1 and all(name in result.err for name in names), result.err
