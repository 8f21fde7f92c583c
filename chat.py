"""
Talk to an instruction-tuned model: in the terminal, by one prompt, or over HTTP as OpenAI's API and a page for the browser.

    python chat.py --out_dir=out-poems-sft
    python chat.py --out_dir=out-poems-sft --prompt="写一首关于秋天的诗"
    python chat.py --out_dir=out-poems-sft --rate=pairs.jsonl
    python chat.py --out_dir=out-poems-sft --serve
"""
import contextlib
import importlib.util
import json
import os
import sys

from core.device import explain, setup
from core.inference.conversation import LIMITS, check_range, fit_into_context, stream_reply
from core.inference.server import run_server
from core.text.chat_template import can_chat
from core.weights.checkpoint import load_model, refuse_reward_model, source_tokenizer
from core.weights.quantize import prepare_for_inference

# ---------------------------------------------------------------------------------------------------------------------------------------
init_from = 'resume'  # 'resume' (the run in out_dir), a checkpoint, a run's or a Hugging Face model's folder
out_dir = 'out'  # the run whose model answers, if init_from is 'resume'
ckpt = ''  # this checkpoint file rather than the one that out_dir offers
system = ''  # the system message, which says how to answer; '': none
prompt = ''  # answer this message and exit
max_new_tokens = 500  # length of an answer at most; it also ends where the context is full
temperature = 0.8  # 1.0: the model's own probabilities; lower is more careful; 0: always the most likely token
top_k = 200  # draw from the k most likely tokens only; 0: from all
top_p = 1.0  # draw from the smallest set of tokens with this much probability only
min_p = 0.0  # draw from tokens with at least this share of the most likely one's probability only
seed = 1337  # of the draws: the same seed and the same conversation, the same answers
rate = ''  # for each message show two answers, and add the better one and the other to this file, a line of JSON each pair: data for DPO
# over HTTP
serve = False  # answer over HTTP rather than here; the settings above are what a request does not choose
host = '127.0.0.1'  # the address to answer at: this machine only; 0.0.0.0: whoever reaches it, without a password
port = 8000  # 0: any that is free
max_requests = 4  # answers in the making at a time; further requests are told to come again (429)
max_body = 1048576  # bytes of a request; larger ones are refused (413)
# the machine
device = 'auto'  # cuda, then mps, then cpu, whichever there is; or say which, e.g. 'cpu', 'cuda:1'
dtype = 'auto'  # of the weights: bfloat16 or float16 on CUDA, float32 elsewhere; or say which; int8: one byte each
# ---------------------------------------------------------------------------------------------------------------------------------------
sys.excepthook = explain
config, config_given = {}, {}  # filled by the next line: every setting with its value, and what the command line set
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())

HELP = """/reset             forget the conversation
/system TEXT       another system message; without a text: none
/set KEY=VALUE     another temperature, ...; without one: show them
/help              this
/quit              end, as Ctrl-D does; Ctrl-C ends an answer
A line that begins with a space is a message, whatever follows."""

try:
    settings = {key: check_range(key, config[key]) for key in LIMITS}
    for key, low, high in (('port', 0, 65535), ('max_requests', 1, 10**6), ('max_body', 1, 2**40)):
        if not low <= config[key] <= high:
            raise ValueError(f'{key}={config[key]}: expected {low} to {high:,}')
except ValueError as error:
    sys.exit(str(error))
if (serve, bool(rate), 'prompt' in config_given).count(True) > 1:
    sys.exit('--prompt, --rate and --serve: choose one of them')
if 'prompt' in config_given and not prompt:
    sys.exit('prompt: it is empty; expected a message')
if serve and not all(map(importlib.util.find_spec, ('starlette', 'uvicorn'))):
    sys.exit('--serve needs two more packages: pip install starlette uvicorn')
rate = rate and os.path.expanduser(rate)
if rate:
    try:
        with open(rate, 'a+b') as f:
            torn = f.tell() and (f.seek(-1, os.SEEK_END), f.read())[1] != b'\n'
            f.write(b'\n' * bool(torn))  # a last line without an end would run into the next one
    except OSError as error:
        sys.exit(f'rate={rate}: {error}; expected a file to add to')

run = setup(device, dtype, seed=seed)
model, source = load_model(init_from, out_dir, ckpt)
refuse_reward_model(model, out_dir if init_from == 'resume' else init_from)
tokens = source_tokenizer(source)
if not can_chat(tokens):
    sys.exit('this model has no chat template: its tokenizer lacks the tokens for it; instruction-tune it first, or continue a text with it by sample.py')
if tokens.vocab_size > model.config.vocab_size:
    sys.exit(f'the tokenizer has {tokens.vocab_size:,} tokens, the model only {model.config.vocab_size:,}; is this the right tokenizer?')
prepare_for_inference(model.to(run.device), run.dtype)
block_size = model.config.block_size


def ask(messages):
    """The ids that ask for an answer, and the messages that they hold: with a quarter of the context left for it."""
    return fit_into_context(messages, tokens, block_size, max(1, min(settings['max_new_tokens'], block_size // 4)))


def answer(ids, *number):
    """Print the answer as it comes, drawn by the seed and `number`; returns it and why it is over, None where Ctrl-C ended it."""
    said, reason, length = '', None, 0
    with contextlib.suppress(() if prompt else KeyboardInterrupt):
        for text, over in stream_reply(model, tokens, ids, **{**settings, 'seed': [settings['seed'], *number]}):
            print(text, end='', flush=True)
            said, reason, length = said + text, over, length + 1
    print()
    if reason == 'length':
        print(f'(cut off: {"max_new_tokens" if length == settings["max_new_tokens"] else "the context is full"})', file=sys.stderr)
    return said, reason


def rated(ids, kept, number):
    """Print two answers, ask for the better one and add the pair to the file. Returns the better one, None where there is none: then nothing was asked."""
    both = []
    for attempt in range(6):
        print(f'{len(both) + 1}: ', end='', flush=True)
        said, reason = answer(ids, number, attempt)
        if reason is None:
            print('(stopped: not rated, and the message is forgotten)')
            return None
        if said and said not in both:
            both.append(said)
        else:
            print('(empty, or the same)')
        if len(both) == 2:
            break
    else:
        print('(no two different answers: not rated, and the message is forgotten; raise the temperature)')
        return None
    while (better := input('better: 1 or 2 (0 or nothing: neither)? ').strip()) not in ('1', '2'):
        if better in ('', '0'):
            print('(not rated, and the message is forgotten)')
            return None
    chosen, rejected = both if better == '1' else both[::-1]
    try:
        with open(rate, 'a', encoding='utf-8', newline='\n') as f:  # whole lines only: what has been rated stays
            f.write(json.dumps({'messages': kept, 'chosen': chosen, 'rejected': rejected}, ensure_ascii=False) + '\n')
    except OSError as error:
        sys.exit(f'rate={rate}: {error}; this pair is not kept')
    return chosen


def command(line):
    """Do what a line like '/set temperature=0.5' says. Returns False where that is to end the chat."""
    global system, told
    name, _, rest = line.strip().partition(' ')
    rest = rest.strip()
    if name == '/reset':
        history.clear()
        told = False
        print('(forgotten)')
    elif name == '/system':
        system = rest
        print(f'(system message: {system or "none"})')
    elif name == '/set':
        try:
            if rest:
                key, _, value = (part.strip() for part in rest.partition('='))
                if key not in settings:
                    raise ValueError(f'{key}: no such setting; expected {", ".join(settings)}')
                with contextlib.suppress(ValueError):
                    value = type(LIMITS[key][0])(value)
                settings[key] = check_range(key, value)
            print(', '.join(f'{key}={value}' for key, value in settings.items()))
        except ValueError as error:
            print(error, file=sys.stderr)
    elif name == '/quit':
        return False
    else:
        print(HELP if name == '/help' else f'{name}: no such command; /help shows them', file=sys.stdout if name == '/help' else sys.stderr)
    return True


def talk():
    """The chat in the terminal, until /quit or the end of the input."""
    global told
    number = 0
    while True:
        line = input('> ')
        if line.startswith('/'):
            if not command(line):
                return
            continue
        if not line.strip():
            continue
        messages = [{'role': 'system', 'content': system}] * bool(system) + history + [{'role': 'user', 'content': line.strip()}]
        try:
            ids, kept = ask(messages)
        except ValueError as error:
            print(error, file=sys.stderr)
            continue
        if len(kept) < len(messages) and not told:
            print('(the conversation has outgrown the context: from now on its oldest exchanges are left out)', file=sys.stderr)
            told = True
        said = rated(ids, kept, number) if rate else answer(ids, number)[0]
        number += 1
        if said is not None:
            history[:] = [*(message for message in kept if message['role'] != 'system'), {'role': 'assistant', 'content': said}]


history, told = [], False  # the exchanges so far; whether it has been said that they no longer fit
if serve:
    name = ckpt or (out_dir if init_from == 'resume' else init_from)
    run_server(model, tokens, os.path.splitext(os.path.basename(os.path.normpath(name)))[0], settings, system, host, port, max_requests, max_body)
elif prompt:
    try:
        ids, _ = ask([{'role': 'system', 'content': system}] * bool(system) + [{'role': 'user', 'content': prompt}])
    except ValueError as error:
        sys.exit(str(error))
    answer(ids, 0)
else:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (input() then edits lines and remembers them; Windows has its own)
    print(f'system message: {system}\n' * bool(system) + '/help shows what else can be typed')
    try:
        talk()
    except (EOFError, KeyboardInterrupt):
        print()
