"""The folder of a run: claimed by one process at a time, and its checkpoints, written beside training so that a kill at any moment loses little."""
import os
import sys
import threading
import time

import torch

from core.distributed import full_tensor
from core.weights.checkpoint import (
    EARLIER,
    checkpoint_path,
    copy_checkpoint,
    earlier_checkpoints,
    load_checkpoint,
    save_checkpoint,
)


def save_weights(out_dir):
    """Write weights.pt: of the checkpoint that sampling takes, all but the optimizer, number for number. A third of its size, to be shared."""
    checkpoint = load_checkpoint(checkpoint_path(out_dir))
    save_checkpoint({key: value for key, value in checkpoint.items() if key not in ('optimizer', 'scaler')}, os.path.join(out_dir, 'weights.pt'))


class Saver:
    """
    Saves a run's checkpoints: ckpt.pt, the last; best.pt, with the best validation loss; ckpt_STEP.pt, the `keep_last` before the last.
    In the background: the tensors are copied, to memory that is kept, and a thread writes the copy; never two at once. Training waits for the
    copy, and for the checkpoint before where that is not written yet.
    """

    def __init__(self, out_dir, run, log, keep_last, background, resumed_from=None, step=0):
        self.out_dir, self.run, self.log, self.keep_last, self.background = out_dir, run, log, keep_last, background
        self.path = os.path.join(out_dir, 'ckpt.pt')
        self.last_step = step if resumed_from == self.path else None  # of the ckpt.pt that is there, if it is this run's, and whole
        self.new = resumed_from is None  # whatever is there belongs to another run
        self.thread, self.copies, self.failures, self.reason = None, {}, 0, ''
        self.saved, self.waited, self.written = 0, 0.0, 0.0  # checkpoints; seconds that training waited for them, and that writing them took

    def __call__(self, checkpoint, best=False, wait=False):
        """Save this state; wait: until it is on the disk. Every process of a sharded network gives its part; of another the first one is enough."""
        if not (self.run.master or self.run.sharded):
            return
        started = time.perf_counter()
        self.wait()
        if self.background or self.run.sharded:
            checkpoint = self.copy(checkpoint)
        if not self.run.master:
            return
        copied = torch.cuda.Event() if self.run.device_type == 'cuda' else None
        if copied:
            copied.record()  # when the GPU gets here, the copies are there
        self.thread = threading.Thread(target=self.write, args=(checkpoint, best, copied))
        self.thread.start()
        if wait or not self.background:
            self.wait()
        waited = time.perf_counter() - started
        self.waited += waited
        print(f'saved step {checkpoint["iter_num"]} to {self.out_dir}, training waited {waited * 1000:.0f}ms', flush=True)

    def reserve(self, checkpoint):
        """Find the memory for the copies while training begins; the first checkpoint would wait for it, a second for a GB."""
        if self.background and self.run.master and not self.run.sharded:  # gathering takes all processes
            self.thread = threading.Thread(target=self.copy, args=(checkpoint,))
            self.thread.start()

    def copy(self, tree, path=()):
        """The same dicts and lists with copies of their tensors in this machine's memory: whole ones of what is sharded, one copy of what is tied."""
        if path == ('objective',):
            return tree  # nothing in it is changed after it was made
        if isinstance(tree, dict):
            return {key: self.copy(value, (*path, key)) for key, value in tree.items()}
        if isinstance(tree, (list, tuple)):
            return [self.copy(value, (*path, i)) for i, value in enumerate(tree)]
        if not isinstance(tree, torch.Tensor):
            return tree
        key, tree = (tree.data_ptr() or path, tree.shape), full_tensor(tree)
        if self.run.master:
            if key not in self.copies:
                self.copies[key] = torch.empty(tree.shape, dtype=tree.dtype, pin_memory=tree.is_cuda)
            return self.copies[key].copy_(tree, non_blocking=tree.is_cuda)

    def write(self, checkpoint, best, copied):
        """In the thread: the last checkpoint becomes an earlier one, this one the last; the oldest goes."""
        started = time.perf_counter()
        if copied:
            copied.synchronize()
        try:
            self.log.sync()  # the rows of a step are on the disk before its checkpoint
            if self.keep_last and self.last_step not in (None, checkpoint['iter_num']):
                copy_checkpoint(self.path, os.path.join(self.out_dir, EARLIER.format(self.last_step)))
            save_checkpoint(checkpoint, self.path)
            if best:
                copy_checkpoint(self.path, os.path.join(self.out_dir, 'best.pt'))
        except (SystemExit, OSError) as error:
            self.failures, self.reason = self.failures + 1, str(error)
            print(f'warning: {error}; the next checkpoint is another try', file=sys.stderr)
            return
        old = earlier_checkpoints(self.out_dir)[0 if self.new else self.keep_last:]
        if self.new:  # sampling would be misled
            old += [os.path.join(self.out_dir, name) for name in ('weights.pt', *['best.pt'] * (not best))]
        for path in filter(os.path.exists, old):
            os.remove(path)
        self.new, self.failures, self.last_step = False, 0, checkpoint['iter_num']
        self.saved, self.written = self.saved + 1, self.written + time.perf_counter() - started

    def wait(self, last=False):
        """Until nothing is being written. Ends the script where two checkpoints in turn, or the last one, could not be saved."""
        if self.thread:
            self.thread.join()
        if self.failures > 1 or self.failures and last:
            sys.exit(self.reason)
