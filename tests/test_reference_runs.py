"""Reference runs: how they are made and thinned out, the line at the end of a run, plot.py --reference."""
import json
import os
import re
import sys
from unittest import mock

import pytest
from conftest import ROOT, TINY, exit_line, run_script, write

from benchmarks import reference
from core.training import reference_runs
from core.training.log import read_columns
from core.training.reference_runs import compare, describe_comparison, find_reference, interpolate

CONFIG = 'n_layer = 2\nlearning_rate = 1e-3\n'
COMMITTED = sorted(path.parent for path in (ROOT / 'docs' / 'reference').glob('*/run.json'))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder instead of docs/reference."""
    for module in reference, reference_runs:
        monkeypatch.setattr(module, 'FOLDER', str(tmp_path / 'references'))
    return tmp_path / 'references'


@pytest.fixture
def train(tiny_data, tmp_path):
    """A function that trains with a config file and returns what is printed."""
    config = write(tmp_path / 'train_tiny.py', CONFIG)

    def run(out_dir, *args, configs=(config,)):
        tiny = [word for word in TINY if not word.startswith('--n_layer')]
        result = run_script('train.py', *configs, *tiny, f'--dataset={tiny_data}', '--max_iters=8',
                            f'--out_dir={tmp_path / out_dir}', *args)
        assert result.code == 0, result.err
        return result.out
    return run


def line_of(out):
    """Return the line of the output that names the reference, '' if there is none."""
    return ''.join(line for line in out.splitlines() if 'the reference run of' in line)


def scale_losses(folder, factor):
    """Multiply the losses of the only reference in the folder."""
    path, = folder.glob('*/log.csv')
    header, *rows = path.read_text(encoding='utf-8').splitlines()
    lines = [header]
    for step, *losses, tokens in (row.split(',') for row in rows):
        lines.append(','.join([step, *(loss and str(float(loss) * factor) for loss in losses), tokens]))
    path.write_text('\n'.join(lines) + '\n', encoding='utf-8')


def test_thinning_by_hand(monkeypatch):
    """Edges at 8 * (i / 2)**2 = 0, 2, 8: means of steps 0 and 1, and of 2 to 7, at the middle of those steps."""
    monkeypatch.setattr(reference, 'LOSS_ROWS', 2)
    monkeypatch.setattr(reference, 'EVALUATION_ROWS', 2)
    losses = [(step, 10.0 - step) for step in range(8)]
    columns = {'loss': losses, 'lr': losses, 'val_loss': [(0, 4.0), (4, 3.0), (8, 2.0)], 'val_kl': [(8, 0.5)],
               'train_loss': [(0, 4.0)], 'val_x': []}
    assert reference.thin(columns, 8) == {
        0: {'loss': 9.5, 'val_loss': 4.0}, 4: {'loss': 5.5}, 8: {'val_loss': 2.0, 'val_kl': 0.5}}


def test_interpolation_by_hand():
    column = [(0, 4.0), (10, 3.0), (20, 2.5)]
    assert interpolate(column, [0, 5, 10, 16]).tolist() == pytest.approx([4, 3.5, 3, 2.7])


def test_comparison_by_hand():
    """
    The last evaluation, if the run ends with it; else the mean training loss of the last fifth of the steps, at least
    of five rows. Here the differences are -0.6, -0.5, -0.1, 0 and 0.1, so their standard error is 0.0776**0.5 / 5**0.5.
    """
    other = {'val_loss': [(0, 4.0), (10, 3.0)], 'loss': [(0, 4.0), (10, 3.0)]}
    run = {'loss': [(step, 3.1) for step in range(5)], 'val_loss': [(0, 4.0), (5, 3.4)]}
    assert compare(run, other) == ('validation loss', 'at step 5', 3.4, 3.5, 0.02)
    run['loss'] += [(step, 3.1) for step in (8, 9, 10)]  # stopped after step 10
    name, where, ours, theirs, band = compare(run, other)
    assert (name, where) == ('training loss', 'over steps 3 to 10')
    assert (ours, theirs, band) == pytest.approx((3.1, 3.32, 0.02 + 2 * (0.0776 / 5)**0.5 / 3.32))
    run['loss'] = [(step / 2, 3.1) for step in range(21)]  # steps 8, 8.5, 9, 9.5 and 10: the last fifth
    assert compare(run, other)[2:4] == pytest.approx((3.1, 3.1))
    run['loss'].append((11, 3.1))
    assert compare(run, other) is None  # beyond the reference
    assert compare({}, other) is None
    assert compare({'loss': [(0, 4.0)], 'val_loss': [(0, 4.0)]}, other) is None
    few = {'loss': [(0, 4.0), (5, 3.4), (10, 3.1)], 'val_loss': [(0, 4.0), (5, 3.4)]}
    assert compare(few, other)[:3] == ('validation loss', 'at step 5', 3.4)
    assert compare({'val_loss': [(5, 3.4)]}, {'loss': [(10, 3.0)]}) is None


def test_from_end_to_end(train, folder, tmp_path):
    """A reference of a run; the same run again is normal, one with other losses is not, other settings are named."""
    out = train('first', '--log_interval=1', '--eval_interval=2')
    assert line_of(out) == ''  # there is no reference yet
    made = run_script('benchmarks/reference.py', tmp_path / 'first', '--name=tiny')
    assert made.code == 0 and made.out == f'wrote {folder / "tiny"}: 9 rows\n', made.err
    columns = read_columns('', (folder / 'tiny' / 'log.csv').read_text(encoding='utf-8').splitlines())
    assert columns['tokens_per_iter'] == [(0, 4 * 32)]
    out = train('second', '--seed=1337', '--eval_interval=4')
    assert re.fullmatch(r'validation loss (2\.\d{4}) at step 8; the reference run of .*train_tiny\.py had \1: '
                        r'normal \(within 2 %\)', line_of(out))
    assert out.index(line_of(out)) < out.index('8 steps in')  # the last line stays the last
    scale_losses(folder, 0.9)
    assert line_of(train('third')).endswith(f': 11.1 % higher; what to check: {reference_runs.HELP}')
    scale_losses(folder, 1.2)
    assert line_of(train('third')).endswith(': 7.4 % lower')
    line = line_of(train('fourth', '--learning_rate=2e-3', '--max_iters=7', '--weight_decay=0'))
    assert line.endswith(' with other settings: learning_rate 0.001 -> 0.002; weight_decay 0.1 -> 0.0')
    line = line_of(train('fifth', *(f'--{key}=0.5' for key in ('dropout', 'beta1', 'beta2', 'grad_clip', 'min_lr'))))
    assert line.count('->') == 4 and line.endswith('and 1 more')
    assert line_of(train('sixth', '--decay_lr=False', '--max_iters=9', '--eval_interval=100')) == ''  # beyond its end


def test_a_resumed_run(train, folder, tmp_path):
    """The command names the config file again. Without it there is no reference."""
    train('first', '--eval_interval=2')
    reference.make_reference(str(tmp_path / 'first'), 'r')
    train('second', '--max_iters=4')
    assert 'normal' in line_of(train('second', '--init_from=resume'))
    assert 'init_from' in line_of(train('third', f'--init_from={tmp_path / "first"}'))
    assert line_of(train('fourth', configs=())) == ''


def test_names():
    """Config files and what changes learning, in a form that every file system takes."""
    command = ['train.py', 'config/a.py', '/x/b.py', '--max_iters=9', '--seed=7', '--out_dir=z', '--reward=a/b.py:c']
    assert reference.default_name(command) == 'a+b+max_iters=9+reward=a_b.py_c'


def test_of_several_references_the_nearest(train, folder, tmp_path):
    for name, *args in ('a', '--dropout=0.1'), ('b', '--dropout=0.1', '--beta2=0.9'), ('c', '--beta2=0.9'):
        train(name, *args)
        reference.make_reference(str(tmp_path / name), name)
    train('own', '--beta2=0.9')
    assert find_reference(str(tmp_path / 'own')) == (str(folder / 'c') + os.sep, [])
    train('own', '--beta2=0.9', '--dropout=0.2')
    assert find_reference(str(tmp_path / 'own'))[1] == ['dropout 0.1 -> 0.2']


def test_another_text(train, folder, tmp_path):
    """It is recognised by its tokens, not by its name."""
    train('first')
    reference.make_reference(str(tmp_path / 'first'), 'r')
    path, = folder.glob('*/run.json')
    entries = json.loads(path.read_text(encoding='utf-8'))
    entries['config']['dataset'] = 'elsewhere'
    path.write_text(json.dumps(entries), encoding='utf-8')
    assert find_reference(str(tmp_path / 'first'))[1] == []
    path.write_text(json.dumps({**entries, 'data': 'x'}), encoding='utf-8')
    change, = find_reference(str(tmp_path / 'first'))[1]
    assert change.startswith('other text or tokenizer: elsewhere -> ')


def test_other_objectives_are_not_judged(train, folder, tmp_path):
    """How far their seeds differ has not been measured."""
    train('first')
    reference.make_reference(str(tmp_path / 'first'), 'r')
    for path in tmp_path / 'first' / 'run.json', *folder.glob('*/run.json'):
        entries = json.loads(path.read_text(encoding='utf-8'))
        entries['config']['objective'] = 'dpo'
        path.write_text(json.dumps(entries), encoding='utf-8')
    line = describe_comparison(str(tmp_path / 'first'))
    assert re.fullmatch(r'validation loss (2\.\d{4}) at step 8; the reference run of .*train_tiny\.py had \1', line)


def test_another_objective_is_compared_by_its_validation_loss(train, folder, tmp_path):
    """What distillation minimises is not the loss of the next token."""
    train('first', '--eval_interval=3', '--max_iters=8', '--log_interval=1')
    reference.make_reference(str(tmp_path / 'first'), 'r')
    log = tmp_path / 'first' / 'log.csv'
    lines = log.read_text(encoding='utf-8').splitlines()
    last = max(i for i, line in enumerate(lines) if line.startswith('8,'))
    log.write_text('\n'.join(lines[:last]) + '\n', encoding='utf-8')  # as if it had stopped after step 7
    assert describe_comparison(str(tmp_path / 'first')).startswith('training loss ')
    path = tmp_path / 'first' / 'run.json'
    entries = json.loads(path.read_text(encoding='utf-8'))
    entries['config']['objective'] = 'distill'
    path.write_text(json.dumps(entries), encoding='utf-8')
    line = describe_comparison(str(tmp_path / 'first'))
    assert line.startswith('validation loss ') and ' at step 6; ' in line
    assert 'objective next_token -> distill' in line


def test_a_damaged_reference(train, folder, tmp_path):
    """It breaks neither the run nor its end."""
    train('first')
    reference.make_reference(str(tmp_path / 'first'), 'r')
    write(folder / 'r' / 'log.csv', 'iter,loss\n0,x\n')
    out = train('second')
    assert 'warning: no comparison with the reference run: ' in out and 'line 2 is damaged' in out
    assert 'checkpoints in' in out.splitlines()[-1]


def test_plot(train, folder, tmp_path):
    """Dashed, in the run's colour; what cannot be drawn is said in one line, and the rest is plotted."""
    figure = pytest.importorskip('matplotlib.figure').Figure
    train('first', '--eval_interval=2')
    reference.make_reference(str(tmp_path / 'first'), 'r')
    train('own', '--eval_interval=4')
    train('unknown', configs=())

    def plot(*args):
        drawn = []
        with mock.patch.object(figure, 'savefig', lambda figure, *args, **kwargs: drawn.append(figure)):
            result = run_script('plot.py', *args, '--reference', cwd=tmp_path)
        assert result.code == 0, result.err
        axes = drawn[0].axes[0]
        return [(text.get_text(), line.get_linestyle(), line.get_color(), list(line.get_xdata())) for text, line in
                zip(axes.get_legend().get_texts(), axes.lines)], result.err

    assert plot('own') == ([('own', '-', 'C0', [0, 4, 8]), ('own (reference)', '--', 'C0', [0, 2, 4, 6, 8])], '')
    lines, err = plot('own/log.csv', 'unknown', '--x=tokens')
    assert [(*line[:3], line[3][-1]) for line in lines] == [
        ('own', '-', 'C0', 1024), ('own (reference)', '--', 'C0', 1024), ('unknown', '-', 'C1', 1024)]
    assert err.count('\n') == 1 and err.startswith('unknown: no reference run') and 'benchmarks/reference.py' in err
    lines, err = plot('own', '--x=time')
    assert len(lines) == 1 and err.count('\n') == 1 and 'no times' in err
    lines, err = plot('own', '--y=lr')
    assert len(lines) == 1 and err == 'own: its reference run has no lr\n'
    train('own', '--eval_interval=4', '--dropout=0.1')
    lines, err = plot('own')
    assert len(lines) == 2 and err == 'own: its reference run had other settings: dropout 0.0 -> 0.1\n'


def run_reference(monkeypatch, *args):
    """Run benchmarks/reference.py's main(), in this process. Returns its exit code or line."""
    monkeypatch.setattr(sys, 'argv', ['reference.py', *map(str, args)])
    try:
        reference.main()
    except SystemExit as exit:
        return exit.code
    return 0


def test_refusals(train, folder, tmp_path, monkeypatch, capsys):
    """One line, and nothing is written."""
    train('unfinished', '--max_iters=4')
    path = tmp_path / 'unfinished' / 'run.json'
    path.write_text(path.read_text(encoding='utf-8').replace('"max_iters": 4', '"max_iters": 5'), encoding='utf-8')
    train('unnamed', configs=())
    train('long')
    for args, names in (
        ([tmp_path / 'missing'], ['missing', 'expected the folder of a run']),
        ([tmp_path / 'unnamed'], ['unnamed', 'config file', 'run.json names none']),
        ([tmp_path / 'unfinished'], ['unfinished', 'stopped at step 4 of 5', '--init_from=resume']),
        ([tmp_path / 'unfinished', '--name=../x'], ['--name=../x', 'without a path']),
        ([tmp_path / 'long'], ['train_tiny+', '--name=NAME']),
        ([tmp_path / 'unfinished', 'more'], ['more', 'expected a config file']),
    ):
        line = run_reference(monkeypatch, *args)
        assert isinstance(line, str) and '\n' not in line and all(name in line for name in names), line
    (tmp_path / 'unfinished' / 'log.csv').unlink()
    assert 'log.csv' in exit_line(reference.make_reference, str(tmp_path / 'unfinished'))
    assert run_reference(monkeypatch) == 2 and 'usage' not in capsys.readouterr().out
    assert run_reference(monkeypatch, '--help') == 0 and '--all' in capsys.readouterr().out
    assert not folder.exists()


def test_all(folder, monkeypatch):
    """What exists is skipped; what fails is named, and does not stop the others."""
    calls = []
    monkeypatch.setattr(reference, 'RUNS', [
        ('a', ['p.py x'], 'config/one.py'), ('a', [], 'config/two.py --max_iters=2'), ('a', [], 'config/three.py'),
        ('a', [], 'config/four.py --name=4')])
    monkeypatch.setattr(reference, 'python', lambda *args: calls.append(args) or 'config/one.py' not in args)
    monkeypatch.setattr(reference, 'make_reference', lambda out_dir, name: calls.append(name))
    (folder / 'three').mkdir(parents=True)
    assert run_reference(monkeypatch, '--all').startswith('failed, see above: one;')
    assert [call if isinstance(call, str) else call[0] for call in calls] == [
        'p.py', 'train.py', 'train.py', 'two+max_iters=2', 'train.py', '4']
    assert calls[2][1:] == ('config/two.py', '--max_iters=2', '--log_interval=1',
                                '--out_dir=out-reference-two+max_iters=2')


@pytest.mark.parametrize('path', COMMITTED, ids=lambda path: path.name)
def test_committed_references(path):
    """They are small, plot.py reads them, and they belong to the config files as these are now."""
    log = (path / 'log.csv').read_text(encoding='utf-8')
    assert len(log) <= 3000 and len(log.splitlines()) <= 61
    columns = read_columns(str(path), log.splitlines())
    run_json = json.loads((path / 'run.json').read_text(encoding='utf-8'))
    assert columns['val_loss'][-1][0] == run_json['config']['max_iters'] and columns['tokens_per_iter']
    given = {word[2:].partition('=')[0] for word in run_json['command'][1:] if word.startswith('--')}
    settings = {}
    for word in run_json['command'][1:]:
        if not word.startswith('--'):
            exec((ROOT / word).read_text(encoding='utf-8'), settings)
    for key in settings.keys() - given - set(reference_runs.NEUTRAL) - {'__builtins__'}:
        if settings[key] != -1:  # derived
            assert run_json['config'][key] == settings[key], f'{key} has changed: make this reference anew'
