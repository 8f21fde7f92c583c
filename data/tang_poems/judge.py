"""
What a model makes of titles that no stage was trained on: how many of its poems are well formed, how many in verses of five characters, and whether they are still
as long and as varied as before.

    python data/tang_poems/judge.py --out_dir=out-poems-dpo --reference=out-poems-sft --out=journey.jsonl
"""
import json
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), '..', '..')))  # the repository, which has core/

import numpy as np
from poems import five_characters, messages_of, well_formed

from core.device import setup
from core.inference.generation import continue_prompts
from core.text.chat_template import answer_text, can_chat, end_of_turn, render
from core.text.dataset import open_dataset
from core.weights.checkpoint import load_model, refuse_reward_model, source_tokenizer

# ---------------------------------------------------------------------------------------------------------------------------------------
out_dir = 'out-poems-sft'  # the run to judge
reference = ''  # another one, whose poem is shown beside, and whose numbers too
title = '春夜喜雨'  # of the poem that is shown
titles = 200  # how many of the held-out titles to write a poem for
temperature = 0.8  # of the draws
max_new_tokens = 200  # length of a poem at most
seed = 1337  # of the draws
batch_size = 100  # poems written at once
out = ''  # a .jsonl file that gets a line with the numbers of each model
device = 'auto'  # cuda, then mps, then cpu, whichever there is
dtype = 'auto'  # bfloat16 where the hardware multiplies it, else float32
# ---------------------------------------------------------------------------------------------------------------------------------------
exec(open(os.path.join(sys.path[0], 'configurator.py'), encoding='utf-8').read())
if min(titles, max_new_tokens, batch_size) < 1:
    sys.exit(f'titles={titles}, max_new_tokens={max_new_tokens}, batch_size={batch_size}: expected at least 1')
run = setup(device, dtype, seed=seed, training=True)  # in the precision of training
data = open_dataset('tang_poems/prompts')
tokens, starts = np.fromfile(data.files['val'][0][0], data.dtype), data.starts['val']
held_out = [data.tokenizer.decode(tokens[i:j]).split('\n')[1].removesuffix('<|im_end|>') for i, j in zip(starts, starts[1:titles + 1])]


def write(model, tokenizer, subjects):
    """[(poem, whether it ended by itself)] for each title."""
    prompts, poems = [render(messages_of(subject), tokenizer, reply=True)[0] for subject in subjects], []
    for i in range(0, len(prompts), batch_size):
        seeds = [[seed, j] for j in range(i, min(i + batch_size, len(prompts)))]
        with run.ctx():
            *_, rows = continue_prompts(model, tokenizer, prompts[i:i + batch_size], max_new_tokens, seeds,
                                        end_ids=[end_of_turn(tokenizer)], temperature=temperature)
        rows = [row.ids for row in rows]
        poems += [(answer_text(tokenizer, row), row[-1] == end_of_turn(tokenizer)) for row in rows]
    return poems


def judge(path):
    """Show the poem of a run and return its numbers."""
    model, source = load_model(path)
    refuse_reward_model(model, path)
    tokenizer = source_tokenizer(source)
    if not can_chat(tokenizer):
        sys.exit(f'out_dir={path}: this model knows no conversations; judge one that was instruction-tuned')
    (poem, _), *poems = write(model.to(run.device).eval(), tokenizer, [title, *held_out])
    bigrams = [poem[i:i + 2] for poem, _ in poems for i in range(len(poem) - 1)]
    print(f'{title}, by {path}:\n{poem}\n', flush=True)
    return {'run': path, 'titles': len(poems), 'well_formed': sum(well_formed(*poem) for poem in poems) / len(poems), 'five_characters': sum(five_characters(*poem) for poem in poems) / len(poems),
            'characters': sum(len(poem) for poem, _ in poems) / len(poems), 'distinct_2': len(set(bigrams)) / max(1, len(bigrams)), 'poem': poem}


numbers = [judge(path) for path in filter(None, (reference, out_dir))]
print(f'{"of " + str(len(held_out)) + " held-out titles":24} well-formed  five characters  characters a poem  distinct 2-grams')
for row in numbers:
    print(f'{row["run"]:24} {row["well_formed"]:11.1%}  {row["five_characters"]:15.1%}  {row["characters"]:17.1f}  {row["distinct_2"]:16.3f}')
if out:
    try:
        with open(os.path.expanduser(out), 'a', encoding='utf-8') as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in numbers)
    except OSError as error:
        sys.exit(f'out={out}: {error}')
