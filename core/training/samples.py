"""What train.py shows as text while it trains: a row of the first batch, and samples of what the model writes."""
import json
import os
import sys

import torch

from core.files import atomic
from core.inference.generation import continue_prompts
from core.text.chat_template import end_ids, render
from core.text.dataset import read_document


def show_batch(batch, tokenizer):
    """Print the first row of a batch (X, Y, ...), (rows, T) each, with the targets between ⟦ and ⟧, without padding."""
    X, Y = batch[:2]
    tokens = X[0, :length_without_padding(*(x[0] for x in batch[:3]))].tolist()
    is_learned = [False, *(Y[0] >= 0).tolist()]  # the target at a position is the token after it
    parts = []
    begin = 0
    for i in range(1, len(tokens) + 1):
        if i == len(tokens) or is_learned[i] != is_learned[begin]:
            text = tokenizer.decode(tokens[begin:i])
            parts.append(f'⟦{text}⟧' if is_learned[begin] else text)
            begin = i
    print('a row of the first batch; what is learned stands between ⟦ and ⟧:\n' + ''.join(parts), flush=True)


def length_without_padding(X, Y, document=None):
    """Return the length of a row (T,). Padding is one token, again and again, that has no target."""
    is_padding = (X == X[-1]) & (Y < 0)
    length = len(X) - int(is_padding.flip(0).cumprod(0).sum())
    if length == len(X):
        return length
    if document is not None and document[length] != document[length - 1]:  # padding of pack(): a document of its own
        return length
    return length + 1  # windows() repeats the last token of the text


def encode_prompts(prompts, data, model, env):
    """
    Return [(text, ids)] of the setting sample_prompts: texts to continue, separated by |. For a dataset
    of conversations they are messages of a user, and '' is the first prompt of the dataset. A reward model
    generates no text and has none. Exits if the model cannot continue them.
    """
    if model.config.reward:
        return []
    tokenizer = data.tokenizer
    if env.sharded:
        sys.exit('sample_interval: a part of the network in each process (parallel=fsdp) writes nothing by itself; '
                 'use --sample_interval=0')
    if tokenizer is None:
        sys.exit(f'sample_interval: {data.folder} has no tokenizer; use --sample_interval=0')
    if data.kind and not prompts:
        return [first_prompt(data)]

    encoded = []
    for text in prompts.replace('\\n', '\n').split('|'):
        if not text:
            sys.exit(f'sample_prompts={prompts}: one of them is empty')
        unknown = tokenizer.unknown(text)
        if unknown:
            sys.exit(f'sample_prompts={prompts}: not in this vocabulary: {unknown[0]!r}')
        if data.kind:
            ids, _ = render([{'role': 'user', 'content': text}], tokenizer, reply=True)
        else:
            ids = tokenizer.encode(text)
        encoded.append((text, ids))
    return encoded


def first_prompt(data):
    """
    Return (text, ids) of the first validation document, or training document, up to where its first
    answer begins.
    """
    split = 'val' if data.splits['val'] else 'train'
    ids, is_answer = read_document(data, split, 0)
    if is_answer.any():
        ids = ids[:is_answer.argmax()]
    return data.tokenizer.decode(ids), ids


@torch.no_grad()
def show_samples(model, data, prompts, max_new_tokens, step, out_dir, env):
    """
    Print continuations of the prompts [(text, ids)] and add them to out_dir/samples.jsonl. The random
    numbers are the same at every step, so that samples of different steps can be compared.
    """
    model.eval()
    with env.ctx():
        prompt_ids = [ids for _, ids in prompts]
        *_, rows = continue_prompts(model, data.tokenizer, prompt_ids, max_new_tokens, seeds=range(len(prompts)),
                                    end_ids=end_ids(data.tokenizer), temperature=0.8, top_k=200)
    model.train()

    path = os.path.join(out_dir, 'samples.jsonl')
    samples = read_samples(path, step)
    for (prompt, _), row in zip(prompts, rows):
        separator = '\n' if data.kind else ''
        print(f'sample at step {step}: {prompt}{separator}{row.text()}', flush=True)
        samples.append({'step': step, 'prompt': prompt, 'text': row.text()})
    try:
        with atomic(path, 'w') as f:
            f.writelines(json.dumps(sample, ensure_ascii=False) + '\n' for sample in samples)
    except OSError as error:
        sys.exit(f'{path}: cannot be written: {error.strerror}')


def read_samples(path, step):
    """
    Return the samples of earlier steps. A resumed run may repeat steps whose samples are in the file
    already: those are dropped. At step 0 a new run begins, which replaces the file.
    """
    if not step or not os.path.exists(path):
        return []
    with open(path, encoding='utf-8') as f:
        samples = [json.loads(line) for line in f]
    return [sample for sample in samples if sample.get('step', step) < step]
