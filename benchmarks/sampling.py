"""
How fast a network generates, also beside nanoGPT, transformers and llama.cpp with the same shape or weights:

    python bench.py --sample --nanogpt=../nanoGPT --transformers                # GPT-2 124M, one text and ten
    python bench.py --sample --network=char --new_tokens=63 --prompt_tokens=1   # a character model of 0.8M parameters
    python bench.py --sample --dtypes=int8 --samples=1 --llamacpp               # llama.cpp computes in Q8_0

The weights are random. Top-k is 200 and the temperature 0.8, as in nanoGPT's sample.py.

A row is a program, or a dtype of ours and the number of texts that are generated at once (a batch): tokens per second
of all texts together, milliseconds per step, the time of the first token after the start, and how much of the memory
bandwidth reading the weights once per step takes (1: no dtype of this size can be faster). The last columns are
our tokens per second relative to those of each other program. All take turns; a figure is the median of `runs`.
"""
import copy
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections import namedtuple

import torch

from benchmarks.common import duration, median_ms
from core.device import setup
from core.inference.generation import STEPS_AT_ONCE, sample_token
from core.text.tokenizer import char_tokenizer
from core.weights.checkpoint import checkpoint_path, describe, load_checkpoint
from core.weights.gguf import write_gguf
from core.weights.quantize import prepare_for_inference
from model import GPT, GPTConfig

SHAPES = {
    'gpt2': GPTConfig(vocab_size=50257, bias=True),
    'char': GPTConfig(vocab_size=65, n_layer=4, n_head=4, n_embd=128, block_size=64, bias=False),
}
TOP_K, TEMPERATURE = 200, 0.8

# write() generates and returns the seconds until the first token (None if unknown); rows: texts at once;
# step_bytes: weights that a step reads (None for programs that are not ours)
Writer = namedtuple('Writer', 'write rows step_bytes', defaults=(1, None))


def time_sampling(network, prompt_tokens, new_tokens, samples, dtypes, runs, nanogpt, transformers, llamacpp):
    """
    network: 'gpt2', 'char', or a run whose shape is used. samples: numbers of texts at once.
    nanogpt: its folder, or ''. transformers, llamacpp: whether to time them too.
    """
    config = SHAPES.get(network)
    if config is None:
        if not os.path.exists(checkpoint_path(network)):
            sys.exit(f'network={network}: expected {", ".join(SHAPES)} or the folder of a run')
        config = GPTConfig(**load_checkpoint(checkpoint_path(network), 'meta')['model_args'])
    if config.rope_theta and (nanogpt or transformers):
        sys.exit(f'network={network}: beside nanoGPT and transformers only networks of their GPT-2 can be timed')
    device = setup(dtype='float32').device
    bandwidth = read_bandwidth(device)
    prompt = torch.randint(config.vocab_size, (1, prompt_tokens), device=device)
    model = GPT(config)
    print(f'{describe(model)}; {device} reads {bandwidth / 1e9:.1f} GB a second; '
          f'{prompt_tokens} tokens, {new_tokens} more', flush=True)

    writers = {}
    if nanogpt:
        writers['nanoGPT'] = Writer(nanogpt_writer(nanogpt, config, prompt, new_tokens))
    if transformers:
        writers['transformers'] = Writer(transformers_writer(config, prompt, new_tokens))
    if llamacpp:
        writers['llama.cpp'] = Writer(llamacpp_writer(model, network, prompt, new_tokens))
    others = list(writers)
    if device != 'cpu' and 'int8' in dtypes:
        print('int8 is for CPUs; going on without it', flush=True)
        dtypes = [dtype for dtype in dtypes if dtype != 'int8']
    for dtype in dtypes:
        for rows in samples:
            prepared = prepare_for_inference(copy.deepcopy(model).to(device), dtype, rows)
            write = our_writer(prepared, dtype, rows, prompt, new_tokens)
            writers[f'{dtype}, {rows}'] = Writer(write, rows, weight_bytes(model, dtype))
            print_prefill(prepared, dtype, rows, prompt)

    times = {name: [] for name in writers}
    first_times = {name: [] for name in writers}
    for _ in range(runs):
        for name, writer in writers.items():
            t0 = time.perf_counter()
            first_times[name].append(writer.write())
            times[name].append(time.perf_counter() - t0)
            tokens_per_s = writer.rows * new_tokens / times[name][-1]
            print(f'{name}: {tokens_per_s:,.1f} tokens a second', flush=True)

    ratio_titles = ''.join(f'  / {other}' for other in others)
    print(f'                 tokens/s  ms per step  first token after  of the bandwidth{ratio_titles}')
    for name, writer in writers.items():
        seconds = statistics.median(times[name])
        row = f'{name:14} {writer.rows * new_tokens / seconds:10,.1f} {seconds / new_tokens * 1000:12.2f}'
        if writer.step_bytes is None:
            row += ' ' * 37
        else:
            first_ms = statistics.median(first_times[name]) * 1000
            share = writer.step_bytes * new_tokens / seconds / bandwidth
            row += f' {first_ms:15.1f} ms {share:17.2f}'
        for other in others:
            row += f'{writer.rows * statistics.median(times[other]) / seconds:11.2f}'
        print(row)


def read_bandwidth(device):
    """
    Return the bytes per second that the device reads from its memory: the best product of a matrix of 1 GB and a
    vector within about a second.
    """
    matrix = torch.ones(2**18, 1024, device=device)
    vector = torch.ones(1024, device=device)
    best = 0
    started = time.perf_counter()
    while time.perf_counter() - started < 1 or not best:
        seconds = duration(lambda: (matrix @ vector)[0].item())  # .item() waits for a GPU
        best = max(best, matrix.nbytes / seconds)
    return best


def weight_bytes(model, dtype):
    """Return the bytes of the weights that a step reads; of the position embeddings it reads one row."""
    size = {'float32': 4, 'bfloat16': 2, 'float16': 2, 'int8': 1}[dtype]
    return sum(p.numel() for name, p in model.named_parameters() if 'wpe' not in name) * size


def print_prefill(model, dtype, rows, prompt):
    T = min(512, model.config.block_size)
    idx = prompt[:, :1].repeat(1, T)
    with torch.no_grad():
        ms = median_ms(lambda: model.hidden(idx)[0, 0, 0].item(), 3)
    print(f'{dtype}, laid out for {rows}: a prompt of {T} tokens at {T / ms * 1000:,.0f} tokens a second', flush=True)


# --- functions that continue a prompt (1, T) by new_tokens


def our_writer(model, dtype, rows, prompt, new_tokens):
    def next_tokens(logits):
        uniform = torch.rand(rows, 1, device=prompt.device)
        return sample_token(logits, uniform, TEMPERATURE, TOP_K)

    def write():
        torch.backends.mkldnn.set_flags(dtype != 'float32')  # prepare_for_inference() has set it for the last model
        started = time.perf_counter()
        first = None
        for i, tokens in enumerate(model.generate(prompt, new_tokens, next_tokens, copies=rows), 1):
            if i == 1 or i % STEPS_AT_ONCE == 0 or i == new_tokens:
                tokens.tolist()  # waits for a GPU, about as often as continue_prompts()
            if first is None:
                first = time.perf_counter() - started
        return first
    return write


def nanogpt_writer(folder, config, prompt, new_tokens):
    spec = importlib.util.spec_from_file_location('nanogpt_model', os.path.join(folder, 'model.py'))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    keys = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias')
    model = module.GPT(module.GPTConfig(**{key: getattr(config, key) for key in keys})).eval().to(prompt.device)

    def write():
        model.generate(prompt, new_tokens, temperature=TEMPERATURE, top_k=TOP_K)
    return write


def transformers_writer(config, prompt, new_tokens):
    from transformers import GPT2Config, GPT2LMHeadModel
    gpt2_config = GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd,
        n_layer=config.n_layer, n_head=config.n_head, eos_token_id=None, bos_token_id=None)
    model = GPT2LMHeadModel(gpt2_config).eval().to(prompt.device)
    mask = torch.ones_like(prompt)

    def write():
        model.generate(prompt, attention_mask=mask, max_new_tokens=new_tokens, pad_token_id=0,
                       do_sample=True, temperature=TEMPERATURE, top_k=TOP_K)
    return write


def llamacpp_writer(model, name, prompt, new_tokens):
    """llama.cpp has its default settings and as many threads as PyTorch. Exits if it is not installed."""
    try:
        import xllamacpp
    except ImportError:
        sys.exit('xllamacpp, which is llama.cpp for Python, is not installed: pip install gguf xllamacpp')
    if prompt.size(1) + new_tokens > model.config.block_size:
        sys.exit(f'prompt_tokens={prompt.size(1)}, new_tokens={new_tokens}: '
                 f'llama.cpp writes no more than fits into the context, {model.config.block_size} tokens')
    characters = map(chr, range(2**16, 2**16 + model.config.vocab_size - 1))  # any; the prompt is given as ids
    with tempfile.TemporaryDirectory() as folder:  # the server keeps its files open
        params = xllamacpp.CommonParams()
        params.model.path = os.path.join(folder, 'x.gguf')
        params.hostnames = [os.path.join(folder, 'x.sock')]
        params.verbosity = -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        write_gguf(params.model.path, model, char_tokenizer(characters), 'q8_0', name)
        server = xllamacpp.Server(params)
    request = {
        'prompt': prompt[0].tolist(), 'max_tokens': new_tokens, 'ignore_eos': True, 'cache_prompt': False,
        'samplers': ['top_k', 'temperature'], 'top_k': TOP_K, 'temperature': TEMPERATURE,
    }

    def write():
        assert server.handle_completions(request)['usage']['completion_tokens'] == new_tokens
    return write
