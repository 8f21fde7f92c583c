"""Reading a dataset folder: token files and what is known about them."""
import glob
import hashlib
import json
import os
import pickle
import re
import sys
from types import SimpleNamespace

import numpy as np
import torch

from core.files import find
from core.text.tokenizer import EOT, char_tokenizer, gpt2_tokenizer, load_tokenizer


class Dataset(SimpleNamespace):
    """What open_dataset returns; hashable, so that what is found out about it can be cached."""
    __hash__ = object.__hash__


def open_dataset(name):
    """
    A dataset to train on: a folder data/<name> (or the folder `name` itself), ours or nanoGPT's, or several that share a tokenizer, each with
    its weight: 'a:0.7,b:0.3'. Returns a namespace:
    folder, its name for people; shortest, the training tokens of the shortest folder; dtype (numpy's); vocab_size; tokenizer (None if GPT-2's cannot be had); token_bytes and token_chars (V,), how
    many bytes and characters each id stands for; splits {'train': tokens, 'val': tokens}; weights, of each folder in the mixture;
    files {split: [(path, where its tokens begin in the split)]}; ends {split: where the tokens of each folder end in the split}; kind: '' of texts, or what
    documents the folder has ('conversations', 'pairs', 'prompts'), and then starts {split: where each begins, and the end} and longest, in tokens.
    Ends the script with one line when a folder is missing, empty, torn or too large for its numbers.
    """
    parts, weights = [], []
    for part in name.split(','):
        folder, colon, weight = part.rpartition(':')
        if not colon or not re.fullmatch(r'[0-9.eE+-]+', weight):  # C:\\data is a folder
            folder, weight = part, '1'
        try:
            weights.append(float(weight))
        except ValueError:
            weights.append(0)
        if not 0 < weights[-1] < float('inf'):
            sys.exit(f'dataset={name}: the weight {weight} of {folder} should be a number above 0, as in a:0.7,b:0.3')
        parts.append(_open_folder(folder.strip()))
    first = parts[0]
    if len(parts) > 1 and any(part.kind for part in parts):
        sys.exit(f'dataset={name}: only folders of texts can be mixed, not those of conversations, pairs or prompts')
    for part in parts[1:]:
        if part.dtype != first.dtype or part.vocab_size != first.vocab_size or part.tokenizer and first.tokenizer and part.tokenizer.json != first.tokenizer.json:
            sys.exit(f'dataset={name}: {part.folder} and {first.folder} have different tokenizers, so they cannot be mixed; prepare one with '
                     f"the other's: --tokenizer={first.folder}/tokenizer.json")
    if first.tokenizer:
        token_bytes, token_chars = (torch.from_numpy(count()).long() for count in (first.tokenizer.token_bytes, first.tokenizer.token_chars))
    else:
        token_bytes = token_chars = torch.zeros(first.vocab_size, dtype=torch.int64)
    shortest = min(sum(tokens for _, tokens in part.files['train']) for part in parts)
    data = Dataset(folder=' + '.join(part.folder for part in parts), shortest=shortest, dtype=first.dtype, vocab_size=first.vocab_size,
                           tokenizer=first.tokenizer, token_bytes=token_bytes, token_chars=token_chars, weights=weights, splits={}, files={}, ends={},
                           kind=first.kind, longest=first.longest, starts={})
    for split in ('train', 'val'):
        data.files[split], data.ends[split], at = [], [], 0
        for part in parts:
            for path, tokens in part.files[split]:
                data.files[split].append((path, at))
                at += tokens
            data.ends[split].append(at)
        data.splits[split] = at
        if data.kind:
            data.starts[split] = np.append(np.fromfile(f'{first.folder}/{split}_index.bin', '<u8').astype(np.int64), at)
    return data


def _open_folder(name):
    """One folder: a namespace of folder, dtype, vocab_size, tokenizer, files {split: [(path, tokens)]}."""
    places = [find(path) for path in (os.path.join('data', os.path.expanduser(name)), name)]
    folder = next((place for place in places if os.path.isdir(place)), places[0])
    prepare = f'run: python {folder}/prepare.py' if os.path.exists(f'{folder}/prepare.py') else 'python data/any_text/prepare.py makes one from your own text'
    paths = {split: sorted(glob.glob(f'{glob.escape(folder)}/{split}.bin') or glob.glob(f'{glob.escape(folder)}/{split}_[0-9]*.bin'),
                           key=lambda path: (len(path), path))
             for split in ('train', 'val')}
    if not paths['train']:
        sys.exit(f'dataset={name}: no {folder}/train.bin; {prepare}')
    dtype, expected, kind, longest = np.dtype('<u2'), {}, '', 0
    if os.path.exists(f'{folder}/meta.json'):
        try:
            with open(f'{folder}/meta.json', encoding='utf-8') as f:
                meta = json.load(f)
            dtype = {'uint16': np.dtype('<u2'), 'uint32': np.dtype('<u4')}[meta['dtype']]
            expected = {split: meta[split]['tokens'] for split in ('train', 'val') if split in meta}
            kind, longest = meta.get('kind', ''), meta.get('longest', 0)
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
    files = {}
    for split in ('train', 'val'):
        for path in paths[split]:
            if os.path.getsize(path) % dtype.itemsize:
                sys.exit(f'{path}: {os.path.getsize(path):,} bytes is no whole number of {dtype.itemsize}-byte tokens, so the file is cut off; {prepare}')
        files[split] = [(path, os.path.getsize(path) // dtype.itemsize) for path in paths[split]]
    if not sum(count for _, count in files['train']):
        sys.exit(f'{paths["train"][0]} is empty; {prepare}')
    for split, count in expected.items():
        tokens = sum(tokens for _, tokens in files[split])
        if tokens != count:
            sys.exit(f'{folder}: {tokens:,} {split} tokens, but meta.json says {count:,}; a file is missing or of another dataset; {prepare}')
        sizes = [os.path.getsize(path) if os.path.exists(path) else -1 for path in (f'{folder}/{split}_mask.bin', f'{folder}/{split}_index.bin')]
        if kind and sizes != [count, 8 * meta[split]['documents']]:
            sys.exit(f'{folder}: {split}_mask.bin or {split}_index.bin does not belong to {split}.bin; {prepare}')
    return SimpleNamespace(folder=folder, dtype=dtype, vocab_size=vocab_size, tokenizer=tokenizer, files=files, kind=kind, longest=longest)


def fingerprint(data):
    """A text that is another one for another dataset: a hash of tokenizer, weights, lengths and tokens; of more than 8 million in a split of 2,048 pieces."""
    known = hashlib.sha256(repr((data.vocab_size, data.weights, data.ends, data.tokenizer and data.tokenizer.json)).encode())
    for files in data.files.values():
        for path, _ in files:
            tokens = os.path.getsize(path) // data.dtype.itemsize
            pieces = min(-(-tokens // 4096), max(1, 2048 // len(files)))
            for start in np.linspace(0, max(tokens - 4096, 0), pieces).astype(np.int64):
                known.update(np.fromfile(path, data.dtype, 4096, offset=int(start) * data.dtype.itemsize))
    return known.hexdigest()


def document_starts(data, split='train'):
    """Where the documents of a split begin (documents,): where its index says or, reading all of it once, at its start and after each end-of-text token."""
    if data.kind:
        return data.starts[split][:-1]
    starts = [np.zeros(1, dtype=np.int64)]
    for path, begin in data.files[split]:
        tokens = np.memmap(path, dtype=data.dtype, mode='r')
        for i in range(0, len(tokens), 2**24):
            starts.append(np.flatnonzero(tokens[i:i + 2**24] == data.tokenizer.eot) + (begin + i + 1))
    starts = np.concatenate(starts)
    return starts[starts < data.splits[split]]


def read_tokens(data, split, at):
    """
    The tokens at these places of a split, as int64 of the same shape, and which of them count for a loss (bool): those that the mask marks, or all.
    The maps are opened anew each time: kept ones hold on to every page they have ever touched (nanoGPT #287).
    """
    begins = np.array([begin for _, begin in data.files[split]])
    file_of = np.searchsorted(begins, at, side='right') - 1
    tokens, counts = np.empty(at.shape, dtype=np.int64), np.ones(at.shape, dtype=bool)
    for i in np.unique(file_of):
        path, begin = data.files[split][i]
        here = file_of == i
        tokens[here] = np.asarray(np.memmap(path, dtype=data.dtype, mode='r'))[at[here] - begin]
        if data.kind:
            counts[here] = np.asarray(np.memmap(f'{path[:-4]}_mask.bin', dtype=np.uint8, mode='r'))[at[here] - begin] > 0
    if tokens.max(initial=0) >= data.vocab_size:
        sys.exit(f'{data.folder}: token id {tokens.max():,} in {split} is outside the vocabulary of {data.vocab_size:,}; '
                 'bins and tokenizer do not belong together, so prepare the dataset again')
    return tokens, counts


def read_document(data, split, number):
    """The tokens of a document and which of them count, (length,) each: see read_tokens()."""
    return read_tokens(data, split, np.arange(*data.starts[split][number:number + 2]))


def windows(data, split, starts, block_size):
    """
    Inputs and targets (rows, block_size) int64, the targets one token ahead, from these places in a split; -1 where a folder has ended or the loss
    does not count.
    """
    at = starts[:, None] + np.arange(block_size + 1)  # (rows, T + 1)
    ends = np.array(data.ends[split])
    end = ends[np.searchsorted(ends, starts, side='right')][:, None]  # of the folder that each row is in (rows, 1)
    tokens, counts = read_tokens(data, split, np.minimum(at, end - 1))
    x, y = tokens[:, :-1], np.where(counts & (at < end), tokens, -1)[:, 1:]
    return torch.from_numpy(x), torch.from_numpy(y)


def pack_documents(data, split, numbers, block_size):
    """Whole documents of a split, by their numbers (n,), packed: tokens, targets, of which -1 count not, and which one of the n each token belongs to, n for padding; (rows, T) int64 each."""
    texts = []
    for number in numbers:
        tokens, counts = read_document(data, split, number)
        texts.append((torch.from_numpy(tokens), torch.from_numpy(np.append(np.where(counts, tokens, -1)[1:], -1))))
    return pack(texts, block_size)


def pack(texts, block_size):
    """
    Several texts in a row, the longest first into the first row that has room. Each of the n is a tuple of tensors (length,): tokens, targets and what else there
    is about its tokens. Returns these for all texts, filled up with 0, targets with -1, and which one of the n each token belongs to, n for padding; (rows, T)
    each, T at most block_size.
    """
    used, places = [], {}
    for i in sorted(range(len(texts)), key=lambda i: -len(texts[i][0])):
        length = len(texts[i][0])
        row = next((row for row, taken in enumerate(used) if taken + length <= block_size), len(used))
        used += [0] * (row == len(used))
        places[i] = row, slice(used[row], used[row] + length)
        used[row] += length
    shape = len(used), max(used)
    packed = [torch.full(shape, -1 if kind == 1 else 0, dtype=part.dtype) for kind, part in enumerate(texts[0])]
    document = torch.full(shape, len(texts))
    for i, place in places.items():
        document[place] = i
        for whole, part in zip(packed, texts[i]):
            whole[place] = part
    return *packed, document


def shuffled(count, rows, seed, step):
    """The numbers (rows,) of a step's rows when all `count` come once in random order, then all again in another."""
    def order(epoch):
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).numpy()
    first, last = step * rows // count, ((step + 1) * rows - 1) // count
    return np.concatenate([order(epoch) for epoch in range(first, last + 1)])[step * rows - first * count:][:rows]


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
