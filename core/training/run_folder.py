"""The folder of a run: its lock, run.json, room on the disk, and the checkpoint to resume from."""
import glob
import json
import os
import re
import shutil
import sys
import tempfile

import torch

from core.distributed import all_reduce
from core.files import atomic, lock_folder
from core.weights.checkpoint import build_model, describe, earlier_checkpoints, load_last

# what atomic() and copy_checkpoint() leave behind in a run's folder if the run is killed
TEMPORARY = re.compile(r'(ckpt|ckpt_\d{8}|best|weights|log|run|samples)\.(pt|csv|json|jsonl)\.tmp\d+')


def open_run_folder(out_dir, opt, average, keep_last, resuming, **run_json):
    """Lock the folder, check the room on its disk, write run.json, and return the lock. Exits if one of them fails."""
    lock = lock_run_folder(out_dir)
    if not resuming and has_checkpoint(out_dir):
        print(f'warning: {out_dir} has checkpoints of another run, which the first of this one will replace; '
              'to go on with that one: --init_from=resume', flush=True)
    tensors = [p for group in opt.param_groups for p in group['params']]
    tensors += [p for p, _ in average.pairs]
    for moments in opt.state_dict()['state'].values():  # of torch's optimizers empty before the first step
        tensors += filter(torch.is_tensor, moments.values())
    check_disk(out_dir, sum(tensor.numel() * tensor.element_size() for tensor in tensors), keep_last)
    write_run_json(out_dir, **run_json)
    return lock


def load_to_resume(out_dir, device, dropout):
    """
    Return the network of the last checkpoint with its raw weights (LoRA: on the device), the checkpoint and its path,
    and print a line about it. Exits if there is none, or if it has no training state.
    """
    checkpoint, path = load_last(out_dir)
    missing = [key for key in ('optimizer', 'iter_num', 'best_val_loss') if key not in checkpoint]
    if missing:
        sys.exit(f'{path}: no {", ".join(missing)} in it, so it cannot be resumed; '
                 f'to start from its weights: --init_from={path}')
    model = build_model(checkpoint, path, device, dropout=dropout)
    description = '' if model.lora else f': {describe(model)}'
    print(f'resuming {path} at step {checkpoint["iter_num"]}{description}')
    return model, checkpoint, path


def load_optimizer_state(opt, scaler, checkpoint, path, name):
    """Restore the states of the optimizer and the gradient scaler. Exits if the checkpoint has another optimizer's."""
    try:
        opt.load_state_dict(checkpoint['optimizer'])
    except (KeyError, ValueError) as error:
        sys.exit(f'{path}: its optimizer is not {name} for these weights ({error}); '
                 f'to start from the weights: --init_from={path} and another --out_dir')
    if scaler.is_enabled() and checkpoint.get('scaler'):
        scaler.load_state_dict(checkpoint['scaler'])


def check_disk(out_dir, size, keep_last):
    """
    Exit if the disk has no room for checkpoints of `size` bytes.
    Old checkpoints in the folder will be replaced, so they count as room.
    """
    count = 3 + keep_last  # the last, the best, the one being written (at the end: weights.pt) and earlier ones
    needed = size * count
    old = {}  # by inode: best.pt may be a hard link to ckpt.pt
    for path in glob.glob(os.path.join(glob.escape(out_dir), '*.pt')):
        status = os.stat(path)
        old[status.st_ino] = status.st_size
    room = shutil.disk_usage(out_dir).free + sum(old.values())
    if needed > room:
        sys.exit(f'out_dir={out_dir}: the checkpoints need {needed / 2**30:.2g} GB ({size / 2**30:.2g} each) '
                 f'and there is room for {room / 2**30:.2g} GB; '
                 f'make some, choose another --out_dir, or lower --keep_last={keep_last}')


def check_writable(out_dir):
    """Exit if nothing can be written to the folder or, if it does not exist yet, to where it would be created."""
    folder = os.path.abspath(out_dir)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        sys.exit(f'out_dir={out_dir}: cannot write there: {error.strerror}')


def lock_run_folder(out_dir):
    """
    Create the folder, lock it until this process ends, and delete temporary files of killed runs. Return the lock.
    Exits if another run has the lock, or if the folder cannot be written to.
    """
    lock = lock_folder(out_dir, f'out_dir={out_dir}', 'another run is writing there; '
                       'wait for its end or stop it, or choose another --out_dir')
    if lock:
        for name in os.listdir(out_dir):
            if TEMPORARY.fullmatch(name):
                os.remove(os.path.join(out_dir, name))
    return lock


def write_run_json(out_dir, **entries):
    """
    Write run.json: the command, and what is given: the run_id, the torchrun launch, the hash of the data and the
    settings. Exits if it cannot be written.
    """
    path = os.path.join(out_dir, 'run.json')
    try:
        with atomic(path, 'w') as f:
            json.dump({'command': sys.argv, **entries}, f, indent=2, ensure_ascii=False)
    except OSError as error:
        sys.exit(f'{path}: cannot be written: {error.strerror}')


def read_run_json(out_dir):
    """Return the contents of run.json, {} if there is none."""
    try:
        with open(os.path.join(out_dir, 'run.json'), encoding='utf-8') as f:
            return dict(json.load(f))
    except (OSError, ValueError, TypeError):
        return {}


def has_checkpoint(out_dir):
    """Whether the folder has a checkpoint, of this run or another."""
    paths = [os.path.join(out_dir, name) for name in ('ckpt.pt', 'best.pt')]
    paths += earlier_checkpoints(out_dir)
    return any(os.path.exists(path) for path in paths)


def torchrun_launch():
    """Return the identity of this torchrun launch, which stays the same when torchrun restarts its workers; or ''."""
    if os.environ.get('TORCHELASTIC_RUN_ID', 'none') == 'none':
        return ''
    return ' '.join(os.environ[key] for key in ('TORCHELASTIC_RUN_ID', 'MASTER_ADDR', 'MASTER_PORT'))


def resolve_init_from(init_from, out_dir, env):
    """
    Resolve 'auto' and elastic restarts. Return what to start from, and the identity of the torchrun launch.
    'auto' becomes 'resume' if the folder has a checkpoint, and 'scratch' otherwise. After an elastic restart, every
    rank resumes from this run's last checkpoint, but never from that of an earlier run in the same folder.
    """
    launch = torchrun_launch() if env.ddp else ''
    run_json = read_run_json(out_dir)
    restarted = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0
    if launch and run_json.get('launch') == launch:
        restarted = True
    # torchrun counts a restart only on the machine that lost a process
    restarted = all_reduce([restarted], env).item() > 0
    has_saved = False
    if env.master and init_from == 'auto':
        has_saved = has_checkpoint(out_dir)
    elif env.master and restarted and init_from != 'resume':
        try:
            has_saved = load_last(out_dir, 'meta')[0].get('run_id') == run_json['run_id']
        except (KeyError, SystemExit):
            pass
    if all_reduce([has_saved], env).item():  # every rank decides as rank 0
        return 'resume', launch
    return 'scratch' if init_from == 'auto' else init_from, launch
