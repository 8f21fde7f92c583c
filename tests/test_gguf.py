"""GGUF files in the real llama.cpp, as xllamacpp brings it along: it computes the same, cuts text into the same tokens, and ends where it should."""
import functools
import http.client
import json
import os
import random
import socket
import tempfile
import unicodedata

import numpy as np
import pytest
import torch
from conftest import exit_line, run_script

from core.text.chat_template import JINJA, chat_tokenizer, end_of_turn, render
from core.text.tokenizer import EOT, Tokenizer, bpe_tokenizer, char_tokenizer, gpt2_tokenizer, prune_tokenizer, qwen2_tokenizer, train_bpe
from core.weights.gguf import LLAMA3_SPLIT, modelfile, write_gguf
from model import GPT, GPTConfig

gguf = pytest.importorskip('gguf')
xllamacpp = pytest.importorskip('xllamacpp')
pytestmark = pytest.mark.skipif(not hasattr(socket, 'AF_UNIX'), reason='no sockets but those of the network')

MODERN = dict(bias=False, norm='rmsnorm', activation='swiglu', rope_theta=1e4, n_kv_head=2)
NETWORKS = {'qwen3': dict(**MODERN, qk_norm=True), 'qwen3, untied': dict(**MODERN, qk_norm=True, tied=False, head_size=24, norm_eps=1e-6),
            'llama': dict(**MODERN, head_size=40), 'llama, untied': {**MODERN, 'tied': False, 'n_kv_head': 1, 'rope_theta': 1e6},
            'gpt2': dict(activation='gelu_tanh'), 'gpt2, untied': dict(activation='gelu_tanh', tied=False, bias=False)}
far = [pytest.mark.slow, pytest.mark.network]
TOKENIZERS = ['char', 'bbpe', pytest.param('gpt2', marks=far), pytest.param('pruned qwen2', marks=far), pytest.param('qwen2', marks=far)]


class Connection(http.client.HTTPConnection):
    """To a socket in the file system."""

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.host)


class Llama:
    """A GGUF file, opened by llama.cpp's server, which listens at a socket in the file system; in float32 throughout."""

    def __init__(self, path):
        self.folder = tempfile.TemporaryDirectory()  # a socket's name may not be as long as those of pytest's folders
        address = os.path.join(self.folder.name, 'x.sock')
        params = xllamacpp.CommonParams()
        params.model.path, params.hostnames, params.verbosity, params.warmup = str(path), [address], -1, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # its products are in float16
        self.server = xllamacpp.Server(params)
        self.connection = Connection(address)

    def post(self, route, **content):
        self.connection.request('POST', route, json.dumps(content), {'Content-Type': 'application/json', 'Host': 'here'})
        answer = json.loads(self.connection.getresponse().read())
        assert 'error' not in answer, answer
        return answer

    def complete(self, prompt, n, **more):
        return self.post('/completion', prompt=prompt, n_predict=n, temperature=0, n_probs=1, return_tokens=True, **more)

    def losses(self, ids):
        """Of every id but the first, in nats; NaN where it tells none: of halves of characters."""
        asked = [self.complete(ids[:i], 1, logit_bias=[[ids[i], 1e6]]) for i in range(1, len(ids))]  # a bias changes what is chosen, not what is told
        assert [answer['tokens'] for answer in asked] == [[i] for i in ids[1:]]
        return np.array([-answer['completion_probabilities'][0]['logprob'] if answer.get('completion_probabilities') else np.nan for answer in asked])


PROSE = ('It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife.\n'
         "However little known the feelings or views of such a man may be, on his first entering a neighbourhood, this truth isn't so well fixed...\n"
         '满纸荒唐言，一把辛酸泪！都云作者痴，谁解其中味？此开卷第一回也。作者自云：“因曾历过一番梦幻之后，故将真事隐去。”\n')


@functools.cache
def corpus():
    """Something to learn in both scripts: counting."""
    english, chinese = 'zero one two three four five six seven eight nine'.split(), '零一二三四五六七八九'
    return PROSE + ''.join(f'{n}: {" ".join(english[int(i)] for i in str(n))}, {"".join(chinese[int(i)] for i in str(n))}。\n' for n in range(1000, 3000))


@functools.cache
def a_tokenizer(name):
    return {'char': lambda: char_tokenizer(sorted({*corpus(), *'Tkaé你好😀', *map(chr, range(0x4e00, 0x4f00))})), 'bbpe': lambda: train_bpe([corpus()], 400),
            'gpt2': gpt2_tokenizer, 'qwen2': qwen2_tokenizer,
            'pruned qwen2': lambda: prune_tokenizer(qwen2_tokenizer(), np.unique(qwen2_tokenizer().encode(corpus())))}[name]()


def network(tokenizer, **settings):
    """One whose weights are large but for the embedding's, and none alike: so it does not write the same token again and again, and all of them count."""
    torch.manual_seed(1)
    config = GPTConfig(**{**dict(vocab_size=tokenizer.vocab_size, block_size=128, n_layer=2, n_head=4, n_embd=64), **settings})
    model = GPT(config).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        larger = 2 if 'wte' in name or 'lm_head' in name else 4 if 'mlp' in name and not config.rope_theta else 12  # llama.cpp's GELU is a table in float16
        p.mul_(larger) if p.dim() == 2 else p.add_(torch.randn_like(p) / 4)
    return model


def opened(path, model, tokenizer, quant='f32'):
    write_gguf(path, model, tokenizer, quant, 'a model')
    return Llama(path)


def our_losses(model, ids):
    return model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))[0].numpy()


def texts(tokenizer, n):
    """Pieces of text in both scripts, and what is seldom: written as the tokenizer wants them."""
    chance = random.Random(0)
    pieces = ['Hello', ' world', "'s", "'LL", ' ', '   ', '\n', '\n\n', '\r\n', '\t', '7', '1234567', '!', '...', '你好', '，', '。”', '\u3000', '天地玄黄', 'é', 'e\u0301',
              'ﬁ', 'Ω', '한국', 'नमस्ते', '٣', 'Ⅷ', '½', '😀', '👩\u200d👩\u200d👧', '𝒳', '\ufeff', '\u2028', '\x00', EOT, '<|im_start|>user\n', 'x_y', '—']
    mixed = [''.join(chance.choices(pieces, k=chance.randint(1, 12))) for _ in range(n // 2)]
    cut = [corpus()[i:i + chance.randint(10, 80)] for i in (chance.randrange(2 * len(PROSE)) for _ in range(n // 2))]
    if tokenizer.is_char:
        return [''.join(char for char in text if not tokenizer.unknown(char)) for text in mixed + cut]
    return [unicodedata.normalize('NFC', text) for text in mixed + cut]


@pytest.mark.parametrize('tokenizer', TOKENIZERS)
def test_tokens(tmp_path, capsys, tokenizer):
    """Text to ids and back; names of special tokens are text unless they are to be parsed; rows beyond the vocabulary get in the way of nothing."""
    ours = chat_tokenizer(a_tokenizer(tokenizer))
    llama = opened(tmp_path / 'x.gguf', network(ours, n_layer=1, vocab_size=ours.vocab_size + 5), ours)
    assert ('NFC' in capsys.readouterr().out) == ('qwen2' in tokenizer)
    for text in texts(ours, 200):
        ids = ours.encode(text).tolist()
        assert llama.post('/tokenize', content=text, parse_special=False)['tokens'] == ids, text
        assert llama.post('/detokenize', tokens=ids)['content'] == text
    assert llama.post('/tokenize', content=f'a{EOT}a')['tokens'] == [*ours.encode('a'), ours.eot, *ours.encode('a')]


@pytest.mark.parametrize('ignore_merges', [False, True])
def test_llama3_words(tmp_path, ignore_merges):
    """Its split, with and without tokens that no merge leads to."""
    spec = json.loads(bpe_tokenizer([' '.join(pair) for pair in a_tokenizer('bbpe')._merges], split=LLAMA3_SPLIT).json)
    spec['model'].update(ignore_merges=ignore_merges, vocab={**spec['model']['vocab'], 'zqzq': 400})
    ours = Tokenizer(json.dumps(spec))
    assert (ours.encode('zqzq').tolist() == [400]) == ignore_merges
    llama = opened(tmp_path / 'x.gguf', network(ours, n_layer=1), ours)
    for text in [*texts(ours, 200), 'zqzq', 'zqzq 1234567 zqzq']:
        assert llama.post('/tokenize', content=text, parse_special=False)['tokens'] == ours.encode(text).tolist(), text


def test_characters(tmp_path):
    """Those that the vocabulary lacks are dropped, neighbours stay apart; ASCII alone, which needs no merges, is enough, without a newline too."""
    for known in ('ab', 'aé你😀', 'ab \n'):
        ours = char_tokenizer(known)
        llama = opened(tmp_path / 'x.gguf', network(ours), ours)
        assert llama.post('/tokenize', content='xaéb你c你好b😀😁\n a')['tokens'] == [known.index(char) for char in 'xaéb你c你好b😀😁\n a' if char in known]


@pytest.mark.parametrize('tokenizer', TOKENIZERS[:4])
@pytest.mark.parametrize('style', NETWORKS)
def test_greedy_text(tmp_path, style, tokenizer):
    """60 of 60 tokens, and their log-probabilities."""
    ours = a_tokenizer(tokenizer)
    model, prompt = network(ours, **NETWORKS[style]), 'The truth 一番，a'
    ids = start = ours.encode(prompt).tolist()
    got = opened(tmp_path / 'x.gguf', model, ours).complete(prompt, 60, ignore_eos=True)
    ends, losses = [i for text, i in ours.specials.items() if text in (EOT, '<|im_end|>')], []
    for _ in range(60):
        logits = model.lm_head(model.hidden(torch.tensor([ids]))[0, -1])
        chosen = logits.index_fill(0, torch.tensor(ends), float('-inf')).argmax().item()
        losses.append(-logits.log_softmax(0)[chosen].item())
        ids = [*ids, chosen]
    assert got['tokens_evaluated'] == len(start) and got['tokens'] == ids[len(start):] and len(set(got['tokens'])) > 8
    theirs = [-token['logprob'] for token in got['completion_probabilities']]
    if ours.is_char:
        assert got['content'] == ours.decode(got['tokens']) and len(theirs) == 60
    if len(theirs) == 60:  # it tells none of an unfinished character
        assert np.abs(np.array(theirs) - losses).max() < (1e-4 if model.config.rope_theta else 1e-3)


@pytest.mark.parametrize('style', NETWORKS)
def test_log_probabilities(tmp_path, capsys, style):
    """Of any tokens, at every position that there is."""
    ours = a_tokenizer('char')
    model, ids = network(ours, **NETWORKS[style]), np.random.default_rng(0).integers(ours.vocab_size, size=128).tolist()
    error = np.abs(opened(tmp_path / 'x.gguf', model, ours).losses(ids) - our_losses(model, ids)).max()
    assert error < (2e-5 if model.config.rope_theta else 1e-3) and not capsys.readouterr().out


def test_exact_gelu(tmp_path, capsys):
    ours = a_tokenizer('char')
    model, ids = network(ours), np.random.default_rng(0).integers(ours.vocab_size, size=60).tolist()
    assert np.abs(opened(tmp_path / 'x.gguf', model, ours).losses(ids) - our_losses(model, ids)).max() < 2e-3
    assert 'GELU' in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize('style', ['qwen3', 'gpt2'])
def test_perplexity(tmp_path, style):
    """Of a network that has learned something: eight bits cost next to nothing, four a little."""
    ours = a_tokenizer('char')  # of halves of characters llama.cpp tells no probabilities
    torch.manual_seed(1)
    model = GPT(GPTConfig(vocab_size=ours.vocab_size, block_size=64, n_layer=2, n_head=2, n_embd=64, **NETWORKS[style]))
    data = torch.from_numpy(ours.encode(corpus()))
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        rows = torch.stack([data[i:i + 65] for i in torch.randint(len(data) - 65, (16,))])
        model(rows[:, :-1], rows[:, 1:]).mean().backward()
        opt.step()
        opt.zero_grad()
    model.requires_grad_(False)
    windows = [data[i:i + 64].tolist() for i in range(0, len(data) - 64, len(data) // 10)]
    measured = {'ours': np.mean([our_losses(model, ids) for ids in windows])}
    for quant in ('f32', 'f16', 'bf16', 'q8_0', 'q4_0'):
        llama = opened(tmp_path / f'{quant}.gguf', model, ours, quant)
        measured[quant] = np.mean([llama.losses(ids) for ids in windows])
    more = {quant: np.expm1(loss - measured['f32']) for quant, loss in measured.items()}
    sizes = {quant: os.path.getsize(tmp_path / f'{quant}.gguf') for quant in measured if quant != 'ours'}
    assert measured['ours'] < 5 and abs(more['ours']) < 1e-3 and abs(more['f16']) < 1e-3 and abs(more['bf16']) < 3e-3, more
    assert abs(more['q8_0']) < 0.005 and -0.02 < more['q4_0'] < 0.1, more
    assert sizes['q4_0'] < sizes['q8_0'] < sizes['f16'] == sizes['bf16'] < sizes['f32'], sizes


@pytest.mark.parametrize('quant, types', [('f32', {'F32'}), ('f16', {'F16'}), ('bf16', {'BF16'}), ('q8_0', {'Q8_0'}), ('q4_0', {'Q4_0'})])
def test_types(tmp_path, capsys, quant, types):
    """What is written as what; rows that are no multiple of 32 as float16, and one line about them."""
    ours = a_tokenizer('char')
    write_gguf(tmp_path / 'x.gguf', network(ours, **NETWORKS['gpt2, untied']), ours, quant, 'x')
    assert not capsys.readouterr().out
    found = gguf.GGUFReader(tmp_path / 'x.gguf')
    outer = {'Q8_0'} if quant == 'q4_0' else types
    for tensor in found.tensors:
        wanted = {'F32'} if len(tensor.shape) == 1 or 'position' in tensor.name else outer if tensor.name in ('token_embd.weight', 'output.weight') else types
        assert tensor.tensor_type.name in wanted, tensor.name
    assert gguf.LlamaFileType(int(found.fields['general.file_type'].parts[-1][0])).name.removeprefix('MOSTLY_').removeprefix('ALL_') == quant.upper()
    model = network(ours, **NETWORKS['qwen3'], n_inner=100)
    ids, llama = ours.encode('The truth').tolist(), opened(tmp_path / 'y.gguf', model, ours, quant)
    line = capsys.readouterr().out
    coarse = 'blk.0.ffn_down.weight and 1 more will be in f16'
    assert line.count('\n') == quant.startswith('q') and (coarse in line) == quant.startswith('q')
    assert llama.losses(ids) == pytest.approx(our_losses(model, ids), abs=2.0 if quant == 'q4_0' else 0.2)


@pytest.mark.parametrize('tokenizer', TOKENIZERS)
def test_chat(tmp_path, tokenizer):
    """The chat template gives the ids that a model is taught; an answer ends with its turn or with the text."""
    ours = chat_tokenizer(a_tokenizer(tokenizer))
    llama = opened(tmp_path / 'x.gguf', network(ours, **NETWORKS['qwen3']), ours)
    said = ['一番', ' The truth, a  truth: a\n', '真事 a \n', 'a']
    messages = [dict(role=role, content=''.join(char for char in text if not ours.unknown(char)))
                for role, text in zip(('system', 'user', 'assistant', 'user'), said)]
    ids = render(messages, ours, reply=True)[0].tolist()
    assert gguf.GGUFReader(tmp_path / 'x.gguf').fields['tokenizer.chat_template'].contents() == JINJA
    prompt = llama.post('/apply-template', messages=messages)['prompt']
    assert llama.post('/tokenize', content=prompt, add_special=True)['tokens'] == ids
    for end in (ours.eot, end_of_turn(ours)):
        got = llama.post('/v1/chat/completions', messages=messages, max_tokens=9, temperature=0, logit_bias=[[end, 1e6]])
        assert got['choices'][0]['finish_reason'] == 'stop' and got['usage']['prompt_tokens'] == len(ids) and got['usage']['completion_tokens'] == 1
        assert llama.complete('a', 9, logit_bias=[[end, 1e6]])['stop_type'] == 'eos'


def test_no_end_of_text(tmp_path, capsys):
    """No ordinary token ends a text, least of all number 11, which llama.cpp takes if nothing is said."""
    ours = bpe_tokenizer(['a b', 'ab c'], specials=())
    llama = opened(tmp_path / 'x.gguf', network(ours), ours)
    assert f'no {EOT}' in capsys.readouterr().out
    for token in (11, *ours.encode('abc')):
        assert llama.complete('ab', 4, logit_bias=[[int(token), 1e6]])['tokens'] == [token] * 4


def test_added_tokens_that_are_not_special(tmp_path):
    """<think> and the like are read and written as they stand; special ones are not shown."""
    added = [{'id': 401 + special, 'content': text, 'special': special} for special, text in enumerate(('<think>', '<|pad|>'))]
    ours = with_spec(a_tokenizer('bbpe'), added_tokens=[{'id': 399, 'content': EOT, 'special': True}, *added])
    llama = opened(tmp_path / 'x.gguf', network(ours), ours)
    assert llama.post('/tokenize', content='a<think>a<|pad|>')['tokens'] == [*ours.encode('a'), 401, *ours.encode('a'), 402]
    assert [llama.complete('a', 1, logit_bias=[[i, 1e6]])['content'] for i in (401, 402)] == ['<think>', '']


def with_spec(tokenizer, **changes):
    """The tokenizer with other parts: of the model, where the model has them."""
    spec = json.loads(tokenizer.json)
    for key, value in changes.items():
        (spec['model'] if key in spec['model'] or key == 'ignore_merges' else spec)[key] = value
    return Tokenizer(json.dumps(spec))


@pytest.mark.parametrize('change, names', [
    (dict(normalizer={'type': 'NFKC'}), ['normalizer NFKC', '--tokenizer=bbpe', '--format=hf']),
    (dict(dropout=0.1), ['dropout']),
    (dict(ignore_merges=True), ['pattern of words', 's+(?!']),
    (dict(pre_tokenizer={'type': 'ByteLevel', 'add_prefix_space': False, 'use_regex': False}), ["pattern of words ''"]),
])
def test_refuses_tokenizers(tmp_path, change, names):
    ours = with_spec(a_tokenizer('bbpe'), **change)
    line = exit_line(write_gguf, tmp_path / 'x.gguf', network(ours), ours, 'f32', 'a model')
    assert line.startswith('a model: ') and all(name in line for name in names) and list(tmp_path.iterdir()) == [], line


def test_refusals(tmp_path, monkeypatch):
    ours, path = a_tokenizer('char'), tmp_path / 'x.gguf'
    assert 'layernorm' in exit_line(write_gguf, path, network(ours, **{**MODERN, 'norm': 'layernorm'}), ours, 'f32', 'a model')
    letters = with_spec(char_tokenizer('ab'), added_tokens=[], vocab={'a': 0, 'b': 1})
    assert EOT in exit_line(write_gguf, path, network(letters), letters, 'f32', 'a model')
    with pytest.raises(OSError, match='nowhere'):
        write_gguf(tmp_path / 'nowhere' / 'x.gguf', network(ours), ours, 'f32', 'a model')
    monkeypatch.setitem(__import__('sys').modules, 'gguf', None)
    assert 'pip install gguf' in exit_line(write_gguf, path, network(ours), ours, 'f32', 'a model')
    assert list(tmp_path.iterdir()) == []


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    """The same bytes every time; after Ctrl-C what was there is there, and nothing else."""
    ours, path = a_tokenizer('bbpe'), tmp_path / 'x.gguf'
    model = network(ours, **NETWORKS['llama'])
    written = []
    for quant in ('q4_0', 'q4_0', 'q8_0'):
        write_gguf(path, model, ours, quant, 'x')
        written.append(path.read_bytes())
    assert written[0] == written[1] != written[2]

    def interrupted(writer):
        writer.write_ti_data_to_file()
        raise KeyboardInterrupt
    monkeypatch.setattr(gguf.GGUFWriter, 'write_tensors_to_file', interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_gguf(path, model, ours, 'f32', 'x')
    assert [*tmp_path.iterdir()] == [path] and path.read_bytes() == written[2]


def test_modelfile():
    """Ollama's own syntax; it was not run."""
    assert modelfile('x.gguf', a_tokenizer('char'), 64) == (
        'FROM ./x.gguf\nTEMPLATE """{{ .Prompt }}"""\nPARAMETER stop "<|endoftext|>"\nPARAMETER num_ctx 64\n')
    assert modelfile('x.gguf', chat_tokenizer(a_tokenizer('char')), 64) == (
        'FROM ./x.gguf\nTEMPLATE """{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"""\n'
        'PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\nPARAMETER num_ctx 64\n')


@pytest.mark.slow
def test_beside_llamacpp(tmp_path):
    """bench.py times both, of either style; what does not fit into the context is refused before."""
    torch.save({'model': {}, 'model_args': vars(GPTConfig(vocab_size=99, n_layer=1, n_head=2, n_embd=32, **NETWORKS['qwen3']))}, tmp_path / 'ckpt.pt')
    arguments = ['--sample', '--prompt_tokens=2', '--runs=1', '--dtypes=int8', '--samples=1', '--llamacpp']
    for name in ('char', tmp_path):
        result = run_script('bench.py', *arguments, f'--network={name}', '--new_tokens=62')
        assert result.code == 0, result.err
        header, theirs, ours = (line.replace(',', '').split() for line in result.out.splitlines()[-3:])
        assert header[-2:] == ['/', 'llama.cpp'] and theirs[0] == 'llama.cpp' and float(theirs[-1]) == 1
        assert float(ours[-1]) == pytest.approx(float(ours[2]) / float(theirs[1]), abs=0.01)
    result = run_script('bench.py', *arguments, '--network=char', '--new_tokens=63')
    assert result.code == 1 and result.err.count('\n') == 1 and 'new_tokens=63' in result.err
