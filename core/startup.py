"""
Every script imports this before all else. It exits with one line if Python is too old, if packages are missing, or if
Ctrl-C interrupts the imports; under torchrun an error of all ranks is printed once. Python 3.8 can read this file, and
the scripts.
"""
import os
import re
import signal
import sys
import time

from core.files import ROOT

STARTED = time.perf_counter()  # of the script: nothing but Python itself is loaded before this file
INSTALL = '{python} -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt -c constraints.txt'


def explain(error_type, error, traceback):
    """The excepthook. Print one line for Ctrl-C and for packages that are not installed, and else the traceback."""
    if issubclass(error_type, KeyboardInterrupt):
        print('interrupted', file=sys.stderr)  # Python then exits with 130
    elif issubclass(error_type, ModuleNotFoundError) and error.name in required_modules():
        print(f'the package {error.name} is not installed for {sys.executable}; {how_to_get_it()}', file=sys.stderr)
    else:
        sys.__excepthook__(error_type, error, traceback)


def seconds_since_start():
    """Return how long this process has been running, the imports included."""
    return time.perf_counter() - STARTED


def required_modules():
    with open(os.path.join(ROOT, 'requirements.txt'), encoding='utf-8') as f:
        return [name.replace('-', '_') for name in re.findall(r'^[\w-]+', f.read(), re.MULTILINE)]


def how_to_get_it():
    environment = os.path.join(ROOT, '.venv')
    if os.path.exists(environment) and not os.path.samefile(environment, sys.prefix):
        activate = os.path.join(environment, 'Scripts' if os.name == 'nt' else 'bin', 'activate')
        return f'activate the environment that has the packages: . {activate}'
    return f'install the packages: {INSTALL.format(python="python3")} (or: make demo)'


def interrupt_import(number, frame):
    """Exit at once: some packages swallow a KeyboardInterrupt that is raised while they are imported."""
    os.write(2, b'interrupted\n')  # print is not safe in a handler
    os._exit(130)


def end_imports():
    """Let Ctrl-C raise KeyboardInterrupt again, so that the script can save and clean up."""
    if signal.getsignal(signal.SIGINT) is interrupt_import:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class PatientStderr:
    """
    A stderr that waits for two seconds before it writes, and for six in all. An error that all ranks share, such as an
    impossible setting, ends rank 0 at once; torchrun then kills the other ranks before they print it too.
    """

    def __init__(self, stream):
        self.stream = stream
        self.patience = 6.0  # seconds

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def isatty(self):
        return False  # no progress bars

    def write(self, text):
        seconds = min(2.0, self.patience)
        self.patience -= seconds
        time.sleep(seconds)
        return self.stream.write(text)


if sys.version_info < (3, 10):
    sys.exit(f'StoneGPT needs Python 3.10 or newer, and this is {sys.version.split()[0]}; take a newer one: '
             f'{INSTALL.format(python="python3.12")} (or: make demo PYTHON=python3.12)')
sys.excepthook = explain
if os.environ.get('RANK', '0') != '0':  # set by torchrun
    sys.stderr = PatientStderr(sys.stderr)
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell ignores Ctrl-C
    signal.signal(signal.SIGINT, interrupt_import)
