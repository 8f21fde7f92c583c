"""
Runs a train.py, ours or nanoGPT's, as `python train.py ...` would, and stops it after some steps; bench.py starts this in a process of its own:

    python benchmarks/run_and_time.py '{"folder": "...", "result": "out.json", ...}' config/train_gpt2.py --batch_size=8

A step is known by the line that train.py prints about it. The file `result` gets the milliseconds of each and what else there is to know.
"""
import builtins
import json
import math
import os
import re
import sys

import torch

job = json.loads(sys.argv[1])  # folder (of train.py), result, skip (steps before those that count), steps (that count), seconds (or fewer, then), trace (a path or ''), bare
script = os.path.join(job['folder'], 'train.py')
sys.argv[:2] = [script]
sys.path[0] = job['folder']
activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * torch.cuda.is_available()
profiler = torch.profiler.profile(activities=activities) if job['trace'] else None
times = []


def watched(*args, **kwargs):
    """print, as train.py sees it."""
    builtins.print(*args, **kwargs)
    step = re.match(r'iter \d+: .*?time ([\d.]+)ms', str(args[0]) if args else '')
    if step:
        times.append(float(step[1]))
        timed = len(times) - job['skip']
        if timed == job['steps'] or timed >= 3 and sum(times[job['skip']:]) > job['seconds'] * 1000:
            sys.exit()
        if profiler and timed == 0:
            profiler.start()


def peak_memory():
    """The most bytes that this process has held, on the GPU if it used one; None where the system does not tell."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    try:
        with open('/proc/self/status', encoding='utf-8') as f:  # ru_maxrss would count what the parent held when it forked
            return int(re.search(r'VmHWM:\s+(\d+)', f.read())[1]) * 1024
    except (OSError, TypeError):
        try:
            import resource
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
        except ImportError:
            return None


def operations():
    """The ten operations that took most time themselves: [[name, calls, ms, share]]."""
    events = profiler.key_averages()
    on_gpu = any(event.self_device_time_total for event in events)
    if on_gpu:  # its kernels, not those who called them
        events = [event for event in events if event.device_type != torch.autograd.DeviceType.CPU]
    costs = [event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events]
    ten = sorted(zip(costs, range(len(events))), reverse=True)[:10]
    return [[events[i].key, events[i].count, cost / 1000, cost / sum(costs)] for cost, i in ten]


if job['bare']:  # the same loop without looking after it: nothing saved, no jumps of the loss, no signals
    sys.path.insert(0, job['folder'])
    from types import SimpleNamespace

    import core.device
    import core.training.log
    import core.training.saver
    core.training.saver.Saver.save = core.training.saver.Saver.reserve = lambda *args, **kwargs: None
    core.training.log.spike_detector = lambda: lambda loss: None
    core.device.catch_signals = lambda nothing_to_save: SimpleNamespace(signal=None)
space = {'__name__': '__main__', '__file__': script, 'print': watched}
try:
    with open(script, encoding='utf-8') as f:
        exec(compile(f.read(), script, 'exec'), space)
except SystemExit as end:
    if end.code:
        raise
result = {'times': times[job['skip']:], 'memory': peak_memory(), 'parameters': sum(p.numel() for p in space['model'].parameters()), 'tokens': space['tokens_per_iter']}
env = space.get('env', space.get('run'))  # nanoGPT's train.py has neither
if env:
    data = space['data']
    known = math.nan if getattr(space['model'], 'lora', None) else 1  # where not all is trained, other operations are spent
    result.update(flops=known * space['model'].flops_per_token() * space['tokens_per_iter'], device=env.device, dtype=env.dtype,
                  config=space['config'], folder=os.path.abspath(data.folder), vocab_size=data.vocab_size)
if profiler and len(times) > job['skip']:
    profiler.stop()
    profiler.export_chrome_trace(job['trace'])
    result['operations'] = operations()
with open(job['result'], 'w', encoding='utf-8') as f:
    json.dump(result, f)
