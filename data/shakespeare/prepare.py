"""
Prepare tiny Shakespeare in the tokens of GPT-2, to fine-tune it: train.bin, val.bin and the tokenizer, in this folder.
The text and GPT-2's merges are fetched if they are not here: from DATA_MIRROR, their URLs, or packages.
"""
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), '..', '..')))  # the repository, which has core/
sys.path.append(os.path.join(sys.path[0], 'data', 'shakespeare_char'))  # the text comes from there

from from_wheel import tinyshakespeare

from core.text.prepare import prepare

tokenizer = 'gpt2'  # that of the model to be fine-tuned
_settings = 'core.text.prepare'  # has the other settings
exec(open(os.path.join(sys.path[0], 'configurator.py'), encoding='utf-8').read())

folder = os.path.dirname(os.path.abspath(__file__))
own = os.path.join(folder, 'input.txt')  # nanoGPT's place for it
prepare(folder, input or (own if os.path.exists(own) else tinyshakespeare()), 'python train.py config/finetune_shakespeare.py')
