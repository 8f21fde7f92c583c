"""sample.py from end to end."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from chat_models import save_model
from conftest import ROOT, make_dataset, run_script, write

from core.weights.checkpoint import load_model, source_tokenizer


def sample(run, *args, **kwargs):
    """Return what sample.py prints."""
    result = run_script('sample.py', f'--out_dir={run}', '--device=cpu', *args, **kwargs)
    assert (result.code, result.err) == (0, ''), result.err
    return result.out


def sampled_text(*args, **kwargs):
    """Return what sample.py prints after the line about the cache."""
    return sample(*args, **kwargs).split('bytes\n')[1]


def records(path):
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


@pytest.fixture(scope='module')
def chinese_run(tmp_path_factory):
    """A network on a byte-level BPE in which most characters take several tokens."""
    folder = tmp_path_factory.mktemp('chinese')
    text = '满纸荒唐言，一把辛酸泪！都云作者痴，谁解其中味？\n' * 80
    make_dataset(folder / 'd', write(folder / 'x.txt', text), tokenizer='bbpe', vocab_size=262)
    result = run_script(
        'train.py', f'--dataset={folder / "d"}', f'--out_dir={folder / "out"}', '--device=cpu', '--dtype=float32',
        '--compile=False', '--n_layer=1', '--n_head=2', '--n_embd=32', '--block_size=32', '--batch_size=4',
        '--gradient_accumulation_steps=1', '--eval_iters=1', '--max_iters=20', '--learning_rate=3e-3')
    assert result.code == 0, result.err
    return folder / 'out'


def test_same_seed_same_text(tiny_run, tmp_path):
    """Alone, in a batch of ten, beside another text or in several batches; another seed gives another text."""
    def texts(*args):
        sample(tiny_run, *args, f'--out={tmp_path / "o.jsonl"}', '--max_new_tokens=40', '--temperature=2')
        return {(r['start'], r['sample']): r['text'] for r in records(tmp_path / 'o.jsonl')}

    many = texts('--start=one', '--start=seven', '--num_samples=10')
    assert len({text for (start, _), text in many.items() if start == 'one'}) == 10
    assert texts('--start=one', '--num_samples=1').items() <= many.items()
    assert texts('--start=seven', '--num_samples=3', '--batch_size=2').items() <= many.items()
    (tmp_path / 'p.txt').write_text('seven\n\none\n', encoding='utf-8')
    assert texts(f'--prompts={tmp_path / "p.txt"}', '--num_samples=10', '--batch_size=10') == many
    assert texts('--start=one', '--num_samples=1', '--seed=2')['one', 0] != many['one', 0]


def test_out(tiny_run, tmp_path):
    """Every sample has a line with its tokens and the network's log-probabilities, and is printed too."""
    out = sample(tiny_run, '--start=one two', '--num_samples=2', '--max_new_tokens=6', '--temperature=3', '--logprobs',
                 f'--out={tmp_path / "o.jsonl"}', '--end_token=')
    model, source = load_model('resume', str(tiny_run))
    tok = source_tokenizer(source)
    for i, record in enumerate(records(tmp_path / 'o.jsonl')):
        assert (record['start'], record['sample'], record['over']) == ('one two', i, 'length')
        assert tok.decode(record['tokens']) == record['text'] and record['text'] in out
        ids = torch.tensor([*tok.encode('one two'), *record['tokens']])
        with torch.no_grad():
            logprobs = model.eval()(ids[None, :-1])[0, :, :tok.vocab_size].log_softmax(-1)
        expected = logprobs.gather(1, ids[1:, None])[-6:, 0]
        assert record['logprobs'] == pytest.approx(expected.tolist(), abs=1e-5)
        for token, logprob in zip(record['tokens'], record['logprobs']):
            assert f'{logprob:9.4f}  {tok.decode([token])!r}' in out
    cache_bytes = 2 * 2 * 2 * 2 * 16 * 13 * 4
    assert f'= {cache_bytes:,} bytes' in out


def test_a_chat_model_ends_where_its_answers_end(tmp_path):
    """By default at every token of the template, by --end_token= nowhere, else at this token alone."""
    run = save_model(tmp_path, end_logit=3).folder
    args = ['--start=ab', '--num_samples=4', '--max_new_tokens=60', f'--out={tmp_path / "o.jsonl"}']

    def sample_records(*more):
        sample(run, *args, *more)
        return records(tmp_path / 'o.jsonl')
    assert all(r['over'] == 'end' and '<|' not in r['text'] for r in sample_records())
    assert all(r['over'] == 'length' and len(r['tokens']) == 60 for r in sample_records('--end_token='))
    assert sample_records('--end_token=<|im_end|>\n') == sample_records()  # the others are unlikely in this model
    assert 'length' in [r['over'] for r in sample_records('--end_token=<|im_start|>user\n')]


@pytest.mark.parametrize('num_samples', [1, 2])
def test_stop(tiny_run, num_samples):
    """The first of several stop texts ends a sample, also one that is printed as it is generated."""
    args = ['--start=one', '--max_new_tokens=60', '--temperature=1', '--end_token=']
    text = sampled_text(tiny_run, *args, '--num_samples=1')
    stops = [text[20:23], text[30:34]]
    out = sampled_text(tiny_run, *args, f'--num_samples={num_samples}', *(f'--stop={stop}' for stop in reversed(stops)))
    end = min(text.index(stop, 3) for stop in stops)
    assert out.startswith(text[:end] + '\n')


def test_streaming_never_splits_a_character(chinese_run):
    """A single sample is written to a pipe in many parts, each of whole characters."""
    command = [sys.executable, 'sample.py', f'--out_dir={chinese_run}', '--device=cpu', '--start=满纸',
               '--num_samples=1', '--max_new_tokens=300', '--temperature=1.5', '--end_token=']
    parts = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        while part := os.read(process.stdout.fileno(), 65536):
            parts.append(part)
    assert process.returncode == 0 and len(parts) > 20
    assert '\ufffd' not in ''.join(part.decode() for part in parts)


def test_interactive(tiny_run, monkeypatch):
    """Each line is continued; after one that cannot be continued comes a message and the next line."""
    lines = iter(['one', 'Ω', '', 'two'])

    def typed(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr('builtins.input', typed)
    result = run_script('sample.py', f'--out_dir={tiny_run}', '--device=cpu', '--interactive', '--max_new_tokens=5')
    assert result.code == 0
    assert "'Ω' (U+03A9)" in result.err and 'no text to continue' in result.err
    assert result.out.split('bytes\n')[1].startswith('one') and '\ntwo' in result.out


def test_ctrl_c(chinese_run, tmp_path):
    """Ctrl-C ends the sample; what there is so far is printed and written."""
    command = [sys.executable, 'sample.py', f'--out_dir={chinese_run}', '--device=cpu', '--start=满纸',
               '--num_samples=1', '--max_new_tokens=10000000', f'--out={tmp_path / "o.jsonl"}', '--end_token=']
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while '满纸'.encode() not in os.read(process.stdout.fileno(), 65536):
            pass
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b'')
    record, = records(tmp_path / 'o.jsonl')
    assert record['over'] == 'interrupted' and len(record['text']) > 3


@pytest.mark.parametrize('num_samples, max_new_tokens', [(1, 90000), (64, 80)])
def test_closed_pipe(tiny_run, tmp_path, num_samples, max_new_tokens):
    """`| head` ends sample.py without a message; what there is so far is written to the file."""
    command = (f'{sys.executable} sample.py --out_dir={tiny_run} --device=cpu --start=one --num_samples={num_samples} '
               f'--max_new_tokens={max_new_tokens} --end_token= --logprobs --out={tmp_path / "o.jsonl"} | head -c 2000')
    result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True)
    assert result.stderr == b'' and b' bytes\none' in result.stdout
    assert len(records(tmp_path / 'o.jsonl')) == num_samples


def test_start_that_is_no_utf8(chinese_run):
    """Text in another encoding is refused with one line."""
    command = [sys.executable, 'sample.py', f'--out_dir={chinese_run}', '--device=cpu', b'--start=\xba\xec']
    result = subprocess.run(command, cwd=ROOT, capture_output=True)
    err = result.stderr.decode()
    assert result.returncode == 1 and err.count('\n') == 1 and 'U+DCBA' in err


@pytest.mark.parametrize('skip_unknown', [False, True])
def test_typed_bytes_that_are_no_utf8(chinese_run, skip_unknown):
    """They are refused with one line, or left out; the next line is continued."""
    command = [sys.executable, 'sample.py', f'--out_dir={chinese_run}', '--device=cpu', '--max_new_tokens=3',
               '--interactive', f'--skip_unknown={skip_unknown}']
    result = subprocess.run(command, cwd=ROOT, capture_output=True, input=b'\xba\xec\xe6\xbb\xa1\n' + '纸'.encode(),
                            env={**os.environ, 'PYTHONIOENCODING': 'utf-8:strict'})
    err, shown = result.stderr.decode(), result.stdout.decode().split('bytes\n')[1]
    assert result.returncode == 0 and err.count('\n') == int(not skip_unknown), err
    assert '> 纸' in shown and ('> 满' in shown) == skip_unknown


@pytest.mark.parametrize('batch_size', [1, 2, 3])
def test_separators(tiny_run, tmp_path, batch_size):
    """Several texts have a line between them, in any batches; those of --start come first."""
    (tmp_path / 'p.txt').write_text('one\ntwo\n', encoding='utf-8')
    out = sampled_text(tiny_run, f'--prompts={tmp_path / "p.txt"}', '--start=six', '--num_samples=1',
                       '--max_new_tokens=5', f'--batch_size={batch_size}')
    assert [text[:3] for text in out.split('\n---------------\n')] == ['six', 'one', 'two', '']


def test_logprobs_of_parts_of_characters(chinese_run):
    """--logprobs shows the bytes of a token that is a part of a character."""
    out = sample(chinese_run, '--start=满纸', '--num_samples=2', '--max_new_tokens=40', '--logprobs')
    assert r"b'\x" in out and r'\ufffd' not in out and '\ufffd' not in out


def test_byte_order_mark(tiny_run, tmp_path):
    """A byte-order mark is no part of the text."""
    (tmp_path / 'p.txt').write_text('one', encoding='utf-8-sig')
    for source in (f'--prompts={tmp_path / "p.txt"}', f'--start=FILE:{tmp_path / "p.txt"}'):
        assert sampled_text(tiny_run, source, '--num_samples=1', '--max_new_tokens=5').startswith('one')


def test_stop_at_a_newline(tiny_run):
    r"""A newline in --stop may be typed as \n."""
    args = ['--start=one', '--max_new_tokens=60', '--temperature=1', '--num_samples=1']
    escaped, literal = (sampled_text(tiny_run, *args, f'--stop={stop}') for stop in ('\\n', '\n'))
    assert escaped == literal and escaped.count('\n') == 1


def test_padded_ids_are_never_sampled(tmp_path):
    """The head has rows for ids that the tokenizer lacks; they are not sampled even if they are the most likely."""
    text = ''.join(chr(0x4e00 + i) for i in range(4200)) * 2
    make_dataset(tmp_path / 'd', write(tmp_path / 'x.txt', text), tokenizer='char')
    result = run_script(
        'train.py', f'--dataset={tmp_path / "d"}', f'--out_dir={tmp_path / "o"}', '--device=cpu', '--dtype=float32',
        '--compile=False', '--n_layer=1', '--n_head=1', '--n_embd=8', '--block_size=8', '--batch_size=1',
        '--gradient_accumulation_steps=1', '--eval_iters=1', '--max_iters=1')
    assert result.code == 0, result.err
    checkpoint = torch.load(tmp_path / 'o' / 'ckpt.pt', weights_only=True)
    head, vocab_size = checkpoint['model']['lm_head.weight'], 4201
    assert len(head) == 4224
    head[vocab_size:] = 100 * torch.sign(checkpoint['model']['transformer.ln_f.weight'])
    checkpoint['model']['transformer.wte.weight'] = head
    torch.save(checkpoint, tmp_path / 'o' / 'ckpt.pt')
    for extra in ([], ['--top_k=0'], ['--temperature=0'], ['--top_p=0.9', '--top_k=0']):
        result = run_script('sample.py', f'--ckpt={tmp_path / "o" / "ckpt.pt"}', '--device=cpu', '--num_samples=3',
                            '--max_new_tokens=20', f'--out={tmp_path / "s"}', *extra)
        assert result.code == 0, result.err
        assert max(max(record['tokens']) for record in records(tmp_path / 's')) < vocab_size


@pytest.mark.parametrize('args, names', [
    (['--min_p=1.5'], ['min_p=1.5']),
    (['--min_p=-0.1'], ['min_p=-0.1']),
    (['--repetition_penalty=0'], ['repetition_penalty=0']),
    (['--batch_size=0'], ['batch_size=0', 'at least 1']),
    (['--max_new_tokens=0'], ['max_new_tokens=0', 'at least 1']),
    (['--start=oné'], ["'é' (U+00E9)", '--skip_unknown']),
    (['--end_token=<|im_end|>'], ['end_token=<|im_end|>', '<|endoftext|>']),
    (['--prompts=no.txt'], ['prompts=no.txt', 'No such file', 'UTF-8']),
    (['--prompts={folder}/empty.txt'], ['empty.txt', 'is empty']),
    (['--prompts={folder}/gbk.txt'], ['gbk.txt', 'UTF-8']),
    (['--prompts={folder}/second.txt'], ['second.txt, line 3', "'Ω' (U+03A9)"]),
    (['--prompts={folder}/second.txt', '--skip_unknown'], ['second.txt, line 3', 'no text to continue']),
    (['--interactive'], ['interactive', '--start']),
    (['--out={folder}/none/o.jsonl'], ['o.jsonl', 'no such folder']),
    (['--dtype=int4'], ['dtype=int4', 'int8']),
    (['--out={folder}'], ['out=', 'no regular file']),
    (['--out=/dev/null'], ['out=/dev/null', 'no regular file']),
    (['--seed=99999999999999999999'], ['seed=99999999999999999999', '2**63']),
], ids=lambda x: x[0] if x[0].startswith('--') else '')
def test_bad_input(tiny_run, tmp_path, args, names):
    (tmp_path / 'empty.txt').write_text('\n', encoding='utf-8')
    (tmp_path / 'second.txt').write_text('one\n\nΩ\n', encoding='utf-8')
    (tmp_path / 'gbk.txt').write_bytes('红楼梦'.encode('gbk'))
    args = [arg.replace('{folder}', str(tmp_path)) for arg in args]
    result = run_script('sample.py', f'--out_dir={tiny_run}', '--device=cpu', '--start=one', *args)
    assert result.code == 1 and len(result.err.strip().splitlines()) == 1, result.err
    for name in names:
        assert name in result.err


def test_warnings(tiny_run):
    """A prompt longer than the context, and top_k=0."""
    result = run_script('sample.py', f'--out_dir={tiny_run}', '--device=cpu', '--start=' + 'one two ' * 9 + 'Ω',
                        '--max_new_tokens=3', '--num_samples=1', '--skip_unknown', '--top_k=0')
    assert result.code == 0
    assert result.err == ('top_k=0: drawing from all tokens\n'
                          'the text has 72 tokens, the context of this network 32: its last 32 count\n')
