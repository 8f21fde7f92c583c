"""
The sampling loop: continue a batch of prompts token by token. Used by sample.py, chat.py, the server, the samples of a
training run, GRPO and lm-evaluation-harness.
"""
import math

import numpy as np
import torch

TOP_P_CANDIDATES = 1000  # this many of the most likely tokens nearly always reach top_p; sorting all is 25 times slower
STEPS_AT_ONCE = 16  # steps that a GPU computes before their tokens are read; up to 15 are in vain when all rows end
NUMBERS_AT_ONCE = 256  # random numbers that are drawn for each row at a time


def continue_prompts(model, tokenizer, prompts, max_new_tokens, seeds, copies=1, end_ids=(), stop_texts=(),
                     with_logprobs=False, top_logprobs=0, repetition_penalty=1.0, presence_penalty=0.0,
                     frequency_penalty=0.0, **sampling):
    """
    Continue prompts in one batch. After every token, yield the rows: a list of len(prompts) * copies Continuations, the
    copies of a prompt side by side. Stops when every row has a finish_reason. On a GPU, tokens come in blocks of 1, 2,
    4, ..., STEPS_AT_ONCE, because to read one waits for all that the GPU has to do.

    prompts: lists or arrays of token ids; each is cut to its last block_size ids and prefilled once for all copies.
    seeds: an int or a list of ints for each row. In float32 the same seed and prompt give the same text, whatever the
        other rows are.
    end_ids, stop_texts: token ids and texts that end a row; they are not part of its text.
    with_logprobs: also collect the log-probability of each token under the model, before temperature and penalties,
        and those of the `top_logprobs` most likely tokens at its place.
    repetition_penalty: of penalise_repetition(); the tokens of the prompt and the generated ones have occurred.
    presence_penalty, frequency_penalty: OpenAI's. The logit of a token is lowered by the first if it has been
        generated, and by the second for each time. The prompt does not count, as in vLLM.
    sampling: temperature, top_k, top_p and min_p of sample_token().

    Raises FloatingPointError if the logits are not finite.
    """
    device = model.transformer.wte.weight.device
    vocab_size = min(model.config.vocab_size, tokenizer.vocab_size)  # the model's may be padded
    rows = [Continuation(tokenizer, max_new_tokens, end_ids, stop_texts) for _ in range(len(prompts) * copies)]
    uniforms = uniform_numbers(seeds, device)
    seen = None
    if repetition_penalty != 1:
        seen = occurring_tokens(prompts, vocab_size).repeat_interleave(copies, dim=0).to(device)

    counts = None  # how often each token has been generated (rows, V)
    if presence_penalty or frequency_penalty:
        counts = torch.zeros(len(rows), vocab_size, device=device)

    may_follow, next_state = (torch.from_numpy(table).to(device) for table in tokenizer.utf8_states)
    forbidden = ~may_follow[:, :vocab_size]  # (states, V)
    state = torch.zeros(len(rows), dtype=torch.int64, device=device)
    steps = []  # what is still to be read: (rows, 2 or more) of each step, float32, which holds any token id

    def next_tokens(logits):  # (rows, V) -> (rows,); nothing here waits for a GPU
        nonlocal state
        logits = model_logits = logits[:, :vocab_size]
        if seen is not None:
            logits = penalise_repetition(logits, seen, repetition_penalty)
        if counts is not None:
            logits = logits - presence_penalty * (counts > 0) - frequency_penalty * counts
        if not tokenizer.is_char:  # only tokens that keep the text valid UTF-8
            logits = logits.masked_fill(forbidden[state], float('-inf'))
        tokens = sample_token(logits, next(uniforms), **sampling)
        if not tokenizer.is_char:
            state = next_state[state, tokens].long()
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        if counts is not None:
            counts.scatter_add_(1, tokens[:, None], counts.new_ones(len(rows), 1))
        columns = [tokens[:, None], model_logits.sum(dim=1, keepdim=True)]
        if with_logprobs:
            logprobs = model_logits.log_softmax(dim=-1)
            columns += [logprobs.gather(1, tokens[:, None]), *logprobs.topk(min(top_logprobs, vocab_size))]
        steps.append(torch.cat(columns, dim=1))
        return tokens

    idx, pads = left_pad(prompts, device)
    at_once = 1
    for i, _ in enumerate(model.generate(idx, max_new_tokens, next_tokens, pads, copies), 1):
        if len(steps) < at_once and i < max_new_tokens:
            continue
        for step in torch.stack(steps).tolist():
            if not all(math.isfinite(total) for _, total, *_ in step):  # a NaN or an infinity makes the sum one
                raise FloatingPointError("the model's output is not finite: its weights are damaged or have diverged, "
                                         'or its dtype has too small a range (try --dtype=float32)')
            for row, (token, _, *logprobs) in zip(rows, step):
                if not row.finish_reason:
                    row.append(int(token), logprobs)
            yield rows
            if all(row.finish_reason for row in rows):
                return
        steps.clear()
        if is_gpu(device):
            at_once = min(2 * at_once, STEPS_AT_ONCE)


def is_gpu(device):
    """Return whether the host waits when it reads what the device has computed."""
    return device.type != 'cpu'


def uniform_numbers(seeds, device):
    """Yield numbers in [0, 1) (len(seeds), 1), float32, without end. A row of them depends on its own seed only."""
    rngs = [np.random.default_rng(seed) for seed in seeds]
    while True:
        numbers = np.stack([rng.random(NUMBERS_AT_ONCE, dtype=np.float32) for rng in rngs])
        numbers = torch.from_numpy(numbers).to(device)
        yield from (numbers[:, i:i + 1] for i in range(NUMBERS_AT_ONCE))


class Continuation:
    """
    The continuation of one prompt: its `ids`, their `logprobs` and `top_logprobs` [[(id, logprob)]] (if asked for) and
    its `finish_reason`, None until it ends: 'end' (the last id is an end id), 'stop' (it has a stop text) or 'length'.
    """

    def __init__(self, tokenizer, max_new_tokens, end_ids, stop_texts):
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.end_ids = end_ids
        self.stop_texts = stop_texts
        self.longest_stop = max(map(len, stop_texts), default=0)
        self.ids = []
        self.logprobs = []
        self.top_logprobs = []
        self.finish_reason = None
        self.n_returned = 0  # characters that new_text() has returned

    def append(self, token, logprobs=()):
        """
        Add a token id, and set finish_reason if it is the last one. logprobs: nothing, or its log-probability, those
        of the most likely tokens, and their ids.
        """
        self.ids.append(token)
        if logprobs:
            logprob, *best = logprobs
            n = len(best) // 2
            self.logprobs.append(logprob)
            self.top_logprobs.append([*zip(map(int, best[n:]), best[:n])])
        if token in self.end_ids:
            self.finish_reason = 'end'
        elif self.stop_texts and self._ends_with_stop_text():
            self.finish_reason = 'stop'
        elif len(self.ids) == self.max_new_tokens:
            self.finish_reason = 'length'

    def _ends_with_stop_text(self):
        n = 4 * self.longest_stop  # a character has at most 4 bytes, a token at least 1
        tail = self.tokenizer.decode(self.ids[-n:])
        return any(stop in tail for stop in self.stop_texts)

    def text(self):
        """Return the text so far, without the end token, stop text and what follows it, or an unfinished character."""
        ids = self.ids[:-1] if self.finish_reason == 'end' else self.ids
        text = self.tokenizer.decode(ids).rstrip('\ufffd')
        stops = [text.index(stop) for stop in self.stop_texts if stop in text]
        return text[:min(stops)] if stops else text

    def new_text(self):
        """Return the text since the last call. Holds back characters that may be the beginning of a stop text."""
        text = self.text()
        n = len(text)
        if not self.finish_reason:
            n = max(self.n_returned, n - max(0, self.longest_stop - 1))
        new = text[self.n_returned:n]
        self.n_returned = n
        return new


def left_pad(prompts, device):
    """Stack prompts of different lengths. Returns token ids (B, longest) and paddings (B,), None if there are none."""
    longest = max(map(len, prompts))
    pads = [longest - len(ids) for ids in prompts]
    idx = torch.tensor(np.stack([np.pad(ids, (longest - len(ids), 0)) for ids in prompts]))
    return idx.to(device), torch.tensor(pads, device=device) if any(pads) else None


def occurring_tokens(prompts, vocab_size):
    """Return which tokens occur in each prompt, (B, vocab_size) bool."""
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
    for row, ids in zip(seen, prompts):
        row[ids] = True
    return seen


def penalise_repetition(logits, seen, penalty):
    """
    Make tokens that have occurred less likely (CTRL, Keskar et al. 2019: https://arxiv.org/abs/1909.05858).
    logits (B, V); seen (B, V) bool.
    """
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalised, logits)


def sample_token(logits, uniform, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """
    Sample one token (B,) for each row of logits (B, V): invert the cumulative distribution at `uniform` (B, 1), float32
    in [0, 1). The same number gives the same token, whatever the other rows are. Settings as in `transformers`:

    temperature: divides the logits; 0 takes the most likely token.
    top_k: only the k most likely tokens; 0 means all.
    top_p: only the smallest set with this probability (Holtzman et al. 2019: https://arxiv.org/abs/1904.09751).
    min_p: only tokens with at least this share of the largest probability
        (Nguyen et al. 2024: https://arxiv.org/abs/2407.01082).
    """
    if temperature < 1e-5:
        return logits.argmax(dim=-1)
    vocab_size = logits.size(1)
    probs = (logits / temperature).softmax(dim=-1)  # (B, V)
    tokens = None  # the token of each column of probs; None: column i is token i
    if 0 < top_k < vocab_size or top_p < 1:
        all_probs = probs
        few = top_k or not is_gpu(probs.device)  # a GPU sorts quickly, and to ask whether few are enough is to wait
        if few:
            probs, tokens = all_probs.topk(min(top_k or TOP_P_CANDIDATES, vocab_size))  # (B, n), in descending order
        if not few or not top_k and probs.sum(dim=-1).min() < top_p:
            probs, tokens = all_probs.sort(descending=True)
    if top_p < 1:
        before = probs.cumsum(dim=-1) - probs
        total = probs.sum(dim=-1, keepdim=True) if top_k else 1
        probs = probs.masked_fill(before > top_p * total, 0.0)  # the tokens before already reach top_p
    if min_p > 0:
        probs = probs.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), 0.0)
    cumulative = probs.cumsum(dim=-1)  # (B, n)
    column = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)  # (B, 1)
    column.clamp_(max=probs.size(1) - 1)  # NaNs have no place
    if tokens is None:
        return column.squeeze(1)
    return tokens.gather(1, column).squeeze(1)
