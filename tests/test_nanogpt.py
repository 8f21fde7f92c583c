"""
Whatever a nanoGPT user has works here: config files, checkpoints, dataset folders. nanoGPT's side is written down again
below, from its formats and formulas.
"""
import math
import pickle
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, losses_of, run_script
from torch.nn import functional as F

from core.weights.checkpoint import describe
from model import GPT, GPTConfig


@pytest.fixture(autouse=True)
def one_thread():
    """For tensors this small, threads cost more than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

# --- nanoGPT's settings

DEFAULTS = {
    'out_dir': 'out', 'eval_interval': 2000, 'log_interval': 1, 'eval_iters': 200, 'eval_only': False,
    'always_save_checkpoint': True, 'init_from': 'scratch',
    'wandb_log': False, 'wandb_project': 'owt', 'wandb_run_name': 'gpt2',
    'dataset': 'openwebtext', 'gradient_accumulation_steps': 40, 'batch_size': 12, 'block_size': 1024,
    'n_layer': 12, 'n_head': 12, 'n_embd': 768, 'dropout': 0.0, 'bias': False,
    'learning_rate': 6e-4, 'max_iters': 600000, 'weight_decay': 0.1, 'beta1': 0.9, 'beta2': 0.95, 'grad_clip': 1.0,
    'decay_lr': True, 'warmup_iters': 2000, 'lr_decay_iters': 600000, 'min_lr': 6e-5, 'compile': True,
}
EVALUATE = {'batch_size': 8, 'eval_iters': 500, 'eval_only': True, 'wandb_log': False}
CONFIGS = {
    'eval_gpt2': {**EVALUATE, 'init_from': 'gpt2'},
    'eval_gpt2_medium': {**EVALUATE, 'init_from': 'gpt2-medium'},
    'eval_gpt2_large': {**EVALUATE, 'init_from': 'gpt2-large'},
    'eval_gpt2_xl': {**EVALUATE, 'init_from': 'gpt2-xl'},
    'finetune_shakespeare': {
        'out_dir': 'out-shakespeare', 'eval_interval': 5, 'eval_iters': 40, 'wandb_log': False,
        'wandb_project': 'shakespeare', 'dataset': 'shakespeare', 'init_from': 'gpt2-xl',
        'always_save_checkpoint': False, 'batch_size': 1, 'gradient_accumulation_steps': 32, 'max_iters': 20,
        'learning_rate': 3e-5, 'decay_lr': False,
    },
    'train_gpt2': {
        'wandb_log': True, 'wandb_project': 'owt', 'wandb_run_name': 'gpt2-124M', 'batch_size': 12, 'block_size': 1024,
        'gradient_accumulation_steps': 40, 'max_iters': 600000, 'lr_decay_iters': 600000, 'eval_interval': 1000,
        'eval_iters': 200, 'log_interval': 10, 'weight_decay': 0.1,
    },
    'train_shakespeare_char': {
        'out_dir': 'out-shakespeare-char', 'eval_interval': 250, 'eval_iters': 200, 'log_interval': 10,
        'always_save_checkpoint': False, 'wandb_log': False, 'wandb_project': 'shakespeare-char',
        'wandb_run_name': 'mini-gpt', 'dataset': 'shakespeare_char', 'gradient_accumulation_steps': 1,
        'batch_size': 64, 'block_size': 256, 'n_layer': 6, 'n_head': 6, 'n_embd': 384, 'dropout': 0.2,
        'learning_rate': 1e-3, 'max_iters': 5000, 'lr_decay_iters': 5000, 'min_lr': 1e-4, 'beta2': 0.99,
        'warmup_iters': 100,
    },
}
LAPTOP = {  # the arguments in nanoGPT's README
    'device': 'cpu', 'compile': False, 'eval_iters': 20, 'log_interval': 1, 'block_size': 64, 'batch_size': 12,
    'n_layer': 4, 'n_head': 4, 'n_embd': 128, 'max_iters': 2000, 'lr_decay_iters': 2000, 'dropout': 0.0,
}


@pytest.fixture
def config_of(monkeypatch):
    """config_of(*args) runs train.py as far as the configurator, and returns the settings it would start with."""
    def config(*args):
        source = (ROOT / 'train.py').read_text(encoding='utf-8')
        head = source[:source.index('\n', source.index('\nexec(open(') + 1)]
        script = {'__name__': '__main__', '__file__': str(ROOT / 'train.py'), '__doc__': ''}
        monkeypatch.setattr(sys, 'argv', ['train.py', *map(str, args)])
        exec(compile(head, 'train.py', 'exec'), script)
        assert all(script[key] == value for key, value in script['config'].items())
        return script['config']
    return config


def test_defaults(config_of):
    """train.py's defaults are nanoGPT's, except those that depend on the machine."""
    config = config_of()
    assert {key: config[key] for key in DEFAULTS} == DEFAULTS
    assert all(type(config[key]) is type(value) for key, value in DEFAULTS.items())
    assert [config[key] for key in ('device', 'dtype', 'backend')] == ['auto', 'auto', 'auto']


@pytest.mark.parametrize('name', CONFIGS)
def test_config_files(config_of, tmp_path, name):
    """A file with nanoGPT's settings runs unchanged, and ours of the same name has the same settings."""
    expected = DEFAULTS | CONFIGS[name]
    text = ''.join(f'{key} = {value!r}\n' for key, value in CONFIGS[name].items())
    if name == 'finetune_shakespeare':
        text = f"import time\n\n{text}wandb_run_name = 'ft-' + str(time.time())\n"
    (tmp_path / f'{name}.py').write_text(text)
    theirs = config_of(tmp_path / f'{name}.py')
    ours = config_of(f'config/{name}.py')
    if name == 'finetune_shakespeare':
        assert float(theirs['wandb_run_name'].removeprefix('ft-')) > 1.7e9
        assert ours['wandb_run_name'].startswith('ft')
        expected = {key: value for key, value in expected.items() if key != 'wandb_run_name'}
    assert {key: theirs[key] for key in expected} == expected
    assert {key: ours[key] for key in expected} == expected


def test_readme_command(config_of):
    config = config_of('config/train_shakespeare_char.py', *(f'--{key}={value}' for key, value in LAPTOP.items()))
    expected = DEFAULTS | CONFIGS['train_shakespeare_char'] | LAPTOP
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize('style, text', [
    ({}, '10,745,088 parameters, 10.65M as nanoGPT counts (6 layers, '),  # nanoGPT prints 10.65M
    ({'rope_theta': 1e4, 'tied': False}, '10,671,744 parameters (6 layers, '),  # no learned positions; two matrices
])
def test_counts_of_parameters(style, text):
    with torch.device('meta'):
        model = GPT(GPTConfig(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384, bias=False, **style))
    assert describe(model).startswith(text)

# --- nanoGPT's checkpoints

CHARS = 'abcdefghijklmnopqrstuvwxyz '
BLOCK, LAYERS, HEADS, WIDTH = 16, 2, 2, 16
# each so far from its default that ignoring it would show
TRAINING = {'learning_rate': 1e-2, 'weight_decay': 0.5, 'beta1': 0.8, 'beta2': 0.95, 'grad_clip': 0.2}


def forward(params, idx):
    """Return the logits (B, T, V) of GPT-2, in plain operations."""
    def linear(x, name):
        return x @ params[f'{name}.weight'].T + params.get(f'{name}.bias', 0)

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * params[f'{name}.weight'] + params.get(f'{name}.bias', 0)

    def heads(x):
        return torch.stack(x.split(WIDTH // HEADS, dim=-1), dim=1)  # (B, nh, T, hs)

    T = idx.shape[1]
    x = params['transformer.wte.weight'][idx] + params['transformer.wpe.weight'][:T]
    for layer in range(LAYERS):
        h = f'transformer.h.{layer}.'
        q, k, v = (heads(part) for part in linear(norm(x, h + 'ln_1'), h + 'attn.c_attn').chunk(3, dim=-1))
        scores = (q @ k.transpose(2, 3)) / math.sqrt(WIDTH // HEADS)
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        x = x + linear(torch.cat((scores.softmax(-1) @ v).unbind(1), dim=-1), h + 'attn.c_proj')
        x = x + linear(F.gelu(linear(norm(x, h + 'ln_2'), h + 'mlp.c_fc')), h + 'mlp.c_proj')
    return norm(x, 'transformer.ln_f') @ params['transformer.wte.weight'].T


@torch.no_grad()
def greedy(params, ids, steps):
    """Return ids and the most likely continuation, token by token, each from the last BLOCK tokens."""
    for _ in range(steps):
        ids = [*ids, forward(params, torch.tensor([ids[-BLOCK:]]))[0, -1].argmax().item()]
    return ids


def new_params(bias, seed=3):
    """Return random weights under nanoGPT's names, in the order in which nanoGPT's model lists its parameters."""
    layer_shapes = {
        'ln_1': (WIDTH,), 'attn.c_attn': (3 * WIDTH, WIDTH), 'attn.c_proj': (WIDTH, WIDTH),
        'ln_2': (WIDTH,), 'mlp.c_fc': (4 * WIDTH, WIDTH), 'mlp.c_proj': (WIDTH, 4 * WIDTH),
    }
    shapes = {'transformer.wte.weight': (len(CHARS), WIDTH), 'transformer.wpe.weight': (BLOCK, WIDTH)}
    for layer in range(LAYERS):
        h = f'transformer.h.{layer}.'
        for name, shape in layer_shapes.items():
            shapes[f'{h}{name}.weight'] = shape
            if bias:
                shapes[f'{h}{name}.bias'] = shape[:1]
    shapes['transformer.ln_f.weight'] = (WIDTH,)
    if bias:
        shapes['transformer.ln_f.bias'] = (WIDTH,)
    generator = torch.Generator().manual_seed(seed)
    params = {}
    for name, shape in shapes.items():
        scale = 0.1 if 'wte' in name else 0.6  # larger in the layers, because a tied head tends to repeat its input
        is_gain = len(shape) == 1 and name.endswith('weight')
        params[name] = torch.randn(shape, generator=generator) * scale + is_gain
    return {name: value.requires_grad_() for name, value in params.items()}


def plain_adamw(params):
    """AdamW as nanoGPT sets it up: matrices decay, vectors do not."""
    groups = [{'params': [p for p in params.values() if p.dim() >= 2], 'weight_decay': TRAINING['weight_decay']},
              {'params': [p for p in params.values() if p.dim() < 2], 'weight_decay': 0.0}]
    return torch.optim.AdamW(groups, lr=TRAINING['learning_rate'], betas=(TRAINING['beta1'], TRAINING['beta2']))


def train_plainly(params, optimizer, ids, steps):
    """Train on one window. Returns the losses."""
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(forward(params, ids[None, :-1])[0], ids[1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params.values(), TRAINING['grad_clip'])
        optimizer.step()
        losses.append(loss.item())
    return losses


def save_as_nanogpt(path, params, optimizer, step, prefix='', bias=False):
    """Save a ckpt.pt with the entries that nanoGPT writes."""
    state = {prefix + name: value.detach().clone() for name, value in params.items()}
    state[f'{prefix}lm_head.weight'] = state[f'{prefix}transformer.wte.weight']  # tied
    shape = {'n_layer': LAYERS, 'n_head': HEADS, 'n_embd': WIDTH, 'block_size': BLOCK, 'bias': bias}
    machine = {'device': 'cuda', 'dtype': 'bfloat16', 'backend': 'nccl'}
    checkpoint = {
        'model': state,
        'optimizer': optimizer.state_dict(),
        'model_args': {**shape, 'vocab_size': len(CHARS), 'dropout': 0.0},
        'iter_num': step,
        'best_val_loss': torch.tensor(9.9),
        'config': {**DEFAULTS, **TRAINING, **shape, **machine, 'dataset': 'letters'},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)


@pytest.fixture
def letters(tmp_path):
    """
    A folder data/letters as nanoGPT's own prepare.py writes it. Its train.bin is one window long, so that every step
    trains on the same tokens.
    """
    folder = tmp_path / 'data' / 'letters'
    folder.mkdir(parents=True)
    ids = np.random.default_rng(0).integers(len(CHARS), size=300).astype(np.uint16)
    ids[:BLOCK + 1].tofile(folder / 'train.bin')
    ids.tofile(folder / 'val.bin')
    itos = dict(enumerate(CHARS))
    meta = {'vocab_size': len(CHARS), 'itos': itos, 'stoi': {char: i for i, char in itos.items()}}
    with open(folder / 'meta.pkl', 'wb') as f:
        pickle.dump(meta, f)
    return folder


@pytest.mark.parametrize('bias, prefix', [(False, ''), (True, '_orig_mod.')])
def test_sample_from_their_checkpoint(letters, tmp_path, bias, prefix):
    """
    Greedy text equals greedy()'s, token for token, also beyond the context. The letters come from the dataset that the
    checkpoint's config names.
    """
    params = new_params(bias)
    save_as_nanogpt(tmp_path / 'out' / 'ckpt.pt', params, plain_adamw(params), 0, prefix, bias=bias)
    for prompt in ('q', 'to be or not', 'longer than sixteen letters'):
        expected = greedy(params, [CHARS.index(char) for char in prompt], 2 * BLOCK)
        assert len(set(expected[len(prompt):])) >= 4  # not one letter over and over
        result = run_script('sample.py', '--temperature=0', f'--start={prompt}', '--num_samples=1',
                            f'--max_new_tokens={2 * BLOCK}', '--device=cpu', '--dtype=float32', cwd=tmp_path)
        assert result.code == 0, result.err
        assert result.out.splitlines()[-1] == ''.join(CHARS[i] for i in expected)


RESUME = ['--init_from=resume', '--batch_size=2', '--gradient_accumulation_steps=2', '--eval_iters=1', '--device=cpu',
          '--dtype=float32', '--compile=False']


@pytest.mark.parametrize('bias, prefix', [(True, ''), (False, '_orig_mod.')])
def test_resume_their_checkpoint(letters, tmp_path, bias, prefix):
    """After resuming, the losses are those of plain AdamW that goes on with its moments on the same tokens."""
    params = new_params(bias)
    optimizer = plain_adamw(params)
    ids = torch.from_numpy(np.fromfile(letters / 'train.bin', dtype=np.uint16).astype(np.int64))
    train_plainly(params, optimizer, ids, 5)
    save_as_nanogpt(tmp_path / 'out' / 'ckpt.pt', params, optimizer, 5, prefix, bias=bias)
    training = [f'--{key}={value}' for key, value in TRAINING.items()]
    result = run_script('train.py', *RESUME, '--dataset=letters', '--max_iters=9', *training, '--decay_lr=False',
                        cwd=tmp_path)
    assert result.code == 0, result.err
    losses = losses_of(tmp_path / 'out')
    assert [step for step, _ in losses] == [5, 6, 7, 8]
    expected = train_plainly(params, optimizer, ids, 4)
    assert expected[0] - expected[-1] > 0.1
    np.testing.assert_allclose([loss for _, loss in losses], expected, rtol=2e-5)
    checkpoint = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)
    assert checkpoint['iter_num'] == 9
    for name, value in params.items():
        if value.dim() == 2:  # the gradient of a key's bias is only rounding errors, which Adam makes large
            torch.testing.assert_close(checkpoint['model'][name], value.detach(), rtol=1e-3, atol=1e-4)


def test_resume_on_our_own_folder(letters, tmp_path):
    """nanoGPT's checkpoint of a character model resumes on a folder of the same letters, made by our prepare script."""
    text = CHARS * 20
    (tmp_path / 'ours.txt').write_text(text)
    result = run_script('data/any_text/prepare.py', f'--input={tmp_path / "ours.txt"}', cwd=tmp_path)
    assert result.code == 0, result.err
    params = new_params(False)
    save_as_nanogpt(tmp_path / 'out' / 'ckpt.pt', params, plain_adamw(params), 0)
    result = run_script('train.py', *RESUME, '--dataset=ours', '--max_iters=1', cwd=tmp_path)
    assert result.code == 0, result.err
    assert torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)['iter_num'] == 1

# --- nanoGPT's data folders


def test_folder_with_meta_pkl(letters, tmp_path):
    """A model trains on this folder, and samples without it."""
    (letters / 'val.bin').replace(letters / 'train.bin')
    args = [arg for arg in TINY if not arg.startswith('--block_size')] + ['--block_size=8']
    result = run_script('train.py', *args, '--dataset=letters', cwd=tmp_path)
    assert (result.code, result.err) == (0, '')
    assert len(losses_of(tmp_path / 'out')) == 4
    letters.rename(tmp_path / 'elsewhere')
    result = run_script('sample.py', '--start=to be', '--num_samples=1', '--max_new_tokens=20', '--device=cpu',
                        cwd=tmp_path)
    assert (result.code, result.err) == (0, '')
    text = result.out.splitlines()[-1]
    assert text.startswith('to be')
    assert set(text) <= set(CHARS)


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """Nothing can be fetched: no mirror, no server, no package index, an empty cache."""
    for name in ('DATA_MIRROR', 'PIP_FIND_LINKS', 'HF_ENDPOINT'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr('core.text.tokenizer.GPT2_URL', 'http://127.0.0.1:9/vocab.bpe')


def test_bins_alone(tmp_path, no_network):
    """
    Bins without a vocabulary are read as GPT-2 BPE, with one warning. Training needs no tokenizer; sampling says that
    it cannot be downloaded.
    """
    folder = tmp_path / 'data' / 'bins'
    folder.mkdir(parents=True)
    for split in ('train', 'val'):
        np.random.default_rng(1).integers(50257, size=300).astype(np.uint16).tofile(folder / f'{split}.bin')
    result = run_script('train.py', *TINY, '--dataset=bins', '--max_iters=1', cwd=tmp_path)
    assert result.code == 0, result.err
    assert result.err.count('\n') == 1
    assert result.err.startswith('warning: data/bins has')
    assert 'GPT-2 BPE' in result.err
    assert losses_of(tmp_path / 'out')[0][1] == pytest.approx(math.log(50304), abs=0.5)
    checkpoint = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)
    assert checkpoint['model']['transformer.wte.weight'].shape[0] == 50304  # 50,257 rounded up, as nanoGPT does
    result = run_script('sample.py', '--num_samples=1', '--device=cpu', cwd=tmp_path)
    assert result.code == 1
    assert 'vocab.bpe' in result.err.splitlines()[-1]
    assert 'Traceback' not in result.err


def test_bins_alone_with_the_tokenizer(tmp_path, monkeypatch, capsys):
    """If GPT-2's tokenizer can be loaded, it is used, with the same warning."""
    from core.text import dataset
    from core.text.tokenizer import char_tokenizer
    monkeypatch.setattr(dataset, 'gpt2_tokenizer', lambda: char_tokenizer('ab'))
    for split in ('train', 'val'):
        np.zeros(10, dtype=np.uint16).tofile(tmp_path / f'{split}.bin')
    data = dataset.open_dataset(str(tmp_path))
    err = capsys.readouterr().err
    assert err.count('\n') == 1
    assert err.startswith('warning: ')
    assert 'GPT-2 BPE' in err and 'without' not in err
    assert data.vocab_size == 50257
    assert data.tokenizer.decode([1, 0]) == 'ba'


def test_our_folder_for_nanogpt(tmp_path):
    """
    Our bins equal nanoGPT's byte for byte, and our meta.pkl, read by plain pickle, encodes and decodes as its sample.py
    would.
    """
    text = 'First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n' * 3 + '石头记'
    (tmp_path / 'play.txt').write_text(text, encoding='utf-8')
    (tmp_path / 'data').mkdir()
    assert run_script('data/any_text/prepare.py', f'--input={tmp_path / "play.txt"}', cwd=tmp_path).code == 0
    folder = tmp_path / 'data' / 'play'
    stoi = {char: i for i, char in enumerate(sorted(set(text)))}
    ids = np.array([stoi[char] for char in text], dtype=np.uint16)
    n = int(len(text) * 0.9)
    assert (folder / 'train.bin').read_bytes() == ids[:n].tobytes()
    assert (folder / 'val.bin').read_bytes() == ids[n:].tobytes()
    meta = pickle.loads((folder / 'meta.pkl').read_bytes())
    assert {char: i for char, i in meta['stoi'].items() if len(char) == 1} == stoi
    assert ''.join(meta['itos'][i] for i in ids.tolist()) == text
    assert meta['vocab_size'] == len(meta['itos']) == len(stoi) + 1
    assert meta['itos'][len(stoi)] == '<|endoftext|>'  # we reserve the last id
