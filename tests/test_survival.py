"""What a run survives: kills, lost processes, damaged and missing checkpoints, full disks, jumps of the loss, a second run in its folder."""
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
from core.weights.checkpoint import load_checkpoint, load_last
from objectives import next_token

TORCHRUN = [sys.executable, '-m', 'torch.distributed.run']


def train(data, out_dir, *args):
    result = run_script('train.py', *TINY, f'--dataset={data}', f'--out_dir={out_dir}', *args)
    assert result.code == 0, result.err
    return result


def torchrun(*args, cwd=ROOT, **kwargs):
    return subprocess.Popen([*TORCHRUN, *map(str, args)], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding='utf-8',
                            env={**os.environ, 'OMP_NUM_THREADS': '1'}, **kwargs)


def finished(process):
    """What it printed, when it has ended well."""
    out = process.communicate(timeout=240)[0]
    assert process.returncode == 0, out[-6000:]
    return out


def wait_for(condition, process, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)


def steps_done(out_dir):
    return len(losses_of(out_dir)) if (out_dir / 'log.csv').exists() else 0


def same_run(a, b):
    """The same losses and weights, bit for bit."""
    for column in ('loss', 'grad_norm', 'val_loss'):
        assert losses_of(a, column) == losses_of(b, column)
    a, b = (load_last(str(path))[0]['model'] for path in (a, b))
    assert all(torch.equal(a[key], b[key]) for key in a)


def close(a, b, loss, weights):
    """As many losses, so close, and weights."""
    for column in ('loss', 'val_loss'):
        assert losses_of(a, column) and [x for _, x in losses_of(a, column)] == pytest.approx([x for _, x in losses_of(b, column)], abs=loss)
    a, b = (load_last(str(path))[0] for path in (a, b))
    assert a['iter_num'] == b['iter_num'] and all((a['model'][key] - b['model'][key]).abs().max() <= weights for key in a['model'])
    for i, state in a['optimizer']['state'].items():
        assert all(torch.allclose(state[key], b['optimizer']['state'][i][key], atol=weights) for key in state)

# --- one process


@pytest.mark.slow
@pytest.mark.skipif(os.name == 'nt', reason='no kill -9')
def test_kills(tmp_path):
    """The short form of `python benchmarks/kills.py 100`."""
    found = re.match(r'5 kills .*, (\d+) of them while it trained', kill_and_compare(tmp_path, 5))
    assert found and int(found[1]) >= 2


@pytest.mark.slow
def test_more_kills(tmp_path):
    assert kill_and_compare(tmp_path, 10, ['--optimizer=muon', '--dtype=bfloat16', '--data_order=epochs'], seed=2).startswith('10 kills')


def test_auto_begins_and_goes_on(tiny_data, tmp_path):
    assert 'new model' in train(tiny_data, tmp_path / 'a', '--init_from=auto', '--max_iters=3').out
    out = train(tiny_data, tmp_path / 'a', '--init_from=auto', '--max_iters=8').out
    assert 'at step 3' in out and 'not as before: max_iters 3 -> 8' in out
    train(tiny_data, tmp_path / 'b', '--max_iters=8')
    assert losses_of(tmp_path / 'a') == losses_of(tmp_path / 'b')
    assert 'nothing is left to do' in train(tiny_data, tmp_path / 'a', '--init_from=auto', '--max_iters=8').out


def test_saving_by_steps_and_by_minutes(tiny_data, tmp_path):
    """save_interval=6 begins a checkpoint at every third step, but for those where an evaluation saves as well; save_minutes when the time has come."""
    out = train(tiny_data, tmp_path / 'a', '--max_iters=10', '--eval_interval=4', '--save_interval=6').out
    assert [line.split()[2] for line in out.splitlines() if line.startswith('saved')] == ['3', '4', '6', '8', '9', '10']
    out = train(tiny_data, tmp_path / 'b', '--max_iters=3', '--save_minutes=1e-9').out
    assert out.count('\nsaved step') == 3
    assert train(tiny_data, tmp_path / 'c', '--max_iters=3').out.count('\nsaved step') == 1


def test_a_clock_that_goes_backwards(tiny_data, tmp_path, monkeypatch):
    """Somebody sets it, an hour back at each look: no time is counted by it."""
    now = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, 'time', lambda: float(next(now)))
    out = train(tiny_data, tmp_path / 'a', '--max_iters=6', '--eval_interval=2', '--save_interval=2').out
    assert all(ms > 0 for _, ms in losses_of(tmp_path / 'a', 'ms')) and 'left -' not in out
    train(tiny_data, tmp_path / 'a', '--max_iters=8', '--init_from=resume')
    train(tiny_data, tmp_path / 'b', '--max_iters=8')
    assert losses_of(tmp_path / 'a') == losses_of(tmp_path / 'b')


def test_earlier_checkpoints(tiny_data, tmp_path):
    """The last two before the last are kept; another run in the folder leaves none of them."""
    args = '--max_iters=10', '--save_interval=4', '--keep_last=2', '--dropout=0.2'
    train(tiny_data, tmp_path, *args)
    assert {path.name: load_checkpoint(str(path))['iter_num'] for path in tmp_path.glob('ckpt*')} == {'ckpt.pt': 10, 'ckpt_00000008.pt': 8, 'ckpt_00000006.pt': 6}
    train(tiny_data, tmp_path, '--max_iters=2')
    assert sorted(path.name for path in tmp_path.glob('*.pt')) == ['best.pt', 'ckpt.pt', 'weights.pt'] and load_checkpoint(str(tmp_path / 'best.pt'))['iter_num'] == 2


@pytest.mark.parametrize('spoil', [lambda path: cut(path, path.stat().st_size // 2), lambda path: path.unlink()], ids=['cut in half', 'gone'])
def test_a_damaged_checkpoint(spoil, tiny_data, tmp_path):
    """The one before it is taken, with a warning, and the run ends as it would have."""
    args = '--save_interval=4', '--dropout=0.2', '--eval_interval=3'
    train(tiny_data, tmp_path / 'parts', *args, '--max_iters=6')
    spoil(tmp_path / 'parts' / 'ckpt.pt')
    result = train(tiny_data, tmp_path / 'parts', *args, '--max_iters=9', '--init_from=auto')
    assert f'taking the one before, {tmp_path / "parts" / "ckpt_00000004.pt"}' in result.err and result.err.count('\n') == 1
    assert [path.name for path in (tmp_path / 'parts').glob('ckpt_*')] == ['ckpt_00000008.pt']
    train(tiny_data, tmp_path / 'whole', *args, '--max_iters=9')
    same_run(tmp_path / 'whole', tmp_path / 'parts')


def test_weights_alone(tiny_data, tmp_path):
    """weights.pt is what sampling would take, number for number, in a third of the size; it samples alike, and a run can start from it."""
    train(tiny_data, tmp_path / 'run', '--n_embd=64')
    weights, checkpoint = (load_checkpoint(str(tmp_path / 'run' / name)) for name in ('weights.pt', 'ckpt.pt'))
    assert all(torch.equal(weights['model'][key], checkpoint['model'][key]) for key in checkpoint['model']) and 'optimizer' not in weights
    assert (tmp_path / 'run' / 'weights.pt').stat().st_size < 0.4 * (tmp_path / 'run' / 'ckpt.pt').stat().st_size
    one, other = (run_script('sample.py', f'--ckpt={tmp_path / "run" / name}', '--device=cpu', '--start=one', '--max_new_tokens=20').out.partition('\none')[2] for name in ('weights.pt', 'ckpt.pt'))
    assert one == other and len(one) > 10
    result = run_script('train.py', '--device=cpu', '--compile=False', f'--dataset={tiny_data}', f'--out_dir={tmp_path / "out"}', '--max_iters=1', '--batch_size=2',
                        '--gradient_accumulation_steps=1', '--eval_iters=1', f'--init_from={tmp_path / "run" / "weights.pt"}')
    assert result.code == 0, result.err


@pytest.mark.slow
@pytest.mark.skipif(os.name == 'nt', reason='no kill -9')
def test_two_runs_in_one_folder(tiny_data, tmp_path):
    """The second refuses and changes nothing; a kill of the first frees the folder."""
    command = [sys.executable, 'train.py', *TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path}', '--max_iters=1000000', '--save_interval=2']
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / 'ckpt.pt').exists(), process)
    for init_from in ('scratch', 'resume', 'auto'):
        second = subprocess.run([*command, f'--init_from={init_from}'], cwd=ROOT, capture_output=True, text=True, encoding='utf-8')
        assert second.returncode == 1 and second.stderr == f'out_dir={tmp_path}: another run is writing there; wait for its end or stop it, or choose another --out_dir\n'
    evaluated = subprocess.run([*command, '--init_from=resume', '--eval_only=True'], cwd=ROOT, capture_output=True, text=True, encoding='utf-8')
    assert evaluated.returncode == 0, evaluated.stderr  # which writes nothing
    process.kill()
    process.wait()
    step = load_last(str(tmp_path))[0]['iter_num']
    out = train(tiny_data, tmp_path, f'--max_iters={step + 2}', '--init_from=resume').out
    assert f'at step {step}' in out

# --- guards


def test_a_dataset_that_has_changed(tiny_data, tmp_path):
    """Another text of the same characters and length is refused; the same one elsewhere is not."""
    digits_dataset(tmp_path / 'elsewhere')
    train(tiny_data, tmp_path / 'run', '--max_iters=2')
    train(tmp_path / 'elsewhere', tmp_path / 'run', '--max_iters=3', '--init_from=resume')
    ids = np.fromfile(tmp_path / 'elsewhere' / 'train.bin', '<u2')
    ids[:2000] = ids[1999::-1]
    ids.tofile(tmp_path / 'elsewhere' / 'train.bin')
    args = *TINY, f'--dataset={tmp_path / "elsewhere"}', f'--out_dir={tmp_path / "run"}', '--init_from=resume'
    refuse('train.py', *args, '--max_iters=4', names=[tmp_path / 'elsewhere', 'not those', tmp_path / 'run' / 'ckpt.pt'], folder=tmp_path)
    assert run_script('train.py', *args, '--eval_only=True').code == 0


def test_the_fingerprint_looks_into_every_shard(tiny_data, tmp_path):
    make_dataset(tmp_path / 'd', tiny_data / 'input.txt', shard_tokens=3000)
    before = fingerprint(open_dataset(str(tmp_path / 'd')))
    assert before == fingerprint(open_dataset(str(tmp_path / 'd')))
    for shard in sorted((tmp_path / 'd').glob('*.bin')):
        ids = np.fromfile(shard, '<u2')
        (ids[::-1]).tofile(shard)
        assert fingerprint(open_dataset(str(tmp_path / 'd'))) != before, shard
        ids.tofile(shard)
    assert fingerprint(open_dataset(str(tmp_path / 'd'))) == before


@pytest.fixture
def spoilt_losses(monkeypatch):
    """Multiplies the losses of some steps by some factor: {step: factor}."""
    factors, real, calls = {}, next_token.loss, iter(range(10**6))
    monkeypatch.setattr(next_token, 'loss', lambda model, batch: real(model, batch) * factors.get(next(calls), 1.0))
    return factors


def test_steps_that_are_not_finite(spoilt_losses, tiny_data, tmp_path):
    """Two may be left out, the third ends the run; a resumed run remembers how many there were."""
    spoilt_losses |= {2: float('nan'), 4: float('inf'), 6: float('nan')}
    args = *TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path}', '--skip_nonfinite=2'
    result = run_script('train.py', *args, '--max_iters=6')
    assert result.code == 0 and result.out.count('is left out') == 2 and '(2 of skip_nonfinite=2)' in result.out and ', 2 left out' in result.out
    assert [step for step, loss in losses_of(tmp_path) if not np.isfinite(loss)] == [2, 4]
    checkpoint = load_checkpoint(str(tmp_path / 'ckpt.pt'))
    assert checkpoint['optimizer']['state'][0]['step'] == 4 and checkpoint['skipped'] == 2 and all(w.isfinite().all() for w in checkpoint['model'].values())
    result = run_script('train.py', *args, '--max_iters=8', '--init_from=resume')
    assert result.code == 1 and result.err.startswith('step 6: the loss is nan') and '--skip_nonfinite' in result.err
    assert load_checkpoint(str(tmp_path / 'ckpt.pt'))['iter_num'] == 6


def test_a_jump_of_the_loss(spoilt_losses, tiny_data, tmp_path):
    spoilt_losses |= {70: float('nan'), 80: 4.0, 81: 4.0, 100: 4.0}
    out = train(tiny_data, tmp_path, '--max_iters=120', '--skip_nonfinite=1').out
    assert [line.split()[2] for line in out.splitlines() if 'the loss jumped' in line] == ['80:', '100:']


# --- data


def documents_dataset(folder, lengths, **settings):
    """Documents of so many letters, each of the alphabet from its own place on."""
    import json
    folder.mkdir()
    alphabet = 'abcdefghijklmnopqrstuvwxyz' * 30
    text = ''.join(json.dumps({'text': alphabet[i % 26:i % 26 + length]}) + '\n' for i, length in enumerate(lengths))
    (folder / 'documents.jsonl').write_text(text, encoding='utf-8')
    make_dataset(folder, str(folder / 'documents.jsonl'), val_fraction=0.1, min_chars=0, **settings)
    return open_dataset(str(folder))


def test_rows_of_documents(tmp_path):
    """Over shards: all targets are seen, no document that fits a row is cut, and rows begin with a document or go on with a long one."""
    T, lengths = 16, np.random.default_rng(0).integers(1, 60, 300)
    data = documents_dataset(tmp_path / 'd', lengths, shard_tokens=1000)
    assert len(data.files['train']) > 3
    ids = np.concatenate([np.fromfile(path, '<u2') for path, _ in data.files['train']])
    starts = np.concatenate([[0], np.flatnonzero(ids[:-1] == data.tokenizer.eot) + 1])
    ends = np.append(starts[1:], len(ids))
    rows = next_token.document_rows(data, T)
    seen = np.zeros(len(ids) + T + 1, dtype=bool)
    for row in rows:
        seen[row + 1:row + T + 1] = True
        begin = starts[starts <= row][-1]
        assert (row - begin) % T == 0 and (row == begin or ends[starts == begin] - begin > T + 1)
    assert set(np.flatnonzero(~seen[:len(ids)])) <= set(starts)  # only what begins a row is no target
    for begin, end in zip(starts, ends):
        assert end - begin > T + 1 or any(row <= begin and end <= row + T + 1 for row in rows)
    drawn = np.concatenate([next_token.draw(data, 10, T, 7, step, 'documents') for step in range(len(rows) // 10 + 1)])
    assert sorted(drawn[:len(rows)]) == sorted(rows)
    X, Y = windows(data, 'train', rows[-3:], T)
    assert X.shape == (3, T) and (Y[-1] != -1).any()


def test_documents_train_and_resume(tmp_path):
    documents_dataset(tmp_path / 'd', [20] * 400)
    args = '--data_order=documents', '--dropout=0.1'
    train(tmp_path / 'd', tmp_path / 'whole', *args, '--max_iters=120')
    train(tmp_path / 'd', tmp_path / 'parts', *args, '--max_iters=50')
    train(tmp_path / 'd', tmp_path / 'parts', *args, '--max_iters=120', '--init_from=resume')
    same_run(tmp_path / 'whole', tmp_path / 'parts')


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='not Linux')
def test_reading_takes_no_memory(tmp_path):
    """256 MB of shards, read all over: what has been read does not stay in this process. The long form is in docs/RECORDS.md."""
    def resident():
        with open('/proc/self/status', encoding='utf-8') as f:
            return int(next(line for line in f if line.startswith('VmRSS')).split()[1]) / 1024
    shards = [tmp_path / f'train_{i:05d}.bin' for i in range(4)]
    for shard in shards:
        np.ones(2**25, '<u2').tofile(shard)
    data = SimpleNamespace(files={'train': [(str(path), i * 2**25) for i, path in enumerate(shards)]}, ends={'train': [2**27]}, dtype=np.dtype('<u2'), vocab_size=2, folder='d', kind='')
    draw = np.random.default_rng(0)
    windows(data, 'train', draw.integers(0, 2**27 - 2000, 500), 1024)
    before = resident()
    for _ in range(60):
        windows(data, 'train', draw.integers(0, 2**27 - 2000, 500), 1024)
    assert resident() - before < 64

# --- several processes


PROCESSES = ['--max_iters=50', '--eval_interval=25', '--gradient_accumulation_steps=2', '--eval_iters=-1']


def test_one_two_and_four_processes(tiny_data, tmp_path):
    """The same 50 losses, to 1e-6 in float32; two of them with activations computed again in the backward pass."""
    train(tiny_data, tmp_path / '1', *PROCESSES)
    for n, checkpointing in ((2, True), (4, False)):
        finished(torchrun('--standalone', f'--nproc_per_node={n}', 'train.py', *TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path / str(n)}', *PROCESSES,
                          f'--gradient_checkpointing={checkpointing}'))
        close(tmp_path / '1', tmp_path / str(n), loss=1.01e-6, weights=1e-5)
        assert len(losses_of(tmp_path / str(n))) == 50


@pytest.mark.parametrize('style', [
    [],
    pytest.param(['--optimizer=muon', '--n_layer=3', '--gradient_checkpointing=True', '--tied=False',
                  '--rope_theta=10000', '--qk_norm=True'], marks=pytest.mark.slow),
], ids=['adamw', 'muon-checkpointing'])
def test_sharded(style, tiny_data, tmp_path):
    """FSDP on three processes, some of whose parts are empty or uneven, is one process; its checkpoints are whole, and go on on any number."""
    args = [*TINY, f'--dataset={tiny_data}', '--eval_iters=-1', '--eval_interval=4', '--batch_size=6', '--n_embd=40', '--n_head=2', *style]
    for out_dir, processes, steps, settings in [('one', 1, 12, []), ('many', 3, 8, ['--parallel=fsdp']), ('many', 2, 10, ['--parallel=fsdp', '--init_from=resume']), ('many', 1, 12, ['--init_from=resume'])]:
        out = finished(torchrun('--standalone', f'--nproc_per_node={processes}', train_in_fp32(tmp_path), *args, f'--out_dir={tmp_path / out_dir}', f'--max_iters={steps}', *settings))
    assert 'processes 2 -> 1, which share the same 6 rows a step' in out and 'parallel fsdp -> ddp' in out
    close(tmp_path / 'one', tmp_path / 'many', loss=2e-6, weights=2e-5)


@pytest.mark.slow
def test_sharded_and_compiled(tiny_data, tmp_path):
    args = [*TINY, f'--dataset={tiny_data}', '--parallel=fsdp', '--max_iters=6']
    out = finished(torchrun('--standalone', '--nproc_per_node=2', 'train.py', *args, f'--out_dir={tmp_path / "a"}', '--compile=True'))
    if 'does not work here' in out:
        pytest.skip('no compiler here')
    train(tiny_data, tmp_path / 'b', '--max_iters=6')
    close(tmp_path / 'a', tmp_path / 'b', loss=1e-5, weights=1e-4)


def test_float16_is_not_sharded(tiny_data, tmp_path, monkeypatch):
    for name, value in {'RANK': '0', 'LOCAL_RANK': '0', 'WORLD_SIZE': '2'}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)  # pretend, as a CPU does not train in float16
    refuse('train.py', *TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path / "out"}', '--parallel=fsdp', '--device=mps', '--dtype=float16',
           names=['parallel=fsdp', 'float16', '--dtype=bfloat16'], folder=tmp_path)


def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/proc/self/environ'), reason='not Linux')
def test_a_lost_process_on_one_of_two_nodes(tiny_data, tmp_path):
    """Two agents that meet by c10d, each with a process; one is killed, torchrun starts both again, and the run, started from scratch in a folder with an older
    run's checkpoint, goes on where it was: it ends as the one that lost nobody."""
    settings = [*TINY, f'--dataset={tiny_data}', '--max_iters=150', '--eval_interval=50', '--save_interval=10', '--gradient_accumulation_steps=2', '--dropout=0.1']
    finished(torchrun('--standalone', 'train.py', *settings, f'--out_dir={tmp_path / "lost"}', '--max_iters=1', '--n_embd=64'))
    finished(torchrun('--standalone', '--nproc_per_node=2', 'train.py', *settings, f'--out_dir={tmp_path / "whole"}'))
    port = free_port()
    agents = [torchrun('--nnodes=2', '--nproc_per_node=1', '--rdzv_backend=c10d', f'--rdzv_endpoint=localhost:{port}', '--rdzv_id=a', '--max_restarts=9', 'train.py', *settings,
                       f'--out_dir={tmp_path / "lost"}') for _ in range(2)]
    wait_for(lambda: steps_done(tmp_path / 'lost') > 20 and load_last(str(tmp_path / 'lost'), 'meta')[0]['model_args']['n_embd'] == 32, agents[0])
    worker = subprocess.run(['pgrep', '-P', str(agents[1].pid), '-f', 'train.py'], capture_output=True, text=True).stdout.split()
    os.kill(int(worker[0]), signal.SIGKILL)
    outs = [finished(agent) for agent in agents]
    assert any('resuming ' in out for out in outs)  # torchrun may end the other process before it can say that it lost one
    same_run(tmp_path / 'whole', tmp_path / 'lost')


def test_a_terminated_group_saves(tiny_data, tmp_path):
    """As on a machine that is taken away: torchrun gets SIGTERM, hands it on, and its processes save the step they are at."""
    process = torchrun('--standalone', '--nproc_per_node=2', 'train.py', *TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path}', '--max_iters=1000000')
    wait_for(lambda: steps_done(tmp_path) > 5, process)
    process.terminate()
    out = process.communicate(timeout=90)[0]
    step = load_checkpoint(str(tmp_path / 'ckpt.pt'))['iter_num']
    assert losses_of(tmp_path)[-1][0] == step - 1 and f'stopping at step {step}' in out and process.returncode != 0


@pytest.mark.parametrize('what, differs', [('dataset=', 'cd $PLACE/$RANK && '), ('the settings: ', 'SEED=--seed=$RANK; ')], ids=['dataset', 'settings'])
def test_processes_that_do_not_see_the_same(what, differs, tiny_data, tmp_path):
    """Folders of one name with another text on each machine, and another setting."""
    for rank in range(2):
        digits_dataset(tmp_path / str(rank) / 'data' / 'd')
    ids = np.fromfile(tmp_path / '1' / 'data' / 'd' / 'train.bin', '<u2')
    ids[::-1].tofile(tmp_path / '1' / 'data' / 'd' / 'train.bin')
    dataset = 'd' if what == 'dataset=' else tiny_data
    command = f'PLACE={tmp_path}; {differs} exec {sys.executable} {ROOT / "train.py"} {" ".join(TINY)} --dataset={dataset} --out_dir={tmp_path / "out"} $SEED'
    out = torchrun('--standalone', '--nproc_per_node=2', '--no_python', 'bash', '-c', command).communicate(timeout=120)[0]
    assert f'{what}' in out and 'process 1 sees another than process 0' in out and not (tmp_path / 'out').exists()


def test_a_lost_process_is_said(capsys):
    """What gloo raises when the other end is gone is one line that says what to do."""
    from core.device import explain
    explain(RuntimeError, RuntimeError('[gloo/transport/tcp/pair.cc:547]\n Connection closed by peer'), None)
    said = capsys.readouterr().err
    assert said.startswith('lost another process of this run') and '--max-restarts' in said
