"""
Prepare your own text, in any of the usual formats and encodings and of any size. Writes the dataset folder data/<name>.

    python data/any_text/prepare.py --input=my.txt
    python train.py config/auto.py --dataset=my --minutes=10 --out_dir=out-my
"""
import os
import re
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), '..', '..')))  # the repository

import core.startup  # noqa: F401  first: it catches Ctrl-C and missing packages in the imports below

from core.files import dataset_folder
from core.text.documents import name_of
from core.text.prepare import prepare

name = ''  # name of the dataset folder; '': the name of the input without its endings
EXTRA_SETTINGS = ('core.text.prepare',)  # modules whose settings are settings of this script too
exec(open(os.path.join(sys.path[0], 'configurator.py'), encoding='utf-8').read())

if not input:
    sys.exit('no input given: python data/any_text/prepare.py my.txt (or another file, or a folder)')
name = name or re.sub(r'[^\w.-]+', '-', name_of(os.path.expanduser(input))).strip('.-')  # needs no quotes in a shell
if not name:
    sys.exit(f'input={input}: this gives no name for the dataset folder; choose one by --name=...')
if os.path.exists(os.path.join(dataset_folder(name), 'prepare.py')):
    sys.exit(f'name={name}: {dataset_folder(name)} is for what its prepare.py makes; choose another by --name=...')
if '..' in name:
    sys.exit(f'name={name}: expected the name of a folder in data/')
prepare(dataset_folder(name), input)
