"""
A GPT as one GGUF file, which llama.cpp and Ollama open, and the Modelfile that Ollama wants beside it.
References:
1) the format and its keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
2) how llama.cpp reads a vocabulary: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
3) Modelfiles: https://github.com/ollama/ollama/blob/main/docs/modelfile.md
"""
import sys

import torch

from core.files import atomic
from core.text.chat_template import JINJA, can_chat, end_of_turn
from core.text.tokenizer import BYTE_OF, EOT, GPT2_SPLIT, QWEN2_SPLIT
from core.weights.huggingface import architecture_of, split_name, stacked_rows

# numbers of general.file_type; the package gguf writes none of llama.cpp's other kinds (q4_k_m, ...)
FILE_TYPES = {'f32': 0, 'f16': 1, 'bf16': 32, 'q8_0': 7, 'q5_1': 9, 'q5_0': 8, 'q4_1': 3, 'q4_0': 2}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # numbers of tokenizer.ggml.token_type

# our layer: its names in llama.cpp, several where our matrix is a stack of theirs
LAYERS = {
    'transformer.wte': ['token_embd'],
    'transformer.ln_f': ['output_norm'],
    'lm_head': ['output'],
    'ln_1': ['attn_norm'],
    'attn.c_attn': ['attn_q', 'attn_k', 'attn_v'],
    'attn.q_norm': ['attn_q_norm'],
    'attn.k_norm': ['attn_k_norm'],
    'attn.c_proj': ['attn_output'],
    'ln_2': ['ffn_norm'],
    'mlp.c_fc': ['ffn_gate', 'ffn_up'],
    'mlp.c_proj': ['ffn_down'],
}
GPT2_LAYERS = {**LAYERS, 'transformer.wpe': ['position_embd'], 'attn.c_attn': ['attn_qkv'], 'mlp.c_fc': ['ffn_up']}

# llama.cpp's names: (regex that cuts text into words, whether a word that is a token skips the merges): name
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r'\p{N}|', r'\p{N}{1,3}|')
PRE_TOKENIZERS = {
    (GPT2_SPLIT, False): 'gpt-2',
    (QWEN2_SPLIT, False): 'qwen2',
    (LLAMA3_SPLIT, True): 'llama-bpe',
    (LLAMA3_SPLIT, False): 'dbrx',
}
SYMBOL_OF = {ord(byte): symbol for symbol, byte in BYTE_OF.items()}  # the printable character that stands for a byte

# core.text.chat_template.JINJA in Go's template language
CHATML = '{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n'


def gguf_tensors(model, arch):
    """
    Return a model's tensors as llama.cpp wants them, {name: (out, in) or (out,)}.
    Where llama.cpp's GPT-2 has biases and the model none, they are 0.
    """
    config = model.config
    layers = GPT2_LAYERS if arch == 'gpt2' else LAYERS
    tensors = {}
    for key, p in model.named_parameters():
        block, layer, suffix = split_name(key)
        names = layers[layer]
        rows = stacked_rows(layer, config) if len(names) > 1 else len(p)
        for name, tensor in zip(names, p.detach().split(rows)):
            if arch == 'llama' and name in ('attn_q', 'attn_k'):
                # llama.cpp rotates channels 2 i and 2 i + 1 of a head together, this network i and i + hs / 2
                pairs = tensor.view(-1, 2, config.head_size // 2, config.n_embd)
                tensor = pairs.transpose(1, 2).reshape(tensor.shape)
            name = name if block is None else f'blk.{block}.{name}'
            tensors[f'{name}.{suffix}'] = tensor
            if arch == 'gpt2' and not config.bias and name not in ('token_embd', 'position_embd', 'output'):
                tensors[f'{name}.bias'] = torch.zeros(len(tensor))
    return tensors


def tensor_type(name, shape, quant):
    """
    Return the GGML type in which to write a tensor.

    Vectors and positions, which are few, stay F32. The quantised types have one factor for every block of 32 numbers,
    so a matrix whose rows are no multiple of 32 becomes F16. With 4 and 5 bits, embedding and head are Q8_0: three
    fifths of the cost of Q4_0 came from them (docs/RECORDS.md).
    """
    if len(shape) == 1 or name == 'position_embd.weight':
        return 'F32'
    if quant.startswith('q') and shape[1] % 32:
        return 'F16'
    if quant.startswith('q') and name in ('token_embd.weight', 'output.weight'):
        return 'Q8_0'
    return quant.upper()


def model_metadata(config, arch):
    """Return the file's entries about the network, {key: value}."""
    entries = {
        'context_length': config.block_size,
        'embedding_length': config.n_embd,
        'block_count': config.n_layer,
        'feed_forward_length': config.n_inner,
        'attention.head_count': config.n_head,
        'vocab_size': config.vocab_size,
    }
    if arch == 'gpt2':
        entries['attention.layer_norm_epsilon'] = float(config.norm_eps)
    else:
        entries.update({
            'attention.head_count_kv': config.n_kv_head,
            'attention.key_length': config.head_size,
            'attention.value_length': config.head_size,
            'attention.layer_norm_rms_epsilon': float(config.norm_eps),
            'rope.dimension_count': config.head_size,
            'rope.freq_base': float(config.rope_theta),
        })
    return {f'{arch}.{key}': value for key, value in entries.items()}


def pre_tokenizer_name(tokenizer, name):
    """Return llama.cpp's name for the way in which a tokenizer cuts text into words. Exits if it has no such way."""
    if tokenizer.is_char:
        return 'qwen2'  # any would do; some lose spaces before punctuation when they decode
    model = tokenizer._spec['model']
    normalizer = (tokenizer._spec.get('normalizer') or {}).get('type')
    pre_tokenizer = PRE_TOKENIZERS.get((tokenizer._split, bool(model.get('ignore_merges'))))
    odd = [key for key in ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix') if model.get(key)]
    if normalizer not in (None, 'NFC'):
        odd.append(f'normalizer {normalizer}')
    if pre_tokenizer is None:
        odd.append(f'pattern of words {tokenizer._split!r}')
    if odd:
        sys.exit(f"{name}: llama.cpp has nothing like its tokenizer's {', '.join(odd)}; "
                 'prepare the data with --tokenizer=bbpe, or export with --format=hf')
    if normalizer:
        print(f'{name}: llama.cpp does not bring text into the form {normalizer}, as its tokenizer does: '
              'text that is not in it is cut into other tokens')
    return pre_tokenizer


def token_texts(tokenizer, rows):
    """
    Return the text of each of the model's `rows` ids as byte-level BPE writes it, one printable character a byte.
    Ids beyond the vocabulary have ''.
    """
    texts = [piece.decode('latin-1').translate(SYMBOL_OF) for piece in tokenizer.pieces]
    return texts + [''] * (rows - tokenizer.vocab_size)


def bpe_merges(tokenizer, texts):
    """
    Return the merges of a byte-level BPE, 'a b' each. A character vocabulary becomes one: its merges join the bytes
    of each character from left to right, and llama.cpp drops characters that the vocabulary lacks.
    """
    if not tokenizer.is_char:
        return [' '.join(pair) for pair in tokenizer._merges]
    specials = set(tokenizer.specials.values())
    merges = {}  # a dict keeps the order and drops duplicates
    for token, text in enumerate(texts):
        if token not in specials:
            for i in range(1, len(text)):
                merges[f'{text[:i]} {text[i]}'] = None
    return list(merges)


def end_of_text(tokenizer, texts, name):
    """Return the id that ends a text or a turn. llama.cpp's default would be id 11. Exits if no id is suitable."""
    end = end_of_turn(tokenizer) if can_chat(tokenizer) else tokenizer.eot
    if end is not None:
        return end
    unused_byte = '\xff'  # occurs in no UTF-8 text
    if unused_byte not in texts:
        sys.exit(f'{name}: its vocabulary has no {EOT}, which llama.cpp needs; prepare the data again')
    print(f'{name}: its tokenizer has no {EOT}: llama.cpp will end a text at none but the special tokens '
          'whose names it knows, such as </s>')
    return texts.index(unused_byte)


def tokenizer_metadata(tokenizer, rows, name):
    """
    Return the file's entries about the tokenizer, {key: value}, as a byte-level BPE of `rows` ids: those beyond the
    vocabulary are named [PADi].

    llama.cpp parses the names of special tokens only in prompts and chat templates. Both end-of-text and ChatML's end
    of turn end an answer.
    """
    pre_tokenizer = pre_tokenizer_name(tokenizer, name)
    texts = token_texts(tokenizer, rows)
    end = end_of_text(tokenizer, texts, name)

    name_of = {i: text for text, i in tokenizer.specials.items()}
    tokens = []
    types = []
    for i, text in enumerate(texts):
        tokens.append(name_of.get(i, text or f'[PAD{i}]'))
        if i in name_of:  # added tokens that are not special, such as <think>, are shown to the user
            types.append(CONTROL if i in tokenizer._special else USER_DEFINED)
        else:
            types.append(NORMAL if text else UNUSED)

    entries = {
        'tokenizer.ggml.model': 'gpt2',
        'tokenizer.ggml.pre': pre_tokenizer,
        'tokenizer.ggml.tokens': tokens,
        'tokenizer.ggml.token_type': types,
        'tokenizer.ggml.merges': bpe_merges(tokenizer, texts) or ['\xff \xff'],  # one is required: of a byte in no text
        'tokenizer.ggml.bos_token_id': end if tokenizer.eot is None else tokenizer.eot,
        'tokenizer.ggml.eos_token_id': end,
        'tokenizer.ggml.add_bos_token': False,
    }
    if can_chat(tokenizer):
        entries['tokenizer.ggml.eot_token_id'] = end
        entries['tokenizer.chat_template'] = JINJA
    return entries


def write_gguf(path, model, tokenizer, quant, name):
    """
    Write a model (float32, on the CPU) and its tokenizer to a GGUF file, atomically.

    quant: one of FILE_TYPES; name: of the model, in the file and in messages.
    Exits if llama.cpp has no such network or tokenizer.
    """
    try:
        import gguf
    except ImportError:
        sys.exit('gguf, which writes this format, is not installed: pip install gguf')
    config = model.config
    arch = architecture_of(config, name)
    if any(config.windows()):
        sys.exit(f'{name}: window={config.window}: llama.cpp has no sliding window for {arch}, expected window=0; '
                 '--format=hf can express it')
    entries = {
        'general.name': name,
        'general.file_type': FILE_TYPES[quant],
        **model_metadata(config, arch),
        **tokenizer_metadata(tokenizer, config.vocab_size, name),
    }
    tensors = gguf_tensors(model, arch)
    types = {key: tensor_type(key, tensor.shape, quant) for key, tensor in tensors.items()}
    if config.activation == 'gelu':
        print(f'{name}: llama.cpp computes GELU by its approximation with tanh, this network exactly: '
              'its logits will differ by about 1e-3')
    coarse = [key for key in types if types[key] == 'F16' and quant != 'f16']
    if coarse:
        others = f' and {len(coarse) - 1} more' if len(coarse) > 1 else ''
        print(f'{name}: {coarse[0]}{others} will be in f16: their rows are no multiple of 32, as {quant} wants them')

    with atomic(path) as f:
        writer = gguf.GGUFWriter(f.name, arch)  # opens the temporary file a second time
        for key, value in entries.items():
            if type(value) is int:
                writer.add_key_value(key, value, gguf.GGUFValueType.UINT32)
            else:
                writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
        for key, tensor in tensors.items():
            ggml_type = gguf.GGMLQuantizationType[types[key]]
            writer.add_tensor(key, gguf.quantize(tensor.numpy(), ggml_type), raw_dtype=ggml_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def modelfile(gguf_name, tokenizer, context):
    """Return the text of an Ollama Modelfile (see reference 3) for the GGUF file beside it; context: in tokens."""
    template = '{{ .Prompt }}'
    stops = [EOT]
    if can_chat(tokenizer):
        template = CHATML
        stops = ['<|im_end|>', EOT]
    parameters = ''.join(f'PARAMETER stop "{stop}"\n' for stop in stops)
    return f'FROM ./{gguf_name}\nTEMPLATE """{template}"""\n{parameters}PARAMETER num_ctx {context}\n'
