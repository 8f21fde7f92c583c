"""Conversations: as tokens, by the chat template that a model is taught, and answered by it."""
import numpy as np

from core.text.tokenizer import add_specials

ROLES = ('system', 'user', 'assistant')
START, END = '<|im_start|>', '<|im_end|>'  # ChatML, as Qwen writes it: <|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n...
HEADS = {role: f'{START}{role}\n' for role in ROLES}
JINJA = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")  # the same for transformers and llama.cpp


def chat_tokenizer(tokenizer):
    """
    A tokenizer that can write conversations: itself if it has ChatML's tokens (Qwen's has); else with four appended, each of which stands for the whole
    of what the template puts around a message: a vocabulary of characters may lack the letters of 'user', and a short context has no room for them.
    """
    return tokenizer if can_chat(tokenizer) else add_specials(tokenizer, [*HEADS.values(), f'{END}\n'])


def can_chat(tokenizer):
    """Whether it has the tokens of the chat template."""
    return START in tokenizer.specials or HEADS['user'] in tokenizer.specials


def encode_markup(tokenizer, text):
    """The ids of what the template puts around a message."""
    return tokenizer.encode(text, special=tokenizer.specials)


def end_of_turn(tokenizer):
    """The id that ends a message."""
    return int(encode_markup(tokenizer, f'{END}\n')[0])


def check_messages(messages):
    """ValueError, saying what is wrong, unless these are messages [{'role': ..., 'content': text}, ...]."""
    if not isinstance(messages, list) or not messages:
        raise ValueError('expected a list of messages, at least one')
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get('content'), str):
            raise ValueError('a message: expected {"role": ..., "content": text}')
        if message.get('role') not in ROLES:
            raise ValueError(f'unknown role {message.get("role")!r}: expected {", ".join(ROLES[:-1])} or {ROLES[-1]}')


def render(messages, tokenizer, reply=False):
    """
    A conversation as ids (T,) int64 and its mask (T,) uint8: 1 on what the assistant says and on the token that ends it, which are what a model
    is to learn. reply: ends with the beginning of the assistant's next message. The names of special tokens in a message are ordinary text.
    """
    ids, mask = [], []
    for message in messages:
        head, said, end = encode_markup(tokenizer, HEADS[message['role']]), tokenizer.encode(message['content']), encode_markup(tokenizer, f'{END}\n')
        ids += [head, said, end]
        counts = message['role'] == 'assistant'
        mask += [0] * len(head) + [counts] * (len(said) + 1) + [0] * (len(end) - 1)
    if reply:
        ids.append(encode_markup(tokenizer, HEADS['assistant']))
        mask += [0] * len(ids[-1])
    return np.concatenate(ids), np.array(mask, dtype=np.uint8)


def answer_text(tokenizer, ids):
    """What an answer says: up to the end of the turn, without a character that is not finished yet."""
    end = end_of_turn(tokenizer)
    return tokenizer.decode(ids[:ids.index(end)] if end in ids else ids).rstrip('\ufffd')
