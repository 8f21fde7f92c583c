"""Step timing, and the lines that train.py prints about the run, a step, an evaluation and the end."""
import datetime
import math
import time


class StepClock:
    """Measures seconds per step on a monotonic clock. Call restart() after work that is not part of a step."""

    def __init__(self, step):
        self.begun = time.perf_counter()
        self.restart(step)

    def restart(self, step):
        self.since = time.perf_counter()
        self.step = step

    def lap(self, step):
        """Return the mean seconds per step since the last lap or restart."""
        seconds = (time.perf_counter() - self.since) / (step - self.step)
        self.restart(step)
        return seconds

    def elapsed(self):
        return datetime.timedelta(seconds=round(time.perf_counter() - self.begun))


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
        epochs = max_iters * total_rows / rows_in_epoch if data.kind else max_iters * per_iter / data.splits['train']
        line += f', {max_iters:,} steps see them {epochs:.3g} times'
    return line


def describe_step(step, numbers, seconds_left):
    """Return nanoGPT's line about a step, with more fields at its end."""
    mfu = f', mfu {numbers["mfu"] * 100:.2f}%' if 'mfu' in numbers else ''
    left = datetime.timedelta(seconds=round(seconds_left))
    return (f'iter {step}: loss {numbers["loss"]:.4f}, time {numbers["ms"]:.2f}ms{mfu}, lr {numbers["lr"]:.2e}, '
            f'norm {numbers["grad_norm"]:.3f}, {numbers["tokens_per_s"]:,.0f} tok/s, left {left}')


def describe_evaluation(step, numbers):
    """Return nanoGPT's line about an evaluation: 'step 0: train loss 4.2, val loss 4.3, ...'."""
    fields = [f'{name.replace("_", " ")} {value:.4f}' for name, value in numbers.items()]
    return f'step {step}: ' + ', '.join(fields)


def describe_end(steps, elapsed, skipped, saver, best_val_loss, next_command):
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
    hint = f'; now: {next_command}' if next_command else ''
    return ', '.join(parts) + hint
