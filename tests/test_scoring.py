"""core/inference/scoring.py against plain loops and lm-evaluation-harness."""
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import write

from core.inference import scoring
from core.inference.scoring import harness, multiple_choice, read_choices
from core.text.tokenizer import GPT2_SPLIT, bpe_tokenizer
from core.weights.checkpoint import load_model, source_tokenizer

WORDS = 'zero one two three four five six seven eight nine'.split()
N = 30


@pytest.fixture(scope='module')
def items():
    """Questions with four endings."""
    rng = random.Random(2)
    items = []
    for _ in range(N):
        context = ' '.join(rng.choices(WORDS, k=3))
        endings = [' '.join(rng.choices(WORDS, k=rng.randint(1, 4))) for _ in range(4)]
        items.append({'ctx': context, 'endings': endings, 'label': rng.randrange(4)})
    return items


@pytest.fixture(scope='module')
def model_and_tok(tiny_run):
    model, source = load_model('resume', str(tiny_run))
    return model.eval(), source_tokenizer(source)


def as_questions(items):
    return [(item['ctx'], item['endings'], item['label']) for item in items]


def logprobs(model, ids):
    """Return the log-probability of every id but the first, (T - 1,)."""
    ids = torch.tensor(ids)
    with torch.no_grad():
        return model(ids[None, :-1])[0].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)


def test_multiple_choice(model_and_tok, items):
    """Against a loop over questions and endings."""
    model, tok = model_and_tok
    right = right_norm = 0
    for item in items:
        scores = []
        for ending in item['endings']:
            ids = tok.encode(f'{item["ctx"]} {ending}')[-33:]
            scores.append(logprobs(model, ids)[-len(f' {ending}'):].sum().item())
        scores_norm = [score / len(ending) for score, ending in zip(scores, item['endings'])]
        right += scores.index(max(scores)) == item['label']
        right_norm += scores_norm.index(max(scores_norm)) == item['label']
    assert multiple_choice(model, tok, as_questions(items), batch_size=7) == (right / N, right_norm / N)


def test_an_ending_that_grows_together_with_its_context(monkeypatch):
    """'ab' is one token, so the 'a' of 'xa' is counted with every ending, and every ending has a token to count."""
    tok, seen = bpe_tokenizer(['a b'], split=GPT2_SPLIT), []

    def log_likelihoods(model, pairs, batch_size):
        seen.extend((tok.decode(context), tok.decode(ending)) for context, ending in pairs)
        return [(-float(len(ids)), False) for _, ids in pairs]

    monkeypatch.setattr(scoring, 'log_likelihoods', log_likelihoods)
    assert multiple_choice(None, tok, [('xa', ['b', 'cd'], 0)], delimiter='') == (1, 1)
    assert seen == [('x', 'ab'), ('x', 'acd')]


def test_hellaswag(tmp_path):
    """HellaSwag's own lines are put together as in the harness."""
    utils = pytest.importorskip('lm_eval.tasks.hellaswag.utils')
    item = {'ind': 1, 'activity_label': 'Baking', 'ctx_a': 'A man  stands [substeps] there.', 'ctx_b': 'the man',
            'ctx': 'A man stands there. the man', 'label': '1',
            'endings': ['bakes [title] bread.', ' sings.', '[header] runs', 'sleeps  .']}
    expected = utils.process_docs(SimpleNamespace(map=lambda process: process(item)))
    questions = read_choices(write(tmp_path / 'h.jsonl', json.dumps(item)))
    assert questions == [(expected['query'], expected['choices'], expected['gold'])]


TASK = """dataset_path: json
dataset_kwargs: {{data_files: {{validation: {path}}}}}
validation_split: validation
"""
DIGITS = """task: digits
output_type: multiple_choice
doc_to_text: "{{ctx}}"
doc_to_choice: "{{endings}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """task: rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{ctx}}"
metric_list: [{metric: bits_per_byte}]
"""
WRITING = """task: writing
output_type: generate_until
doc_to_text: "{{ctx}}"
doc_to_target: "{{ctx}}"
metric_list: [{metric: exact_match}]
generation_kwargs: {until: [" "], max_gen_toks: 5}
"""


@pytest.fixture(scope='module')
def harness_results(model_and_tok, items, tmp_path_factory):
    """The results of the harness on tasks that choose, that sum over a text, and that generate."""
    pytest.importorskip('lm_eval')
    folder = tmp_path_factory.mktemp('tasks')
    path = write(folder / 'q.jsonl', ''.join(json.dumps(item) + '\n' for item in items))
    for name, task in (('digits', DIGITS), ('rolling', ROLLING), ('writing', WRITING)):
        write(folder / 'tasks' / f'{name}.yaml', TASK.format(path=path) + task)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('HF_HUB_OFFLINE', '1')
        return harness(*model_and_tok, ['digits', 'rolling', 'writing'], str(folder / 'tasks'))['results']


@pytest.mark.slow  # lm_eval alone takes 15 s to import
def test_harness_on_choices(harness_results, model_and_tok, items):
    """It counts the same as multiple_choice()."""
    got = harness_results['digits']['acc,none'], harness_results['digits']['acc_norm,none']
    assert got == pytest.approx(multiple_choice(*model_and_tok, as_questions(items)))


@pytest.mark.slow
def test_harness_on_whole_texts(harness_results, model_and_tok, items):
    model, tok = model_and_tok
    nats = -sum(logprobs(model, [tok.eot, *tok.encode(item['ctx'])]).sum().item() for item in items)
    n_bytes = sum(len(item['ctx']) for item in items)
    assert harness_results['rolling']['bits_per_byte,none'] == pytest.approx(nats / math.log(2) / n_bytes, abs=1e-4)


@pytest.mark.slow
def test_harness_on_generated_texts(harness_results):
    assert 0 <= harness_results['writing']['exact_match,none'] <= 1
