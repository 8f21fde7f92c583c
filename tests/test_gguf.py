"""GGUF files in llama.cpp itself (the package xllamacpp): the same logits, the same tokens, the same end of text."""
import functools
import http.client
import json
import os
import random
import socket
import sys
import tempfile
import unicodedata

import numpy as np
import pytest
import torch
from conftest import exit_line, run_script

from core.text.chat_template import JINJA, chat_tokenizer, end_of_turn, render
from core.text.tokenizer import (
    EOT,
    Tokenizer,
    bpe_tokenizer,
    char_tokenizer,
    gpt2_tokenizer,
    prune_tokenizer,
    qwen2_tokenizer,
    train_bpe,
)
from core.weights.gguf import FILE_TYPES, LLAMA3_SPLIT, modelfile, write_gguf
from model import GPT, GPTConfig

gguf = pytest.importorskip('gguf')
xllamacpp = pytest.importorskip('xllamacpp')
pytestmark = pytest.mark.skipif(not hasattr(socket, 'AF_UNIX'), reason='needs Unix sockets')

MODERN = dict(bias=False, norm='rmsnorm', activation='swiglu', rope_theta=1e4, n_kv_head=2)
NETWORKS = {
    'qwen3': dict(**MODERN, qk_norm=True),
    'qwen3, untied': dict(**MODERN, qk_norm=True, tied=False, head_size=24, norm_eps=1e-6),
    'llama': dict(**MODERN, head_size=40),
    'llama, untied': {**MODERN, 'tied': False, 'n_kv_head': 1, 'rope_theta': 1e6},
    'gpt2': dict(activation='gelu_tanh'),
    'gpt2, untied': dict(activation='gelu_tanh', tied=False, bias=False),
}
DOWNLOADED = [pytest.mark.slow, pytest.mark.network]
TOKENIZERS = ['char', 'bbpe', *(pytest.param(name, marks=DOWNLOADED) for name in ('gpt2', 'pruned qwen2', 'qwen2'))]


QUANTS = list(FILE_TYPES)


class Connection(http.client.HTTPConnection):
    """A connection to a Unix socket."""

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.host)


class Llama:
    """llama.cpp's server with a GGUF file, at a Unix socket. It computes in float32 throughout."""

    def __init__(self, path):
        self.folder = tempfile.TemporaryDirectory()  # pytest's folders are too long for a socket's name
        address = os.path.join(self.folder.name, 'x.sock')
        params = xllamacpp.CommonParams()
        params.model.path, params.hostnames, params.verbosity, params.warmup = str(path), [address], -1, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        off = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.flash_attn_type = off  # it multiplies in float16
        self.server = xllamacpp.Server(params)
        self.connection = Connection(address)
        self.complete([0], 1)  # a server that is destroyed before its loop has begun waits for that loop for ever

    def post(self, route, **content):
        headers = {'Content-Type': 'application/json', 'Host': 'here'}
        self.connection.request('POST', route, json.dumps(content), headers)
        answer = json.loads(self.connection.getresponse().read())
        self.connection.close()  # the server would, after five seconds; the next request opens it again
        assert 'error' not in answer, answer
        return answer

    def complete(self, prompt, n, **more):
        settings = dict(n_predict=n, temperature=0, n_probs=1, return_tokens=True)
        return self.post('/completion', prompt=prompt, **settings, **more)

    def tokenize(self, text, **more):
        return self.post('/tokenize', content=text, **more)['tokens']

    def losses(self, ids):
        """Return the loss of every id but the first, in nats; NaN for parts of characters, which it omits."""
        losses = []
        for i in range(1, len(ids)):
            # the bias forces the choice of this id; the reported probability is without it
            answer = self.complete(ids[:i], 1, logit_bias=[[ids[i], 1e6]])
            assert answer['tokens'] == [ids[i]]
            found = answer.get('completion_probabilities')
            losses.append(-found[0]['logprob'] if found else np.nan)
        return np.array(losses)


PROSE = ('It is a truth universally acknowledged, that a single man in possession of a good fortune, '
         'must be in want of a wife.\n'
         'However little known the feelings or views of such a man may be, on his first entering a neighbourhood, '
         "this truth isn't so well fixed...\n"
         '满纸荒唐言，一把辛酸泪！都云作者痴，谁解其中味？此开卷第一回也。作者自云：“因曾历过一番梦幻之后，故将真事隐去。”\n')


@functools.cache
def corpus():
    """A text that can be learned in both scripts: counting."""
    words = 'zero one two three four five six seven eight nine'.split()
    lines = []
    for n in range(1000, 3000):
        digits = [int(digit) for digit in str(n)]
        english = ' '.join(words[digit] for digit in digits)
        chinese = ''.join('零一二三四五六七八九'[digit] for digit in digits)
        lines.append(f'{n}: {english}, {chinese}。\n')
    return PROSE + ''.join(lines)


@functools.cache
def a_tokenizer(name):
    if name == 'char':
        return char_tokenizer(sorted({*corpus(), *'Tkaé你好😀', *map(chr, range(0x4e00, 0x4f00))}))
    if name == 'bbpe':
        return train_bpe([corpus()], 400)
    if name == 'gpt2':
        return gpt2_tokenizer()
    qwen2 = qwen2_tokenizer()
    return qwen2 if name == 'qwen2' else prune_tokenizer(qwen2, np.unique(qwen2.encode(corpus())))


def network(tokenizer, **settings):
    """Return a network with large weights in its blocks: it does not repeat one token, and every weight matters."""
    torch.manual_seed(1)
    shape = dict(vocab_size=tokenizer.vocab_size, block_size=128, n_layer=2, n_head=4, n_embd=64)
    config = GPTConfig(**{**shape, **settings})
    model = GPT(config).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.add_(torch.randn_like(p) / 4)
        elif 'wte' in name or 'lm_head' in name:
            p.mul_(2)
        elif 'mlp' in name and not config.rope_theta:
            p.mul_(4)  # llama.cpp's GELU is a table in float16
        else:
            p.mul_(12)
    return model


def opened(path, model, tokenizer, quant='f32'):
    write_gguf(path, model, tokenizer, quant, 'a model')
    return Llama(path)


def random_ids(tokenizer, n):
    return np.random.default_rng(0).integers(tokenizer.vocab_size, size=n).tolist()


def our_losses(model, ids):
    return model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))[0].numpy()


def texts(tokenizer, n):
    """Return n texts: half are random mixtures of common and rare strings, half are cut from the corpus."""
    rng = random.Random(0)
    strings = ['Hello', ' world', "'s", "'LL", ' ', '   ', '\n', '\n\n', '\r\n', '\t', '7', '1234567', '!', '...',
               '你好', '，', '。”', '\u3000', '天地玄黄', 'é', 'e\u0301', 'ﬁ', 'Ω', '한국', 'नमस्ते', '٣', 'Ⅷ', '½', '😀',
               '👩\u200d👩\u200d👧', '𝒳', '\ufeff', '\u2028', '\x00', EOT, '<|im_start|>user\n', 'x_y', '—']
    found = [''.join(rng.choices(strings, k=rng.randint(1, 12))) for _ in range(n // 2)]
    for _ in range(n // 2):
        start = rng.randrange(2 * len(PROSE))
        found.append(corpus()[start:start + rng.randint(10, 80)])
    if tokenizer.is_char:
        return [''.join(char for char in text if not tokenizer.unknown(char)) for text in found]
    return [unicodedata.normalize('NFC', text) for text in found]


@pytest.mark.parametrize('tokenizer', TOKENIZERS)
def test_tokens(tmp_path, capsys, tokenizer):
    """Text to ids and back, special tokens parsed or not. The model has more rows than the tokenizer ids."""
    tok = chat_tokenizer(a_tokenizer(tokenizer))
    llama = opened(tmp_path / 'x.gguf', network(tok, n_layer=1, vocab_size=tok.vocab_size + 5), tok)
    assert ('NFC' in capsys.readouterr().out) == ('qwen2' in tokenizer)
    for text in texts(tok, 200):
        ids = tok.encode(text).tolist()
        assert llama.tokenize(text, parse_special=False) == ids, text
        assert llama.post('/detokenize', tokens=ids)['content'] == text
    assert llama.tokenize(f'a{EOT}a') == [*tok.encode('a'), tok.eot, *tok.encode('a')]


@pytest.mark.parametrize('ignore_merges', [False, True])
def test_llama3_words(tmp_path, ignore_merges):
    """Llama 3's pre-tokenizer, with and without a token that no merge produces."""
    merges = [' '.join(pair) for pair in a_tokenizer('bbpe')._merges]
    spec = json.loads(bpe_tokenizer(merges, split=LLAMA3_SPLIT).json)
    spec['model'].update(ignore_merges=ignore_merges, vocab={**spec['model']['vocab'], 'zqzq': 400})
    tok = Tokenizer(json.dumps(spec))
    assert (tok.encode('zqzq').tolist() == [400]) == ignore_merges
    llama = opened(tmp_path / 'x.gguf', network(tok, n_layer=1), tok)
    for text in [*texts(tok, 200), 'zqzq', 'zqzq 1234567 zqzq']:
        assert llama.tokenize(text, parse_special=False) == tok.encode(text).tolist(), text


@pytest.mark.parametrize('chars', ['ab', 'aé你😀', 'ab \n'])  # the first has no newline, and ASCII needs no merges
def test_characters(chars, tmp_path):
    """llama.cpp drops characters that the vocabulary lacks and does not join their neighbours."""
    tok = char_tokenizer(chars)
    llama = opened(tmp_path / 'x.gguf', network(tok), tok)
    text = 'xaéb你c你好b😀😁\n a'
    assert llama.tokenize(text) == [chars.index(char) for char in text if char in chars]


@pytest.mark.parametrize('tokenizer', TOKENIZERS[:4])
@pytest.mark.parametrize('style', NETWORKS)
def test_greedy_text(tmp_path, style, tokenizer):
    """60 tokens and their log-probabilities are equal."""
    tok = a_tokenizer(tokenizer)
    model = network(tok, **NETWORKS[style])
    prompt = 'The truth 一番，a'
    start = tok.encode(prompt).tolist()
    got = opened(tmp_path / 'x.gguf', model, tok).complete(prompt, 60, ignore_eos=True)
    ends = [i for text, i in tok.specials.items() if text in (EOT, '<|im_end|>')]
    ids = start
    losses = []
    for _ in range(60):
        logits = model.lm_head(model.hidden(torch.tensor([ids]))[0, -1])
        chosen = logits.index_fill(0, torch.tensor(ends), float('-inf')).argmax().item()
        losses.append(-logits.log_softmax(0)[chosen].item())
        ids = [*ids, chosen]
    assert got['tokens_evaluated'] == len(start)
    assert got['tokens'] == ids[len(start):]
    assert len(set(got['tokens'])) > 8
    llama_losses = [-token['logprob'] for token in got['completion_probabilities']]
    if tok.is_char:
        assert got['content'] == tok.decode(got['tokens'])
        assert len(llama_losses) == 60
    if len(llama_losses) == 60:  # llama.cpp omits parts of characters
        assert np.abs(np.array(llama_losses) - losses).max() < (1e-4 if model.config.rope_theta else 1e-3)


@pytest.mark.parametrize('style', NETWORKS)
def test_log_probabilities(tmp_path, capsys, style):
    """Of random tokens, at every position of the context. Nothing is printed."""
    tok = a_tokenizer('char')
    model = network(tok, **NETWORKS[style])
    ids = random_ids(tok, 128)
    error = np.abs(opened(tmp_path / 'x.gguf', model, tok).losses(ids) - our_losses(model, ids)).max()
    assert error < (2e-5 if model.config.rope_theta else 1e-3)
    assert not capsys.readouterr().out


def test_exact_gelu(tmp_path, capsys):
    tok = a_tokenizer('char')
    model = network(tok)
    ids = random_ids(tok, 60)
    assert np.abs(opened(tmp_path / 'x.gguf', model, tok).losses(ids) - our_losses(model, ids)).max() < 2e-3
    assert 'GELU' in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize('style', ['qwen3', 'gpt2'])
def test_perplexity(tmp_path, style):
    """Of a trained network: eight bits cost next to nothing, four a little."""
    tok = a_tokenizer('char')  # llama.cpp omits the probabilities of parts of characters
    torch.manual_seed(1)
    model = GPT(GPTConfig(vocab_size=tok.vocab_size, block_size=64, n_layer=2, n_head=2, n_embd=64, **NETWORKS[style]))
    data = torch.from_numpy(tok.encode(corpus()))
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        rows = torch.stack([data[i:i + 65] for i in torch.randint(len(data) - 65, (16,))])
        model(rows[:, :-1], rows[:, 1:]).mean().backward()
        opt.step()
        opt.zero_grad()
    model.requires_grad_(False)
    windows = [data[i:i + 64].tolist() for i in range(0, len(data) - 64, len(data) // 10)]
    here = np.mean([our_losses(model, ids) for ids in windows])
    measured, sizes = {}, {}
    for quant in QUANTS:
        path = tmp_path / f'{quant}.gguf'
        llama = opened(path, model, tok, quant)
        measured[quant] = np.mean([llama.losses(ids) for ids in windows])
        sizes[quant] = os.path.getsize(path)
    more = {quant: np.expm1(loss - measured['f32']) for quant, loss in measured.items()}  # of the perplexity
    assert here < 5 and abs(np.expm1(here - measured['f32'])) < 1e-3, (here, measured)
    assert abs(more['f16']) < 1e-3 and abs(more['bf16']) < 3e-3, more
    assert abs(more['q8_0']) < 0.005, more
    assert all(-0.02 < more[quant] < 0.1 for quant in QUANTS if quant.startswith(('q4', 'q5'))), more
    assert sizes['f32'] > sizes['f16'] == sizes['bf16']
    quantised = [sizes[quant] for quant in ('f16', 'q8_0', 'q5_1', 'q5_0', 'q4_1', 'q4_0')]
    assert sorted(set(quantised), reverse=True) == quantised


@pytest.mark.parametrize('quant', QUANTS)
def test_types(tmp_path, capsys, quant):
    """The type of every tensor. Vectors and positions are F32; with 4 and 5 bits embedding and head are Q8_0."""
    tok = a_tokenizer('char')
    write_gguf(tmp_path / 'x.gguf', network(tok, **NETWORKS['gpt2, untied']), tok, quant, 'x')
    assert not capsys.readouterr().out
    reader = gguf.GGUFReader(tmp_path / 'x.gguf')
    for tensor in reader.tensors:
        expected = quant.upper()
        if len(tensor.shape) == 1 or 'position' in tensor.name:
            expected = 'F32'
        elif quant.startswith('q') and tensor.name in ('token_embd.weight', 'output.weight'):
            expected = 'Q8_0'
        assert tensor.tensor_type.name == expected, tensor.name
    file_type = gguf.LlamaFileType(int(reader.fields['general.file_type'].parts[-1][0]))
    assert file_type.name.removeprefix('MOSTLY_').removeprefix('ALL_') == quant.upper()


@pytest.mark.parametrize('quant', QUANTS)
def test_rows_that_cannot_be_quantised(tmp_path, capsys, quant):
    """Rows that are no multiple of 32 are written in float16, and one line says so."""
    tok = a_tokenizer('char')
    model = network(tok, **NETWORKS['qwen3'], n_inner=100)
    ids = tok.encode('The truth').tolist()
    llama = opened(tmp_path / 'x.gguf', model, tok, quant)
    out = capsys.readouterr().out
    if quant.startswith('q'):
        assert out.count('\n') == 1 and 'blk.0.ffn_down.weight and 1 more will be in f16' in out
    else:
        assert not out
    tolerance = 2.0 if quant.startswith(('q4', 'q5')) else 0.2
    assert llama.losses(ids) == pytest.approx(our_losses(model, ids), abs=tolerance)


@pytest.mark.parametrize('tokenizer', TOKENIZERS)
def test_chat(tmp_path, tokenizer):
    """The chat template gives the ids that render() trains on. End of turn and end of text both end an answer."""
    tok = chat_tokenizer(a_tokenizer(tokenizer))
    llama = opened(tmp_path / 'x.gguf', network(tok, **NETWORKS['qwen3']), tok)
    messages = []
    for role, text in [
        ('system', '一番'),
        ('user', ' The truth, a  truth: a\n'),
        ('assistant', '真事 a \n'),
        ('user', 'a'),
    ]:
        messages.append({'role': role, 'content': ''.join(char for char in text if not tok.unknown(char))})
    ids = render(messages, tok, reply=True)[0].tolist()
    assert gguf.GGUFReader(tmp_path / 'x.gguf').fields['tokenizer.chat_template'].contents() == JINJA
    prompt = llama.post('/apply-template', messages=messages)['prompt']
    assert llama.tokenize(prompt, add_special=True) == ids
    for end in (tok.eot, end_of_turn(tok)):
        forced = dict(logit_bias=[[end, 1e6]])
        got = llama.post('/v1/chat/completions', messages=messages, max_tokens=9, temperature=0, **forced)
        assert got['choices'][0]['finish_reason'] == 'stop'
        assert got['usage']['prompt_tokens'] == len(ids)
        assert got['usage']['completion_tokens'] == 1
        assert llama.complete('a', 9, **forced)['stop_type'] == 'eos'


def test_no_end_of_text(tmp_path, capsys):
    """No ordinary token ends a text, least of all id 11, which is llama.cpp's default."""
    tok = bpe_tokenizer(['a b', 'ab c'], specials=())
    llama = opened(tmp_path / 'x.gguf', network(tok), tok)
    assert f'no {EOT}' in capsys.readouterr().out
    for token in (11, *tok.encode('abc')):
        assert llama.complete('ab', 4, logit_bias=[[int(token), 1e6]])['tokens'] == [token] * 4


def test_added_tokens_that_are_not_special(tmp_path):
    """Tokens such as <think> are shown in the text; special ones are not."""
    tok = with_spec(a_tokenizer('bbpe'), added_tokens=[
        {'id': 399, 'content': EOT, 'special': True},
        {'id': 401, 'content': '<think>', 'special': False},
        {'id': 402, 'content': '<|pad|>', 'special': True},
    ])
    llama = opened(tmp_path / 'x.gguf', network(tok), tok)
    assert llama.tokenize('a<think>a<|pad|>') == [*tok.encode('a'), 401, *tok.encode('a'), 402]
    assert llama.complete('a', 1, logit_bias=[[401, 1e6]])['content'] == '<think>'
    assert llama.complete('a', 1, logit_bias=[[402, 1e6]])['content'] == ''


def with_spec(tokenizer, **changes):
    """Return the tokenizer with other entries in its tokenizer.json, or in the 'model' there."""
    spec = json.loads(tokenizer.json)
    for key, value in changes.items():
        in_model = key in spec['model'] or key == 'ignore_merges'
        target = spec['model'] if in_model else spec
        target[key] = value
    return Tokenizer(json.dumps(spec))


@pytest.mark.parametrize('change, names', [
    (dict(normalizer={'type': 'NFKC'}), ['normalizer NFKC', '--tokenizer=bbpe', '--format=hf']),
    (dict(dropout=0.1), ['dropout']),
    (dict(ignore_merges=True), ['pattern of words', 's+(?!']),
    (dict(pre_tokenizer={'type': 'ByteLevel', 'add_prefix_space': False, 'use_regex': False}), ["pattern of words ''"]),
])
def test_refuses_tokenizers(tmp_path, change, names):
    tok = with_spec(a_tokenizer('bbpe'), **change)
    line = exit_line(write_gguf, tmp_path / 'x.gguf', network(tok), tok, 'f32', 'a model')
    assert line.startswith('a model: ') and all(name in line for name in names), line
    assert not list(tmp_path.iterdir())


def test_refusals(tmp_path, monkeypatch):
    tok, path = a_tokenizer('char'), tmp_path / 'x.gguf'
    mixed = network(tok, **{**MODERN, 'norm': 'layernorm'})
    assert 'layernorm' in exit_line(write_gguf, path, mixed, tok, 'f32', 'a model')
    letters = with_spec(char_tokenizer('ab'), added_tokens=[], vocab={'a': 0, 'b': 1})
    assert EOT in exit_line(write_gguf, path, network(letters), letters, 'f32', 'a model')
    windows = network(tok, **MODERN, qk_norm=True, window=8)
    assert 'window=8' in exit_line(write_gguf, path, windows, tok, 'f32', 'a model')
    with pytest.raises(OSError, match='nowhere'):
        write_gguf(tmp_path / 'nowhere' / 'x.gguf', network(tok), tok, 'f32', 'a model')
    monkeypatch.setitem(sys.modules, 'gguf', None)
    assert 'pip install gguf' in exit_line(write_gguf, path, network(tok), tok, 'f32', 'a model')
    assert list(tmp_path.iterdir()) == []


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    """The same bytes every time. After Ctrl-C the old file is there, and no other."""
    tok, path = a_tokenizer('bbpe'), tmp_path / 'x.gguf'
    model = network(tok, **NETWORKS['llama'])
    written = []
    for quant in ('q4_0', 'q4_0', 'q8_0'):
        write_gguf(path, model, tok, quant, 'x')
        written.append(path.read_bytes())
    assert written[0] == written[1] != written[2]

    def interrupted(writer):
        writer.write_ti_data_to_file()
        raise KeyboardInterrupt
    monkeypatch.setattr(gguf.GGUFWriter, 'write_tensors_to_file', interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_gguf(path, model, tok, 'f32', 'x')
    assert [*tmp_path.iterdir()] == [path] and path.read_bytes() == written[2]


def test_modelfile():
    """As Ollama documents it; Ollama itself is not run."""
    assert modelfile('x.gguf', a_tokenizer('char'), 64) == (
        'FROM ./x.gguf\nTEMPLATE """{{ .Prompt }}"""\nPARAMETER stop "<|endoftext|>"\nPARAMETER num_ctx 64\n')
    assert modelfile('x.gguf', chat_tokenizer(a_tokenizer('char')), 64) == (
        'FROM ./x.gguf\n'
        'TEMPLATE """{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}'
        '<|im_start|>assistant\n"""\n'
        'PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\nPARAMETER num_ctx 64\n')


@pytest.mark.slow
def test_beside_llamacpp(tmp_path):
    """bench.py times both, for either style. It refuses more tokens than the context has before it starts."""
    config = GPTConfig(vocab_size=99, n_layer=1, n_head=2, n_embd=32, **NETWORKS['qwen3'])
    torch.save({'model': {}, 'model_args': vars(config)}, tmp_path / 'ckpt.pt')
    arguments = ['--sample', '--prompt_tokens=2', '--runs=1', '--dtypes=int8', '--samples=1', '--llamacpp']
    for name in ('char', tmp_path):
        result = run_script('bench.py', *arguments, f'--network={name}', '--new_tokens=62')
        assert result.code == 0, result.err
        header, llama, here = (line.replace(',', '').split() for line in result.out.splitlines()[-3:])
        assert header[-2:] == ['/', 'llama.cpp']
        assert llama[0] == 'llama.cpp' and float(llama[-1]) == 1
        assert float(here[-1]) == pytest.approx(float(here[2]) / float(llama[1]), abs=0.01)
    result = run_script('bench.py', *arguments, '--network=char', '--new_tokens=63')
    assert result.code == 1 and result.err.count('\n') == 1 and 'new_tokens=63' in result.err
