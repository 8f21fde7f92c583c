"""
Prepare tiny Shakespeare in the tokens of GPT-2, to fine-tune it: train.bin, val.bin and the tokenizer, in this folder.
The text and GPT-2's merges are fetched if they are not here: from DATA_MIRROR, their URLs, or packages.
"""
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), '..', '..')))  # the repository, which has core/
sys.path.append(os.path.join(sys.path[0], 'data', 'shakespeare_char'))  # the text comes from there

from from_wheel import tinyshakespeare

from core.prepare import read_documents, write_dataset
from core.tokenizer import gpt2_tokenizer

input = ''  # a text of your own to use instead; nanoGPT's place for it, input.txt in this folder, works too
exec(open(os.path.join(sys.path[0], 'configurator.py'), encoding='utf-8').read())

folder = os.path.dirname(os.path.abspath(__file__))
own = os.path.join(folder, 'input.txt')
path = input or (own if os.path.exists(own) else tinyshakespeare())
write_dataset(folder, lambda: read_documents(path), gpt2_tokenizer(), next_command='python train.py config/finetune_shakespeare.py')
