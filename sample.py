"""
Continue a start string with a trained model.

    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:"
    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --start="JULIET:" --num_samples=3 --out=samples.jsonl
    python sample.py --out_dir=out-hongloumeng-char --interactive
    python sample.py --init_from=gpt2-xl --start="What is the answer to life, the universe, and everything?" --dtype=int8
"""
import json
import os
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

from core.device import explain, setup
from core.files import atomic, find
from core.inference.generation import penalise_repetition, sample_token
from core.text.tokenizer import EOT, load_tokenizer
from core.weights.checkpoint import load_model, refuse_reward_model, source_tokenizer
from core.weights.quantize import prepare_for_inference

# ---------------------------------------------------------------------------------------------------------------------------------------
init_from = 'resume'  # 'resume' (the run in out_dir), 'gpt2' (-medium, -large, -xl), a checkpoint, a run's or a Hugging Face model's folder
out_dir = 'out'  # the run to sample from, if init_from is 'resume'
ckpt = ''  # this checkpoint file rather than the one that out_dir offers
tokenizer = ''  # 'gpt2' or a tokenizer.json, rather than the one that comes with the model
start = '\n'  # the text to continue, may be given several times; '<|endoftext|>' in it is the token; FILE:prompt.txt takes it from a file
prompts = ''  # a file of texts to continue, one in each line, after those of --start
interactive = False  # read a line and continue it, again and again
skip_unknown = False  # leave out the characters of a text that the vocabulary lacks, rather than stop there
num_samples = 10  # how many to draw of each text, all at once; a single one is printed as it comes
max_new_tokens = 500  # length of each. Beyond the context of a network with learned positions all of it is computed anew for each token (slow); with rotary ones the context moves along
temperature = 0.8  # 1.0: the model's own probabilities; lower is more careful; 0: always the most likely token
top_k = 200  # draw from the k most likely tokens only; 0: from all
top_p = 1.0  # draw from the smallest set of tokens with this much probability only
min_p = 0.0  # draw from tokens with at least this share of the most likely one's probability only
repetition_penalty = 1.0  # above 1: tokens of the text so far become less likely; 1.2 is a lot
stop = ''  # end a sample before this text, in which \n is the end of a line; may be given several times
end_token = '<|endoftext|>'  # end a sample before this special token; '': go on to max_new_tokens
seed = 1337  # of the draws: the same seed, the same text, in float32 whatever is drawn beside it (each line of --interactive has another)
logprobs = False  # print the log-probability of each token, as the model has it (in nats, at temperature 1)
out = ''  # write the samples to this file, too: a line of JSON each
batch_size = 64  # samples computed at once; of more than that some texts wait, but all samples of a text are computed together
device = 'auto'  # cuda, then mps, then cpu, whichever there is; or say which, e.g. 'cpu', 'cuda:1'
dtype = 'auto'  # of the weights: bfloat16 or float16 on CUDA, float32 elsewhere; or say which; int8: one byte each
compile = False  # torch.compile: takes up to a minute, and on CPUs gains nothing (docs/LOG.md)
# ---------------------------------------------------------------------------------------------------------------------------------------
sys.excepthook = explain
config, config_given = {}, {}  # filled by the next line: every setting with its value, and what the command line set
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())

for key, least in {'num_samples': 1, 'max_new_tokens': 1, 'temperature': 0, 'top_k': 0, 'seed': 0, 'batch_size': 1}.items():
    if config[key] < least:
        sys.exit(f'{key}={config[key]}: expected at least {least}')
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
out = out and os.path.realpath(os.path.expanduser(out))  # a link stays one
if out and os.path.exists(out) and not os.path.isfile(out):
    sys.exit(f'out={out}: no regular file; give the name of one')
if seed >= 2**63:
    sys.exit(f'seed={seed}: expected less than 2**63')
if interactive:
    if prompts or 'start' in config_given:
        sys.exit('interactive: the lines to continue come from the keyboard; leave out --start and --prompts')
    num_samples = num_samples if 'num_samples' in config_given else 1
stops = [text.replace('\\n', '\n') for text in config_given.get('stop', [stop]) if text]


def read(key, path):
    try:
        with open(find(path), encoding='utf-8-sig') as f:
            return f.read()
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f'{key}={path}: {error}; expected a text file in UTF-8')


texts = [('', read('start', text[5:]) if text.startswith('FILE:') else text) for text in config_given.get('start', [start])]  # where it comes from, the text
if prompts:
    lines = [(f'{prompts}, line {number}: ', line) for number, line in enumerate(read('prompts', prompts).splitlines(), 1) if line]
    if not lines:
        sys.exit(f'prompts={prompts}: the file is empty; expected a text in each line')
    texts = texts * ('start' in config_given) + lines
run = setup(device, dtype, seed=seed)
model, source = load_model(init_from, out_dir, ckpt)
refuse_reward_model(model, out_dir if init_from == 'resume' else init_from)
tokens = load_tokenizer(tokenizer) if tokenizer else source_tokenizer(source)
block_size, vocab_size = model.config.block_size, min(tokens.vocab_size, model.config.vocab_size)
if end_token and end_token not in tokens.specials and 'end_token' in config_given:
    sys.exit(f'end_token={end_token}: no special token of this tokenizer; it has {", ".join(tokens.specials) or "none"}')
end = tokens.specials.get(end_token)
if texts == [('', '\n')] and 'start' not in config_given and tokens.unknown('\n'):
    texts = [('', tokens.decode([0]))]  # a vocabulary without newlines: begin with its first character


def encode(where, text):
    """A text to continue, so far as the vocabulary has its characters, and its token ids (T,). Ends the script with one line where there are none."""
    unknown = tokens.unknown(text)
    if unknown and skip_unknown:
        text = text.translate({ord(char): None for char in unknown})
    elif unknown:
        sys.exit(f'{where}not in this vocabulary: {", ".join(f"{char!r} (U+{ord(char):04X})" for char in unknown)}; write the text without, or leave them out by --skip_unknown')
    ids = tokens.encode(text, special=[EOT])
    if len(ids) == 0:
        sys.exit(f'{where}there is no text to continue: give at least one character' + ', or --start="<|endoftext|>" to begin anew' * (tokens.eot is not None))
    if ids.max() >= model.config.vocab_size:
        sys.exit(f'{where}the prompt has token {ids.max()}, the model only {model.config.vocab_size}; is this the right tokenizer?')
    if len(ids) > block_size:
        print(f'{where}the text has {len(ids):,} tokens, the context of this network {block_size:,}: its last {block_size:,} count', file=sys.stderr)
    return text, ids[-block_size:]


def text_of(ids):
    """The text of a sample so far: up to `end_token`, the first of `stops`, and a character that is not finished yet."""
    text = tokens.decode(ids[:ids.index(end)] if end in ids else ids).rstrip('\ufffd')
    return text[:min([text.index(stop) for stop in stops if stop in text], default=None)]


def why_over(ids):
    """'end' or 'stop' where the last token ended a sample, else ''."""
    if ids[-1] == end:
        return 'end'
    if stops:  # a character has at most 4 bytes, a token at least one
        tail = tokens.decode(ids[-4 * max(map(len, stops)):])
        return 'stop' * any(stop in tail for stop in stops)
    return ''


def continue_all(prompts, seed):
    """Print num_samples continuations of each of these prompts, [(text, ids), ...], and add a dict for each to `records`; Ctrl-C ends them early."""
    texts, prompts = zip(*prompts)
    rows, longest = len(prompts) * num_samples, max(map(len, prompts))
    pads = torch.tensor([longest - len(ids) for ids in prompts])
    idx = torch.tensor(np.stack([np.pad(ids, (longest - len(ids), 0)) for ids in prompts]), device=run.device)  # (len(prompts), longest)
    samples, scores, over = [[] for _ in range(rows)], [[] for _ in range(rows)], [''] * rows
    chance = [np.random.default_rng([seed, row % num_samples]) for row in range(rows)]
    seen = torch.zeros(rows, vocab_size, dtype=torch.bool, device=run.device)
    for row in range(rows):
        seen[row, prompts[row // num_samples]] = True

    def choose(logits):
        """The next token of every row (rows,)."""
        logits = own = logits[:, :vocab_size]
        if repetition_penalty != 1:
            logits = penalise_repetition(logits, seen, repetition_penalty)
        if not tokens.is_char:  # those that leave its bytes valid UTF-8
            allowed = torch.from_numpy(np.stack([tokens.can_follow(ids) for ids in samples])[:, :vocab_size])
            logits = logits.masked_fill(~allowed.to(logits.device), float('-inf'))
        uniform = torch.from_numpy(np.stack([draws.random(1, dtype=np.float32) for draws in chance])).to(logits.device)  # (rows, 1)
        token = sample_token(logits, uniform, temperature, top_k, top_p, min_p)
        if repetition_penalty != 1:
            seen.scatter_(1, token[:, None], True)
        if logprobs or out:
            for score, new, done in zip(scores, own.log_softmax(dim=-1).gather(1, token[:, None])[:, 0].tolist(), over):
                if not done:
                    score.append(new)
        return token

    stream, shown = num_samples == 1 and (interactive or len(all_prompts) == 1), 0
    if stream:
        print(texts[0], end='', flush=True)
    try:
        for new in tqdm(model.generate(idx, max_new_tokens, choose, pads.to(run.device) if pads.any() else None, num_samples), total=max_new_tokens,
                        disable=True if stream else None, leave=False, unit=' tokens'):
            for row, token in enumerate(new.tolist()):
                if not over[row]:
                    samples[row].append(token)
                    over[row] = why_over(samples[row])
            if stream:  # hold back what may still become a text to stop at
                text = text_of(samples[0])
                settled = len(text) if over[0] else max(shown, len(text) - max(map(len, stops), default=1) + 1)
                print(text[shown:settled], end='', flush=True)
                shown = settled
            if all(over):
                break
    except (KeyboardInterrupt, BrokenPipeError):
        over = [reason or 'interrupted' for reason in over]
    done = [{'start': texts[row // num_samples], 'sample': row % num_samples, 'text': text_of(ids), 'over': over[row] or 'length', 'tokens': ids, 'logprobs': scores[row]}
            for row, ids in enumerate(samples)]
    records.extend(done)
    for record in done:
        print(record['text'][shown:] if stream else f'{record["start"]}{record["text"]}\n---------------')
        if logprobs:
            for token, score in zip(record['tokens'], record['logprobs']):
                piece = tokens.decode([token])
                piece = tokens.pieces[token] if '\ufffd' in piece else piece  # of half a character its bytes
                print(f'{score:9.4f}  {piece!r}')


def write():
    """All samples into the file `out`, whole or not at all."""
    if out and records:
        try:
            with atomic(out, 'w') as f:
                f.writelines(json.dumps(record, ensure_ascii=False) + '\n' for record in records)
        except OSError as error:
            sys.exit(f'out={out}: could not be written: {error}')


all_prompts = [] if interactive else [encode(where, text) for where, text in texts]
at_once = max(1, batch_size // num_samples)  # prompts
rows = num_samples * min(max(1, len(all_prompts)), at_once)
slots = min(block_size, max((len(ids) for _, ids in all_prompts), default=block_size) + max_new_tokens)
prepare_for_inference(model.to(run.device), run.dtype, rows)
if compile:
    model.hidden = torch.compile(model.hidden, dynamic=True)
    try:
        list(model.generate(torch.zeros(1, 2, dtype=torch.int64, device=run.device), 3, copies=rows))
    except Exception as error:  # no C++ compiler, no Triton, or weights that it cannot place
        print(f'warning: torch.compile does not work here ({type(error).__name__}); going on without it', file=sys.stderr)
        del model.hidden
c, number = model.config, model.transformer.wte.weight.element_size()
print(f'cache of keys and values: 2 x {rows} rows x {c.n_layer} layers x {c.n_kv_head} heads x {c.head_size} channels x {slots} tokens x {number} bytes = '
      f'{2 * rows * c.n_layer * c.n_kv_head * c.head_size * slots * number:,} bytes', flush=True)
records, started = [], time.perf_counter()
try:
    while interactive:
        try:
            line = input('> ')
        except (EOFError, KeyboardInterrupt):
            print()
            break
        try:
            continue_all([encode('', line)], seed + len(records))
        except SystemExit as error:  # what cannot be continued
            print(error, file=sys.stderr)
    for i in range(0, len(all_prompts), at_once):
        continue_all(all_prompts[i:i + at_once], seed)
        if any(record['over'] == 'interrupted' for record in records):
            break
finally:  # also where the reader of what is printed has gone
    write()
if records and not interactive:
    seconds, count = time.perf_counter() - started, sum(len(record['tokens']) for record in records)
    if sys.stderr.isatty():  # what is written elsewhere is the same each time
        print(f'{count:,} tokens in {seconds:.1f} s, {count / seconds:,.0f} a second', file=sys.stderr)
    if any(record['over'] == 'interrupted' for record in records):
        sys.exit(130)
