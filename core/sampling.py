"""Which token comes next: from logits to a choice."""
import torch

CANDIDATES = 1000  # so many of the most likely tokens nearly always hold what top_p asks for; sorting a whole vocabulary takes 25 times as long


def penalise(logits, seen, penalty):
    """Make tokens that have occurred less likely (CTRL, Keskar et al. 2019: https://arxiv.org/abs/1909.05858): logits (B, V), seen (B, V) bool."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def draw(logits, uniform, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
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
