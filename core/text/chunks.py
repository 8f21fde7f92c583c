"""Long texts in pieces that can be encoded each by itself, by many threads."""
import os
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from core.text.documents import BLOCK

# Where words end whatever follows, in GPT-2 and Qwen2 and others like them: after a line feed that stands alone, before a space that stands
# alone, and between a letter and a mark.
CUT = re.compile(r'(?<=\S\n)(?=\w)|(?<=\S)(?= \S)|(?<=[^\W\d_])(?=[,.:;!?，。、：；！？])')


def cut_before(text):
    """
    Where to cut a text so that its two parts encode to the ids of the whole: the last such place, 0 if there is none yet, so that more text
    is gathered. A single word of a million characters is none of any language and is cut where it stands.
    """
    for tail in (text[-1000:], text):
        places = [match.start() for match in CUT.finditer(tail)]
        if places:
            return len(text) - len(tail) + places[-1]
    return len(text) if len(text) >= 4 * BLOCK else 0


def cut_up(parts, size):
    """
    (split, text, whether a part ends after it), from texts of about `size` characters that can be encoded each by itself. How the text
    arrives in pieces makes no difference.
    """
    text, start, wanted = '', 0, size  # gathered, used up so far, looked at next
    for split, more in parts:
        if more is None:
            yield split, text[start:], True
            text, start, wanted = '', 0, size
            continue
        text, start = text[start:] + more, 0
        while len(text) - start >= wanted:
            cut = cut_before(text[start:start + wanted])
            if cut:
                yield split, text[start:start + cut], False
            start, wanted = start + cut, size if cut else 2 * wanted


def batches_of(texts):
    """Lists of such texts, each of about BLOCK characters."""
    batch, size = [], 0
    for entry in texts:
        batch.append(entry)
        size += len(entry[1])
        if size >= BLOCK:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def in_order(function, batches, threads=0):
    """
    function(batch) of each, in order, computed by so many threads, 0: one for each core. Tokenizing leaves Python's lock alone. Few batches
    are in memory at a time.
    """
    threads = threads or (len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())
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


def sample(texts, share):
    """An even sample of texts: this share of their characters."""
    read = taken = 0
    for text in texts:
        read += len(text)
        if taken < share * read:
            taken += len(text)
            yield text
