"""
Prepare your own text: a dataset folder data/<name> from a text file, a .jsonl file (one document a line), or a folder of these.

    python data/any_text/prepare.py --input=my.txt --tokenizer=char
    python train.py config/train_shakespeare_char.py --dataset=my --out_dir=out-my
"""
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), '..', '..')))  # the repository, which has core/

from core.files import find
from core.prepare import read_documents, write_dataset
from core.tokenizer import load_tokenizer

input = ''  # required: a text file in UTF-8, a .jsonl file, or a folder with these in it or below
tokenizer = 'char'  # 'char' (a small text or model), 'gpt2' (its BPE), or the path of a tokenizer.json
name = ''  # of the dataset folder; '': the name of the input without its ending
field = 'text'  # which field of a .jsonl line holds the text
val_fraction = 0.1  # share of the characters, at the end, kept for validation; nanoGPT's; 0: none
exec(open(os.path.join(sys.path[0], 'configurator.py'), encoding='utf-8').read())

if not input:
    sys.exit('no input given: python data/any_text/prepare.py --input=my.txt (or a .jsonl file, or a folder of these)')
stem = os.path.splitext(os.path.basename(os.path.abspath(os.path.expanduser(input))))[0]
write_dataset(os.path.join(find('data'), name or stem), lambda: read_documents(input, field),
              tokenizer if tokenizer == 'char' else load_tokenizer(tokenizer), val_fraction)
