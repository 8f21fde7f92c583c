"""Networks in Hugging Face folders, read and written: GPT-2, Llama and Qwen3."""
import json
import os
import re
import sys
import zipfile

import torch

from core.text.chat_template import JINJA, can_chat, end_of_turn
from model import GPT, GPTConfig


def gpt2_config(hf, name):
    """The GPTConfig of a GPT2LMHeadModel's config.json."""
    wanted = {'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False, 'add_cross_attention': False}
    odd = {key: hf[key] for key, value in wanted.items() if hf.get(key, value) != value}
    activation = {'gelu': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh'}.get(hf.get('activation_function', 'gelu_new'))
    if odd or activation is None:
        sys.exit(f'{name}: expected a plain GPT-2, its config.json says {odd or hf["activation_function"]}')
    return GPTConfig(block_size=hf['n_positions'], vocab_size=hf['vocab_size'], n_layer=hf['n_layer'], n_head=hf['n_head'], n_embd=hf['n_embd'],
                     bias=True, activation=activation, norm_eps=hf.get('layer_norm_epsilon', 1e-5), tied=hf.get('tie_word_embeddings', True),
                     n_inner=hf.get('n_inner') or 0)


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


ARCHITECTURES = {'gpt2': gpt2_config, 'llama': llama_config, 'qwen3': llama_config}  # how to read the config.json of each


def architecture_of(config, name):
    """Which of the ARCHITECTURES computes what this network does. Ends the script with one line that says what stands in the way where none does."""
    if config.rope_theta:
        wanted = {'norm': ['rmsnorm'], 'activation': ['swiglu'], 'bias': [False]}
    else:
        wanted = {'norm': ['layernorm'], 'activation': ['gelu', 'gelu_tanh'], 'qk_norm': [False], 'n_kv_head': [config.n_head], 'head_size': [config.n_embd / config.n_head]}
    odd = {key: getattr(config, key) for key, values in wanted.items() if getattr(config, key) not in values}
    if odd:
        sys.exit(f'{name}: a network with {", ".join(f"{key}={value}" for key, value in odd.items())} is none that other programs know: with '
                 f'rope_theta={config.rope_theta} they want {", ".join(f"{key}={wanted[key][0]}" for key in odd)}')
    return 'gpt2' if not config.rope_theta else 'qwen3' if config.qk_norm else 'llama'


# what Llama and Qwen3 call our layers; what is stacked in one matrix of ours they have by itself
LAYERS = {'transformer.wte': ['model.embed_tokens'], 'transformer.ln_f': ['model.norm'], 'lm_head': ['lm_head'], 'ln_1': ['input_layernorm'],
          'attn.c_attn': ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'], 'attn.c_proj': ['self_attn.o_proj'],
          'attn.q_norm': ['self_attn.q_norm'], 'attn.k_norm': ['self_attn.k_norm'], 'ln_2': ['post_attention_layernorm'],
          'mlp.c_fc': ['mlp.gate_proj', 'mlp.up_proj'], 'mlp.c_proj': ['mlp.down_proj']}


def split_rows(layer, config):
    """How many rows of a layer's matrix belong to each of the matrices that are stacked in it."""
    return {'attn.c_attn': [heads * config.head_size for heads in (config.n_head, config.n_kv_head, config.n_kv_head)], 'mlp.c_fc': [config.n_inner] * 2}[layer]


def huggingface_names(key, p, config):
    """Our parameter `key` as a Hugging Face folder has it: [(name there, a view of p)]. So reading and writing are the same list."""
    layer, _, kind = key.rpartition('.')
    if not config.rope_theta:  # OpenAI's Conv1D keeps its matrices transposed
        return [(key, p.t() if layer.endswith(('c_attn', 'c_proj', 'c_fc')) and p.dim() == 2 else p)]
    block = re.match(r'transformer\.h\.(\d+)\.', layer)
    layer = layer[block.end():] if block else layer
    names = [(f'model.layers.{block[1]}.' if block else '') + f'{name}.{kind}' for name in LAYERS[layer]]
    return [(names[0], p)] if len(names) == 1 else [*zip(names, p.split(split_rows(layer, config)))]


def load_pretrained(name, dropout=0.0):
    """
    The network of a Hugging Face model, in float32: name is a folder with config.json and *.safetensors or pytorch_model.bin, or a repository
    on the hub ('gpt2', 'Qwen/Qwen3-0.6B'). Its files are mapped, so the weights are in memory once. Ends the script with one line where it
    is of another architecture or its files are damaged.
    """
    folder = download_pretrained(name)
    path = os.path.join(folder, 'config.json')
    try:
        with open(path, encoding='utf-8') as f:
            hf = json.load(f)
        kind = hf.get('model_type')
        if kind not in ARCHITECTURES:
            sys.exit(f'{name}: its architecture is {kind}; supported are {", ".join(ARCHITECTURES)}')
        config = ARCHITECTURES[kind](hf, name)
        config.dropout = dropout
        if min(config.block_size, config.n_layer) < 1:
            raise ValueError(f'{config.n_layer} layers, a context of {config.block_size}')
        with torch.device('meta'):
            model = GPT(config)  # whether these numbers make a network
    except (KeyError, ValueError, AttributeError, TypeError, ArithmeticError, RuntimeError) as error:
        sys.exit(f'{path}: not the config.json of a language model, or a damaged one ({type(error).__name__}: {str(error).partition(chr(10))[0]})')
    state = load_weights(folder)
    if kind == 'gpt2':
        state = {key if key.startswith(('transformer.', 'lm_head.')) else f'transformer.{key}': value for key, value in state.items()}
    model.to_empty(device='cpu')
    if config.tied:
        model.transformer.wte.weight = model.lm_head.weight
    ours = {key: view for name, p in model.named_parameters() for key, view in huggingface_names(name, p.detach(), config)}
    ignored = {key for key in state if re.search(r'\.attn\.(masked_)?bias$|\.inv_freq$', key) or key == 'lm_head.weight' and config.tied}  # no parameters
    wrong = {f'{key} is missing' for key in ours.keys() - state} | {f'{key} is unknown' for key in state.keys() - ours - ignored}
    wrong |= {f'{key} is {state[key].dtype}, expected floating point' for key in ours.keys() & state if not state[key].is_floating_point()}
    wrong |= {f'{key} is {tuple(state[key].shape)}, expected {tuple(p.shape)}' for key, p in ours.items() if key in state and state[key].shape != p.shape}
    if wrong:
        sys.exit(f'{name}: its weights do not fit its config.json: {"; ".join(sorted(wrong))}')
    for key, p in ours.items():
        p.copy_(state[key])
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
        return snapshot_download(name, allow_patterns=['config.json', '*.safetensors', '*.safetensors.index.json', 'tokenizer.json', 'vocab.json', 'merges.txt'])
    except Exception as error:  # every kind of network failure has a class of its own there
        sys.exit(f'{name}: no such folder, and no such model could be had from the Hugging Face hub ({type(error).__name__}); '
                 'without network, give the path of a folder with config.json and model.safetensors')


def load_weights(folder):
    """The tensors of a Hugging Face folder, by name: model.safetensors, the shards of its index, or pytorch_model.bin (never unpickled beyond tensors)."""
    from safetensors.torch import load_file
    state, index = {}, os.path.join(folder, 'model.safetensors.index.json')
    names = sorted(name for name in os.listdir(folder) if name.endswith('.safetensors')) or ['pytorch_model.bin']
    names = ['model.safetensors'] if 'model.safetensors' in names else names  # and not what else lies there
    if os.path.exists(index):
        try:
            with open(index, encoding='utf-8') as f:
                names = sorted({os.path.basename(name) for name in json.load(f)['weight_map'].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            sys.exit(f'{index}: damaged ({type(error).__name__}: {error})')
    missing = [name for name in names if not os.path.exists(os.path.join(folder, name))]
    if missing:
        sys.exit(f'{folder}: {", ".join(missing)} missing' + '; expected model.safetensors or pytorch_model.bin' * (names == ['pytorch_model.bin']))
    for name in names:
        path = os.path.join(folder, name)
        try:
            state.update(load_file(path) if name.endswith('.safetensors') else torch.load(path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path)))
            if not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
                raise TypeError
        except Exception as error:  # nearly every kind there is
            sys.exit(f'{path}: not a file of tensors alone, or a damaged one ({type(error).__name__})')
    return state


def hf_config(config, name):
    """The config.json of a network, as transformers 4 and 5 read it."""
    c, kind = config, architecture_of(config, name)
    if kind == 'gpt2':
        return {'architectures': ['GPT2LMHeadModel'], 'model_type': kind, 'vocab_size': c.vocab_size, 'n_positions': c.block_size, 'n_embd': c.n_embd,
                'n_layer': c.n_layer, 'n_head': c.n_head, 'n_inner': c.n_inner, 'activation_function': {'gelu': 'gelu', 'gelu_tanh': 'gelu_new'}[c.activation],
                'layer_norm_epsilon': c.norm_eps, 'embd_pdrop': 0.0, 'attn_pdrop': 0.0, 'resid_pdrop': 0.0, 'tie_word_embeddings': c.tied}
    return {'architectures': [{'llama': 'LlamaForCausalLM', 'qwen3': 'Qwen3ForCausalLM'}[kind]], 'model_type': kind, 'vocab_size': c.vocab_size,
            'max_position_embeddings': c.block_size, 'hidden_size': c.n_embd, 'num_hidden_layers': c.n_layer, 'num_attention_heads': c.n_head,
            'num_key_value_heads': c.n_kv_head, 'head_dim': c.head_size, 'intermediate_size': c.n_inner, 'hidden_act': 'silu', 'rms_norm_eps': c.norm_eps,
            'rope_theta': c.rope_theta, 'rope_parameters': {'rope_type': 'default', 'rope_theta': c.rope_theta}, 'attention_bias': False, 'mlp_bias': False,
            'attention_dropout': 0.0, 'tie_word_embeddings': c.tied}


def hf_weights(model, dtype):
    """The tensors of a Hugging Face folder {name: tensor}, in `dtype`. Where GPT-2 has biases and the network none, they are 0."""
    state = {name: view for key, p in model.named_parameters() for name, view in huggingface_names(key, p.detach(), model.config)}
    if not model.config.rope_theta:
        with torch.device('meta'):
            full = GPT(GPTConfig(**{**vars(model.config), 'bias': True}))
        state.update({key: torch.zeros(p.shape) for key, p in full.named_parameters() if key not in state})
    return {name: torch.empty(p.shape, dtype=dtype).copy_(p) for name, p in state.items()}  # each with memory of its own


def save_pretrained(folder, model, tokenizer, dtype, name):
    """Write what transformers and vLLM open: weights in float32, bfloat16 or float16, in shards where they are large; tokenizer; how a text ends; chat template."""
    from huggingface_hub import save_torch_state_dict
    end = end_of_turn(tokenizer) if can_chat(tokenizer) else tokenizer.eot
    bos = tokenizer.eot if tokenizer.eot is not None else end
    ids = {'bos_token_id': bos, 'eos_token_id': end, 'pad_token_id': bos}
    names = {i: text for text, i in tokenizer.specials.items()}
    about_tokens = {'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': model.config.block_size, 'clean_up_tokenization_spaces': False,
                    **{key.removesuffix('_id'): names[i] for key, i in ids.items() if i is not None}, **({'chat_template': JINJA} if can_chat(tokenizer) else {})}
    files = {'config.json': {**hf_config(model.config, name), 'dtype': dtype, **ids},
             'generation_config.json': {**ids, 'eos_token_id': sorted({end, tokenizer.eot} - {None}) or None, 'do_sample': True, 'temperature': 0.8, 'top_k': 200},
             'tokenizer_config.json': about_tokens}
    for file, content in files.items():
        with open(os.path.join(folder, file), 'w', encoding='utf-8') as f:
            json.dump(content, f, indent=2, ensure_ascii=False)
    with open(os.path.join(folder, 'tokenizer.json'), 'w', encoding='utf-8', newline='') as f:
        f.write(tokenizer.json)
    save_torch_state_dict(hf_weights(model, getattr(torch, dtype)), folder, max_shard_size='4GB', metadata={'format': 'pt'})
