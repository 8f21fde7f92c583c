"""The network against its formulas, written down plainly. Against transformers: test_huggingface.py."""
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from core.device import try_compile
from model import GPT, GPTConfig, rotary, rotate

TINY = {'block_size': 16, 'vocab_size': 97, 'n_layer': 3, 'n_head': 4, 'n_embd': 32}
QWEN3 = {**TINY, 'bias': False, 'activation': 'swiglu', 'norm': 'rmsnorm', 'rope_theta': 1e4, 'qk_norm': True,
         'n_kv_head': 2, 'head_size': 12}
STYLES = pytest.mark.parametrize('style', [
    pytest.param(TINY, id='gpt2'),
    pytest.param({**TINY, 'tied': False}, id='gpt2, untied'),
    pytest.param(QWEN3, id='qwen3'),
    pytest.param({**QWEN3, 'tied': False}, id='qwen3, untied'),
])
AND_WINDOWS = pytest.mark.parametrize('style', [*STYLES.args[1], pytest.param({**QWEN3, 'window': 5}, id='windows')])


def plain_loss(state, idx, targets, n_layer, n_head, bias=True):
    """Return GPT-2's mean loss, computed head by head from the state dict alone."""
    def norm(x, name):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (var + 1e-5).sqrt() * state[f'{name}.weight'] + (state[f'{name}.bias'] if bias else 0)

    def linear(x, name):
        return x @ state[f'{name}.weight'].T + (state[f'{name}.bias'] if bias else 0)
    B, T = idx.shape
    x = state['transformer.wte.weight'][idx] + state['transformer.wpe.weight'][torch.arange(T)]
    for i in range(n_layer):
        block = f'transformer.h.{i}'
        q, k, v = linear(norm(x, f'{block}.ln_1'), f'{block}.attn.c_attn').chunk(3, dim=-1)
        heads = []
        for qh, kh, vh in zip(*(z.chunk(n_head, dim=-1) for z in (q, k, v))):
            scores = qh @ kh.transpose(1, 2) / math.sqrt(qh.shape[-1])
            allowed = torch.arange(T)[:, None] >= torch.arange(T)[None, :]
            weights = scores.exp() * allowed
            heads.append(weights / weights.sum(-1, keepdim=True) @ vh)
        x = x + linear(torch.cat(heads, -1), f'{block}.attn.c_proj')
        h = linear(norm(x, f'{block}.ln_2'), f'{block}.mlp.c_fc')
        x = x + linear(0.5 * h * (1 + torch.erf(h / math.sqrt(2))), f'{block}.mlp.c_proj')
    logits = norm(x, 'transformer.ln_f') @ state['lm_head.weight'].T
    return -torch.log_softmax(logits, -1).gather(-1, targets[..., None]).mean()


@pytest.mark.parametrize('bias', [True, False])
def test_loss_and_gradients_are_those_of_the_formulas(bias):
    torch.manual_seed(1)
    model = GPT(GPTConfig(**TINY, bias=bias))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)  # so that no bias is 0 and no gain is 1
    idx, targets = random_batch(97, B=5)
    loss = model(idx, targets).mean()
    loss.backward()
    state = {key: value.detach().clone().requires_grad_() for key, value in model.state_dict().items()}
    state['lm_head.weight'] = state['transformer.wte.weight']  # tied
    expected = plain_loss(state, idx, targets, 3, 4, bias)
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, state[name].grad, atol=1e-5, rtol=1e-4)


def test_state_dict_has_nanogpts_names():
    expected = {'transformer.wte.weight', 'transformer.wpe.weight', 'transformer.ln_f.weight', 'transformer.ln_f.bias',
                'lm_head.weight'}
    for i in range(3):
        for part in ('ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj'):
            expected |= {f'transformer.h.{i}.{part}.weight', f'transformer.h.{i}.{part}.bias'}
    assert set(GPT(GPTConfig(**TINY)).state_dict()) == expected


def test_rotary_positions():
    """
    Against complex numbers: channels i and i + hs / 2 are the real and imaginary part of one number, and position t
    rotates it by t * theta**(-2i / hs).
    """
    x = torch.randn(2, 3, 50, 12)
    y = rotate(x, rotary(50, 12, 100.0, 'cpu'))
    angles = torch.arange(50.0, dtype=torch.float64)[:, None] * 100.0 ** (-torch.arange(0, 6, dtype=torch.float64) / 6)
    expected = torch.complex(*x.double().chunk(2, -1)) * torch.exp(1j * angles)
    torch.testing.assert_close(y, torch.cat([expected.real, expected.imag], -1).float(), atol=1e-5, rtol=0)


def losses_and_gradients(model, idx, targets, seed=0):
    """Return {'losses': of one step in training mode, name: gradient of each parameter}."""
    torch.manual_seed(seed)
    model.train().zero_grad()
    losses = model(idx, targets)
    losses.mean().backward()
    return {'losses': losses.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def random_batch(vocab_size, B=4, T=16):
    idx, targets = torch.randint(vocab_size, (2, B, T))
    return idx, targets


@AND_WINDOWS
def test_gradient_checkpointing(style):
    """Each block is computed twice, with the same dropout: the same losses and gradients."""
    model = GPT(GPTConfig(**style, dropout=0.2))
    calls = []
    for block in model.transformer.h:
        block.register_forward_pre_hook(lambda *args: calls.append(1))
    idx, targets = random_batch(97)
    saved = losses_and_gradients(model, idx, targets)
    assert len(calls) == 3
    assert not torch.equal(saved['losses'], losses_and_gradients(model, idx, targets, seed=1)['losses'])
    calls.clear()
    model.gradient_checkpointing = True
    recomputed = losses_and_gradients(model, idx, targets)
    assert len(calls) == 6
    for name in saved:
        torch.testing.assert_close(saved[name], recomputed[name], atol=1e-7, rtol=1e-5)


@AND_WINDOWS
def test_counts(style):
    """The number of parameters against their sum by hand, and of operations against those that torch counts."""
    model = GPT(GPTConfig(**style))
    C, V = 32, 97
    if 'qk_norm' in style:
        inner = 128  # 8/3 * 32, rounded up to a multiple of 64
        matrices = C * (4 + 2 + 2 + 4) * 12 + 3 * C * inner
        vectors = 3 * (2 * C + 2 * 12) + C
    else:
        matrices = 12 * C * C
        vectors = 3 * (4 * C + 9 * C) + 2 * C  # gains and biases
    assert model.num_params(lookups=False) == 3 * matrices + vectors + V * C
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        losses_and_gradients(model, *random_batch(97))
    skipped = sum(12 * 4 * model.config.head_size * (16 - window) for window in model.config.windows() if window)
    assert model.flops_per_token() == counter.get_total_flops() / 64 + 6 * vectors - skipped


@STYLES
def test_crop_block_size(style):
    model = GPT(GPTConfig(**style)).eval()
    idx = torch.randint(97, (2, 8))
    before = model(idx)
    model.crop_block_size(8)
    torch.testing.assert_close(model(idx), before)
    with pytest.raises(AssertionError, match='block_size=8'):
        model(torch.randint(97, (2, 9)))


def test_masked_targets_cost_nothing():
    model = GPT(GPTConfig(**TINY))
    targets = torch.randint(97, (2, 8))
    targets[0, 3:] = -1
    loss = model(torch.randint(97, (2, 8)), targets)
    assert (loss[0, 3:] == 0).all()
    assert (loss[1] > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize('style, packed', [
    (TINY, False), (QWEN3, True), ({**TINY, 'window': 5}, False), ({**QWEN3, 'window': 5}, True)])
def test_compiled_gradients(style, packed):
    """The gradients of the compiled model equal those of the model itself. packed: with several documents in a row."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = GPT(GPTConfig(**style))
    batch = random_batch(97)
    if packed:
        batch = (*batch, torch.arange(16).expand(4, 16) // 5)
    env = SimpleNamespace(device='cpu', device_type='cpu', dtype='float32', ctx=nullcontext, ddp=False)
    compiled = try_compile(model, [(4, 16)], env, packed)
    if compiled is model:
        pytest.skip('no compiler here')
    gradients = []
    for network in (model, compiled):
        model.zero_grad()
        network(*batch).mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for expected, found in zip(*gradients):
        torch.testing.assert_close(expected, found, atol=1e-6, rtol=1e-4)
