"""
From a text on the disk to tokens on the disk: data/any_text/prepare.py beside what one would write with tiktoken alone.

    python bench.py --what=prepare --text=big.txt --tokenizer=qwen2

The text should have some hundred MB, so that the start of a process does not count.

A line is a run of a whole process: its seconds, and megabytes of text per second. The last line has the ratio of our
throughput to tiktoken's, for every pair.
"""
import os
import subprocess
import sys
import tempfile

from benchmarks.common import duration, print_ratios
from core.files import ROOT, find

# tiktoken's own batches: pieces of a quarter of a million characters, as many threads as cores, one file
TIKTOKEN_ONLY = """
import os
import sys

import numpy as np

from core.text.tokenizer import load_tokenizer

text = open(sys.argv[1], encoding='utf-8').read()
encoding = load_tokenizer(sys.argv[2])._tiktoken
n = 1 << 18
pieces = [text[i:i + n] for i in range(0, len(text), n)]
ids = encoding.encode_ordinary_batch(pieces, num_threads=len(os.sched_getaffinity(0)))
with open(sys.argv[3], 'wb') as f:
    for part in ids:
        f.write(np.array(part, dtype='<u4').tobytes())
"""


def time_prepare(text, tokenizer, runs):
    """text: path of a UTF-8 text. tokenizer: 'qwen2' or 'gpt2'."""
    path = find(text)
    if not os.path.isfile(path) or tokenizer not in ('qwen2', 'gpt2'):
        sys.exit(f'text={text}, tokenizer={tokenizer}: expected a text file, and qwen2 or gpt2')
    path = os.path.abspath(path)  # the processes run in another folder
    megabytes = os.path.getsize(path) / 1e6
    times = {'tiktoken': [], 'StoneGPT': []}
    with tempfile.TemporaryDirectory() as out:
        os.makedirs(os.path.join(out, 'data'))
        script = os.path.join(ROOT, 'data', 'any_text', 'prepare.py')
        commands = {
            'tiktoken': ['-c', TIKTOKEN_ONLY, path, tokenizer, os.path.join(out, 'train.bin')],
            'StoneGPT': [script, f'--input={path}', f'--tokenizer={tokenizer}', '--prune=False', '--name=x'],
        }
        for _ in range(runs):
            for name, command in commands.items():
                seconds = duration(lambda: run_python(command, out))
                times[name].append(seconds)
                print(f'{name}: {seconds:.1f} s, {megabytes / seconds:.1f} MB/s', flush=True)
    print_ratios('our throughput over that of tiktoken, pair by pair', times['tiktoken'], times['StoneGPT'])


def run_python(arguments, folder):
    subprocess.run([sys.executable, *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL,
                   env={**os.environ, 'PYTHONPATH': ROOT})
