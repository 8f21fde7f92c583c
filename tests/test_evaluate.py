"""evaluate.py against losses computed token by token and transformers, and its refusals."""
import math
import random
import re

import pytest
import torch
from conftest import run_script, write
from test_huggingface import make

from core.text.dataset import open_dataset
from core.text.tokenizer import char_tokenizer
from core.weights.checkpoint import load_model, source_tokenizer

WORDS = 'zero one two three four five six seven eight nine'.split()
RESULT = re.compile(r'loss ([\d.]+), perplexity ([\d.]+), bits per byte ([\d.]+), bits per character ([\d.]+)')


def evaluate(*args):
    """Return the loss, perplexity, bits per byte and bits per character that evaluate.py prints, and its output."""
    result = run_script('evaluate.py', '--device=cpu', *args)
    assert (result.code, result.err) == (0, ''), result.err
    return *map(float, RESULT.findall(result.out)[-1]), result.out


@pytest.fixture(scope='module')
def text(tmp_path_factory):
    rng = random.Random(1)
    return write(tmp_path_factory.mktemp('text') / 'text.txt', ' '.join(rng.choice(WORDS) for _ in range(200)))


@pytest.mark.parametrize('stride', [0, 5, 32])
def test_loss(tiny_run, text, stride):
    """The loss of a text file, token by token, each after the tokens before it in its window."""
    model, source = load_model('resume', str(tiny_run))
    with open(text, encoding='utf-8') as f:
        content = f.read()
    ids = torch.tensor(source_tokenizer(source).encode(content))
    T, step, nats = 32, stride or 32, []
    for i in range(1, len(ids)):
        window_start = max(0, math.ceil((i - T) / step)) * step  # the first window that has the token as a target
        with torch.no_grad():
            logits = model.eval()(ids[None, window_start:i])[0, -1]
        nats.append(-logits.log_softmax(-1)[ids[i]].item())
    args = [f'--out_dir={tiny_run}', f'--data={text}', f'--stride={stride}']
    loss, perplexity, per_byte, per_char, out = evaluate(*args)
    mean = sum(nats) / len(nats)
    assert loss == pytest.approx(mean, abs=1e-4)
    assert perplexity == pytest.approx(math.exp(mean), abs=1e-2)
    assert per_byte == per_char == pytest.approx(sum(nats) / math.log(2) / (len(content) - 1), abs=1e-4)
    assert f'{len(ids) - 1:,} tokens' in out


def test_newlines_are_read_as_in_training(tmp_path, tiny_run):
    """A text from Windows has the loss and the bytes that it has with line feeds, and the output says so."""
    lines = 'one two three\nfour five six\nseven eight nine zero\n'
    results = {}
    for newline in '\n', '\r\n', '\r':
        path = write(tmp_path / 'x.txt', b'\xef\xbb\xbf' + lines.replace('\n', newline).encode())
        *results[newline], out = evaluate(f'--out_dir={tiny_run}', f'--data={path}')
        assert f'{len(lines) - 1} tokens, {len(lines) - 1} bytes, {len(lines) - 1} characters' in out
        assert ('3 newlines with a carriage return are read as line feeds' in out) == (newline != '\n')
    assert results['\n'] == results['\r\n'] == results['\r']


def test_the_validation_split(tiny_run, tiny_data):
    """By default all of it, with the loss of train.py --eval_only; every dtype has a line."""
    result = run_script(
        'train.py', f'--init_from={tiny_run}', '--eval_only=True', '--eval_iters=-1', '--device=cpu', '--dtype=float32',
        '--compile=False', f'--dataset={tiny_data}', '--batch_size=4', '--gradient_accumulation_steps=1',
        '--block_size=32', '--out_dir=unused')
    expected = float(re.search(r'val loss ([\d.]+)', result.out)[1])
    *_, out = evaluate(f'--out_dir={tiny_run}', '--dtype=float32,bfloat16,int8')
    losses = dict(re.findall(r'^(\w+): loss ([\d.]+)', out, re.MULTILINE))
    assert list(losses) == ['float32', 'bfloat16', 'int8']
    for dtype, tolerance in (('float32', 2e-4), ('bfloat16', 5e-3), ('int8', 5e-3)):
        assert float(losses[dtype]) == pytest.approx(expected, abs=tolerance)
    assert f'{open_dataset(str(tiny_data)).splits["val"] - 1:,} tokens' in out


def test_a_hugging_face_folder(tmp_path):
    """GPT-2 as transformers computes it, on a text of several windows."""
    peer, tok = make(tmp_path / 'gpt2', 'gpt2'), char_tokenizer(map(chr, range(32, 127)))
    write(tmp_path / 'gpt2' / 'tokenizer.json', tok.json)
    content = 'to be or not to be ' * 20
    ids = torch.tensor(tok.encode(content))
    T, nats = peer.config.n_positions, []
    for i in range(0, len(ids) - 1, T):
        targets = ids[i + 1:i + 1 + T]
        with torch.no_grad():
            logits = peer(ids[None, i:i + T]).logits[0, :len(targets)]
        nats.append(torch.nn.functional.cross_entropy(logits, targets, reduction='none'))
    nats = torch.cat(nats)
    loss, _, per_byte, _, _ = evaluate(f'--init_from={tmp_path / "gpt2"}', '--data=' + write(tmp_path / 't', content))
    assert loss == pytest.approx(nats.mean().item(), abs=1e-4)
    assert per_byte == pytest.approx(nats.sum().item() / math.log(2) / (len(content) - 1), abs=1e-4)


def test_tasks(tiny_run, tmp_path):
    question = '{"ctx": "one two", "endings": ["three", "nine"], "label": 0}\n'
    path = write(tmp_path / 'q.jsonl', question * 12)
    result = run_script('evaluate.py', f'--out_dir={tiny_run}', '--device=cpu', f'--tasks={path}', '--limit=10')
    assert result.code == 0 and 'q.jsonl: 10 questions, float32: acc ' in result.out
    assert '(guessing: 0.5000)' in result.out


NO_DATA_TASK = """task: gone
dataset_path: json
dataset_kwargs: {data_files: {validation: gone.jsonl}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{ctx}}"
doc_to_choice: "{{endings}}"
doc_to_target: "{{label}}"
"""


@pytest.mark.parametrize('content, args, names', [
    ('one two', ['--data={file}'], ['7 tokens', 'a window has 32', '--block_size=6']),
    ('one' * 20 + 'Ω', ['--data={file}'], ['data=', "'Ω' (U+03A9)"]),
    ('红楼梦'.encode('gbk'), ['--data={file}'], ['UTF-8']),
    ('', ['--data=nowhere'], ['data=nowhere', 'train.bin']),
    ('one' * 20, ['--data={file}', '--block_size=64'], ['block_size=64', 'at most 32']),
    ('one' * 20, ['--data={file}', '--stride=33'], ['stride=33']),
    ('', ['--split=test'], ['split=test', 'val or train']),
    ('', ['--tasks={file}'], ['no questions']),
    ('{"ctx": "one"}', ['--tasks={file}'], ['line 1', 'endings']),
    ('{"ctx": "one", "endings": ["a", "b"], "label": 2}', ['--tasks={file}'], ['line 1', 'label 2 of 2']),
    ('{"ctx": "one", "endings": ["a", ""], "label": 0}', ['--tasks={file}'], ['line 1', 'empty']),
    ('{"ctx": "", "endings": ["a", "b"], "label": 0}', ['--tasks={file}'], ['line 1', 'empty']),
    ('{"ctx": "one", "endings": "ab", "label": 0}', ['--tasks={file}'], ['line 1', 'no list']),
    ('{"ctx": "one", "endings": [1, 2], "label": 0}', ['--tasks={file}'], ['line 1', 'text']),
    ('{"ctx": 5, "endings": ["a", "b"], "label": 0}', ['--tasks={file}'], ['line 1', 'text']),
    ('{"ctx": "Ω", "endings": ["a", "b"], "label": 0}', ['--tasks={file}'], ['file: ', 'U+03A9']),
    ('o', ['--data={file}'], ['give more text']),
    ('', ['--dtype=float32,int4'], ['dtype=int4']),
], ids=lambda x: None)
def test_bad_input(tiny_run, tmp_path, content, args, names):
    path = write(tmp_path / 'file', content)
    refused(tiny_run, [arg.replace('{file}', path) for arg in args], names)


@pytest.mark.slow  # lm_eval alone takes 15 s to import
def test_tasks_that_lm_eval_cannot_run(tiny_run, tmp_path):
    write(tmp_path / 'task.yaml', NO_DATA_TASK)
    refused(tiny_run, ['--lm_eval=no_such_task'], ['no_such_task', 'lm_eval ls tasks'])
    refused(tiny_run, ['--lm_eval=gone', f'--lm_eval_folder={tmp_path}'], ['lm_eval=gone', 'cannot be had'])


def refused(tiny_run, args, names):
    """evaluate.py exits with one line that contains these names."""
    result = run_script('evaluate.py', f'--out_dir={tiny_run}', '--device=cpu', *args)
    assert result.code == 1 and len(result.err.strip().splitlines()) == 1, result.err
    for name in names:
        assert name in result.err
