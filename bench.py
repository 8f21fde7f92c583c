"""
How fast: the steps of any configuration, and what stands in docs/RECORDS.md, measured again.

    python bench.py config/train_gpt2.py --batch_size=8                         # train.py's own steps with these arguments of its
    python bench.py config/train_shakespeare_char.py --nanogpt=../nanoGPT       # and nanoGPT's with the same settings, in turn
    python bench.py config/train_shakespeare_char.py --profile                  # a trace, and the ten most expensive operations
    python bench.py --nanogpt=../nanoGPT       # nanoGPT's laptop command, whole, in nanoGPT's folder and in ours, in turn
    python bench.py --nanogpt=../nanoGPT --ours='config/train_shakespeare_char_cpu.py --max_iters=110'   # there, and this one here
    python bench.py --what=attention           # the two ways to compute attention on this CPU, forward and backward
    python bench.py --what=save                # how long training waits for a checkpoint of GPT-2 124M, written beside it and not
    python bench.py --what=trust --steps=600   # the laptop command's steps with a checkpoint every 100, beside the same loop with nothing that looks after it
    python bench.py --what=memory --seconds=7200    # of a process that reads all over shards of 32 GB for two hours
    python bench.py --sample --nanogpt=../nanoGPT --transformers       # how fast GPT-2 124M writes, one text and ten, beside nanoGPT and transformers
    python bench.py --sample --network=char --new_tokens=63 --prompt_tokens=1     # the same of a character model of 0.8M parameters
    python bench.py --sample --dtypes=int8 --samples=1 --llamacpp      # and in eight bits, beside llama.cpp's
    python bench.py --what=prepare --text=big.txt --tokenizer=qwen2     # text to shards, beside tiktoken's own encode_ordinary_batch

Milliseconds and memory are those of whole steps of train.py, which is stopped after some: batches, forward, backward, optimizer. A step is
one micro-batch unless --gradient_accumulation_steps says otherwise. What is no setting of this script goes to train.py.
"""
import copy
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

import numpy as np
import torch

from core.device import explain, measured_peak, setup
from core.files import ROOT, find
from core.inference.generation import sample_token
from core.text.dataset import open_dataset
from core.text.tokenizer import char_tokenizer
from core.training.optimizer import configure_optimizer
from core.training.saver import Saver
from core.weights.checkpoint import checkpoint_path, describe, load_checkpoint
from core.weights.gguf import write_gguf
from core.weights.quantize import prepare_for_inference
from kernels import attention
from model import GPT, GPTConfig
from objectives import next_token

# ---------------------------------------------------------------------------------------------------------------------------------------
what = ''  # 'steps': of train.py; 'laptop': a whole command beside nanoGPT's; 'attention': the rule in model.py; 'batch': drawing one; 'save'; 'trust'; 'memory'; 'prepare'; 'sample'
steps = 20  # that are timed, after two that are not; the median counts
seconds = 60.0  # or as many as start in this time, but at least 3
nanogpt = ''  # a folder with nanoGPT; for 'laptop' with its prepared data/shakespeare_char
ours = ''  # for 'laptop': what train.py gets here, where that is not the same
runs = 3  # of each, where two are compared; the median counts
profile = False  # write a trace of three steps, and print where their time went
trace = 'trace.json'  # this is the file; chrome://tracing and https://ui.perfetto.dev show it
gigabytes = 32  # of shards for 'memory'; they take no room on the disk, but all the page cache there is
sample = False  # the same as --what=sample
network = 'gpt2'  # for 'sample', with random weights: gpt2 (124M), char (0.8M), or a run's folder, whatever it is, as it is
prompt_tokens = 16  # for 'sample': tokens that are there
new_tokens = 256  # for 'sample': tokens that are written
samples = '1,10'  # for 'sample': texts at once
dtypes = 'float32,bfloat16,int8'  # for 'sample': of the weights
transformers = False  # for 'sample': beside transformers' generate, in float32
llamacpp = False  # for 'sample': beside llama.cpp's, of the same weights in Q8_0 (pip install gguf xllamacpp)
text = ''  # a UTF-8 text for 'prepare'; some hundred MB, so that starting up does not count
tokenizer = 'qwen2'  # for 'prepare': qwen2 (all of it) or gpt2
# ---------------------------------------------------------------------------------------------------------------------------------------
OTHER_ARGUMENTS = 'all'  # those of train.py
config, config_given, other_arguments = {}, {}, []  # filled by the configurator
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())

LAPTOP = ('config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 '
          '--n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0').split()

# what one would write without us: pieces of a quarter of a million characters, as many threads as cores, one file
BATCH = """
import os, sys; import numpy as np; from core.text.tokenizer import load_tokenizer
text = open(sys.argv[1], encoding='utf-8').read(); encoding = load_tokenizer(sys.argv[2])._tiktoken; n = 1 << 18
ids = encoding.encode_ordinary_batch([text[i:i + n] for i in range(0, len(text), n)], num_threads=len(os.sched_getaffinity(0)))
with open(sys.argv[3], 'wb') as f:
    for part in ids: f.write(np.array(part, dtype='<u4').tobytes())
"""


def duration(function):
    t0 = time.perf_counter()
    function()
    return time.perf_counter() - t0


def median_ms(function, repeats):
    function()
    return statistics.median(duration(function) for _ in range(repeats)) * 1000


def watch(folder, arguments, out, trace='', bare=False):
    """What benchmarks/run_and_time.py finds out about train.py in `folder`; None if its dataset is not there."""
    job = dict(folder=folder, result=os.path.join(out, 'result.json'), skip=2, steps=3 if trace else steps, seconds=seconds, trace=trace, bare=bare)
    print(f'running {os.path.join(folder, "train.py")}{" once more, for the trace" * bool(trace)}', flush=True)
    done = subprocess.run([sys.executable, os.path.join(ROOT, 'benchmarks', 'run_and_time.py'), json.dumps(job), *arguments], cwd=None if folder == ROOT else folder,
                          capture_output=True, encoding='utf-8', errors='replace', env={**os.environ, 'PYTHONUTF8': '1'})
    if done.returncode:
        error = (done.stderr.strip().splitlines() or [f'ended with {done.returncode}'])[-1]
        if re.match(r'dataset=.*: no .*train\.bin', error):
            return None
        sys.exit(error if folder == ROOT else f'{folder}: {error}')
    for line in re.findall(r'warning: .*compile.*', done.stdout):
        print(line)
    with open(job['result'], encoding='utf-8') as f:
        result = json.load(f)
    if not result['times']:
        sys.exit(f'train.py ended before its {job["skip"] + 1}rd step, so there was nothing to time; raise --max_iters')
    return {**result, 'ms': statistics.median(result['times'])}


def random_tokens(out):
    """A dataset folder for both, of random tokens: 50,257 ids as GPT-2 has them."""
    folder = os.path.join(out, 'random')
    os.makedirs(folder, exist_ok=True)
    for split in ('train', 'val'):
        np.random.default_rng(0).integers(50257, size=2**21, dtype=np.uint16).tofile(os.path.join(folder, f'{split}.bin'))
    for name, content in (('meta.json', '{"dtype": "uint16"}'), ('tokenizer.json', char_tokenizer(map(chr, range(256, 256 + 50256))).json)):
        with open(os.path.join(folder, name), 'w', encoding='utf-8') as f:
            f.write(content)
    return folder


def readable(result):
    """Whether nanoGPT can read this dataset and gives the network the same vocabulary."""
    names = ['train.bin', 'val.bin'] + ['meta.pkl'] * (result['vocab_size'] != 50257)
    return all(os.path.exists(os.path.join(result['folder'], name)) for name in names)


def nanogpt_arguments(result):
    """Our settings as they were used, so far as nanoGPT has them; what it has no setting for is said."""
    with open(os.path.join(nanogpt, 'train.py'), encoding='utf-8') as f:
        known = re.findall(r'^(\w+) *= ', f.read().partition('\nconfig_keys')[0], re.MULTILINE)
    unknown = [argument for argument in other_arguments if argument.startswith('--') and argument[2:].partition('=')[0] not in known]
    if unknown:
        print(f'nanoGPT goes without {" ".join(unknown)}, which it does not know')
    if result['device'] == 'cpu' and result['dtype'] != 'float32':
        print(f'nanoGPT computes in float32 on a CPU, StoneGPT in {result["dtype"]} (--dtype=float32: both in that)')
    used = {key: value for key, value in result['config'].items() if key in known and not key.startswith('wandb') and key != 'backend'}
    used.update(dataset=result['folder'], device=result['device'], dtype=result['dtype'])
    return [f'--{key}={value}' for key, value in used.items()]


def compare_steps(out):
    quiet = ['--eval_only=False', '--eval_iters=1', '--eval_interval=1000000000', '--log_interval=1', '--wandb_log=False', f'--out_dir={os.path.join(out, "run")}']
    ours = [*other_arguments, *quiet, '--tensorboard_log=False', '--save_minutes=0', '--background_save=False']
    if not any(argument.startswith('--gradient_accumulation_steps=') for argument in other_arguments):
        ours.append('--gradient_accumulation_steps=1')
    first = watch(ROOT, ours, out)
    if not first or nanogpt and not readable(first):
        print('the dataset is not there' if not first else 'nanoGPT cannot read the dataset', "so random tokens of GPT-2's vocabulary stand in for it", sep=', ', flush=True)
        ours.append(f'--dataset={random_tokens(out)}')
        first = watch(ROOT, ours, out)
    results = {'StoneGPT': [first]}
    if nanogpt:
        theirs, results['nanoGPT'] = [*nanogpt_arguments(first), *quiet], []
        for i in range(runs):
            if i:
                results['StoneGPT'].append(watch(ROOT, ours, out))
            results['nanoGPT'].append(watch(nanogpt, theirs, out))
            print(', '.join(f'{name}: {found[i]["ms"]:.2f} ms' for name, found in results.items()), flush=True)
    run = setup(first['device'], first['dtype'], training=True)
    peak = run.peak_flops or measured_peak(run)
    print(f'{run.device} {run.dtype}, {first["tokens"]:,} tokens per step, {len(first["times"])} steps timed')
    print('            parameters  ms per step    tokens/s     MFU  peak memory')
    for name, found in results.items():
        ms, memory = statistics.median(result['ms'] for result in found), max(result['memory'] or 0 for result in found)
        print(f'{name:10} {found[0]["parameters"]:12,} {ms:12,.2f} {first["tokens"] / ms * 1000:11,.0f} {first["flops"] / ms * 1000 / peak:7.1%} '
              + (f'{memory / 1e6:9,.0f} MB' if memory else '           -'))
    print(f'MFU: % of {peak / 1e12:,.3g} TFLOP/s, '
          + ("this GPU's data sheet" if run.peak_flops else f"this {'CPU' if run.device == 'cpu' else 'GPU'}'s {run.dtype} matrix product, measured just now"))
    if nanogpt:
        print_ratios('StoneGPT / nanoGPT, ms per step', *([result['ms'] for result in results[name]] for name in ('StoneGPT', 'nanoGPT')))
    if profile:
        found = watch(ROOT, ours, out, os.path.abspath(os.path.expanduser(trace)))
        print(f'trace of 3 steps: {trace}; what took most time in them:\n   share  ms per step  calls per step  operation')
        for name, calls, ms, share in found['operations']:
            print(f'{share:8.1%} {ms / 3:12.2f} {calls / 3:15.0f}  {name[:90]}')


def print_ratios(name, ours, others):
    print(f'{name}: {", ".join(f"{a / b:.3f}" for a, b in zip(ours, others))}; of the medians: {statistics.median(ours) / statistics.median(others):.3f}')


def bandwidth(device):
    """Bytes a second in which this device reads its memory: the best of about a second of products of a matrix of 1 GB and a vector."""
    matrix, vector, best, started = torch.ones(2**18, 1024, device=device), torch.ones(1024, device=device), 0, time.perf_counter()
    while time.perf_counter() - started < 1 or not best:
        best = max(best, matrix.nbytes / duration(lambda: (matrix @ vector)[0].item()))  # waits for a GPU
    return best


def llamacpp_writer(model, prompt):
    """A function in which llama.cpp, with its own settings and as many threads as PyTorch has, continues a prompt (1, T)."""
    try:
        import xllamacpp
    except ImportError:
        sys.exit('xllamacpp, which is llama.cpp for Python, is not installed: pip install gguf xllamacpp')
    if prompt_tokens + new_tokens > model.config.block_size:
        sys.exit(f'prompt_tokens={prompt_tokens}, new_tokens={new_tokens}: llama.cpp writes no more than fits into the context, {model.config.block_size} tokens')
    with tempfile.TemporaryDirectory() as folder:  # what is open outlives it
        params = xllamacpp.CommonParams()
        params.model.path, params.hostnames, params.verbosity = os.path.join(folder, 'x.gguf'), [os.path.join(folder, 'x.sock')], -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        write_gguf(params.model.path, model, char_tokenizer(map(chr, range(2**16, 2**16 + model.config.vocab_size - 1))), 'q8_0', network)
        server = xllamacpp.Server(params)
    question = {'prompt': prompt[0].tolist(), 'max_tokens': new_tokens, 'ignore_eos': True, 'cache_prompt': False,
                'samplers': ['top_k', 'temperature'], 'top_k': 200, 'temperature': 0.8}

    def write():
        assert server.handle_completions(question)['usage']['completion_tokens'] == new_tokens
    return write


def compare_sampling():
    """Tokens per second, medians of `runs`, all in turn."""
    shape = {'gpt2': dict(bias=True), 'char': dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65, bias=False)}
    arguments = vars(GPTConfig(**{'vocab_size': 50257, **shape[network]})) if network in shape else load_checkpoint(checkpoint_path(network), 'meta')['model_args']
    if arguments['rope_theta'] and (nanogpt or transformers):
        sys.exit(f'network={network}: beside nanoGPT and transformers only networks of their GPT-2 can be timed')
    device = setup(dtype='float32').device
    limit = bandwidth(device)
    prompt = torch.randint(arguments['vocab_size'], (1, prompt_tokens), device=device)
    weights = GPT(GPTConfig(**arguments))
    print(f'{describe(weights)}; {device} reads {limit / 1e9:.1f} GB a second; {prompt_tokens} tokens, {new_tokens} more', flush=True)
    writers = {}  # {name: (texts at once, function that writes and returns when the first token came, bytes read for each step or None)}
    if nanogpt:
        spec = importlib.util.spec_from_file_location('nanogpt_model', os.path.join(nanogpt, 'model.py'))
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # its dataclass looks itself up
        spec.loader.exec_module(module)
        theirs = module.GPT(module.GPTConfig(**{key: arguments[key] for key in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias')})).eval().to(device)
        writers['nanoGPT'] = 1, lambda: theirs.generate(prompt, new_tokens, temperature=0.8, top_k=200), None
    if transformers:
        from transformers import GPT2Config, GPT2LMHeadModel
        peer = GPT2LMHeadModel(GPT2Config(vocab_size=arguments['vocab_size'], n_positions=arguments['block_size'], n_embd=arguments['n_embd'],
                                          n_layer=arguments['n_layer'], n_head=arguments['n_head'], eos_token_id=None, bos_token_id=None)).eval().to(device)
        writers['transformers'] = 1, lambda: peer.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=0.8, top_k=200,
                                                           max_new_tokens=new_tokens, pad_token_id=0), None

    if llamacpp:
        writers['llama.cpp'] = 1, llamacpp_writer(weights, prompt), None

    def writer(model, count, dtype):
        def write():
            torch.backends.mkldnn.set_flags(dtype != 'float32')  # as convert() has set it for this one
            came, t0 = [], time.perf_counter()
            for token in model.generate(prompt, new_tokens, lambda logits: sample_token(logits, torch.rand(count, 1, device=device), 0.8, 200), copies=count):
                token.tolist()  # waits for a GPU
                came.append(time.perf_counter() - t0)
            return came[0]
        return write
    for dtype in dtypes.split(','):
        for count in map(int, samples.split(',')):
            model = prepare_for_inference(copy.deepcopy(weights).to(device), dtype, count)
            size = sum(p.numel() for name, p in weights.named_parameters() if 'wpe' not in name) * {'float32': 4, 'int8': 1}.get(dtype, 2)
            writers[f'{dtype}, {count}'] = count, writer(model, count, dtype), size
            T = min(512, arguments['block_size'])
            with torch.no_grad():
                ms = median_ms(lambda: model.hidden(prompt[:, :1].repeat(1, T))[0, 0, 0].item(), 3)
            print(f'{dtype}, laid out for {count}: a prompt of {T} tokens at {T / ms * 1000:,.0f} tokens a second', flush=True)
    times, firsts = {name: [] for name in writers}, {name: [] for name in writers}
    for _ in range(runs):
        for name, (count, write, _) in writers.items():
            t0 = time.perf_counter()
            firsts[name].append(write())
            times[name].append(time.perf_counter() - t0)
            print(f'{name}: {count * new_tokens / times[name][-1]:,.1f} tokens a second', flush=True)
    others = ['nanoGPT'] * bool(nanogpt) + ['transformers'] * transformers + ['llama.cpp'] * llamacpp
    print('                 tokens/s  ms per step  first token after  of the bandwidth' + ''.join(f'  / {other}' for other in others))
    for name, (count, _, size) in writers.items():
        seconds = statistics.median(times[name])
        row = f'{name:14} {count * new_tokens / seconds:10,.1f} {seconds / new_tokens * 1000:12.2f}'
        row += ' ' * 37 if size is None else f' {statistics.median(firsts[name]) * 1000:15.1f} ms {size * new_tokens / seconds / limit:17.2f}'
        for other in others:
            row += f'{count * statistics.median(times[other]) / seconds:11.2f}'
        print(row)


sys.excepthook = explain
what = 'sample' if sample else what
nanogpt = nanogpt and os.path.abspath(find(nanogpt))
what = what or ('laptop' if nanogpt and not other_arguments else 'steps')
if other_arguments and what != 'steps':
    sys.exit(f'bench.py: what={what} takes no {other_arguments[0]} (python bench.py --help lists its settings)')
if min(steps, runs, prompt_tokens, new_tokens) < 1:
    sys.exit(f'steps={steps}, runs={runs}, prompt_tokens={prompt_tokens}, new_tokens={new_tokens}: expected at least 1')
if not re.fullmatch(r'[1-9]\d*(,[1-9]\d*)*', samples) or set(dtypes.split(',')) - {'float32', 'bfloat16', 'float16', 'int8'}:
    sys.exit(f'samples={samples}, dtypes={dtypes}: expected numbers, and float32, bfloat16, float16 or int8, separated by commas')
if nanogpt and not os.path.exists(os.path.join(nanogpt, 'train.py')):
    sys.exit(f'nanogpt={nanogpt}: expected a folder with nanoGPT; there is no train.py in it')
if profile and not os.path.isdir(os.path.dirname(os.path.abspath(os.path.expanduser(trace)))):
    sys.exit(f'trace={trace}: there is no such folder to write it to')
if what == 'steps':
    with tempfile.TemporaryDirectory() as out:
        compare_steps(out)
elif what == 'laptop':
    folders = {'nanoGPT': nanogpt, 'StoneGPT': ROOT}
    if not nanogpt or not os.path.exists(os.path.join(nanogpt, 'data', 'shakespeare_char', 'train.bin')):
        sys.exit(f'nanogpt={nanogpt}: expected a folder with nanoGPT whose data/shakespeare_char is prepared')
    times, loops = {name: [] for name in folders}, {name: [] for name in folders}
    with tempfile.TemporaryDirectory() as out:
        for _ in range(runs):
            for name, folder in folders.items():
                arguments = ours.split() if ours and folder == ROOT else LAPTOP
                t0, begun = time.perf_counter(), None
                command = [sys.executable, '-u', 'train.py', *arguments, f'--out_dir={os.path.join(out, name)}']
                with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, encoding='utf-8') as process:
                    for line in process.stdout:
                        begun = begun or (time.perf_counter() if line.startswith('step 0:') else None)  # imported, compiled, evaluated once
                if process.returncode:
                    sys.exit(f'{folder}: train.py {" ".join(arguments)} ended with {process.returncode}')
                times[name].append(time.perf_counter() - t0)
                loops[name].append(time.perf_counter() - begun)
                print(f'{name}: {times[name][-1]:.1f} s, from the first step on {loops[name][-1]:.1f} s', flush=True)
    print_ratios('ratio of each pair', times['StoneGPT'], times['nanoGPT'])
    print_ratios('from the first step on', loops['StoneGPT'], loops['nanoGPT'])
elif what == 'attention':
    setup('cpu', training=True)
    print('B x nh x T x hs        dtype     dropout   fused ms   plain ms   of packed rows: fused ms   plain ms   (forward and backward)')
    for B, nh, T, hs in ((12, 4, 64, 32), (16, 4, 128, 40), (8, 4, 256, 32), (64, 6, 256, 64), (4, 12, 512, 64), (1, 12, 1024, 64)):
        document = torch.arange(T) // (T // 4)
        packed = (document[:, None] == document).tril().expand(B, 1, T, T)
        for dtype, dropout in ((torch.float32, 0.0), (torch.float32, 0.2), (torch.bfloat16, 0.0), (torch.bfloat16, 0.2)):
            x = torch.randn(3, nh, B, T, hs, dtype=dtype, requires_grad=True)  # laid out as the network lays it out
            gradient = torch.randn(nh, B, T, hs, dtype=dtype)
            times = [median_ms(lambda: attention(*x, dropout, plain, mask).backward(gradient), 10 * runs if T < 256 else 2 * runs)
                     for mask in (None, packed) for plain in (False, True)]
            print(f'{f"{B} x {nh} x {T} x {hs}":22} {str(dtype)[6:]:10} {dropout:6} {times[0]:10.2f} {times[1]:10.2f} {times[2]:26.2f} {times[3]:10.2f}', flush=True)
elif what == 'batch':
    data = open_dataset('shakespeare_char')
    print(f'a batch of 12 x 64: {median_ms(lambda: next_token.load(data, "train", next_token.draw(data, 12, 64, 1337, 0), 64), 1000):.3f} ms')
elif what == 'save':
    run = setup(training=True)
    model = GPT(GPTConfig()).to(run.device)
    opt = configure_optimizer(model, 'adamw', 0.1, 6e-4, (0.9, 0.95))
    idx = torch.randint(50257, (1, 257), device=run.device)

    def step():
        with run.ctx():
            model(idx[:, :-1], idx[:, 1:]).mean().backward()
        opt.step()
        opt.zero_grad()
        next(model.parameters()).flatten()[0].item()  # waits for a GPU
    checkpoint = {'model': model.state_dict(), 'optimizer': opt.state_dict(), 'iter_num': 0}
    usual = median_ms(step, 20) / 1000
    blocking, waited, lost = [], [], []
    log = SimpleNamespace(sync=lambda: None)
    with tempfile.TemporaryDirectory(dir='.') as out:
        beside, alone = (Saver(out, run, log, 1, background) for background in (True, False))
        beside.reserve(checkpoint)
        beside.wait()
        for _ in range(runs):
            blocking.append(duration(lambda: alone.save(checkpoint)))
            waited.append(duration(lambda: beside.save(checkpoint)))
            times = []
            while beside.thread.is_alive():
                times.append(duration(step))
            lost.append(waited[-1] + sum(times) - usual * len(times))
            print(f'a step {usual:.2f} s; blocking {blocking[-1]:.2f} s; beside training: waited {waited[-1]:.2f} s, and {len(times)} steps took {sum(times):.2f} s', flush=True)
    print_ratios('training waits, beside / blocking', waited, blocking)
    print_ratios('waited, and lost by slower steps, beside / blocking', lost, blocking)
elif what == 'trust':
    means = {True: [], False: []}
    with tempfile.TemporaryDirectory() as out:
        for i in range(runs):
            for bare in (True, False) if i % 2 else (False, True):
                arguments = [*LAPTOP, '--eval_interval=1000000000', '--eval_iters=1', '--save_interval=200', f'--out_dir={os.path.join(out, "run")}']
                means[bare].append(statistics.mean(watch(ROOT, arguments, out, bare=bare)['times']))
                print(f'{means[bare][-1]:.2f} ms a step {"without" if bare else "with"}', flush=True)
    print_ratios('ms per step, looked after / not', means[False], means[True])
elif what == 'memory':
    with tempfile.TemporaryDirectory(dir='.') as out:
        folder = random_tokens(os.path.abspath(out))
        os.remove(os.path.join(folder, 'train.bin'))
        for i in range(gigabytes):
            with open(os.path.join(folder, f'train_{i:05d}.bin'), 'wb') as f:
                f.truncate(10**9)  # a hole reads as zeros
        data, seen, step, started = open_dataset(folder), [], 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            next_token.load(data, 'train', next_token.draw(data, 32, 1024, 1337, step, 'epochs'), 1024)
            step += 1
            if time.perf_counter() - started > seconds * (len(seen) + 1) / 20:
                with open('/proc/self/status', encoding='utf-8') as f:
                    seen.append(int(re.search(r'VmRSS:\s+(\d+)', f.read())[1]) * 1024)
                print(f'{time.perf_counter() - started:.0f} s, {step:,} batches of 32 rows of 1,024: {seen[-1] / 1e6:.1f} MB', flush=True)
    print(f'from a tenth of the time on between {min(seen[1:]) / 1e6:.1f} and {max(seen[1:]) / 1e6:.1f} MB')
elif what == 'sample':
    compare_sampling()
elif what == 'prepare':
    if not os.path.isfile(find(text)) or tokenizer not in ('qwen2', 'gpt2'):
        sys.exit(f'text={text}, tokenizer={tokenizer}: expected a text file, and qwen2 or gpt2')
    times = {'tiktoken': [], 'StoneGPT': []}
    with tempfile.TemporaryDirectory() as out:
        os.makedirs(os.path.join(out, 'data'))
        commands = {'tiktoken': ['-c', BATCH, find(text), tokenizer, os.path.join(out, 'train.bin')],
                    'StoneGPT': [os.path.join(ROOT, 'data', 'any_text', 'prepare.py'), f'--input={find(text)}', f'--tokenizer={tokenizer}', '--prune=False', '--name=x']}
        for _ in range(runs):
            for name, command in commands.items():
                times[name].append(duration(lambda: subprocess.run([sys.executable, *command], cwd=out, check=True, stdout=subprocess.DEVNULL,
                                                                  env={**os.environ, 'PYTHONPATH': ROOT})))
                print(f'{name}: {times[name][-1]:.1f} s, {os.path.getsize(find(text)) / 1e6 / times[name][-1]:.1f} MB/s', flush=True)
    print_ratios('our throughput over that of tiktoken, pair by pair', times['tiktoken'], times['StoneGPT'])
else:
    sys.exit(f'what={what}: expected steps, laptop, attention, batch, save, trust, memory, prepare or sample')
