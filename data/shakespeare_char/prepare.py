"""
Prepare tiny Shakespeare for a character-level model. Writes train.bin, val.bin and the vocabulary here.
A missing text comes from DATA_MIRROR, its URL, or a package.
"""
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), '..', '..')))  # the repository

import core.startup  # noqa: F401  first: it catches Ctrl-C and missing packages in the imports below

from from_wheel import tinyshakespeare

from core.text.prepare import prepare

tokenizer = 'char'  # every character is a token
EXTRA_SETTINGS = ('core.text.prepare',)  # modules whose settings are settings of this script too
exec(open(os.path.join(sys.path[0], 'configurator.py'), encoding='utf-8').read())

folder = os.path.dirname(os.path.abspath(__file__))
prepare(folder, input or tinyshakespeare(), 'python train.py config/train_shakespeare_char.py')
