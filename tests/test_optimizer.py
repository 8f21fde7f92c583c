"""Our AdamW against torch's: the same numbers, and each loads the other's state."""
import copy

import pytest
import torch

from core.optimizer import configure_optimizer
from model import GPT, GPTConfig


def twins():
    torch.manual_seed(0)
    models = [GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours = configure_optimizer(models[0], 'adamw', 0.1, 1e-2, (0.9, 0.99))
    torchs = torch.optim.AdamW([{'params': [p for p in models[1].parameters() if p.dim() >= 2], 'weight_decay': 0.1},
                                {'params': [p for p in models[1].parameters() if p.dim() < 2], 'weight_decay': 0.0}], lr=1e-2, betas=(0.9, 0.99), fused=True)
    return models, (ours, torchs)


def step(models, optimizers):
    idx = torch.randint(11, (4, 8))
    for model, optimizer in zip(models, optimizers):
        model(idx, idx).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def same(models):
    return all(torch.equal(a, b) for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values()))


def test_it_equals_torchs():
    models, optimizers = twins()
    before = models[0].lm_head.weight.clone()
    for _ in range(5):
        step(models, optimizers)
    assert same(models) and not torch.equal(before, models[0].lm_head.weight)


def test_each_loads_the_others_state():
    models, optimizers = twins()
    for _ in range(3):
        step(models, optimizers)
    fresh, (ours, torchs) = twins()
    for a, b in zip(fresh, models):
        a.load_state_dict(b.state_dict())
    ours.load_state_dict(optimizers[1].state_dict())  # torch shares the tensors that it loads: hence the copy
    torchs.load_state_dict({**copy.deepcopy(optimizers[0].state_dict()), 'param_groups': torchs.state_dict()['param_groups']})
    torch.manual_seed(1)
    step(fresh, (ours, torchs))
    torch.manual_seed(1)
    step(models, optimizers)
    assert same(fresh) and same(models) and same((fresh[0], models[0]))


def test_every_parameter_is_in_one_group():
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8, bias=True))
    groups = configure_optimizer(model, 'adamw', 0.1, 1e-3, (0.9, 0.95)).param_groups
    members = [id(p) for group in groups for p in group['params']]
    assert sorted(members) == sorted(id(p) for p in model.parameters())
    assert {p.dim() for p in groups[1]['params']} == {1}


def test_another_networks_state_is_refused():
    (_, other), (ours, _) = twins()
    small = configure_optimizer(GPT(GPTConfig(block_size=4, vocab_size=11, n_layer=1, n_head=2, n_embd=8)), 'adamw', 0.1, 1e-2, (0.9, 0.99))
    with pytest.raises(ValueError):
        ours.load_state_dict(small.state_dict())
