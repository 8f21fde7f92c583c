"""Logging to out_dir/log.csv, and to wandb and TensorBoard if asked; detection of loss spikes."""
import csv
import math
import os
import sys
import threading

from core.files import atomic


class Log:
    """
    Writes log.csv, one row a step or evaluation. A resumed run keeps the rows before step `start` and drops the others.
    measures: names of what evaluation reports, e.g. ('loss', 'bpb'). Other numbers may be logged, too.
    """

    def __init__(self, out_dir, measures, start, config, run_id):
        self.path = os.path.join(out_dir, 'log.csv')
        self.columns = ['iter', 'loss', 'lr', 'grad_norm', 'ms', 'tokens_per_s', 'mfu']
        evaluated = ('train', 'val', 'val_ema') if config['ema'] else ('train', 'val')
        self.columns += [f'{key}_{name}' for name in measures for key in evaluated]
        self.file = None
        self.lock = threading.Lock()  # the checkpoint writer calls sync() in its thread
        self.wandb = None
        self.tensorboard = None
        self.rewrite([row for row in self.read() if int(row['iter']) < start] if start > 0 else [])
        if config['wandb_log']:
            self.wandb = start_wandb(config, out_dir, run_id)
        if config['tensorboard_log']:
            from torch.utils.tensorboard import SummaryWriter
            self.tensorboard = SummaryWriter(os.path.join(out_dir, 'tensorboard'), purge_step=start)

    def read(self):
        """Return the rows of the file, [{column: text}]."""
        if not os.path.exists(self.path):
            return []
        with open(self.path, encoding='utf-8', newline='') as f:
            return [row for row in csv.DictReader(f, restval='') if row.get('iter', '').isdigit()]

    def rewrite(self, rows):
        """Write the file anew, with these rows and columns for all that is in them. Exits if it cannot be written."""
        names = [name for row in rows[:1] for name in row if name]
        self.columns += [name for name in names if name not in self.columns]
        try:
            with self.lock:
                with atomic(self.path, 'w', newline='') as f:
                    writer = csv.DictWriter(f, self.columns, extrasaction='ignore')
                    writer.writeheader()
                    writer.writerows(rows)
                if self.file:
                    self.file.close()
                self.file = open(self.path, 'a', encoding='utf-8', newline='')
        except OSError as error:
            sys.exit(f'{self.path}: cannot be written: {error.strerror}')
        self.writer = csv.DictWriter(self.file, self.columns)

    def __call__(self, step, numbers):
        """Write the numbers of one step, {column: number}. A name that is new becomes a new column."""
        new_columns = [name for name in numbers if name not in self.columns]
        if new_columns:
            self.columns += new_columns
            self.rewrite(self.read())
        try:
            row = {key: f'{value:.8g}' for key, value in numbers.items()}
            self.writer.writerow({'iter': step, **row})
            self.file.flush()
        except OSError as error:
            sys.exit(f'{self.path}: cannot be written: {error.strerror}')
        if self.wandb:
            self.wandb.log({'iter': step, **numbers}, step=step)  # wandb drops steps that it already has
        if self.tensorboard:
            for key, value in numbers.items():
                self.tensorboard.add_scalar(key, value, step)

    def sync(self):
        with self.lock:
            os.fsync(self.file.fileno())

    def close(self):
        self.file.close()
        if self.wandb:
            self.wandb.finish()
        if self.tensorboard:
            self.tensorboard.close()


def read_columns(path, lines):
    """
    Return the numbers of a log.csv, given its lines, as {column: [(step, number), ...]}. Raises ValueError, with a
    message that begins with the path, if a line is damaged.
    """
    reader = csv.DictReader(lines)
    columns = {}
    try:
        for row in reader:
            for name, value in row.items():
                column = columns.setdefault(name, [])
                if value and name != 'iter':
                    column.append((int(row['iter']), float(value)))
    except (ValueError, TypeError, csv.Error) as error:  # text, a row that is too long, a zero byte
        expected = ', '.join(reader.fieldnames)
        raise ValueError(f'{path}: line {reader.line_num} is damaged: expected the numbers of {expected}') from error
    return columns


def start_wandb(config, out_dir, run_id):
    """Start or resume a wandb run. It is offline if nobody is logged in, so it never prompts."""
    import wandb
    mode = os.environ.get('WANDB_MODE')
    if not mode and not wandb.api.api_key:
        mode = 'offline'
        print('wandb: not logged in, so this run is logged offline; '
              '`wandb login` first, or `wandb sync` the folder later')
    return wandb.init(project=config['wandb_project'], name=config['wandb_run_name'], config=config, dir=out_dir,
                      mode=mode, id=run_id, resume='allow')


def spike_detector(sigmas=6, patience=50):
    """
    Return a function that takes the loss of every step. It returns the mean loss before a jump of more than `sigmas`
    standard deviations, else None; of consecutive jumps it reports the first. Mean and deviation are moving averages
    over about `patience` steps.
    """
    count = 0
    mean = 0.0
    variance = 0.0
    high = False

    def spike(loss):
        nonlocal count, mean, variance, high
        if not math.isfinite(loss):
            return None  # the training loop handles it
        mean_before = mean
        was_high = high
        limit = sigmas * variance**0.5
        high = count >= patience and loss > mean + max(limit, 0.1)
        difference = loss - mean
        if high:  # one outlier must not raise the averages much
            difference = min(difference, limit)
        count += 1
        weight = max(1 / patience, 1 / count)
        mean += difference * weight
        if count > 1:
            variance += (difference**2 - variance) * weight
        return mean_before if high and not was_high else None
    return spike
