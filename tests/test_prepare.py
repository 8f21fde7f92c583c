"""prepare(): bins against plain restatements, splits, what is left out, shards, bad input."""
import gzip
import json
import os
import pickle
import random
from collections import Counter

import numpy as np
import pytest
from conftest import exit_line, make_dataset, write
from dataset_helpers import CHINESE, TEXT, bins_of, files_of, make, meta_of, nanogpt_char, plain, write_jsonl

from core.text.prepare import Seen
from core.text.tokenizer import EOT, Tokenizer

pytest_plugins = 'dataset_fixtures'


def test_characters_and_their_pickle(tmp_path):
    text = TEXT.replace('\r\n', '\n')
    bins = make(
        tmp_path / 'd', write(tmp_path / 'x.txt', b'\xef\xbb\xbf' + TEXT.encode())
    )  # a byte order mark and Windows' newlines go
    assert [np.array(bins[name], dtype=np.uint16).tobytes() for name in ('train', 'val')] == nanogpt_char(text)
    with open(tmp_path / 'd' / 'meta.pkl', 'rb') as f:
        meta = pickle.load(f)
    assert meta['vocab_size'] == len(meta['itos']) == len(meta['stoi']) == len(set(text)) + 1
    assert (
        ''.join(meta['itos'][i] for i in bins['train'] + bins['val']) == text
        and meta['stoi'][EOT] == meta['vocab_size'] - 1
    )
    sizes = meta_of(tmp_path / 'd')
    n = int(len(text) * 0.9)
    assert sizes['train'] == {'tokens': n, 'characters': n, 'bytes': len(text[:n].encode())}
    assert sizes['val'] == {'tokens': len(text) - n, 'characters': len(text) - n, 'bytes': len(text[n:].encode())}


def test_many_characters_need_uint32(tmp_path):
    text = ''.join(chr(i) for i in range(0x20, 0x11000) if not 0xd800 <= i < 0xe000)
    bins = make(tmp_path / 'd', write(tmp_path / 'x.txt', text))
    assert meta_of(tmp_path / 'd')['dtype'] == 'uint32' and bins['train'] + bins['val'] == list(range(len(text)))


@pytest.mark.parametrize('val_fraction', [0.1, 0.5, 0.0])
def test_the_end_of_each_document_is_for_validation(tmp_path, bpe, small_blocks, val_fraction):
    """Texts of every length, read in pieces of 8 characters: split inside a piece, between two, and not at all."""
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
        assert meta_of(tmp_path / 'd')['val'] == {
            'tokens': len(bins['val']),
            'characters': len(''.join(parts)),
            'bytes': len(''.join(parts)),
        }


@pytest.mark.parametrize('n', [1000, 1001])
def test_of_many_documents_whole_ones_are_for_validation(tmp_path, gpt2_like, n):
    texts = [f'Document {i} ends here, or ' + 'there. ' * (i % 3) for i in range(n)]
    path = write_jsonl(tmp_path / 'x.jsonl', texts)
    bins = make(tmp_path / 'd', path, tokenizer=gpt2_like.path)
    assert bins == plain(texts, gpt2_like) and bins['train'].count(gpt2_like.eot) + bins['val'].count(
        gpt2_like.eot
    ) == (2000 if n == 1000 else n)
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


@pytest.mark.parametrize('settings', [
    {},
    {'min_chars': 6},
    {'max_repetition': 0.2917},
    {'limit': 20},
    {'min_chars': 9, 'max_repetition': 0.5017, 'limit': 12},
])
def test_what_is_left_out(tmp_path, gpt2_like, settings):
    rng = random.Random(3)
    texts = [
        '\n'.join(rng.choices(['', 'a', 'to be', ' to be ', '满纸荒唐言', 'ab'], k=rng.randrange(6)))
        for _ in range(120)
    ]
    texts = [text if text.strip() else '' for text in texts]
    kept, dropped = filtered(texts, **settings)
    out = make_dataset(tmp_path / 'd', write_jsonl(tmp_path / 'x.jsonl', texts), tokenizer=gpt2_like.path, **settings)
    assert bins_of(tmp_path / 'd') == plain(kept, gpt2_like) and len(kept) > 9
    assert meta_of(tmp_path / 'd')['documents'] == len(kept) and meta_of(tmp_path / 'd')['dropped'] == dropped
    assert sum(dropped.values()) + len(kept) == 120 or 'limit' in settings
    for reason, number in dropped.items():
        assert f'left out: {number:,} {reason} document{"s" if number > 1 else ""}' in out.splitlines()


def test_duplicates_in_other_files_and_formats(tmp_path, gpt2_like, small_blocks):
    """Also of long documents, read in pieces (.txt) or in one (.jsonl), that share their beginning or end."""
    small_blocks(64)
    long = CHINESE * 9
    texts = {
        'a.txt': long,
        'b.txt': long[:-1],
        'c.txt': long[1:],
        'd.txt.gz': long,
        'e.txt': 'short',
        'f.txt': '',
        'g.txt': long + '。',
    }
    for name, text in texts.items():
        write(
            tmp_path / 'in' / name,
            gzip.compress(text.encode())
            if name.endswith('gz')
            else text.encode('utf-16' if name == 'e.txt' else 'utf-8'),
        )
    write_jsonl(tmp_path / 'in' / 'h.jsonl', [long, 'short', long[:-1], 'short ', ''])
    kept = [long, long[:-1], long[1:], 'short', long + '。', 'short ']
    out = make_dataset(tmp_path / 'd', str(tmp_path / 'in'), tokenizer=gpt2_like.path)
    assert bins_of(tmp_path / 'd') == plain(kept, gpt2_like)
    assert (
        meta_of(tmp_path / 'd')['dropped'] == {'duplicate': 4, 'empty': 2} and 'left out: 4 duplicate documents' in out
    )


def test_repetition_of_a_long_document_is_that_of_its_beginning(tmp_path, small_blocks):
    small_blocks(64)
    new = [f'line number {i} is new\n' for i in range(200)]
    write(tmp_path / 'in' / 'a.txt', ''.join(new) + 'same\n' * 3000)
    write(tmp_path / 'in' / 'b.txt', 'same\n' * 100 + ''.join(new) * 2)
    make(tmp_path / 'd', tmp_path / 'in', max_repetition=0.3)
    assert (
        meta_of(tmp_path / 'd')['dropped'] == {'repetitive': 1}
        and meta_of(tmp_path / 'd')['train']['characters'] > 10_000
    )


def test_more_numbers_than_the_set_holds():
    rng = random.Random(0)
    numbers = [0, 2**64 - 1, 2**63] + [rng.getrandbits(64) for _ in range(2**20 + 5)]
    assert len(set(numbers)) == len(numbers)
    met = Seen()
    met.new.update(
        numbers[: 2**20 - 2]
    )  # as if they had been asked for; what follows goes over the threshold and beyond
    assert not any(met.add(number) for number in numbers[2**20 - 2:])
    assert len(met.old) == 2**20 and len(met.new) == 8
    assert all(met.add(number) for number in numbers[:1000] + numbers[-1000:])
    others = [number ^ 1 for number in numbers[:1000] + numbers[-1000:]]
    assert not any(met.add(number) for number in others) and all(met.add(number) for number in others)
    met.new.update(rng.getrandbits(64) for _ in range(2**20 - 1 - len(met.new)))
    assert (
        not met.add(5)
        and len(met.new) == 0
        and met.add(5)
        and met.add(numbers[0])
        and met.add(numbers[-1])
        and met.add(others[0])
        and not met.add(6)
    )


@pytest.mark.parametrize('tokenizer', ['char', 'bpe'])
def test_shards(tmp_path, gpt2_like, small_blocks, tokenizer):
    from core.text.dataset import open_dataset, windows
    small_blocks(50)
    settings = {'tokenizer': 'char' if tokenizer == 'char' else gpt2_like.path}
    path = write_jsonl(tmp_path / 'x.jsonl', [TEXT[i:i + 99] for i in range(0, 900, 99)])
    whole = make(tmp_path / 'whole', path, **settings)
    assert sorted(name for name in os.listdir(tmp_path / 'whole') if '.bin' in name) == ['train.bin', 'val.bin']
    expected, starts = open_dataset(str(tmp_path / 'whole')), {}
    for size in (
        100_000,
        3,
        7,
        64,
        len(whole['train']),
        len(whole['train']) // 2 + 1,
    ):  # one folder: what the one before left must go
        make_dataset(tmp_path / 'd', path, shard_tokens=size, **settings)
        for name, tokens in whole.items():
            shards = sorted(tmp_path.glob(f'd/{name}*.bin'))
            assert [shard.name for shard in shards] == [f'{name}_{i:05d}.bin' for i in range(-(-len(tokens) // size))]
            assert [shard.stat().st_size // 2 for shard in shards] == [
                min(size, len(tokens) - i) for i in range(0, len(tokens), size)
            ]
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
    assert sorted(os.listdir(tmp_path / 'd')) == [
        'input.txt',
        'meta.json',
        'tokenizer.json',
        'train.bin',
        'train_notes.bin',
    ]


def test_threads(tmp_path, corpus, small_blocks):
    small_blocks(100)
    for settings in ({'tokenizer': 'bbpe', 'vocab_size': 300}, {'tokenizer': 'char', 'shard_tokens': 1000}):
        for num_proc in (1, 2, 3, 0):
            make_dataset(tmp_path / str(num_proc), str(corpus), num_proc=num_proc, **settings)
            assert files_of(tmp_path / str(num_proc)) == files_of(tmp_path / '1')


@pytest.mark.parametrize('settings, expected', [
    ({'val_fraction': 1.0}, 'val_fraction=1.0: expected'),
    ({'val_fraction': -0.1}, 'val_fraction=-0.1: expected'),
    ({'val_fraction': float('nan')}, 'val_fraction=nan: expected'),
    ({'val_fraction': 1e-17}, 'nothing for validation'),
    ({'val_fraction': 0.9999999}, 'nothing for training'),
    ({'prune': 'yes'}, 'prune=yes: expected True, False or auto'),
    ({'prune': 'True'}, 'prune=True'),
    ({'prune': 'True', 'tokenizer': 'bbpe'}, 'prune=True'),
    ({'shard_tokens': -1}, 'shard_tokens=-1'),
    ({'limit': -1}, 'limit=-1'),
    ({'num_proc': -1}, 'num_proc=-1'),
    ({'min_chars': -1}, 'min_chars=-1'),
    ({'train_bytes': 0}, 'train_bytes=0'),
    ({'tokenizer': 'bbpe', 'vocab_size': -5}, 'vocab_size=-5'),
    ({'min_chars': 9999}, 'passes the filters'),
    ({'max_repetition': 0.2}, 'passes the filters'),
    ({'tokenizer': 'nothing'}, 'tokenizer=nothing: expected char'),
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
    ('x.txt', '', 'no text'),
    ('x.txt', ' \n\n', 'no text'),
    ('x.txt', b'\xef\xbb\xbf', 'no text'),
    ('x.jsonl', '{"text": ""}\n', 'no text'),
    ('x.jsonl', '\n\n', 'no text'),
    ('x.jsonl', '{"text": "a"}\n{"text": \n', 'line 2'),
    ('x.jsonl', '{"content": "a"}', '"text"'),
    ('folder/x.pdf', 'a', 'pdftotext x.pdf'),
    ('folder/x.txt', '', 'no text'),
    ('x.txt', 'déjà vu, café'.encode('latin-1'), 'byte 0xe9'),
    ('x.txt', 'a', 'nothing for training'),
    ('x.jsonl', '{"text": "a"}\n{"text": "b"}', 'nothing for training'),
])
def test_bad_files(tmp_path, name, data, expected):
    path = write(tmp_path / name, data)
    assert expected in exit_line(make_dataset, tmp_path / 'd', os.path.dirname(path) if 'folder' in name else path)
    assert not (tmp_path / 'd').exists()


def test_bad_draws(tmp_path):
    """Of 1,001 documents none may be drawn, or all."""
    path = write_jsonl(tmp_path / 'x.jsonl', [f'document {i}' for i in range(1001)])
    assert 'nothing for validation of 1,001 documents' in exit_line(
        make_dataset, tmp_path / 'd', path, val_fraction=1e-6
    )
    assert 'nothing for training of 1,001 documents' in exit_line(
        make_dataset, tmp_path / 'd', path, val_fraction=1 - 1e-6
    )


def test_bad_tokenizers(tmp_path, gpt2_like):
    path, two = write(tmp_path / 'x.txt', TEXT), write_jsonl(tmp_path / 'two.jsonl', ['to be', 'or not'])
    spec = json.loads(gpt2_like.json)
    other = write(tmp_path / 'other.json', json.dumps({**spec, 'model': {'type': 'Unigram', 'vocab': [['a', 0]]}}))
    endless = write(tmp_path / 'endless.json', json.dumps({**spec, 'added_tokens': []}))
    make(tmp_path / 'small', write(tmp_path / 'y.txt', 'abc'))
    small = str(tmp_path / 'small')
    for settings, source, expected in [
        ({'tokenizer': other}, path, 'expected a tokenizer.json'),
        ({'tokenizer': endless}, two, EOT),
        ({'tokenizer': small}, path, 'not among the 3 characters'),
        ({'tokenizer': write(tmp_path / 'no.json', 'text')}, path, 'expected a tokenizer.json'),
    ]:
        assert expected in exit_line(make_dataset, tmp_path / 'd', source, **settings)
        assert not (tmp_path / 'd').exists() or not os.listdir(tmp_path / 'd')
    line = exit_line(
        make_dataset,
        tmp_path / 'd',
        path,
        tokenizer=str(make(tmp_path / 'own', path) and tmp_path / 'own'),
        prune='True',
    )
    assert 'prune' in line  # an old vocabulary of characters
    known = Tokenizer(json.dumps({**spec, 'added_tokens': []}))
    assert make(tmp_path / 'e', path, tokenizer=endless) == plain(
        [TEXT.replace('\r\n', '\n')], known
    )  # one document needs no end


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
