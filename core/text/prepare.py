"""
What every prepare.py shares: from text to a dataset folder, in two passes over the documents, never more than some MB of them in memory.
The first looks (how many, which are duplicates, where the splits part, which characters there are), the second encodes and writes; a
tokenizer that is trained or pruned reads them once between. What is
written lies in the folder's unfinished/ until all is done; interrupted, the same command goes on from there.
"""
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import sys
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np

from core.files import atomic, find
from core.text.chunks import batches_of, cut_up, in_order, sample
from core.text.documents import BLOCK, read_documents, skipped
from core.text.download import progress
from core.text.tokenizer import EOT, char_tokenizer, load_tokenizer, prune_tokenizer, train_bpe

# settings of every prepare.py; one that assigns a name itself gives it another default
input = ''  # a text of your own: .txt, .jsonl or .parquet, also as .gz .bz2 .xz .zst, or a folder of these
tokenizer = 'char'  # 'char', 'bbpe' (byte-level BPE trained on this text), 'gpt2', 'qwen2', or the path of a tokenizer.json
vocab_size = 8192  # of a bbpe: its ids, <|endoftext|> included
train_bytes = 9_000_000  # a bbpe is trained on an even sample of so many bytes; 9 MB of Chinese take 0.9 GB of memory
prune = 'auto'  # cut a BPE to the ids that this text uses: True, False, or auto: qwen2 for texts below 100 MB
field = 'text'  # which field of a .jsonl line or column of a .parquet file holds the text
min_chars = 1  # leave out documents with fewer characters
max_repetition = 1.0  # leave out documents with a larger share of characters in lines that occurred before in them; 0.3 is usual
limit = 0  # stop after so many documents; 0: take all
val_fraction = 0.1  # share for validation: up to 1,000 documents the end of each, of more whole ones, drawn by the seed; 0: none
seed = 1337  # of the draw of validation documents
shard_tokens = 0  # tokens in a shard train_00000.bin, ...; 0: all in train.bin
num_proc = 0  # threads that encode; 0: one for each core
skip_bad = False  # leave out files that no encoding fits, rather than stop there

MANY = 1000  # documents: from here on validation takes whole ones
LAPTOP = '\n(without a GPU put config/laptop.py behind the config file)'
SMALL = 100_000_000  # bytes of text that use so few of Qwen2's ids that the others would only be in the way

# ----------------------------------------------------------------------------- first pass


class Seen:
    """Whether a 64-bit number was met before. Holds 8 bytes for each in a sorted array, and the newest million in a set."""

    def __init__(self):
        self.old, self.new = np.empty(0, np.uint64), set()

    def __call__(self, number):
        at = np.searchsorted(self.old, np.uint64(number))
        if number in self.new or at < len(self.old) and self.old[at] == number:
            return True
        self.new.add(number)
        if len(self.new) == 2**20:
            self.old = np.concatenate([self.old, np.fromiter(self.new, np.uint64)])
            self.old.sort()
            self.new.clear()
        return False


def repetition(text):
    """The share of a text's characters that stand in lines which occurred before in it (Gopher's filter, Rae et al. 2021, appendix A1)."""
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    return 1 - sum(map(len, set(lines))) / sum(map(len, lines)) if lines else 0.0


def survey(documents):
    """
    Read all documents once. Returns a namespace: keep, a byte for each document, 1 or 0; n_documents kept, their characters and bytes;
    lengths, the characters of each, [] if they are MANY; chars, the set of their characters, for a character vocabulary only;
    dropped, how many for which reason; digest, the same only for the same documents.
    """
    plan = SimpleNamespace(keep=bytearray(), n_documents=0, characters=0, bytes=0, lengths=[], chars=set(), dropped=Counter())
    met, all_documents = Seen(), hashlib.blake2b(digest_size=16)
    length = size = 0
    head, chars, digest = '', set(), hashlib.blake2b(digest_size=8)
    with progress('read') as bar:
        for text in documents:
            if text is not None:
                data = text.encode()
                length, size = length + len(text), size + len(data)
                digest.update(data)
                if max_repetition < 1 and len(head) < 4 * BLOCK:  # of a whole book its beginning will do
                    head += text
                if tokenizer == 'char':
                    chars |= set(text)
                bar.update(len(text))
                continue
            reason = ('empty' if not length else 'short' if length < min_chars else 'repetitive' if repetition(head) > max_repetition
                      else 'duplicate' if met(int.from_bytes(digest.digest(), 'little')) else '')
            plan.keep.append(not reason)
            if reason:
                plan.dropped[reason] += 1
            else:
                plan.n_documents, plan.characters, plan.bytes = plan.n_documents + 1, plan.characters + length, plan.bytes + size
                plan.lengths.append(length)
                if plan.n_documents > MANY:
                    plan.lengths.clear()
                plan.chars |= chars
                all_documents.update(digest.digest())
                if plan.n_documents == limit:
                    break
            length = size = 0
            head, chars, digest = '', set(), hashlib.blake2b(digest_size=8)
    plan.digest = all_documents.hexdigest()
    return plan

# ----------------------------------------------------------------------------- second pass


def _cut(length):
    """How many characters of a document, of those that are split up, are for training."""
    return int(length * (1 - val_fraction))


def parts_of(documents, plan):
    """The documents that are kept, split up: (0 for training or 1 for validation, text), and (the same, None) at the end of each part."""
    cuts, draw = map(_cut, plan.lengths), random.Random(seed)
    number = start = 0  # of the document; of the text in it
    for text in documents:
        if not start:
            kept = plan.keep[number]
            if kept:  # its characters from `cut` on are for validation
                cut = next(cuts) if plan.lengths else 0 if draw.random() < val_fraction else sys.maxsize
        if text is None:
            if kept:
                yield int(start > cut), None
            number, start = number + 1, 0
            if number == len(plan.keep):  # the limit; what comes after it need not even be fetched
                return
            continue
        if kept:
            before, after = text[:max(0, cut - start)], text[max(0, cut - start):]
            if before:
                yield 0, before
            if after:
                if 0 < cut == start + len(before):
                    yield 0, None
                yield 1, after
        start += len(text)


def make_tokenizer(known, plan, texts):
    """The tokenizer that the settings ask for. known: it, if it needs no text; texts(size): begins the second pass, see cut_up."""
    if tokenizer == 'bbpe':
        share = min(1, train_bytes / plan.bytes / (1 - val_fraction))
        print(f'training a tokenizer of {vocab_size:,} ids on {share * plan.bytes * (1 - val_fraction) / 1e6:,.1f} MB ...', flush=True)
        started = time.perf_counter()
        known = train_bpe(sample((text for split, text, _ in texts(BLOCK // 16) if split == 0), share), vocab_size)
        print(f'... in {time.perf_counter() - started:.1f} s')
    if prune == 'True' or prune == 'auto' and tokenizer == 'qwen2' and plan.bytes < SMALL:
        known.encode('')  # what it builds at first use is built once, not by each thread
        used = np.zeros(known.vocab_size, dtype=bool)

        def count(batch):
            return [known.encode(text) for _, text, _ in batch], sum(len(text) for _, text, _ in batch)
        with progress('count ids', plan.characters) as bar:
            for ids, characters in in_order(count, batches_of(texts()), num_proc):
                used[np.concatenate(ids)] = True
                bar.update(characters)
        whole, known = known.vocab_size, prune_tokenizer(known, np.flatnonzero(used).tolist())
        print(f'{used.sum():,} of {whole:,} ids occur in this text; with those they are merged from, the bytes and {EOT}: {known.vocab_size:,}')
    return known


class Split:
    """One split being written to a folder, in shards or one file, from what was written before on."""

    def __init__(self, folder, name, dtype, count):
        self.folder, self.name, self.dtype, self.count, self.file = folder, name, dtype, count, None
        self.size = shard_tokens or sys.maxsize
        shard, tokens = divmod(count['tokens'], self.size)
        if tokens:
            self._open(shard, 'r+b')
            self.file.truncate(tokens * dtype.itemsize)
            self.file.seek(0, os.SEEK_END)

    def _open(self, shard, mode):
        self.close()
        self.file = open(os.path.join(self.folder, f'{self.name}_{shard:05d}.bin' if shard_tokens else f'{self.name}.bin'), mode)

    def write(self, ids, characters, size):
        while len(ids):
            shard, tokens = divmod(self.count['tokens'], self.size)
            if not tokens:
                self._open(shard, 'wb')
            self.file.write(ids[:self.size - tokens].tobytes())
            self.count['tokens'] += min(len(ids), self.size - tokens)
            ids = ids[self.size - tokens:]
        self.count['characters'] += characters
        self.count['bytes'] += size

    def flush(self):
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self):
        if self.file:
            self.flush()
            self.file.close()


def prepare(folder, source, next_command='', known=None):
    """
    Write the dataset folder: train.bin and val.bin (or shards of them), meta.json, tokenizer.json, and for characters nanoGPT's meta.pkl.
    source: the path of a file or folder, or those of files, or a function that returns an iterable of them, the same each time
    next_command: what to type next, printed at the end
    known: the tokenizer, if not the one that the settings ask for
    With several documents each part of one is followed by EOT; one alone is not, so that its tokens are nanoGPT's.
    """
    started = time.perf_counter()
    skipped.clear()
    _check_settings()
    try:
        plan, known, done = _prepare(folder, source, known)
    except (OSError, KeyboardInterrupt) as error:
        kept = os.path.exists(os.path.join(folder, 'unfinished', 'progress.json'))
        if isinstance(error, OSError):
            sys.exit(f'{folder}: cannot write the dataset: {error}' + '; what is done stays in unfinished/, and the same command goes on from there' * kept)
        print('stopped; the same command ' + ('goes on from here' if kept else 'begins anew'), file=sys.stderr)
        sys.exit(130)
    size, has_chars = known.vocab_size, known.is_char and known.eot is not None
    print('vocabulary: ' + (f'{size - 1:,} characters and {EOT}' if has_chars else f'{size:,} tokens'))
    for name in ('train', 'val'):
        print(f'{name} has {done[name]["tokens"]:,} tokens')
    print(f'{plan.n_documents:,} document{"s" * (plan.n_documents > 1)}, {plan.characters:,} characters, '
          f'{plan.characters / (done["train"]["tokens"] + done["val"]["tokens"]):.2f} a token; {time.perf_counter() - started:.1f} s'
          + (f'; files skipped: {len(skipped)}' if skipped else ''))
    dataset, config = os.path.basename(os.path.normpath(folder)), 'shakespeare_char' if known.is_char else 'hongloumeng_bbpe'
    print(f'written to {folder}; next:\n' + (next_command or f'python train.py config/train_{config}.py --dataset={dataset} --out_dir=out-{dataset}{LAPTOP}'))


def _prepare(folder, source, known):
    """The work of prepare(). Returns the plan, the tokenizer, and what was written; lets Ctrl-C and a full disk through."""
    if tokenizer not in ('char', 'bbpe', 'gpt2', 'qwen2') and not os.path.exists(find(tokenizer)):
        sys.exit(f'tokenizer={tokenizer}: expected char, bbpe, gpt2, qwen2, or the path of a tokenizer.json or of a folder that has one')
    given, known = known, known or (None if tokenizer in ('char', 'bbpe') else load_tokenizer(tokenizer))

    def documents():
        return read_documents(source() if callable(source) else source, field, skip_bad)

    def texts(size=BLOCK):
        return cut_up(parts_of(documents(), plan), size)
    plan = survey(documents())
    for reason, number in plan.dropped.items():
        print(f'left out: {number:,} {reason} document{"s" * (number > 1)}')
    if not plan.n_documents:
        sys.exit('there is no text: expected at least one document' + ' that passes the filters' * bool(plan.dropped) + (f'; files skipped: {len(skipped)}' if skipped else ''))
    _check_split(plan)
    if tokenizer == 'char' and not given:
        known = char_tokenizer(sorted(plan.chars))
    elif known and known.is_char and prune == 'True':
        sys.exit(f'prune=True: {tokenizer} is a vocabulary of characters; this is for BPE')
    unfinished = os.path.join(folder, 'unfinished')
    settings = [tokenizer, vocab_size, train_bytes, prune, val_fraction, seed, shard_tokens, known.json if known else '', plan.digest]
    task = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    progress_path, tokenizer_path = os.path.join(unfinished, 'progress.json'), os.path.join(unfinished, 'tokenizer.json')
    done = _read_json(progress_path)
    try:
        if done.get('task') == task:
            print(f'going on where it was interrupted, after {done["train"]["tokens"] + done["val"]["tokens"]:,} tokens')
            known = load_tokenizer(tokenizer_path)
        else:
            shutil.rmtree(unfinished, ignore_errors=True)
            os.makedirs(unfinished)
            known = make_tokenizer(known, plan, texts)
            if plan.n_documents > 1 and known.eot is None:
                sys.exit(f'{plan.n_documents:,} documents, but the tokenizer has no {EOT} to put between them: join them, or use another tokenizer')
            _write(tokenizer_path, known.json)
            done = {'task': task, 'batches': 0, **{name: {'tokens': 0, 'characters': 0, 'bytes': 0} for name in ('train', 'val')}}
            _write(progress_path, json.dumps(done))
        done = _encode(batches_of(texts()), plan, known, unfinished, done, progress_path)
        _finish(folder, unfinished, plan, known, done)
    except BaseException as error:
        noted = _read_json(progress_path)
        if not noted or isinstance(error, SystemExit) and not noted['batches']:  # there is nothing to go on with
            shutil.rmtree(unfinished, ignore_errors=True)
            if os.path.isdir(folder) and not os.listdir(folder):
                os.rmdir(folder)
        raise
    return plan, known, done


def _check_settings():
    if not 0 <= max_repetition <= 1:
        sys.exit(f'max_repetition={max_repetition}: expected a share, 0 to 1 (1: leave out none)')
    if not 0 <= val_fraction < 1:
        sys.exit(f'val_fraction={val_fraction}: expected 0 (no validation split) or a number below 1')
    if prune not in ('auto', 'True', 'False'):
        sys.exit(f'prune={prune}: expected True, False or auto')
    if prune == 'True' and tokenizer in ('char', 'bbpe'):
        sys.exit(f'prune=True: a vocabulary of kind {tokenizer} is made of this text already; it is for gpt2, qwen2 or a tokenizer.json of BPE')
    for key, least in {'shard_tokens': 0, 'limit': 0, 'num_proc': 0, 'min_chars': 0, 'train_bytes': 1, 'vocab_size': 257}.items():
        if globals()[key] < least:
            sys.exit(f'{key}={globals()[key]}: expected at least {least}')


def _check_split(plan):
    """Exit unless both splits, where two are asked for, will have text."""
    if plan.lengths:
        train = sum(map(_cut, plan.lengths))
        val = sum(plan.lengths) - train
    else:
        draw = random.Random(seed)
        val = sum(draw.random() < val_fraction for _ in range(plan.n_documents))
        train = plan.n_documents - val
    for name, size in (('training', train), ('validation', val)):
        if not size and (name == 'training' or val_fraction):
            sys.exit(f'val_fraction={val_fraction} leaves nothing for {name} of {plan.n_documents:,} document{"s" * (plan.n_documents > 1)}, {plan.characters:,} characters; '
                     'take another, or 0 for no validation split')


def _encode(batches, plan, known, folder, done, progress_path):
    """The second pass: encode and write, from batch done['batches'] on; notes every few seconds how far it is."""
    dtype = np.dtype('<u4' if known.vocab_size > 2**16 else '<u2')
    eot = [known.eot] if plan.n_documents > 1 else []
    splits = [Split(folder, name, dtype, dict(done[name])) for name in ('train', 'val')]

    def encode(batch):
        ids, characters, sizes = [[[]], [[]]], [0, 0], [0, 0]
        for split, text, ends in batch:
            ids[split] += [known.encode(text), eot] if ends else [known.encode(text)]
            characters[split] += len(text)
            sizes[split] += len(text.encode())
        return [(np.concatenate(part).astype(dtype), *counts) for part, *counts in zip(ids, characters, sizes)]

    def note():
        for split in splits:
            split.flush()  # what is noted is on the disk
        _write(progress_path, json.dumps(done))
    known.encode('')  # what it builds at first use is built once, not by each thread
    noted = time.monotonic()
    for _ in range(done['batches']):
        next(batches)
    try:
        with progress('encode', plan.characters) as bar:
            bar.update(done['train']['characters'] + done['val']['characters'])
            for encoded in in_order(encode, batches, num_proc):
                for split, part in zip(splits, encoded):
                    split.write(*part)
                # at one moment, so that what is noted is always the state after a whole batch
                done = {**done, 'batches': done['batches'] + 1, **{split.name: dict(split.count) for split in splits}}
                bar.update(sum(characters for _, characters, _ in encoded))
                if time.monotonic() - noted > 5:
                    note()
                    noted = time.monotonic()
    except KeyboardInterrupt:
        note()
        raise
    finally:
        for split in splits:
            split.close()
    return done


def _finish(folder, unfinished, plan, known, done):
    """Meta files beside the bins, and all of them to where they belong, in place of what was there."""
    meta = {'dtype': 'uint32' if known.vocab_size > 2**16 else 'uint16', 'vocab_size': known.vocab_size,
            'tokenizer_sha256': hashlib.sha256(known.json.encode()).hexdigest(), 'train': done['train'], 'val': done['val'],
            'documents': plan.n_documents, 'dropped': plan.dropped}
    _write(os.path.join(unfinished, 'meta.json'), json.dumps(meta, indent=2))
    if known.is_char:
        itos = dict(enumerate(piece.decode() for piece in known.pieces))
        with atomic(os.path.join(unfinished, 'meta.pkl')) as f:
            pickle.dump({'vocab_size': len(itos), 'itos': itos, 'stoi': {char: i for i, char in itos.items()}}, f)
    os.remove(os.path.join(unfinished, 'progress.json'))  # what is cut off from here on begins anew
    for old in os.listdir(folder):
        if old == 'meta.pkl' or re.fullmatch(r'(train|val)(_\d{5,})?\.bin', old):
            os.remove(os.path.join(folder, old))
    # the training tokens last: should this be cut off, they are missing or too few, and a reader notices
    for name in sorted(os.listdir(unfinished), key=lambda name: name.startswith('train')):
        if '.tmp' not in name:  # a killed run leaves those
            os.replace(os.path.join(unfinished, name), os.path.join(folder, name))
    shutil.rmtree(unfinished)


def _read_json(path):
    """progress.json; {} if there is none."""
    try:
        with open(path, encoding='utf-8') as f:
            return dict(json.load(f))
    except (OSError, ValueError, TypeError):
        return {}


def _write(path, text):
    with atomic(path) as f:
        f.write(text.encode())
