"""
Prepare your own conversations for instruction tuning, and preferences for a reward model, DPO and GRPO.
Writes the dataset folders data/chat/sft, data/chat/pairs and data/chat/prompts: in data/ of the current folder if there
is one, else of the repository.

    python data/chat/prepare.py --input=conversations.jsonl --tokenizer=data/my
    python train.py config/sft_chat.py --init_from=out-my
"""
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), '..', '..')))  # the repository: for core/

import core.startup  # noqa: F401  first: it catches Ctrl-C and missing packages in the imports below

from core.files import dataset_folder, quoted
from core.text.conversations import divide, prompt_of, read, write_folders
from core.text.tokenizer import load_tokenizer

# -----------------------------------------------------------------------------
input = ''  # a .jsonl file, or a .json file with a list (forms: data/chat/readme.md); may be given several times
tokenizer = 'gpt2'  # the model's: 'gpt2', 'qwen2', a tokenizer.json or its folder; missing role tokens are appended
max_tokens = 1024  # longer conversations are cut there; at most the model's context
val_fraction = 0.05  # share of the conversations and of the pairs for validation
seed = 1337  # of the random choice of the validation part
name = 'chat'  # of the folder in data/
SEVERAL_INPUTS = True  # as arguments without --input= too
# -----------------------------------------------------------------------------
config, config_given = {}, {}
exec(open(os.path.join(sys.path[0], 'configurator.py'), encoding='utf-8').read())

if not input:
    sys.exit('no input given: python data/chat/prepare.py conversations.jsonl')
if not name or '..' in name:
    sys.exit(f'name={name}: expected the name of a folder in data/')
if max_tokens < 8:
    sys.exit(f'max_tokens={max_tokens}: expected at least 8')


def texts_of(record):
    """Return the texts of a conversation or a preference."""
    messages, *answers = record if isinstance(record, tuple) else (record,)
    return [*(message['content'] for message in messages), *answers]


def check_vocabulary(tok, records):
    """Exit if the tokenizer lacks characters of the records, with the first ten of these characters."""
    missing = {}  # in order
    n_records = 0
    for record in records:
        unknown = tok.unknown(''.join(texts_of(record)))
        missing.update(dict.fromkeys(unknown))
        n_records += bool(unknown)
    if not missing:
        return
    shown = ', '.join(f'{char!r} (U+{ord(char):04X})' for char in list(missing)[:10])
    if len(missing) > 10:
        shown += f' and {len(missing) - 10:,} more'
    way_out = ''
    if tok.is_char:
        way_out = ('train with a tokenizer that has every character, made by '
                   'python data/any_text/prepare.py --input=... --tokenizer=bbpe, or ')
    sys.exit(f'not in the vocabulary of {tokenizer}: {shown}, in {n_records:,} of {len(records):,} conversations; '
             f'{way_out}leave these conversations out')


tok = load_tokenizer(tokenizer)
print(f'in the tokens of {tokenizer}' + ('' if 'tokenizer' in config_given else '; --tokenizer=data/... takes others'))
records = [record for path in config_given.get('input', [input]) for record in read(path)]
if not records:
    sys.exit(f'{input}: there is no conversation in it')
conversations = [record for record in records if isinstance(record, list)]  # messages
preferences = [record for record in records if isinstance(record, tuple)]  # (messages, chosen, rejected)
check_vocabulary(tok, records)

conversations = divide(conversations, val_fraction, seed)
preferences = divide(preferences, val_fraction, seed)
prompts = {}
for split in ('train', 'val'):
    prompts[split] = [prompt_of(messages) for messages in conversations[split] if prompt_of(messages)]
    prompts[split] += [messages for messages, _, _ in preferences[split]]

write_folders(dataset_folder(name), tok, conversations, preferences, prompts, max_tokens)
config_name, part = ('sft_chat', 'sft') if conversations['train'] else ('dpo_chat', 'pairs')
command = f'python train.py config/{config_name}.py --dataset={quoted(f"{name}/{part}")}'
print(f'next: {command} --init_from=..., a model with the tokenizer of {tokenizer}')
