"""Find paths, and write files and folders atomically: either completely or not at all."""
import os
import shutil
from contextlib import contextmanager

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
