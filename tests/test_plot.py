"""plot.py: pictures of one and of several runs, also from nanoGPT's printed lines, and the errors."""
import runpy
import struct
import sys
from unittest import mock

import pytest
from conftest import ROOT, run_script, write

pytest.importorskip('matplotlib')
CSV = '''iter,loss,ms,tokens_per_s,mfu,val_loss
0,,,,,4.2
0,4.2,20,3200,,
1,3.9,10,6400,,
2,,,,,3.5
2,3.4,10,6400,,
3,3.1,10,6400,,
4,,,,,3
'''
PRINTED = '''tokens per iteration will be: 64
step 0: train loss 4.2000, val loss 4.3000
iter 0: loss 4.2100, time 9000.00ms, mfu -100.00%
iter 1: loss 4.0000, time 20.00ms, mfu -100.00%
step 2: train loss 3.6000, val loss 3.7000
saving checkpoint to out
iter 2: loss 3.7000, time 5000.00ms, mfu 1.50%
iter 3: loss nan, time 20.00ms, mfu 1.50%
'''


def size_of_picture(path):
    """Return (width, height) of a PNG."""
    data = path.read_bytes()
    assert data[:8] == b'\x89PNG\r\n\x1a\n' and data[12:16] == b'IHDR'
    return struct.unpack('>II', data[16:24])


def points(*args):
    """Return what plot.py hands to matplotlib: [(xs, ys, name in the legend)]."""
    with mock.patch.object(sys, 'argv', ['plot.py', *map(str, args)]):
        drawn = runpy.run_path(str(ROOT / 'plot.py'))['curves']
    return [(list(map(float, xs)), list(map(float, ys)), name) for xs, ys, name in drawn]


def test_a_run(tiny_run, tmp_path):
    """A real run, over every x."""
    for x in 'iter', 'tokens', 'time':
        result = run_script('plot.py', tiny_run, f'--x={x}', '--log=y', '--out=a.png', cwd=tmp_path)
        assert result.code == 0 and result.out.splitlines()[-1].startswith('a.png: val loss of 1 run: '), result.err
        assert size_of_picture(tmp_path / 'a.png') == (1200, 750)


def test_several(tmp_path):
    """
    Folders, a log.csv and nanoGPT's printed lines in one picture. Names in Chinese, with $ (a formula
    to matplotlib) and with a leading _ (hidden from a legend) are shown.
    """
    for name in '石头记', '$a_$b', '_c':
        write(tmp_path / name / 'log.csv', CSV)
    write(tmp_path / 'again' / '石头记' / 'log.csv', CSV)
    write(tmp_path / 'nanogpt.txt', PRINTED)
    runs = '石头记', '$a_$b', '_c/log.csv', 'again/石头记', 'nanogpt.txt'
    result = run_script('plot.py', *runs, '--y', 'loss', '--out', 'b.png', cwd=tmp_path)
    assert (result.code, result.err) == (0, '')
    assert 'loss of 5 runs: 石头记 3.1, $a_$b 3.1, _c 3.1, again/石头记 3.1, nanogpt nan' in result.out
    assert size_of_picture(tmp_path / 'b.png') == (1200, 750)


def test_points(tmp_path):
    """The x of a point: its step, the tokens before it, or the time of the steps before it, without evaluations."""
    write(tmp_path / 'ours' / 'log.csv', CSV)
    runs = write(tmp_path / 'nanogpt.txt', PRINTED), tmp_path / 'ours', f'--out={tmp_path / "c.png"}'
    assert points(*runs) == [([0, 2], [4.3, 3.7], 'nanogpt'), ([0, 2, 4], [4.2, 3.5, 3], 'ours')]
    assert [xs for xs, *_ in points(*runs, '--x=tokens')] == [[0, 128], [0, 128, 256]]
    (nanogpt, _, _), (ours, _, _) = points(*runs, '--x=time')
    assert ours == pytest.approx([0, 0.03, 0.05])
    assert nanogpt == pytest.approx([0, 0.04])


def test_fewer_rows_than_steps(tmp_path):
    """With log_interval=10 a row has the mean time of the ten steps since the row before."""
    rows = ''.join(f'{i},1000,{i}\n' for i in range(0, 50, 10))
    write(tmp_path / 'r' / 'log.csv', f'iter,ms,loss\n{rows}')
    (xs, _, _), = points(tmp_path / 'r', '--x=time', '--y=loss', f'--out={tmp_path / "d.png"}')
    assert xs == pytest.approx([0, 10, 20, 30, 40])


@pytest.mark.parametrize('args, names', [
    ([], ['which run?', '--help']),
    (['missing'], ['missing', 'No such file', 'folder of a run']),
    (['empty'], ['log.csv', 'No such file']),
    (['good', '--y=val_los'], ['y=val_los', 'good', 'did you mean val_loss?', 'ms']),
    (['good', '--y=zzz'], ['zzz', 'it has loss, ms, tokens_per_s, val_loss']),
    (['good', '--y=mfu'], ['y=mfu', 'no numbers']),
    (['short.csv', '--x=time', '--y=loss'], ['x=time', 'short.csv', 'ms', 'it has loss']),
    (['short.csv', '--x=tokens', '--y=loss'], ['x=tokens', 'short.csv']),
    (['good', '--x=hours'], ['x=hours', 'iter, tokens, time']),
    (['good', '--log=z'], ['log=z', 'xy']),
    (['good', '--yy=loss'], ['--yy', 'no such setting']),
    (['good', '--out=no/such.png'], ['no/such.png', 'No such file']),
    (['good', '--out=a.xyz'], ['a.xyz', 'not supported']),
    (['damaged.csv'], ['damaged.csv', 'line 3', 'iter, loss']),
    (['long.csv'], ['long.csv', 'line 2']),
    (['nonsense.txt'], ['nonsense.txt', 'neither']),
    (['header.csv'], ['header.csv', 'neither']),
])
def test_refusals(tmp_path, args, names):
    """One line that names what is wrong."""
    (tmp_path / 'empty').mkdir()
    write(tmp_path / 'good' / 'log.csv', CSV)
    for name, text in (('damaged', '0,4.2\n1,\x00\xff4..\n'), ('long', '0,1,2\n'), ('short', '0,1\n'), ('header', '')):
        write(tmp_path / f'{name}.csv', f'iter,loss\n{text}')
    write(tmp_path / 'nonsense.txt', 'nothing\n')
    result = run_script('plot.py', *args, cwd=tmp_path)
    assert result.code == 1 and result.err.count('\n') == 1 and all(name in result.err for name in names), result.err


def test_without_matplotlib(tmp_path, monkeypatch):
    """It says what to install."""
    write(tmp_path / 'good' / 'log.csv', CSV)
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    result = run_script('plot.py', 'good', cwd=tmp_path)
    assert (result.code, result.err) == (1, 'plot.py needs matplotlib: pip install matplotlib\n')


def test_help(tmp_path):
    for args in ['--help'], ['good', '-h']:
        result = run_script('plot.py', *args, cwd=tmp_path)
        assert (result.code, result.err, list(tmp_path.iterdir())) == (0, '', []) and '--y=' in result.out


def test_panels(tmp_path):
    """Several columns: a panel each, with the runs that have it, each run in one colour."""
    from matplotlib.figure import Figure
    write(tmp_path / 'a' / 'log.csv', 'iter,loss,val_kl\n0,2,0\n1,1,0.5\n')
    write(tmp_path / 'b' / 'log.csv', 'iter,loss,val_reward\n0,3,\n1,,7\n')
    drawn = []
    with mock.patch.object(Figure, 'savefig', lambda figure, *args, **kwargs: drawn.append(figure)):
        result = run_script('plot.py', 'a', 'b', '--y=loss,val_kl,val_reward', cwd=tmp_path)
    assert result.code == 0 and 'val kl of 1 run: a 0.5 at the end' in result.out, result.err
    panels = {}
    for axes in drawn[0].axes:
        names = [text.get_text() for text in axes.get_legend().get_texts()]
        panels[axes.get_ylabel()] = dict(zip(names, [line.get_color() for line in axes.lines]))
    assert {name: list(lines) for name, lines in panels.items()} == {
        'loss': ['a', 'b'], 'val kl': ['a'], 'val reward': ['b']}
    assert panels['val kl']['a'] == panels['loss']['a'] != panels['loss']['b'] == panels['val reward']['b']
    result = run_script('plot.py', 'a', '--y=loss,val_nothing', cwd=tmp_path)
    assert 'no run here has numbers of val_nothing' in result.err
