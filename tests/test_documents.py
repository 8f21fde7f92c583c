"""Reading files of every kind, against Python's own codecs, json and pyarrow; guessing encodings; damaged files."""
import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import random
import sys
import tracemalloc

import pytest
from conftest import exit_line, write

from core.files import ROOT
from core.text import documents
from core.text.documents import find_files, guess_encoding, read_documents

MIRRORS = [os.environ.get('DATA_MIRROR', ''), os.path.join(ROOT, '..', 'shared', 'data')]
MIRROR = next((folder for folder in MIRRORS if os.path.exists(os.path.join(folder, 'tang_poems.json'))), None)
SIMPLIFIED = (
    '满纸荒唐言，一把辛酸泪。都云作者痴，谁解其中味？此开卷第一回也。作者自云：因曾历过一番梦幻之后，故将真事隐去。\r\n'
)
TRADITIONAL = (
    '滿紙荒唐言，一把辛酸淚。都云作者癡，誰解其中味？此開卷第一回也。作者自云：因曾歷過一番夢幻之後，故將真事隱去。\n'
)
ENGLISH = 'It was the best of times, it was the worst of times;\r\nit was the age of wisdom, 1859.\r'
PACKERS = {'': bytes, '.gz': gzip.compress, '.bz2': bz2.compress, '.xz': lzma.compress,
           '.zst': lambda data: pytest.importorskip('zstandard').ZstdCompressor().compress(data)}


def read(paths, *args, **kwargs):
    """[the text of each document]; every document must end."""
    texts, parts = [], []
    for piece in read_documents(paths, *args, **kwargs):
        if piece is None:
            texts.append(''.join(parts))
            parts = []
        else:
            assert piece
            parts.append(piece)
    assert not parts
    return texts


def one_newline(text):
    return text.replace('\r\n', '\n').replace('\r', '\n')


def write_parquet(path, columns, **kwargs):
    pq = pytest.importorskip('pyarrow.parquet')
    import pyarrow
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pyarrow.table(columns), path, **kwargs)
    return str(path)

# ----------------------------------------------------------------------------- finding


def test_a_folder(tmp_path):
    readable = [
        'a/B.TXT',
        'a/b.jsonl.Zst',
        'a/b/c.parquet',
        'a.txt',
        'x.txt.gz',
        'x.txt.bz2',
        'x.txt.xz',
        'x.txt.zst',
        'y.jsonl',
        'y.jsonl.gz',
        'y.jsonl.bz2',
        'y.jsonl.xz',
        'notes.md',
        'a/table.csv',
        'a/table.tsv.gz',
        'poems.json',
    ]
    for name in readable + [
        'README.md',
        'book.epub',
        'page.html',
        'table.xlsx',
        'txt',
        'b.zst',
        'c.parquet.gz',
        '.hidden.txt',
        '.git/a.txt',
        'a/.cache/b/c.txt',
    ]:
        write(tmp_path / name, '')
    assert find_files(str(tmp_path)) == sorted(str(tmp_path / name) for name in readable)
    assert find_files(tmp_path / 'notes.md') == [str(tmp_path / 'notes.md')]  # named, so meant
    assert os.path.samefile(find_files('core/text/documents.py')[0], documents.__file__)
    write(tmp_path / 'empty' / 'my book.epub', '')
    line = exit_line(find_files, str(tmp_path / 'empty'))
    assert line.startswith(str(tmp_path / 'empty')) and '.txt' in line and '.parquet' in line
    assert "of my book.epub: pandoc -t plain -o text.txt 'my book.epub'" in line
    assert 'nowhere.txt: no such' in exit_line(list, read_documents(str(tmp_path / 'nowhere.txt')))


def test_paths_one_by_one(tmp_path):
    """An iterable of paths is read lazily; a file with another ending is a text; an empty file is a document."""
    paths = [
        write(tmp_path / name, text)
        for name, text in (('b.md', 'b'), ('a', ''), ('c.txt', b'\xef\xbb\xbf'), ('d.TXT', '\r'))
    ]
    taken = []
    stream = read_documents(path for path in paths if not taken.append(path))
    assert [next(stream), next(stream)] == ['b', None] and taken == paths[:1]
    assert list(stream) == [None, None, '\n', None] and taken == paths
    assert read(tmp_path / 'b.md') == ['b']
    write(tmp_path / 'folder' / 'z.txt', 'z')
    write(tmp_path / 'folder' / 'a' / 'a.jsonl', '{"text": "1"}\n{"text": ""}\n\n{"text": "2"}')
    assert read(str(tmp_path / 'folder')) == ['1', '', '2', 'z']
    assert list(read_documents([])) == []

# ----------------------------------------------------------------------------- text


ENCODINGS = ['utf-8', 'utf-8-sig', 'utf-16', 'utf-32', 'gbk', 'gb18030', 'big5', 'cp950', 'utf-16-le', 'utf-16-be']


# every encoding in a plain file, and every compression with an encoding that has a mark, one that is guessed, and UTF-8
@pytest.mark.parametrize('encoding, packer', [
    *((encoding, '') for encoding in ENCODINGS),
    *((encoding, packer) for encoding in ('utf-8', 'utf-16', 'gbk') for packer in PACKERS if packer),
])
def test_blocks_may_end_anywhere(tmp_path, monkeypatch, packer, encoding):
    rng = random.Random(encoding + packer)
    for _ in range(20):
        monkeypatch.setattr(documents, 'READ_BYTES', rng.randrange(1, 200))
        text = ''.join(
            rng.choices(
                [TRADITIONAL if 'big5' in encoding or encoding == 'cp950' else SIMPLIFIED, ENGLISH, '\r\n\r\n'], k=4
            )
        )
        text = text[rng.randrange(40):] + SIMPLIFIED[:20] * ('utf' in encoding)
        path = write(tmp_path / f'x.txt{packer}', PACKERS[packer](text.encode(encoding)))
        documents._guess_encoding.cache_clear()
        pieces = list(read_documents(path))
        assert ''.join(pieces[:-1]) == one_newline(text) and pieces[-1] is None
        assert max(map(len, pieces[:-1]), default=0) <= documents.READ_BYTES


@pytest.mark.parametrize('mark, encoding', [(codecs.BOM_UTF16_LE, 'utf-16-le'), (codecs.BOM_UTF16_BE, 'utf-16-be'),
                                            (codecs.BOM_UTF32_LE, 'utf-32-le'), (codecs.BOM_UTF32_BE, 'utf-32-be')])
def test_byte_order_marks(tmp_path, capsys, mark, encoding):
    text = 'Все люди 石\0头🙂\n'  # any language, and no rule about which characters are likely
    path = write(tmp_path / 'x.txt', mark + text.encode(encoding))
    assert read(path) == read(path) == [text]
    assert capsys.readouterr().out == f'{path}: read as {encoding[:6]}\n'  # once


def test_utf8_is_not_announced(tmp_path, capsys):
    texts = [ENGLISH, SIMPLIFIED, 'Все люди', '\ufeff' + SIMPLIFIED, 'a\0b\0c' + 'd' * 9, '']
    paths = [write(tmp_path / f'{i}.txt', text) for i, text in enumerate(texts)]
    assert read(paths) == [one_newline(text).removeprefix('\ufeff') for text in texts]
    assert capsys.readouterr().out == ''


def test_english_in_utf16_is_not_utf8(tmp_path):
    for encoding in ('utf_16_le', 'utf_16_be'):
        path = write(tmp_path / f'{encoding}.txt', ENGLISH.encode(encoding))
        open(path, encoding='utf-8').read()  # though it could be
        assert guess_encoding(path) == (encoding, '') and read(path) == [one_newline(ENGLISH)]


def test_a_long_english_preface(tmp_path):
    path = write(tmp_path / 'x.txt', (ENGLISH * 20_000 + SIMPLIFIED).encode('gb18030'))
    assert guess_encoding(path)[0] == 'gb18030'


def test_a_changed_file_is_guessed_again(tmp_path):
    path = write(tmp_path / 'x.txt', (SIMPLIFIED * 2).encode('gb18030'))
    assert guess_encoding(path)[0] == 'gb18030'
    write(tmp_path / 'x.txt', (TRADITIONAL * 3).encode('big5'))
    assert guess_encoding(path)[0] == 'big5hkscs'


def test_neighbours_are_told_apart(tmp_path):
    for encoding, text in (
        ('shift_jis', '吾輩は猫である。名前はまだ無い。どこで生れたか'),
        ('euc_kr', '모든 인간은 태어날 때부터 자유로우며 '),
    ):
        path = write(tmp_path / encoding, (text * 9).encode(encoding))
        assert guess_encoding(path) == (encoding, '') and read(path) == [text * 9]


BAD = {
    'Latin 1': 'déjà vu, café'.encode('latin-1'),
    'Russian': ('Все счастливые семьи похожи друг на друга. ' * 9).encode('cp1251'),
    'bytes': random.Random(0).randbytes(2000),
    'UTF-16 cut': codecs.BOM_UTF16_LE + SIMPLIFIED.encode('utf-16-le')[:-1],
    'zeros': bytes(4000),
    'UTF-8 broken': SIMPLIFIED.encode() * 9 + b'\xff' + SIMPLIFIED.encode(),
    'UTF-8 cut': (SIMPLIFIED * 9 + '石').encode()[:-1],
    'UTF-8 quotes': ('It’s the age of “foolishness”. ' * 9).encode() + b'\x80',
    'GBK broken': SIMPLIFIED.encode('gbk') * 9 + b'\xff\xff',
}


@pytest.mark.parametrize('data', BAD.values(), ids=BAD)
def test_no_encoding_fits(tmp_path, capsys, data):
    path, good = write(tmp_path / 'bad.txt', data), write(tmp_path / 'good.txt', 'good')
    line = exit_line(list, read_documents([good, path]))
    assert line.startswith(f'{path}: ') and 'UTF-8' in line and 'iconv' in line and '--skip_bad=True' in line
    if data.strip(b'\0'):
        at = next(i for i in itertools.count() if fails(data, i))
        assert f': byte 0x{data[at]:02x} at offset {at:,} is not UTF-8' in line
    skipped = []
    for source in (str(tmp_path), [path, good]):  # read twice, as prepare() does
        assert read(source, skip_bad=True, skipped=skipped) == ['good']
    assert skipped == [path]
    said = capsys.readouterr()
    assert said.err.count('\n') == 1 and said.err.startswith(f'{path}: left out') and said.out == ''


def fails(data, at):
    """Whether the UTF-8 character that Python's own decoder cannot read starts at this byte."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start == at
    raise AssertionError('this is UTF-8')


@pytest.mark.parametrize('packer', PACKERS)
def test_the_offset_of_a_bad_byte_is_the_files(tmp_path, monkeypatch, packer):
    monkeypatch.setattr(documents, 'READ_BYTES', 7)
    monkeypatch.setattr(documents, 'GUESSES', ['euc_jp'])  # in others this noise might be text
    for n in range(40):
        data = b'\xef\xbb\xbf' * (n % 2) + ('石' * 40).encode()[:3 * n] + b'\xff' + '石头'.encode()
        line = exit_line(list, read_documents(write(tmp_path / f'{n}.txt{packer}', PACKERS[packer](data))))
        assert f'byte 0xff at offset {3 * n + 3 * (n % 2)} ' in line
    cut = write(tmp_path / f'cut.txt{packer}', PACKERS[packer](b'a' * 40 + '石'.encode()[:2]))
    assert 'byte 0xe7 at offset 40 ' in exit_line(list, read_documents(cut))
    line = exit_line(
        list, read_documents(write(tmp_path / f'x.jsonl{packer}', PACKERS[packer](b'{"text": "a"}\n{"text": "\xff"}')))
    )
    assert 'offset 24 ' in line

# ----------------------------------------------------------------------------- encodings of real texts


def encoded(text, rng, encoding):
    """A text as it comes from Windows, or with English in it, or plain, without what the encoding does not have."""
    change = rng.choice(['plain', 'Windows', 'English', 'one line'])
    if change == 'English':
        text = ''.join(
            c
            + rng.choice([' GPT-4 ', ' Chapter 12\n', 'http://a.b/?c=d', '1949']) * (c in '，。' and rng.random() < 0.4)
            for c in text
        )
    if change == 'one line':
        text = ''.join(text.split())
    return (text.replace('\n', '\r\n') if change == 'Windows' else text).encode(encoding, 'ignore')


@pytest.mark.skipif(MIRROR is None, reason='DATA_MIRROR names no folder with tang_poems.json')
@pytest.mark.parametrize('text', ['hongloumeng', 'sanguo', 'shuihu', 'xiyou', 'tang_poems'])
def test_real_texts(tmp_path, text):
    """Whole texts, their ends, and excerpts of 200, 1000 and 5000 characters: each encoding is told from the others."""
    traditional = text == 'tang_poems'
    with open(os.path.join(MIRROR, text + ('.json' if traditional else '.txt')), encoding='utf-8', newline='') as f:
        text = f.read()
    if traditional:
        text = '\n'.join(
            f'{poem["title"]}\n{poem["author"]}\n' + '\n'.join(poem['paragraphs']) for poem in json.loads(text)[:12_000]
        )
    rng = random.Random(text[:100])
    names = {
        'gb18030': 'gb18030',
        'utf-16-le': 'utf_16_le',
        'utf-16-be': 'utf_16_be',
        'utf-16': 'utf-16',
        'utf-8': 'utf-8',
        **({'cp950': 'big5hkscs', 'big5': 'big5hkscs'} if traditional else {}),
    }
    for encoding, name in names.items():
        excerpts = [text] + [text[-n:] for n in (200, 1000, 5000)]
        excerpts += [text[at:at + n] for n in (200, 1000, 5000) for at in rng.sample(range(len(text) - n), 12)]
        for i, excerpt in enumerate(excerpts):
            path = write(tmp_path / f'{encoding}{i}.txt', encoded(excerpt, rng, encoding))
            assert guess_encoding(path) == (name, ''), (encoding, i)

# ----------------------------------------------------------------------------- .jsonl


def a_text(rng):
    return ''.join(
        rng.choices(
            ['石头', 'a b', '\n', '\r\n', '\r', '🙂', '\\"', '\u2028', '\x85', '\x00', '记'], k=rng.randrange(9)
        )
    )


@pytest.mark.parametrize('encoding, packer', [
    ('utf-8', ''), ('utf-8-sig', '.gz'), ('gb18030', '.bz2'), ('utf-16', '.xz'), ('utf-8', '.zst'), ('gb18030', ''),
])
def test_jsonl(tmp_path, monkeypatch, packer, encoding):
    """Lines end at line feeds alone, blocks anywhere; the text is what json says, its newlines too."""
    rng = random.Random(packer + encoding)
    for _ in range(20):
        monkeypatch.setattr(documents, 'READ_BYTES', rng.randrange(1, 300))
        texts = [SIMPLIFIED] + [a_text(rng) for _ in range(6)]
        lines = ''.join(
            json.dumps({'id': 1, 'text': text}, ensure_ascii=rng.random() < 0.3) + rng.choice(['\n', '\r\n', '\n \n\n'])
            for text in texts
        )
        lines = (
            SIMPLIFIED.join(['{"text": "a", "note": "', '"}\n']).replace('\r\n', '') + lines
        )  # so that there is something to guess by
        documents._guess_encoding.cache_clear()
        path = write(tmp_path / f'x.jsonl{packer}', PACKERS[packer](lines.rstrip().encode(encoding)))
        assert read(path) == ['a', *texts]
        assert sum(piece is not None for piece in read_documents(path)) == 1 + sum(
            text != '' for text in texts
        )  # each whole


def test_jsonl_half_a_character(tmp_path):
    path = write(tmp_path / 'x.jsonl', r'{"body": "\ud83d\ude42 \ud83d a \ude42"}')
    assert read(path, 'body') == ['🙂 \ufffd a \ufffd']


@pytest.mark.parametrize('line, expected', [
    ('{"text": ', 'JSONDecodeError'), ('{"content": "a", "id": 5}', 'there are: content, id'),
    ('{"text": 5}', 'not a number'), ('{"text": ["a", 5]}', 'not a list'), ('true', 'not true or false'),
    ('[' * 100_000, 'RecursionError'), ('\ufeff{"text": "a"}', 'JSONDecodeError')])
def test_bad_jsonl(tmp_path, line, expected):
    path = write(tmp_path / 'x.jsonl', '{"text": "a"}\n\n' + line + '\n')
    said = exit_line(list, read_documents(path))
    assert said.startswith(f'{path}, line 3: ') and '"text"' in said and '--field' in said and expected in said

# ----------------------------------------------------------------------------- .json, .csv and .tsv


def as_csv(rows, **kwargs):
    """A table as Python's csv module writes it, with Windows' ends of lines."""
    table = io.StringIO(newline='')
    csv.writer(table, **kwargs).writerows(rows)
    return table.getvalue()


@pytest.mark.parametrize('name, write_table', [('x.csv', as_csv), ('x.tsv', lambda rows: as_csv(rows, delimiter='\t'))])
@pytest.mark.parametrize('packer', PACKERS)
def test_tables(tmp_path, monkeypatch, name, write_table, packer):
    """Cells may hold separators, quotes and newlines; blocks end anywhere; the column is --field's."""
    rng = random.Random(name + packer)
    for _ in range(5):
        monkeypatch.setattr(documents, 'READ_BYTES', rng.randrange(1, 300))
        texts = [SIMPLIFIED, '', *(a_text(rng).replace('\0', '') + ',"\t' for _ in range(5)), 'a' * 200_000]
        table = write_table([['id', 'text, all'], *enumerate(texts)])
        path = write(tmp_path / (name + packer), PACKERS[packer](table.encode(rng.choice(['utf-8-sig', 'gb18030']))))
        documents._guess_encoding.cache_clear()
        expected = [one_newline(text) for text in texts]
        assert read(path, 'text, all') == read(str(tmp_path), 'text, all') == expected


@pytest.mark.parametrize('table, says', [
    ('id,body\n1,a\n', 'line 1: no "text" (--field names another), there are: id, body'),
    ('', 'line 1: no "text"'),
    ('id,text\n1,a\n\n2\n', 'line 4: 1 columns; expected 2'),
    ('id,text\n1,"a\n', 'unexpected end of data'),
    ('id,text\n1,"a" b\n', 'line 2: '),
])
def test_bad_tables(tmp_path, table, says):
    path = write(tmp_path / 'x.csv', table)
    line = exit_line(list, read_documents(path))
    assert line.startswith(f'{path}, ') and says in line


POEMS = [{'author': 'a', 'paragraphs': ['满纸荒唐言，', '一把辛酸泪。']},
         {'paragraphs': ['都云作者痴。']}, {'paragraphs': []}]
POEM_TEXTS = ['满纸荒唐言，\n一把辛酸泪。', '都云作者痴。', '']


@pytest.mark.parametrize('data, field, expected', [
    (POEMS, 'paragraphs', POEM_TEXTS),
    ({'poems': POEMS, 'version': 1}, 'paragraphs', POEM_TEXTS),
    (POEMS[0], 'paragraphs', POEM_TEXTS[:1]),
    ([{'text': 'a'}, {'text': None}, {'text': '🙂 b'}], 'text', ['a', '', '🙂 b']),
    (['a', 'b\nc'], 'text', ['a', 'b\nc']),
    ([], 'text', []),
], ids=str)
def test_json(tmp_path, data, field, expected):
    """A list of records, in any layout, encoding and compression; a list of texts is joined."""
    for i, text in enumerate((json.dumps(data), json.dumps(data, ensure_ascii=False, indent=2) + '\n')):
        for packer in PACKERS:
            path = write(tmp_path / f'{i}.json{packer}', PACKERS[packer](text.encode('utf-8-sig')))
            assert read(path, field) == expected


def test_json_with_a_record_per_line(tmp_path):
    """As C4's .json.gz files have them."""
    path = write(tmp_path / 'c4.json.gz', gzip.compress(b'{"text": "a"}\n\n{"text": "b"}\n'))
    assert read(path) == ['a', 'b']
    assert read(write(tmp_path / 'one.json', '{"text": "a"}')) == ['a']


@pytest.mark.parametrize('text, says', [
    ('[{"text": "a"}', 'expected JSON: JSONDecodeError'),
    ('', 'expected JSON'),
    ('5', 'a number; expected a list'),
    ('{"a": [], "b": [], "n": 1}', 'an object with 2 lists (a, b, n); expected a list'),
    ('[{"title": "a", "content": "b"}]', 'item 1: no "text" (--field names another), there are: title, content'),
    ('[{"text": "a"}, {"text": 5}]', 'item 2: expected a text in "text" (--field names another), not a number'),
    ('[5]', 'item 1: expected a text in "text" (--field names another), not a number'),
])
def test_bad_json(tmp_path, text, says):
    path = write(tmp_path / 'x.json', text)
    line = exit_line(list, read_documents(path))
    assert line.startswith(path) and says in line


def test_files_without_the_field_may_be_left_out(tmp_path, capsys):
    """As the authors beside chinese-poetry's poems."""
    for i in range(2):
        write(tmp_path / '宋词' / f'ci.song.{i}000.json', json.dumps(POEMS[i:i + 1]))
    authors = write(tmp_path / '宋词' / 'author.song.json', json.dumps([{'name': 'a'}]))
    write(tmp_path / '宋词' / 'README.md', 'about them')
    line = exit_line(list, read_documents(str(tmp_path), 'paragraphs'))
    assert line.startswith(f'{authors}, item 1: no "paragraphs"')
    assert line.endswith('--skip_bad=True leaves such files out')
    assert read(str(tmp_path), 'paragraphs', skip_bad=True) == POEM_TEXTS[:2]
    assert capsys.readouterr().err == f'{authors}: left out: no "paragraphs" in it\n'


@pytest.mark.parametrize('name, how', [
    ('a.html', 'pandoc'), ('a.epub', 'pandoc'), ('a.docx', 'pandoc'), ('a.pdf', 'pdftotext'), ('a.xlsx', '.csv'),
    ('a.xml.bz2', '.jsonl'), ('a.yaml', '.json'), ('a.zip', 'unpack'), ('a.tar', 'unpack'), ('a.tar.gz', 'unpack'),
    ('a.tgz', 'unpack'), ('A.PDF', 'pdftotext A.PDF'),
])
def test_files_that_have_to_be_converted(tmp_path, name, how):
    path = write(tmp_path / name, 'text')
    line = exit_line(list, read_documents(path))
    assert line.startswith(f'{path}: ') and 'expected a .txt' in line and how in line.partition('to convert it: ')[2]


def test_a_large_json_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(documents, 'LARGE_JSON', 5)
    path = write(tmp_path / 'x.json', '["some text"]')
    assert read(path) == read(path) == ['some text']
    assert capsys.readouterr().out.count('.jsonl') == 2  # one line, whose command names two

# ----------------------------------------------------------------------------- .parquet


@pytest.mark.parametrize('kwargs', [{}, {'row_group_size': 7}, {'compression': 'zstd', 'use_dictionary': False}])
def test_parquet(tmp_path, kwargs):
    rng = random.Random(0)
    texts = [rng.choice([None, a_text(rng)]) for _ in range(300)]
    path = write_parquet(tmp_path / 'x.PARQUET', {'id': list(range(300)), 'body': texts}, **kwargs)
    assert read(path, 'body') == [text or '' for text in texts]
    assert [piece for piece in read_documents(path, 'body') if piece is not None] == [text for text in texts if text]
    assert read(str(tmp_path), 'body') == read(path, 'body')
    assert path in (line := exit_line(list, read_documents(path))) and '"text"' in line and 'id, body' in line
    assert 'row 1' in (line := exit_line(list, read_documents(path, 'id'))) and 'not a number' in line


def test_parquet_types(tmp_path):
    pyarrow = pytest.importorskip('pyarrow')
    texts = ['石', '', None, 'b', '石'] * 50
    columns = {
        'large': pyarrow.array(texts, pyarrow.large_string()),
        'dictionary': pyarrow.array(texts).dictionary_encode(),
        'bytes': pyarrow.array([b'\xff'] * 250),
        'nulls': pyarrow.nulls(250),
        'lines': pyarrow.array([['a', 'b'], []] * 125),
    }
    path = write_parquet(tmp_path / 'x.parquet', columns)
    assert read(path, 'large') == read(path, 'dictionary') == [text or '' for text in texts]
    assert read(path, 'nulls') == [''] * 250
    assert read(path, 'lines') == ['a\nb', ''] * 125
    assert 'bytes' in exit_line(list, read_documents(path, 'bytes'))


def test_bad_parquet(tmp_path):
    whole = write_parquet(
        tmp_path / 'whole.parquet', {'text': [str(i) * 99 for i in range(9000)]}, use_dictionary=False
    )
    with open(whole, 'rb') as f:
        data = f.read()
    half = len(data) // 2
    for damaged in (b'', b'text', data[:half], data[half:], data[:half] + b'\xff' * 999 + data[half + 999:]):
        path = write(tmp_path / 'x.parquet', damaged)
        assert exit_line(list, read_documents(path)).startswith(f'{path}: damaged')


@pytest.mark.parametrize('name, module', [('x.parquet', 'pyarrow'), ('x.txt.zst', 'zstandard')])
def test_a_missing_library(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    path = write(tmp_path / name, 'x')
    assert exit_line(list, read_documents(path)).endswith(f'pip install {module}') and name in exit_line(
        list, read_documents(path)
    )


# ----------------------------------------------------------------------------- compressed and large files


@pytest.mark.parametrize('packer', ['.gz', '.bz2', '.xz', '.zst'])
def test_damaged_archives(tmp_path, packer):
    data = random.Random(0).randbytes(60_000).hex().encode()
    packed = PACKERS[packer](data)
    half = len(packed) // 2
    for number, damaged in enumerate(
        (packed[:half], packed[:-1], packed[:half] + bytes(99) + packed[half + 99 :], data)
    ):
        if packer == '.zst' and number == 2:
            continue  # without a checksum, which the tool writes and this library does not, a change may go unseen
        path = write(tmp_path / f'{number}.txt{packer}', damaged)
        assert exit_line(list, read_documents(path)).startswith(f'{path}: damaged'), number


@pytest.mark.parametrize('packer', ['.gz', '.bz2', '.xz', '.zst'])
def test_archives_joined(tmp_path, packer):
    """Several archives in a row are one, as for the tools; what they hold may have grown a thousandfold."""
    texts = ['石头记' * 200_000, 'a', SIMPLIFIED]
    path = write(tmp_path / f'x.txt{packer}', b''.join(PACKERS[packer](text.encode()) for text in texts))
    assert read(path) == [one_newline(''.join(texts))]
    assert max(len(piece) for piece in read_documents(path) if piece) <= documents.READ_BYTES


@pytest.mark.parametrize('name', ['x.txt', 'x.jsonl', *(f'x.jsonl{packer}' for packer in PACKERS if packer)])
def test_memory_stays_small(tmp_path, monkeypatch, name):
    """Reading a file of 6 MB, 64 KB at a time, takes less than 1.5 MB of memory."""
    monkeypatch.setattr(documents, 'READ_BYTES', 1 << 16)
    rng = random.Random(0)
    data = ''.join(json.dumps({'text': rng.randbytes(10_000).hex()}) + '\n' for _ in range(300))
    pack = (
        (lambda data: lzma.compress(data, preset=0)) if name.endswith('.xz') else PACKERS[name[7:]]
    )  # its window is 8 MB otherwise
    path = write(tmp_path / name, pack(data.encode()))
    tracemalloc.start()
    try:
        characters = sum(len(piece or '') for piece in read_documents(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert characters == (len(data) if name == 'x.txt' else 20_000 * 300)
    assert peak < 1.5e6


def test_the_first_document_comes_first(tmp_path, monkeypatch):
    """Reading has not reached the end of the file when it yields its first text, once the encoding is known."""
    path = write(tmp_path / 'x.jsonl', '{"text": "first"}\n' + '{"text": "石头记"}\n' * 10_000)
    guess_encoding(path)
    monkeypatch.setattr(documents, 'READ_BYTES', 1000)
    read_so_far = []
    blocks = documents._blocks
    monkeypatch.setattr(
        documents, '_blocks', lambda path: (block for block in blocks(path) if not read_so_far.append(len(block)))
    )
    assert next(read_documents(path)) == 'first' and sum(read_so_far) == 1000


def test_parquet_memory_stays_small(tmp_path):
    """A row group of 40 MB."""
    pyarrow = pytest.importorskip('pyarrow')
    rng = random.Random(0)
    path = write_parquet(
        tmp_path / 'x.parquet',
        {'text': [rng.randbytes(20_000).hex() for _ in range(1000)]},
        compression='none',
        use_dictionary=False,
        row_group_size=1000,
        write_batch_size=32,
    )
    before = pyarrow.total_allocated_bytes()
    peak = max(pyarrow.total_allocated_bytes() - before for _ in read_documents(path))
    assert os.path.getsize(path) > 40_000_000 and peak < 20_000_000


def test_what_the_system_says(tmp_path):
    (tmp_path / 'folder.txt').mkdir()
    path = str(tmp_path / 'folder.txt')
    assert (
        exit_line(list, read_documents([path])).startswith(f'{path}: Is a directory; expected a .txt')
        or os.name == 'nt'
    )
    gone = str(tmp_path / 'gone.txt')
    assert exit_line(list, read_documents([gone])).startswith(f'{gone}: No such file')


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, 'guess_encoding', lambda path: ('utf-8', ''))  # as it was a moment ago
    path = write(tmp_path / 'x.txt', b'\xff')
    assert exit_line(list, read_documents(path)).startswith(f'{path}: damaged')


def test_null_is_a_document_without_text(tmp_path):
    """In a .jsonl as in a .parquet file."""
    path = write(tmp_path / 'x.jsonl', '{"text": null}\n{"text": "a"}\n{"text": ""}\n')
    assert list(read_documents(path)) == [None, 'a', None, None]
