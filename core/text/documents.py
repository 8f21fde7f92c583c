"""Read documents from text files of every usual format and encoding, a few hundred KB at a time."""
import bz2
import codecs
import csv
import functools
import gzip
import io
import itertools
import json
import lzma
import os
import re
import sys
import zlib

from charset_normalizer import from_bytes

from core.files import find, quoted

READ_BYTES = 1 << 18  # bytes read at a time, and the most characters in a piece of text
COMPRESSED = {'.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open, '.zst': None}  # .zst: see _decompress_zst()
KINDS = ('.txt', '.md', '.jsonl', '.json', '.csv', '.tsv')  # each may be compressed
COMPRESSED_ENDING = '|'.join(map(re.escape, COMPRESSED))
ENDINGS = ('.parquet', *(kind + compressed for kind in KINDS for compressed in ('', *COMPRESSED)))
EXPECTED = ('a .txt, .md, .jsonl, .json, .csv or .tsv file (also .gz, .bz2, .xz, .zst), a .parquet file, '
            'or a folder of these')
CONVERSIONS = {  # files that are not taken for text: how to make something readable of them
    ('.zip', '.tar', '.tgz', '.tbz2', '.txz', '.7z', '.rar'): 'unpack it and give the folder',
    ('.html', '.htm', '.xhtml', '.epub', '.docx', '.odt', '.rtf', '.fb2'): 'pandoc -t plain -o text.txt {}',
    ('.pdf',): 'pdftotext {} text.txt',
    ('.doc', '.ppt', '.pptx'): 'save it as a .txt in the program that opens it',
    ('.mobi', '.azw', '.azw3'): 'ebook-convert {} text.txt',
    ('.xlsx', '.xls', '.ods'): 'save it as a .csv in the program that opens it',
    ('.xml',): 'write its texts to a .txt or a .jsonl by a script',
    ('.yaml', '.yml', '.toml'): 'write its texts to a .json by a script',
    ('.arrow', '.feather', '.npy', '.npz', '.pkl', '.pickle', '.db', '.sqlite', '.bin', '.pt', '.safetensors'):
        'write its texts to a .jsonl or a .parquet by a script'}
CONVERSION_OF = {ending: how for endings, how in CONVERSIONS.items() for ending in endings}
LARGE_JSON = 500_000_000  # bytes; Python needs several times as much memory
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, 'utf-8-sig'),
    (codecs.BOM_UTF32_LE, 'utf-32'),  # before UTF-16, whose mark is the beginning of this one
    (codecs.BOM_UTF32_BE, 'utf-32'),
    (codecs.BOM_UTF16_LE, 'utf-16'),
    (codecs.BOM_UTF16_BE, 'utf-16'))
# gb18030 is a superset of GBK and GB2312, big5hkscs of Big5
GUESSES = ['gb18030', 'big5hkscs', 'utf_16_le', 'utf_16_be', 'shift_jis', 'euc_jp', 'euc_kr']


def ending_of(path):
    """Return the ending of a file's name in lower case, without that of a compression: '.txt' for 'a.TXT.gz'."""
    found = re.search(rf'(\.\w+)({COMPRESSED_ENDING})?$', os.path.basename(path).lower())
    return found[1] if found else ''


def name_of(path):
    """Return the name of a file or folder without the endings of the files that are read."""
    kinds = '|'.join(map(re.escape, (*KINDS, '.parquet')))
    return re.sub(rf'(?i)({kinds})?({COMPRESSED_ENDING})?$', '', os.path.basename(os.path.abspath(path)))


def find_files(path):
    """
    Return the file `path`, whatever its ending, or the readable files in this folder and its subfolders, sorted and
    without hidden ones and readmes. Exits if there are none.
    """
    path = find(path)
    if not os.path.isdir(path):
        if not os.path.exists(path):
            sys.exit(f'{path}: no such file or folder; expected {EXPECTED}')
        return [path]
    found, names_seen = [], set()
    for folder, folders, names in os.walk(path, onerror=_cannot_read):
        names_seen.update(names)
        folders[:] = [name for name in folders if not name.startswith('.')]
        for name in names:
            file = os.path.join(folder, name)
            is_about_others = name.lower().startswith(('.', 'readme'))
            if name.lower().endswith(ENDINGS) and not is_about_others and os.path.isfile(file):
                found.append(file)
    if not found:
        sys.exit(f'{path}: no file in this folder that is read; expected {EXPECTED}{_convertible(names_seen)}')
    return sorted(found)


def _convertible(names):
    """Return how the first of these files that has to be converted is converted, '' if there is none."""
    for name in sorted(names):
        if ending_of(name) in CONVERSION_OF:
            return f'; of {name}: {_conversion(name)}'
    return ''


def _conversion(path):
    return CONVERSION_OF[ending_of(path)].format(quoted(os.path.basename(path)))


def _cannot_read(error):
    sys.exit(f'{error.filename}: {error.strerror}; expected {EXPECTED}')


def read_documents(paths, field='text', skip_bad=False, skipped=None):
    """
    Read the documents of a file, of all files in a folder, or of the files in an iterable. A text file is one document.
    A .jsonl file has one per line, a .json file one per item of its list, a .csv, .tsv or .parquet file one per row, in
    this field. A list of texts in the field is joined by newlines.
    Yields the text of each document in pieces, then None, also for a document without text. Pieces of a text file have
    at most READ_BYTES characters; a line, item or row is one piece.
    Exits if a file cannot be read. With skip_bad, files in an unknown encoding, and files whose first record has no
    such field, are left out and appended to the list `skipped`.
    """
    skipped = [] if skipped is None else skipped
    if isinstance(paths, (str, os.PathLike)):
        paths = find_files(paths)
    for path in paths:
        path = os.fspath(path)
        try:
            yield from _read_file(path, field)
        except Unreadable as error:
            message, reason = error.args
            if not skip_bad:
                sys.exit(f'{message}; --skip_bad=True leaves such files out')
            if path not in skipped:
                skipped.append(path)
                print(f'{path}: left out: {reason}', file=sys.stderr)
        except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeError) as error:
            # a UnicodeError means that the file has changed since its encoding was determined
            reason = getattr(error, 'strerror', None)  # only errors of the operating system have one
            if reason:
                sys.exit(f'{path}: {reason}; expected {EXPECTED}')
            sys.exit(f'{path}: damaged or not what its ending says: {error}')


class Unreadable(Exception):
    """A file that --skip_bad leaves out. Arguments: the message without it, and the reason with it."""


def _read_file(path, field):
    ending = ending_of(path)
    if ending in CONVERSION_OF:
        sys.exit(f'{path}: {ending} is not read as text; expected {EXPECTED}; to convert it: {_conversion(path)}')
    encoding = None
    if ending != '.parquet':
        encoding, fault = guess_encoding(path)
        if not encoding:
            reason = f'{fault}, nor does another encoding fit'
            raise Unreadable(f'{path}: {reason}; convert it from the one it is in, for example: '
                             'iconv -f LATIN1 -t UTF-8 FILE > utf8.txt', reason)
    if ending not in RECORDS:
        yield from _read_text(path, encoding)
        return
    is_first = True
    for where, record in RECORDS[ending](path, encoding, field):
        try:
            text = _text_of(record, field)
        except KeyError:
            present = ' '.join(', '.join(record).split())[:200] or 'nothing'
            message = f'{path}, {where}: no "{field}" (--field names another), there are: {present}'
            if is_first:
                raise Unreadable(message, f'no "{field}" in it') from None
            sys.exit(message)
        except TypeError as error:
            sys.exit(f'{path}, {where}: expected a text in "{field}" (--field names another), not {error}')
        if text:
            yield text
        yield None
        is_first = False


def _text_of(record, field):
    """
    Return the text in the field of a record, or the record if it is a text itself; a list of texts is joined by
    newlines. Raises KeyError if there is no such field, TypeError with the kind of what is there instead of a text.
    """
    text = record[field] if isinstance(record, dict) else record
    if isinstance(record, dict) and text is None:
        return ''
    if isinstance(text, list) and all(isinstance(line, str) for line in text):
        text = '\n'.join(text)
    if not isinstance(text, str):
        raise TypeError(json_kind(text))
    # an escape in JSON can be half of a surrogate pair; it becomes U+FFFD
    return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


def json_kind(value):
    """Return what a value from JSON is, in words."""
    kinds = {type(None): 'null', bool: 'true or false', int: 'a number', float: 'a number', str: 'a text',
             list: 'a list', dict: 'an object'}
    return kinds.get(type(value), type(value).__name__)

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


def _jsonl_records(path, encoding, field):
    """Yield (where it is, record) for each line. The functions for other kinds of files do the same."""
    for number, line in enumerate(_lines(_decode(path, encoding)), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            sys.exit(f'{path}, line {number}: expected an object with a text in "{field}" (--field names another): '
                     f'{type(error).__name__}: {error}')
        yield f'line {number}', record


def _json_records(path, encoding, field):
    """Yield the items of the list in a .json file, which is parsed in one piece; or its lines, if each is an object."""
    lines = (line for line in _lines(_decode(path, encoding)) if line.strip())
    first, second = next(lines, ''), next(lines, '')
    if first.lstrip()[:1] == '{' and second.lstrip()[:1] == '{':  # as in the .json.gz files of C4
        yield from _jsonl_records(path, encoding, field)
        return
    _note_large_json(path)
    try:
        data = json.loads(''.join(_decode(path, encoding)))
    except (ValueError, RecursionError, MemoryError) as error:
        sys.exit(f'{path}: expected JSON: {type(error).__name__}: {error}')
    if isinstance(data, dict):
        lists = [key for key, value in data.items() if isinstance(value, list)]
        if field in data:
            data = [data]
        elif len(lists) == 1:
            data = data[lists[0]]
        else:
            raise Unreadable(f'{path}: an object with {len(lists)} lists ({", ".join(data)}); expected a list of '
                             f'objects with a text in "{field}" (--field names another), or an object with one list',
                             f'an object with {len(lists)} lists')
    if not isinstance(data, list):
        raise Unreadable(f'{path}: {json_kind(data)}; expected a list', json_kind(data))
    for number, record in enumerate(data, 1):
        yield f'item {number}', record


@functools.cache  # once, though the file is read at least twice
def _note_large_json(path):
    size = os.path.getsize(path)
    if size > LARGE_JSON:
        print(f'{path}: {size / 1e9:.1f} GB of JSON are parsed in one piece, which takes several times as much memory; '
              "a .jsonl is read line by line: jq -c '.[]' FILE > FILE.jsonl")


def _csv_records(path, encoding, field):
    """Yield the cells in a column of a .csv or .tsv file, which is written as spreadsheet programs do (RFC 4180)."""
    csv.field_size_limit(2**31 - 1)  # characters; the default is 131,072
    lines = (f'{line}\n' for line in _lines(_decode(path, encoding, translate=True)))
    rows = csv.reader(lines, delimiter='\t' if ending_of(path) == '.tsv' else ',', strict=True)
    try:
        header = next(rows, [])
        if field not in header:
            yield 'line 1', dict.fromkeys(header)
        column = header.index(field)
        for row in rows:
            if not row:  # an empty line
                continue
            if column >= len(row):
                sys.exit(f'{path}, line {rows.line_num}: {len(row)} columns; expected {len(header)}, '
                         'as in the first line')
            yield f'line {rows.line_num}', row[column]
    except csv.Error as error:
        sys.exit(f'{path}, line {rows.line_num}: {error}; expected cells with a separator, a quote or a newline in '
                 'double quotes, and quotes in them doubled')


def _parquet_records(path, encoding, field):
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
                yield 'columns', dict.fromkeys(columns)
            number = 0
            for batch in file.iter_batches(batch_size=64, columns=[field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield f'row {number}', {field: value}
    except (ArrowException, ValueError) as error:
        sys.exit(f'{path}: damaged or not a .parquet file: {str(error).splitlines()[0]}')


RECORDS = {'.jsonl': _jsonl_records, '.json': _json_records, '.csv': _csv_records, '.tsv': _csv_records,
           '.parquet': _parquet_records}
