"""core/training/settings.py: impossible values of train.py's settings are refused with one line."""
from types import SimpleNamespace

import pytest
from conftest import exit_line

from core.training.settings import (
    check_against_checkpoint,
    check_data,
    check_heads,
    check_settings,
    describe_changes,
    run_length,
    split_rows,
)

GOOD = {
    'batch_size': 12, 'gradient_accumulation_steps': 1, 'block_size': 32, 'n_layer': 2, 'n_head': 2, 'n_embd': 32,
    'n_kv_head': 0, 'head_size': 0, 'n_inner': 0, 'rope_theta': 0.0, 'norm': 'layernorm', 'activation': 'gelu',
    'eval_interval': 10, 'log_interval': 1, 'eval_iters': 2, 'save_interval': 0, 'save_minutes': 10.0, 'keep_last': 1,
    'skip_nonfinite': 0, 'learning_rate': 1e-3, 'muon_lr': 0.02, 'min_lr': 1e-4, 'weight_decay': 0.1, 'grad_clip': 1.0,
    'warmup_iters': 0, 'beta1': 0.9, 'beta2': 0.95, 'dropout': 0.0, 'cooldown': 0.4, 'max_iters': 10,
    'lr_decay_iters': 10, 'data_order': 'random', 'parallel': 'ddp', 'optimizer': 'adamw', 'schedule': 'cosine',
    'seed': 1337, 'epochs': 0.0, 'wandb_log': False, 'tensorboard_log': False, 'decay_lr': True, 'sample_interval': 0,
    'sample_tokens': 100, 'window': 0, 'window_pattern': 'SSSL', 'eval_only': False, 'dry_run': False,
    'ema': 0.0, 'short_rows': 0.0, 'objective': 'next_token', 'minutes': 0.0, 'auto': False,
}


@pytest.mark.parametrize('key, value, expected', [
    ('batch_size', 0, 'at least 1'),
    ('gradient_accumulation_steps', -1, 'at least 1'),
    ('block_size', 0, 'at least 1'),
    ('n_layer', 0, 'at least 1'),
    ('eval_interval', 0, 'at least 1'),
    ('log_interval', 0, 'at least 1'),
    ('n_head', -1, 'at least 0'),
    ('rope_theta', -1.0, 'at least 0'),
    ('save_interval', -1, 'at least 0'),
    ('save_minutes', -1.0, 'at least 0'),
    ('keep_last', -1, 'at least 0'),
    ('skip_nonfinite', -1, 'at least 0'),
    ('learning_rate', -1.0, 'at least 0'),
    ('muon_lr', -1.0, 'at least 0'),
    ('weight_decay', -1.0, 'at least 0'),
    ('grad_clip', -1.0, 'at least 0'),
    ('norm', 'batchnorm', 'layernorm or rmsnorm'),
    ('activation', 'relu', 'gelu or gelu_tanh or swiglu'),
    ('optimizer', 'sgd', 'adamw or muon'),
    ('schedule', 'linear', 'cosine or wsd'),
    ('data_order', 'sorted', 'random or epochs or documents'),
    ('parallel', 'zero', 'ddp or fsdp'),
    ('seed', 10**19, 'less than 2**32'),
    ('window', -1, 'at least 0'),
    ('window_pattern', '', 'S and L'),
    ('window_pattern', 'SSM', 'S and L'),
    ('beta1', 1.0, '[0, 1)'),
    ('beta2', -0.5, '[0, 1)'),
    ('dropout', 1.0, '[0, 1)'),
    ('cooldown', 1.5, '[0, 1]'),
    ('ema', -0.1, '[0, 0.5]'),
    ('short_rows', 1.5, '[0, 1]'),
    ('ema', 0.999, '[0, 0.5]'),
    ('epochs', -1.0, 'at least 0'),
    ('epochs', float('inf'), 'a finite number'),
    ('max_iters', -2, 'at least 0, or -1'),
    ('lr_decay_iters', -2, 'at least 0, or -1'),
    ('eval_iters', 0, 'above 0, or -1'),
])
def test_impossible_value(key, value, expected):
    line = exit_line(check_settings, GOOD | {key: value})
    assert line.startswith(f'{key}={value}: expected ')
    assert expected in line


def test_an_objective_whose_rows_cannot_be_cut():
    line = exit_line(check_settings, GOOD | {'short_rows': 0.5, 'objective': 'dpo'})
    assert line.startswith('short_rows=0.5: ') and 'not dpo' in line


def test_possible_values():
    check_settings(GOOD)
    check_settings(GOOD | {'optimizer': 'muon', 'max_iters': -1, 'eval_iters': -1, 'cooldown': 1.0})


@pytest.mark.parametrize('window, pattern, warns', [
    (0, 'L', False), (31, 'S', False), (31, 'LS', False), (32, 'S', True), (8, 'L', True), (8, 'LLS', True),
])
def test_a_window_that_limits_nothing(window, pattern, warns, capsys):
    check_settings(GOOD | {'window': window, 'window_pattern': pattern})
    assert capsys.readouterr().out.startswith('warning: window=') == warns


def test_muon_needs_a_learning_rate():
    line = exit_line(check_settings, GOOD | {'optimizer': 'muon', 'learning_rate': 0.0})
    assert 'learning_rate=0' in line and 'muon_lr=0.02' in line


@pytest.mark.parametrize('arguments, names', [
    ((32, 3, 0, 0, 0.0, False), ['n_embd=32', 'n_head=3', 'divisible']),
    ((200, 3, 0, 0, 0.0, True), ['n_embd=200', 'n_head=3', '64 channels']),
    ((32, 4, 3, 0, 0.0, False), ['n_head=4', 'n_kv_head=3', 'divisible']),
    ((32, 2, 4, 0, 0.0, False), ['n_head=2', 'n_kv_head=4', 'divisible']),
    ((30, 2, 0, 0, 10000.0, False), ['rope_theta=10000.0', '15', 'even']),
    ((32, 2, 0, 5, 10000.0, False), ['rope_theta=10000.0', '5', 'head_size', 'even']),
])
def test_heads(arguments, names):
    line = exit_line(check_heads, *arguments)
    assert all(name in line for name in names), line


def test_checkpoint_contradicted():
    """Only what the command line gives can contradict; 0 means a derived value, which cannot."""
    model = SimpleNamespace(config=SimpleNamespace(n_layer=2, n_head=2))
    check_against_checkpoint(model, 'out/ckpt.pt', {'n_layer': 3, 'n_head': 2}, {})
    check_against_checkpoint(model, 'out/ckpt.pt', {'n_layer': 2, 'n_head': 0}, {'n_layer': '2', 'n_head': '0'})
    line = exit_line(check_against_checkpoint, model, 'out/ckpt.pt', {'n_layer': 3}, {'n_layer': '3'})
    assert line.startswith('--n_layer=3 contradicts out/ckpt.pt, which has n_layer=2')


def test_changes_since_the_checkpoint():
    before = {'config': {'max_iters': 3, 'out_dir': 'a'}, 'world_size': 1, 'iter_num': 3}
    after = {'max_iters': 8, 'out_dir': 'b', 'eval_only': False, 'minutes': 0.0}
    line = describe_changes(before, after, 2, 6)
    assert line == 'not as before: max_iters 3 -> 8; processes 1 -> 2, which share the same 6 rows a step'
    after['max_iters'] = 3
    line, nothing_left = describe_changes(before, after, 1, 6).splitlines()
    assert line == 'all settings as before'
    assert 'nothing is left' in nothing_left and '--max_iters' in nothing_left
    after['eval_only'] = True
    assert describe_changes(before, after, 1, 6) == line


def test_data_that_cannot_be_drawn():
    mixture = SimpleNamespace(weights=[0.5, 0.5], shortest=100, kind='', folder='a:0.5,b:0.5')
    check_data(mixture, 'a:0.5,b:0.5', 'random', 32, 0.5)
    assert 'data_order=epochs' in exit_line(check_data, mixture, 'a:0.5,b:0.5', 'epochs', 32, 0.0)
    short = SimpleNamespace(weights=[1.0], shortest=32, kind='', folder='short')
    assert '--block_size=31' in exit_line(check_data, short, 'short', 'random', 32, 0.0)
    chats = SimpleNamespace(weights=[1.0], shortest=100, kind='conversations', folder='chats')
    assert 'block_size=31 tokens' in exit_line(check_data, mixture, 'a:0.5,b:0.5', 'random', 31, 0.5)
    line = exit_line(check_data, chats, 'chats', 'random', 32, 0.5)
    assert line.startswith('short_rows=0.5: chats has conversations')


def test_split_rows():
    assert split_rows(12, 40, 8) == (5, 12)
    assert split_rows(4, 3, 6) == (1, 2)
    assert split_rows(4, 5, 2) == (5, 2)  # 10 rows: 2 + 2 + 2 + 2 + 2, not 4 + 4 + 2
    line = exit_line(split_rows, 4, 1, 3)
    assert all(name in line for name in ('batch_size=4', 'gradient_accumulation_steps=1', '3 processes')), line


@pytest.mark.parametrize('given, config, expected', [
    (['epochs'], {'epochs': 2.5}, (25, 25)),
    (['epochs'], {'epochs': 0.01}, (1, 1)),
    (['epochs', 'lr_decay_iters'], {'epochs': 2.5, 'lr_decay_iters': 7}, (25, 7)),
    (['epochs', 'lr_decay_iters'], {'epochs': 2.5, 'lr_decay_iters': -1}, (25, 25)),
    (['max_iters'], {'epochs': 2.5, 'max_iters': 30}, (30, 10)),  # a config file has the epochs
    (['epochs', 'max_iters'], {'epochs': 0.0, 'max_iters': 30}, (30, 10)),
    ([], {'lr_decay_iters': -1}, (10, 10)),
])
def test_epochs(given, config, expected):
    """Of ten steps each."""
    check_settings(GOOD | config, given)
    assert run_length(GOOD | config, given, None, None, 10.0) == expected


def test_dry_run_of_an_evaluation():
    line = exit_line(check_settings, GOOD | {'dry_run': True, 'eval_only': True})
    assert line.startswith('dry_run=True, eval_only=True: ')


def test_epochs_and_steps_together():
    line = exit_line(check_settings, GOOD | {'epochs': 2.0}, ['epochs', 'max_iters'])
    assert line.startswith('epochs=2.0, max_iters=10: ')
