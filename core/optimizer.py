"""The optimizer."""
import torch


def configure_optimizer(model, weight_decay, learning_rate, betas):
    """AdamW in nanoGPT's two groups: matrices and embeddings decay, biases and norm gains do not. One fused kernel where there is one."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
              {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=params[0].device.type in ('cuda', 'cpu'))


def load_optimizer(optimizer, state):
    """Load moments and step counts from a state dict (nanoGPT's too) but keep this run's own settings, as torch's loading would not."""
    own = [{key: value for key, value in group.items() if key != 'params'} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, own):
        group.update(settings)
