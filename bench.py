"""
How fast: what stands in docs/RECORDS.md, measured again.

    python bench.py --nanogpt=../nanoGPT       # nanoGPT's laptop command, whole, in nanoGPT's folder and in ours, in turn
    python bench.py --what=attention           # the two ways to compute attention on this CPU, forward and backward
    python bench.py --what=prepare --text=big.txt --tokenizer=qwen2     # text to shards, beside tiktoken's own encode_ordinary_batch
"""
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch

from core.device import setup
from core.files import ROOT, find
from core.tokens import open_dataset
from model import attention
from objectives import next_token

# ---------------------------------------------------------------------------------------------------------------------------------------
what = 'laptop'  # 'laptop': a whole command beside nanoGPT's; 'attention': the rule in model.py; 'batch': drawing a batch; 'prepare': see above
text = ''  # a UTF-8 text for 'prepare'; some hundred MB, so that starting up does not count
tokenizer = 'qwen2'  # for 'prepare': qwen2 (all of it) or gpt2
nanogpt = ''  # a folder with nanoGPT and its prepared data/shakespeare_char
runs = 3  # of each; the median counts
# ---------------------------------------------------------------------------------------------------------------------------------------
config, config_given = {}, set()  # filled by the next line
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())

LAPTOP = ('train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 '
          '--n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0').split()

# what one would write without us: pieces of a quarter of a million characters, as many threads as cores, one file
BATCH = """
import os, sys; import numpy as np; from core.tokenizer import load_tokenizer
text = open(sys.argv[1], encoding='utf-8').read(); encoding = load_tokenizer(sys.argv[2])._tiktoken; n = 1 << 18
ids = encoding.encode_ordinary_batch([text[i:i + n] for i in range(0, len(text), n)], num_threads=len(os.sched_getaffinity(0)))
with open(sys.argv[3], 'wb') as f:
    for part in ids: f.write(np.array(part, dtype='<u4').tobytes())
"""


def seconds(function):
    t0 = time.perf_counter()
    function()
    return time.perf_counter() - t0


def median_ms(function, repeats):
    function()
    return statistics.median(seconds(function) for _ in range(repeats)) * 1000


if what == 'laptop':
    folders = {'nanoGPT': find(nanogpt), 'StoneGPT': ROOT}
    if not os.path.exists(os.path.join(folders['nanoGPT'], 'data', 'shakespeare_char', 'train.bin')):
        sys.exit(f'nanogpt={nanogpt}: expected a folder with nanoGPT whose data/shakespeare_char is prepared')
    times = {name: [] for name in folders}
    with tempfile.TemporaryDirectory() as out:
        for _ in range(runs):
            for name, folder in folders.items():
                command = [sys.executable, *LAPTOP, f'--out_dir={os.path.join(out, name)}']
                times[name].append(seconds(lambda: subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)))
                print(f'{name}: {times[name][-1]:.1f} s', flush=True)
    print(f'ratio of each pair: {", ".join(f"{b / a:.3f}" for a, b in zip(*times.values()))}; '
          f'of the medians: {statistics.median(times["StoneGPT"]) / statistics.median(times["nanoGPT"]):.3f}')
elif what == 'attention':
    setup('cpu', training=True)
    print('B x nh x T x hs        dtype      fused ms   plain ms   (forward and backward)')
    for B, nh, T, hs in ((12, 4, 64, 32), (16, 4, 128, 40), (8, 4, 256, 32), (64, 6, 256, 64), (4, 12, 512, 64), (1, 12, 1024, 64)):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(3, nh, B, T, hs, dtype=dtype, requires_grad=True)  # laid out as the network lays it out
            gradient = torch.randn(nh, B, T, hs, dtype=dtype)
            fused, plain = (median_ms(lambda: attention(*x, 0.0, plain).backward(gradient), 10 * runs if T < 256 else 2 * runs)
                            for plain in (False, True))
            print(f'{f"{B} x {nh} x {T} x {hs}":22} {str(dtype)[6:]:10} {fused:8.2f}   {plain:8.2f}', flush=True)
elif what == 'batch':
    data, generator = open_dataset('shakespeare_char'), torch.Generator()
    print(f'a batch of 12 x 64: {median_ms(lambda: next_token.load(data, "train", next_token.draw(data, 12, 64, generator), 64), 1000):.3f} ms')
elif what == 'prepare':
    times = {'tiktoken': [], 'StoneGPT': []}
    with tempfile.TemporaryDirectory() as out:
        os.makedirs(os.path.join(out, 'data'))
        commands = {'tiktoken': ['-c', BATCH, find(text), tokenizer, os.path.join(out, 'train.bin')],
                    'StoneGPT': [os.path.join(ROOT, 'data', 'any_text', 'prepare.py'), f'--input={find(text)}', f'--tokenizer={tokenizer}', '--prune=False', '--name=x']}
        for _ in range(runs):
            for name, command in commands.items():
                times[name].append(seconds(lambda: subprocess.run([sys.executable, *command], cwd=out, check=True, stdout=subprocess.DEVNULL,
                                                                  env={**os.environ, 'PYTHONPATH': ROOT})))
                print(f'{name}: {times[name][-1]:.1f} s, {os.path.getsize(find(text)) / 1e6 / times[name][-1]:.1f} MB/s', flush=True)
    print(f'our throughput over that of tiktoken, pair by pair: {", ".join(f"{a / b:.3f}" for a, b in zip(*times.values()))}; '
          f'of the medians: {statistics.median(times["tiktoken"]) / statistics.median(times["StoneGPT"]):.3f}')
else:
    sys.exit(f'what={what}: expected laptop, attention, batch or prepare')
