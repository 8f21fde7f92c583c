"""The HTTP server, request by request, chat.py --serve, and the page in a browser."""
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time

import pytest
from chat_models import assistant, chat, one_thread, read_until, save_endless, save_short, started, system, user

pytest.importorskip('starlette')
uvicorn = pytest.importorskip('uvicorn')

from core.inference import server as server_file  # noqa: E402
from core.inference.conversation import LIMITS, fit_into_context, stream_reply  # noqa: E402
from core.inference.server import ChatApp, parse_request  # noqa: E402

PATH = '/v1/chat/completions'
OK = {'messages': [user('a')], 'max_tokens': 2}


@pytest.fixture(scope='module', autouse=True)
def few_threads():
    with one_thread():
        yield


@pytest.fixture(scope='module')
def short(tmp_path_factory):
    return save_short(tmp_path_factory.mktemp('models') / 'short')


@contextlib.contextmanager
def serving(made, settings=None, **kwargs):
    """Run the application on a free port of this machine; yields the port."""
    defaults = {key: low for key, (low, _) in LIMITS.items()}
    defaults.update({'max_new_tokens': 40, 'temperature': 1.0, 'top_p': 1.0, 'repetition_penalty': 1.0,
                     'presence_penalty': 0.0, 'frequency_penalty': 0.0, 'seed': 1, **(settings or {})})
    app = ChatApp(made.model, made.tokenizer, 'tiny', defaults, hosts={'127.0.0.1', 'localhost', '[::1]'}, **kwargs)
    config = uvicorn.Config(app, log_level='error', lifespan='off', timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    with socket.create_server(('127.0.0.1', 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={'sockets': [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope='module')
def port(short):
    with serving(short, max_body=2000) as port:
        yield port


def send(port, body=None, method='POST', path=PATH, headers=()):
    """Send a request. Returns the connection and the response, which is not read yet."""
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=20)
    if isinstance(body, (dict, list)):
        body = json.dumps(body)
    chunked = body is not None and not isinstance(body, (str, bytes))
    headers = {'Content-Type': 'application/json', **dict(headers)}
    connection.request(method, path, body, headers, encode_chunked=chunked)
    return connection, connection.getresponse()


def call(*args, **kwargs):
    """Send a request. Returns the status and the JSON of the response."""
    connection, response = send(*args, **kwargs)
    with contextlib.closing(connection):
        return response.status, json.loads(response.read())


def status_of(*args, **kwargs):
    return call(*args, **kwargs)[0]


def stream(port, **request):
    """Return the chunks of a streamed answer, which must end as OpenAI's do."""
    connection, response = send(port, {'messages': [user('a')], 'stream': True, **request})
    with contextlib.closing(connection):
        assert response.status == 200
        assert response.headers['Content-Type'] == 'text/event-stream; charset=utf-8'
        *events, last, rest = response.read().decode().split('\n\n')
    assert (last, rest) == ('data: [DONE]', '')
    return [json.loads(event.removeprefix('data: ')) for event in events]


# --- completions

def test_completion(port, short):
    """The object is OpenAI's, and nothing else."""
    status, got = call(port, {'model': 'any', 'messages': [user('who are you?')], 'seed': 5, 'max_tokens': 30,
                              'user': 'x', 'stop': None})
    assert status == 200
    ids, _ = fit_into_context([user('who are you?')], short.tokenizer, 64)
    steps = list(stream_reply(short.model, short.tokenizer, ids, 30, 5, temperature=1.0))
    content = ''.join(text for text, _ in steps)
    _, reason = steps[-1]
    message = {'role': 'assistant', 'content': content, 'refusal': None}
    assert got == {
        'id': got['id'], 'object': 'chat.completion', 'created': got['created'], 'model': 'tiny',
        'choices': [{'index': 0, 'message': message, 'logprobs': None, 'finish_reason': reason}],
        'usage': {'prompt_tokens': len(ids), 'completion_tokens': len(steps), 'total_tokens': len(ids) + len(steps)}}
    assert got['id'].startswith('chatcmpl-') and abs(got['created'] - time.time()) < 60


def test_stream(port):
    """The chunks are OpenAI's, and say the same as the completion with the same seed."""
    request = {'messages': [user('who are you?')], 'seed': 5, 'max_completion_tokens': 30}
    _, completion = call(port, request)
    chunks = stream(port, **request, stream_options={'include_usage': True})
    for chunk in chunks:
        assert chunk.keys() == {'id', 'object', 'created', 'model', 'choices', 'usage'}
        assert chunk['object'] == 'chat.completion.chunk' and chunk['id'] == chunks[0]['id']
    assert chunks[0]['usage'] is None
    assert chunks[-1]['choices'] == [] and chunks[-1]['usage'] == completion['usage']
    first, *middle, last = [chunk['choices'][0] for chunk in chunks[:-1]]
    empty = {'index': 0, 'delta': {}, 'logprobs': None, 'finish_reason': None}
    assert first == {**empty, 'delta': {'role': 'assistant', 'content': ''}}
    assert last == {**empty, 'finish_reason': completion['choices'][0]['finish_reason']}
    content = ''.join(choice['delta'].pop('content') for choice in middle)
    assert content == completion['choices'][0]['message']['content']
    assert all(choice == empty for choice in middle)


def test_stream_without_usage(port):
    assert 'usage' not in stream(port)[0]


def answer(port, **request):
    """Return the text and the finish_reason of an answer."""
    status, got = call(port, {'messages': [user('a')], **request})
    assert status == 200
    choice = got['choices'][0]
    return choice['message']['content'], choice['finish_reason']


def test_settings_of_a_request(port):
    """The length, stop texts and the seed count."""
    text, _ = answer(port, seed=3)
    assert answer(port, seed=3)[0] == text and len(text) > 4
    assert answer(port, seed=3, max_tokens=2) == (text[:2], 'length')
    assert answer(port, seed=3, max_tokens=9, max_completion_tokens=2) == (text[:2], 'length')
    stop = text[2:4]
    for stops in (stop, ['no such text', stop]):
        assert answer(port, seed=3, stop=stops)[0] == text[:text.index(stop)]


def test_without_a_seed(port):
    """Every answer is another one, unless the temperature or top_p is 0."""
    assert len({answer(port)[0] for _ in range(4)}) > 1
    for setting in ('temperature', 'top_p'):
        assert len({answer(port, **{setting: 0})[0] for _ in range(3)}) == 1


def test_truncation(port):
    """A conversation that does not fit is refused, or with truncation='auto' cut."""
    messages = [user('b' * 20), assistant('c' * 20), user('d' * 20)]
    status, got = call(port, {'messages': messages})
    assert status == 400 and 'shorten' in got['error']['message']
    connection, response = send(port, {'messages': messages, 'truncation': 'auto'})
    assert (response.status, response.headers['x-left-out']) == (200, '2')
    connection.close()


def test_system_message():
    """The server's own system message is for requests without one."""
    def messages(*messages):
        return parse_request(json.dumps({'messages': messages}).encode(), {}, 'be kind')[0]

    assert messages(user('a')) == [system('be kind'), user('a')]
    assert messages(system(''), user('a')) == [system(''), user('a')]
    assert parse_request(json.dumps(OK).encode(), {})[0] == OK['messages']


def test_answers_at_the_same_time(port):
    """They take turns, and each is the same as alone."""
    requests = [{'messages': [user(text)], 'seed': seed} for seed, text in enumerate(('a', '满纸', 'b'))]
    alone = [call(port, request)[1]['choices'] for request in requests]
    together = [None] * 3

    def ask(i):
        together[i] = call(port, requests[i])[1]['choices']

    threads = [threading.Thread(target=ask, args=[i]) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


# --- what is refused

@pytest.mark.parametrize('body, reason', [
    ('', 'no JSON'),
    ('{"messages"', 'no JSON'),
    (b'\xff\xfe', 'no JSON'),
    ('[' * 1999, 'no JSON'),
    ('[]', 'a JSON object'),
    ('null', 'a JSON object'),
    ({}, 'list of messages'),
    ({'messages': []}, 'at least one'),
    ({'messages': 'a'}, 'list of messages'),
    ({'messages': ['a']}, 'a message'),
    ({'messages': [{'role': 'user'}]}, 'a message'),
    ({'messages': [{'role': ['user'], 'content': 'a'}]}, 'unknown role'),
    ({'messages': [{'role': 'tool', 'content': 'a'}]}, 'unknown role'),
    ({'messages': [system('a')]}, 'last message'),
    ({'messages': [user('a'), assistant('b')]}, 'last message'),
    ({'messages': [user('a' * 62)]}, '65 tokens'),
    ({'messages': [user('é')]}, "'é'"),
    ({'messages': [user('\ud800')]}, "'\\ud800'"),
    ({'messages': [user('\0')]}, 'U+0000'),
    ('{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}', 'temperature'),
    ({**OK, 'temperature': 'hot'}, 'temperature'),
    ({**OK, 'temperature': -1}, 'temperature'),
    ({**OK, 'temperature': True}, 'temperature'),
    ({**OK, 'temperature': float('nan')}, 'NaN'),
    ({**OK, 'top_p': 2}, 'top_p'),
    ({**OK, 'top_p': float('-inf')}, 'Infinity'),
    ({**OK, 'max_tokens': 0}, 'max_tokens'),
    ({**OK, 'max_tokens': 1.5}, 'max_tokens'),
    ({**OK, 'max_completion_tokens': 10**30}, 'max_completion'),
    ({**OK, 'seed': 'x'}, 'seed'),
    ({**OK, 'seed': -1}, 'seed'),
    ({**OK, 'n': 2}, 'n: expected 1'),
    ({**OK, 'n': True}, 'n: expected 1'),
    ({**OK, 'stop': 3}, 'stop'),
    ({**OK, 'stop': ['']}, 'stop'),
    ({**OK, 'stop': list('abcde')}, 'stop'),
    ({**OK, 'stream': 'yes'}, 'stream'),
    ({**OK, 'stream_options': 1}, 'stream_options'),
    ({**OK, 'model': 1}, 'model'),
    ({**OK, 'truncation': []}, 'truncation'),
], ids=str)
def test_bad_requests(port, body, reason):
    status, got = call(port, body)
    assert status == 400 and got.keys() == {'error'}
    assert got['error']['type'] == 'invalid_request_error' and reason in got['error']['message']


def test_size_of_a_request(port):
    """Also of one that does not say its length."""
    status, got = call(port, {'messages': [user('a' * 2000)]})
    assert status == 413 and '2,000 bytes' in got['error']['message']
    assert status_of(port, iter([b' ' * 1000] * 3)) == 413
    assert status_of(port, iter([json.dumps(OK).encode()])) == 200


@pytest.mark.parametrize('content_type, status', [
    ('text/plain', 415),
    ('application/x-www-form-urlencoded', 415),
    ('', 415),
    ('application/json; charset=utf-8', 200),
])
def test_content_types(port, content_type, status):
    assert status_of(port, json.dumps(OK), headers={'Content-Type': content_type}) == status


@pytest.mark.parametrize('host, status', [
    ('evil.example', 403),
    ('127.0.0.1.evil.example:80', 403),
    ('', 403),
    ('localhost:1234', 200),
    ('[::1]:8000', 200),
])
def test_hosts(port, host, status):
    """Names that this machine does not have are refused (DNS rebinding)."""
    assert status_of(port, OK, headers={'Host': host}) == status


def test_paths_and_methods(port):
    assert status_of(port, method='GET', path='/v1/nothing') == 404
    assert status_of(port, OK, path='/') == 405
    assert status_of(port, method='GET') == 405
    assert status_of(port, method='OPTIONS', headers={'Origin': 'http://evil.example'}) == 405


def test_other_pages(port):
    """The list of models, and the page, which loads nothing from other servers."""
    _, got = call(port, method='GET', path='/v1/models')
    assert got['data'][0].items() >= {'id': 'tiny', 'object': 'model', 'owned_by': 'stonegpt'}.items()
    connection, response = send(port, method='GET', path='/', headers={'Host': 'LOCALHOST:9'})
    html = response.read().decode()
    connection.close()
    assert response.status == 200 and '<title>StoneGPT</title>' in html
    assert "default-src 'none'" in response.headers['content-security-policy']
    assert 'http' not in html.replace('http-equiv', '')
    assert not response.headers['access-control-allow-origin']  # pages of other sites cannot read it


# --- clients and the end of the server

def wait_for(condition, seconds=20):
    """Wait until condition() is true."""
    for _ in range(int(seconds / 0.05)):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError('it did not happen')


@pytest.mark.parametrize('streamed', [True, False], ids=['streamed', 'whole'])
def test_clients_that_go_away(short, streamed, monkeypatch, capsys):
    """Nothing more is computed for them. Until they go, other completions get 429, and other requests are answered."""
    steps = []

    def slow_reply(*args, **kwargs):
        while True:
            time.sleep(0.005)
            steps.append(1)
            yield 'x', None

    def nothing_is_computed():
        before = len(steps)
        time.sleep(0.2)
        return len(steps) == before

    with monkeypatch.context() as patch, serving(short, max_requests=2) as port:
        patch.setattr(server_file, 'stream_reply', slow_reply)
        clients = [http.client.HTTPConnection('127.0.0.1', port, timeout=20) for _ in range(2)]
        for client in clients:
            client.request('POST', PATH, json.dumps({**OK, 'stream': streamed}), {'Content-Type': 'application/json'})
        wait_for(lambda: len(steps) >= 10)
        connection, response = send(port, OK)
        assert response.status == 429 and response.headers['Retry-After']
        assert 'busy' in json.loads(response.read())['error']['message']
        connection.close()
        assert status_of(port, method='GET', path='/v1/models') == 200
        for client in clients:
            client.sock.shutdown(socket.SHUT_RDWR)
            client.close()
        wait_for(nothing_is_computed)
        patch.undo()
        for _ in range(3):
            assert status_of(port, OK) == 200
    assert capsys.readouterr().err == ''


def test_a_client_that_goes_away_during_its_request(short, capsys):
    with serving(short, max_requests=1) as port:
        with socket.create_connection(('127.0.0.1', port)) as client:
            client.sendall(f'POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
                           'Content-Length: 99\r\n\r\n{'.encode())
        wait_for(lambda: status_of(port, OK) == 200)
    assert capsys.readouterr().err == ''


def test_serve(tmp_path):
    """chat.py --serve prints its address and streams; a port in use is one line; Ctrl-C ends it amid an answer."""
    run = save_endless(tmp_path / 'endless')
    with started(run, '--serve', '--port=0') as process:
        port = int(re.search(r'http.*:(\d+) is', read_until(process, 'Ctrl-C ends it)\n'))[1])
        connection, response = send(port, {'messages': [user('a')], 'stream': True})
        assert response.status == 200 and response.read(2000)
        assert status_of(port, method='GET', path='/', headers={'Host': 'evil.example'}) == 403
        second = chat(run, '--serve', f'--port={port}')
        assert second.code == 1 and second.err.count('\n') == 1 and '--port' in second.err
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        connection.close()
        assert (process.returncode, err) == (0, '')


# --- the page

@contextlib.contextmanager
def browser(language='en'):
    """
    Run a headless Chromium through chromedriver's own protocol (https://www.w3.org/TR/webdriver2). Yields
    drive(method, path, **parameters).
    """
    driver, chromium = shutil.which('chromedriver'), shutil.which('chromium') or shutil.which('google-chrome')
    if not driver or not chromium:
        pytest.skip('no chromium and chromedriver here (Debian: apt-get install chromium chromium-driver)')
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder, open(os.path.join(folder, 'log'), 'wb') as log:
        process = subprocess.Popen([driver, f'--port={port}'], stdout=log, stderr=log,
                                   env={**os.environ, 'HOME': folder, 'LANGUAGE': language})
        session = ''

        def drive(method, path='', **parameters):
            connection = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
            with contextlib.closing(connection):
                body = json.dumps(parameters) if method == 'POST' else None
                connection.request(method, session + path, body, {'Content-Type': 'application/json'})
                value = json.loads(connection.getresponse().read())['value']
            assert not isinstance(value, dict) or 'error' not in value, value
            return value

        try:
            for _ in range(200):
                with contextlib.suppress(OSError):
                    drive('GET', '/status')
                    break
                time.sleep(0.1)
            arguments = ['--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage',
                         '--window-size=900,800', f'--user-data-dir={folder}/profile', f'--lang={language}']
            options = {'binary': chromium, 'args': arguments, 'prefs': {'intl.accept_languages': language}}
            capabilities = {'alwaysMatch': {'goog:chromeOptions': options}}
            session = '/session/' + drive('POST', '/session', capabilities=capabilities)['sessionId']
            yield drive
            drive('DELETE')
        finally:
            process.terminate()
            process.wait()


@pytest.mark.slow
@pytest.mark.parametrize('language, words', [
    ('en', ['Reset', 'Settings', 'Send']),
    ('zh-CN', ['重新开始', '设置', '发送']),
], ids=['en', 'zh'])
def test_page(short, language, words):
    """
    A user types two messages and one that is refused, and resets the chat. Every field has a label, and the browser
    logs no error.
    """
    def type_text(text):
        field = drive('POST', '/element', using='css selector', value='#message')
        drive('POST', f'/element/{next(iter(field.values()))}/value', text=text)

    def page(script):
        return drive('POST', '/execute/sync', script=f'return {script}', args=[])

    def wait(script):
        wait_for(lambda: page(script))

    with serving(short, settings={'max_new_tokens': 12}) as port, browser(language) as drive:
        drive('POST', '/url', url=f'http://127.0.0.1:{port}/')
        wait("document.getElementById('model').textContent === 'tiny'")
        for word in words:
            assert word in page('document.body.innerText')
        assert page("document.activeElement.id === 'message'")
        assert page("[...document.querySelectorAll('input, textarea')].every(field => field.labels[0]?.textContent)")
        for number, text in enumerate(['满纸荒唐言？', 'who are you?'], 1):
            type_text(text + '\ue007')  # Enter
            wait(f"document.querySelectorAll('.user').length === {number} && !document.querySelector('.busy')")
        assert page('messages.map(message => message.role)') == ['user', 'assistant'] * 2
        assert page('messages[0].content') == '满纸荒唐言？'
        shown = page("document.querySelectorAll('.assistant')[0].textContent")
        assert shown.startswith(page('messages[1].content'))
        type_text('a' * 99 + '\ue007')
        wait("document.querySelector('[role=alert]')?.textContent.includes('shorten it')")
        assert page('messages.length') == 4
        assert page("document.getElementById('message').value") == 'a' * 99
        page("document.getElementById('reset').click()")
        assert page("messages.length === 0 && !document.getElementById('talk').textContent")
        errors = [entry['message'] for entry in drive('POST', '/se/log', type='browser') if entry['level'] == 'SEVERE']
        assert [error for error in errors if 'favicon' not in error and '400' not in error] == []
