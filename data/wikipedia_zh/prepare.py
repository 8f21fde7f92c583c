"""
Prepare the Chinese Wikipedia of November 2023 in the tokens of a BBPE that is trained on it.
The text is fetched from the Hugging Face hub, file after file, or read from DATA_MIRROR/wikipedia_zh or --input.
--limit=100000 needs the first of them only.
"""
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), '..', '..')))  # the repository, which has core/

from core.text.download import hub_files
from core.text.prepare import prepare

tokenizer = 'bbpe'  # of qwen2's 151,646 ids a small model would spend more on embeddings than on layers, and most of them are not Chinese
vocab_size = 32768  # fits uint16
val_fraction = 0.001  # some 1,400 of 1,384,748 articles
shard_tokens = 100_000_000  # 200 MB a file, which any disk and any copying takes
_settings = 'core.text.prepare'  # has the other settings
exec(open(os.path.join(sys.path[0], 'configurator.py'), encoding='utf-8').read())

prepare(os.path.dirname(os.path.abspath(__file__)),
        input or (lambda: hub_files('wikimedia/wikipedia', '20231101.zh/*.parquet', 'wikipedia_zh')),
        'python train.py config/train_wikipedia_zh.py')
