"""Split long texts into chunks that can be encoded independently, and process batches of chunks in threads."""
import os
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from core.text.documents import READ_BYTES

# Places where GPT-2, Qwen2 and similar tokenizers always split words, whatever follows: after a single line feed,
# before a single space, and between a letter and a punctuation mark.
SAFE_BOUNDARY = re.compile(r'(?<=\S\n)(?=\w)|(?<=\S)(?= \S)|(?<=[^\W\d_])(?=[,.:;!?，。、：；！？])')


def last_boundary(text):
    """
    Return the last position at which the text can be split so that its parts encode to the same ids as the text.
    Return 0 if there is none yet, so that the caller gathers more text. A text of 4 * READ_BYTES characters without a
    boundary is no language; it is split at its end.
    """
    for tail in (text[-1000:], text):  # most texts have a boundary near the end
        boundaries = [match.start() for match in SAFE_BOUNDARY.finditer(tail)]
        if boundaries:
            return len(text) - len(tail) + boundaries[-1]
    return len(text) if len(text) >= 4 * READ_BYTES else 0


def chunk(parts, size):
    """
    Yield (split, text, whether a part ends after it): chunks of about `size` characters that can be encoded
    independently.
    parts: (split, text) pieces of any length; (split, None) ends a part. The chunks do not depend on the pieces'
    lengths.
    """
    text = ''  # what has arrived
    start = 0  # the first character that is not in a chunk yet
    n_search = size  # characters to search for a boundary
    for split, piece in parts:
        if piece is None:
            yield split, text[start:], True
            text, start, n_search = '', 0, size
            continue
        text, start = text[start:] + piece, 0
        while len(text) - start >= n_search:
            length = last_boundary(text[start:start + n_search])
            if length:
                yield split, text[start:start + length], False
                start += length
                n_search = size
            else:
                n_search *= 2


def batch_chunks(chunks):
    """Yield lists of chunks, with about READ_BYTES characters in each list."""
    batch, size = [], 0
    for entry in chunks:
        batch.append(entry)
        size += len(entry[1])
        if size >= READ_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def map_in_order(function, batches, threads=0):
    """
    Yield function(batch) for each batch, in order, computed by this many threads (0: one per core). Encoding releases
    the GIL.
    Only a few batches are in memory at a time.
    """
    if not threads:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    pool, waiting = ThreadPoolExecutor(threads), deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(function, batch))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def sample_evenly(texts, share):
    """Yield an even sample of the texts: this share of their characters."""
    read = taken = 0
    for text in texts:
        read += len(text)
        if taken < share * read:
            taken += len(text)
            yield text
