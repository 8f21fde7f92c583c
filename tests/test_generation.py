"""Writing token by token: the KV cache against the whole network, sampling against definitions, the sampling loop."""
import contextlib
from functools import partial
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import kernels
import kv_cache
import model as model_file
from core.inference.generation import Continuation, continue_prompts, penalise_repetition, sample_token, uniform_numbers
from core.text.tokenizer import bpe_tokenizer, char_tokenizer
from model import GPT, GPTConfig

BLOCK = 16  # the context
V = 97
GPT2 = dict(block_size=BLOCK, vocab_size=V, n_layer=3, n_head=4, n_embd=32)
QWEN3 = dict(**GPT2, bias=False, activation='swiglu', norm='rmsnorm', rope_theta=1e4, qk_norm=True, head_size=12)
STYLES = {
    'gpt2': GPT2,
    'gpt2, gqa': {**GPT2, 'n_kv_head': 2},
    'qwen3': QWEN3,
    'qwen3, gqa, untied': {**QWEN3, 'n_kv_head': 1, 'tied': False},
    'gpt2, windows': {**GPT2, 'window': 6, 'window_pattern': 'SL'},
    'qwen3, gqa, windows': {**QWEN3, 'n_kv_head': 2, 'window': 5, 'window_pattern': 'SSL'},
    'qwen3, a window longer than the context': {**QWEN3, 'window': 99},
}
each_style = pytest.mark.parametrize('style', STYLES.values(), ids=STYLES)
CHARS = char_tokenizer([chr(ord('a') + i) for i in range(V - 1)])
BYTES = bpe_tokenizer([])


def new_model(style):
    torch.manual_seed(4)
    model = GPT(GPTConfig(**style)).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.2)  # positions and biases count, and no two tokens are about equally likely
    return model


# --- model.generate() and its cache

def logits_without_cache(model, idx):
    """Logits (B, V) after idx (B, any T): the whole network, no layer attends to more than BLOCK tokens."""
    T = idx.size(1)
    if not model.config.rope_theta:
        return model(idx[:, -BLOCK:])[:, -1]
    ones = torch.ones(T, T, dtype=torch.bool)
    x = model.transformer.wte(idx)
    rope = model_file.rotary(T, model.config.head_size, model.config.rope_theta, 'cpu')
    for block, window in zip(model.transformer.h, model.config.windows()):
        mask = ones.tril() & ~ones.tril(-min(window or BLOCK, BLOCK))
        x = block(x, rope, partial(kernels.attention, mask=mask[None, None]))
    return model.lm_head(model.transformer.ln_f(x))[:, -1]


def generate_greedily(model, idx, steps, **kwargs):
    """Return the tokens (B, steps) that generate() yields, and the logits (B, steps, V) that they were chosen from."""
    all_logits = []

    def choose(logits):
        all_logits.append(logits.clone())
        return logits.argmax(dim=-1)

    tokens = list(model.generate(idx, steps, choose, **kwargs))
    return torch.stack(tokens, 1), torch.stack(all_logits, 1)


@each_style
@pytest.mark.parametrize('start', [1, 5, BLOCK, BLOCK + 9])
@pytest.mark.parametrize('step', [3, 256])
def test_cache(style, start, step, monkeypatch):
    """
    For three contexts, the cached logits are those of the whole network (within 1e-5), and the tokens are equal,
    in how many steps ever the cache grows.
    """
    monkeypatch.setattr(kv_cache, 'MIN_NEW_SLOTS', step)
    model = new_model(style)
    idx = torch.randint(V, (2, start))
    tokens, logits = generate_greedily(model, idx, 3 * BLOCK)
    text = idx[:, -BLOCK:]
    for i in range(3 * BLOCK):
        expected = logits_without_cache(model, text)
        assert torch.equal(tokens[:, i], expected.argmax(dim=-1)), i
        torch.testing.assert_close(logits[:, i], expected, atol=1e-5, rtol=0)
        text = torch.cat([text, tokens[:, i:i + 1]], 1)


@each_style
@pytest.mark.parametrize('lengths', [(3, 7, 1), (BLOCK, 2), (BLOCK + 5, 4, BLOCK + 5)], ids=str)
def test_batch_of_different_prompts(style, lengths, monkeypatch):
    """Each row of a padded batch, and each of its copies, equals the prompt alone, also beyond the context."""
    monkeypatch.setattr(kv_cache, 'MIN_NEW_SLOTS', 4)
    model, longest, steps = new_model(style), max(lengths), 2 * BLOCK
    prompts = [torch.randint(V, (n,)) for n in lengths]
    idx = torch.stack([torch.cat([torch.full((longest - len(prompt),), V - 1), prompt]) for prompt in prompts])
    pads = torch.tensor([longest - n for n in lengths])
    tokens, logits = generate_greedily(model, idx, steps, pads=pads, copies=2)
    assert logits.isfinite().all()
    for i, prompt in enumerate(prompts):
        alone, expected = generate_greedily(model, prompt[None], steps)
        for copy in (2 * i, 2 * i + 1):
            assert torch.equal(tokens[copy], alone[0])
            torch.testing.assert_close(logits[copy], expected[0], atol=1e-5, rtol=0)


def mistral(model):
    """A MistralForCausalLM with the weights of a Qwen3-style model without QK-norm, and a sliding window of BLOCK."""
    from transformers import MistralConfig, MistralForCausalLM
    c = model.config
    peer = MistralForCausalLM(MistralConfig(
        vocab_size=V, hidden_size=c.n_embd, intermediate_size=c.n_inner, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_size,
        max_position_embeddings=999, rms_norm_eps=c.norm_eps, sliding_window=BLOCK, tie_word_embeddings=False,
        rope_parameters={'rope_type': 'default', 'rope_theta': c.rope_theta}, attn_implementation='eager')).eval()
    state = model.state_dict()
    weights = {
        'model.embed_tokens': state['transformer.wte.weight'],
        'model.norm': state['transformer.ln_f.weight'],
        'lm_head': state['lm_head.weight'],
    }
    for i in range(c.n_layer):
        ours, theirs = f'transformer.h.{i}', f'model.layers.{i}'
        q, k, v = state[f'{ours}.attn.c_attn.weight'].split([heads * c.head_size for heads in (4, 2, 2)])
        gate, up = state[f'{ours}.mlp.c_fc.weight'].chunk(2)
        weights[f'{theirs}.self_attn.q_proj'] = q
        weights[f'{theirs}.self_attn.k_proj'] = k
        weights[f'{theirs}.self_attn.v_proj'] = v
        weights[f'{theirs}.self_attn.o_proj'] = state[f'{ours}.attn.c_proj.weight']
        weights[f'{theirs}.mlp.gate_proj'] = gate
        weights[f'{theirs}.mlp.up_proj'] = up
        weights[f'{theirs}.mlp.down_proj'] = state[f'{ours}.mlp.c_proj.weight']
        weights[f'{theirs}.input_layernorm'] = state[f'{ours}.ln_1.weight']
        weights[f'{theirs}.post_attention_layernorm'] = state[f'{ours}.ln_2.weight']
    peer.load_state_dict({f'{name}.weight': weight for name, weight in weights.items()})
    return peer


def test_rolling_window_is_that_of_transformers():
    """Beyond the context, a rotary network equals MistralForCausalLM with its sliding window over the whole text."""
    model = new_model({**QWEN3, 'qk_norm': False, 'n_kv_head': 2, 'tied': False})
    idx = torch.randint(V, (2, 5))
    tokens, logits = generate_greedily(model, idx, 4 * BLOCK)
    with torch.no_grad():
        expected = mistral(model)(torch.cat([idx, tokens], 1)).logits[:, 4:-1]
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)


def test_the_prompt_is_read_once(monkeypatch):
    """Five samples of a prompt of 9 tokens take one pass of 9 tokens, then one token a step; the cache has 13 slots."""
    model, shapes, caches = new_model(QWEN3), [], []
    hidden = model.hidden

    def record(idx, cache):
        shapes.append(tuple(idx.shape))
        caches.append(cache)
        return hidden(idx, cache)

    monkeypatch.setattr(model, 'hidden', record)
    list(model.generate(torch.randint(V, (1, 9)), 4, copies=5))
    assert shapes == [(1, 9)] + [(5, 1)] * 3
    assert cache_bytes(caches[-1]) == 2 * 5 * 3 * 4 * 12 * 13 * 4


def cache_bytes(cache):
    return sum(x.nbytes for layer in cache.layers for x in layer)


def test_the_cache_grows_with_the_text(monkeypatch):
    """It has no more than a quarter or 256 slots to spare, whatever the limit, and never more than the context has."""
    model, sizes = new_model({**QWEN3, 'block_size': 700, 'n_layer': 1}), []
    hidden = model.hidden

    def record(idx, cache):
        x = hidden(idx, cache)
        sizes.append((cache.length, cache_bytes(cache) // (2 * 4 * 12 * 4)))
        return x

    monkeypatch.setattr(model, 'hidden', record)
    list(model.generate(torch.randint(V, (1, 9)), 900))
    lengths, slots = zip(*sizes)
    assert lengths == tuple(range(9, 909))
    assert all(n == min(length, 700) or n - length < 256 and n <= 700 for length, n in sizes)
    assert sorted(set(slots)) == [9, 265, 521, 700]


def test_layers_with_a_window_keep_no_more(monkeypatch):
    """Of keys and values: after a prompt longer than the window, and after a short one that grows."""
    monkeypatch.setattr(kv_cache, 'MIN_NEW_SLOTS', 2)
    model, caches = new_model({**QWEN3, 'window': 5, 'window_pattern': 'SLS'}), []
    hidden = model.hidden
    monkeypatch.setattr(model, 'hidden', lambda idx, cache: caches.append(cache) or hidden(idx, cache))
    for start in (9, 2):
        list(model.generate(torch.randint(V, (1, start)), 20))
        assert [keys.size(2) for keys, _ in caches[-1].layers] == [5, BLOCK, 5]


# --- CUDA graphs

class FakeGraph(TorchFunctionMode):
    """
    A CUDA graph on a CPU: the calls of a function, repeated on the same tensors. A number of the host is what it was,
    and to read one of the device is refused.
    """

    def __init__(self):
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, '__name__', '')
        assert name not in ('item', 'tolist', '__bool__', '__int__', '__float__', '__index__'), 'the host waits here'
        out = function(*args, **(kwargs or {}))
        outs = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(x)]
        if outs:
            self.calls.append((function, args, kwargs or {}, outs))
        return out

    def replay(self):
        for function, args, kwargs, outs in self.calls:
            inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
            new = function(*args, **kwargs)
            for old, x in zip(outs, new if isinstance(new, (tuple, list)) else [new]):
                if old.untyped_storage().data_ptr() not in inputs:
                    old.copy_(x)


@pytest.fixture
def graphs(monkeypatch):
    """Let CPUs capture their steps. Return the graphs."""
    made = []

    def fake(function, device):
        made.append(FakeGraph())
        function()
        with made[-1]:
            output = function()
        return made[-1], output

    monkeypatch.setattr(kv_cache, 'cuda_graph', fake)
    monkeypatch.setattr(kv_cache, 'CAPTURED_ON', ('cpu',))
    return made


@each_style
@pytest.mark.parametrize('kwargs', [{}, {'pads': torch.tensor([1, 0, 3]), 'copies': 2}], ids=['plain', 'padded copies'])
def test_captured_steps(style, kwargs, monkeypatch, graphs):
    """Tokens and logits are those of the steps themselves, while the cache grows, and beyond the context."""
    monkeypatch.setattr(kv_cache, 'MIN_NEW_SLOTS', 6)
    model, idx = new_model(style), torch.randint(V, (3, 4))
    tokens, logits = generate_greedily(model, idx, BLOCK + 9, **kwargs)
    assert len(graphs) == 2  # with 10 slots and with 16
    monkeypatch.setattr(kv_cache, 'CAPTURED_ON', ())
    expected_tokens, expected = generate_greedily(model, idx, BLOCK + 9, **kwargs)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize('style', [GPT2, QWEN3], ids=['gpt2', 'qwen3'])
def test_captured_steps_under_autocast(style, monkeypatch, graphs):
    """In bf16, with weights in fp32."""
    model, text = new_model(style).requires_grad_(), torch.randint(V, (8, 2))

    def logits():
        seen, tokens = [], iter(text)

        def choose(logits):
            seen.append(logits.clone())
            return next(tokens)

        with torch.autocast('cpu', torch.bfloat16):
            list(model.generate(text[:3, :].T, 8, choose))
        return torch.stack(seen)

    captured = logits()
    monkeypatch.setattr(kv_cache, 'CAPTURED_ON', ())
    expected = logits()
    assert len(graphs) == 1
    assert (captured - expected).norm() < 0.02 * expected.norm()


def test_steps_that_cannot_be_captured(monkeypatch, graphs, capsys):
    """One warning, and the texts are the same."""
    def fail(function, device):
        function()
        raise RuntimeError('not supported\nhere')

    model = new_model(QWEN3)
    expected = final_rows(model, CHARS, PROMPTS, 20, [1, 2, 3])
    monkeypatch.setattr(kv_cache, 'cuda_graph', fail)
    monkeypatch.setattr(kv_cache.CapturedStep, 'works', True)
    for _ in range(2):
        assert [row.ids for row in final_rows(model, CHARS, PROMPTS, 20, [1, 2, 3])] == [row.ids for row in expected]
    err = capsys.readouterr().err
    assert err.count('\n') == err.count('warning') == 1 and 'RuntimeError: not supported' in err


def test_captured_on_the_device_of_the_tokens(monkeypatch):
    """Also in a thread, which begins on GPU 0: the graph of the other GPU would be empty, and its tokens garbage."""
    current, seen = ['cuda:0'], []

    @contextlib.contextmanager
    def on(device):
        before, current[0] = current[0], str(device)
        yield
        current[0] = before

    monkeypatch.setattr(torch, 'cuda', MagicMock(device=on))
    kv_cache.cuda_graph(lambda: seen.append(current[0]), torch.device('cuda:1'))
    assert seen == ['cuda:1'] * 2 and current == ['cuda:0']


# --- sample_token() and the repetition penalty

def as_on_a_gpu(patch):
    """Sample as on a GPU, where to read a number is to wait: refuse it, but for tolist(), and return its shapes."""
    reads, tolist = [], torch.Tensor.tolist

    def refuse(tensor):
        raise AssertionError('the host waits here')

    def count(tensor):
        reads.append(tensor.shape)
        return tolist(tensor)

    patch.setattr('core.inference.generation.is_gpu', lambda device: True)
    for name in ('item', '__bool__', '__int__', '__float__', '__index__'):
        patch.setattr(torch.Tensor, name, refuse)
    patch.setattr(torch.Tensor, 'tolist', count)
    return reads


@pytest.mark.parametrize('settings, expected', [
    ({}, [0.1, 0.2, 0.3, 0.4]),
    ({'temperature': 0.5}, [1 / 30, 4 / 30, 9 / 30, 16 / 30]),
    ({'top_k': 2}, [0, 0, 3 / 7, 4 / 7]),
    ({'top_p': 0.69}, [0, 0, 3 / 7, 4 / 7]),  # 0.4 alone does not reach 0.69
    ({'top_p': 0.71}, [0, 2 / 9, 3 / 9, 4 / 9]),
    ({'top_k': 3, 'top_p': 0.5}, [0, 0, 3 / 7, 4 / 7]),
    ({'min_p': 0.6}, [0, 0, 3 / 7, 4 / 7]),
    ({'temperature': 0}, [0, 0, 0, 1]),
    ({'temperature': 1e-40}, [0, 0, 0, 1]),
    ({'top_k': 1}, [0, 0, 0, 1]),
    ({'top_p': 1e-9}, [0, 0, 0, 1]),
    ({'min_p': 1.0}, [0, 0, 0, 1]),
], ids=str)
def test_sample_token(settings, expected):
    """The share of each token, measured at 10,000 evenly spaced numbers."""
    n = 10000
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().expand(n, 4)
    uniform = (torch.arange(n) + 0.5)[:, None] / n
    shares = torch.bincount(sample_token(logits, uniform, **settings), minlength=4) / n
    assert shares.tolist() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize('number', [0.0, 0.5, 1 - 2**-24])
def test_impossible_tokens_are_never_sampled(number):
    logits = torch.tensor([[float('-inf'), 0.0, float('-inf'), 0.0]])
    assert sample_token(logits, torch.tensor([[number]])).item() in (1, 3)


@pytest.mark.parametrize('top_p', [0.3, 0.9, 0.9999])
def test_top_p_of_a_large_vocabulary(top_p, monkeypatch):
    """The tokens are the same whether the candidates suffice or all tokens are sorted."""
    torch.manual_seed(1)
    logits, uniform = 3 * torch.randn(50, 2000), torch.rand(50, 1)
    few = sample_token(logits, uniform, top_p=top_p)
    with monkeypatch.context() as patch:
        patch.setattr('core.inference.generation.TOP_P_CANDIDATES', 2000)
        assert torch.equal(few, sample_token(logits, uniform, top_p=top_p))
    with monkeypatch.context() as patch:
        as_on_a_gpu(patch)
        sorted_all = sample_token(logits, uniform, top_p=top_p)
    assert torch.equal(few, sorted_all)


def test_repetition_penalty_is_that_of_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor
    logits, ids = torch.randn(3, 20), torch.randint(20, (3, 7))
    seen = torch.zeros(3, 20, dtype=torch.bool).scatter_(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits)
    torch.testing.assert_close(penalise_repetition(logits, seen, 1.3), expected)


# --- continue_prompts()

PROMPTS = [[1, 2, 3], np.array([4]), [5, 6, 7, 8, 9]]


def final_rows(*args, **kwargs):
    """Return the rows after the last token."""
    *_, rows = continue_prompts(*args, **kwargs)
    return rows


@each_style
def test_a_row_does_not_depend_on_the_others(style):
    """A seed and a prompt give the same ids and log-probabilities alone, in a batch, and as a copy of a prompt."""
    model = new_model(style)
    seeds = [[1, 2], 3, [4, 5], [4, 6], 7, 8]
    settings = {'temperature': 1.2, 'top_p': 0.9, 'repetition_penalty': 1.3, 'with_logprobs': True}
    together = final_rows(model, CHARS, PROMPTS, 20, seeds, copies=2, **settings)
    assert len({tuple(row.ids) for row in together}) == 6
    for i, row in enumerate(together):
        alone, = final_rows(model, CHARS, [PROMPTS[i // 2]], 20, [seeds[i]], **settings)
        assert alone.ids == row.ids and len(row.ids) == 20 and row.finish_reason == 'length'
        assert alone.logprobs == pytest.approx(row.logprobs, abs=1e-4)


@pytest.mark.parametrize('presence, frequency', [(0.7, 0.0), (0.0, 0.4), (-0.5, 0.3)])
def test_presence_and_frequency_penalties(presence, frequency):
    """
    They are OpenAI's: a token's logit is lowered for having been generated, and for each time. Neither the prompt
    counts nor the other rows.
    """
    model = new_model(GPT2)
    rows = final_rows(model, CHARS, PROMPTS, 14, [1, 2, 3], temperature=0, with_logprobs=True,
                      presence_penalty=presence, frequency_penalty=frequency)
    for prompt, row in zip(PROMPTS, rows):
        text = torch.tensor([[*prompt]])
        for i, token in enumerate(row.ids):
            logits = logits_without_cache(model, text)[0]
            count = torch.bincount(torch.tensor(row.ids[:i], dtype=torch.int64), minlength=V)
            assert token == (logits - presence * (count > 0) - frequency * count).argmax()
            assert row.logprobs[i] == pytest.approx(logits.log_softmax(0)[token].item(), abs=1e-4)
            text = torch.cat([text, torch.tensor([[token]])], 1)
    assert any(row.ids != plain.ids for row, plain in
               zip(rows, final_rows(model, CHARS, PROMPTS, 14, [1, 2, 3], temperature=0)))


def test_top_logprobs():
    """The most likely tokens at each place and their log-probabilities, the largest first."""
    model = new_model(GPT2)
    row, = final_rows(model, CHARS, [[1]], 5, [1], with_logprobs=True, top_logprobs=3)
    for i, (token, top) in enumerate(zip(row.ids, row.top_logprobs)):
        expected = logits_without_cache(model, torch.tensor([[1, *row.ids[:i]]]))[0].log_softmax(0)
        values, ids = expected.topk(3)
        assert [id_ for id_, _ in top] == ids.tolist()
        assert [logprob for _, logprob in top] == pytest.approx(values.tolist(), abs=1e-4)
        assert row.logprobs[i] == pytest.approx(expected[token].item(), abs=1e-4)
    row, = final_rows(model, CHARS, [[1]], 5, [1], with_logprobs=True)
    assert row.top_logprobs == [[]] * 5


@pytest.mark.parametrize('settings', [{'temperature': 0}, {'top_k': 20}, {'top_p': 0.9}, {'min_p': 0.1}, {}], ids=str)
@pytest.mark.parametrize('gpu', [False, True], ids=['one by one', 'in blocks'])
@pytest.mark.parametrize('tokenizer', [CHARS, BYTES], ids=['characters', 'bytes'])
def test_logits_that_are_not_finite(settings, gpu, tokenizer, monkeypatch):
    """They are an error, whatever chooses the tokens, not a token; what comes before is returned."""
    monkeypatch.setattr('core.inference.generation.is_gpu', lambda device: gpu)
    model = new_model({**GPT2, 'vocab_size': tokenizer.vocab_size})
    expected = final_rows(model, tokenizer, PROMPTS, 4, [1, 2, 3], **settings)
    model.transformer.wpe.weight[8] = float('nan')  # five tokens of a prompt, three more, then this
    steps = continue_prompts(model, tokenizer, PROMPTS, 30, [1, 2, 3], **settings)
    with pytest.raises(FloatingPointError, match='not finite.*weights.*dtype'):
        while True:
            rows = next(steps)
    assert [row.ids for row in rows] == [row.ids for row in expected]


def test_the_numbers_of_a_seed(monkeypatch):
    """They are those that numpy draws one by one, in how many parts ever they are drawn and uploaded."""
    monkeypatch.setattr('core.inference.generation.NUMBERS_AT_ONCE', 7)
    numbers = uniform_numbers([3, [4, 5]], 'cpu')
    drawn = torch.cat([next(numbers) for _ in range(30)], 1)
    for row, seed in zip(drawn, (3, [4, 5])):
        rng = np.random.default_rng(seed)
        assert row.tolist() == [float(rng.random(1, dtype=np.float32)[0]) for _ in range(30)]


def test_temperature_0_ignores_the_seed():
    model = new_model(GPT2)
    a, b = final_rows(model, CHARS, [[1], [1]], 10, [1, 2], temperature=0)
    tokens, _ = generate_greedily(model, torch.tensor([[1]]), 10)
    assert a.ids == b.ids == tokens[0].tolist()


def test_rows_end_one_by_one():
    """A row stops growing at its end id or stop text, and the loop ends with the last row."""
    model = new_model(GPT2)
    free = final_rows(model, CHARS, PROMPTS, 30, [1, 2, 3])
    end_id = free[0].ids[4]
    stop_text = CHARS.decode(free[1].ids[6:8])
    n_steps = 0
    steps = continue_prompts(model, CHARS, PROMPTS, 30, [1, 2, 3], end_ids=[end_id], stop_texts=[stop_text])
    for rows in steps:  # noqa: B007
        n_steps += 1
    assert n_steps == max(len(row.ids) for row in rows)
    for row, unlimited in zip(rows, free):
        text = CHARS.decode(unlimited.ids)
        assert row.ids == unlimited.ids[:len(row.ids)]
        if row.finish_reason == 'end':
            assert row.ids[-1] == end_id and row.text() == CHARS.decode(row.ids[:-1])
        elif row.finish_reason == 'stop':
            assert row.text() == text[:text.index(stop_text)]
        else:
            assert len(row.ids) == 30 and end_id not in row.ids and stop_text not in text
    assert {rows[0].finish_reason, rows[1].finish_reason} == {'end', 'stop'}


def snapshots(*args, **kwargs):
    """Return what every row is after every token."""
    return [[(row.text(), row.finish_reason, [*row.ids], [*row.logprobs], [*row.top_logprobs]) for row in rows]
            for rows in continue_prompts(*args, **kwargs)]


@pytest.mark.parametrize('settings', [
    {}, {'top_k': 5}, {'top_p': 0.9, 'top_logprobs': 3, 'with_logprobs': True},
    {'repetition_penalty': 1.3, 'frequency_penalty': 0.5}], ids=str)
def test_blocks_of_tokens(settings, monkeypatch):
    """
    A GPU's tokens are read in blocks of 1, 2, 4, 8 and then 16: six times in 47 tokens, and nothing else is read.
    Rows end at the same tokens as one by one; what a block has after their end does not count.
    """
    model = new_model({**GPT2, 'vocab_size': BYTES.vocab_size})
    args = model, BYTES, [[1, 2, 3], [4]], 47, [1, 2, 3, 4], 2
    free = final_rows(*args, **settings)
    settings = {'end_ids': [free[0].ids[20]], 'stop_texts': [free[1].text()[8:10]], **settings}
    expected = snapshots(*args, **settings)
    assert len({row[1] for row in expected[-1]}) > 1 and len(expected) == 47
    with monkeypatch.context() as patch:
        reads = as_on_a_gpu(patch)
        assert snapshots(*args, **settings) == expected
    assert [shape[:2] for shape in reads] == [(n, 4) for n in (1, 2, 4, 8, 16, 16)]


def test_bytes_stay_valid_utf8():
    """A random network on bytes writes whole characters only."""
    model = new_model({**GPT2, 'vocab_size': BYTES.vocab_size})
    rows = final_rows(model, BYTES, [[1]], 60, range(8), copies=8, temperature=2.0)
    for row in rows:
        text = BYTES.decode(row.ids)
        assert '\ufffd' not in text.rstrip('\ufffd')
        assert row.text() == text.rstrip('\ufffd')


def grow(text, tokenizer, stop_texts=()):
    """Return the parts that new_text() returns while a Continuation grows to `text`."""
    ids = tokenizer.encode(text).tolist()
    row = Continuation(tokenizer, len(ids), (), stop_texts)
    parts = []
    for token in ids:
        row.append(token)
        parts.append(row.new_text())
        if row.finish_reason:
            break
    assert ''.join(parts) == row.text()
    return parts


@pytest.mark.parametrize('text, tokenizer, stop_texts, parts', [
    ('abcd', CHARS, (), ['a', 'b', 'c', 'd']),
    ('abcd', CHARS, ('xyz',), ['', '', 'a', 'bcd']),  # two characters are held back until the end
    ('abcdef', CHARS, ('cd', 'e'), ['', 'a', 'b', '']),
    ('石a', BYTES, (), ['', '', '石', 'a']),
], ids=['plain', 'held back', 'stopped', 'bytes'])
def test_new_text(text, tokenizer, stop_texts, parts):
    """Neither a stop text nor half of a character is ever returned."""
    assert grow(text, tokenizer, stop_texts) == parts
