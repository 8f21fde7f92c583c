"""Attention, dropout and token losses against the plain PyTorch that they replace. The KV cache: test_generation.py."""
import pytest
import torch
from test_model import QWEN3, STYLES, TINY, losses_and_gradients, random_batch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import model as model_file
from kernels import (
    TokenLosses,
    attention,
    document_starts,
    dropout,
    dropout_mask,
    flexible_attention,
    key_blocks,
    layer_attentions,
    token_losses,
    window_mask,
)
from model import GPT, GPTConfig

# --- attention


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('T', [5, 64, 512, 700])  # 1, 1, 2 and 3 blocks; of 3 the weights are computed again
def test_blockwise_attention_equals_the_fused_kernel(T, masked):
    """Values and gradients in bf16 against fp32, also under a mask of several documents per row."""
    torch.manual_seed(3)
    inputs = [torch.randn(2, 3, T, 16, requires_grad=True) for _ in range(3)]
    inputs_bf16 = [x.detach().bfloat16().requires_grad_() for x in inputs]
    gradient = torch.randn(2, 3, T, 16)
    document = (torch.rand(3, T) < 0.05).cumsum(dim=1)
    mask = (document[:, None, :, None] == document[:, None, None, :]).tril() if masked else None  # (B, 1, T, T)
    expected = F.scaled_dot_product_attention(*inputs, None if mask is None else mask[:, 0], is_causal=not masked)
    expected.backward(gradient)
    y = attention(*inputs_bf16, mask=mask, blockwise=True)
    y.backward(gradient.bfloat16())
    expected = [expected, *(x.grad for x in inputs)]
    found = [y, *(x.grad for x in inputs_bf16)]
    for a, b in zip(expected, found):
        assert (a - b.float()).norm() / a.norm() < 1e-2


@pytest.mark.parametrize('T', [5, 20, 40])
def test_dropout_in_attention(T, monkeypatch):
    """Values and gradients, in blocks of 16, against softmax times the same dropout mask, in fp64."""
    monkeypatch.setattr(kernels, 'ATTENTION_BLOCK', 16)
    masks = []

    def recorded_mask(x, p):
        masks.append(dropout_mask(x, p))
        return masks[-1]
    monkeypatch.setattr(kernels, 'dropout_mask', recorded_mask)
    torch.manual_seed(3)
    q, k, v, gradient = torch.randn(4, 1, 2, T, 8, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    y = attention(*inputs, dropout=0.5)
    mask = torch.cat([F.pad(x, (0, T - x.size(2))) for x in masks], dim=1)  # (2, T, T)
    assert set(mask.unique().tolist()) == {0.0, 2.0}

    plain_inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    q, k, v = plain_inputs
    scores = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(torch.ones(T, T).triu(1) > 0, float('-inf'))
    expected = (scores.softmax(-1) * mask) @ v
    torch.testing.assert_close(y, expected)
    for a, b in zip(torch.autograd.grad(y, inputs, gradient), torch.autograd.grad(expected, plain_inputs, gradient)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('blockwise', [False, True])
@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('window', [1, 3, 16, 17, 40, 99])
def test_windows(window, packed, blockwise, monkeypatch):
    """
    A token attends to itself and the window - 1 tokens before it, in its own document: values and gradients against
    softmax under a dense mask, in fp64.
    """
    monkeypatch.setattr(kernels, 'ATTENTION_BLOCK', 16)
    torch.manual_seed(3)
    T = 40
    q, k, v, gradient = torch.randn(4, 2, 3, T, 8, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    documents = (torch.rand(3, T) < 0.1).cumsum(dim=1)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    mask = (distance >= 0) & (distance < window) & torch.ones(3, 1, 1, dtype=torch.bool)
    if packed:
        mask &= documents[:, :, None] == documents[:, None, :]  # (B, T, T)
    attend, full = layer_attentions([window, 0], documents, documents if packed else None)
    assert packed or full is attention
    y = attend(*inputs, blockwise=blockwise)
    plain = [x.clone().requires_grad_() for x in (q, k, v)]
    scores = (plain[0] @ plain[1].transpose(2, 3) / 8**0.5).masked_fill(~mask, float('-inf'))
    expected = scores.softmax(dim=-1) @ plain[2]
    torch.testing.assert_close(y, expected)
    for a, b in zip(torch.autograd.grad(y, inputs, gradient), torch.autograd.grad(expected, plain, gradient)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('window', [0, 1, 128, 130, 999])
@pytest.mark.parametrize('packed', [False, True])
def test_blocks_that_are_not_skipped(packed, window):
    """FlexAttention gets the blocks of 128 x 128 that have an allowed pair, and no others, in a row of 2.3 and of 5."""
    from torch.nn.attention.flex_attention import BlockMask
    torch.manual_seed(3)
    for T in (300, 640):
        documents = (torch.rand(3, T) < 0.01).cumsum(dim=1) if packed else None
        blocks = key_blocks(window, torch.zeros(3, T), documents)
        found = BlockMask.from_kv_blocks(*blocks, seq_lengths=(T, T)).to_dense().expand(3, -1, -1, -1)
        allowed = window_mask(T, window, 'cpu').expand(3, T, T)
        if packed:
            allowed = allowed & (documents[:, :, None] == documents[:, None, :])
        n = found.size(-1)
        allowed = F.pad(allowed, (0, 128 * n - T) * 2).view(3, n, 128, n, 128)
        assert torch.equal(found[:, 0].bool(), allowed.any(dim=4).any(dim=2))


@pytest.mark.slow
@pytest.mark.parametrize('packed, window', [(True, 0), (True, 130), (False, 130)])
def test_flexible_attention(packed, window):
    """What GPUs compute with documents and windows, on the CPU, which has no backward pass for it."""
    torch.manual_seed(3)
    q, k, v = torch.randn(4, 3, 300, 16), *torch.randn(2, 2, 3, 300, 16)
    documents = (torch.rand(3, 300) < 0.01).cumsum(dim=1) if packed else None
    idx = torch.zeros(3, 300)
    [expected] = layer_attentions([window], idx, documents)
    found = flexible_attention(window, idx, documents)
    torch.testing.assert_close(found(q, k, v), expected(q, k, v), atol=1e-5, rtol=0)


def test_document_starts():
    documents = torch.tensor([[4, 4, 0, 0, 0, 7], [1, 2, 3, 3, 9, 9]])
    assert document_starts(documents).tolist() == [[0, 0, 2, 2, 2, 5], [0, 1, 2, 2, 4, 4]]


@pytest.mark.parametrize('blockwise, flash', [(False, False), (False, True), (True, False)])
def test_grouped_queries(blockwise, flash, monkeypatch):
    """
    Query head h attends to keys and values of head h // 4: values and gradients against a loop over the heads. flash:
    keys and values are not repeated, as on GPUs.
    """
    monkeypatch.setattr(kernels, 'has_flash', lambda q: flash)
    torch.manual_seed(3)
    q, k, v = (torch.randn(n, 3, 16, 12, requires_grad=True) for n in (8, 2, 2))
    y = attention(q, k, v, blockwise=blockwise)
    heads = [F.scaled_dot_product_attention(q[h], k[h // 4], v[h // 4], is_causal=True) for h in range(8)]
    expected = torch.stack(heads)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)
    gradient = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, (q, k, v), gradient), torch.autograd.grad(expected, (q, k, v), gradient)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


class Copies(TorchDispatchMode):
    """Records the operations that copy a tensor."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('style', [TINY, QWEN3], ids=['gpt2', 'qwen3'])
def test_no_copies_on_gpus(style):
    """There the attention layer copies nothing forward (on 'meta', which takes their path): not the output either."""
    with torch.device('meta'):
        layer = GPT(GPTConfig(**style)).transformer.h[0].attn
        x = torch.empty(2, 16, 32)
        rope = torch.empty(2, 16, layer.head_size // 2) if style is QWEN3 else None

    def flash(q, k, v, dropout):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout, True)[0].transpose(0, 1)

    with Copies() as copies, torch.no_grad():
        layer(x, rope, flash)
    assert not copies.names


@STYLES
def test_the_layout_changes_nothing(style, monkeypatch):
    """Losses and gradients of queries, keys and values as they are on GPUs equal those of the CPUs' layout."""
    torch.manual_seed(6)
    model = GPT(GPTConfig(**style))
    batch = random_batch(97)
    expected = losses_and_gradients(model, *batch)
    monkeypatch.setattr(model_file, 'HEADS_FIRST', ())
    found = losses_and_gradients(model, *batch)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-4)

# --- dropout


@pytest.mark.parametrize('p', [0.1, 0.2, 0.5])
def test_dropout(p):
    """
    A share p of the elements becomes zero and the mean stays. Neighbours are independent, the seed alone decides, and
    the gradient has the same mask.
    """
    x = torch.ones(999, 1001, requires_grad=True)
    torch.manual_seed(1)
    y = dropout(x, p)
    y.sum().backward()
    assert abs((y == 0).float().mean() - p) < 0.002 + 1 / 512
    assert abs(y.mean() - 1) < 0.003
    assert len(y.unique()) == 2
    assert torch.equal(x.grad, y)
    assert abs((y[:, :-1] * y[:, 1:]).mean() - 1) < 0.008
    assert abs((y[:-1] * y[1:]).mean() - 1) < 0.008
    torch.manual_seed(1)
    assert torch.equal(dropout(x, p), y)
    assert not torch.equal(dropout(x, p), y)
    assert dropout(x, 0.0) is x
    assert set(dropout_mask(torch.ones(10000), 0.999).unique().tolist()) == {0.0, 256.0}

# --- token losses

LIMITS = {  # of a head with 97 logits
    'at once': {},
    'in parts': {'LOGITS_AT_ONCE': 7 * 97 + 5},
    'recomputed': {'LOGITS_AT_ONCE': 7 * 97 + 5, 'MAX_SAVED_BYTES': 20 * 97 * 4},
}


@STYLES
@pytest.mark.parametrize('autocast', [False, True], ids=['fp32', 'bf16'])
@pytest.mark.parametrize('limits', LIMITS.values(), ids=LIMITS)
def test_losses_against_cross_entropy(style, autocast, limits, monkeypatch):
    """
    64 tokens, some of them masked, each loss with a factor of its own: losses and gradients equal those of
    F.cross_entropy on the logits, at once, in parts, and recomputed in the backward pass.
    """
    for name, limit in limits.items():
        monkeypatch.setattr(kernels, name, limit)
    torch.manual_seed(6)
    model = GPT(GPTConfig(**style))
    idx, targets = random_batch(97)
    targets[1, 3:12] = -1
    factors = torch.rand(targets.shape)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        losses = model(idx, targets)
        logits = model(idx).float().flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction='none').view(targets.shape)
    assert losses.dtype == torch.float32
    assert (losses[1, 3:12] == 0).all()
    assert (losses - expected).norm() <= (1e-4 if autocast else 1e-6) * expected.norm()
    params = list(model.parameters())
    gradients = torch.autograd.grad((losses * factors).sum(), params)
    expected_gradients = torch.autograd.grad((expected * factors).sum(), params)
    for a, b in zip(gradients, expected_gradients):
        assert (a - b).norm() <= (1e-2 if autocast else 2e-6) * b.norm()


@STYLES
@pytest.mark.parametrize('autocast', [False, True], ids=['fp32', 'bf16'])
def test_losses_without_gradients(style, autocast, monkeypatch):
    """Under no_grad, some rows at a time, the losses are those of training."""
    monkeypatch.setattr(kernels, 'LOGITS_AT_ONCE', 7 * 97 + 5)
    model = GPT(GPTConfig(**style))
    idx, targets = random_batch(97)
    targets[1, 3:12] = -1
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        losses = model(idx, targets)
        with torch.no_grad():
            losses_without = model(idx, targets)
    assert (losses_without[1, 3:12] == 0).all()
    torch.testing.assert_close(losses_without, losses.detach(), atol=1e-2 if autocast else 1e-5, rtol=0)


def test_a_loss_beyond_the_smallest_probability():
    """exp(-300) is 0 in fp32, and yet the loss is 300."""
    x = torch.eye(2)
    weight = torch.tensor([[300.0, 0.0], [0.0, 1.0]])
    losses = TokenLosses.apply(x, weight, torch.tensor([1, 1]))
    assert losses.tolist() == pytest.approx([300.0, 0.3132617])


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returns, and of the largest in fp32."""
    numel = 0
    numel_fp32 = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
                if x.dtype == torch.float32:
                    self.numel_fp32 = max(self.numel_fp32, x.numel())
        return result


@pytest.mark.parametrize('recomputed', [False, True])
def test_never_all_logits_in_fp32(recomputed, monkeypatch):
    """
    Forward and backward pass on 64 tokens compute the logits of 4 tokens at a time. If the gradients are too large to
    be saved, the logits are never all there, not even in bf16.
    """
    monkeypatch.setattr(kernels, 'LOGITS_AT_ONCE', 4 * 1000)
    if recomputed:
        monkeypatch.setattr(kernels, 'MAX_SAVED_BYTES', 8 * 1000 * 2)
    model = GPT(GPTConfig(**{**TINY, 'vocab_size': 1000}))
    with LargestTensor() as largest, torch.autocast('cpu', torch.bfloat16):
        losses_and_gradients(model, *random_batch(1000))
    embedding = 1000 * 32
    assert largest.numel_fp32 == embedding
    assert largest.numel == (embedding if recomputed else 64 * 1000)

# --- token losses under torch.compile


class Head(torch.nn.Module):
    """A linear layer and the losses of its logits, some targets masked."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(6)
        self.head = torch.nn.Linear(16, 97, bias=False)
        self.x = torch.nn.Parameter(torch.randn(64, 16))
        self.targets = torch.randint(97, (64,)).masked_fill(torch.arange(64) % 7 == 0, -1)
        self.factors = torch.rand(64)
        self.dtype = dtype

    def forward(self):
        return token_losses(self.x, self.head, self.targets, 97)

    def results(self, backend):
        """Return the losses, and the gradients of input and weight, compiled by this backend."""
        torch._dynamo.reset()
        network = torch.compile(self, backend=backend)
        with torch.autocast('cpu', self.dtype, enabled=self.dtype != torch.float32):
            losses = network()
        return [losses, *torch.autograd.grad((losses * self.factors).sum(), [self.x, self.head.weight])]

    def expected(self):
        """Return the same by F.cross_entropy."""
        with torch.autocast('cpu', self.dtype, enabled=self.dtype != torch.float32):
            logits = self.head(self.x)
        losses = F.cross_entropy(logits.float(), self.targets, ignore_index=-1, reduction='none')
        return [losses, *torch.autograd.grad((losses * self.factors).sum(), [self.x, self.head.weight])]


def collect(graphs):
    """Return a backend that appends the graphs of forward and backward pass to a list, and runs them as they are."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)
    return aot_autograd(fw_compiler=keep, partition_fn=min_cut_rematerialization_partition)


def computed(graphs):
    """Return (name of the operation, shape) of all tensors that these graphs compute."""
    nodes = [node for graph in graphs for node in graph.graph.nodes if node.op == 'call_function']
    return [(str(node.target), tuple(node.meta['val'].shape)) for node in nodes
            if isinstance(node.meta.get('val'), torch.Tensor)]


@pytest.mark.parametrize('style, packed', [(TINY, False), (QWEN3, True)], ids=['gpt2', 'qwen3, documents'])
def test_the_network_is_one_graph(style, packed):
    """With fullgraph=True a break is an error."""
    torch._dynamo.reset()
    model = GPT(GPTConfig(**{**style, 'n_layer': 1}))
    batch = (*random_batch(97), *[torch.arange(16).expand(4, 16) // 5] * packed)
    losses = torch.compile(model, backend='eager', fullgraph=True)(*batch)
    torch.testing.assert_close(losses, model(*batch), atol=1e-5, rtol=0)


def test_compiled_losses_are_not_split(monkeypatch):
    """The parts that fit a CPU's cache would be buffers of their own, in fp32, and each would be copied."""
    graphs = []
    monkeypatch.setattr(kernels, 'LOGITS_AT_ONCE', 1)
    torch.testing.assert_close(Head().results(collect(graphs)), Head().expected())
    operations = computed(graphs)
    assert not any('split' in name or 'copy' in name for name, _ in operations)
    assert {shape[0] for _, shape in operations if shape[1:] == (97,)} == {64, 16}  # logits, and the weight transposed


def test_very_large_batches_are_not_compiled(monkeypatch):
    """Of logits that are too large to be saved, no graph has any: they are computed in chunks."""
    for n_tokens, any_logits in (20, False), (64, True):
        monkeypatch.setattr(kernels, 'MAX_SAVED_BYTES', n_tokens * 97 * 2)  # 2 * 2 bytes each, as it is compiled
        graphs = []
        torch.testing.assert_close(Head().results(collect(graphs)), Head().expected())
        assert any(97 in shape for _, shape in computed(graphs)) == any_logits


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('saved', [True, False])
def test_compiled_losses_against_cross_entropy(dtype, saved, monkeypatch):
    """By PyTorch's own compiler. Some targets are masked; each loss has a factor of its own."""
    if not saved:
        monkeypatch.setattr(kernels, 'MAX_SAVED_BYTES', 20 * 97)
    head = Head(dtype=dtype)
    found, expected = head.results('inductor'), head.expected()
    assert (found[0][head.targets < 0] == 0).all()
    for a, b in zip(found, expected):
        assert (a - b).norm() <= (1e-2 if dtype == torch.bfloat16 else 1e-6) * b.norm()
