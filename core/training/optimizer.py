"""The optimizers: AdamW for all parameters; or Muon or NorMuon for the matrices of the blocks, AdamW for the rest."""
import itertools
import math

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

from core.device import fast_bf16_cpu
from core.distributed import all_gather_like, shard_like, to_local

MUONS = ('muon', 'normuon')
OPTIMIZERS = ('adamw', *MUONS)


def step_unless(skip, opt):
    """
    opt.step(), unless skip, a bool tensor (), is True. Ours decides that on a GPU itself; for optimizers of others the
    host waits for it.
    """
    if isinstance(opt, Optimizer):
        opt.step(skip)
    elif not skip:
        opt.step()


def warm_up_momentum(opt, step):
    """Set Muon's momentum at this step, from 0.85 to 0.95: early gradients are soon out of date."""
    for group in opt.param_groups:
        if group.get('rule') in MUONS:
            group['momentum'] = 0.85 + 0.1 * min(1.0, step / 300)


def matrices_of(model):
    """
    Yield the weight matrices of the blocks, which Muon updates, as (parameter, row counts). The row counts are
    those of the matrices stacked in it: queries, keys and values; gate and up.
    """
    config = model.config
    n_query_rows, n_kv_rows = config.n_head * config.head_size, config.n_kv_head * config.head_size
    for block in model.transformer.h:
        yield block.attn.c_attn.weight, [n_query_rows, n_kv_rows, n_kv_rows]
        yield block.attn.c_proj.weight, [config.n_embd]
        yield block.mlp.c_fc.weight, [config.n_inner, config.n_inner] if block.mlp.gated else [config.n_inner]
        yield block.mlp.c_proj.weight, [config.n_embd]


def configure_optimizer(model, name, weight_decay, learning_rate, betas, muon_lr=0.0):
    """
    Return the optimizer of a model. AdamW has nanoGPT's two groups: matrices and embeddings decay, biases and the gains
    of norms do not. With 'muon' and 'normuon' the matrices of the blocks are a third group with its own learning rate.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    matrices, parts = [], []
    if name in MUONS:
        for p, row_counts in matrices_of(model):
            if p.requires_grad:
                matrices.append(p)
                parts.append(row_counts)
    muon_ids = {id(p) for p in matrices}
    decayed = [p for p in params if p.dim() >= 2 and id(p) not in muon_ids]
    not_decayed = [p for p in params if p.dim() < 2]

    # lr_scale: the learning rate relative to learning_rate, for train.py's schedule
    adamw_settings = {'rule': 'adamw', 'lr': learning_rate, 'lr_scale': 1.0, 'betas': betas}
    groups = [
        {'params': decayed, 'weight_decay': weight_decay, **adamw_settings},
        {'params': not_decayed, 'weight_decay': 0.0, **adamw_settings},
    ]
    if matrices:
        lr_scale = muon_lr / (learning_rate or 1.0)
        muon_settings = {'rule': name, 'lr': muon_lr, 'lr_scale': lr_scale, 'momentum': 0.95}
        groups.append({'params': matrices, 'parts': parts, 'weight_decay': weight_decay, **muon_settings})
    grouped_ids = [id(p) for group in groups for p in group['params']]
    assert sorted(grouped_ids) == sorted(map(id, params)), 'the groups must hold every parameter once'
    return Optimizer(groups)


class Optimizer:
    """
    Parameter groups, each updated by its rule:

    - 'adamw' (Loshchilov & Hutter 2019: https://arxiv.org/abs/1711.05101), in one fused kernel on CPUs, CUDA and MPS
    - 'muon', 'normuon': see muon(). 'parts' are the row counts of the matrices stacked in each parameter.

    The first two compute what torch.optim's classes do, and the state dict has the same form, so nanoGPT's loads. Those
    classes are not used because making one imports all of torch.compile: 1.7 s, more than the rest of the start.
    """

    def __init__(self, groups):
        self.param_groups = groups  # GradScaler reads this attribute
        self.params = [p for group in groups for p in group['params']]
        self.state = []  # of each parameter, in the same order
        for group in groups:
            new_state = {'adamw': adamw_state, 'muon': muon_state, 'normuon': normuon_state}[group['rule']]
            self.state += [new_state(p) for p in group['params']]

    @torch.no_grad()
    def step(self, skip=None):
        """
        Update the parameters. skip: a bool tensor (); nothing changes, step counts included, if it is True. On CUDA the
        host does not wait to know it. None: False.
        """
        if skip is not None and not skip.is_cuda:
            if skip:
                return
            skip = None
        start = 0
        for group in self.param_groups:
            end = start + len(group['params'])
            states = self.state[start:end]
            start = end
            if group['rule'] in MUONS:
                muon_step(group, states, skip)
            elif states:
                adamw_step(group, states, skip)

    def zero_grad(self):
        for p in self.params:
            p.grad = None

    def state_dict(self):
        """
        Return {'state': {number of a parameter: its moments and step}, 'param_groups': settings}, in torch's form: the
        groups contain the numbers of their parameters.
        """
        numbers = itertools.count()
        groups = [{**group, 'params': [next(numbers) for _ in group['params']]} for group in self.param_groups]
        return {'state': dict(enumerate(self.state)), 'param_groups': groups}

    def load_state_dict(self, state_dict):
        """
        Load moments and step counts. Learning rates, betas and weight decay stay this run's. Raise ValueError if the
        state belongs to other parameters or another optimizer.
        """
        saved = [state for _, state in sorted(state_dict['state'].items())]  # torch's is empty before the first step
        n_params = sum(len(group['params']) for group in state_dict['param_groups'])
        fits = n_params == len(self.params)
        if fits and saved:
            fits = list(map(shapes_of, saved)) == list(map(shapes_of, self.state))
        if not fits:
            raise ValueError('it has other parameters, or is of another kind')
        for state, saved_state in zip(self.state, saved):
            for key, value in state.items():
                to_local(value).copy_(shard_like(torch.as_tensor(saved_state[key]), value))


def shapes_of(state):
    """Return the shapes of a parameter's moments, {name: shape}."""
    return {key: tuple(value.shape) for key, value in state.items() if key != 'step'}

# --- AdamW


def adamw_state(p):
    step_device = p.device if has_fused_adamw(p) else 'cpu'
    return {
        'step': torch.tensor(0.0, device=step_device),
        'exp_avg': torch.zeros_like(p),
        'exp_avg_sq': torch.zeros_like(p),
    }


def has_fused_adamw(p):
    return p.device.type in ('cuda', 'cpu', 'mps')


def adamw_step(group, states, skip):
    """Update the parameters of a group, on each rank its shards. skip: see Optimizer.step(), or None."""
    params = group['params']
    beta1, beta2 = group['betas']
    adamw(
        [to_local(p) for p in params],
        [to_local(p.grad) for p in params],
        [to_local(state['exp_avg']) for state in states],
        [to_local(state['exp_avg_sq']) for state in states],
        [],  # for AMSGrad
        [state['step'] for state in states],
        foreach=False,
        fused=has_fused_adamw(params[0]),
        amsgrad=False,
        maximize=False,
        lr=group['lr'],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group['weight_decay'],
        eps=1e-8,
        found_inf=None if skip is None else skip.float(),  # the kernel changes nothing if it is 1
    )

# --- Muon and NorMuon

JORDAN = [(3.4445, -4.7750, 2.0315)] * 5  # singular values become 0.7 to 1.2, those below 0.0015 of the norm less
# The first steps of Polar Express (Amsel et al. 2025: https://arxiv.org/abs/2505.16932). Those above 0.01 of the norm
# become 0.2 to 1.9. NorMuon needs no more, and learned better with them than with JORDAN (docs/LOG.md).
POLAR_EXPRESS = [
    (8.287212, -23.595887, 17.300387), (4.107059, -2.947850, 0.544843), (3.948691, -2.908902, 0.551819)]
ROW_BETA = 0.95  # of NorMuon's averages


def muon_state(p):
    return {'momentum_buffer': torch.zeros_like(p)}


def normuon_state(p):
    rows = torch.zeros(len(p), 1, dtype=p.dtype, device=p.device)  # under FSDP, too, each rank has all of them
    return {'momentum_buffer': torch.zeros_like(p), 'row_squares': rows}


def muon_step(group, states, skip):
    params = group['params']
    grads = [to_local(p.grad) for p in params]
    buffers = [to_local(state['momentum_buffer']) for state in states]
    squares = [state['row_squares'] for state in states] if group['rule'] == 'normuon' else None
    muon(params, group['parts'], grads, buffers, group['lr'], group['momentum'], group['weight_decay'], skip, squares)


def muon(params, parts, grads, buffers, lr, momentum, weight_decay, skip=None, row_squares=None):
    """
    Update matrices by one step of Muon (Jordan et al. 2024: https://kellerjordan.github.io/posts/muon). The update is
    the orthogonal matrix nearest to the Nesterov momentum, so every direction moves by the same amount, and one
    learning rate suits any width.

    parts: for each parameter the row counts of the matrices stacked in it. Each of these is updated separately.
    grads, buffers: under FSDP this rank's shards. Momenta are gathered to be orthogonalised, and each rank adds its
        part of the update to its shard.
    skip: a bool tensor () on the device: nothing may change if it is True. None: False.
    row_squares: one (rows, 1) for each parameter makes it NorMuon, see normalize_rows().
    """
    if skip is not None:
        grads = [torch.where(skip, buffer, grad) for grad, buffer in zip(grads, buffers)]  # then lerp changes nothing
    torch._foreach_lerp_(buffers, grads, 1 - momentum)
    momenta = torch._foreach_lerp(grads, buffers, momentum)
    # The updates are added to the parameter itself or, if it is sharded, to a full matrix of zeros.
    targets = [p if to_local(p) is p else torch.zeros(p.shape, dtype=p.dtype, device=p.device) for p in params]
    batches = {}  # shape: (matrices to update, their momenta, squares). Equal shapes are orthogonalised in one batch.
    for i, (p, target, row_counts) in enumerate(zip(params, targets, parts)):
        stacked = [target, all_gather_like(momenta[i], p), *(row_squares[i:i + 1] if row_squares else ())]
        for of_matrix in zip(*(x.split(row_counts) for x in stacked)):
            batch = batches.setdefault(of_matrix[0].shape, [[] for _ in stacked])
            for column, x in zip(batch, of_matrix):
                column.append(x)

    decay = 1 - lr * weight_decay
    torch._foreach_mul_([to_local(p) for p in params], decay if skip is None else torch.where(skip, 1.0, decay))
    for (n_rows, n_columns), (matrices, matrix_momenta, *squares) in batches.items():
        scale = max(1.0, n_rows / n_columns) ** 0.5
        updates = orthogonalize_list(matrix_momenta, POLAR_EXPRESS if squares else JORDAN)
        if squares:
            updates = normalize_rows(updates, *squares, skip)
        if skip is not None:
            torch._foreach_mul_(updates, (~skip).float())
        torch._foreach_add_(matrices, updates, alpha=-lr * scale)
    for p, target in zip(params, targets):
        if target is not p:
            to_local(p).add_(shard_like(target, p))


def normalize_rows(updates, row_squares, skip=None):
    """
    Return the updates (m, n) with each row (neuron) divided by the root of a moving average of its squares, and with
    the norm that the update had: NorMuon (Li et al. 2025: https://arxiv.org/abs/2510.05491). Changes row_squares (m, 1)
    of each, the averages, unless skip.
    """
    stacked = torch.stack(updates)  # (K, m, n)
    squares = stacked.square().mean(dim=2, keepdim=True)
    weight = 1 - ROW_BETA if skip is None else torch.where(skip, 0.0, 1 - ROW_BETA)
    average = torch.stack(row_squares).lerp(squares, weight)
    for kept, new in zip(row_squares, average):
        kept.copy_(new)
    scaled = stacked / (average.sqrt() + 1e-8)
    norm, scaled_norm = (x.norm(dim=(1, 2), keepdim=True) for x in (stacked, scaled))
    return list(scaled * (norm / scaled_norm.clamp(min=1e-8)))


def orthogonalize_list(matrices, steps):
    """Orthogonalise matrices of one shape. Each rank computes a share of them, and the results are gathered."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size == 1:
        return list(orthogonalize(torch.stack(matrices), steps).to(matrices[0].dtype))
    share = math.ceil(len(matrices) / world_size)
    first = dist.get_rank() * share
    mine = matrices[first:first + share]
    padding = [torch.zeros_like(matrices[0])] * (share - len(mine))  # the last ranks may have fewer
    mine = orthogonalize(torch.stack(mine + padding), steps)
    gathered = mine.new_empty(world_size * share, *mine.shape[1:])  # in bf16 it is half as much to send
    # all_gather_into_tensor is the name before PyTorch 2.13
    all_gather = getattr(dist, 'all_gather_single', None) or dist.all_gather_into_tensor
    all_gather(gathered, mine)
    return list(gathered[:len(matrices)].to(matrices[0].dtype))


def orthogonalize(matrices, steps=JORDAN):
    """
    Return approximately the orthogonal matrices nearest to matrices (K, m, n), as bf16 if the hardware is fast at it.
    steps: the coefficients of Newton-Schulz steps of fifth order, JORDAN or POLAR_EXPRESS.
    """
    wide = matrices.size(1) <= matrices.size(2)
    x = matrices if wide else matrices.transpose(1, 2)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    if x.device.type != 'cpu' or fast_bf16_cpu():
        x = x.bfloat16()
    for a, b, c in steps:
        gram = x @ x.transpose(1, 2)  # (K, m, m)
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    x = x if wide else x.transpose(1, 2)
    return x.contiguous()
