"""
Prepare the 10-billion-token sample of FineWeb-Edu, educational web pages, with GPT-2's tokenizer.
The text is read from --input or DATA_MIRROR/fineweb_edu, or downloaded from the Hugging Face hub: 14 files of about
2 GB, one after the other; --limit=100000 needs only the first. GPT-2's merges are kept in ~/.cache/stonegpt.
"""
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), '..', '..')))  # the repository

import core.startup  # noqa: F401  first: it catches Ctrl-C and missing packages in the imports below

from core.text.download import hub_files
from core.text.prepare import prepare

tokenizer = 'gpt2'  # the corpus's token counts and published losses are in its tokens
val_fraction = 0.0005  # as for OpenWebText; about 4,800 of 9,672,101 documents
shard_tokens = 100_000_000  # 200 MB a file, easy to copy
revision = ''  # commit or branch on the hub; '': the newest commit, which is printed and kept in meta.json
EXTRA_SETTINGS = ('core.text.prepare',)  # modules whose settings are settings of this script too
exec(open(os.path.join(sys.path[0], 'configurator.py'), encoding='utf-8').read())

folder = os.path.dirname(os.path.abspath(__file__))
source = input or (lambda: hub_files('HuggingFaceFW/fineweb-edu', 'sample/10BT/*.parquet', 'fineweb_edu', revision))
prepare(folder, source, 'python train.py config/train_gpt2.py --dataset=fineweb_edu --out_dir=out-fineweb_edu')
