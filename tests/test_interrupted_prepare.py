"""Preparations that are interrupted, killed or out of disk space resume, and write the same files."""
import errno
import itertools
import json
import os
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import exit_line, make_dataset, write
from dataset_helpers import (
    CHINESE,
    TEXT,
    files_of,
    make,
    meta_of,
    plain,
    write_jsonl,
)

from core.files import ROOT
from core.text import prepare
from core.text.tokenizer import Tokenizer, load_tokenizer

pytest_plugins = 'dataset_fixtures'


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
    {'tokenizer': 'char', 'shard_tokens': 90},
    {'tokenizer': 'bpe'},
    {'tokenizer': 'bpe', 'prune': 'True', 'shard_tokens': 64, 'val_fraction': 0.0},
    {'tokenizer': 'bbpe', 'vocab_size': 300, 'num_proc': 2},
], ids=str)
def test_an_interrupted_run_goes_on(tmp_path, corpus, gpt2_like, small_blocks, monkeypatch, encoded, capsys, settings):
    """Interrupt it every few writes until it ends: the files are the same, and nothing is encoded twice."""
    small_blocks(100)
    settings = {**settings, 'tokenizer': gpt2_like.path if settings['tokenizer'] == 'bpe' else settings['tokenizer']}
    make(tmp_path / 'whole', corpus, **settings)
    expected, (*_, all_characters) = (
        files_of(tmp_path / 'whole'),
        (sum(meta_of(tmp_path / 'whole')[name]['characters'] for name in ('train', 'val')),),
    )
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
    assert (
        f'going on where it was interrupted, after {progress["train"]["tokens"] + progress["val"]["tokens"]:,} tokens'
        in out.splitlines()
    )
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
    # progress is saved every third batch
    prepare.time = SimpleNamespace(perf_counter=time.perf_counter, monotonic=itertools.count(0, 2).__next__)
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
    script = write(
        tmp_path / 'killed.py',
        textwrap.dedent(KILLED).format(root=ROOT, folder=str(tmp_path / 'd'), source=str(corpus), **settings),
    )
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


@pytest.mark.parametrize('change', [
    {'val_fraction': 0.2},
    {'shard_tokens': 70},
    {'tokenizer': 'char'},
    {'prune': 'True'},
    {'min_chars': 200},
    {'limit': 9},
    {'input': 'more'},
    {'input': 'less'},
    {'num_proc': 2},
], ids=str)
def test_with_a_change_it_starts_anew(tmp_path, corpus, gpt2_like, small_blocks, monkeypatch, change):
    """But not if only the number of threads is another."""
    small_blocks(100)
    settings = {'tokenizer': gpt2_like.path}
    interrupted(tmp_path, corpus, monkeypatch, **settings)
    if 'input' in change:
        write(
            corpus / 'b9.txt', (corpus / 'b9.txt').read_text(encoding='utf-8')[:-1] + '!' * (change['input'] == 'more')
        )
    settings.update({key: value for key, value in change.items() if key != 'input'})
    out = make_dataset(tmp_path / 'd', str(corpus), **settings)
    assert ('going on' in out) == ('num_proc' in change)
    make(tmp_path / 'whole', corpus, **settings)
    assert files_of(tmp_path / 'd') == files_of(tmp_path / 'whole') and not (tmp_path / 'd' / 'unfinished').exists()


def test_the_same_text_in_another_encoding_while_it_was_interrupted(tmp_path, small_blocks, monkeypatch, gpt2_like):
    """The text then arrives in pieces of other lengths, but the batches must be the same."""
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


@pytest.mark.parametrize('shard_tokens', [0, 300])
def test_tokens_that_changed_on_the_disk(tmp_path, corpus, small_blocks, monkeypatch, shard_tokens):
    """As another preparation in the same folder would change them: noticed at the end, and when it goes on."""
    small_blocks(100)
    make(tmp_path / 'whole', corpus, shard_tokens=shard_tokens)
    make(tmp_path / 'd', write(tmp_path / 'old.txt', TEXT))
    before, name = files_of(tmp_path / 'd'), 'train_00000.bin' if shard_tokens else 'train.bin'

    def change(folder):
        path = folder / 'unfinished' / name
        data = path.read_bytes()
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])

    with monkeypatch.context() as patch:
        move = prepare.move_to_place
        patch.setattr(prepare, 'move_to_place', lambda folder, *args: (change(tmp_path / 'd'), move(folder, *args)))
        line = exit_line(make_dataset, tmp_path / 'd', str(corpus), shard_tokens=shard_tokens)
    assert 'train tokens on the disk are not those that were written' in line
    assert files_of(tmp_path / 'd') == before and not (tmp_path / 'd' / 'unfinished').exists()

    interrupted(tmp_path, corpus, monkeypatch, shard_tokens=shard_tokens)
    change(tmp_path / 'd')
    out = make_dataset(tmp_path / 'd', str(corpus), shard_tokens=shard_tokens)
    assert 'beginning anew' in out and 'going on' not in out
    assert files_of(tmp_path / 'd') == files_of(tmp_path / 'whole')


def test_two_at_a_time(tmp_path):
    """The second one ends with a line and changes nothing; it can run when the first one has ended."""
    filelock = pytest.importorskip('filelock')
    path = write(tmp_path / 'x.txt', TEXT)
    (tmp_path / 'd').mkdir()
    with filelock.FileLock(tmp_path / 'd' / 'lock'):
        line = exit_line(make_dataset, tmp_path / 'd', path)
        assert line.startswith(f'{tmp_path / "d"}: another preparation is writing there')
        assert os.listdir(tmp_path / 'd') == ['lock']
    make_dataset(tmp_path / 'd', path)
    assert 'lock' not in os.listdir(tmp_path / 'd')


@pytest.mark.slow
def test_two_at_a_time_for_real(tmp_path):
    """Start two, a moment apart: one of them ends at once, and the other's dataset is whole."""
    with open(tmp_path / 'big.txt', 'w', encoding='utf-8') as f:
        f.writelines(f'{i} {CHINESE}\n' for i in range(100_000))
    (tmp_path / 'data').mkdir()
    command = [sys.executable, os.path.join(ROOT, 'data', 'any_text', 'prepare.py'), 'big.txt', '--name=two']
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
    for delay in (0, 0.3):
        first = subprocess.Popen(command, cwd=tmp_path, **pipes)
        time.sleep(delay)
        second = subprocess.Popen(command, cwd=tmp_path, **pipes)
        errors = [process.communicate()[1].decode() for process in (first, second)]
        assert sorted([first.returncode, second.returncode]) == [0, 1], errors
        assert sum(error.count('another preparation is writing there') for error in errors) == 1
        tokens = np.fromfile(tmp_path / 'data' / 'two' / 'train.bin', '<u2')
        known = load_tokenizer(str(tmp_path / 'data' / 'two'))
        assert np.array_equal(tokens, known.encode((tmp_path / 'big.txt').read_text(encoding='utf-8')[:len(tokens)]))


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
        assert (
            out[0] == 130 and json.loads((tmp_path / 'd' / 'unfinished' / 'progress.json').read_text())['batches'] == 29
        )


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
    assert make(tmp_path / 'd', path) == make(tmp_path / 'whole', path) and files_of(tmp_path / 'd') == files_of(
        tmp_path / 'whole'
    )
