"""Paths, and writing files whole or not at all."""
import os
import shutil
from contextlib import contextmanager

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the repository


def find(path):
    """`path` with ~ expanded if it exists from the caller's folder, else the same path in the repository if that exists, else as given."""
    path = os.path.expanduser(path)
    inside = os.path.join(ROOT, path)
    return inside if not os.path.exists(path) and os.path.exists(inside) else path


@contextmanager
def atomic(path, mode='wb', **kwargs):
    """Open a temporary file beside `path` to write to; on success it takes the name `path`, on any error it goes and what was there stays."""
    temporary = f'{path}.tmp{os.getpid()}'
    try:
        with open(temporary, mode, encoding=None if 'b' in mode else 'utf-8', **kwargs) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


@contextmanager
def atomic_folder(path):
    """Make a temporary folder beside `path` to write in; on success it takes the name `path`, on any error it goes and what was there stays."""
    temporary, old = f'{path}.tmp{os.getpid()}', f'{path}.old{os.getpid()}'
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
