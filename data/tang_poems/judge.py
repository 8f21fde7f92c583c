"""
Judge the poems that a model writes for titles which no stage was trained on: how many are well formed,
how many are in verses of five characters, and whether they are still as long and as varied as before.

    python data/tang_poems/judge.py --out_dir=out-poems-dpo --reference=out-poems-sft --out=journey.jsonl
"""
import json
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), '..', '..')))  # the repository: for core/

import core.startup  # noqa: F401  first: it catches Ctrl-C and missing packages in the imports below

import numpy as np
from poems import five_characters, messages_of, well_formed

from core.device import setup
from core.inference.generation import continue_prompts
from core.text.chat_template import answer_text, can_chat, end_of_turn, render
from core.text.dataset import open_dataset
from core.weights.checkpoint import load_model, refuse_reward_model, source_tokenizer

# -----------------------------------------------------------------------------
out_dir = 'out-poems-sft'  # the run to judge
reference = ''  # another run to compare with
title = '春夜喜雨'  # of the poem that is shown
titles = 200  # how many of the held-out titles to write a poem for
temperature = 0.8  # sampling temperature
max_new_tokens = 200  # maximum length of a poem
seed = 1337  # of sampling
batch_size = 100  # poems written at once
out = ''  # a .jsonl file to which the numbers of each model are added
device = 'auto'  # cuda, then mps, then cpu, whichever there is
dtype = 'auto'  # bfloat16 where the hardware multiplies it, else float32
# -----------------------------------------------------------------------------
exec(open(os.path.join(sys.path[0], 'configurator.py'), encoding='utf-8').read())
if min(titles, max_new_tokens, batch_size) < 1:
    sys.exit(f'titles={titles}, max_new_tokens={max_new_tokens}, batch_size={batch_size}: expected at least 1')
env = setup(device, dtype, seed=seed, training=True)  # in the precision of training


def held_out_titles(n):
    """Return the first n validation prompts: the second line of '<|im_start|>user\\ntitle<|im_end|>...'."""
    data = open_dataset('tang_poems/prompts')
    tokens = np.fromfile(data.files['val'][0][0], data.dtype)
    starts = data.starts['val']
    texts = [data.tokenizer.decode(tokens[begin:end]) for begin, end in zip(starts, starts[1:n + 1])]
    return [text.split('\n')[1].removesuffix('<|im_end|>') for text in texts]


def write_poems(model, tok, subjects):
    """Return [(poem, whether it ended before max_new_tokens)] for these titles."""
    prompts = [render(messages_of(subject), tok, reply=True)[0] for subject in subjects]
    poems = []
    for i in range(0, len(prompts), batch_size):
        batch = prompts[i:i + batch_size]
        seeds = [[seed, i + j] for j in range(len(batch))]
        with env.ctx():
            *_, rows = continue_prompts(model, tok, batch, max_new_tokens, seeds,
                                        end_ids=[end_of_turn(tok)], temperature=temperature)
        poems += [(answer_text(tok, row.ids), row.ids[-1] == end_of_turn(tok)) for row in rows]
    return poems


def judge(path, subjects):
    """Print the poem of a run for `title`, and return the numbers of its poems for `subjects`."""
    model, source = load_model(path)
    refuse_reward_model(model, path)
    tok = source_tokenizer(source)
    if not can_chat(tok):
        sys.exit(f'out_dir={path}: this model knows no conversations; judge one that was instruction-tuned')
    model = model.to(env.device).eval()
    (shown, _), *poems = write_poems(model, tok, [title, *subjects])
    print(f'{title}, by {path}:\n{shown}\n', flush=True)

    n = len(poems)
    bigrams = [text[i:i + 2] for text, _ in poems for i in range(len(text) - 1)]
    return {'run': path, 'titles': n,
            'well_formed': sum(well_formed(*poem) for poem in poems) / n,
            'five_characters': sum(five_characters(*poem) for poem in poems) / n,
            'characters': sum(len(text) for text, _ in poems) / n,
            'distinct_2': len(set(bigrams)) / max(1, len(bigrams)),
            'poem': shown}


subjects = held_out_titles(titles)
numbers = [judge(path, subjects) for path in (reference, out_dir) if path]
print(f'{f"of {len(subjects)} held-out titles":24} well-formed  five characters  characters a poem  distinct 2-grams')
for row in numbers:
    print(f'{row["run"]:24} {row["well_formed"]:11.1%}  {row["five_characters"]:15.1%}  '
          f'{row["characters"]:17.1f}  {row["distinct_2"]:16.3f}')
if out:
    try:
        with open(os.path.expanduser(out), 'a', encoding='utf-8') as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in numbers)
    except OSError as error:
        sys.exit(f'out={out}: {error}')
