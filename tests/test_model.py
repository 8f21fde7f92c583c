"""The network against independent truth: transformers' GPT-2, and a plain re-statement of the formulas."""
import math

import pytest
import torch
from torch.nn import functional as F

from core.pretrained import load_pretrained
from model import GPT, GPTConfig, attention, sampling_probs

TINY = dict(block_size=16, vocab_size=97, n_layer=3, n_head=4, n_embd=32)


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


@pytest.mark.parametrize('activation', ['gelu_new', 'gelu'])
@pytest.mark.parametrize('safe', [True, False])
def test_logits_equal_transformers(activation, safe, tmp_path):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(2)
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=97, n_positions=16, n_embd=32, n_layer=3, n_head=4, activation_function=activation)).eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    hf.save_pretrained(tmp_path)
    if not safe:  # as older repositories have it
        torch.save(hf.state_dict(), tmp_path / 'pytorch_model.bin')
        (tmp_path / 'model.safetensors').unlink()
    model = load_pretrained(str(tmp_path)).eval()
    idx = torch.randint(97, (5, 16))
    with torch.no_grad():
        assert (model(idx) - hf(idx).logits).abs().max() <= 1e-5


def test_state_dict_has_nanogpts_names():
    names = set(GPT(GPTConfig(**TINY)).state_dict())
    block = [f'{part}.{kind}' for part in ('ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj') for kind in ('weight', 'bias')]
    assert names == {'transformer.wte.weight', 'transformer.wpe.weight', 'transformer.ln_f.weight', 'transformer.ln_f.bias', 'lm_head.weight',
                     *(f'transformer.h.{i}.{part}' for i in range(3) for part in block)}


@pytest.mark.parametrize('T', [5, 64, 512])
def test_plain_attention_equals_the_fused_kernel(T):
    """Values and gradients of the bf16 path on CPUs against fp32."""
    torch.manual_seed(3)
    wide = [torch.randn(2, 3, T, 16, requires_grad=True) for _ in range(3)]
    narrow = [x.detach().bfloat16().requires_grad_() for x in wide]
    g = torch.randn(2, 3, T, 16)
    y = F.scaled_dot_product_attention(*wide, is_causal=True)
    y.backward(g)
    z = attention(*narrow)
    z.backward(g.bfloat16())
    for a, b in zip((y, *(x.grad for x in wide)), (z, *(x.grad for x in narrow))):
        assert (a - b.float()).norm() / a.norm() < 1e-2


def test_generate():
    torch.manual_seed(4)
    model = GPT(GPTConfig(**TINY)).eval()
    idx = torch.randint(97, (3, 4))
    greedy = torch.stack(list(model.generate(idx, 20, temperature=0)), 1)
    assert torch.equal(greedy, torch.stack(list(model.generate(idx, 20, top_k=1)), 1))
    assert torch.equal(greedy, torch.stack(list(model.generate(idx, 20, top_p=1e-6)), 1))
    expected = idx
    for _ in range(20):  # past block_size the context is its last 16 tokens
        expected = torch.cat([expected, model(expected[:, -16:])[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(greedy, expected[:, 4:])
    drawn = torch.stack(list(model.generate(idx, 200, temperature=5.0, vocab_size=7)), 1)
    assert drawn.max() == 6 and drawn.unique().numel() == 7


def test_sampling_probs():
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    torch.testing.assert_close(sampling_probs(logits), torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
    assert sampling_probs(logits, top_k=2)[0].nonzero().flatten().tolist() == [2, 3]
    assert sampling_probs(logits, top_p=0.69)[0].nonzero().flatten().tolist() == [2, 3]  # 0.4 alone do not reach 0.69
    assert sampling_probs(logits, top_p=0.71)[0].nonzero().flatten().tolist() == [1, 2, 3]


def test_crop_block_size():
    model = GPT(GPTConfig(**TINY)).eval()
    idx = torch.randint(97, (2, 8))
    before = model(idx)
    model.crop_block_size(8)
    torch.testing.assert_close(model(idx), before)


def test_masked_targets_cost_nothing():
    model = GPT(GPTConfig(**TINY))
    targets = torch.randint(97, (2, 8))
    targets[0, 3:] = -1
    loss = model(torch.randint(97, (2, 8)), targets)
    assert (loss[0, 3:] == 0).all() and (loss[1] > 0).all()
