"""
Prepare OpenWebText, on which nanoGPT trains GPT-2, with GPT-2's tokenizer: about 9 billion tokens.
The text is read from --input or DATA_MIRROR/openwebtext, or downloaded from the Hugging Face hub: 80 files of about
300 MB, one after the other; --limit=100000 needs only one or two. GPT-2's merges are kept in ~/.cache/stonegpt.
"""
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), '..', '..')))  # the repository

import core.startup  # noqa: F401  first: it catches Ctrl-C and missing packages in the imports below

from core.text.download import hub_files
from core.text.prepare import prepare

tokenizer = 'gpt2'  # as in nanoGPT, so that losses can be compared
val_fraction = 0.0005  # nanoGPT's; about 4,000 of 8,013,769 documents
seed = 2357  # nanoGPT's, but drawn by another generator: other documents are for validation
shard_tokens = 100_000_000  # 200 MB a file, easy to copy
revision = ''  # commit or branch on the hub; '': the newest commit, which is printed and kept in meta.json
EXTRA_SETTINGS = ('core.text.prepare',)  # modules whose settings are settings of this script too
exec(open(os.path.join(sys.path[0], 'configurator.py'), encoding='utf-8').read())

folder = os.path.dirname(os.path.abspath(__file__))
source = input or (lambda: hub_files('Skylion007/openwebtext', 'plain_text/*.parquet', 'openwebtext', revision))
prepare(folder, source, 'python train.py config/train_gpt2.py')
