"""core/estimates.py: peaks of GPUs, memory."""
import contextlib
from types import SimpleNamespace

import pytest
import torch
from conftest import exit_line

from core import estimates
from core.device import shapes_only
from core.estimates import check_memory, known_peak, largest_batch, training_memory
from core.training.averaging import Average
from core.training.optimizer import configure_optimizer
from model import GPT, GPTConfig

STYLES = {
    'gpt2': {},
    'qwen3': {'bias': False, 'activation': 'swiglu', 'norm': 'rmsnorm', 'rope_theta': 1e4, 'qk_norm': True,
              'tied': False},
}
ROWS, T = 2, 128


def new_model(style, vocab_size=1000):
    return GPT(GPTConfig(block_size=T, vocab_size=vocab_size, n_layer=3, n_head=4, n_embd=128, **STYLES[style]))


def env(dtype, device_type='cpu'):
    return SimpleNamespace(device=device_type, device_type=device_type, dtype=dtype, sharded=False, world_size=1)


@pytest.mark.parametrize('name, tflops', [  # as torch.cuda.get_device_name() gives them
    ('NVIDIA H100 80GB HBM3', 989),
    ('NVIDIA H100 PCIe', 756),
    ('NVIDIA H100 NVL', 835),
    ('NVIDIA H200', 989),
    ('NVIDIA H200 NVL', 835),
    ('NVIDIA GH200 480GB', 989),
    ('NVIDIA H800', 989),
    ('NVIDIA H800 PCIe', 756),
    ('NVIDIA H20', 148),
    ('NVIDIA H20-3e', 148),
    ('NVIDIA B200', 2250),
    ('NVIDIA GB200', 2500),
    ('NVIDIA B300 SXM6 AC', 2250),
    ('NVIDIA GB300', 2500),
    ('NVIDIA A100-SXM4-80GB', 312),
    ('NVIDIA A100 80GB PCIe', 312),
    ('NVIDIA A800-SXM4-80GB', 312),
    ('NVIDIA A10', 125),
    ('NVIDIA A10G', 70),
    ('NVIDIA L4', 121),
    ('NVIDIA L40S', 362),
    ('Tesla T4', 65),
    ('Tesla V100-SXM2-32GB', 125),
    ('NVIDIA RTX A6000', 155),
    ('NVIDIA RTX PRO 6000 Blackwell Workstation Edition', 504),
    ('NVIDIA GeForce RTX 4090', 165),
    ('AMD Instinct MI300X OAM', 1307),
    ('NVIDIA L40', None),
    ('NVIDIA GeForce RTX 4090 Laptop GPU', None),
    ('NVIDIA GeForce RTX 4090 D', None),
    ('NVIDIA A100-SXM4-40GB MIG 1g.5gb', None),
    ('NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition', None),
    ('NVIDIA GeForce GTX 1080', None),
])
def test_known_peaks(name, tflops):
    assert known_peak(name) == (tflops and tflops * 1e12)


def saved_bytes(model, dtype):
    """Return the bytes that a forward pass keeps for the backward pass, beside the parameters."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # so that its address is not used again
        return tensor
    autocast = contextlib.nullcontext() if dtype == 'float32' else torch.autocast('cpu', getattr(torch, dtype))
    idx = torch.randint(model.config.vocab_size, (ROWS, T))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        model(idx, idx).mean()
    for p in model.parameters():
        kept.pop(p.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('style', STYLES)
def test_activations(style, dtype):
    """A lower bound, near what is kept in fp32. In bf16 norms and attention keep more on a CPU than on a GPU."""
    model = new_model(style)
    _, estimate = training_memory(model, ROWS, T, env(dtype))
    actual = saved_bytes(model, dtype)
    if dtype == 'bfloat16':
        actual -= 2 * model.num_params(lookups=False)  # autocast's copies, counted with the weights
    assert (0.75 if dtype == 'float32' else 0.5) * actual < estimate < actual


@pytest.mark.parametrize('style', STYLES)
def test_checkpointed_activations(style):
    """The inputs of all blocks, and what one block keeps."""
    model = new_model(style)
    _, plain = training_memory(model, ROWS, T, env('float32'))
    model.gradient_checkpointing = True
    _, estimate = training_memory(model, ROWS, T, env('float32'))
    assert 3 * ROWS * T * 128 * 4 < estimate < plain / 2


def test_logits_of_a_large_vocabulary():
    """They are counted up to the size that TokenLosses saves, which is larger on CUDA."""
    def activations(vocab_size, rows, device_type='cpu'):
        with shapes_only():
            model = new_model('gpt2', vocab_size)
        return training_memory(model, rows, T, env('float32', device_type))[1]
    assert activations(50304, 8) - activations(304, 8) == 8 * T * 50000 * 4
    assert activations(50304, 800) - activations(304, 800) == 2**30 - 800 * T * 304 * 4
    assert activations(50304, 800, 'cuda') - activations(50304, 800) == 3 * 2**30


@pytest.mark.parametrize('style', STYLES)
def test_weights(style):
    """Parameters, gradients, AdamW's state and averaged weights, exactly."""
    model = new_model(style)
    weights, _ = training_memory(model, ROWS, T, env('float32'))
    state = configure_optimizer(model, 'adamw', 0.1, 1e-3, (0.9, 0.95)).state
    moments = sum(value.nbytes for values in state for name, value in values.items() if name != 'step')
    assert weights == 2 * sum(p.nbytes for p in model.parameters()) + moments
    averages = sum(average.nbytes for _, average in Average(model, 0.1).pairs)
    assert training_memory(model, ROWS, T, env('float32'), ema=0.1)[0] == weights + averages


def test_largest_batch(monkeypatch):
    """80 GB, of which others use 8 and this process has reserved 12: 0.95 * 72 - 8 are left for rows of 0.5 GB."""
    gb = 2**30
    monkeypatch.setattr('torch.cuda.mem_get_info', lambda: (60 * gb, 80 * gb))
    monkeypatch.setattr('torch.cuda.memory_reserved', lambda: 12 * gb)
    assert largest_batch(4, 8 * gb, 10 * gb) == 120
    assert largest_batch(4, 100 * gb, 110 * gb) == 0
    assert largest_batch(4, 8 * gb, 0) is None  # nothing was measured


@pytest.mark.parametrize('rows, advice', [(2, '--batch_size'), (0, '--n_layer')])
def test_check_memory(rows, advice, monkeypatch):
    """Refuse what cannot fit; if only the activations are too large, fewer rows would."""
    model = new_model('qwen3')
    weights, activations = training_memory(model, 2, T, env('float32'))
    for room, fits in ((weights + activations, True), (weights + rows / 2 * activations - 1, False)):
        monkeypatch.setattr(estimates, 'total_memory', lambda env, room=room: room)
        if fits:
            check_memory(model, 2, T, env('float32'))
        else:
            assert f'; lower {advice} ' in exit_line(check_memory, model, 2, T, env('float32'))
