"""chat.py: the terminal, one prompt, rated answers, and its refusals. (--serve: test_server.py)"""
import json
import signal

import pytest
import torch
from chat_models import (
    CHARS,
    assistant,
    chat,
    one_thread,
    read_until,
    save_endless,
    save_model,
    save_short,
    started,
    system,
    user,
)

from core.device import explain
from core.inference import conversation
from core.inference.conversation import fit_into_context, stream_reply
from core.text.chat_template import chat_tokenizer
from core.text.tokenizer import bpe_tokenizer
from core.weights.checkpoint import save_checkpoint


@pytest.fixture(scope='module', autouse=True)
def few_threads():
    with one_thread():
        yield


@pytest.fixture(scope='module')
def short(tmp_path_factory):
    return save_short(tmp_path_factory.mktemp('models') / 'short')


def test_prompt(short):
    """The answer and nothing after it; the same seed, the same answer; the system message and --dtype matter."""
    def answer(*args):
        result = chat(short, '--prompt=who are you?', '--max_new_tokens=20', *args)
        assert result.code == 0, result.err
        return result.out.split('step 7\n')[1]

    ids, _ = fit_into_context([user('who are you?')], short.tokenizer, 64)
    steps = stream_reply(short.model, short.tokenizer, ids, 20, [1337, 0], temperature=0.8, top_k=200)
    assert answer() == ''.join(text for text, _ in steps) + '\n'
    others = [answer('--seed=2'), answer('--system=be kind'), answer('--dtype=int8', '--seed=3')]
    others += [answer('--repetition_penalty=3'), answer('--presence_penalty=2'), answer('--frequency_penalty=-2')]
    assert len({answer(), *others}) == 7


# --- the terminal

@pytest.fixture
def sent(monkeypatch):
    """Replace the model's answers by 'so' and the temperature. Returns the list of the messages that are sent."""
    sent = []

    def record(messages, *args):
        sent.append(list(messages))
        return fit_into_context(messages, *args)

    def reply(model, tokenizer, ids, **settings):
        yield 'so ', None
        yield f'{settings["temperature"]:g}', 'stop'

    monkeypatch.setattr(conversation, 'fit_into_context', record)
    monkeypatch.setattr(conversation, 'stream_reply', reply)
    return sent


SO = assistant('so 0.8')


def test_history(sent, short, monkeypatch):
    """The exchanges so far and the system message are sent; /reset, /system and messages that are refused."""
    lines = ['a', ' /b', '', '/system be kind', 'c', 'é', 'd', '/reset', 'e', '/system', 'f', '/quit', 'never']
    result = chat(short, lines=lines, monkeypatch=monkeypatch)
    assert result.code == 0
    kind, exchange_a, exchange_b = system('be kind'), [user('a'), SO], [user('/b'), SO]
    assert sent[:3] == [
        [user('a')],
        [*exchange_a, user('/b')],
        [kind, *exchange_a, *exchange_b, user('c')],
    ]
    assert sent[3][-1] == user('é') and result.err.startswith('not in this vocabulary')
    assert user('é') not in sent[4] and sent[4][-1] == user('d')
    assert sent[5:] == [[kind, user('e')], [user('e'), SO, user('f')]]
    for text in ('> so 0.8\n', '(forgotten)', '(system message: be kind)', '(system message: none)'):
        assert text in result.out, text


@pytest.mark.parametrize('line, out, err', [
    ('/set temperature=0.5', 'max_new_tokens=500, temperature=0.5, top_k=200', ''),
    ('/set', 'temperature=0.8', ''),
    ('/set presence_penalty=-0.5', 'repetition_penalty=1.0, presence_penalty=-0.5, frequency_penalty=0.0', ''),
    ('/set frequency_penalty=3', '', 'frequency_penalty=3.0: expected a number, -2 to 2'),
    ('/set repetition_penalty=0', '', 'repetition_penalty=0.0: expected a number, 0.01 to 100'),
    ('/help', '/reset  ', ''),
    ('/set temperature=-1', '', 'temperature=-1.0: expected a number, 0 to 100'),
    ('/set temperature=x', '', "temperature='x': expected a number, 0 to 100"),
    ('/set top_k=1.5', '', "top_k='1.5': expected an int, 0 to 2,147,483,647\n"),
    ('/set seed=nan', '', "seed='nan': expected an int, 0 to"),
    ('/set color=red', '', 'color: no such setting; expected max_new_tokens, temperature'),
    ('/oops', '', '/oops: no such command; /help shows them\n'),
])
def test_commands(sent, short, monkeypatch, line, out, err):
    result = chat(short, lines=[line, 'a'], monkeypatch=monkeypatch)
    assert result.code == 0 and out in result.out
    assert result.err.startswith(err) and bool(result.err) == bool(err)
    assert sent == [[user('a')]]  # no command is sent
    assert ('so 0.5' in result.out) == (line == '/set temperature=0.5')


def test_outgrown_context(sent, tmp_path, monkeypatch):
    """A message that never fits is refused; then the oldest exchanges are left out, which is said once."""
    run = save_model(tmp_path / 'm', block_size=128)
    result = chat(run, lines=['g' * 126, *['h' * 19] * 8], monkeypatch=monkeypatch)
    assert result.code == 0
    refused, outgrown = result.err.splitlines()
    assert refused.startswith('the prompt has ') and outgrown.startswith('(the conversation has outgrown')
    assert sent[0] == [user('g' * 126)] and sent[1] == [user('h' * 19)]
    assert len(sent) == 9 and len(sent[-1]) < 9  # of 17 messages


def test_ctrl_c(tmp_path):
    """Ctrl-C ends the answer, and the chat goes on; at the prompt it ends the chat."""
    with started(save_endless(tmp_path / 'm')) as process:
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


@pytest.fixture
def stopped(sent, monkeypatch):
    """Every answer is stopped by Ctrl-C after the text 'half'."""
    def reply(*args, **kwargs):
        yield 'half', None
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation, 'stream_reply', reply)
    return sent


def test_stopped_answer(stopped, short, monkeypatch):
    """What there is of a stopped answer belongs to the conversation."""
    assert chat(short, lines=['a', 'b'], monkeypatch=monkeypatch).code == 0
    assert stopped == [[user('a')], [user('a'), assistant('half'), user('b')]]


def test_stopped_answer_to_a_prompt(stopped, short):
    with pytest.raises(KeyboardInterrupt):  # explain() turns it into exit status 130
        chat(short, '--prompt=a')


# --- --rate

def test_rate(short, tmp_path, monkeypatch):
    """Rated pairs are appended as they were shown; a message without a rating is forgotten."""
    path = tmp_path / 'pairs.jsonl'
    path.write_text('{"old": 1}', encoding='utf-8')  # without a newline
    lines = ['满纸', '1', 'b', '7', '0', 'c', '2', 'd', '']  # of 满纸 the first answer is better
    args = [f'--rate={path}', '--system=be kind', '--temperature=1.5']
    result = chat(short, *args, lines=lines, monkeypatch=monkeypatch)
    assert result.code == 0, result.err
    content = path.read_text(encoding='utf-8')
    assert '\\u' not in content
    old, first, second = [json.loads(line) for line in content.splitlines()]
    assert old == {'old': 1}
    assert first.keys() == second.keys() == {'messages', 'chosen', 'rejected'}
    assert first['messages'] == [system('be kind'), user('满纸')] and first['chosen'] != first['rejected']
    history = [system('be kind'), user('满纸'), assistant(first['chosen']), user('c')]
    assert second['messages'] in (history, [history[0], history[-1]])  # the first exchange may no longer fit
    shown = result.out.split('1: ', 1)[1]
    assert shown.startswith(first['chosen']) and f'2: {first["rejected"]}\n' in shown
    assert shown.index(second['rejected']) <= shown.index(f'2: {second["chosen"]}')
    assert shown.count('(not rated') == 2


def test_rate_without_two_answers(short, tmp_path, monkeypatch):
    path = tmp_path / 'pairs.jsonl'
    result = chat(short, f'--rate={path}', '--temperature=0', lines=['a', 'b'], monkeypatch=monkeypatch)
    assert result.code == 0 and result.out.count('no two different answers') == 2
    assert path.read_text(encoding='utf-8') == ''


def test_stopped_answers_are_not_rated(stopped, short, tmp_path, monkeypatch):
    path = tmp_path / 'pairs.jsonl'
    result = chat(short, f'--rate={path}', lines=['a', 'b'], monkeypatch=monkeypatch)
    assert result.code == 0 and result.out.count('not rated') == 2
    assert stopped == [[user('a')], [user('b')]] and path.read_text(encoding='utf-8') == ''


# --- refusals

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
    (['--max_cache_gb=-1'], ['max_cache_gb=-1']),
    (['--dtype=int4'], ['dtype=int4']),
    (['--out_dir={folder}/none'], ['no such checkpoint']),
], ids=lambda x: x[0][:24] if x[0].startswith('--') else '')
def test_bad_input(short, tmp_path, args, names):
    result = chat(short, *[arg.replace('{folder}', str(tmp_path)) for arg in args])
    assert result.code == 1 and len(result.err.strip().splitlines()) == 1, result.err
    for name in names:
        assert name in result.err


def test_damaged_weights(tmp_path, capsys):
    """A model whose output is not finite ends the script with one line."""
    run = save_model(tmp_path / 'm')
    path = tmp_path / 'm' / 'ckpt.pt'
    checkpoint = torch.load(path, weights_only=True)
    checkpoint['model']['transformer.ln_f.weight'][3] = float('nan')
    save_checkpoint(checkpoint, str(path))
    with pytest.raises(FloatingPointError) as caught:
        chat(run, '--prompt=a')
    explain(caught.type, caught.value, None)  # the excepthook
    err = capsys.readouterr().err
    assert err.startswith("the model's output is not finite") and err.count('\n') == 1


def test_missing_packages(short, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    result = chat(short, '--serve')
    assert result.code == 1 and result.err == '--serve needs two more packages: pip install starlette uvicorn\n'


@pytest.mark.parametrize('tokenizer, names', [
    (CHARS, ['instruction-tune', 'sample.py']),  # without the tokens of the template
    (chat_tokenizer(bpe_tokenizer([])), ['right tokenizer']),  # with more tokens than the model
], ids=['no template', 'too many tokens'])
def test_what_cannot_chat(tmp_path, tokenizer, names):
    run = save_model(tmp_path / 'm')
    path = tmp_path / 'm' / 'ckpt.pt'
    checkpoint = torch.load(path, weights_only=True)
    save_checkpoint({**checkpoint, 'tokenizer': tokenizer.json}, str(path))
    result = chat(run, '--prompt=a')
    assert result.code == 1 and result.err.count('\n') == 1
    for name in names:
        assert name in result.err
