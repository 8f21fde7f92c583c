"""Compare a device with the CPU before training on it, because a wrong kernel trains worse without a word."""
import json
import os
import platform
from contextlib import suppress

import torch

from core.files import atomic, cache_folder
from model import GPT, GPTConfig

SHAPE = {'block_size': 128, 'vocab_size': 512, 'n_layer': 2, 'n_head': 4, 'n_embd': 256}
QWEN3 = {'rope_theta': 1e4, 'norm': 'rmsnorm', 'activation': 'swiglu', 'qk_norm': True, 'n_kv_head': 2, 'tied': False,
         'bias': False}
NETWORKS = {  # name: (settings beside SHAPE, do rows hold several documents)
    'GPT-2 style': ({}, False),
    'Qwen3 style': (QWEN3, False),
    'GPT-2 style with several documents in a row': ({}, True),
}
# Largest relative errors of a loss, and of the gradient of a parameter. TF32, which setup() allows on CUDA, stays below
# 0.00002 and 0.004, rounding to bf16 below 0.0003 and 0.03. Attention that is not causal, or whose last row is 0, makes
# errors of 0.13 to 1.3 in a gradient. (All emulated on a CPU.)
LOSS_TOLERANCE = 0.001
GRADIENT_TOLERANCE = 0.02


def check_device(env):
    """
    Print a warning if loss or gradients of small networks on this device differ from the CPU's. The result is kept in
    the user's cache, by version of PyTorch and device. Leaves the state of all random generators as it is.
    """
    if env.device_type == 'cpu' or not env.master:
        return
    # the version of macOS, where there is no name: its updates change the kernels
    name = torch.cuda.get_device_name(env.device) if env.device_type == 'cuda' else platform.platform()
    key = f'torch {torch.__version__}, {name}'
    path = os.path.join(cache_folder(), 'device_check.json')
    results = {}  # key: what is wrong, '' if nothing is
    with suppress(OSError, ValueError, TypeError), open(path, encoding='utf-8') as f:
        results = dict(json.load(f))
    if key not in results:
        results[key] = '; '.join(differences(measure('cpu'), measure(env.device), env.device))
        with suppress(OSError):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with atomic(path, 'w') as f:
                json.dump(results, f, indent=1)
    if results[key]:
        print(f'warning: {env.device} computes something else than the CPU ({key}), so models may learn badly here: '
              f'{results[key]}. Another version of PyTorch may be right; --device=cpu is')


def measure(device):
    """Return {network: (loss, {parameter: gradient on the CPU})} of one step in fp32 on the device."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for network, (settings, packed) in NETWORKS.items():
        config = GPTConfig(**{**SHAPE, **settings})
        with torch.random.fork_rng(devices=[]):  # of the CPU's generator, from which new weights are drawn
            model = GPT(config)
        for p in model.parameters():  # larger weights than new ones, so that attention is far from uniform
            mean, std = (1.0, 0.1) if p.dim() == 1 else (0.0, 1.5 * p.size(1)**-0.5)
            p.data.copy_(torch.randn(p.shape, generator=generator) * std + mean)
        model.to(device)
        idx = torch.randint(config.vocab_size, (4, config.block_size + 1), generator=generator).to(device)
        documents = [torch.arange(config.block_size, device=device).expand(4, -1) // 50] if packed else []
        loss = model(idx[:, :-1], idx[:, 1:], *documents).mean()
        loss.backward()
        found[network] = loss.item(), {name: p.grad.cpu() for name, p in model.named_parameters()}
    return found


def differences(expected, actual, device):
    """Return a text for each network whose loss or gradients differ; both from measure(), on the CPU and the device."""
    texts = []
    for network, (loss, gradients) in expected.items():
        device_loss, device_gradients = actual[network]
        errors = {name: ((device_gradients[name] - gradient).norm() / gradient.norm()).nan_to_num(torch.inf).item()
                  for name, gradient in gradients.items()}
        worst = max(errors, key=errors.get)
        if not abs(device_loss - loss) <= LOSS_TOLERANCE * loss or errors[worst] > GRADIENT_TOLERANCE:
            texts.append(f'{network}: loss {device_loss:.5f} on {device}, {loss:.5f} on the CPU; '
                         f'gradient of {worst} off by {errors[worst]:.1%}')
    return texts
