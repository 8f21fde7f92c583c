"""export.py's Hugging Face folders against transformers; of GGUF see test_gguf.py."""
import importlib.util
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
from core.text.tokenizer import add_specials, char_tokenizer, gpt2_tokenizer, prune_tokenizer, qwen2_tokenizer, train_bpe
from core.weights.checkpoint import load_checkpoint, save_checkpoint
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
}


def network(vocab_size=97, **settings):
    """A small random network whose biases and gains are none of those that it starts with, and whose text is not one token again and again."""
    torch.manual_seed(3)
    model = GPT(GPTConfig(**{**dict(block_size=128, n_layer=2, n_head=4, n_embd=32), 'vocab_size': vocab_size, **settings})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.05 if p is model.lm_head.weight else 0.3))
    return model


@torch.no_grad()
@pytest.mark.parametrize('style', STYLES)
def test_transformers_computes_the_same(style, tmp_path):
    model, tokenizer = network(**STYLES[style]), char_tokenizer([chr(33 + i) for i in range(96)])
    save_pretrained(tmp_path, model, tokenizer, 'float32', 'x')
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert peer.config.model_type == architecture_of(model.config, 'x') == style.split(',')[0]
    idx = torch.randint(97, (3, 20))
    assert (model(idx) - peer(idx).logits).abs().max() <= 1e-5
    ours = torch.stack([*model.generate(idx[:, :8], 100)], dim=1)  # (3, 100)
    theirs = peer.generate(idx[:, :8], max_new_tokens=100, do_sample=False, eos_token_id=None, attention_mask=torch.ones(3, 8))[:, 8:]
    assert torch.equal(ours, theirs) and len(ours.unique()) > 8
    again = load_pretrained(str(tmp_path)).eval()
    assert torch.equal(again(idx), model(idx)) or not model.config.bias and (again(idx) - model(idx)).abs().max() <= 1e-5


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
    """It cuts and joins as ours does, knows how a text ends, and writes a conversation as ours is rendered."""
    from core.text.chat_template import can_chat, end_of_turn, render
    ours = TOKENIZERS[name]()
    save_pretrained(tmp_path, network(ours.vocab_size, n_embd=4), ours, 'float32', 'x')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (TEXT, TEXT[::-1], 'fox', ' \n\n  fox\n'):
        ids = ours.encode(text).tolist()
        assert theirs.encode(text, add_special_tokens=False) == ids and theirs.decode(ids) == text
    assert len(theirs) == ours.vocab_size
    generation = json.loads((tmp_path / 'generation_config.json').read_text(encoding='utf-8'))
    assert can_chat(ours) == (theirs.chat_template is not None) == ('chat' in name or name == 'qwen2')
    if can_chat(ours):
        talk = [{'role': 'user', 'content': 'the fox'}, {'role': 'assistant', 'content': '满纸'}]
        assert theirs.apply_chat_template(talk, return_dict=False) == render(talk, ours)[0].tolist()
        assert theirs.apply_chat_template(talk[:1], add_generation_prompt=True, return_dict=False) == render(talk[:1], ours, reply=True)[0].tolist()
        assert theirs.eos_token_id == end_of_turn(ours) and set(generation['eos_token_id']) == {end_of_turn(ours), ours.eot}
    else:
        assert theirs.eos_token_id == ours.eot and generation['eos_token_id'] == [ours.eot]


@pytest.mark.parametrize('name', NETWORKS)
def test_export_of_what_was_imported(name, tmp_path):
    """A Hugging Face model read and written again has the same tensors, bit for bit, in its own precision too, and is written the same way twice."""
    from safetensors.torch import load_file
    make(tmp_path / 'theirs', name).bfloat16().save_pretrained(tmp_path / 'theirs')
    write(tmp_path / 'theirs' / 'tokenizer.json', char_tokenizer([chr(33 + i) for i in range(70)]).json)  # of fewer ids than rows
    for folder in ('ours', 'again'):
        result = run_script('export.py', f'--init_from={tmp_path / "theirs"}', f'--to={tmp_path / folder}', '--quant=bf16')
        assert result.code == 0, result.err
    theirs, ours = (load_file(tmp_path / folder / 'model.safetensors') for folder in ('theirs', 'ours'))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) and ours[key].dtype == torch.bfloat16 for key in ours)
    for file in os.listdir(tmp_path / 'ours'):
        assert (tmp_path / 'ours' / file).read_bytes() == (tmp_path / 'again' / file).read_bytes(), file


def test_command(tiny_run, tmp_path):
    """From a run to a folder that sample.py reads: the same greedy text; a card that says what was measured; what is there is not replaced unasked."""
    to = tmp_path / 'deep' / 'stone'
    result = run_script('export.py', f'--out_dir={tiny_run}', f'--to={to}/')
    assert result.code == 0 and f'--init_from={to}' in result.out, result.err
    settings = ['--device=cpu', '--start=one', '--num_samples=1', '--max_new_tokens=20', '--temperature=0']
    samples = [run_script('sample.py', source, *settings).out.partition('bytes\n')[2] for source in (f'--out_dir={tiny_run}', f'--init_from={to}')]
    assert samples[0] == samples[1] and 'one' in samples[0]
    card, checkpoint = (to / 'README.md').read_text(encoding='utf-8'), load_checkpoint(str(tiny_run / 'ckpt.pt'))
    assert f'| val loss | {checkpoint["measured"]["val_loss"]:.4f} |' in card and '| val bpb |' in card and '4 steps, up to 512 tokens' in card and '| learning_rate | 0.001 |' in card
    before = sorted(os.stat(to / file).st_ino for file in os.listdir(to))
    result = run_script('export.py', f'--out_dir={tiny_run}', f'--to={to}')
    assert result.code == 1 and '--force' in result.err and sorted(os.stat(to / file).st_ino for file in os.listdir(to)) == before
    result = run_script('export.py', f'--out_dir={tiny_run}', f'--to={to}', '--force', '--quant=f16')
    assert result.code == 0 and json.loads((to / 'config.json').read_text(encoding='utf-8'))['dtype'] == 'float16' and os.listdir(to.parent) == ['stone']
    result = run_script('export.py', f'--init_from={to}', f'--to={to}', '--force')
    assert result.code == 1 and 'this is what is to be exported' in result.err
    (to / 'thesis.txt').touch()
    result = run_script('export.py', f'--out_dir={tiny_run}', f'--to={to}', '--force')
    assert result.code == 1 and 'thesis.txt' in result.err and (to / 'thesis.txt').exists() and result.err.count('\n') == 1


def test_rows_of_the_vocabulary(tiny_run, tmp_path):
    """Rows that only round up are left out; those that nanoGPT's checkpoints lack are added."""
    checkpoint = load_checkpoint(str(tiny_run / 'ckpt.pt'))
    size = checkpoint['model_args']['vocab_size']
    for rows in (size + 7, size - 1):
        model = GPT(GPTConfig(**{**checkpoint['model_args'], 'vocab_size': rows}))
        save_checkpoint({**checkpoint, 'model': model.state_dict(), 'model_args': vars(model.config)}, str(tmp_path / f'{rows}.pt'))
        result = run_script('export.py', f'--init_from={tmp_path / f"{rows}.pt"}', f'--to={tmp_path / str(rows)}')
        assert result.code == 0 and ('mean' in result.out) == (rows < size), result.err
        peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(rows))
        known = min(rows, size)
        idx = torch.randint(known, (2, 9))
        assert peer.config.vocab_size == size and (peer(idx).logits[..., :known] - model(idx)[..., :known]).abs().max() <= 1e-5


def test_shards(tmp_path, monkeypatch):
    import huggingface_hub
    save = huggingface_hub.save_torch_state_dict
    monkeypatch.setattr(huggingface_hub, 'save_torch_state_dict', lambda *args, max_shard_size, **kwargs: save(*args, max_shard_size='20KB', **kwargs))
    model = network(**STYLES['qwen3'])
    save_pretrained(tmp_path, model, char_tokenizer(map(chr, range(33, 129))), 'float32', 'x')
    assert len([*tmp_path.glob('*.safetensors')]) > 2
    for again in (load_pretrained(str(tmp_path)), transformers.AutoModelForCausalLM.from_pretrained(tmp_path)):
        idx = torch.randint(97, (2, 9))
        logits = again.eval()(idx)
        assert (getattr(logits, 'logits', logits) - model(idx)).abs().max() <= 1e-5


@pytest.mark.parametrize('settings, names', [
    (dict(rope_theta=1e4), ['norm=layernorm', 'norm=rmsnorm', 'activation=gelu', 'bias=True']),
    (dict(**{**MODERN, 'bias': True}), ['bias=True']),
    (dict(norm='rmsnorm'), ['norm=rmsnorm', 'norm=layernorm']),
    (dict(n_kv_head=2), ['n_kv_head=2']),
    (dict(qk_norm=True, head_size=16), ['qk_norm=True', 'head_size=16']),
])
def test_networks_between_the_styles(settings, names, tmp_path):
    line = exit_line(architecture_of, network(**settings).config, 'out-x')
    assert all(name in line for name in ['out-x', *names]), line


def test_what_is_not_replaced(tiny_run, tmp_path):
    """Not by --force either: folders and files that export.py has not written; and what a link points to is, not the link."""
    write(tmp_path / 'theirs' / 'config.json', '{}')
    write(tmp_path / 'weights.pt', b'weights')
    write(tmp_path / 'mine' / 'README.md', '# mine')
    write(tmp_path / 'old.gguf', b'GGUF, an older one')
    os.symlink('old.gguf', tmp_path / 'link.gguf')
    for to, form in (('theirs', 'hf'), ('weights.pt', 'gguf'), ('mine', 'ollama'), ('weights.pt', 'hf'), ('mine', 'gguf'), ('.', 'hf'), ('weights.pt/x', 'hf')):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
        result = run_script('export.py', f'--out_dir={tiny_run}', f'--format={form}', f'--to={tmp_path / to}', '--force')
        assert result.code == 1 and result.err.count('\n') == 1 and f'to={tmp_path / to}'.removesuffix('/.') in result.err, result.err
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == before
    pytest.importorskip('gguf')
    result = run_script('export.py', f'--out_dir={tiny_run}', '--format=gguf', f'--to={tmp_path / "link.gguf"}', '--force')
    assert result.code == 0 and os.path.islink(tmp_path / 'link.gguf') and os.path.getsize(tmp_path / 'old.gguf') > 1000, result.err


def test_names(tiny_run, tmp_path):
    """Of what nothing else is said of: the run's, also where it has a point in it or a checkpoint of it is given; printed so that a shell takes it."""
    run = tmp_path / 'out v1.5 红'
    shutil.copytree(tiny_run, run)
    for args in ([f'--out_dir={run}'], [f'--ckpt={run / "ckpt.pt"}', '--force']):
        result = run_script('export.py', *args, cwd=tmp_path)
        assert result.code == 0 and "'--init_from=exported/out v1.5 红'" in result.out and os.listdir(tmp_path / 'exported') == [run.name], result.err
    assert {oct(path.stat().st_mode) for path in (tmp_path / 'exported' / run.name).iterdir()} == {oct((run / 'run.json').stat().st_mode)}
    result = run_script('export.py', f'--out_dir={run}', '--tokenizer=gpt2', f'--to={tmp_path / "x"}')
    assert result.code == 1 and 'tokenizer=gpt2' in result.err and not os.path.exists(tmp_path / 'x')


def test_a_full_disk(tiny_run, tmp_path):
    """One line, and nothing is left."""
    command = f'ulimit -f 20; exec "$@" --out_dir={tiny_run} --to={tmp_path / "x"}'
    for form in ['hf'] + ['gguf'] * (importlib.util.find_spec('gguf') is not None):
        result = subprocess.run(['bash', '-c', command, 'bash', sys.executable, 'export.py', f'--format={form}'], cwd=ROOT, capture_output=True, text=True, encoding='utf-8')
        assert result.returncode == 1 and result.stderr.count('\n') == 1 and 'could not be written' in result.stderr, result.stderr
        assert not os.listdir(tmp_path)


@pytest.mark.parametrize('args, names', [
    (['--format=onnx'], ['format=onnx', 'hf', 'gguf', 'ollama']),
    (['--quant=q4_0'], ['quant=q4_0', 'f32, f16, bf16', 'hf']),
    (['--quant=q3', '--format=gguf'], ['quant=q3', 'q8_0']),
    (['--ckpt=nowhere.pt'], ['nowhere.pt']),
])
def test_bad_arguments(args, names, tiny_run, tmp_path):
    result = run_script('export.py', f'--out_dir={tiny_run}', f'--to={tmp_path / "x"}', *args)
    assert result.code == 1 and result.err.count('\n') == 1 and all(name in result.err for name in names), result.err
    assert not os.listdir(tmp_path)


def test_reward_models_are_refused(tmp_path, tiny_run):
    checkpoint = load_checkpoint(str(tiny_run / 'ckpt.pt'))
    model = GPT(GPTConfig(**{**checkpoint['model_args'], 'reward': True}))
    save_checkpoint({**checkpoint, 'model': model.state_dict(), 'model_args': vars(model.config)}, str(tmp_path / 'reward.pt'))
    for form in ('hf', 'gguf', 'ollama'):
        result = run_script('export.py', f'--init_from={tmp_path / "reward.pt"}', f'--format={form}', f'--to={tmp_path / "x"}')
        assert result.code == 1 and 'reward model' in result.err and os.listdir(tmp_path) == ['reward.pt']


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

def anonymous():  # what is this process's own; the files that it maps are not
    with open('/proc/self/status', encoding='utf-8') as f:
        return int(re.search(r'RssAnon:\s+(\d+)', f.read())[1]) * 1024

def watch():
    global most
    while model is None:
        most = max(most, anonymous())
        time.sleep(0.001)

load_pretrained(sys.argv[1])  # what is imported on the way is there now
model, before, most = None, anonymous(), 0
threading.Thread(target=watch, daemon=True).start()
model = load_pretrained(sys.argv[2])
print((max(most, anonymous()) - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='Linux says what memory is used')
def test_memory_of_loading(tmp_path):
    """Weights are loaded without being in memory twice."""
    tokenizer = char_tokenizer(map(chr, range(33, 129)))
    for name, size in (('small', {}), ('large', {'n_embd': 512, 'n_layer': 8})):  # 100 MB
        (tmp_path / name).mkdir()
        save_pretrained(tmp_path / name, network(**MODERN, **size, tied=False), tokenizer, 'float32', 'x')
    result = subprocess.run([sys.executable, '-c', MEMORY, tmp_path / 'small', tmp_path / 'large'], capture_output=True, text=True, encoding='utf-8', cwd=ROOT)
    assert result.returncode == 0 and 0.9 < float(result.stdout) < 1.2, (result.stdout, result.stderr)
