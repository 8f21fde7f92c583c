"""Fixtures for the tests of prepare.py, chunks.py and data/*/prepare.py."""
import os
import random
import shutil
import subprocess
import sys

import pytest
from conftest import write
from dataset_helpers import CHINESE, train_bpe, write_jsonl

from core.files import ROOT
from core.text import chunks, documents, prepare
from core.text.tokenizer import QWEN2_SPLIT, Tokenizer


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
        for module in (prepare, chunks, documents):
            monkeypatch.setattr(module, 'READ_BYTES', characters)
    return set_block


@pytest.fixture
def house(tmp_path):
    """A copy of the prepare scripts, so that no test writes to the real folders: run(script, *arguments)."""
    root = tmp_path / 'house'
    root.mkdir()
    scripts = [
        'any_text',
        'classics_bbpe',
        'hongloumeng_bbpe',
        'hongloumeng_char',
        'hongloumeng_qwen2',
        'novels',
        'shakespeare',
        'shakespeare_char',
    ]
    for name in ('configurator.py', 'core', *(f'data/{script}' for script in scripts)):
        source = os.path.join(ROOT, name)
        if os.path.isdir(source):
            ignored = shutil.ignore_patterns(
                '__pycache__', '*.bin', '*.pkl', '*.json', 'input.txt', 'input', 'unfinished'
            )
            shutil.copytree(source, root / name, ignore=ignored)
        else:
            shutil.copy(source, root / name)

    def run(script, *arguments, cwd=root, **env):
        env = {
            **{k: v for k, v in os.environ.items() if k != 'DATA_MIRROR'},
            'XDG_CACHE_HOME': str(tmp_path / 'cache'),
            **env,
        }
        command = [sys.executable, str(root / script), *arguments]
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, encoding='utf-8')
    run.root = root
    return run


@pytest.fixture
def corpus(tmp_path):
    """Documents of different lengths, some of several batches at small blocks, in two files."""
    rng = random.Random(5)
    texts = [
        ''.join(rng.choices([CHINESE, 'Some words, ', 'and a line\n', '石头记。'], k=rng.randrange(1, 40)))
        for _ in range(30)
    ]
    write_jsonl(tmp_path / 'in' / 'a.jsonl', texts[:20])
    for number, text in enumerate(texts[20:]):
        write(tmp_path / 'in' / f'b{number}.txt', text)
    return tmp_path / 'in'
