"""Set up a script: device, precision, processes and seed; the compiler; signals and error messages."""
import copy
import ctypes
import functools
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.overrides import TorchFunctionMode

from core import startup
from core.distributed import all_reduce, average_gradients, fresh_rendezvous
from core.estimates import known_peak

# --- device, precision, process group, seed


def setup(device='auto', dtype='auto', backend='auto', seed=1337, training=False):
    """
    Choose device and precision, join torchrun's process group, and seed. Also set sys.excepthook and, on ranks other
    than 0, silence stdout. Return the namespace `env`:

        device, device_type, dtype (its name), ctx() (the autocast context), peak_flops (None if unknown),
        rank, world_size, master (rank 0, which saves and prints), ddp (is there a process group),
        sharded (is the model sharded; set by the caller)

    device: 'auto' (cuda, else mps, else cpu), 'cpu', 'cuda', 'cuda:1' or 'mps'
    dtype: 'auto', 'float32', 'bfloat16' or 'float16'; without training on CPUs also 'int8'
    backend: of torch.distributed; 'auto': nccl on CUDA, else gloo
    Exits if the device or the dtype is not available.
    """
    sys.excepthook = explain
    ddp = 'RANK' in os.environ and 'WORLD_SIZE' in os.environ  # set by torchrun
    if ddp and 'MASTER_ADDR' not in os.environ:
        sys.exit('RANK and WORLD_SIZE are set in the environment, MASTER_ADDR is not: start several processes by '
                 'torchrun, or unset the two')
    rank = int(os.environ['RANK']) if ddp else 0
    world_size = int(os.environ['WORLD_SIZE']) if ddp else 1
    if rank > 0:
        sys.stdout = open(os.devnull, 'w', encoding='utf-8')
    device = choose_device(device)
    device_type = device.split(':')[0]
    if device_type == 'cuda':
        if ddp:
            device = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
        use_gpu(device)
    if device_type == 'cpu':
        tune_malloc()
    if ddp:
        if backend == 'auto':
            backend = 'nccl' if device_type == 'cuda' else 'gloo'
        dist.init_process_group(backend, **fresh_rendezvous(rank, world_size))
    dtype = choose_dtype(dtype, device_type, training)
    peak_flops = None
    if device_type == 'cuda' and dtype != 'float32':
        peak_flops = known_peak(torch.cuda.get_device_name())

    def ctx():
        return nullcontext() if dtype == 'float32' else torch.autocast(device_type, getattr(torch, dtype))

    torch.manual_seed(seed)
    return SimpleNamespace(device=device, device_type=device_type, dtype=dtype, ctx=ctx, peak_flops=peak_flops,
                           rank=rank, world_size=world_size, master=rank == 0, ddp=ddp, sharded=False)


def choose_device(device):
    """Return the name of the device; 'auto': the first available one of cuda, mps and cpu. Exits if not available."""
    available = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
    best = next(name for name in available if available[name])
    if device == 'auto':
        device = best
        if device == 'cpu' and shutil.which('nvidia-smi'):
            print('warning: this machine has NVIDIA tools, but this PyTorch sees no GPU, so training runs on the CPU; '
                  'install a CUDA build of PyTorch to use the card (https://pytorch.org/get-started/locally)')
    if not re.fullmatch(r'cpu|mps|cuda(:\d+)?', device):
        sys.exit(f'device={device}: expected auto, cpu, cuda, cuda:N or mps')
    if not available[device.split(':')[0]]:
        sys.exit(f'device={device}: this PyTorch sees no such device; use --device={best}')
    return device


def use_gpu(device):
    """Make 'cuda:N' the current GPU. Exits if the machine has fewer GPUs."""
    index = torch.device(device).index or 0
    if index >= torch.cuda.device_count():
        sys.exit(f'device={device}: there are only {torch.cuda.device_count()} GPUs here; '
                 'start at most that many processes')
    torch.cuda.set_device(index)
    torch.set_float32_matmul_precision('high')  # TF32 for products that stay in fp32


def choose_dtype(dtype, device_type, training):
    """Return the name of the precision; for 'auto' the fastest one. Exits if the device cannot use it."""
    if dtype == 'auto':
        if device_type == 'cuda':
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            return 'bfloat16' if has_bf16 else 'float16'
        if device_type == 'cpu' and training and fast_bf16_cpu():
            return 'bfloat16'
        return 'float32'
    dtypes = ['auto', 'float32', 'bfloat16', 'float16']
    if not training:
        dtypes.append('int8')
    if dtype not in dtypes:
        sys.exit(f'dtype={dtype}: expected {", ".join(dtypes[:-1])} or {dtypes[-1]}')
    if dtype == 'int8' and device_type != 'cpu':
        sys.exit('dtype=int8: is for CPUs; on a GPU use --dtype=bfloat16')  # that converts weights all the time
    if dtype == 'float16' and device_type == 'cpu' and training:
        sys.exit('dtype=float16: CPUs train in bfloat16 or float32; use --dtype=auto')
    return dtype


@functools.cache  # Muon asks at every step
def fast_bf16_cpu():
    """
    Return whether this CPU multiplies matrices faster in bf16 than in fp32: with AMX 3 to 4 times as fast, with AMD's
    AVX512-BF16 (Zen 4 and later) twice. Intel's AVX512-BF16 without AMX is slower than fp32 for small networks
    (docs/LOG.md). Other CPUs emulate bf16.
    """
    if torch.cpu._is_amx_tile_supported():
        return True
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            is_amd = 'AuthenticAMD' in f.read(1000)
    except OSError:  # not Linux
        is_amd = 'AuthenticAMD' in platform.processor()
    return is_amd and torch.cpu._is_avx512_bf16_supported()


class SkipInit(TorchFunctionMode):
    """Leave new parameters as they are."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, '__module__', '') == 'torch.nn.init':
            return kwargs['tensor'] if 'tensor' in kwargs else args[0]
        return function(*args, **kwargs)


@contextmanager
def shapes_only():
    """
    Make tensors on the device 'meta', which have shapes and no numbers. To initialise them would do nothing but import
    all of torch.compile: 1.4 s.
    """
    with torch.device('meta'), SkipInit():
        yield


def reseed(seed, env):
    """Seed the generator of this device, which dropout draws from. torch.manual_seed seeds all, which takes 0.2 ms."""
    generators = {'cuda': torch.cuda, 'mps': torch.mps}
    generators.get(env.device_type, torch.default_generator).manual_seed(seed)


def tune_malloc():
    """
    Tune glibc's malloc, which otherwise costs a quarter of a small network's step on a CPU (docs/LOG.md):
    - It returns freed memory to the kernel, and the next step page-faults it in again (2,700 faults, 6 of 33 ms).
    - Its pages are small. 256 MB of heap in huge pages save another 2 ms.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, MADV_HUGEPAGE = -1, -3, 14
    heap_size, huge_page = 2**28, 2**21
    try:
        libc = ctypes.CDLL('libc.so.6')
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)
        # All tensors come from the heap, except the logits of a large vocabulary, which would leave holes in it.
        libc.mallopt(M_MMAP_THRESHOLD, 2**29)
        libc.malloc.restype = ctypes.c_void_p
        heap = libc.malloc(ctypes.c_size_t(heap_size))
        aligned = math.ceil(heap / huge_page) * huge_page
        libc.madvise(ctypes.c_void_p(aligned), ctypes.c_size_t(heap_size - huge_page), MADV_HUGEPAGE)
        libc.free(ctypes.c_void_p(heap))  # memory is used only once it is written to
    except (OSError, AttributeError, TypeError):
        pass  # no glibc here

# --- torch.compile


def try_compile(model, shapes, env, packed=False, logits=False):
    """
    Compile the model, wrap it with average_gradients() and try it on a batch of each of the shapes (rows, T). Return
    the network. If compiling fails on a rank (no C++ compiler, no Triton) or the gradients are wrong, print a warning
    and return the model itself, wrapped.

    The trial goes through the wrapper: on GPUs torch.compile splits the graph for DDP, so that gradients are averaged
    while the backward pass goes on, and it does so only then.
    packed: a batch has a third tensor, the document of each token. logits: it has no targets, so logits are returned.
    """
    if is_miscompiled(model, env):
        print('warning: not compiled: for RoPE on heads of 64 or 128 channels in bfloat16 on a CPU, torch.compile '
              'computes wrong gradients (seen with PyTorch 2.13); heads of 32 or 96 are fine (--head_size=32)')
        return average_gradients(model, env)
    print('compiling the model... (some seconds on a CPU, a minute on a GPU; --compile=False starts at once)',
          flush=True)
    started = time.perf_counter()
    problem = None
    try:
        network = average_gradients(compiled(model, shapes, env), env)
        without_others = getattr(network, 'no_sync', nullcontext)  # of DDP: a rank that fails must not stop the others
        for rows, T in shapes:
            with without_others(), env.ctx():
                X, Y, *document = trial_batch(rows, T, model.config.vocab_size, env.device, packed)
                network(X, None if logits else Y, *document).mean().backward()
        check_gradients(model)
    except (torch.OutOfMemoryError, dist.DistError):
        raise
    except Exception as error:
        problem = f'{type(error).__name__}: ' + str(error).strip().partition('\n')[0][:120]
    finally:
        model.zero_grad(set_to_none=True)
    if not all_reduce([problem is not None], env).item():
        print(f'compiled in {time.perf_counter() - started:.0f} s', flush=True)
        return network
    print(f'warning: torch.compile does not work here ({problem or "on another rank"}); going on without it')
    network = None  # frees DDP's hooks
    return average_gradients(model, env)


def compiled(model, shapes, env):
    """
    Return a network that shares the model's parameters and is compiled at its first batch. On a CPU only its blocks are
    compiled: as all have the same code, this takes a third of the time, and a step is not slower (docs/LOG.md).
    """
    # by default torch.compile makes slower code for any shape as soon as it meets a second one
    compile_it = functools.partial(torch.compile, dynamic=False if len(shapes) > 1 else None)
    if env.device_type != 'cpu':
        return compile_it(model)
    network = copy.copy(model)
    blocks = nn.ModuleList(compile_it(block) for block in model.transformer.h)
    network._modules = {**model._modules, 'transformer': nn.ModuleDict({**model.transformer._modules, 'h': blocks})}
    return network


def is_miscompiled(model, env):
    """Return whether torch.compile is known to compute wrong gradients here (docs/LOG.md, "A wrong kernel")."""
    config = model.config
    bf16_on_cpu = env.device_type == 'cpu' and env.dtype == 'bfloat16'
    return bool(bf16_on_cpu and config.rope_theta and config.head_size % 64 == 0)


def trial_batch(rows, T, vocab_size, device, packed):
    """Return a batch for try_compile(): contiguous like real ones; for others it would compile once more."""
    X = torch.arange(rows * T, device=device).view(rows, T) % vocab_size
    Y = X.roll(-1, dims=1)
    if packed:
        return X, Y, torch.zeros_like(Y)
    return X, Y


def check_gradients(model):
    """Raise ArithmeticError if the gradients are not finite or all zero."""
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    finite = all(grad.isfinite().all() for grad in grads)
    if not finite or not any(grad.any() for grad in grads):
        raise ArithmeticError('its gradients are not finite, or all 0')

# --- signals and errors


def catch_signals(nothing_to_save=False):
    """
    From now on SIGINT (Ctrl-C), SIGTERM and SIGUSR1 do not end the script but are stored in the attribute `signal` of
    the returned namespace, so that the caller can finish its step. A second Ctrl-C ends the script at once.
    """
    caught = SimpleNamespace(signal=None)
    if nothing_to_save:
        return caught

    def handler(number, frame):
        caught.signal = number
        os.write(2, b'stopping after this step; Ctrl-C again stops at once\n')  # print is not safe in a handler
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ('SIGINT', 'SIGTERM', 'SIGUSR1'):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), handler)
    return caught


def explain(error_type, error, traceback):
    """The excepthook. Print one line for errors that a user can solve, and the traceback for all others."""
    if issubclass(error_type, BrokenPipeError):  # the reader of a pipe has stopped, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes stdout once more
    elif is_out_of_memory(error_type, error):
        print('out of memory: lower --batch_size (or, sampling, --num_samples; training, raise '
              '--gradient_accumulation_steps as much, for the same total batch), --block_size, or the size of the '
              'network (--n_layer, --n_embd), or set --gradient_checkpointing=True', file=sys.stderr)
    elif issubclass(error_type, FloatingPointError):  # a model's output is not finite
        print(error, file=sys.stderr)
    elif is_lost_process(error_type, error):
        message = ' '.join(str(error).split())[:300]
        print(f'lost another process of this run, or cannot reach it: {message}\n'
              'It was killed, or says itself why it ended. torchrun --max-restarts=3 starts all of them again, '
              'and they go on from the last checkpoint', file=sys.stderr)
    else:
        startup.explain(error_type, error, traceback)


def is_out_of_memory(error_type, error):
    if issubclass(error_type, (torch.OutOfMemoryError, MemoryError)):
        return True
    return issubclass(error_type, RuntimeError) and "can't allocate memory" in str(error)  # PyTorch on CPUs


def is_lost_process(error_type, error):
    if issubclass(error_type, dist.DistError):
        return True
    if not issubclass(error_type, RuntimeError):
        return False
    return bool(re.search(r'gloo.*(connection|timed out)', str(error), re.IGNORECASE | re.DOTALL))


def to_device(batch, env):
    """
    Copy the tensors of a batch to the device. On CUDA the copy waits for nothing if the tensors are in pinned memory.
    Not on MPS, where it may read memory that is already used again (https://github.com/pytorch/pytorch/issues/189690).
    """
    return [x.to(env.device, non_blocking=env.device_type == 'cuda') for x in batch]
