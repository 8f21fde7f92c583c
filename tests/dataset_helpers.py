"""Texts, throwaway tokenizers and plain restatements for the tests of prepare.py and chunks.py."""
import json
import os
import random

import numpy as np
import pytest
import tokenizers
from conftest import make_dataset, write
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from core.files import ROOT
from core.text.tokenizer import EOT

MIRRORS = [os.environ.get('DATA_MIRROR', ''), os.path.join(ROOT, '..', 'shared', 'data')]
MIRROR = next((folder for folder in MIRRORS if os.path.exists(os.path.join(folder, 'tinyshakespeare.txt'))), None)
needs_mirror = pytest.mark.skipif(MIRROR is None, reason='DATA_MIRROR names no folder with tinyshakespeare.txt')
NOVEL = os.path.join(MIRROR or '', 'hongloumeng.txt')
needs_novel = pytest.mark.skipif(not os.path.exists(NOVEL), reason='DATA_MIRROR names no folder with hongloumeng.txt')
NO_NETWORK = {
    'http_proxy': 'http://127.0.0.1:9',
    'https_proxy': 'http://127.0.0.1:9',
    'no_proxy': '',
    'PIP_NO_INDEX': '1',
    'PIP_FIND_LINKS': '',
    'PIP_CONFIG_FILE': os.devnull,
}
TEXT = (
    'First Citizen:\nBefore we proceed any further, hear me speak.\n\n'
    '满纸荒唐言，一把辛酸泪。\r\nAll: it\'s <|endoftext|>  \t 🙂 é\n'
    * 9
)
CHINESE = (
    '满纸荒唐言，一把辛酸泪。都云作者痴，谁解其中味？此开卷第一回也。作者自云：因曾历过一番梦幻之后，故将真事隐去，'
    '而借“通灵”之说，撰此《石头记》一书也。故曰“甄士隐”云云。'
)
POOL = [
    '\nso',
    ' on',
    '\n',
    ' ',
    '  ',
    '\n\n',
    '\t',
    'it\'s',
    'two',
    '石头',
    '!',
    '?\n',
    ' 1',
    '12',
    '\u3000',
    '\x85',
    '🙂',
    'e\u0301',
    EOT,  # plain
    '满纸荒唐言，',
    '一把辛酸泪。',
    '\r\n',
    '\r',
    '\u0301',
    '\u0301,',
    'a\u0327\u0301.',
    '\u1100\u1161',
    '\u11a8!',
    '½,',
    '٣。',
    '_;',
    'x:',
    '\x1c',
]


def write_jsonl(path, texts):
    return write(path, ''.join(json.dumps({'text': text}, ensure_ascii=False) + '\n' for text in texts))


def files_of(folder):
    """{name: bytes} of a dataset folder, without what is unfinished in it and the lock of a killed run."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != 'lock'}


def meta_of(folder):
    return json.loads((folder / 'meta.json').read_text(encoding='utf-8'))


def bins_of(folder):
    """{split: its tokens, one shard after the other}."""
    bins = {}
    for path in sorted(folder.glob('*.bin')):
        bins.setdefault(path.name[:-4].partition('_')[0], []).extend(
            np.fromfile(path, meta_of(folder)['dtype']).tolist()
        )
    return bins


def make(folder, path, **settings):
    make_dataset(folder, str(path), **settings)
    return bins_of(folder)


def plain(documents, known, val_fraction=0.1, seed=1337):
    """What the bins should hold, in the fewest words."""
    bins = {'train': [], 'val': []} if val_fraction else {'train': []}
    end, draw = [known.eot] if len(documents) > 1 else [], random.Random(seed)
    for text in documents:
        cut = int(len(text) * (1 - val_fraction))
        if len(documents) > 1000:
            cut = 0 if draw.random() < val_fraction else len(text)
        for name, part in (('train', text[:cut]), ('val', text[cut:])):
            if part:
                bins[name] += known.encode(part).tolist() + end
    return bins


def train_bpe(split=None, vocab_size=600, extra=()):
    """Return the tokenizer.json of a small byte-level BPE, split like GPT-2, or by a regex, with Qwen2's normalizer."""
    trained = tokenizers.Tokenizer(models.BPE())
    steps = [pre_tokenizers.Split(tokenizers.Regex(split), 'isolated')] if split else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split))
    trained.pre_tokenizer = pre_tokenizers.Sequence(steps) if split else steps[0]
    trained.decoder = decoders.ByteLevel()
    if split:
        trained.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    with open(__file__, encoding='utf-8') as f:
        trained.train_from_iterator([TEXT, CHINESE * 3, f.read(), *extra], trainer)
    trained.add_special_tokens([EOT])
    return trained.to_str()


def nanogpt_char(data):
    """nanoGPT's data/shakespeare_char/prepare.py."""
    chars = sorted(list(set(data)))
    stoi = {ch: i for i, ch in enumerate(chars)}
    n = len(data)
    return [
        np.array([stoi[c] for c in part], dtype=np.uint16).tobytes()
        for part in (data[: int(n * 0.9)], data[int(n * 0.9) :])
    ]


def random_texts(rng, n):
    """Spaces, newlines, marks, combining marks and digits in any order; and Chinese without a space or a line's end."""
    for _ in range(n):
        pool = rng.sample(POOL, 12)
        yield ''.join(rng.choices(pool, k=rng.randrange(1, 200)))
        yield ''.join(rng.choices([CHINESE[i:i + 3] for i in range(0, 90, 3)], k=rng.randrange(1, 60)))
