"""Checkpoints and the tokenizer that belongs to them."""
import pickle

import pytest
import torch
from conftest import exit_line, run_script

from core.text.tokenizer import char_tokenizer
from core.weights.checkpoint import checkpoint_path, load_checkpoint, save_checkpoint, source_tokenizer, sum_of_bytes
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


def test_the_file_of_a_folder(tmp_path):
    """weights.pt, which is for sharing, may be all that somebody has been given."""
    for name in ('weights.pt', 'best.pt', 'ckpt.pt'):
        (tmp_path / name).touch()
        if name != 'ckpt.pt':  # with both, the run's settings choose: test_best_and_last()
            assert checkpoint_path(tmp_path) == str(tmp_path / name)
    assert '--ckpt=' in exit_line(checkpoint_path, tmp_path / 'best.pt')
    assert checkpoint_path(tmp_path / 'empty') == str(tmp_path / 'empty' / 'ckpt.pt')


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


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.int8, torch.float64, torch.bool, torch.int64])
def test_every_bit_counts_in_a_checksum(dtype):
    """Of a tensor with bytes left over behind the last 8, of its transpose, of a part of it that is not aligned."""
    tensor = (torch.arange(39) % 7).to(dtype).view(3, 13)
    before = sum_of_bytes(tensor)
    assert before == sum_of_bytes(tensor.clone())
    for part in (tensor, tensor.T, tensor[1:]):
        bits = part.contiguous().clone().view(-1).view(torch.uint8)
        expected = sum_of_bytes(part)
        for i in range(len(bits)):
            bits[i] ^= 1
            assert sum_of_bytes(bits) != expected
            bits[i] ^= 1
        assert sum_of_bytes(bits) == expected
    assert sum_of_bytes(tensor[0, 0]) == sum_of_bytes(torch.empty(0, dtype=dtype)) == 0


def test_a_checkpoint_without_a_part_or_checksums(tmp_path, capsys):
    """What was written without checksums resumes, and so does what somebody saved again without the optimizer."""
    path = str(tmp_path / 'ckpt.pt')
    save_as_nanogpt(tmp_path / 'nanogpt' / 'ckpt.pt', 'letters')
    checkpoint = load_checkpoint(str(tmp_path / 'nanogpt' / 'ckpt.pt'))
    save_checkpoint({**checkpoint, 'optimizer': {'state': {0: torch.ones(3)}}}, path)
    checkpoint = load_checkpoint(path)
    assert checkpoint['checksums'].keys() == {'model', 'optimizer', 'best_val_loss'}
    del checkpoint['optimizer']
    torch.save(checkpoint, path)
    load_checkpoint(path, check=True)
    checkpoint['model']['lm_head.weight'][0, 0] += 1
    torch.save(checkpoint, path)
    line = exit_line(load_checkpoint, path, check=True)
    assert '"model"' in line and '"checksums"' in line
    capsys.readouterr()
    load_checkpoint(path)  # for sampling
    assert capsys.readouterr().err.startswith(f'warning: {path}: damaged: "model" is not what was written')
