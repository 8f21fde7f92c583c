"""Checkpoints and the tokenizer that belongs to them."""
import pickle

import torch
from conftest import exit_line, run_script

from core.text.tokenizer import char_tokenizer
from core.weights.checkpoint import source_tokenizer
from model import GPT, GPTConfig

CHARS = 'abcdefghijklmnopqrstuvwxyz '


def save_as_nanogpt(path, dataset):
    """Save a checkpoint as nanoGPT does: no tokenizer in it, only the name of the dataset."""
    torch.manual_seed(1)
    args = dict(n_layer=1, n_head=2, n_embd=16, block_size=16, bias=False, vocab_size=len(CHARS), dropout=0.0)
    checkpoint = {
        'model': GPT(GPTConfig(**args)).state_dict(),
        'optimizer': {},
        'model_args': args,
        'iter_num': 10,
        'best_val_loss': torch.tensor(3.0),
        'config': {'dataset': dataset},
    }
    path.parent.mkdir(parents=True)
    torch.save(checkpoint, path)


def test_sample_with_nanogpts_meta_pkl_alone(tmp_path):
    """A nanoGPT checkpoint's vocabulary is in data/<dataset>/meta.pkl. As in nanoGPT, no token files are needed."""
    save_as_nanogpt(tmp_path / 'out' / 'ckpt.pt', 'letters')
    folder = tmp_path / 'data' / 'letters'
    folder.mkdir(parents=True)
    meta = {
        'vocab_size': len(CHARS),
        'itos': dict(enumerate(CHARS)),
        'stoi': {char: i for i, char in enumerate(CHARS)},
    }
    (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))
    args = ['--start=to be', '--num_samples=1', '--max_new_tokens=20', '--device=cpu']
    result = run_script('sample.py', *args, cwd=tmp_path)
    assert (result.code, result.err) == (0, '')
    text = result.out.splitlines()[-1]
    assert text.startswith('to be') and len(text) == len('to be') + 20 and set(text) <= set(CHARS)


def test_a_meta_pkl_that_would_run_code(tmp_path):
    """Nothing in it is executed, and sample.py exits with one line."""
    save_as_nanogpt(tmp_path / 'out' / 'ckpt.pt', 'letters')
    folder = tmp_path / 'data' / 'letters'
    folder.mkdir(parents=True)
    (folder / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': print}))
    result = run_script('sample.py', '--start=to be', '--device=cpu', cwd=tmp_path)
    assert result.code == 1 and result.err.count('\n') == 1 and 'meta.pkl' in result.err, result.err


def test_tokenizer_of_a_source(tmp_path):
    """It is in the checkpoint, or in the Hugging Face folder, whose name is in the message if it has none."""
    tok = char_tokenizer('ab')
    assert source_tokenizer({'tokenizer': tok.json}).json == tok.json
    line = exit_line(source_tokenizer, {'folder': str(tmp_path)})
    assert line.startswith(f'{tmp_path}: no tokenizer in this folder')
    (tmp_path / 'tokenizer.json').write_text(tok.json, encoding='utf-8')
    assert source_tokenizer({'folder': str(tmp_path)}).json == tok.json
