"""export.py's Hugging Face folders against transformers. GGUF is in test_gguf.py."""
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, exit_line, run_script, write
from test_huggingface import NETWORKS, make

from core.files import atomic_folder
from core.text.chat_template import can_chat, end_of_turn, render
from core.text.tokenizer import (
    add_specials,
    char_tokenizer,
    gpt2_tokenizer,
    prune_tokenizer,
    qwen2_tokenizer,
    train_bpe,
)
from core.weights.checkpoint import describe, load_checkpoint, save_checkpoint
from core.weights.huggingface import architecture_of, load_pretrained, save_pretrained
from model import GPT, GPTConfig

transformers = pytest.importorskip('transformers')

TEXT = 'The quick brown fox jumps over the lazy dog. 满纸荒唐言，一把辛酸泪！\n  都云作者痴，谁解其中味？ 1234 \n'
MODERN = dict(rope_theta=1e4, norm='rmsnorm', activation='swiglu', bias=False)
STYLES = {
    'gpt2': {},
    'gpt2, no bias, tanh, untied': dict(bias=False, activation='gelu_tanh', tied=False),
    'llama': dict(**MODERN, tied=False),
    'llama, tied, gqa': dict(**MODERN, n_kv_head=2),
    'qwen3': dict(**MODERN, qk_norm=True, tied=False),
    'qwen3, tied, gqa, wide heads': dict(**MODERN, qk_norm=True, n_kv_head=1, head_size=16, norm_eps=1e-6),
    'qwen3, windows': dict(**MODERN, qk_norm=True, n_kv_head=2, window=7, window_pattern='SLS', n_layer=4),
}


def network(vocab_size=97, **settings):
    """Return a small random network. No bias is 0, no gain is 1, and its greedy text does not repeat one token."""
    torch.manual_seed(3)
    shape = dict(block_size=128, n_layer=2, n_head=4, n_embd=32)
    model = GPT(GPTConfig(**{**shape, 'vocab_size': vocab_size, **settings})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.05 if p is model.lm_head.weight else 0.3))
    return model


def save_model(checkpoint, model, path):
    """Save a copy of a run's checkpoint with another model in it."""
    save_checkpoint({**checkpoint, 'model': model.state_dict(), 'model_args': vars(model.config)}, str(path))


def exported(*args):
    """Run export.py, which must succeed; returns what it printed."""
    result = run_script('export.py', *args)
    assert result.code == 0, result.err
    return result.out


def refused(*args, **kwargs):
    """Run export.py, which must exit with one line; returns it."""
    result = run_script('export.py', *args, **kwargs)
    assert result.code == 1 and result.err.count('\n') == 1, result.err
    return result.err


@torch.no_grad()
@pytest.mark.parametrize('style', STYLES)
def test_transformers_computes_the_same(style, tmp_path):
    model, tokenizer = network(**STYLES[style]), char_tokenizer([chr(33 + i) for i in range(96)])
    save_pretrained(tmp_path, model, tokenizer, 'float32', 'x')
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert peer.config.model_type == architecture_of(model.config, 'x') == style.split(',')[0]
    if 'no bias' not in style:  # transformers' GPT-2 has them, as zeros
        assert describe(model).startswith(f'{peer.num_parameters():,} parameters')
    idx = torch.randint(97, (3, 20))
    assert (model(idx) - peer(idx).logits).abs().max() <= 1e-5
    text = torch.stack([*model.generate(idx[:, :8], 100)], dim=1)  # (3, 100)
    greedy = dict(max_new_tokens=100, do_sample=False, eos_token_id=None, attention_mask=torch.ones(3, 8))
    assert torch.equal(text, peer.generate(idx[:, :8], **greedy)[:, 8:])
    assert len(text.unique()) > 8
    again = load_pretrained(str(tmp_path)).eval()
    assert again.config.windows() == model.config.windows()
    if model.config.bias:
        assert torch.equal(again(idx), model(idx))
    else:
        assert (again(idx) - model(idx)).abs().max() <= 1e-5


ROLES = ['<|im_start|>system\n', '<|im_start|>user\n', '<|im_start|>assistant\n', '<|im_end|>\n']
TOKENIZERS = {
    'char': lambda: char_tokenizer(sorted(set(TEXT))),
    'char, chat': lambda: add_specials(char_tokenizer(sorted(set(TEXT))), ROLES),
    'bbpe': lambda: train_bpe([TEXT * 20], 300),
    'gpt2': gpt2_tokenizer,
    'qwen2': qwen2_tokenizer,
    'qwen2, pruned': lambda: prune_tokenizer(qwen2_tokenizer(), qwen2_tokenizer().encode(TEXT)),
}


@pytest.mark.network
@pytest.mark.parametrize('name', TOKENIZERS)
def test_tokenizer_in_transformers(name, tmp_path):
    """It encodes and decodes as ours does, and has the same end-of-text token and chat template."""
    tok = TOKENIZERS[name]()
    save_pretrained(tmp_path, network(tok.vocab_size, n_embd=4), tok, 'float32', 'x')
    hf_tok = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (TEXT, TEXT[::-1], 'fox', ' \n\n  fox\n'):
        ids = tok.encode(text).tolist()
        assert hf_tok.encode(text, add_special_tokens=False) == ids
        assert hf_tok.decode(ids) == text
    assert len(hf_tok) == tok.vocab_size
    generation = json.loads((tmp_path / 'generation_config.json').read_text(encoding='utf-8'))
    assert can_chat(tok) == (hf_tok.chat_template is not None) == ('chat' in name or name == 'qwen2')
    if can_chat(tok):
        talk = [{'role': 'user', 'content': 'the fox'}, {'role': 'assistant', 'content': '满纸'}]
        assert hf_tok.apply_chat_template(talk, return_dict=False) == render(talk, tok)[0].tolist()
        prompt = hf_tok.apply_chat_template(talk[:1], add_generation_prompt=True, return_dict=False)
        assert prompt == render(talk[:1], tok, reply=True)[0].tolist()
        assert hf_tok.eos_token_id == end_of_turn(tok)
        assert set(generation['eos_token_id']) == {end_of_turn(tok), tok.eot}
    else:
        assert hf_tok.eos_token_id == tok.eot
        assert generation['eos_token_id'] == [tok.eot]


@pytest.mark.parametrize('name', NETWORKS)
def test_export_of_what_was_imported(name, tmp_path):
    """An imported bf16 model is exported with the same tensors bit for bit, and twice as the same bytes."""
    from safetensors.torch import load_file
    make(tmp_path / 'original', name).bfloat16().save_pretrained(tmp_path / 'original')
    tok = char_tokenizer([chr(33 + i) for i in range(70)])  # fewer ids than the model has rows
    write(tmp_path / 'original' / 'tokenizer.json', tok.json)
    for folder in ('first', 'second'):
        exported(f'--init_from={tmp_path / "original"}', f'--to={tmp_path / folder}', '--quant=bf16')
    original, first = (load_file(tmp_path / folder / 'model.safetensors') for folder in ('original', 'first'))
    assert original.keys() == first.keys()
    for key, tensor in first.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, original[key]), key
    for file in os.listdir(tmp_path / 'first'):
        assert (tmp_path / 'first' / file).read_bytes() == (tmp_path / 'second' / file).read_bytes(), file


def greedy_text(*args):
    """What sample.py writes for a model at temperature 0."""
    settings = ['--device=cpu', '--start=one', '--num_samples=1', '--max_new_tokens=20', '--temperature=0']
    return run_script('sample.py', *args, *settings).out.partition('bytes\n')[2]


def test_command(tiny_run, tmp_path):
    """sample.py reads the folder and writes the same greedy text. README.md has the measured losses."""
    to = tmp_path / 'deep' / 'stone'
    assert f'--init_from={to}' in exported(f'--out_dir={tiny_run}', f'--to={to}/')
    text = greedy_text(f'--out_dir={tiny_run}')
    assert text == greedy_text(f'--init_from={to}') and 'one' in text
    card = (to / 'README.md').read_text(encoding='utf-8')
    loss = load_checkpoint(str(tiny_run / 'ckpt.pt'))['measured']['val_loss']
    for part in (f'| val loss | {loss:.4f} |', '| val bpb |', '4 steps, up to 512 tokens', '| learning_rate | 0.001 |'):
        assert part in card


def test_force(tiny_run, tmp_path):
    """It replaces an earlier export, but never the model itself or a folder with other files."""
    to = tmp_path / 'stone'
    args = [f'--out_dir={tiny_run}', f'--to={to}']
    exported(*args)

    def inodes():
        return sorted(path.stat().st_ino for path in to.iterdir())
    before = inodes()
    assert '--force' in refused(*args)
    assert inodes() == before
    exported(*args, '--force', '--quant=f16')
    assert json.loads((to / 'config.json').read_text(encoding='utf-8'))['dtype'] == 'float16'
    assert os.listdir(tmp_path) == ['stone']

    assert 'this is what is to be exported' in refused(f'--init_from={to}', f'--to={to}', '--force')
    (to / 'thesis.txt').touch()
    assert 'thesis.txt' in refused(*args, '--force')
    assert (to / 'thesis.txt').exists()


@torch.no_grad()
@pytest.mark.parametrize('extra', [7, -1])
def test_rows_of_the_vocabulary(extra, tiny_run, tmp_path):
    """Rows that only round the vocabulary up are cut off. Rows that nanoGPT's checkpoints lack are added."""
    checkpoint = load_checkpoint(str(tiny_run / 'ckpt.pt'))
    size = checkpoint['model_args']['vocab_size']
    model = GPT(GPTConfig(**{**checkpoint['model_args'], 'vocab_size': size + extra}))
    save_model(checkpoint, model, tmp_path / 'x.pt')
    out = exported(f'--init_from={tmp_path / "x.pt"}', f'--to={tmp_path / "x"}')
    assert ('mean' in out) == (extra < 0)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'x')
    assert peer.config.vocab_size == size
    common = min(size, size + extra)
    idx = torch.randint(common, (2, 9))
    assert (peer(idx).logits[..., :common] - model(idx)[..., :common]).abs().max() <= 1e-5


@torch.no_grad()
def test_shards(tmp_path, monkeypatch):
    import huggingface_hub
    save = huggingface_hub.save_torch_state_dict

    def save_in_small_shards(*args, max_shard_size, **kwargs):
        save(*args, max_shard_size='20KB', **kwargs)
    monkeypatch.setattr(huggingface_hub, 'save_torch_state_dict', save_in_small_shards)
    model = network(**STYLES['qwen3'])
    save_pretrained(tmp_path, model, char_tokenizer(map(chr, range(33, 129))), 'float32', 'x')
    assert len([*tmp_path.glob('*.safetensors')]) > 2
    idx = torch.randint(97, (2, 9))
    again = load_pretrained(str(tmp_path)).eval()
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for logits in (again(idx), peer(idx).logits):
        assert (logits - model(idx)).abs().max() <= 1e-5


@pytest.mark.parametrize('settings, names', [
    (dict(window=8), ['window=8', 'window=0']),
    (dict(**MODERN, window=8), ['window=8', 'qk_norm=False', 'window=0']),
    (dict(rope_theta=1e4), ['norm=layernorm', 'norm=rmsnorm', 'activation=gelu', 'bias=True']),
    (dict(**{**MODERN, 'bias': True}), ['bias=True']),
    (dict(norm='rmsnorm'), ['norm=rmsnorm', 'norm=layernorm']),
    (dict(n_kv_head=2), ['n_kv_head=2']),
    (dict(qk_norm=True, head_size=16), ['qk_norm=True', 'head_size=16']),
])
def test_networks_between_the_styles(settings, names, tmp_path):
    line = exit_line(architecture_of, network(**settings).config, 'out-x')
    assert all(name in line for name in ['out-x', *names]), line


@pytest.mark.parametrize('to, form', [
    ('original', 'hf'),
    ('weights.pt', 'gguf'),
    ('mine', 'ollama'),
    ('weights.pt', 'hf'),
    ('mine', 'gguf'),
    ('.', 'hf'),
    ('weights.pt/x', 'hf'),
])
def test_what_is_not_replaced(to, form, tiny_run, tmp_path):
    """Files and folders that export.py has not written, even with --force."""
    write(tmp_path / 'original' / 'config.json', '{}')
    write(tmp_path / 'weights.pt', b'weights')
    write(tmp_path / 'mine' / 'README.md', '# mine')
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    line = refused(f'--out_dir={tiny_run}', f'--format={form}', f'--to={tmp_path / to}', '--force')
    assert f'to={tmp_path / to}'.removesuffix('/.') in line
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == before


def test_format_from_the_name(tiny_run, tmp_path):
    """Without --format the ending of --to decides. With --format=gguf, a name that ends in / is the file's folder."""
    pytest.importorskip('gguf')
    assert 'llama-cli -m' in exported(f'--out_dir={tiny_run}', f'--to={tmp_path / "model.gguf"}', '--quant=q8_0')
    exported(f'--out_dir={tiny_run}', f'--to={tmp_path / "folder"}/', '--format=gguf', '--quant=Q5_1')
    files = [tmp_path / 'model.gguf', tmp_path / 'folder' / f'{tiny_run.name}.gguf']
    assert [path.read_bytes()[:4] for path in files] == [b'GGUF', b'GGUF']
    exported(f'--out_dir={tiny_run}', f'--to={tmp_path / "model"}')
    assert (tmp_path / 'model' / 'config.json').exists()


def test_a_link_stays_a_link(tiny_run, tmp_path):
    """What it points to is replaced."""
    pytest.importorskip('gguf')
    write(tmp_path / 'old.gguf', b'GGUF, an older one')
    os.symlink('old.gguf', tmp_path / 'link.gguf')
    exported(f'--out_dir={tiny_run}', '--format=gguf', f'--to={tmp_path / "link.gguf"}', '--force')
    assert os.path.islink(tmp_path / 'link.gguf')
    assert os.path.getsize(tmp_path / 'old.gguf') > 1000


def test_names(tiny_run, tmp_path):
    """Without --to the folder has the run's name, also with --ckpt. The next command is quoted for a shell."""
    run = tmp_path / 'out v1.5 红'
    shutil.copytree(tiny_run, run)
    for args in ([f'--out_dir={run}'], [f'--ckpt={run / "ckpt.pt"}', '--force']):
        result = run_script('export.py', *args, cwd=tmp_path)
        assert result.code == 0, result.err
        assert "'--init_from=exported/out v1.5 红'" in result.out
        assert os.listdir(tmp_path / 'exported') == [run.name]
    modes = {oct(path.stat().st_mode) for path in (tmp_path / 'exported' / run.name).iterdir()}
    assert modes == {oct((run / 'run.json').stat().st_mode)}


def test_a_tokenizer_for_a_run_that_has_one(tiny_run, tmp_path):
    assert 'tokenizer=gpt2' in refused(f'--out_dir={tiny_run}', '--tokenizer=gpt2', f'--to={tmp_path / "x"}')
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize('form', ['hf', 'gguf'])
def test_a_full_disk(form, tiny_run, tmp_path):
    """The script exits with one line and leaves no file."""
    if form == 'gguf':
        pytest.importorskip('gguf')
    limited = f'ulimit -f 20; exec "$@" --format={form} --out_dir={tiny_run} --to={tmp_path / "x"}'
    command = ['bash', '-c', limited, 'bash', sys.executable, 'export.py']
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding='utf-8')
    assert result.returncode == 1, result.stderr
    assert result.stderr.count('\n') == 1 and 'could not be written' in result.stderr, result.stderr
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize('args, names', [
    (['--format=onnx'], ['format=onnx', 'hf', 'gguf', 'ollama']),
    (['--quant=q4_0'], ['quant=q4_0', 'f32, f16, bf16', 'hf']),
    (['--quant=q8_0'], ['quant=q8_0', '--format=gguf']),
    (['--quant=q3', '--format=gguf'], ['quant=q3', 'q8_0']),
    (['--quant=q4_k_m', '--format=gguf'], ['quant=q4_k_m', 'llama-quantize model.gguf model-q4_k_m.gguf q4_k_m']),
    (['--quant=Q6_K'], ['llama-quantize model.gguf model-q6_k.gguf q6_k']),
    (['--format=hf', '--to=model.gguf'], ['to=model.gguf', 'format=hf', 'leave out --format']),
    (['--format=ollama', '--to=model.GGUF'], ['to=model.GGUF', 'format=ollama']),
    (['--ckpt=nowhere.pt'], ['nowhere.pt']),
])
def test_bad_arguments(args, names, tiny_run, tmp_path):
    line = refused(f'--out_dir={tiny_run}', f'--to={tmp_path / "x"}', *args)
    assert all(name in line for name in names), line
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize('form', ['hf', 'gguf', 'ollama'])
def test_reward_models_are_refused(form, tmp_path, tiny_run):
    checkpoint = load_checkpoint(str(tiny_run / 'ckpt.pt'))
    model = GPT(GPTConfig(**{**checkpoint['model_args'], 'reward': True}))
    save_model(checkpoint, model, tmp_path / 'reward.pt')
    line = refused(f'--init_from={tmp_path / "reward.pt"}', f'--format={form}', f'--to={tmp_path / "x"}')
    assert 'reward model' in line
    assert os.listdir(tmp_path) == ['reward.pt']


def test_folder_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'x'
    for content in ('old', 'new'):
        with atomic_folder(str(path)) as folder:
            write(tmp_path / folder / content, content)
            assert content == 'old' or (path / 'old').exists()
    with pytest.raises(KeyboardInterrupt), atomic_folder(str(path)) as folder:
        write(tmp_path / folder / 'half', 'half')
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ['x'] and os.listdir(path) == ['new']


MEMORY = r"""
import re, sys, threading, time
from core.weights.huggingface import load_pretrained

def anonymous():  # memory without mapped files
    with open('/proc/self/status', encoding='utf-8') as f:
        return int(re.search(r'RssAnon:\s+(\d+)', f.read())[1]) * 1024

def watch():
    global most
    while model is None:
        most = max(most, anonymous())
        time.sleep(0.001)

load_pretrained(sys.argv[1])  # the modules that it imports are in memory now
model, before, most = None, anonymous(), 0
threading.Thread(target=watch, daemon=True).start()
model = load_pretrained(sys.argv[2])
print((max(most, anonymous()) - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='only Linux reports the memory of a process there')
def test_memory_of_loading(tmp_path):
    """Weights are not in memory twice while they are loaded."""
    tokenizer = char_tokenizer(map(chr, range(33, 129)))
    for name, size in (('small', {}), ('large', {'n_embd': 512, 'n_layer': 8})):  # 100 MB
        (tmp_path / name).mkdir()
        save_pretrained(tmp_path / name, network(**MODERN, **size, tied=False), tokenizer, 'float32', 'x')
    command = [sys.executable, '-c', MEMORY, tmp_path / 'small', tmp_path / 'large']
    result = subprocess.run(command, capture_output=True, text=True, encoding='utf-8', cwd=ROOT)
    assert result.returncode == 0 and 0.9 < float(result.stdout) < 1.2, (result.stdout, result.stderr)
