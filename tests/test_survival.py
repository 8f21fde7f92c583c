"""
What a run survives: kills, lost processes, damaged and missing checkpoints, jumps of the loss, a second run in its
folder; and that it is the same run on any number of processes.
"""
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, digits_dataset, losses_of, make_dataset, run_script, train_in_fp32
from test_bad_input import cut, refuse

from benchmarks.kills import kill_and_compare
from core.text.dataset import fingerprint, open_dataset, windows
from core.weights.checkpoint import load_checkpoint, load_last, tensors_in
from objectives import next_token

TORCHRUN = [sys.executable, '-m', 'torch.distributed.run']


def train(data, out_dir, *args):
    result = run_script('train.py', *TINY, f'--dataset={data}', f'--out_dir={out_dir}', *args)
    assert result.code == 0, result.err
    return result


def torchrun(*args):
    """Start torchrun with these arguments. Returns its process."""
    command = [*TORCHRUN, *map(str, args)]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, encoding='utf-8')


def finish(process):
    """Wait for a process that must succeed. Returns what it printed."""
    out = process.communicate(timeout=240)[0]
    assert process.returncode == 0, out[-6000:]
    return out


def wait_for(condition, process, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)


def n_logged(out_dir):
    """Return the number of steps in log.csv."""
    return len(losses_of(out_dir)) if (out_dir / 'log.csv').exists() else 0


def assert_same_run(a, b):
    """Two runs have the same losses and weights, bit for bit."""
    for column in ('loss', 'grad_norm', 'val_loss'):
        assert losses_of(a, column) == losses_of(b, column)
    weights_a, weights_b = (load_last(str(path))[0]['model'] for path in (a, b))
    assert all(torch.equal(weights_a[key], weights_b[key]) for key in weights_a)


def assert_close_runs(a, b, loss, weights):
    """Two runs have the same number of steps, and losses, weights and moments within these tolerances."""
    for column in ('loss', 'val_loss'):
        numbers_a, numbers_b = ([number for _, number in losses_of(path, column)] for path in (a, b))
        assert numbers_a and numbers_a == pytest.approx(numbers_b, abs=loss)
    a, b = (load_last(str(path))[0] for path in (a, b))
    assert a['iter_num'] == b['iter_num']
    for key, weight in a['model'].items():
        assert (weight - b['model'][key]).abs().max() <= weights, key
    for i, state in a['optimizer']['state'].items():
        for key, moment in state.items():
            assert torch.allclose(moment, b['optimizer']['state'][i][key], atol=weights), (i, key)

# --- one process


@pytest.mark.slow
@pytest.mark.skipif(os.name == 'nt', reason='no kill -9')
def test_kills(tmp_path):
    """The short form of `python benchmarks/kills.py 100`."""
    found = re.match(r'5 kills .*, (\d+) of them while it trained', kill_and_compare(tmp_path, 5))
    assert found and int(found[1]) >= 2


@pytest.mark.slow
@pytest.mark.skipif(os.name == 'nt', reason='no kill -9')
def test_more_kills(tmp_path):
    settings = ['--optimizer=muon', '--data_order=epochs', '--ema=0.1']
    assert kill_and_compare(tmp_path, 4, settings, seed=2).startswith('4 kills')


def test_auto_starts_and_resumes(tiny_data, tmp_path):
    assert 'new model' in train(tiny_data, tmp_path / 'a', '--init_from=auto', '--max_iters=3').out
    out = train(tiny_data, tmp_path / 'a', '--init_from=auto', '--max_iters=8').out
    assert 'at step 3' in out
    assert 'not as before: max_iters 3 -> 8' in out
    train(tiny_data, tmp_path / 'b', '--max_iters=8')
    assert losses_of(tmp_path / 'a') == losses_of(tmp_path / 'b')
    assert 'nothing is left to do' in train(tiny_data, tmp_path / 'a', '--init_from=auto', '--max_iters=8').out


def test_saving_by_steps_and_by_minutes(tiny_data, tmp_path):
    """save_interval=6 saves at every third step, but not twice where an evaluation saves; save_minutes by the clock."""
    out = train(tiny_data, tmp_path / 'a', '--max_iters=10', '--eval_interval=4', '--save_interval=6').out
    saved = [line.split()[2] for line in out.splitlines() if line.startswith('saved')]
    assert saved == ['3', '4', '6', '8', '9', '10']
    out = train(tiny_data, tmp_path / 'b', '--max_iters=3', '--save_minutes=1e-9').out
    assert out.count('\nsaved step') == 3
    assert train(tiny_data, tmp_path / 'c', '--max_iters=3').out.count('\nsaved step') == 1


def test_a_clock_that_goes_backwards(tiny_data, tmp_path, monkeypatch):
    """The wall clock is set back by an hour at each reading: nothing is timed by it."""
    now = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, 'time', lambda: float(next(now)))
    out = train(tiny_data, tmp_path / 'a', '--max_iters=6', '--eval_interval=2', '--save_interval=2').out
    assert all(ms > 0 for _, ms in losses_of(tmp_path / 'a', 'ms'))
    assert 'left -' not in out
    train(tiny_data, tmp_path / 'a', '--max_iters=8', '--init_from=resume')
    train(tiny_data, tmp_path / 'b', '--max_iters=8')
    assert losses_of(tmp_path / 'a') == losses_of(tmp_path / 'b')


def test_earlier_checkpoints(tiny_data, tmp_path):
    """keep_last=2 keeps the two checkpoints before the last; another run in the folder deletes all of them."""
    train(tiny_data, tmp_path, '--max_iters=10', '--save_interval=4', '--keep_last=2', '--dropout=0.2')
    steps = {path.name: load_checkpoint(str(path))['iter_num'] for path in tmp_path.glob('ckpt*')}
    assert steps == {'ckpt.pt': 10, 'ckpt_00000008.pt': 8, 'ckpt_00000006.pt': 6}
    train(tiny_data, tmp_path, '--max_iters=2')
    assert sorted(path.name for path in tmp_path.glob('*.pt')) == ['best.pt', 'ckpt.pt', 'weights.pt']
    assert load_checkpoint(str(tmp_path / 'best.pt'))['iter_num'] == 2


def cut_in_half(path):
    cut(path, path.stat().st_size // 2)


def flip_a_bit(path, part):
    """Flip a bit of a tensor in the `part` of a checkpoint, in which nothing else notices it."""
    checkpoint = load_checkpoint(str(path))
    tensor = max(tensors_in(checkpoint[part]), key=lambda tensor: tensor.numel())
    content = bytearray(path.read_bytes())
    content[content.index(tensor.numpy().tobytes()) + 401] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize('damage', [
    cut_in_half, os.remove, lambda path: flip_a_bit(path, 'model'), lambda path: flip_a_bit(path, 'optimizer'),
])
def test_a_damaged_checkpoint(damage, tiny_data, tmp_path):
    """The run resumes from the checkpoint before it, with a warning, and ends as it would have."""
    args = '--save_interval=4', '--dropout=0.2', '--eval_interval=3'
    out_dir = tmp_path / 'damaged'
    train(tiny_data, out_dir, *args, '--max_iters=6')
    damage(out_dir / 'ckpt.pt')
    result = train(tiny_data, out_dir, *args, '--max_iters=9', '--init_from=auto')
    assert f'taking the one before, {out_dir / "ckpt_00000004.pt"}' in result.err
    assert result.err.count('\n') == 1
    assert [path.name for path in out_dir.glob('ckpt_*')] == ['ckpt_00000008.pt']
    train(tiny_data, tmp_path / 'undisturbed', *args, '--max_iters=9')
    assert_same_run(tmp_path / 'undisturbed', out_dir)


def test_weights_alone(tiny_data, tmp_path):
    """weights.pt has the weights of ckpt.pt in a third of the size; it samples alike, and a run can start from it."""
    run = tmp_path / 'run'
    train(tiny_data, run, '--n_embd=64')
    checkpoint = load_checkpoint(str(run / 'ckpt.pt'))
    weights = load_checkpoint(str(run / 'weights.pt'))
    assert 'optimizer' not in weights
    assert all(torch.equal(weights['model'][key], weight) for key, weight in checkpoint['model'].items())
    assert (run / 'weights.pt').stat().st_size < 0.4 * (run / 'ckpt.pt').stat().st_size

    def sample(name):
        out = run_script('sample.py', f'--ckpt={run / name}', '--device=cpu', '--start=one', '--max_new_tokens=20').out
        return out.partition('\none')[2]
    assert sample('weights.pt') == sample('ckpt.pt')
    assert len(sample('ckpt.pt')) > 10

    result = run_script('train.py', '--device=cpu', '--compile=False', f'--dataset={tiny_data}',
                        f'--init_from={run / "weights.pt"}', f'--out_dir={tmp_path / "out"}', '--max_iters=1',
                        '--batch_size=2', '--gradient_accumulation_steps=1', '--eval_iters=1')
    assert result.code == 0, result.err


@pytest.mark.slow
@pytest.mark.skipif(os.name == 'nt', reason='no kill -9')
def test_two_runs_in_one_folder(tiny_data, tmp_path):
    """The second run exits and changes nothing; a kill of the first frees the folder."""
    command = [sys.executable, 'train.py', *TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path}',
               '--max_iters=1000000', '--save_interval=2']

    def start_second(*args):
        return subprocess.run([*command, *args], cwd=ROOT, capture_output=True, text=True, encoding='utf-8')

    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_for((tmp_path / 'ckpt.pt').exists, first)
    for init_from in ('scratch', 'resume', 'auto'):
        second = start_second(f'--init_from={init_from}')
        assert second.returncode == 1
        assert second.stderr == (f'out_dir={tmp_path}: another run is writing there; '
                                 'wait for its end or stop it, or choose another --out_dir\n')
    evaluation = start_second('--init_from=resume', '--eval_only=True')  # writes nothing, so it is allowed
    assert evaluation.returncode == 0, evaluation.stderr
    first.kill()
    first.wait()
    step = load_last(str(tmp_path))[0]['iter_num']
    assert f'at step {step}' in train(tiny_data, tmp_path, f'--max_iters={step + 2}', '--init_from=resume').out

# --- guards


def reverse_tokens(path, n=None):
    """Reverse the first n tokens of a file, or all."""
    ids = np.fromfile(path, '<u2')
    ids[:n] = ids[:n][::-1].copy()
    ids.tofile(path)


def test_a_dataset_that_has_changed(tiny_data, tmp_path):
    """Another text of the same characters and length is refused; the same text in another folder is not."""
    copy, run = tmp_path / 'copy', tmp_path / 'run'
    digits_dataset(copy)
    train(tiny_data, run, '--max_iters=2')
    train(copy, run, '--max_iters=3', '--init_from=resume')
    reverse_tokens(copy / 'train.bin', 2000)
    args = *TINY, f'--dataset={copy}', f'--out_dir={run}', '--init_from=resume'
    refuse('train.py', *args, '--max_iters=4', names=[copy, 'not those', run / 'ckpt.pt'], folder=tmp_path)
    assert run_script('train.py', *args, '--eval_only=True').code == 0


def test_the_fingerprint_covers_every_shard(tiny_data, tmp_path):
    folder = tmp_path / 'd'
    make_dataset(folder, tiny_data / 'input.txt', shard_tokens=3000)
    before = fingerprint(open_dataset(str(folder)))
    assert before == fingerprint(open_dataset(str(folder)))
    for shard in sorted(folder.glob('*.bin')):
        reverse_tokens(shard)
        assert fingerprint(open_dataset(str(folder))) != before, shard
        reverse_tokens(shard)
    assert fingerprint(open_dataset(str(folder))) == before


@pytest.fixture
def loss_factors(monkeypatch):
    """Returns a dict {step: factor}: the losses of these steps are multiplied by the factor."""
    factors = {}
    steps = iter(range(10**6))
    true_loss = next_token.loss
    monkeypatch.setattr(
        next_token, 'loss', lambda model, batch: true_loss(model, batch) * factors.get(next(steps), 1.0))
    return factors


def test_steps_that_are_not_finite(loss_factors, tiny_data, tmp_path):
    """Two such steps may be left out, the third ends the run; a resumed run goes on counting."""
    loss_factors |= {2: float('nan'), 4: float('inf'), 6: float('nan')}
    args = *TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path}', '--skip_nonfinite=2'
    result = run_script('train.py', *args, '--max_iters=6')
    assert result.code == 0
    assert result.out.count('is left out') == 2
    assert '(2 of skip_nonfinite=2)' in result.out
    assert ', 2 left out' in result.out
    assert [step for step, loss in losses_of(tmp_path) if not np.isfinite(loss)] == [2, 4]
    checkpoint = load_checkpoint(str(tmp_path / 'ckpt.pt'))
    assert checkpoint['optimizer']['state'][0]['step'] == 4
    assert checkpoint['skipped'] == 2
    assert all(weight.isfinite().all() for weight in checkpoint['model'].values())
    result = run_script('train.py', *args, '--max_iters=8', '--init_from=resume')
    assert result.code == 1
    assert result.err.startswith('step 6: the loss is nan')
    assert '--skip_nonfinite' in result.err
    assert load_checkpoint(str(tmp_path / 'ckpt.pt'))['iter_num'] == 6


def test_a_jump_of_the_loss(loss_factors, tiny_data, tmp_path):
    loss_factors |= {70: float('nan'), 80: 4.0, 81: 4.0, 100: 4.0}
    out = train(tiny_data, tmp_path, '--max_iters=120', '--skip_nonfinite=1').out
    assert [line.split()[2] for line in out.splitlines() if 'the loss jumped' in line] == ['80:', '100:']

# --- data


def documents_dataset(folder, lengths, **settings):
    """Make a dataset of documents with these numbers of letters: the alphabet, from another letter on in each."""
    folder.mkdir()
    alphabet = 'abcdefghijklmnopqrstuvwxyz' * 30
    texts = [alphabet[i % 26:i % 26 + length] for i, length in enumerate(lengths)]
    lines = [json.dumps({'text': text}) + '\n' for text in texts]
    (folder / 'documents.jsonl').write_text(''.join(lines), encoding='utf-8')
    make_dataset(folder, str(folder / 'documents.jsonl'), val_fraction=0.1, min_chars=0, **settings)
    return open_dataset(str(folder))


def test_rows_of_documents(tmp_path):
    """
    With several shards: every token is a target, except the first of a document. No document that fits into a row is
    cut. Each row starts at a document, or continues a long one.
    """
    T = 16
    data = documents_dataset(tmp_path / 'd', np.random.default_rng(0).integers(1, 60, 300), shard_tokens=1000)
    assert len(data.files['train']) > 3
    ids = np.concatenate([np.fromfile(path, '<u2') for path, _ in data.files['train']])
    starts = np.concatenate([[0], np.flatnonzero(ids[:-1] == data.tokenizer.eot) + 1])
    ends = np.append(starts[1:], len(ids))
    rows = next_token.document_rows(data, T)
    is_target = np.zeros(len(ids) + T + 1, dtype=bool)
    for row in rows:
        is_target[row + 1:row + T + 1] = True
        document = starts.searchsorted(row, side='right') - 1
        start, end = starts[document], ends[document]
        assert (row - start) % T == 0
        assert row == start or end - start > T + 1
    assert set(np.flatnonzero(~is_target[:len(ids)])) <= set(starts)
    for start, end in zip(starts, ends):
        if end - start <= T + 1:
            assert any(row <= start and end <= row + T + 1 for row in rows)
    steps = range(len(rows) // 10 + 1)
    drawn = np.concatenate([next_token.draw(data, 10, T, 7, step, 'documents') for step in steps])
    assert sorted(drawn[:len(rows)]) == sorted(rows)
    X, Y = windows(data, 'train', rows[-3:], T)
    assert X.shape == (3, T)
    assert (Y[-1] != -1).any()


def test_documents_train_and_resume(tmp_path):
    documents_dataset(tmp_path / 'd', [20] * 100)  # an epoch is about 22 steps
    args = '--data_order=documents', '--dropout=0.1'
    train(tmp_path / 'd', tmp_path / 'undisturbed', *args, '--max_iters=30')
    train(tmp_path / 'd', tmp_path / 'resumed', *args, '--max_iters=13')
    train(tmp_path / 'd', tmp_path / 'resumed', *args, '--max_iters=30', '--init_from=resume')
    assert_same_run(tmp_path / 'undisturbed', tmp_path / 'resumed')


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='not Linux')
def test_reading_takes_no_memory(tmp_path):
    """Reading all over 256 MB of shards leaves nothing in memory. docs/RECORDS.md has the long form."""
    def resident():
        with open('/proc/self/status', encoding='utf-8') as f:
            line = next(line for line in f if line.startswith('VmRSS'))
        return int(line.split()[1]) / 1024  # MB

    shards = [tmp_path / f'train_{i:05d}.bin' for i in range(4)]
    for shard in shards:
        np.ones(2**25, '<u2').tofile(shard)
    files = [(str(path), i * 2**25) for i, path in enumerate(shards)]
    data = SimpleNamespace(files={'train': files}, ends={'train': [2**27]}, dtype=np.dtype('<u2'), vocab_size=2,
                           folder='d', kind='')
    rng = np.random.default_rng(0)
    windows(data, 'train', rng.integers(0, 2**27 - 2000, 500), 1024)
    before = resident()
    for _ in range(60):
        windows(data, 'train', rng.integers(0, 2**27 - 2000, 500), 1024)
    assert resident() - before < 64

# --- several processes


@pytest.mark.parametrize('n, checkpointing', [(2, True), pytest.param(4, False, marks=pytest.mark.slow)])
def test_one_process_and_several(n, checkpointing, tiny_data, tmp_path):
    """The same 50 losses to 1e-6 in float32, also with activations that are computed again in the backward pass."""
    args = ['--max_iters=50', '--eval_interval=25', '--gradient_accumulation_steps=2', '--eval_iters=-1']
    train(tiny_data, tmp_path / 'one', *args)
    out = finish(torchrun('--standalone', f'--nproc_per_node={n}', 'train.py', *TINY, f'--dataset={tiny_data}',
                          f'--out_dir={tmp_path / "several"}', *args, f'--gradient_checkpointing={checkpointing}'))
    assert 'deprecated' not in out
    assert_close_runs(tmp_path / 'one', tmp_path / 'several', loss=1.01e-6, weights=1e-5)
    assert len(losses_of(tmp_path / 'several')) == 50


MUON = ['--optimizer=muon', '--n_layer=3', '--gradient_checkpointing=True', '--tied=False', '--rope_theta=10000',
        '--qk_norm=True']


@pytest.mark.parametrize('style, stages', [
    pytest.param([], [(1, 4), (3, 8), (1, 12)], id='adamw'),
    pytest.param(MUON, [(3, 8), (2, 10), (1, 12)], id='muon-checkpointing', marks=pytest.mark.slow),
    pytest.param(['--optimizer=normuon', *MUON[1:]], [(3, 8), (1, 12)], id='normuon', marks=pytest.mark.slow),
])
def test_sharded(style, stages, tiny_data, tmp_path, monkeypatch):
    """
    FSDP on three processes, some of whose shards are empty or uneven, equals one process. Its checkpoints have full
    tensors, so one process can resume them, and FSDP those of one process. stages: (processes, max_iters).
    """
    monkeypatch.setattr('core.training.optimizer.fast_bf16_cpu', lambda: False)  # bf16 rounds more than the tolerance
    script = train_in_fp32(tmp_path)  # the same, for other processes
    args = ['--eval_iters=-1', '--eval_interval=4', '--batch_size=6', '--n_embd=40', '--n_head=2', *style]
    one, several = tmp_path / 'one', tmp_path / 'several'
    train(tiny_data, one, *args, '--max_iters=12')
    for processes, max_iters in stages:
        stage = [*args, f'--max_iters={max_iters}', '--init_from=auto']
        if processes == 1:
            out = train(tiny_data, several, *stage).out
            gc.collect()  # the run was in this process: give its lock back
        else:
            finish(torchrun('--standalone', f'--nproc_per_node={processes}', script, *TINY, f'--dataset={tiny_data}',
                            f'--out_dir={several}', *stage, '--parallel=fsdp'))
    assert f'processes {stages[-2][0]} -> 1, which share the same 6 rows a step' in out
    assert 'parallel fsdp -> ddp' in out
    # dividing by the size of a row makes rounding errors larger
    tolerance = 50 if '--optimizer=normuon' in style else 1
    assert_close_runs(one, several, loss=2e-6 * tolerance, weights=2e-5 * tolerance)


@pytest.mark.slow
def test_sharded_and_compiled(tiny_data, tmp_path):
    out = finish(torchrun('--standalone', '--nproc_per_node=2', 'train.py', *TINY, f'--dataset={tiny_data}',
                          f'--out_dir={tmp_path / "a"}', '--parallel=fsdp', '--max_iters=6', '--compile=True'))
    if 'does not work here' in out:
        pytest.skip('no compiler here')
    train(tiny_data, tmp_path / 'b', '--max_iters=6')
    assert_close_runs(tmp_path / 'a', tmp_path / 'b', loss=1e-5, weights=1e-4)


def test_float16_is_not_sharded(tiny_data, tmp_path, monkeypatch):
    for name, value in {'RANK': '0', 'LOCAL_RANK': '0', 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1'}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)  # because CPUs do not train in float16
    refuse('train.py', *TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path / "out"}', '--parallel=fsdp',
           '--device=mps', '--dtype=float16', names=['parallel=fsdp', 'float16', '--dtype=bfloat16'], folder=tmp_path)


def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/proc/self/environ'), reason='not Linux')
def test_a_lost_process_on_one_of_two_nodes(tiny_data, tmp_path):
    """
    Two torchrun agents meet by c10d, each with one process. One process is killed, and torchrun restarts both. The run
    was started from scratch in a folder with an older run's checkpoint, and yet resumes its own: it ends as a run that
    lost no process.
    """
    lost = tmp_path / 'lost'
    args = [*TINY, f'--dataset={tiny_data}', '--max_iters=150', '--eval_interval=50', '--save_interval=10',
            '--gradient_accumulation_steps=2', '--dropout=0.1']
    finish(torchrun('--standalone', 'train.py', *args, f'--out_dir={lost}', '--max_iters=1', '--n_embd=64'))
    finish(torchrun('--standalone', '--nproc_per_node=2', 'train.py', *args, f'--out_dir={tmp_path / "undisturbed"}'))
    agent_args = ['--nnodes=2', '--nproc_per_node=1', '--rdzv_backend=c10d',
                  f'--rdzv_endpoint=localhost:{free_port()}', '--rdzv_id=a', '--max_restarts=9']
    agents = [torchrun(*agent_args, 'train.py', *args, f'--out_dir={lost}') for _ in range(2)]

    def has_saved():  # the new run, not the older one
        return n_logged(lost) > 20 and load_last(str(lost), 'meta')[0]['model_args']['n_embd'] == 32
    wait_for(has_saved, agents[0])
    find_worker = ['pgrep', '-P', str(agents[1].pid), '-f', 'train.py']
    worker = int(subprocess.run(find_worker, capture_output=True, text=True).stdout.split()[0])
    os.kill(worker, signal.SIGKILL)
    outs = [finish(agent) for agent in agents]
    assert any('resuming ' in out for out in outs)
    assert_same_run(tmp_path / 'undisturbed', lost)


def test_a_terminated_group_saves(tiny_data, tmp_path):
    """As on a machine that is reclaimed: torchrun passes SIGTERM on, and its processes save their current step."""
    process = torchrun('--standalone', '--nproc_per_node=2', 'train.py', *TINY, f'--dataset={tiny_data}',
                       f'--out_dir={tmp_path}', '--max_iters=1000000')
    wait_for(lambda: n_logged(tmp_path) > 5, process)
    process.terminate()
    out = process.communicate(timeout=90)[0]
    step = load_checkpoint(str(tmp_path / 'ckpt.pt'))['iter_num']
    assert losses_of(tmp_path)[-1][0] == step - 1
    assert f'stopping at step {step}' in out
    assert process.returncode != 0


def torchrun_bash(command):
    """Run a bash command in two processes. Returns what they print."""
    process = torchrun('--standalone', '--nproc_per_node=2', '--no_python', 'bash', '-c', command)
    return process.communicate(timeout=120)[0]


@pytest.mark.slow
def test_ranks_with_another_dataset(tmp_path):
    """Each machine has a folder of the same name, with another text in it."""
    for rank in range(2):
        digits_dataset(tmp_path / str(rank) / 'data' / 'd')
    reverse_tokens(tmp_path / '1' / 'data' / 'd' / 'train.bin')
    args = [*TINY, '--dataset=d', f'--out_dir={tmp_path / "out"}']
    out = torchrun_bash(f'cd {tmp_path}/$RANK && exec {sys.executable} {ROOT / "train.py"} {" ".join(args)}')
    assert 'dataset=d: process 1 sees another than process 0' in out
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_ranks_with_other_settings(tiny_data, tmp_path):
    args = [*TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path / "out"}', '--seed=$RANK']
    out = torchrun_bash(f'exec {sys.executable} {ROOT / "train.py"} {" ".join(args)}')
    assert 'the settings: process 1 sees another than process 0' in out
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_an_error_of_all_ranks_is_printed_once(tiny_data):
    args = *TINY, f'--dataset={tiny_data}'
    out = torchrun_bash(f'exec {sys.executable} {ROOT / "train.py"} {" ".join(args)} --n_head=3')
    assert out.count('n_embd=32 is not divisible by n_head=3') == 1
    out = torchrun_bash(f'exec {sys.executable} {ROOT / "train.py"} {" ".join(args)} --n_head=$((2 + RANK))')
    assert out.count('n_embd=32 is not divisible by n_head=3') == 1  # of rank 1 alone


def test_the_message_about_a_lost_process(capsys):
    """What gloo raises when the other side is gone becomes one line that says what to do."""
    from core.device import explain
    explain(RuntimeError, RuntimeError('[gloo/transport/tcp/pair.cc:547]\n Connection closed by peer'), None)
    err = capsys.readouterr().err
    assert err.startswith('lost another process of this run')
    assert '--max-restarts' in err
