"""
Tang poems: download and clean them, split them, and tell their forms apart.

The source is chinese-poetry's 全唐诗 (MIT licence) at a fixed commit: 57,016 poems in traditional
characters. Of these 47,457 are used: those without brackets or '□' (a lost character) that have at
least two lines, all equally long. A line is a couplet with its punctuation: 秦川雄帝宅，函谷壯皇居。
"""
import json
import random
import sys

from core.text.download import download, fetch

SHA256 = '7a676f46963e2ef7dba88f760392c79154f3aad24b9a76ce5effedd2849cb2c3'
URL = ('https://raw.githubusercontent.com/chinese-poetry/chinese-poetry/master/'
       '%E5%85%A8%E5%94%90%E8%AF%97/poet.tang.{}.json')


def is_clean(poem):
    lines = poem['paragraphs']
    text = poem['title'] + ''.join(lines)
    return len(lines) > 1 and len(set(map(len, lines))) == 1 and not set('□()（）') & set(text)


def clean(poems):
    """Return the bytes of tang_poems.json from the parsed poems of the source."""
    cleaned = [{key: poem[key] for key in ('title', 'author', 'paragraphs')} for poem in poems if is_clean(poem)]
    return json.dumps(cleaned, ensure_ascii=False, separators=(',', ':')).encode()


def read_poems(path):
    """Return all poems, [{'title', 'author', 'paragraphs'}, ...]. Downloads them to `path` if it does not exist."""
    def convert(first_file):
        poems = json.loads(first_file)
        for number in range(1000, 57000, 1000):
            poems += json.loads(download(URL.format(number)))
        return clean(poems)

    fetch(path, 'tang_poems.json', SHA256, URL.format(0), convert)
    try:
        with open(path, encoding='utf-8-sig') as f:
            poems = json.load(f)
        if not isinstance(poems, list) or not poems or not all(map(is_poem, poems)):
            raise ValueError('no poems, or one without title or lines')
    except (OSError, ValueError, RecursionError) as error:
        sys.exit(f'{path}: {error}; expected a list of {{"title": text, "paragraphs": [line, ...]}}')
    return poems


def is_poem(poem):
    if not isinstance(poem, dict) or not isinstance(poem.get('title'), str):
        return False
    lines = poem.get('paragraphs')
    return isinstance(lines, list) and bool(lines) and all(isinstance(line, str) for line in lines)


def split(poems):
    """Return TutorialLLM's three parts: 50 % for pretraining, 30 % for instruction tuning, 20 % for preferences."""
    poems = list(poems)
    random.Random(2024).shuffle(poems)
    first, second = int(0.5 * len(poems)), int(0.8 * len(poems))
    return poems[:first], poems[first:second], poems[second:]


def hold_out(items):
    """Return {'train': the first 90 %, 'val': the last 10 %}."""
    n_train = int(0.9 * len(items))
    return {'train': items[:n_train], 'val': items[n_train:]}


def text_of(poem):
    return '\n'.join(poem['paragraphs'])


def messages_of(title, answer=None):
    """Return the conversation about a poem: the user says the title, the assistant the poem, if there is one."""
    messages = [{'role': 'user', 'content': title}]
    if answer is not None:
        messages.append({'role': 'assistant', 'content': answer})
    return messages


def well_formed(text, finished=True):
    """Return whether an answer is a poem: it has ended, and has at least two lines, all equally long."""
    lines = text.split('\n')
    return finished and len(lines) > 1 and len(set(map(len, lines))) == 1


def five_characters(text, finished=True):
    """Return whether an answer is a poem in verses of five characters: its lines have twelve with punctuation."""
    return well_formed(text, finished) and len(text.split('\n')[0]) == 12


def reward(prompt, answer, finished):
    """Return GRPO's reward by a rule: 1 for a poem in verses of five characters that repeats no line, else 0."""
    lines = answer.split('\n')
    return float(five_characters(answer, finished) and len(set(lines)) == len(lines))
