"""Conversations and preferences: read the usual JSON forms, and write dataset folders for train.py."""
import collections
import hashlib
import json
import os
import random
import sys

import numpy as np

from core.files import atomic, find, locked_dataset
from core.text.chat_template import chat_tokenizer, check_messages, render
from core.text.documents import json_kind
from core.text.download import progress

ROLE_OF = {'human': 'user', 'gpt': 'assistant', 'chatgpt': 'assistant'}  # ShareGPT's speakers

# ----------------------------------------------------------------------------- reading


def read(path):
    """
    Yield the records of a file: one JSON object a line in .jsonl, a list of them in .json. A conversation is a
    list of messages [{'role', 'content'}, ...], a preference a tuple (messages, chosen, rejected). Exits at a
    record that is neither.
    """
    path = find(path)
    by_line = not path.lower().endswith('.json')
    try:
        with open(path, encoding='utf-8-sig') as f:
            for number, record in numbered_records(f, by_line):
                try:
                    yield parse_record(json.loads(record) if by_line else record)
                except (ValueError, RecursionError) as error:
                    is_json = not isinstance(error, (json.JSONDecodeError, RecursionError))
                    sys.exit(f'{path}, record {number}: {"" if is_json else "not JSON: "}{error}')
    except (OSError, ValueError, RecursionError) as error:
        sys.exit(f'{path}: {error}; expected a .jsonl file, or a .json file with a list')


def numbered_records(f, by_line):
    """Yield (number, record) of an open file: the lines, not parsed yet, or the items of a JSON list."""
    if by_line:
        for number, line in enumerate(f, 1):
            if line.strip():
                yield number, line
        return
    records = json.load(f)
    if not isinstance(records, list):
        raise ValueError(f'{json_kind(records)}, not a list of records')
    yield from enumerate(records, 1)


def parse_record(record):
    """
    Return the messages of a conversation (OpenAI's, ShareGPT's or Alpaca's form, or prompt and completion), or
    (messages, chosen, rejected) of a preference. Raises ValueError if the record has no such form.
    """
    if not isinstance(record, dict):
        raise ValueError(f'expected a JSON object, not {json_kind(record)}')
    if 'chosen' in record or 'rejected' in record:
        return parse_preference(record)
    if 'messages' in record:
        messages = record['messages']
    elif 'conversations' in record:
        messages = sharegpt_messages(record['conversations'])
    elif 'instruction' in record:
        messages = alpaca_messages(record)
    elif 'completion' in record:
        messages = [*prompt_messages(record.get('prompt')),
                    {'role': 'assistant', 'content': answer_of(record, 'completion')}]
    else:
        raise ValueError("expected 'messages' (OpenAI), 'conversations' (ShareGPT), 'instruction' and 'output' "
                         "(Alpaca), 'prompt' and 'completion', or 'chosen' and 'rejected'")
    check_messages(messages)
    if not any(message['role'] == 'assistant' and message['content'] for message in messages):
        raise ValueError('the assistant says nothing in this conversation, so there is nothing to learn')
    return messages


def sharegpt_messages(turns):
    if not isinstance(turns, list):
        raise ValueError(f'conversations: expected a list of turns, not {json_kind(turns)}')
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ('from', 'value')):
            raise ValueError(f'turn {number}: expected {{"from": "human" or "gpt", "value": text}}')
        messages.append({'role': ROLE_OF.get(turn['from'], turn['from']), 'content': turn['value']})
    return messages


def alpaca_messages(record):
    for key in ('instruction', 'input', 'output', 'system'):
        is_optional = key in ('input', 'system')
        if not isinstance(record.get(key), str) and not (is_optional and record.get(key) is None):
            raise ValueError(f'{key}: expected a text, not {json_kind(record.get(key))}')
    messages = []
    if record.get('system'):
        messages.append({'role': 'system', 'content': record['system']})
    question = '\n\n'.join(filter(None, [record['instruction'], record.get('input')]))
    messages.append({'role': 'user', 'content': question})
    messages.append({'role': 'assistant', 'content': record['output']})
    return messages


def prompt_messages(prompt):
    """Return the messages of a prompt, a text or a list of messages. Raises ValueError if it is something else."""
    if isinstance(prompt, str):
        return [{'role': 'user', 'content': prompt}]
    if not isinstance(prompt, list):
        raise ValueError(f'the prompt: expected a text or a list of messages, not {json_kind(prompt)}')
    check_messages(prompt)
    if prompt[-1]['role'] == 'assistant':
        raise ValueError("the prompt ends with the assistant's answer; expected it to end with what is answered")
    return prompt


def parse_preference(record):
    """
    Return (messages, chosen, rejected) of a record. The prompt is in 'messages' or 'prompt', or in front of the
    answers; an answer is a text, a message, or a list of messages that ends with it.
    """
    prompt_of_side = {side: record[side][:-1] for side in ('chosen', 'rejected') if isinstance(record.get(side), list)}
    prompt = prompt_of_side.get('chosen') or record.get('messages', record.get('prompt'))
    messages = prompt_messages(prompt)
    if len(prompt_of_side) == 2 and prompt_of_side['chosen'] != prompt_of_side['rejected']:
        raise ValueError('chosen and rejected answer different prompts')
    chosen = answer_of(record, 'chosen')
    rejected = answer_of(record, 'rejected')
    if chosen == rejected:
        raise ValueError('chosen and rejected are equal, so there is nothing to prefer')
    return messages, chosen, rejected


def answer_of(record, key):
    """
    Return the text of an answer: of a side of a preference, whose list may begin with the prompt, or of a completion.
    Raises ValueError if there is none.
    """
    answer = record.get(key)
    if isinstance(answer, list) and (len(answer) == 1 or (answer and key != 'completion')):
        answer = answer[-1]
    if isinstance(answer, dict) and answer.get('role', 'assistant') == 'assistant':
        answer = answer.get('content')
    if not isinstance(answer, str) or not answer:
        raise ValueError(f'{key}: expected the text of an answer, or a message of the assistant')
    return answer


def prompt_of(messages):
    """Return the messages before the assistant's last one."""
    last = max(i for i, message in enumerate(messages) if message['role'] == 'assistant')
    return messages[:last]


def divide(items, val_fraction, seed):
    """
    Return {'train': [...], 'val': [...]}, the items in their order. Those for validation are drawn by the seed: at
    least one, if there are two or more and val_fraction is not 0.
    """
    if not 0 <= val_fraction < 1:
        sys.exit(f'val_fraction={val_fraction}: expected 0 (no validation split) or a number below 1')
    n_val = 0
    if val_fraction and items:
        n_val = min(len(items) - 1, max(1, round(val_fraction * len(items))))
    is_val = set(random.Random(seed).sample(range(len(items)), n_val))
    return {'train': [item for i, item in enumerate(items) if i not in is_val],
            'val': [item for i, item in enumerate(items) if i in is_val]}

# ----------------------------------------------------------------------------- writing


def write_folders(folder, tokenizer, conversations, preferences, prompts, max_tokens):
    """
    Write the dataset folders `folder`/sft (conversations), /pairs (preferences) and /prompts, those that have items, in
    the tokens of chat_tokenizer(tokenizer).

    conversations, preferences and prompts are {'train': [...], 'val': [...]}, of what read() yields; a
    prompt is a list of messages. Documents are cut after max_tokens. A conversation is left out if
    nothing of an answer remains, a pair if its two sides become equal, and a prompt if it leaves less
    than a quarter of max_tokens for an answer. What is cut and what is left out is counted and printed.
    """
    tokenizer = chat_tokenizer(tokenizer)

    def render_conversation(messages):
        return [render(messages, tokenizer)]

    def render_pair(preference):
        messages, *answers = preference
        return [render([*messages, {'role': 'assistant', 'content': answer}], tokenizer) for answer in answers]

    def render_prompt(messages):
        return [render(messages, tokenizer, reply=True)]

    folders = []
    for kind, name, items, documents_of in (('conversations', 'sft', conversations, render_conversation),
                                            ('pairs', 'pairs', preferences, render_pair),
                                            ('prompts', 'prompts', prompts, render_prompt)):
        if any(items.values()):
            path = os.path.join(folder, name)
            folders.append(build_folder(path, kind, tokenizer, items, documents_of, max_tokens))
    with locked_dataset(folder):
        for built in folders:  # only now: if one of them cannot be built, none is written
            write_folder(*built)


def build_folder(folder, kind, tokenizer, items, documents_of, max_tokens):
    """
    Build the files of a dataset folder in memory, and return write_folder()'s arguments. items is
    {'train': [...], 'val': [...]}, and documents_of(item) returns the documents of an item, [(ids, mask), ...].
    """
    fits_uint16 = tokenizer.vocab_size <= 2**16
    dtype = np.dtype('<u2' if fits_uint16 else '<u4')
    meta = {'kind': kind, 'dtype': 'uint16' if fits_uint16 else 'uint32', 'vocab_size': tokenizer.vocab_size,
            'tokenizer_sha256': hashlib.sha256(tokenizer.json.encode()).hexdigest(),
            'max_tokens': max_tokens, 'longest': 0}
    files = {'tokenizer.json': tokenizer.json.encode(), 'meta.json': b''}
    counts = collections.Counter()
    for split in ('train', 'val'):
        documents = cut_documents(kind, split, items[split], documents_of, max_tokens, counts)
        lengths = [len(ids) for ids, _ in documents]
        starts = np.cumsum([0, *lengths])[:-1]
        ids = np.concatenate([np.zeros(0, dtype), *(ids.astype(dtype) for ids, _ in documents)])
        mask = np.concatenate([np.zeros(0, np.uint8), *(mask.astype(np.uint8) for _, mask in documents)])
        meta['longest'] = max(meta['longest'], max(lengths, default=0))
        meta[split] = {'tokens': len(ids), 'documents': len(documents),
                       'bytes': int(tokenizer.token_bytes()[ids].sum()),
                       'characters': int(tokenizer.token_chars()[ids].sum())}
        files[f'{split}_mask.bin'] = mask.tobytes()
        files[f'{split}_index.bin'] = starts.astype('<u8').tobytes()
        files[f'{split}.bin'] = ids.tobytes()
    files['train.bin'] = files.pop('train.bin')  # written last: readers notice that an older one does not fit meta.json
    if not meta['train']['documents']:
        total = sum(map(len, items.values()))
        sys.exit(f'{folder}: nothing is left to train on: of {total:,} {kind} none fits max_tokens={max_tokens}; '
                 'raise it')
    meta |= counts
    files['meta.json'] = json.dumps(meta, indent=2).encode()
    return folder, files, describe(meta, kind, counts)


def cut_documents(kind, split, items, documents_of, max_tokens, counts):
    """
    Return the documents [(ids, mask), ...] of the items of a split, cut after max_tokens, without those of which
    nothing can be learned then. The items 'cut' and 'left out' are added to `counts`.
    """
    usable = []
    with progress(f'{kind}, {split}', len(items), 'item') as bar:
        for item in items:
            bar.update()
            documents = documents_of(item)
            cut = [(ids[:max_tokens], mask[:max_tokens]) for ids, mask in documents]
            if kind == 'prompts':
                useless = len(documents[0][0]) > max_tokens - max_tokens // 4
            else:
                useless = not all(mask.any() for _, mask in cut)
            if kind == 'pairs' and np.array_equal(cut[0][0], cut[1][0]):
                useless = True
            if useless:
                counts['left out'] += 1
                continue
            is_cut = any(len(ids) > max_tokens for ids, _ in documents)
            counts['cut'] += int(is_cut)
            usable += cut
    return usable


def describe(meta, kind, counts):
    """Return the line that is printed about a folder."""
    parts = []
    for split in ('train', 'val'):
        n_items = meta[split]['documents']
        if kind == 'pairs':
            n_items //= 2
        parts.append(f'{split} {n_items:,} {kind}, {meta[split]["tokens"]:,} tokens')
    line = ', '.join(parts) + f'; the longest has {meta["longest"]:,}'
    for what, number in counts.items():
        if number:
            line += f'; {number:,} {what} (max_tokens={meta["max_tokens"]:,})'
    return line


def write_folder(folder, files, summary):
    """Write the files {name: bytes} of a dataset folder and print the line about it."""
    try:
        os.makedirs(folder, exist_ok=True)
        for name, data in files.items():
            with atomic(os.path.join(folder, name)) as f:
                f.write(data)
    except OSError as error:
        sys.exit(f'{folder}: cannot write the dataset: {error}')
    print(f'{folder}: {summary}')
