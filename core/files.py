"""Find paths, write files and folders atomically (either completely or not at all), and lock folders."""
import os
import re
import shlex
import shutil
import sys
import tempfile
from contextlib import contextmanager, suppress

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the repository


def find(path):
    """
    Expand ~ and return the path. If it does not exist relative to the working directory but does in the repository,
    return the path in the repository.
    """
    path = os.path.expanduser(path)
    in_repository = os.path.join(ROOT, path)
    if not os.path.exists(path) and os.path.exists(in_repository):
        return in_repository
    return path


def quoted(text):
    """Return a path as it is typed in a shell: quoted only if it must be (shlex.quote() also quotes Chinese)."""
    return text if re.fullmatch(r'[\w./~:\\-]+', text) else shlex.quote(text)


def dataset_folder(name):
    """Return data/<name>, where train.py finds it: in data/ of the current folder if there is one, else of ROOT."""
    return os.path.join(find('data'), name)


def cache_folder():
    """Return the folder in the user's cache for what is fetched or measured once. It may not exist yet."""
    return os.path.join(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'stonegpt')


@contextmanager
def atomic(path, mode='wb', **kwargs):
    """
    Open a temporary file beside `path` for writing. On success it is renamed to `path`. On an error it is removed, and
    an existing file stays unchanged. kwargs: passed to open().
    """
    temporary = f'{path}.tmp{os.getpid()}'
    encoding = None if 'b' in mode else 'utf-8'
    try:
        with open(temporary, mode, encoding=encoding, **kwargs) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


@contextmanager
def atomic_folder(path):
    """
    Make a temporary folder beside `path` and yield its name. On success it is renamed to `path` and replaces an
    existing folder. On an error it is removed, and an existing folder stays unchanged.
    """
    temporary = f'{path}.tmp{os.getpid()}'
    old = f'{path}.old{os.getpid()}'
    try:
        os.makedirs(temporary)
        yield temporary
        if os.path.exists(path):
            os.rename(path, old)
        try:
            os.rename(temporary, path)
        except OSError:
            if os.path.exists(old):
                os.rename(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def lock_folder(path, name, busy):
    """
    Create the folder, and lock it until the lock is released or this process ends. Return the lock; None, with a
    warning, if the file system has no locks. Exits if another process has it, or if the folder cannot be written to.
    name: of the folder in messages; busy: the message about another process.
    """
    from filelock import FileLock, Timeout  # here, because most scripts lock nothing and its import takes 40 ms
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
        lock = FileLock(os.path.join(path, 'lock'), timeout=0, is_singleton=True)  # a process may lock it twice
        lock.acquire()
        return lock
    except Timeout:
        sys.exit(f'{name}: {busy}')
    except NotImplementedError:
        print(f'warning: the file system of {path} has no locks, so nothing keeps another process from writing there')
    except OSError as error:
        sys.exit(f'{name}: cannot write there: {error.strerror}')


@contextmanager
def locked_dataset(folder):
    """
    Lock a dataset folder against other preparations (in the same process: only the outermost call). At the end the lock
    is removed, and the folder too if it is empty. Exits as lock_folder() does.
    """
    lock = lock_folder(folder, folder, 'another preparation is writing there; wait for its end or stop it')
    try:
        yield
    finally:
        if lock and lock.lock_counter == 1:
            with suppress(OSError):  # Windows removes it at the release
                os.remove(lock.lock_file)
        if lock:
            lock.release()
        if os.path.isdir(folder) and not os.listdir(folder):
            os.rmdir(folder)
