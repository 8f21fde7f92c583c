"""The vocabulary of a model: padded size, fitting it to a dataset, resizing it; the head of a reward model."""
import math
import sys

import torch

from core.text.tokenizer import Tokenizer, has_tokenizer, load_tokenizer


def new_reward_head(model):
    """Replace the head for the vocabulary with one that outputs a single number. Its weights start at 0."""
    model.config.reward = True
    model.lm_head = torch.nn.Linear(model.config.n_embd, 1, bias=False, device=model.lm_head.weight.device)
    torch.nn.init.zeros_(model.lm_head.weight)


def padded_vocab_size(vocab_size):
    """
    Return the number of embedding rows for a vocabulary: above 4,096 ids a multiple of 64, which matrix units like.
    """
    if vocab_size <= 4096:
        return vocab_size
    return math.ceil(vocab_size / 64) * 64


def own_tokenizer(source):
    """Return the tokenizer that came with the weights, or None. source: as load_model() returned it."""
    if 'folder' in source:
        return load_tokenizer(source['folder']) if has_tokenizer(source['folder']) else None
    return Tokenizer(source['tokenizer']) if source.get('tokenizer') else None


def fit_vocabulary(model, source, data, origin):
    """
    Grow the embedding if the dataset's tokenizer adds role tokens to the model's own.

    source: as load_model() returned it, or {} for a new model; origin: the name of the weights in messages.
    Returns the number of embedding rows that came with the weights. Exits if the dataset was cut into tokens by
    another tokenizer.
    """
    base_vocab_size = model.config.vocab_size
    tok = data.tokenizer
    base_tok = own_tokenizer(source)
    if base_tok and tok and base_tok.json != tok.json:
        if 'folder' in source:  # common ids must be equal: Qwen2's tokenizer has fewer than Qwen3's, but the same ones
            compatible = all(a == b for a, b in zip(tok.pieces, base_tok.pieces))
        else:
            compatible = tok.extends(base_tok)
        if not compatible:
            sys.exit(f'dataset={data.folder} is cut into tokens by another tokenizer ({tok.vocab_size:,} ids) than the '
                     f'text that {origin} was trained on ({base_tok.vocab_size:,} ids); prepare it with that one')
        base_vocab_size = min(base_vocab_size, base_tok.vocab_size)

    grows = data.kind and data.vocab_size > base_vocab_size
    if grows and data.kind in ('pairs', 'prompts'):
        print(f'warning: {origin} has no role tokens, so it has not learned to answer; instruction-tune it first')
    if grows:
        rows = max(padded_vocab_size(data.vocab_size), model.config.vocab_size)
        resize_vocabulary(model, base_vocab_size, rows)

    needed = data.vocab_size
    if tok is not None and tok.eot == data.vocab_size - 1:
        needed -= 1  # nanoGPT's models have no row for end-of-text; a dataset of one text never contains it
    if needed > model.config.vocab_size:
        sys.exit(f'dataset={data.folder} has {data.vocab_size:,} token ids and {origin} only '
                 f'{model.config.vocab_size:,}; they need the same tokenizer')
    return base_vocab_size if grows else model.config.vocab_size


def resize_vocabulary(model, keep, rows):
    """
    Resize embedding and head to `rows` rows. The first `keep` rows stay; the others start as the mean of these
    (Hewitt 2021: https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
    """
    modules = {model.transformer.wte}
    if not model.config.reward:
        modules.add(model.lm_head)
    for module in modules:
        old = module.weight.detach()
        new = old[:keep].mean(dim=0).repeat(rows, 1)
        new[:keep] = old[:keep]
        module.weight = torch.nn.Parameter(new)
    model.config.vocab_size = rows
    if model.config.tied and not model.config.reward:
        model.transformer.wte.weight = model.lm_head.weight
