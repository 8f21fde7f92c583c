"""
How good a model is: its loss on any text, in bits per byte too, and its answers to questions with several choices.

    python evaluate.py --out_dir=out-shakespeare-char                                   # on the whole validation split of its dataset
    python evaluate.py --out_dir=out-shakespeare-char --dtype=float32,bfloat16,int8     # what rounding the weights costs
    python evaluate.py --init_from=gpt2 --data=my.txt --stride=256                      # a text file; each token after at least 768 others
    python evaluate.py --init_from=gpt2 --tasks=hellaswag_val.jsonl                     # HellaSwag's format, scored as lm-evaluation-harness does
    python evaluate.py --init_from=gpt2 --lm_eval=piqa,arc_easy                         # that itself (pip install lm_eval)
"""
import math
import os
import re
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from core.device import explain, setup
from core.files import find
from core.inference.scoring import harness, multiple_choice, read_choices
from core.text.dataset import open_dataset
from core.text.tokenizer import load_tokenizer
from core.weights.checkpoint import load_model, refuse_reward_model, source_tokenizer
from core.weights.quantize import prepare_for_inference
from objectives import next_token

# ---------------------------------------------------------------------------------------------------------------------------------------
init_from = 'resume'  # 'resume' (the run in out_dir), 'gpt2' (-medium, -large, -xl), a checkpoint, a run's or a Hugging Face model's folder
out_dir = 'out'  # the run to evaluate, if init_from is 'resume'
ckpt = ''  # this checkpoint file rather than the one that out_dir offers
tokenizer = ''  # 'gpt2' or a tokenizer.json, rather than the one that comes with the model
data = ''  # a dataset folder or a text file in UTF-8; '': the dataset that the run was trained on
split = 'val'  # of a dataset: 'val' or 'train'
block_size = 0  # tokens of a window; 0: the network's context
stride = 0  # from one window of a text to the next; the tokens before are context and do not count again. 0: block_size, so that windows stand end to end
tasks = ''  # a .jsonl of questions in HellaSwag's format, or several, separated by commas
delimiter = ' '  # between a question and its answer; '' for Chinese
lm_eval = ''  # tasks of lm-evaluation-harness, separated by commas
lm_eval_folder = ''  # more of its tasks, in .yaml files
limit = 0  # questions of each task; 0: all
batch_size = 8  # rows at once
device = 'auto'  # cuda, then mps, then cpu, whichever there is; or say which, e.g. 'cpu', 'cuda:1'
dtype = 'auto'  # of the weights, as in sample.py: float32, bfloat16, float16, int8; several, separated by commas, one after the other
# ---------------------------------------------------------------------------------------------------------------------------------------
sys.excepthook = explain
config, config_given = {}, {}  # filled by the next line: every setting with its value, and what the command line set
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())

for key, least in {'block_size': 0, 'stride': 0, 'limit': 0, 'batch_size': 1}.items():
    if config[key] < least:
        sys.exit(f'{key}={config[key]}: expected at least {least}')
if split not in ('val', 'train'):
    sys.exit(f'split={split}: expected val or train')
questions = {path: read_choices(find(path), limit) for path in tasks.split(',') if path}
runs = [setup(device, name) for name in dtype.split(',')]


def open_text(data, tokens):
    """
    What there is to read: its name, a function that gives X, Y (rows, T), and of conversations which one a token is in, from some places of it on, where its texts begin and end, [(begin, end), ...] (none of conversations, whose rows begin with one),
    and what measure() wants to know. Ends the script with one line where there is nothing.
    """
    path = find(data)
    if not os.path.isfile(path):
        try:
            found = open_dataset(data)
        except SystemExit as error:
            sys.exit(re.sub('^dataset=', 'data=', str(error)))
        if found.tokenizer and found.tokenizer.json != tokens.json and found.tokenizer.pieces != tokens.pieces:
            sys.exit(f'data={data}: its tokens are those of another tokenizer; prepare it with that of the model, or give a text file')
        if found.kind not in ('', 'conversations'):
            sys.exit(f'data={data}: this dataset has {found.kind}; evaluate.py reads texts and conversations, and train.py --eval_only=True has the measures of the others')
        return f'{found.folder}, {split}', lambda at, T: next_token.load(found, split, at, T), [] if found.kind else list(zip([0, *found.ends[split]], found.ends[split])), found
    try:
        with open(path, encoding='utf-8-sig') as f:
            ids = tokens.encode(f.read())
    except SystemExit as error:
        sys.exit(f'data={data}: {error}')
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f'data={data}: {error}; expected a dataset folder or a text file in UTF-8')

    def take(at, T):
        at = at[:, None] + np.arange(T + 1)
        rows = ids[np.minimum(at, len(ids) - 1)]  # (rows, T + 1)
        return torch.from_numpy(rows[:, :-1]), torch.from_numpy(np.where(at < len(ids), rows, -1)[:, 1:])
    return data, take, [(0, len(ids))], SimpleNamespace(kind='', token_bytes=torch.from_numpy(tokens.token_bytes()), token_chars=torch.from_numpy(tokens.token_chars()))


def losses(model, tokens, run):
    """Print the loss of a text, every token of it once but the first, or of what the assistant says in conversations."""
    config, T = model.config, block_size or model.config.block_size
    if T > config.block_size or stride > T:
        sys.exit(f'block_size={T}, stride={stride or T}: expected windows of at most {config.block_size} tokens, the context of this network, and a stride of at most one window')
    name, take, parts, known = open_text(data, tokens)
    step, places = stride or T, [(at, at) for at in next_token.fixed(known, split, -1, T)] if known.kind else []
    for begin, end in parts:
        if begin < end <= begin + T:
            sys.exit(f'{name}: {end - begin:,} tokens, and a window has {T:,} and one to predict; give more text' + f', or a window that fits: --block_size={end - begin - 1}' * (end - begin > 1))
        places += [(at, at if at == begin else at + T - step) for at in range(begin, max(begin, end - 1 - T + step), step)]  # where a row begins, and what counts
    if not places:
        sys.exit(f'{name}: no tokens')
    total, started = torch.zeros(3, 2, dtype=torch.float64), time.perf_counter()
    with torch.no_grad():
        for i in tqdm(range(0, len(places), batch_size), disable=None, leave=False):
            at, counted = np.array(places[i:i + batch_size]).T  # (rows,) each
            X, Y, *document = take(at, T)
            Y[torch.arange(T) < torch.from_numpy(counted - at)[:, None]] = -1
            total += next_token.measure(model, [x.to(run.device) for x in (X, Y, *document)], known).double().cpu()
    (nats, count), (bits, size), (_, characters) = total.tolist()
    loss = nats / count
    print(f'{name}: {count:,.0f} tokens, {size:,.0f} bytes, {characters:,.0f} characters; windows of {T:,}, every {step:,}, in {time.perf_counter() - started:.1f} s')
    print(f'{run.dtype}: loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):,.3f}, bits per byte {bits / max(size, 1):.4f}, bits per character {bits / max(characters, 1):.4f}', flush=True)


for run in runs:
    model, source = load_model(init_from, out_dir, ckpt)
    refuse_reward_model(model, out_dir if init_from == 'resume' else init_from)
    tokens = load_tokenizer(tokenizer) if tokenizer else source_tokenizer(source)
    data = data or (source.get('config', {}).get('dataset', '') if not tasks and not lm_eval else '')
    if not data and not tasks and not lm_eval:
        sys.exit('nothing to evaluate on: give --data (a dataset folder or a text file), --tasks or --lm_eval')
    prepare_for_inference(model.to(run.device), run.dtype, batch_size * model.config.block_size)
    if data:
        losses(model, tokens, run)
    for path, asked in questions.items():
        try:
            acc, acc_norm = multiple_choice(model, tokens, asked, delimiter, batch_size)
        except SystemExit as error:
            sys.exit(f'{path}: {error}')
        print(f'{path}: {len(asked):,} questions, {run.dtype}: acc {acc:.4f}, acc_norm {acc_norm:.4f} (guessing: {np.mean([1 / len(endings) for _, endings, _ in asked]):.4f})', flush=True)
    if lm_eval:
        results = harness(model, tokens, lm_eval.split(','), find(lm_eval_folder) if lm_eval_folder else '', limit, batch_size)
        from lm_eval.utils import make_table
        print(make_table(results))
