"""Read a dataset folder: token files, their description, and batches of windows or packed documents."""
import glob
import hashlib
import json
import math
import os
import pickle
import re
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

from core.files import find, quoted
from core.text.tokenizer import EOT, Tokenizer, char_tokenizer, gpt2_tokenizer, load_tokenizer

SPLITS = ('train', 'val')


@dataclass(eq=False)  # compared and hashed by identity, so that functions of a dataset can be cached
class Dataset:
    """What open_dataset() returns: one folder, or a mixture of folders that share a tokenizer."""
    folder: str  # its name in messages; the folders of a mixture are joined by ' + '
    dtype: np.dtype  # of the token files: '<u2' or '<u4'
    vocab_size: int
    tokenizer: Tokenizer  # None if the folder has no tokenizer and GPT-2's is not available
    token_bytes: torch.Tensor  # (V,) number of bytes that each id stands for
    token_chars: torch.Tensor  # (V,) number of characters that each id stands for
    weights: list  # of each folder in the mixture
    shortest: int  # training tokens of the shortest folder
    splits: dict  # {'train': number of tokens, 'val': number of tokens}
    files: dict  # {split: [(path, position of its first token in the split), ...]}
    ends: dict  # {split: [position where the tokens of each folder end]}
    kind: str  # '' for texts; 'conversations', 'pairs' or 'prompts' for a folder of documents
    longest: int  # tokens of the longest document, if `kind` is set
    starts: dict  # {split: (documents + 1,) start of each document, and the end of the last}, if `kind` is set


def open_dataset(name):
    """
    Open a dataset to train on and return a Dataset.
    name: a folder data/<name>, or the path of a folder; nanoGPT's folders work too. A mixture of folders that share
    a tokenizer is written with weights: 'a:0.7,b:0.3'.
    Exits if a folder is missing, empty, truncated, or does not match its meta.json.
    """
    folders, weights = _parse_mixture(name)
    parts = [_open_folder(folder) for folder in folders]
    _check_mixture(name, parts)

    first = parts[0]
    if first.tokenizer:
        token_bytes = torch.from_numpy(first.tokenizer.token_bytes()).long()
        token_chars = torch.from_numpy(first.tokenizer.token_chars()).long()
    else:
        token_bytes = token_chars = torch.zeros(first.vocab_size, dtype=torch.int64)

    data = Dataset(
        folder=' + '.join(part.folder for part in parts), dtype=first.dtype, vocab_size=first.vocab_size,
        tokenizer=first.tokenizer, token_bytes=token_bytes, token_chars=token_chars, weights=weights,
        shortest=min(sum(tokens for _, tokens in part.files['train']) for part in parts),
        splits={}, files={}, ends={}, kind=first.kind, longest=first.longest, starts={})
    for split in SPLITS:
        _join_files(data, split, parts)
        if data.kind:
            starts = np.fromfile(f'{first.folder}/{split}_index.bin', '<u8').astype(np.int64)
            data.starts[split] = np.append(starts, data.splits[split])
    return data


def _parse_mixture(name):
    """Return the folders and the weights of 'a:0.7,b:0.3'. Exits if a weight is not a positive number."""
    folders, weights = [], []
    for part in name.split(','):
        folder, colon, weight = part.rpartition(':')
        if not colon or not re.fullmatch(r'[0-9.eE+-]+', weight):  # the colon of C:\\data is part of a path
            folder, weight = part, '1'
        try:
            weights.append(float(weight))
        except ValueError:
            weights.append(0)
        if not 0 < weights[-1] < float('inf'):
            sys.exit(f'dataset={name}: the weight {weight} of {folder} should be a number above 0, as in a:0.7,b:0.3')
        folders.append(folder.strip())
    return folders, weights


def _check_mixture(name, parts):
    """Exit unless the folders can be mixed."""
    first = parts[0]
    if len(parts) > 1 and any(part.kind for part in parts):
        sys.exit(f'dataset={name}: only folders of texts can be mixed, not those of conversations, pairs or prompts')
    for part in parts[1:]:
        same = part.dtype == first.dtype and part.vocab_size == first.vocab_size
        if part.tokenizer and first.tokenizer:
            same = same and part.tokenizer.json == first.tokenizer.json
        if not same:
            sys.exit(f'dataset={name}: {part.folder} and {first.folder} have different tokenizers, so they '
                     f"cannot be mixed; prepare one with the other's: --tokenizer={first.folder}/tokenizer.json")


def _join_files(data, split, parts):
    """Number the tokens of a split through all files of all folders; fills in data.files, data.ends and data.splits."""
    position = 0
    data.files[split] = []
    data.ends[split] = []
    for part in parts:
        for path, tokens in part.files[split]:
            data.files[split].append((path, position))
            position += tokens
        data.ends[split].append(position)
    data.splits[split] = position


def _open_folder(name):
    """Open one folder. Returns folder, dtype, vocab_size, tokenizer, files {split: [(path, tokens)]}, kind, longest."""
    candidates = [find(os.path.join('data', os.path.expanduser(name))), find(name)]
    folder = next((path for path in candidates if os.path.isdir(path)), candidates[0])
    hint = _how_to_make(name)
    paths = {split: _bin_paths(folder, split) for split in SPLITS}
    if not paths['train']:
        sys.exit(f'dataset={name}: no {folder}/train.bin; {hint}')

    meta, dtype = {}, np.dtype('<u2')
    if os.path.exists(f'{folder}/meta.json'):
        meta, dtype = _read_meta_json(folder, hint)
        tok = load_tokenizer(folder)
        vocab_size = tok.vocab_size
    elif os.path.exists(f'{folder}/meta.pkl'):
        tok = read_meta_pkl(f'{folder}/meta.pkl')
        vocab_size = tok.vocab_size
    else:
        tok = _assume_gpt2(folder)
        vocab_size = 50257

    files = {split: [(path, _count_tokens(path, dtype, hint)) for path in paths[split]] for split in SPLITS}
    if not sum(tokens for _, tokens in files['train']):
        sys.exit(f'{paths["train"][0]} is empty; {hint}')
    _check_counts(folder, files, meta, hint)
    return SimpleNamespace(folder=folder, dtype=dtype, vocab_size=vocab_size, tokenizer=tok, files=files,
                           kind=meta.get('kind', ''), longest=meta.get('longest', 0))


def _how_to_make(name):
    """Return the command that makes a dataset, as the docstring of the prepare.py in or above its folder shows it."""
    path = os.path.normpath(os.path.expanduser(name))
    for folder in filter(None, (path, os.path.dirname(path))):
        for script in (find(os.path.join('data', folder, 'prepare.py')), find(os.path.join(folder, 'prepare.py'))):
            if os.path.exists(script):
                with open(script, encoding='utf-8') as f:
                    usage = re.search(r'^ +python data/\S+/prepare\.py( .*)', f.read(), re.MULTILINE)
                return f'run: python {quoted(script)}{usage[1] if usage else ""}'
    return 'python data/any_text/prepare.py makes one from your own text'


def _bin_paths(folder, split):
    """Return the path of the split's only file, or those of its shards in order."""
    prefix = f'{glob.escape(folder)}/{split}'
    paths = glob.glob(f'{prefix}.bin') or glob.glob(f'{prefix}_[0-9]*.bin')
    return sorted(paths, key=lambda path: (len(path), path))  # 99999 before 100000


def _read_meta_json(folder, hint):
    """Return the dict in meta.json, and the dtype of the token files."""
    try:
        with open(f'{folder}/meta.json', encoding='utf-8') as f:
            meta = json.load(f)
        dtype = {'uint16': np.dtype('<u2'), 'uint32': np.dtype('<u4')}[meta['dtype']]
        counted = ['tokens', 'documents'] if meta.get('kind') else ['tokens']
        counts = [meta[split][key] for split in SPLITS if split in meta for key in counted]
        if not all(type(count) is int for count in [*counts, meta.get('longest', 0)]):
            raise TypeError
        if meta.get('kind', '') not in ('', 'conversations', 'pairs', 'prompts'):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        sys.exit(f'{folder}/meta.json: damaged: expected {{"dtype": "uint16" or "uint32", '
                 f'"train": {{"tokens": ...}}, ...}}; {hint}')
    return meta, dtype


def _assume_gpt2(folder):
    """Return GPT-2's tokenizer for a folder without meta files, None if it is not available; prints a warning."""
    tok, note = None, ''
    try:
        tok = gpt2_tokenizer()
    except SystemExit as error:
        note = f', and going on without the tokenizer: {error}'
    print(f'warning: {folder} has neither meta.json nor meta.pkl; taking its tokens for GPT-2 BPE{note}',
          file=sys.stderr)
    return tok


def _count_tokens(path, dtype, hint):
    size = os.path.getsize(path)
    if size % dtype.itemsize:
        sys.exit(f'{path}: {size:,} bytes is no whole number of {dtype.itemsize}-byte tokens, '
                 f'so the file is cut off; {hint}')
    return size // dtype.itemsize


def _check_counts(folder, files, meta, hint):
    """Exit unless the files have the numbers of tokens and documents that meta.json gives."""
    for split in SPLITS:
        if split not in meta:
            continue
        expected = meta[split]['tokens']
        tokens = sum(tokens for _, tokens in files[split])
        if tokens != expected:
            sys.exit(f'{folder}: {tokens:,} {split} tokens, but meta.json says {expected:,}; '
                     f'a file is missing or of another dataset; {hint}')
        if meta.get('kind'):
            paths = [f'{folder}/{split}_mask.bin', f'{folder}/{split}_index.bin']
            sizes = [os.path.getsize(path) if os.path.exists(path) else -1 for path in paths]
            if sizes != [expected, 8 * meta[split]['documents']]:
                sys.exit(f'{folder}: {split}_mask.bin or {split}_index.bin does not belong to {split}.bin; {hint}')


def fingerprint(data):
    """
    Return a hash of the tokenizer, mixture weights, lengths and tokens, to recognise a dataset.
    Of splits above 8 million tokens it reads samples of 4,096 tokens at 2,048 places.
    """
    tokenizer_json = data.tokenizer and data.tokenizer.json
    digest = hashlib.sha256(repr((data.vocab_size, data.weights, data.ends, tokenizer_json)).encode())
    for files in data.files.values():
        for path, _ in files:
            tokens = os.path.getsize(path) // data.dtype.itemsize
            n_samples = min(math.ceil(tokens / 4096), max(1, 2048 // len(files)))
            for start in np.linspace(0, max(tokens - 4096, 0), n_samples).astype(np.int64):
                digest.update(np.fromfile(path, data.dtype, 4096, offset=int(start) * data.dtype.itemsize))
    return digest.hexdigest()


def document_starts(data, split='train'):
    """
    Return the position of each document's first token (documents,).
    Without an index file this reads the whole split: documents start at 0 and after each end-of-text token.
    """
    if data.kind:
        return data.starts[split][:-1]
    starts = [np.zeros(1, dtype=np.int64)]
    for path, begin in data.files[split]:
        tokens = np.memmap(path, dtype=data.dtype, mode='r')
        for i in range(0, len(tokens), 2**24):
            starts.append(np.flatnonzero(tokens[i:i + 2**24] == data.tokenizer.eot) + (begin + i + 1))
    starts = np.concatenate(starts)
    return starts[starts < data.splits[split]]


def read_tokens(data, split, positions):
    """
    Return the tokens at these positions, as int64 of the same shape, and a bool mask of the same shape: True where
    the loss counts (everywhere if the folder has no mask file).
    The memory maps are opened anew in each call: one that stays open keeps every page it has touched (nanoGPT #287).
    """
    begins = np.array([begin for _, begin in data.files[split]])
    file_of = np.searchsorted(begins, positions, side='right') - 1
    tokens = np.empty(positions.shape, dtype=np.int64)
    mask = np.ones(positions.shape, dtype=bool)
    for i in np.unique(file_of):
        path, begin = data.files[split][i]
        if not os.path.exists(path):
            sys.exit(f'{path}: it was there when the dataset was opened, and has been removed since')
        here = file_of == i
        offsets = positions[here] - begin
        tokens[here] = np.asarray(np.memmap(path, dtype=data.dtype, mode='r'))[offsets]
        if data.kind:
            mask_path = path.removesuffix('.bin') + '_mask.bin'
            mask[here] = np.asarray(np.memmap(mask_path, dtype=np.uint8, mode='r'))[offsets] > 0
    if tokens.max(initial=0) >= data.vocab_size:
        sys.exit(f'{data.folder}: token id {tokens.max():,} in {split} is outside the vocabulary of '
                 f'{data.vocab_size:,}; bins and tokenizer do not belong together, so prepare the dataset again')
    return tokens, mask


def read_document(data, split, number):
    """Return the tokens and the loss mask of a document, (length,) each; see read_tokens()."""
    begin, end = data.starts[split][number:number + 2]
    return read_tokens(data, split, np.arange(begin, end))


def windows(data, split, starts, block_size):
    """
    Return inputs and targets from these positions of a split, (rows, block_size) int64 each, targets one token ahead.
    A target is -1 (ignored) after the end of its folder and where the loss mask is False. A row that starts before
    position 0 begins there instead, and targets after its own last one are ignored.
    """
    positions = np.maximum(starts, 0)[:, None] + np.arange(block_size + 1)  # (rows, T + 1)
    ends = np.array(data.ends[split])
    end = ends[np.searchsorted(ends, positions[:, 0], side='right')][:, None]  # (rows, 1), of the row's folder
    tokens, mask = read_tokens(data, split, np.minimum(positions, end - 1))
    x = np.ascontiguousarray(tokens[:, :-1])  # copies of arrays with gaps make the host wait for the GPU
    is_target = mask & (positions < end) & (positions <= starts[:, None] + block_size)
    y = np.where(is_target[:, 1:], tokens[:, 1:], -1)
    return torch.from_numpy(x), torch.from_numpy(y)


def pack_documents(data, split, numbers, block_size):
    """
    Pack the documents with these numbers (n,) into rows. Returns tokens, targets (-1 = ignored) and document index
    (0 to n - 1; n = padding), (rows, T) int64 each.
    """
    texts = []
    for number in numbers:
        tokens, mask = read_document(data, split, number)
        targets = np.append(np.where(mask, tokens, -1)[1:], -1)
        texts.append((torch.from_numpy(tokens), torch.from_numpy(targets)))
    return pack(texts, block_size)


def pack(texts, block_size):
    """
    Pack several texts into each row: first-fit decreasing, the longest text first, each into the first row with room.
    Each of the n texts is a tuple of tensors (length,): tokens, targets, then any others.
    Returns these tensors packed, and the index of the text that each token belongs to; (rows, T) each, T <= block_size.
    Padding is 0, -1 for targets, n for the index.
    """
    used = []  # tokens in each row
    slots = {}  # text -> its row and columns
    for i in sorted(range(len(texts)), key=lambda i: -len(texts[i][0])):
        length = len(texts[i][0])
        row = next((row for row, taken in enumerate(used) if taken + length <= block_size), len(used))
        if row == len(used):
            used.append(0)
        slots[i] = row, slice(used[row], used[row] + length)
        used[row] += length

    shape = len(used), max(used)
    packed = [torch.full(shape, -1 if j == 1 else 0, dtype=tensor.dtype) for j, tensor in enumerate(texts[0])]
    document = torch.full(shape, len(texts))
    for i, slot in slots.items():
        document[slot] = i
        for rows, tensor in zip(packed, texts[i]):
            rows[slot] = tensor
    return *packed, document


def shuffled(count, rows, seed, step):
    """Return the indices (rows,) of a step's rows, without replacement: a new permutation of range(count) per epoch."""
    def order(epoch):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        return torch.randperm(count, generator=generator).numpy()

    first = step * rows // count
    last = ((step + 1) * rows - 1) // count
    indices = np.concatenate([order(epoch) for epoch in range(first, last + 1)])
    return indices[step * rows - first * count:][:rows]


def read_meta_pkl(path):
    """Read nanoGPT's character vocabulary and return a Tokenizer. Exits if it holds anything but plain types."""
    class PlainUnpickler(pickle.Unpickler):  # pickles can run code, so no class or function is looked up
        def find_class(self, module, name):
            raise pickle.UnpicklingError(f'it wants {module}.{name}')

    try:
        with open(path, 'rb') as f:
            meta = PlainUnpickler(f).load()
        chars = [meta['itos'][i] for i in range(meta['vocab_size'])]
    except Exception as error:
        sys.exit(f'{path}: not a character vocabulary as nanoGPT writes it, '
                 f"{{'vocab_size', 'itos', 'stoi'}} in plain types: {error}")
    if meta['vocab_size'] > 2**16:
        sys.exit(f'{path}: vocab_size={meta["vocab_size"]:,} does not fit the uint16 tokens of a nanoGPT folder; '
                 'prepare it again with data/any_text/prepare.py, which writes uint32 where it must')
    if chars[-1:] == [EOT]:
        chars = chars[:-1]  # char_tokenizer() adds it again
    return char_tokenizer(chars)
