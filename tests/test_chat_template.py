"""core/text/chat_template.py against its definition and the `tokenizers` library."""
import random
import string

import pytest
from chat_models import CHINESE, each_tokenizer

from core.text.chat_template import END, HEADS, ROLES, START, end_ids, end_of_turn, render
from core.text.tokenizer import EOT, char_tokenizer

LETTERS = string.ascii_letters + CHINESE + ' \n.'
FORGED = [END, START, EOT, 'user\n', *HEADS.values(), f'{END}\n', 'a', '满', '<', '|>']
MARKUP = (START, END, EOT, f'{END}\n', *HEADS.values())


def random_conversations(parts):
    """Yield 60 conversations with all roles in any order."""
    rng = random.Random(1)
    for _ in range(60):
        yield [{'role': rng.choice(ROLES), 'content': ''.join(rng.choices(parts, k=rng.randrange(12)))}
               for _ in range(rng.randrange(1, 7))]


def written(messages):
    return ''.join(f'{HEADS[message["role"]]}{message["content"]}{END}\n' for message in messages)


each_text = pytest.mark.parametrize('parts', [LETTERS, FORGED], ids=['text', 'names of special tokens'])


@each_tokenizer
@each_text
def test_ids(tokenizer, parts):
    """The ids decode to ChatML; the names of special tokens in a message are text, and change no role."""
    end = end_of_turn(tokenizer)
    special_ids = {tokenizer.specials[name] for name in MARKUP if name in tokenizer.specials} - {end}
    heads = {role: tokenizer.encode(head, special=tokenizer.specials)[0] for role, head in HEADS.items()}
    for messages in random_conversations(parts):
        ids, mask = render(messages, tokenizer)
        assert (ids.dtype, mask.dtype, ids.shape) == ('int64', 'uint8', mask.shape)
        ids = ids.tolist()
        assert tokenizer.decode(ids) == written(messages)
        assert ids.count(end) == len(messages)
        assert [token for token in ids if token in special_ids] == [heads[message['role']] for message in messages]


@each_tokenizer
@each_text
def test_mask(tokenizer, parts):
    """The mask is 1 exactly on the assistant's messages and the token that ends each."""
    end = end_of_turn(tokenizer)
    for messages in random_conversations(parts):
        answers, answer = [], []
        for token, is_target in zip(*render(messages, tokenizer)):
            if not is_target:
                assert not answer  # the target before it was the end of a turn
            elif token == end:
                answers.append(tokenizer.decode(answer))
                answer = []
            else:
                answer.append(token)
        assert answers == [message['content'] for message in messages if message['role'] == 'assistant']


@each_tokenizer
def test_reply(tokenizer):
    """The prompt for an answer ends with the assistant's head, which is no target."""
    for messages in random_conversations(LETTERS):
        ids, _ = render(messages, tokenizer)
        more, mask = render(messages, tokenizer, reply=True)
        n = len(ids)
        assert more[:n].tolist() == ids.tolist()
        assert tokenizer.decode(more[n:]) == HEADS['assistant'] and not mask[n:].any()


@each_tokenizer
def test_the_same_ids_as_tokenizers(tokenizer):
    """The library, reading the text of a conversation with the same tokenizer.json."""
    from tokenizers import Tokenizer
    peer = Tokenizer.from_str(tokenizer.json)
    for messages in random_conversations(LETTERS):
        expected = peer.encode(written(messages), add_special_tokens=False).ids
        assert render(messages, tokenizer)[0].tolist() == expected


@each_tokenizer
def test_end_ids(tokenizer):
    """A text and an answer end at the end of a text and at any token of the template that the vocabulary has."""
    ends = end_ids(tokenizer)
    assert {tokenizer.specials[EOT], end_of_turn(tokenizer)} < ends
    assert ends == {tokenizer.specials[name] for name in MARKUP if name in tokenizer.specials}


def test_end_ids_of_a_plain_vocabulary():
    tokenizer = char_tokenizer('ab')
    assert end_ids(tokenizer) == {tokenizer.specials[EOT]}
