"""Where the numbers of a run go: log.csv in out_dir, and wandb and TensorBoard if asked."""
import csv
import math
import os
import sys

from core.files import atomic


class Log:
    """log.csv with these columns (the first is the step), continued from step `start` on: rows of a run's lost steps are dropped."""

    def __init__(self, out_dir, columns, start, config, run_id):
        self.columns, self.wandb, self.tensorboard = columns, None, None
        path, kept = os.path.join(out_dir, 'log.csv'), []
        if start > 0 and os.path.exists(path):
            with open(path, encoding='utf-8', newline='') as f:
                kept = [row for row in csv.DictReader(f, restval='') if row[columns[0]].isdigit() and int(row[columns[0]]) < start]
        try:
            with atomic(path, 'w', newline='') as f:
                writer = csv.DictWriter(f, columns, extrasaction='ignore')
                writer.writeheader()
                writer.writerows(kept)
            self.file = open(path, 'a', encoding='utf-8', newline='')
        except OSError as error:
            sys.exit(f'{path}: cannot be written: {error.strerror}')
        self.writer = csv.DictWriter(self.file, columns)
        if config['wandb_log']:
            self.wandb = start_wandb(config, out_dir, run_id)
        if config['tensorboard_log']:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                sys.exit('tensorboard_log=True needs tensorboard: pip install tensorboard')
            self.tensorboard = SummaryWriter(os.path.join(out_dir, 'tensorboard'), purge_step=start)

    def __call__(self, step, numbers):
        """Write {name: number} of one step; names as in `columns`."""
        try:
            self.writer.writerow({self.columns[0]: step, **{key: f'{value:.8g}' for key, value in numbers.items()}})
            self.file.flush()
        except OSError as error:
            sys.exit(f'{self.file.name}: cannot be written: {error.strerror}')
        if self.wandb:
            self.wandb.log({self.columns[0]: step, **numbers}, step=step)  # which drops the steps that it has already
        if self.tensorboard:
            for key, value in numbers.items():
                self.tensorboard.add_scalar(key, value, step)

    def sync(self):
        os.fsync(self.file.fileno())

    def close(self):
        self.file.close()
        if self.wandb:
            self.wandb.finish()
        if self.tensorboard:
            self.tensorboard.close()


def start_wandb(config, out_dir, run_id):
    """A wandb run, the same one when it is resumed; offline, never prompting, where nobody is logged in."""
    try:
        import wandb
    except ImportError:
        sys.exit('wandb_log=True needs wandb: pip install wandb, or --wandb_log=False')
    mode = os.environ.get('WANDB_MODE')
    if not mode and not wandb.api.api_key:
        mode = 'offline'
        print('wandb: not logged in, so this run is logged offline; `wandb login` first, or `wandb sync` the folder later')
    return wandb.init(project=config['wandb_project'], name=config['wandb_run_name'], config=config, dir=out_dir, mode=mode, id=run_id, resume='allow')


def spike_detector(sigmas=6, patience=50):
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
