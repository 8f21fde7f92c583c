"""The network against a plain re-statement of its formulas; against transformers' see test_huggingface.py."""
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import kernels as model_file
from core.device import try_compile
from kernels import attention
from model import GPT, GPTConfig, rotary, rotate

TINY = dict(block_size=16, vocab_size=97, n_layer=3, n_head=4, n_embd=32)
QWEN3 = dict(**TINY, bias=False, activation='swiglu', norm='rmsnorm', rope_theta=1e4, qk_norm=True, n_kv_head=2, head_size=12)
STYLES = pytest.mark.parametrize('style', [TINY, {**TINY, 'tied': False}, QWEN3, {**QWEN3, 'tied': False}], ids=['gpt2', 'gpt2, untied', 'qwen3', 'qwen3, untied'])


def restated_loss(state, idx, targets, n_layer, n_head, bias=True):
    """GPT-2's mean loss, written down head by head and position by position, from the state dict alone."""
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
            p.add_(torch.randn_like(p) * 0.1)  # so that no bias is zero and no gain one
    idx, targets = torch.randint(97, (5, 16)), torch.randint(97, (5, 16))
    loss = model(idx, targets).mean()
    loss.backward()
    state = {key: value.detach().clone().requires_grad_() for key, value in model.state_dict().items()}
    state['lm_head.weight'] = state['transformer.wte.weight']  # tied
    expected = restated_loss(state, idx, targets, 3, 4, bias)
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, state[name].grad, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f'{name}: {text}')


def test_state_dict_has_nanogpts_names():
    names = set(GPT(GPTConfig(**TINY)).state_dict())
    block = [f'{part}.{kind}' for part in ('ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj') for kind in ('weight', 'bias')]
    assert names == {'transformer.wte.weight', 'transformer.wpe.weight', 'transformer.ln_f.weight', 'transformer.ln_f.bias', 'lm_head.weight',
                     *(f'transformer.h.{i}.{part}' for i in range(3) for part in block)}


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('T', [5, 64, 512, 700])  # one block, two, and three, of which the weights are computed twice
def test_blockwise_attention_equals_the_fused_kernel(T, masked):
    """Values and gradients of the bf16 path on CPUs against fp32; of rows of several documents each, too."""
    torch.manual_seed(3)
    wide = [torch.randn(2, 3, T, 16, requires_grad=True) for _ in range(3)]
    narrow = [x.detach().bfloat16().requires_grad_() for x in wide]
    g = torch.randn(2, 3, T, 16)
    document = (torch.rand(3, T) < 0.05).cumsum(dim=1)
    mask = (document[:, :, None] == document[:, None]).tril() if masked else None  # (B, T, T)
    y = F.scaled_dot_product_attention(*wide, mask, is_causal=not masked)
    y.backward(g)
    z = attention(*narrow, mask=mask[:, None] if masked else None, blockwise=True)
    z.backward(g.bfloat16())
    for a, b in zip((y, *(x.grad for x in wide)), (z, *(x.grad for x in narrow))):
        assert (a - b.float()).norm() / a.norm() < 1e-2


@pytest.mark.parametrize('T', [5, 20, 40])
def test_dropout_in_attention(T, monkeypatch):
    """Values and gradients, in blocks of 16, against softmax, the same factors and a product, written out in fp64."""
    monkeypatch.setattr(model_file, 'ATTENTION_BLOCK', 16)
    torch.manual_seed(3)
    q, k, v, g = torch.randn(4, 1, 2, T, 8, dtype=torch.float64)
    factors, drawn = [], model_file.dropout_mask
    monkeypatch.setattr(model_file, 'dropout_mask', lambda x, p: factors.append(drawn(x, p)) or factors[-1])
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    y = attention(*inputs, dropout=0.5)
    whole = torch.cat([F.pad(x, (0, T - x.size(2))) for x in factors], dim=1)  # (2, T, T)
    assert set(whole.unique().tolist()) == {0.0, 2.0}
    again = [x.clone().requires_grad_() for x in (q, k, v)]
    scores = (again[0] @ again[1].transpose(2, 3) / 8**0.5).masked_fill(torch.ones(T, T).triu(1) > 0, float('-inf'))
    z = (scores.softmax(-1) * whole) @ again[2]
    for a, b in zip((y, *torch.autograd.grad(y, inputs, g)), (z, *torch.autograd.grad(z, again, g))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('p', [0.1, 0.2, 0.5])
def test_dropout(p):
    """As many numbers as asked for become zero, the mean stays, which ones depends on the seed alone, and the gradient is the same factors."""
    x = torch.ones(999, 1001, requires_grad=True)
    torch.manual_seed(1)
    y = model_file.dropout(x, p)
    y.sum().backward()
    assert abs((y == 0).float().mean() - p) < 0.002 + 1 / 512 and abs(y.mean() - 1) < 0.003
    assert torch.equal(x.grad, y) and len(y.unique()) == 2
    assert abs((y[:, :-1] * y[:, 1:]).mean() - 1) < 0.008 and abs((y[:-1] * y[1:]).mean() - 1) < 0.008  # neighbours are independent
    torch.manual_seed(1)
    assert torch.equal(model_file.dropout(x, p), y) and not torch.equal(model_file.dropout(x, p), y)
    assert model_file.dropout(x, 0.0) is x
    assert set(model_file.dropout_mask(torch.ones(10000), 0.999).unique().tolist()) == {0.0, 256.0}


def test_rotary_positions():
    """Against complex numbers: channels i and i + hs / 2 are the parts of one, which position t turns by t * theta**(-2i / hs)."""
    x = torch.randn(2, 3, 50, 12)
    y = rotate(x, rotary(50, 12, 100.0, 'cpu'))
    angles = torch.arange(50.0, dtype=torch.float64)[:, None] * 100.0 ** (-torch.arange(0, 6, dtype=torch.float64) / 6)
    expected = torch.complex(*x.double().chunk(2, -1)) * torch.exp(1j * angles)
    torch.testing.assert_close(y, torch.cat([expected.real, expected.imag], -1).float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize('blockwise', [False, True])
def test_grouped_queries(blockwise):
    """Query head h takes the keys and values of head h // 4: values and gradients against a loop over the heads."""
    torch.manual_seed(3)
    q, k, v = (torch.randn(n, 3, 16, 12, requires_grad=True) for n in (8, 2, 2))
    y = attention(q, k, v, blockwise=blockwise)
    z = torch.stack([F.scaled_dot_product_attention(q[h], k[h // 4], v[h // 4], is_causal=True) for h in range(8)])
    g = torch.randn_like(y)
    for a, b in zip((y, *torch.autograd.grad(y, (q, k, v), g)), (z, *torch.autograd.grad(z, (q, k, v), g))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def losses_and_gradients(model, idx, targets, seed=0):
    """Of one step in training mode, every number of them: {name: tensor}."""
    torch.manual_seed(seed)
    model.train().zero_grad()
    losses = model(idx, targets)
    losses.mean().backward()
    return {'losses': losses.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def batch(vocab_size, B=4, T=16):
    idx, targets = torch.randint(vocab_size, (2, B, T))
    return idx, targets


HEAD = {'whole': {}, 'in parts': {'LOGITS_AT_ONCE': 7 * 97 + 5}, 'twice': {'LOGITS_AT_ONCE': 7 * 97 + 5, 'MAX_SAVED_BYTES': 20 * 97 * 4}}


@STYLES
@pytest.mark.parametrize('autocast', [False, True], ids=['fp32', 'bf16'])
@pytest.mark.parametrize('limits', HEAD.values(), ids=HEAD)
def test_losses_against_cross_entropy(style, autocast, limits, monkeypatch):
    """64 tokens, some masked, each with a factor of its own: the losses and gradients of F.cross_entropy on the logits, however they are computed."""
    for name, limit in limits.items():
        monkeypatch.setattr(model_file, name, limit)
    torch.manual_seed(6)
    model = GPT(GPTConfig(**style))
    idx, targets = batch(97)
    targets[1, 3:12] = -1
    factors = torch.rand(targets.shape)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        losses = model(idx, targets)
        expected = F.cross_entropy(model(idx).float().flatten(0, 1), targets.flatten(), ignore_index=-1, reduction='none').view(targets.shape)
    assert (losses[1, 3:12] == 0).all() and losses.dtype == torch.float32
    assert (losses - expected).norm() <= (1e-4 if autocast else 1e-6) * expected.norm()
    gradients, wanted = (torch.autograd.grad((x * factors).sum(), list(model.parameters())) for x in (losses, expected))
    for a, b in zip(gradients, wanted):
        assert (a - b).norm() <= (1e-2 if autocast else 2e-6) * b.norm()


def test_a_loss_beyond_the_smallest_probability():
    """exp(-300) is 0 in fp32, the loss still 300."""
    x, weight = torch.eye(2), torch.tensor([[300.0, 0.0], [0.0, 1.0]])
    assert model_file.TokenLosses.apply(x, weight, torch.tensor([1, 1])).tolist() == pytest.approx([300.0, 0.3132617])


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation returns, and of the largest in fp32."""
    numel = fp32 = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
                self.fp32 = max(self.fp32, x.numel() * (x.dtype == torch.float32))
        return result


@pytest.mark.parametrize('kept', [True, False])
def test_never_all_logits_in_fp32(kept, monkeypatch):
    """In the forward pass and in the backward pass: of 64 tokens, 4 at a time; and where keeping their gradients in bf16 is too much, not even these."""
    monkeypatch.setattr(model_file, 'LOGITS_AT_ONCE', 4 * 1000)
    if not kept:
        monkeypatch.setattr(model_file, 'MAX_SAVED_BYTES', 8 * 1000 * 2)
    model = GPT(GPTConfig(**{**TINY, 'vocab_size': 1000}))
    with Largest() as seen, torch.autocast('cpu', torch.bfloat16):
        losses_and_gradients(model, *batch(1000))
    assert seen.fp32 == 1000 * 32  # the embedding
    assert seen.numel == (64 * 1000 if kept else 1000 * 32)


@STYLES
def test_gradient_checkpointing(style):
    """Each block is computed twice, with the same dropout: the same losses and gradients."""
    model = GPT(GPTConfig(**style, dropout=0.2))
    model.gradient_checkpointing, calls = False, []
    for block in model.transformer.h:
        block.register_forward_pre_hook(lambda *args: calls.append(1))
    idx, targets = batch(97)
    kept = losses_and_gradients(model, idx, targets)
    assert len(calls) == 3 and not torch.equal(kept['losses'], losses_and_gradients(model, idx, targets, seed=1)['losses'])
    model.gradient_checkpointing, calls[:] = True, []
    again = losses_and_gradients(model, idx, targets)
    assert len(calls) == 6
    for name in kept:
        torch.testing.assert_close(kept[name], again[name], atol=1e-7, rtol=1e-5)


@STYLES
def test_counts(style):
    """Parameters against their sum by hand, floating-point operations against those that torch counts."""
    model = GPT(GPTConfig(**style))
    C, V = 32, 97
    if 'qk_norm' in style:
        matrices, gains = C * (4 + 2 + 2 + 4) * 12 + 3 * C * 128, 2 * C + 2 * 12  # 8/3 * 32, rounded up, is 128
    else:
        matrices, gains = 12 * C * C, 4 * C + 9 * C  # and biases
    gains = 3 * gains + (C if 'qk_norm' in style else 2 * C)
    assert model.num_params() == 3 * matrices + gains + V * C
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        losses_and_gradients(model, *batch(97))
    assert model.flops_per_token() == counter.get_total_flops() / 64 + 6 * gains


@STYLES
def test_crop_block_size(style):
    model = GPT(GPTConfig(**style)).eval()
    idx = torch.randint(97, (2, 8))
    before = model(idx)
    model.crop_block_size(8)
    torch.testing.assert_close(model(idx), before)
    with pytest.raises(AssertionError, match='block_size=8'):
        model(torch.randint(97, (2, 9)))


@STYLES
@pytest.mark.parametrize('autocast', [False, True], ids=['fp32', 'bf16'])
def test_losses_without_gradients(style, autocast, monkeypatch):
    """Some rows at a time and without gradients, the losses are those of training."""
    monkeypatch.setattr(model_file, 'LOGITS_AT_ONCE', 7 * 97 + 5)
    model = GPT(GPTConfig(**style))
    idx, targets = batch(97)
    targets[1, 3:12] = -1
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        losses = model(idx, targets)
        with torch.no_grad():
            again = model(idx, targets)
    assert (again[1, 3:12] == 0).all()
    torch.testing.assert_close(again, losses.detach(), atol=1e-2 if autocast else 1e-5, rtol=0)


def test_masked_targets_cost_nothing():
    model = GPT(GPTConfig(**TINY))
    targets = torch.randint(97, (2, 8))
    targets[0, 3:] = -1
    loss = model(torch.randint(97, (2, 8)), targets)
    assert (loss[0, 3:] == 0).all() and (loss[1] > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize('style, packed', [(TINY, False), (QWEN3, True)])
def test_compiled_gradients(style, packed):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, (X, Y) = GPT(GPTConfig(**style)), torch.randint(TINY['vocab_size'], (2, 4, 16))
    run = SimpleNamespace(device='cpu', device_type='cpu', dtype='float32', ctx=nullcontext)
    compiled = try_compile(model, 4, 16, run, packed)
    if compiled is model:
        pytest.skip('no compiler here')
    gradients = []
    for network in (model, compiled):
        model.zero_grad()
        network(X, Y, *[torch.arange(16).expand(4, 16) // 5] * packed).mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)
