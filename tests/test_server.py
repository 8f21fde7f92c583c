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
import torch
from chat_models import assistant, chat, one_thread, read_until, save_endless, save_short, started, system, user

pytest.importorskip('starlette')
pytest.importorskip('uvicorn')
from starlette.exceptions import HTTPException  # noqa: E402

from core.inference import completions  # noqa: E402
from core.inference.api import CHAT, parse_request  # noqa: E402
from core.inference.connections import Limits, new_server  # noqa: E402
from core.inference.conversation import LIMITS, fit_into_context, stream_reply  # noqa: E402
from core.inference.generation import Continuation, continue_prompts  # noqa: E402
from core.inference.server import ChatApp  # noqa: E402
from core.text.chat_template import END, HEADS, end_ids  # noqa: E402

PATH = '/v1/chat/completions'
TEXT_PATH = '/v1/completions'
OK = {'messages': [user('a')], 'max_tokens': 2}


@pytest.fixture(scope='module', autouse=True)
def few_threads():
    with one_thread():
        yield


@pytest.fixture(scope='module')
def short(tmp_path_factory):
    return save_short(tmp_path_factory.mktemp('models') / 'short')


@contextlib.contextmanager
def serving(made, settings=None, limits=None, **kwargs):
    """Run the application on a free port of this machine; yields the port."""
    defaults = {key: low for key, (low, _) in LIMITS.items()}
    defaults.update({'max_new_tokens': 40, 'temperature': 1.0, 'top_p': 1.0, 'repetition_penalty': 1.0,
                     'presence_penalty': 0.0, 'frequency_penalty': 0.0, 'seed': 1, **(settings or {})})
    hosts = {'127.0.0.1', 'localhost', '[::1]'}
    app = ChatApp(made.model, made.tokenizer, 'tiny', defaults, hosts=hosts, limits=limits, **kwargs)
    server = new_server(app, app.limits)
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


def stream(port, path=PATH, **request):
    """Return the chunks of a streamed answer, which must end as OpenAI's do."""
    prompt = {'messages': [user('a')]} if path == PATH else {'prompt': 'a'}
    connection, response = send(port, {**prompt, 'stream': True, **request}, path=path)
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
        return parse_request(json.dumps({'messages': messages}).encode(), {}, CHAT, 'be kind')[1]['messages']

    assert messages(user('a')) == [system('be kind'), user('a')]
    assert messages(system(''), user('a')) == [system(''), user('a')]
    assert parse_request(json.dumps(OK).encode(), {}, CHAT)[1]['messages'] == OK['messages']


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


@pytest.mark.parametrize('penalty', [
    {'presence_penalty': 2}, {'frequency_penalty': -2}, {'repetition_penalty': 5}, {'top_k': 1}, {'min_p': 1},
], ids=str)
def test_penalties_of_a_request(port, short, penalty):
    """They are those of the sampling loop."""
    text, reason = answer(port, seed=3, **penalty)
    assert text != answer(port, seed=3)[0]
    ids, _ = fit_into_context([user('a')], short.tokenizer, 64)
    steps = list(stream_reply(short.model, short.tokenizer, ids, 40, 3, **penalty))
    assert (text, reason) == (''.join(text for text, _ in steps), steps[-1][1])


def test_parts_of_a_message(port):
    """The texts of a message in parts are joined by newlines."""
    def parts(*texts):
        return [{'type': 'text', 'text': text} for text in texts]

    expected = answer(port, seed=3, messages=[system('b'), user('who\nare you?')])
    assert answer(port, seed=3, messages=[system(parts('b')), user(parts('who', 'are you?'))]) == expected


def test_logprobs(port, short):
    """Every token of the text with its log-probability, its bytes and the most likely ones; the same in a stream."""
    request = {'messages': [user('a')], 'seed': 2, 'logprobs': True, 'top_logprobs': 3}
    choice = call(port, request)[1]['choices'][0]
    tokens = choice['logprobs']['content']
    assert choice['logprobs'].keys() == {'content', 'refusal'} and choice['logprobs']['refusal'] is None
    assert ''.join(token['token'] for token in tokens) == choice['message']['content']
    ids, _ = fit_into_context([user('a')], short.tokenizer, 64)
    for token in tokens:
        assert token.keys() == {'token', 'logprob', 'bytes', 'top_logprobs'}
        expected = short.model(torch.tensor(ids)[None])[0, -1, :short.tokenizer.vocab_size].log_softmax(0)
        values, best = expected.topk(3)
        assert [top['logprob'] for top in token['top_logprobs']] == pytest.approx(values.tolist(), abs=1e-4)
        assert [bytes(top['bytes']) for top in token['top_logprobs']] == [short.tokenizer.pieces[i] for i in best]
        next_id, = short.tokenizer.encode(token['token'])
        assert token['logprob'] == pytest.approx(expected[next_id].item(), abs=1e-4)
        assert bytes(token['bytes']).decode() == token['token']
        ids = [*ids, next_id]
    chunks = [chunk['choices'][0] for chunk in stream(port, **request)]
    assert [token for chunk in chunks if chunk['logprobs'] for token in chunk['logprobs']['content']] == tokens
    choice = call(port, {**request, 'top_logprobs': None})[1]['choices'][0]
    assert all(token['top_logprobs'] == [] for token in choice['logprobs']['content'])


def test_text_completion(port, short):
    """A prompt is continued as it stands, without the template; the object is OpenAI's, and so is the stream."""
    request = {'prompt': 'who are', 'seed': 4, 'max_tokens': 12}
    status, got = call(port, request, path=TEXT_PATH)
    *_, (row,) = continue_prompts(short.model, short.tokenizer, [short.tokenizer.encode('who are')], 12, [4],
                                  end_ids=end_ids(short.tokenizer))
    reason = 'length' if row.finish_reason == 'length' else 'stop'
    assert status == 200 and got == {
        'id': got['id'], 'object': 'text_completion', 'created': got['created'], 'model': 'tiny',
        'choices': [{'index': 0, 'text': row.text(), 'logprobs': None, 'finish_reason': reason}],
        'usage': {'prompt_tokens': 7, 'completion_tokens': len(row.ids), 'total_tokens': 7 + len(row.ids)}}
    assert got['id'].startswith('cmpl-')
    chunks = stream(port, TEXT_PATH, **request, stream_options={'include_usage': True})
    assert chunks[-1]['choices'] == [] and chunks[-1]['usage'] == got['usage']
    choices = [chunk['choices'][0] for chunk in chunks[:-1]]
    assert ''.join(choice['text'] for choice in choices) == row.text()
    assert [choice['finish_reason'] for choice in choices] == [None] * (len(choices) - 1) + [reason]
    text = row.text()
    _, got = call(port, {**request, 'stop': text[3:5]}, path=TEXT_PATH)
    assert got['choices'][0]['text'] == text[:text.index(text[3:5])]


def test_markup_in_a_prompt(port):
    """The names of special tokens are these tokens, so that a client may write the template itself."""
    chat_text, _ = answer(port, seed=4, max_tokens=12, messages=[user('who?')])
    prompt = f'{HEADS["user"]}who?{END}\n{HEADS["assistant"]}'
    _, got = call(port, {'prompt': prompt, 'seed': 4, 'max_tokens': 12}, path=TEXT_PATH)
    assert got['choices'][0]['text'] == chat_text


def test_logprobs_of_a_text_completion(port):
    """They have the older form, with the place of each token in the text; the same in a stream."""
    request = {'prompt': 'a', 'seed': 2, 'logprobs': 2, 'max_tokens': 9}
    choice = call(port, request, path=TEXT_PATH)[1]['choices'][0]
    got = choice['logprobs']
    assert got.keys() == {'tokens', 'token_logprobs', 'top_logprobs', 'text_offset'}
    assert ''.join(got['tokens']) == choice['text']
    for token, logprob, top, offset in zip(*[got[key] for key in ('tokens', 'token_logprobs', 'top_logprobs',
                                                                  'text_offset')]):
        assert len(top) in (2, 3) and top[token] == logprob <= max(top.values())
        assert choice['text'].startswith(token, offset)
    chunks = [chunk['choices'][0]['logprobs'] for chunk in stream(port, TEXT_PATH, **request)]
    for key in got:
        assert [x for chunk in chunks if chunk for x in chunk[key]] == got[key]
    choice = call(port, {**request, 'logprobs': 0}, path=TEXT_PATH)[1]['choices'][0]
    assert choice['logprobs']['token_logprobs'] == got['token_logprobs']


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
    ({**OK, 'presence_penalty': 3}, 'presence_penalty'),
    ({**OK, 'frequency_penalty': 'a'}, 'frequency_penalty'),
    ({**OK, 'repetition_penalty': 0}, 'repetition_penalty'),
    ({**OK, 'logprobs': 2}, 'logprobs: expected true or false'),
    ({**OK, 'logprobs': True, 'top_logprobs': 21}, 'top_logprobs: expected an int, 0 to 20'),
    ({**OK, 'top_logprobs': 2}, 'together with "logprobs": true'),
    ({'messages': [user([{'type': 'image_url', 'image_url': {}}])]}, "'image_url' are not supported"),
    ({'messages': [user(['a'])]}, 'None are not supported'),
    ({'messages': [user([{'type': 'text', 'text': 1}])]}, 'expected parts'),
    ({**OK, 'n': 2}, 'n: expected 1'),
    ({**OK, 'response_format': {'type': 'json_object'}}, 'response_format: expected {"type": "text"}'),
    ({**OK, 'tools': [{}]}, 'tools: expected []; others are not supported'),
    ({**OK, 'tool_choice': 'required'}, 'tool_choice: expected "none" or "auto"'),
    ({**OK, 'functions': [{}]}, 'functions'),
    ({**OK, 'logit_bias': {'5': 1}}, 'logit_bias'),
    ({**OK, 'modalities': ['text', 'audio']}, 'modalities'),
    ({**OK, 'audio': {}}, 'audio: not supported'),
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


@pytest.mark.parametrize('fields, reason', [
    ({}, 'prompt: expected a text'),
    ({'prompt': ''}, 'prompt: expected one text'),
    ({'prompt': ['a', 'b']}, 'lists of texts and token ids are not supported'),
    ({'prompt': [1, 2]}, 'prompt'),
    ({'prompt': 'a' * 65}, 'the prompt has 65 tokens'),
    ({'prompt': f'<|endof{END}text|>é'}, "not in this vocabulary: 'é'"),
    ({'prompt': 'a', 'logprobs': True}, 'logprobs: expected an int'),
    ({'prompt': 'a', 'echo': True}, 'echo: expected false'),
    ({'prompt': 'a', 'suffix': 'b'}, 'suffix'),
    ({'prompt': 'a', 'best_of': 2}, 'best_of'),
], ids=str)
def test_bad_text_requests(port, fields, reason):
    status, got = call(port, fields, path=TEXT_PATH)
    assert status == 400 and reason in got['error']['message']


def test_fields_that_change_nothing(port):
    """What a client sends by default, and what only concerns OpenAI's own service, is no reason to refuse."""
    harmless = {'n': 1, 'tools': [], 'tool_choice': 'auto', 'response_format': {'type': 'text'}, 'logit_bias': {},
                'user': 'x', 'metadata': {'a': 'b'}, 'store': True, 'service_tier': 'auto', 'logprobs': False}
    assert answer(port, seed=3, **harmless) == answer(port, seed=3)


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


def endless_rows(tokenizer):
    """Yield what reply_rows() does for an answer that never ends: a token every 5 milliseconds."""
    row = Continuation(tokenizer, 10**9, (), ())
    while True:
        time.sleep(0.005)
        row.append(tokenizer.encode(' ')[0])
        yield row


@pytest.mark.parametrize('streamed', [True, False], ids=['streamed', 'whole'])
def test_clients_that_go_away(short, streamed, monkeypatch, capsys):
    """Nothing more is computed for them. Until they go, other completions get 429, and other requests are answered."""
    steps = []

    def slow_reply(*args, **kwargs):
        for row in endless_rows(short.tokenizer):
            steps.append(1)
            yield row

    def nothing_is_computed():
        before = len(steps)
        time.sleep(0.2)
        return len(steps) == before

    with monkeypatch.context() as patch, serving(short, max_requests=2) as port:
        patch.setattr(completions, 'reply_rows', slow_reply)
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


HALF_A_REQUEST = (f'POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
                  'Content-Length: 99\r\n\r\n{').encode()


def connect(port, data=b''):
    """Open a connection, and send some bytes."""
    client = socket.create_connection(('127.0.0.1', port), timeout=20)
    client.sendall(data)
    return client


def test_a_client_that_goes_away_during_its_request(short, capsys):
    with serving(short, max_requests=1) as port:
        connect(port, HALF_A_REQUEST).close()
        wait_for(lambda: status_of(port, OK) == 200)
    assert capsys.readouterr().err == ''


def test_half_a_request_takes_no_place(short):
    """While a body is on its way, others are answered; after body_seconds the client is told, and has to go."""
    with serving(short, max_requests=1, limits=Limits(body_seconds=0.3)) as port, connect(port, HALF_A_REQUEST) as slow:
        assert status_of(port, OK) == 200
        reply = slow.makefile('rb').read()  # until the server closes the connection
        assert reply.startswith(b'HTTP/1.1 408') and b'did not arrive within 0.3 seconds' in reply


@pytest.mark.parametrize('data', [b'', b'GET /v1/models HT', b'GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\nGET'],
                         ids=['nothing', 'half a head', 'half of a second head'])
def test_connections_that_wait(short, data):
    """One that sends nothing, or only half of a head, is closed."""
    with serving(short, limits=Limits(head_seconds=0.2, idle_seconds=0.3)) as port, connect(port, data) as client:
        with contextlib.suppress(ConnectionResetError):
            while client.recv(10000):
                pass
        assert status_of(port, OK) == 200


def test_a_head_that_trickles(short):
    """Every byte of it in time does not make a connection last."""
    with serving(short, limits=Limits(head_seconds=0.2)) as port, connect(port) as client:
        with pytest.raises(OSError):
            for _ in range(200):
                client.sendall(b'x')
                time.sleep(0.02)


def test_a_client_that_does_not_read(short, monkeypatch):
    """After send_seconds it is dropped, and its place is free."""
    class Row:
        ids, logprobs, top_logprobs, finish_reason = [], [], [], None

        def new_text(self):
            return 'x' * 10**6

    monkeypatch.setattr(completions, 'reply_rows', lambda *args, **kwargs: iter(Row, None))
    body = json.dumps({**OK, 'stream': True})
    request = (f'POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
               f'Content-Length: {len(body)}\r\n\r\n{body}').encode()
    with serving(short, max_requests=1, limits=Limits(send_seconds=0.3)) as port, connect(port, request) as client:
        assert client.recv(10)
        assert status_of(port, OK) == 429
        monkeypatch.undo()
        wait_for(lambda: status_of(port, OK) == 200)


def test_too_many_connections(short):
    """Those above the limit are turned away at once; the others go on, and their places are free again."""
    with serving(short, limits=Limits(connections=3)) as port:
        clients = [connect(port) for _ in range(3)]
        with connect(port) as client:
            assert client.makefile('rb').read().startswith(b'HTTP/1.1 503 ')
        clients[0].sendall(b'GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n')
        assert clients[0].recv(10000).startswith(b'HTTP/1.1 200')
        for client in clients:
            client.close()
        wait_for(lambda: status_of(port, OK) == 200)


def test_the_limit_is_below_that_of_files(monkeypatch):
    resource = pytest.importorskip('resource')
    for files, connections in ((64, 32), (10**6, 512), (resource.RLIM_INFINITY, 512)):
        monkeypatch.setattr(resource, 'getrlimit', lambda kind, files=files: (files, files))
        assert Limits().connections == connections


def test_memory_of_the_caches(short):
    """
    A request whose KV cache can never fit is refused; one that does not fit beside those that run has to come again.
    """
    token_bytes = 2 * 1 * 2 * 16 * 4
    n_prompt = len(fit_into_context([user('a')], short.tokenizer, 64)[0])
    with serving(short, max_cache=(n_prompt + 30) * token_bytes) as port:
        status, got = call(port, {**OK, 'max_tokens': 31})
        assert status == 400 and 'max_cache_gb' in got['error']['message']
        assert status_of(port, {**OK, 'max_tokens': 30}) == 200
    app = ChatApp(short.model, short.tokenizer, 'tiny', {}, max_cache=100 * token_bytes)
    with app.place() as one, app.place() as two:
        app.reserve_cache(one, 10, 50)
        with pytest.raises(HTTPException) as refused:
            app.reserve_cache(two, 10, 31)
        assert (refused.value.status_code, refused.value.headers) == (503, {'retry-after': '2'})
        app.reserve_cache(two, 10, 30)
    with app.place() as one:
        app.reserve_cache(one, 60, 999)  # no more than the context: 64


def test_output_that_is_not_finite(short, capsys):
    """It is an error with its reason, in a stream too, and the server goes on."""
    weight = short.model.transformer.ln_f.weight
    before = weight[3].item()
    with serving(short) as port:
        weight[3] = float('nan')
        try:
            status, got = call(port, OK)
            connection, response = send(port, {**OK, 'stream': True})
            events = response.read().decode()
            connection.close()
        finally:
            weight[3] = before
        assert status == 500 and got['error']['type'] == 'server_error'
        assert got['error']['message'].startswith("the model's output is not finite")
        last = json.loads(events.strip().split('\n\n')[-1].removeprefix('data: '))
        assert last == got
        assert status_of(port, OK) == 200
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
    ('en', ['New conversation', 'Settings', 'Send', 'Who are you?']),
    ('zh-CN', ['新对话', '设置', '发送', '你是谁？']),
], ids=['en', 'zh'])
def test_page(short, language, words, monkeypatch):
    """
    A user begins with an example, types messages, reloads the page, edits, regenerates, copies and stops, and begins
    another conversation. Every field has a label, and the browser logs no error.
    """
    def type_text(text):
        field = drive('POST', '/element', using='css selector', value='#message')
        drive('POST', f'/element/{next(iter(field.values()))}/value', text=text)

    def page(script):
        return drive('POST', '/execute/sync', script=f'return {script}', args=[])

    def wait(script):
        wait_for(lambda: page(script))

    def answered(n):
        wait(f"messages.length === {n} && !asking && document.querySelectorAll('.message').length === {n}")

    def click(label, index=-1):
        buttons = f"[...document.querySelectorAll('button')].filter(x => x.textContent === words.{label})"
        page(f'{buttons}.at({index}).click()')

    def reload():
        drive('POST', '/refresh')
        wait("document.getElementById('model').textContent === 'tiny'")

    with serving(short, settings={'max_new_tokens': 12}) as port, browser(language) as drive:
        drive('POST', '/url', url=f'http://127.0.0.1:{port}/')
        wait("document.getElementById('model').textContent === 'tiny'")
        for word in words:
            assert word in page('document.body.innerText')
        assert page("document.activeElement.id === 'message'")
        assert page("[...document.querySelectorAll('input, textarea')].every(field => field.labels[0]?.textContent)")

        # an example (one that this vocabulary has), a message, and one that is refused
        page("(words.examples[0] = 'who?', redraw())")
        page("document.querySelector('#examples button').click()")
        answered(2)
        assert page('messages[0].content') == 'who?' and not page("document.getElementById('greeting')")
        type_text('满纸荒唐言？\ue007')  # Enter
        answered(4)
        assert page('messages.map(message => message.role)') == ['user', 'assistant'] * 2
        assert page('messages[2].content') == '满纸荒唐言？'
        shown = page("[...document.querySelectorAll('.message .text')].map(p => p.textContent)")
        assert shown == page('messages.map(message => message.content)')
        page("document.getElementById('message').value = ''")
        type_text('a' * 99 + '\ue007')
        wait("document.querySelector('[role=alert]')?.textContent.includes('shorten it')")
        assert page('messages.length') == 4
        assert page("document.getElementById('message').value") == 'a' * 99
        page("document.getElementById('temperature').value = 1.5")

        # a reload keeps the conversation, the message that is being written and the settings
        reload()
        assert page("[...document.querySelectorAll('.message .text')].map(p => p.textContent)") == shown
        assert page("document.getElementById('message').value") == 'a' * 99
        assert page("document.getElementById('temperature').value") == '1.5'

        # another answer to the same message; an edited message drops what follows
        page("document.getElementById('message').value = ''")
        click('regenerate')
        answered(4)
        assert page('messages.slice(0, 3).map(message => message.content)') == shown[:3]
        assert page('messages[3].content') != shown[3]
        click('edit', 0)
        assert page("document.getElementById('message').value") == 'who?'
        assert page("document.querySelectorAll('.replaced').length") == 4
        click('cancel')
        assert page("document.querySelectorAll('.replaced').length") == 0
        assert page('messages.length') == 4
        click('edit', 0)
        type_text(' me\ue007')
        answered(2)
        assert page('messages[0].content') == 'who? me'

        # the text is copied; the end of an answer that was cut off is no part of it
        page("(messages[1].note = 'cut', redraw(), navigator.clipboard.writeText = text => { window.copied = text })")
        click('copy')
        assert page('window.copied') == page('messages[1].content')
        assert page("document.querySelector('.assistant .note').textContent === words.cut")

        # an answer is stopped; what there is stays
        with monkeypatch.context() as patch:
            patch.setattr(completions, 'reply_rows', lambda *args, **kwargs: endless_rows(short.tokenizer))
            type_text('b\ue007')
            wait("messages.length === 4 && messages[3].content.length > 3")
            assert page("document.getElementById('send').textContent === words.stop")
            type_text('c')
            page("document.getElementById('send').click()")
            wait('!asking')
        assert page("messages[3].note") == 'stopped' and page('messages[3].content').startswith('   ')
        assert page("document.getElementById('message').value") == 'c'  # not sent

        page("document.getElementById('reset').click()")
        assert page("messages.length === 0 && !!document.getElementById('greeting')")
        reload()
        assert page('messages.length') == 0
        errors = [entry['message'] for entry in drive('POST', '/se/log', type='browser') if entry['level'] == 'SEVERE']
        assert [error for error in errors if 'favicon' not in error and '400' not in error] == []


@pytest.mark.slow
def test_page_on_a_phone(short):
    """Nothing is wider than the screen, in both colour schemes, and the colours differ."""
    with serving(short) as port, browser() as drive:
        def cdp(cmd, **params):
            drive('POST', '/goog/cdp/execute', cmd=cmd, params=params)

        def page(script):
            return drive('POST', '/execute/sync', script=f'return {script}', args=[])

        cdp('Emulation.setDeviceMetricsOverride', width=360, height=640, deviceScaleFactor=1, mobile=True)
        colours = set()
        for scheme in ('light', 'dark'):
            cdp('Emulation.setEmulatedMedia', features=[{'name': 'prefers-color-scheme', 'value': scheme}])
            drive('POST', '/url', url=f'http://127.0.0.1:{port}/')
            page("(messages = ['user', 'assistant'].map(role => ({role, content: 'a'.repeat(400)})), redraw(), "
                 "document.querySelector('details').open = true)")
            assert page('document.documentElement.scrollWidth <= 360 && document.documentElement.scrollHeight <= 640')
            assert page("[...document.querySelectorAll('body *')].every(e => e.getBoundingClientRect().right <= 360)")
            colours.add(page('getComputedStyle(document.body).backgroundColor'))
        assert len(colours) == 2
