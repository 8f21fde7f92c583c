"""What several benchmarks use: clocks, ratios, a dataset of random tokens, and a run of train.py that is stopped."""
import json
import os
import re
import statistics
import subprocess
import sys
import time

import numpy as np
import torch

from core.files import ROOT
from core.text.tokenizer import char_tokenizer

SKIPPED_STEPS = 2  # the first steps of a run, which are slower, are not timed


def duration(function):
    """Return the seconds that a call of `function` takes."""
    t0 = time.perf_counter()
    function()
    return time.perf_counter() - t0


def median_ms(function, repeats):
    """Return the median milliseconds of `repeats` calls, after a first call that is not timed."""
    function()
    return statistics.median(duration(function) for _ in range(repeats)) * 1000


def print_ratios(name, ours, others):
    """Print ours / others for every pair, and for the medians."""
    pairs = ', '.join(f'{a / b:.3f}' for a, b in zip(ours, others))
    print(f'{name}: {pairs}; of the medians: {statistics.median(ours) / statistics.median(others):.3f}')


def random_dataset(out):
    """Write a dataset of random tokens with GPT-2's 50,257 ids, which nanoGPT can read too. Returns its folder."""
    folder = os.path.join(out, 'random')
    os.makedirs(folder, exist_ok=True)
    for split in ('train', 'val'):
        tokens = np.random.default_rng(0).integers(50257, size=2**21, dtype=np.uint16)
        tokens.tofile(os.path.join(folder, f'{split}.bin'))
    characters = map(chr, range(256, 256 + 50256))  # any 50,256; the tokenizer adds <|endoftext|>
    for name, content in (
        ('meta.json', '{"dtype": "uint16"}'),
        ('tokenizer.json', char_tokenizer(characters).json),
    ):
        with open(os.path.join(folder, name), 'w', encoding='utf-8') as f:
            f.write(content)
    return folder


def time_train(folder, arguments, out, steps, seconds, trace='', bare=False):
    """
    Run folder/train.py in a process of its own (benchmarks/run_and_time.py) and stop it when `steps` steps are timed,
    or at least 3 in `seconds`. Returns what run_and_time.py writes; None if the dataset of `arguments` does not exist.
    Exits if train.py fails. On a GPU it prints every tenth step only: nanoGPT waits for the GPU to print a loss.
    out: folder for the result. trace: file for a profile of 3 steps, or ''. bare: see run_and_time.py.
    """
    job = {
        'folder': folder,
        'result': os.path.join(out, 'result.json'),
        'skip': SKIPPED_STEPS,
        'steps': 3 if trace else steps,
        'seconds': seconds,
        'trace': trace,
        'bare': bare,
    }
    note = ' once more, for the trace' if trace else ''
    print(f'running {os.path.join(folder, "train.py")}{note}', flush=True)
    if torch.accelerator.is_available() and '--device=cpu' not in arguments and not trace:
        arguments = [*arguments, f'--log_interval={min(10, steps)}']
    command = [sys.executable, os.path.join(ROOT, 'benchmarks', 'run_and_time.py'), json.dumps(job), *arguments]
    done = subprocess.run(
        command,
        cwd=None if folder == ROOT else folder,  # nanoGPT finds its files only from its own folder
        env={**os.environ, 'PYTHONUTF8': '1'},
        capture_output=True, encoding='utf-8', errors='replace')
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        error = lines[-1] if lines else f'ended with {done.returncode}'
        if re.match(r'dataset=.*: no .*train\.bin', error):
            return None
        sys.exit(error if folder == ROOT else f'{folder}: {error}')
    for line in re.findall(r'warning: .*compile.*', done.stdout):
        print(line)
    with open(job['result'], encoding='utf-8') as f:
        result = json.load(f)
    if not result['times']:
        sys.exit(f'train.py ended before its {SKIPPED_STEPS + 1}rd step, so there was nothing to time; '
                 'raise --max_iters')
    return result
