"""Instruction tuning, reward model, DPO and GRPO: against plain restatements, packed against alone, interrupted against uninterrupted, one process against two."""
import copy
import json
import math
import os
import random
import re
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_LOADED, exit_line, losses_of, make_dataset, run_script, write
from torch.nn import functional as F

from core.text.chat_template import answer_text, chat_tokenizer, end_of_turn, render
from core.text.conversations import divide, prompt_of, read, write_folders
from core.text.dataset import open_dataset, pack_documents, shuffled
from core.text.tokenizer import char_tokenizer
from core.weights.vocabulary import resize_vocabulary
from model import GPT, GPTConfig
from objectives import dpo, grpo, next_token, reward

LETTERS = char_tokenizer('\n abcdefghijklmnopqrstuvwxyz')
RUN = SimpleNamespace(device='cpu', device_type='cpu', ddp=False, rank=0, world_size=1, sharded=False, master=True, ctx=nullcontext)


def spell(n):
    """Something to learn: a count of letters, spelled out."""
    return [{'role': 'user', 'content': f'{"ab"[n % 2] * (n % 7 + 1)}'}, {'role': 'assistant', 'content': f'{"ab"[n % 2]}{"cdefghi"[n % 7] * (n % 5 + 1)}'}]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """sft, pairs and prompts of 40 short conversations, one of them in two turns."""
    path = tmp_path_factory.mktemp('chat')
    conversations = [spell(n) for n in range(39)] + [spell(3) + spell(8)]
    pairs = [(messages[:1], messages[1]['content'] + 'x', messages[1]['content']) for messages in conversations[:39]]
    write_folders(str(path), LETTERS, divide(conversations, 0.2, 1), divide(pairs, 0.2, 1), divide([messages[:1] for messages in conversations[:39]], 0.2, 1), 32)
    return path


@pytest.fixture(scope='module')
def base(folder, tmp_path_factory):
    """A pretrained network without the role tokens, and one that was tuned a little."""
    path = tmp_path_factory.mktemp('runs')
    write(path / 'rewards.py', """def long(prompt, answer, finished):
    assert prompt.startswith('<|im_start|>user\\n') and prompt.endswith('<|im_start|>assistant\\n')
    return len(answer) - 2 * finished
""")
    text = ''.join(f'{messages[0]["content"]} {messages[1]["content"]}\n' for messages in map(spell, range(300)))
    write(path / 'text.py', 'no Python')
    make_dataset(path / 'text', write(path / 'text.txt', text), tokenizer=write(path / 'tokenizer.json', LETTERS.json))
    result = run_script('train.py', *TINY, '--rope_theta=10000.0', f'--dataset={path / "text"}', f'--out_dir={path / "base"}')
    assert result.code == 0, result.err
    result = run_script('train.py', *TINY_LOADED, f'--dataset={folder / "sft"}', f'--init_from={path / "base"}', f'--out_dir={path / "sft"}')
    assert result.code == 0, result.err
    return path


def tiny(**config):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{'block_size': 32, 'vocab_size': 40, 'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'dropout': 0.0, **config}))

# ----------------------------------------------------------------------------- data


def test_every_answer_counts_once_in_an_epoch_and_nothing_else(folder):
    data = open_dataset(str(folder / 'sft'))
    for T in (32, 50, 64):
        X, Y, _ = next_token.load(data, 'train', next_token.document_rows(data, T), T)
        learned = sorted(Y[Y != -1].tolist())
        tokens, mask = np.fromfile(folder / 'sft' / 'train.bin', '<u2'), np.fromfile(folder / 'sft' / 'train_mask.bin', np.uint8)
        assert learned == sorted(tokens[mask == 1].tolist())
    said = [data.tokenizer.decode(row[row != -1]) for row in Y.numpy()]
    assert all(re.fullmatch(r'([a-z]+<\|im_end\|>\n)*', text) for text in said)
    assert ''.join(sorted(''.join(said))) == ''.join(sorted(data.tokenizer.decode(tokens[mask == 1])))


@pytest.mark.parametrize('style', [{}, {'rope_theta': 10000.0, 'norm': 'rmsnorm', 'activation': 'swiglu', 'qk_norm': True, 'n_kv_head': 1}])
def test_a_packed_row_computes_what_its_conversations_alone_do(folder, style):
    data, model = open_dataset(str(folder / 'sft')), tiny(**style)
    X, Y, document = batch = next_token.load(data, 'train', next_token.document_rows(data, 32)[:6], 32)
    with torch.no_grad():
        together, across = model(*batch), model(X, Y)
        for row in range(len(X)):
            for number in document[row].unique():
                place = document[row] == number
                alone = model(X[row, place][None], Y[row, place][None])[0]
                torch.testing.assert_close(together[row, place], alone)
    assert not torch.allclose(together, across)


def test_gradients_of_packed_rows_with_checkpointing(folder, monkeypatch):
    data, model = open_dataset(str(folder / 'sft')), tiny(rope_theta=10000.0)
    batch = next_token.load(data, 'train', next_token.document_rows(data, 32)[:3], 32)
    next_token.loss(model, batch).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    monkeypatch.setattr(GPT, 'gradient_checkpointing', True)
    next_token.loss(model, batch).backward()
    for p, gradient in zip(model.parameters(), gradients):
        torch.testing.assert_close(p.grad, gradient)


def test_a_row_without_targets_adds_zero(folder):
    data, model = open_dataset(str(folder / 'sft')), tiny()
    X, Y, document = next_token.load(data, 'train', next_token.document_rows(data, 32)[:2], 32)
    loss = next_token.loss(model, (X, torch.full_like(Y, -1), document))
    loss.backward()
    assert loss.item() == 0 and all((p.grad == 0).all() for p in model.parameters())
    half = Y.clone()
    half[0] = -1
    assert next_token.loss(model, (X, half, document)).item() == pytest.approx(model(X, Y, document)[1].sum().item(), rel=1e-5)
    assert int(next_token.divisor((X, half))) == int((Y[1] != -1).sum())


def test_whole_documents_in_rows(folder):
    data = open_dataset(str(folder / 'pairs'))
    numbers = np.array([5, 0, 3, 9, 12])
    X, Y, document = pack_documents(data, 'train', numbers, 32)
    tokens, mask, starts = np.fromfile(folder / 'pairs' / 'train.bin', '<u2'), np.fromfile(folder / 'pairs' / 'train_mask.bin', np.uint8), data.starts['train']
    for i, number in enumerate(numbers):
        place, (begin, end) = document == i, starts[number:number + 2]
        assert X[place].tolist() == tokens[begin:end].tolist()
        assert Y[place].tolist() == [*np.where(mask[begin + 1:end], tokens[begin + 1:end].astype(int), -1), -1]
    assert (Y[document == 5] == -1).all() and X.size(1) <= 32 and len(X) < 5


def test_shuffled_is_a_permutation_each_epoch():
    drawn = np.concatenate([shuffled(10, 4, 1, step) for step in range(10)])
    for epoch in range(4):
        assert sorted(drawn[10 * epoch:10 * epoch + 10]) == list(range(10))
    assert drawn[:10].tolist() != drawn[10:20].tolist()
    assert sorted(shuffled(3, 9, 1, 0)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_long_conversations_are_cut_and_counted(tmp_path, capsys):
    long, short = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b' * 50}], spell(1)
    hopeless = [{'role': 'user', 'content': 'a' * 50}, {'role': 'assistant', 'content': 'b'}]
    same = ([{'role': 'user', 'content': 'a'}], 'b' * 30 + 'x', 'b' * 30 + 'y')  # differ where they are cut off
    write_folders(str(tmp_path), LETTERS, {'train': [long, short, hopeless], 'val': []}, {'train': [same, (short[:1], 'b', 'c')], 'val': []},
                  {'train': [hopeless[:1], short[:1]], 'val': []}, 20)
    out = capsys.readouterr().out
    assert 'train 2 conversations' in out and '1 cut' in out and 'train 1 pairs' in out and 'train 1 prompts' in out and out.count('1 left out') == 3
    data = open_dataset(str(tmp_path / 'sft'))
    assert data.longest == 20 and data.starts['train'].tolist()[:2] == [0, 20] and data.splits['val'] == 0


def test_forms_of_conversations(tmp_path):
    right = [{'role': 'user', 'content': 'p'}, {'role': 'assistant', 'content': 'good'}]
    path = write(tmp_path / 'a.jsonl', '\n'.join(json.dumps(record, ensure_ascii=False) for record in [
        {'instruction': '写诗', 'input': '春', 'output': '好'}, {'instruction': 'hi', 'input': '', 'output': 'yo', 'system': 'be brief'},
        {'conversations': [{'from': 'system', 'value': 's'}, {'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'a'}]},
        {'messages': [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}, {'role': 'user', 'content': 'r'}, {'role': 'assistant', 'content': 'b'}]},
        {'prompt': 'p', 'chosen': 'good', 'rejected': 'bad'},
        {'chosen': [{'role': 'user', 'content': 'p'}, {'role': 'assistant', 'content': 'good'}], 'rejected': [{'role': 'user', 'content': 'p'}, {'role': 'assistant', 'content': 'bad'}]},
        {'messages': [{'role': 'user', 'content': 'p'}], 'chosen': 'good', 'rejected': 'bad'},
        {'prompt': 'p', 'messages': right, 'chosen': right, 'rejected': right[:1] + [{'role': 'assistant', 'content': 'bad'}]},
        {'prompt': 'p', 'chosen': right[1:], 'rejected': [{'role': 'assistant', 'content': 'bad'}]}]) + '\n\n')
    alpaca, system, sharegpt, openai, *pairs = read(path)
    assert alpaca == [{'role': 'user', 'content': '写诗\n\n春'}, {'role': 'assistant', 'content': '好'}]
    assert [message['role'] for message in system] == ['system', 'user', 'assistant'] == [message['role'] for message in sharegpt]
    assert prompt_of(openai) == openai[:3]
    assert pairs == [([{'role': 'user', 'content': 'p'}], 'good', 'bad')] * 5
    assert list(read(write(tmp_path / 'a.json', json.dumps([{'prompt': 'p', 'chosen': 'good', 'rejected': 'bad'}])))) == pairs[:1]


@pytest.mark.parametrize('record, says', [
    ({'messages': [{'role': 'user', 'content': 'q'}]}, 'the assistant says nothing'), ({'messages': [{'role': 'robot', 'content': 'q'}]}, "unknown role 'robot'"),
    ({'conversations': [{'from': 'alien', 'value': 'q'}]}, "unknown role 'alien'"), ({'prompt': 'p', 'chosen': 'a', 'rejected': 'a'}, 'are equal'), ({'messages': []}, 'at least one'),
    ({'prompt': 'p', 'chosen': 'a'}, 'rejected: expected'), ({'text': 'q'}, "expected 'messages'"), ([1], 'expected a JSON object'), ({'messages': [{'role': 'user'}]}, 'expected {"role"'),
    ({'messages': [{'role': 'assistant', 'content': 'p'}], 'chosen': 'a', 'rejected': 'b'}, "ends with the assistant's answer"),
    ({'chosen': [{'role': 'user', 'content': 'p'}, {'role': 'assistant', 'content': 'a'}], 'rejected': [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'b'}]}, 'different prompts'),
    ({'prompt': 'p', 'chosen': [{'role': 'user', 'content': 'bye'}], 'rejected': 'b'}, 'chosen: expected'), ({'conversations': ['q']}, 'expected {"role"'), ({'instruction': 'q', 'output': None}, 'expected {"role"')])
def test_bad_records(tmp_path, record, says):
    path = write(tmp_path / 'bad.jsonl', json.dumps(spell(1)[0] | {'messages': spell(1)}) + '\n' + json.dumps(record))
    line = exit_line(lambda: list(read(path)))
    assert 'record 2' in line and says in line
    result = run_script('data/chat/prepare.py', f'--input={path}', f'--name={tmp_path / "x"}')
    assert result.code == 1 and says in result.err and result.err.count('\n') == 1 and not (tmp_path / 'x').exists()

# ----------------------------------------------------------------------------- the vocabulary grows


@pytest.mark.parametrize('tied', [True, False])
def test_new_tokens_start_as_the_mean(tied):
    model = tiny(tied=tied)
    before, idx = copy.deepcopy(model), torch.arange(20)[None]
    resize_vocabulary(model, 30, 64)
    for new, old in ((model.transformer.wte, before.transformer.wte), (model.lm_head, before.lm_head)):
        torch.testing.assert_close(new.weight[:30], old.weight[:30])
        torch.testing.assert_close(new.weight[30:], old.weight[:30].mean(dim=0).expand(34, -1))
    assert (model.transformer.wte.weight is model.lm_head.weight) == tied and model.config.vocab_size == 64
    torch.testing.assert_close(model(idx)[..., :30], before(idx)[..., :30])

# ----------------------------------------------------------------------------- losses


def test_reward_loss(folder):
    data, model = open_dataset(str(folder / 'pairs')), tiny()
    reward.start(model, data, RUN, {'block_size': 32}, {})
    batch = reward.load(data, 'train', np.arange(5), 32)
    assert reward.loss(model, batch).item() == pytest.approx(5 * math.log(2))  # the head starts at 0
    torch.nn.init.normal_(model.lm_head.weight)
    margin = reward.margins(model, batch)
    X, _, document = batch
    end, scores = end_of_turn(data.tokenizer), []
    for i in range(10):
        ids = X[document == i]
        scores.append(model.hidden(ids[None])[0, (ids == end).nonzero()[1, 0]] @ model.lm_head.weight[0])  # the second end is the answer's
    scores = torch.stack(scores)
    torch.testing.assert_close(margin, scores[::2] - scores[1::2])
    torch.testing.assert_close(reward.loss(model, batch), torch.log1p(torch.exp(-margin)).sum())
    swapped = batch[0], batch[1], torch.where(document < 10, document ^ 1, document)
    torch.testing.assert_close(reward.margins(model, swapped), -margin)
    assert reward.measure(model, batch, data)[1].tolist() == [(margin > 0).sum().item(), 5]


def test_dpo_loss_and_gradients(folder, monkeypatch):
    """Against -log sigmoid(beta (log pi(y_w)/ref(y_w) - log pi(y_l)/ref(y_l))), from logits; with label smoothing as trl writes it."""
    monkeypatch.setattr(dpo, 'beta', 0.3)
    monkeypatch.setattr(dpo, 'label_smoothing', 0.1)
    data, model = open_dataset(str(folder / 'pairs')), tiny()
    torch.manual_seed(1)
    base = GPT(model.config)
    context = SimpleNamespace(reference_model=base, logps={'train': dpo.reference_logps(base, data, 'train', {'batch_size': 3, 'block_size': 32}, with_ctx())})
    batch = dpo.load(data, 'train', np.arange(6), 32, context)
    dpo.loss(model, batch).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    def answer_logp(network, number):
        starts, tokens = data.starts['train'], np.fromfile(folder / 'pairs' / 'train.bin', '<u2').astype(np.int64)
        mask = np.fromfile(folder / 'pairs' / 'train_mask.bin', np.uint8)
        ids, counts = torch.from_numpy(tokens[starts[number]:starts[number + 1]]), mask[starts[number]:starts[number + 1]]
        logps = network(ids[None])[0].log_softmax(dim=-1)
        return sum(logps[i - 1, ids[i]] for i in range(1, len(ids)) if counts[i])
    total = 0
    for pair in range(6):
        chosen, rejected = (answer_logp(model, 2 * pair + side) - answer_logp(base, 2 * pair + side).detach() for side in (0, 1))
        logits = chosen - rejected
        total = total - F.logsigmoid(0.3 * logits) * 0.9 - F.logsigmoid(-0.3 * logits) * 0.1
    torch.testing.assert_close(dpo.loss(model, batch), total)
    total.backward()
    for p, gradient in zip(model.parameters(), gradients):
        torch.testing.assert_close(p.grad, gradient, atol=1e-5, rtol=1e-4)
    same = SimpleNamespace(reference_model=model, logps={'train': dpo.reference_logps(model, data, 'train', {'batch_size': 4, 'block_size': 32}, with_ctx())})
    numbers = dpo.measure(model, dpo.load(data, 'train', np.arange(6), 32, same), data, same)
    assert (numbers[:, 0] / numbers[:, 1]).tolist() == pytest.approx([math.log(2), numbers[1, 0].item() / 6, 0, 0], abs=1e-4)


def with_ctx():
    from contextlib import nullcontext
    return SimpleNamespace(**{**vars(RUN), 'ctx': nullcontext})


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
    torch.testing.assert_close(logps.grad, -advantage.expand(4, 6))  # on the spot it is the policy gradient
    far = (old + 1).requires_grad_()  # ratio e: gains are clipped, losses are not
    grpo.surrogate(far, old, far.detach(), advantage).sum().backward()
    torch.testing.assert_close(far.grad, torch.where(advantage > 0, 0.0, -advantage * math.e).expand(4, 6))
    theirs = torch.randn(4, 6) - 3
    kl = grpo.surrogate(old, old, theirs, torch.zeros(4, 1)) / 0.5
    assert (kl >= 0).all()
    torch.testing.assert_close(kl, torch.exp(theirs - old) - (theirs - old) - 1)



def test_rollouts(base, folder, monkeypatch):
    """Packed answers have the log-probabilities that each alone has; rewards by the function, advantages by group; the second step of the same answers gets the same."""
    for key, value in {'group_size': 5, 'updates': 2, 'max_new_tokens': 8, 'reward': f'{base / "rewards.py"}:long', 'reference': str(base / 'sft')}.items():
        monkeypatch.setattr(grpo, key, value)
    data, model = open_dataset(str(folder / 'prompts')), tiny(vocab_size=open_dataset(str(folder / 'sft')).vocab_size)
    config = {'dataset': 'prompts', 'init_from': str(base / 'sft'), 'block_size': 32, 'seed': 1, 'kl_coef': 0.04, 'clip': 0.2, 'temperature': 1.0, 'group_size': 5, 'updates': 2, 'max_new_tokens': 8,
              'batch_size': 2, 'gradient_accumulation_steps': 2}
    context = grpo.start(model, data, RUN, config, {})
    numbers = grpo.draw(data, 4, 32, 1, 0)
    X, Y, old, theirs, advantage, document = batch = grpo.load(data, 'train', numbers, 32, context)
    assert (old == 0)[Y == -1].all() and X.size(1) <= 32 and len(X) < 20 == document[Y != -1].max() + 1
    better = torch.zeros(20)
    for i in range(20):
        place, prompt = document == i, np.fromfile(folder / 'prompts' / 'train.bin', '<u2')[slice(*data.starts['train'][numbers[i // 5, 0]:][:2])]
        ids, targets = X[place], Y[place]
        assert ids[:len(prompt)].tolist() == prompt.tolist() and targets[len(prompt) - 1:-1].tolist() == ids[len(prompt):].tolist() and targets[-1] == -1
        with torch.no_grad():
            for network, logps in ((model, old), (context.reference_model, theirs)):
                told = torch.log_softmax(network(ids[None])[0], dim=-1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
                torch.testing.assert_close(logps[place], torch.where(targets == -1, 0.0, told), atol=1e-5, rtol=1e-5)
        better[i] = advantage[place][0]
        assert (advantage[place] == better[i]).all()
    told = [Y[(document == i) & (Y != -1)].tolist() for i in range(20)]
    rewards = torch.tensor([float(len(answer_text(data.tokenizer, ids)) - 2 * (ids[-1] == end_of_turn(data.tokenizer))) for ids in told])
    torch.testing.assert_close(better, grpo.advantages(rewards.view(4, 5)).flatten(), atol=1e-5, rtol=1e-5)
    assert len(context.rollouts) == 4
    again = grpo.load(data, 'train', grpo.draw(data, 4, 32, 1, 1), 32, context)
    assert all(torch.equal(one, two) for one, two in zip(batch, again)) and not context.rollouts
    context.rollouts = {3: [1, []]}  # another process has used it up before this one was resumed
    grpo.load(data, 'train', grpo.draw(data, 4, 32, 1, 2)[:2], 32, context)
    grpo.load(data, 'train', grpo.draw(data, 4, 32, 1, 2)[2:], 32, context)
    assert sorted(context.rollouts) == [4, 5, 6, 7]

# ----------------------------------------------------------------------------- through train.py


def stage(base, folder, name, *settings):
    """The command of a stage, from the tuned network, but for its out_dir."""
    dataset, rest = {'sft': ('sft', ['--dropout=0.1']), 'reward': ('pairs', ['--objective=reward']), 'dpo': ('pairs', ['--objective=dpo', '--beta=0.1', f'--reference={base / "sft"}']),
                     'grpo': ('prompts', ['--objective=grpo', '--group_size=3', '--updates=2', '--max_new_tokens=8', f'--reward={base / "rewards.py"}:long',
                                          f'--reference={base / "sft"}', '--batch_size=3'])}[name]
    return ['train.py', *TINY_LOADED, f'--dataset={folder / dataset}', f'--init_from={base / "sft"}', *rest, *settings]


@pytest.mark.parametrize('name', ['sft', 'reward', 'dpo', 'grpo'])
def test_each_stage_resumes_exactly(base, folder, tmp_path, name):
    """Interrupted after 3 of 6 steps, for GRPO between two steps of the same answers, and uninterrupted: the same weights, bit by bit."""
    whole = run_script(*stage(base, folder, name, '--max_iters=6', f'--out_dir={tmp_path / "whole"}'))
    assert whole.code == 0, whole.err
    half = run_script(*stage(base, folder, name, '--max_iters=3', '--lr_decay_iters=100', f'--out_dir={tmp_path / "half"}'))
    assert half.code == 0, half.err
    rest = run_script(*stage(base, folder, name, '--max_iters=6', f'--out_dir={tmp_path / "half"}', '--init_from=resume'))
    assert rest.code == 0 and 'at step 3' in rest.out, rest.err
    one, two = (torch.load(tmp_path / run / 'ckpt.pt', weights_only=True) for run in ('whole', 'half'))
    assert all(torch.equal(one['model'][key], two['model'][key]) for key in one['model'])
    assert losses_of(tmp_path / 'whole') == losses_of(tmp_path / 'half')
    assert any(not torch.equal(one['model'][key], torch.load(base / 'sft' / 'ckpt.pt', weights_only=True)['model'].get(key)) for key in one['model'] if 'lm_head' not in key)


@pytest.mark.parametrize('name', ['sft', 'reward', 'dpo', 'grpo'])
def test_one_process_and_two_take_the_same_first_step(base, folder, tmp_path, name):
    numbers = {}
    for processes in (1, 2):
        command = [sys.executable] + ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}'] * (processes > 1)
        settings = ['--max_iters=2', '--log_interval=1', '--gradient_accumulation_steps=2', '--dropout=0.0', '--eval_iters=1', f'--out_dir={tmp_path / str(processes)}']
        result = subprocess.run([*command, *stage(base, folder, name, *settings)], cwd=ROOT, capture_output=True, text=True, encoding='utf-8',
                                env={**os.environ, 'OMP_NUM_THREADS': '1'}, timeout=200)
        assert result.returncode == 0, result.stderr[-3000:]
        numbers[processes] = [losses_of(tmp_path / str(processes), column) for column in ('loss', 'grad_norm', 'val_loss')]
    for one, two in zip(numbers[1], numbers[2]):
        assert [value for _, value in one] == pytest.approx([value for _, value in two], rel=1e-5, abs=1e-7)


def test_learning_from_a_rule_and_from_a_reward_model(base, folder, tmp_path):
    settings = ['--max_iters=30', '--learning_rate=3e-3', '--lr_decay_iters=30', '--kl_coef=0.0', '--temperature=1.0', '--eval_interval=30', '--batch_size=6', '--group_size=8']
    result = run_script(*stage(base, folder, 'grpo', *settings, f'--out_dir={tmp_path / "rule"}'))
    assert result.code == 0, result.err
    rewards = losses_of(tmp_path / 'rule', 'val_reward')
    assert rewards[-1][1] > rewards[0][1] + 1, rewards
    result = run_script(*stage(base, folder, 'reward', '--max_iters=30', '--learning_rate=1e-2', f'--out_dir={tmp_path / "reward"}', '--eval_interval=30'))
    assert result.code == 0 and losses_of(tmp_path / 'reward', 'val_accuracy')[-1][1] > 0.9, result.err
    result = run_script(*stage(base, folder, 'grpo', '--max_iters=1', f'--reward={tmp_path / "reward"}', f'--out_dir={tmp_path / "grpo"}'))
    assert result.code == 0, result.err
    for name in ('dpo', 'grpo'):
        result = run_script(*stage(base, folder, name, f'--reference={tmp_path / "reward"}', f'--out_dir={tmp_path / "x"}'))
        assert result.code == 1 and 'this is a reward model' in result.err and result.err.count('\n') == 1, name
    for script, *args in (('sample.py', '--start=a'), ('evaluate.py',), ('chat.py', '--prompt=a')):
        result = run_script(script, f'--out_dir={tmp_path / "reward"}', '--device=cpu', *args)
        assert result.code == 1 and 'this is a reward model' in result.err and result.err.count('\n') == 1, script


def test_samples_and_a_batch_are_shown(base, folder, tmp_path):
    result = run_script(*stage(base, folder, 'sft', '--sample_interval=2', '--sample_prompts=aa|b', '--sample_tokens=5', f'--out_dir={tmp_path}'))
    assert result.code == 0, result.err
    lines = [json.loads(line) for line in (tmp_path / 'samples.jsonl').read_text(encoding='utf-8').splitlines()]
    assert [(line['step'], line['prompt']) for line in lines] == [(step, prompt) for step in (0, 2, 4) for prompt in ('aa', 'b')]
    assert result.out.count('sample at step 2: ') == 2 and re.search(r'<\|im_start\|>user\n[ab]+<\|im_end\|>\n<\|im_start\|>assistant\n⟦[a-z]+<\|im_end\|>\n⟧', result.out)
    result = run_script(*stage(base, folder, 'sft', '--sample_interval=2', '--sample_prompts=aa|b', '--sample_tokens=5', f'--out_dir={tmp_path}', '--init_from=resume', '--max_iters=6'))
    assert result.code == 0 and 'sample at step 4' in result.out, result.err
    again = [json.loads(line) for line in (tmp_path / 'samples.jsonl').read_text(encoding='utf-8').splitlines()]
    assert again[:len(lines)] == lines and [line['step'] for line in again[len(lines):]] == [6, 6]  # what step 4 wrote stands there once
    result = run_script(*stage(base, folder, 'grpo', '--sample_interval=1', '--sample_prompts=', f'--out_dir={tmp_path / "first"}', '--max_iters=1'))
    assert result.code == 0 and re.search(r'sample at step 1: <\|im_start\|>user\n[ab]+<\|im_end\|>\n<\|im_start\|>assistant\n\n', result.out), result.err
    assert 'Z' in run_script(*stage(base, folder, 'sft', '--sample_interval=2', '--sample_prompts=Z', f'--out_dir={tmp_path}')).err


BAD = {
    'a text for DPO': ('dpo', ['--dataset={base}/text', '--init_from={base}/base'], 'learns from pairs'), 'pairs for next_token': ('sft', ['--dataset={folder}/pairs'], 'has pairs'),
    'conversations for GRPO': ('grpo', ['--dataset={folder}/sft'], 'needs prompts'), 'no room for answers': ('grpo', ['--max_new_tokens=30'], 'the longest prompt has'),
    'no reward': ('grpo', ['--reward='], 'expected a reward model'), 'no such function': ('grpo', ['--reward=' + str(ROOT / 'model.py') + ':judge'], 'has no judge'),
    'no such file': ('grpo', ['--reward=nowhere.py:judge'], 'there is no file nowhere.py'), 'no reward model': ('grpo', ['--reward={base}/sft'], 'this is no reward model'),
    'no Python': ('grpo', ['--reward={base}/text.py:judge'], 'text.py cannot be read: SyntaxError'), 'a beta': ('dpo', ['--beta=0'], 'beta=0'),
    'it raises': ('grpo', ['--reward={rewards}:raises'], 'ZeroDivisionError'), 'NaN': ('grpo', ['--reward={rewards}:nan'], 'a reward is nan'), 'one answer': ('grpo', ['--group_size=1'], 'at least 2'),
    'a short context': ('dpo', ['--block_size=16'], 'the longest answer with its prompt'), 'no such reference': ('dpo', ['--reference={base}/nowhere'], 'nowhere'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input(base, folder, tmp_path, case):
    name, settings, says = BAD[case]
    rewards = write(tmp_path / 'rewards.py', "def raises(prompt, answer, finished):\n    return 1 / 0\n\n\ndef nan(prompt, answer, finished):\n    return float('nan')\n")
    settings = [setting.format(base=base, folder=folder, rewards=rewards) for setting in settings]
    result = run_script(*stage(base, folder, name, *settings, f'--out_dir={tmp_path / "out"}'))
    assert result.code == 1 and says in result.err and result.err.strip().count('\n') == 0, result.err
    assert not (tmp_path / 'out' / 'ckpt.pt').exists()


def test_all_of_a_dataset_is_evaluated(base, folder, tmp_path):
    """eval_iters=-1 takes every pair, prompt and conversation; evaluate.py has the loss that training has."""
    for name in ('sft', 'reward', 'grpo'):
        said = [run_script(*stage(base, folder, name, '--eval_only=True', f'--eval_iters={number}', f'--out_dir={tmp_path}')).out for number in (-1, 1000, 1)]
        lines = [re.search('step 0: .*', out)[0] for out in said]
        assert re.findall(r'val \w+ [-\d.]+', lines[0]) == re.findall(r'val \w+ [-\d.]+', lines[1]) and (name == 'reward' or lines[0] != lines[2]), lines
        if name == 'sft':
            loss = re.search(r'val loss ([\d.]+)', lines[0])[1]
    result = run_script('evaluate.py', f'--init_from={base / "sft"}', f'--data={folder / "sft"}', '--device=cpu', '--dtype=float32')
    assert f'loss {loss}, ' in result.out, result.err
    result = run_script('evaluate.py', f'--init_from={base / "sft"}', f'--data={folder / "pairs"}', '--device=cpu')
    assert result.code == 1 and 'has pairs' in result.err and result.err.count('\n') == 1


def test_grpo_refuses_fsdp():
    line = exit_line(grpo.start, None, None, SimpleNamespace(sharded=True), {}, {})
    assert 'fsdp' in line and 'ddp' in line


def test_random_rendering_is_what_the_library_makes_of_the_text():
    from tokenizers import Tokenizer
    tokenizer, chance = chat_tokenizer(LETTERS), random.Random(1)
    library = Tokenizer.from_str(tokenizer.json)
    for _ in range(20):
        messages = [{'role': chance.choice(('system', 'user', 'assistant')), 'content': ''.join(chance.choices('abc \n', k=chance.randrange(9)))} for _ in range(chance.randrange(1, 5))]
        text = ''.join(f'<|im_start|>{message["role"]}\n{message["content"]}<|im_end|>\n' for message in messages)
        assert render(messages, tokenizer)[0].tolist() == library.encode(text).ids
