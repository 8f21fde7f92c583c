"""
Prepare the four classic novels, 红楼梦 三国演义 水浒传 西游记, with a byte-level BPE (BBPE) that is trained on them.
Missing texts come from DATA_MIRROR or their URLs.
"""
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), '..', '..')))  # the repository

import core.startup  # noqa: F401  first: it catches Ctrl-C and missing packages in the imports below

from classics import NOVELS, novel

from core.text.prepare import LAPTOP, prepare

tokenizer = 'bbpe'  # trained on these novels
EXTRA_SETTINGS = ('core.text.prepare',)  # modules whose settings are settings of this script too
exec(open(os.path.join(sys.path[0], 'configurator.py'), encoding='utf-8').read())

folder = os.path.dirname(os.path.abspath(__file__))
source = input or (lambda: [novel(name, os.path.join(folder, 'input', f'{name}.txt')) for name in NOVELS])
prepare(folder, source, 'python train.py config/train_classics_bbpe.py' + LAPTOP)
