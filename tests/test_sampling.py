"""Writing token by token: the cache against the whole network, choices against their definitions, sample.py from end to end."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, make_dataset, run_script, write

import kernels
import model as model_file
from core.inference.generation import penalise_repetition, sample_token
from core.weights.quantize import Int8Linear, PackedLinear, packed_matmul_is_correct, prepare_for_inference
from model import GPT, GPTConfig

BLOCK = 16
GPT2 = dict(block_size=BLOCK, vocab_size=97, n_layer=3, n_head=4, n_embd=32)
QWEN3 = dict(**GPT2, bias=False, activation='swiglu', norm='rmsnorm', rope_theta=1e4, qk_norm=True, head_size=12)
STYLES = pytest.mark.parametrize('style', [GPT2, {**GPT2, 'n_kv_head': 2}, QWEN3, {**QWEN3, 'n_kv_head': 1, 'tied': False}],
                                 ids=['gpt2', 'gpt2, gqa', 'qwen3', 'qwen3, gqa, untied'])


def new_model(style):
    torch.manual_seed(4)
    model = GPT(GPTConfig(**style)).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.2)  # so that positions and biases count, and no two tokens are about as likely
    return model


def windowed(model, idx):
    """Logits (B, V) after idx (B, any T) without a cache: of each position the BLOCK tokens that it sees are masked out by hand, layer by layer."""
    T = idx.size(1)
    if not model.config.rope_theta:
        return model(idx[:, -BLOCK:])[:, -1]
    far = torch.ones(T, T, dtype=torch.bool).tril() & ~torch.ones(T, T, dtype=torch.bool).tril(-BLOCK)
    kept = kernels.attention, model.config.block_size
    model.config.block_size = T
    try:
        x = model.transformer.wte(idx)
        rope = model_file.rotary(T, model.config.head_size, model.config.rope_theta, 'cpu')
        for block in model.transformer.h:
            x = block(x, rope, lambda q, k, v, dropout: kernels.attention(q, k, v, mask=far[None, None]))
        return model.lm_head(model.transformer.ln_f(x))[:, -1]
    finally:
        model.config.block_size = kept[1]


def written(model, idx, steps, **kwargs):
    """The tokens (B, steps) that generate yields and the logits (B, steps, V) that it chose from, greedily."""
    logits, tokens = [], []

    def choose(found):
        logits.append(found)
        return found.argmax(dim=-1)
    for token in model.generate(idx, steps, choose, **kwargs):
        tokens.append(token)
    return torch.stack(tokens, 1), torch.stack(logits, 1)


@STYLES
@pytest.mark.parametrize('start', [1, 5, BLOCK, BLOCK + 9])
def test_cache(style, start):
    """Token for token and within 1e-5, the cached logits are those computed anew, three contexts on."""
    model = new_model(style)
    idx = torch.randint(97, (2, start))
    tokens, logits = written(model, idx, 3 * BLOCK)
    text = idx[:, -BLOCK:]
    for i in range(3 * BLOCK):
        expected = windowed(model, text)
        assert torch.equal(tokens[:, i], expected.argmax(dim=-1)), i
        torch.testing.assert_close(logits[:, i], expected, atol=1e-5, rtol=0)
        text = torch.cat([text, tokens[:, i:i + 1]], 1)


@STYLES
@pytest.mark.parametrize('lengths', [(3, 7, 1), (BLOCK, 2), (BLOCK + 5, 4, BLOCK + 5)], ids=str)
def test_batch_of_different_prompts(style, lengths):
    """Each row of a padded batch is what the prompt alone gives, also beyond the context; copies of it are, too."""
    model, longest, steps = new_model(style), max(lengths), 2 * BLOCK
    texts = [torch.randint(97, (n,)) for n in lengths]
    idx = torch.stack([torch.cat([torch.full((longest - len(text),), 96), text]) for text in texts])
    tokens, logits = written(model, idx, steps, pads=torch.tensor([longest - n for n in lengths]), copies=2)
    assert logits.isfinite().all()
    for row, text in enumerate(texts):
        alone, expected = written(model, text[None], steps)
        for copy in (2 * row, 2 * row + 1):
            assert torch.equal(tokens[copy], alone[0])
            torch.testing.assert_close(logits[copy], expected[0], atol=1e-5, rtol=0)


def test_rolling_window_is_that_of_transformers():
    """Beyond the context of a rotary network: MistralForCausalLM with its sliding window, over the whole text at once."""
    from transformers import MistralConfig, MistralForCausalLM
    style = {**QWEN3, 'qk_norm': False, 'n_kv_head': 2, 'tied': False}
    model = new_model(style)
    c = model.config
    theirs = MistralForCausalLM(MistralConfig(vocab_size=97, hidden_size=32, intermediate_size=c.n_inner, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                                              head_dim=12, max_position_embeddings=999, rms_norm_eps=c.norm_eps, sliding_window=BLOCK, tie_word_embeddings=False,
                                              rope_parameters={'rope_type': 'default', 'rope_theta': 1e4}, attn_implementation='eager')).eval()
    names, state = {}, model.state_dict()
    for i in range(3):
        q, k, v = state[f'transformer.h.{i}.attn.c_attn.weight'].split([48, 24, 24])
        gate, up = state[f'transformer.h.{i}.mlp.c_fc.weight'].chunk(2)
        names.update({f'model.layers.{i}.{name}.weight': x for name, x in {
            'self_attn.q_proj': q, 'self_attn.k_proj': k, 'self_attn.v_proj': v, 'self_attn.o_proj': state[f'transformer.h.{i}.attn.c_proj.weight'],
            'mlp.gate_proj': gate, 'mlp.up_proj': up, 'mlp.down_proj': state[f'transformer.h.{i}.mlp.c_proj.weight'],
            'input_layernorm': state[f'transformer.h.{i}.ln_1.weight'], 'post_attention_layernorm': state[f'transformer.h.{i}.ln_2.weight']}.items()})
    names.update({'model.embed_tokens.weight': state['transformer.wte.weight'], 'model.norm.weight': state['transformer.ln_f.weight'], 'lm_head.weight': state['lm_head.weight']})
    theirs.load_state_dict(names)
    idx = torch.randint(97, (2, 5))
    tokens, logits = written(model, idx, 4 * BLOCK)
    with torch.no_grad():
        expected = theirs(torch.cat([idx, tokens], 1)).logits[:, 4:-1]
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)


def test_the_prompt_is_read_once(monkeypatch):
    """For five samples of a prompt of 9 tokens: one pass of 9 tokens, then one row a step of each; and the cache is as large as it says."""
    model, seen, caches = new_model(QWEN3), [], []
    hidden = model.hidden
    monkeypatch.setattr(model, 'hidden', lambda idx, cache: seen.append(tuple(idx.shape)) or caches.append(cache) or hidden(idx, cache))
    list(model.generate(torch.randint(97, (1, 9)), 4, copies=5))
    assert seen == [(1, 9)] + [(5, 1)] * 3
    assert caches[-1].kv.nbytes == 2 * 5 * 3 * 4 * 12 * 13 * 4


def test_draw():
    """Each choice against its definition, by many evenly spaced numbers."""
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    numbers = (torch.arange(10000) + 0.5) / 10000

    def shares(**kwargs):
        return (torch.bincount(sample_token(logits.expand(10000, 4), numbers[:, None], **kwargs), minlength=4) / 10000).tolist()
    assert shares() == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=1e-3)
    assert shares(temperature=0.5) == pytest.approx([1 / 30, 4 / 30, 9 / 30, 16 / 30], abs=1e-3)
    assert shares(top_k=2) == pytest.approx([0, 0, 3 / 7, 4 / 7], abs=1e-3)
    assert shares(top_p=0.69) == pytest.approx([0, 0, 3 / 7, 4 / 7], abs=1e-3)  # 0.4 alone do not reach 0.69
    assert shares(top_p=0.71) == pytest.approx([0, 2 / 9, 3 / 9, 4 / 9], abs=1e-3)
    assert shares(top_k=3, top_p=0.5) == pytest.approx([0, 0, 3 / 7, 4 / 7], abs=1e-3)
    assert shares(min_p=0.6) == pytest.approx([0, 0, 3 / 7, 4 / 7], abs=1e-3)
    for kwargs in ({'temperature': 0}, {'temperature': 1e-40}, {'top_k': 1}, {'top_p': 1e-9}, {'min_p': 1.0}):
        assert shares(**kwargs) == [0, 0, 0, 1]
    impossible = torch.tensor([[float('-inf'), 0.0, float('-inf'), 0.0]])
    for number in (0.0, 0.5, 1 - 2**-24):
        assert sample_token(impossible, torch.tensor([[number]])).item() in (1, 3)


@pytest.mark.parametrize('top_p', [0.3, 0.9, 0.9999])
def test_top_p_of_a_large_vocabulary(top_p, monkeypatch):
    """Whether the first candidates suffice or all have to be sorted, the tokens are the same."""
    torch.manual_seed(1)
    logits, numbers = 3 * torch.randn(50, 2000), torch.rand(50, 1)
    few = sample_token(logits, numbers, top_p=top_p)
    monkeypatch.setattr('core.inference.generation.CANDIDATES', 2000)
    assert torch.equal(few, sample_token(logits, numbers, top_p=top_p))


def test_repetition_penalty_is_that_of_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor
    logits, ids = torch.randn(3, 20), torch.randint(20, (3, 7))
    seen = torch.zeros(3, 20, dtype=torch.bool).scatter_(1, ids, True)
    torch.testing.assert_close(penalise_repetition(logits, seen, 1.3), RepetitionPenaltyLogitsProcessor(1.3)(ids, logits))


@STYLES
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16', 'int8'])
@pytest.mark.parametrize('rows', [1, 8])
def test_other_weights(style, dtype, rows, monkeypatch):
    """Logits of converted weights against those of the weights themselves; int8 against a plain product with rounded weights."""
    monkeypatch.setattr('core.weights.quantize.SMALL', 0)
    model = new_model(style)
    idx = torch.randint(97, (rows, 7))
    if dtype == 'int8':
        rounded = new_model(style)
        for module in rounded.modules():
            if isinstance(module, torch.nn.Linear):
                step = module.weight.abs().amax(1, keepdim=True) / 127
                module.weight = torch.nn.Parameter((module.weight / step).round() * step)
        if style.get('tied', True):
            rounded.transformer.wte.weight = torch.nn.Parameter(model.transformer.wte.weight.clone())
        expected = rounded(idx)
    else:
        expected = model(idx)
    logits = prepare_for_inference(model, dtype, rows)(idx).float()
    kinds = {type(module) for module in model.modules()}
    assert Int8Linear in kinds if dtype == 'int8' else (PackedLinear in kinds) == (packed_matmul_is_correct(dtype) and (dtype != 'float32' or rows >= 4))
    assert (logits - expected).norm() <= {'float32': 1e-6, 'bfloat16': 3e-2, 'float16': 4e-3, 'int8': 3e-4}[dtype] * expected.norm()


def test_bytes_elsewhere(monkeypatch):
    """Where bytes cannot be multiplied by bytes, the same numbers come from a plain product."""
    torch.manual_seed(1)
    linear, x = torch.nn.Linear(64, 48), 5 * torch.randn(3, 2, 64)
    x[0, 0] = 0
    y = Int8Linear(linear)(x)
    monkeypatch.setattr('core.weights.quantize.packed_matmul_is_correct', lambda dtype: False)
    torch.testing.assert_close(y, Int8Linear(linear)(x), atol=2e-3, rtol=0)
    assert Int8Linear(linear)(torch.zeros(1, 64)).allclose(linear.bias)


def sample(run, *args, **kwargs):
    result = run_script('sample.py', f'--out_dir={run}', '--device=cpu', *args, **kwargs)
    assert (result.code, result.err) == (0, ''), result.err
    return result.out


def records(path):
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def test_same_seed_same_text(tiny_run, tmp_path):
    """Whatever is drawn beside it: alone, of ten, beside another text, in several batches; and another seed gives another text."""
    def texts(*args):
        sample(tiny_run, *args, f'--out={tmp_path / "o.jsonl"}', '--max_new_tokens=40', '--temperature=2')
        return {(r['start'], r['sample']): r['text'] for r in records(tmp_path / 'o.jsonl')}
    many = texts('--start=one', '--start=seven', '--num_samples=10')
    assert len({text for (start, _), text in many.items() if start == 'one'}) == 10
    assert texts('--start=one', '--num_samples=1').items() <= many.items()
    assert texts('--start=seven', '--num_samples=3', '--batch_size=2').items() <= many.items()
    (tmp_path / 'p.txt').write_text('seven\n\none\n', encoding='utf-8')
    assert texts(f'--prompts={tmp_path / "p.txt"}', '--num_samples=10', '--batch_size=10') == many
    assert texts('--start=one', '--num_samples=1', '--seed=2')['one', 0] != many['one', 0]


def test_out(tiny_run, tmp_path):
    """A line for each sample with its tokens and their log-probabilities, which are those of the network; it is printed, too."""
    out = sample(tiny_run, '--start=one two', '--num_samples=2', '--max_new_tokens=6', '--temperature=3', '--logprobs', f'--out={tmp_path / "o.jsonl"}', '--end_token=')
    from core.weights.checkpoint import load_model, source_tokenizer
    model, source = load_model('resume', str(tiny_run))
    tokens = source_tokenizer(source)
    for i, record in enumerate(records(tmp_path / 'o.jsonl')):
        assert (record['start'], record['sample'], record['over']) == ('one two', i, 'length')
        assert tokens.decode(record['tokens']) == record['text'] and record['text'] in out
        ids = torch.tensor([*tokens.encode('one two'), *record['tokens']])
        with torch.no_grad():
            expected = model.eval()(ids[None, :-1])[0, :, :tokens.vocab_size].log_softmax(-1).gather(1, ids[1:, None])[-6:, 0]
        assert record['logprobs'] == pytest.approx(expected.tolist(), abs=1e-5)
        for token, score in zip(record['tokens'], record['logprobs']):
            assert f'{score:9.4f}  {tokens.decode([token])!r}' in out
    size = 2 * 2 * 2 * 2 * 16 * 13 * 4
    assert f'= {size:,} bytes' in out


def test_stops(tiny_run):
    """The first of several stop texts ends a sample; printed as it comes it is the same, and nothing of the stop text is shown."""
    whole = sample(tiny_run, '--start=one', '--num_samples=1', '--max_new_tokens=60', '--temperature=1', '--end_token=')
    text = whole[whole.index('bytes\n') + 6:-1]
    assert text.startswith('one')
    a, b = text[20:23], text[30:34]
    for number in (1, 2):
        out = sample(tiny_run, '--start=one', f'--num_samples={number}', '--max_new_tokens=60', '--temperature=1', '--end_token=', f'--stop={b}', f'--stop={a}')
        first = min(text.index(stop, 3) for stop in (a, b))
        assert out[out.index('bytes\n') + 6:].startswith(text[:first] + '\n')


@pytest.fixture(scope='module')
def chinese_run(tmp_path_factory):
    """A network on a byte-level BPE, which knows no character as a whole."""
    folder = tmp_path_factory.mktemp('chinese')
    text = '满纸荒唐言，一把辛酸泪！都云作者痴，谁解其中味？\n' * 80
    make_dataset(folder / 'd', write(folder / 'x.txt', text), tokenizer='bbpe', vocab_size=262)
    result = run_script('train.py', f'--dataset={folder / "d"}', f'--out_dir={folder / "out"}', '--device=cpu', '--dtype=float32', '--compile=False', '--n_layer=1', '--n_head=2',
                        '--n_embd=32', '--block_size=32', '--batch_size=4', '--gradient_accumulation_steps=1', '--eval_iters=1', '--max_iters=20', '--learning_rate=3e-3')
    assert result.code == 0, result.err
    return folder / 'out'


def test_streaming_never_splits_a_character(chinese_run):
    """What is written to a pipe, piece by piece, is whole characters each time, and comes before the end."""
    command = [sys.executable, 'sample.py', f'--out_dir={chinese_run}', '--device=cpu', '--start=满纸', '--num_samples=1', '--max_new_tokens=300', '--temperature=1.5', '--end_token=']
    pieces = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        while piece := os.read(process.stdout.fileno(), 65536):
            pieces.append(piece)
    assert process.returncode == 0 and len(pieces) > 20
    assert ''.join(piece.decode() for piece in pieces).count('\ufffd') == 0


def test_interactive(tiny_run, monkeypatch):
    """Each line is continued; one that cannot be is said, and the next one asked for."""
    lines = iter(['one', 'Ω', '', 'two'])

    def answer(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None
    monkeypatch.setattr('builtins.input', answer)
    result = run_script('sample.py', f'--out_dir={tiny_run}', '--device=cpu', '--interactive', '--max_new_tokens=5')
    assert result.code == 0
    assert "'Ω' (U+03A9)" in result.err and 'no text to continue' in result.err
    assert result.out.split('bytes\n')[1].startswith('one') and '\ntwo' in result.out


def test_interrupted(chinese_run, tmp_path):
    """Ctrl-C ends the sample, and what there is is printed and written."""
    command = [sys.executable, 'sample.py', f'--out_dir={chinese_run}', '--device=cpu', '--start=满纸', '--num_samples=1', '--max_new_tokens=10000000', f'--out={tmp_path / "o.jsonl"}', '--end_token=']
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while '满纸'.encode() not in os.read(process.stdout.fileno(), 65536):
            pass
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b'')
    record, = records(tmp_path / 'o.jsonl')
    assert record['over'] == 'interrupted' and len(record['text']) > 3


@pytest.mark.parametrize('number', [1, 64])
def test_closed_pipe(tiny_run, tmp_path, number):
    """`| head` ends it quietly, and what there is is written to the file."""
    done = subprocess.run(f'{sys.executable} sample.py --out_dir={tiny_run} --device=cpu --start=one --num_samples={number} --max_new_tokens={90000 if number == 1 else 80} '
                          f'--end_token= --logprobs --out={tmp_path / "o.jsonl"} | head -c 2000', shell=True, cwd=ROOT, capture_output=True)
    assert done.stderr == b'' and b' bytes\none' in done.stdout
    assert len(records(tmp_path / 'o.jsonl')) == number


def test_bytes_that_are_no_text(chinese_run, tmp_path):
    """Typed in another encoding they are refused with one line, or left out; the next line is continued."""
    command = f'{sys.executable} sample.py --out_dir={chinese_run} --device=cpu --max_new_tokens=3 --num_samples=1'
    done = subprocess.run(command.split() + [b'--start=\xba\xec'], cwd=ROOT, capture_output=True)
    assert done.returncode == 1 and done.stderr.decode().count('\n') == 1 and 'U+DCBA' in done.stderr.decode()
    for args, lines in (([], 1), (['--skip_unknown'], 0)):
        done = subprocess.run([*command.split(), '--interactive', *args], cwd=ROOT, capture_output=True, input=b'\xba\xec\xe6\xbb\xa1\n' + '纸'.encode(),
                              env={**os.environ, 'PYTHONIOENCODING': 'utf-8:strict'})
        assert done.returncode == 0 and done.stderr.decode().count('\n') == lines, done.stderr.decode()
        shown = done.stdout.decode().split('bytes\n')[1]
        assert '> 纸' in shown and ('> 满' in shown) == bool(args)


def test_separators(tiny_run, tmp_path):
    """Several texts have a line between them, however they fall into batches; those of --start come first."""
    (tmp_path / 'p.txt').write_text('one\ntwo\n', encoding='utf-8')
    for rows in (1, 2, 3):
        out = sample(tiny_run, f'--prompts={tmp_path / "p.txt"}', '--start=six', '--num_samples=1', '--max_new_tokens=5', f'--batch_size={rows}').split('bytes\n')[1]
        assert [text[:3] for text in out.split('\n---------------\n')] == ['six', 'one', 'two', '']


def test_half_characters(chinese_run):
    """--logprobs shows the bytes of a token that is no whole character."""
    out = sample(chinese_run, '--start=满纸', '--num_samples=2', '--max_new_tokens=40', '--logprobs')
    assert r"b'\x" in out and r'\ufffd' not in out and '\ufffd' not in out


def test_texts_from_windows(tiny_run, tmp_path):
    """A byte-order mark is no part of the text, and a new line is one however it is typed."""
    (tmp_path / 'p.txt').write_text('one', encoding='utf-8-sig')
    for args in ([f'--prompts={tmp_path / "p.txt"}'], [f'--start=FILE:{tmp_path / "p.txt"}']):
        assert 'bytes\none' in sample(tiny_run, *args, '--num_samples=1', '--max_new_tokens=5')
    outs = [sample(tiny_run, '--start=one', '--max_new_tokens=60', '--temperature=1', f'--stop={stop}', '--num_samples=1') for stop in ('\\n', '\n')]
    assert outs[0].split('bytes\n')[1] == outs[1].split('bytes\n')[1] and outs[0].split('bytes\n')[1].count('\n') == 1


def test_padded_ids_are_never_sampled(tmp_path):
    """A head with rows for ids that the tokenizer does not have, and these the most likely ones."""
    text = ''.join(chr(0x4e00 + i) for i in range(4200)) * 2
    make_dataset(tmp_path / 'd', write(tmp_path / 'x.txt', text), tokenizer='char')
    args = ['--device=cpu', '--dtype=float32', '--compile=False', '--n_layer=1', '--n_head=1', '--n_embd=8', '--block_size=8', '--batch_size=1', '--gradient_accumulation_steps=1', '--eval_iters=1']
    assert run_script('train.py', *args, f'--dataset={tmp_path / "d"}', f'--out_dir={tmp_path / "o"}', '--max_iters=1').code == 0
    checkpoint = torch.load(tmp_path / 'o' / 'ckpt.pt', weights_only=True)
    assert checkpoint['model']['lm_head.weight'].shape[0] == 4224
    known = 4201
    checkpoint['model']['lm_head.weight'][known:] = 100 * torch.sign(checkpoint['model']['transformer.ln_f.weight'])
    checkpoint['model']['transformer.wte.weight'] = checkpoint['model']['lm_head.weight']
    torch.save(checkpoint, tmp_path / 'o' / 'ckpt.pt')
    for extra in ([], ['--top_k=0'], ['--temperature=0'], ['--top_p=0.9', '--top_k=0']):
        result = run_script('sample.py', f'--ckpt={tmp_path / "o" / "ckpt.pt"}', '--device=cpu', '--num_samples=3', '--max_new_tokens=20', f'--out={tmp_path / "s"}', *extra)
        assert result.code == 0, result.err
        assert max(max(record['tokens']) for record in records(tmp_path / 's')) < known


@pytest.mark.parametrize('args, names', [
    (['--min_p=1.5'], ['min_p=1.5']),
    (['--min_p=-0.1'], ['min_p=-0.1']),
    (['--repetition_penalty=0'], ['repetition_penalty=0']),
    (['--batch_size=0'], ['batch_size=0', 'at least 1']),
    (['--max_new_tokens=0'], ['max_new_tokens=0', 'at least 1']),
    (['--start=oné'], ["'é' (U+00E9)", '--skip_unknown']),
    (['--end_token=<|im_end|>'], ['end_token=<|im_end|>', '<|endoftext|>']),
    (['--prompts=no.txt'], ['prompts=no.txt', 'No such file', 'UTF-8']),
    (['--prompts={folder}/empty.txt'], ['empty.txt', 'is empty']),
    (['--prompts={folder}/gbk.txt'], ['gbk.txt', 'UTF-8']),
    (['--prompts={folder}/second.txt'], ['second.txt, line 3', "'Ω' (U+03A9)"]),
    (['--prompts={folder}/second.txt', '--skip_unknown'], ['second.txt, line 3', 'no text to continue']),
    (['--interactive'], ['interactive', '--start']),
    (['--out={folder}/none/o.jsonl'], ['o.jsonl', 'no such folder']),
    (['--dtype=int4'], ['dtype=int4', 'int8']),
    (['--out={folder}'], ['out=', 'no regular file']),
    (['--out=/dev/null'], ['out=/dev/null', 'no regular file']),
    (['--seed=99999999999999999999'], ['seed=99999999999999999999', '2**63']),
], ids=lambda x: x[0] if isinstance(x, list) else '')
def test_bad_input(tiny_run, tmp_path, args, names):
    (tmp_path / 'empty.txt').write_text('\n', encoding='utf-8')
    (tmp_path / 'second.txt').write_text('one\n\nΩ\n', encoding='utf-8')
    (tmp_path / 'gbk.txt').write_bytes('红楼梦'.encode('gbk'))
    args = [arg.replace('{folder}', str(tmp_path)) for arg in args]
    result = run_script('sample.py', f'--out_dir={tiny_run}', '--device=cpu', '--start=one', *args)
    assert result.code == 1 and len(result.err.strip().splitlines()) == 1, result.err
    for name in names:
        assert name in result.err


def test_what_is_said(tiny_run):
    """A prompt that does not fit, top_k=0, and characters that were left out on demand."""
    result = run_script('sample.py', f'--out_dir={tiny_run}', '--device=cpu', '--start=' + 'one two ' * 9 + 'Ω', '--max_new_tokens=3', '--num_samples=1', '--skip_unknown', '--top_k=0')
    assert result.code == 0
    assert result.err == 'top_k=0: drawing from all tokens\nthe text has 72 tokens, the context of this network 32: its last 32 count\n'
