"""LoRA and QLoRA: against peft, merged against unmerged, resumed against uninterrupted, with every objective."""
import copy
import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY_LOADED, exit_line, losses_of, run_script
from test_export import MODERN, network
from test_objectives import base, folder  # noqa: F401  # fixtures
from torch import nn

from core.text.tokenizer import char_tokenizer
from core.weights.checkpoint import build_model, load_checkpoint, load_model, save_checkpoint
from core.weights.huggingface import save_pretrained
from core.weights.lora import (
    LoRALinear,
    add_adapters,
    describe_adapters,
    merge,
    trained_weights,
    weight_sample,
    without_adapters,
)
from core.weights.quantize import FrozenLinear
from core.weights.vocabulary import resize_vocabulary
from model import GPT

LORA = {
    'lora_rank': 4,
    'lora_alpha': 8.0,
    'lora_dropout': 0.0,
    'lora_targets': 'c_attn,c_proj,c_fc',
    'quantize_base': '',
    'known': 97,
}
KINDS = ['int8', 'nf4'] if importlib.util.find_spec('bitsandbytes') else ['int8']
NEW_ROWS = 'transformer.wte.parametrizations.weight.0.rows'
LOSSES = {'sft': [], 'reward': ['--objective=reward'], 'dpo': ['--objective=dpo', '--beta=0.3'],
          'grpo': ['--objective=grpo', '--group_size=2', '--max_new_tokens=4', '--updates=2']}


def adapted(settings, **lora):
    """Return a network with adapters whose output is not 0."""
    model = network(**settings)
    add_adapters(model, {**LORA, **lora})
    for name, p in model.named_parameters():
        if 'lora_B' in name:
            nn.init.normal_(p, std=0.2)
    return model


def learn(model, steps=5):
    """Train on fixed tokens; returns the losses."""
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    X, Y = torch.randint(97, (2, 4, 17), generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        loss = model(X, Y).mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses


def train(*args):
    """Run train.py, which must succeed; returns what it printed."""
    result = run_script('train.py', *TINY_LOADED, *args)
    assert result.code == 0, result.err
    return result.out


def refused(*args):
    """Run train.py, which must exit with one line; returns it."""
    result = run_script('train.py', *TINY_LOADED, *args)
    assert result.code == 1 and result.err.count('\n') == 1, result.err
    return result.err


@pytest.mark.parametrize('targets, count', [('c_attn,c_proj,c_fc', 16), ('attn.c_proj,c_fc', 8)])
def test_peft_trains_the_same(targets, count):
    """From the same seed: the same adapters, losses, and adapters after five steps."""
    peft = pytest.importorskip('peft')
    model = network(**MODERN)
    peer = copy.deepcopy(model)
    torch.manual_seed(7)
    add_adapters(model, {**LORA, 'lora_targets': targets})
    torch.manual_seed(7)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets.split(','))
    peer = peft.inject_adapter_in_model(config, peer)
    peer.requires_grad_(False)
    for name, p in peer.named_parameters():
        p.requires_grad_('lora_' in name)

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    peer_trained = {name.replace('.default', ''): p for name, p in peer.named_parameters() if p.requires_grad}
    assert [*trained] == [*peer_trained] and len(trained) == count
    assert all(torch.equal(p, peer_trained[name]) for name, p in trained.items())
    losses = learn(model)
    assert losses == pytest.approx(learn(peer), abs=1e-6)
    assert losses[-1] < losses[0] - 0.01
    assert all((p - peer_trained[name]).abs().max() < 1e-6 for name, p in trained.items())


@torch.no_grad()
@pytest.mark.parametrize('lora', [{}, {'known': 90}, *({'quantize_base': kind} for kind in KINDS)], ids=str)
@pytest.mark.parametrize('tied', [True, False])
def test_merged_computes_what_unmerged_does(lora, tied):
    settings = {**MODERN, 'qk_norm': True, 'tied': tied}
    model = adapted(settings, **lora)
    idx = torch.randint(97, (3, 20))
    if 'known' in lora:
        new_rows = 1 if tied else 2
        assert len(trained_weights(model)) == 2 * 2 * 4 + new_rows
    expected = model(idx)
    assert (expected - without_adapters(model)(idx)).abs().max() > 0.1
    merged = merge(model)
    assert (merged(idx) - expected).abs().max() <= 1e-5
    assert merged.state_dict().keys() == network(**settings).state_dict().keys()
    assert all(p.requires_grad for p in merged.parameters())
    assert (merged.transformer.wte.weight is merged.lm_head.weight) == tied


def test_the_base_stays_and_serves_as_reference():
    """Training changes adapters and new rows only. Without them the network computes as before, in the same memory."""
    model = network(**MODERN)
    resize_vocabulary(model, 97, 100)
    idx = torch.randint(100, (2, 9))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    expected = model(idx).detach()
    add_adapters(model, LORA)
    torch.testing.assert_close(model(idx), expected, rtol=0, atol=0)

    learn(model)
    reference = without_adapters(model)
    torch.testing.assert_close(reference(idx), expected, rtol=0, atol=1e-6)
    assert (model(idx) - expected).abs().max() > 1e-2
    shared = {p.data_ptr() for p in model.parameters()}
    assert [name for name, p in reference.named_parameters() if p.data_ptr() not in shared] == [NEW_ROWS]
    assert not any(isinstance(module, LoRALinear) for module in reference.modules())
    assert not any(p.requires_grad for p in reference.parameters())

    learn(model)
    torch.testing.assert_close(reference(idx), expected, rtol=0, atol=1e-6)
    again = merge(reference).state_dict()
    assert again.keys() == before.keys()
    assert all((again[name] - before[name]).abs().max() < 1e-6 for name in again)


@pytest.mark.parametrize('kind', KINDS)
def test_frozen_layers(kind):
    """Forward and backward use the dequantised weights, which are close to the original ones, also under autocast."""
    torch.manual_seed(0)
    linear = nn.Linear(256, 192)
    frozen = FrozenLinear(linear, kind)
    error = (frozen.dequantized(torch.float32) - linear.weight).abs().mean() / linear.weight.abs().mean()
    assert 1e-4 < error < {'int8': 0.01, 'nf4': 0.1}[kind]
    x = torch.randn(5, 7, 256, requires_grad=True)
    gradient = torch.randn(5, 7, 192)
    y = frozen(x)
    y.backward(gradient)
    plain = frozen.linear()
    plain_x = x.detach().clone().requires_grad_()
    plain_y = plain(plain_x)
    plain_y.backward(gradient)
    torch.testing.assert_close(y, plain_y)
    torch.testing.assert_close(x.grad, plain_x.grad)
    with torch.autocast('cpu', torch.bfloat16):
        half = frozen(x)
    assert half.dtype == torch.bfloat16 and (half - y).abs().max() < 0.05
    assert frozen.nbytes() <= {'int8': 0.52, 'nf4': 0.30}[kind] * 2 * linear.weight.numel()


def test_what_is_printed():
    model = adapted({**MODERN, 'qk_norm': True, 'n_kv_head': 2}, quantize_base='int8')
    trained = 2 * 4 * ((32 + 64) + (32 + 32) + (32 + 256) + (128 + 32))
    text = describe_adapters(model)
    for part in (f'{trained:,} of', '8 layers in int8', f'{16 * trained / 1e6:,.1f} MB'):
        assert part in text


@torch.no_grad()
@pytest.mark.parametrize('style', [
    {},
    {'bias': False, 'activation': 'gelu_tanh'},
    {**MODERN, 'tied': False},
    {**MODERN, 'qk_norm': True, 'n_kv_head': 2, 'head_size': 16},
], ids=str)
def test_adapters_load_in_peft(style, tmp_path):
    """transformers and peft compute the same from an exported base and adapter, and from an exported merged model."""
    peft, transformers = pytest.importorskip('peft'), pytest.importorskip('transformers')
    tok = char_tokenizer(map(chr, range(33, 129)))
    base_folder = str(tmp_path / 'base')
    plain = network(**style)
    os.mkdir(base_folder)
    save_pretrained(base_folder, plain, tok, 'float32', 'x')
    model = adapted(style)
    probe = weight_sample(load_model(base_folder)[0])
    checkpoint = {
        'model': trained_weights(model),
        'model_args': vars(model.config),
        'lora': {**LORA, 'base': base_folder, 'base_path': '', 'probe': probe},
        'tokenizer': tok.json,
        'config': {},
    }
    save_checkpoint(checkpoint, str(tmp_path / 'lora.pt'))
    for to, merged in (('adapter', '--merge=False'), ('merged', '--merge=True')):
        result = run_script('export.py', f'--init_from={tmp_path / "lora.pt"}', f'--to={tmp_path / to}', merged)
        assert result.code == 0, result.err
    files = ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    assert sorted(os.listdir(tmp_path / 'adapter')) == files

    load = transformers.AutoModelForCausalLM.from_pretrained
    peer = peft.PeftModel.from_pretrained(load(base_folder), tmp_path / 'adapter').eval()
    merged = load(tmp_path / 'merged').eval()
    idx = torch.randint(97, (3, 20))
    logits = model(idx)
    assert (logits - plain(idx)).abs().max() > 0.1
    assert (peer(idx).logits - logits).abs().max() <= 1e-5
    assert (merged(idx).logits - logits).abs().max() <= 1e-5


def same_state(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize('objective, kind', [*((name, '') for name in LOSSES), *(('sft', kind) for kind in KINDS)])
def test_training(objective, kind, base, folder, tmp_path):  # noqa: F811
    """With every objective: the checkpoint has only what is trained, and a resumed run equals an uninterrupted one."""
    weights = base / ('base' if objective == 'sft' else 'sft')
    dataset = folder / {'sft': 'sft', 'grpo': 'prompts'}.get(objective, 'pairs')
    args = [f'--dataset={dataset}', *LOSSES[objective], '--lora_rank=4', '--lora_alpha=4', '--learning_rate=1e-2',
            '--save_interval=2', '--eval_interval=4']
    if objective == 'grpo':
        args.append(f'--reward={base / "rewards.py"}:long')
    quantised = [*args, f'--quantize_base={kind}', f'--init_from={weights}']
    assert 'LoRA of rank 4' in train(*quantised, f'--out_dir={tmp_path / "one"}')
    train(*quantised, f'--out_dir={tmp_path / "two"}', '--max_iters=2')
    resume = ['--init_from=resume', f'--out_dir={tmp_path / "two"}']
    assert 'at step 2' in train(*args, *resume)  # quantised as before

    one, two = (load_checkpoint(str(tmp_path / name / 'ckpt.pt')) for name in ('one', 'two'))
    for key in ('model', 'optimizer', 'model_args', 'lora', 'best_val_loss'):
        assert same_state(one[key], two[key]), key
    assert one['config']['quantize_base'] == two['config']['quantize_base'] == kind
    assert losses_of(tmp_path / 'one') == losses_of(tmp_path / 'two')
    others = [key for key in one['model'] if '.lora_' not in key]
    assert others == {'sft': [NEW_ROWS], 'reward': ['lm_head.weight']}.get(objective, [])
    assert len(one['optimizer']['state']) == len(one['model']) == 2 * 2 * 4 + len(others)
    model, _ = load_model(str(tmp_path / 'one'))
    assert model.lora is None and model.config.reward == (objective == 'reward')

    if objective == 'sft':
        line = refused(*args, *resume, '--lora_rank=5')
        assert '--lora_rank=5 contradicts' in line and 'lora_rank=4' in line
        assert 'optimizer=muon' in refused(f'--dataset={dataset}', *resume, '--optimizer=muon')
        assert '--lora_rank=4 contradicts' in refused(*args, '--init_from=resume', f'--out_dir={weights}')
        losses = [loss for _, loss in losses_of(tmp_path / 'one', 'val_loss')]
        assert losses[-1] < losses[0] - 0.01
        chat = ['--prompt=ab', '--max_new_tokens=4', '--device=cpu']
        result = run_script('chat.py', f'--out_dir={tmp_path / "one"}', *chat)
        assert result.code == 0, result.err
    if objective == 'dpo':
        (_, kl), *_ = losses_of(tmp_path / 'one', 'val_kl')
        assert kl == 0  # the reference is the base


@pytest.mark.slow
def test_two_processes(base, folder, tmp_path):  # noqa: F811
    """Two processes train the same adapters as one."""
    settings = [*TINY_LOADED, f'--dataset={folder / "sft"}', f'--init_from={base / "base"}', '--lora_rank=4',
                '--learning_rate=1e-2', '--gradient_accumulation_steps=2']
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    for name, launcher in (('one', []), ('two', torchrun)):
        command = [sys.executable, *launcher, 'train.py', *settings, f'--out_dir={tmp_path / name}']
        result = subprocess.run(command, cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True,
                                text=True, encoding='utf-8', timeout=200)
        assert result.returncode == 0, result.stderr[-3000:]
    one, two = (load_checkpoint(str(tmp_path / name / 'ckpt.pt'))['model'] for name in ('one', 'two'))
    assert one.keys() == two.keys()
    assert all((one[key] - two[key]).abs().max() < 1e-5 for key in one)
    assert any(one[key].any() for key in one if 'lora_B' in key)


def test_a_base_that_is_adapters_itself(base, folder, tmp_path):  # noqa: F811
    """LoRA on top of LoRA: the first merged model is the base of the second."""
    args = [f'--dataset={folder / "sft"}', '--lora_rank=2', '--max_iters=2', '--learning_rate=1e-2']
    train(*args, f'--init_from={base / "sft"}', f'--out_dir={tmp_path / "one"}')
    train(*args, f'--init_from={tmp_path / "one"}', f'--out_dir={tmp_path / "two"}')
    one, two = (load_model(str(tmp_path / name))[0] for name in ('one', 'two'))
    checkpoint = load_checkpoint(str(tmp_path / 'two' / 'ckpt.pt'))
    reference = without_adapters(build_model(checkpoint, 'two'))
    idx = torch.randint(20, (2, 9))
    torch.testing.assert_close(reference(idx), one(idx))
    assert (two(idx) - one(idx)).abs().max() > 1e-4


def test_a_reward_model_as_base(base, folder, tmp_path):  # noqa: F811
    """Its head is trained further, saved with the adapters and loaded again."""
    args = [f'--dataset={folder / "pairs"}', '--objective=reward', '--learning_rate=1e-2']
    out_dir = f'--out_dir={tmp_path / "lora"}'
    train(*args, f'--init_from={base / "sft"}', f'--out_dir={tmp_path / "reward"}', '--max_iters=2')
    train(*args, f'--init_from={tmp_path / "reward"}', out_dir, '--lora_rank=2')
    out = train(*args, '--init_from=resume', out_dir, '--eval_only=True')
    loss = losses_of(tmp_path / 'lora', 'val_loss')[-1][1]
    assert f'val loss {loss:.4f}' in out
    assert 'lm_head.weight' in load_checkpoint(str(tmp_path / 'lora' / 'ckpt.pt'))['model']
    assert load_model(str(tmp_path / 'lora'))[0].lm_head.weight.shape == (1, 32)


def test_another_base_is_noticed(base, folder, tmp_path):  # noqa: F811
    path = str(tmp_path / 'base.pt')
    shutil.copy(base / 'sft' / 'ckpt.pt', path)
    train(f'--dataset={folder / "sft"}', '--lora_rank=2', '--max_iters=1', f'--init_from={path}',
          f'--out_dir={tmp_path / "lora"}')
    checkpoint = load_checkpoint(path)
    torch.manual_seed(11)
    other = GPT(build_model(checkpoint, '').config)
    save_checkpoint({**checkpoint, 'model': other.state_dict()}, path)
    line = exit_line(load_model, str(tmp_path / 'lora'))
    assert path in line and 'other weights' in line
    os.remove(path)
    assert path in exit_line(load_model, str(tmp_path / 'lora'))


@pytest.mark.parametrize('args, names', [
    (['--lora_targets=attn.q_proj,c_fc'], ['attn.q_proj', 'attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj']),
    (['--lora_targets='], ['lora_targets', 'attn.c_attn']),
    (['--lora_rank=-1'], ['lora_rank=-1']),
    (['--lora_dropout=1.0'], ['lora_dropout=1.0']),
    (['--quantize_base=q4'], ['quantize_base=q4', 'int8', 'nf4']),
    (['--quantize_base=int8', '--lora_rank=0'], ['quantize_base=int8', '--lora_rank=16']),
    (['--init_from=scratch', '--n_embd=32', '--n_head=2', '--n_layer=1'], ['lora_rank=4', '--init_from']),
    (['--init_from=auto'], ['lora_rank=4', '--init_from']),
    (['--init_from=nowhere/best.pt'], ['nowhere/best.pt', 'no such checkpoint']),
    (['--optimizer=muon'], ['optimizer=muon', '--optimizer=adamw']),
    (['--parallel=fsdp'], ['parallel=fsdp']),
], ids=str)
def test_bad_input(args, names, base, folder, tmp_path):  # noqa: F811
    line = refused(f'--dataset={folder / "sft"}', f'--init_from={base / "sft"}', '--lora_rank=4',
                   f'--out_dir={tmp_path / "x"}', *args)
    assert all(name in line for name in names), line
    assert not os.path.exists(tmp_path / 'x')


def test_without_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, 'bitsandbytes', None)
    assert 'pip install bitsandbytes' in exit_line(FrozenLinear, nn.Linear(8, 8), 'nf4')
