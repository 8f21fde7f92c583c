"""What keeps a GPU busy: batches are loaded ahead of their step, and what a step has found is read after it."""
import itertools
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch

from core.distributed import stack_on_device


def load_ahead(load, step, ahead=True):
    """
    Yield load(step), load(step + 1) and so on. Each is computed in a thread while the caller works on the one before;
    ahead=False: when it is asked for. What load() raises, SystemExit too, is raised here.
    """
    if not ahead:
        yield from map(load, itertools.count(step))  # without end
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(load, step)
        while True:
            batches = upcoming.result()
            step += 1
            upcoming = thread.submit(load, step)
            yield batches


def pin(batch, env):
    """On CUDA move the tensors of a batch to pinned memory, from which a copy to the GPU does not wait for it."""
    return [x.pin_memory() for x in batch] if env.device_type == 'cuda' else batch


class Unread:
    """
    What steps have found, in order. The numbers stay on a GPU until they are needed, and then until the next step is
    launched, so that the GPU has work while the host waits for them. On other devices they are read at once.
    """

    def __init__(self, env):
        self.env = env
        self.steps = deque()  # (what the host knows, numbers, CUDA event)
        self.n_needed = 0  # that many of them

    def add(self, known, numbers, needed):
        """
        Add a step. known: a tuple, which read() returns first. numbers: plain ones or tensors () on the device.
        needed: return this step, and those before it, soon.
        """
        numbers = stack_on_device(numbers, self.env)
        copied = None
        if self.env.device_type == 'cuda':
            numbers = numbers.to('cpu', non_blocking=True)  # pinned memory
            copied = torch.cuda.Event()
            copied.record()
        self.steps.append((known, numbers, copied))
        if needed or not copied:
            self.n_needed = len(self.steps)

    def is_ready(self, everything):
        """Whether to read() a step now. everything: read all that there are."""
        lag = 1 if self.env.device_type == 'cuda' else 0
        return bool(self.steps) if everything else min(self.n_needed, len(self.steps) - lag) > 0

    def read(self):
        """Return (*known, *numbers) of the first step, the numbers as floats. Waits until the GPU has computed them."""
        known, numbers, copied = self.steps.popleft()
        self.n_needed -= 1
        if copied:
            copied.synchronize()
        return *known, *numbers.tolist()
