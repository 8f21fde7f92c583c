"""docs/hacking.md: each recipe is applied to a copy of the repository and run; its map of the tests is complete."""
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, losses_of, run_script

import objectives
from core.weights.checkpoint import load_checkpoint

PAGE = (ROOT / 'docs' / 'hacking.md').read_text(encoding='utf-8')
RECIPES = {title: text for title, text in re.findall(r'(?ms)^### (.*?)\n(.*?)(?=^##)', PAGE)}
COPIED = ('*.py', 'core', 'objectives', 'config')
STEPS = [setting for setting in TINY if not setting.startswith('--max_iters')] + ['--max_iters=3']


def blocks(recipe, language):
    """Return [(words behind the language, text)] of a recipe's code blocks."""
    return re.findall(rf'(?ms)^```{language} ?([^\n]*)\n(.*?)^```', RECIPES[recipe])


def replacements(diff):
    """Yield (file, text before, text after) for each @@ part of a diff block."""
    for name, lines in re.findall(r'(?ms)^@@ (\S+) @@\n(.*?)(?=^@@|\Z)', diff):
        lines = lines.splitlines(keepends=True)
        assert all(line[0] in ' +-' for line in lines)
        before = ''.join(line[1:] for line in lines if line[0] in ' -')
        after = ''.join(line[1:] for line in lines if line[0] in ' +')
        yield name, before, after


def apply(recipe, folder):
    """Copy the repository to `folder` and change it as the recipe says."""
    for pattern in COPIED:
        for path in ROOT.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns('__pycache__'))
            else:
                shutil.copy(path, folder)
    for _, diff in blocks(recipe, 'diff'):
        for name, before, after in replacements(diff):
            text = (folder / name).read_text(encoding='utf-8')
            assert text.count(before) == 1, f'{name}: {before}'
            (folder / name).write_text(text.replace(before, after), encoding='utf-8')
    for name, text in blocks(recipe, 'python'):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding='utf-8')


def run(folder, command, *args):
    """Run a command of the page in the changed copy."""
    words = [sys.executable, *shlex.split(command)[1:], *map(str, args)]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, encoding='utf-8')


@pytest.fixture
def train(tiny_data, tmp_path):
    """Return a function that applies a recipe, trains three steps by its command, and returns the checkpoint."""
    def train(recipe, *args):
        apply(recipe, tmp_path)
        command = commands(recipe)[-1]
        refused = run_script(*shlex.split(command)[1:], *STEPS, f'--out_dir={tmp_path / "unchanged"}')
        assert refused.code == 1 and refused.err.count('\n') == 1, 'this repository has it already'
        result = run(tmp_path, command, *STEPS, f'--dataset={tiny_data}', f'--out_dir={tmp_path / "out"}', *args)
        assert result.returncode == 0, result.stderr
        return load_checkpoint(str(tmp_path / 'out' / 'ckpt.pt'))
    return train


def commands(recipe):
    return [line for _, block in blocks(recipe, 'sh') for line in block.splitlines()]


@pytest.mark.parametrize('recipe', RECIPES)
def test_every_recipe_fits_the_code(recipe, tmp_path):
    apply(recipe, tmp_path)


@pytest.mark.slow
def test_an_activation(train, tmp_path):
    assert train('An activation')['model_args']['activation'] == 'relu2'
    formula = """import torch
from model import GPTConfig, MLP
mlp, x = MLP(GPTConfig(n_embd=8, activation='relu2')), torch.randn(3, 8)
h = mlp.c_fc(x)
torch.testing.assert_close(mlp(x), mlp.c_proj(torch.where(h > 0, h * h, 0)))
"""
    result = run(tmp_path, f'python -c {shlex.quote(formula)}')
    assert result.returncode == 0, result.stderr
    refused = run(tmp_path, 'python export.py --out_dir=out')  # until the exporters know it
    assert refused.returncode == 1 and 'activation=relu2' in refused.stderr


@pytest.mark.slow
def test_a_schedule(train, tmp_path):
    rates = ['--learning_rate=1e-3', '--min_lr=0.0']
    train('A learning-rate schedule', '--log_interval=1', '--lr_decay_iters=2', '--cooldown=1.0', *rates)
    rates = [rate for _, rate in losses_of(tmp_path / 'out', 'lr')]
    assert rates == pytest.approx([1e-3, 1e-3 * (1 - 0.5**0.5), 0])


@pytest.mark.slow
def test_an_objective(train, tmp_path):
    """The file of the page is the example of the contract, which test_objectives.py compares with next_token."""
    assert train('An objective')['config']['gamma'] == 1.5
    losses = dict(losses_of(tmp_path / 'out'))
    assert losses[0] < losses_of(tmp_path / 'out', 'val_loss')[0][1]  # cross-entropy
    [(_, code)] = blocks('An objective', 'python')
    assert textwrap.indent(code, '    ', bool).replace('    \n', '\n') in objectives.__doc__


@pytest.mark.slow
def test_an_optimizer(tiny_data, tmp_path):
    """The schedule drives it, and a resumed run ends with the weights of an undisturbed one."""
    recipe = 'An optimizer'
    apply(recipe, tmp_path)
    [command] = commands(recipe)

    def train(name, *args):
        result = run(tmp_path, command, *STEPS, f'--dataset={tiny_data}', f'--out_dir={tmp_path / name}', *args,
                     '--learning_rate=0.1', '--lr_decay_iters=6', '--min_lr=0.0', '--log_interval=1')
        assert result.returncode == 0, result.stderr
        return load_checkpoint(str(tmp_path / name / 'ckpt.pt'))
    whole = train('whole', '--max_iters=3')
    train('resumed', '--max_iters=2')
    resumed = train('resumed', '--max_iters=3', '--init_from=resume')
    [group] = resumed['optimizer']['param_groups']
    assert group['momentum'] == 0.9
    assert [rate for _, rate in losses_of(tmp_path / 'resumed', 'lr')] == pytest.approx([0.1, 0.0933, 0.075], abs=1e-4)
    assert all(torch.equal(weight, resumed['model'][key]) for key, weight in whole['model'].items())


@pytest.mark.slow
def test_a_logged_number(tiny_data, tmp_path):
    recipe = 'A logged number'
    apply(recipe, tmp_path)
    result = run(tmp_path, commands(recipe)[0], *STEPS, f'--dataset={tiny_data}', f'--out_dir={tmp_path / "out"}',
                 '--log_interval=1')
    assert result.returncode == 0, result.stderr
    *_, (step, norm) = losses_of(tmp_path / 'out', 'weight_norm')
    weights = load_checkpoint(str(tmp_path / 'out' / 'ckpt.pt'))['model']
    weights.pop('lm_head.weight')  # the same tensor as the token embedding
    assert step == 2
    assert norm == pytest.approx(sum(weight.square().sum().item() for weight in weights.values())**0.5, rel=1e-5)


@pytest.mark.slow
def test_a_dataset(tmp_path):
    recipe = 'A dataset'
    apply(recipe, tmp_path)
    for command in commands(recipe):
        result = run(tmp_path, command, *(STEPS if 'train.py' in command else []))
        assert result.returncode == 0, result.stderr
    assert os.path.getsize(tmp_path / 'data' / 'counting' / 'train.bin') == 2 * 98000


@pytest.mark.slow
def test_an_export_format(tiny_run, tmp_path):
    recipe = 'An export format'
    apply(recipe, tmp_path)
    [command] = commands(recipe)
    for force in ([], ['--force']):
        result = run(tmp_path, command, f'--out_dir={tiny_run}', '--to=exported', *force)
        assert result.returncode == 0, result.stderr
    weights = np.load(tmp_path / 'exported' / 'weights.npz')
    for key, p in load_checkpoint(str(tiny_run / 'ckpt.pt'))['model'].items():
        rows = min(len(p), len(weights[key]))  # rows that only round the vocabulary up are cut off
        assert np.array_equal(weights[key][:rows], p[:rows].numpy())
    next_command = result.stdout.splitlines()[-1].removeprefix('now: ')
    assert 'lm_head.weight' in run(tmp_path, next_command).stdout


def test_the_map_of_the_tests_is_complete():
    named = re.findall(r'test_\w+\.py', PAGE.partition('## Tests')[2])
    assert sorted(set(named)) == sorted(path.name for path in (ROOT / 'tests').glob('test_*.py'))


def test_the_chinese_page_has_the_same_code():
    """All blocks but the first, the layout, whose descriptions are translated."""
    chinese = (ROOT / 'docs' / 'hacking.zh.md').read_text(encoding='utf-8')
    code = re.compile(r'(?ms)^```.*?^```$')
    assert code.findall(chinese)[1:] == code.findall(PAGE)[1:]
