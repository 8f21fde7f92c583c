"""A chat with a model: limits of its settings, fitting a conversation into the context, streaming the reply."""
import numpy as np

from core.inference.generation import continue_prompts
from core.text.chat_template import end_ids, render

LIMITS = {  # the settings of an answer: smallest and largest value
    'max_new_tokens': (1, 2**31 - 1),
    'temperature': (0.0, 100.0),
    'top_k': (0, 2**31 - 1),
    'top_p': (0.0, 1.0),
    'min_p': (0.0, 1.0),
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
    check_characters(messages, tokenizer)
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
    if size > block_size:
        raise ValueError(f'the prompt has {size:,} tokens, the context of this network {block_size:,}: shorten it')
    kept = [i for i in range(len(messages)) if i not in left_out]
    return np.concatenate([*(parts[i] for i in kept), head]), [messages[i] for i in kept]


def check_characters(messages, tokenizer):
    """Raise ValueError if the messages contain characters that the vocabulary lacks."""
    characters = dict.fromkeys(''.join(message['content'] for message in messages))
    unknown = tokenizer.unknown(''.join(characters))  # each once, so that no name of a special token is among them
    if unknown:
        names = ', '.join(f'{char!r} (U+{ord(char):04X})' for char in unknown[:10])
        more = ', ...' if len(unknown) > 10 else ''
        raise ValueError(f'not in this vocabulary: {names}{more}; write it without')


def stream_reply(model, tokenizer, ids, max_new_tokens, seed, stop_texts=(), **sampling):
    """
    Answer a prompt of fit_into_context(). After every token, yield (text, finish_reason): the new text, which may be
    '', and None until the answer ends. It ends by 'stop' (the end of the turn, any other token of the template, or a
    stop text) or by 'length' (max_new_tokens, or the context is full). seed, sampling: see continue_prompts().
    """
    max_new_tokens = min(max_new_tokens, model.config.block_size + 1 - len(ids))  # the last token is never read
    for (row,) in continue_prompts(model, tokenizer, [ids], max_new_tokens, [seed], end_ids=end_ids(tokenizer),
                                   stop_texts=stop_texts, **sampling):
        yield row.new_text(), 'stop' if row.finish_reason == 'end' else row.finish_reason
