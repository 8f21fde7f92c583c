"""A chat with a model: limits of its settings, fitting a conversation into the context, streaming the reply."""
import re

import numpy as np

from core.inference.generation import continue_prompts
from core.text.chat_template import encode_markup, end_ids, render

LIMITS = {  # the settings of an answer: smallest and largest value
    'max_new_tokens': (1, 2**31 - 1),
    'temperature': (0.0, 100.0),
    'top_k': (0, 2**31 - 1),
    'top_p': (0.0, 1.0),
    'min_p': (0.0, 1.0),
    'repetition_penalty': (0.01, 100.0),
    'presence_penalty': (-2.0, 2.0),
    'frequency_penalty': (-2.0, 2.0),
    'seed': (0, 2**63 - 1),
}


def check_range(key, value, name=''):
    """Return the value of a setting. Raises ValueError if its type is wrong or it is outside LIMITS, as NaN is."""
    low, high = LIMITS[key]
    if type(value) not in (int, type(low)) or not low <= value <= high:
        expected = 'an int' if type(low) is int else 'a number'
        raise ValueError(f'{name or key}={value!r:.50}: expected {expected}, {low:g} to {high:,}')
    return value


def fit_into_context(messages, tokenizer, block_size, room=None):
    """
    Render a conversation as the prompt for its next answer. Returns token ids (T,) and the messages that they contain.

    messages must have passed check_messages(). room: leave out the oldest exchanges until an answer of this many tokens
    fits too; a system message and the last message always stay. Raises ValueError if no answer can follow.
    """
    if messages[-1]['role'] != 'user':
        raise ValueError("the last message: expected one with the role 'user'")
    check_characters(''.join(message['content'] for message in messages), tokenizer)
    parts = [render([message], tokenizer)[0] for message in messages]
    head = render([], tokenizer, reply=True)[0]
    size = sum(map(len, parts)) + len(head)
    left_out = set()
    if room:
        for i, message in enumerate(messages[:-1]):
            answer_alone = left_out and message['role'] == 'assistant'  # its question is left out
            if size + room <= block_size and not answer_alone:
                break
            if message['role'] != 'system':
                left_out.add(i)
                size -= len(parts[i])
    check_size(size, block_size)
    kept = [i for i in range(len(messages)) if i not in left_out]
    return np.concatenate([*(parts[i] for i in kept), head]), [messages[i] for i in kept]


def encode_prompt(text, tokenizer, block_size):
    """
    Return the ids (T,) of a text to continue, in which the names of special tokens are these tokens. Raises ValueError
    if it does not fit into the context.
    """
    names = sorted(tokenizer.specials, key=len, reverse=True)
    check_characters(''.join(re.split('|'.join(map(re.escape, names)), text)), tokenizer)
    ids = encode_markup(tokenizer, text)
    check_size(len(ids), block_size)
    return ids


def check_size(size, block_size):
    if size > block_size:
        raise ValueError(f'the prompt has {size:,} tokens, the context of this network {block_size:,}: shorten it')


def check_characters(text, tokenizer):
    """Raise ValueError if the text contains characters that the vocabulary lacks."""
    characters = dict.fromkeys(text)
    unknown = tokenizer.unknown(''.join(characters))  # each once, so that no name of a special token is among them
    if unknown:
        names = ', '.join(f'{char!r} (U+{ord(char):04X})' for char in unknown[:10])
        more = ', ...' if len(unknown) > 10 else ''
        raise ValueError(f'not in this vocabulary: {names}{more}; write it without')


def longest_reply(max_new_tokens, n_prompt, block_size):
    """Return the most tokens that an answer to a prompt of n_prompt tokens may have; its last one is never read."""
    return min(max_new_tokens, block_size + 1 - n_prompt)


def reply_rows(model, tokenizer, ids, max_new_tokens, seed, stop_texts=(), **sampling):
    """
    Answer a prompt of fit_into_context() or continue one of encode_prompt(). Yield its Continuation after every token.
    It ends by 'end' (the end of the turn, or any other token of the template), by 'stop' (a stop text) or by 'length'
    (max_new_tokens, or the context is full). seed, sampling: see continue_prompts().
    """
    max_new_tokens = longest_reply(max_new_tokens, len(ids), model.config.block_size)
    for (row,) in continue_prompts(model, tokenizer, [ids], max_new_tokens, [seed], end_ids=end_ids(tokenizer),
                                   stop_texts=stop_texts, **sampling):
        yield row


def finish_reason(row):
    """Return OpenAI's finish_reason of a Continuation: 'stop' or 'length'; None until it ends."""
    return 'stop' if row.finish_reason == 'end' else row.finish_reason


def stream_reply(*args, **kwargs):
    """As reply_rows(), but yield (the new text, which may be '', and OpenAI's finish_reason)."""
    for row in reply_rows(*args, **kwargs):
        yield row.new_text(), finish_reason(row)
