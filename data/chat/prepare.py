"""
Prepare conversations for instruction tuning, and preferences for a reward model and DPO: dataset folders data/chat/sft, data/chat/pairs and data/chat/prompts.

    python data/chat/prepare.py --input=conversations.jsonl --tokenizer=data/my
    python train.py config/sft_chat.py --init_from=out-my
"""
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), '..', '..')))  # the repository, which has core/

from core.text.conversations import divide, prompt_of, read, write_folders
from core.text.tokenizer import load_tokenizer

# ---------------------------------------------------------------------------------------------------------------------------------------
input = ''  # a .jsonl file, or a .json file with a list: Alpaca's, ShareGPT's or OpenAI's form, and pairs as chat.py --rate writes them; may be given several times
tokenizer = 'gpt2'  # that of the model to be tuned: 'gpt2', 'qwen2', a tokenizer.json or a folder with one; the role tokens that it lacks are appended
max_tokens = 1024  # longer conversations are cut there; at most the model's context
val_fraction = 0.05  # of the conversations and of the pairs, for validation
seed = 1337  # of the draw of these
name = 'chat'  # of the folder in data/
# ---------------------------------------------------------------------------------------------------------------------------------------
config, config_given = {}, {}
exec(open(os.path.join(sys.path[0], 'configurator.py'), encoding='utf-8').read())

if not input:
    sys.exit('no input given: python data/chat/prepare.py --input=conversations.jsonl')
if max_tokens < 8:
    sys.exit(f'max_tokens={max_tokens}: expected at least 8')
known = load_tokenizer(tokenizer)
records = [record for path in config_given.get('input', [input]) for record in read(path)]
if not records:
    sys.exit(f'{input}: there is no conversation in it')
conversations, pairs = [record for record in records if isinstance(record, list)], [record for record in records if isinstance(record, tuple)]
for messages in [*conversations, *([*pair[0], *({'content': side} for side in pair[1:])] for pair in pairs)]:
    for message in messages:
        unknown = known.unknown(message['content'])
        if unknown:
            sys.exit(f'not in the vocabulary of {tokenizer}: {unknown[0]!r} (U+{ord(unknown[0]):04X}), in {message["content"][:40]!r}; take another tokenizer, or leave the text out')
conversations, pairs = (divide(items, val_fraction, seed) for items in (conversations, pairs))
prompts = {split: [*filter(None, map(prompt_of, conversations[split])), *(pair[0] for pair in pairs[split])] for split in conversations}
folder = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), name)
write_folders(folder, known, conversations, pairs, prompts, max_tokens)
print('next: ' + (f'python train.py config/sft_chat.py --dataset={name}/sft' if conversations['train'] else f'python train.py config/dpo_chat.py --dataset={name}/pairs')
      + ' --init_from=..., the run whose tokenizer this is')
