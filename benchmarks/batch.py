"""
Drawing a batch of nanoGPT's laptop command, 12 windows of 64 tokens, from data/shakespeare_char:

    python bench.py --what=batch

The line has the median milliseconds.
"""
from benchmarks.common import median_ms
from core.text.dataset import open_dataset
from objectives import next_token


def time_batch():
    data = open_dataset('shakespeare_char')

    def load_batch():
        starts = next_token.draw(data, 12, 64, 1337, 0)
        next_token.load(data, 'train', starts, 64)
    print(f'a batch of 12 x 64: {median_ms(load_batch, 1000):.3f} ms')
