"""
Prepare the 10-billion-token sample of FineWeb-Edu, web pages that teach something, in GPT-2's tokens.
The text is fetched from the Hugging Face hub, 14 files of about 2 GB, one after the other, or read from DATA_MIRROR/fineweb_edu or --input.
--limit=100000 needs the first of them only. GPT-2's merges stay in ~/.cache/stonegpt.
"""
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), '..', '..')))  # the repository, which has core/

from core.text.download import hub_files
from core.text.prepare import prepare

tokenizer = 'gpt2'  # the corpus is counted in its tokens, and models trained on it are compared by them
val_fraction = 0.0005  # as for OpenWebText; some 4,800 of 9,672,101 documents
shard_tokens = 100_000_000  # 200 MB a file, which any disk and any copying takes
_settings = 'core.text.prepare'  # has the other settings
exec(open(os.path.join(sys.path[0], 'configurator.py'), encoding='utf-8').read())

prepare(os.path.dirname(os.path.abspath(__file__)),
        input or (lambda: hub_files('HuggingFaceFW/fineweb-edu', 'sample/10BT/*.parquet', 'fineweb_edu')),
        'python train.py config/train_gpt2.py --dataset=fineweb_edu --out_dir=out-fineweb_edu')
