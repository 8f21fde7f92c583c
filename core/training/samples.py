"""What a network is trained on and what it writes meanwhile, shown as text."""
import json
import os
import sys

import torch

from core.files import atomic
from core.inference.generation import continue_prompts
from core.text.chat_template import answer_text, end_of_turn, render
from core.text.dataset import read_document


def show_batch(batch, tokenizer):
    """Print the first row of a batch: tokens X and targets Y (rows, T), and what else there may be. What is learned stands between ⟦ and ⟧."""
    tokens, counts = batch[0][0].tolist(), [False, *(batch[1][0] >= 0).tolist()]
    parts, begin = [], 0
    for i in range(1, len(tokens) + 1):
        if i == len(tokens) or counts[i] != counts[begin]:
            text = tokenizer.decode(tokens[begin:i])
            parts.append(f'⟦{text}⟧' if counts[begin] else text)
            begin = i
    print('a row of the first batch; what is learned stands between ⟦ and ⟧:\n' + ''.join(parts), flush=True)


def encode_prompts(prompts, data, run):
    """
    [(text, ids)] of texts to continue, separated by |; of conversations, of what a user says, or '' for the first prompt of the dataset. Ends the script with one
    line where they cannot be had.
    """
    tokenizer = data.tokenizer
    if tokenizer is None or run.sharded:
        sys.exit('sample_interval: ' + ('a part of the network in each process (parallel=fsdp) writes nothing by itself' if run.sharded else f'{data.folder} has no tokenizer') + '; use --sample_interval=0')
    if data.kind and not prompts:
        split = 'val' if data.splits['val'] else 'train'
        ids, counts = read_document(data, split, 0)
        ids = ids[:counts.argmax()] if counts.any() else ids  # up to where an answer begins
        return [(tokenizer.decode(ids), ids)]
    texts = prompts.replace('\\n', '\n').split('|')
    for text in texts:
        if tokenizer.unknown(text) or not text:
            sys.exit(f'sample_prompts={prompts}: ' + (f'not in this vocabulary: {tokenizer.unknown(text)[0]!r}' if text else 'one of them is empty'))
    return [(text, render([{'role': 'user', 'content': text}], tokenizer, reply=True)[0] if data.kind else tokenizer.encode(text)) for text in texts]


@torch.no_grad()
def show_samples(model, data, prompts, max_new_tokens, step, out_dir, run):
    """Print what the network makes of prompts [(text, ids)], always by the same random numbers, and add it to out_dir/samples.jsonl, where what a run wrote in steps that it has lost is dropped."""
    model.eval()
    with run.ctx():
        *_, rows = continue_prompts(model, data.tokenizer, [ids for _, ids in prompts], max_new_tokens, range(len(prompts)),
                                    end_ids=[end_of_turn(data.tokenizer)] if data.kind else [], temperature=0.8, top_k=200)
    model.train()
    path, samples = os.path.join(out_dir, 'samples.jsonl'), []
    if step and os.path.exists(path):
        with open(path, encoding='utf-8') as f:
            samples = [sample for sample in map(json.loads, f) if sample.get('step', step) < step]
    for (text, _), row in zip(prompts, rows):
        said = answer_text(data.tokenizer, row.ids) if data.kind else data.tokenizer.decode(row.ids)
        print(f'sample at step {step}: {text}' + '\n' * bool(data.kind) + said, flush=True)
        samples.append({'step': step, 'prompt': text, 'text': said})
    try:
        with atomic(path, 'w') as f:
            f.writelines(json.dumps(sample, ensure_ascii=False) + '\n' for sample in samples)
    except OSError as error:
        sys.exit(f'{path}: cannot be written: {error.strerror}')
