"""
Prepare 47,457 Tang poems for every stage of training, split as TutorialLLM does:

    .           half of them, as a text for pretraining
    sft/        30 %, titles with their poems for instruction tuning
    pairs/      the other 20 %, preferences: poems in verses of five characters rather than others
    prompts/    the titles of these 20 %

The poems are downloaded if they are not here: from DATA_MIRROR or their URLs.
"""
import os
import random
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), '..', '..')))  # the repository: for core/

import core.startup  # noqa: F401  first: it catches Ctrl-C and missing packages in the imports below

from poems import five_characters, hold_out, messages_of, read_poems, split, text_of

from core.files import atomic, find, locked_dataset
from core.text.conversations import write_folders
from core.text.prepare import prepare
from core.text.tokenizer import char_tokenizer

input = ''  # a tang_poems.json of your own: a list of {"title", "author", "paragraphs"}
max_tokens = 256  # a longer poem is cut there, title included: the context of the configs
held_out = 200  # titles that occur in no training data, on which the stages are judged
exec(open(os.path.join(sys.path[0], 'configurator.py'), encoding='utf-8').read())

folder = os.path.dirname(os.path.abspath(__file__))
if input and not os.path.isfile(find(input)):
    sys.exit(f'input={input}: there is no such file')
poems = read_poems(find(input) if input else os.path.join(folder, 'input', 'tang_poems.json'))
pretraining, instruction, preference = split(poems)

# --- a vocabulary of the characters of all three parts
tok = char_tokenizer(sorted({'\n'}.union(*(poem['title'] + text_of(poem) for poem in poems))))

# --- instruction tuning: title -> poem
conversations = hold_out([messages_of(poem['title'], text_of(poem)) for poem in instruction])

# --- preferences. The rejected answer is a poem of another form, written for another title. So the two differ in the
# form that is to be learned, and both are good verse. Answers of a model would differ in quality as well, and would
# need a model first.
five = [poem for poem in preference if five_characters(text_of(poem))]
others = [poem for poem in preference if not five_characters(text_of(poem))]
if not five or not others:
    sys.exit(f'{input}: of {len(preference):,} poems for preferences {len(five):,} are in verses of five characters; '
             'pairs need some of them and some others')
rng = random.Random(2024)
pairs = hold_out([(messages_of(poem['title']), text_of(poem), text_of(rng.choice(others))) for poem in five])

# --- prompts. Those for validation occur in no training data of any stage.
titles = hold_out([poem['title'] for poem in preference])
trained_on = {poem['title'] for poem in pretraining}
trained_on |= {messages[0]['content'] for messages in conversations['train']}
trained_on |= {messages[0]['content'] for messages, _, _ in pairs['train']}
trained_on |= set(titles['train'])
titles['val'] = [title for title in dict.fromkeys(titles['val']) if title not in trained_on][:held_out]
prompts = {name: [messages_of(title) for title in part] for name, part in titles.items()}

print(f'poems: {len(pretraining):,} for pretraining, {len(instruction):,} for instruction tuning, '
      f'{len(preference):,} for preferences, {len(five):,} of these in verses of five characters')
with locked_dataset(folder):
    path = os.path.join(folder, 'input', 'pretraining.txt')  # one text of all poems
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with atomic(path, 'w') as f:
        f.write('\n\n'.join(f'{poem["title"]}\n{text_of(poem)}' for poem in pretraining))
    prepare(folder, path, 'python train.py config/pretrain_poems.py', tok)
    write_folders(folder, tok, conversations, pairs, prompts, max_tokens)

print('\nthe first poems:\n')
for poem in pretraining[:2]:
    print(f'{poem["title"]}\n{text_of(poem)}\n')
question, answer = conversations['train'][0]
print(f'an instruction: {question["content"]}\nits answer:\n{answer["content"]}\n')
messages, chosen, rejected = pairs['train'][0]
print(f'a preference: {messages[0]["content"]}\nchosen:\n{chosen}\nrejected:\n{rejected}')
