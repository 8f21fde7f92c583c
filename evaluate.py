"""
Evaluate a model: its loss on a text, also in bits per byte, and its answers to multiple-choice questions. Of several
models the probabilities are averaged.

    python evaluate.py --out_dir=out-shakespeare-char                              # validation split of its dataset
    python evaluate.py --out_dir=out-shakespeare-char --dtype=float32,int8         # what rounding the weights costs
    python evaluate.py --out_dir=out-a,out-b                                       # each of them, and their mean
    python evaluate.py --init_from=gpt2 --data=my.txt --stride=256                 # each token after 768 or more others
    python evaluate.py --init_from=gpt2 --tasks=hellaswag_val.jsonl                # HellaSwag's format
    python evaluate.py --init_from=gpt2 --lm_eval=piqa,arc_easy                    # tasks of lm-evaluation-harness

Bytes and characters are those of the text as it is scored, with line feeds as newlines.
"""
import core.startup  # noqa: F401  first: it catches Ctrl-C and missing packages in the imports below

import math
import os
import re
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from core.device import explain, setup, to_device
from core.files import find
from core.inference.scoring import harness, multiple_choice, read_choices
from core.text.dataset import open_dataset
from core.text.tokenizer import load_tokenizer
from core.training.pipeline import pin
from core.weights.checkpoint import load_model, refuse_reward_model, source_tokenizer
from core.weights.ensemble import Ensemble, mean_logps, split_names
from core.weights.quantize import prepare_for_inference
from objectives import next_token

# ----------------------------------------------------------------------------------------------------------------------
init_from = 'resume'  # 'resume' (the run in out_dir), 'gpt2' (-medium, ...), a checkpoint, run, HF folder; several: a,b
out_dir = 'out'  # the run to evaluate, if init_from is 'resume'; several: a,b
ckpt = ''  # this checkpoint file instead of the one that out_dir offers
tokenizer = ''  # 'gpt2' or a tokenizer.json, instead of the model's own
data = ''  # a dataset folder or a text file in UTF-8; '': the dataset that the run was trained on
split = 'val'  # of a dataset: 'val' or 'train'
block_size = 0  # tokens of a window; 0: the network's context
stride = 0  # step between windows, whose overlap is context that does not count again; 0: block_size (no overlap)
tasks = ''  # a .jsonl of questions in HellaSwag's format, or several, separated by commas
delimiter = ' '  # between a question and its answer; '' for Chinese
lm_eval = ''  # tasks of lm-evaluation-harness, separated by commas
lm_eval_folder = ''  # a folder with more of its tasks, in .yaml files
limit = 0  # questions of each task; 0: all
batch_size = 8  # rows per batch
device = 'auto'  # 'auto' (cuda, then mps, then cpu), 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'  # of the weights, as in sample.py: float32, bfloat16, float16, int8; or several, separated by commas
# ----------------------------------------------------------------------------------------------------------------------
sys.excepthook = explain
config, config_given = {}, {}  # filled by configurator.py: all settings, and those given on the command line
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py'), encoding='utf-8').read())

for key, least in {'block_size': 0, 'stride': 0, 'limit': 0, 'batch_size': 1}.items():
    if config[key] < least:
        sys.exit(f'{key}={config[key]}: expected at least {least}')
if split not in ('val', 'train'):
    sys.exit(f'split={split}: expected val or train')


def open_text(name, tok):
    """
    Open a dataset folder or a text file. Returns a namespace:
    name: to print;
    segments: the texts in it, [(start, end), ...]; None for conversations;
    read(starts, T): X, Y (rows, T), and of conversations which one each token belongs to;
    dataset: what next_token.measure() needs.
    """
    path = find(name)
    if os.path.isfile(path):
        return open_text_file(name, path, tok)
    try:
        dataset = open_dataset(name)
    except SystemExit as error:
        sys.exit(re.sub('^dataset=', 'data=', str(error)))
    if dataset.tokenizer and dataset.tokenizer.json != tok.json and dataset.tokenizer.pieces != tok.pieces:
        sys.exit(f'data={name}: its tokens are those of another tokenizer; prepare it with that of the model, '
                 'or give a text file')
    if dataset.kind not in ('', 'conversations'):
        sys.exit(f'data={name}: this dataset has {dataset.kind}; evaluate.py reads texts and conversations, '
                 'and train.py --eval_only=True has the measures of the others')
    ends = dataset.ends[split]

    def read(starts, T):
        return next_token.load(dataset, split, starts, T)

    return SimpleNamespace(
        name=f'{dataset.folder}, {split}',
        segments=None if dataset.kind else list(zip([0, *ends], ends)),
        read=read,
        dataset=dataset)


def open_text_file(name, path, tok):
    """
    Do what open_text() does, for a text file. Every kind of newline is read as one line feed, as prepare.py reads
    a text for training (a vocabulary of characters has no carriage return). Bits per byte and per character are those
    of the text that is read, without a byte order mark: on a file from Windows they count fewer bytes than it has.
    """
    try:
        with open(path, encoding='utf-8-sig', newline='') as f:
            text = f.read()
        if carriage_returns := text.count('\r'):
            print(f'{name}: {carriage_returns:,} newlines with a carriage return are read as line feeds')
        ids = tok.encode(text.replace('\r\n', '\n').replace('\r', '\n'))
    except SystemExit as error:
        sys.exit(f'data={name}: {error}')
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f'data={name}: {error}; expected a dataset folder or a text file in UTF-8 '
                 '(to convert one: iconv -f GB18030 -t UTF-8 FILE > utf8.txt)')

    def read(starts, T):
        positions = starts[:, None] + np.arange(T + 1)
        rows = ids[np.minimum(positions, len(ids) - 1)]  # (rows, T + 1)
        targets = np.where(positions < len(ids), rows, -1)
        return torch.from_numpy(rows[:, :-1]), torch.from_numpy(targets[:, 1:])

    counts = SimpleNamespace(
        kind='',
        token_bytes=torch.from_numpy(tok.token_bytes()),
        token_chars=torch.from_numpy(tok.token_chars()))
    return SimpleNamespace(name=name, segments=[(0, len(ids))], read=read, dataset=counts)


def windows_of(text, T, step):
    """Return the windows of a text, (n, 2): the position of the first token, and that of the first one to count."""
    if text.segments is None:  # conversations: every window starts with one
        starts = next_token.fixed(text.dataset, split, -1, T)
        return np.stack([starts, starts], axis=1)
    windows = []
    for start, end in text.segments:
        if start < end <= start + T:
            hint = f', or a window that fits: --block_size={end - start - 1}' if end - start > 1 else ''
            sys.exit(f'{text.name}: {end - start:,} tokens, and a window has {T:,} and one to predict; '
                     f'give more text{hint}')
        last_start = end - 1 - T  # the last window that is full; windows go on until one includes the last target
        for window_start in range(start, max(start, last_start + step), step):
            first_counted = window_start
            if window_start > start:  # the previous windows have counted all targets but the last `step` ones
                first_counted += T - step
            windows.append((window_start, first_counted))
    return np.array(windows)


def print_loss(models, text, env):
    """
    Print the loss of a text, in which all tokens but the first count once, or of the answers in conversations: of each
    of the models {name: model}, and of the mean of their probabilities if there are several.
    """
    context = min(model.config.block_size for model in models.values())
    T = block_size or context
    step = stride or T
    if T > context or step > T:
        sys.exit(f'block_size={T}, stride={step}: expected windows of at most {context} tokens, '
                 'the context of this network, and a stride of at most one window')
    windows = windows_of(text, T, step)
    if len(windows) == 0:
        sys.exit(f'{text.name}: no tokens')
    found = []
    started = time.perf_counter()
    with torch.no_grad():
        for i in tqdm(range(0, len(windows), batch_size), disable=None, leave=False):
            window_start, first_counted = windows[i:i + batch_size].T  # (rows,) each
            X, Y, *document = text.read(window_start, T)
            n_context = torch.from_numpy(first_counted - window_start)
            Y[torch.arange(T) < n_context[:, None]] = -1
            batch = to_device(pin((X, Y, *document), env), env)
            losses = [model(*batch) for model in models.values()]  # (rows, T) each
            if len(losses) > 1:
                losses.append(-mean_logps(-loss for loss in losses))
            found.append(torch.stack([next_token.measures_of(loss, batch[1], text.dataset) for loss in losses]))
    sums = torch.stack(found).cpu().double().sum(dim=0)  # read at the end: no batch waits for it
    _, n_tokens, _, n_bytes, _, n_chars = sums[0].flatten().tolist()
    seconds = time.perf_counter() - started
    print(f'{text.name}: {n_tokens:,.0f} tokens, {n_bytes:,.0f} bytes, {n_chars:,.0f} characters; '
          f'windows of {T:,}, every {step:,}, in {seconds:.1f} s')
    labels = [f', {name}' for name in models] + [f', mean of {len(models)}'] if len(models) > 1 else ['']
    for label, ((nats, _), (bits, _), _) in zip(labels, sums.tolist()):
        loss, per_byte, per_char = nats / n_tokens, bits / max(n_bytes, 1), bits / max(n_chars, 1)
        perplexity = math.exp(min(loss, 700))
        print(f'{env.dtype}{label}: loss {loss:.4f}, perplexity {perplexity:,.3f}, '
              f'bits per byte {per_byte:.4f}, bits per character {per_char:.4f}', flush=True)


def print_accuracy(model, tok, path, questions, env):
    """Print how many multiple-choice questions the model answers correctly."""
    try:
        acc, acc_norm = multiple_choice(model, tok, questions, delimiter, batch_size)
    except SystemExit as error:
        sys.exit(f'{path}: {error}')
    guessing = np.mean([1 / len(endings) for _, endings, _ in questions])
    print(f'{path}: {len(questions):,} questions, {env.dtype}: acc {acc:.4f}, acc_norm {acc_norm:.4f} '
          f'(guessing: {guessing:.4f})', flush=True)


def load_networks(key, names):
    """
    Return the networks {name: model} that the setting `key` names, their tokenizer, and the dataset that the first one
    was trained on, '' if that is not known. Exits if their tokenizers differ.
    """
    models, toks, datasets = {}, [], []
    for name in names:
        model, source = load_model(name) if key == 'init_from' else load_model('resume', **{key: name})
        refuse_reward_model(model, name)
        models[name] = model
        datasets.append(source.get('config', {}).get('dataset', ''))
        toks.append(load_tokenizer(tokenizer) if tokenizer else source_tokenizer(source))
        if toks[-1].json != toks[0].json and toks[-1].pieces != toks[0].pieces:
            sys.exit(f'{key}={config[key]}: the tokenizer of {name} ({toks[-1].vocab_size:,} ids) is another one than '
                     f'that of {names[0]} ({toks[0].vocab_size:,} ids); give networks with the same tokenizer')
    return models, toks[0], datasets[0]


questions = {path: read_choices(find(path), limit) for path in tasks.split(',') if path}
envs = [setup(device, name) for name in dtype.split(',')]
key = 'init_from' if init_from != 'resume' else 'ckpt' if ckpt else 'out_dir'
names = split_names(key, config[key])
if lm_eval and len(names) > 1:
    sys.exit(f'lm_eval={lm_eval}, {key}={config[key]}: its tasks also generate text, for which one network is needed')
for env in envs:
    models, tok, trained_on = load_networks(key, names)
    name = data
    if not data and not tasks and not lm_eval:
        name = trained_on
        if not name:
            sys.exit('nothing to evaluate on: give --data (a dataset folder or a text file), --tasks or --lm_eval')
    for model in models.values():
        prepare_for_inference(model.to(env.device), env.dtype, batch_size * model.config.block_size)
    if name:
        print_loss(models, open_text(name, tok), env)
    if len(models) > 1:
        model = Ensemble(list(models.values()))
    for path in questions:
        print_accuracy(model, tok, path, questions[path], env)
    if lm_eval:
        folder = find(lm_eval_folder) if lm_eval_folder else ''
        results = harness(model, tok, lm_eval.split(','), folder, limit, batch_size)
        from lm_eval.utils import make_table
        print(make_table(results))
