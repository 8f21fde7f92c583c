"""What training will need, and how fast it can be: peak FLOP/s of GPUs, memory, hours on a CPU."""
import math
import os
import re
import sys
import time

import torch

from kernels import MAX_SAVED_BYTES

# --- speed

# Dense 16-bit matrix peak with fp32 accumulation in FLOP/s, from the vendors' data sheets. MFU is shown for these GPUs
# only. The first name that matches counts, so 'H100 PCIe' stands before 'H100'.
PEAK_FLOPS = {
    'GB300': 2500e12,
    'GB200': 2500e12,
    'B300': 2250e12,
    'B200': 2250e12,
    'B100': 1750e12,
    'GH200': 989e12,
    'H200 NVL': 835e12,
    'H200': 989e12,
    'H100 PCIe': 756e12,
    'H100 NVL': 835e12,
    'H100': 989e12,
    'H800 PCIe': 756e12,
    'H800': 989e12,
    'H20': 148e12,
    'A100': 312e12,
    'A800': 312e12,
    'A40': 150e12,
    'A30': 165e12,
    'A10G': 70e12,
    'A10': 125e12,
    'A6000': 155e12,
    'L40S': 362e12,
    'L4': 121e12,
    'V100': 125e12,
    'T4': 65e12,
    'RTX PRO 6000 Blackwell Workstation': 504e12,
    'RTX 5090': 210e12,
    'RTX 4090': 165e12,
    'RTX 3090': 71e12,
    'MI300X': 1307e12,
}


def known_peak(gpu_name):
    """
    Return the peak FLOP/s of a GPU, e.g. 'NVIDIA H100 80GB HBM3'; None if it is not in PEAK_FLOPS. Laptop
    GPUs, slices of a GPU (MIG) and the RTX 4090 D and 5090 D are slower than what their names begin with.
    """
    if re.search(r'\b(Laptop|MIG|D)\b', gpu_name):
        return None
    for name, flops in PEAK_FLOPS.items():
        if re.search(rf'\b{name}\b', gpu_name):
            return flops
    return None


def measured_peak(env):
    """
    Return the FLOP/s of a large matrix product on this device, the best of about a second. bench.py uses it for MFU if
    the peak is unknown.
    """
    started = time.perf_counter()
    n = 2048 if env.device_type == 'cpu' else 8192
    a, b = torch.randn(2, n, n, device=env.device, dtype=getattr(torch, env.dtype))
    best = math.inf
    while best == math.inf or time.perf_counter() - started < 1:
        t0 = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - t0)
    return 2 * n**3 / best


def warn_if_slow(flops, env):
    """On a CPU, print a warning if training, which takes so many FLOPs, will take hours."""
    if env.device_type != 'cpu':
        return
    flops_per_core = 100e9 if env.dtype == 'bfloat16' else 40e9  # per second, for small networks (docs/RECORDS.md)
    rate = env.world_size * torch.get_num_threads() * flops_per_core
    hours = flops / rate / 3600
    if hours > 1:
        print(f'warning: on this CPU the run will take about {hours:,.0f} hours; '
              'config/train_shakespeare_char_cpu.py is made for CPUs and takes minutes')

# --- memory


def check_memory(model, rows, T, env, ema=0.0):
    """Exit if training on (rows, T) tokens at a time cannot fit into memory. See training_memory()."""
    available = total_memory(env)
    if available is None:
        return
    weights, activations = training_memory(model, rows, T, env, ema)
    if weights + activations <= available:
        return
    if weights > available:
        advice = '--n_layer or --n_embd (weights and optimizer alone take more)'
    else:
        advice = ('--batch_size (and raise --gradient_accumulation_steps as much, for the same step) or --block_size, '
                  'or set --gradient_checkpointing=True')
    gb = 2**30
    sys.exit(f'this network needs about {(weights + activations) / gb:,.0f} GB to train '
             f'({weights / gb:,.0f} for weights and optimizer, {activations / gb:,.0f} for {rows} rows of {T}), '
             f'and {env.device} has {available / gb:,.0f} GB; lower {advice}')


def total_memory(env):
    """Return the bytes of memory of the GPU or, on other devices, of the machine; None if the system does not say."""
    if env.device_type == 'cuda':
        return torch.cuda.get_device_properties(env.device).total_memory
    if hasattr(os, 'sysconf') and 'SC_PHYS_PAGES' in os.sysconf_names:
        return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    return None


def peak_memory(env):
    """Return the most bytes held so far, by tensors on the GPU or else by the process; None if that is not known."""
    if env.device_type == 'cuda':
        return torch.cuda.max_memory_allocated()
    try:
        with open('/proc/self/status', encoding='utf-8') as f:
            return int(re.search(r'VmHWM:\s+(\d+)', f.read())[1]) * 1024
    except (OSError, TypeError):  # not Linux
        return None


def training_memory(model, rows, T, env, ema=0.0):
    """
    Return a lower bound of the bytes of training: (weights, gradients and two moments; what the backward pass needs of
    rows * T tokens). The model may be on 'meta'. Muon keeps one moment and needs another one in its step.
    ema: train.py's setting; unless it is 0 there are averaged weights, too.

    Activations are counted as in Korthikanti et al. 2022 (https://arxiv.org/abs/2205.05198), but for this network and
    without attention weights, which flash attention does not keep. Queries and keys count once, because torch.compile
    computes their norm and rotation again.
    """
    config = model.config
    weights = 0
    for tensor in (*model.parameters(), *model.buffers()):
        weights += tensor.nbytes
        if tensor.requires_grad:
            weights += (16 if ema else 12) * tensor.numel()  # 4 bytes each
    size = 4  # bytes of a number
    if env.dtype != 'float32':
        size = 2
        weights += 2 * model.num_params(lookups=False)  # autocast's copies
    if env.sharded and env.device_type == 'cuda':
        weights /= env.world_size

    queries, keys = config.n_head * config.head_size, config.n_kv_head * config.head_size
    mlp = (4 if model.transformer.h[0].mlp.gated else 2) * config.n_inner  # before and after the activation
    layer = size * (2 * config.n_embd  # normalised, for attention and MLP
                    + queries + 2 * keys  # and values
                    + 2 * queries  # what attention returns, by head and by token
                    + mlp)
    residual = 4 * config.n_embd  # always in fp32
    if model.gradient_checkpointing:
        per_token = config.n_layer * residual + layer + residual
    else:
        per_token = config.n_layer * (layer + 2 * residual)
    most = MAX_SAVED_BYTES * (4 if env.device_type == 'cuda' else 1)  # see TokenLosses
    logits = 0 if config.reward else min(rows * T * config.vocab_size * size, most)
    return weights, rows * T * per_token + logits


def largest_batch(rows, fixed, peak):
    """
    Return the number of rows that would fit into the memory of a GPU. With `rows` rows the peak was `peak` bytes, of
    which `fixed` do not depend on the rows. Of the others some do not either, so it is rather too low. None if unknown.
    """
    free, _ = torch.cuda.mem_get_info()
    usable = 0.95 * (free + torch.cuda.memory_reserved())  # the rest is lost between tensors
    return max(0, int((usable - fixed) / (peak - fixed) * rows)) if peak > fixed else None
