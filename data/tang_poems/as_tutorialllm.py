"""
Write the conversations as TutorialLLM does, to compare losses with it: a fixed instruction with its
labels before each title, and every token counts for the loss, those of the instruction too. Writes
data/tang_poems/tutorialllm; run prepare.py before.

    python data/tang_poems/as_tutorialllm.py
    python train.py config/sft_poems.py --dataset=tang_poems/tutorialllm --init_from=...
"""
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), '..', '..')))  # the repository: for core/

import core.startup  # noqa: F401  first: it catches Ctrl-C and missing packages in the imports below

import numpy as np
from poems import hold_out, read_poems, split, text_of

from core.text.conversations import build_folder, write_folder
from core.text.tokenizer import EOT, add_specials, load_tokenizer

exec(open(os.path.join(sys.path[0], 'configurator.py'), encoding='utf-8').read())

LABELS = '<INSPRE>'  # the letters of <INS>, <INP> and <RES>, a token each; no poem has them
folder = os.path.dirname(os.path.abspath(__file__))
tok = add_specials(load_tokenizer(folder), sorted(set(LABELS)))


def documents_of(poem):
    text = f'<INS>請用以下題目寫一首詩<INP>{poem["title"]}<RES>{text_of(poem)}{EOT}'
    ids = tok.encode(text, special=tok.specials)
    return [(ids, np.arange(len(ids)) > 0)]


_, instruction, _ = split(read_poems(os.path.join(folder, 'input', 'tang_poems.json')))
out = os.path.join(folder, 'tutorialllm')
write_folder(*build_folder(out, 'conversations', tok, hold_out(instruction), documents_of, max_tokens=256))
