"""
Take a model along: to a Hugging Face folder, which transformers and vLLM open; to GGUF, for llama.cpp; to a folder for Ollama.

    python export.py --out_dir=out-poems-dpo                                                        # to exported/out-poems-dpo
    python export.py --out_dir=out-hongloumeng-qwen2 --format=hf --to=exported/stone                # then: python sample.py --init_from=exported/stone
    python export.py --out_dir=out-poems-dpo --format=gguf --quant=q8_0 --to=stone.gguf             # then: llama-cli -m stone.gguf
    python export.py --out_dir=out-poems-dpo --format=ollama --quant=q8_0 --to=stone-ollama         # then: ollama create stone -f stone-ollama/Modelfile
    python export.py --out_dir=out-lora --merge=True                                                # a model; without --merge the adapter alone, for peft
"""
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
from core.weights.gguf import modelfile, write_gguf
from core.weights.huggingface import save_pretrained
from core.weights.lora import save_adapter
from core.weights.vocabulary import resize_vocabulary

# ---------------------------------------------------------------------------------------------------------------------------------------
init_from = 'resume'  # 'resume' (the run in out_dir), a checkpoint, a run's folder, or a GPT-2, Llama or Qwen3 (folder or hub)
out_dir = 'out'  # the run to export, if init_from is 'resume'
ckpt = ''  # this checkpoint file rather than the one that out_dir offers
tokenizer = ''  # 'gpt2' or a tokenizer.json, rather than the one that comes with the model
format = 'hf'  # 'hf': a Hugging Face folder; 'gguf': a file; 'ollama': a folder with that file and a Modelfile
to = ''  # the folder or file to write; '': in exported/, with the name of the run
quant = 'f32'  # the weights' numbers: f32, f16 or bf16; for gguf and ollama also q8_0 (8.5 bits a weight) or q4_0 (4.5)
merge = False  # a run with LoRA: add the adapter to the weights; False: the Hugging Face folder holds the adapter alone, as peft has it
force = False  # replace what is there
# ---------------------------------------------------------------------------------------------------------------------------------------
sys.excepthook = explain
config, config_given = {}, {}  # filled by the next line: every setting with its value, and what the command line set
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())

DTYPES = {'f32': 'float32', 'f16': 'float16', 'bf16': 'bfloat16'}
QUANTS = {'hf': [*DTYPES], 'gguf': [*DTYPES, 'q8_0', 'q4_0'], 'ollama': [*DTYPES, 'q8_0', 'q4_0']}
if format not in QUANTS:
    sys.exit(f'format={format}: expected hf, gguf or ollama')
if quant not in QUANTS[format]:
    sys.exit(f'quant={quant}: expected {", ".join(QUANTS[format])} for format={format}')
origin = os.path.abspath(os.path.expanduser(ckpt or (out_dir if init_from == 'resume' else init_from)))
name = os.path.basename(os.path.dirname(origin) if origin.endswith('.pt') else origin)
to = os.path.normpath(os.path.expanduser(to)) if to else os.path.join('exported', name + {'hf': '', 'gguf': '.gguf', 'ollama': '-ollama'}[format])
to = os.path.realpath(to) if os.path.islink(to) else to
MARK = 'tags: [stonegpt]'  # in the card of a folder that this script has written
FILES = r'(README\.md|Modelfile|(tokenizer|config|tokenizer_config|generation_config|adapter_config|model\.safetensors\.index)\.json|(adapter_)?model[-0-9of]*\.safetensors)'


def check_target():
    """End the script with one line where what is at `to` is not to be replaced: not by this, or not without --force."""
    if not os.path.lexists(to):
        return
    if os.path.isdir(to):
        others = [file for file in sorted(os.listdir(to)) if not re.fullmatch(FILES, file) and file != f'{name}.gguf' or os.path.isdir(os.path.join(to, file))]
        text = ''
        if os.path.exists(os.path.join(to, 'README.md')):
            with open(os.path.join(to, 'README.md'), encoding='utf-8', errors='replace') as f:
                text = f.read(1000)
        ours = format != 'gguf' and MARK in text and not others
        what = f'this folder has {others[0]} in it' if others else 'this folder was not written by export.py'
    else:
        with open(to, 'rb') as f:
            ours = format == 'gguf' and f.read(4) == b'GGUF'
        what = 'this is no GGUF file' if format == 'gguf' else 'this is a file'
    if not ours or os.path.realpath(to) == os.path.realpath(origin):
        sys.exit(f'to={to}: ' + ('this is what is to be exported' if ours else what) + ', so it is not replaced; choose another name')
    if not force:
        sys.exit(f'to={to}: it is there already; choose another name, or replace it by --force')


def card():
    """The text of a README.md: what the model is, what it was trained on and how, and how good it was."""
    lines = ['---', f'library_name: {"peft" if adapter else "transformers"}', 'pipeline_tag: text-generation', MARK, '---', '', f'# {name}', '',
             (f'Adapters for {source["lora"]["base"]}, ' if adapter else 'A GPT of ') + f'{describe(model)}, trained with StoneGPT.', '']
    if isinstance(source, str):
        return '\n'.join([*lines, f'Its weights are those of {init_from}.', ''])
    used, steps, best = source.get('config', {}), source.get('iter_num', 0), float(source.get('best_val_loss', math.inf))
    measured = source.get('measured') or ({'iter': steps, 'val_loss': best} if math.isfinite(best) else {})
    seen = steps * used.get('batch_size', 0) * used.get('gradient_accumulation_steps', 0) * used.get('block_size', 0)
    lines += ['## Data', '', f'{used.get("dataset", "unknown")}: {steps:,} steps' + f', up to {seen:,} tokens' * (seen > 0) + f'. Vocabulary: {tokens.vocab_size:,} ids.', '']
    if measured:
        lines += [f'## Measured after {measured["iter"]:,} steps', '', '| | |', '|---|---|', *(f'| {key.replace("_", " ")} | {value:.4f} |' for key, value in measured.items() if key != 'iter'), '',
                  'loss: nats per token; bpb and bpc: bits per byte and per character, which can be compared between tokenizers.', '']
    return '\n'.join([*lines, '## Settings', '', '| | |', '|---|---|', *(f'| {key} | {value} |' for key, value in used.items()), ''])


try:
    check_target()
except OSError as error:
    sys.exit(f'to={to}: {error}')
model, source = load_model(init_from, out_dir, ckpt)
refuse_reward_model(model, out_dir if init_from == 'resume' else init_from)
if tokenizer and isinstance(source, dict) and source.get('tokenizer'):
    sys.exit(f'tokenizer={tokenizer}: {name} comes with the one that it was trained on; leave it out')
tokens = load_tokenizer(tokenizer) if tokenizer else source_tokenizer(source)
rows, size = model.config.vocab_size, tokens.vocab_size
if rows < size:
    print(f'the network has {rows:,} rows and the tokenizer {size:,} ids; the rows that are missing are added as the mean of the others')
if rows < size or rows > size and isinstance(source, dict):  # those that only round a number of ours up are left out; another's stay
    resize_vocabulary(model, min(rows, size), size)
adapter = isinstance(source, dict) and source.get('lora') and format == 'hf' and not merge
try:
    os.makedirs(os.path.dirname(to) or '.', exist_ok=True)
    if format == 'gguf':
        write_gguf(to, model, tokens, quant, name)
    else:
        with atomic_folder(to) as folder:
            with open(os.path.join(folder, 'README.md'), 'w', encoding='utf-8') as f:
                f.write(card())
            if adapter:
                save_adapter(folder, source, DTYPES[quant], name)
            elif format == 'hf':
                save_pretrained(folder, model, tokens, DTYPES[quant], name)
            else:
                write_gguf(os.path.join(folder, f'{name}.gguf'), model, tokens, quant, name)
                with open(os.path.join(folder, 'Modelfile'), 'w', encoding='utf-8', newline='\n') as f:
                    f.write(modelfile(f'{name}.gguf', tokens, model.config.block_size))
            for file in os.listdir(folder):
                shutil.copymode(os.path.join(folder, 'README.md'), os.path.join(folder, file))  # safetensors lets nobody else read its files
except (OSError, SafetensorError) as error:
    sys.exit(f'to={to}: could not be written: {error}')
files = [os.path.join(to, file) for file in sorted(os.listdir(to))] if os.path.isdir(to) else [to]
print(f'wrote {to}: {sum(map(os.path.getsize, files)) / 1e6:,.1f} MB' + f' ({", ".join(map(os.path.basename, files))})' * (format != 'gguf'))
if adapter:
    print(f'now: PeftModel.from_pretrained(base, {to!r}), where base is {source["lora"]["base"]} as transformers opens it (if it is a run: exported, too)')
else:
    print('now: ' + shlex.join({'hf': ['python', 'chat.py' if can_chat(tokens) else 'sample.py', f'--init_from={to}'], 'gguf': ['llama-cli', '-m', to],
                                'ollama': ['ollama', 'create', name, '-f', os.path.join(to, 'Modelfile')]}[format]))
