"""
Export a model: to a Hugging Face folder for transformers and vLLM, to a GGUF file for llama.cpp, or to a folder for
Ollama. The last line that it prints is the command that uses the result.

    python export.py --out_dir=out-poems-dpo                    # writes exported/out-poems-dpo
    python export.py --out_dir=out-hongloumeng-qwen2 --format=hf --to=exported/stone
    python export.py --out_dir=out-poems-dpo --quant=q8_0 --to=stone.gguf    # the ending says the format, gguf
    python export.py --out_dir=out-poems-dpo --format=ollama --quant=q8_0 --to=stone-ollama
    python export.py --out_dir=out-lora --merge=True            # merged; without --merge the adapters alone, for peft
"""
import core.startup  # noqa: F401  first: it catches Ctrl-C and missing packages in the imports below

import math
import os
import re
import shlex
import shutil
import sys

from safetensors import SafetensorError

from core.device import explain
from core.files import atomic_folder
from core.text.chat_template import can_chat
from core.text.tokenizer import load_tokenizer
from core.weights.checkpoint import describe, load_model, refuse_reward_model, source_tokenizer
from core.weights.gguf import FILE_TYPES, modelfile, write_gguf
from core.weights.huggingface import save_pretrained
from core.weights.lora import save_adapter
from core.weights.vocabulary import resize_vocabulary

# ---------------------------------------------------------------------------------------------------------------------
init_from = 'resume'  # 'resume' (the run in out_dir), a checkpoint, a run's folder, or a Hugging Face model
out_dir = 'out'  # the run to export, if init_from is 'resume'
ckpt = ''  # a checkpoint file, instead of the one chosen in out_dir
tokenizer = ''  # 'gpt2' or a tokenizer.json, for a model that comes without a tokenizer
format = ''  # hf: a Hugging Face folder; gguf: a file; ollama: a folder for it; '': gguf if --to ends in .gguf, else hf
to = ''  # the folder or file to write; '': exported/ and the name of the run
quant = 'f32'  # of the weights: f32, f16, bf16; gguf and ollama also q8_0 (8.5 bits a weight), q5_1, q5_0, q4_1, q4_0
merge = False  # a run with LoRA: add the adapters to the weights; False: format 'hf' has the adapters alone, for peft
force = False  # replace an earlier export
# ---------------------------------------------------------------------------------------------------------------------
sys.excepthook = explain
config, config_given = {}, {}  # filled by the next line: every setting with its value, and what the command line set
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())

DTYPES = {'f32': 'float32', 'f16': 'float16', 'bf16': 'bfloat16'}
QUANTS = {'hf': DTYPES, 'gguf': FILE_TYPES, 'ollama': FILE_TYPES}
SUFFIXES = {'hf': '', 'gguf': '.gguf', 'ollama': '-ollama'}  # of the default target
MARK = 'tags: [stonegpt]'  # in the README.md of a folder that this script has written
OUR_FILES = re.compile(
    r'README\.md|Modelfile|(adapter_)?model[-0-9of]*\.safetensors|'
    r'(tokenizer|config|tokenizer_config|generation_config|adapter_config|model\.safetensors\.index)\.json')


def target_path(name):
    """Return the path to write to. A link is followed, so that what it points to is replaced."""
    file = name + SUFFIXES[format]
    path = os.path.normpath(os.path.expanduser(to)) if to else os.path.join('exported', file)
    if format == 'gguf' and to.endswith('/'):
        path = os.path.join(path, file)
    return os.path.realpath(path) if os.path.islink(path) else path


def check_target(target, origin, name):
    """
    Exit if the target exists and was not written by this script, is the model itself, or is to be replaced without
    --force.
    """
    if not os.path.lexists(target):
        return
    if os.path.isdir(target) and format == 'gguf':
        is_export, problem = False, f'this is a folder (in it: --to={to}/)'
    elif os.path.isdir(target):
        is_export, problem = is_exported_folder(target, f'{name}.gguf')
    elif format == 'gguf':
        problem = 'this is no GGUF file'
        with open(target, 'rb') as f:
            is_export = f.read(4) == b'GGUF'
    else:
        is_export, problem = False, 'this is a file'
    if os.path.realpath(target) == os.path.realpath(origin) and is_export:
        is_export, problem = False, 'this is what is to be exported'
    if not is_export:
        sys.exit(f'to={target}: {problem}, so it is not replaced; choose another name')
    if not force:
        sys.exit(f'to={target}: it is there already; choose another name, or replace it by --force')


def is_exported_folder(folder, gguf_name):
    """Return whether this script may have written a folder, and if not, the reason."""
    for file in sorted(os.listdir(folder)):
        known = OUR_FILES.fullmatch(file) or file == gguf_name
        if not known or os.path.isdir(os.path.join(folder, file)):
            return False, f'this folder has {file} in it'
    card_path = os.path.join(folder, 'README.md')
    text = ''
    if os.path.exists(card_path):
        with open(card_path, encoding='utf-8', errors='replace') as f:
            text = f.read(1000)
    return MARK in text, 'this folder was not written by export.py'


def fit_rows(model, tok, source):
    """
    Give the network as many embedding rows as the tokenizer has ids. Rows that only round our vocabulary size up are
    cut off; those of another's model stay.
    """
    rows = model.config.vocab_size
    ids = tok.vocab_size
    if rows < ids:
        print(f'the network has {rows:,} rows and the tokenizer {ids:,} ids; '
              'the rows that are missing are added as the mean of the others')
    if rows < ids or (rows > ids and 'folder' not in source):
        resize_vocabulary(model, min(rows, ids), ids)


def table(rows):
    """Return the lines of a Markdown table of two columns."""
    return ['| | |', '|---|---|', *(f'| {key} | {value} |'.replace('\n', r'\n') for key, value in rows)]


def card(name, model, source, tok, as_adapter):
    """Return the text of README.md: what the model is, what it was trained on and how, and its measured losses."""
    library = 'peft' if as_adapter else 'transformers'
    lines = ['---', f'library_name: {library}', 'pipeline_tag: text-generation', MARK, '---', '', f'# {name}', '']
    kind = f'Adapters for {source["lora"]["base"]},' if as_adapter else 'A GPT of'
    lines += [f'{kind} {describe(model)}, trained with StoneGPT.', '']
    if 'weights' in source:
        lines += [f'These are its {source["weights"]}; "ema" marks what was measured with the averaged ones.', '']
    if 'folder' in source:
        return '\n'.join([*lines, f'Its weights are those of {init_from}.', ''])

    settings = source.get('config', {})
    steps = source.get('iter_num', 0)
    tokens_per_step = settings.get('block_size', 0)
    for key in ('batch_size', 'gradient_accumulation_steps'):
        tokens_per_step *= settings.get(key, 0)
    seen = f', up to {steps * tokens_per_step:,} tokens' if steps * tokens_per_step > 0 else ''
    lines += ['## Data', '',
              f'{settings.get("dataset", "unknown")}: {steps:,} steps{seen}. Vocabulary: {tok.vocab_size:,} ids.', '']

    best = float(source.get('best_val_loss', math.inf))
    measured = source.get('measured')
    if not measured and math.isfinite(best):
        measured = {'iter': steps, 'val_loss': best}
    if measured:
        rows = [(key.replace('_', ' '), f'{value:.4f}') for key, value in measured.items() if key != 'iter']
        units = ('loss: nats per token; bpb and bpc: bits per byte and per character, '
                 'which can be compared between tokenizers.')
        lines += [f'## Measured after {measured["iter"]:,} steps', '', *table(rows), '', units, '']
    return '\n'.join([*lines, '## Settings', '', *table(settings.items()), ''])


def write_folder(target, name, model, source, tok, as_adapter):
    """Write a Hugging Face or Ollama folder, atomically."""
    with atomic_folder(target) as folder:
        card_path = os.path.join(folder, 'README.md')
        with open(card_path, 'w', encoding='utf-8') as f:
            f.write(card(name, model, source, tok, as_adapter))
        if as_adapter:
            save_adapter(folder, source, DTYPES[quant], name)
        elif format == 'hf':
            save_pretrained(folder, model, tok, DTYPES[quant], name)
        else:
            write_gguf(os.path.join(folder, f'{name}.gguf'), model, tok, quant, name)
            with open(os.path.join(folder, 'Modelfile'), 'w', encoding='utf-8', newline='\n') as f:
                f.write(modelfile(f'{name}.gguf', tok, model.config.block_size))
        for file in os.listdir(folder):
            shutil.copymode(card_path, os.path.join(folder, file))  # safetensors' files are for their owner only


def written_text(target):
    """Return the line about what was written: its size, and the files of a folder."""
    if not os.path.isdir(target):
        return f'wrote {target}: {os.path.getsize(target) / 1e6:,.1f} MB'
    files = sorted(os.listdir(target))
    size = sum(os.path.getsize(os.path.join(target, file)) for file in files)
    return f'wrote {target}: {size / 1e6:,.1f} MB ({", ".join(files)})'


def next_command(target, name, tok):
    """Return the command that uses the export, quoted for a shell."""
    if format == 'hf':
        command = ['python', 'chat.py' if can_chat(tok) else 'sample.py', f'--init_from={target}']
    elif format == 'gguf':
        command = ['llama-cli', '-m', target]
    else:
        command = ['ollama', 'create', name, '-f', os.path.join(target, 'Modelfile')]
    return shlex.join(command)


# --- check the settings
is_gguf_name = to.lower().endswith('.gguf')
format = format or ('gguf' if is_gguf_name else 'hf')
quant = quant.lower()  # llama.cpp's names are in capitals
if format not in QUANTS:
    sys.exit(f'format={format}: expected hf, gguf or ollama')
if format != 'gguf' and is_gguf_name:
    sys.exit(f'to={to}: this is the name of a GGUF file, and format={format} writes a folder; '
             'leave out --format, or give a name without .gguf')
if re.fullmatch(r'i?q\d_(k|xx?s|s|m|nl)(_\w+)?', quant):
    sys.exit(f"quant={quant}: llama.cpp's own tool writes this kind: export with --format=gguf --to=model.gguf, then "
             f'llama-quantize model.gguf model-{quant}.gguf {quant}')
if quant not in QUANTS[format]:
    hint = '; it is one of --format=gguf and ollama' if quant in FILE_TYPES else ''
    sys.exit(f'quant={quant}: expected {", ".join(QUANTS[format])} for format={format}{hint}')
given_name = out_dir if init_from == 'resume' else init_from
origin = os.path.abspath(os.path.expanduser(ckpt or given_name))
name = os.path.basename(os.path.dirname(origin) if origin.endswith('.pt') else origin)
target = target_path(name)
try:
    check_target(target, origin, name)
except OSError as error:
    sys.exit(f'to={target}: {error}')

# --- load
model, source = load_model(init_from, out_dir, ckpt)
refuse_reward_model(model, given_name)
if tokenizer and source.get('tokenizer'):
    sys.exit(f'tokenizer={tokenizer}: {name} comes with the one that it was trained on; leave it out')
tok = load_tokenizer(tokenizer) if tokenizer else source_tokenizer(source)
fit_rows(model, tok, source)
as_adapter = bool(source.get('lora')) and format == 'hf' and not merge

# --- write
try:
    os.makedirs(os.path.dirname(target) or '.', exist_ok=True)
    if format == 'gguf':
        write_gguf(target, model, tok, quant, name)
    else:
        write_folder(target, name, model, source, tok, as_adapter)
except (OSError, SafetensorError) as error:
    sys.exit(f'to={target}: could not be written: {error}')
print(written_text(target))
if as_adapter:
    print(f'now: PeftModel.from_pretrained(base, {target!r}), where base is {source["lora"]["base"]} '
          'as transformers opens it (if it is a run: exported, too)')
else:
    print(f'now: {next_command(target, name, tok)}')
