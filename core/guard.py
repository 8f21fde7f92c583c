"""What is looked after so that a long run does not end in nothing: room on the disk, the same sight in every process, losses that jump."""
import glob
import hashlib
import math
import os
import shutil
import sys

from core.device import all_reduce


def check_disk(out_dir, size, keep_last):
    """End the script with one line where the checkpoints of a run, `size` bytes each, will not fit on the disk of its folder. What is there of an
    earlier run will be replaced, so it counts as room."""
    needed = size * (3 + keep_last)  # the last, the best, the one being written (at the end: the weights) and those before
    there = {os.stat(path).st_ino: os.stat(path).st_size for path in glob.glob(os.path.join(glob.escape(out_dir), '*.pt'))}
    room = shutil.disk_usage(out_dir).free + sum(there.values())
    if needed > room:
        sys.exit(f'out_dir={out_dir}: the checkpoints need {needed / 2**30:.2g} GB ({size / 2**30:.2g} each) and there is room for {room / 2**30:.2g} GB; '
                 f'make some, choose another --out_dir, or lower --keep_last={keep_last}')


def same_everywhere(seen, run):
    """End the script with one line where something, {what: text}, is not the same in every process."""
    for what, text in seen.items():
        digest = int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)  # 48 bits, which a float64 holds
        digests = all_reduce([digest * (rank == run.rank) for rank in range(run.world_size)], run).tolist()
        other = [rank for rank in range(run.world_size) if digests[rank] != digests[0]]
        if other:
            sys.exit(f'{what}: process {other[0]} sees another than process 0; the files and settings must be the same for every process' if run.master else 1)


def watch_spikes(sigmas=6, patience=50):
    """A function to be told the loss of every step. It returns the mean before a jump of so many standard deviations, else None; of several in
    a row only at the first. Mean and deviation are those of about the last 50 steps."""
    count, mean, variance, high = 0, 0.0, 0.0, False

    def jumped(loss):
        nonlocal count, mean, variance, high
        if not math.isfinite(loss):
            return None  # which is a matter of its own
        before, was_high, limit = mean, high, sigmas * variance**0.5
        high = count >= patience and loss > mean + max(limit, 0.1)
        away = min(loss - mean, limit) if high else loss - mean
        count += 1
        mean += away * max(1 / patience, 1 / count)
        variance += (away**2 * (count > 1) - variance) * max(1 / patience, 1 / count)
        return before if high and not was_high else None
    return jumped
