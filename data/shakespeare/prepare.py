"""
Prepare tiny Shakespeare with GPT-2's tokenizer, to fine-tune GPT-2. Writes train.bin, val.bin and the tokenizer here.
A missing text and GPT-2's merges come from DATA_MIRROR, their URLs, or packages.
"""
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), '..', '..')))  # the repository
sys.path.append(os.path.join(sys.path[0], 'data', 'shakespeare_char'))  # the text comes from there

import core.startup  # noqa: F401  first: it catches Ctrl-C and missing packages in the imports below

from from_wheel import tinyshakespeare

from core.text.prepare import prepare

tokenizer = 'gpt2'  # the tokenizer of the model to be fine-tuned
EXTRA_SETTINGS = ('core.text.prepare',)  # modules whose settings are settings of this script too
exec(open(os.path.join(sys.path[0], 'configurator.py'), encoding='utf-8').read())

folder = os.path.dirname(os.path.abspath(__file__))
own = os.path.join(folder, 'input.txt')  # nanoGPT's place for it
source = input or (own if os.path.exists(own) else tinyshakespeare())
prepare(folder, source, 'python train.py config/finetune_shakespeare.py')
