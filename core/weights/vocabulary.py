"""The vocabulary of a model: padded size, fitting to a dataset, resizing; the head of a reward model."""
import operator
import sys

import torch

from core.text.tokenizer import Tokenizer, has_tokenizer, load_tokenizer


def new_reward_head(model):
    """A head of one number, which starts at 0, in the place of that for the vocabulary."""
    model.config.reward = True
    model.lm_head = torch.nn.Linear(model.config.n_embd, 1, bias=False, device=model.lm_head.weight.device)
    torch.nn.init.zeros_(model.lm_head.weight)


def padded_vocab_size(vocab_size):
    """How many rows a network has for a vocabulary: above 4,096 ids a multiple of 64, which matrix units like."""
    return vocab_size if vocab_size <= 4096 else -(-vocab_size // 64) * 64


def fit_vocabulary(model, source, data, origin):
    """
    Make room in a network, as load_model returned it with its source, for the role tokens that a dataset's tokenizer has appended to its own. Returns how many rows
    of the vocabulary are still the network's own. Ends the script with one line where the two do not belong together.
    """
    known, ours, theirs = model.config.vocab_size, data.tokenizer, None
    if isinstance(source, str):
        theirs = load_tokenizer(source) if has_tokenizer(source) else None
    elif source.get('tokenizer'):
        theirs = Tokenizer(source['tokenizer'])
    if theirs and ours and theirs.json != ours.json:
        if not (all(map(operator.eq, ours.pieces, theirs.pieces)) if isinstance(source, str) else ours.extends(theirs)):  # Qwen2's has fewer tokens than Qwen3's, but the same
            sys.exit(f'dataset={data.folder} is cut into tokens by another tokenizer than the text that {origin} was trained on; prepare it with that one')
        known = min(known, theirs.vocab_size)
    grows = data.kind and data.vocab_size > known
    if grows:
        resize_vocabulary(model, known, max(padded_vocab_size(data.vocab_size), model.config.vocab_size))
    eot_on_top = ours is not None and ours.eot == data.vocab_size - 1  # nanoGPT's models have no row for it; a single text has none in it
    if data.vocab_size - eot_on_top > model.config.vocab_size:
        sys.exit(f'dataset={data.folder} has {data.vocab_size:,} token ids and {origin} only {model.config.vocab_size:,}; they need the same tokenizer')
    return known if grows else model.config.vocab_size


def resize_vocabulary(model, known, rows):
    """
    From now on a vocabulary of so many rows, of which the `known` first ones are as before, and the others start as the mean of these
    (Hewitt 2021: https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
    """
    for module in {model.transformer.wte, model.transformer.wte if model.config.reward else model.lm_head}:
        old = module.weight.detach()
        new = old[:known].mean(dim=0).repeat(rows, 1)
        new[:known] = old[:known]
        module.weight = torch.nn.Parameter(new)
    model.config.vocab_size = len(new)
    if model.config.tied and not model.config.reward:
        model.transformer.wte.weight = model.lm_head.weight
