"""Which token comes next: from logits to a choice."""
import numpy as np
import torch

from core.text.chat_template import end_of_turn

CANDIDATES = 1000  # so many of the most likely tokens nearly always hold what top_p asks for; sorting a whole vocabulary takes 25 times as long


def penalise_repetition(logits, seen, penalty):
    """Make tokens that have occurred less likely (CTRL, Keskar et al. 2019: https://arxiv.org/abs/1909.05858): logits (B, V), seen (B, V) bool."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample_token(logits, uniform, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """
    One token for each row (B,) of logits (B, V), by a number of `uniform` (B, 1) in float32, at least 0 and below 1: the same number, the same token,
    whatever the other rows are. temperature 0: the most likely one. Then, as `transformers` has it, top_k: of the k most likely only; top_p: of the
    smallest set with so much probability (Holtzman et al. 2019: https://arxiv.org/abs/1904.09751); min_p: of those with so much of the most likely
    one's (Nguyen et al. 2024: https://arxiv.org/abs/2407.01082).
    """
    if temperature < 1e-5:
        return logits.argmax(dim=-1)
    probs, tokens = (logits / temperature).softmax(dim=-1), None  # (B, V)
    if 0 < top_k < logits.size(1) or top_p < 1:
        whole, (probs, tokens) = probs, probs.topk(min(top_k or CANDIDATES, logits.size(1)))  # (B, n), in descending order
        if not top_k and probs.sum(dim=-1).min() < top_p:
            probs, tokens = whole.sort(descending=True)
    if top_p < 1:
        before = probs.cumsum(dim=-1) - probs
        probs = probs.masked_fill(before > top_p * (probs.sum(dim=-1, keepdim=True) if top_k else 1), 0.0)  # those before already have top_p
    if min_p > 0:
        probs = probs.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), 0.0)
    reached = probs.cumsum(dim=-1)  # (B, n)
    place = torch.searchsorted(reached, uniform * reached[:, -1:], right=True)  # (B, 1)
    return (place if tokens is None else tokens.gather(1, place)).squeeze(1)


def generate_answers(model, tokenizer, prompts, max_new_tokens, seeds, end=None, **choice):
    """
    Continue prompts, a list of ids each, all at once; yields after every token the rows so far, [[id, ...], ...]. A row is over with the token `end`, by
    default that of a turn; when all are, nothing more comes. seeds: an int or a list of ints for each row, which with the same prompt give the same answer
    whatever the other rows are (in float32). choice: temperature, top_k, top_p, min_p of core.inference.generation.draw. A prompt may not be longer than the context.
    """
    end = end_of_turn(tokenizer) if end is None else end
    device, known = model.transformer.wte.weight.device, min(model.config.vocab_size, tokenizer.vocab_size)
    longest = max(map(len, prompts))
    pads = torch.tensor([longest - len(ids) for ids in prompts], device=device)
    idx = torch.tensor(np.stack([np.pad(ids, (longest - len(ids), 0)) for ids in prompts]), device=device)  # (B, longest)
    chance = [np.random.default_rng(seed) for seed in seeds]
    rows, over = [[] for _ in prompts], [False] * len(prompts)

    def choose(logits):
        logits = logits[:, :known]
        if not tokenizer.is_char:  # those that leave its bytes valid UTF-8
            allowed = torch.from_numpy(np.stack([tokenizer.can_follow(ids) for ids in rows])[:, :known])
            logits = logits.masked_fill(~allowed.to(device), float('-inf'))
        uniform = torch.from_numpy(np.stack([draws.random(1, dtype=np.float32) for draws in chance])).to(device)  # (B, 1)
        return sample_token(logits, uniform, **choice)
    for new in model.generate(idx, max_new_tokens, choose, pads if pads.any() else None):
        for row, token in enumerate(new.tolist()):
            if not over[row]:
                rows[row].append(token)
                over[row] = token == end
        yield rows
        if all(over):
            return
