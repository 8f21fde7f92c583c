"""
Continue texts with a trained model.

    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:"
    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --start="JULIET:" --num_samples=3 --out=s.jsonl
    python sample.py --out_dir=out-hongloumeng-char --interactive
    python sample.py --init_from=gpt2-xl --dtype=int8 --start="The answer to life, the universe, and everything is"
"""
import core.startup  # noqa: F401  first: it catches Ctrl-C and missing packages in the imports below

import json
import os
import sys
import time

import torch
from tqdm import tqdm

from core.device import explain, setup
from core.files import atomic, find
from core.inference.generation import continue_prompts
from core.text.chat_template import end_ids
from core.text.tokenizer import EOT, load_tokenizer
from core.weights.checkpoint import load_model, refuse_reward_model, source_tokenizer
from core.weights.quantize import prepare_for_inference
from kv_cache import cache_bytes

# ----------------------------------------------------------------------------------------------------------------------
init_from = 'resume'  # 'resume' (the run in out_dir), 'gpt2' (-medium, -large, -xl), or a checkpoint, run or HF folder
out_dir = 'out'  # the run to sample from, if init_from is 'resume'
ckpt = ''  # this checkpoint file instead of the one that out_dir offers
tokenizer = ''  # 'gpt2' or a tokenizer.json, instead of the model's own
start = '\n'  # the text to continue; may be repeated; '<|endoftext|>' in it is the token; FILE:prompt.txt reads a file
prompts = ''  # a file of texts to continue, one per line, after those of --start
interactive = False  # read a line and continue it, again and again
skip_unknown = False  # leave out characters that the vocabulary lacks, instead of stopping there
num_samples = 10  # samples of each text, drawn in one batch; a single one is printed as it is generated
max_new_tokens = 500  # length of a sample; past block_size learned positions recompute the context every token (slow)
temperature = 0.8  # 1.0: the model's own probabilities; lower is more careful; 0: always the most likely token
top_k = 200  # sample from the k most likely tokens only; 0: from all
top_p = 1.0  # sample from the smallest set of tokens with this probability
min_p = 0.0  # sample only tokens with at least this share of the most likely token's probability
repetition_penalty = 1.0  # above 1: tokens that have occurred become less likely; 1.2 is a lot
stop = ''  # end a sample before this text, in which \n is a newline; may be repeated
end_token = '<|endoftext|>'  # end a sample before this token (this one: and a chat's); '': always max_new_tokens
seed = 1337  # same seed, same text (in float32, whatever else is in the batch); every line of --interactive has its own
logprobs = False  # print each token's log-probability under the model (in nats, at temperature 1)
out = ''  # also write the samples to this file, one JSON object per line
batch_size = 64  # samples per batch; all samples of a text are in the same batch
device = 'auto'  # 'auto' (cuda, then mps, then cpu), 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'  # of the weights: bfloat16 or float16 on CUDA, else float32; or a name; int8: a byte per weight, on CPUs
compile = False  # torch.compile: takes up to a minute, and gains nothing on CPUs (docs/LOG.md)
# ----------------------------------------------------------------------------------------------------------------------
sys.excepthook = explain
config, config_given = {}, {}  # filled by configurator.py: all settings, and those given on the command line
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())


def check_settings():
    least = {'num_samples': 1, 'max_new_tokens': 1, 'temperature': 0, 'top_k': 0, 'seed': 0, 'batch_size': 1}
    for key, minimum in least.items():
        if config[key] < minimum:
            sys.exit(f'{key}={config[key]}: expected at least {minimum}')
    if not 0 < top_p <= 1:
        sys.exit(f'top_p={top_p}: expected more than 0 and at most 1')
    if not 0 <= min_p <= 1:
        sys.exit(f'min_p={min_p}: expected 0 to 1')
    if repetition_penalty <= 0:
        sys.exit(f'repetition_penalty={repetition_penalty}: expected more than 0; 1 changes nothing')
    if top_k == 0 and 'top_k' in config_given:
        print('top_k=0: drawing from all tokens', file=sys.stderr)
    if out and not os.path.isdir(os.path.dirname(os.path.abspath(os.path.expanduser(out)))):
        sys.exit(f'out={out}: there is no such folder to write it to')
    if out and os.path.exists(os.path.expanduser(out)) and not os.path.isfile(os.path.expanduser(out)):
        sys.exit(f'out={out}: no regular file; give the name of one')
    if seed >= 2**63:
        sys.exit(f'seed={seed}: expected less than 2**63')
    if interactive and (prompts or 'start' in config_given):
        sys.exit('interactive: the lines to continue come from the keyboard; leave out --start and --prompts')


def read_text(key, path):
    """Return the text of the file that a setting names."""
    try:
        with open(find(path), encoding='utf-8-sig') as f:
            return f.read()
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f'{key}={path}: {error}; expected a text file in UTF-8')


def texts_to_continue():
    """Return (origin, text) of each text of --start and --prompts; origin begins an error message about the text."""
    texts = []
    if 'start' in config_given or not prompts:
        for text in config_given.get('start', [start]):
            texts.append(('', read_text('start', text[5:]) if text.startswith('FILE:') else text))
    if prompts:
        lines = read_text('prompts', prompts).splitlines()
        if not any(lines):
            sys.exit(f'prompts={prompts}: the file is empty; expected a text in each line')
        texts += [(f'{prompts}, line {number}: ', line) for number, line in enumerate(lines, 1) if line]
    return texts


def encode(origin, text, tok, model_config):
    """Return a text without the characters that --skip_unknown leaves out, and its last block_size token ids (T,)."""
    block_size = model_config.block_size
    unknown = tok.unknown(text)
    if unknown and not skip_unknown:
        names = ', '.join(f'{char!r} (U+{ord(char):04X})' for char in unknown)
        sys.exit(f'{origin}not in this vocabulary: {names}; write the text without, '
                 'or leave them out by --skip_unknown')
    text = text.translate({ord(char): None for char in unknown})
    ids = tok.encode(text, special=[EOT])
    if len(ids) == 0:
        hint = ', or --start="<|endoftext|>" to begin anew' if tok.eot is not None else ''
        sys.exit(f'{origin}there is no text to continue: give at least one character{hint}')
    if ids.max() >= model_config.vocab_size:
        sys.exit(f'{origin}the prompt has token {ids.max()}, the model only {model_config.vocab_size}; '
                 'is this the right tokenizer?')
    if len(ids) > block_size:
        print(f'{origin}the text has {len(ids):,} tokens, the context of this network {block_size:,}: '
              f'its last {block_size:,} count', file=sys.stderr)
    return text, ids[-block_size:]


def generate(model, tok, encoded, copies, first_seed, stream):
    """
    Sample `copies` continuations of each prompt (text, ids) in one batch; if stream, print the only one meanwhile.
    Returns the rows of continue_prompts(), and whether Ctrl-C or a closed pipe ended them early.
    """
    steps = continue_prompts(
        model, tok, [ids for _, ids in encoded], max_new_tokens,
        seeds=[[first_seed, copy] for _ in encoded for copy in range(copies)], copies=copies,
        end_ids=end_ids(tok) if end_token == EOT else [tok.specials[end_token]] if end_token else [],
        stop_texts=[text.replace('\\n', '\n') for text in config_given.get('stop', [stop]) if text],
        with_logprobs=logprobs or bool(out), repetition_penalty=repetition_penalty,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    rows, interrupted = [], False
    hidden = True if stream else None  # None: no progress bar unless stderr is a terminal
    try:
        for rows in tqdm(steps, total=max_new_tokens, disable=hidden, leave=False, unit=' tokens'):
            if stream:
                print(rows[0].new_text(), end='', flush=True)
    except (KeyboardInterrupt, BrokenPipeError):
        interrupted = True
        for row in rows:
            row.finish_reason = row.finish_reason or 'interrupted'
    return rows, interrupted


def continue_texts(model, tok, encoded, copies, first_seed, stream, records):
    """Print `copies` continuations of each prompt (text, ids) and add them to records. Returns whether interrupted."""
    if stream:
        print(encoded[0][0], end='', flush=True)
    rows, interrupted = generate(model, tok, encoded, copies, first_seed, stream)
    new_records = [
        {'start': encoded[i // copies][0], 'sample': i % copies, 'text': row.text(), 'over': row.finish_reason,
         'tokens': row.ids, 'logprobs': row.logprobs}
        for i, row in enumerate(rows)]
    records += new_records  # before printing, which fails if the pipe is closed
    for row, record in zip(rows, new_records):
        print(row.new_text() if stream else f'{record["start"]}{record["text"]}\n---------------')
        if logprobs:
            print_logprobs(row, tok)
    return interrupted


def print_logprobs(row, tok):
    for token, logprob in zip(row.ids, row.logprobs):
        text = tok.decode([token])
        if '\ufffd' in text:
            text = tok.pieces[token]  # the bytes of a part of a character
        print(f'{logprob:9.4f}  {text!r}')


def continue_lines(model, tok, copies, records):
    """Read a line from the keyboard and continue it, until the end of the input or Ctrl-C."""
    while True:
        try:
            line = input('> ')
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:
            encoded = [encode('', line, tok, model.config)]
            continue_texts(model, tok, encoded, copies, seed + len(records), copies == 1, records)
        except SystemExit as error:  # this line cannot be continued
            print(error, file=sys.stderr)


def try_compile(model, env, rows):
    """Compile the model's forward pass; keep it uncompiled, with a warning, if that fails."""
    model.hidden = torch.compile(model.hidden, dynamic=True)
    try:
        list(model.generate(torch.zeros(1, 2, dtype=torch.int64, device=env.device), 3, copies=rows))
    except Exception as error:  # no C++ compiler, no Triton, or weights that torch.compile cannot place
        reason = type(error).__name__
        print(f'warning: torch.compile does not work here ({reason}); going on without it', file=sys.stderr)
        del model.hidden


def print_cache_size(model, rows, slots):
    c, number_bytes = model.config, model.transformer.wte.weight.element_size()
    size = rows * cache_bytes(c, slots, number_bytes)
    tokens = size / (2 * rows * c.n_layer * c.n_kv_head * c.head_size * number_bytes)  # of a layer, on average
    print(f'cache of keys and values: 2 x {rows} rows x {c.n_layer} layers x {c.n_kv_head} heads x '
          f'{c.head_size} channels x {tokens:g} tokens x {number_bytes} bytes = {size:,} bytes', flush=True)


def write_records(records):
    """Write all samples to the file `out`."""
    try:
        with atomic(os.path.realpath(os.path.expanduser(out)), 'w') as f:  # realpath: a link stays a link
            f.writelines(json.dumps(record, ensure_ascii=False) + '\n' for record in records)
    except OSError as error:
        sys.exit(f'out={out}: could not be written: {error}')


check_settings()
copies = 1 if interactive and 'num_samples' not in config_given else num_samples
texts = [] if interactive else texts_to_continue()
env = setup(device, dtype, seed=seed)
model, source = load_model(init_from, out_dir, ckpt)
refuse_reward_model(model, out_dir if init_from == 'resume' else init_from)
tok = load_tokenizer(tokenizer) if tokenizer else source_tokenizer(source)
if end_token not in ('', *tok.specials) and (end_token != EOT or 'end_token' in config_given):
    sys.exit(f'end_token={end_token}: no special token of this tokenizer; it has {", ".join(tok.specials) or "none"}')
if texts == [('', '\n')] and 'start' not in config_given and tok.unknown('\n'):
    texts = [('', tok.decode([0]))]  # a vocabulary without newlines: start with its first character
encoded = [encode(origin, text, tok, model.config) for origin, text in texts]

texts_at_once = max(1, batch_size // copies)
rows = copies * min(max(1, len(encoded)), texts_at_once)
longest_prompt = max((len(ids) for _, ids in encoded), default=model.config.block_size)
prepare_for_inference(model.to(env.device), env.dtype, rows)
if compile:
    try_compile(model, env, rows)
print_cache_size(model, rows, slots=min(model.config.block_size, longest_prompt + max_new_tokens))

records = []
interrupted = False
started = time.perf_counter()
try:
    if interactive:
        continue_lines(model, tok, copies, records)
    for i in range(0, len(encoded), texts_at_once):
        stream = copies == 1 and len(encoded) == 1
        interrupted = continue_texts(model, tok, encoded[i:i + texts_at_once], copies, seed, stream, records)
        if interrupted:
            break
finally:  # also if the reader of the output has gone
    if out and records:
        write_records(records)
if encoded and sys.stderr.isatty():  # no time in a file, so that the same seed gives the same file
    seconds, count = time.perf_counter() - started, sum(len(record['tokens']) for record in records)
    print(f'{count:,} tokens in {seconds:.1f} s, {count / seconds:,.0f} a second', file=sys.stderr)
if interrupted:
    sys.exit(130)
