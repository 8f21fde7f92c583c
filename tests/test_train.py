"""The loop: golden losses, exact resume, any number of processes, evaluation, signals, logging."""
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

from core.device import known_peak
from core.training import optimizer
from core.weights.checkpoint import build_model, load_checkpoint

# losses of the first steps of the tiny run below: whoever changes the network, the data order or the optimizer changes them, and says why
GOLDEN = [2.8880, 2.8674, 2.7953, 2.7681, 2.7703, 2.7238, 2.7196, 2.6842, 2.6576, 2.6344,
          2.6076, 2.6000, 2.5986, 2.5817, 2.5399, 2.5415, 2.5619, 2.4948, 2.5053, 2.4530]
QWEN3 = ['--rope_theta=10000.0', '--norm=rmsnorm', '--activation=swiglu', '--qk_norm=True', '--tied=False', '--n_kv_head=1',
         '--optimizer=muon', '--schedule=wsd', '--lr_decay_iters=20']
GOLDEN_QWEN3 = [2.8945, 2.8062, 2.7447, 2.6657, 2.6595, 2.5740, 2.5355, 2.4912, 2.4831, 2.4607,
                2.4354, 2.4093, 2.3908, 2.3695, 2.3834, 2.3250, 2.3457, 2.2727, 2.2917, 2.2755]


def train(data, out_dir, *args, tiny=TINY):
    result = run_script('train.py', *tiny, f'--dataset={data}', f'--out_dir={out_dir}', *args)
    assert result.code == 0, result.err
    return result.out


def weights_of(out_dir, name='ckpt.pt'):
    return load_checkpoint(str(out_dir / name))['model']


def test_golden_losses(tiny_data, tmp_path):
    train(tiny_data, tmp_path, '--max_iters=20')
    assert [loss for _, loss in losses_of(tmp_path)] == pytest.approx(GOLDEN, abs=2e-4)


def test_golden_losses_of_qwen3_and_muon(tiny_data, tmp_path, monkeypatch):
    """Updates in fp32, as on most CPUs."""
    monkeypatch.setattr(optimizer, 'fast_bf16_cpu', lambda: False)
    train(tiny_data, tmp_path, '--max_iters=20', *QWEN3)
    assert [loss for _, loss in losses_of(tmp_path)] == pytest.approx(GOLDEN_QWEN3, abs=2e-4)


def test_it_learns(tiny_data, tmp_path):
    train(tiny_data, tmp_path, '--max_iters=300', '--lr_decay_iters=300', '--learning_rate=1e-2', '--min_lr=1e-3', '--batch_size=16', '--eval_interval=100')
    assert losses_of(tmp_path, 'val_loss')[-1][1] < 0.9  # from ln(17) = 2.8
    text = run_script('sample.py', f'--out_dir={tmp_path}', '--start=one', '--num_samples=1', '--temperature=0.5', '--max_new_tokens=300').out
    words = text.split('\none', 1)[1].split()[1:-1]
    known = set('zero one two three four five six seven eight nine'.split())
    assert sum(word in known for word in words) > 0.9 * len(words)


@pytest.mark.parametrize('style', [[], [*QWEN3, '--data_order=epochs'], ['--dtype=bfloat16'], [*QWEN3, '--dtype=bfloat16', '--background_save=False']],
                         ids=['gpt2', 'qwen3', 'gpt2-bf16', 'qwen3-bf16'])
def test_resume_is_exact(style, tiny_data, tmp_path):
    """Ten steps, with dropout, against four and then six more: same losses, same weights, bit for bit, and a log without gaps."""
    args = '--dropout=0.2', '--gradient_accumulation_steps=2', '--eval_interval=4', *style
    train(tiny_data, tmp_path / 'whole', *args, '--max_iters=10')
    train(tiny_data, tmp_path / 'parts', *args, '--max_iters=4')
    out = train(tiny_data, tmp_path / 'parts', *args, '--max_iters=10', '--init_from=resume')
    assert 'at step 4' in out
    for column in ('loss', 'grad_norm', 'lr', 'val_loss', 'train_bpb'):
        assert losses_of(tmp_path / 'whole', column) == losses_of(tmp_path / 'parts', column)
    whole, parts = weights_of(tmp_path / 'whole'), weights_of(tmp_path / 'parts')
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_the_batch_does_not_depend_on_accumulation(tiny_data, tmp_path):
    train(tiny_data, tmp_path / 'a', '--batch_size=12')
    train(tiny_data, tmp_path / 'b', '--batch_size=3', '--gradient_accumulation_steps=4', '--eval_iters=8')
    assert [x for _, x in losses_of(tmp_path / 'a')] == pytest.approx([x for _, x in losses_of(tmp_path / 'b')], abs=2e-6)
    assert losses_of(tmp_path / 'a', 'val_loss')[-1][1] == pytest.approx(losses_of(tmp_path / 'b', 'val_loss')[-1][1], abs=2e-6)


@pytest.mark.parametrize('split_up', [['--gradient_accumulation_steps=2'], ['--batch_size=6'], ['--batch_size=6', '--n_layer=3', *QWEN3]], ids=['micro-batches', 'rows', 'muon'])
def test_two_processes_equal_one(split_up, tiny_data, tmp_path, monkeypatch):
    """With Muon the processes share three of the matrices out unevenly; updates in fp32, as bf16 makes more of rounding than the tolerance."""
    monkeypatch.setattr(optimizer, 'fast_bf16_cpu', lambda: False)
    args = [*TINY, f'--dataset={tiny_data}', '--eval_iters=-1', *split_up]
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
               '--no_python', sys.executable, train_in_fp32(tmp_path), *args, f'--out_dir={tmp_path / "two"}']  # torchrun itself would call `python -u`
    result = subprocess.run(command, capture_output=True, text=True, encoding='utf-8', timeout=120, cwd=ROOT, env={**os.environ, 'PYTHONUNBUFFERED': ''})
    assert result.returncode == 0, result.stderr[-9000:]
    assert f'now: python sample.py --out_dir={tmp_path / "two"}' in result.stdout  # processes of a group leave without Python's clean-up, but not without their last line
    train(tiny_data, tmp_path / 'one', '--eval_iters=-1', *split_up)
    for column in ('loss', 'val_loss', 'val_bpb'):
        one, two = losses_of(tmp_path / 'one', column), losses_of(tmp_path / 'two', column)
        assert [x for _, x in one] == pytest.approx([x for _, x in two], abs=1e-6) and one
    one, two = weights_of(tmp_path / 'one'), weights_of(tmp_path / 'two')
    assert all((one[key] - two[key]).abs().max() < 1e-5 for key in one)


def test_full_validation_is_the_mean_over_every_token(tiny_data, tiny_run):
    """Against a loop that looks at one token at a time, with the context that its window gives it."""
    out = run_script('train.py', *TINY, f'--dataset={tiny_data}', f'--out_dir={tiny_run}', '--init_from=resume', '--eval_only=True', '--eval_iters=-1').out
    printed = dict(re.findall(r'(val \w+) ([\d.]+)', out))
    checkpoint = load_checkpoint(str(tiny_run / 'ckpt.pt'))
    model = build_model(checkpoint, 'x').eval()
    ids = torch.from_numpy(np.fromfile(tiny_data / 'val.bin', '<u2').astype(np.int64))
    total = 0.0
    for start in range(0, len(ids) - 1, 32):
        window = ids[start:start + 33]
        total -= torch.log_softmax(model(window[None, :-1])[0].double(), -1)[range(len(window) - 1), window[1:]].sum().item()
    assert float(printed['val loss']) == pytest.approx(total / (len(ids) - 1), abs=1e-4)
    assert float(printed['val bpb']) == pytest.approx(total / (len(ids) - 1) / math.log(2), abs=1e-4)  # ASCII: a byte a token


def test_evaluation_does_not_disturb_training(tiny_data, tmp_path):
    train(tiny_data, tmp_path / 'often', '--dropout=0.1', '--eval_interval=1')
    train(tiny_data, tmp_path / 'seldom', '--dropout=0.1', '--eval_interval=100')
    assert losses_of(tmp_path / 'often') == losses_of(tmp_path / 'seldom')


def test_max_iters_updates_exactly(tiny_data, tmp_path):
    train(tiny_data, tmp_path, '--max_iters=7')
    assert [step for step, _ in losses_of(tmp_path)] == list(range(7))
    assert load_checkpoint(str(tmp_path / 'ckpt.pt'))['iter_num'] == 7


def test_best_and_last(tiny_data, tmp_path):
    """A learning rate that ruins what was learnt: best.pt keeps the best, and sampling takes it if the run was to keep only that."""
    args = '--eval_interval=10', '--max_iters=40', '--learning_rate=3e-2', '--eval_iters=-1'
    train(tiny_data, tmp_path, *args, '--max_iters=30', '--lr_decay_iters=30', '--always_save_checkpoint=False')
    train(tiny_data, tmp_path, *args, '--max_iters=40', '--learning_rate=3.0', '--decay_lr=False', '--init_from=resume', '--always_save_checkpoint=False')
    losses = dict(losses_of(tmp_path, 'val_loss'))
    best = load_checkpoint(str(tmp_path / 'best.pt'))
    assert losses[best['iter_num']] == pytest.approx(min(losses.values())) and best['iter_num'] < 40
    assert 'best.pt' in run_script('sample.py', f'--out_dir={tmp_path}', '--max_new_tokens=2').out
    assert 'ckpt.pt' in run_script('sample.py', f'--out_dir={tmp_path}', f'--ckpt={tmp_path / "ckpt.pt"}', '--max_new_tokens=2').out


def test_non_finite_loss_stops_and_names_the_step(tiny_data, tmp_path):
    result = run_script('train.py', *TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path}', '--learning_rate=1e30', '--max_iters=20')
    assert result.code == 1 and re.match(r'step \d+: the loss is nan|step \d+: the loss is', result.err) and 'Traceback' not in result.err
    assert not (tmp_path / 'ckpt.pt').exists()


@pytest.mark.skipif(os.name == 'nt', reason='POSIX signals')
@pytest.mark.parametrize('name,code', [('SIGINT', 130), ('SIGTERM', 0), ('SIGUSR1', 0)])
def test_signals_save_and_say_how_to_go_on(name, code, tiny_data, tmp_path):
    command = [sys.executable, 'train.py', *TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path}', '--max_iters=1000000']
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding='utf-8')
    deadline = time.time() + 60
    while not (tmp_path / 'log.csv').exists() or len(losses_of(tmp_path)) < 5:
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and '--init_from=resume' in out and 'Traceback' not in err
    step = load_checkpoint(str(tmp_path / 'ckpt.pt'))['iter_num']
    assert losses_of(tmp_path)[-1][0] == step - 1  # the step was finished, and nothing is lost


def test_init_from_a_checkpoint_starts_anew(tiny_data, tiny_run, tmp_path):
    out = train(tiny_data, tmp_path, f'--init_from={tiny_run}', '--learning_rate=0.0', '--min_lr=0.0')
    assert f'loaded {tiny_run}' in out and losses_of(tmp_path)[0][0] == 0
    assert losses_of(tmp_path, 'val_loss')[0][1] == losses_of(tiny_run, 'val_loss')[-1][1]  # the same weights, and the schedule from its start


@pytest.mark.parametrize('schedule, shares', [('wsd', [0, 0, 0, 0.5, 1]), ('cosine', [0, 0.1464466, 0.5, 0.8535534, 1])])
def test_schedules(schedule, shares, tiny_data, tmp_path):
    """Warm-up over 4 steps; then from step 4 to 20, of whose last 8 wsd decays in, given at every quarter. Muon's rate goes along."""
    args = '--max_iters=23', '--warmup_iters=4', '--lr_decay_iters=20', f'--schedule={schedule}', '--learning_rate=1e-3', '--min_lr=1e-4'
    train(tiny_data, tmp_path, *args, '--cooldown=0.4', '--optimizer=muon', '--muon_lr=0.02')
    rates = [rate for _, rate in losses_of(tmp_path, 'lr')]
    assert rates[:4] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4])
    assert rates[4:21:4] == pytest.approx([1e-3 - 9e-4 * share for share in shares], rel=1e-5)
    assert rates[20:] == pytest.approx([1e-4] * 3)
    if schedule == 'wsd':
        assert rates[12:21] == pytest.approx([1e-3 - 9e-4 * i / 8 for i in range(9)])
    groups = load_checkpoint(str(tmp_path / 'ckpt.pt'))['optimizer']['param_groups']
    assert [group['lr'] for group in groups] == pytest.approx([1e-4, 1e-4, 0.002])


def test_depth_alone(tiny_data, tmp_path):
    """n_embd=0 and n_head=0: 64 channels a layer and a head, learning rates for that width, Muon's as it is."""
    train(tiny_data, tmp_path, '--max_iters=1', '--n_layer=3', '--n_embd=0', '--n_head=0', '--decay_lr=False', '--learning_rate=1e-3', '--min_lr=1e-4',
          *QWEN3, '--n_kv_head=0', '--muon_lr=0.03')
    checkpoint = load_checkpoint(str(tmp_path / 'ckpt.pt'))
    expected = {'n_embd': 192, 'n_head': 3, 'n_kv_head': 3, 'head_size': 64, 'n_inner': 512}  # 8/3 * 192
    assert expected == {key: checkpoint['model_args'][key] for key in expected} == {key: checkpoint['config'][key] for key in expected}
    assert [checkpoint['config'][key] for key in ('learning_rate', 'min_lr')] == pytest.approx([2e-3, 2e-4])  # (768 / 192)**0.5 = 2
    assert [group['lr'] for group in checkpoint['optimizer']['param_groups']] == pytest.approx([2e-3, 2e-3, 0.03])
    train(tiny_data, tmp_path, '--max_iters=2', '--init_from=resume', '--n_embd=0', '--n_head=0', '--decay_lr=False', '--learning_rate=1e-3', '--optimizer=muon', '--muon_lr=0.03',
          tiny=TINY_LOADED)
    assert [rate for _, rate in losses_of(tmp_path, 'lr')] == pytest.approx([2e-3, 2e-3])  # by the checkpoint's width


@pytest.mark.parametrize('tied', [True, False])
def test_as_many_steps_as_parameters_want(tied, tiny_data, tmp_path):
    """max_iters=-1 sees 20 tokens per parameter, and lr_decay_iters=-1 decays until then."""
    train(tiny_data, tmp_path, '--n_layer=1', '--n_embd=8', '--batch_size=32', '--max_iters=-1', '--lr_decay_iters=-1', '--min_lr=0.0', f'--tied={tied}')
    steps = math.ceil(20 * (12 * 8 * 8 + 3 * 8 + 17 * 8) / (32 * 32))  # matrices, gains and the head
    assert [step for step, _ in losses_of(tmp_path)] == list(range(steps))
    config = load_checkpoint(str(tmp_path / 'ckpt.pt'))['config']
    assert config['max_iters'] == config['lr_decay_iters'] == steps
    assert losses_of(tmp_path, 'lr')[-1][1] == pytest.approx(1e-3 * (1 + math.cos(math.pi * (steps - 1) / steps)) / 2, rel=1e-4)


def test_a_folder_without_validation_trains(tiny_data, tmp_path):
    make_dataset(tmp_path / 'data', tiny_data / 'input.txt', val_fraction=0.0)
    out = train(tmp_path / 'data', tmp_path / 'out')
    assert 'val loss' not in out and (tmp_path / 'out' / 'ckpt.pt').exists() and not (tmp_path / 'out' / 'best.pt').exists()


def test_bf16_on_the_cpu_is_close_to_fp32(tiny_data, tmp_path):
    train(tiny_data, tmp_path / 'a', '--max_iters=20')
    train(tiny_data, tmp_path / 'b', '--max_iters=20', '--dtype=bfloat16')
    a, b = ([x for _, x in losses_of(tmp_path / name)] for name in 'ab')
    assert a != b and a == pytest.approx(b, abs=0.03)


def test_compile_falls_back(tiny_data, tmp_path, monkeypatch):
    def broken(model):
        raise RuntimeError('no compiler')
    monkeypatch.setattr(torch, 'compile', broken)
    out = train(tiny_data, tmp_path / 'a', '--compile=True')
    assert out.count('torch.compile does not work here') == 1
    train(tiny_data, tmp_path / 'b')
    assert losses_of(tmp_path / 'a') == losses_of(tmp_path / 'b')


def test_nonsense_is_not_compiled(tiny_data, tmp_path, monkeypatch):
    """A compiled network without finite gradients is left alone, and so is what PyTorch is known to compile wrongly."""
    class Broken(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, *batch):
            return self.model(*batch) * float('nan')
    monkeypatch.setattr(torch, 'compile', Broken)
    out = train(tiny_data, tmp_path / 'a', '--compile=True')
    assert out.count('gradients are not finite') == 1 and 'best validation loss' in out
    out = train(tiny_data, tmp_path / 'b', '--compile=True', '--dtype=bfloat16', '--rope_theta=10000', '--head_size=64', '--max_iters=1')
    assert out.count('not compiled') == 1 and 'not finite' not in out


@pytest.mark.slow
@pytest.mark.parametrize('settings, apart', [((), 1e-5), (('--dtype=bfloat16', '--dropout=0.2'), 0.02)], ids=['fp32', 'bf16-dropout'])
def test_compile_gives_the_same_losses(settings, apart, tiny_data, tmp_path):
    torch._dynamo.reset()  # what other tests compiled for other shapes would make a difference
    graphs = torch._dynamo.utils.counters['stats']['unique_graphs']
    out = train(tiny_data, tmp_path / 'a', '--compile=True', *settings)
    if 'does not work here' in out:
        pytest.skip('no compiler here')
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] - graphs == 1  # tried out with a batch like those that follow
    train(tiny_data, tmp_path / 'b', *settings)
    assert [x for _, x in losses_of(tmp_path / 'a')] == pytest.approx([x for _, x in losses_of(tmp_path / 'b')], abs=apart)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_cuda(dtype, tiny_data, tmp_path):
    train(tiny_data, tmp_path / 'cpu', '--max_iters=10')
    train(tiny_data, tmp_path / 'gpu', '--max_iters=10', '--device=cuda', f'--dtype={dtype}')
    cpu, gpu = ([x for _, x in losses_of(tmp_path / name)] for name in ('cpu', 'gpu'))
    assert cpu == pytest.approx(gpu, abs=2e-3 if dtype == 'float32' else 5e-2)


def test_wandb_goes_offline_without_a_login(tiny_data, tmp_path, monkeypatch):
    pytest.importorskip('wandb')
    for name in ('WANDB_MODE', 'WANDB_API_KEY'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('NETRC', str(tmp_path / 'nobody'))
    out = train(tiny_data, tmp_path, '--wandb_log=True')
    assert 'offline' in out
    [file] = tmp_path.glob('wandb/offline-run*/*.wandb')
    deadline = time.time() + 30
    while file.stat().st_size <= 1000:  # wandb's own process writes it, on a busy machine a moment later
        assert time.time() < deadline
        time.sleep(0.1)


def test_tensorboard(tiny_data, tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train(tiny_data, tmp_path, '--tensorboard_log=True')
    events = EventAccumulator(str(tmp_path / 'tensorboard')).Reload()
    assert [(e.step, pytest.approx(e.value, abs=1e-5)) for e in events.Scalars('loss')] == losses_of(tmp_path)


def test_known_peaks():
    assert known_peak('NVIDIA H100 80GB HBM3') == 989e12
    assert known_peak('NVIDIA H100 PCIe') == 756e12
    assert known_peak('NVIDIA A100-SXM4-80GB') == 312e12
    assert known_peak('NVIDIA L4') == 121e12
    assert known_peak('NVIDIA L40S') == 362e12
    assert known_peak('NVIDIA GeForce RTX 4090') == 165e12
    for unknown in ('NVIDIA L40', 'NVIDIA GeForce RTX 4090 Laptop GPU', 'NVIDIA GeForce GTX 1080'):
        assert known_peak(unknown) is None


def test_a_gpu_sized_run_on_a_cpu_is_announced(tiny_data, tmp_path):
    out = run_script('train.py', *TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path}', '--max_iters=100000000', '--learning_rate=1e30').out  # which stops
    assert re.search(r'about [\d,]+ hours', out) and 'train_shakespeare_char_cpu.py' in out


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


def test_a_new_run_in_an_old_folder_is_not_mistaken_for_the_old_one(tiny_data, tmp_path):
    train(tiny_data, tmp_path, '--always_save_checkpoint=False')
    assert load_checkpoint(str(tmp_path / 'best.pt'))['model_args']['n_embd'] == 32
    bad = '--always_save_checkpoint=False', '--n_embd=16', '--learning_rate=0.1', '--decay_lr=False'
    train(tiny_data, tmp_path, *bad)
    for name in ('ckpt.pt', 'best.pt'):
        assert load_checkpoint(str(tmp_path / name))['model_args']['n_embd'] == 16
    best = load_checkpoint(str(tmp_path / 'best.pt'))
    assert dict(losses_of(tmp_path, 'val_loss'))[best['iter_num']] == pytest.approx(best['best_val_loss'], abs=1e-5)


@pytest.mark.parametrize('device', ['cpu:x', 'gpu', 'cuda:x'])
def test_an_odd_device_is_refused(device, tiny_data, tmp_path):
    result = run_script('train.py', *TINY, f'--dataset={tiny_data}', f'--out_dir={tmp_path}', f'--device={device}')
    assert result.code == 1 and result.err.startswith(f'device={device}: expected')


@pytest.mark.parametrize('name', sorted(path.name for path in (ROOT / 'config').glob('train_*.py')))
def test_every_config_trains(name, tiny_data, tmp_path):
    """And what a laptop lays over it comes after it; both with their sizes cut."""
    for overlay in ([], ['config/laptop.py']):
        args = [f'config/{name}', *overlay, *TINY, '--max_iters=1', '--wandb_log=False', f'--dataset={tiny_data}', f'--out_dir={tmp_path / "out"}']
        result = run_script('train.py', *args)
        assert result.code == 0 and 'step 1: train loss' in result.out, result.err


def test_samples_are_whole_characters(tmp_path):
    """Of a network that knows nothing and a vocabulary that is mostly bytes: it would write broken characters, and may not."""
    text = '满纸荒唐言，一把辛酸泪。都云作者痴，谁解其中味？🙂\n' * 30
    (tmp_path / 'input.txt').write_text(text, encoding='utf-8')
    make_dataset(tmp_path / 'd', str(tmp_path / 'input.txt'), tokenizer='bbpe', vocab_size=270)
    train(tmp_path / 'd', tmp_path / 'out', '--max_iters=1')
    for number in (1, 3):
        result = run_script('sample.py', f'--out_dir={tmp_path / "out"}', '--device=cpu', '--start=满纸', f'--num_samples={number}',
                            '--max_new_tokens=60', '--temperature=1.5')
        sample = result.out[result.out.index('满纸'):]
        assert result.code == 0 and '\ufffd' not in sample and len(sample) > 20 * number, result.err
