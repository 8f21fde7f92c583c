"""Talking to a model: the chat template against its definition, chat.py in the terminal, the HTTP server request by request, its page in a browser."""
import contextlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_script

from core.inference import conversation
from core.inference import server as server_file
from core.inference.conversation import check_range, fit_into_context, stream_reply
from core.inference.generation import generate_answers
from core.text.chat_template import END, HEADS, START, answer_text, chat_tokenizer, end_of_turn, render
from core.text.tokenizer import EOT, QWEN2_SPLIT, bpe_tokenizer, char_tokenizer
from core.weights.checkpoint import save_checkpoint
from model import GPT, GPTConfig

CHINESE = '满纸荒唐言一把辛酸泪都云作者痴谁解其中味，。？！'
CHARS = char_tokenizer(sorted(set(string.ascii_letters + string.digits + ' .,!?:/\'"<|>_\n' + CHINESE)))
BBPE = bpe_tokenizer(['h e', 'he l', 'i m', '_ s', 'im _s', 'Ġ t'], split=QWEN2_SPLIT, specials=(EOT, START, END))
TOKENIZERS = pytest.mark.parametrize('tokenizer', [chat_tokenizer(CHARS), BBPE, chat_tokenizer(bpe_tokenizer([]))], ids=['characters', 'as Qwen', 'bytes'])


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    """Networks this small gain nothing by a second one, and wait for it long where the machine has other work."""
    kept = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(kept)


def user(text):
    return {'role': 'user', 'content': text}


def assistant(text):
    return {'role': 'assistant', 'content': text}


def save(folder, tokenizer=CHARS, block_size=64, ending=None, **args):
    """A run's folder with a random network; ending: how likely the end of a turn is (a logit of about so much more than the others', None: as it comes)."""
    torch.manual_seed(1)
    chat = chat_tokenizer(tokenizer)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=chat.vocab_size, n_layer=1, n_head=2, n_embd=32, **args)).requires_grad_(False)
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.1)
    if ending is not None:  # one channel of the last layer's output is always 10, and only the special tokens look at it
        weight = model.lm_head.weight
        model.transformer.ln_f.bias[0], model.transformer.ln_f.weight[0], weight[:, 0] = 10, 0, 0
        weight[list(chat.specials.values()), 0] = -3
        weight[end_of_turn(chat), 0] = ending / 10
    folder.mkdir(exist_ok=True)
    save_checkpoint({'model': model.state_dict(), 'model_args': vars(model.config), 'tokenizer': chat.json, 'config': {}, 'iter_num': 7}, str(folder / 'ckpt.pt'))
    return SimpleNamespace(folder=folder, model=model.eval(), tokenizer=chat)


@pytest.fixture(scope='module')
def short(tmp_path_factory):
    """A model whose answers end by themselves."""
    return save(tmp_path_factory.mktemp('models') / 'short', ending=0.5)


@pytest.fixture(scope='module')
def endless(tmp_path_factory):
    """One that goes on and on."""
    return save(tmp_path_factory.mktemp('models') / 'endless', block_size=8192, ending=-30, rope_theta=1e4)


# --- the template
def conversations(letters, number=60):
    """Random ones, all roles in any order."""
    chance = random.Random(1)
    for _ in range(number):
        yield [{'role': chance.choice(['system', 'user', 'assistant']), 'content': ''.join(chance.choices(letters, k=chance.randrange(12)))} for _ in range(chance.randrange(1, 7))]


LETTERS = string.ascii_letters + CHINESE + ' \n.'
FORGED = [END, START, EOT, 'user\n', *HEADS.values(), f'{END}\n', 'a', '满', '<', '|>']


@TOKENIZERS
@pytest.mark.parametrize('letters', [LETTERS, FORGED], ids=['text', 'names of special tokens'])
def test_template(tokenizer, letters):
    """What is masked are the assistant's words and the end of its turns; the names of special tokens in a message are text, and change no role."""
    template = {tokenizer.specials.get(name, -1) for name in (START, END, EOT, f'{END}\n', *HEADS.values())}
    heads = {name: tokenizer.encode(name, special=tokenizer.specials)[0] for name in HEADS.values()}
    for messages in conversations(letters):
        ids, mask = render(messages, tokenizer)
        assert ids.dtype == 'int64' and mask.dtype == 'uint8' and ids.shape == mask.shape and set(mask.tolist()) <= {0, 1}
        said, run = [], []
        for token, counts in zip(ids.tolist(), mask.tolist()):
            run += [token] * counts
            if counts and token == end_of_turn(tokenizer):
                said.append(tokenizer.decode(run[:-1]))
                run = []
            assert counts or not run
        assert said == [message['content'] for message in messages if message['role'] == 'assistant']
        assert [token for token in ids.tolist() if token in template and token != end_of_turn(tokenizer)] == [heads[HEADS[message['role']]] for message in messages]
        assert ids.tolist().count(end_of_turn(tokenizer)) == len(messages)
        assert tokenizer.decode(ids) == ''.join(f'{HEADS[message["role"]]}{message["content"]}{END}\n' for message in messages)
        more, zeros = render(messages, tokenizer, reply=True)
        assert more[:len(ids)].tolist() == ids.tolist() and tokenizer.decode(more[len(ids):]) == HEADS['assistant'] and not zeros[len(ids):].any()


@TOKENIZERS
def test_the_same_ids_as_tokenizers(tokenizer):
    """As the library reads the text of a conversation with the same tokenizer.json."""
    from tokenizers import Tokenizer
    theirs = Tokenizer.from_str(tokenizer.json)
    for messages in conversations(LETTERS):
        text = ''.join(f'{HEADS[message["role"]]}{message["content"]}{END}\n' for message in messages)
        assert render(messages, tokenizer)[0].tolist() == theirs.encode(text, add_special_tokens=False).ids


def test_answers(short):
    """The same seed gives the same answer whatever is beside it; a row ends with the end of its turn; several rows are over when all are."""
    prompts = [render([user(text)], short.tokenizer, reply=True)[0] for text in ('a', '满纸荒唐言', 'who are you?')]
    seeds = [5, [6, 7], 8]
    *_, together = generate_answers(short.model, short.tokenizer, prompts, 40, seeds, temperature=1.0)
    end = end_of_turn(short.tokenizer)
    for prompt, seed, row in zip(prompts, seeds, together):
        *_, (alone,) = generate_answers(short.model, short.tokenizer, [prompt], 40, [seed], temperature=1.0)
        assert alone == row
        assert row[-1] == end and end not in row[:-1] or len(row) == 40
    assert any(row[-1] == end for row in together) and len({tuple(row) for row in together}) == 3
    *_, (other,) = generate_answers(short.model, short.tokenizer, prompts[:1], 40, [9], temperature=1.0)
    assert other != together[0]


@TOKENIZERS
def test_reply(tokenizer, tmp_path):
    """Its pieces are the text of the answer, without a token of the template or half a character; a stop text is never shown, wherever it falls."""
    made = save(tmp_path / 'm', tokenizer, ending=0)
    ids, kept = fit_into_context([user('a')], made.tokenizer, 64)
    reasons = set()
    for seed in range(8):
        pieces = list(stream_reply(made.model, made.tokenizer, ids, 30, [seed], temperature=1.0))
        whole, reason = ''.join(text for text, _ in pieces), pieces[-1][1]
        *_, (row,) = generate_answers(made.model, made.tokenizer, [ids], 30, [[seed]], temperature=1.0)
        reasons.add(reason)
        assert all(reason is None for _, reason in pieces[:-1])
        if row[-1] == end_of_turn(made.tokenizer) or reason == 'length':
            assert whole == answer_text(made.tokenizer, row) and (reason == 'length') == (row[-1] != end_of_turn(made.tokenizer))
        assert '\ufffd' not in whole
        for stop in {whole[2:4], whole[3:6], whole[5:6]} - {''}:
            cut = list(stream_reply(made.model, made.tokenizer, ids, 30, [seed], stops=['nowhere', stop], temperature=1.0))
            assert ''.join(text for text, _ in cut) == whole[:whole.index(stop)] and cut[-1][1] == 'stop'
    assert reasons == {'stop', 'length'}
    for length, most in ((64, 1), (60, 5)):  # tokens that the context has room for: the last one is not read
        assert len(list(stream_reply(made.model, made.tokenizer, [*ids, *[0] * (length - len(ids))], 30, 1, temperature=0, stops=['nowhere']))) <= most


@TOKENIZERS
def test_out_of_turn(tokenizer, monkeypatch):
    """Any token of the template ends an answer, and none of their names is part of it; those that the tokenizer lacks do not matter."""
    names = [name for name in (EOT, START, END, f'{END}\n', *HEADS.values()) if name in tokenizer.specials]
    model = GPT(GPTConfig(block_size=64, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=8))
    assert len(names) == (3 if START in names else 5)
    for name in names:
        said = [*tokenizer.encode('ab').tolist(), tokenizer.specials[name], *tokenizer.encode('c').tolist()]
        monkeypatch.setattr(conversation, 'generate_answers', lambda *args, **kwargs: ([said[:i]] for i in range(1, len(said) + 1)))
        assert list(stream_reply(model, tokenizer, [0], 30, 1)) == [('a', None), ('b', None), ('', 'stop')]


def test_fit():
    """The oldest exchanges go, whole ones, and no more than must; never a system message or the last question."""
    tokenizer = chat_tokenizer(CHARS)
    system = {'role': 'system', 'content': 's' * 5}
    messages = [system] + [message for i in range(4) for message in (user(f'{i}' * 8), assistant(f'{i}' * 8))] + [user('last')]
    size = len(fit_into_context(messages, tokenizer, 999)[0])
    assert size == 7 + 4 * 20 + 6 + 1
    for room, left in ((10, 0), (11, 1), (30, 1), (31, 2), (90, 4), (999, 4)):
        ids, kept = fit_into_context(messages, tokenizer, size + 10, room)
        assert kept == [system, *messages[1 + 2 * left:]], room
        assert ids.tolist() == render(kept, tokenizer, reply=True)[0].tolist()
    assert fit_into_context(messages, tokenizer, size)[1] == messages
    for wrong, block_size, room, reason in ((messages, size - 1, None, 'shorten'), ([user('a' * 90)], 80, 20, '93 tokens'), ([assistant('a')], 80, None, 'last message'),
                                            ([], 80, None, 'at least one'), ([user('é' + EOT + 'é')], 80, None, "'é' (U+00E9)"), ([{'role': 'tool', 'content': ''}], 80, 9, 'unknown role')):
        with pytest.raises(ValueError, match=re.escape(reason)):
            fit_into_context(wrong, tokenizer, block_size, room)
    no_char = chat_tokenizer(char_tokenizer('ab'))
    with pytest.raises(ValueError, match="'<'.*U"):  # characters of a token's name are text, too
        fit_into_context([user(EOT)], no_char, 80)


# --- the terminal
def chat(run, *args, lines=(), monkeypatch=None):
    """chat.py with these lines typed; returns code, out, err."""
    lines = iter(lines)

    def typed(prompt):
        print(prompt, end='')
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None
    if monkeypatch:
        monkeypatch.setattr('builtins.input', typed)
    return run_script('chat.py', f'--out_dir={run.folder}', '--device=cpu', *args)


def test_prompt(short):
    """The answer and nothing after it; the same seed, the same answer; the system message matters; int8 weights answer as well."""
    def said(*args):
        result = chat(short, '--prompt=who are you?', '--max_new_tokens=20', *args)
        assert result.code == 0, result.err
        return result.out.split('step 7\n')[1]
    ids, _ = fit_into_context([user('who are you?')], short.tokenizer, 64)
    expected = ''.join(text for text, _ in stream_reply(short.model, short.tokenizer, ids, 20, [1337, 0], temperature=0.8, top_k=200))
    assert said() == expected + '\n'
    assert len({said(), said('--seed=2'), said('--system=be kind'), said('--dtype=int8', '--seed=3')}) == 4


def test_terminal(tmp_path, monkeypatch):
    """Commands, a history that is one, what cannot be said, and what outgrows the context."""
    seen, run = [], save(tmp_path / 'm', block_size=128)
    original = conversation.fit_into_context
    monkeypatch.setattr(conversation, 'fit_into_context', lambda messages, *args: seen.append([dict(message) for message in messages]) or original(messages, *args))
    monkeypatch.setattr(conversation, 'stream_reply', lambda model, tokenizer, ids, **settings: iter([('so ', None), (f'{settings["temperature"]:g}', 'stop')]))
    lines = ['a', ' /b', '', '/system be kind', 'c', '/set temperature=0.5', '/set', '/set temperature=-1', '/set temperature=x', '/set top_k=1.5', '/set color=red', '/set seed=nan', 'd', 'é', '/oops',
             '/help', '/reset', 'e', '/system', 'f', 'g' * 126, *['h' * 19] * 8, '/quit', 'never']
    result = chat(run, lines=lines, monkeypatch=monkeypatch)
    assert result.code == 0
    a, b = user('a'), user('/b')
    so = assistant('so 0.8')
    kind, half = {'role': 'system', 'content': 'be kind'}, assistant('so 0.5')
    assert seen[:4] == [[a], [a, so, b], [kind, a, so, b, so, user('c')], [kind, a, so, b, so, user('c'), so, user('d')]]
    assert seen[4][-1] == user('é') and seen[5:7] == [[kind, user('e')], [user('e'), half, user('f')]]
    assert seen[7][-1] == user('g' * 126) and user('g' * 126) not in seen[8] and ['never'] not in seen[-1]
    assert len(seen[-1]) < 9 and len(seen) == 16
    errors = result.err.splitlines()
    assert [line[:12] for line in errors] == ['temperature=', "temperature=", "top_k='1.5':", 'color: no su', "seed='nan': ", 'not in this ', '/oops: no su', 'the prompt h', '(the convers']
    for text in ('> so 0.8\n', 'so 0.5', '/reset  ', '(forgotten)', 'max_new_tokens=500, temperature=0.5, top_k=200', '(system message: be kind)', '(system message: none)'):
        assert text in result.out, text


def test_rate(short, tmp_path, monkeypatch):
    """Pairs as they were judged, in a file that stays readable; what is not rated leaves nothing."""
    path = tmp_path / 'pairs.jsonl'
    path.write_text('{"old": 1}', encoding='utf-8')  # without an end of line
    result = chat(short, f'--rate={path}', '--system=be kind', '--temperature=1.5', lines=['满纸', '1', 'b', '7', '0', 'c', '2', 'd', ''], monkeypatch=monkeypatch)
    assert result.code == 0, result.err
    assert '\\u' not in path.read_text(encoding='utf-8')
    old, first, second = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
    assert old == {'old': 1} and first.keys() == second.keys() == {'messages', 'chosen', 'rejected'}
    kind = {'role': 'system', 'content': 'be kind'}
    assert first['messages'] == [kind, user('满纸')] and first['chosen'] != first['rejected']
    assert second['messages'] == [kind, user('满纸'), assistant(first['chosen']), user('c')] or user('满纸') not in second['messages']  # where it no longer fits
    shown = result.out.split('1: ', 1)[1]
    assert shown.startswith(first['chosen']) and f'2: {first["rejected"]}\n' in shown
    assert shown.index(second['rejected']) <= shown.index(f'2: {second["chosen"]}')
    assert shown.count('(not rated') == 2
    result = chat(short, f'--rate={path}', '--temperature=0', lines=['a', 'b'], monkeypatch=monkeypatch)
    assert result.code == 0 and result.out.count('no two different answers') == 2 and len(path.read_text(encoding='utf-8').splitlines()) == 3


def test_stopped_answers(short, tmp_path, monkeypatch):
    """What Ctrl-C leaves of an answer is what the assistant has said; a pair with such an answer is not rated."""
    seen, path = [], tmp_path / 'pairs.jsonl'
    original = conversation.fit_into_context

    def stopped(*args, **kwargs):
        yield 'half', None
        raise KeyboardInterrupt
    monkeypatch.setattr(conversation, 'fit_into_context', lambda messages, *args: seen.append(messages) or original(messages, *args))
    monkeypatch.setattr(conversation, 'stream_reply', stopped)
    assert chat(short, lines=['a', 'b'], monkeypatch=monkeypatch).code == 0
    assert seen == [[user('a')], [user('a'), assistant('half'), user('b')]]
    result = chat(short, f'--rate={path}', lines=['a', 'b'], monkeypatch=monkeypatch)
    assert result.code == 0 and result.out.count('not rated') == 2 and seen[2:] == [[user('a')], [user('b')]] and path.read_text(encoding='utf-8') == ''
    with pytest.raises(KeyboardInterrupt):  # which explain() makes an exit with 130
        chat(short, '--prompt=a')


@pytest.mark.parametrize('args, names', [
    (['--prompt='], ['prompt', 'empty']),
    (['--prompt=é'], ["'é' (U+00E9)"]),
    (['--prompt=' + 'a' * 62], ['65 tokens', 'context', '64']),
    (['--prompt=a', '--rate=x.jsonl'], ['--prompt', '--rate']),
    (['--serve', '--rate=x.jsonl'], ['--rate', '--serve']),
    (['--rate={folder}'], ['rate=', 'directory']),
    (['--rate={folder}/no/x.jsonl'], ['rate=', 'No such file']),
    (['--temperature=-0.5'], ['temperature=-0.5', '0 to 100']),
    (['--top_p=1.5'], ['top_p=1.5', '0 to 1']),
    (['--max_new_tokens=0'], ['max_new_tokens=0', 'an int, 1 to']),
    (['--seed=-1'], ['seed=-1', 'an int, 0 to']),
    (['--port=65536'], ['port=65536', '65,535']),
    (['--max_requests=0'], ['max_requests=0']),
    (['--dtype=int4'], ['dtype=int4']),
    (['--out_dir={folder}/none'], ['no such checkpoint']),
], ids=lambda x: x[0][:24] if isinstance(x, list) else '')
def test_bad_input(short, tmp_path, args, names):
    result = chat(short, *[arg.replace('{folder}', str(tmp_path)) for arg in args])
    assert result.code == 1 and len(result.err.strip().splitlines()) == 1, result.err
    for name in names:
        assert name in result.err


def test_what_cannot_chat(tmp_path):
    """A model that has not been instruction-tuned."""
    run = save(tmp_path / 'm')
    checkpoint = torch.load(tmp_path / 'm' / 'ckpt.pt', weights_only=True)
    save_checkpoint({**checkpoint, 'tokenizer': CHARS.json}, str(tmp_path / 'm' / 'ckpt.pt'))
    result = chat(run, '--prompt=a')
    assert result.code == 1 and 'instruction-tune' in result.err and 'sample.py' in result.err and result.err.count('\n') == 1
    save_checkpoint({**checkpoint, 'tokenizer': chat_tokenizer(bpe_tokenizer([])).json}, str(tmp_path / 'm' / 'ckpt.pt'))
    result = chat(run, '--prompt=a')
    assert result.code == 1 and 'right tokenizer' in result.err


@contextlib.contextmanager
def started(run, *args):
    """chat.py in a process of its own, which ends with the test at the latest."""
    command = [sys.executable, 'chat.py', f'--out_dir={run.folder}', '--device=cpu', '--max_new_tokens=8000', *args]
    process = subprocess.Popen(command, cwd=ROOT, text=True, encoding='utf-8', stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_until(process, text):
    """What it prints, up to this text."""
    shown = ''
    while not shown.endswith(text):
        char = process.stdout.read(1)
        assert char, (shown, process.stderr.read())
        shown += char
    return shown


def test_interrupted(endless):
    """Ctrl-C ends the answer, and the chat goes on; at the prompt it ends the chat."""
    with started(endless) as process:
        process.stdin.write('a\n')
        process.stdin.flush()
        read_until(process, '> ')
        assert len(process.stdout.read(50)) == 50
        process.send_signal(signal.SIGINT)
        assert len(read_until(process, '\n> ')) < 7000  # '>' is a character of its vocabulary
        process.stdin.write('/set\n')
        process.stdin.flush()
        assert 'temperature=0.8' in read_until(process, '\n> ')
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, '\n', '')


# --- over HTTP
@contextlib.contextmanager
def serving(made, **kwargs):
    """The application on a free port of this machine; yields the port."""
    import uvicorn
    settings = {**{key: low for key, (low, _) in conversation.LIMITS.items()}, 'max_new_tokens': 40, 'temperature': 1.0, 'top_p': 1.0, 'seed': 1, **kwargs.pop('settings', {})}
    app = server_file.build_app(made.model, made.tokenizer, 'tiny', settings, hosts={'127.0.0.1', 'localhost', '[::1]'}, **kwargs)
    server = uvicorn.Server(uvicorn.Config(app, log_level='error', lifespan='off', timeout_graceful_shutdown=2))
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


PATH = '/v1/chat/completions'


def send(port, body=None, method='POST', path=PATH, headers=()):
    """A request; returns the connection and the response, not read yet."""
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=20)
    body = json.dumps(body) if isinstance(body, (dict, list)) else body
    connection.request(method, path, body, {'Content-Type': 'application/json', **dict(headers)}, encode_chunked=not isinstance(body, (str, bytes, type(None))))
    return connection, connection.getresponse()


def call(*args, **kwargs):
    """(status, what the JSON says)"""
    connection, response = send(*args, **kwargs)
    with contextlib.closing(connection):
        return response.status, json.loads(response.read())


def stream(port, **request):
    """The chunks of a streamed answer, which must end as OpenAI's do."""
    connection, response = send(port, {'messages': [user('a')], 'stream': True, **request})
    with contextlib.closing(connection):
        assert response.status == 200 and response.headers['Content-Type'] == 'text/event-stream; charset=utf-8'
        *events, last, rest = response.read().decode().split('\n\n')
    assert (last, rest) == ('data: [DONE]', '')
    return [json.loads(event.removeprefix('data: ')) for event in events]


def test_completion(port, short):
    """Exactly OpenAI's object; and the stream of the same seed says the same."""
    status, got = call(port, {'model': 'any', 'messages': [user('who are you?')], 'seed': 5, 'max_tokens': 30, 'user': 'x', 'stop': None})
    assert status == 200
    said, reason = got['choices'][0]['message']['content'], got['choices'][0]['finish_reason']
    ids, _ = fit_into_context([user('who are you?')], short.tokenizer, 64)
    pieces = list(stream_reply(short.model, short.tokenizer, ids, 30, 5, temperature=1.0))
    assert said == ''.join(text for text, _ in pieces) and reason == pieces[-1][1]
    assert got['id'].startswith('chatcmpl-') and abs(got['created'] - time.time()) < 60
    assert got == {'id': got['id'], 'object': 'chat.completion', 'created': got['created'], 'model': 'tiny',
                   'choices': [{'index': 0, 'message': {'role': 'assistant', 'content': said, 'refusal': None}, 'logprobs': None, 'finish_reason': reason}],
                   'usage': {'prompt_tokens': len(ids), 'completion_tokens': len(pieces), 'total_tokens': len(ids) + len(pieces)}}
    chunks = stream(port, messages=[user('who are you?')], seed=5, max_completion_tokens=30, stream_options={'include_usage': True})
    assert all(chunk.keys() == {'id', 'object', 'created', 'model', 'choices', 'usage'} and chunk['object'] == 'chat.completion.chunk' and chunk['id'] == chunks[0]['id'] for chunk in chunks)
    assert chunks[-1]['choices'] == [] and chunks[-1]['usage'] == got['usage'] and chunks[0]['usage'] is None
    first, *middle, last = [chunk['choices'][0] for chunk in chunks[:-1]]
    assert first == {'index': 0, 'delta': {'role': 'assistant', 'content': ''}, 'logprobs': None, 'finish_reason': None}
    assert last == {'index': 0, 'delta': {}, 'logprobs': None, 'finish_reason': reason}
    assert ''.join(choice['delta'].pop('content') for choice in middle) == said and all(choice == {**first, 'delta': {}} for choice in middle)
    assert 'usage' not in stream(port)[0]


def test_choices(port):
    """The length, a stop text, the temperature and the seed count; without a seed every answer is another."""
    def said(**request):
        status, got = call(port, {'messages': [user('a')], **request})
        assert status == 200
        return got['choices'][0]['message']['content'], got['choices'][0]['finish_reason']
    whole, _ = said(seed=3)
    assert said(seed=3)[0] == whole and len(whole) > 4
    assert said(seed=3, max_tokens=2) == (whole[:2], 'length') == said(seed=3, max_tokens=9, max_completion_tokens=2)
    assert said(seed=3, stop=whole[2:4])[0] == said(seed=3, stop=['no such text', whole[2:4]])[0] == whole[:whole.index(whole[2:4])]
    assert len({said()[0] for _ in range(4)}) > 1 and len({said(temperature=0)[0] for _ in range(3)}) == len({said(top_p=0)[0] for _ in range(3)}) == 1
    status, got = call(port, {'messages': [user('b' * 20), assistant('c' * 20), user('d' * 20)]})
    assert status == 400 and 'shorten' in got['error']['message']
    connection, response = send(port, {'messages': [user('b' * 20), assistant('c' * 20), user('d' * 20)], 'truncation': 'auto'})
    assert (response.status, response.headers['x-left-out']) == (200, '2')
    connection.close()


def test_system_message():
    """The server's own is that of requests without one."""
    def messages(*asked):
        return server_file.parse_request(json.dumps({'messages': asked}).encode(), {}, 'be kind')[0]
    own, theirs = {'role': 'system', 'content': 'be kind'}, {'role': 'system', 'content': ''}
    assert messages(user('a')) == [own, user('a')] and messages(theirs, user('a')) == [theirs, user('a')]
    assert server_file.parse_request(json.dumps(OK).encode(), {})[0] == OK['messages']


def test_other_pages(port):
    assert call(port, method='GET', path='/v1/models')[1]['data'][0].items() >= {'id': 'tiny', 'object': 'model', 'owned_by': 'stonegpt'}.items()
    connection, response = send(port, method='GET', path='/', headers={'Host': 'LOCALHOST:9'})
    html = response.read().decode()
    connection.close()
    assert response.status == 200 and '<title>StoneGPT</title>' in html and "default-src 'none'" in response.headers['content-security-policy']
    assert 'http' not in html.replace('http-equiv', '') and not response.headers['access-control-allow-origin']  # nothing comes from elsewhere, and other sites' pages read nothing


OK = {'messages': [user('a')], 'max_tokens': 2}


@pytest.mark.parametrize('status, body, reason', [
    (400, '', 'no JSON'), (400, '{"messages"', 'no JSON'), (400, b'\xff\xfe', 'no JSON'), (400, '[' * 1999, 'no JSON'), (400, '[]', 'a JSON object'), (400, 'null', 'a JSON object'),
    (400, {}, 'list of messages'), (400, {'messages': []}, 'at least one'), (400, {'messages': 'a'}, 'list of messages'), (400, {'messages': ['a']}, 'a message'),
    (400, {'messages': [{'role': 'user'}]}, 'a message'), (400, {'messages': [{'role': ['user'], 'content': 'a'}]}, 'unknown role'), (400, {'messages': [{'role': 'tool', 'content': 'a'}]}, 'unknown role'),
    (400, {'messages': [{'role': 'system', 'content': 'a'}]}, 'last message'), (400, {'messages': [user('a'), assistant('b')]}, 'last message'),
    (400, {'messages': [user('a' * 62)]}, '65 tokens'), (400, {'messages': [user('é')]}, "'é'"), (400, {'messages': [user('\ud800')]}, "'\\ud800'"), (400, {'messages': [user('\0')]}, 'U+0000'),
    (400, {**OK, 'temperature': 'hot'}, 'temperature'), (400, {**OK, 'temperature': -1}, 'temperature'), (400, {**OK, 'temperature': True}, 'temperature'),
    (400, {**OK, 'temperature': float('nan')}, 'NaN'), (400, '{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}', 'temperature'), (400, {**OK, 'top_p': 2}, 'top_p'),
    (400, {**OK, 'top_p': float('-inf')}, 'Infinity'), (400, {**OK, 'max_tokens': 0}, 'max_tokens'), (400, {**OK, 'max_tokens': 1.5}, 'max_tokens'), (400, {**OK, 'max_completion_tokens': 10**30}, 'max_completion'),
    (400, {**OK, 'seed': 'x'}, 'seed'), (400, {**OK, 'seed': -1}, 'seed'), (400, {**OK, 'n': 2}, 'n: expected 1'), (400, {**OK, 'n': True}, 'n: expected 1'), (400, {**OK, 'stop': 3}, 'stop'),
    (400, {**OK, 'stop': ['']}, 'stop'), (400, {**OK, 'stop': list('abcde')}, 'stop'), (400, {**OK, 'stream': 'yes'}, 'stream'), (400, {**OK, 'stream_options': 1}, 'stream_options'),
    (400, {**OK, 'model': 1}, 'model'), (400, {**OK, 'truncation': []}, 'truncation'), (413, {'messages': [user('a' * 2000)]}, '2,000 bytes'), (200, OK, ''),
], ids=str)
def test_bad_requests(port, status, body, reason):
    got = call(port, body)
    assert got[0] == status
    if status != 200:
        assert got[1].keys() == {'error'} and got[1]['error']['type'] == 'invalid_request_error' and reason in got[1]['error']['message']


def test_who_may_not_come_in(port):
    """Oversized bodies without a length, other content types, methods, paths, and names that this machine does not have."""
    assert call(port, iter([b' ' * 1000] * 3))[0] == 413
    assert call(port, iter([json.dumps(OK).encode()]))[0] == 200
    for kind in ('text/plain', 'application/x-www-form-urlencoded', ''):
        assert call(port, json.dumps(OK), headers={'Content-Type': kind})[0] == 415
    assert call(port, json.dumps(OK), headers={'Content-Type': 'application/json; charset=utf-8'})[0] == 200
    for host, status in (('evil.example', 403), ('127.0.0.1.evil.example:80', 403), ('', 403), ('localhost:1234', 200), ('[::1]:8000', 200)):
        assert call(port, OK, headers={'Host': host})[0] == status, host
    assert call(port, method='GET', path='/v1/nothing')[0] == call(port, OK, path='/')[0] - 1 == 404
    assert call(port, method='GET')[0] == call(port, method='OPTIONS', headers={'Origin': 'http://evil.example'})[0] == 405


def test_two_at_once(port):
    """They take turns, and both get what they would alone."""
    alone = [call(port, {'messages': [user(text)], 'seed': seed})[1]['choices'] for seed, text in enumerate(('a', '满纸', 'b'))]
    together = [None] * 3

    def one(seed, text):
        together[seed] = call(port, {'messages': [user(text)], 'seed': seed})[1]['choices']
    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(('a', '满纸', 'b'))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


@pytest.mark.parametrize('streamed', [True, False], ids=['streamed', 'whole'])
def test_clients_that_go_away(short, streamed, monkeypatch, capsys):
    """No more is computed for them; before that, those beyond the limit are told to come again, and what can be answered at once still is."""
    steps = []

    def slow(*args, **kwargs):
        while True:
            time.sleep(0.005)
            steps.append(1)
            yield 'x', None
    with monkeypatch.context() as patch, serving(short, max_requests=2) as port:
        patch.setattr(server_file, 'stream_reply', slow)
        clients = [http.client.HTTPConnection('127.0.0.1', port, timeout=20) for _ in range(2)]
        for client in clients:
            client.request('POST', PATH, json.dumps({**OK, 'stream': streamed}), {'Content-Type': 'application/json'})
        for _ in range(1000):
            if len(steps) < 10:
                time.sleep(0.01)
        connection, response = send(port, OK)
        assert response.status == 429 and response.headers['Retry-After'] and 'busy' in json.loads(response.read())['error']['message']
        assert call(port, method='GET', path='/v1/models')[0] == 200
        for client in clients:
            client.sock.shutdown(socket.SHUT_RDWR)
            client.close()
        for _ in range(500):
            before = len(steps)
            time.sleep(0.05)
            if len(steps) == before:
                break
        assert len(steps) == before
        half = socket.create_connection(('127.0.0.1', port))  # gone in the middle of its request
        half.sendall(f'POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{{'.encode())
        half.close()
        patch.undo()
        for _ in range(3):
            assert call(port, OK)[0] == 200
    assert capsys.readouterr().err == ''


def test_serve(endless):
    """chat.py --serve says where it is, streams, and Ctrl-C ends it at once in the middle of an answer; a port that is taken is one line."""
    with started(endless, '--serve', '--port=0') as process:
        port = int(re.search(r'http.*:(\d+) is', read_until(process, 'Ctrl-C ends it)\n'))[1])
        connection, response = send(port, {'messages': [user('a')], 'stream': True})
        assert response.status == 200 and response.read(2000)
        assert call(port, method='GET', path='/', headers={'Host': 'evil.example'})[0] == 403
        again = chat(endless, '--serve', f'--port={port}')
        assert again.code == 1 and again.err.count('\n') == 1 and '--port' in again.err
        begun = time.time()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        connection.close()
        assert (process.returncode, err) == (0, '') and time.time() - begun < 5


def test_missing_packages(short, monkeypatch):
    import importlib.util
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    result = chat(short, '--serve')
    assert result.code == 1 and result.err == '--serve needs two more packages: pip install starlette uvicorn\n'


def test_within():
    assert [check_range('temperature', 0), check_range('top_p', 0.5), check_range('seed', 2**63 - 1)] == [0, 0.5, 2**63 - 1]
    for key, value in (('temperature', float('nan')), ('top_k', True), ('top_k', 1.0), ('min_p', '0.1'), ('seed', None)):
        with pytest.raises(ValueError, match=key):
            check_range(key, value)


# --- the page
@contextlib.contextmanager
def browser(language='en'):
    """A headless Chromium, driven through chromedriver's own protocol (https://www.w3.org/TR/webdriver2); yields call(method, path, **parameters)."""
    driver, chromium = shutil.which('chromedriver'), shutil.which('chromium') or shutil.which('google-chrome')
    if not driver or not chromium:
        pytest.skip('no chromium and chromedriver here (Debian: apt-get install chromium chromium-driver)')
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder, open(os.path.join(folder, 'log'), 'wb') as log:
        process = subprocess.Popen([driver, f'--port={port}'], stdout=log, stderr=log, env={**os.environ, 'HOME': folder, 'LANGUAGE': language})
        session = ''

        def drive(method, path='', **parameters):
            connection = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
            with contextlib.closing(connection):
                connection.request(method, session + path, json.dumps(parameters) if method == 'POST' else None, {'Content-Type': 'application/json'})
                value = json.loads(connection.getresponse().read())['value']
            assert not isinstance(value, dict) or 'error' not in value, value
            return value
        try:
            for _ in range(200):
                with contextlib.suppress(OSError):
                    drive('GET', '/status')
                    break
                time.sleep(0.1)
            arguments = ['--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--window-size=900,800', f'--user-data-dir={folder}/profile', f'--lang={language}']
            options = {'binary': chromium, 'args': arguments, 'prefs': {'intl.accept_languages': language}}
            session = '/session/' + drive('POST', '/session', capabilities={'alwaysMatch': {'goog:chromeOptions': options}})['sessionId']
            yield drive
            drive('DELETE')
        finally:
            process.terminate()
            process.wait()


@pytest.mark.slow
@pytest.mark.parametrize('language, words', [('en', ['Reset', 'Settings', 'Send', 'shorten it']), ('zh-CN', ['重新开始', '设置', '发送', 'shorten it'])], ids=['en', 'zh'])
def test_page(short, tmp_path, language, words):
    """A person opens the page, types two messages and one that is refused, and begins anew; every field has a label, and nothing is logged as an error."""
    def typed(text):
        field = drive('POST', '/element', using='css selector', value='#message')
        drive('POST', f'/element/{next(iter(field.values()))}/value', text=text)

    def page(script):
        return drive('POST', '/execute/sync', script=f'return {script}', args=[])

    def wait(script):
        for _ in range(200):
            if page(script):
                return
            time.sleep(0.05)
        raise AssertionError(f'{script}: {page("document.body.innerText")}')
    with serving(short, settings={'max_new_tokens': 12}) as port, browser(language) as drive:
        drive('POST', '/url', url=f'http://127.0.0.1:{port}/')
        wait("document.getElementById('model').textContent === 'tiny'")
        for word in words[:3]:
            assert word in page('document.body.innerText')
        assert page("document.activeElement.id === 'message' && [...document.querySelectorAll('input, textarea')].every(field => field.labels[0]?.textContent)")
        for number, text in enumerate(['满纸荒唐言？', 'who are you?'], 1):
            typed(text + '\ue007')  # Enter
            wait(f"document.querySelectorAll('.user').length === {number} && !document.querySelector('.busy')")
        assert page('messages.map(message => message.role)') == ['user', 'assistant'] * 2
        assert page("messages[0].content") == '满纸荒唐言？' and page("document.querySelectorAll('.assistant')[0].textContent").startswith(page('messages[1].content'))
        typed('a' * 99 + '\ue007')
        wait("document.querySelector('[role=alert]')?.textContent.includes('shorten it')")
        assert page('messages.length') == 4 and page("document.getElementById('message').value") == 'a' * 99
        page("document.getElementById('reset').click()")
        assert page("messages.length === 0 && !document.getElementById('talk').textContent")
        errors = [entry for entry in drive('POST', '/se/log', type='browser') if entry['level'] == 'SEVERE' and 'favicon' not in entry['message'] and '400' not in entry['message']]
        assert errors == []
