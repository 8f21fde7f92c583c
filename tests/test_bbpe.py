"""Training a byte-level BPE on a text, and pruning a BPE to the ids of a text."""
import json
import os
import random
import re
import unicodedata

import pytest
import tokenizers
from conftest import exit_line, make_dataset, write
from dataset_helpers import (
    CHINESE,
    NOVEL,
    TEXT,
    bins_of,
    make,
    meta_of,
    needs_novel,
    plain,
    random_texts,
    train_bpe,
    write_jsonl,
)

from core.files import ROOT
from core.text import prepare
from core.text.tokenizer import EOT, QWEN2_SPLIT, Tokenizer, load_tokenizer

pytest_plugins = 'dataset_fixtures'


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
    for path, share in (
        (write(tmp_path / 'a.txt', text + strange), 0.1),
        (write_jsonl(tmp_path / 'b.jsonl', [text + strange, 'So, ' * 999 + strange]), 0.3),
    ):
        for val_fraction in (share, 0.0):
            make(tmp_path / 'd', path, tokenizer='bbpe', vocab_size=400, val_fraction=val_fraction)
            pieces = load_tokenizer(str(tmp_path / 'd')).pieces
            assert (b'zq' in pieces or b'qx' in pieces or b'xj' in pieces) == (not val_fraction)


@pytest.mark.parametrize('run', ['ab', '=', ' ', '石'])
def test_bbpe_of_a_very_long_word(tmp_path, run):
    """`tokenizers` would take hours, quadratic in the length of a word; the text still comes back."""
    text = TEXT + run * 400_000 + TEXT
    bins = make(tmp_path / 'd', write(tmp_path / 'x.txt', text), tokenizer='bbpe', vocab_size=300, val_fraction=0)
    known = load_tokenizer(str(tmp_path / 'd'))
    assert known.decode(bins['train']) == text.replace('\r\n', '\n') and len(bins['train']) < 420_000


def test_bbpe_of_other_sizes(tmp_path):
    path = write(tmp_path / 'x.txt', TEXT)
    assert exit_line(make, tmp_path / 'd', path, tokenizer='bbpe', vocab_size=256).startswith(
        'vocab_size=256: expected at least 257'
    )
    line = exit_line(make, tmp_path / 'd', path, tokenizer='bbpe', vocab_size=50_000)
    supported = int(re.search(r'pairs that occur twice give ([\d,]+);', line)[1].replace(',', ''))
    assert 257 < supported < 1000 and not (tmp_path / 'd').exists()
    make(tmp_path / 'd', path, tokenizer='bbpe', vocab_size=supported)
    assert 'vocab_size' in exit_line(make, tmp_path / 'e', path, tokenizer='bbpe', vocab_size=supported + 1)


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
    assert (
        places == sorted(places)
        and max(b - a for a, b in zip([0, *places], [*places, 0.9])) < 0.03
        and places[-1] < 0.9
    )
    make(tmp_path / 'd', path, tokenizer='bbpe', vocab_size=300)
    assert ''.join(given) == text[:int(len(text) * 0.9)]


@pytest.fixture(scope='module', params=[None, QWEN2_SPLIT], ids=['gpt2', 'qwen2'])
def large(request, tmp_path_factory):
    """A BPE that knows many words of which a small text has few."""
    with open(os.path.join(ROOT, 'README.zh.md'), encoding='utf-8') as f, open(prepare.__file__, encoding='utf-8') as g:
        known = Tokenizer(train_bpe(request.param, 3000, [f.read(), g.read()]))
    known.path = write(tmp_path_factory.mktemp('large') / 'tokenizer.json', known.json)
    return known


def test_pruned(tmp_path, large):
    texts = [
        'A tokenizer of characters: ' + CHINESE + ' e\u0301 \u00e9 documents of validation',
        'shards ' * 3 + CHINESE[::-1],
    ]
    out = make_dataset(tmp_path / 'd', write_jsonl(tmp_path / 'x.jsonl', texts), tokenizer=large.path, prune='True')
    small, bins, expected = load_tokenizer(str(tmp_path / 'd')), bins_of(tmp_path / 'd'), plain(texts, large)
    for name in ('train', 'val'):
        assert [small.pieces[i] for i in bins[name]] == [large.pieces[i] for i in expected[name]]
    used = set(expected['train'] + expected['val']) - {large.eot}
    assert f'{len(used):,} of {large.vocab_size:,} ids occur in this text' in out
    assert (
        small.vocab_size < 700 < large.vocab_size
        and small.eot == small.vocab_size - 1
        and small.pieces[small.eot] == EOT.encode()
    )
    assert {bytes([byte]) for byte in range(256)} | {large.pieces[i] for i in used} < set(small.pieces)
    # the least that will do: whatever is kept is a byte, or used, or a part of something longer that is kept
    made_of, spec = {}, json.loads(small.json)
    for pair in spec['model']['merges']:
        left, right = pair if isinstance(pair, list) else pair.split(' ')
        made_of[left + right] = left, right
    name_of = {i: token for token, i in spec['model']['vocab'].items() if token != EOT}
    assert len(name_of) == small.vocab_size - 1 and set(made_of) == {
        token for token in name_of.values() if len(token) > 1
    }
    parts = {part for pair in made_of.values() for part in pair}
    assert parts <= set(name_of.values())
    assert all(
        len(token) == 1 or token in parts or small.pieces[i] in {large.pieces[j] for j in used}
        for i, token in name_of.items()
    )
    order = [large.pieces.index(piece) for piece in small.pieces[:-1]]
    assert order == sorted(order)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / 'd' / 'tokenizer.json'))
    theirs.encode_special_tokens = True
    form = (lambda text: unicodedata.normalize('NFC', text)) if spec['normalizer'] else str
    for text in [
        *texts,
        *random_texts(random.Random(6), 100),
        ''.join(map(chr, [*range(1, 768), *range(0x4E00, 0x5000)])),
    ]:
        assert small.decode(small.encode(text)) == form(text) and small.encode(text).tolist() == theirs.encode(text).ids


def test_pruned_where_several_merges_make_one_token(tmp_path, gpt2_like):
    """As in files converted from tiktoken's, such as Llama 3's: each token has a merge for every pair that forms it."""
    spec = json.loads(gpt2_like.json)
    vocab = spec['model']['vocab']
    tokens = sorted((token for token in vocab if len(token) > 1 and token != EOT), key=vocab.get)
    spec['model']['merges'] = [
        [token[:i], token[i:]]
        for token in tokens
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    ]
    path = write(tmp_path / 'tokenizer.json', json.dumps(spec))
    text = 'hear me speak any further. First Citizen of the text, documents of the tokenizer; ' * 3
    make(tmp_path / 'd', write(tmp_path / 'x.txt', text), tokenizer=path, prune='True', val_fraction=0.0)
    small, known = load_tokenizer(str(tmp_path / 'd')), load_tokenizer(path)
    assert [small.pieces[i] for i in bins_of(tmp_path / 'd')['train']] == [known.pieces[i] for i in known.encode(text)]
    assert small.vocab_size < known.vocab_size and small.decode(small.encode(TEXT)) == TEXT


def test_only_qwen2_is_pruned_by_itself(tmp_path, large, monkeypatch):
    path = write(tmp_path / 'x.txt', CHINESE)
    monkeypatch.setattr(
        prepare, 'load_tokenizer', lambda name: large if name in ('qwen2', 'gpt2') else load_tokenizer(name)
    )
    for settings, pruned in (
        ({'tokenizer': 'qwen2'}, True),
        ({'tokenizer': 'qwen2', 'prune': 'False'}, False),
        ({'tokenizer': 'gpt2'}, False),
        ({'tokenizer': large.path}, False),
        ({'tokenizer': 'gpt2', 'prune': 'True'}, True),
    ):
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
    assert (
        '9,244 of 151,646 ids occur in this text; with those they are merged from, the bytes and <|endoftext|>: 9,793'
        in out
    )
    pruned, bins = load_tokenizer(str(tmp_path / 'd')), bins_of(tmp_path / 'd')
    assert (pruned.vocab_size, pruned.eot, meta_of(tmp_path / 'd')['dtype']) == (9_793, 9_792, 'uint16')
    n = int(len(text) * 0.9)
    for part, tokens in ((text[:n], bins['train']), (text[n:], bins['val'])):
        assert [pruned.pieces[i] for i in tokens] == [known.pieces[i] for i in known.encode(part).tolist()]
