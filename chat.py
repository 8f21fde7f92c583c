"""
Chat with an instruction-tuned model: in the terminal, for one prompt, or over HTTP (OpenAI's API and a web page).

    python chat.py --out_dir=out-poems-sft
    python chat.py --out_dir=out-poems-sft --prompt="写一首关于秋天的诗"
    python chat.py --out_dir=out-poems-sft --rate=pairs.jsonl
    python chat.py --out_dir=out-poems-sft --serve
"""
import core.startup  # noqa: F401  first: it catches Ctrl-C and missing packages in the imports below

import contextlib
import importlib.util
import json
import os
import sys

from core.device import explain, setup
from core.estimates import total_memory
from core.inference.conversation import LIMITS, check_range, fit_into_context, stream_reply
from core.text.chat_template import can_chat
from core.weights.checkpoint import load_model, refuse_reward_model, source_tokenizer
from core.weights.quantize import prepare_for_inference

# ----------------------------------------------------------------------------------------------------------------------
init_from = 'resume'  # 'resume' (the run in out_dir), a checkpoint, a run's folder or a Hugging Face folder
out_dir = 'out'  # the run whose model answers, if init_from is 'resume'
ckpt = ''  # this checkpoint file instead of the one that out_dir offers
system = ''  # the system message, which says how to answer; '': none
prompt = ''  # answer this message and exit
max_new_tokens = 500  # longest answer; an answer also ends when the context is full
temperature = 0.8  # 1.0: the model's own probabilities; lower is more careful; 0: always the most likely token
top_k = 200  # sample from the k most likely tokens only; 0: from all
top_p = 1.0  # sample from the smallest set of tokens with this probability
min_p = 0.0  # sample only tokens with at least this share of the most likely token's probability
repetition_penalty = 1.0  # above 1: tokens that have occurred, also in the conversation, become less likely
presence_penalty = 0.0  # OpenAI's: the logits of tokens that are in the answer so far are this much lower
frequency_penalty = 0.0  # OpenAI's: lower by this much for each time that the token is in the answer
seed = 1337  # same seed, same conversation: same answers
rate = ''  # show two answers to each message, and append the better and the worse one to this JSONL file (for DPO)
# over HTTP
serve = False  # serve over HTTP instead; the settings above apply where a request leaves them out
host = '127.0.0.1'  # the address to listen on: this machine only; 0.0.0.0: whoever reaches it, without a password
port = 8000  # 0: any free port
max_requests = 4  # answers generated at a time; further requests get 429 (try again later)
max_cache_gb = 0.0  # memory that the KV caches of all answers together may take; more gets 503; 0: a quarter of all
max_body = 1048576  # largest request in bytes; larger ones get 413
# the machine
device = 'auto'  # 'auto' (cuda, then mps, then cpu), 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'  # of the weights: bfloat16 or float16 on CUDA, else float32; or a name; int8: a byte per weight, on CPUs
# ----------------------------------------------------------------------------------------------------------------------
sys.excepthook = explain
config, config_given = {}, {}  # filled by configurator.py: all settings, and those given on the command line
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())

HELP = """/reset             forget the conversation
/system TEXT       another system message; without a text: none
/set KEY=VALUE     another temperature, ...; without one: show them
/help              this
/quit              end, as Ctrl-D does; Ctrl-C ends an answer
A line that begins with a space is a message, whatever follows."""


class Conversation:
    """The state of a chat in the terminal."""

    def __init__(self):
        self.messages = []  # the exchanges so far, without the system message
        self.system = system
        self.settings = {key: config[key] for key in LIMITS}  # of the answers; /set changes them
        self.n_asked = 0
        self.warned = False  # the user has been told that the oldest exchanges are left out

    def with_message(self, text):
        """Return the messages to send: the system message, the exchanges so far, and the user's next message."""
        first = [{'role': 'system', 'content': self.system}] if self.system else []
        return [*first, *self.messages, {'role': 'user', 'content': text}]


def check_settings():
    limits = {'port': (0, 65535), 'max_requests': (1, 10**6), 'max_cache_gb': (0, 10**6), 'max_body': (1, 2**40)}
    try:
        for key in LIMITS:
            check_range(key, config[key])
        for key, (low, high) in limits.items():
            if not low <= config[key] <= high:
                raise ValueError(f'{key}={config[key]}: expected {low} to {high:,}')
    except ValueError as error:
        sys.exit(str(error))
    if [serve, bool(rate), 'prompt' in config_given].count(True) > 1:
        sys.exit('--prompt, --rate and --serve: choose one of them')
    if 'prompt' in config_given and not prompt:
        sys.exit('prompt: it is empty; expected a message')
    if serve and not all(importlib.util.find_spec(name) for name in ('starlette', 'uvicorn')):
        sys.exit('--serve needs two more packages: pip install starlette uvicorn')


def open_pairs():
    """Check that the file `rate` can be appended to. If its last line lacks a newline, add it."""
    try:
        with open(os.path.expanduser(rate), 'a+b') as f:
            if f.tell() == 0:
                return
            f.seek(-1, os.SEEK_END)
            if f.read() != b'\n':
                f.write(b'\n')
    except OSError as error:
        sys.exit(f'rate={rate}: {error}; expected a file to add to')


def append_pair(messages, chosen, rejected):
    line = json.dumps({'messages': messages, 'chosen': chosen, 'rejected': rejected}, ensure_ascii=False) + '\n'
    try:
        with open(os.path.expanduser(rate), 'a', encoding='utf-8', newline='\n') as f:
            f.write(line)  # one write per pair: an interruption leaves no partial line
    except OSError as error:
        sys.exit(f'rate={rate}: {error}; this pair is not kept')


def prompt_ids(messages, model, tok, settings):
    """Return the prompt's ids and the messages in it: a quarter of the context, if needed, is left for the answer."""
    block_size = model.config.block_size
    room = max(1, min(settings['max_new_tokens'], block_size // 4))
    return fit_into_context(messages, tok, block_size, room)


def answer(model, tok, ids, settings, *number):
    """
    Print the answer while it is generated, with a seed of settings['seed'] and `number`. Returns its text and its
    finish_reason, None if Ctrl-C ended it; with --prompt, Ctrl-C ends the script.
    """
    text = ''
    reason = None
    n_tokens = 0
    sampling = {**settings, 'seed': [settings['seed'], *number]}
    try:
        for new_text, finish_reason in stream_reply(model, tok, ids, **sampling):
            print(new_text, end='', flush=True)
            text += new_text
            reason = finish_reason
            n_tokens += 1
    except KeyboardInterrupt:
        if prompt:
            raise
    print()
    if reason == 'length':
        limit = 'max_new_tokens' if n_tokens == settings['max_new_tokens'] else 'the context is full'
        print(f'(cut off: {limit})', file=sys.stderr)
    return text, reason


def two_answers(model, tok, ids, settings, number):
    """Print and return two different answers. Returns None after Ctrl-C or six attempts."""
    answers = []
    for attempt in range(6):
        print(f'{len(answers) + 1}: ', end='', flush=True)
        text, reason = answer(model, tok, ids, settings, number, attempt)
        if reason is None:
            print('(stopped: not rated, and the message is forgotten)')
            return None
        if not text or text in answers:
            print('(empty, or the same)')
            continue
        answers.append(text)
        if len(answers) == 2:
            return answers
    print('(no two different answers: not rated, and the message is forgotten; raise the temperature)')
    return None


def rated_answer(model, tok, ids, messages, settings, number):
    """Let the user choose between two answers, and append the pair to the file. Returns the better one, or None."""
    answers = two_answers(model, tok, ids, settings, number)
    if answers is None:
        return None
    better = ''
    while better not in ('1', '2'):
        better = input('better: 1 or 2 (0 or nothing: neither)? ').strip()
        if better in ('', '0'):
            print('(not rated, and the message is forgotten)')
            return None
    chosen, rejected = answers if better == '1' else reversed(answers)
    append_pair(messages, chosen, rejected)
    return chosen


def change_setting(settings, assignment):
    """Change a setting by a text like 'temperature=0.5', and print all of them."""
    try:
        if assignment:
            key, _, value = (part.strip() for part in assignment.partition('='))
            if key not in settings:
                raise ValueError(f'{key}: no such setting; expected {", ".join(settings)}')
            with contextlib.suppress(ValueError):  # check_range() says what is wrong
                value = type(LIMITS[key][0])(value)
            settings[key] = check_range(key, value)
        print(', '.join(f'{key}={value}' for key, value in settings.items()))
    except ValueError as error:
        print(error, file=sys.stderr)


def run_command(line, conversation):
    """Run a command like '/set temperature=0.5'. Returns False if it ends the chat."""
    name, _, argument = line.strip().partition(' ')
    argument = argument.strip()
    if name == '/reset':
        conversation.messages = []
        conversation.warned = False
        print('(forgotten)')
    elif name == '/system':
        conversation.system = argument
        print(f'(system message: {argument or "none"})')
    elif name == '/set':
        change_setting(conversation.settings, argument)
    elif name == '/help':
        print(HELP)
    elif name != '/quit':
        print(f'{name}: no such command; /help shows them', file=sys.stderr)
    return name != '/quit'


def send_message(text, conversation, model, tok):
    """Answer a message, and add both to the conversation."""
    messages = conversation.with_message(text)
    settings, number = conversation.settings, conversation.n_asked
    try:
        ids, kept = prompt_ids(messages, model, tok, settings)
    except ValueError as error:
        print(error, file=sys.stderr)
        return
    if len(kept) < len(messages) and not conversation.warned:
        print('(the conversation has outgrown the context: from now on its oldest exchanges are left out)',
              file=sys.stderr)
        conversation.warned = True
    if rate:
        said = rated_answer(model, tok, ids, kept, settings, number)
    else:
        said, _ = answer(model, tok, ids, settings, number)
    conversation.n_asked += 1
    if said is not None:
        exchanges = [message for message in kept if message['role'] != 'system']
        conversation.messages = [*exchanges, {'role': 'assistant', 'content': said}]


def talk(model, tok):
    """Chat in the terminal, until /quit, the end of the input or Ctrl-C at the prompt."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives input() line editing and a history; Windows has its own)
    conversation = Conversation()
    if system:
        print(f'system message: {system}')
    print('/help shows what else can be typed')
    try:
        while True:
            line = input('> ')
            if line.startswith('/'):
                if not run_command(line, conversation):
                    return
            elif line.strip():
                send_message(line.strip(), conversation, model, tok)
    except (EOFError, KeyboardInterrupt):
        print()


check_settings()
if rate:
    open_pairs()
env = setup(device, dtype, seed=seed)
model, source = load_model(init_from, out_dir, ckpt)
origin = out_dir if init_from == 'resume' else init_from
refuse_reward_model(model, origin)
tok = source_tokenizer(source)
if not can_chat(tok):
    sys.exit('this model has no chat template: its tokenizer lacks the tokens for it; instruction-tune it first, '
             'or continue a text with it by sample.py')
if tok.vocab_size > model.config.vocab_size:
    sys.exit(f'the tokenizer has {tok.vocab_size:,} tokens, the model only {model.config.vocab_size:,}; '
             'is this the right tokenizer?')
prepare_for_inference(model.to(env.device), env.dtype)

if serve:
    from core.inference.server import run_server  # needs two packages that the rest does not
    name = os.path.splitext(os.path.basename(os.path.normpath(ckpt or origin)))[0]
    settings = {key: config[key] for key in LIMITS}
    max_cache = int(max_cache_gb * 2**30) or (total_memory(env) or 2**34) // 4
    run_server(model, tok, name, settings, system, host, port,
               max_requests=max_requests, max_cache=max_cache, max_body=max_body)
elif prompt:
    conversation = Conversation()
    try:
        ids, _ = prompt_ids(conversation.with_message(prompt), model, tok, conversation.settings)
    except ValueError as error:
        sys.exit(str(error))
    answer(model, tok, ids, conversation.settings, 0)
else:
    talk(model, tok)
