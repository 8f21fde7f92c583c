"""
Benchmarks: the speed of training steps in any configuration, and the figures of docs/RECORDS.md.

    python bench.py config/train_gpt2.py --batch_size=8                     # steps of train.py with these arguments
    python bench.py config/train_shakespeare_char.py --nanogpt=../nanoGPT   # also of nanoGPT's, with the same settings
    python bench.py config/train_shakespeare_char.py --profile              # a trace; the ten most expensive operations
    python bench.py --nanogpt=../nanoGPT    # nanoGPT's laptop command from start to end, in its folder and in this one
    python bench.py --nanogpt=../nanoGPT --ours='config/train_shakespeare_char_cpu.py --n_layer=2 --max_iters=110'
    python bench.py --what=attention        # the two ways to compute attention on this CPU, forward and backward
    python bench.py --what=batch            # drawing a batch
    python bench.py --what=save             # the time that training waits for a checkpoint of GPT-2 124M
    python bench.py --what=trust --steps=600            # the cost of checkpoints, loss watch and signal handlers
    python bench.py --what=memory --seconds=7200        # memory of a process that reads all over a dataset of 32 GB
    python bench.py --what=prepare --text=big.txt       # text to token files, beside tiktoken alone
    python bench.py --sample --nanogpt=../nanoGPT --transformers    # GPT-2 124M generates one text and ten
    python bench.py --sample --network=char --new_tokens=63 --prompt_tokens=1   # a character model of 0.8M parameters
    python bench.py --sample --dtypes=int8 --samples=1 --llamacpp   # in eight bits, beside llama.cpp

benchmarks/<name>.py says what is measured and what the printed rows mean. Arguments that are not settings of this
script go to train.py. A step is one micro-batch unless --gradient_accumulation_steps is given.
"""
import core.startup  # noqa: F401  first: it catches Ctrl-C and missing packages in the imports below

import os
import re
import sys

from benchmarks.attention import time_attention
from benchmarks.batch import time_batch
from benchmarks.laptop import time_laptop
from benchmarks.memory import measure_memory
from benchmarks.prepare import time_prepare
from benchmarks.sampling import time_sampling
from benchmarks.saving import time_saving, time_trust
from benchmarks.steps import time_steps
from core.device import explain
from core.files import find

# ---------------------------------------------------------------------------------------------------------------------
what = ''  # steps, laptop, attention, batch, save, trust, memory, prepare, sample; '': steps, or laptop if no arguments
steps = 20  # number of timed steps, after two that are not timed; the median counts, on a GPU the mean
seconds = 60.0  # or as many steps as start in this time, but at least 3
nanogpt = ''  # a folder with nanoGPT; for 'laptop' with its prepared data/shakespeare_char
ours = ''  # 'laptop': arguments of our train.py; '': the same as nanoGPT's
runs = 3  # of each program, where two are compared; the median counts
profile = False  # write a trace of three steps, and print the most expensive operations
trace = 'trace.json'  # the file of the trace; chrome://tracing and https://ui.perfetto.dev show it
gigabytes = 32  # 'memory': size of the dataset; it uses no space on the disk, but all the page cache there is
sample = False  # the same as --what=sample
network = 'gpt2'  # 'sample': gpt2 (124M), char (0.8M), or a run whose shape is used; the weights are random
prompt_tokens = 16  # 'sample': length of the prompt
new_tokens = 256  # 'sample': tokens to generate
samples = '1,10'  # 'sample': numbers of texts at once
dtypes = 'float32,bfloat16,int8'  # 'sample': dtypes of the weights
transformers = False  # 'sample': also time transformers' generate(), in float32
llamacpp = False  # 'sample': also time llama.cpp with the same weights in Q8_0 (pip install gguf xllamacpp)
text = ''  # 'prepare': a UTF-8 text of some hundred MB, so that the start of a process does not count
tokenizer = 'qwen2'  # 'prepare': qwen2 (unpruned) or gpt2
# ---------------------------------------------------------------------------------------------------------------------
OTHER_ARGUMENTS = 'all'  # the arguments of train.py; the configurator puts them into other_arguments
other_arguments = []
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())

sys.excepthook = explain
if sample:
    what = 'sample'
if nanogpt:
    nanogpt = os.path.abspath(find(nanogpt))
if not what:
    what = 'laptop' if nanogpt and not other_arguments else 'steps'

if other_arguments and what != 'steps':
    sys.exit(f'bench.py: what={what} takes no {other_arguments[0]} (python bench.py --help lists its settings)')
if min(steps, runs, prompt_tokens, new_tokens) < 1:
    sys.exit(f'steps={steps}, runs={runs}, prompt_tokens={prompt_tokens}, new_tokens={new_tokens}: expected at least 1')
good_samples = re.fullmatch(r'[1-9]\d*(,[1-9]\d*)*', samples)
good_dtypes = {'float32', 'bfloat16', 'float16', 'int8'}.issuperset(dtypes.split(','))
if not good_samples or not good_dtypes:
    sys.exit(f'samples={samples}, dtypes={dtypes}: '
             'expected numbers, and float32, bfloat16, float16 or int8, separated by commas')
if nanogpt and not os.path.exists(os.path.join(nanogpt, 'train.py')):
    sys.exit(f'nanogpt={nanogpt}: expected a folder with nanoGPT; there is no train.py in it')
if profile and not os.path.isdir(os.path.dirname(os.path.abspath(os.path.expanduser(trace)))):
    sys.exit(f'trace={trace}: there is no such folder to write it to')

if what == 'steps':
    time_steps(other_arguments, steps, seconds, runs, nanogpt, trace if profile else '')
elif what == 'laptop':
    time_laptop(nanogpt, ours, runs)
elif what == 'attention':
    time_attention(runs)
elif what == 'batch':
    time_batch()
elif what == 'save':
    time_saving(runs)
elif what == 'trust':
    time_trust(steps, seconds, runs)
elif what == 'memory':
    measure_memory(gigabytes, seconds)
elif what == 'prepare':
    time_prepare(text, tokenizer, runs)
elif what == 'sample':
    rows = [int(n) for n in samples.split(',')]
    time_sampling(network, prompt_tokens, new_tokens, rows, dtypes.split(','), runs, nanogpt, transformers, llamacpp)
else:
    sys.exit(f'what={what}: expected steps, laptop, attention, batch, save, trust, memory, prepare or sample')
