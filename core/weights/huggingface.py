"""GPT-2, Llama and Qwen3 in Hugging Face folders: reading and writing config.json, weights and tokenizer."""
import difflib
import glob
import json
import math
import os
import re
import sys
import zipfile

import torch

from core.device import shapes_only
from core.text.chat_template import JINJA, can_chat, end_of_turn
from model import GPT, GPTConfig

# --- config.json

LAYER_TYPES = {'S': 'sliding_attention', 'L': 'full_attention'}  # GPTConfig's window_pattern: Hugging Face's name

# what the fields that are read here must be: (what, test, names)
FIELDS = [
    ('a whole number from 1 to 2**31', lambda value: type(value) is int and 0 < value <= 2**31,
     ('vocab_size', 'n_positions', 'n_embd', 'n_inner', 'n_head', 'max_position_embeddings', 'num_attention_heads',
      'num_key_value_heads', 'head_dim', 'hidden_size', 'intermediate_size', 'sliding_window')),
    ('a whole number from 0 to 1,000', lambda value: type(value) is int and 0 <= value <= 1000, ('max_window_layers',)),
    ('a whole number from 1 to 1,000', lambda value: type(value) is int and 0 < value <= 1000,
     ('n_layer', 'num_hidden_layers')),
    ('a number above 0', lambda value: type(value) in (int, float) and 0 < value < math.inf,
     ('layer_norm_epsilon', 'rms_norm_eps', 'rope_theta')),
    ('true or false', lambda value: type(value) is bool, ('tie_word_embeddings', 'use_sliding_window')),
    ('text', lambda value: type(value) is str, ('model_type', 'activation_function', 'rope_type', 'type')),
    ('a list of full_attention and sliding_attention',
     lambda value: type(value) is list and all(layer in tuple(LAYER_TYPES.values()) for layer in value),
     ('layer_types',)),
    ('an object {...}', lambda value: type(value) is dict, ('rope_parameters', 'rope_scaling')),
]


def read_config(path):
    """Return the contents of a config.json, a dict. Exits if it is none, or if a field that counts here is damaged."""
    try:
        with open(path, encoding='utf-8') as f:
            hf = json.load(f)
    except (OSError, ValueError, RecursionError) as error:
        sys.exit(f'{path}: not JSON, or damaged: {error}')
    if type(hf) is not dict or not hf.get('model_type'):
        sys.exit(f'{path}: not the config.json of a language model: expected {{"model_type": ...}}')
    hf = {key: value for key, value in hf.items() if value is not None}  # null: left out
    check_fields(hf, path)
    for key in ('rope_parameters', 'rope_scaling'):
        check_fields(hf.get(key, {}), f'{path}: {key}')
    return hf


def check_fields(fields, name):
    """Exit if one of FIELDS is there and is none of what it must be."""
    for what, is_good, keys in FIELDS:
        for key in keys:
            if key in fields and not is_good(fields[key]):
                sys.exit(f'{name}: {key}={str(fields[key])[:80]}: expected {what}')


def unsupported(hf, supported):
    """Return the entries of a config.json which are there and have another value than the supported one."""
    return {key: hf[key] for key, value in supported.items() if hf.get(key, value) != value}


def gpt2_config(hf, name):
    """Return the GPTConfig for the config.json (a dict) of a GPT2LMHeadModel. Exits if GPTConfig cannot express it."""
    odd = unsupported(hf, {
        'scale_attn_weights': True,
        'scale_attn_by_inverse_layer_idx': False,
        'add_cross_attention': False,
    })
    hf_activation = hf.get('activation_function', 'gelu_new')
    activation = {'gelu': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh'}.get(hf_activation)
    if odd or activation is None:
        sys.exit(f'{name}: expected a plain GPT-2, its config.json says {odd or hf_activation}')
    return GPTConfig(
        block_size=hf['n_positions'],
        vocab_size=hf['vocab_size'],
        n_layer=hf['n_layer'],
        n_head=hf['n_head'],
        n_embd=hf['n_embd'],
        n_inner=hf.get('n_inner') or 0,
        bias=True,
        activation=activation,
        norm_eps=hf.get('layer_norm_epsilon', 1e-5),
        tied=hf.get('tie_word_embeddings', True),
    )


def llama_config(hf, name):
    """
    Return the GPTConfig for the config.json (a dict) of a LlamaForCausalLM or Qwen3ForCausalLM.
    Exits if GPTConfig cannot express it.
    """
    odd = unsupported(hf, {
        'hidden_act': 'silu',
        'attention_bias': False,
        'mlp_bias': False,
        **({} if hf['model_type'] == 'qwen3' else {'use_sliding_window': False}),
    })
    rope = hf.get('rope_parameters') or hf.get('rope_scaling') or {}  # transformers 5 and 4
    rope_type = rope.get('rope_type', rope.get('type', 'default'))
    if rope_type != 'default':
        odd['rope_type'] = rope_type
    if odd:
        sys.exit(f'{name}: its config.json says {odd}, which this network does not have')
    window, pattern = qwen3_window(hf, name)
    return GPTConfig(
        block_size=hf['max_position_embeddings'],
        vocab_size=hf['vocab_size'],
        n_layer=hf['num_hidden_layers'],
        n_head=hf['num_attention_heads'],
        n_kv_head=hf.get('num_key_value_heads') or 0,
        head_size=hf.get('head_dim') or 0,
        n_embd=hf['hidden_size'],
        n_inner=hf['intermediate_size'],
        bias=False,
        activation='swiglu',
        norm='rmsnorm',
        norm_eps=hf['rms_norm_eps'],
        rope_theta=float(rope.get('rope_theta', hf.get('rope_theta', 10000.0))),
        qk_norm=hf['model_type'] == 'qwen3',
        tied=hf.get('tie_word_embeddings', False),
        window=window,
        window_pattern=pattern,
    )


def qwen3_window(hf, name):
    """Return window and window_pattern of GPTConfig for a Qwen3's config.json (a dict). Exits on a contradiction."""
    n_layer = hf['num_hidden_layers']
    if 'layer_types' in hf:
        types = hf['layer_types']
    else:
        n_full = hf['max_window_layers'] if hf.get('use_sliding_window') else n_layer  # the first ones
        types = ['full_attention'] * min(n_full, n_layer) + ['sliding_attention'] * (n_layer - n_full)
    if len(types) != n_layer:
        sys.exit(f'{name}: its config.json says layer_types of {len(types)} layers, and num_hidden_layers={n_layer}')
    if 'sliding_attention' not in types:
        return 0, GPTConfig.window_pattern
    if not hf.get('use_sliding_window'):
        sys.exit(f'{name}: its config.json says layer_types with sliding_attention, and use_sliding_window is not true')
    return hf['sliding_window'], ''.join('S' if kind == 'sliding_attention' else 'L' for kind in types)


# model_type: reader of its config.json
ARCHITECTURES = {'gpt2': gpt2_config, 'llama': llama_config, 'qwen3': llama_config}


def architecture_of(config, name):
    """
    Return the Hugging Face model_type ('gpt2', 'llama', 'qwen3') that computes the same as this GPTConfig.
    Exits naming the settings that have no equivalent.
    """
    if config.rope_theta:
        supported = {'norm': ['rmsnorm'], 'activation': ['swiglu'], 'bias': [False]}
    else:
        supported = {
            'norm': ['layernorm'],
            'activation': ['gelu', 'gelu_tanh'],
            'qk_norm': [False],
            'n_kv_head': [config.n_head],
            'head_size': [config.n_embd / config.n_head],
        }
    if not (config.rope_theta and config.qk_norm):
        supported['window'] = [0]  # of these formats, Qwen3 alone has one
    odd = [key for key, values in supported.items() if getattr(config, key) not in values]
    if odd:
        found = ', '.join(f'{key}={getattr(config, key)}' for key in odd)
        expected = ', '.join(f'{key}={" or ".join(map(str, supported[key]))}' for key in odd)
        sys.exit(f'{name}: a network with {found} is none that other programs know: '
                 f'with rope_theta={config.rope_theta}, qk_norm={config.qk_norm} they want {expected}')
    if not config.rope_theta:
        return 'gpt2'
    return 'qwen3' if config.qk_norm else 'llama'


def hf_config(config, name):
    """Return the config.json of a network as a dict that transformers 4 and 5 read."""
    c = config
    arch = architecture_of(config, name)
    if arch == 'gpt2':
        return {
            'architectures': ['GPT2LMHeadModel'],
            'model_type': arch,
            'vocab_size': c.vocab_size,
            'n_positions': c.block_size,
            'n_embd': c.n_embd,
            'n_layer': c.n_layer,
            'n_head': c.n_head,
            'n_inner': c.n_inner,
            'activation_function': {'gelu': 'gelu', 'gelu_tanh': 'gelu_new'}[c.activation],
            'layer_norm_epsilon': c.norm_eps,
            'embd_pdrop': 0.0,
            'attn_pdrop': 0.0,
            'resid_pdrop': 0.0,
            'tie_word_embeddings': c.tied,
        }
    windows = {}
    if any(c.windows()):
        windows = {
            'use_sliding_window': True,
            'sliding_window': c.window,
            'layer_types': [LAYER_TYPES['S' if window else 'L'] for window in c.windows()],
        }
    return {
        'architectures': [{'llama': 'LlamaForCausalLM', 'qwen3': 'Qwen3ForCausalLM'}[arch]],
        'model_type': arch,
        'vocab_size': c.vocab_size,
        'max_position_embeddings': c.block_size,
        'hidden_size': c.n_embd,
        'num_hidden_layers': c.n_layer,
        'num_attention_heads': c.n_head,
        'num_key_value_heads': c.n_kv_head,
        'head_dim': c.head_size,
        'intermediate_size': c.n_inner,
        'hidden_act': 'silu',
        'rms_norm_eps': c.norm_eps,
        'rope_theta': c.rope_theta,  # transformers 4
        'rope_parameters': {'rope_type': 'default', 'rope_theta': c.rope_theta},  # transformers 5
        'attention_bias': False,
        'mlp_bias': False,
        'attention_dropout': 0.0,
        'tie_word_embeddings': c.tied,
        **windows,
    }

# --- weights


# our layer: its names in Llama and Qwen3, several where our matrix is a stack of theirs (see stacked_rows)
LAYERS = {
    'transformer.wte': ['model.embed_tokens'],
    'transformer.ln_f': ['model.norm'],
    'lm_head': ['lm_head'],
    'ln_1': ['input_layernorm'],
    'attn.c_attn': ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'],
    'attn.c_proj': ['self_attn.o_proj'],
    'attn.q_norm': ['self_attn.q_norm'],
    'attn.k_norm': ['self_attn.k_norm'],
    'ln_2': ['post_attention_layernorm'],
    'mlp.c_fc': ['mlp.gate_proj', 'mlp.up_proj'],
    'mlp.c_proj': ['mlp.down_proj'],
}


def stacked_rows(layer, config):
    """Return the number of rows of each matrix stacked in this layer: queries, keys, values; or SwiGLU's gate, up."""
    return {
        'attn.c_attn': [heads * config.head_size for heads in (config.n_head, config.n_kv_head, config.n_kv_head)],
        'mlp.c_fc': [config.n_inner, config.n_inner],
    }[layer]


def split_name(key):
    """
    Split a parameter's name: 'transformer.h.3.attn.c_attn.weight' -> ('3', 'attn.c_attn', 'weight').
    Outside of blocks the first is None.
    """
    return re.fullmatch(r'(?:transformer\.h\.(\d+)\.)?(.+)\.(\w+)', key).groups()


def huggingface_names(key, p, config):
    """
    Return what our parameter `p`, named `key`, is in a Hugging Face folder: [(name, a view of p), ...].
    Reading and writing both use this list.
    """
    block, layer, suffix = split_name(key)
    if not config.rope_theta:
        transposed = layer.endswith(('c_attn', 'c_proj', 'c_fc')) and p.dim() == 2  # OpenAI's Conv1D stores (in, out)
        return [(key, p.t() if transposed else p)]
    prefix = '' if block is None else f'model.layers.{block}.'
    names = [f'{prefix}{name}.{suffix}' for name in LAYERS[layer]]
    if len(names) == 1:
        return [(names[0], p)]
    return list(zip(names, p.split(stacked_rows(layer, config))))


def load_pretrained(name, dropout=0.0):
    """
    Load a Hugging Face model as a GPT in float32.

    name: a folder with config.json and *.safetensors or pytorch_model.bin, or a repository on the hub ('gpt2',
    'Qwen/Qwen3-0.6B'). The files are memory-mapped, so the weights are in memory once. Exits if the architecture is
    another one or the files are damaged.
    """
    folder = download_pretrained(name)
    model = model_without_weights(folder, name, dropout)
    config = model.config
    state = load_weights(folder)
    if not config.rope_theta:  # GPT-2: some repositories leave the prefix out
        prefixes = ('transformer.', 'lm_head.')
        state = {key if key.startswith(prefixes) else f'transformer.{key}': value for key, value in state.items()}
    model.to_empty(device='cpu')
    if config.tied:
        model.transformer.wte.weight = model.lm_head.weight

    views = {}  # Hugging Face's name: the part of our parameter that it fills
    for key, p in model.named_parameters():
        views.update(huggingface_names(key, p.detach(), config))
    check_weights(state, views, config, name)
    for key, view in views.items():
        view.copy_(state[key])
    return model


def model_without_weights(folder, name, dropout=0.0):
    """Return the GPT of a folder's config.json on the device 'meta'. Exits if it is damaged or unsupported."""
    path = os.path.join(folder, 'config.json')
    hf = read_config(path)
    arch = hf['model_type']
    if arch not in ARCHITECTURES:
        sys.exit(f'{name}: its architecture is {arch}; supported are {", ".join(ARCHITECTURES)}')
    try:
        config = ARCHITECTURES[arch](hf, name)
        config.dropout = dropout
        with shapes_only():
            return GPT(config)  # raises if the numbers do not make a network
    except KeyError as error:
        sys.exit(f'{path}: {error} is missing; it is not the config.json of a {arch}, or a damaged one')
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        reason = str(error).partition('\n')[0]
        sys.exit(f'{path}: its numbers make no network: {reason}')


def check_weights(state, views, config, name):
    """Exit unless the tensors of a folder, {name: tensor}, are floating point and match `views` in name and shape."""
    wrong = [f'{key} is missing' for key in views if key not in state]
    for key, tensor in state.items():
        is_buffer = re.search(r'\.attn\.(masked_)?bias$|\.inv_freq$', key)
        is_tied_head = key == 'lm_head.weight' and config.tied
        if key in views:
            if not tensor.is_floating_point():
                wrong.append(f'{key} is {tensor.dtype}, expected floating point')
            if tensor.shape != views[key].shape:
                wrong.append(f'{key} is {tuple(tensor.shape)}, expected {tuple(views[key].shape)}')
        elif not is_buffer and not is_tied_head:
            wrong.append(f'{key} is unknown')
    if wrong:
        sys.exit(f'{name}: its weights do not fit its config.json: {"; ".join(sorted(wrong))}')


def download_pretrained(name):
    """
    Return the folder of a Hugging Face model: `name` itself if it is a folder, else a download from the hub, where
    `name` may be repo@revision (a commit, tag or branch). huggingface_hub reads HF_ENDPOINT and HF_HOME.
    """
    folder = os.path.expanduser(name)
    if os.path.isfile(os.path.join(folder, 'config.json')):
        return folder
    if os.path.isfile(os.path.join(folder, 'adapter_config.json')):
        sys.exit(f"{name}: it has peft's adapters alone; merge them into their base there (merge_and_unload(), then "
                 'save_pretrained()), and take that folder')
    if os.path.isdir(folder):
        sys.exit(f'{name}: no config.json in this folder; expected a Hugging Face model')
    try:
        from huggingface_hub import snapshot_download
        patterns = ['config.json', '*.safetensors', '*.safetensors.index.json']
        patterns += ['tokenizer.json', 'vocab.json', 'merges.txt']
        repo, _, revision = name.partition('@')
        return snapshot_download(repo, revision=revision or None, allow_patterns=patterns)
    except Exception as error:  # every kind of network failure has its own class there
        near = difflib.get_close_matches(name, ['resume', 'scratch', *ARCHITECTURES, *glob.glob('out*')], 1)
        hint = f'; did you mean {near[0]}?' if near else ''
        sys.exit(f'{name}: no such folder, and no such model could be had from the Hugging Face hub '
                 f'({type(error).__name__}); without network, give the path of a folder '
                 f'with config.json and model.safetensors{hint}')


def load_weights(folder):
    """
    Return the tensors of a Hugging Face folder, {name: tensor}, from model.safetensors, the shards of its index, or
    pytorch_model.bin (loaded with weights_only). Exits if a file is missing or damaged.
    """
    from safetensors.torch import load_file
    files = weight_files(folder)
    missing = [file for file in files if not os.path.exists(os.path.join(folder, file))]
    if missing:
        hint = '; expected model.safetensors or pytorch_model.bin' if files == ['pytorch_model.bin'] else ''
        sys.exit(f'{folder}: {", ".join(missing)} missing{hint}')
    state = {}
    for file in files:
        path = os.path.join(folder, file)
        try:
            if file.endswith('.safetensors'):
                tensors = load_file(path)
            else:
                tensors = torch.load(path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path))
            state.update(tensors)
            if not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
                raise TypeError
        except Exception as error:  # a damaged file raises nearly every class of error
            sys.exit(f'{path}: not a file of tensors alone, or a damaged one ({type(error).__name__})')
    return state


def weight_files(folder):
    """Return the names of the files with the weights of a Hugging Face folder."""
    index = os.path.join(folder, 'model.safetensors.index.json')
    if os.path.exists(index):
        try:
            with open(index, encoding='utf-8') as f:
                return sorted({os.path.basename(file) for file in json.load(f)['weight_map'].values()})
        except (ValueError, KeyError, TypeError, AttributeError):
            sys.exit(f'{index}: damaged: expected {{"weight_map": {{tensor: file, ...}}}}')
    files = sorted(file for file in os.listdir(folder) if file.endswith('.safetensors'))
    if 'model.safetensors' in files:
        return ['model.safetensors']  # other files may be there, such as the original's consolidated.safetensors
    return files or ['pytorch_model.bin']


def hf_weights(model, dtype):
    """
    Return the tensors of a Hugging Face folder, {name: tensor}, in `dtype`.
    Where transformers' GPT-2 has biases and the model none, they are 0.
    """
    views = {}
    for key, p in model.named_parameters():
        views.update(huggingface_names(key, p.detach(), model.config))
    if not model.config.rope_theta:
        with shapes_only():
            with_biases = GPT(GPTConfig(**{**vars(model.config), 'bias': True}))
        views.update({key: torch.zeros(p.shape) for key, p in with_biases.named_parameters() if key not in views})
    # each with memory of its own, as safetensors wants it
    return {key: torch.empty(view.shape, dtype=dtype).copy_(view) for key, view in views.items()}

# --- a whole folder


def save_pretrained(folder, model, tokenizer, dtype, name):
    """
    Write a folder that transformers and vLLM open: weights in float32, bfloat16 or float16 (in shards of 4 GB),
    tokenizer, end-of-text tokens and chat template. dtype: 'float32', ...; name: of the model in messages.
    """
    from huggingface_hub import save_torch_state_dict
    chats = can_chat(tokenizer)
    end = end_of_turn(tokenizer) if chats else tokenizer.eot
    bos = end if tokenizer.eot is None else tokenizer.eot
    ids = {'bos_token_id': bos, 'eos_token_id': end, 'pad_token_id': bos}
    name_of = {i: text for text, i in tokenizer.specials.items()}

    generation = {
        **ids,
        'eos_token_id': sorted({end, tokenizer.eot} - {None}) or None,
        'do_sample': True,
        'temperature': 0.8,
        'top_k': 200,
    }
    about_tokens = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'model_max_length': model.config.block_size,
        'clean_up_tokenization_spaces': False,
    }
    for key, i in ids.items():
        if i is not None:
            about_tokens[key.removesuffix('_id')] = name_of[i]
    if chats:
        about_tokens['chat_template'] = JINJA
    files = {
        'config.json': {**hf_config(model.config, name), 'dtype': dtype, **ids},
        'generation_config.json': generation,
        'tokenizer_config.json': about_tokens,
    }
    for file, content in files.items():
        with open(os.path.join(folder, file), 'w', encoding='utf-8') as f:
            json.dump(content, f, indent=2, ensure_ascii=False)
    with open(os.path.join(folder, 'tokenizer.json'), 'w', encoding='utf-8', newline='') as f:
        f.write(tokenizer.json)
    weights = hf_weights(model, getattr(torch, dtype))
    save_torch_state_dict(weights, folder, max_shard_size='4GB', metadata={'format': 'pt'})
