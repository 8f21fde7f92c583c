"""Step timing, and what train.py prints about the run, a step, an evaluation, a long wait and the end."""
import datetime
import math
import sys
import time

from tqdm import tqdm

from core.files import quoted
from core.training.log import spike_detector

SILENCE = 10  # seconds after which something is printed


class StepClock:
    """Measures seconds per step on a monotonic clock. Call restart() after work that is not part of a step."""

    def __init__(self, step):
        self.begun = time.perf_counter()
        self.restart(step)

    def restart(self, step):
        self.since = time.perf_counter()
        self.step = step

    def mean(self, step):
        """Return the mean seconds per step since the last restart."""
        return (time.perf_counter() - self.since) / (step - self.step)

    def is_silent(self):
        """Whether the last restart, at which something was printed, was long ago."""
        return time.perf_counter() - self.since > SILENCE

    def elapsed(self):
        return as_time(time.perf_counter() - self.begun)


class StatusLine:
    """
    The last line on a terminal, overwritten by the next one and by whatever is printed: it replaces sys.stdout. Shows
    nothing in a file or a pipe.
    """

    def __init__(self):
        self.stream = sys.stdout
        self.is_terminal = self.stream.isatty()
        self.is_shown = False
        self.since = 0.0
        if self.is_terminal:
            sys.stdout = self

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        if self.is_shown:
            self.stream.write('\r\033[K')  # clears the line
            self.is_shown = False
        return self.stream.write(text)

    def is_due(self):
        return self.is_terminal and time.perf_counter() - self.since > 0.2

    def show(self, step, max_iters, loss, seconds_left):
        if self.is_due():
            self.write(f'iter {step} of {max_iters}: loss {loss:.4f}, left {as_time(seconds_left)}')
            self.stream.flush()
            self.is_shown = True
            self.since = time.perf_counter()


class StepReports:
    """
    Prints and logs what the steps have found: a line every `log_interval` steps and after ten seconds of silence, the
    status line, and a warning when the loss jumps.
    MFU is shown for known GPUs, but not for adapters: flops_per_token() counts full training.
    """

    def __init__(self, step, log_interval, short_rows, log, env, model):
        self.clock = StepClock(step)
        self.status = StatusLine()
        self.spike = spike_detector()
        self.log_interval = log_interval
        self.short_rows = short_rows  # see train.py
        self.rows_were_short = False
        self.log = log
        self.flops_per_s = env.peak_flops and env.peak_flops * env.world_size
        self.flops_per_token = None if model.lora else model.flops_per_token()

    def is_line_due(self, step):
        return step % self.log_interval == 0 or self.clock.is_silent()

    def __call__(self, step, line_due, numbers, tokens, max_iters):
        """
        Report a step. Call this for every step, in order.
        line_due: is_line_due() when the step was launched. numbers: {name: number}, 'loss' among them.
        """
        dt = self.clock.mean(step + 1)
        seconds_left = dt * (max_iters - step - 1)
        if line_due:
            self.clock.restart(step + 1)
            numbers.update(ms=dt * 1000, tokens_per_s=tokens / dt)
            if self.flops_per_s and self.flops_per_token:
                numbers['mfu'] = self.flops_per_token * tokens / dt / self.flops_per_s
            print(describe_step(step, numbers, seconds_left), flush=True)
            if self.log:
                self.log(step, numbers)
        rows_are_short = step < self.short_rows * max_iters
        if self.rows_were_short and not rows_are_short:  # contexts that the model has not seen yet
            self.spike = spike_detector()
            print(f'step {step}: whole rows from here on; the loss is higher at first', flush=True)
        self.rows_were_short = rows_are_short
        loss = numbers['loss']
        self.status.show(step, max_iters, loss, seconds_left)
        mean_before = self.spike(loss)
        if mean_before is not None:
            print(f'warning: step {step}: the loss jumped to {loss:.4f}, from {mean_before:.4f} in the steps before',
                  flush=True)


def show_progress(items, what):
    """Yield the items of a sequence. Meanwhile show a bar on a terminal, and elsewhere a line every ten seconds."""
    begun = since = time.perf_counter()
    for i, item in enumerate(tqdm(items, desc=what, leave=False, disable=None, delay=1), 1):
        yield item
        now = time.perf_counter()
        if now - since > SILENCE and not sys.stderr.isatty():
            since = now
            print(f'{what}: {i / len(items):.0%}, left {as_time((now - begun) / i * (len(items) - i))}', flush=True)


def as_time(seconds):
    """Return for example '0:01:05'."""
    return datetime.timedelta(seconds=round(seconds))


def describe_run(env, data, micro_steps, micro_rows, block_size, total_rows, max_iters, rows_in_epoch):
    """Return 'cpu float32, 1 process x 1 micro-batches x 12 rows x 64 = 768 tokens per iteration; ...'."""
    if data.kind in ('pairs', 'prompts'):
        unit = data.kind
        width = data.kind
        per_iter = total_rows
    else:
        unit = 'tokens'
        width = f'rows x {block_size}'
        per_iter = total_rows * block_size
    processes = '1 process' if env.world_size == 1 else f'{env.world_size} processes'
    line = (f'{env.device} {env.dtype}, {processes} x {micro_steps} micro-batches x {micro_rows} {width} = '
            f'{per_iter:,} {unit} per iteration; {data.folder}: {data.splits["train"]:,} tokens')
    if max_iters is not None:
        line += f', {max_iters:,} steps see them {max_iters * total_rows / rows_in_epoch:.3g} times'
    return line


def describe_step(step, numbers, seconds_left):
    """Return nanoGPT's line about a step, with more fields at its end."""
    mfu = f', mfu {numbers["mfu"] * 100:.2f}%' if 'mfu' in numbers else ''
    return (f'iter {step}: loss {numbers["loss"]:.4f}, time {numbers["ms"]:.2f}ms{mfu}, lr {numbers["lr"]:.2e}, '
            f'norm {numbers["grad_norm"]:.3f}, {numbers["tokens_per_s"]:,.0f} tok/s, left {as_time(seconds_left)}')


def describe_evaluation(step, numbers):
    """Return nanoGPT's line about an evaluation: 'step 0: train loss 4.2, val loss 4.3, ...'."""
    fields = [f'{name.replace("_", " ")} {value:.4f}' for name, value in numbers.items()]
    return f'step {step}: ' + ', '.join(fields)


def describe_end(steps, elapsed, skipped, saver, best_val_loss, script):
    """Return the last line of a run: its steps, time, checkpoints and best loss, and the command to try next."""
    parts = [f'{steps} steps in {elapsed}']
    if skipped:
        parts.append(f'{skipped} left out')
    if saver.saved:
        parts.append(f'{saver.saved} saved (written in {saver.written:.1f}s, '
                     f'for which training waited {saver.waited:.1f}s)')
    if math.isfinite(best_val_loss):
        parts.append(f'best validation loss {best_val_loss:.4f}')
    parts.append(f'checkpoints in {saver.out_dir}')
    hint = f'; now: python {script} --out_dir={quoted(saver.out_dir)}' if script else ''
    return ', '.join(parts) + hint
