"""train.py --minutes: the clock decides how many steps a run has."""
import bisect
import dataclasses
import math
import sys

import torch

from core import startup
from core.distributed import all_reduce
from core.training.evaluation import evaluate
from core.training.progress import as_time, describe_evaluation

EVALUATIONS = {False: 10, True: 5}  # in a run, about; True: with auto
EVALUATION_SHARE = {False: 0.01, True: 0.006}  # of the budget, for an evaluation
WHOLE_SHARE = 0.03  # of the budget, with auto: for the evaluation on the whole validation text at the end
WARM_UP_SHARE = 0.05  # of the steps, at most
TOLERANCE = 0.01  # of the budget: the number of steps changes if the run would end so much too early or too late
TIMED_STEPS, TIMED_SECONDS = 9, 10  # the plan is printed after so many steps, or after so many seconds of them
WRITING_SECONDS = 0.1  # of a checkpoint, before one was written
EXIT_SECONDS = 0.5  # after the last one was written
SAVED = ('spent_before', 'step_seconds', 'n_timed', 'is_planned', 'evaluation_seconds', 'writing_seconds', 'eval_rows',
         'whole_rows', 'whole_seconds')  # attributes of Budget that a checkpoint has


def steps_within(seconds, step, step_seconds, evaluation_seconds, eval_interval):
    """
    Return how many steps after `step` fit into so many seconds, together with the evaluations between them (not with
    the one after the last step).
    """
    def needed(n):
        return duration(n, step, step_seconds, evaluation_seconds, eval_interval)
    return max(0, bisect.bisect_right(range(10**9), seconds, key=needed) - 1)


def duration(n, step, step_seconds, evaluation_seconds, eval_interval):
    """Return the seconds of n steps after `step`, and of the evaluations between them."""
    evaluations = (step + n - 1) // eval_interval - step // eval_interval if n else 0
    return n * step_seconds + evaluations * evaluation_seconds


class Budget:
    """
    Decides how many steps a run has, from its minutes and from the time that its steps, evaluations and checkpoints
    have taken. The minutes count from the start of the process, and before that from the start of the run that it
    resumes. Without minutes this changes nothing.

    The steps are counted anew at evaluations and every 5 % of the run. Only there the host waits for a GPU, and all
    ranks take the times of rank 0.
    """

    def __init__(self, config, given, checkpoint, env):
        """
        Set max_iters, lr_decay_iters, warmup_iters and eval_interval in `config`, until the first steps are timed.
        checkpoint: the one that is resumed, or {}. Exits if the minutes have passed already.
        """
        self.config, self.given, self.env = config, given, env
        self.seconds = config['minutes'] * 60
        self.warmup_iters, self.eval_interval = config['warmup_iters'], config['eval_interval']  # at most
        self.spent_before = 0.0  # seconds of the run that is resumed
        self.step_seconds, self.n_timed = 0.0, 0  # moving mean, and the steps that were timed
        self.is_planned = False  # enough steps have been timed
        self.evaluation_seconds = 0.0  # of the last evaluation, with the wait for a checkpoint
        self.writing_seconds = WRITING_SECONDS
        self.eval_rows = 0  # of each split in an evaluation; -1: all
        self.whole_rows, self.whole_seconds = 0, 0.0  # of the evaluation by finish(); -1 rows: all
        saved = checkpoint.get('budget')
        vars(self).update(saved or {})
        if not self.seconds:
            return
        spent, = self.agree([self.spent()])
        if saved:
            self.follow(checkpoint, spent)
        elif spent > self.seconds:
            sys.exit(f'minutes={config["minutes"]:g}: too short, because the start took {spent:.1f} s; '
                     'give it more minutes')
        else:
            self.set_steps(max(config['max_iters'], checkpoint.get('iter_num', 0) + 1))

    def follow(self, checkpoint, spent):
        """Take the number of steps that the checkpoint's run has planned; another if the minutes have changed."""
        step, before = checkpoint['iter_num'], checkpoint['config']
        for key in {'max_iters', 'lr_decay_iters', 'warmup_iters', 'eval_interval'} - set(self.given):
            self.config[key] = before[key]
        if spent >= self.seconds:
            self.set_steps(step)
            print(f'the budget of {as_time(self.seconds)} is spent')
            return
        if before['minutes'] != self.config['minutes']:
            self.set_steps(self.affordable_steps(step, spent))
        print(f'as the checkpoint plans: {self.config["max_iters"]:,} steps; {as_time(spent)} of '
              f'{as_time(self.seconds)} are spent')

    def spent(self):
        """Return the seconds of the run so far, without those between an interruption and the next start."""
        return self.spent_before + startup.seconds_since_start()

    def schedule(self):
        """Return max_iters, lr_decay_iters, warmup_iters and eval_interval."""
        return tuple(self.config[key] for key in ('max_iters', 'lr_decay_iters', 'warmup_iters', 'eval_interval'))

    def start(self, step, n_rows, objective_module, model, average, data, context, micro_rows, block_size):
        """
        Start the clock of the steps. Return the rows to evaluate on: n_rows (-1: all), or fewer if that would take more
        than EVALUATION_SHARE of the budget, unless the command line gives eval_iters. A resumed run keeps its rows.
        """
        if not self.seconds:
            return n_rows
        spent, = self.agree([self.spent()])
        if spent > self.seconds and not self.spent_before:
            sys.exit(f'minutes={self.config["minutes"]:g}: too short, because {spent:.1f} s were spent before the '
                     'first step; give it more minutes' + self.config['compile'] * ', or --compile=False')

        def run(rows, data):
            return evaluate(
                objective_module, model, average, data, context, rows, micro_rows, block_size, self.env)
        self.run = run
        self.data = data
        if not self.eval_rows:
            self.eval_rows = self.choose_rows(n_rows, objective_module, micro_rows, block_size)
        self.restart(step)
        self.next_check = step + self.until_next_check(step)
        return n_rows if 'eval_iters' in self.given else self.eval_rows

    def choose_rows(self, n_rows, objective_module, micro_rows, block_size):
        """Return the rows for start(), and set whole_rows, by timing an evaluation on a few rows."""
        data, auto = self.data, self.config['auto']
        split = 'val' if data.splits.get('val', 0) > 1 else 'train'
        all_rows = len(objective_module.fixed(data, split, -1, block_size))
        row_seconds = self.time_rows(micro_rows * self.env.world_size, all_rows)
        affordable = max(1, int(EVALUATION_SHARE[auto] * self.seconds / row_seconds))
        wanted = min(n_rows, all_rows) if n_rows > 0 else all_rows
        if wanted > affordable and 'eval_iters' not in self.given:
            if not auto:
                print(f'evaluating on {affordable:,} rows instead of {wanted:,}, which would take '
                      f'{wanted * row_seconds:.1f} s each time (--eval_iters=N to decide yourself)')
            n_rows = wanted = affordable
        self.evaluation_seconds = wanted * row_seconds
        if auto and 0 < n_rows < all_rows and split == 'val':
            row_seconds /= 2  # of the validation text alone
            rows = min(all_rows, int(WHOLE_SHARE * self.seconds / row_seconds))
            self.whole_seconds = rows * row_seconds
            self.whole_rows = rows if rows < all_rows else -1
        return n_rows

    def time_rows(self, rows, all_rows):
        """Return the seconds of evaluating a row of each split, from so many rows or more."""
        while True:
            rows = min(rows, all_rows)
            began = self.spent()
            self.run(rows, self.data)
            seconds, = self.agree([self.spent() - began])
            if rows == all_rows or seconds > 0.001 * self.seconds:
                return max(seconds / rows, 1e-9)  # a clock may be too coarse to see it
            rows *= 4

    def agree(self, numbers):
        """Return the numbers of rank 0."""
        return all_reduce(numbers if self.env.master else [0.0] * len(numbers), self.env).tolist()

    def restart(self, step):
        self.since, self.since_step = self.spent(), step

    def evaluated(self, step, saver):
        """Count the time of an evaluation, which followed replan() or start(), and restart the clock of the steps."""
        if self.seconds:
            self.evaluation_seconds = self.spent() - self.since
            if saver.saved:
                self.writing_seconds = saver.written / saver.saved
            self.restart(step)

    def until_next_check(self, step):
        """Return the number of steps after which to look at the clock again: soon at the start and at the end."""
        max_iters = self.config['max_iters']
        return max(1, min(2 * self.n_timed, max_iters // 20, (max_iters - step) // 4))

    def replan(self, step):
        """Return schedule(), for other max_iters if the steps so far have taken other times than planned."""
        config = self.config
        evaluates = step % config['eval_interval'] == 0 or step >= config['max_iters']
        if not self.seconds or not (evaluates or step >= self.next_check):
            return self.schedule()
        torch.get_device_module(self.env.device_type).synchronize()  # does nothing on the CPU
        n = step - self.since_step
        spent, mean, self.evaluation_seconds, self.writing_seconds = self.agree(
            [self.spent(), (self.spent() - self.since) / n, self.evaluation_seconds, self.writing_seconds])
        weight = n / (n + min(self.n_timed, config['max_iters'] // 20))  # of these steps in the mean
        self.step_seconds += weight * (mean - self.step_seconds)
        self.n_timed += n
        self.restart(step)

        end = spent + self.ending_seconds() + duration(
            config['max_iters'] - step, step, self.step_seconds, self.evaluation_seconds, config['eval_interval'])
        before = config['max_iters']
        if not self.is_planned or abs(end - self.seconds) > TOLERANCE * self.seconds:
            self.set_steps(self.affordable_steps(step, spent))
        enough = self.n_timed >= TIMED_STEPS or self.n_timed * self.step_seconds > TIMED_SECONDS
        if not self.is_planned and (enough or step >= config['max_iters']):
            self.is_planned = True
            print(f'budget: {config["max_iters"]:,} steps of {self.step_seconds * 1000:.0f} ms, to end after '
                  f'{as_time(self.seconds)}; {as_time(spent)} are spent', flush=True)
        elif self.is_planned and config['max_iters'] != before:
            print(f'budget: now {config["max_iters"]:,} steps, as they take {self.step_seconds * 1000:.0f} ms',
                  flush=True)
        self.next_check = step + self.until_next_check(step)
        return self.schedule()

    def ending_seconds(self):
        """Return the seconds from the last step to the end: evaluations, the last checkpoint and weights.pt."""
        return self.evaluation_seconds + self.whole_seconds + 3 * self.writing_seconds + EXIT_SECONDS

    def affordable_steps(self, step, spent):
        """Return the steps of a run that has done `step` of them and spent so many seconds."""
        left = self.seconds - spent - self.ending_seconds()
        return step + steps_within(
            left, step, self.step_seconds, self.evaluation_seconds, self.config['eval_interval'])

    def set_steps(self, max_iters):
        """Let the run and its schedule have so many steps; until the plan is made, adapt the evaluations, too."""
        config = self.config
        config['max_iters'] = config['lr_decay_iters'] = max_iters
        if 'warmup_iters' not in self.given:
            config['warmup_iters'] = min(self.warmup_iters, int(WARM_UP_SHARE * max_iters))
        if 'eval_interval' not in self.given and not self.is_planned:
            # a little more, so that the last but one is not just before the end
            share = max_iters / (EVALUATIONS[config['auto']] - 0.5)
            config['eval_interval'] = max(1, min(self.eval_interval, math.ceil(share)))

    def finish(self, step):
        """With auto, after the last step: evaluate on the whole validation text, or as much as there is time for."""
        if self.whole_rows and step >= self.config['max_iters']:
            validation = dataclasses.replace(self.data, splits={'val': self.data.splits['val']})
            numbers = self.run(self.whole_rows, validation)
            rows = 'the whole' if self.whole_rows < 0 else f'{self.whole_rows:,} rows of the'
            print(f'on {rows} validation text, {describe_evaluation(step, numbers)}', flush=True)

    def state(self):
        """Return what a checkpoint must have, so that a resumed run has the rest of the minutes."""
        return {**{key: vars(self)[key] for key in SAVED}, 'spent_before': self.spent()} if self.seconds else {}
