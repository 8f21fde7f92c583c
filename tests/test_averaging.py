"""core/training/averaging.py: the average against its closed form, its exact resume, and which weights are used."""
import math
import re

import pytest
import torch
from conftest import TINY, TINY_LOADED, losses_of, run_script
from test_survival import assert_same_run, finish, loss_factors, torchrun, train  # noqa: F401  # a fixture

from core.training.averaging import Average
from core.weights.checkpoint import best_loss, build_model, choose_weights, load_checkpoint, load_model
from model import GPT, GPTConfig

CONSTANT = ['--decay_lr=False', '--learning_rate=3e-2', '--eval_iters=-1', '--max_iters=40', '--eval_interval=20']


def load(out_dir, name='ckpt.pt'):
    return load_checkpoint(str(out_dir / name))


def closed_form(ema, t):
    """Return the shares in the average of the weights after steps 1 to t."""
    g = 1 / ema - 2
    shares = [math.exp(math.lgamma(s + g) - math.lgamma(s)) for s in range(1, t + 1)]
    return [share / sum(shares) for share in shares]


def weights_of_each_step(out_dir):
    """Return the checkpoints' weights in the order of the steps."""
    paths = [*sorted(out_dir.glob('ckpt_*.pt')), out_dir / 'ckpt.pt']
    return [load_checkpoint(str(path))['model'] for path in paths]


def assert_average(checkpoint, weights, shares):
    """The checkpoint's averaged weights are the sum of these weights, {name: tensor} each, times these shares."""
    assert checkpoint['ema'].keys() == checkpoint['model'].keys()
    for key, average in checkpoint['ema'].items():
        expected = sum(share * w[key].double() for share, w in zip(shares, weights, strict=True))
        torch.testing.assert_close(average, expected.float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('ema', [0.05, 0.1, 0.3, 0.5])
@pytest.mark.parametrize('t', [1, 2, 7, 300])
def test_closed_form(ema, t):
    """Also the mean age of the weights, which is what the setting says."""
    model = GPT(GPTConfig(block_size=2, vocab_size=2, n_layer=1, n_head=1, n_embd=2))
    [p, *_] = model.parameters()
    average = Average(model, ema)
    [name] = [key for key, other in model.named_parameters() if other is p]
    values = torch.randn(t, *p.shape, generator=torch.Generator().manual_seed(t))
    for step, value in enumerate(values):
        p.data.copy_(value)
        average.update(step)
    shares = closed_form(ema, t)
    expected = (values.double() * torch.tensor(shares, dtype=torch.float64)[:, None, None]).sum(dim=0)
    torch.testing.assert_close(average.state()[name], expected.float(), rtol=1e-4, atol=1e-6)
    mean_age = sum(share * (t - s) for s, share in enumerate(shares, 1))
    assert mean_age == pytest.approx(ema * (t - 1))


def test_of_a_run(tiny_data, tmp_path, loss_factors):  # noqa: F811
    """
    Its checkpoint of every step gives the weights to average; tied matrices are stored once. After a step that is left
    out the weights are those of the step before, and count again.
    """
    loss_factors[3] = float('nan')
    train(tiny_data, tmp_path, '--ema=0.2', '--max_iters=9', '--save_interval=2', '--keep_last=9', '--skip_nonfinite=1',
          '--decay_lr=False')
    weights = weights_of_each_step(tmp_path)
    assert torch.equal(weights[2]['lm_head.weight'], weights[3]['lm_head.weight'])
    checkpoint = load(tmp_path)
    assert_average(checkpoint, weights, closed_form(0.2, 9))
    averages = checkpoint['ema']
    assert averages['lm_head.weight'].data_ptr() == averages['transformer.wte.weight'].data_ptr()
    assert {'model', 'ema', 'optimizer'} <= checkpoint['checksums'].keys()


@pytest.mark.parametrize('style', [
    pytest.param([], id='adamw'),
    pytest.param(['--optimizer=muon', '--tied=False', '--dtype=bfloat16', '--gradient_checkpointing=True'], id='muon'),
    pytest.param(['--background_save=False', '--save_interval=2'], id='every-step'),
])
def test_resume_is_exact(style, tiny_data, tmp_path):
    """The run without an average has the same losses and weights, too."""
    args = '--dropout=0.2', '--eval_interval=3', *style
    undisturbed, resumed, without = tmp_path / 'undisturbed', tmp_path / 'resumed', tmp_path / 'without'
    train(tiny_data, undisturbed, *args, '--ema=0.1', '--max_iters=10')
    train(tiny_data, resumed, *args, '--ema=0.1', '--max_iters=4')
    train(tiny_data, resumed, *args, '--ema=0.1', '--max_iters=10', '--init_from=resume')
    train(tiny_data, without, *args, '--max_iters=10')
    assert_same_run(undisturbed, resumed)
    assert_same_run(undisturbed, without)
    assert_same_averages(undisturbed, resumed)
    assert load(without)['ema'] == {} and not (load(without)['measured'].keys() & {'val_ema_loss'})


def assert_same_averages(a, b):
    for column in ('val_ema_loss', 'val_ema_bpb'):
        assert losses_of(a, column) == losses_of(b, column)
    assert len(losses_of(a, 'val_ema_loss')) == len(losses_of(a, 'val_loss')) > 1
    a, b = load(a), load(b)
    assert a['measured'] == b['measured'] and a['best_val_loss'] == b['best_val_loss']
    assert a['ema'].keys() == b['ema'].keys() == a['model'].keys()
    assert all(torch.equal(a['ema'][key], b['ema'][key]) for key in a['ema'])
    assert not torch.equal(a['ema']['lm_head.weight'], a['model']['lm_head.weight'])


def test_steps_left_out_on_both_sides_of_an_interruption(tiny_data, tmp_path, loss_factors):  # noqa: F811
    args = '--ema=0.1', '--eval_interval=3', '--skip_nonfinite=2', '--decay_lr=False'
    loss_factors |= {0: float('nan'), 5: float('nan')}
    train(tiny_data, tmp_path / 'undisturbed', *args, '--max_iters=8')
    loss_factors |= {8: float('nan'), 13: float('nan')}  # the steps of both runs are counted
    train(tiny_data, tmp_path / 'resumed', *args, '--max_iters=3')
    train(tiny_data, tmp_path / 'resumed', *args, '--max_iters=8', '--init_from=resume')
    assert load(tmp_path / 'resumed')['skipped'] == 2
    assert_same_averages(tmp_path / 'undisturbed', tmp_path / 'resumed')


@pytest.mark.slow
@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_two_processes(parallel, tiny_data, tmp_path):
    """Interrupted and resumed they equal an undisturbed run bit for bit, and one process up to rounding."""
    args = ['--ema=0.1', '--dropout=0.0', '--eval_interval=2', '--eval_iters=-1']

    def two(out_dir, max_iters):
        finish(torchrun('--standalone', '--nproc_per_node=2', 'train.py', *TINY, *args, f'--dataset={tiny_data}',
                        f'--out_dir={out_dir}', f'--parallel={parallel}', f'--max_iters={max_iters}',
                        '--init_from=auto'))
    undisturbed, resumed, one = tmp_path / 'undisturbed', tmp_path / 'resumed', tmp_path / 'one'
    two(undisturbed, 8)
    two(resumed, 3)
    two(resumed, 8)
    assert_same_run(undisturbed, resumed)
    assert_same_averages(undisturbed, resumed)
    train(tiny_data, one, *args, '--max_iters=8')
    for column in ('loss', 'val_loss', 'val_ema_loss'):
        numbers = [number for _, number in losses_of(resumed, column)]
        assert [number for _, number in losses_of(one, column)] == pytest.approx(numbers, abs=2e-6)
    for part in ('model', 'ema'):
        a, b = load(one)[part], load(resumed)[part]
        assert all((a[key] - b[key]).abs().max() < 1e-5 for key in a)


def test_it_starts_when_a_run_is_resumed_and_is_dropped_without_the_setting(tiny_data, tmp_path):
    args = '--decay_lr=False', '--eval_interval=2'
    train(tiny_data, tmp_path, *args, '--max_iters=3')
    start = load(tmp_path)['model']
    out = train(tiny_data, tmp_path, *args, '--max_iters=4', '--init_from=resume', '--ema=0.2').out
    assert 'ema 0.0 -> 0.2' in out
    share = 1 / (1 + 3 * 0.2 / 0.8)
    checkpoint = load(tmp_path)
    assert_average(checkpoint, [start, checkpoint['model']], [1 - share, share])
    train(tiny_data, tmp_path, *args, '--max_iters=5', '--init_from=resume', '--eval_interval=100', '--ema=0')
    assert load(tmp_path)['ema'] == {}


def whole_loss(result):
    return float(re.search(r': loss ([\d.]+)', result.out)[1])


def test_the_better_weights_are_used(tiny_data, tmp_path):
    """
    With a high, constant learning rate these are the averaged ones. sample.py, evaluate.py, export.py, a new run and
    weights.pt take them; a resumed run goes on with the raw ones.
    """
    run = tmp_path / 'run'
    out = train(tiny_data, run, *CONSTANT, '--ema=0.1').out
    checkpoint = load(run)
    measured = checkpoint['measured']
    assert measured['val_ema_loss'] < measured['val_loss']
    assert checkpoint['best_val_loss'] == measured['val_ema_loss']
    assert re.search(r'step 40: train loss [\d.]+, val loss [\d.]+, val ema loss [\d.]+, ', out)
    assert f'best validation loss {measured["val_ema_loss"]:.4f}' in out

    weights = load(run, 'weights.pt')
    assert 'ema' not in weights and all(torch.equal(weights['model'][key], p) for key, p in checkpoint['ema'].items())
    for path in (run, run / 'ckpt.pt', run / 'best.pt', run / 'weights.pt'):
        model, source = load_model(str(path), quiet=True)
        assert source['weights'] == 'averaged weights'
        assert torch.equal(model.lm_head.weight, checkpoint['ema']['lm_head.weight'])
    raw = build_model(load(run), 'x')
    assert torch.equal(raw.lm_head.weight, checkpoint['model']['lm_head.weight'])

    sampled = run_script('sample.py', f'--out_dir={run}', '--device=cpu', '--start=one', '--max_new_tokens=2')
    assert re.search(r'^loaded .* averaged weights$', sampled.out, re.MULTILINE)
    evaluated = run_script('evaluate.py', f'--out_dir={run}', f'--data={tiny_data}', '--device=cpu', '--dtype=float32')
    assert whole_loss(evaluated) == pytest.approx(measured['val_ema_loss'], abs=1e-3)
    exported = run_script('export.py', f'--out_dir={run}', f'--to={tmp_path / "hf"}')
    assert exported.code == 0, exported.err
    assert 'These are its averaged weights' in (tmp_path / 'hf' / 'README.md').read_text(encoding='utf-8')
    anew = run_script('train.py', *TINY_LOADED, f'--dataset={tiny_data}', f'--out_dir={tmp_path / "new"}',
                      f'--init_from={run}', '--learning_rate=0', '--min_lr=0', '--eval_iters=-1')
    assert 'averaged weights' in anew.out
    assert load(tmp_path / 'new')['measured']['val_loss'] == pytest.approx(measured['val_ema_loss'], abs=1e-5)

    out = train(tiny_data, run, *CONSTANT, '--ema=0.1', '--init_from=resume', '--eval_only=True').out
    for key in ('val_loss', 'val_ema_loss'):
        assert f'{key.replace("_", " ")} {measured[key]:.4f}' in out


def test_the_raw_weights_are_used_if_they_are_better(tiny_data, tmp_path):
    """As in the first steps. Before the first evaluation nothing says that the averaged ones are."""
    train(tiny_data, tmp_path, '--ema=0.5', '--decay_lr=False', '--eval_iters=-1')
    checkpoint = load(tmp_path)
    measured = checkpoint['measured']
    assert checkpoint['best_val_loss'] == measured['val_loss'] < measured['val_ema_loss']
    model, source = load_model(str(tmp_path), quiet=True)
    assert source['weights'] == 'raw weights'
    assert torch.equal(model.lm_head.weight, checkpoint['model']['lm_head.weight'])
    weights = load(tmp_path, 'weights.pt')
    assert torch.equal(weights['model']['lm_head.weight'], checkpoint['model']['lm_head.weight'])
    checkpoint['measured'] = {}
    choose_weights(checkpoint)
    assert checkpoint['weights'] == 'raw weights'
    assert best_loss({}) == math.inf


def test_a_run_without_averages_says_nothing_about_them(tiny_run):
    _, source = load_model(str(tiny_run), quiet=True)
    assert 'weights' not in source


def test_adapters(tiny_data, tiny_run, tmp_path):
    """Only what is trained is averaged; what is loaded is the base with averaged adapters."""
    args = [*TINY_LOADED, '--lora_rank=2', '--lora_dropout=0.1', '--ema=0.1', *CONSTANT, '--eval_interval=10']

    def run(name, *more):
        result = run_script('train.py', *args, f'--dataset={tiny_data}', f'--out_dir={tmp_path / name}', *more)
        assert result.code == 0, result.err
    run('undisturbed', f'--init_from={tiny_run}', '--max_iters=30')
    run('resumed', f'--init_from={tiny_run}', '--max_iters=20')
    run('resumed', '--init_from=resume', '--max_iters=30')
    one, two = load(tmp_path / 'undisturbed'), load(tmp_path / 'resumed')
    assert all('lora_' in key for key in one['ema']) and one['ema'].keys() == one['model'].keys()
    assert all(torch.equal(one['ema'][key], two['ema'][key]) for key in one['ema'])
    assert one['measured'] == two['measured']
    model, source = load_model(str(tmp_path / 'resumed'), quiet=True)
    plain, _ = load_model(str(tiny_run), quiet=True)
    used = two['ema' if source['weights'] == 'averaged weights' else 'model']
    name = 'transformer.h.0.mlp.c_fc'
    added = 32 / 2 * used[f'{name}.lora_B.weight'] @ used[f'{name}.lora_A.weight']
    expected = plain.get_parameter(f'{name}.weight') + added
    torch.testing.assert_close(model.get_parameter(f'{name}.weight'), expected)
