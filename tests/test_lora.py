"""LoRA and QLoRA: against peft, merged against unmerged, interrupted against uninterrupted, with every objective."""
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
from core.weights.lora import LoRALinear, add_adapters, describe_adapters, merge, weight_sample, trained_weights, without_adapters
from core.weights.quantize import FrozenLinear
from core.weights.vocabulary import resize_vocabulary
from model import GPT

LORA = {'lora_rank': 4, 'lora_alpha': 8.0, 'lora_dropout': 0.0, 'lora_targets': 'c_attn,c_proj,c_fc', 'quantize_base': '', 'known': 97}
KINDS = ['int8'] + ['nf4'] * (importlib.util.find_spec('bitsandbytes') is not None)
LOSSES = {'sft': [], 'reward': ['--objective=reward'], 'dpo': ['--objective=dpo', '--beta=0.3'],
          'grpo': ['--objective=grpo', '--group_size=2', '--max_new_tokens=4', '--updates=2']}


def adapted(settings=None, **lora):
    """A network with adapters that add something."""
    model = network(**{**MODERN, 'qk_norm': True, 'n_kv_head': 2} if settings is None else settings)
    add_adapters(model, {**LORA, **lora})
    for name, p in model.named_parameters():
        if 'lora_B' in name:
            nn.init.normal_(p, std=0.2)
    return model


def learn(model, steps=5):
    """Losses of some steps on fixed tokens."""
    opt, found = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
    X, Y = torch.randint(97, (2, 4, 17), generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        loss = model(X, Y).mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize('targets', ['c_attn,c_proj,c_fc', 'attn.c_proj,c_fc'])
def test_peft_trains_the_same(targets):
    """From the same seed: the same adapters, losses, and adapters after five steps."""
    peft = pytest.importorskip('peft')
    ours = network(**MODERN)
    theirs = copy.deepcopy(ours)
    torch.manual_seed(7)
    add_adapters(ours, {**LORA, 'lora_targets': targets})
    torch.manual_seed(7)
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets.split(',')), theirs)
    theirs.requires_grad_(False)
    for name, p in theirs.named_parameters():
        p.requires_grad_('lora_' in name)
    pairs = [[(name, p) for name, p in model.named_parameters() if p.requires_grad] for model in (ours, theirs)]
    assert [name.replace('.default', '') for name, _ in pairs[1]] == [name for name, _ in pairs[0]] and len(pairs[0]) == {'c_attn,c_proj,c_fc': 16, 'attn.c_proj,c_fc': 8}[targets]
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(*pairs))
    losses = learn(ours), learn(theirs)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and losses[0][-1] < losses[0][0] - 0.01
    assert all((p - q).abs().max() < 1e-6 for (_, p), (_, q) in zip(*pairs))


@torch.no_grad()
@pytest.mark.parametrize('lora', [{}, {'known': 90}, *({'quantize_base': kind} for kind in KINDS)], ids=str)
@pytest.mark.parametrize('tied', [True, False])
def test_merged_computes_what_unmerged_does(lora, tied):
    model = adapted({**MODERN, 'qk_norm': True, 'tied': tied}, **lora)
    idx = torch.randint(97, (3, 20))
    if 'known' in lora:
        assert len(trained_weights(model)) == 2 * 2 * 4 + 2 - tied
    expected, before = model(idx), without_adapters(model)(idx)
    assert (expected - before).abs().max() > 0.1
    merged = merge(model)
    assert (merged(idx) - expected).abs().max() <= 1e-5
    assert merged.state_dict().keys() == network(**MODERN, qk_norm=True, tied=tied).state_dict().keys() and all(p.requires_grad for p in merged.parameters())
    assert (merged.transformer.wte.weight is merged.lm_head.weight) == tied


def test_the_base_stays_and_serves_as_reference():
    """Training moves adapters and new rows alone; without them the network computes what it did before, in the same memory."""
    model = network(**MODERN)
    resize_vocabulary(model, 97, 100)
    idx, before = torch.randint(100, (2, 9)), {name: p.clone() for name, p in model.state_dict().items()}
    expected = model(idx).detach()
    add_adapters(model, LORA)
    torch.testing.assert_close(model(idx), expected, rtol=0, atol=0)
    learn(model)
    reference = without_adapters(model)
    torch.testing.assert_close(reference(idx), expected, rtol=0, atol=1e-6)
    assert (model(idx) - expected).abs().max() > 1e-2
    shared = {p.data_ptr() for p in model.parameters()}
    assert [name for name, p in reference.named_parameters() if p.data_ptr() not in shared] == ['transformer.wte.parametrizations.weight.0.rows']
    assert not any(isinstance(module, LoRALinear) for module in reference.modules()) and not any(p.requires_grad for p in reference.parameters())
    learn(model)
    torch.testing.assert_close(reference(idx), expected, rtol=0, atol=1e-6)
    again = merge(reference).state_dict()
    assert again.keys() == before.keys() and all((again[name] - before[name]).abs().max() < 1e-6 for name in again)


@pytest.mark.parametrize('kind', KINDS)
def test_frozen_layers(kind):
    """They compute with what they unpack to, which is near, forward and backward, eagerly in both precisions; and take the memory that they say."""
    torch.manual_seed(0)
    linear = nn.Linear(256, 192)
    frozen = FrozenLinear(linear, kind)
    near = (frozen.unpacked(torch.float32) - linear.weight).abs().mean() / linear.weight.abs().mean()
    assert 1e-4 < near < {'int8': 0.01, 'nf4': 0.1}[kind]
    x = torch.randn(5, 7, 256, requires_grad=True)
    plain = frozen.linear()
    gradient = torch.randn(5, 7, 192)
    y = frozen(x)
    y.backward(gradient)
    theirs = x.detach().clone().requires_grad_()
    plain(theirs).backward(gradient)
    torch.testing.assert_close(y, plain(theirs))
    torch.testing.assert_close(x.grad, theirs.grad)
    with torch.autocast('cpu', torch.bfloat16):
        assert frozen(x).dtype == torch.bfloat16 and (frozen(x) - y).abs().max() < 0.05
    assert frozen.nbytes() <= {'int8': 0.52, 'nf4': 0.30}[kind] * 2 * linear.weight.numel()


def test_what_is_printed():
    model = adapted(None, quantize_base='int8')
    text, trained = describe_adapters(model), 2 * 4 * ((32 + 64) + (32 + 32) + (32 + 256) + (128 + 32))
    assert f'{trained:,} of' in text and '8 layers in int8' in text and f'{16 * trained / 1e6:,.1f} MB' in text


@torch.no_grad()
@pytest.mark.parametrize('style', [{}, {'bias': False, 'activation': 'gelu_tanh'}, {**MODERN, 'tied': False}, {**MODERN, 'qk_norm': True, 'n_kv_head': 2, 'head_size': 16}], ids=str)
def test_adapters_load_in_peft(style, tmp_path):
    """An exported base with the exported adapter computes there what ours do together; merged, it is one folder that does."""
    peft, transformers = pytest.importorskip('peft'), pytest.importorskip('transformers')
    tokenizer, plain = char_tokenizer(map(chr, range(33, 129))), network(**style)
    (tmp_path / 'base').mkdir()
    save_pretrained(tmp_path / 'base', plain, tokenizer, 'float32', 'x')
    model = adapted(style)
    lora = {**LORA, 'base': str(tmp_path / 'base'), 'base_path': '', 'probe': weight_sample(load_model(str(tmp_path / 'base'))[0])}
    save_checkpoint({'model': trained_weights(model), 'model_args': vars(model.config), 'lora': lora, 'tokenizer': tokenizer.json, 'config': {}}, str(tmp_path / 'lora.pt'))
    idx = torch.randint(97, (3, 20))
    for to, merged in (('adapter', '--merge=False'), ('whole', '--merge=True')):
        result = run_script('export.py', f'--init_from={tmp_path / "lora.pt"}', f'--to={tmp_path / to}', merged)
        assert result.code == 0, result.err
    peer = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'base'), tmp_path / 'adapter').eval()
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'whole').eval()
    assert sorted(os.listdir(tmp_path / 'adapter')) == ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    assert (model(idx) - plain(idx)).abs().max() > 0.1
    assert (peer(idx).logits - model(idx)).abs().max() <= 1e-5 and (whole(idx).logits - model(idx)).abs().max() <= 1e-5


def same_state(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize('objective, kind', [*((name, '') for name in LOSSES), *(('sft', kind) for kind in KINDS)])
def test_training(objective, kind, base, folder, tmp_path):  # noqa: F811
    """With every objective: only adapters (and the head, and the rows of tokens that the base never saw) are kept; interrupted is uninterrupted; a model comes of it."""
    source = base / ('base' if objective == 'sft' else 'sft')
    dataset = folder / {'sft': 'sft', 'grpo': 'prompts'}.get(objective, 'pairs')
    args = [*TINY_LOADED, f'--dataset={dataset}', *LOSSES[objective], f'--reward={base / "rewards.py"}:long', '--lora_rank=4', f'--quantize_base={kind}', '--lora_alpha=4', '--learning_rate=1e-2', '--save_interval=2', '--eval_interval=4']
    args = [arg for arg in args if objective == 'grpo' or not arg.startswith('--reward=')]
    result = run_script('train.py', *args, f'--init_from={source}', f'--out_dir={tmp_path / "whole"}')
    assert result.code == 0 and 'LoRA of rank 4' in result.out, result.err
    run_script('train.py', *args, f'--init_from={source}', f'--out_dir={tmp_path / "parts"}', '--max_iters=2')
    result = run_script('train.py', *[arg for arg in args if 'quantize' not in arg], '--init_from=resume', f'--out_dir={tmp_path / "parts"}')
    assert result.code == 0 and 'at step 2' in result.out, result.err
    if objective == 'sft':
        result = run_script('train.py', *args, '--init_from=resume', f'--out_dir={tmp_path / "parts"}', '--lora_rank=5')
        assert result.code == 1 and '--lora_rank=5 contradicts' in result.err and 'lora_rank=4' in result.err, result.err
        result = run_script('train.py', *TINY_LOADED, f'--dataset={dataset}', '--init_from=resume', f'--out_dir={tmp_path / "parts"}', '--optimizer=muon')
        assert result.code == 1 and 'optimizer=muon' in result.err and result.err.count('\n') == 1, result.err
        result = run_script('train.py', *args, '--init_from=resume', f'--out_dir={source}')
        assert result.code == 1 and '--lora_rank=4 contradicts' in result.err, result.err
    whole, parts = (load_checkpoint(str(tmp_path / name / 'ckpt.pt')) for name in ('whole', 'parts'))
    for key in ('model', 'optimizer', 'model_args', 'lora', 'best_val_loss'):
        assert same_state(whole[key], parts[key]), key
    assert losses_of(tmp_path / 'whole') == losses_of(tmp_path / 'parts')
    others = [key for key in whole['model'] if '.lora_' not in key]
    assert others == {'sft': ['transformer.wte.parametrizations.weight.0.rows'], 'reward': ['lm_head.weight']}.get(objective, [])
    assert len(whole['optimizer']['state']) == len(whole['model']) == 2 * 2 * 4 + len(others)
    model, _ = load_model(str(tmp_path / 'whole'))
    assert model.lora is None and model.config.reward == (objective == 'reward')
    if objective == 'sft':
        losses = [loss for _, loss in losses_of(tmp_path / 'whole', 'val_loss')]
        assert losses[-1] < losses[0] - 0.01
        result = run_script('chat.py', f'--out_dir={tmp_path / "whole"}', '--prompt=ab', '--max_new_tokens=4', '--device=cpu')
        assert result.code == 0, result.err
    if objective == 'dpo':
        start, *_ = (loss for _, loss in losses_of(tmp_path / 'whole', 'val_kl'))
        assert start == 0  # the reference is the base


@pytest.mark.slow
def test_two_processes(base, folder, tmp_path):  # noqa: F811
    """Two processes train the adapters that one does."""
    for processes in (1, 2):
        command = [sys.executable] + ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}'] * (processes > 1)
        settings = ['--lora_rank=4', '--learning_rate=1e-2', '--gradient_accumulation_steps=2', f'--init_from={base / "base"}', f'--out_dir={tmp_path / str(processes)}']
        result = subprocess.run([*command, 'train.py', *TINY_LOADED, f'--dataset={folder / "sft"}', *settings], cwd=ROOT, capture_output=True, text=True, encoding='utf-8',
                                env={**os.environ, 'OMP_NUM_THREADS': '1'}, timeout=200)
        assert result.returncode == 0, result.stderr[-3000:]
    one, two = (load_checkpoint(str(tmp_path / name / 'ckpt.pt'))['model'] for name in '12')
    assert one.keys() == two.keys() and all((one[key] - two[key]).abs().max() < 1e-5 for key in one) and any(one[key].any() for key in one if 'lora_B' in key)


def test_a_base_that_is_adapters_itself(base, folder, tmp_path):  # noqa: F811
    """LoRA upon LoRA: what the first gave is the base of the second."""
    args = [*TINY_LOADED, f'--dataset={folder / "sft"}', '--lora_rank=2', '--max_iters=2', '--learning_rate=1e-2']
    for source, to in ((base / 'sft', 'one'), (tmp_path / 'one', 'two')):
        result = run_script('train.py', *args, f'--init_from={source}', f'--out_dir={tmp_path / to}')
        assert result.code == 0, result.err
    one, two = (load_model(str(tmp_path / name))[0] for name in ('one', 'two'))
    checkpoint = load_checkpoint(str(tmp_path / 'two' / 'ckpt.pt'))
    reference = without_adapters(build_model(checkpoint, 'two'))
    idx = torch.randint(20, (2, 9))
    torch.testing.assert_close(reference(idx), one(idx))
    assert (two(idx) - one(idx)).abs().max() > 1e-4


def test_a_reward_model_as_base(base, folder, tmp_path):  # noqa: F811
    """Its head, which is trained on, is taken along and comes back."""
    args = [*TINY_LOADED, f'--dataset={folder / "pairs"}', '--objective=reward', '--learning_rate=1e-2']
    result = run_script('train.py', *args, f'--init_from={base / "sft"}', f'--out_dir={tmp_path / "reward"}', '--max_iters=2')
    assert result.code == 0, result.err
    result = run_script('train.py', *args, f'--init_from={tmp_path / "reward"}', f'--out_dir={tmp_path / "lora"}', '--lora_rank=2')
    assert result.code == 0, result.err
    result = run_script('train.py', *args, '--init_from=resume', f'--out_dir={tmp_path / "lora"}', '--eval_only=True')
    assert result.code == 0 and f'val loss {losses_of(tmp_path / "lora", "val_loss")[-1][1]:.4f}' in result.out, result.err
    assert 'lm_head.weight' in load_checkpoint(str(tmp_path / 'lora' / 'ckpt.pt'))['model']
    assert load_model(str(tmp_path / 'lora'))[0].lm_head.weight.shape == (1, 32)


def test_another_base_is_noticed(base, folder, tmp_path):  # noqa: F811
    shutil.copy(base / 'sft' / 'ckpt.pt', tmp_path / 'base.pt')
    result = run_script('train.py', *TINY_LOADED, f'--dataset={folder / "sft"}', '--lora_rank=2', '--max_iters=1', f'--init_from={tmp_path / "base.pt"}', f'--out_dir={tmp_path / "lora"}')
    assert result.code == 0, result.err
    checkpoint = load_checkpoint(str(tmp_path / 'base.pt'))
    torch.manual_seed(11)
    save_checkpoint({**checkpoint, 'model': GPT(build_model(checkpoint, '').config).state_dict()}, str(tmp_path / 'base.pt'))
    line = exit_line(load_model, str(tmp_path / 'lora'))
    assert str(tmp_path / 'base.pt') in line and 'other weights' in line
    os.remove(tmp_path / 'base.pt')
    line = exit_line(load_model, str(tmp_path / 'lora'))
    assert str(tmp_path / 'base.pt') in line


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
    (['--optimizer=muon'], ['optimizer=muon']),
    (['--parallel=fsdp'], ['parallel=fsdp']),
], ids=str)
def test_bad_input(args, names, base, folder, tmp_path):  # noqa: F811
    result = run_script('train.py', *TINY_LOADED, f'--dataset={folder / "sft"}', f'--init_from={base / "sft"}', '--lora_rank=4', f'--out_dir={tmp_path / "x"}', *args)
    assert result.code == 1 and result.err.count('\n') == 1 and all(name in result.err for name in names), result.err
    assert not os.path.exists(tmp_path / 'x')


def test_without_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, 'bitsandbytes', None)
    assert 'pip install bitsandbytes' in exit_line(FrozenLinear, nn.Linear(8, 8), 'nf4')
