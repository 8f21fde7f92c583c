"""Reading documents: every kind of text file, a few hundred KB at a time."""
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

BLOCK = 1 << 18  # bytes read at a time, and the most characters in a piece of text
PACKED = {'.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open, '.zst': None}
ENDINGS = ('.parquet', *(kind + packed for kind in ('.txt', '.jsonl') for packed in ('', *PACKED)))
EXPECTED = 'a .txt or .jsonl file (also .gz, .bz2, .xz, .zst), a .parquet file, or a folder of these'
MARKS = ((codecs.BOM_UTF8, 'utf-8-sig'), (codecs.BOM_UTF32_LE, 'utf-32'), (codecs.BOM_UTF32_BE, 'utf-32'),  # UTF-32's starts like UTF-16's
         (codecs.BOM_UTF16_LE, 'utf-16'), (codecs.BOM_UTF16_BE, 'utf-16'))
GUESSES = ['gb18030', 'big5hkscs', 'utf_16_le', 'utf_16_be', 'shift_jis', 'euc_jp', 'euc_kr']  # gb18030 has GBK's and GB2312's characters too, big5hkscs Big5's
skipped = []  # the files that skip_bad left out


def find_files(path):
    """The file `path`, whatever its name, or the readable files in the folder and below, sorted, without hidden ones. None: one line."""
    path = find(path)
    if not os.path.isdir(path):
        if not os.path.exists(path):
            sys.exit(f'{path}: no such file or folder; expected {EXPECTED}')
        return [path]
    found = []
    for folder, folders, names in os.walk(path, onerror=_cannot_read):
        folders[:] = [name for name in folders if not name.startswith('.')]
        found += [os.path.join(folder, name) for name in names if name.lower().endswith(ENDINGS) and not name.startswith('.')]
    found = [path for path in found if os.path.isfile(path)]
    return sorted(found) or sys.exit(f'{path}: no {", ".join(ENDINGS[1:])} or {ENDINGS[0]} file in this folder')


def _cannot_read(error):
    sys.exit(f'{error.filename}: {error.strerror}; expected {EXPECTED}')


def read_documents(paths, field='text', skip_bad=False):
    """
    The documents of a file, of all files in a folder, or of the files that an iterable gives: a text is one document, a .jsonl file has
    one a line, a .parquet file one a row, in this field. Yields a document's text in pieces of at most BLOCK characters (that of a line
    or a row whole), then None, also for a document without text. Whatever is wrong with a file ends the script with one line, but with
    skip_bad a file whose encoding cannot be told is left out and noted in `skipped`.
    """
    for path in find_files(paths) if isinstance(paths, (str, os.PathLike)) else paths:
        path = os.fspath(path)
        try:
            if path.lower().endswith('.parquet'):
                yield from _read_parquet(path, field)
                continue
            encoding, fault = guess_encoding(path)
            if encoding:
                stem, ending = os.path.splitext(path.lower())
                is_jsonl = (stem if ending in PACKED else path.lower()).endswith('.jsonl')
                yield from _read_jsonl(path, encoding, field) if is_jsonl else _read_text(path, encoding)
            elif not skip_bad:
                sys.exit(f'{path}: {fault}, nor does another encoding fit; convert it from the one it is in, for example: '
                         'iconv -f LATIN1 -t UTF-8 FILE > utf8.txt; --skip_bad=True leaves such files out')
            elif path not in skipped:
                skipped.append(path)
                print(f'{path}: left out: {fault}, nor does another encoding fit', file=sys.stderr)
        except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeError) as error:  # UnicodeError: it was changed since the guess
            reason = getattr(error, 'strerror', None)  # only the system's own errors have one
            sys.exit(f'{path}: {reason}; expected {EXPECTED}' if reason else f'{path}: damaged or not what its ending says: {error}')

# ----------------------------------------------------------------------------- bytes and encodings


def _blocks(path):
    """The bytes of a file, unpacked, never empty. Of a .zst a block may have some MB where the text only repeats."""
    ending = os.path.splitext(path)[1].lower()
    if ending == '.zst':
        yield from _unpack_zst(path)
        return
    with PACKED.get(ending, open)(path, 'rb') as f:
        while block := f.read(BLOCK):
            yield block


def _unpack_zst(path):
    try:
        import zstandard
    except ImportError:
        sys.exit(f'{path}: .zst needs zstandard: pip install zstandard')
    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # what zstd --long=31 writes
    frame = unpacker.decompressobj()  # and not stream_reader, which takes a file cut short for a whole one
    with open(path, 'rb') as f:
        try:
            while packed := f.read(1 << 10):
                while packed:
                    if frame.eof:
                        frame = unpacker.decompressobj()
                    if block := frame.decompress(packed):
                        yield block
                    packed = frame.unused_data
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from None
    if not frame.eof:
        raise EOFError('the file ends before its last frame does')


def _decode(path, encoding, translate=False):
    """
    The text of a file as it is read; translate: every kind of newline becomes one line feed, as when Python opens a text.
    A UnicodeDecodeError has `offset`, counted from the start of the (unpacked) file.
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
            error.offset = read - len(error.object) + error.start  # what it decoded ends where we have read to
            raise
        yield text


def guess_encoding(path):
    """
    (encoding, ''), in which the whole file decodes: what a byte order mark says, or UTF-8, or the likeliest of GUESSES. (None, what is wrong
    with it as UTF-8) if there is none. Prints what is not UTF-8, once.
    """
    stat = os.stat(path)
    return _guess(path, stat.st_size, stat.st_mtime_ns)


@functools.cache  # every file is read twice, and this may take a third and a fourth time
def _guess(path, size, time):
    start = b''
    for block in _blocks(path):
        start += block
        if len(start) >= 4:
            break
    fault = ''
    for encoding in [name for mark, name in MARKS if start.startswith(mark)][:1] + ['utf-8']:
        try:
            characters = zeros = 0
            for text in _decode(path, encoding):
                characters += len(text)
                zeros += text.count('\0')
        except UnicodeDecodeError as error:
            fault = f'byte 0x{error.object[error.start]:02x} at offset {error.offset:,} is not UTF-8'
            continue
        if zeros <= characters / 4:
            if not encoding.startswith('utf-8'):
                print(f'{path}: read as {encoding}')
            return encoding, ''
        fault = f'{zeros:,} of {characters:,} characters are NUL, which is not UTF-8 text'  # English in UTF-16, perhaps
    sample = b''
    for block in _blocks(path):
        sample += block
        if len(sample) >= 1 << 16 and b'\0' not in sample:  # not UTF-16
            sample = sample.lstrip(bytes(range(128)))  # a preface in English tells nothing
        if len(sample) >= 1 << 16:
            break
    for cut in range(4):  # bytes off its end, where it may be in the middle of a character
        # a threshold above the library's, which refuses one Chinese text in fifty; what is wrong for the whole file is refused below
        for guess in from_bytes(sample[:len(sample) - cut], cp_isolation=GUESSES, threshold=0.5):
            try:
                for _ in _decode(path, guess.encoding):
                    pass
            except UnicodeDecodeError:
                continue
            print(f'{path}: read as {guess.encoding}')
            return guess.encoding, ''
    return None, fault

# ----------------------------------------------------------------------------- kinds of files


def _read_text(path, encoding):
    for text in _decode(path, encoding, translate=True):
        for i in range(0, len(text), BLOCK):
            yield text[i:i + BLOCK]
    yield None


def _lines(pieces):
    parts = []  # of a line, so that a very long one is joined once
    for piece in pieces:
        *ended, rest = piece.split('\n')
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
            text = (text or '').encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')  # JSON can spell half a character
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
        with ParquetFile(path, buffer_size=BLOCK, pre_buffer=False) as file:  # so that a row group is not in memory as a whole
            if field not in file.schema_arrow.names:
                sys.exit(f'{path}: no column "{field}" (--field names another), there are: {", ".join(file.schema_arrow.names)}')
            rows = (text for batch in file.iter_batches(batch_size=64, columns=[field]) for text in batch.column(0).to_pylist())
            for number, text in enumerate(rows, 1):
                if text is not None and not isinstance(text, str):
                    sys.exit(f'{path}, row {number}: expected a text in "{field}" (--field names another), not {type(text).__name__}')
                if text:
                    yield text
                yield None
    except (ArrowException, ValueError) as error:
        sys.exit(f'{path}: damaged or not a .parquet file: {str(error).splitlines()[0]}')
