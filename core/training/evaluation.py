"""Evaluation during training."""
import torch

from core.device import to_device
from core.distributed import all_reduce
from core.training.pipeline import pin
from core.training.progress import show_progress

EVAL_LOGITS = 2**18  # logits per rank and batch: small models evaluate many rows at once


@torch.no_grad()
def evaluate(objective_module, model, average, data, context, n_rows, micro_rows, block_size, env):
    """
    Return {'train_loss': ..., 'val_loss': ..., 'train_bpb': ...} on fixed rows, divided among the ranks.
    Uses no random state.
    average: with averaged weights in it, these are evaluated on the validation split, as 'val_ema_loss' and so on.
    n_rows: rows per split; -1: all rows of the validation split, and as many of the training split.
    """
    model.eval()
    splits = [split for split, length in data.splits.items() if length > 1]  # a folder may have no validation tokens
    if n_rows < 0 and 'val' in splits:
        n_rows = len(objective_module.fixed(data, 'val', -1, block_size))
    at_once = max(micro_rows, EVAL_LOGITS // (block_size * model.config.vocab_size)) * env.world_size

    def measure(split):
        """Return [(sum, divisor)] of the measures."""
        starts = objective_module.fixed(data, split, n_rows, block_size)
        found = []  # sum and divisor of each measure (measures, 2), of every batch; read at the end, so no batch waits
        for i in show_progress(range(0, len(starts), at_once), f'evaluation, {split}'):
            mine = starts[i + env.rank:i + at_once:env.world_size]
            # a rank without rows still runs a forward pass: FSDP's collectives need every rank
            batch = objective_module.load(data, split, mine if len(mine) else starts[:1], block_size, context)
            with env.ctx():
                numbers = objective_module.measure(model, to_device(pin(batch, env), env), data, context)
            if len(mine):
                found.append(numbers)
        n_measures = len(objective_module.MEASURES)
        sums = torch.stack(found).cpu().double().sum(dim=0) if found else torch.zeros(n_measures, 2)
        return all_reduce(sums, env).tolist()

    results = {split: measure(split) for split in splits}
    if average.pairs and 'val' in splits:
        with average.in_model():
            results['val_ema'] = measure('val')
    model.train()

    losses = {}
    for i, name in enumerate(objective_module.MEASURES):
        for split, sums in results.items():
            total, divisor = sums[i]
            if divisor:
                losses[f'{split}_{name}'] = total / divisor
    return losses
