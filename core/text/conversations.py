"""Conversations and preferences: reading them in the forms that people keep them in, and writing the dataset folders that train.py learns them from."""
import collections
import hashlib
import json
import os
import random
import sys

import numpy as np

from core.files import atomic, find
from core.text.chat_template import chat_tokenizer, check_messages, render
from core.text.download import progress

SPEAKERS = {'human': 'user', 'user': 'user', 'gpt': 'assistant', 'assistant': 'assistant', 'chatgpt': 'assistant', 'system': 'system'}  # ShareGPT's and ours


def read(path):
    """
    The records of a .jsonl file, one in each line, or of a .json file with a list: yields messages [{'role', 'content'}, ...] of a conversation, or
    (messages, chosen, rejected) of a preference. Ends the script with one line at a record that is neither.
    """
    path = find(path)
    try:
        with open(path, encoding='utf-8-sig') as f:
            if path.lower().endswith('.json'):
                records = json.load(f)
                if not isinstance(records, list):
                    raise ValueError('expected a list of records')
                lines = enumerate(records, 1)
            else:
                lines = ((number, line) for number, line in enumerate(f, 1) if line.strip())
            for number, record in lines:
                try:
                    yield understand(json.loads(record) if isinstance(record, str) else record)
                except (ValueError, TypeError, RecursionError) as error:  # a JSONDecodeError is one
                    sys.exit(f'{path}, record {number}: {error}')
    except (OSError, ValueError) as error:
        sys.exit(f'{path}: {error}; expected a .jsonl file, or a .json file with a list')


def understand(record):
    """What a record says, see read(): Alpaca's, ShareGPT's or OpenAI's form, or a prompt with 'chosen' and 'rejected'. ValueError where it is none."""
    if not isinstance(record, dict):
        raise ValueError('expected a JSON object')
    if 'chosen' in record or 'rejected' in record:
        return preference(record)
    if 'messages' in record:
        messages = record['messages']
    elif 'conversations' in record:
        messages = [{'role': SPEAKERS.get(turn.get('from'), turn.get('from')), 'content': turn.get('value')} if isinstance(turn, dict) else turn
                    for turn in record['conversations']]
    elif 'instruction' in record:
        parts = [record['instruction'], record.get('input') or '']
        messages = [{'role': 'user', 'content': '\n\n'.join(filter(None, parts))}, {'role': 'assistant', 'content': record.get('output')}]
        messages = [{'role': 'system', 'content': record.get('system')}] * bool(record.get('system')) + messages
    else:
        raise ValueError("expected 'messages' (OpenAI), 'conversations' (ShareGPT), 'instruction' and 'output' (Alpaca), or 'chosen' and 'rejected'")
    check_messages(messages)
    if not any(message['role'] == 'assistant' and message['content'] for message in messages):
        raise ValueError('the assistant says nothing in this conversation, so there is nothing to learn')
    return messages


def preference(record):
    """(messages, chosen, rejected) of a record; an answer may be a text, a message, or a list of messages that begins with the prompt."""
    def answer(side):
        said = record.get(side)
        said = said[-1] if isinstance(said, list) and said else said
        said = said.get('content') if isinstance(said, dict) and said.get('role', 'assistant') == 'assistant' else said
        if not isinstance(said, str) or not said:
            raise ValueError(f'{side}: expected the text of an answer')
        return said
    prompt = record['chosen'][:-1] if isinstance(record.get('chosen'), list) else None
    prompt = prompt or record.get('messages', record.get('prompt'))
    messages = [{'role': 'user', 'content': prompt}] if isinstance(prompt, str) else prompt
    check_messages(messages)
    if messages[-1]['role'] == 'assistant':
        raise ValueError("the prompt of a preference ends with the assistant's answer; expected it to end with what is answered")
    if isinstance(record.get('chosen'), list) and isinstance(record.get('rejected'), list) and record['chosen'][:-1] != record['rejected'][:-1]:
        raise ValueError('chosen and rejected answer different prompts')
    chosen, rejected = answer('chosen'), answer('rejected')
    if chosen == rejected:
        raise ValueError('chosen and rejected are equal, so there is nothing to prefer')
    return messages, chosen, rejected


def prompt_of(messages):
    """A conversation up to the assistant's last message."""
    last = max(i for i, message in enumerate(messages) if message['role'] == 'assistant')
    return messages[:last]


def write_folders(folder, tokenizer, conversations, preferences, prompts, max_tokens):
    """
    The dataset folders `folder`/sft (conversations), /pairs (preferences) and /prompts, in the tokens of chat_tokenizer(tokenizer); none of what is empty.
    Each argument is {'train': [...], 'val': [...]}, of what read() yields; prompts are messages. What is longer than max_tokens is cut at its end, and
    left out where nothing of an answer, or the difference between two, remains; a prompt that leaves less than a quarter of it for an answer is left out. All is counted.
    """
    tokenizer = chat_tokenizer(tokenizer)

    def conversation(messages):
        return [render(messages, tokenizer)]

    def pair(item):
        messages, *sides = item
        return [render([*messages, {'role': 'assistant', 'content': side}], tokenizer) for side in sides]

    def prompt(messages):
        return [render(messages, tokenizer, reply=True)]
    folders = [build_folder(os.path.join(folder, name), kind, tokenizer, items, documents_of, max_tokens)
               for kind, name, items, documents_of in (('conversations', 'sft', conversations, conversation), ('pairs', 'pairs', preferences, pair), ('prompts', 'prompts', prompts, prompt))
               if any(items.values())]
    for built in folders:  # all or, where one cannot be built, none
        write_folder(*built)


def build_folder(folder, kind, tokenizer, items, documents_of, max_tokens):
    """What write_folder() takes: documents_of(item) are the documents of an item, each its ids and mask (T,)."""
    dtype = np.dtype('<u4' if tokenizer.vocab_size > 2**16 else '<u2')
    meta = {'kind': kind, 'dtype': 'uint32' if dtype.itemsize == 4 else 'uint16', 'vocab_size': tokenizer.vocab_size,
            'tokenizer_sha256': hashlib.sha256(tokenizer.json.encode()).hexdigest(), 'max_tokens': max_tokens, 'longest': 0}
    counts, files = collections.Counter(), {}
    for split in ('train', 'val'):
        ids, masks, starts, at = [np.zeros(0, dtype)], [np.zeros(0, np.uint8)], [], 0
        with progress(f'{kind}, {split}', len(items[split]), 'item') as bar:
            for item in items[split]:
                bar.update()
                whole = documents_of(item)
                documents = [(one[:max_tokens], mask[:max_tokens]) for one, mask in whole]
                useless = kind == 'prompts' and len(whole[0][0]) > max_tokens - max_tokens // 4 or kind != 'prompts' and not all(mask.any() for _, mask in documents)
                if useless or kind == 'pairs' and np.array_equal(documents[0][0], documents[1][0]):
                    counts['left out'] += 1
                    continue
                counts['cut'] += any(len(one) > max_tokens for one, _ in whole)
                for one, mask in documents:
                    starts.append(at)
                    ids.append(one.astype(dtype))
                    masks.append(mask.astype(np.uint8))
                    at += len(one)
                    meta['longest'] = max(meta['longest'], len(one))
        ids = np.concatenate(ids)
        meta[split] = {'tokens': len(ids), 'documents': len(starts), 'bytes': int(tokenizer.token_bytes()[ids].sum()), 'characters': int(tokenizer.token_chars()[ids].sum())}
        files |= {f'{split}_mask.bin': np.concatenate(masks).tobytes(), f'{split}_index.bin': np.array(starts, '<u8').tobytes(), f'{split}.bin': ids.tobytes()}
    if not meta['train']['documents']:
        sys.exit(f'{folder}: nothing is left to train on: of {sum(map(len, items.values())):,} {kind} none fits max_tokens={max_tokens}; raise it')
    meta |= counts
    files = {'tokenizer.json': tokenizer.json.encode(), 'meta.json': json.dumps(meta, indent=2).encode(), **files}
    files['train.bin'] = files.pop('train.bin')  # last: should this be cut off, the tokens are not those that meta.json counts, and a reader notices
    return folder, files, (', '.join(f'{split} {meta[split]["documents"] // (1 + (kind == "pairs")):,} {kind}, {meta[split]["tokens"]:,} tokens' for split in ('train', 'val'))
                           + f'; the longest has {meta["longest"]:,}' + ''.join(f'; {number:,} {what} (max_tokens={max_tokens:,})' for what, number in counts.items() if number))


def write_folder(folder, files, told):
    """Write the files {name: bytes} of a dataset folder and say what is in it."""
    try:
        os.makedirs(folder, exist_ok=True)
        for name, data in files.items():
            with atomic(os.path.join(folder, name)) as f:
                f.write(data)
    except OSError as error:
        sys.exit(f'{folder}: cannot write the dataset: {error}')
    print(f'{folder}: {told}')


def divide(items, val_fraction, seed):
    """{'train': [...], 'val': [...]}: items in their order, those for validation drawn by the seed; of at least two one is."""
    if not 0 <= val_fraction < 1:
        sys.exit(f'val_fraction={val_fraction}: expected 0 (no validation split) or a number below 1')
    number = min(len(items) - 1, max(1, round(val_fraction * len(items)))) if val_fraction and items else 0
    held = set(random.Random(seed).sample(range(len(items)), number))
    return {'train': [item for i, item in enumerate(items) if i not in held], 'val': [item for i, item in enumerate(items) if i in held]}
