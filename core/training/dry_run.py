"""train.py --dry_run=True: a few steps of the loop, then what a run needs and how long it will take. Writes nothing."""
import os
import sys
import time

import torch

from core.distributed import all_reduce
from core.estimates import largest_batch, peak_memory, total_memory, training_memory

MICRO_BATCHES = 4  # that train.py computes in a step, at most; the others take as long
WARM_UP = 3  # steps that are not timed
STEPS, SECONDS = 100, 5  # timed steps: so many, or for so long, but at least two
PATIENCE = 30  # seconds for the first step; if it takes longer, it is the only one


class DryRun:
    """
    Made when everything is ready for the first step, and told of every step of the loop. It waits for a GPU only where
    it reads the clock: after the first step, after the warm-up, and at the end.
    """

    def __init__(self, model, data, config, env, micro_rows, micro_steps, iter_num):
        self.model, self.data, self.config, self.env = model, data, config, env
        self.micro_rows, self.micro_steps = micro_rows, micro_steps
        self.iter_num = iter_num
        self.steps_left = config['max_iters'] - iter_num
        if self.steps_left < 1:
            sys.exit(f'dry_run: {iter_num} steps of max_iters={config["max_iters"]} are done, so there is none to '
                     'time; raise --max_iters')
        self.resident = torch.cuda.memory_allocated() if env.device_type == 'cuda' else 0  # before gradients
        self.steps = 0  # so far
        self.warm_up = self.last = None  # the steps after which timing begins and ends
        self.start_clock()

    def start_clock(self):
        self.since = self.read_clock()
        self.steps_before = self.steps
        self.tokens = 0  # after the steps; perhaps a tensor on the device

    def read_clock(self):
        torch.get_device_module(self.env.device_type).synchronize()  # does nothing on the CPU
        return time.perf_counter()

    def step(self, tokens):
        """Count a step of so many tokens over all ranks. Return whether it was the last; then print the summary."""
        self.steps += 1
        self.tokens += tokens
        if self.steps not in (1, self.warm_up, self.last):
            return False
        seconds = self.read_clock() - self.since
        seconds = all_reduce([seconds], self.env).item() / self.env.world_size  # so that all ranks decide alike
        steps = self.steps - self.steps_before
        only_one = self.steps == 1 and (seconds > PATIENCE or self.steps_left == 1)
        if only_one or self.steps == self.last:
            self.print_summary(seconds / steps, float(self.tokens) / seconds, steps)
            return True
        if self.steps == 1:
            self.warm_up = min(WARM_UP, self.steps_left - 1)
        if self.steps == self.warm_up:
            more = min(STEPS, max(2, int(SECONDS * steps / seconds)))
            self.last = min(self.steps + more, self.steps_left)
        self.start_clock()
        return False

    def print_summary(self, seconds, tokens_per_s, steps):
        """seconds: of a step, which had at most MICRO_BATCHES; steps: how many were timed."""
        model, env, T = self.model, self.env, self.model.config.block_size
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        weights, activations = training_memory(model, self.micro_rows, T, env, self.config['ema'])
        peak, available = peak_memory(env), total_memory(env)
        print('dry run, nothing was written:')
        print(f'  parameters  {sum(p.numel() for p in model.parameters()):,}, of which {trained:,} are trained')
        print(f'  memory      at least {as_size(weights)} for weights, gradients and optimizer, and '
              f'{as_size(activations)} for {self.micro_rows} rows of {T}')
        if peak and available:
            sharing = 1 if env.device_type == 'cuda' else int(os.environ.get('LOCAL_WORLD_SIZE', 1))  # torchrun's
            each = f' in each of {sharing} processes' if sharing > 1 else ''
            verdict = 'it fits' if sharing * peak < available else 'it does not fit'
            print(f'              measured: {as_size(peak)}{each}; {env.device} has {as_size(available)}: {verdict}')
        if env.device_type == 'cuda':
            gradients = 4 * trained / (env.world_size if env.sharded else 1)
            rows = largest_batch(self.micro_rows, self.resident + gradients, peak)
            if rows is not None:
                print(f'              about {rows} rows would fit (--batch_size={rows})')

        seconds *= self.micro_steps / min(self.micro_steps, MICRO_BATCHES)
        evaluations = self.evaluation_tokens() / (3 * tokens_per_s)  # a forward pass takes a third of a step
        timed = f'{steps} timed' if self.warm_up else 'the first, which takes longest'
        print(f'  speed       {tokens_per_s:,.0f} tokens a second, {seconds * 1000:,.1f} ms a step ({timed})')
        print(f'  time        {as_hours(self.steps_left * seconds + evaluations)} for {self.steps_left:,} steps, about '
              f'{as_hours(evaluations)} of it for evaluations')

    def evaluation_tokens(self):
        """Return the tokens in all evaluations of the run. 0 for prompts, whose answers are generated."""
        if self.data.kind == 'prompts':
            return 0
        interval, max_iters, T = self.config['eval_interval'], self.config['max_iters'], self.model.config.block_size
        count = max_iters // interval - (self.iter_num - 1) // interval + (max_iters % interval > 0)
        rows = self.config['eval_iters'] * self.config['batch_size']
        splits = sum(length > 1 for length in self.data.splits.values())
        if self.config['ema'] and self.data.splits.get('val', 0) > 1:
            splits += 1  # for the averaged weights
        return count * splits * (rows * T if rows > 0 else self.data.splits.get('val', 0))


def as_hours(seconds):
    """Return for example '12.3 hours' or '12.3 minutes'."""
    return f'{seconds / 3600:,.1f} hours' if seconds >= 3600 else f'{seconds / 60:.1f} minutes'


def as_size(n):
    """Return for example '1.5 GB' or '300 MB'."""
    return f'{n / 2**30:,.1f} GB' if n >= 2**30 else f'{n / 2**20:,.0f} MB'
