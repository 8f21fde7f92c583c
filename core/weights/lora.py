"""
LoRA (Hu et al. 2021: https://arxiv.org/abs/2106.09685): a network stays as it is, and beside some of its Linears two small matrices are trained, whose product is
added. With a base in eight or four bits that is QLoRA (Dettmers et al. 2023: https://arxiv.org/abs/2305.14314).
"""
import copy
import json
import math
import os
import sys

import torch
import torch.nn as nn
from safetensors.torch import save_file
from torch.nn.utils.parametrize import is_parametrized, register_parametrization, remove_parametrizations

from core.files import find
from core.weights.huggingface import LAYERS, architecture_of, split_rows
from core.weights.quantize import FrozenLinear
from kernels import dropout
from model import GPTConfig

# settings of train.py
lora_rank = 0  # of LoRA's adapters: their inner width, e.g. 16; only they are trained. 0: no LoRA, all weights are
lora_alpha = 32.0  # what an adapter adds is multiplied by lora_alpha / lora_rank
lora_dropout = 0.0  # on what goes into an adapter
lora_targets = 'c_attn,c_proj,c_fc'  # names, or ends of names, of the Linears that get one; attn.c_proj and mlp.c_proj are two
quantize_base = ''  # the weights that are not trained in 'int8', or in 'nf4' by bitsandbytes (QLoRA); '': in float32
SETTINGS = 'lora_rank', 'lora_alpha', 'lora_dropout', 'lora_targets', 'quantize_base'


class LoRALinear(nn.Module):
    """base(x) + alpha / rank * B A x, (..., in) -> (..., out): A (rank, in) starts as peft starts it, B (out, rank) at 0, so that nothing is added at first."""

    def __init__(self, base, rank, alpha, p):
        super().__init__()
        device = base.weight.device
        self.base, self.scale, self.dropout = base, alpha / rank, p
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return self.base(x) + self.lora_B(self.lora_A(dropout(x, self.dropout if self.training else 0.0))) * self.scale


class NewRows(nn.Module):
    """Rows of the vocabulary that are trained, (n, C), below those that are not."""

    def __init__(self, rows):
        super().__init__()
        self.rows = nn.Parameter(rows)

    def forward(self, weight):
        return torch.cat([weight, self.rows])  # (V, C)


def replace_modules(model, kind, new):
    """Put new(child) in the place of each child module of this kind."""
    for module in [module for module in model.modules() if not isinstance(module, kind)]:  # nobody holds a child that has been replaced
        for name, child in module.named_children():
            if isinstance(child, kind):
                setattr(module, name, new(child))


def add_lora(model, origin, resumed, known, config, given, run):
    """
    Give a network, which comes from `origin`, adapters where the settings `config` want some; a resumed one has its own or none, and then the settings become those. Ends
    the script with one line where they cannot be, or the command line, `given`, says otherwise. known: see add_adapters().
    """
    if config['lora_rank'] < 0 or config['lora_alpha'] <= 0 or not 0 <= config['lora_dropout'] < 1:
        sys.exit(f'lora_rank={config["lora_rank"]}, lora_alpha={config["lora_alpha"]}, lora_dropout={config["lora_dropout"]}: expected at least 0, above 0, and in [0, 1)')
    if config['quantize_base'] not in ('', 'int8', 'nf4'):
        sys.exit(f'quantize_base={config["quantize_base"]}: expected int8 or nf4')
    if config['quantize_base'] and not (config['lora_rank'] or model.lora):
        sys.exit(f'quantize_base={config["quantize_base"]}: only what is not trained can be quantised; set --lora_rank=16')
    for key, value, why in (('optimizer', 'muon', 'adapters are no matrices for Muon'), ('parallel', 'fsdp', 'adapters are not sharded')):
        if config[key] == value and (config['lora_rank'] or model.lora):
            sys.exit(f'{key}={value}: {why}; leave it out where LoRA is trained')
    if config['lora_rank'] and not resumed:
        if origin == 'scratch':
            sys.exit(f'lora_rank={config["lora_rank"]}: adapters stand beside weights that are good already; say whose: --init_from=...')
        lora = {key: config[key] for key in SETTINGS} | {'base': origin, 'base_path': os.path.realpath(find(origin)) if os.path.exists(find(origin)) else ''}
        add_adapters(model, {**lora, 'known': known, 'probe': sample_weights(model)}, run.device)
    had = model.lora or {'lora_rank': 0}
    for key in filter(had.__contains__, SETTINGS):
        if key in given and config[key] != had[key]:
            sys.exit(f'--{key}={config[key]} contradicts {origin}, which has {key}={had[key]}; leave it out, or choose another --out_dir')
        config[key] = had[key]
    if model.lora:
        print(describe_adapters(model))


def add_adapters(model, lora, device='cpu'):
    """
    Freeze a network, bring it to the device, with a quantised base layer by layer, and give it adapters, in place. lora: the SETTINGS and 'known': so many rows of
    the vocabulary are the base's; those below, of tokens that it never saw, are trained as well. Ends the script with one line where the targets match nothing.
    """
    model.lora = lora
    model.requires_grad_(False)
    if lora['quantize_base']:
        replace_modules(model.transformer.h, nn.Linear, lambda linear: FrozenLinear(linear, lora['quantize_base'], device))
    model.to(device)
    if model.config.reward:
        model.lm_head.requires_grad_(True)  # small, and what the answers are judged by
    targets = [target.strip() for target in lora['lora_targets'].split(',') if target.strip()]
    layers = {name: module for name, module in model.transformer.h.named_modules() if isinstance(module, (nn.Linear, FrozenLinear))}
    unmatched = [target for target in targets if not any(f'.{name}'.endswith(f'.{target}') for name in layers)]
    if unmatched or not targets:
        names = dict.fromkeys(name.partition('.')[2] for name in layers)  # without the number of the block
        sys.exit(f'lora_targets={lora["lora_targets"]}: ' + (f'no layer is called {", ".join(unmatched)}' if unmatched else 'no names') + f'; there are {", ".join(names)}')
    for name, layer in layers.items():
        if any(f'.{name}'.endswith(f'.{target}') for target in targets):
            parent, _, child = name.rpartition('.')
            setattr(model.transformer.h.get_submodule(parent), child, LoRALinear(layer, lora['lora_rank'], lora['lora_alpha'], lora['lora_dropout']))
    known, halves = lora['known'], {}  # of each matrix of the vocabulary, one where it is tied: the rows that stay, those that are trained
    for module in [model.transformer.wte] + [model.lm_head] * (not model.config.reward):
        weight = module.weight
        if known < len(weight):
            if id(weight) not in halves:
                halves[id(weight)] = nn.Parameter(weight[:known].clone(), requires_grad=False), NewRows(weight[known:].clone())
            module.weight, rows = halves[id(weight)]
            register_parametrization(module, 'weight', rows, unsafe=True)  # it changes the shape


def describe_adapters(model):
    """What is trained and what memory that takes, for people."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    layers = [module for module in model.modules() if isinstance(module, FrozenLinear)]
    small, before = sum(layer.nbytes() for layer in layers), sum(layer.in_features * layer.out_features for layer in layers)
    count = trained + before + sum(p.numel() for p in frozen)
    base = small + sum(p.nbytes for p in frozen)
    return (f'LoRA of rank {model.lora["lora_rank"]} on {model.lora["lora_targets"]}: {trained:,} of {count:,} parameters are trained ({trained / count:.2%}); the base takes {base / 1e6:,.1f} MB'
            + (f' ({len(layers)} layers in {model.lora["quantize_base"]}: {small / 1e6:,.1f} MB, {small / (2 * before):.3f} of what they take in bfloat16)' if layers else '')
            + f', adapters, gradients and moments {16 * trained / 1e6:,.1f} MB (training all of it: {16 * (count - trained) / 1e6:,.1f} MB)')


def trained_weights(model):
    """What a checkpoint keeps of a network: all of it, or of one with adapters what is trained."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad} if model.lora else model.state_dict()


def merge(model):
    """Add the adapters to the weights that they stand beside, in place, to within rounding; and turn quantised ones back into what they multiplied as. Returns the model, a plain one."""
    @torch.no_grad()
    def merged(layer):
        linear = layer.base.linear() if isinstance(layer.base, FrozenLinear) else layer.base
        linear.weight += layer.scale * layer.lora_B.weight @ layer.lora_A.weight
        return linear
    replace_modules(model, LoRALinear, merged)
    replace_modules(model, FrozenLinear, FrozenLinear.linear)
    for module in {model.transformer.wte, model.lm_head}:
        if is_parametrized(module):
            weight = module.weight.detach()
            remove_parametrizations(module, 'weight', leave_parametrized=False)
            module.weight = nn.Parameter(weight)
    if model.config.tied and not model.config.reward:
        model.transformer.wte.weight = model.lm_head.weight
    model.lora = None
    return model.requires_grad_(True)


def without_adapters(model):
    """The base as it was, a reference to measure from: a network of its own that shares the weights with `model`."""
    base = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    replace_modules(base, LoRALinear, lambda layer: layer.base)
    for module in {base.transformer.wte, base.lm_head}:
        if is_parametrized(module):
            original, added = module.parametrizations.weight.original, module.parametrizations.weight[0]
            added.rows = nn.Parameter(original.mean(dim=0).repeat(len(added.rows), 1))
    base.lora = None
    return base.eval().requires_grad_(False)


def sample_weights(model):
    """Some numbers of every tensor in the blocks of a network, by which another one is noticed."""
    return torch.cat([p.detach().flatten()[::max(1, p.numel() // 16)][:16].cpu() for p in model.transformer.h.parameters()])


def save_adapter(folder, checkpoint, dtype, name):
    """
    Write what peft reads, adapter_config.json and adapter_model.safetensors, for the base as transformers has it, in `dtype`. One matrix A of ours that serves queries, keys and
    values stands there with each of them. Ends the script with one line where more than adapters was trained.
    """
    lora, config, tensors, targets = checkpoint['lora'], GPTConfig(**checkpoint['model_args']), {}, set()
    kind = architecture_of(config, name)
    others = [key for key in checkpoint['model'] if '.lora_' not in key]
    if others:
        sys.exit(f'{name}: {others[0]} is trained, too, and is none of the base, so the adapter alone is no use; export the whole by --merge=True')
    for key, p in checkpoint['model'].items():
        layer, _, part = key.removesuffix('.weight').rpartition('.')
        _, _, block, layer = layer.split('.', 3)
        names = [f'transformer.h.{block}.{layer}'] if kind == 'gpt2' else [f'model.layers.{block}.{other}' for other in LAYERS[layer]]
        parts = [p] * len(names) if part == 'lora_A' or len(names) == 1 else p.split(split_rows(layer, config))
        tensors.update((f'base_model.model.{other}.{part}.weight', tensor.to(getattr(torch, dtype), copy=True)) for other, tensor in zip(names, parts))
        targets.update('.'.join(other.split('.')[-2:]) for other in names)
    about = {'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': lora['base'], 'r': lora['lora_rank'], 'lora_alpha': lora['lora_alpha'], 'lora_dropout': lora['lora_dropout'],
             'target_modules': sorted(targets), 'fan_in_fan_out': kind == 'gpt2', 'bias': 'none', 'inference_mode': True}
    save_file(tensors, os.path.join(folder, 'adapter_model.safetensors'), metadata={'format': 'pt'})
    with open(os.path.join(folder, 'adapter_config.json'), 'w', encoding='utf-8') as f:
        json.dump(about, f, indent=2)
