"""
Distillation and ensembles: losses and gradients against torch's kl_div, the mean of probabilities by hand, what the
student writes, and the refusals.
"""
import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, digits_dataset, losses_of, run_script, write
from test_evaluate import RESULT
from test_huggingface import make
from test_objectives import ENV, QWEN3_STYLE, base, folder, stage, tiny  # noqa: F401  # fixtures
from torch.nn import functional as F

from core.inference.generation import continue_prompts
from core.text.chat_template import end_of_turn
from core.text.dataset import open_dataset
from core.weights.checkpoint import load_model
from core.weights.ensemble import Ensemble, mean_logps
from model import GPT, GPTConfig
from objectives import distill, next_token


def network(seed, vocab_size=40, **config):
    torch.manual_seed(seed)
    shape = {'block_size': 32, 'n_layer': 1, 'n_head': 2, 'n_embd': 16, 'dropout': 0.0}
    model = GPT(GPTConfig(vocab_size=vocab_size, **{**shape, **config}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)  # the distributions are far from uniform, and from each other
    return model.double()


def kl(p, q):
    """Return KL(p || q) (...) of log-probabilities (..., V)."""
    return F.kl_div(q, p, reduction='none', log_target=True).sum(dim=-1)


def set_up(monkeypatch, ensemble, **settings):
    for key, value in {**settings, '_ensemble': ensemble}.items():
        monkeypatch.setattr(distill, key, value)

# ----------------------------------------------------------------------------- ensembles


@torch.no_grad()
def test_an_ensemble_is_the_mean_of_softmaxes():
    models = [network(seed, vocab_size) for seed, vocab_size in enumerate((40, 40, 48))]
    idx = torch.randint(40, (3, 20))
    probs = [model(idx)[..., :40].softmax(-1) for model in models]
    torch.testing.assert_close(Ensemble(models)(idx), torch.stack(probs).mean(0).log())
    torch.testing.assert_close(Ensemble(models[:1])(idx), models[0](idx).log_softmax(-1), rtol=0, atol=0)
    ensemble = Ensemble(models)
    hidden = ensemble.hidden(idx)
    probs = [(model(idx)[..., :40] / 3).softmax(-1) for model in models]
    expected = torch.stack(probs).mean(0).log().flatten(0, 1)[5:9]
    torch.testing.assert_close(ensemble.log_probs(hidden, slice(5, 9), temperature=3.0), expected)


def test_the_mean_is_stable():
    """Probabilities that no float holds, whose logs do."""
    logps = torch.tensor([[-1000.0, -1e5], [-1001.0, -1e5]])
    expected = torch.tensor([-1000 + math.log((1 + math.exp(-1)) / 2), -1e5])
    torch.testing.assert_close(mean_logps(logps), expected)
    assert torch.equal(mean_logps(logps[:1]), logps[0])


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A dataset of texts, and two runs on it, of different sizes."""
    path = tmp_path_factory.mktemp('runs')
    digits_dataset(path / 'text')
    for name, *settings in (('a', '--seed=1', '--max_iters=30'), ('b', '--seed=2', '--n_layer=1', '--block_size=48')):
        args = [*TINY, f'--dataset={path / "text"}', f'--out_dir={path / name}', '--learning_rate=1e-2', *settings]
        result = run_script('train.py', *args)
        assert result.code == 0, result.err
    return path


def evaluate(*args):
    result = run_script('evaluate.py', '--device=cpu', *args)
    assert (result.code, result.err) == (0, ''), result.err
    return result.out


@pytest.mark.parametrize('key', ['out_dir', 'init_from'])
def test_evaluate_several(runs, key):
    """The loss of each is that of the network alone; that of the mean is -log of the mean of the probabilities."""
    names = [str(runs / 'a'), str(runs / 'b')]
    args = ['--block_size=32', '--stride=7', '--dtype=float32']
    out = evaluate(f'--{key}={",".join(names)}', *args)
    found = RESULT.findall(out)
    assert len(found) == 3 and f'float32, {names[0]}: loss ' in out and 'float32, mean of 2: loss ' in out
    for numbers, name in zip(found, names):
        assert RESULT.findall(evaluate(f'--{key}={name}', *args)) == [numbers]
    models = [load_model(name)[0].eval() for name in names]
    data = open_dataset(str(runs / 'text'))
    ids = torch.from_numpy(np.fromfile(runs / 'text' / 'val.bin', '<u2').astype(np.int64))
    assert len(ids) == data.splits['val']
    nats = []
    with torch.no_grad():
        for i in range(1, len(ids)):
            start = max(0, math.ceil((i - 32) / 7)) * 7
            probs = [model(ids[None, start:i])[0, -1].softmax(-1)[ids[i]] for model in models]
            nats.append(-(sum(probs) / 2).log().item())
    assert float(found[2][0]) == pytest.approx(sum(nats) / len(nats), abs=1e-4)
    assert float(found[2][0]) <= (float(found[0][0]) + float(found[1][0])) / 2  # by Jensen's inequality


def test_evaluate_several_on_questions(runs, tmp_path):
    """Of two networks where one is certain, the answers are that one's."""
    path = write(tmp_path / 'q.jsonl', '{"ctx": "one two", "endings": ["three", "nine"], "label": 0}\n' * 2)
    out = evaluate(f'--out_dir={runs / "a"},{runs / "b"}', f'--tasks={path}', '--dtype=float32,int8')
    assert out.count('2 questions') == 2

# ----------------------------------------------------------------------------- the loss


@pytest.mark.parametrize('vocab_size', [40, 48])
@pytest.mark.parametrize('temperature, hard_weight', [(1.0, 0.0), (2.5, 0.3), (1.0, 1.0)])
def test_loss_and_gradients(monkeypatch, vocab_size, temperature, hard_weight):
    """
    Against kl_div of the full distributions, in float64 and in chunks of three tokens. Rows of the text and rows of the
    student's own. The student's vocabulary may be padded more than the teachers'.
    """
    student, teachers = network(0, vocab_size), [network(1), network(2, 44)]
    set_up(monkeypatch, Ensemble(teachers, vocab_size), temperature=temperature, hard_weight=hard_weight,
           on_policy=0.5, LOGITS_AT_ONCE=3 * vocab_size)
    X, Y = torch.randint(40, (2, 4, 10))
    Y[1, 4:] = Y[2, :6] = -1
    by_student = torch.tensor([False, False, True, True])[:, None].expand(4, 10)
    found = distill.loss(student, (X, Y, by_student))
    (found * 3).backward()
    gradients = [p.grad / 3 for p in student.parameters()]
    student.zero_grad()

    with torch.no_grad():
        means = torch.stack([(model(X)[..., :40] / temperature).softmax(-1) for model in teachers]).mean(0)
        means /= means.sum(-1, keepdim=True)
    total = 0
    logits = student(X)
    for row in range(4):
        for t in range(10):
            if Y[row, t] == -1:
                continue
            logps = (logits[row, t] / temperature).log_softmax(-1)
            common = logps[:40] - logps[:40].logsumexp(-1)
            one, other = (common, means[row, t].log()) if row >= 2 else (means[row, t].log(), common)
            soft = temperature**2 * (kl(one, other) - logps[:40].logsumexp(-1))
            hard = F.cross_entropy(logits[row, t], Y[row, t])
            total = total + (soft if row >= 2 else (1 - hard_weight) * soft + hard_weight * hard)
    torch.testing.assert_close(found, total)
    total.backward()
    for p, gradient in zip(student.parameters(), gradients):
        torch.testing.assert_close(gradient, p.grad)


def test_the_teacher_itself_has_nothing_to_learn(monkeypatch):
    student = network(0)
    set_up(monkeypatch, Ensemble([copy.deepcopy(student)]), on_policy=0.5)
    X, Y = torch.randint(40, (2, 4, 10))
    loss = distill.loss(student, (X, Y, torch.arange(40).view(4, 10) % 2 == 0))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert all(p.grad.abs().max() < 1e-12 for p in student.parameters())


def test_hard_weight_1_is_next_token(monkeypatch):
    student = network(0)
    set_up(monkeypatch, Ensemble([network(1)]), hard_weight=1.0)
    X, Y = torch.randint(40, (2, 4, 10))
    found = distill.loss(student, (X, Y, torch.zeros(4, 10, dtype=torch.bool)))
    torch.testing.assert_close(found, next_token.loss(student, (X, Y)).double())


def test_conversations(folder, monkeypatch):  # noqa: F811
    """Only answers count, and attention does not cross conversations: packed rows as each conversation alone."""
    data = open_dataset(str(folder / 'sft'))
    student, teacher = network(0, **QWEN3_STYLE), network(1)
    set_up(monkeypatch, Ensemble([teacher]))
    rows = distill.fixed(data, 'train', 4, 32)
    batch = X, Y, document, by_student = distill.load(data, 'train', rows, 32, None)
    assert not by_student.any() and torch.equal(Y, next_token.load(data, 'train', rows[:, 0], 32)[1])
    total = 0
    with torch.no_grad():
        for row in range(4):
            for number in document[row].unique():
                here = document[row] == number
                logps, teacher_logps = (m(X[row, here][None])[0].log_softmax(-1) for m in (student, teacher))
                total += kl(teacher_logps, logps)[Y[row, here] != -1].sum()
        torch.testing.assert_close(distill.loss(student, batch), total)
        numbers = distill.measure(student, batch, data, None)
        torch.testing.assert_close(numbers[1], torch.stack([total, (Y != -1).sum()]))
        torch.testing.assert_close(numbers[[0, 2, 3]], next_token.measure(student, batch[:3], data).double())

# ----------------------------------------------------------------------------- what the student writes


def context_of(student):
    return SimpleNamespace(policy=student, env=ENV, seed=1)


def test_rows_of_the_student_are_spread_evenly(tiny_data, monkeypatch):
    data = open_dataset(str(tiny_data))
    for share in (0.0, 0.25, 0.3, 1.0):
        monkeypatch.setattr(distill, 'on_policy', share)
        drawn = np.concatenate([distill.draw(data, 8, 32, 1, step) for step in range(10)])
        assert (drawn[:, 0] == np.concatenate([next_token.draw(data, 8, 32, 1, step) for step in range(10)])).all()
        own = drawn[:, 1] >= 0
        assert own.sum() == round(80 * share)
        assert (drawn[own, 1] == np.flatnonzero(own)).all()
        assert all(own[i:i + 20].sum() == 20 * share for i in range(0, 80, 20))
    assert (distill.fixed(data, 'val', 5, 32)[:, 1] == -1).all()


@pytest.mark.parametrize('own_tokens', [0, 5, 32])
@pytest.mark.parametrize('style', [{}, {'rope_theta': 10000.0}], ids=['learned', 'rope'])
def test_texts_that_the_student_writes(tiny_data, monkeypatch, own_tokens, style):
    """They begin as the text, and go on as the network alone continues that; only what it writes counts."""
    data = open_dataset(str(tiny_data))
    student = network(0, data.vocab_size, **style).float()
    monkeypatch.setattr(distill, 'on_policy', 0.5)
    monkeypatch.setattr(distill, 'own_tokens', own_tokens)
    rows = distill.draw(data, 6, 32, 1, 3)
    X, Y, by_student = distill.load(data, 'train', rows, 32, context_of(student))
    text, targets = next_token.load(data, 'train', rows[:, 0], 32)
    n = own_tokens or 16
    assert student.training and by_student.sum() == 3 * 32
    for row in range(6):
        if not by_student[row, 0]:
            assert torch.equal(X[row], text[row]) and torch.equal(Y[row], targets[row])
            continue
        prompt = text[row, :33 - n].tolist()
        *_, (written,) = continue_prompts(student.eval(), data.tokenizer, [prompt], n, [[1, int(rows[row, 1]), 0]])
        student.train()
        assert X[row].tolist() == (prompt + written.ids)[:32]
        assert Y[row].tolist() == [-1] * (32 - n) + written.ids
    again = distill.load(data, 'train', rows[3:], 32, context_of(student))
    assert torch.equal(again[0], X[3:])  # whatever the other rows are


def test_answers_that_the_student_writes(folder, monkeypatch):  # noqa: F811
    """The last answer of each conversation is its own, in the place of the other, up to the end of the turn."""
    data = open_dataset(str(folder / 'sft'))
    student = network(0, data.vocab_size, rope_theta=10000.0, block_size=64).float()
    end = end_of_turn(data.tokenizer)
    student.lm_head.weight.data[end] *= 3  # some answers end early
    monkeypatch.setattr(distill, 'on_policy', 1.0)
    rows = distill.draw(data, 6, 64, 1, 0)
    X, Y, document, by_student = distill.load(data, 'train', rows, 64, context_of(student))
    text, targets, same_document = next_token.load(data, 'train', rows[:, 0], 64)
    assert by_student.all() and torch.equal(document, same_document)
    lengths = []
    for row in range(6):
        for number in document[row].unique():
            here = document[row] == number
            x, y, old = X[row, here], Y[row, here], text[row, here]
            answers = np.flatnonzero(targets[row, here] != -1)
            if not len(answers):
                assert (y == -1).all()
                continue
            first = answers[np.r_[True, np.diff(answers) > 1]][-1]  # of the last answer
            own = np.flatnonzero(y != -1)
            assert own[0] == first and (np.diff(own) == 1).all() and own[-1] <= answers[-1]
            assert torch.equal(x[:first + 1], old[:first + 1])
            ids = y[own].tolist()
            assert x[first + 1:first + 1 + len(ids)].tolist() == ids[:len(x) - first - 1]
            assert end not in ids[:-1] and (ids[-1] == end or own[-1] == answers[-1])
            lengths.append(len(ids) - (answers[-1] + 1 - first))
    assert min(lengths) < 0 == max(lengths)

# ----------------------------------------------------------------------------- through train.py


def distilled(runs, out_dir, *settings):
    args = [*TINY, f'--dataset={runs / "text"}', f'--out_dir={out_dir}', '--objective=distill', '--eval_interval=20',
            '--learning_rate=1e-2', '--block_size=32', f'--teachers={runs / "a"},{runs / "b"}', *settings]
    result = run_script('train.py', *args)
    assert result.code == 0, result.err
    return result.out


@pytest.mark.parametrize('on_policy', [0.0, 0.5])
def test_a_student_comes_nearer_to_its_teachers(runs, tmp_path, on_policy):
    out = distilled(runs, tmp_path, '--max_iters=60', f'--on_policy={on_policy}', '--temperature=2', '--batch_size=8',
                    '--sample_interval=30', '--sample_tokens=5')
    kls = [value for _, value in losses_of(tmp_path, 'val_kl')]
    assert kls[-1] < 0.3 * kls[0]
    losses = dict(losses_of(tmp_path, 'val_loss'))
    assert losses[60] < losses[0]
    mean = float(RESULT.findall(evaluate(f'--out_dir={runs / "a"},{runs / "b"}', '--block_size=32'))[-1][0])
    assert losses[60] == pytest.approx(mean, abs=0.4)
    assert 'val loss' in out and 'val kl' in out and 'val bpc' in out


def test_resuming_needs_no_teachers(runs, tmp_path):
    """Their names are in the checkpoint; texts that the student writes are those of an uninterrupted run."""
    settings = '--on_policy=0.5', '--dropout=0.1'
    distilled(runs, tmp_path / 'one', '--max_iters=4', *settings)
    distilled(runs, tmp_path / 'two', '--max_iters=2', *settings)
    distilled(runs, tmp_path / 'two', '--max_iters=4', *settings, '--init_from=resume', '--teachers=')
    one, two = (torch.load(tmp_path / name / 'ckpt.pt', weights_only=True)['model'] for name in ('one', 'two'))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.slow
def test_compiled_once(runs, tmp_path):
    """With the logits that the loss needs, and the gradients of the network itself."""
    from test_pipeline import count_graphs
    args = f'--dataset={runs / "text"}', '--objective=distill', f'--teachers={runs / "a"}', '--on_policy=0.5'
    assert count_graphs(tmp_path, *args, '--max_iters=4', '--eval_interval=2') == 1
    distilled(runs, tmp_path / 'eager', f'--teachers={runs / "a"}', '--on_policy=0.5', '--learning_rate=1e-3')
    assert [x for _, x in losses_of(tmp_path)] == pytest.approx([x for _, x in losses_of(tmp_path / 'eager')], rel=1e-4)


@pytest.mark.parametrize('name', ['gpt2', 'qwen3'])
def test_a_hugging_face_teacher(runs, tmp_path, name):
    """The KL of the first evaluation is that of transformers' own logits."""
    data = open_dataset(str(runs / 'text'))
    hf = make(tmp_path / 'teacher', name)
    write(tmp_path / 'teacher' / 'tokenizer.json', data.tokenizer.json)
    distilled(runs, tmp_path / 'out', f'--teachers={tmp_path / "teacher"}', '--block_size=16', '--max_iters=1',
              '--eval_iters=-1')
    torch.manual_seed(1337)
    found = losses_of(tmp_path / 'out', 'val_kl')[-1][1]
    student, _ = load_model(str(tmp_path / 'out'))
    X, Y = next_token.load(data, 'val', next_token.fixed(data, 'val', -1, 16), 16)
    n = data.vocab_size
    with torch.no_grad():
        kls = kl(hf(X).logits[..., :n].log_softmax(-1), student(X).log_softmax(-1))
    assert found == pytest.approx(kls[Y != -1].mean().item(), rel=1e-4)


@pytest.mark.slow
def test_fsdp_equals_one_process(runs, tmp_path):
    import os
    import subprocess
    import sys

    from conftest import ROOT
    args = [*TINY, f'--dataset={runs / "text"}', '--objective=distill', f'--teachers={runs / "a"},{runs / "b"}']
    result = run_script('train.py', *args, f'--out_dir={tmp_path / "one"}')
    assert result.code == 0, result.err
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'train.py', *args,
               '--parallel=fsdp', f'--out_dir={tmp_path / "two"}']
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding='utf-8',
                            env={**os.environ, 'OMP_NUM_THREADS': '1'}, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    for column in ('loss', 'val_loss', 'val_kl'):
        expected = [value for _, value in losses_of(tmp_path / 'one', column)]
        assert [value for _, value in losses_of(tmp_path / 'two', column)] == pytest.approx(expected, rel=1e-5)

# ----------------------------------------------------------------------------- refusals


BAD = {
    'no teachers': ('text', [], ['teachers=: none is given']),
    'an empty list': ('text', ['--teachers=,'], ['teachers=,: none is given']),
    'an empty name': ('text', ['--teachers={a},'], ['one of them is empty']),
    'twice': ('text', ['--teachers={a},{a}'], ['{a} is named twice']),
    'not there': ('text', ['--teachers=nowhere/ckpt.pt'], ['nowhere']),
    'another tokenizer': ('letters', ['--teachers={a}'], ['/text is cut into tokens by another tokenizer (',
                          ' ids) than the text that {a} was trained on (']),
    'a reward model': ('sft', ['--teachers={reward}'], ['{reward}: this is a reward model']),
    'no role tokens': ('sft', ['--teachers={base}'], ['{base}: it has no role tokens']),
    'a short context': ('text', ['--teachers={a}', '--block_size=40'], ['a context of 32', '--block_size=32']),
    'a share': ('text', ['--teachers={a}', '--on_policy=1.5'], ['on_policy=1.5: expected a number in [0, 1]']),
    'a weight': ('text', ['--teachers={a}', '--hard_weight=-1.0'], ['hard_weight=-1.0: expected a number in [0, 1]']),
    'a temperature': ('text', ['--teachers={a}', '--temperature=0.0'], ['temperature=0.0: expected']),
    'a length': ('text', ['--teachers={a}', '--own_tokens=33'], ['own_tokens=33', 'block_size=32']),
    'pairs': ('pairs', ['--teachers={a}'], ['has pairs', 'texts and conversations']),
}


@pytest.fixture(scope='module')
def reward_model(base, folder, tmp_path_factory):  # noqa: F811
    out_dir = tmp_path_factory.mktemp('reward')
    assert run_script(*stage(base, folder, 'reward', '--max_iters=1', f'--out_dir={out_dir}')).code == 0
    return out_dir


@pytest.mark.parametrize('case', BAD)
def test_bad_input(runs, base, folder, reward_model, tmp_path, case):  # noqa: F811
    dataset, settings, says = BAD[case]
    folders = {'text': runs / 'text', 'letters': base / 'text', 'sft': folder / 'sft', 'pairs': folder / 'pairs'}
    names = {'a': runs / 'a', 'base': base / 'base', 'reward': reward_model}
    settings = [setting.format(**names) for setting in settings]
    result = run_script('train.py', *TINY, '--objective=distill', f'--dataset={folders[dataset]}',
                        f'--out_dir={tmp_path / "out"}', *settings)
    assert result.code == 1 and result.err.count('\n') == 1, result.err
    for part in says:
        assert part.format(**names) in result.err
    assert not (tmp_path / 'out' / 'ckpt.pt').exists()


@pytest.mark.parametrize('args, says', [
    (['--out_dir={a},'], 'out_dir={a},: one of them is empty'),
    (['--out_dir='], 'out_dir=: none is given'),
    (['--init_from={a},{letters}'], 'the tokenizer of {letters} ('),
    (['--out_dir={a},{a}'], '{a} is named twice'),
    (['--out_dir={a},{reward}'], '{reward}: this is a reward model'),
    (['--out_dir={a},{b}', '--lm_eval=piqa'], 'one network'),
    (['--out_dir={a},{b}', '--block_size=40'], 'at most 32'),
])
def test_evaluate_refuses(runs, base, reward_model, args, says):  # noqa: F811
    names = {'a': runs / 'a', 'b': runs / 'b', 'letters': base / 'base', 'reward': reward_model}
    result = run_script('evaluate.py', '--device=cpu', *(arg.format(**names) for arg in args))
    assert result.code == 1 and result.err.count('\n') == 1, result.err
    assert says.format(**names) in result.err


def test_fsdp_with_own_text(monkeypatch):
    monkeypatch.setattr(distill, 'on_policy', 0.5)
    with pytest.raises(SystemExit, match='parallel=fsdp: .* use --parallel=ddp'):
        distill.check_settings(SimpleNamespace(kind=''), SimpleNamespace(sharded=True), {'block_size': 32})
