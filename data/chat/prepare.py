"""
Prepare your own conversations for instruction tuning, and preferences for a reward model, DPO and GRPO.
Writes the dataset folders data/chat/sft, data/chat/pairs and data/chat/prompts.

    python data/chat/prepare.py --input=conversations.jsonl --tokenizer=data/my
    python train.py config/sft_chat.py --init_from=out-my
"""
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), '..', '..')))  # the repository: for core/

import core.startup  # noqa: F401  first: it catches Ctrl-C and missing packages in the imports below

from core.text.conversations import divide, prompt_of, read, write_folders
from core.text.tokenizer import load_tokenizer

# -----------------------------------------------------------------------------
input = ''  # a .jsonl file, or a .json file with a list (forms: data/chat/readme.md); may be given several times
tokenizer = 'gpt2'  # the model's: 'gpt2', 'qwen2', a tokenizer.json or its folder; missing role tokens are appended
max_tokens = 1024  # longer conversations are cut there; at most the model's context
val_fraction = 0.05  # share of the conversations and of the pairs for validation
seed = 1337  # of the random choice of the validation part
name = 'chat'  # of the folder in data/
# -----------------------------------------------------------------------------
config, config_given = {}, {}
exec(open(os.path.join(sys.path[0], 'configurator.py'), encoding='utf-8').read())

if not input:
    sys.exit('no input given: python data/chat/prepare.py --input=conversations.jsonl')
if max_tokens < 8:
    sys.exit(f'max_tokens={max_tokens}: expected at least 8')


def check_vocabulary(tok, texts):
    """Exit if a text has a character that the tokenizer lacks."""
    for text in texts:
        unknown = tok.unknown(text)
        if unknown:
            char = unknown[0]
            sys.exit(f'not in the vocabulary of {tokenizer}: {char!r} (U+{ord(char):04X}), in {text[:40]!r}; '
                     'take another tokenizer, or leave the text out')


tok = load_tokenizer(tokenizer)
records = [record for path in config_given.get('input', [input]) for record in read(path)]
if not records:
    sys.exit(f'{input}: there is no conversation in it')
conversations = [record for record in records if isinstance(record, list)]  # messages
preferences = [record for record in records if isinstance(record, tuple)]  # (messages, chosen, rejected)
for messages in conversations:
    check_vocabulary(tok, [message['content'] for message in messages])
for messages, chosen, rejected in preferences:
    check_vocabulary(tok, [*(message['content'] for message in messages), chosen, rejected])

conversations = divide(conversations, val_fraction, seed)
preferences = divide(preferences, val_fraction, seed)
prompts = {}
for split in ('train', 'val'):
    prompts[split] = [prompt_of(messages) for messages in conversations[split] if prompt_of(messages)]
    prompts[split] += [messages for messages, _, _ in preferences[split]]

folder = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), name)
write_folders(folder, tok, conversations, preferences, prompts, max_tokens)
if conversations['train']:
    command = f'python train.py config/sft_chat.py --dataset={name}/sft'
else:
    command = f'python train.py config/dpo_chat.py --dataset={name}/pairs'
print(f'next: {command} --init_from=..., the run whose tokenizer this is')
