"""
A GPT as one GGUF file, which llama.cpp and Ollama open, and the Modelfile that Ollama wants beside it.
References:
1) the format and its keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
2) how llama.cpp reads a vocabulary: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
3) Modelfiles: https://github.com/ollama/ollama/blob/main/docs/modelfile.md
"""
import re
import sys

import torch

from core.files import atomic
from core.text.chat_template import JINJA, can_chat, end_of_turn
from core.text.tokenizer import BYTE_OF, EOT, GPT2_SPLIT, QWEN2_SPLIT
from core.weights.huggingface import architecture_of, split_rows

FILE_TYPES = {'f32': 0, 'f16': 1, 'q4_0': 2, 'q8_0': 7, 'bf16': 32}  # how general.file_type numbers them
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # and tokenizer.ggml.token_type its kinds of tokens

# what llama.cpp calls our layers; what is stacked in one matrix of ours it has by itself
LAYERS = {'transformer.wte': ['token_embd'], 'transformer.ln_f': ['output_norm'], 'lm_head': ['output'], 'ln_1': ['attn_norm'],
          'attn.c_attn': ['attn_q', 'attn_k', 'attn_v'], 'attn.q_norm': ['attn_q_norm'], 'attn.k_norm': ['attn_k_norm'], 'attn.c_proj': ['attn_output'],
          'ln_2': ['ffn_norm'], 'mlp.c_fc': ['ffn_gate', 'ffn_up'], 'mlp.c_proj': ['ffn_down']}
GPT2_LAYERS = {**LAYERS, 'transformer.wpe': ['position_embd'], 'attn.c_attn': ['attn_qkv'], 'mlp.c_fc': ['ffn_up']}

# its names for the regexes that cut text into words, and for whether a word that is a token skips the merges
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r'\p{N}|', r'\p{N}{1,3}|')
WORDS = {(GPT2_SPLIT, False): 'gpt-2', (QWEN2_SPLIT, False): 'qwen2', (LLAMA3_SPLIT, True): 'llama-bpe', (LLAMA3_SPLIT, False): 'dbrx'}
SYMBOL_OF = {ord(byte): symbol for symbol, byte in BYTE_OF.items()}  # the printable character that stands for a byte

# core.text.chat_template.JINJA in Go's language
CHATML = '{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n'


def tensors(model, kind):
    """The matrices (out, in) and vectors that llama.cpp wants, {name: tensor}. Where its GPT-2 has biases and ours none, they are 0."""
    config, found = model.config, {}
    for key, p in model.named_parameters():
        block, layer, role = re.fullmatch(r'(?:transformer\.h\.(\d+)\.)?(.+)\.(weight|bias)', key).groups()
        names = (GPT2_LAYERS if kind == 'gpt2' else LAYERS)[layer]
        for name, part in zip(names, p.detach().split(split_rows(layer, config) if len(names) > 1 else len(p))):
            if kind == 'llama' and name in ('attn_q', 'attn_k'):  # its rotary embedding turns channels 2 i and 2 i + 1 together, ours i and i + hs / 2
                part = part.view(-1, 2, config.head_size // 2, config.n_embd).transpose(1, 2).reshape(part.shape)
            name = name if block is None else f'blk.{block}.{name}'
            found[f'{name}.{role}'] = part
            if kind == 'gpt2' and not config.bias and name not in ('token_embd', 'position_embd', 'output'):
                found[f'{name}.bias'] = torch.zeros(len(part))
    return found


def format_of(name, shape, quant):
    """
    The numbers that a tensor is written in. Vectors and positions, which are few, stay F32. In Q8_0 and Q4_0 blocks of 32 numbers share a factor, so
    rows that are no multiple of it become F16. With Q4_0 embedding and head are Q8_0: three fifths of its cost came from there (docs/RECORDS.md).
    """
    if len(shape) == 1 or name == 'position_embd.weight':
        return 'F32'
    if quant in ('q8_0', 'q4_0') and shape[1] % 32:
        return 'F16'
    return 'Q8_0' if quant == 'q4_0' and name in ('token_embd.weight', 'output.weight') else quant.upper()


def about_network(config, kind):
    """What the file says about the network, {key: value}."""
    keys = {'context_length': config.block_size, 'embedding_length': config.n_embd, 'block_count': config.n_layer, 'feed_forward_length': config.n_inner,
            'attention.head_count': config.n_head, 'vocab_size': config.vocab_size}
    if kind == 'gpt2':
        keys['attention.layer_norm_epsilon'] = float(config.norm_eps)
    else:
        keys.update({'attention.head_count_kv': config.n_kv_head, 'attention.key_length': config.head_size, 'attention.value_length': config.head_size,
                     'attention.layer_norm_rms_epsilon': float(config.norm_eps), 'rope.dimension_count': config.head_size, 'rope.freq_base': float(config.rope_theta)})
    return {f'{kind}.{key}': value for key, value in keys.items()}


def words_of(tokenizer, name):
    """llama.cpp's name for the way in which a tokenizer cuts text into words. Ends the script with one line where it has none."""
    if tokenizer.is_char:
        return 'qwen2'  # any would do; some lose spaces before punctuation when they decode
    model, normalizer = tokenizer._spec['model'], (tokenizer._spec.get('normalizer') or {}).get('type')
    words = WORDS.get((tokenizer._split, bool(model.get('ignore_merges'))))
    odd = [key for key in ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix') if model.get(key)]
    odd += [f'normalizer {normalizer}'] * (normalizer not in (None, 'NFC')) + [f'pattern of words {tokenizer._split!r}'] * (words is None)
    if odd:
        sys.exit(f"{name}: llama.cpp has nothing like its tokenizer's {', '.join(odd)}; prepare the data with --tokenizer=bbpe, or export with --format=hf")
    if normalizer:
        print(f'{name}: llama.cpp does not bring text into the form {normalizer}, as its tokenizer does: text that is not in it is cut into other tokens')
    return words


def about_tokenizer(tokenizer, rows, name):
    """
    What the file says about the tokenizer, {key: value}: that it is a byte-level BPE. One of characters becomes one whose merges join the bytes of each
    character; llama.cpp drops characters that it lacks. Special tokens are found by their names only where these are to be parsed, as in prompts and
    chat templates; those of EOT and ChatML end what is written, both. Rows of the network beyond the vocabulary get names of their own.
    """
    words, names = words_of(tokenizer, name), {i: text for text, i in tokenizer.specials.items()}
    kinds = {i: CONTROL if i in tokenizer._special else USER_DEFINED for i in names}  # those that others call not special, as <think>, are seen
    pieces = [piece.decode('latin-1').translate(SYMBOL_OF) for piece in tokenizer.pieces] + [''] * (rows - tokenizer.vocab_size)
    merges = [' '.join(pair) for pair in tokenizer._merges] if not tokenizer.is_char else dict.fromkeys(
        f'{piece[:i]} {piece[i]}' for token, piece in enumerate(pieces) if token not in names for i in range(1, len(piece)))
    end = end_of_turn(tokenizer) if can_chat(tokenizer) else tokenizer.eot
    if end is None:  # it has to be said: else token 11 would be the end
        end = pieces.index('\xff') if '\xff' in pieces else sys.exit(f'{name}: its vocabulary has no {EOT}, which llama.cpp needs; prepare the data again')
        print(f'{name}: its tokenizer has no {EOT}: llama.cpp will end a text at none but the special tokens whose names it knows, such as </s>')
    keys = {'model': 'gpt2', 'pre': words, 'tokens': [names.get(i, piece or f'[PAD{i}]') for i, piece in enumerate(pieces)],
            'token_type': [kinds.get(i, NORMAL if piece else UNUSED) for i, piece in enumerate(pieces)],
            'merges': [*merges] or ['\xff \xff'],  # there must be one: of a byte that is in no text
            'bos_token_id': end if tokenizer.eot is None else tokenizer.eot, 'eos_token_id': end, 'add_bos_token': False}
    keys = {f'tokenizer.ggml.{key}': value for key, value in keys.items()}
    return {**keys, 'tokenizer.ggml.eot_token_id': end, 'tokenizer.chat_template': JINJA} if can_chat(tokenizer) else keys


def write_gguf(path, model, tokenizer, quant, name):
    """
    Write a GPT, which is in float32 on the CPU, with its tokenizer, whole or not at all; quant: one of FILE_TYPES. Ends the script with one line where
    llama.cpp has no such network or tokenizer.
    """
    try:
        import gguf
    except ImportError:
        sys.exit('gguf, which writes this format, is not installed: pip install gguf')
    config, kind = model.config, architecture_of(model.config, name)
    keys = {'general.name': name, 'general.file_type': FILE_TYPES[quant], **about_network(config, kind), **about_tokenizer(tokenizer, config.vocab_size, name)}
    found = {key: (p, format_of(key, p.shape, quant)) for key, p in tensors(model, kind).items()}
    if config.activation == 'gelu':
        print(f'{name}: llama.cpp computes GELU by its approximation with tanh, this network exactly: its logits will differ by about 1e-3')
    coarse = [key for key, (_, form) in found.items() if form == 'F16' and quant != 'f16']
    if coarse:
        print(f'{name}: {coarse[0]}' + f' and {len(coarse) - 1} more' * (len(coarse) > 1) + f' will be in f16: their rows are no multiple of 32, as {quant} wants them')
    with atomic(path) as f:
        writer = gguf.GGUFWriter(f.name, kind)  # which opens the temporary file once more
        for key, value in keys.items():
            writer.add_key_value(key, value, gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value))
        for key, (p, form) in found.items():
            form = gguf.GGMLQuantizationType[form]
            writer.add_tensor(key, gguf.quantize(p.numpy(), form), raw_dtype=form)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def modelfile(gguf_name, tokenizer, context):
    """The text of an Ollama Modelfile for the GGUF file beside it, written by Ollama's documentation; context: how many tokens the network sees."""
    chats = can_chat(tokenizer)
    stops = ''.join(f'PARAMETER stop "{stop}"\n' for stop in ['<|im_end|>'] * chats + [EOT])
    return f'FROM ./{gguf_name}\nTEMPLATE """{CHATML if chats else "{{ .Prompt }}"}"""\n{stops}PARAMETER num_ctx {context}\n'
