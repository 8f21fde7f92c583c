"""core/text/conversations.py: the forms of a record, records that are refused, and what is cut or left out."""
import json
import re

import numpy as np
import pytest
from conftest import exit_line, run_script, write

from core.text.conversations import parse_record, prompt_of, read, write_folders
from core.text.dataset import open_dataset
from core.text.tokenizer import char_tokenizer

LETTERS = char_tokenizer('\n abcdefghijklmnopqrstuvwxyz')


def message(role, content):
    return {'role': role, 'content': content}


def turn(speaker, text):
    return {'from': speaker, 'value': text}


def exchange(question, answer):
    return [message('user', question), message('assistant', answer)]


GOOD = exchange('p', 'good')
BAD = exchange('p', 'bad')
PREFERENCE = ([message('user', 'p')], 'good', 'bad')


@pytest.mark.parametrize('record, expected', [
    ({'instruction': '写诗', 'input': '春', 'output': '好'}, exchange('写诗\n\n春', '好')),
    ({'instruction': 'hi', 'input': '', 'output': 'yo', 'system': 'be brief'},
     [message('system', 'be brief'), *exchange('hi', 'yo')]),
    ({'conversations': [turn('system', 's'), turn('human', 'q'), turn('gpt', 'a')]},
     [message('system', 's'), *exchange('q', 'a')]),
    ({'messages': exchange('q', 'a') + exchange('r', 'b')}, exchange('q', 'a') + exchange('r', 'b')),
    ({'prompt': 'p', 'chosen': 'good', 'rejected': 'bad'}, PREFERENCE),
    ({'messages': GOOD[:1], 'chosen': 'good', 'rejected': 'bad'}, PREFERENCE),
    ({'prompt': 'q', 'completion': 'a'}, exchange('q', 'a')),
    ({'prompt': 'q', 'completion': message('assistant', 'a')}, exchange('q', 'a')),
    ({'prompt': exchange('q', 'a') + exchange('r', '')[:1], 'completion': [message('assistant', 'b')]},
     exchange('q', 'a') + exchange('r', 'b')),
    ({'chosen': GOOD, 'rejected': BAD}, PREFERENCE),
    ({'prompt': 'p', 'messages': GOOD, 'chosen': GOOD, 'rejected': BAD}, PREFERENCE),
    ({'prompt': 'p', 'chosen': GOOD[1:], 'rejected': BAD[1:]}, PREFERENCE),
])
def test_forms_of_records(tmp_path, record, expected):
    """All forms, in a .jsonl file with blank lines and in a .json file."""
    text = json.dumps(record, ensure_ascii=False)
    assert list(read(write(tmp_path / 'a.jsonl', f'{text}\n\n{text}\n\n'))) == [expected, expected]
    assert list(read(write(tmp_path / 'a.json', f'[{text}]'))) == [expected]


def test_prompt_of():
    messages = exchange('q', 'a') + exchange('r', 'b')
    assert prompt_of(messages) == messages[:3]


@pytest.mark.parametrize('record, says', [
    ([1], 'expected a JSON object'),
    ({'text': 'q'}, "expected 'messages'"),
    ({'messages': []}, 'at least one'),
    ({'messages': [message('user', 'q')]}, 'the assistant says nothing'),
    ({'messages': [message('robot', 'q')]}, "unknown role 'robot'"),
    ({'messages': [{'role': 'user'}]}, 'expected {"role"'),
    ({'conversations': ['q']}, 'turn 1: expected {"from"'),
    ({'conversations': 5}, 'conversations: expected a list of turns, not a number'),
    ({'conversations': [turn(['human'], 'q')]}, 'turn 1: expected {"from"'),
    ({'messages': [message(['user'], 'q')]}, "unknown role ['user']"),
    ({'instruction': ['a'], 'output': 'b'}, 'instruction: expected a text, not a list'),
    ({'prompt': 'p', 'completion': exchange('q', 'a')}, 'completion: expected the text of an answer'),
    ({'prompt': 'p', 'completion': ''}, 'completion: expected the text of an answer'),
    ({'prompt': exchange('q', 'a'), 'completion': 'a'}, "ends with the assistant's answer"),
    ({'completion': 'a'}, 'the prompt: expected a text or a list of messages, not null'),
    ({'conversations': [turn('alien', 'q')]}, "unknown role 'alien'"),
    ({'instruction': 'q', 'output': None}, 'output: expected a text, not null'),
    ({'prompt': 'p', 'chosen': 'a'}, 'rejected: expected'),
    ({'prompt': 'p', 'chosen': 'a', 'rejected': 'a'}, 'are equal'),
    ({'prompt': 'p', 'chosen': [message('user', 'bye')], 'rejected': 'b'}, 'chosen: expected'),
    ({'messages': [message('assistant', 'p')], 'chosen': 'a', 'rejected': 'b'}, "ends with the assistant's answer"),
    ({'chosen': exchange('p', 'a'), 'rejected': exchange('q', 'b')}, 'different prompts'),
])
def test_bad_records(tmp_path, record, says):
    path = write(tmp_path / 'bad.jsonl', json.dumps({'messages': GOOD}) + '\n' + json.dumps(record))
    line = exit_line(lambda: list(read(path)))
    assert 'record 2' in line and says in line


FORMS = [
    {'messages': GOOD},
    {'conversations': [turn('human', 'q'), turn('gpt', 'a')]},
    {'instruction': 'q', 'input': 'i', 'output': 'a', 'system': 's'},
    {'prompt': 'q', 'completion': 'a'},
    {'prompt': GOOD[:1], 'completion': GOOD[1:]},
    {'messages': GOOD[:1], 'chosen': 'a', 'rejected': 'b'},
    {'chosen': GOOD, 'rejected': BAD},
]
WRONG = [None, 5, 0.5, True, '', 'x', [], {}, ['x'], [5], [None], [[]], [{}], {'x': 5}, [['x']], {'role': 'user'},
         {'role': ['user']}, [{'role': 'user', 'content': 5}], [{'role': {}, 'content': 'x'}],
         [{'from': [], 'value': 'x'}]]


def variants(value):
    """Yield the value with each of its parts replaced by each of WRONG."""
    yield from WRONG
    for key in range(len(value)) if isinstance(value, list) else list(value) if isinstance(value, dict) else []:
        for part in variants(value[key]):
            copy = value.copy()
            copy[key] = part
            yield copy


@pytest.mark.parametrize('form', FORMS, ids=lambda form: '+'.join(form))
def test_every_malformed_record_gives_a_sensible_line(form):
    """It says what was expected, and nothing of Python's own. Some variants are records, too."""
    refused = 0
    for record in variants(form):
        try:
            parse_record(record)
        except ValueError as error:  # another class of error fails this test
            refused += 1
            line = str(error)
            assert re.search(r"expected|nothing to learn|nothing to prefer|different prompts", line), (record, line)
            assert not re.search(r'instance|NoneType|object is|indices|unhashable|Error', line), (record, line)
    assert refused > 20


def test_a_bad_record_stops_the_script(tmp_path):
    path = write(tmp_path / 'bad.jsonl', json.dumps({'text': 'q'}))
    result = run_script('data/chat/prepare.py', f'--input={path}', f'--name={tmp_path / "x"}')
    assert result.code == 1 and result.err.count('\n') == 1
    assert 'record 1' in result.err and "expected 'messages'" in result.err
    assert not (tmp_path / 'x').exists()


def write_records(path, *records):
    return write(path, ''.join(json.dumps(record) + '\n' for record in records))


def test_the_script_writes_where_train_looks(tmp_path):
    """In data/ of the current folder, if there is one; files may be given without --input=."""
    (tmp_path / 'data' / 'letters').mkdir(parents=True)
    write(tmp_path / 'data' / 'letters' / 'tokenizer.json', LETTERS.json)
    write_records(tmp_path / 'a.jsonl', {'messages': exchange('q', 'a')}, {'prompt': 'p', 'completion': 'b'})
    write_records(tmp_path / 'b.jsonl', {'prompt': 'p', 'chosen': 'good', 'rejected': 'bad'})
    result = run_script('data/chat/prepare.py', 'a.jsonl', '--input=b.jsonl', '--tokenizer=data/letters',
                        '--name=my chat', '--val_fraction=0', cwd=tmp_path)
    assert result.code == 0, result.err
    assert sorted(path.name for path in (tmp_path / 'data' / 'my chat').iterdir()) == ['pairs', 'prompts', 'sft']
    assert "config/sft_chat.py --dataset='my chat/sft' --init_from=" in result.out
    assert len(open_dataset(str(tmp_path / 'data' / 'my chat' / 'sft')).starts['train']) == 3  # two, and the end


def test_characters_that_the_tokenizer_lacks(tmp_path):
    """The first ten, how many more, in how many conversations, and what to do."""
    path = write(tmp_path / 'tokenizer.json', LETTERS.json)
    records = [{'messages': exchange('q', 'a')}, {'messages': exchange('QRS', 'AB')},
               {'prompt': 'p', 'chosen': 'good', 'rejected': '0123456789'}]
    source = write_records(tmp_path / 'a.jsonl', *records)
    result = run_script('data/chat/prepare.py', source, f'--tokenizer={path}', f'--name={tmp_path / "x"}')
    assert result.code == 1 and result.err.count('\n') == 1 and not (tmp_path / 'x').exists()
    shown = ', '.join(f"'{char}' (U+{ord(char):04X})" for char in 'QRSAB01234')
    assert f'{path}: {shown} and 5 more, in 2 of 3 conversations; ' in result.err
    assert 'data/any_text/prepare.py --input=... --tokenizer=bbpe, or leave these conversations out' in result.err


def test_long_conversations_are_cut_and_counted(tmp_path, capsys):
    """At 20 tokens. An item is left out if nothing of an answer remains, or no difference, or no room for an answer."""
    long = exchange('a', 'b' * 50)
    short = exchange('b', 'dd')
    no_answer_left = exchange('a' * 50, 'b')
    no_difference_left = (long[:1], 'b' * 30 + 'x', 'b' * 30 + 'y')
    conversations = {'train': [long, short, no_answer_left], 'val': []}
    pairs = {'train': [no_difference_left, (short[:1], 'b', 'c')], 'val': []}
    prompts = {'train': [no_answer_left[:1], short[:1]], 'val': []}
    write_folders(str(tmp_path), LETTERS, conversations, pairs, prompts, 20)

    out = capsys.readouterr().out
    assert 'train 2 conversations' in out and 'train 1 pairs' in out and 'train 1 prompts' in out
    assert '1 cut' in out and out.count('1 left out') == 3
    data = open_dataset(str(tmp_path / 'sft'))
    assert data.longest == 20 and data.starts['train'].tolist()[:2] == [0, 20] and data.splits['val'] == 0


def test_files_of_a_folder(tmp_path):
    """train_index.bin has the start of every document, train_mask.bin a 1 for each token that the assistant writes."""
    conversations = {'train': [exchange('q', 'ab'), exchange('r', 'c')], 'val': []}
    write_folders(str(tmp_path), LETTERS, conversations, {}, {}, 20)
    data = open_dataset(str(tmp_path / 'sft'))
    tokens = np.fromfile(tmp_path / 'sft' / 'train.bin', '<u2')
    mask = np.fromfile(tmp_path / 'sft' / 'train_mask.bin', np.uint8)
    starts = np.fromfile(tmp_path / 'sft' / 'train_index.bin', '<u8').tolist()
    texts = [data.tokenizer.decode(tokens[begin:end]) for begin, end in zip(starts, [*starts[1:], len(tokens)])]
    template = '<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n'
    assert texts == [template.format('q', 'ab'), template.format('r', 'c')]
    assert data.tokenizer.decode(tokens[mask == 1]) == 'ab<|im_end|>\nc<|im_end|>\n'
