"""
Prepare 47,457 Tang poems for every stage, as TutorialLLM does: half of them as a text for pretraining (this folder), 30 % as titles with their poems for instruction tuning
(sft/), the rest as preferences, poems in verses of five characters rather than others (pairs/), and as titles alone (prompts/).
The poems are fetched if they are not here: from DATA_MIRROR or their URLs.
"""
import os
import random
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), '..', '..')))  # the repository, which has core/

from poems import five_characters, messages_of, read_poems, split, text_of

from core.files import find
from core.text.conversations import write_folders
from core.text.prepare import prepare
from core.text.tokenizer import char_tokenizer

input = ''  # a tang_poems.json of your own: a list of {"title", "author", "paragraphs"}
max_tokens = 256  # what is longer, with its title, is cut there: the context of the configs
held_out = 200  # titles that occur in no training data, on which the stages are judged
exec(open(os.path.join(sys.path[0], 'configurator.py'), encoding='utf-8').read())

folder = os.path.dirname(os.path.abspath(__file__))
if input and not os.path.isfile(find(input)):
    sys.exit(f'input={input}: there is no such file')
poems = read_poems(find(input) if input else os.path.join(folder, 'input', 'tang_poems.json'))
pretraining, instruction, preference = split(poems)
tokenizer = char_tokenizer(sorted({'\n'}.union(*(poem['title'] + text_of(poem) for poem in poems))))
path = os.path.join(folder, 'input', 'pretraining.txt')
os.makedirs(os.path.dirname(path), exist_ok=True)
with open(path, 'w', encoding='utf-8') as f:
    f.write('\n\n'.join(f'{poem["title"]}\n{text_of(poem)}' for poem in pretraining))
prepare(folder, path, 'python train.py config/pretrain_poems.py', tokenizer)


def parts(items):
    """90 % for training, the last 10 % for validation."""
    return {'train': items[:int(0.9 * len(items))], 'val': items[int(0.9 * len(items)):]}


conversations = {name: [messages_of(poem['title'], text_of(poem)) for poem in part] for name, part in parts(instruction).items()}
# The rejected side is a poem of another form under the same title: so the two differ in what is to be learned, and both are good verse. Answers
# of the model's own would differ in quality as well, and no preferences could be written before there is a model.
draw, five, others = random.Random(2024), [poem for poem in preference if five_characters(text_of(poem))], [poem for poem in preference if not five_characters(text_of(poem))]
if not five or not others:
    sys.exit(f'{input}: of {len(preference):,} poems for preferences {len(five):,} are in verses of five characters; pairs need some of them and some others')
pairs = {name: [(messages_of(poem['title']), text_of(poem), text_of(draw.choice(others))) for poem in part] for name, part in parts(five).items()}
seen = {poem['title'] for poem in pretraining} | {messages[0]['content'] for messages in conversations['train']} | {pair[0][0]['content'] for pair in pairs['train']}
titles = {name: [poem['title'] for poem in part] for name, part in parts(preference).items()}
titles['val'] = [title for title in dict.fromkeys(titles['val']) if title not in seen and title not in set(titles['train'])][:held_out]
prompts = {name: [messages_of(title) for title in part] for name, part in titles.items()}
print(f'poems: {len(pretraining):,} for pretraining, {len(instruction):,} for instruction tuning, {len(preference):,} for preferences, {len(five):,} of these in verses of five characters')
write_folders(folder, tokenizer, conversations, pairs, prompts, max_tokens)
print(f'\nthe first poems:\n\n{text_of({"paragraphs": [pretraining[0]["title"], *pretraining[0]["paragraphs"], "", pretraining[1]["title"], *pretraining[1]["paragraphs"]]})}\n')
print(f'an instruction: {conversations["train"][0][0]["content"]}\nits answer:\n{conversations["train"][0][1]["content"]}\n')
print('a preference: {}\nchosen:\n{}\nrejected:\n{}'.format(pairs['train'][0][0][0]['content'], *pairs['train'][0][1:]))
