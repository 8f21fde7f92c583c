"""The optimizers: AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest."""
import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

from core.device import fast_bf16_cpu
from core.distributed import all_gather_like, shard_like, to_local

OPTIMIZERS = ('adamw', 'muon')


class Optimizer:
    """
    Groups of parameters, each with its rule: 'adamw' (Loshchilov & Hutter 2019: https://arxiv.org/abs/1711.05101), a group in one fused
    kernel where there is one, or 'muon', see muon(). Both compute what torch.optim's of that name do and the state dict has the same form,
    so nanoGPT's loads; but making one of those imports all of torch.compile: 1.7 s, more than the rest of the start.
    """

    def __init__(self, groups):
        self.param_groups = groups  # GradScaler knows this name
        self.params = [p for group in groups for p in group['params']]
        self.state = []  # of every parameter, in that order
        for group in groups:
            for p in group['params']:
                fused = p.device.type in ('cuda', 'cpu')
                self.state.append({'momentum_buffer': torch.zeros_like(p)} if group['rule'] == 'muon' else
                                  {'step': torch.tensor(0.0, device=p.device if fused else 'cpu'), 'exp_avg': torch.zeros_like(p), 'exp_avg_sq': torch.zeros_like(p)})

    @torch.no_grad()
    def step(self):
        start = 0
        for group in self.param_groups:
            params, states = group['params'], self.state[start:start + len(group['params'])]
            start += len(params)
            grads = [to_local(p.grad) for p in params]
            if group['rule'] == 'muon':
                muon(params, group['parts'], grads, [to_local(s['momentum_buffer']) for s in states], group['lr'], group['momentum'], group['weight_decay'])
            elif params:
                adamw([to_local(p) for p in params], grads, *([to_local(s[key]) for s in states] for key in ('exp_avg', 'exp_avg_sq')), [], [s['step'] for s in states],
                      foreach=False, fused=params[0].device.type in ('cuda', 'cpu'), amsgrad=False, maximize=False, lr=group['lr'],
                      beta1=group['betas'][0], beta2=group['betas'][1], weight_decay=group['weight_decay'], eps=1e-8)

    def zero_grad(self):
        for p in self.params:
            p.grad = None

    def state_dict(self):
        """{'state': {number of the parameter: its moments and step}, 'param_groups': settings, with numbers for parameters}, as torch's."""
        numbers = iter(range(len(self.params)))
        return {'state': dict(enumerate(self.state)),
                'param_groups': [{**group, 'params': [next(numbers) for _ in group['params']]} for group in self.param_groups]}

    def load_state_dict(self, state_dict):
        """Take over moments and step counts; learning rate, betas and decay stay this run's own. ValueError where they do not fit."""
        def form(state):
            return {key: tuple(value.shape) for key, value in state.items() if key != 'step'}
        saved = state_dict['state']
        if sum(len(group['params']) for group in state_dict['param_groups']) != len(self.params) or saved and [form(saved[i]) for i in sorted(saved)] != [form(s) for s in self.state]:
            raise ValueError('it has other parameters, or is of another kind')
        for i, state in enumerate(self.state if saved else []):  # torch's is empty before the first step
            for key, value in state.items():
                to_local(value).copy_(shard_like(torch.as_tensor(saved[i][key]), value))


def muon(params, parts, grads, buffers, lr, momentum, weight_decay):
    """
    One step of Muon (Jordan et al. 2024: https://kellerjordan.github.io/posts/muon) on matrices: Nesterov momentum, whose nearest
    orthogonal matrix is the update, so that every direction moves alike, and learning rates are good for any width. parts: of each matrix the rows of those that are
    stacked in it, which are updated each by itself. Equally shaped ones are computed in one batch; over several processes each computes
    its share of a batch and the results are gathered. Of a sharded matrix, gradients and buffers are the parts of this process; what it moves by is
    gathered, and the matrix itself left where it is.
    """
    torch._foreach_lerp_(buffers, grads, 1 - momentum)
    updates = torch._foreach_lerp(grads, buffers, momentum)
    batches = {}  # shape: matrices and what they move by
    moved = [p if p is to_local(p) else torch.zeros(p.shape, dtype=p.dtype, device=p.device) for p in params]
    for p, target, update, rows in zip(params, moved, updates, parts):
        for matrix, direction in zip(target.split(rows), all_gather_like(update, p).split(rows)):
            weights, directions = batches.setdefault(matrix.shape, ([], []))
            weights.append(matrix)
            directions.append(direction)
    torch._foreach_mul_([to_local(p) for p in params], 1 - lr * weight_decay)
    for shape, (weights, directions) in batches.items():
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        share = -(-len(weights) // world_size)
        if world_size == 1:
            directions = orthogonalize(torch.stack(directions))
        else:
            mine = directions[dist.get_rank() * share:(dist.get_rank() + 1) * share]
            mine = torch.stack(mine + [torch.zeros_like(directions[0])] * (share - len(mine)))  # the last processes may have fewer
            directions = mine.new_empty(world_size * share, *shape)
            gather = getattr(dist, 'all_gather_single', None) or dist.all_gather_into_tensor  # its name before torch 2.13
            gather(directions, orthogonalize(mine))
        torch._foreach_add_(weights, list(directions[:len(weights)]), alpha=-lr * max(1.0, shape[0] / shape[1]) ** 0.5)
    for p, target in zip(params, moved):
        if target is not p:
            to_local(p).add_(shard_like(target, p))


def orthogonalize(matrices, steps=5):
    """
    Matrices (K, m, n) -> about the orthogonal matrices nearest to them, by Newton-Schulz steps of the fifth order with the coefficients of
    Jordan et al.: singular values end between about 0.7 and 1.2, but for those below 0.0015 of the norm; in bf16 where the hardware multiplies it.
    """
    wide = matrices.size(1) <= matrices.size(2)
    x = matrices if wide else matrices.transpose(1, 2)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    if x.device.type != 'cpu' or fast_bf16_cpu():
        x = x.bfloat16()
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)  # (K, m, m)
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, gram, x, beta=3.4445)
    return (x if wide else x.transpose(1, 2)).to(matrices.dtype).contiguous()


def configure_optimizer(model, name, weight_decay, learning_rate, betas, muon_lr=0.0):
    """
    nanoGPT's two groups for AdamW: matrices and embeddings decay, biases and the gains of norms do not. With Muon the matrices of the
    blocks make a third, with a learning rate of its own. A group's 'lr_scale' is its learning rate relative to learning_rate.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    matrices = [(p, rows) for p, rows in model.matrices() if p.requires_grad] if name == 'muon' else []
    taken = {id(p) for p, _ in matrices}
    adamw_group = {'rule': 'adamw', 'lr': learning_rate, 'lr_scale': 1.0, 'betas': betas}
    groups = [{'params': [p for p in params if p.dim() >= 2 and id(p) not in taken], 'weight_decay': weight_decay, **adamw_group},
              {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0, **adamw_group}]
    if matrices:
        groups.append({'params': [p for p, _ in matrices], 'parts': [rows for _, rows in matrices], 'weight_decay': weight_decay,
                       'rule': 'muon', 'lr': muon_lr, 'lr_scale': muon_lr / (learning_rate or 1.0), 'momentum': 0.95})
    assert sorted(id(p) for group in groups for p in group['params']) == sorted(map(id, params)), 'the groups must hold every parameter once'
    return Optimizer(groups)
