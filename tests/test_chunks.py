"""Chunks of a text encode to the ids of the text; samples are even."""
import random
from collections import Counter

import pytest
from conftest import write
from dataset_helpers import CHINESE, make, random_texts

from core.text.chunks import chunk, last_boundary, sample_evenly

pytest_plugins = 'dataset_fixtures'


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
        assert ''.join(piece for _, piece, _ in cut) == text and [end for *_, end in cut] == [False] * (
            len(cut) - 1
        ) + [True]
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
    assert (
        last_boundary('e\u0301t\u0301e,e\u0301,') == 5
    )  # between a letter and a mark, but not between a combining one and a mark
    for text in (
        'one  two\n',
        '',
        'x',
        ' two',
        ',',
        'it\'s',
        '1,000.5',
        '_,',
        'a\u0301,',
        'one\r\n\r\ntwo',
        '？！',
        'a ',
        'one\n',
        'x' * 2000,
    ):
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
            assert (
                bins['train'] == [i for piece in pieces for i in bpe.encode(piece).tolist()]
                and bpe.decode(bins['train']) == text
            )
    assert any(
        bpe.encode(text[:32]).tolist() + bpe.encode(text[32:]).tolist() != bpe.encode(text).tolist()
        for text in texts[1000]
    )  # if need be


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
