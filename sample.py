"""
Continue a start string with a trained model.

    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:"
    python sample.py --init_from=gpt2-xl --start="What is the answer to life, the universe, and everything?" --num_samples=5
"""
import os
import sys

import numpy as np
import torch

from core.checkpoint import load_model, source_tokenizer
from core.device import setup
from core.files import find
from core.tokenizer import load_tokenizer

# ---------------------------------------------------------------------------------------------------------------------------------------
init_from = 'resume'  # 'resume' (the run in out_dir), 'gpt2' (-medium, -large, -xl), a checkpoint, a run's or a GPT-2's folder
out_dir = 'out'  # the run to sample from, if init_from is 'resume'
ckpt = ''  # this checkpoint file rather than the one that out_dir offers
tokenizer = ''  # 'gpt2' or a tokenizer.json, rather than the one that comes with the model
start = '\n'  # the text to continue; '<|endoftext|>' in it is the token; FILE:prompt.txt takes it from a file
num_samples = 10  # how many to draw, all at once; a single one is printed as it comes
max_new_tokens = 500  # length of each
temperature = 0.8  # 1.0: the model's own probabilities; lower is more careful; 0: always the most likely token
top_k = 200  # draw from the k most likely tokens only; 0: from all
top_p = 1.0  # draw from the smallest set of tokens with this much probability only
stop = ''  # end a sample before this text; each ends before <|endoftext|> anyhow
seed = 1337  # of the draws
device = 'auto'  # cuda, then mps, then cpu, whichever there is; or say which, e.g. 'cpu', 'cuda:1'
dtype = 'auto'  # bfloat16 or float16 on CUDA, float32 elsewhere; or say which
compile = False  # torch.compile: worth its minute only for very many samples
# ---------------------------------------------------------------------------------------------------------------------------------------
config, config_given = {}, set()  # filled by the next line: every setting with its value, and the names that the command line set
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())

for key, least in {'num_samples': 1, 'max_new_tokens': 1, 'temperature': 0, 'top_k': 0}.items():
    if config[key] < least:
        sys.exit(f'{key}={config[key]}: expected at least {least}')
if not 0 < top_p <= 1:
    sys.exit(f'top_p={top_p}: expected more than 0 and at most 1')
run = setup(device, dtype, seed=seed)
model, source = load_model(init_from, out_dir, ckpt)
tokens = load_tokenizer(tokenizer) if tokenizer else source_tokenizer(source)
model.eval().to(run.device)
if compile:
    model.hidden = torch.compile(model.hidden, dynamic=True)

if start.startswith('FILE:'):
    try:
        with open(find(start[5:]), encoding='utf-8') as f:
            start = f.read()
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f'start={start}: {error}; expected a text file in UTF-8')
if 'start' not in config_given and tokens.is_char and start.encode() not in tokens.pieces:
    start = tokens.decode([0])  # a vocabulary without newlines: begin with its first character
prompt = tokens.encode(start, allow_eot=True)
if len(prompt) == 0:
    sys.exit('start is empty: give at least one character, or --start="<|endoftext|>" to begin anew')
if prompt.max() >= model.config.vocab_size:
    sys.exit(f'the prompt has token {prompt.max()}, the model only {model.config.vocab_size}; is this the right tokenizer?')


def text_of(ids):
    """The text of a sample so far, and whether it is over: it ends before <|endoftext|> and before `stop`."""
    over = tokens.eot in ids
    text = tokens.decode(ids[:ids.index(tokens.eot)] if over else ids).rstrip('\ufffd')  # without a character that is not finished yet
    if stop and stop in text:
        return text[:text.index(stop)], True
    return text, over


idx = torch.tensor(prompt, dtype=torch.int64, device=run.device).repeat(num_samples, 1)  # (num_samples, T)
samples = [[] for _ in range(num_samples)]  # the new token ids of each


def allowed():
    """Which tokens may come next in each sample (num_samples, V): those that leave its bytes valid UTF-8."""
    return torch.from_numpy(np.stack([tokens.can_follow(ids) for ids in samples]))


texts, over = [''] * num_samples, [False] * num_samples
stream, shown = num_samples == 1, 0
if stream:
    print(start, end='', flush=True)
with run.ctx():
    for new in model.generate(idx, max_new_tokens, temperature, top_k, top_p, tokens.vocab_size, None if tokens.is_char else allowed):
        for i, token in enumerate(new.tolist()):
            if not over[i]:
                samples[i].append(token)
                texts[i], over[i] = text_of(samples[i])
        if stream:  # hold back what may still become the stop text
            settled = max(shown, len(texts[0]) - max(len(stop) - 1, 0))
            print(texts[0][shown:settled], end='', flush=True)
            shown = settled
        if all(over):
            break
if stream:
    print(texts[0][shown:])
else:
    for text in texts:
        print(f'{start}{text}\n---------------')
