"""evaluate.py against transformers and lm-evaluation-harness, and its refusals."""
import json
import math
import random
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import run_script, write
from test_huggingface import make

from core.inference import scoring
from core.inference.scoring import harness, multiple_choice, read_choices
from core.text.dataset import open_dataset
from core.text.tokenizer import GPT2_SPLIT, bpe_tokenizer, char_tokenizer
from core.weights.checkpoint import load_model, source_tokenizer

WORDS = 'zero one two three four five six seven eight nine'.split()


def evaluate(*args):
    result = run_script('evaluate.py', '--device=cpu', *args)
    assert (result.code, result.err) == (0, ''), result.err
    loss, perplexity, per_byte, per_char = map(float, re.findall(r'loss ([\d.]+), perplexity ([\d.]+), bits per byte ([\d.]+), bits per character ([\d.]+)', result.out)[-1])
    return loss, perplexity, per_byte, per_char, result.out


@pytest.fixture(scope='module')
def text(tmp_path_factory):
    rng = random.Random(1)
    return write(tmp_path_factory.mktemp('text') / 'text.txt', ' '.join(rng.choice(WORDS) for _ in range(200)))


@pytest.mark.parametrize('stride', [0, 5, 32])
def test_loss(tiny_run, text, stride):
    """Of a text file: token by token, each after as many of those before it as its window says."""
    model, source = load_model('resume', str(tiny_run))
    with open(text, encoding='utf-8') as f:
        content = f.read()
    ids = torch.tensor(source_tokenizer(source).encode(content))
    T, step, nats = 32, stride or 32, []
    for i in range(1, len(ids)):
        window = max(0, -(-(i - T) // step)) * step  # the first window that has it
        with torch.no_grad():
            nats.append(-model.eval()(ids[None, window:i])[0, -1].log_softmax(-1)[ids[i]].item())
    loss, perplexity, per_byte, per_char, out = evaluate(f'--out_dir={tiny_run}', f'--data={text}', f'--stride={stride}')
    mean = sum(nats) / len(nats)
    assert loss == pytest.approx(mean, abs=1e-4) and perplexity == pytest.approx(math.exp(mean), abs=1e-2)
    assert per_byte == per_char == pytest.approx(sum(nats) / math.log(2) / (len(content) - 1), abs=1e-4)
    assert f'{len(ids) - 1:,} tokens' in out


def test_the_validation_split(tiny_run, tiny_data):
    """Is the default, whole, as train.py --eval_only has it; and each dtype has a line of its own."""
    wanted = run_script('train.py', f'--init_from={tiny_run}', '--eval_only=True', '--eval_iters=-1', '--device=cpu', '--dtype=float32', '--compile=False', f'--dataset={tiny_data}',
                        '--batch_size=4', '--gradient_accumulation_steps=1', '--block_size=32', '--out_dir=unused')
    expected = float(re.search(r'val loss ([\d.]+)', wanted.out)[1])
    loss, *_, out = evaluate(f'--out_dir={tiny_run}', '--dtype=float32,bfloat16,int8')
    losses = dict(re.findall(r'^(\w+): loss ([\d.]+)', out, re.MULTILINE))
    assert list(losses) == ['float32', 'bfloat16', 'int8']
    for dtype, tolerance in (('float32', 2e-4), ('bfloat16', 5e-3), ('int8', 5e-3)):
        assert float(losses[dtype]) == pytest.approx(expected, abs=tolerance)
    assert f'{open_dataset(str(tiny_data)).splits["val"] - 1:,} tokens' in out


def test_a_hugging_face_folder(tmp_path):
    """GPT-2 as transformers computes it, on a text of several windows."""
    theirs, tokens = make(tmp_path / 'gpt2', 'gpt2'), char_tokenizer(map(chr, range(32, 127)))
    write(tmp_path / 'gpt2' / 'tokenizer.json', tokens.json)
    content = 'to be or not to be ' * 20
    ids = torch.tensor(tokens.encode(content))[None]
    T = theirs.config.n_positions
    with torch.no_grad():
        nats = [torch.nn.functional.cross_entropy(theirs(ids[:, i:i + T]).logits[0, :ids.size(1) - 1 - i], ids[0, i + 1:i + 1 + T], reduction='none') for i in range(0, ids.size(1) - 1, T)]
    loss, _, per_byte, _, _ = evaluate(f'--init_from={tmp_path / "gpt2"}', '--data=' + write(tmp_path / 't.txt', content))
    assert loss == pytest.approx(torch.cat(nats).mean().item(), abs=1e-4)
    assert per_byte == pytest.approx(torch.cat(nats).sum().item() / math.log(2) / (len(content) - len(tokens.pieces[ids[0, 0]])), abs=1e-4)


def questions(folder, n=30):
    rng = random.Random(2)
    items = [{'ctx': ' '.join(rng.choices(WORDS, k=3)), 'endings': [' '.join(rng.choices(WORDS, k=rng.randint(1, 4))) for _ in range(4)], 'label': rng.randrange(4)} for _ in range(n)]
    return items, write(folder / 'q.jsonl', ''.join(json.dumps(item) + '\n' for item in items))


def test_multiple_choice(tiny_run, tmp_path):
    """Against a loop over questions and endings."""
    items, path = questions(tmp_path)
    model, source = load_model('resume', str(tiny_run))
    tokens = source_tokenizer(source)
    right = [0, 0]
    for item in items:
        scores = []
        for ending in item['endings']:
            ids = torch.tensor(tokens.encode(item['ctx'] + ' ' + ending))[-33:]
            with torch.no_grad():
                steps = model.eval()(ids[None, :-1])[0].log_softmax(-1).gather(1, ids[1:, None])
            scores.append(steps[-len(' ' + ending):].sum().item())
        by_length = [score / len(ending) for score, ending in zip(scores, item['endings'])]
        right = [n + (by.index(max(by)) == item['label']) for n, by in zip(right, (scores, by_length))]
    assert multiple_choice(model, tokens, [(item['ctx'], item['endings'], item['label']) for item in items], batch_size=7) == (right[0] / 30, right[1] / 30)
    result = run_script('evaluate.py', f'--out_dir={tiny_run}', '--device=cpu', f'--tasks={path}', '--limit=10')
    assert result.code == 0 and 'q.jsonl: 10 questions, float32: acc 0.' in result.out


def test_an_ending_that_grows_together_with_its_context():
    """'ab' is one token, so 'a' counts with every ending of 'xa', and each ending has something to count."""
    tokens, seen = bpe_tokenizer(['a b'], split=GPT2_SPLIT), []

    def log_likelihoods(model, pairs, batch_size):
        seen.extend(pairs)
        return [(-float(len(ids)), False) for _, ids in pairs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, 'log_likelihoods', log_likelihoods)
        assert multiple_choice(None, tokens, [('xa', ['b', 'cd'], 0)], delimiter='') == (1, 1)
    assert [(tokens.decode(context), tokens.decode(ending)) for context, ending in seen] == [('x', 'ab'), ('x', 'acd')]


def test_hellaswag(tmp_path):
    """Its own lines, put together as the harness does it."""
    utils = pytest.importorskip('lm_eval.tasks.hellaswag.utils')
    item = {'ind': 1, 'activity_label': 'Baking', 'ctx_a': 'A man  stands [substeps] there.', 'ctx_b': 'the man', 'ctx': 'A man stands there. the man', 'label': '1',
            'endings': ['bakes [title] bread.', ' sings.', '[header] runs', 'sleeps  .']}
    expected = utils.process_docs(SimpleNamespace(map=lambda process: process(item)))
    assert read_choices(write(tmp_path / 'h.jsonl', json.dumps(item))) == [(expected['query'], expected['choices'], expected['gold'])]


def test_harness(tiny_run, tmp_path, monkeypatch):
    """lm-evaluation-harness asks the same questions and counts the same; it rolls over a text and lets the network write, too."""
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    items, path = questions(tmp_path)
    write(tmp_path / 'tasks' / 'digits.yaml', f"""task: digits
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {path}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{ctx}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""")
    for name, kind in (('rolling', 'loglikelihood_rolling'), ('writing', 'generate_until')):
        write(tmp_path / 'tasks' / f'{name}.yaml', f"""task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {path}}}}}
validation_split: validation
output_type: {kind}
doc_to_text: "{'' if name == 'rolling' else '{{ctx}}'}"
doc_to_target: "{{{{ctx}}}}"
metric_list: [{{metric: {'bits_per_byte' if name == 'rolling' else 'exact_match'}}}]
""" + 'generation_kwargs: {until: [" "], max_gen_toks: 5}\n' * (name == 'writing'))
    model, source = load_model('resume', str(tiny_run))
    tokens = source_tokenizer(source)
    model.eval()
    results = harness(model, tokens, ['digits', 'rolling', 'writing'], str(tmp_path / 'tasks'))['results']
    acc, acc_norm = multiple_choice(model, tokens, [(item['ctx'], item['endings'], item['label']) for item in items])
    assert (results['digits']['acc,none'], results['digits']['acc_norm,none']) == pytest.approx((acc, acc_norm))
    nats = 0
    for item in items:
        ids = torch.tensor([tokens.eot, *tokens.encode(item['ctx'])])
        with torch.no_grad():
            nats -= model(ids[None, :-1])[0].log_softmax(-1).gather(1, ids[1:, None]).sum().item()
    assert results['rolling']['bits_per_byte,none'] == pytest.approx(nats / math.log(2) / sum(len(item['ctx']) for item in items), abs=1e-4)
    assert 0 <= results['writing']['exact_match,none'] <= 1


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
    ('', ['--lm_eval=no_such_task'], ['no_such_task', 'lm_eval ls tasks']),
    ('task: gone\ndataset_path: json\ndataset_kwargs: {data_files: {validation: gone.jsonl}}\nvalidation_split: validation\noutput_type: multiple_choice\n'
     'doc_to_text: "{{ctx}}"\ndoc_to_choice: "{{endings}}"\ndoc_to_target: "{{label}}"\n', ['--lm_eval=gone', '--lm_eval_folder={folder}'], ['lm_eval=gone', 'cannot be had']),
], ids=lambda x: None)
def test_bad_input(tiny_run, tmp_path, content, args, names):
    path = write(tmp_path / ('task.yaml' if '--lm_eval=gone' in args else 'file'), content)
    result = run_script('evaluate.py', f'--out_dir={tiny_run}', '--device=cpu', *(arg.replace('{file}', path).replace('{folder}', str(tmp_path)) for arg in args))
    assert result.code == 1 and len(result.err.strip().splitlines()) == 1, result.err
    for name in names:
        assert name in result.err
