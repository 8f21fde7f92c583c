"""A chat with a model: fit the conversation into the context, stream the reply, limits of the settings."""
import numpy as np

from core.inference.generation import generate_answers
from core.text.chat_template import END, HEADS, START, answer_text, check_messages, render
from core.text.tokenizer import EOT

LIMITS = {'max_new_tokens': (1, 2**31 - 1), 'temperature': (0.0, 100.0), 'top_k': (0, 2**31 - 1), 'top_p': (0.0, 1.0), 'min_p': (0.0, 1.0), 'seed': (0, 2**63 - 1)}


def check_range(key, value, name=''):
    """The value of a setting of answers; ValueError where it is of the wrong type or out of range, which NaN is, too."""
    low, high = LIMITS[key]
    if type(value) not in {int, type(low)} or not low <= value <= high:
        raise ValueError(f'{name or key}={value!r:.50}: expected {"an int" if type(low) is int else "a number"}, {low:g} to {high:,}')
    return value


def fit_into_context(messages, tokenizer, block_size, room=None):
    """
    The ids (T,) that ask for an answer to a conversation, and the messages that are in them: with `room`, the oldest exchanges are left out until there is
    space for an answer of that many tokens; never a system message or the last message. ValueError, one line, where no answer can follow.
    """
    check_messages(messages)
    if messages[-1]['role'] != 'user':
        raise ValueError("the last message: expected one with the role 'user'")
    unknown = tokenizer.unknown(''.join(dict.fromkeys(''.join(message['content'] for message in messages))))  # each once: no name of a token is left in it
    if unknown:
        raise ValueError(f'not in this vocabulary: {", ".join(f"{char!r} (U+{ord(char):04X})" for char in unknown[:10])}{", ..." * (len(unknown) > 10)}; write it without')
    parts = [render([message], tokenizer)[0] for message in messages]
    head = render([], tokenizer, reply=True)[0]
    size, left = sum(map(len, parts)) + len(head), set()
    for i, message in enumerate(messages[:-1] if room else []):
        if size + room <= block_size and not (left and message['role'] == 'assistant'):  # an answer goes with its question
            break
        if message['role'] != 'system':
            left.add(i)
            size -= len(parts[i])
    if size > block_size:
        raise ValueError(f'the prompt has {size:,} tokens, the context of this network {block_size:,}: shorten it')
    return np.concatenate([part for i, part in enumerate(parts) if i not in left] + [head]), [message for i, message in enumerate(messages) if i not in left]


def stream_reply(model, tokenizer, ids, max_new_tokens, seed, stops=(), **choice):
    """
    The answer to what fit() returned, as it comes: yields after every token the next piece of text, which may be '', and None or why the answer ends here:
    'stop' after its last token, or any other of the template's, and before one of the texts `stops`; 'length' after max_new_tokens and where the context is full.
    seed and choice: see core.text.chat_template.answers.
    """
    ends = {tokenizer.specials.get(name) for name in (EOT, START, END, f'{END}\n', *HEADS.values())}
    most, held, shown = min(max_new_tokens, model.config.block_size + 1 - len(ids)), max(map(len, stops), default=1) - 1, 0
    for (row,) in generate_answers(model, tokenizer, [ids], most, [seed], **choice):
        over = row[-1] in ends
        text = answer_text(tokenizer, row[:-1] if over else row)
        stop = min((text.index(stop) for stop in stops if stop in text), default=None)
        reason = 'stop' if over or stop is not None else 'length' if len(row) == most else None
        settled = len(text[:stop]) if reason else max(shown, len(text) - held)  # what may still become a text to stop at waits
        yield text[shown:settled], reason
        if reason:
            return
        shown = settled
