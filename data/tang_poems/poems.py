"""
Tang poems: where they come from, what is made of them, and what is asked of a poem.

The source is chinese-poetry's 全唐诗 (MIT licence), 57,016 poems in traditional characters, at a fixed commit. Kept are the 47,457 that have no '□' for a lost
character and no brackets, and whose lines, at least two, are equally long. A line is a couplet with its marks: 秦川雄帝宅，函谷壯皇居。
"""
import json
import random
import sys

from core.text.download import download, fetch

SHA256 = '7a676f46963e2ef7dba88f760392c79154f3aad24b9a76ce5effedd2849cb2c3'
URL = 'https://raw.githubusercontent.com/chinese-poetry/chinese-poetry/master/%E5%85%A8%E5%94%90%E8%AF%97/poet.tang.{}.json'


def keep(poems):
    """The bytes of tang_poems.json, from the parsed files of the source."""
    def whole(poem):
        lines = poem['paragraphs']
        return len(lines) > 1 and len(set(map(len, lines))) == 1 and not set('□()（）') & set(poem['title'] + ''.join(lines))
    kept = [{'title': poem['title'], 'author': poem['author'], 'paragraphs': poem['paragraphs']} for poem in poems if whole(poem)]
    return json.dumps(kept, ensure_ascii=False, separators=(',', ':')).encode()


def read_poems(path):
    """All poems in their order, [{'title', 'author', 'paragraphs'}, ...], fetched to `path` unless they are there."""
    def convert(first):
        return keep(json.loads(first) + [poem for number in range(1000, 57000, 1000) for poem in json.loads(download(URL.format(number)))])
    fetch(path, 'tang_poems.json', SHA256, URL.format(0), convert)
    try:
        with open(path, encoding='utf-8-sig') as f:
            poems = json.load(f)
        if not poems or not all(isinstance(poem['title'], str) and poem['paragraphs'] and all(isinstance(line, str) for line in poem['paragraphs']) for poem in poems):
            raise ValueError('a poem without title or lines')
    except (OSError, ValueError, TypeError, KeyError) as error:
        sys.exit(f'{path}: {type(error).__name__}: {error}; expected a list of {{"title": text, "paragraphs": [line, ...]}}')
    return poems


def split(poems):
    """TutorialLLM's split, poem by poem: half for pretraining, 30 % for instruction tuning, 20 % for preferences."""
    poems = list(poems)
    random.Random(2024).shuffle(poems)
    first, second = int(0.5 * len(poems)), int(0.8 * len(poems))
    return poems[:first], poems[first:second], poems[second:]


def text_of(poem):
    return '\n'.join(poem['paragraphs'])


def messages_of(title, answer=None):
    """The conversation about a poem: its title is what the user says."""
    return [{'role': 'user', 'content': title}] + [{'role': 'assistant', 'content': answer}] * (answer is not None)


def well_formed(text, finished=True):
    """Whether it is a poem: at least two lines, equally long, and ended by itself."""
    lines = text.split('\n')
    return finished and len(lines) > 1 and len(set(map(len, lines))) == 1


def five_characters(text, finished=True):
    """Whether it is one in verses of five characters: with their marks, the lines have twelve."""
    return well_formed(text, finished) and len(text.split('\n')[0]) == 12


def reward(prompt, answer, finished):
    """GRPO's rule: 1 for a poem in verses of five characters that repeats no line, else 0."""
    lines = answer.split('\n')
    return float(five_characters(answer, finished) and len(set(lines)) == len(lines))
