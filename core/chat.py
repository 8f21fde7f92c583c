"""Conversations: as tokens, by the chat template that a model is taught, and answered by it."""
import numpy as np
import torch

from core.sampling import draw
from core.tokenizer import add_specials

ROLES = ('system', 'user', 'assistant')
START, END = '<|im_start|>', '<|im_end|>'  # ChatML, as Qwen writes it: <|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n...
HEADS = {role: f'{START}{role}\n' for role in ROLES}
JINJA = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")  # the same for transformers and llama.cpp


def chat_tokenizer(tokenizer):
    """
    A tokenizer that can write conversations: itself if it has ChatML's tokens (Qwen's has); else with four appended, each of which stands for the whole
    of what the template puts around a message: a vocabulary of characters may lack the letters of 'user', and a short context has no room for them.
    """
    return tokenizer if can_chat(tokenizer) else add_specials(tokenizer, [*HEADS.values(), f'{END}\n'])


def can_chat(tokenizer):
    """Whether it has the tokens of the chat template."""
    return START in tokenizer.specials or HEADS['user'] in tokenizer.specials


def template(tokenizer, text):
    """The ids of what the template puts around a message."""
    return tokenizer.encode(text, special=tokenizer.specials)


def end_of_turn(tokenizer):
    """The id that ends a message."""
    return int(template(tokenizer, f'{END}\n')[0])


def check(messages):
    """ValueError, saying what is wrong, unless these are messages [{'role': ..., 'content': text}, ...]."""
    if not isinstance(messages, list) or not messages:
        raise ValueError('expected a list of messages, at least one')
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get('content'), str):
            raise ValueError('a message: expected {"role": ..., "content": text}')
        if message.get('role') not in ROLES:
            raise ValueError(f'unknown role {message.get("role")!r}: expected {", ".join(ROLES[:-1])} or {ROLES[-1]}')


def render(messages, tokenizer, reply=False):
    """
    A conversation as ids (T,) int64 and its mask (T,) uint8: 1 on what the assistant says and on the token that ends it, which are what a model
    is to learn. reply: ends with the beginning of the assistant's next message. The names of special tokens in a message are ordinary text.
    """
    ids, mask = [], []
    for message in messages:
        head, said, end = template(tokenizer, HEADS[message['role']]), tokenizer.encode(message['content']), template(tokenizer, f'{END}\n')
        ids += [head, said, end]
        counts = message['role'] == 'assistant'
        mask += [0] * len(head) + [counts] * (len(said) + 1) + [0] * (len(end) - 1)
    if reply:
        ids.append(template(tokenizer, HEADS['assistant']))
        mask += [0] * len(ids[-1])
    return np.concatenate(ids), np.array(mask, dtype=np.uint8)


def answers(model, tokenizer, prompts, max_new_tokens, seeds, end=None, **choice):
    """
    Continue prompts, a list of ids each, all at once; yields after every token the rows so far, [[id, ...], ...]. A row is over with the token `end`, by
    default that of a turn; when all are, nothing more comes. seeds: an int or a list of ints for each row, which with the same prompt give the same answer
    whatever the other rows are (in float32). choice: temperature, top_k, top_p, min_p of core.sampling.draw. A prompt may not be longer than the context.
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
        return draw(logits, uniform, **choice)
    for new in model.generate(idx, max_new_tokens, choose, pads if pads.any() else None):
        for row, token in enumerate(new.tolist()):
            if not over[row]:
                rows[row].append(token)
                over[row] = token == end
        yield rows
        if all(over):
            return


def text_of(tokenizer, ids):
    """What an answer says: up to the end of the turn, without a character that is not finished yet."""
    end = end_of_turn(tokenizer)
    return tokenizer.decode(ids[:ids.index(end)] if end in ids else ids).rstrip('\ufffd')
