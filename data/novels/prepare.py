"""
Prepare a folder of your own novels, .txt files in any of the usual encodings, with a byte-level BPE (BBPE) trained
on them.

    python data/novels/prepare.py --input=~/novels
    python train.py config/train_novels.py
"""
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), '..', '..')))  # the repository

import core.startup  # noqa: F401  first: it catches Ctrl-C and missing packages in the imports below

from core.text.prepare import LAPTOP, prepare

tokenizer = 'bbpe'  # trained on these novels
vocab_size = 16384  # dozens of novels have enough words for this many ids
EXTRA_SETTINGS = ('core.text.prepare',)  # modules whose settings are settings of this script too
exec(open(os.path.join(sys.path[0], 'configurator.py'), encoding='utf-8').read())

if not input:
    sys.exit('no input given: python data/novels/prepare.py --input=~/novels, a folder of .txt files')
prepare(os.path.dirname(os.path.abspath(__file__)), input, 'python train.py config/train_novels.py' + LAPTOP)
