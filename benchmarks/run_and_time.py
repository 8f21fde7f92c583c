"""
Run a train.py, ours or nanoGPT's, as `python train.py ...` would, and stop it after some steps. bench.py starts this in
a process of its own (common.time_train):

    python benchmarks/run_and_time.py '{"folder": "...", "result": "out.json", ...}' config/train_gpt2.py --batch_size=8

Steps are counted by the lines `iter N: ...` that train.py prints every log_interval steps, and timed by the clock
between these lines. On a GPU a line may be printed while the steps before it still run, so there only the mean of all
timed steps counts, between two moments at which the GPU has finished. The file `result` gets a JSON object: ms (per
step), times (ms per step between two lines), steps (that were timed), memory (bytes), parameters, tokens (per step);
for our train.py also flops (per step), device, dtype, config, folder and vocab_size (of the dataset); with a trace its
most expensive operations.
"""
import builtins
import itertools
import json
import math
import os
import re
import statistics
import sys
import time
from types import SimpleNamespace

import torch

# folder: of train.py. result: file to write. skip: first steps, not timed. steps: timed steps. seconds: fewer steps, at
# least 3, if they take longer; both in whole log_intervals. trace: file of the profiler, or ''. bare: train without
# what protects a run.
job = json.loads(sys.argv[1])
script = os.path.join(job['folder'], 'train.py')
sys.argv[:2] = [script]
sys.path[0] = job['folder']
lines = []  # (step, seconds on the clock) of the line before the first timed step, and of those after it
profiler = None
if job['trace']:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)


def timing_print(*args, **kwargs):
    """The print() of train.py. Collects the times of its lines, starts the profiler, and exits after the last step."""
    plain_print(*args, **kwargs)
    found = re.match(r'iter (\d+): ', str(args[0])) if args else None
    if not found or int(found[1]) < job['skip'] - 1:
        return
    step, first = int(found[1]), not lines
    timed = 0 if first else step - lines[0][0]
    last = timed >= job['steps'] or (timed >= 3 and time.perf_counter() - lines[0][1] > job['seconds'])
    if on_gpu() and (first or last):
        torch.accelerator.synchronize()
    lines.append((step, time.perf_counter()))
    if last:
        sys.exit()
    if profiler and first:
        profiler.start()


def on_gpu():
    return next(space['model'].parameters()).device.type != 'cpu'


def peak_memory():
    """Return the largest number of bytes that this process held, on the GPU if it used one. None if unknown."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    try:
        with open('/proc/self/status', encoding='utf-8') as f:  # ru_maxrss would include the parent before the fork
            return int(re.search(r'VmHWM:\s+(\d+)', f.read())[1]) * 1024
    except (OSError, TypeError):
        try:
            import resource
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
        except ImportError:
            return None


def expensive_operations():
    """Return [[name, calls, ms, share]] of the ten operations with the longest time of their own."""
    events = profiler.key_averages()
    on_gpu = any(event.self_device_time_total for event in events)
    if on_gpu:  # kernels, not the operations that launched them
        events = [event for event in events if event.device_type != torch.autograd.DeviceType.CPU]
    costs = [event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events]  # microseconds
    total = sum(costs)
    longest = sorted(range(len(events)), key=costs.__getitem__, reverse=True)[:10]
    return [[events[i].key, events[i].count, costs[i] / 1000, costs[i] / total] for i in longest]


def make_bare():
    """Baseline for --what=trust: the loop without checkpoints, spike detection and signal handlers."""
    import core.device
    import core.training.log
    import core.training.saver
    core.training.saver.Saver.save = core.training.saver.Saver.reserve = lambda *args, **kwargs: None
    core.training.log.spike_detector = lambda: lambda loss: None
    core.device.catch_signals = lambda nothing_to_save: SimpleNamespace(signal=None)


if job['bare']:
    make_bare()
space = {'__name__': '__main__', '__file__': script}  # the globals of train.py
plain_print, builtins.print = builtins.print, timing_print
try:
    with open(script, encoding='utf-8') as f:
        exec(compile(f.read(), script, 'exec'), space)
except SystemExit as end:
    if end.code:
        raise
finally:
    builtins.print = plain_print

model = space['model']
times = [(end - begin) / (step - before) * 1000 for (before, begin), (step, end) in itertools.pairwise(lines)]
timed_steps = lines[-1][0] - lines[0][0] if lines else 0
if on_gpu() and timed_steps:
    ms = (lines[-1][1] - lines[0][1]) / timed_steps * 1000
else:
    ms = statistics.median(times) if times else math.nan
tokens = space['tokens_per_iter']
result = {
    'ms': ms,
    'times': times,
    'steps': timed_steps,
    'memory': peak_memory(),
    'parameters': sum(p.numel() for p in model.parameters()),
    'tokens': tokens,
}
if 'env' in space:  # our train.py
    env = space['env']
    data = space['data']
    flops = model.flops_per_token() * tokens
    result.update(
        flops=math.nan if model.lora else flops,  # flops_per_token() counts full training
        device=env.device, dtype=env.dtype, config=space['config'],
        folder=os.path.abspath(data.folder), vocab_size=data.vocab_size)
if profiler and times:
    profiler.stop()
    profiler.export_chrome_trace(job['trace'])
    result['operations'] = expensive_operations()
with open(job['result'], 'w', encoding='utf-8') as f:
    json.dump(result, f)
