"""
The common part of all data/*/prepare.py: from documents to a dataset folder.

The documents are read twice, a few MB at a time. The first pass counts them, finds duplicates, decides which are for
validation and collects the characters. The second pass encodes and writes. A tokenizer that is trained or pruned reads
them once more in between. Files are written to the folder's unfinished/ and moved when all is done. After an
interruption the same command continues there.
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
import zlib
from collections import Counter
from types import SimpleNamespace

import numpy as np

from core.files import atomic, dataset_folder, find, locked_dataset, quoted
from core.text.chunks import batch_chunks, chunk, map_in_order, sample_evenly
from core.text.documents import READ_BYTES, find_files, read_documents
from core.text.download import hub_commit, progress
from core.text.tokenizer import EOT, char_tokenizer, load_tokenizer, prune_tokenizer, train_bpe

# settings of every prepare.py; a script that assigns one of these names gives it another default
input = ''  # your text: .txt .md .jsonl .json .csv .tsv .parquet, also as .gz .bz2 .xz .zst, or a folder of these
tokenizer = 'char'  # 'char', 'bbpe' (byte-level BPE trained on this text), 'gpt2', 'qwen2', or a tokenizer.json's path
vocab_size = 8192  # number of ids of a bbpe, <|endoftext|> included
train_bytes = 9_000_000  # a bbpe is trained on an even sample of so many bytes; 9 MB of Chinese take 0.9 GB of memory
prune = 'auto'  # cut a BPE to the ids that this text uses: True, False, or auto: qwen2 for texts below 100 MB
field = 'text'  # the field of a .jsonl or .json record, or column of a table, that holds the text or a list of lines
min_chars = 1  # leave out documents with fewer characters
max_repetition = 1.0  # leave out documents with a larger share of characters in repeated lines; 0.3 is usual
limit = 0  # stop after so many documents; 0: take all
val_fraction = 0.1  # validation share: the end of each document; above 1,000 documents, some documents, drawn; 0: none
seed = 1337  # for drawing the validation documents
shard_tokens = 0  # tokens in a shard train_00000.bin, ...; 0: all in train.bin
num_proc = 0  # threads that encode; 0: one per core
skip_bad = False  # leave out files in an unknown encoding or without the field, instead of exiting

SPLIT_BY_DOCUMENT_ABOVE = 1000  # documents; with more, whole documents are for validation
PRUNE_BELOW_BYTES = 100_000_000  # with prune='auto': smaller texts use only a few of Qwen2's ids
SPLITS = ('train', 'val')
LAPTOP = '\n(without a GPU put config/laptop.py behind the config file)'

# ----------------------------------------------------------------------------- first pass


class Seen:
    """A set of 64-bit numbers in 8 bytes each: a sorted array, and a Python set of the newest million."""

    def __init__(self):
        self.old = np.empty(0, np.uint64)
        self.new = set()

    def add(self, number):
        """Add a number. Returns whether it was there before."""
        position = np.searchsorted(self.old, np.uint64(number))
        if number in self.new or (position < len(self.old) and self.old[position] == number):
            return True
        self.new.add(number)
        if len(self.new) == 2**20:
            self.old = np.concatenate([self.old, np.fromiter(self.new, np.uint64)])
            self.old.sort()
            self.new.clear()
        return False


def repetition(text):
    """
    Return the share of characters in lines that occurred before in the text (Gopher, Rae et al. 2021, appendix A1).
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return 0.0
    return 1 - sum(map(len, set(lines))) / sum(map(len, lines))


class Document:
    """What the first pass remembers of the document that it is reading."""

    def __init__(self):
        self.characters = self.bytes = 0
        self.is_blank = True
        self.head = ''  # its beginning, for repetition()
        self.chars = set()  # its characters, for a character vocabulary only
        self.digest = hashlib.blake2b(digest_size=8)

    def add(self, text):
        data = text.encode()
        self.characters += len(text)
        self.is_blank = self.is_blank and not text.strip()
        self.bytes += len(data)
        self.digest.update(data)
        if max_repetition < 1 and len(self.head) < 4 * READ_BYTES:  # for a book its beginning is enough
            self.head += text
        if tokenizer == 'char':
            self.chars |= set(text)

    def reason_to_drop(self, seen):
        """Return why the document is left out, or ''. Adds its digest to `seen` if the other filters pass it."""
        if self.is_blank:
            return 'empty'
        if self.characters < min_chars:
            return 'short'
        if repetition(self.head) > max_repetition:
            return 'repetitive'
        if seen.add(int.from_bytes(self.digest.digest(), 'little')):
            return 'duplicate'
        return ''


def survey(documents):
    """
    Read all documents once and return a plan, a namespace: keep, one byte per document, 1 or 0; n_documents, characters
    and bytes of those to keep; lengths, the characters of each, [] above SPLIT_BY_DOCUMENT_ABOVE; chars, the set of
    their characters (for a character vocabulary only); dropped, a Counter of the reasons for leaving documents out;
    digest, a hash of the documents to keep.
    """
    plan = SimpleNamespace(keep=bytearray(), n_documents=0, characters=0, bytes=0, lengths=[], chars=set(),
                           dropped=Counter())
    seen = Seen()
    digest = hashlib.blake2b(digest_size=16)
    document = Document()
    with progress('read') as bar:
        for text in documents:
            if text is not None:
                document.add(text)
                bar.update(len(text))
                continue
            reason = document.reason_to_drop(seen)
            plan.keep.append(not reason)
            if reason:
                plan.dropped[reason] += 1
            else:
                plan.n_documents += 1
                plan.characters += document.characters
                plan.bytes += document.bytes
                plan.lengths.append(document.characters)
                if plan.n_documents > SPLIT_BY_DOCUMENT_ABOVE:
                    plan.lengths.clear()
                plan.chars |= document.chars
                digest.update(document.digest.digest())
                if plan.n_documents == limit:
                    break
            document = Document()
    plan.digest = digest.hexdigest()
    return plan

# ----------------------------------------------------------------------------- splits


def train_characters(length):
    """Return how many characters of a document are for training, if each document is split."""
    return int(length * (1 - val_fraction))


def validation_starts(plan):
    """
    Yield, for each document to keep, the position of its first character for validation; sys.maxsize if it has none.
    """
    if plan.lengths:
        for length in plan.lengths:
            yield train_characters(length)
    else:
        rng = random.Random(seed)
        for _ in range(plan.n_documents):
            yield 0 if rng.random() < val_fraction else sys.maxsize


def split_documents(documents, plan):
    """
    Yield the documents to keep as (0 for training or 1 for validation, text), then (0 or 1, None) where a part ends.
    """
    starts = validation_starts(plan)
    number = 0  # of the document
    position = 0  # in the document
    for text in documents:
        keep = plan.keep[number]
        if position == 0 and keep:
            val_start = next(starts)
        if text is None:
            if keep:
                yield int(position > val_start), None
            number += 1
            position = 0
            if number == len(plan.keep):  # at the limit; files after it need not even be downloaded
                return
            continue
        if keep:
            n_train = max(0, val_start - position)
            before, after = text[:n_train], text[n_train:]
            if before:
                yield 0, before
            if after:
                if 0 < val_start == position + len(before):
                    yield 0, None
                yield 1, after
        position += len(text)


def check_split(plan):
    """Exit if the training split, or the validation split where one is asked for, would be empty."""
    if plan.lengths:
        train = sum(map(train_characters, plan.lengths))
        val = sum(plan.lengths) - train
    else:
        val = sum(start == 0 for start in validation_starts(plan))
        train = plan.n_documents - val
    for name, size in (('training', train), ('validation', val)):
        if not size and (name == 'training' or val_fraction):
            sys.exit(f'val_fraction={val_fraction} leaves nothing for {name} of {count_documents(plan.n_documents)}, '
                     f'{plan.characters:,} characters; take another, or 0 for no validation split')


def count_documents(number, adjective=''):
    """Return '1 document', '2 empty documents'."""
    noun = 'documents' if number > 1 else 'document'
    return f'{number:,} {adjective} {noun}' if adjective else f'{number:,} {noun}'

# ----------------------------------------------------------------------------- tokenizers


def make_tokenizer(tok, plan, chunks):
    """
    Return the tokenizer that the settings ask for. This trains or prunes it if needed.
    tok: a tokenizer that exists already, else None. chunks(size): the chunks of the text, see chunk().
    """
    if tokenizer == 'bbpe':
        tok = train_tokenizer(plan, chunks)
    if prune == 'True' or (prune == 'auto' and tokenizer == 'qwen2' and plan.bytes < PRUNE_BELOW_BYTES):
        used = used_ids(tok, plan, chunks)
        full_size = tok.vocab_size
        tok = prune_tokenizer(tok, used)
        print(f'{len(used):,} of {full_size:,} ids occur in this text; '
              f'with those they are merged from, the bytes and {EOT}: {tok.vocab_size:,}')
    return tok


def train_tokenizer(plan, chunks):
    """Train a byte-level BPE on an even sample of the training text."""
    share = min(1, train_bytes / plan.bytes / (1 - val_fraction))
    megabytes = share * plan.bytes * (1 - val_fraction) / 1e6
    print(f'training a tokenizer of {vocab_size:,} ids on {megabytes:,.1f} MB ...', flush=True)
    started = time.perf_counter()
    texts = (text for split, text, _ in chunks(READ_BYTES // 16) if split == 0)
    tok = train_bpe(sample_evenly(texts, share), vocab_size)
    print(f'... in {time.perf_counter() - started:.1f} s')
    return tok


def used_ids(tok, plan, chunks):
    """Return a list of the ids that occur in the text."""
    def encode(batch):
        return [tok.encode(text) for _, text, _ in batch], sum(len(text) for _, text, _ in batch)

    tok.encode('')  # builds what it needs at first use once, not in every thread
    used = np.zeros(tok.vocab_size, dtype=bool)
    with progress('count ids', plan.characters) as bar:
        for ids, characters in map_in_order(encode, batch_chunks(chunks()), num_proc):
            used[np.concatenate(ids)] = True
            bar.update(characters)
    return np.flatnonzero(used).tolist()

# ----------------------------------------------------------------------------- second pass


class Split:
    """Writes one split to a folder, in shards or one file, after the tokens that `count` says are there already."""

    def __init__(self, folder, name, dtype, count):
        self.folder, self.name = folder, name
        self.count = count  # {'tokens', 'characters', 'bytes', 'crc32': of all token files, one after the other}
        self.file = None
        self.shard_size = shard_tokens or sys.maxsize
        shard, tokens = divmod(count['tokens'], self.shard_size)
        if tokens:
            self._open(shard, 'r+b')
            self.file.truncate(tokens * dtype.itemsize)
            self.file.seek(0, os.SEEK_END)

    def _open(self, shard, mode):
        self.close()
        self.file = open(token_file(self.folder, self.name, shard), mode)

    def write(self, ids, characters, size):
        """Write ids, which stand for so many characters and bytes."""
        while len(ids):
            shard, tokens = divmod(self.count['tokens'], self.shard_size)
            if not tokens:
                self._open(shard, 'wb')
            room = self.shard_size - tokens
            data = ids[:room].tobytes()
            self.file.write(data)
            self.count['crc32'] = zlib.crc32(data, self.count['crc32'])
            self.count['tokens'] += min(len(ids), room)
            ids = ids[room:]
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


def token_file(folder, name, shard):
    """Return the path of a token file of a split."""
    return os.path.join(folder, f'{name}_{shard:05d}.bin' if shard_tokens else f'{name}.bin')


def has_what_was_written(folder, name, count, itemsize):
    """Return whether the token files of a split begin with what Split has written, according to `count`."""
    crc32 = shard = 0
    left = count['tokens'] * itemsize  # bytes
    try:
        while left:
            with open(token_file(folder, name, shard), 'rb') as f:
                left_in_shard = min(left, shard_tokens * itemsize or left)
                left -= left_in_shard
                while left_in_shard:
                    block = f.read(min(left_in_shard, 1 << 20))
                    if not block:
                        return False
                    crc32 = zlib.crc32(block, crc32)
                    left_in_shard -= len(block)
            shard += 1
    except FileNotFoundError:
        return False
    return crc32 == count.get('crc32')


def check_written(folder, unfinished, done, itemsize):
    """Exit unless the token files are exactly what Split has written. Then the next run begins anew."""
    for name in SPLITS:
        files = [file for file in os.listdir(unfinished) if re.fullmatch(rf'{name}(_\d+)?\.bin', file)]
        size = sum(os.path.getsize(os.path.join(unfinished, file)) for file in files)
        if size != done[name]['tokens'] * itemsize or not has_what_was_written(unfinished, name, done[name], itemsize):
            os.remove(os.path.join(unfinished, 'progress.json'))
            sys.exit(f'{folder}: the {name} tokens on the disk are not those that were written; another program or the '
                     'disk has changed them; run the same command again, which begins anew')


def encode_batch(batch, tok, eot, dtype):
    """
    Encode a batch of chunks. Returns (ids, characters, bytes) for each split; eot (a list) follows the end of a part.
    """
    ids, characters, sizes = [[[]], [[]]], [0, 0], [0, 0]
    for split, text, part_ends in batch:
        ids[split].append(tok.encode(text))
        if part_ends:
            ids[split].append(eot)
        characters[split] += len(text)
        sizes[split] += len(text.encode())
    return [(np.concatenate(ids[i]).astype(dtype), characters[i], sizes[i]) for i in range(len(SPLITS))]


def encode_and_write(batches, plan, tok, folder, done, progress_path):
    """
    Encode the batches from number done['batches'] on and write them to the folder. Returns the new `done`.
    Saves `done` to progress_path every few seconds, and on Ctrl-C.
    """
    dtype = token_dtype(tok)
    eot = [tok.eot] if plan.n_documents > 1 else []
    splits = [Split(folder, name, dtype, dict(done[name])) for name in SPLITS]

    def save_progress():
        for split in splits:
            split.flush()  # the tokens are on the disk before the file that counts them
        write_text(progress_path, json.dumps(done))

    tok.encode('')  # builds what it needs at first use once, not in every thread
    saved_at = time.monotonic()
    for _ in range(done['batches']):
        next(batches)
    try:
        with progress('encode', plan.characters) as bar:
            bar.update(done['train']['characters'] + done['val']['characters'])
            for encoded in map_in_order(lambda batch: encode_batch(batch, tok, eot, dtype), batches, num_proc):
                for split, part in zip(splits, encoded):
                    split.write(*part)
                # one assignment, so that after an interruption `done` is the state at the end of a batch
                done = {**done, 'batches': done['batches'] + 1, **{split.name: dict(split.count) for split in splits}}
                bar.update(sum(characters for _, characters, _ in encoded))
                if time.monotonic() - saved_at > 5:
                    save_progress()
                    saved_at = time.monotonic()
    except KeyboardInterrupt:
        save_progress()
        raise
    finally:
        for split in splits:
            split.close()
    return done


def vocabulary_meta(tok):
    """Return the entries of meta.json that describe a tokenizer and the size of its ids in the token files."""
    return {'dtype': token_dtype(tok).name, 'vocab_size': tok.vocab_size,
            'tokenizer_sha256': hashlib.sha256(tok.json.encode()).hexdigest()}


def token_dtype(tok):
    """Return the dtype of token files: uint16, or uint32 if the vocabulary needs it; little-endian."""
    return np.dtype('<u4' if tok.vocab_size > 2**16 else '<u2')


def move_to_place(folder, unfinished, plan, tok, done, commits):
    """
    Write the meta files beside the token files, and move them all to the dataset folder in place of an older dataset.
    """
    check_written(folder, unfinished, done, token_dtype(tok).itemsize)
    counts = {name: {key: done[name][key] for key in ('tokens', 'characters', 'bytes')} for name in SPLITS}
    meta = {**vocabulary_meta(tok), **counts,
            'documents': plan.n_documents, 'dropped': plan.dropped}
    if commits:
        meta['hub'] = commits
    write_text(os.path.join(unfinished, 'meta.json'), json.dumps(meta, indent=2))
    if tok.is_char:
        itos = dict(enumerate(piece.decode() for piece in tok.pieces))
        stoi = {char: i for i, char in itos.items()}
        with atomic(os.path.join(unfinished, 'meta.pkl')) as f:
            pickle.dump({'vocab_size': len(itos), 'itos': itos, 'stoi': stoi}, f)
    os.remove(os.path.join(unfinished, 'progress.json'))  # interrupted after this line, the next run starts anew

    for name in os.listdir(folder):
        if name == 'meta.pkl' or re.fullmatch(r'(train|val)(_\d{5,})?\.bin', name):
            os.remove(os.path.join(folder, name))
    # Training tokens last: after an interruption they are missing or too few, which open_dataset() notices.
    for name in sorted(os.listdir(unfinished), key=lambda name: name.startswith('train')):
        if '.tmp' not in name:  # left by a killed run
            os.replace(os.path.join(unfinished, name), os.path.join(folder, name))
    shutil.rmtree(unfinished)

# ----------------------------------------------------------------------------- all of it


def prepare(folder, source, next_command='', tok=None):
    """
    Write the dataset folder: train.bin and val.bin (or shards of them), meta.json, tokenizer.json, and nanoGPT's
    meta.pkl for a vocabulary of characters.
    source: the path of a file or folder, or an iterable of paths, or a function that returns the same one at every call
    next_command: what to type next, printed at the end
    tok: the tokenizer, if not the one that the settings ask for
    With several documents each part of a document is followed by EOT. A single document is not, as in nanoGPT.
    """
    started = time.perf_counter()
    check_settings()
    skipped = []  # files in an unknown encoding
    try:
        with locked_dataset(folder):
            plan, tok, done = prepare_folder(folder, source, tok, skipped)
    except (OSError, KeyboardInterrupt) as error:
        resumable = os.path.exists(os.path.join(folder, 'unfinished', 'progress.json'))
        if isinstance(error, OSError):
            message = f'{folder}: cannot write the dataset: {error}'
            if resumable:
                message += '; what is done stays in unfinished/, and the same command goes on from there'
            sys.exit(message)
        print('stopped; the same command ' + ('goes on from here' if resumable else 'begins anew'), file=sys.stderr)
        sys.exit(130)
    print_summary(folder, plan, tok, done, skipped, time.perf_counter() - started)
    if not next_command:
        dataset = os.path.relpath(folder, dataset_folder(''))
        out_dir = f'out-{os.path.basename(dataset)}'
        next_command = (f'python train.py config/auto.py --dataset={quoted(dataset)} --minutes=10 '
                        f'--out_dir={quoted(out_dir)}')
    if done['train']['tokens'] < 20_000:
        print('warning: a network learns so short a text by heart; give it 100 KB or more')
    print(f'written to {folder}; next:\n{next_command}')


def print_summary(folder, plan, tok, done, skipped, seconds):
    if tok.is_char and tok.eot is not None:
        print(f'vocabulary: {tok.vocab_size - 1:,} characters and {EOT}')
    else:
        print(f'vocabulary: {tok.vocab_size:,} tokens')
    for name in SPLITS:
        print(f'{name} has {done[name]["tokens"]:,} tokens')
    tokens = done['train']['tokens'] + done['val']['tokens']
    print(f'{count_documents(plan.n_documents)}, {plan.characters:,} characters, '
          f'{plan.characters / tokens:.2f} a token; {seconds:.1f} s{count_skipped(skipped)}')


def count_skipped(skipped):
    return f'; files skipped: {len(skipped)}' if skipped else ''


def check_settings():
    """Exit if a setting is out of range."""
    if not 0 <= max_repetition <= 1:
        sys.exit(f'max_repetition={max_repetition}: expected a share, 0 to 1 (1: leave out none)')
    if not 0 <= val_fraction < 1:
        sys.exit(f'val_fraction={val_fraction}: expected 0 (no validation split) or a number below 1')
    if prune not in ('auto', 'True', 'False'):
        sys.exit(f'prune={prune}: expected True, False or auto')
    if prune == 'True' and tokenizer in ('char', 'bbpe'):
        sys.exit(f'prune=True: a vocabulary of kind {tokenizer} is made of this text already; '
                 'it is for gpt2, qwen2 or a tokenizer.json of BPE')
    least = {'shard_tokens': 0, 'limit': 0, 'num_proc': 0, 'min_chars': 0, 'train_bytes': 1, 'vocab_size': 257}
    for key, value in least.items():
        if globals()[key] < value:
            sys.exit(f'{key}={globals()[key]}: expected at least {value}')


def prepare_folder(folder, source, tok, skipped):
    """Do the work of prepare(). Returns the plan, the tokenizer, and counts of what was written."""
    if tokenizer not in ('char', 'bbpe', 'gpt2', 'qwen2') and not os.path.exists(find(tokenizer)):
        sys.exit(f'tokenizer={tokenizer}: expected char, bbpe, gpt2, qwen2, '
                 'or the path of a tokenizer.json or of a folder that has one')
    given = tok
    if tok is None and tokenizer not in ('char', 'bbpe'):
        tok = load_tokenizer(tokenizer)

    commits = set()  # of the Hugging Face hub

    def paths():
        paths = source() if callable(source) else source
        for path in find_files(paths) if isinstance(paths, (str, os.PathLike)) else paths:
            commits.add(hub_commit(os.path.abspath(path)))
            yield path

    def documents():
        return read_documents(paths(), field, skip_bad, skipped)

    def chunks(size=READ_BYTES):
        return chunk(split_documents(documents(), plan), size)

    plan = survey(documents())
    for reason, number in plan.dropped.items():
        print(f'left out: {count_documents(number, reason)}')
    if not plan.n_documents:
        filters = ' that passes the filters' if plan.dropped else ''
        sys.exit(f'there is no text: expected at least one document{filters}{count_skipped(skipped)}')
    check_split(plan)
    if tokenizer == 'char' and not given:
        tok = char_tokenizer(sorted(plan.chars))
    elif tok and tok.is_char and prune == 'True':
        sys.exit(f'prune=True: {tokenizer} is a vocabulary of characters; this is for BPE')

    unfinished = os.path.join(folder, 'unfinished')
    progress_path = os.path.join(unfinished, 'progress.json')
    try:
        tok, done = start_or_resume(unfinished, progress_path, plan, tok, chunks)
        done = encode_and_write(batch_chunks(chunks()), plan, tok, unfinished, done, progress_path)
        move_to_place(folder, unfinished, plan, tok, done, sorted(filter(None, commits)))
    except BaseException as error:
        saved = read_progress(progress_path)
        if not saved or (isinstance(error, SystemExit) and not saved['batches']):  # nothing to resume from
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return plan, tok, done


def start_or_resume(unfinished, progress_path, plan, tok, chunks):
    """
    Return the tokenizer, and the counts of what is written already: those of an interrupted run of this task, or 0.
    """
    settings = [tokenizer, vocab_size, train_bytes, prune, val_fraction, seed, shard_tokens,
                tok.json if tok else '', plan.digest]
    task = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    tokenizer_path = os.path.join(unfinished, 'tokenizer.json')
    done = read_progress(progress_path)
    if done.get('task') == task:
        saved_tok = load_tokenizer(tokenizer_path)
        itemsize = token_dtype(saved_tok).itemsize
        if all(has_what_was_written(unfinished, name, done[name], itemsize) for name in SPLITS):
            tokens = done['train']['tokens'] + done['val']['tokens']
            print(f'going on where it was interrupted, after {tokens:,} tokens')
            return saved_tok, done
        print(f'{unfinished}: the tokens there are not those that were written; beginning anew')

    shutil.rmtree(unfinished, ignore_errors=True)
    os.makedirs(unfinished)
    tok = make_tokenizer(tok, plan, chunks)
    if plan.n_documents > 1 and tok.eot is None:
        sys.exit(f'{plan.n_documents:,} documents, but the tokenizer has no {EOT} to put between them: '
                 'join them, or use another tokenizer')
    write_text(tokenizer_path, tok.json)
    done = {'task': task, 'batches': 0,
            **{name: {'tokens': 0, 'characters': 0, 'bytes': 0, 'crc32': 0} for name in SPLITS}}
    write_text(progress_path, json.dumps(done))
    return tok, done


def read_progress(path):
    """Return the contents of progress.json, {} if there is none."""
    try:
        with open(path, encoding='utf-8') as f:
            return dict(json.load(f))
    except (OSError, ValueError, TypeError):
        return {}


def write_text(path, text):
    with atomic(path) as f:
        f.write(text.encode())
