"""Networks that others trained, read from Hugging Face folders: GPT-2, Llama and Qwen3."""
import json
import os
import sys

import torch

from model import GPT, GPTConfig


def gpt2_config(hf, name):
    """The GPTConfig of a GPT2LMHeadModel's config.json."""
    wanted = {'tie_word_embeddings': True, 'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False, 'add_cross_attention': False}
    odd = {key: hf[key] for key, value in wanted.items() if hf.get(key, value) != value}
    activation = {'gelu': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh'}.get(hf.get('activation_function', 'gelu_new'))
    if odd or activation is None:
        sys.exit(f'{name}: expected a plain GPT-2, its config.json says {odd or hf["activation_function"]}')
    return GPTConfig(block_size=hf['n_positions'], vocab_size=hf['vocab_size'], n_layer=hf['n_layer'], n_head=hf['n_head'], n_embd=hf['n_embd'],
                     bias=True, activation=activation, norm_eps=hf.get('layer_norm_epsilon', 1e-5), n_inner=hf.get('n_inner') or 0)


def llama_config(hf, name):
    """The GPTConfig of a LlamaForCausalLM's or Qwen3ForCausalLM's config.json."""
    rope = hf.get('rope_parameters') or hf.get('rope_scaling') or {}  # transformers 5 and 4
    wanted = {'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False, 'use_sliding_window': False}
    odd = {key: hf[key] for key, value in wanted.items() if hf.get(key, value) != value}
    if rope.get('rope_type', rope.get('type', 'default')) != 'default':
        odd['rope_type'] = rope.get('rope_type', rope.get('type'))
    if odd:
        sys.exit(f'{name}: its config.json says {odd}, which this network does not have')
    return GPTConfig(block_size=hf['max_position_embeddings'], vocab_size=hf['vocab_size'], n_layer=hf['num_hidden_layers'], n_head=hf['num_attention_heads'],
                     n_embd=hf['hidden_size'], bias=False, activation='swiglu', norm='rmsnorm', norm_eps=hf['rms_norm_eps'],
                     rope_theta=float(rope.get('rope_theta', hf.get('rope_theta', 10000.0))), qk_norm=hf['model_type'] == 'qwen3',
                     tied=hf.get('tie_word_embeddings', False), n_kv_head=hf.get('num_key_value_heads') or 0, head_size=hf.get('head_dim') or 0,
                     n_inner=hf['intermediate_size'])


def gpt2_weights(model, state):
    """{our name: tensor} of a GPT-2's state dict."""
    state = {key.removeprefix('transformer.'): value for key, value in state.items()}
    # OpenAI's Conv1D keeps its matrices transposed
    return {f'transformer.{key}': state[key].t() if key.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')) else state[key]
            for key, _ in model.transformer.named_parameters()}


def llama_weights(model, state):
    """{our name: tensor} of a Llama's or Qwen3's state dict: theirs are stacked where ours are one matrix."""
    names = {'transformer.wte.weight': ['model.embed_tokens'], 'transformer.ln_f.weight': ['model.norm'], 'lm_head.weight': ['lm_head']}
    for i in range(model.config.n_layer):
        for ours, theirs in (('ln_1', ['input_layernorm']), ('attn.c_attn', ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj']),
                             ('attn.c_proj', ['self_attn.o_proj']), ('attn.q_norm', ['self_attn.q_norm']), ('attn.k_norm', ['self_attn.k_norm']),
                             ('ln_2', ['post_attention_layernorm']), ('mlp.c_fc', ['mlp.gate_proj', 'mlp.up_proj']), ('mlp.c_proj', ['mlp.down_proj'])):
            names[f'transformer.h.{i}.{ours}.weight'] = [f'model.layers.{i}.{name}' for name in theirs]
    return {ours: torch.cat([state[f'{name}.weight'] for name in names[ours]]) for ours, _ in model.named_parameters()}


# of each architecture: how to read its config.json, and its weights
ARCHITECTURES = {'gpt2': (gpt2_config, gpt2_weights), 'llama': (llama_config, llama_weights), 'qwen3': (llama_config, llama_weights)}


def load_pretrained(name, dropout=0.0):
    """
    The network of a Hugging Face model, in float32: name is a folder with config.json and *.safetensors or pytorch_model.bin, or a repository
    on the hub ('gpt2', 'Qwen/Qwen3-0.6B'). Ends the script with one line where it is of another architecture or its files are damaged.
    """
    folder = download_pretrained(name)
    path = os.path.join(folder, 'config.json')
    try:
        with open(path, encoding='utf-8') as f:
            hf = json.load(f)
        kind = hf.get('model_type')
        if kind not in ARCHITECTURES:
            sys.exit(f'{name}: its architecture is {kind}; supported are {", ".join(ARCHITECTURES)}')
        read_config, read_weights = ARCHITECTURES[kind]
        config = read_config(hf, name)
        config.dropout = dropout
        with torch.device('meta'):
            GPT(config)  # whether these numbers make a network
    except (KeyError, ValueError, AttributeError, TypeError, ArithmeticError, RuntimeError) as error:
        sys.exit(f'{path}: not the config.json of a language model, or a damaged one ({type(error).__name__}: {str(error).partition(chr(10))[0]})')
    model, state = GPT(config), load_weights(folder)
    try:
        weights = read_weights(model, state)
        with torch.no_grad():
            for key, p in model.named_parameters():
                if weights[key].shape != p.shape:
                    sys.exit(f'{name}: its weights do not fit its config.json: {key} is {tuple(weights[key].shape)}, expected {tuple(p.shape)}')
                p.copy_(weights[key])
    except (KeyError, RuntimeError) as error:
        sys.exit(f'{name}: its weights do not fit its config.json ({type(error).__name__}: {str(error).splitlines()[0]})')
    return model


def download_pretrained(name):
    """The folder of a Hugging Face model: name itself if it is one, else its copy from the hub (HF_ENDPOINT and HF_HOME are honoured)."""
    folder = os.path.expanduser(name)
    if os.path.isfile(os.path.join(folder, 'config.json')):
        return folder
    if os.path.isdir(folder):
        sys.exit(f'{name}: no config.json in this folder; expected a Hugging Face model')
    try:
        from huggingface_hub import snapshot_download
        return snapshot_download(name, allow_patterns=['config.json', '*.safetensors', 'tokenizer.json', 'vocab.json', 'merges.txt'])
    except Exception as error:  # every kind of network failure has a class of its own there
        sys.exit(f'{name}: no such folder, and no such model could be had from the Hugging Face hub ({type(error).__name__}); '
                 'without network, give the path of a folder with config.json and model.safetensors')


def load_weights(folder):
    """The tensors of a Hugging Face folder, by name: *.safetensors, or pytorch_model.bin (never unpickled beyond tensors)."""
    from safetensors.torch import load_file
    state = {}
    for name in sorted(name for name in os.listdir(folder) if name.endswith('.safetensors')) or ['pytorch_model.bin']:
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            sys.exit(f'{folder}: no weights; expected model.safetensors or pytorch_model.bin')
        try:
            state.update(load_file(path) if name.endswith('.safetensors') else torch.load(path, map_location='cpu', weights_only=True))
        except Exception as error:  # nearly every kind there is
            sys.exit(f'{path}: not a file of tensors alone, or a damaged one ({type(error).__name__})')
    return state
