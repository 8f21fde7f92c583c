"""Our AdamW and Muon against torch's: the same numbers, and each loads the other's state."""
import copy

import pytest
import torch

from core.training import optimizer as optimizer_file
from core.training.optimizer import OPTIMIZERS, Optimizer, configure_optimizer, orthogonalize
from model import GPT, GPTConfig

STYLES = {'gpt2': dict(bias=True), 'qwen3': dict(bias=False, activation='swiglu', norm='rmsnorm', rope_theta=1e4, qk_norm=True, tied=False, n_kv_head=1)}


def network(style):
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8, **STYLES[style]))


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


@pytest.mark.parametrize('style', STYLES)
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_every_parameter_is_in_one_group(style, name):
    model = network(style)
    groups = configure_optimizer(model, name, 0.1, 1e-3, (0.9, 0.95), 0.02).param_groups
    members = [id(p) for group in groups for p in group['params']]
    assert sorted(members) == sorted(id(p) for p in model.parameters())
    assert {p.dim() for p in groups[1]['params']} == {1} and groups[1]['weight_decay'] == 0.0 < groups[0]['weight_decay']
    matrices = [p for key, p in model.named_parameters() if '.h.' in key and p.dim() == 2] if name == 'muon' else []
    assert {id(p) for group in groups[2:] for p in group['params']} == {id(p) for p in matrices}


def test_a_parameter_named_twice_is_noticed(monkeypatch):
    model = network('qwen3')
    matrices = list(model.matrices())
    monkeypatch.setattr(model, 'matrices', lambda: matrices + matrices[:1])
    with pytest.raises(AssertionError, match='every parameter once'):
        configure_optimizer(model, 'muon', 0.1, 1e-3, (0.9, 0.95), 0.02)


def test_another_networks_state_is_refused():
    (_, other), (ours, _) = twins()
    small = configure_optimizer(GPT(GPTConfig(block_size=4, vocab_size=11, n_layer=1, n_head=2, n_embd=8)), 'adamw', 0.1, 1e-2, (0.9, 0.99))
    with pytest.raises(ValueError):
        ours.load_state_dict(small.state_dict())


def muon(params, parts=None):
    """Our Muon of these matrices, parts[i] the rows of those that are stacked in the i-th."""
    return Optimizer([{'params': params, 'parts': parts or [[len(p)] for p in params], 'rule': 'muon', 'lr': 0.02, 'momentum': 0.95, 'weight_decay': 0.1}])


def moved(params, make, steps=5):
    """What five steps of random gradients change in these matrices, of which make(copies) makes the optimizer."""
    copies = [p.clone().requires_grad_() for p in params]
    opt = make(copies)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in copies:
            p.grad = torch.randn(p.shape, generator=generator)
        opt.step()
    return [b.detach() - a for a, b in zip(params, copies)]


@pytest.fixture(params=[False, True], ids=['fp32', 'bf16'])
def precision(request, monkeypatch):
    """In which the updates of a CPU are computed, whatever this one has."""
    monkeypatch.setattr(optimizer_file, 'fast_bf16_cpu', lambda: request.param)
    return torch.bfloat16 if request.param else torch.float32


@pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='torch has it from 2.9 on')
def test_muon_equals_torchs(precision):
    """Square, tall and wide; torch computes the update in bf16 and rounds it first: hence the tolerance."""
    params = [torch.randn(shape) for shape in ((24, 24), (24, 24), (48, 24), (24, 72), (24, 24), (1, 24))]
    torchs = moved(params, lambda copies: torch.optim.Muon(copies, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True))
    for a, b in zip(moved(params, muon), torchs):
        assert (a - b).norm() < 0.02 * b.norm()


def test_stacked_matrices_equal_the_same_apart(precision):
    apart = [torch.randn(rows, 24) for rows in (32, 16, 16, 24)]
    generator = torch.Generator().manual_seed(1)
    grads = [[torch.randn(p.shape, generator=generator) for p in apart] for _ in range(3)]
    stacked = [torch.cat(apart[:3]).requires_grad_(), apart[3].clone().requires_grad_()]
    apart = [p.clone().requires_grad_() for p in apart]
    ours, theirs = muon(stacked, [[32, 16, 16], [24]]), muon(apart)
    for step_grads in grads:
        for p, g in zip(apart, step_grads):
            p.grad = g.clone()
        stacked[0].grad, stacked[1].grad = torch.cat(step_grads[:3]), step_grads[3].clone()
        ours.step()
        theirs.step()
    assert torch.equal(stacked[0], torch.cat(apart[:3])) and torch.equal(stacked[1], apart[3])


@pytest.mark.parametrize('shape', [(3, 16, 48), (3, 48, 16), (1, 64, 24)], ids=str)
def test_orthogonalize(shape, precision):
    """Against the singular value decomposition U S V: S becomes about 1, U and V stay."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 1e-3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    s = u.mT @ orthogonalize(matrices) @ v.mT
    diagonal = s.diagonal(dim1=1, dim2=2)
    assert diagonal.min() > 0.6 and diagonal.max() < 1.3
    error = (s - diagonal.diag_embed()).abs().max()
    assert error < 1e-5 if precision == torch.float32 else 1e-3 < error < 0.03
    assert torch.equal(orthogonalize(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize('style', STYLES)
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_state_dict_round_trip(style, name, tmp_path):
    """Through a file: the copy goes on as the first does."""
    models = [network(style), network(style)]
    opts = [configure_optimizer(model, name, 0.1, 1e-2, (0.9, 0.99), 0.02) for model in models]
    torch.manual_seed(1)
    for _ in range(3):
        step(models[:1], opts[:1])
    torch.save(opts[0].state_dict(), tmp_path / 'state.pt')
    models[1].load_state_dict(models[0].state_dict())
    opts[1].load_state_dict(torch.load(tmp_path / 'state.pt', weights_only=True))
    step(models, opts)
    step(models, opts)
    assert same(models) and not torch.equal(models[0].lm_head.weight, network(style).lm_head.weight)


@pytest.mark.parametrize('style', STYLES)
@pytest.mark.parametrize('name, other', [OPTIMIZERS, OPTIMIZERS[::-1]])
def test_another_optimizers_state_is_refused(style, name, other):
    opts = [configure_optimizer(network(style), kind, 0.1, 1e-2, (0.9, 0.99), 0.02) for kind in (name, other)]
    with pytest.raises(ValueError):
        opts[0].load_state_dict(opts[1].state_dict())
