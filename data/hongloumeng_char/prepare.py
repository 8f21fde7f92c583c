"""
Prepare 红楼梦 for a character-level model. Writes train.bin, val.bin and the vocabulary here.
A missing text comes from DATA_MIRROR or its URL.
"""
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), '..', '..')))  # the repository
sys.path.append(os.path.join(sys.path[0], 'data', 'classics_bbpe'))  # the text comes from there

import core.startup  # noqa: F401  first: it catches Ctrl-C and missing packages in the imports below

from classics import novel

from core.text.prepare import LAPTOP, prepare

tokenizer = 'char'  # every character is a token
EXTRA_SETTINGS = ('core.text.prepare',)  # modules whose settings are settings of this script too
exec(open(os.path.join(sys.path[0], 'configurator.py'), encoding='utf-8').read())

folder = os.path.dirname(os.path.abspath(__file__))
source = input or (lambda: novel('hongloumeng', os.path.join(folder, 'input.txt')))
prepare(folder, source, 'python train.py config/train_hongloumeng_char.py' + LAPTOP)
