"""core/inference/conversation.py: limits of settings, fitting a chat into the context, streaming a reply."""
import re

import pytest
import torch
from chat_models import CHARS, assistant, each_tokenizer, one_thread, save_model, save_short, system, user

from core.inference.conversation import check_range, fit_into_context, stream_reply
from core.inference.generation import continue_prompts
from core.text.chat_template import END, HEADS, START, answer_text, chat_tokenizer, end_of_turn, render
from core.text.tokenizer import EOT, char_tokenizer
from model import GPT, GPTConfig


@pytest.fixture(scope='module', autouse=True)
def few_threads():
    with one_thread():
        yield


def test_check_range():
    for key, value in (('temperature', 0), ('top_p', 0.5), ('seed', 2**63 - 1)):
        assert check_range(key, value) == value


@pytest.mark.parametrize('key, value', [
    ('temperature', float('nan')), ('top_k', True), ('top_k', 1.0), ('min_p', '0.1'), ('seed', None),
])
def test_out_of_range(key, value):
    with pytest.raises(ValueError, match=key):
        check_range(key, value)


# --- fit_into_context()

TOK = chat_tokenizer(CHARS)
EXCHANGES = [message for i in range(4) for message in (user(f'{i}' * 8), assistant(f'{i}' * 8))]
MESSAGES = [system('s' * 5), *EXCHANGES, user('last')]
SIZE = 7 + 4 * 20 + 6 + 1


def test_size_of_a_conversation():
    ids, kept = fit_into_context(MESSAGES, TOK, block_size=SIZE)
    assert len(ids) == SIZE and kept == MESSAGES


@pytest.mark.parametrize('room, left_out', [(10, 0), (11, 1), (30, 1), (31, 2), (90, 4), (999, 4)])
def test_fit_into_context(room, left_out):
    """The oldest exchanges are left out, no more than necessary; the system message and the last question stay."""
    ids, kept = fit_into_context(MESSAGES, TOK, SIZE + 10, room)
    assert kept == [MESSAGES[0], *MESSAGES[1 + 2 * left_out:]]
    assert ids.tolist() == render(kept, TOK, reply=True)[0].tolist()


@pytest.mark.parametrize('messages, block_size, room, reason', [
    (MESSAGES, SIZE - 1, None, 'shorten'),
    ([user('a' * 90)], 80, 20, '93 tokens'),
    ([assistant('a')], 80, None, 'last message'),
    ([user('é' + EOT + 'é')], 80, None, "'é' (U+00E9)"),
])
def test_what_does_not_fit(messages, block_size, room, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        fit_into_context(messages, TOK, block_size, room)


def test_characters_of_a_special_token_are_text():
    tok = chat_tokenizer(char_tokenizer('ab'))
    with pytest.raises(ValueError, match="'<'.*U"):
        fit_into_context([user(EOT)], tok, 80)


# --- stream_reply()

def final_rows(made, prompts, max_new_tokens, seeds):
    *_, rows = continue_prompts(made.model, made.tokenizer, prompts, max_new_tokens, seeds,
                                end_ids=[end_of_turn(made.tokenizer)])
    return [row.ids for row in rows]


def test_answers_in_a_batch(tmp_path):
    """A seed gives the same answer alone and in a batch; each answer ends with its turn or after 40 tokens."""
    made = save_short(tmp_path / 'm')
    prompts = [render([user(text)], made.tokenizer, reply=True)[0] for text in ('a', '满纸荒唐言', 'who are you?')]
    seeds = [5, [6, 7], 8]
    end = end_of_turn(made.tokenizer)
    together = final_rows(made, prompts, 40, seeds)
    assert len({tuple(ids) for ids in together}) == 3
    assert any(ids[-1] == end for ids in together)
    for prompt, seed, ids in zip(prompts, seeds, together):
        assert final_rows(made, [prompt], 40, [seed]) == [ids]
        assert end not in ids[:-1] and (ids[-1] == end or len(ids) == 40)
    assert final_rows(made, prompts[:1], 40, [9]) != together[:1]


def reply(made, ids, seed, stop_texts=()):
    """Return the text of a reply of at most 30 tokens and its finish_reason, which comes with the last token."""
    steps = list(stream_reply(made.model, made.tokenizer, ids, 30, seed, stop_texts=stop_texts))
    *others, reason = [reason for _, reason in steps]
    assert not any(others)
    return ''.join(text for text, _ in steps), reason


@each_tokenizer
def test_stream_reply(tokenizer, tmp_path):
    """The parts of a reply are its text, without tokens of the template and without halves of characters."""
    made = save_model(tmp_path / 'm', tokenizer, end_logit=0)
    prompt, _ = fit_into_context([user('a')], made.tokenizer, 64)
    reasons = set()
    for seed in range(8):
        text, reason = reply(made, prompt, [seed])
        reasons.add(reason)
        assert '\ufffd' not in text
        ids, = final_rows(made, [prompt], 30, [[seed]])
        ended = ids[-1] == end_of_turn(made.tokenizer)
        if ended or reason == 'length':  # not by another token of the template
            assert text == answer_text(made.tokenizer, ids)
            assert reason == ('stop' if ended else 'length')
    assert reasons == {'stop', 'length'}


@each_tokenizer
def test_stop_texts(tokenizer, tmp_path):
    """A reply ends before a stop text, of which nothing is returned."""
    made = save_model(tmp_path / 'm', tokenizer, end_logit=0)
    prompt, _ = fit_into_context([user('a')], made.tokenizer, 64)
    for seed in range(8):
        text, _ = reply(made, prompt, [seed])
        for stop in {text[2:4], text[3:6], text[5:6]} - {''}:
            assert reply(made, prompt, [seed], ['nowhere', stop]) == (text[:text.index(stop)], 'stop')


@pytest.mark.parametrize('prompt_length, most', [(64, 1), (60, 5)])
def test_a_full_context_ends_a_reply(prompt_length, most, tmp_path):
    """The last token is not read, so it needs no room."""
    made = save_model(tmp_path / 'm')
    ids = [0] * prompt_length
    assert len(list(stream_reply(made.model, made.tokenizer, ids, 30, 1, temperature=0))) <= most


@each_tokenizer
def test_any_token_of_the_template_ends_a_reply(tokenizer, monkeypatch):
    """None of their names is part of it; those that the tokenizer lacks do not matter."""
    model = GPT(GPTConfig(block_size=64, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=8))
    names = [name for name in (EOT, START, END, f'{END}\n', *HEADS.values()) if name in tokenizer.specials]
    assert len(names) == (3 if START in names else 5)
    for name in names:
        ids = [*tokenizer.encode('ab'), tokenizer.specials[name], *tokenizer.encode('c')]
        logits = 99 * torch.eye(tokenizer.vocab_size)[ids]  # the network writes these
        monkeypatch.setattr(model, 'generate', lambda idx, n, choose, *_, logits=logits: map(choose, logits[:, None]))
        assert list(stream_reply(model, tokenizer, [0], 30, 1)) == [('a', None), ('b', None), ('', 'stop')]
