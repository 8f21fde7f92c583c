"""What is looked after so that a long run does not end in nothing: room on the disk, the same sight in every process, losses that jump."""
import glob
import json
import os
import shutil
import sys
import tempfile

from filelock import FileLock, Timeout

from core.distributed import all_reduce
from core.files import atomic
from core.weights.checkpoint import earlier_checkpoints, load_last


def check_disk(out_dir, size, keep_last):
    """End the script with one line where the checkpoints of a run, `size` bytes each, will not fit on the disk of its folder. What is there of an
    earlier run will be replaced, so it counts as room."""
    needed = size * (3 + keep_last)  # the last, the best, the one being written (at the end: the weights) and those before
    there = {os.stat(path).st_ino: os.stat(path).st_size for path in glob.glob(os.path.join(glob.escape(out_dir), '*.pt'))}
    room = shutil.disk_usage(out_dir).free + sum(there.values())
    if needed > room:
        sys.exit(f'out_dir={out_dir}: the checkpoints need {needed / 2**30:.2g} GB ({size / 2**30:.2g} each) and there is room for {room / 2**30:.2g} GB; '
                 f'make some, choose another --out_dir, or lower --keep_last={keep_last}')


def lock_run_folder(out_dir):
    """Make the folder, lock it until this process ends, however it ends, and clear away what a killed one left half-written. Returns the lock.
    Ends the script with one line where another run holds the folder, or nothing can be written to it."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        tempfile.TemporaryFile(dir=out_dir).close()
        lock = FileLock(os.path.join(out_dir, 'lock'), timeout=0, is_singleton=True)  # the same process may claim it twice
        lock.acquire()
        for name in glob.glob(os.path.join(glob.escape(out_dir), '*.tmp[0-9]*')):
            os.remove(name)
        return lock
    except Timeout:
        sys.exit(f'out_dir={out_dir}: another run is writing there; wait for its end or stop it, or choose another --out_dir')
    except NotImplementedError:
        print(f'warning: the file system of {out_dir} has no locks, so nothing keeps a second run from writing there')
    except OSError as error:
        sys.exit(f'out_dir={out_dir}: cannot write there: {error.strerror}')


def write_run_json(out_dir, **known):
    """Write run.json: the name of the run that the folder belongs to, what started it, and its settings. A full disk ends the script with one line."""
    path = os.path.join(out_dir, 'run.json')
    try:
        with atomic(path, 'w') as f:
            json.dump(known, f, indent=2, ensure_ascii=False)
    except OSError as error:
        sys.exit(f'{path}: cannot be written: {error.strerror}')


def read_run_json(out_dir):
    """What is in run.json; {} where there is none."""
    try:
        with open(os.path.join(out_dir, 'run.json'), encoding='utf-8') as f:
            return dict(json.load(f))
    except (OSError, ValueError, TypeError):
        return {}


def has_checkpoint(out_dir):
    """Whether the folder has a checkpoint, of whichever run."""
    return any(map(os.path.exists, (*(os.path.join(out_dir, name) for name in ('ckpt.pt', 'best.pt')), *earlier_checkpoints(out_dir))))


def resolve_init_from(init_from, out_dir, run):
    """
    What train.py's init_from means now: 'auto' is 'resume' if there is a checkpoint and 'scratch' if not. Processes that torchrun has started again, after one
    was lost or joined them, resume what their run has saved, but not what an earlier run has left in its folder.
    """
    launch = ''  # torchrun's own name and place, which are the same after a restart and not in another launch
    if run.ddp and os.environ.get('TORCHELASTIC_RUN_ID', 'none') != 'none':
        launch = ' '.join(os.environ[key] for key in ('TORCHELASTIC_RUN_ID', 'MASTER_ADDR', 'MASTER_PORT'))
    known = read_run_json(out_dir)
    again = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0 or launch != '' and known.get('launch') == launch
    again = all_reduce([again], run).item() > 0  # torchrun counts a restart only on the machine that lost a process
    saved = False
    if run.master and init_from == 'auto':
        saved = has_checkpoint(out_dir)
    elif run.master and again and init_from != 'resume':
        try:
            saved = load_last(out_dir, 'meta')[0].get('run_id') == known['run_id']
        except (KeyError, SystemExit):
            pass
    saved = all_reduce([saved], run).item()  # as the first process sees it
    return 'resume' if saved else 'scratch' if init_from == 'auto' else init_from, launch
