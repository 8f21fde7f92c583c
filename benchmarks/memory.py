"""
The memory of a process that draws batches from everywhere in a large dataset of shards:

    python bench.py --what=memory --seconds=7200

The shards are holes: they use no space on the disk, but all that is read of them goes through the page cache.

A line has the seconds so far, the batches of 32 rows of 1,024 tokens so far, and the resident memory; there are 20. The
last line has the least and the most, from a tenth of the time on. Linux only.
"""
import os
import re
import tempfile
import time

from benchmarks.common import random_dataset
from core.text.dataset import open_dataset
from objectives import next_token

SHARD_BYTES = 10**9
ROWS, BLOCK_SIZE = 32, 1024


def measure_memory(gigabytes, seconds):
    with tempfile.TemporaryDirectory(dir='.') as out:
        data = open_dataset(sparse_dataset(out, gigabytes))
        resident = []  # bytes
        step = 0
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            starts = next_token.draw(data, ROWS, BLOCK_SIZE, 1337, step, 'epochs')
            next_token.load(data, 'train', starts, BLOCK_SIZE)
            step += 1
            if time.perf_counter() - started > seconds * (len(resident) + 1) / 20:
                resident.append(resident_bytes())
                print(f'{time.perf_counter() - started:.0f} s, {step:,} batches of 32 rows of 1,024: '
                      f'{resident[-1] / 1e6:.1f} MB', flush=True)
    settled = resident[1:]
    print(f'from a tenth of the time on between {min(settled) / 1e6:.1f} and {max(settled) / 1e6:.1f} MB')


def sparse_dataset(out, gigabytes):
    """Make a dataset folder whose training tokens are so many shards of zeros. Returns its path."""
    folder = random_dataset(os.path.abspath(out))
    os.remove(os.path.join(folder, 'train.bin'))
    for i in range(gigabytes):
        with open(os.path.join(folder, f'train_{i:05d}.bin'), 'wb') as f:
            f.truncate(SHARD_BYTES)  # a hole reads as zeros
    return folder


def resident_bytes():
    with open('/proc/self/status', encoding='utf-8') as f:
        return int(re.search(r'VmRSS:\s+(\d+)', f.read())[1]) * 1024
