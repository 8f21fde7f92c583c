"""The loop: golden losses, exact resume, any number of processes, evaluation, signals, logging."""
import importlib.util
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_LOADED, losses_of, make_dataset, run_script, train_in_fp32

from core.text.dataset import open_dataset
from core.training import optimizer
from core.weights.checkpoint import build_model, load_checkpoint
from objectives import next_token

# Losses of the first 20 steps of the tiny runs below. A change of the network, the data order or the optimizer changes
# them, and its commit says why.
GOLDEN = [2.8880, 2.8674, 2.7953, 2.7681, 2.7703, 2.7238, 2.7196, 2.6842, 2.6576, 2.6344,
          2.6076, 2.6000, 2.5986, 2.5817, 2.5399, 2.5415, 2.5619, 2.4948, 2.5053, 2.4530]
QWEN3 = [
    '--rope_theta=10000.0', '--norm=rmsnorm', '--activation=swiglu', '--qk_norm=True', '--tied=False',
    '--n_kv_head=1', '--optimizer=muon', '--schedule=wsd', '--lr_decay_iters=20',
]
GOLDEN_QWEN3 = [2.8945, 2.8062, 2.7447, 2.6657, 2.6595, 2.5740, 2.5355, 2.4912, 2.4831, 2.4607,
                2.4354, 2.4093, 2.3908, 2.3695, 2.3834, 2.3250, 2.3457, 2.2727, 2.2917, 2.2755]


def train(data, out_dir, *args, tiny=TINY):
    result = run_script('train.py', *tiny, f'--dataset={data}', f'--out_dir={out_dir}', *args)
    assert result.code == 0, result.err
    return result.out


def load(out_dir, name='ckpt.pt'):
    return load_checkpoint(str(out_dir / name))


def numbers_of(out_dir, column='loss'):
    """Return one column of a run's log.csv, without the steps."""
    return [number for _, number in losses_of(out_dir, column)]


def wait_for(condition, process=None, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None
        time.sleep(0.05)


def test_golden_losses(tiny_data, tmp_path):
    train(tiny_data, tmp_path, '--max_iters=20')
    assert numbers_of(tmp_path) == pytest.approx(GOLDEN, abs=2e-4)


def test_short_rows(tiny_data, tmp_path):
    """Half of the steps see the same tokens in rows of half the length. The weights do not change here."""
    out = train(tiny_data, tmp_path, '--short_rows=0.5', '--max_iters=4', '--learning_rate=0', '--min_lr=0', '--seed=5')
    assert out.count('whole rows from here on') == out.count('step 2: whole rows from here on') == 1
    model = build_model(load(tmp_path), 'ckpt.pt')
    data, T = open_dataset(str(tiny_data)), model.config.block_size
    expected = []
    for step in range(4):
        starts = next_token.draw(data, 4, T, 5, step)
        batch = [x.view(-1, T // 2 if step < 2 else T) for x in next_token.load(data, 'train', starts, T)]
        expected.append(model(*batch).mean().item())
    assert numbers_of(tmp_path) == pytest.approx(expected, abs=1e-4)


def test_golden_losses_of_qwen3_and_muon(tiny_data, tmp_path, monkeypatch):
    """Updates in fp32, as on most CPUs."""
    monkeypatch.setattr(optimizer, 'fast_bf16_cpu', lambda: False)
    train(tiny_data, tmp_path, '--max_iters=20', *QWEN3)
    assert numbers_of(tmp_path) == pytest.approx(GOLDEN_QWEN3, abs=2e-4)


def test_it_learns(tiny_data, tmp_path):
    """After 300 steps nearly all words of a sample are words of the text."""
    train(tiny_data, tmp_path, '--max_iters=300', '--lr_decay_iters=300', '--learning_rate=1e-2', '--min_lr=1e-3',
          '--batch_size=16', '--eval_interval=300')
    assert numbers_of(tmp_path, 'val_loss')[-1] < 0.9  # from ln(17) = 2.8
    out = run_script('sample.py', f'--out_dir={tmp_path}', '--start=one', '--num_samples=1', '--temperature=0.5',
                     '--max_new_tokens=300').out
    words = out.split('\none', 1)[1].split()[1:-1]
    digits = set('zero one two three four five six seven eight nine'.split())
    assert sum(word in digits for word in words) > 0.9 * len(words)


@pytest.mark.parametrize('style', [
    pytest.param([], id='gpt2'),
    pytest.param([*QWEN3, '--data_order=epochs'], id='qwen3'),
    pytest.param(['--dtype=bfloat16'], id='gpt2-bf16'),
    pytest.param([*QWEN3, '--dtype=bfloat16', '--background_save=False'], id='qwen3-bf16'),
])
def test_resume_is_exact(style, tiny_data, tmp_path):
    """
    Ten steps, with dropout, against four and then six more: the same losses and weights, bit for bit, and a log
    without gaps.
    """
    args = '--dropout=0.2', '--gradient_accumulation_steps=2', '--eval_interval=4', *style
    undisturbed, resumed = tmp_path / 'undisturbed', tmp_path / 'resumed'
    train(tiny_data, undisturbed, *args, '--max_iters=10')
    train(tiny_data, resumed, *args, '--max_iters=4')
    assert 'at step 4' in train(tiny_data, resumed, *args, '--max_iters=10', '--init_from=resume')
    for column in ('loss', 'grad_norm', 'lr', 'val_loss', 'train_bpb'):
        assert losses_of(undisturbed, column) == losses_of(resumed, column)
    expected, found = load(undisturbed)['model'], load(resumed)['model']
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_the_batch_does_not_depend_on_accumulation(tiny_data, tmp_path):
    a, b = tmp_path / 'a', tmp_path / 'b'
    train(tiny_data, a, '--batch_size=12')
    train(tiny_data, b, '--batch_size=3', '--gradient_accumulation_steps=4', '--eval_iters=8')
    assert numbers_of(a) == pytest.approx(numbers_of(b), abs=2e-6)
    assert numbers_of(a, 'val_loss')[-1] == pytest.approx(numbers_of(b, 'val_loss')[-1], abs=2e-6)


@pytest.mark.parametrize('rows', [
    pytest.param(['--gradient_accumulation_steps=2'], id='micro-batches', marks=pytest.mark.slow),
    pytest.param(['--batch_size=6'], id='rows'),
    # the ranks share three matrices unevenly
    pytest.param(['--batch_size=6', '--n_layer=3', *QWEN3], id='muon', marks=pytest.mark.slow),
])
def test_two_processes_equal_one(rows, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(optimizer, 'fast_bf16_cpu', lambda: False)  # bf16 rounds more than the tolerance
    args = [*TINY, f'--dataset={tiny_data}', '--eval_iters=-1', *rows]
    # --no_python, because torchrun itself would call `python -u`
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--no_python',
               sys.executable, train_in_fp32(tmp_path), *args, f'--out_dir={tmp_path / "two"}']
    result = subprocess.run(command, capture_output=True, text=True, encoding='utf-8', timeout=120, cwd=ROOT,
                            env={**os.environ, 'PYTHONUNBUFFERED': ''})
    assert result.returncode == 0, result.stderr[-9000:]
    # the last line is printed, although processes of a group exit without Python's clean-up
    assert f'now: python sample.py --out_dir={tmp_path / "two"}' in result.stdout
    train(tiny_data, tmp_path / 'one', '--eval_iters=-1', *rows)
    for column in ('loss', 'val_loss', 'val_bpb'):
        one, two = (numbers_of(tmp_path / name, column) for name in ('one', 'two'))
        assert one and one == pytest.approx(two, abs=1e-6)
    one, two = load(tmp_path / 'one')['model'], load(tmp_path / 'two')['model']
    assert all((one[key] - two[key]).abs().max() < 1e-5 for key in one)


def test_full_validation_is_the_mean_over_every_token(tiny_data, tiny_run):
    """Against a loop over windows, in plain operations and fp64."""
    out = run_script('train.py', *TINY, f'--dataset={tiny_data}', f'--out_dir={tiny_run}', '--init_from=resume',
                     '--eval_only=True', '--eval_iters=-1').out
    printed = {name: float(value) for name, value in re.findall(r'(val \w+) ([\d.]+)', out)}
    model = build_model(load(tiny_run), 'x').eval()
    ids = torch.from_numpy(np.fromfile(tiny_data / 'val.bin', '<u2').astype(np.int64))
    total = 0.0
    for start in range(0, len(ids) - 1, 32):
        window = ids[start:start + 33]
        log_probs = torch.log_softmax(model(window[None, :-1])[0].double(), dim=-1)  # (T, V)
        total -= log_probs[range(len(window) - 1), window[1:]].sum().item()
    loss = total / (len(ids) - 1)
    assert printed['val loss'] == pytest.approx(loss, abs=1e-4)
    assert printed['val bpb'] == pytest.approx(loss / math.log(2), abs=1e-4)  # in ASCII a token is a byte


def test_evaluation_does_not_disturb_training(tiny_data, tmp_path):
    train(tiny_data, tmp_path / 'often', '--dropout=0.1', '--eval_interval=1')
    train(tiny_data, tmp_path / 'seldom', '--dropout=0.1', '--eval_interval=100')
    assert losses_of(tmp_path / 'often') == losses_of(tmp_path / 'seldom')


def test_max_iters_updates_exactly(tiny_data, tmp_path):
    train(tiny_data, tmp_path, '--max_iters=7')
    assert [step for step, _ in losses_of(tmp_path)] == list(range(7))
    assert load(tmp_path)['iter_num'] == 7


def test_no_step_at_all(tiny_data, tmp_path):
    """max_iters=0 evaluates and saves the weights it started with, so that they can be sampled from."""
    out = train(tiny_data, tmp_path, '--max_iters=0')
    assert 'step 0: train loss' in out
    assert f'now: python sample.py --out_dir={tmp_path}' in out
    for name in ('ckpt.pt', 'best.pt', 'weights.pt'):
        assert load(tmp_path, name)['iter_num'] == 0
    sampled = run_script('sample.py', f'--out_dir={tmp_path}', '--start=one', '--device=cpu', '--max_new_tokens=2')
    assert sampled.code == 0, sampled.err
    assert 'nothing is left to do' in train(tiny_data, tmp_path, '--max_iters=0', '--init_from=resume')
    train(tiny_data, tmp_path, '--max_iters=2', '--init_from=resume')
    assert load(tmp_path)['iter_num'] == 2


def test_best_and_last(tiny_data, tmp_path):
    """
    A high learning rate ruins the model. best.pt keeps the best one, and sampling uses it if always_save_checkpoint is
    False.
    """
    args = '--eval_interval=10', '--eval_iters=-1', '--always_save_checkpoint=False'
    train(tiny_data, tmp_path, *args, '--max_iters=30', '--learning_rate=3e-2', '--lr_decay_iters=30')
    train(tiny_data, tmp_path, *args, '--max_iters=40', '--learning_rate=3.0', '--decay_lr=False',
          '--init_from=resume')
    losses = dict(losses_of(tmp_path, 'val_loss'))
    best_step = load(tmp_path, 'best.pt')['iter_num']
    assert losses[best_step] == pytest.approx(min(losses.values()))
    assert best_step < 40
    sample = 'sample.py', f'--out_dir={tmp_path}', '--max_new_tokens=2'
    assert 'best.pt' in run_script(*sample).out
    assert 'ckpt.pt' in run_script(*sample, f'--ckpt={tmp_path / "ckpt.pt"}').out


def test_non_finite_loss_stops_and_names_the_step(tiny_data, tmp_path):
    result = run_script('train.py', *TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path}', '--learning_rate=1e30',
                        '--max_iters=20')
    assert result.code == 1
    assert re.match(r'step \d+: the loss is', result.err)
    assert 'Traceback' not in result.err
    assert not (tmp_path / 'ckpt.pt').exists()


@pytest.mark.skipif(os.name == 'nt', reason='POSIX signals')
@pytest.mark.parametrize('name, code', [('SIGINT', 130), ('SIGTERM', 0), ('SIGUSR1', 0)])
def test_signals_save_and_say_how_to_go_on(name, code, tiny_data, tmp_path):
    command = [sys.executable, 'train.py', *TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path}',
               '--max_iters=1000000']
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               encoding='utf-8')
    wait_for(lambda: (tmp_path / 'log.csv').exists() and len(losses_of(tmp_path)) >= 5, process)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert '--init_from=resume' in out
    assert 'Traceback' not in err
    assert losses_of(tmp_path)[-1][0] == load(tmp_path)['iter_num'] - 1  # the step was finished, and nothing is lost


def test_init_from_a_checkpoint_starts_anew(tiny_data, tiny_run, tmp_path):
    """The weights are the checkpoint's; steps and schedule start at 0."""
    out = train(tiny_data, tmp_path, f'--init_from={tiny_run}', '--learning_rate=0.0', '--min_lr=0.0')
    assert f'loaded {tiny_run}' in out
    assert losses_of(tmp_path)[0][0] == 0
    # not bit for bit: sampling, in an earlier test of this process, switches oneDNN's kernels off
    assert numbers_of(tmp_path, 'val_loss')[0] == pytest.approx(numbers_of(tiny_run, 'val_loss')[-1], abs=1e-6)


@pytest.mark.parametrize('schedule, decayed', [
    ('wsd', [0, 0, 0, 0.5, 1]),
    ('cosine', [0, 0.1464466, 0.5, 0.8535534, 1]),
])
def test_schedules(schedule, decayed, tiny_data, tmp_path):
    """
    Warm-up in 4 steps, then decay until step 20; for wsd in the last 8 steps. decayed: the share of the way down at
    each quarter between steps 4 and 20. Muon's learning rate decays by the same ratio.
    """
    train(tiny_data, tmp_path, '--max_iters=23', '--warmup_iters=4', '--lr_decay_iters=20', f'--schedule={schedule}',
          '--learning_rate=1e-3', '--min_lr=1e-4', '--cooldown=0.4', '--optimizer=muon', '--muon_lr=0.02')
    rates = numbers_of(tmp_path, 'lr')
    assert rates[:4] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4])
    assert rates[4:21:4] == pytest.approx([1e-3 - 9e-4 * share for share in decayed], rel=1e-5)
    assert rates[20:] == pytest.approx([1e-4] * 3)
    if schedule == 'wsd':
        assert rates[12:21] == pytest.approx([1e-3 - 9e-4 * i / 8 for i in range(9)])
    groups = load(tmp_path)['optimizer']['param_groups']
    assert [group['lr'] for group in groups] == pytest.approx([1e-4, 1e-4, 0.002])


def test_depth_alone(tiny_data, tmp_path):
    """
    n_embd=0 and n_head=0 derive the shape from n_layer: 64 channels per layer and per head. AdamW's learning rates are
    scaled to the width, Muon's is not.
    """
    depth = ['--n_embd=0', '--n_head=0', '--decay_lr=False', '--learning_rate=1e-3', '--min_lr=1e-4', *QWEN3,
             '--muon_lr=0.03']
    train(tiny_data, tmp_path, '--max_iters=1', '--n_layer=3', *depth, '--n_kv_head=0')
    checkpoint = load(tmp_path)
    expected = {'n_embd': 192, 'n_head': 3, 'n_kv_head': 3, 'head_size': 64, 'n_inner': 512}  # 8/3 * 192
    for saved in (checkpoint['model_args'], checkpoint['config']):
        assert {key: saved[key] for key in expected} == expected
    rates = [checkpoint['config'][key] for key in ('learning_rate', 'min_lr')]
    assert rates == pytest.approx([2e-3, 2e-4])  # (768 / 192)**0.5 = 2
    groups = checkpoint['optimizer']['param_groups']
    assert [group['lr'] for group in groups] == pytest.approx([2e-3, 2e-3, 0.03])
    depth = [arg for arg in depth if not arg.startswith(('--tied', '--n_kv_head', '--schedule', '--lr_decay'))]
    train(tiny_data, tmp_path, '--max_iters=2', '--init_from=resume', *depth, tiny=TINY_LOADED)
    assert numbers_of(tmp_path, 'lr') == pytest.approx([2e-3, 2e-3])  # scaled to the checkpoint's width


@pytest.mark.parametrize('tied', [True, False])
def test_20_tokens_per_parameter(tied, tiny_data, tmp_path):
    """max_iters=-1 trains on 20 tokens per parameter, and lr_decay_iters=-1 decays until then."""
    train(tiny_data, tmp_path, '--n_layer=1', '--n_embd=8', '--batch_size=32', '--max_iters=-1', '--lr_decay_iters=-1',
          '--min_lr=0.0', f'--tied={tied}')
    n_params = 12 * 8 * 8 + 3 * 8 + 17 * 8  # matrices, gains and the head
    steps = math.ceil(20 * n_params / (32 * 32))
    assert [step for step, _ in losses_of(tmp_path)] == list(range(steps))
    config = load(tmp_path)['config']
    assert config['max_iters'] == config['lr_decay_iters'] == steps
    last_rate = 1e-3 * (1 + math.cos(math.pi * (steps - 1) / steps)) / 2
    assert numbers_of(tmp_path, 'lr')[-1] == pytest.approx(last_rate, rel=1e-4)


def test_epochs(tiny_data, tmp_path):
    """One pass over the tokens, with the schedule; train.py says how many times they are seen."""
    args = [arg for arg in TINY if not arg.startswith(('--max_iters', '--lr_decay'))]
    out = train(tiny_data, tmp_path, '--epochs=0.5', '--batch_size=50', '--data_order=epochs', tiny=args)
    steps = math.ceil(0.5 * 17100 / 32 / 50)
    assert f'17,100 tokens, {steps} steps see them 0.561 times' in out
    assert load(tmp_path)['iter_num'] == load(tmp_path)['config']['lr_decay_iters'] == steps


def test_a_folder_without_validation_trains(tiny_data, tmp_path):
    make_dataset(tmp_path / 'data', tiny_data / 'input.txt', val_fraction=0.0)
    assert 'val loss' not in train(tmp_path / 'data', tmp_path / 'out')
    assert (tmp_path / 'out' / 'ckpt.pt').exists()
    assert not (tmp_path / 'out' / 'best.pt').exists()


def test_bf16_on_the_cpu_is_close_to_fp32(tiny_data, tmp_path):
    train(tiny_data, tmp_path / 'fp32', '--max_iters=20')
    train(tiny_data, tmp_path / 'bf16', '--max_iters=20', '--dtype=bfloat16')
    fp32, bf16 = (numbers_of(tmp_path / name) for name in ('fp32', 'bf16'))
    assert fp32 != bf16
    assert fp32 == pytest.approx(bf16, abs=0.03)


@pytest.mark.parametrize('message', ['no compiler', ''])
def test_compile_falls_back(message, tiny_data, tmp_path, monkeypatch):
    def broken(model, dynamic):
        raise RuntimeError(message)
    monkeypatch.setattr(torch, 'compile', broken)
    out = train(tiny_data, tmp_path / 'a', '--compile=True')
    assert out.count('torch.compile does not work here') == 1
    train(tiny_data, tmp_path / 'b')
    assert losses_of(tmp_path / 'a') == losses_of(tmp_path / 'b')


def test_a_wrong_compilation_is_not_used(tiny_data, tmp_path, monkeypatch):
    """Its gradients are not finite, or this PyTorch is known to compile such a model wrongly."""
    class Broken(torch.nn.Module):
        def __init__(self, model, dynamic):
            super().__init__()
            self.model = model

        def forward(self, *batch):
            return self.model(*batch) * float('nan')
    monkeypatch.setattr(torch, 'compile', Broken)
    out = train(tiny_data, tmp_path / 'a', '--compile=True')
    assert out.count('gradients are not finite') == 1
    assert 'best validation loss' in out
    out = train(tiny_data, tmp_path / 'b', '--compile=True', '--dtype=bfloat16', '--rope_theta=10000',
                '--head_size=64', '--max_iters=1')
    assert out.count('not compiled') == 1
    assert 'not finite' not in out


@pytest.mark.slow
@pytest.mark.parametrize('settings, tolerance, n_shapes', [
    pytest.param([], 1e-5, 1, id='fp32'),
    pytest.param(['--dtype=bfloat16', '--dropout=0.2'], 0.02, 1, id='bf16-dropout'),
    pytest.param(['--short_rows=0.5'], 1e-5, 2, id='short-rows'),
])
def test_compile_gives_the_same_losses(settings, tolerance, n_shapes, tiny_data, tmp_path):
    torch._dynamo.reset()  # forget what other tests compiled for other shapes
    counts = torch._dynamo.utils.counters['stats']
    graphs_before = counts['unique_graphs']
    out = train(tiny_data, tmp_path / 'a', '--compile=True', *settings)
    if 'does not work here' in out:
        pytest.skip('no compiler here')
    assert counts['unique_graphs'] - graphs_before == n_shapes  # the trial batches are like the batches that follow
    train(tiny_data, tmp_path / 'b', *settings)
    assert numbers_of(tmp_path / 'a') == pytest.approx(numbers_of(tmp_path / 'b'), abs=tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_cuda(dtype, tiny_data, tmp_path):
    train(tiny_data, tmp_path / 'cpu', '--max_iters=10')
    train(tiny_data, tmp_path / 'gpu', '--max_iters=10', '--device=cuda', f'--dtype={dtype}')
    tolerance = 2e-3 if dtype == 'float32' else 5e-2
    assert numbers_of(tmp_path / 'cpu') == pytest.approx(numbers_of(tmp_path / 'gpu'), abs=tolerance)


def test_wandb_goes_offline_without_a_login(tiny_data, tmp_path, monkeypatch):
    pytest.importorskip('wandb')
    for name in ('WANDB_MODE', 'WANDB_API_KEY'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('NETRC', str(tmp_path / 'nobody'))
    out = train(tiny_data, tmp_path, '--wandb_log=True')
    assert 'offline' in out
    [file] = tmp_path.glob('wandb/offline-run*/*.wandb')
    wait_for(lambda: file.stat().st_size > 1000)  # wandb's own process writes it, on a busy machine a moment later


def test_tensorboard(tiny_data, tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train(tiny_data, tmp_path, '--tensorboard_log=True')
    events = EventAccumulator(str(tmp_path / 'tensorboard')).Reload().Scalars('loss')
    assert [(event.step, pytest.approx(event.value, abs=1e-5)) for event in events] == losses_of(tmp_path)


@pytest.mark.parametrize('package', ['wandb', 'tensorboard'])
def test_logging_without_the_package(package, tiny_data, tmp_path, monkeypatch):
    """The line names it, before anything is written."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == package else found(name))
    result = run_script('train.py', *TINY, f'--{package}_log=True', f'--dataset={tiny_data}', f'--out_dir={tmp_path}')
    assert (result.code, result.err) == (1, f'{package}_log=True needs {package}: pip install {package}\n')
    assert not list(tmp_path.iterdir())


def test_a_gpu_sized_run_on_a_cpu_is_announced(tiny_data, tmp_path):
    out = run_script('train.py', *TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path}', '--max_iters=100000000',
                     '--learning_rate=1e30').out  # stops the run soon
    assert re.search(r'about [\d,]+ hours', out)
    assert 'train_shakespeare_char_cpu.py' in out


@pytest.mark.skipif(torch.cuda.is_available() or os.name == 'nt', reason='for machines without a usable GPU')
def test_an_nvidia_card_that_torch_cannot_see_is_announced(tiny_data, tmp_path, monkeypatch):
    (tmp_path / 'nvidia-smi').write_text('#!/bin/sh\n', encoding='utf-8')
    (tmp_path / 'nvidia-smi').chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    assert 'sees no GPU' in train(tiny_data, tmp_path / 'out', '--device=auto')


def test_the_default_start_is_valid_without_newlines(tmp_path):
    (tmp_path / 'line.txt').write_text('abcdefgh' * 100, encoding='utf-8')
    make_dataset(tmp_path / 'data', tmp_path / 'line.txt')
    train(tmp_path / 'data', tmp_path / 'out')
    result = run_script('sample.py', f'--out_dir={tmp_path / "out"}', '--max_new_tokens=5')
    assert result.code == 0, result.err


def test_a_new_run_replaces_the_old_one_in_its_folder(tiny_data, tmp_path):
    train(tiny_data, tmp_path, '--always_save_checkpoint=False')
    assert load(tmp_path, 'best.pt')['model_args']['n_embd'] == 32
    train(tiny_data, tmp_path, '--always_save_checkpoint=False', '--n_embd=16', '--learning_rate=0.1',
          '--decay_lr=False')  # its loss is worse
    for name in ('ckpt.pt', 'best.pt'):
        assert load(tmp_path, name)['model_args']['n_embd'] == 16
    best = load(tmp_path, 'best.pt')
    assert dict(losses_of(tmp_path, 'val_loss'))[best['iter_num']] == pytest.approx(best['best_val_loss'], abs=1e-5)


@pytest.mark.parametrize('device', ['cpu:x', 'gpu', 'cuda:x'])
def test_an_odd_device_is_refused(device, tiny_data, tmp_path):
    result = run_script('train.py', *TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path}', f'--device={device}')
    assert result.code == 1
    assert result.err.startswith(f'device={device}: expected')


@pytest.mark.parametrize('name', sorted(path.name for path in (ROOT / 'config').glob('train_*.py')))
def test_every_config_trains(name, tiny_data, tmp_path):
    """With its sizes cut, alone and followed by config/laptop.py."""
    for overlay in ([], ['config/laptop.py']):
        result = run_script('train.py', f'config/{name}', *overlay, *TINY, '--max_iters=1', '--wandb_log=False',
                            f'--dataset={tiny_data}', f'--out_dir={tmp_path / "out"}')
        assert result.code == 0, result.err
        assert 'step 1: train loss' in result.out


def test_samples_are_whole_characters(tmp_path):
    """A vocabulary that is mostly bytes and an untrained network would give broken characters; sampling prevents it."""
    text = '满纸荒唐言，一把辛酸泪。都云作者痴，谁解其中味？🙂\n' * 30
    (tmp_path / 'input.txt').write_text(text, encoding='utf-8')
    make_dataset(tmp_path / 'd', str(tmp_path / 'input.txt'), tokenizer='bbpe', vocab_size=270)
    train(tmp_path / 'd', tmp_path / 'out', '--max_iters=1')
    for number in (1, 3):
        result = run_script('sample.py', f'--out_dir={tmp_path / "out"}', '--device=cpu', '--start=满纸',
                            f'--num_samples={number}', '--max_new_tokens=60', '--temperature=1.5')
        assert result.code == 0, result.err
        sample = result.out[result.out.index('满纸'):]
        assert '\ufffd' not in sample
        assert len(sample) > 20 * number
