"""The checkpoint writer. It writes in a background thread, so that training waits little."""
import os
import sys
import threading
import time

import torch

from core.distributed import full_tensor
from core.weights.checkpoint import (
    EARLIER,
    checkpoint_path,
    choose_weights,
    copy_checkpoint,
    earlier_checkpoints,
    load_checkpoint,
    save_checkpoint,
)


def save_weights(out_dir):
    """
    Write weights.pt for sharing: the checkpoint and the weights that sampling uses, without the optimizer. A third of
    the size.
    """
    checkpoint = load_checkpoint(checkpoint_path(out_dir))
    choose_weights(checkpoint)
    for key in ('optimizer', 'scaler'):
        checkpoint.pop(key, None)
    save_checkpoint(checkpoint, os.path.join(out_dir, 'weights.pt'))


class Saver:
    """
    Writes the checkpoints of a run: ckpt.pt, the last; best.pt, with the best validation loss; ckpt_STEP.pt, the
    `keep_last` before the last.
    In the background: the tensors are copied to reused CPU memory, and a thread writes the copy, one checkpoint at a
    time. Training waits for the copy, and for the previous checkpoint if it is not written yet.
    """

    def __init__(self, out_dir, env, log, keep_last, background, resumed_from=None, step=0):
        self.out_dir = out_dir
        self.env = env
        self.log = log
        self.keep_last = keep_last
        self.background = background
        self.path = os.path.join(out_dir, 'ckpt.pt')
        self.last_step = step if resumed_from == self.path else None  # step of this run's ckpt.pt on disk, or None
        self.replaces_another_run = resumed_from is None
        self.thread = None
        self.copies = {}  # CPU memory for the copies
        self.failures = 0  # consecutive checkpoints that could not be written
        self.reason = ''  # of the last failure
        self.saved = 0  # checkpoints written
        self.waited = 0.0  # seconds that training waited for them
        self.written = 0.0  # seconds that writing took
        self.saved_at = time.perf_counter()

    def save(self, checkpoint, best=False, wait=False):
        """
        Save this state; with wait=True return when it is on the disk. best: it has the best validation loss so far.
        Every rank of a sharded model must call this; otherwise rank 0 is enough.
        """
        if not (self.env.master or self.env.sharded):
            return
        started = time.perf_counter()
        self.wait()
        if self.background or self.env.sharded:
            checkpoint = self.copy(checkpoint)
        if not self.env.master:
            return
        copied = None
        if self.env.device_type == 'cuda':
            copied = torch.cuda.Event()
            copied.record()  # recorded after the device-to-host copies; the writer thread waits for it
        self.thread = threading.Thread(target=self.write, args=(checkpoint, best, copied))
        self.thread.start()
        if wait or not self.background:
            self.wait()
        self.saved_at = time.perf_counter()
        waited = self.saved_at - started
        self.waited += waited
        step = checkpoint['iter_num']
        print(f'saved step {step} to {self.out_dir}, training waited {waited * 1000:.0f}ms', flush=True)

    def reserve(self, checkpoint):
        """Allocate the memory for the copies while training starts; it takes a second per GB."""
        if self.background and self.env.master and not self.env.sharded:  # gathering shards needs every rank
            self.thread = threading.Thread(target=self.copy, args=(checkpoint,))
            self.thread.start()

    def copy(self, tree, path=()):
        """
        Copy a nested state dict to (reused, pinned) CPU memory. Sharded tensors are gathered, tied tensors copied once.
        """
        if path == ('objective',):
            return tree  # its tensors never change
        if isinstance(tree, dict):
            return {key: self.copy(value, (*path, key)) for key, value in tree.items()}
        if isinstance(tree, (list, tuple)):
            return [self.copy(value, (*path, i)) for i, value in enumerate(tree)]
        if not isinstance(tree, torch.Tensor):
            return tree
        key = (tree.data_ptr() or path, tree.shape)
        full = full_tensor(tree)
        if not self.env.master:
            return None
        if key not in self.copies:
            self.copies[key] = torch.empty(full.shape, dtype=full.dtype, pin_memory=full.is_cuda)
        return self.copies[key].copy_(full, non_blocking=full.is_cuda)

    def write(self, checkpoint, best, copied):
        """Write a checkpoint (in the thread), keep the previous one as ckpt_STEP.pt, and delete what is too old."""
        started = time.perf_counter()
        step = checkpoint['iter_num']
        if copied:
            copied.synchronize()
        try:
            self.log.sync()  # the log reaches the disk before the checkpoint
            if self.keep_last and self.last_step not in (None, step):
                copy_checkpoint(self.path, os.path.join(self.out_dir, EARLIER.format(self.last_step)))
            save_checkpoint(checkpoint, self.path)
            if best:
                copy_checkpoint(self.path, os.path.join(self.out_dir, 'best.pt'))
        except (SystemExit, OSError) as error:
            self.failures += 1
            self.reason = str(error)
            print(f'warning: {error}; the next checkpoint is another try', file=sys.stderr)
            return
        self.delete_old(best)
        self.replaces_another_run = False
        self.failures = 0
        self.last_step = step
        self.saved += 1
        self.written += time.perf_counter() - started

    def delete_old(self, best):
        """Delete checkpoints beyond keep_last, and with this run's first checkpoint all files of another run."""
        stale = earlier_checkpoints(self.out_dir)
        if self.replaces_another_run:  # sampling would use the other run's files
            stale.append(os.path.join(self.out_dir, 'weights.pt'))
            if not best:
                stale.append(os.path.join(self.out_dir, 'best.pt'))
        else:
            stale = stale[self.keep_last:]
        for path in stale:
            if os.path.exists(path):
                os.remove(path)

    def wait(self, last=False):
        """
        Wait until nothing is being written. Exits if two consecutive checkpoints, or the last one, could not be saved.
        """
        if self.thread:
            self.thread.join()
        if self.failures > 1 or (self.failures and last):
            sys.exit(self.reason)

    def minutes_passed(self, minutes):
        """Whether so many minutes have passed since the last checkpoint; 0: never."""
        return minutes > 0 and time.perf_counter() - self.saved_at > minutes * 60

    def leave_out(self, step, loss, grad_norm, skipped, skip_nonfinite, resuming):
        """
        Count a step that was not applied because its loss or gradient is not finite: return skipped + 1. If that is
        more than skip_nonfinite, finish writing and exit.
        """
        skipped += 1
        if skipped <= skip_nonfinite:
            print(f'warning: step {step} is left out: the loss is {loss}, the gradient norm {grad_norm} '
                  f'({skipped} of skip_nonfinite={skip_nonfinite})', flush=True)
            return skipped
        self.wait()
        if not self.env.master:
            sys.exit(1)
        if self.saved or resuming:
            saved = f'The checkpoint in {self.out_dir} is from before'
        else:
            saved = 'Nothing has been saved yet'
        sys.exit(f'step {step}: the loss is {loss}, the gradient norm {grad_norm}. {saved}; '
                 'try a lower --learning_rate, a longer --warmup_iters, --dtype=float32, or --skip_nonfinite=10')
