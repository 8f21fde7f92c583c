"""
Instruction tuning, reward model, DPO and GRPO: losses against plain restatements, packed rows against
single documents, an interrupted run against an uninterrupted one, two processes against one.
"""
import copy
import json
import math
import os
import re
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chat_models import save_model
from conftest import ROOT, TINY, TINY_LOADED, exit_line, losses_of, make_dataset, run_script, write
from torch.nn import functional as F

import objectives
from core.text.chat_template import answer_text, end_of_turn
from core.text.conversations import divide, write_folders
from core.text.dataset import open_dataset, pack_documents, shuffled
from core.text.tokenizer import char_tokenizer
from core.training.samples import show_batch, show_samples
from core.weights.vocabulary import resize_vocabulary
from model import GPT, GPTConfig
from objectives import dpo, grpo, next_token, reward

LETTERS = char_tokenizer('\n abcdefghijklmnopqrstuvwxyz')
ENV = SimpleNamespace(device='cpu', device_type='cpu', ddp=False, rank=0, world_size=1, sharded=False, master=True,
                      ctx=nullcontext)


def spell(n):
    """
    Return a short conversation with something to learn: the answer depends on the letter and length of
    the question.
    """
    question = 'ab'[n % 2] * (n % 7 + 1)
    answer = 'ab'[n % 2] + 'cdefghi'[n % 7] * (n % 5 + 1)
    return [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """sft, pairs and prompts of 40 short conversations, one of them in two turns."""
    path = tmp_path_factory.mktemp('chat')
    conversations = [spell(n) for n in range(39)] + [spell(3) + spell(8)]
    pairs = [(messages[:1], messages[1]['content'] + 'x', messages[1]['content']) for messages in conversations[:39]]
    prompts = [messages[:1] for messages in conversations[:39]]
    items = [divide(items, 0.2, 1) for items in (conversations, pairs, prompts)]
    write_folders(str(path), LETTERS, *items, max_tokens=32)
    return path


@pytest.fixture(scope='module')
def base(folder, tmp_path_factory):
    """A folder with a pretrained network without the role tokens (base) and the same one tuned a little (sft)."""
    path = tmp_path_factory.mktemp('runs')
    write(path / 'rewards.py', """def long(prompt, answer, finished):
    assert prompt.startswith('<|im_start|>user\\n') and prompt.endswith('<|im_start|>assistant\\n')
    return len(answer) - 2 * finished
""")
    text = ''.join(f'{messages[0]["content"]} {messages[1]["content"]}\n' for messages in map(spell, range(300)))
    write(path / 'text.py', 'no Python')
    make_dataset(path / 'text', write(path / 'text.txt', text), tokenizer=write(path / 'tokenizer.json', LETTERS.json))
    result = run_script('train.py', *TINY, '--rope_theta=10000.0', f'--dataset={path / "text"}',
                        f'--out_dir={path / "base"}')
    assert result.code == 0, result.err
    result = run_script('train.py', *TINY_LOADED, f'--dataset={folder / "sft"}', f'--init_from={path / "base"}',
                        f'--out_dir={path / "sft"}')
    assert result.code == 0, result.err
    return path


def tiny(**config):
    torch.manual_seed(0)
    shape = {'block_size': 32, 'vocab_size': 40, 'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'dropout': 0.0}
    return GPT(GPTConfig(**{**shape, **config}))


def read_files(folder, name):
    """Return tokens and mask of the training split of a dataset folder."""
    tokens = np.fromfile(folder / name / 'train.bin', '<u2').astype(np.int64)
    return tokens, np.fromfile(folder / name / 'train_mask.bin', np.uint8)

# ----------------------------------------------------------------------------- data


def test_the_example_of_the_contract(folder):
    """The objective in the docstring of objectives/__init__.py runs; with gamma=0 it is next_token."""
    code = textwrap.dedent(objectives.__doc__[objectives.__doc__.index("    '''Next-token"):])
    focal = {}
    exec(code, focal)
    functions = ('start', 'draw', 'fixed', 'load', 'divisor', 'loss', 'measure', 'state', 'MEASURES')
    assert all(name in focal for name in functions)
    data = open_dataset(str(folder / 'sft'))
    model = tiny()
    batch = focal['load'](data, 'train', focal['fixed'](data, 'train', 4, 32), 32)
    plain = next_token.loss(model, batch)
    assert 0 < focal['loss'](model, batch) < plain
    focal['gamma'] = 0.0
    torch.testing.assert_close(focal['loss'](model, batch), plain)


def test_every_answer_counts_once_in_an_epoch_and_nothing_else(folder):
    data = open_dataset(str(folder / 'sft'))
    for T in (32, 50, 64):
        X, Y, _ = next_token.load(data, 'train', next_token.document_rows(data, T), T)
        tokens, mask = read_files(folder, 'sft')
        assert sorted(Y[Y != -1].tolist()) == sorted(tokens[mask == 1].tolist())
    said = [data.tokenizer.decode(row[row != -1]) for row in Y.numpy()]
    assert all(re.fullmatch(r'([a-z]+<\|im_end\|>\n)*', text) for text in said)
    assert ''.join(sorted(''.join(said))) == ''.join(sorted(data.tokenizer.decode(tokens[mask == 1])))


QWEN3_STYLE = {'rope_theta': 10000.0, 'norm': 'rmsnorm', 'activation': 'swiglu', 'qk_norm': True, 'n_kv_head': 1}


@pytest.mark.parametrize('style', [{}, QWEN3_STYLE], ids=['gpt2', 'qwen3'])
def test_a_packed_row_computes_what_its_conversations_alone_do(folder, style):
    data = open_dataset(str(folder / 'sft'))
    model = tiny(**style)
    X, Y, document = batch = next_token.load(data, 'train', next_token.document_rows(data, 32)[:6], 32)
    with torch.no_grad():
        packed = model(*batch)
        for row in range(len(X)):
            for number in document[row].unique():
                here = document[row] == number
                alone = model(X[row, here][None], Y[row, here][None])[0]
                torch.testing.assert_close(packed[row, here], alone)
        assert not torch.allclose(packed, model(X, Y))  # without the document mask


def test_gradients_of_packed_rows_with_checkpointing(folder):
    data = open_dataset(str(folder / 'sft'))
    model = tiny(rope_theta=10000.0)
    batch = next_token.load(data, 'train', next_token.document_rows(data, 32)[:3], 32)
    next_token.loss(model, batch).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing = True
    next_token.loss(model, batch).backward()
    for p, gradient in zip(model.parameters(), gradients):
        torch.testing.assert_close(p.grad, gradient)


def test_a_row_without_targets_adds_zero(folder):
    data = open_dataset(str(folder / 'sft'))
    model = tiny()
    X, Y, document = next_token.load(data, 'train', next_token.document_rows(data, 32)[:2], 32)
    loss = next_token.loss(model, (X, torch.full_like(Y, -1), document))
    loss.backward()
    assert loss.item() == 0 and all((p.grad == 0).all() for p in model.parameters())
    second_row = Y.clone()
    second_row[0] = -1
    expected = model(X, Y, document)[1].sum().item()
    assert next_token.loss(model, (X, second_row, document)).item() == pytest.approx(expected, rel=1e-5)
    assert int(next_token.divisor((X, second_row))) == int((Y[1] != -1).sum())


def test_whole_documents_in_rows(folder):
    data = open_dataset(str(folder / 'pairs'))
    numbers = np.array([5, 0, 3, 9, 12])
    X, Y, document = pack_documents(data, 'train', numbers, 32)
    tokens, mask = read_files(folder, 'pairs')
    for i, number in enumerate(numbers):
        here = document == i
        begin, end = data.starts['train'][number:number + 2]
        assert X[here].tolist() == tokens[begin:end].tolist()
        assert Y[here].tolist() == [*np.where(mask[begin + 1:end], tokens[begin + 1:end], -1), -1]
    assert (Y[document == 5] == -1).all() and X.size(1) <= 32 and len(X) < 5


def test_shuffled_is_a_permutation_each_epoch():
    drawn = np.concatenate([shuffled(10, 4, 1, step) for step in range(10)])
    for epoch in range(4):
        assert sorted(drawn[10 * epoch:10 * epoch + 10]) == list(range(10))
    assert drawn[:10].tolist() != drawn[10:20].tolist()
    assert sorted(shuffled(3, 9, 1, 0)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


# ----------------------------------------------------------------------------- the vocabulary grows


@pytest.mark.parametrize('tied', [True, False])
def test_new_tokens_start_as_the_mean(tied):
    model = tiny(tied=tied)
    before = copy.deepcopy(model)
    idx = torch.arange(20)[None]
    resize_vocabulary(model, 30, 64)
    for new, old in ((model.transformer.wte, before.transformer.wte), (model.lm_head, before.lm_head)):
        torch.testing.assert_close(new.weight[:30], old.weight[:30])
        torch.testing.assert_close(new.weight[30:], old.weight[:30].mean(dim=0).expand(34, -1))
    assert (model.transformer.wte.weight is model.lm_head.weight) == tied and model.config.vocab_size == 64
    torch.testing.assert_close(model(idx)[..., :30], before(idx)[..., :30])

# ----------------------------------------------------------------------------- losses


def test_reward_loss(folder):
    data = open_dataset(str(folder / 'pairs'))
    model = tiny()
    reward.start(model, data, ENV, {'block_size': 32}, {})
    batch = reward.load(data, 'train', np.arange(5), 32)
    assert reward.loss(model, batch).item() == pytest.approx(5 * math.log(2))  # the head starts at 0
    assert reward.measure(model, batch, data)[1].tolist() == [2.5, 5]  # so no answer is better than the other
    torch.nn.init.normal_(model.lm_head.weight)
    margin = reward.margins(model, batch)
    X, _, document, _ = batch
    end = end_of_turn(data.tokenizer)
    scores = []
    for i in range(10):
        ids = X[document == i]
        end_of_answer = (ids == end).nonzero()[1, 0]  # the first one ends the question
        scores.append(model.hidden(ids[None])[0, end_of_answer] @ model.lm_head.weight[0])
    scores = torch.stack(scores)
    torch.testing.assert_close(margin, scores[::2] - scores[1::2])
    torch.testing.assert_close(reward.loss(model, batch), torch.log1p(torch.exp(-margin)).sum())
    swapped = X, batch[1], torch.where(document < 10, document ^ 1, document)
    swapped = reward.with_ends(*swapped)
    torch.testing.assert_close(reward.margins(model, swapped), -margin)
    assert reward.measure(model, batch, data)[1].tolist() == [(margin > 0).sum().item(), 5]


def test_dpo_loss_and_gradients(folder, monkeypatch):
    """
    Against -log sigmoid(beta (log pi(y_w)/ref(y_w) - log pi(y_l)/ref(y_l))), computed from the logits
    of each answer; label smoothing as trl does it.
    """
    monkeypatch.setattr(dpo, 'beta', 0.3)
    monkeypatch.setattr(dpo, 'label_smoothing', 0.1)
    monkeypatch.setattr(dpo, 'TOKENS_AT_ONCE', 0)  # the reference's batches have batch_size pairs
    data = open_dataset(str(folder / 'pairs'))
    model = tiny()
    torch.manual_seed(1)
    base = GPT(model.config)

    def context_of(reference, batch_size):
        config = {'batch_size': batch_size, 'block_size': 32}
        logps = dpo.reference_logps(reference, data, 'train', config, ENV)
        return SimpleNamespace(reference_model=reference, logps={'train': logps})

    batch = dpo.load(data, 'train', np.arange(6), 32, context_of(base, 3))
    dpo.loss(model, batch).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    tokens, mask = read_files(folder, 'pairs')

    def answer_logp(network, number):
        begin, end = data.starts['train'][number:number + 2]
        ids = torch.from_numpy(tokens[begin:end])
        logps = network(ids[None])[0].log_softmax(dim=-1)
        return sum(logps[i - 1, ids[i]] for i in range(1, len(ids)) if mask[begin + i])

    total = 0
    for pair in range(6):
        gains = [answer_logp(model, n) - answer_logp(base, n).detach() for n in (2 * pair, 2 * pair + 1)]
        margin = gains[0] - gains[1]
        total = total - F.logsigmoid(0.3 * margin) * 0.9 - F.logsigmoid(-0.3 * margin) * 0.1
    torch.testing.assert_close(dpo.loss(model, batch), total)
    total.backward()
    for p, gradient in zip(model.parameters(), gradients):
        torch.testing.assert_close(p.grad, gradient, atol=1e-5, rtol=1e-4)

    same = context_of(model, 4)  # the model is its own reference: loss ln 2, margin 0, KL 0
    numbers = dpo.measure(model, dpo.load(data, 'train', np.arange(6), 32, same), data, same)
    assert (numbers[:, 0] / numbers[:, 1]).tolist() == pytest.approx([math.log(2), 0.5, 0, 0])


def test_dpo_measures_the_last_answer(tmp_path):
    """In conversations with several answers KL is the mean over the tokens of the one that is preferred."""
    pairs = [(spell(n) + spell(n + 1)[:1], 'abc', 'zz') for n in range(4)] + [(spell(3)[:1], 'bb', 'c')]
    write_folders(str(tmp_path), LETTERS, {}, {'train': pairs, 'val': []}, {}, max_tokens=64)
    data = open_dataset(str(tmp_path / 'pairs'))
    model, reference = tiny(block_size=64), tiny(block_size=64)
    with torch.no_grad():
        model.lm_head.weight += torch.randn_like(model.lm_head.weight) * 0.1
        context = SimpleNamespace(reference_model=reference, logps={'train': torch.zeros(5, 2)})
        numbers = dpo.measure(model, dpo.load(data, 'train', np.arange(5), 64, context), data, context)
        total, count = 0, 0
        for n in range(0, 10, 2):
            begin, end = data.starts['train'][n:n + 2]
            ids = torch.from_numpy(read_files(tmp_path, 'pairs')[0][begin:end])
            answer = len(data.tokenizer.encode('bb' if n == 8 else 'abc')) + 1  # and the end of the turn
            logps, reference_logps = (m(ids[None, :-1])[0, -answer:].log_softmax(-1) for m in (model, reference))
            total += (logps.exp() * (logps - reference_logps)).sum().item()
            count += answer
    assert numbers[3].tolist() == [pytest.approx(total, rel=1e-4), count]


@pytest.mark.parametrize('name', ['dpo', 'grpo'])
def test_the_reference_is_announced_once(base, folder, tmp_path, name):
    args = f'--out_dir={tmp_path}', '--max_iters=0', '--reference='
    result = run_script(*stage(base, folder, name, *args))
    assert result.code == 0, result.err
    assert result.out.count('loaded ') == 1


def test_epochs_of_conversations(base, folder, tmp_path):
    args = [arg for arg in stage(base, folder, 'dpo', f'--out_dir={tmp_path}') if not arg.startswith('--max_iters')]
    result = run_script(*args, '--epochs=2', '--batch_size=8')
    assert result.code == 0, result.err
    assert ' 8 steps see them 2.06 times' in result.out  # 31 pairs


def test_advantages_have_zero_mean_in_each_group():
    rewards = torch.tensor(np.random.default_rng(0).normal(3, 2, (7, 5)))
    advantage = grpo.advantages(rewards)
    torch.testing.assert_close(advantage.mean(dim=1), torch.zeros(7, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(advantage.std(dim=1), torch.ones(7, dtype=torch.float64), atol=1e-3, rtol=0)
    assert (grpo.advantages(torch.ones(2, 4)) == 0).all()


def test_surrogate(monkeypatch):
    monkeypatch.setattr(grpo, 'clip', 0.2)
    monkeypatch.setattr(grpo, 'kl_coef', 0.5)
    old, advantage = torch.randn(4, 6) - 3, torch.tensor([[1.0], [-2.0], [0.5], [0.0]])
    logps = old.clone().requires_grad_()
    grpo.surrogate(logps, old, old, advantage).sum().backward()
    torch.testing.assert_close(logps.grad, -advantage.expand(4, 6))  # at ratio 1 it is the policy gradient
    far = (old + 1).requires_grad_()  # ratio e: gains are clipped, losses are not
    grpo.surrogate(far, old, far.detach(), advantage).sum().backward()
    torch.testing.assert_close(far.grad, torch.where(advantage > 0, 0.0, -advantage * math.e).expand(4, 6))
    log_ratio = torch.randn(4, 6)
    kl = grpo.surrogate(old, old, old + log_ratio, torch.zeros(4, 1)) / 0.5
    assert (kl >= 0).all()
    torch.testing.assert_close(kl, torch.exp(log_ratio) - log_ratio - 1)


@pytest.fixture
def grpo_set_up(base, folder, monkeypatch):
    """
    (data, model, context) of GRPO with five answers a prompt, two steps per set of answers, and four
    prompts a step.
    """
    settings = {'group_size': 5, 'updates': 2, 'max_new_tokens': 8, 'reward': f'{base / "rewards.py"}:long',
                'reference': str(base / 'sft')}
    for key, value in settings.items():
        monkeypatch.setattr(grpo, key, value)
    data = open_dataset(str(folder / 'prompts'))
    model = tiny(vocab_size=open_dataset(str(folder / 'sft')).vocab_size)
    config = {'dataset': 'prompts', 'init_from': str(base / 'sft'), 'block_size': 32, 'seed': 1, 'batch_size': 2,
              'gradient_accumulation_steps': 2}
    return data, model, grpo.start(model, data, ENV, config, {})


def test_rollouts(grpo_set_up, folder):
    """Packed answers have the log-probabilities of each answer alone; rewards by the function; advantages by group."""
    data, model, context = grpo_set_up
    rows = grpo.draw(data, 4, 32, 1, 0)
    X, Y, old_logps, reference_logps, advantage, document = grpo.load(data, 'train', rows, 32, context)
    assert (old_logps == 0)[Y == -1].all()
    assert X.size(1) <= 32 and len(X) < 20 == document[Y != -1].max() + 1

    tokens, _ = read_files(folder, 'prompts')
    answer_advantages = torch.zeros(20)
    rewards = torch.zeros(20)
    for i in range(20):
        here = document == i
        ids, targets = X[here], Y[here]
        begin, end = data.starts['train'][rows[i // 5, 0]:][:2]
        n = end - begin
        assert ids[:n].tolist() == tokens[begin:end].tolist()
        assert targets[n - 1:-1].tolist() == ids[n:].tolist() and targets[-1] == -1
        for network, logps in ((model, old_logps), (context.reference_model, reference_logps)):
            with torch.no_grad():
                all_logps = torch.log_softmax(network(ids[None])[0], dim=-1)
            expected = all_logps.gather(1, targets.clamp(min=0)[:, None])[:, 0].masked_fill(targets == -1, 0.0)
            torch.testing.assert_close(logps[here], expected, atol=1e-5, rtol=1e-5)
        answer_advantages[i] = advantage[here][0]
        assert (advantage[here] == answer_advantages[i]).all()
        answer = targets[targets != -1].tolist()
        rewards[i] = len(answer_text(data.tokenizer, answer)) - 2 * (answer[-1] == end_of_turn(data.tokenizer))
    expected = grpo.advantages(rewards.view(4, 5)).flatten()
    torch.testing.assert_close(answer_advantages, expected, atol=1e-5, rtol=1e-5)


def test_rollouts_serve_several_steps(grpo_set_up):
    """Two steps get the same answers; then they are dropped, also those that another rank used up before a resume."""
    data, _, context = grpo_set_up
    first = grpo.load(data, 'train', grpo.draw(data, 4, 32, 1, 0), 32, context)
    assert len(context.rollouts) == 4
    second = grpo.load(data, 'train', grpo.draw(data, 4, 32, 1, 1), 32, context)
    assert all(map(torch.equal, first, second)) and not context.rollouts

    context.rollouts = {3: [1, []]}  # restored from a checkpoint, where it was another rank's
    rows = grpo.draw(data, 4, 32, 1, 2)
    grpo.load(data, 'train', rows[:2], 32, context)
    grpo.load(data, 'train', rows[2:], 32, context)
    assert sorted(context.rollouts) == [4, 5, 6, 7]

# ----------------------------------------------------------------------------- through train.py


def stage(base, folder, name, *settings):
    """Return the command of a training stage from the tuned network, without its out_dir."""
    reference = f'--reference={base / "sft"}'
    dataset, rest = {
        'sft': ('sft', ['--dropout=0.1']),
        'reward': ('pairs', ['--objective=reward']),
        'dpo': ('pairs', ['--objective=dpo', '--beta=0.1', reference]),
        'grpo': ('prompts', ['--objective=grpo', '--batch_size=3', '--group_size=3', '--updates=2',
                             '--max_new_tokens=8', f'--reward={base / "rewards.py"}:long', reference]),
        'distill': ('sft', ['--objective=distill', '--on_policy=0.5', f'--teachers={base / "sft"}',
                            f'--init_from={base / "base"}']),
    }[name]
    return ['train.py', *TINY_LOADED, f'--dataset={folder / dataset}', f'--init_from={base / "sft"}', *rest, *settings]


@pytest.mark.parametrize('name', ['sft', 'reward', 'dpo', 'grpo', 'distill'])
def test_each_stage_resumes_exactly(base, folder, tmp_path, name):
    """
    A run stopped after 3 of 6 steps and resumed (GRPO: between two steps of the same answers) ends with
    the weights of an uninterrupted run, bit by bit.
    """
    def train(run, *settings):
        result = run_script(*stage(base, folder, name, f'--out_dir={tmp_path / run}', *settings))
        assert result.code == 0, result.err
        return result.out

    def weights_of(path):
        return torch.load(path / 'ckpt.pt', weights_only=True)['model']

    train('uninterrupted', '--max_iters=6')
    train('resumed', '--max_iters=3', '--lr_decay_iters=100')
    assert 'at step 3' in train('resumed', '--max_iters=6', '--init_from=resume')
    one, two, before = (weights_of(path) for path in (tmp_path / 'uninterrupted', tmp_path / 'resumed', base / 'sft'))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert losses_of(tmp_path / 'uninterrupted') == losses_of(tmp_path / 'resumed')
    assert any(not torch.equal(one[key], before[key]) for key in one if 'lm_head' not in key)  # it has learned


@pytest.mark.parametrize('name', [
    pytest.param('sft', marks=pytest.mark.slow),
    pytest.param('reward', marks=pytest.mark.slow),
    pytest.param('dpo', marks=pytest.mark.slow),
    'grpo',
    'distill',
])
def test_one_process_and_two_take_the_same_first_step(base, folder, tmp_path, name):
    args = ['--max_iters=2', '--log_interval=1', '--gradient_accumulation_steps=2', '--dropout=0.0', '--eval_iters=1']
    one, two = tmp_path / 'one', tmp_path / 'two'
    result = run_script(*stage(base, folder, name, *args, f'--out_dir={one}'))
    assert result.code == 0, result.err
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
               *stage(base, folder, name, *args, f'--out_dir={two}')]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding='utf-8',
                            env={**os.environ, 'OMP_NUM_THREADS': '1'}, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    for column in ('loss', 'grad_norm', 'val_loss'):
        expected = [value for _, value in losses_of(one, column)]
        assert [value for _, value in losses_of(two, column)] == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_grpo_learns_from_a_rule(base, folder, tmp_path):
    result = run_script(*stage(base, folder, 'grpo', '--max_iters=30', '--learning_rate=3e-3', '--lr_decay_iters=30',
                               '--kl_coef=0.0', '--temperature=1.0', '--eval_interval=30', '--batch_size=6',
                               '--group_size=8', f'--out_dir={tmp_path}'))
    assert result.code == 0, result.err
    rewards = losses_of(tmp_path, 'val_reward')
    assert rewards[-1][1] > rewards[0][1] + 1, rewards


def test_a_reward_model(base, folder, tmp_path):
    """It learns to rank, serves as GRPO's reward, and is refused wherever a model must write text."""
    reward_model = tmp_path / 'reward'
    result = run_script(*stage(base, folder, 'reward', '--max_iters=30', '--learning_rate=1e-2', '--eval_interval=30',
                               f'--out_dir={reward_model}'))
    assert result.code == 0 and losses_of(reward_model, 'val_accuracy')[-1][1] > 0.9, result.err
    result = run_script(*stage(base, folder, 'grpo', '--max_iters=1', f'--reward={reward_model}',
                               f'--out_dir={tmp_path / "grpo"}'))
    assert result.code == 0, result.err

    commands = [stage(base, folder, name, f'--reference={reward_model}', f'--out_dir={tmp_path / "x"}')
                for name in ('dpo', 'grpo')]
    commands += [[script, f'--out_dir={reward_model}', '--device=cpu', *args]
                 for script, *args in (('sample.py', '--start=a'), ('evaluate.py',), ('chat.py', '--prompt=a'))]
    for command in commands:
        result = run_script(*command)
        assert result.code == 1 and 'this is a reward model' in result.err, command
        assert result.err.count('\n') == 1, result.err


def read_samples(out_dir):
    return [json.loads(line) for line in (out_dir / 'samples.jsonl').read_text(encoding='utf-8').splitlines()]


def test_samples_and_a_batch_are_shown(base, folder, tmp_path):
    def train(name, *settings):
        result = run_script(*stage(base, folder, name, '--sample_tokens=5', *settings))
        assert result.code == 0, result.err
        return result.out

    start, end = re.escape('<|im_start|>'), re.escape('<|im_end|>')
    prompt = f'{start}user\n[ab]+{end}\n{start}assistant\n'
    settings = ['--sample_interval=2', '--sample_prompts=aa|b', f'--out_dir={tmp_path}']
    out = train('sft', *settings)
    samples = read_samples(tmp_path)
    assert [(sample['step'], sample['prompt']) for sample in samples] == [
        (0, 'aa'), (0, 'b'), (2, 'aa'), (2, 'b'), (4, 'aa'), (4, 'b')]
    assert out.count('sample at step 2: ') == 2
    assert re.search(f'{prompt}⟦[a-z]+{end}\n⟧', out)

    out = train('sft', *settings, '--init_from=resume', '--max_iters=6')
    assert 'sample at step 4' in out
    again = read_samples(tmp_path)  # step 4 is sampled again, and is in the file once
    assert again[:len(samples)] == samples and [sample['step'] for sample in again[len(samples):]] == [6, 6]

    out = train('grpo', '--sample_interval=1', '--sample_prompts=', f'--out_dir={tmp_path / "first"}', '--max_iters=1')
    assert re.search(f'sample at step 1: {prompt}\n', out)


def test_the_shown_row_has_no_padding(folder, capsys):
    """Rows of pairs are padded with a token and document of their own, the last row of a text with its last token."""
    data = open_dataset(str(folder / 'pairs'))
    lengths = np.diff(data.starts['train'])
    numbers = np.array([lengths.argmax(), lengths.argmin()])
    X, Y, document = pack_documents(data, 'train', numbers, lengths.max())
    show_batch((X[1:], Y[1:], document[1:]), data.tokenizer)
    begin, end = data.starts['train'][numbers[1]:][:2]
    tokens = read_files(folder, 'pairs')[0][begin:end]
    assert len(X) == 2 and X.size(1) > len(tokens)
    assert re.sub('[⟦⟧]', '', capsys.readouterr().out.split(':\n', 1)[1]) == data.tokenizer.decode(tokens) + '\n'

    data = open_dataset(str(folder / 'sft'))
    begin, end = data.starts['train'][-2:]
    show_batch(next_token.load(data, 'train', np.array([begin]), 100), data.tokenizer)
    tokens = read_files(folder, 'sft')[0][begin:end]
    assert re.sub('[⟦⟧]', '', capsys.readouterr().out.split(':\n', 1)[1]) == data.tokenizer.decode(tokens) + '\n'


def test_samples_end_where_an_answer_ends(tmp_path):
    """A text, too: where it ends, or where the chat template begins, as in sample.py and chat.py."""
    run = save_model(tmp_path, end_logit=3)
    data = SimpleNamespace(tokenizer=run.tokenizer, kind='')
    show_samples(run.model, data, [('ab', run.tokenizer.encode('ab'))], 60, 0, str(tmp_path), ENV)
    [sample] = read_samples(tmp_path)
    assert len(sample['text']) < 50 and '<|' not in sample['text']


def test_a_sample_prompt_outside_the_vocabulary(base, folder, tmp_path):
    settings = ['--sample_interval=2', '--sample_prompts=Z', f'--out_dir={tmp_path}']
    result = run_script(*stage(base, folder, 'sft', *settings))
    assert result.code == 1 and "not in this vocabulary: 'Z'" in result.err


BAD = {
    'a text for DPO': ('dpo', ['--dataset={base}/text', '--init_from={base}/base'], 'learns from pairs'),
    'pairs for next_token': ('sft', ['--dataset={folder}/pairs'], 'has pairs'),
    'conversations for GRPO': ('grpo', ['--dataset={folder}/sft'], 'needs prompts'),
    'a beta': ('dpo', ['--beta=0'], 'beta=0'),
    'a short context': ('dpo', ['--block_size=16'], 'the longest answer with its prompt'),
    'no such reference': ('dpo', ['--reference={base}/nowhere'], 'nowhere'),
    'no room for answers': ('grpo', ['--max_new_tokens=30'], 'the longest prompt has'),
    'one answer': ('grpo', ['--group_size=1'], 'at least 2'),
    'no reward': ('grpo', ['--reward='], 'expected a reward model'),
    'no reward model': ('grpo', ['--reward={base}/sft'], 'this is no reward model'),
    'no such file': ('grpo', ['--reward=nowhere.py:judge'], 'there is no file nowhere.py'),
    'no such function': ('grpo', ['--reward=' + str(ROOT / 'model.py') + ':judge'], 'has no judge'),
    'no Python': ('grpo', ['--reward={base}/text.py:judge'], 'text.py cannot be read: SyntaxError'),
    'it raises': ('grpo', ['--reward={rewards}:raises'], 'ZeroDivisionError'),
    'NaN': ('grpo', ['--reward={rewards}:nan'], 'a reward is nan'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input(base, folder, tmp_path, case):
    name, settings, says = BAD[case]
    rewards = write(tmp_path / 'rewards.py', """def raises(prompt, answer, finished):
    return 1 / 0


def nan(prompt, answer, finished):
    return float('nan')
""")
    settings = [setting.format(base=base, folder=folder, rewards=rewards) for setting in settings]
    result = run_script(*stage(base, folder, name, *settings, f'--out_dir={tmp_path / "out"}'))
    assert result.code == 1 and says in result.err and result.err.strip().count('\n') == 0, result.err
    assert not (tmp_path / 'out' / 'ckpt.pt').exists()


@pytest.mark.parametrize('name', ['sft', 'reward', 'grpo'])
def test_all_of_a_dataset_is_evaluated(base, folder, tmp_path, name):
    """eval_iters=-1 takes every conversation, pair or prompt, as more rows than there are do."""
    def evaluate(eval_iters):
        settings = ['--eval_only=True', f'--eval_iters={eval_iters}', f'--out_dir={tmp_path}']
        result = run_script(*stage(base, folder, name, *settings))
        return re.search('step 0: .*', result.out)[0]

    def val_numbers(line):
        return re.findall(r'val \w+ [-\d.]+', line)

    everything = evaluate(-1)
    assert val_numbers(everything) == val_numbers(evaluate(1000))
    if name != 'reward':  # whose head is 0, so that all losses are ln 2
        assert everything != evaluate(1)
    if name == 'sft':  # evaluate.py computes the same loss
        loss = re.search(r'val loss ([\d.]+)', everything)[1]
        result = run_script('evaluate.py', f'--init_from={base / "sft"}', f'--data={folder / "sft"}', '--device=cpu',
                            '--dtype=float32')
        assert f'loss {loss}, ' in result.out, result.err


def test_evaluate_refuses_pairs(base, folder):
    result = run_script('evaluate.py', f'--init_from={base / "sft"}', f'--data={folder / "pairs"}', '--device=cpu')
    assert result.code == 1 and 'has pairs' in result.err and result.err.count('\n') == 1


def test_grpo_refuses_fsdp():
    line = exit_line(grpo.start, None, None, SimpleNamespace(sharded=True), {}, {})
    assert 'fsdp' in line and 'ddp' in line
