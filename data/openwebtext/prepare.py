"""
Prepare OpenWebText, the text that nanoGPT trains its GPT-2 on, in GPT-2's tokens: some 9 billion.
The text is fetched from the Hugging Face hub, 80 files of about 300 MB, one after the other, or read from DATA_MIRROR/openwebtext or --input.
--limit=100000 needs the first one or two of them. GPT-2's merges stay in ~/.cache/stonegpt.
"""
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), '..', '..')))  # the repository, which has core/

from core.text.download import hub_files
from core.text.prepare import prepare

tokenizer = 'gpt2'  # as in nanoGPT, so that losses can be compared
val_fraction = 0.0005  # nanoGPT's; some 4,000 of 8,013,769 documents
seed = 2357  # nanoGPT's; but another generator draws here, so the validation documents are others
shard_tokens = 100_000_000  # 200 MB a file, which any disk and any copying takes
_settings = 'core.text.prepare'  # has the other settings
exec(open(os.path.join(sys.path[0], 'configurator.py'), encoding='utf-8').read())

prepare(os.path.dirname(os.path.abspath(__file__)),
        input or (lambda: hub_files('Skylion007/openwebtext', 'plain_text/*.parquet', 'openwebtext')),
        'python train.py config/train_gpt2.py')
