"""The likelihood of given texts under a model: multiple-choice questions, and tasks of lm-evaluation-harness."""
import json
import os
import re
import sys

import torch
from torch.nn import functional as F
from tqdm import tqdm

from core.inference.generation import continue_prompts

CHOICES_FORMAT = '{"ctx": text, "endings": [texts], "label": number}'


@torch.no_grad()
def log_likelihoods(model, pairs, batch_size=8):
    """
    Return (log-probability in nats, whether each token was the most likely one) of the continuation of each pair
    (context ids, continuation ids). A context that does not fit loses its beginning, and so does a continuation, with a
    warning.
    """
    device, block_size = next(model.parameters()).device, model.config.block_size
    rows = [([*context, *continuation][-block_size - 1:], len(continuation)) for context, continuation in pairs]
    n_cut = sum(length > block_size for _, length in rows)
    if n_cut:
        print(f'warning: of {n_cut:,} continuations only the last {block_size:,} tokens count, '
              'the context of this network', file=sys.stderr)
    results = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))  # rows of similar length in one batch
    for start in tqdm(range(0, len(order), batch_size), disable=None, leave=False):
        batch = order[start:start + batch_size]
        longest = len(rows[batch[0]][0]) - 1
        idx = torch.zeros(len(batch), longest, dtype=torch.int64)
        targets = torch.full((len(batch), longest), -1)
        for i, index in enumerate(batch):
            ids, length = rows[index]
            n = len(ids) - 1
            length = min(length, n)
            idx[i, :n] = torch.tensor(ids[:-1])
            targets[i, n - length:n] = torch.tensor(ids[n + 1 - length:])
        idx, targets = idx.to(device), targets.to(device)
        logits = model(idx).float()  # (B, T, V)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction='none')
        nats = losses.view(targets.shape).sum(dim=1)
        greedy = ((logits.argmax(dim=-1) == targets) | (targets == -1)).all(dim=1)
        for index, loss, is_greedy in zip(batch, nats.tolist(), greedy.tolist()):
            results[index] = -loss, is_greedy
    return results


def read_choices(path, limit=0):
    """
    Read questions in HellaSwag's format (https://github.com/rowanz/hellaswag), one JSON object per line: 'ctx',
    'endings' and 'label', the index of the right ending. HellaSwag's own also have an 'activity_label'; these are put
    together and cleaned as in lm-evaluation-harness. Returns [(context, endings, label)]. Exits on any other file.
    """
    questions = []
    number = 0
    try:
        with open(path, encoding='utf-8-sig') as f:
            for number, line in enumerate(f, 1):  # noqa: B007 (the message below says which line)
                if line.strip():
                    questions.append(parse_question(json.loads(line)))
                if limit and len(questions) == limit:
                    break
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f'{path}: cannot be read: {error}')
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        sys.exit(f'{path}, line {number}: expected {CHOICES_FORMAT}: {type(error).__name__}: {error}')
    if not questions:
        sys.exit(f'{path}: no questions in it; expected a line {CHOICES_FORMAT} for each')
    return questions


def parse_question(item):
    """Return (context, endings, label) of a question. Raises ValueError, KeyError, TypeError or AttributeError."""
    def clean(text):
        return re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. ')).replace('  ', ' ')

    if 'activity_label' in item:
        item['ctx'] = clean(f'{item["activity_label"]}: {item["ctx_a"]} {item["ctx_b"].capitalize()}')
        item['endings'] = [clean(ending) for ending in item['endings']]
    context, endings, label = item['ctx'], item['endings'], int(item['label'])
    if not isinstance(endings, list) or not all(text and isinstance(text, str) for text in [context, *endings]):
        raise ValueError('an empty text, something else than text, or endings that are no list')
    if not 0 <= label < len(endings):
        raise ValueError(f'label {item["label"]} of {len(endings)} endings')
    return context, endings, label


def multiple_choice(model, tokenizer, questions, delimiter=' ', batch_size=8):
    """
    Return the accuracies (acc, acc_norm) on questions (context, endings, label), as lm-evaluation-harness defines them:
    the chosen ending has the highest log-probability, or the highest one per character. If the end of the context and
    the beginning of an ending become one token, that end is counted with every ending.
    """
    pairs = []
    for context, endings, _ in questions:
        context_ids = tokenizer.encode(context).tolist()
        full_ids = [tokenizer.encode(context + delimiter + ending).tolist() for ending in endings]
        n_shared = len(os.path.commonprefix([context_ids, *full_ids]))
        pairs += [(ids[:n_shared], ids[n_shared:]) for ids in full_ids]
    results = iter(log_likelihoods(model, pairs, batch_size))
    right = right_norm = 0
    for _, endings, label in questions:
        scores = [next(results)[0] for _ in endings]
        scores_norm = [score / len(ending) for score, ending in zip(scores, endings)]
        if scores.index(max(scores)) == label:
            right += 1
        if scores_norm.index(max(scores_norm)) == label:
            right_norm += 1
    return right / len(questions), right_norm / len(questions)


def harness(model, tokenizer, tasks, folder='', limit=0, batch_size=8):
    """
    Evaluate tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), also of a folder
    of .yaml files. Returns its results.
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
            pairs = [(context, continuation) for _, context, continuation in requests]
            return log_likelihoods(model, pairs, batch_size)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            totals, T = [], model.config.block_size
            for request in requests:
                ids = [self.eot_token_id, *self.tok_encode(request.args[0])]
                pairs = [(ids[i - 1:i], ids[i:i + T]) for i in range(1, len(ids), T)]
                totals.append(sum(score for score, _ in log_likelihoods(model, pairs, batch_size)))
            return totals

        def generate_until(self, requests, disable_tqdm=False):
            texts = []
            for text, options in (request.args for request in requests):
                until = options.get('until') or []
                prompt = self.tok_encode(text) or [self.eot_token_id]
                *_, (row,) = continue_prompts(
                    model, tokenizer, [prompt], options.get('max_gen_toks', 256), seeds=[0], temperature=0,
                    end_ids=[tokenizer.eot], stop_texts=[until] if isinstance(until, str) else until)
                texts.append(row.text())
            return texts

    manager = TaskManager(include_path=folder or None)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    names = ','.join(tasks)
    if unknown:
        sys.exit(f'lm_eval={names}: no task named {", ".join(unknown)} (lm_eval ls tasks lists them)')
    try:
        return simple_evaluate(model=Network(), tasks=tasks, task_manager=manager, limit=limit or None)
    except OSError as error:  # the hub's libraries raise it without a network, and for a dataset that does not exist
        reason = ' '.join(str(error).split())[:200]
        sys.exit(f'lm_eval={names}: its data cannot be had: {type(error).__name__}: {reason}')
