"""Corpora of the Hugging Face hub, from a local stand-in: files downloaded, their sources, error messages."""
import hashlib
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pytest

from core.files import ROOT
from core.text import download as fetch
from core.text.tokenizer import load_tokenizer

pyarrow = pytest.importorskip('pyarrow')
pytest.importorskip('huggingface_hub')

SCRIPTS = {'openwebtext': ('Skylion007/openwebtext', 'plain_text/train-0000{}-of-00003.parquet'),
           'fineweb_edu': ('HuggingFaceFW/fineweb-edu', 'sample/10BT/00{}_00000.parquet'),
           'wikipedia_zh': ('wikimedia/wikipedia', '20231101.zh/train-0000{}-of-00003.parquet')}
COMMIT = 'c0ffee' + '0' * 34  # the newest
OLD = '01d' + '0' * 37
BBPE = '--tokenizer=bbpe', '--vocab_size=300'  # GPT-2's merges are not on every machine
NO_PROXY = {'no_proxy': '127.0.0.1', 'NO_PROXY': '127.0.0.1'}


def articles(number):
    """The documents of a corpus's file of this number."""
    return [
        f'Article {number}.{i}: the quick brown fox, 第{number}卷第{i}回，满纸荒唐言。\n\n'
        'More of it, and more of it still.'
        for i in range(20)
    ]


def write_parquet(path, texts):
    from pyarrow import parquet
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({'id': list(range(len(texts))), 'text': texts}), path)
    return path


@pytest.fixture
def hub(tmp_path):
    """
    A local hub that serves the three corpora, three files each: url; asked, its requests [(method, path), ...];
    broken, the name of a file that it does not send.
    """
    files = {}
    for repo, pattern in SCRIPTS.values():
        for number in (2, 0, 1):  # a hub need not sort them
            path = write_parquet(tmp_path / 'served' / repo / pattern.format(number), articles(number))
            files[f'/datasets/{repo}/resolve/main/{pattern.format(number)}'] = path.read_bytes()
        files[f'/datasets/{repo}/resolve/main/README.md'] = b'a card'
        files[f'/datasets/{repo}/resolve/main/other/train-00000-of-00001.parquet'] = b'of another corpus'
    got = SimpleNamespace(asked=[], broken='')

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = unquote(self.path).split('?')[0]
            got.asked.append((self.command, path))
            self.commit = OLD if OLD in path else COMMIT
            path = path.replace(f'/resolve/{self.commit}/', '/resolve/main/')
            if path.startswith('/api/datasets/'):
                prefix = f'/datasets/{path.removeprefix("/api/datasets/").partition("/revision/")[0]}/resolve/main/'
                siblings = [{'rfilename': file.removeprefix(prefix)} for file in files if file.startswith(prefix)]
                self.answer(
                    json.dumps({'id': prefix, 'sha': self.commit, 'siblings': siblings}).encode() if siblings else None
                )
            else:
                self.answer(None if got.broken and path.endswith(got.broken) else files.get(path))

        do_HEAD = do_GET

        def answer(self, data):
            self.send_response(404 if data is None else 200)
            data = data or b''
            for key, value in {
                'ETag': f'"{hashlib.sha1(data).hexdigest()}"',
                'X-Repo-Commit': self.commit,
                'Content-Length': len(data),
            }.items():
                self.send_header(key, str(value))
            if not data:
                self.send_header('X-Error-Code', 'EntryNotFound')
            self.end_headers()
            if self.command == 'GET':
                self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    got.url = f'http://127.0.0.1:{server.server_port}'
    yield got
    server.shutdown()
    server.server_close()


@pytest.fixture
def house(tmp_path):
    """A copy of the three scripts with an empty hub cache: run(corpus, *arguments, **environment)."""
    root = tmp_path / 'house'
    for name in ('configurator.py', 'core', *(f'data/{corpus}/prepare.py' for corpus in SCRIPTS)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        source = os.path.join(ROOT, name)
        if os.path.isdir(source):
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns('__pycache__'))
        else:
            shutil.copy(source, root / name)

    def run(corpus, *arguments, **env):
        kept = {
            key: value
            for key, value in os.environ.items()
            if key != 'DATA_MIRROR' and not key.startswith(('HF_', 'HUGGING', 'TRANSFORMERS'))
        }
        env = {
            **kept,
            **NO_PROXY,
            'HF_HOME': str(tmp_path / 'hf_home'),
            'XDG_CACHE_HOME': str(tmp_path / 'cache'),
            **env,
        }
        command = [sys.executable, str(root / 'data' / corpus / 'prepare.py'), *arguments]
        return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, encoding='utf-8')
    run.root = root
    return run


@pytest.fixture
def here(monkeypatch, tmp_path):
    """here(url): hub_files() in this process asks the hub at this address, and has nothing in its cache yet."""
    from huggingface_hub import constants
    for key, value in NO_PROXY.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv('DATA_MIRROR', raising=False)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)

    def forget():
        fetch._list_hub.cache_clear()
        fetch._from_hub.cache_clear()

    def use(url):
        monkeypatch.setattr(constants, 'ENDPOINT', url)
        monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', url + '/{repo_id}/resolve/{revision}/{filename}')
        forget()
        return fetch.hub_files('Skylion007/openwebtext', 'plain_text/*.parquet', 'openwebtext')
    yield use
    forget()


def documents_of(folder):
    """Return the documents of a dataset folder: the training part of each, followed by its validation part."""
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    known = load_tokenizer(str(folder))
    parts = []
    for split in ('train', 'val'):
        ids = np.concatenate([np.fromfile(path, meta['dtype']) for path in sorted(folder.glob(f'{split}_*.bin'))])
        assert len(ids) == meta[split]['tokens'] and ids[-1] == known.eot
        parts.append(
            [known.decode(part[part != known.eot]) for part in np.split(ids, np.flatnonzero(ids == known.eot) + 1)[:-1]]
        )
    return [train + val for train, val in zip(*parts, strict=True)]


def fetched(hub):
    return [path.rpartition('/')[2] for method, path in hub.asked if method == 'GET' and '/resolve/' in path]


def one_line(done):
    """The line with which a script gave up."""
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize('corpus', SCRIPTS)
def test_corpus_comes_from_the_hub(house, hub, corpus):
    done = house(corpus, *BBPE, '--shard_tokens=1000', HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    repo, pattern = SCRIPTS[corpus]
    folder = house.root / 'data' / corpus
    assert documents_of(folder) == [text for number in range(3) for text in articles(number)]
    assert len(list(folder.glob('train_*.bin'))) > 1
    assert fetched(hub) == [
        pattern.format(number).rpartition('/')[2] for number in range(3)
    ]  # once each, though read more than once
    assert done.stdout.count(f'{corpus}: 3 files from {hub.url}/datasets/{repo}') == 1
    assert sum(path.startswith('/api/datasets/') for _, path in hub.asked) == 1
    assert 'next:\npython train.py config/train_' in done.stdout
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    assert meta['hub'] == [f'{repo}@{COMMIT}'] and f', commit {COMMIT}, ' in done.stdout


def test_limit_fetches_the_first_file_only_and_the_cache_serves_offline(house, hub):
    done = house('wikipedia_zh', '--vocab_size=300', '--limit=12', HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    assert documents_of(house.root / 'data' / 'wikipedia_zh') == articles(0)[:12] and fetched(hub) == [
        'train-00000-of-00003.parquet'
    ]
    asked = len(hub.asked)
    done = house('wikipedia_zh', '--vocab_size=300', HF_ENDPOINT=hub.url, HF_HUB_OFFLINE='1')
    assert done.returncode == 0 and len(hub.asked) == asked, done.stderr
    assert documents_of(house.root / 'data' / 'wikipedia_zh') == articles(0)
    assert 'wikipedia_zh: 1 files from ' in done.stdout and 'HF_HUB_OFFLINE is set' in done.stdout
    done = house(
        'wikipedia_zh', '--vocab_size=300', '--limit=21', HF_ENDPOINT=hub.url
    )  # what is there is not fetched again
    assert done.returncode == 0 and fetched(hub) == ['train-00000-of-00003.parquet', 'train-00001-of-00003.parquet']
    assert documents_of(house.root / 'data' / 'wikipedia_zh') == articles(0) + articles(1)[:1]


def test_a_revision_of_the_hub(house, hub):
    """All files are of that commit, and offline the cache has it too."""
    for env in {}, {'HF_HUB_OFFLINE': '1'}:
        done = house('wikipedia_zh', '--vocab_size=300', '--limit=12', f'--revision={OLD}', HF_ENDPOINT=hub.url, **env)
        assert done.returncode == 0, done.stderr
        meta = json.loads((house.root / 'data' / 'wikipedia_zh' / 'meta.json').read_text(encoding='utf-8'))
        assert meta['hub'] == [f'wikimedia/wikipedia@{OLD}']
    assert not [path for _, path in hub.asked if COMMIT in path or '/main/' in path]


def test_own_files_come_before_the_hub(house, hub, tmp_path):
    write_parquet(tmp_path / 'mirror' / 'openwebtext' / 'b.parquet', articles(7))
    (tmp_path / 'mirror' / 'openwebtext' / 'a.jsonl').write_text(
        '\n'.join(json.dumps({'text': text}) for text in articles(6)), encoding='utf-8'
    )
    done = house('openwebtext', *BBPE, HF_ENDPOINT=hub.url, DATA_MIRROR=str(tmp_path / 'mirror'))
    assert done.returncode == 0, done.stderr
    assert documents_of(house.root / 'data' / 'openwebtext') == articles(6) + articles(7)
    assert done.stdout.count(f'openwebtext: the 2 files in {tmp_path / "mirror" / "openwebtext"}') == 1
    own = write_parquet(tmp_path / 'own.parquet', articles(8))
    done = house('openwebtext', *BBPE, f'--input={own}', HF_ENDPOINT=hub.url, DATA_MIRROR=str(tmp_path / 'mirror'))
    assert done.returncode == 0 and documents_of(house.root / 'data' / 'openwebtext') == articles(8)
    assert not hub.asked


@pytest.mark.parametrize('env, reason', [
    ({'HF_ENDPOINT': 'http://127.0.0.1:9'}, 'refused'),
    ({'HF_HUB_OFFLINE': '1'}, 'cache'),
])
def test_without_network_one_line(house, env, reason):
    line = one_line(house('fineweb_edu', *BBPE, **env))
    assert (
        line.startswith('fineweb_edu: HuggingFaceFW/fineweb-edu/sample/10BT/*.parquet cannot be had') and reason in line
    )
    assert '--input=FOLDER' in line and 'DATA_MIRROR' in line
    assert os.listdir(house.root / 'data' / 'fineweb_edu') == ['prepare.py']


def test_a_hub_that_never_answers(here, monkeypatch):
    with socket.create_server(('127.0.0.1', 0)) as silent:
        monkeypatch.setattr(fetch, 'TIMEOUT', 0.5)
        with pytest.raises(SystemExit, match='cannot be had'):
            next(here(f'http://127.0.0.1:{silent.getsockname()[1]}'))


def test_what_the_hub_lacks_is_named(here, hub, capsys):
    assert [os.path.basename(path) for path in here(hub.url)] == [
        f'train-0000{number}-of-00003.parquet' for number in range(3)
    ]
    for repo, pattern, line in (
        ('nobody/nothing', '*.parquet', r'nothing: nobody/nothing/\*.parquet cannot be had .*404'),
        ('wikimedia/wikipedia', '20231101.xx/*', 'wikipedia/20231101.xx/.* cannot be had .*no such file'),
    ):
        with pytest.raises(SystemExit, match=line):
            next(fetch.hub_files(repo, pattern, 'nothing'))
    hub.broken = 'train-00001-of-00003.parquet'
    files = fetch.hub_files('wikimedia/wikipedia', '20231101.zh/*.parquet', 'zh')
    assert next(files).endswith('20231101.zh/train-00000-of-00003.parquet')
    with pytest.raises(
        SystemExit, match='zh: wikimedia/wikipedia/20231101.zh/train-00001-of-00003.parquet cannot be had'
    ) as stopped:
        next(files)
    assert '\n' not in stopped.value.code
    hub.broken = ''
    assert len(list(fetch.hub_files('wikimedia/wikipedia', '20231101.zh/*.parquet', 'zh'))) == 3
    assert fetched(hub).count('train-00000-of-00003.parquet') == 2  # one of each corpus
    assert capsys.readouterr().out.count('zh: 3 files from') == 1
