"""Reading a dataset folder: token files and what is known about them."""
import json
import os
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import torch

from core.files import find
from core.tokenizer import EOT, char_tokenizer, gpt2_tokenizer, load_tokenizer


def open_dataset(name):
    """
    The dataset folder data/<name> (or the folder `name` itself), ours or nanoGPT's:
    meta.json and tokenizer.json, or nanoGPT's meta.pkl of a character vocabulary, or bins alone, which are taken for GPT-2 BPE.
    Returns a namespace: folder, dtype (numpy's), vocab_size, tokenizer (None if GPT-2's cannot be had), token_bytes (V,)
    how many bytes each id stands for, splits {'train': length, 'val': length} in tokens.
    Ends the script with one line when the folder is missing, empty, torn or too large for its numbers.
    """
    folder = find(os.path.join('data', os.path.expanduser(name)))
    prepare = f'run: python {folder}/prepare.py' if os.path.exists(f'{folder}/prepare.py') else 'python data/any_text/prepare.py makes one from your own text'
    if not os.path.exists(f'{folder}/train.bin'):
        sys.exit(f'dataset={name}: no {folder}/train.bin; {prepare}')
    dtype = np.dtype('<u2')
    if os.path.exists(f'{folder}/meta.json'):
        try:
            with open(f'{folder}/meta.json', encoding='utf-8') as f:
                dtype = {'uint16': np.dtype('<u2'), 'uint32': np.dtype('<u4')}[json.load(f)['dtype']]
        except (ValueError, KeyError, TypeError) as error:
            sys.exit(f'{folder}/meta.json: expected {{"dtype": "uint16" or "uint32", ...}}: {type(error).__name__}: {error}; {prepare}')
        tokenizer = load_tokenizer(folder)
        vocab_size = tokenizer.vocab_size
    elif os.path.exists(f'{folder}/meta.pkl'):
        tokenizer = read_meta_pkl(f'{folder}/meta.pkl')
        vocab_size = tokenizer.vocab_size
    else:
        vocab_size, tokenizer, without = 50257, None, ''
        try:
            tokenizer = gpt2_tokenizer()
        except SystemExit as error:
            without = f', and going on without the tokenizer: {error}'
        print(f'warning: {folder} has neither meta.json nor meta.pkl; taking its tokens for GPT-2 BPE{without}', file=sys.stderr)
    splits = {}
    for split in ('train', 'val'):
        path = f'{folder}/{split}.bin'
        size = os.path.getsize(path) if os.path.exists(path) else 0
        if size % dtype.itemsize:
            sys.exit(f'{path}: {size:,} bytes is no whole number of {dtype.itemsize}-byte tokens, so the file is cut off; {prepare}')
        if size or split == 'val':
            splits[split] = size // dtype.itemsize
    if 'train' not in splits:
        sys.exit(f'{folder}/train.bin is empty; {prepare}')
    token_bytes = torch.from_numpy(tokenizer.token_bytes()).long() if tokenizer else torch.zeros(vocab_size, dtype=torch.int64)
    return SimpleNamespace(folder=folder, dtype=dtype, vocab_size=vocab_size, tokenizer=tokenizer, token_bytes=token_bytes, splits=splits)


def windows(data, split, starts, block_size):
    """
    Inputs and targets (rows, block_size) int64, the targets one token ahead, from these places in a split; -1 where the split has ended.
    The map is opened anew each time: a kept one holds on to every page it has ever touched (nanoGPT #287).
    """
    tokens = np.asarray(np.memmap(f'{data.folder}/{split}.bin', dtype=data.dtype, mode='r'))
    at = starts[:, None] + np.arange(block_size + 1)  # (rows, T + 1)
    rows = tokens[np.minimum(at, len(tokens) - 1)].astype(np.int64)
    if rows.max(initial=0) >= data.vocab_size:
        sys.exit(f'{data.folder}/{split}.bin: token id {rows.max():,} is outside the vocabulary of {data.vocab_size:,}; '
                 'bins and tokenizer do not belong together, so prepare the dataset again')
    x, y = rows[:, :-1], np.where(at < len(tokens), rows, -1)[:, 1:]
    return torch.from_numpy(x), torch.from_numpy(y)


def read_meta_pkl(path):
    """nanoGPT's character vocabulary. Pickles can run code, so this one may hold nothing but plain containers, numbers and text."""
    class Plain(pickle.Unpickler):
        def find_class(self, module, name):
            raise pickle.UnpicklingError(f'it wants {module}.{name}')
    try:
        with open(path, 'rb') as f:
            meta = Plain(f).load()
        chars = [meta['itos'][i] for i in range(meta['vocab_size'])]
    except Exception as error:
        sys.exit(f"{path}: not a character vocabulary as nanoGPT writes it, {{'vocab_size', 'itos', 'stoi'}} in plain types: {error}")
    if meta['vocab_size'] > 2**16:
        sys.exit(f'{path}: vocab_size={meta["vocab_size"]:,} does not fit the uint16 tokens of a nanoGPT folder; prepare it again with '
                 'data/any_text/prepare.py, which writes uint32 where it must')
    return char_tokenizer(chars[:-1] if chars[-1:] == [EOT] else chars)
