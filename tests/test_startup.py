"""core/startup.py: one line for an old Python, missing packages and Ctrl-C while a script imports its packages."""
import ast
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TINY, run_script

from core import startup

SCRIPTS = ['train.py', 'sample.py', 'chat.py', 'evaluate.py', 'export.py', 'bench.py', 'plot.py']
SCRIPTS += [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob('data/*/prepare.py'))]
SCRIPTS += ['data/tang_poems/judge.py', 'data/tang_poems/as_tutorialllm.py']


@pytest.mark.parametrize('script', SCRIPTS)
def test_old_python(script, monkeypatch):
    """The first import of every script refuses it, and its parser reads as far as that."""
    for name in script, 'core/__init__.py', 'core/files.py', 'core/startup.py':
        ast.parse((ROOT / name).read_text(encoding='utf-8'), feature_version=(3, 8))
    monkeypatch.setattr(sys, 'version_info', (3, 9, 18))
    monkeypatch.setattr(sys, 'version', '3.9.18 (main)')
    monkeypatch.delitem(sys.modules, 'core.startup')
    result = run_script(script)
    assert result.code == 1 and not result.out and result.err.count('\n') == 1, result.err
    assert all(part in result.err for part in ('needs Python 3.10', 'this is 3.9.18', 'python3.12 -m venv .venv'))


@pytest.mark.parametrize('script', ['train.py', 'plot.py', 'data/shakespeare_char/prepare.py'])
def test_no_packages(script):
    """A Python without its site-packages."""
    result = subprocess.run([sys.executable, '-S', ROOT / script], capture_output=True, text=True, encoding='utf-8')
    assert result.returncode == 1 and not result.stdout and result.stderr.count('\n') == 1, result.stderr
    assert 'is not installed for' in result.stderr and '.venv/bin/activate' in result.stderr


def test_how_to_get_packages(tmp_path, monkeypatch, capsys):
    """Install them, or activate the environment that is there. Other errors keep their traceback."""
    error = ModuleNotFoundError("No module named 'torch'", name='torch')
    monkeypatch.setattr(startup, 'required_modules', lambda: ['torch'])
    monkeypatch.setattr(startup, 'ROOT', str(tmp_path))
    startup.explain(type(error), error, None)
    assert 'python3 -m venv .venv && . .venv/bin/activate && pip install -r' in capsys.readouterr().err
    (tmp_path / '.venv').mkdir()
    startup.explain(type(error), error, None)
    assert f'. {tmp_path}/.venv/bin/activate\n' in capsys.readouterr().err
    monkeypatch.setattr(sys, 'prefix', str(tmp_path / '.venv'))
    startup.explain(type(error), error, None)
    assert 'pip install -r' in capsys.readouterr().err
    error = ModuleNotFoundError("No module named 'mine'", name='mine')
    startup.explain(type(error), error, None)
    assert capsys.readouterr().err == "ModuleNotFoundError: No module named 'mine'\n"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, 'pthread_kill'), reason='Windows cannot send Ctrl-C to one process')
@pytest.mark.parametrize('script', SCRIPTS)
def test_interrupted_imports(script):
    """Ctrl-C at several moments: one line and the exit status of an interruption, or the script was faster."""
    program = '''
import os, runpy, sys, core.startup
print(flush=True)
del sys.argv[0]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name='__main__')'''
    command = [sys.executable, '-c', program, script, '--help']
    interrupted = 0
    for delay in (0, 0.05, 0.3, 0.8):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
            process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            lines = process.stderr.read().splitlines()
        assert lines in ([], ['interrupted']) and process.returncode in (0, 130, -signal.SIGINT), lines
        interrupted += lines != []
    assert interrupted


@pytest.mark.slow
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_no_compiler_is_imported(optimizer, tiny_data, tmp_path):
    """Training without --compile does not import all of torch.compile, which takes more than a second."""
    program = f'''
import os, runpy, sys
sys.path[0] = {str(ROOT)!r}
sys.argv = ['train.py', *{TINY!r}, '--dataset={tiny_data}', '--out_dir={tmp_path}', '--optimizer={optimizer}']
try:
    runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')
finally:
    print(sorted(name for name in sys.modules if name.startswith('torch._dynamo')))'''
    result = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, encoding='utf-8')
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == '[]', result.stdout + result.stderr
