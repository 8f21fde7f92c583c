"""
What a training step minimises: one file per objective, chosen by --objective=<name of the file>.

An objective is a module with the eight functions below and MEASURES. train.py knows nothing else about
it, so accumulation, precision, DDP, clipping, schedule, logging, checkpoints and resume are the same
for all objectives. Names that the module imports count too: an objective can import any of the eight
from another one.

    start(model, data, env, config, saved)
        Called once, before DDP or FSDP wraps the model. It checks the dataset and the settings (and
        exits with one line if they do not fit), loads other models, and may change `model`, e.g. its
        head. `env` is what core.device.setup() returns, `config` has the settings of train.py by name,
        `saved` is what state() returned for the checkpoint being resumed, else {}. The return value is
        passed to load, measure and state as `context`.
    draw(data, rows, block_size, seed, step, order)
        The rows of a step's batch, as an array (rows,) or (rows, n) of numbers that load() understands.
        It depends on nothing but its arguments, so every rank draws the same batch and a resumed run
        draws the batches of an uninterrupted one.
    fixed(data, split, rows, block_size)
        The rows of a split to evaluate on: `rows` of them, evenly spaced; all if rows is negative. The
        same at every evaluation.
    load(data, split, rows, block_size, context)
        The batch of some of these rows: a tuple of CPU tensors. batch[0] are the tokens X (rows, T),
        batch[1] the targets Y (rows, T), -1 where the loss does not count. What else a batch has is up
        to the objective. Beside a GPU it is called in a thread, while the step before is computed; if it needs the
        model as it is at that step (grpo generates text with it), say load.ahead = False below the function, or in
        start() if it depends on a setting.
    divisor(batch)
        How many things (tokens, pairs) the loss of this batch is averaged over.
    loss(model, batch)
        The sum of their losses, to be differentiated. train.py divides it by the divisors of the whole
        step, added over micro-batches and ranks. `model` may be compiled or wrapped by DDP: call it, do
        not use its methods. If it calls it without targets, for logits, say loss.logits = True below the function:
        that call is then compiled. It gets no context: other networks that it needs are in a global of the module,
        which start() sets.
    measure(model, batch, data, context)
        The sum and the divisor of each of MEASURES, a tensor (len(MEASURES), 2); evaluation adds them
        up over all batches.
    state(context)
        What a checkpoint must hold so that start() can restore the context: a dict of plain values and
        CPU tensors. Every rank calls it.

    MEASURES
        The names of what measure() returns. The first is 'loss', by which best.pt is chosen.
    settings
        Every public global that is a bool, int, float or str, such as `beta = 0.1  # what it does`, is
        a setting of train.py when this objective is chosen. The functions of the module read it by name.

The smallest objective takes everything but its loss from another one. Saved as objectives/focal.py, this
one trains by `python train.py config/train_shakespeare_char_cpu.py --objective=focal --gamma=1.5`:

    '''Next-token prediction with a focal loss (https://arxiv.org/abs/1708.02002): easy tokens count less.'''
    import torch

    from objectives.next_token import MEASURES, divisor, draw, fixed, load, measure, start, state  # noqa: F401

    gamma = 2.0  # a token of probability p counts (1 - p)**gamma times; at least 1


    def loss(model, batch):
        losses = model(*batch)  # (B, T), 0 where there is no target
        return ((1 - torch.exp(-losses))**gamma * losses).sum()
"""
import numpy as np


def evenly_spaced(count, n):
    """Return n evenly spaced indices of range(count); all of them if n is negative or not below count."""
    if n < 0 or n >= count:
        return np.arange(count)
    return np.linspace(0, count - 1, n).astype(np.int64)
