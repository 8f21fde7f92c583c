"""How probable a network finds given texts: answers to choose from, and the tasks of lm-evaluation-harness."""
import json
import os
import re
import sys

import torch
from torch.nn import functional as F
from tqdm import tqdm


@torch.no_grad()
def log_likelihoods(model, pairs, batch_size=8):
    """
    Of pairs [(context ids, continuation ids), ...] the log-probability of each continuation in nats, and whether each of its tokens was the most
    likely one: [(float, bool), ...]. A context that does not fit loses its beginning; so does, with a warning, a continuation.
    """
    device, block_size = model.transformer.wte.weight.device, model.config.block_size
    rows = [([*context, *continuation][-block_size - 1:], len(continuation)) for context, continuation in pairs]
    longer = sum(told > block_size for _, told in rows)
    if longer:
        print(f'warning: of {longer:,} continuations only the last {block_size:,} tokens count, the context of this network', file=sys.stderr)
    found = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))  # rows of about one length stand together
    for at in tqdm(range(0, len(order), batch_size), disable=None, leave=False):
        some = order[at:at + batch_size]
        longest = len(rows[some[0]][0]) - 1
        idx, targets = torch.zeros(len(some), longest, dtype=torch.int64), torch.full((len(some), longest), -1)
        for i, (row, told) in zip(range(len(some)), (rows[i] for i in some)):
            idx[i, :len(row) - 1] = torch.tensor(row[:-1])
            targets[i, max(0, len(row) - 1 - told):len(row) - 1] = torch.tensor(row[max(1, len(row) - told):])
        idx, targets = idx.to(device), targets.to(device)
        logits = model(idx).float()  # (B, T, V)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction='none').view(targets.shape)
        greedy = ((logits.argmax(dim=-1) == targets) | (targets == -1)).all(dim=1)
        for i, loss, best in zip(some, losses.sum(dim=1).tolist(), greedy.tolist()):
            found[i] = -loss, best
    return found


def read_choices(path, limit=0):
    """
    Questions in HellaSwag's format, a line of JSON each (https://github.com/rowanz/hellaswag): 'ctx', 'endings', 'label' (which of them is right).
    HellaSwag's own also say what they are about, 'activity_label'; these are put together and cleaned as lm-evaluation-harness does it.
    Ends the script with one line where the file is something else.
    """
    def clean(text):
        return re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. ')).replace('  ', ' ')

    questions = []
    try:
        with open(path, encoding='utf-8-sig') as f:
            for number, line in enumerate(f, 1):  # noqa: B007  # the error below says which line
                if line.strip():
                    item = json.loads(line)
                    if 'activity_label' in item:
                        item['ctx'] = clean(f'{item["activity_label"]}: {item["ctx_a"]} {item["ctx_b"].capitalize()}')
                        item['endings'] = [clean(ending) for ending in item['endings']]
                    questions.append((item['ctx'], item['endings'], int(item['label'])))
                    if not isinstance(item['endings'], list) or not all(text and isinstance(text, str) for text in [item['ctx'], *item['endings']]):
                        raise ValueError('an empty text, something else than text, or endings that are no list')
                    if not 0 <= questions[-1][2] < len(item['endings']):
                        raise ValueError(f'label {item["label"]} of {len(item["endings"])} endings')
                if limit and len(questions) == limit:
                    break
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f'{path}: cannot be read: {error}')
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        sys.exit(f'{path}, line {number}: expected {{"ctx": text, "endings": [texts], "label": number}}: {type(error).__name__}: {error}')
    if not questions:
        sys.exit(f'{path}: no questions in it; expected a line {{"ctx": text, "endings": [texts], "label": number}} for each')
    return questions


def multiple_choice(model, tokenizer, questions, delimiter=' ', batch_size=8):
    """
    The shares of questions (context, endings, label) whose right ending is the most probable one, (acc, acc_norm), as lm-evaluation-harness defines them:
    by the log-probability of the whole ending, and by this over its length in characters. Where the end of the context and the beginning of one of
    the endings are one token, that end counts with all of them.
    """
    pairs = []
    for context, endings, _ in questions:
        known, *whole = (tokenizer.encode(text).tolist() for text in (context, *(context + delimiter + ending for ending in endings)))
        shared = len(os.path.commonprefix([known, *whole]))
        pairs += [(ids[:shared], ids[shared:]) for ids in whole]
    scores, right = iter(log_likelihoods(model, pairs, batch_size)), [0, 0]
    for _, endings, label in questions:
        found = [next(scores)[0] for _ in endings]
        by_length = [score / len(ending) for score, ending in zip(found, endings)]
        right = [n + (max(range(len(endings)), key=by.__getitem__) == label) for n, by in zip(right, (found, by_length))]
    return tuple(n / len(questions) for n in right)


def harness(model, tokenizer, tasks, folder='', limit=0, batch_size=8):
    """
    Evaluate tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), its own ones and those of a folder. Returns its results.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.api.model import TemplateLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        sys.exit('lm_eval needs lm-evaluation-harness: pip install lm_eval')

    class Network(TemplateLM):
        eot_token_id = 0 if tokenizer.eot is None else tokenizer.eot

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return tokenizer.encode(string).tolist()

        def _loglikelihood_tokens(self, requests, **kwargs):
            return log_likelihoods(model, [(context, continuation) for _, context, continuation in requests], batch_size)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            totals, T = [], model.config.block_size
            for request in requests:
                ids = [self.eot_token_id, *self.tok_encode(request.args[0])]
                pieces = [(ids[max(0, i - 1):i], ids[i:i + T]) for i in range(1, len(ids), T)]
                totals.append(sum(score for score, _ in log_likelihoods(model, pieces, batch_size)))
            return totals

        def generate_until(self, requests, disable_tqdm=False):
            texts, device = [], model.transformer.wte.weight.device
            for text, options in (request.args for request in requests):
                stops, ids, found = [options['until']] if isinstance(options.get('until'), str) else options.get('until') or [], [], ''
                prompt = self.tok_encode(text) or [self.eot_token_id]
                for token in model.generate(torch.tensor([prompt], device=device), options.get('max_gen_toks', 256), lambda logits: logits[:, :tokenizer.vocab_size].argmax(dim=-1)):
                    ids.append(token.item())
                    found = tokenizer.decode(ids[:-1] if ids[-1] == tokenizer.eot else ids)
                    if ids[-1] == tokenizer.eot or any(stop in found for stop in stops):
                        break
                texts.append(found[:min([found.index(stop) for stop in stops if stop in found], default=None)])
            return texts

    manager = TaskManager(include_path=folder or None)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        sys.exit(f'lm_eval={",".join(tasks)}: no task named {", ".join(unknown)} (lm_eval ls tasks lists them)')
    try:
        return simple_evaluate(model=Network(), tasks=tasks, task_manager=manager, limit=limit or None)
    except OSError as error:  # what the hub's libraries raise without a network, and for a dataset that is not there
        sys.exit(f'lm_eval={",".join(tasks)}: its data cannot be had: {type(error).__name__}: {" ".join(str(error).split())[:200]}')
