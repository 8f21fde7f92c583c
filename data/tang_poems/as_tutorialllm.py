"""
The conversations once more as TutorialLLM writes and counts them, to compare with it: a fixed instruction with its labels before each title, and every token counts
for the loss, the instruction's too. For data/tang_poems/tutorialllm, after prepare.py:

    python data/tang_poems/as_tutorialllm.py
    python train.py config/sft_poems.py --dataset=tang_poems/tutorialllm --init_from=...
"""
import os
import sys

import numpy as np

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), '..', '..')))  # the repository, which has core/

from poems import read_poems, split, text_of

from core.text.conversations import build_folder, write_folder
from core.text.tokenizer import EOT, add_specials, load_tokenizer

LABELS = '<INSPRE>'  # the letters of <INS>, <INP> and <RES>, which no poem has, each a token
folder = os.path.dirname(os.path.abspath(__file__))
tokenizer = add_specials(load_tokenizer(folder), sorted(set(LABELS)))


def documents(poem):
    text = f'<INS>請用以下題目寫一首詩<INP>{poem["title"]}<RES>{text_of(poem)}{EOT}'
    ids = tokenizer.encode(text, special=tokenizer.specials)
    return [(ids, np.arange(len(ids)) > 0)]


poems = split(read_poems(os.path.join(folder, 'input', 'tang_poems.json')))[1]
parts = {'train': poems[:int(0.9 * len(poems))], 'val': poems[int(0.9 * len(poems)):]}
write_folder(*build_folder(os.path.join(folder, 'tutorialllm'), 'conversations', tokenizer, parts, documents, 256))
