"""Read documents from text files of every usual format and encoding, a few hundred KB at a time."""
import bz2
import codecs
import functools
import gzip
import io
import itertools
import json
import lzma
import os
import sys
import zlib

from charset_normalizer import from_bytes

from core.files import find

READ_BYTES = 1 << 18  # bytes read at a time, and the most characters in a piece of text
COMPRESSED = {'.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open, '.zst': None}  # .zst: see _decompress_zst()
ENDINGS = ('.parquet', *(ending + compressed for ending in ('.txt', '.jsonl') for compressed in ('', *COMPRESSED)))
EXPECTED = 'a .txt or .jsonl file (also .gz, .bz2, .xz, .zst), a .parquet file, or a folder of these'
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, 'utf-8-sig'),
    (codecs.BOM_UTF32_LE, 'utf-32'),  # before UTF-16, whose mark is the beginning of this one
    (codecs.BOM_UTF32_BE, 'utf-32'),
    (codecs.BOM_UTF16_LE, 'utf-16'),
    (codecs.BOM_UTF16_BE, 'utf-16'))
# gb18030 is a superset of GBK and GB2312, big5hkscs of Big5
GUESSES = ['gb18030', 'big5hkscs', 'utf_16_le', 'utf_16_be', 'shift_jis', 'euc_jp', 'euc_kr']


def find_files(path):
    """
    Return the file `path`, whatever its ending, or the readable files in this folder and its subfolders, sorted and
    without hidden ones. Exits if there are none.
    """
    path = find(path)
    if not os.path.isdir(path):
        if not os.path.exists(path):
            sys.exit(f'{path}: no such file or folder; expected {EXPECTED}')
        return [path]
    found = []
    for folder, folders, names in os.walk(path, onerror=_cannot_read):
        folders[:] = [name for name in folders if not name.startswith('.')]
        for name in names:
            file = os.path.join(folder, name)
            if name.lower().endswith(ENDINGS) and not name.startswith('.') and os.path.isfile(file):
                found.append(file)
    if not found:
        sys.exit(f'{path}: no {", ".join(ENDINGS[1:])} or {ENDINGS[0]} file in this folder')
    return sorted(found)


def _cannot_read(error):
    sys.exit(f'{error.filename}: {error.strerror}; expected {EXPECTED}')


def read_documents(paths, field='text', skip_bad=False, skipped=None):
    """
    Read the documents of a file, of all files in a folder, or of the files in an iterable. A text file is one document,
    a .jsonl file has one per line and a .parquet file one per row, in this field.
    Yields the text of each document in pieces, then None, also for a document without text. Pieces of a text file have
    at most READ_BYTES characters; a line or row is one piece.
    Exits if a file cannot be read. With skip_bad, files in an unknown encoding are left out and appended to the list
    `skipped`.
    """
    skipped = [] if skipped is None else skipped
    if isinstance(paths, (str, os.PathLike)):
        paths = find_files(paths)
    for path in paths:
        path = os.fspath(path)
        try:
            if path.lower().endswith('.parquet'):
                yield from _read_parquet(path, field)
                continue
            encoding, fault = guess_encoding(path)
            if encoding and _is_jsonl(path):
                yield from _read_jsonl(path, encoding, field)
            elif encoding:
                yield from _read_text(path, encoding)
            elif not skip_bad:
                sys.exit(f'{path}: {fault}, nor does another encoding fit; '
                         'convert it from the one it is in, for example: iconv -f LATIN1 -t UTF-8 FILE > utf8.txt; '
                         '--skip_bad=True leaves such files out')
            elif path not in skipped:
                skipped.append(path)
                print(f'{path}: left out: {fault}, nor does another encoding fit', file=sys.stderr)
        except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeError) as error:
            # a UnicodeError means that the file has changed since its encoding was determined
            reason = getattr(error, 'strerror', None)  # only errors of the operating system have one
            if reason:
                sys.exit(f'{path}: {reason}; expected {EXPECTED}')
            sys.exit(f'{path}: damaged or not what its ending says: {error}')


def _is_jsonl(path):
    stem, ending = os.path.splitext(path.lower())
    if ending in COMPRESSED:
        return stem.endswith('.jsonl')
    return path.lower().endswith('.jsonl')

# ----------------------------------------------------------------------------- bytes and encodings


def _blocks(path):
    """
    Yield the (decompressed) bytes of a file in blocks, never empty. A .zst block can have some MB if the text repeats
    itself.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending == '.zst':
        yield from _decompress_zst(path)
        return
    with COMPRESSED.get(ending, open)(path, 'rb') as f:
        while block := f.read(READ_BYTES):
            yield block


def _decompress_zst(path):
    try:
        import zstandard
    except ImportError:
        sys.exit(f'{path}: .zst needs zstandard: pip install zstandard')
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # the window of zstd --long=31
    frame = decompressor.decompressobj()  # stream_reader would accept a truncated file
    with open(path, 'rb') as f:
        try:
            while compressed := f.read(1 << 10):
                while compressed:
                    if frame.eof:
                        frame = decompressor.decompressobj()
                    if block := frame.decompress(compressed):
                        yield block
                    compressed = frame.unused_data
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from None
    if not frame.eof:
        raise EOFError('the file ends before its last frame does')


def _decode(path, encoding, translate=False):
    """
    Yield the text of a file block by block. translate: turn every kind of newline into one line feed, as Python's
    open() does.
    A UnicodeDecodeError has an attribute `offset`, counted from the start of the (decompressed) file.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    if translate:
        decoder = io.IncrementalNewlineDecoder(decoder, translate=True)
    read = 0
    for block in itertools.chain(_blocks(path), [b'']):
        read += len(block)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            error.offset = read - len(error.object) + error.start  # error.object ends at the last byte read
            raise
        yield text


def guess_encoding(path):
    """
    Return (encoding, '') in which the entire file decodes: that of its byte order mark, UTF-8, or the likeliest of
    GUESSES.
    Return (None, what is wrong with it as UTF-8) if there is none. Prints the encoding once if it is not UTF-8.
    """
    stat = os.stat(path)
    return _guess_encoding(path, stat.st_size, stat.st_mtime_ns)


@functools.cache  # every file is read at least twice, and a guess may read it two more times
def _guess_encoding(path, size, modified):
    """guess_encoding() for a file of this size and modification time, which are only part of the cache's key."""
    encoding, fault = _try_utf(path)
    if encoding:
        if not encoding.startswith('utf-8'):
            print(f'{path}: read as {encoding}')
        return encoding, ''
    sample = _read_sample(path)
    for dropped in range(4):  # bytes left out at the end, where a character may be cut
        # The threshold is above the library's, which rejects one Chinese text in fifty. Wrong guesses fail on the
        # entire file.
        for guess in from_bytes(sample[:len(sample) - dropped], cp_isolation=GUESSES, threshold=0.5):
            if _decodes(path, guess.encoding):
                print(f'{path}: read as {guess.encoding}')
                return guess.encoding, ''
    return None, fault


def _try_utf(path):
    """Return (encoding, '') if the byte order mark or UTF-8 fits the entire file, else (None, what is wrong)."""
    start = b''
    for block in _blocks(path):
        start += block
        if len(start) >= 4:
            break
    marked = [encoding for mark, encoding in BYTE_ORDER_MARKS if start.startswith(mark)][:1]
    fault = ''
    for encoding in [*marked, 'utf-8']:
        characters = zeros = 0
        try:
            for text in _decode(path, encoding):
                characters += len(text)
                zeros += text.count('\0')
        except UnicodeDecodeError as error:
            fault = f'byte 0x{error.object[error.start]:02x} at offset {error.offset:,} is not UTF-8'
            continue
        if zeros <= characters / 4:
            return encoding, ''
        # perhaps English in UTF-16
        fault = f'{zeros:,} of {characters:,} characters are NUL, which is not UTF-8 text'
    return None, fault


def _read_sample(path):
    """
    Return the first 64 KB of a file, without the ASCII text at its beginning, which says nothing about the encoding.
    """
    sample = b''
    for block in _blocks(path):
        sample += block
        if len(sample) >= 1 << 16 and b'\0' not in sample:  # NUL: UTF-16, in which ASCII bytes are part of characters
            sample = sample.lstrip(bytes(range(128)))
        if len(sample) >= 1 << 16:
            break
    return sample


def _decodes(path, encoding):
    """Return whether the entire file is valid in this encoding."""
    try:
        for _ in _decode(path, encoding):
            pass
    except UnicodeDecodeError:
        return False
    return True

# ----------------------------------------------------------------------------- kinds of files


def _read_text(path, encoding):
    for text in _decode(path, encoding, translate=True):
        for i in range(0, len(text), READ_BYTES):
            yield text[i:i + READ_BYTES]
    yield None


def _lines(texts):
    """Yield the lines of a text that arrives in pieces; only line feeds end a line."""
    parts = []  # of an unfinished line: a very long one is joined only once
    for text in texts:
        *ended, rest = text.split('\n')
        for line in ended:
            yield ''.join((*parts, line))
            parts = []
        parts.append(rest)
    yield ''.join(parts)


def _read_jsonl(path, encoding, field):
    for number, line in enumerate(_lines(_decode(path, encoding)), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[field]
            if not isinstance(text, str | None):
                raise TypeError(f'it is a {type(text).__name__}')
            # an escape in JSON can be half of a surrogate pair; it becomes U+FFFD
            text = (text or '').encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            sys.exit(f'{path}, line {number}: expected an object with a text in "{field}" (--field names another): '
                     f'{type(error).__name__}: {error}')
        if text:
            yield text
        yield None


def _read_parquet(path, field):
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        sys.exit(f'{path}: .parquet needs pyarrow: pip install pyarrow')
    try:
        # a small buffer without pre-buffering, so that a row group is never in memory in full
        with ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False) as file:
            columns = file.schema_arrow.names
            if field not in columns:
                sys.exit(f'{path}: no column "{field}" (--field names another), there are: {", ".join(columns)}')
            number = 0
            for batch in file.iter_batches(batch_size=64, columns=[field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if text is not None and not isinstance(text, str):
                        sys.exit(f'{path}, row {number}: expected a text in "{field}" (--field names another), '
                                 f'not {type(text).__name__}')
                    if text:
                        yield text
                    yield None
    except (ArrowException, ValueError) as error:
        sys.exit(f'{path}: damaged or not a .parquet file: {str(error).splitlines()[0]}')
