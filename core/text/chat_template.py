"""
The chat template: conversations as tokens. ChatML, as Qwen's models use it:
<|im_start|>user\\nHello!<|im_end|>\\n<|im_start|>assistant\\n...
"""
import numpy as np

from core.text.tokenizer import EOT, add_specials

ROLES = ('system', 'user', 'assistant')
START, END = '<|im_start|>', '<|im_end|>'
HEADS = {role: f'{START}{role}\n' for role in ROLES}

# the same template for transformers and llama.cpp
JINJA = ("{% for message in messages %}"
         "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
         "{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def chat_tokenizer(tokenizer):
    """
    Return a tokenizer that can encode conversations: the tokenizer itself if it has ChatML's tokens (Qwen's has).
    Otherwise append four special tokens: the head of each role and the end of a message, newline included. Whole
    heads, because a vocabulary of characters may lack the letters of 'user', and a short context has no room for them.
    """
    return tokenizer if can_chat(tokenizer) else add_specials(tokenizer, [*HEADS.values(), f'{END}\n'])


def can_chat(tokenizer):
    """Return whether the tokenizer has the tokens of the chat template."""
    return START in tokenizer.specials or HEADS['user'] in tokenizer.specials


def encode_markup(tokenizer, text):
    """Return the ids of a text in which the names of special tokens stand for these tokens."""
    return tokenizer.encode(text, special=tokenizer.specials)


def end_of_turn(tokenizer):
    """Return the id of the token that ends a message."""
    return int(encode_markup(tokenizer, f'{END}\n')[0])


def end_ids(tokenizer):
    """Return the ids at which an answer or a text ends: the end of a text and the tokens of the template."""
    names = (EOT, START, END, f'{END}\n', *HEADS.values())
    return {tokenizer.specials[name] for name in names if name in tokenizer.specials}


def check_messages(messages):
    """Raise ValueError, with the reason, unless messages is [{'role': ..., 'content': text}, ...]."""
    if not isinstance(messages, list) or not messages:
        raise ValueError('expected a list of messages, at least one')
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get('content'), str):
            raise ValueError('a message: expected {"role": ..., "content": text}')
        if message.get('role') not in ROLES:
            expected = f'{", ".join(ROLES[:-1])} or {ROLES[-1]}'
            raise ValueError(f'unknown role {message.get("role")!r}: expected {expected}')


def render(messages, tokenizer, reply=False):
    """
    Return the ids (T,) int64 of a conversation and its mask (T,) uint8.

    The mask is 1 on the assistant's messages and on the token that ends each of them: these are the targets of
    training. reply=True appends the head of the assistant's next message, as the prompt for an answer. The names of
    special tokens in a message are ordinary text.
    """
    ids, mask = [], []

    def add(part, is_target):
        ids.append(part)
        mask.append(np.full(len(part), is_target, dtype=np.uint8))

    end = encode_markup(tokenizer, f'{END}\n')
    for message in messages:
        is_answer = message['role'] == 'assistant'
        add(encode_markup(tokenizer, HEADS[message['role']]), False)
        add(tokenizer.encode(message['content']), is_answer)
        add(end[:1], is_answer)
        add(end[1:], False)  # the newline, where it is a token of its own
    if reply:
        add(encode_markup(tokenizer, HEADS['assistant']), False)
    return np.concatenate(ids), np.concatenate(mask)


def answer_text(tokenizer, ids):
    """Return the text of an answer: up to the end of the turn, and without an incomplete character at its end."""
    end = end_of_turn(tokenizer)
    if end in ids:
        ids = ids[:ids.index(end)]
    return tokenizer.decode(ids).rstrip('\ufffd')
