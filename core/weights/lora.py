"""
LoRA (Hu et al. 2021: https://arxiv.org/abs/2106.09685): the weights of a network are frozen, and beside some of its
Linears two small matrices are trained, whose product is added. With a base in eight or four bits it is QLoRA
(Dettmers et al. 2023:
https://arxiv.org/abs/2305.14314).
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
from core.weights.huggingface import LAYERS, architecture_of, split_name, stacked_rows
from core.weights.quantize import FrozenLinear, replace_modules
from kernels import dropout
from model import GPTConfig

# settings of train.py
lora_rank = 0  # inner width of LoRA adapters, e.g. 16; only they are trained. 0: no LoRA, train all weights
lora_alpha = 32.0  # an adapter's output is multiplied by lora_alpha / lora_rank
lora_dropout = 0.0  # dropout on an adapter's input
lora_targets = 'c_attn,c_proj,c_fc'  # Linears that get an adapter, by (end of) name; c_proj: attn.c_proj and mlp.c_proj
quantize_base = ''  # the frozen weights in 'int8', or in 'nf4' by bitsandbytes (QLoRA); '': in float32
SETTINGS = ('lora_rank', 'lora_alpha', 'lora_dropout', 'lora_targets', 'quantize_base')

# A model with adapters has a dict model.lora, which the checkpoint contains: the SETTINGS; 'base' and 'base_path', the
# name and path of the base; 'known', its number of embedding rows (base_vocab_size); 'probe', a sample of its weights.

# --- layers


class LoRALinear(nn.Module):
    """
    base(x) + alpha / rank * B A x, (..., in) -> (..., out).
    A (rank, in) starts as in peft, B (out, rank) at 0, so that at first nothing is added.
    """

    def __init__(self, base, rank, alpha, p):
        super().__init__()
        device = base.weight.device
        self.base = base
        self.scale = alpha / rank
        self.dropout = p
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        p = self.dropout if self.training else 0.0
        return self.base(x) + self.lora_B(self.lora_A(dropout(x, p))) * self.scale


class NewRows(nn.Module):
    """Trained rows (n, C) of an embedding or head, below the frozen ones. A parametrization of the module's weight."""

    def __init__(self, rows):
        super().__init__()
        self.rows = nn.Parameter(rows)

    def forward(self, weight):
        return torch.cat([weight, self.rows])  # (V, C)

# --- train.py's settings


def check_lora(model, origin, resuming, optimizer, parallel, given):
    """
    Exit unless the settings of this file make sense, with each other and with the run.

    model: before add_lora(), or as resumed; origin: where its weights come from; optimizer, parallel: train.py's
    settings; given: the settings that the command line names, which may not contradict the adapters of a resumed run.
    """
    if lora_rank < 0 or lora_alpha <= 0 or not 0 <= lora_dropout < 1:
        sys.exit(f'lora_rank={lora_rank}, lora_alpha={lora_alpha}, lora_dropout={lora_dropout}: '
                 'expected at least 0, above 0, and in [0, 1)')
    if quantize_base not in ('', 'int8', 'nf4'):
        sys.exit(f'quantize_base={quantize_base}: expected int8 or nf4')
    trains_adapters = lora_rank or model.lora
    if quantize_base and not trains_adapters:
        sys.exit(f'quantize_base={quantize_base}: only what is not trained can be quantised; set --lora_rank=16')
    if optimizer in ('muon', 'normuon') and trains_adapters:
        sys.exit(f'optimizer={optimizer}: it cannot train LoRA adapters, expected adamw; add --optimizer=adamw')
    if parallel == 'fsdp' and trains_adapters:
        sys.exit('parallel=fsdp: adapters are not sharded; leave it out where LoRA is trained')
    if lora_rank and origin == 'scratch':
        sys.exit(f'lora_rank={lora_rank}: adapters stand beside weights that are good already; '
                 'say whose: --init_from=...')
    if resuming:
        wanted = lora_settings()
        for key, value in used_settings(model).items():
            if key in given and wanted[key] != value:
                sys.exit(f'--{key}={wanted[key]} contradicts {origin}, which has {key}={value}; '
                         'leave it out, or choose another --out_dir')


def set_up_lora(model, origin, base_vocab_size, resuming, config, given, device):
    """
    Add adapters as the settings of this file say, unless the run is resumed, and print a line about them. Return the
    settings that the model has, {name: value}: a resumed one keeps those that it was given at first.

    config, given: train.py's settings, and those of the command line; the others: see check_lora() and add_lora().
    Exits as these do.
    """
    check_lora(model, origin, resuming, config['optimizer'], config['parallel'], given)
    if not resuming:
        add_lora(model, origin, base_vocab_size, device)
    if model.lora:
        print(describe_adapters(model))
    return used_settings(model)


def lora_settings():
    """Return the settings of this file, {name: value}."""
    return {key: globals()[key] for key in SETTINGS}


def used_settings(model):
    """Return the settings that this model has, {name: value}."""
    if not model.lora:
        return {'lora_rank': 0}
    return {key: model.lora[key] for key in SETTINGS}


def add_lora(model, origin, base_vocab_size, device):
    """Add adapters as the settings of this file say, if lora_rank is not 0. origin: where the weights come from."""
    if not lora_rank:
        return
    base = find(origin)
    lora = {
        **lora_settings(),
        'base': origin,
        'base_path': os.path.realpath(base) if os.path.exists(base) else '',  # '': a model of the Hugging Face hub
        'known': base_vocab_size,
        'probe': weight_sample(model),
    }
    add_adapters(model, lora, device)

# --- adapters


def add_adapters(model, lora, device='cpu'):
    """
    Freeze a model, move it to the device (a quantised base layer by layer) and add adapters, in place.

    lora: the SETTINGS, and 'known', the number of embedding rows of the base. Rows beyond them, for tokens that the
    base never saw, are trained too, and so is the head of a reward model. Exits if lora_targets match no layer.
    """
    model.lora = lora
    model.requires_grad_(False)
    if lora['quantize_base']:
        kind = lora['quantize_base']
        replace_modules(model.transformer.h, nn.Linear, lambda linear: FrozenLinear(linear, kind, device))
    model.to(device)
    if model.config.reward:
        model.lm_head.requires_grad_(True)  # a single row, which computes the rewards
    for name, layer in target_layers(model, lora['lora_targets']).items():
        parent, _, child = name.rpartition('.')
        adapter = LoRALinear(layer, lora['lora_rank'], lora['lora_alpha'], lora['lora_dropout'])
        setattr(model.transformer.h.get_submodule(parent), child, adapter)
    train_new_rows(model, lora['known'])


def target_layers(model, lora_targets):
    """Return the Linears of the blocks that get an adapter, {name: module}. Exits if one of the targets has none."""
    modules = model.transformer.h.named_modules()
    layers = {name: module for name, module in modules if isinstance(module, (nn.Linear, FrozenLinear))}
    targets = [target.strip() for target in lora_targets.split(',') if target.strip()]
    matched = {}
    for target in targets:
        matched[target] = [name for name in layers if f'.{name}'.endswith(f'.{target}')]
    unmatched = [target for target in targets if not matched[target]]
    if unmatched or not targets:
        problem = f'no layer is called {", ".join(unmatched)}' if unmatched else 'no names'
        names = dict.fromkeys(name.partition('.')[2] for name in layers)  # without the number of the block
        sys.exit(f'lora_targets={lora_targets}: {problem}; there are {", ".join(names)}')
    chosen = {name for target in targets for name in matched[target]}
    return {name: module for name, module in layers.items() if name in chosen}  # in the order of the network


def train_new_rows(model, base_vocab_size):
    """Train the rows of embedding and head beyond the base's vocabulary. Tied matrices share their new rows."""
    modules = [model.transformer.wte]
    if not model.config.reward:
        modules.append(model.lm_head)
    split = {}  # id of a matrix: its frozen rows, its trained rows
    for module in modules:
        weight = module.weight
        if len(weight) > base_vocab_size:
            if id(weight) not in split:
                frozen = nn.Parameter(weight[:base_vocab_size].clone(), requires_grad=False)
                split[id(weight)] = frozen, NewRows(weight[base_vocab_size:].clone())
            module.weight, new_rows = split[id(weight)]
            register_parametrization(module, 'weight', new_rows, unsafe=True)  # unsafe: the shape changes


def describe_adapters(model):
    """Return a line about what is trained and how much memory it takes."""
    lora = model.lora
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    quantised = [module for module in model.modules() if isinstance(module, FrozenLinear)]
    quantised_bytes = sum(layer.nbytes() for layer in quantised)
    quantised_weights = sum(layer.in_features * layer.out_features for layer in quantised)
    count = trained + quantised_weights + sum(p.numel() for p in frozen)
    base_bytes = quantised_bytes + sum(p.nbytes for p in frozen)

    text = (f'LoRA of rank {lora["lora_rank"]} on {lora["lora_targets"]}: {trained:,} of {count:,} parameters '
            f'are trained ({trained / count:.2%}); the base takes {base_bytes / 1e6:,.1f} MB')
    if quantised:
        share = quantised_bytes / (2 * quantised_weights)
        text += (f' ({len(quantised)} layers in {lora["quantize_base"]}: {quantised_bytes / 1e6:,.1f} MB, '
                 f'{share:.3f} of what they take in bfloat16)')
    # weight, gradient and two Adam moments, 4 bytes each
    return text + (f', adapters, gradients and moments {16 * trained / 1e6:,.1f} MB '
                   f'(training all of it: {16 * (count - trained) / 1e6:,.1f} MB)')


def trained_weights(model):
    """Return the tensors that a checkpoint contains, {name: tensor}: all, or with adapters only the trained ones."""
    if not model.lora:
        return model.state_dict()
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def merged_linear(layer):
    """Return a plain Linear that computes what this LoRALinear does, up to rounding."""
    linear = layer.base
    if isinstance(linear, FrozenLinear):
        linear = linear.linear()
    linear.weight += layer.scale * layer.lora_B.weight @ layer.lora_A.weight
    return linear


def merge(model):
    """Add the adapters to the weights, in place, and dequantise quantised layers. Returns the plain model."""
    replace_modules(model, LoRALinear, merged_linear)
    replace_modules(model, FrozenLinear, FrozenLinear.linear)
    for module in (model.transformer.wte, model.lm_head):
        if is_parametrized(module):
            weight = module.weight.detach()
            remove_parametrizations(module, 'weight', leave_parametrized=False)
            module.weight = nn.Parameter(weight)
    if model.config.tied and not model.config.reward:
        model.transformer.wte.weight = model.lm_head.weight
    model.lora = None
    return model.requires_grad_(True)


def without_adapters(model):
    """
    Return the frozen base as a model of its own, which shares its weights with `model`: the reference of DPO and
    GRPO.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    base = copy.deepcopy(model, shared)  # a memo in which each tensor is its own copy
    replace_modules(base, LoRALinear, lambda layer: layer.base)
    for module in (base.transformer.wte, base.lm_head):
        if is_parametrized(module):
            weight = module.parametrizations.weight
            new_rows = weight[0]
            mean = weight.original.mean(dim=0)  # as resize_vocabulary() starts new rows
            new_rows.rows = nn.Parameter(mean.repeat(len(new_rows.rows), 1))
    base.lora = None
    return base.eval().requires_grad_(False)


def weight_sample(model):
    """Return a sample of the weights of the blocks, stored with the adapters to detect that their base has changed."""
    samples = []
    for p in model.transformer.h.parameters():
        stride = max(1, p.numel() // 16)
        samples.append(p.detach().flatten()[::stride][:16].cpu())
    return torch.cat(samples)

# --- export


def save_adapter(folder, checkpoint, dtype, name):
    """
    Write adapter_config.json and adapter_model.safetensors, as peft reads them, for the base in Hugging Face's format.

    dtype: 'float32', ...; name: of the model in messages. For Llama and Qwen3 the one matrix A that our stacked
    queries, keys and values share is written for each of them. Exits if other weights than adapters were trained.
    """
    lora = checkpoint['lora']
    config = GPTConfig(**checkpoint['model_args'])
    arch = architecture_of(config, name)
    others = [key for key in checkpoint['model'] if '.lora_' not in key]
    if others:
        sys.exit(f'{name}: {others[0]} is trained, too, and is none of the base, so the adapter alone is no use; '
                 'export the whole by --merge=True')
    tensors = {}
    targets = set()
    for key, p in checkpoint['model'].items():
        path, _, part = key.removesuffix('.weight').rpartition('.')  # part: lora_A or lora_B
        block, layer, _ = split_name(f'{path}.weight')
        if arch == 'gpt2':
            names = [path]
        else:
            names = [f'model.layers.{block}.{hf_name}' for hf_name in LAYERS[layer]]
        if part == 'lora_B' and len(names) > 1:
            parts = p.split(stacked_rows(layer, config))
        else:
            parts = [p] * len(names)
        for hf_name, tensor in zip(names, parts):
            tensors[f'base_model.model.{hf_name}.{part}.weight'] = tensor.to(getattr(torch, dtype), copy=True)
            targets.add('.'.join(hf_name.split('.')[-2:]))
    adapter_config = {
        'peft_type': 'LORA',
        'task_type': 'CAUSAL_LM',
        'base_model_name_or_path': lora['base'],
        'r': lora['lora_rank'],
        'lora_alpha': lora['lora_alpha'],
        'lora_dropout': lora['lora_dropout'],
        'target_modules': sorted(targets),
        'fan_in_fan_out': arch == 'gpt2',
        'bias': 'none',
        'inference_mode': True,
    }
    save_file(tensors, os.path.join(folder, 'adapter_model.safetensors'), metadata={'format': 'pt'})
    with open(os.path.join(folder, 'adapter_config.json'), 'w', encoding='utf-8') as f:
        json.dump(adapter_config, f, indent=2)
