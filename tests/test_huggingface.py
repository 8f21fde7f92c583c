"""Models in Hugging Face folders, against transformers' own GPT-2, Llama and Qwen3, tiny and random."""
import json

import numpy as np
import pytest
import torch
from conftest import TINY_LOADED, exit_line, losses_of, run_script, write
from torch.nn import functional as F

from core.text.tokenizer import char_tokenizer
from core.weights.checkpoint import load_checkpoint, load_model
from core.weights.huggingface import huggingface_names, load_pretrained

transformers = pytest.importorskip('transformers')

GPT2 = dict(n_positions=16, n_embd=32, n_layer=3, n_head=4)
LLAMA = dict(
    max_position_embeddings=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    rms_norm_eps=1e-6,
    rope_parameters={'rope_type': 'default', 'rope_theta': 5e5},
)
NETWORKS = {
    'gpt2': ('GPT2', 'LMHeadModel', {**GPT2, 'activation_function': 'gelu_new'}),
    'gpt2, exact gelu, narrow': ('GPT2', 'LMHeadModel', {**GPT2, 'activation_function': 'gelu', 'n_inner': 48}),
    'gpt2, untied': ('GPT2', 'LMHeadModel', {**GPT2, 'tie_word_embeddings': False}),
    'llama': ('Llama', 'ForCausalLM', dict(**LLAMA, num_key_value_heads=4, tie_word_embeddings=False)),
    'llama, tied, gqa': ('Llama', 'ForCausalLM', dict(**LLAMA, num_key_value_heads=1, tie_word_embeddings=True)),
    'qwen3': ('Qwen3', 'ForCausalLM', dict(**LLAMA, num_key_value_heads=4, head_dim=8, tie_word_embeddings=False)),
    'qwen3, tied, gqa, wide heads': (
        'Qwen3', 'ForCausalLM', dict(**LLAMA, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)),
    'qwen3, windows': (
        'Qwen3', 'ForCausalLM', dict(**LLAMA, num_key_value_heads=2, head_dim=8, use_sliding_window=True,
                                     sliding_window=5, layer_types=['sliding_attention', 'full_attention'])),
    'qwen3, windows above': (
        'Qwen3', 'ForCausalLM', dict(**LLAMA, head_dim=8, num_key_value_heads=4, use_sliding_window=True,
                                     sliding_window=3, max_window_layers=1)),
}


def make(folder, name, **save):
    """Save one of these networks to a folder and return it. None of its biases is 0, none of its gains 1."""
    family, suffix, settings = NETWORKS[name]
    torch.manual_seed(2)
    config = getattr(transformers, f'{family}Config')(vocab_size=97, **settings)
    hf = getattr(transformers, family + suffix)(config).eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    hf.save_pretrained(folder, **save)
    return hf


def edit(folder, **entries):
    """Change entries of config.json; None deletes one."""
    path = folder / 'config.json'
    config = json.loads(path.read_text(encoding='utf-8')) | entries
    config = {key: value for key, value in config.items() if value is not None}
    path.write_text(json.dumps(config), encoding='utf-8')


@pytest.mark.parametrize('name', NETWORKS)
def test_logits_and_gradients_equal_transformers(name, tmp_path):
    hf, model = make(tmp_path, name), load_pretrained(str(tmp_path)).eval()
    idx, targets = torch.randint(97, (5, 16)), torch.randint(97, (5, 16))
    logits = hf(idx).logits
    assert (model(idx) - logits).abs().max() <= 1e-5
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    model(idx, targets).mean().backward()
    gradients = {key: p.grad for key, p in hf.named_parameters()}
    for name_here, p in model.named_parameters():
        for key, gradient in huggingface_names(name_here, p.grad, model.config):
            assert (gradient - gradients[key]).abs().max() <= 1e-5 < gradient.abs().max(), key


@torch.no_grad()
def assert_equal(hf, folder):
    """The network in this folder is loaded in float32 and computes the logits of `hf`."""
    model = load_pretrained(str(folder)).eval()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    idx = torch.randint(97, (5, 16))
    assert (model(idx) - hf(idx).logits).abs().max() <= 1e-5


def test_pytorch_model_bin(tmp_path):
    """Older repositories have this file."""
    hf = make(tmp_path, 'gpt2')
    torch.save(hf.state_dict(), tmp_path / 'pytorch_model.bin')
    (tmp_path / 'model.safetensors').unlink()
    assert_equal(hf, tmp_path)


def test_config_of_older_transformers(tmp_path):
    """They have rope_theta at the top level."""
    hf = make(tmp_path, 'qwen3')
    edit(tmp_path, rope_parameters=None, rope_theta=5e5)
    assert_equal(hf, tmp_path)


def test_shards(tmp_path):
    hf = make(tmp_path, 'qwen3', max_shard_size='20KB')
    shards = list(tmp_path.glob('*.safetensors'))
    assert len(shards) > 2
    assert_equal(hf, tmp_path)
    shards[0].unlink()
    assert f'{shards[0].name} missing' in exit_line(load_pretrained, str(tmp_path))


def test_damaged_weights(tmp_path):
    hf = make(tmp_path, 'qwen3', max_shard_size='20KB')
    (tmp_path / 'consolidated.safetensors').write_bytes(b'of something else')
    assert_equal(hf, tmp_path)
    (tmp_path / 'model.safetensors.index.json').write_text('{"weight_map": {"a": 3}}', encoding='utf-8')
    assert 'index.json: damaged' in exit_line(load_pretrained, str(tmp_path))
    for path in [*tmp_path.glob('*.safetensors*')]:
        path.unlink()
    torch.save({'model.norm.weight': 3}, tmp_path / 'pytorch_model.bin')
    assert 'pytorch_model.bin' in exit_line(load_pretrained, str(tmp_path))


def test_bf16(tmp_path):
    """Weights saved in bf16 are loaded in fp32 without a change."""
    make(tmp_path / 'fp32', 'llama').bfloat16().save_pretrained(tmp_path / 'bf16')
    hf = transformers.LlamaForCausalLM.from_pretrained(tmp_path / 'bf16', dtype=torch.float32)
    assert_equal(hf, tmp_path / 'bf16')


@pytest.mark.parametrize('name, entries, names', [
    ('qwen3', {'model_type': 'mistral'}, ['mistral', 'gpt2, llama, qwen3']),
    ('llama', {'rope_parameters': {'rope_type': 'llama3', 'factor': 8.0}}, ["'rope_type': 'llama3'"]),
    ('llama', {'rope_parameters': None, 'rope_scaling': {'type': 'linear', 'factor': 2.0}}, ["'rope_type': 'linear'"]),
    ('qwen3', {'attention_bias': True}, ["'attention_bias': True"]),
    ('llama', {'mlp_bias': True}, ["'mlp_bias': True"]),
    ('llama', {'use_sliding_window': True}, ["'use_sliding_window': True"]),
    ('qwen3', {'use_sliding_window': 1}, ['use_sliding_window=1', 'true or false']),
    ('qwen3, windows', {'use_sliding_window': False}, ['use_sliding_window is not true']),
    ('qwen3, windows', {'layer_types': ['sliding_attention']}, ['layer_types of 1 layers', 'num_hidden_layers=2']),
    ('qwen3, windows', {'layer_types': ['full_attention', 'linear_attention']}, ['config.json', 'linear_attention']),
    ('qwen3, windows', {'sliding_window': 0}, ['config.json', 'sliding_window=0']),
    ('qwen3, windows', {'sliding_window': None}, ['config.json', "'sliding_window' is missing"]),
    ('llama', {'hidden_act': 'gelu'}, ["'hidden_act': 'gelu'"]),
    ('gpt2', {'activation_function': 'relu'}, ['relu']),
    ('gpt2', {'scale_attn_weights': False}, ["'scale_attn_weights': False"]),
    ('gpt2', {'scale_attn_by_inverse_layer_idx': True}, ["'scale_attn_by_inverse_layer_idx': True"]),
    ('llama', {'hidden_size': None}, ['config.json', 'damaged', 'hidden_size']),
    ('llama', {'hidden_size': 'wide'}, ['config.json', 'hidden_size=wide', 'a whole number']),
    ('llama', {'max_position_embeddings': 0}, ['config.json', 'max_position_embeddings=0']),
    ('llama', {'vocab_size': -1}, ['config.json', 'vocab_size=-1']),
    ('gpt2', {'n_head': 0}, ['config.json', 'n_head=0']),
    ('gpt2', {'n_embd': 8.5}, ['config.json', 'n_embd=8.5']),
    ('llama', {'hidden_size': 64}, ['do not fit', 'embed_tokens.weight', '(97, 32)', '(97, 64)', 'model.norm.weight']),
    ('llama', {'num_hidden_layers': 3}, ['do not fit', 'model.layers.2.mlp.up_proj.weight is missing',
                                         'model.layers.2.input_layernorm.weight is missing']),
    ('llama', {'num_hidden_layers': 1}, ['do not fit', 'model.layers.1.mlp.up_proj.weight is unknown',
                                         'model.layers.1.input_layernorm.weight is unknown']),
], ids=str)
def test_refused_configs(name, entries, names, tmp_path):
    """Other architectures, entries that GPTConfig cannot express, and damaged ones: the line names them."""
    make(tmp_path, name)
    edit(tmp_path, **entries)
    line = exit_line(load_pretrained, str(tmp_path))
    assert str(tmp_path) in line and all(name in line for name in names), line


@pytest.mark.parametrize('content', [b'', b'[]', b'{"model_type": "qwen3"', b'{}\xff'])
def test_damaged_config(content, tmp_path):
    (tmp_path / 'config.json').write_bytes(content)
    assert str(tmp_path / 'config.json') in exit_line(load_pretrained, str(tmp_path))


def drop(state):
    del state['model.layers.1.mlp.up_proj.weight']


def replace(key, *shape, dtype=torch.float32):
    return lambda state: state.update({key: torch.zeros(shape, dtype=dtype)})


@pytest.mark.parametrize('spoil, names', [
    (drop, ['model.layers.1.mlp.up_proj.weight']),
    (replace('model.layers.1.mlp.up_proj.weight', 47, 32), ['layers.1.mlp.up_proj.weight', '(47, 32)', '(48, 32)']),
    (replace('model.norm.weight', 1), ['model.norm.weight', '(1,)', '(32,)']),
    (replace('model.layers.1.self_attn.q_proj.bias', 32), ['model.layers.1.self_attn.q_proj.bias is unknown']),
    (replace('model.norm.weight', 32, dtype=torch.int8), ['model.norm.weight is torch.int8']),
], ids=['missing', 'stacked', 'one that would be broadcast', 'unknown', 'bytes'])
def test_weights_that_do_not_fit(spoil, names, tmp_path):
    from safetensors.torch import load_file, save_file
    make(tmp_path, 'qwen3')
    state = load_file(tmp_path / 'model.safetensors')
    spoil(state)
    save_file(state, tmp_path / 'model.safetensors')
    line = exit_line(load_pretrained, str(tmp_path))
    assert str(tmp_path) in line and all(name in line for name in names), line


@pytest.mark.parametrize('length', [0, 100, 20000])
def test_weights_cut_off(length, tmp_path):
    make(tmp_path, 'qwen3')
    path = tmp_path / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:length])
    assert str(path) in exit_line(load_pretrained, str(tmp_path))


def test_fine_tuning(tiny_data, tmp_path):
    """train.py starts from a Qwen3's folder and resumes its own checkpoint; sample.py reads it."""
    hf = make(tmp_path / 'qwen3', 'qwen3, tied, gqa, wide heads')
    args = *TINY_LOADED, f'--dataset={tiny_data}', f'--out_dir={tmp_path / "out"}', '--learning_rate=1e-4'
    result = run_script('train.py', *args, f'--init_from={tmp_path / "qwen3"}', '--max_iters=2')
    assert result.code == 0 and f'loaded {tmp_path / "qwen3"}' in result.out, result.err
    checkpoint = load_checkpoint(str(tmp_path / 'out' / 'ckpt.pt'))
    shape = dict(block_size=32, n_embd=32, head_size=16, n_kv_head=2, n_inner=48)
    expected = dict(**shape, rope_theta=5e5, qk_norm=True, tied=True)
    assert expected.items() <= checkpoint['model_args'].items()
    assert expected.items() <= checkpoint['config'].items()
    moved = (checkpoint['model']['transformer.wte.weight'] - hf.model.embed_tokens.weight).abs().max()
    assert 0 < moved < 1e-3  # two steps of 1e-4
    result = run_script('train.py', *args, '--init_from=resume', '--max_iters=4')
    assert result.code == 0 and 'at step 2' in result.out, result.err
    assert [step for step, _ in losses_of(tmp_path / 'out')] == [0, 1, 2, 3]
    settings = ['--device=cpu', '--start=one', '--num_samples=1', '--max_new_tokens=5']
    result = run_script('sample.py', f'--out_dir={tmp_path / "out"}', *settings)
    assert result.code == 0 and '\none' in result.out, result.err


def test_fine_tuning_gpt2(tmp_path):
    """On a dataset folder of GPT-2's token ids without metadata."""
    torch.manual_seed(5)
    config = transformers.GPT2Config(vocab_size=50257, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / 'gpt2')
    data = tmp_path / 'data'
    data.mkdir()
    for i, split in enumerate(('train', 'val')):
        np.random.default_rng(i).integers(0, 50257, 500).astype('<u2').tofile(data / f'{split}.bin')
    paths = [f'--dataset={data}', f'--out_dir={tmp_path / "out"}', f'--init_from={tmp_path / "gpt2"}']
    result = run_script('train.py', *TINY_LOADED, *paths, '--max_iters=2')
    assert result.code == 0 and f'loaded {tmp_path / "gpt2"}' in result.out, result.err
    args = load_checkpoint(str(tmp_path / 'out' / 'ckpt.pt'))['model_args']
    assert args['block_size'] == 32 and args['activation'] == 'gelu_tanh' and args['n_embd'] == 16


def test_a_dataset_of_another_tokenizer(tiny_data, tmp_path):
    """It is refused if the folder has a tokenizer."""
    make(tmp_path, 'qwen3')
    write(tmp_path / 'tokenizer.json', char_tokenizer(map(chr, range(33, 129))).json)
    paths = [f'--dataset={tiny_data}', f'--out_dir={tmp_path / "out"}', f'--init_from={tmp_path}']
    result = run_script('train.py', *TINY_LOADED, *paths)
    assert result.code == 1 and 'another tokenizer' in result.err and result.err.count('\n') == 1


def test_the_commit_of_a_hub_model_is_kept(tmp_path, tiny_data, monkeypatch):
    """repo@revision names a revision; the commit is printed and stays in the checkpoint."""
    import huggingface_hub
    commit = 'c0ffee' + '0' * 34
    folder = tmp_path / 'models--org--tiny' / 'snapshots' / commit
    make(folder, 'gpt2')
    asked = []

    def snapshot_download(repo, revision=None, allow_patterns=()):
        asked.append((repo, revision))
        return str(folder)
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
    result = run_script('train.py', *TINY_LOADED, '--block_size=16', '--max_iters=1', f'--dataset={tiny_data}',
                        '--init_from=org/tiny@v1.0', '--out_dir=a', cwd=tmp_path)
    assert result.code == 0 and f'loaded org/tiny@v1.0 (commit {commit}): ' in result.out, result.err
    for source in str(tmp_path / 'a'), 'org/tiny':
        assert load_model(source)[1]['hub'] == f'org/tiny@{commit}'
    assert asked == [('org/tiny', 'v1.0'), ('org/tiny', None)]
