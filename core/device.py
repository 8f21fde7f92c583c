"""Device, precision, seeds and processes: set up once, for every script."""
import ctypes
import functools
import os
import platform
import re
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import torch
import torch.distributed as dist

from core.distributed import fresh_rendezvous

# Dense 16-bit matrix peak with fp32 accumulation, FLOP/s, from the vendors' data sheets; MFU is shown for these and for no others.
PEAK_FLOPS = {'B200': 2250e12, 'GH200': 989e12, 'H200': 989e12, 'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H100': 989e12, 'A100': 312e12,
              'A40': 150e12, 'A30': 165e12, 'A10G': 70e12, 'A10': 125e12, 'A6000': 155e12, 'L40S': 362e12, 'L4': 121e12, 'V100': 125e12,
              'T4': 65e12, 'RTX 5090': 210e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12}


@functools.cache  # Muon asks at every step
def fast_bf16_cpu():
    """Whether this CPU multiplies bf16 matrices faster than fp32 ones: with AMX 3 to 4 times as fast, by AMD's AVX512-BF16 (Zen 4 and later) twice.
    Intel's AVX512-BF16 without AMX is slower than fp32 for small networks (docs/LOG.md), and elsewhere bf16 is emulated."""
    if torch.cpu._is_amx_tile_supported():
        return True
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            amd = 'AuthenticAMD' in f.read(1000)
    except OSError:  # not Linux
        amd = 'AuthenticAMD' in platform.processor()
    return amd and torch.cpu._is_avx512_bf16_supported()


def setup(device='auto', dtype='auto', backend='auto', seed=1337, training=False):
    """
    Find the device, join the process group that torchrun announces, seed, and choose the precision.
    device: 'auto' (cuda, then mps, then cpu), 'cpu', 'cuda', 'cuda:1', 'mps'. dtype: 'auto', 'float32', 'bfloat16', 'float16'; 'int8' but for training.
    Returns a namespace: device, device_type, dtype (its name), ctx() (the autocast context), peak_flops (None where unknown),
    rank, world_size, master (this process saves; the others' stdout is shut), ddp, sharded (whether the network is; the caller sets it).
    Ends the script with one line when the device or dtype is not to be had.
    """
    sys.excepthook = explain
    ddp = 'RANK' in os.environ and 'WORLD_SIZE' in os.environ
    rank, local_rank, world_size = (int(os.environ.get(key, default)) if ddp else default
                                    for key, default in (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))
    master = rank == 0
    if not master:
        sys.stdout = open(os.devnull, 'w', encoding='utf-8')
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
        if device == 'cpu' and shutil.which('nvidia-smi'):
            print('warning: this machine has NVIDIA tools, but this PyTorch sees no GPU, so training runs on the CPU; '
                  'install a CUDA build of PyTorch to use the card (https://pytorch.org/get-started/locally)')
    if not re.fullmatch(r'cpu|mps|cuda(:\d+)?', device):
        sys.exit(f'device={device}: expected auto, cpu, cuda, cuda:N or mps')
    device_type = device.split(':')[0]
    usable = {'cpu': True, 'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available()}
    if not usable[device_type]:
        sys.exit(f'device={device}: this PyTorch sees no such device; use --device=' + next(d for d in ('cuda', 'mps', 'cpu') if usable[d]))
    if ddp and device_type == 'cuda':
        device = f'cuda:{local_rank}'
    if device_type == 'cuda':
        index = torch.device(device).index or 0
        if index >= torch.cuda.device_count():
            sys.exit(f'device={device}: there are only {torch.cuda.device_count()} GPUs here; start at most that many processes')
        torch.cuda.set_device(index)
        torch.set_float32_matmul_precision('high')  # TF32 for what stays in fp32
    if device_type == 'cpu':
        tune_malloc()
    if ddp:
        dist.init_process_group({'cuda': 'nccl'}.get(device_type, 'gloo') if backend == 'auto' else backend, **fresh_rendezvous(rank, world_size))

    if dtype == 'auto':
        bf16 = {'cuda': lambda: torch.cuda.is_bf16_supported(including_emulation=False), 'cpu': lambda: training and fast_bf16_cpu()}
        dtype = 'bfloat16' if bf16.get(device_type, bool)() else 'float16' if device_type == 'cuda' else 'float32'
    dtypes = ['auto', 'float32', 'bfloat16', 'float16'] + ['int8'] * (not training)
    if dtype not in dtypes:
        sys.exit(f'dtype={dtype}: expected {", ".join(dtypes[:-1])} or {dtypes[-1]}')
    if dtype == 'float16' and device_type == 'cpu' and training:
        sys.exit('dtype=float16: CPUs train in bfloat16 or float32; use --dtype=auto')
    peak = None
    if device_type == 'cuda' and dtype != 'float32':
        peak = known_peak(torch.cuda.get_device_name())

    def ctx():
        return nullcontext() if dtype == 'float32' else torch.autocast(device_type, getattr(torch, dtype))

    torch.manual_seed(seed)
    return SimpleNamespace(device=device, device_type=device_type, dtype=dtype, ctx=ctx, peak_flops=peak,
                           rank=rank, world_size=world_size, master=master, ddp=ddp, sharded=False)


def known_peak(name):
    """The peak FLOP/s of the GPU that calls itself `name` ('NVIDIA H100 80GB HBM3'), or None where the table has none."""
    return next((flops for known, flops in PEAK_FLOPS.items() if re.search(rf'\b{known}\b', name) and 'Laptop' not in name), None)


def measured_peak(run):
    """The FLOP/s of a large matrix product on this device, the best of about a second: what MFU refers to where the table has nothing."""
    n, best, started = 2048 if run.device_type == 'cpu' else 8192, float('inf'), time.perf_counter()
    a, b = torch.randn(2, n, n, device=run.device, dtype=getattr(torch, run.dtype))
    while best == float('inf') or time.perf_counter() - started < 1:
        t0 = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - t0)
    return 2 * n**3 / best


def check_memory(model, rows, T, run):
    """
    End the script with one line where training this network on (rows, T) at a time cannot fit into this machine's memory. The model may be on
    'meta'. Counted is what is certain: weights, gradients and two moments, and per layer and token the activations that the backward pass needs
    (Korthikanti et al. 2022: https://arxiv.org/abs/2205.05198), about 17 numbers per channel.
    """
    if run.device_type == 'cuda':
        there = torch.cuda.get_device_properties(run.device).total_memory
    elif hasattr(os, 'sysconf') and 'SC_PHYS_PAGES' in os.sysconf_names:
        there = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    else:
        return
    c = model.config
    per_token = c.n_layer * c.n_embd * (2 if model.gradient_checkpointing else 17) * (4 if run.dtype == 'float32' else 2)
    weights = sum(tensor.nbytes + 12 * tensor.numel() * tensor.requires_grad for tensor in (*model.parameters(), *model.buffers()))
    activations = rows * T * per_token
    if run.sharded and run.device_type == 'cuda':
        weights /= run.world_size
    if weights + activations > there:
        lower = '--n_layer or --n_embd (weights and optimizer alone take more)' if weights > there else (
                '--batch_size (and raise --gradient_accumulation_steps as much, for the same step) or --block_size, or set --gradient_checkpointing=True')
        sys.exit(f'this network needs about {(weights + activations) / 2**30:,.0f} GB to train ({weights / 2**30:,.0f} for weights and optimizer, '
                 f'{activations / 2**30:,.0f} for {rows} rows of {T}), and {run.device} has {there / 2**30:,.0f} GB; lower {lower}')


def try_compile(model, rows, T, run, packed=False):
    """torch.compile, tried out on one batch (rows, T), packed of documents or not; the model itself, with one warning, where that does not work
    (no C++ compiler, no Triton) or computes nonsense."""
    if run.device_type == 'cpu' and run.dtype == 'bfloat16' and model.config.rope_theta and model.config.head_size % 64 == 0:
        print('warning: not compiled: for RoPE on heads of 64 or 128 channels in bfloat16 on a CPU, torch.compile computes wrong gradients (seen with '
              'PyTorch 2.13); heads of 32 or 96 are fine (--head_size=32)')
        return model
    print('compiling the model... (takes about a minute, the next time some seconds; --compile=False starts at once)', flush=True)
    try:
        compiled = torch.compile(model)
        row = torch.arange(rows * (T + 1), device=run.device).view(rows, T + 1) % model.config.vocab_size
        with run.ctx():
            compiled(row[:, :-1], row[:, 1:], *[torch.zeros_like(row[:, 1:])] * packed).mean().backward()  # laid out like a batch: for other strides it would be compiled once more
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        if not all(grad.isfinite().all() for grad in grads) or not any(grad.any() for grad in grads):
            raise ArithmeticError('its gradients are not finite, or all 0')
        return compiled
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        print(f'warning: torch.compile does not work here ({type(error).__name__}: {str(error).strip().splitlines()[0][:120]}); going on without it')
        return model
    finally:
        model.zero_grad(set_to_none=True)


def warn_if_slow(flops, run):
    """Say so when training will take hours on this CPU."""
    rate = run.world_size * torch.get_num_threads() * (100e9 if run.dtype == 'bfloat16' else 40e9)  # what small networks reach per core (docs/RECORDS.md)
    hours = flops / rate / 3600
    if hours > 1:
        print(f'warning: on this CPU the run will take about {hours:,.0f} hours; config/train_shakespeare_char_cpu.py is made for CPUs and takes minutes')


def catch_signals(nothing_to_save=False):
    """From now on SIGINT (Ctrl-C), SIGTERM and SIGUSR1 end no step half-way: they are noted in the .signal of what this returns.
    A second Ctrl-C ends the script at once."""
    caught = SimpleNamespace(signal=None)
    if nothing_to_save:
        return caught

    def note(number, frame):
        caught.signal = number
        os.write(2, b'stopping after this step; Ctrl-C again stops at once\n')  # print is not safe in a handler
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ('SIGINT', 'SIGTERM', 'SIGUSR1'):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), note)
    return caught


def reseed(seed, run):
    """Seed what dropout draws from on this device. (torch.manual_seed looks at every kind of device, for 0.2 ms.)"""
    generator = {'cuda': torch.cuda, 'mps': torch.mps}.get(run.device_type, torch.default_generator)
    generator.manual_seed(seed)


def tune_malloc():
    """
    Two things about glibc's malloc that cost a quarter of a small network's step on a CPU. It hands what a step frees back to the kernel and
    faults it in again: 2,700 page faults, 6 of 33 ms. And its pages are small: 256 MB of heap, asked for as huge ones, take 2 ms less.
    """
    try:
        libc = ctypes.CDLL('libc.so.6')
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**29)  # M_MMAP_THRESHOLD: now all but the logits of a large vocabulary comes from the heap, in which they would leave holes
        libc.malloc.restype = ctypes.c_void_p
        heap, size, huge = libc.malloc(ctypes.c_size_t(2**28)), 2**28, 2**21
        libc.madvise(ctypes.c_void_p(-(-heap // huge) * huge), ctypes.c_size_t(size - huge), 14)  # MADV_HUGEPAGE
        libc.free(ctypes.c_void_p(heap))  # no memory is used until it is written to
    except (OSError, AttributeError, TypeError):
        pass  # no glibc here


def explain(kind, error, traceback):
    """The excepthook: what a user can mend gets one line, everything else its traceback."""
    if issubclass(kind, BrokenPipeError):  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes stdout once more
    elif issubclass(kind, KeyboardInterrupt):
        print('interrupted', file=sys.stderr)  # Python then exits with 130
    elif issubclass(kind, (torch.OutOfMemoryError, MemoryError)) or issubclass(kind, RuntimeError) and "can't allocate memory" in str(error):
        print('out of memory: lower --batch_size (or, sampling, --num_samples; training, raise --gradient_accumulation_steps as much, for the same total batch), '
              '--block_size, or the size of the network (--n_layer, --n_embd), or set --gradient_checkpointing=True', file=sys.stderr)
    elif issubclass(kind, dist.DistError) or issubclass(kind, RuntimeError) and re.search(r'gloo.*(connection|timed out)', str(error), re.IGNORECASE | re.DOTALL):
        print(f'lost another process of this run, or cannot reach it: {" ".join(str(error).split())[:300]}\nIt was killed, or says itself why it ended. '
              'torchrun --max-restarts=3 starts all of them again, and they go on from the last checkpoint', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def to_device(batch, env):
    """Copy the tensors of a batch to the device. On CUDA, copies from pinned memory overlap with computation."""
    if env.device_type == 'cuda':
        batch = [x.pin_memory() for x in batch]
    return [x.to(env.device, non_blocking=True) for x in batch]
