"""
Prepare the Chinese Wikipedia of November 2023 with a byte-level BPE (BBPE) that is trained on it.
The text is read from --input or DATA_MIRROR/wikipedia_zh, or downloaded from the Hugging Face hub, one file after the
other; --limit=100000 needs only the first.
"""
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), '..', '..')))  # the repository

import core.startup  # noqa: F401  first: it catches Ctrl-C and missing packages in the imports below

from core.text.download import hub_files
from core.text.prepare import prepare

tokenizer = 'bbpe'  # with qwen2's 151,646 ids, mostly not Chinese, a small model would be mostly embeddings
vocab_size = 32768  # fits uint16
val_fraction = 0.001  # about 1,400 of 1,384,748 articles
shard_tokens = 100_000_000  # 200 MB a file, easy to copy
revision = ''  # commit or branch on the hub; '': the newest commit, which is printed and kept in meta.json
EXTRA_SETTINGS = ('core.text.prepare',)  # modules whose settings are settings of this script too
exec(open(os.path.join(sys.path[0], 'configurator.py'), encoding='utf-8').read())

folder = os.path.dirname(os.path.abspath(__file__))
source = input or (lambda: hub_files('wikimedia/wikipedia', '20231101.zh/*.parquet', 'wikipedia_zh', revision))
prepare(folder, source, 'python train.py config/train_wikipedia_zh.py')
