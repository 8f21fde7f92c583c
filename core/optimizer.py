"""The optimizer."""
import torch
from torch.optim.adamw import adamw


class AdamW:
    """
    AdamW (Loshchilov & Hutter 2019: https://arxiv.org/abs/1711.05101) over groups of parameters, a group in one fused kernel where there is
    one. It computes what torch.optim.AdamW does and its state dict has the same form, so nanoGPT's loads; but making one of those imports
    all of torch.compile: 1.7 s, more than the rest of the start.
    """

    def __init__(self, groups, lr, betas, eps=1e-8):
        self.param_groups = [{'lr': lr, 'betas': betas, 'eps': eps, **group} for group in groups]  # GradScaler knows this name
        self.params = [p for group in self.param_groups for p in group['params']]
        self.fused = self.params[0].device.type in ('cuda', 'cpu')
        self.state = [{'step': torch.tensor(0.0, device=p.device if self.fused else 'cpu'), 'exp_avg': torch.zeros_like(p), 'exp_avg_sq': torch.zeros_like(p)}
                      for p in self.params]

    @torch.no_grad()
    def step(self):
        start = 0
        for group in self.param_groups:
            states = self.state[start:start + len(group['params'])]
            start += len(group['params'])
            adamw(group['params'], [p.grad for p in group['params']], [s['exp_avg'] for s in states], [s['exp_avg_sq'] for s in states], [],
                  [s['step'] for s in states], foreach=False, fused=self.fused, amsgrad=False, maximize=False, lr=group['lr'],
                  beta1=group['betas'][0], beta2=group['betas'][1], weight_decay=group['weight_decay'], eps=group['eps'])

    def zero_grad(self):
        for p in self.params:
            p.grad = None

    def state_dict(self):
        """{'state': {number of the parameter: its moments and step}, 'param_groups': settings, with numbers for parameters}, as torch's."""
        numbers = iter(range(len(self.params)))
        return {'state': dict(enumerate(self.state)),
                'param_groups': [{**group, 'params': [next(numbers) for _ in group['params']]} for group in self.param_groups]}

    def load_state_dict(self, state_dict):
        """Take over moments and step counts; learning rate, betas and decay stay this run's own. ValueError where shapes do not fit."""
        saved = state_dict['state']
        if sum(len(group['params']) for group in state_dict['param_groups']) != len(self.params) or saved and [tuple(saved[i]['exp_avg'].shape) for i in sorted(saved)] != [tuple(p.shape) for p in self.params]:
            raise ValueError('it has other parameters')
        for i, state in enumerate(self.state if saved else []):  # torch's is empty before the first step
            for key, value in state.items():
                value.copy_(torch.as_tensor(saved[i][key]))


def configure_optimizer(model, weight_decay, learning_rate, betas):
    """nanoGPT's two groups: matrices and embeddings decay, biases and the gains of norms do not."""
    params = [p for p in model.parameters() if p.requires_grad]
    return AdamW([{'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
                  {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}], learning_rate, betas)
