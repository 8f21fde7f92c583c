"""
The CUDA path without a GPU: scripts with --device=cuda on a pretended GPU (pretended_gpu.py, in a process of its own).
A run fails where devices or dtypes mix, and where the host waits for the GPU more often than MAX_WAITS says.
"""
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from chat_models import CHARS, TOKENIZERS, save_model, save_short
from conftest import ROOT, TINY, TINY_LOADED, losses_of, run_script, write
from pretended_gpu import UNSUPPORTED
from test_objectives import base, folder, stage  # noqa: F401  # fixtures

# How often the host may wait for the GPU. Lower a number when the code gets better.
MAX_WAITS = {
    # in a training step
    'train': 1,
    'train without lines': 0,  # as printed at each log_interval
    'sft': 1,
    'reward': 1,
    'dpo': 1,
    'grpo': 8,
    'distill': 9,  # all but one in the sampling loop
    'distill from the data': 1,
    # for a token
    'sample': 0.07,  # they are read in blocks of 16
    'sample with top_p': 0.07,
    'sample with logprobs': 0.07,
    'sample bytes': 0.07,
    'chat': 0.07,
}
STYLES = {
    'gpt2': [],
    'qwen3': ['--rope_theta=1e4', '--norm=rmsnorm', '--activation=swiglu', '--qk_norm=True', '--n_kv_head=1',
              '--tied=False'],
}


@pytest.fixture(scope='module')
def gpu():
    """gpu(script, *args): run a script on the pretended GPU. Returns code, out, err and waits {'file:line what': n}."""
    if sys.platform != 'linux':
        pytest.skip('the pretended GPU needs PyTorch for Linux')
    process = subprocess.Popen(
        [sys.executable, str(ROOT / 'tests' / 'pretended_gpu.py')], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, encoding='utf-8', env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONUTF8': '1'})

    def answer():
        return json.loads(process.stdout.readline() or f'"status {process.wait()}"')

    def run(script, *args):
        process.stdin.write(json.dumps([script, *map(str, args), '--device=cuda']) + '\n')
        process.stdin.flush()
        result = answer()
        assert isinstance(result, dict), f'the process of the pretended GPU has ended: {result}'
        return SimpleNamespace(**result)

    try:
        reason = answer()
        if reason and (process.wait() == UNSUPPORTED or process.returncode < 0):  # below 0: a signal, in PyTorch's C++
            pytest.skip(f'PyTorch {torch.__version__} cannot pretend to have a GPU: {reason}')
        assert not reason, reason
        yield run
    finally:
        process.stdin.close()
        process.wait()


def run_twice(gpu, name, setting, n, script, *args):
    """
    Run a script with n and with 2 n steps, and check the waits per step: the difference does not depend on set-up.
    setting: the name of the setting that gives the number of steps. Returns what the longer run returns.
    """
    short, long = (gpu(script, *args, f'--{setting}={steps}') for steps in (n, 2 * n))
    for result in (short, long):
        assert result.code == 0, result.err
    per_step = {place: (count - short.waits.get(place, 0)) / n for place, count in long.waits.items()}
    per_step = {place: count for place, count in per_step.items() if count}
    assert sum(per_step.values()) <= MAX_WAITS[name], per_step
    return long


def succeed(result):
    assert result.code == 0, result.err
    return result


@pytest.fixture(autouse=True)
def muon_in_bf16(monkeypatch):
    """On CPUs too, to compare."""
    monkeypatch.setattr('core.training.optimizer.fast_bf16_cpu', lambda: True)


def each(*values):
    """Return pytest's parameters for these values, words of text. Those without a '*' at the end are slow tests."""
    return [pytest.param(*value.strip('*').split(), id=value.strip('*'),
                         marks=() if value.endswith('*') else pytest.mark.slow) for value in values]


# ----------------------------------------------------------------------------- the pretended GPU

CODE = """
import threading, torch
x = torch.ones(4, device='cuda')
"""
COUNTS = {  # Python: how often the host waits, or part of the error
    'x + x': 0,
    'x[0].item()': 1,
    'x.tolist()': 1,
    'bool(x.any())': 1,
    'x.nonzero()': 1,
    'x[x > 0]': 1,
    'x[x > 0] = 0': 0,
    'x[torch.tensor([0, 1])]': 1,
    'x[torch.tensor([0, 1], device="cuda")]': 1,  # of a list, which is copied
    'torch.arange(4, device="cuda").sum()': 0,
    'torch.tensor(1.0, device="cuda")': 1,
    'torch.tensor([x[0], x[1]])': 2,
    'x.cpu()': 1,
    'x.to("cpu", non_blocking=True)': 0,
    'torch.ones(4).to("cuda", non_blocking=True)': 1,
    'torch.ones(4).pin_memory().to("cuda")': 1,
    'torch.ones(4).pin_memory().to("cuda", non_blocking=True)': 0,
    'torch.ones(4, 4).pin_memory()[:, 1:].to("cuda", non_blocking=True)': 1,
    'torch.ones(4, 4)[:, 1:].pin_memory().to("cuda", non_blocking=True)': 1,  # pin_memory() keeps strides
    'x.copy_(torch.ones(4).pin_memory(), non_blocking=True)': 0,
    'torch.empty(4).copy_(x, non_blocking=True)': 1,
    'torch.empty(4, pin_memory=True).copy_(x, non_blocking=True)': 0,
    'y = x.to("cpu", non_blocking=True)\nassert y.isnan().all()': 0,  # not there yet
    'y = x.to("cpu", non_blocking=True)\nx.zero_()\ntorch.cuda.synchronize()\nassert y.tolist() == [1.0] * 4': 1,
    'torch.cuda.synchronize()': 1,
    'torch.cuda.Event().record()': 0,
    'torch.cuda.Event().synchronize()\ntorch.cuda.Event().synchronize()': 1,  # nothing was started in between
    'x + torch.tensor(1.0)': 0,
    'x + torch.ones(4)': 'same device',
    'x.numpy()': 'numpy() is not supported',
    'x.view(2, 2) @ x.view(2, 2).half()': 'same dtype',
    'x.index_copy_(0, torch.arange(1).to("cuda"), x[:1].half())': 'same dtype',
    """
def work():
    pinned.append(torch.ones(4).pin_memory())
    pinned[0].to('cuda').item()
pinned = []
thread = threading.Thread(target=work)
thread.start()
thread.join()
assert pinned[0].is_pinned() and not torch.ones(4).is_pinned()
pinned[0].to('cuda', non_blocking=True)
""": 0,
}


def test_what_waits_and_what_fails(gpu, tmp_path):
    for code, expected in COUNTS.items():
        result = gpu(write(tmp_path / 'code.py', CODE + code))
        if isinstance(expected, str):
            assert expected in result.err, (code, result.err)
        else:
            assert (result.code, sum(result.waits.values())) == (0, expected), (code, result)


# ----------------------------------------------------------------------------- training


@pytest.mark.parametrize('style, optimizer', each('gpt2 adamw*', 'qwen3 muon*', 'gpt2 muon', 'qwen3 adamw'))
def test_losses_are_those_of_the_cpu(gpu, style, optimizer, tiny_data, tmp_path):
    args = [*TINY, *STYLES[style], f'--optimizer={optimizer}', f'--dataset={tiny_data}', '--dropout=0.0', '--ema=0.2']
    succeed(run_script('train.py', *args, f'--out_dir={tmp_path / "cpu"}'))
    run_twice(gpu, 'train', 'max_iters', 2, 'train.py', *args, f'--out_dir={tmp_path / "gpu"}')
    for column in ('loss', 'grad_norm', 'val_loss', 'val_ema_loss'):
        expected = losses_of(tmp_path / 'cpu', column)
        assert losses_of(tmp_path / 'gpu', column) == [(step, pytest.approx(x, rel=1e-3)) for step, x in expected]


@pytest.mark.parametrize('dtype, style, optimizer', each(
    'bfloat16 gpt2 adamw', 'bfloat16 gpt2 muon', 'bfloat16 qwen3 adamw', 'bfloat16 qwen3 muon*',
    'float16 gpt2 adamw*', 'float16 gpt2 muon', 'float16 qwen3 adamw', 'float16 qwen3 muon'))
def test_precisions(gpu, dtype, style, optimizer, tiny_data, tmp_path):
    """16 bits, with dropout and samples; the losses are close to those in 32 bits."""
    args = [*TINY, *STYLES[style], f'--optimizer={optimizer}', f'--dataset={tiny_data}', '--dropout=0.1']
    args += ['--sample_interval=100', '--sample_tokens=4', f'--gradient_checkpointing={style == "qwen3"}']
    run_twice(gpu, 'train', 'max_iters', 2, 'train.py', *args, f'--dtype={dtype}', f'--out_dir={tmp_path}')
    (_, first), *_, (_, last) = losses_of(tmp_path, 'val_loss')
    assert last < first < 3


@pytest.mark.slow
def test_resume(gpu, tiny_data, tmp_path):
    """A resumed run ends with the weights and the loss scale of an uninterrupted one."""
    args = [*TINY, *STYLES['qwen3'], f'--dataset={tiny_data}', '--dtype=float16', '--dropout=0.1', '--ema=0.2']
    succeed(gpu('train.py', *args, '--max_iters=6', f'--out_dir={tmp_path / "one"}'))
    succeed(gpu('train.py', *args, '--max_iters=3', f'--out_dir={tmp_path / "two"}'))
    resumed = succeed(gpu('train.py', *args, '--max_iters=6', f'--out_dir={tmp_path / "two"}', '--init_from=resume'))
    assert 'at step 3' in resumed.out
    one, two = (torch.load(tmp_path / name / 'ckpt.pt', weights_only=True) for name in ('one', 'two'))
    assert all(torch.equal(one[part][key], two[part][key]) for part in ('model', 'ema') for key in one['model'])
    assert one['scaler'] == two['scaler'] and one['scaler']['scale'] > 1


@pytest.mark.slow
def test_no_line_no_wait(gpu, tiny_data, tmp_path):
    args = [*TINY, f'--dataset={tiny_data}', '--log_interval=100', '--gradient_accumulation_steps=2']
    args.append(f'--out_dir={tmp_path}')
    run_twice(gpu, 'train without lines', 'max_iters', 4, 'train.py', *args)


@pytest.mark.parametrize('name, dtype', each(
    'sft float32*', 'sft bfloat16', 'sft float16', 'reward float32', 'reward bfloat16', 'reward float16',
    'dpo float32', 'dpo bfloat16', 'dpo float16', 'grpo float32', 'grpo bfloat16', 'grpo float16',
    'distill float32', 'distill bfloat16', 'distill float16'))
def test_objectives(gpu, name, dtype, base, folder, tmp_path):  # noqa: F811
    """Packed documents, pairs and the model's own answers."""
    _, *args = stage(base, folder, name, '--dropout=0.0')
    run_twice(gpu, name, 'max_iters', 2, 'train.py', *args, f'--dtype={dtype}', f'--out_dir={tmp_path / "gpu"}')
    if dtype == 'float32':
        succeed(run_script('train.py', *args, f'--out_dir={tmp_path / "cpu"}'))
        for column in ('loss', 'val_loss'):
            expected = losses_of(tmp_path / 'cpu', column)
            assert losses_of(tmp_path / 'gpu', column) == [(step, pytest.approx(x, rel=1e-3)) for step, x in expected]


@pytest.mark.parametrize('dtype', each('float32*', 'bfloat16', 'float16'))
def test_distillation_from_the_data(gpu, dtype, tiny_run, tiny_data, tmp_path):
    """The teachers compute on the GPU, and the host does not wait for them."""
    args = [*TINY, '--objective=distill', f'--teachers={tiny_run}', f'--dataset={tiny_data}', f'--dtype={dtype}']
    run_twice(gpu, 'distill from the data', 'max_iters', 2, 'train.py', *args, f'--out_dir={tmp_path / "gpu"}')
    succeed(run_script('train.py', *args, '--dtype=float32', f'--out_dir={tmp_path / "cpu"}'))
    for column in ('loss', 'val_loss', 'val_kl'):
        expected = losses_of(tmp_path / 'cpu', column)
        found = losses_of(tmp_path / 'gpu', column)
        assert found == [(step, pytest.approx(x, rel=1e-3 if dtype == 'float32' else 0.05)) for step, x in expected]


@pytest.mark.slow
@pytest.mark.parametrize('style', STYLES)
def test_both_styles_learn_from_documents_and_answers(gpu, style, base, folder, tmp_path):  # noqa: F811
    sft = ['train.py', *TINY, *STYLES[style], f'--dataset={folder / "sft"}', '--sample_interval=2', '--sample_tokens=8']
    succeed(gpu(*sft, '--dtype=bfloat16', f'--out_dir={tmp_path / "sft"}'))
    _, *args = stage(base, folder, 'grpo', f'--init_from={tmp_path / "sft"}', f'--reference={tmp_path / "sft"}')
    succeed(gpu('train.py', *args, '--dtype=bfloat16', f'--out_dir={tmp_path / "grpo"}'))


@pytest.mark.slow
@pytest.mark.parametrize('quantize_base', ['', 'int8'])
def test_lora(gpu, quantize_base, tiny_run, tiny_data, tmp_path):
    args = [*TINY_LOADED, f'--init_from={tiny_run}', f'--dataset={tiny_data}', f'--quantize_base={quantize_base}']
    args += ['--lora_rank=4', '--dtype=bfloat16', '--sample_interval=100', '--sample_tokens=4']
    run_twice(gpu, 'train', 'max_iters', 2, 'train.py', *args, f'--out_dir={tmp_path}')
    succeed(gpu('sample.py', f'--out_dir={tmp_path}', '--num_samples=2', '--max_new_tokens=4'))


# ----------------------------------------------------------------------------- inference

SAMPLE = ['--num_samples=3', '--temperature=1.0', '--end_token=']


def sampled(result):
    return result.out.split('bytes\n')[1]


def test_sampling_writes_what_a_cpu_does(gpu, tiny_run):
    args = [*SAMPLE, f'--out_dir={tiny_run}', '--dtype=float32', '--start=one', '--start=seven']
    result = run_twice(gpu, 'sample', 'max_new_tokens', 32, 'sample.py', *args)  # beyond the context
    assert sampled(result) == sampled(run_script('sample.py', *args, '--max_new_tokens=64', '--device=cpu'))


@pytest.mark.slow
@pytest.mark.parametrize('name, args', [
    ('sample with top_p', ['--top_p=0.9', '--top_k=0', '--repetition_penalty=1.2']),
    ('sample with logprobs', ['--logprobs=True']),
])
def test_sampling_settings(gpu, name, args, tiny_run):
    args = [*SAMPLE, f'--out_dir={tiny_run}', '--start=one', *args]
    result = run_twice(gpu, name, 'max_new_tokens', 32, 'sample.py', *args, '--dtype=float32')
    expected = sampled(run_script('sample.py', *args, '--max_new_tokens=64', '--device=cpu'))
    number = r'-\d+\.\d{4}'  # log-probabilities, whose last digit is rounded
    assert re.sub(number, '', sampled(result)) == re.sub(number, '', expected)
    logps, expected_logps = (list(map(float, re.findall(number, text))) for text in (sampled(result), expected))
    assert logps == pytest.approx(expected_logps, abs=2e-4)
    succeed(gpu('sample.py', *args, '--max_new_tokens=4', '--dtype=bfloat16'))


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('style', STYLES)
def test_sampling_a_bbpe_model(gpu, style, dtype, tmp_path):
    """Tokens that are parts of characters; prompts of different lengths are padded."""
    settings = {'norm': 'rmsnorm', 'rope_theta': 1e4, 'qk_norm': True, 'activation': 'swiglu', 'n_kv_head': 1}
    save_model(tmp_path / 'run', TOKENIZERS['bytes'], **settings if style == 'qwen3' else {})
    args = [f'--out_dir={tmp_path / "run"}', *SAMPLE, '--start=一', '--start=满纸荒唐言', f'--dtype={dtype}']
    result = run_twice(gpu, 'sample bytes', 'max_new_tokens', 32, 'sample.py', *args)
    if dtype == 'float32':
        assert sampled(result) == sampled(run_script('sample.py', *args, '--max_new_tokens=64', '--device=cpu'))


@pytest.mark.slow
def test_chat(gpu, tmp_path):
    save_short(tmp_path / 'short')
    save_model(tmp_path / 'endless', CHARS, block_size=128, end_logit=-30, rope_theta=1e4)
    args = ['--prompt=Hello', '--dtype=float32']
    reply = succeed(gpu('chat.py', f'--out_dir={tmp_path / "short"}', *args))
    on_cpu = run_script('chat.py', f'--out_dir={tmp_path / "short"}', *args, '--device=cpu')
    assert reply.out == on_cpu.out.replace("'cpu'", "'cuda'")
    run_twice(gpu, 'chat', 'max_new_tokens', 32, 'chat.py', f'--out_dir={tmp_path / "endless"}', '--prompt=Hello')


@pytest.mark.parametrize('dtype', ['float32', pytest.param('bfloat16,float16', marks=pytest.mark.slow)])
def test_evaluate(gpu, dtype, tiny_run):
    args = [f'--out_dir={tiny_run}', f'--dtype={dtype}', '--batch_size=30']
    result = succeed(gpu('evaluate.py', *args))
    losses, expected = (re.findall(r': loss ([\d.]+)', x.out) for x in (
        result, run_script('evaluate.py', *args, '--device=cpu')))
    assert len(losses) == len(expected) == dtype.count(',') + 1
    assert [*map(float, losses)] == pytest.approx([*map(float, expected)], abs=2e-4 if dtype == 'float32' else 0.02)
