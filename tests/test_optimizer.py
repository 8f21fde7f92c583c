"""Our AdamW and Muon against torch's: the same numbers, and each loads the other's state."""
import copy
import itertools
from types import SimpleNamespace

import pytest
import torch

from core.training import optimizer as optimizer_file
from core.training.optimizer import (
    OPTIMIZERS,
    POLAR_EXPRESS,
    Optimizer,
    configure_optimizer,
    matrices_of,
    orthogonalize,
)
from model import GPT, GPTConfig

SHAPE = {'block_size': 8, 'vocab_size': 11, 'n_layer': 1, 'n_head': 2, 'n_embd': 8}
STYLES = {
    'gpt2': {'bias': True},
    'qwen3': {'bias': False, 'activation': 'swiglu', 'norm': 'rmsnorm', 'rope_theta': 1e4, 'qk_norm': True,
              'tied': False, 'n_kv_head': 1},
}


def new_model(style):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SHAPE, 'n_layer': 2}, **STYLES[style]))


def new_pair():
    """Return two equal models, and our AdamW for the first and torch's for the second."""
    torch.manual_seed(0)
    models = [GPT(GPTConfig(**SHAPE)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours = configure_optimizer(models[0], 'adamw', 0.1, 1e-2, (0.9, 0.99))
    groups = [
        {'params': [p for p in models[1].parameters() if p.dim() >= 2], 'weight_decay': 0.1},
        {'params': [p for p in models[1].parameters() if p.dim() < 2], 'weight_decay': 0.0},
    ]
    torchs = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.99), fused=True)
    return models, [ours, torchs]


def train_step(models, optimizers):
    """Train each model by its optimizer on the same tokens."""
    idx = torch.randint(11, (4, 8))
    for model, optimizer in zip(models, optimizers):
        model(idx, idx).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def equal(a, b):
    """Whether two models have the same weights, bit for bit."""
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


def test_adamw_equals_torchs():
    models, optimizers = new_pair()
    before = models[0].lm_head.weight.clone()
    for _ in range(5):
        train_step(models, optimizers)
    assert equal(*models)
    assert not torch.equal(before, models[0].lm_head.weight)


def test_each_loads_the_others_state():
    models, (ours, torchs) = new_pair()
    for _ in range(3):
        train_step(models, [ours, torchs])
    new_models, (new_ours, new_torchs) = new_pair()
    for new_model, model in zip(new_models, models):
        new_model.load_state_dict(model.state_dict())
    new_ours.load_state_dict(torchs.state_dict())
    state = copy.deepcopy(ours.state_dict())  # torch would share the tensors
    new_torchs.load_state_dict({**state, 'param_groups': new_torchs.state_dict()['param_groups']})
    for pair, optimizers in ((new_models, [new_ours, new_torchs]), (models, [ours, torchs])):
        torch.manual_seed(1)
        train_step(pair, optimizers)
    assert equal(*models)
    assert equal(*new_models)
    assert equal(models[0], new_models[0])


@pytest.mark.parametrize('style', STYLES)
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_every_parameter_is_in_one_group(style, name):
    model = new_model(style)
    groups = configure_optimizer(model, name, 0.1, 1e-3, (0.9, 0.95), 0.02).param_groups
    members = [id(p) for group in groups for p in group['params']]
    assert sorted(members) == sorted(id(p) for p in model.parameters())
    assert {p.dim() for p in groups[1]['params']} == {1}
    assert groups[1]['weight_decay'] == 0.0 < groups[0]['weight_decay']
    if name != 'adamw':
        matrices = {id(p) for key, p in model.named_parameters() if '.h.' in key and p.dim() == 2}
        assert {id(p) for p in groups[2]['params']} == matrices


def test_a_parameter_named_twice_is_noticed(monkeypatch):
    model = new_model('qwen3')
    matrices = list(matrices_of(model))
    monkeypatch.setattr('core.training.optimizer.matrices_of', lambda model: matrices + matrices[:1])
    with pytest.raises(AssertionError, match='every parameter once'):
        configure_optimizer(model, 'muon', 0.1, 1e-3, (0.9, 0.95), 0.02)


def test_another_models_state_is_refused():
    _, (ours, _) = new_pair()
    smaller = GPT(GPTConfig(**{**SHAPE, 'block_size': 4}))
    state = configure_optimizer(smaller, 'adamw', 0.1, 1e-2, (0.9, 0.99)).state_dict()
    with pytest.raises(ValueError):
        ours.load_state_dict(state)


def muon(params, parts=None, rule='muon'):
    """Return our Muon for these matrices. parts[i]: the row counts of the matrices stacked in params[i]."""
    parts = parts or [[len(p)] for p in params]
    group = {'params': params, 'parts': parts, 'rule': rule, 'lr': 0.02, 'momentum': 0.95, 'weight_decay': 0.1}
    return Optimizer([group])


def changes(params, make_optimizer):
    """Return what five steps with random gradients change in these matrices."""
    copies = [p.clone().requires_grad_() for p in params]
    optimizer = make_optimizer(copies)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for p in copies:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [after.detach() - before for before, after in zip(params, copies)]


@pytest.fixture(params=[False, True], ids=['fp32', 'bf16'])
def precision(request, monkeypatch):
    """The dtype of Muon's updates, whatever this CPU is fast at."""
    monkeypatch.setattr(optimizer_file, 'fast_bf16_cpu', lambda: request.param)
    return torch.bfloat16 if request.param else torch.float32


@pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='torch has it from 2.9 on')
def test_muon_equals_torchs(precision):
    """For square, tall and wide matrices. The tolerance is for torch's, which rounds momenta to bf16 first."""
    shapes = [(24, 24), (24, 24), (48, 24), (24, 72), (24, 24), (1, 24)]
    params = [torch.randn(shape) for shape in shapes]

    def torch_muon(copies):
        return torch.optim.Muon(copies, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True)
    for ours, expected in zip(changes(params, muon), changes(params, torch_muon)):
        assert (ours - expected).norm() < 0.02 * expected.norm()


def test_normuon(precision):
    """Against one matrix at a time, by the formulas of the paper with the orthogonal matrices of Polar Express."""
    shapes = [(24, 24), (48, 24), (24, 72), (24, 24), (3, 24)]
    params = [torch.randn(shape) for shape in shapes]
    found = changes(params, lambda copies: muon(copies, rule='normuon'))
    generator = torch.Generator().manual_seed(1)
    expected = [p.clone() for p in params]
    momenta, squares = [0.0] * len(params), [0.0] * len(params)
    for _ in range(5):
        for i, p in enumerate(expected):
            grad = torch.randn(p.shape, generator=generator)
            momenta[i] = 0.95 * momenta[i] + 0.05 * grad
            update = orthogonalize((0.95 * momenta[i] + 0.05 * grad)[None], POLAR_EXPRESS)[0].float()
            squares[i] = 0.95 * squares[i] + 0.05 * (update**2).mean(dim=1)
            rows = update / squares[i].sqrt()[:, None]
            rows *= update.norm() / rows.norm() * max(1, len(p) / p.size(1))**0.5
            expected[i] = p * (1 - 0.02 * 0.1) - 0.02 * rows
    for p, change, after in zip(params, found, expected):
        torch.testing.assert_close(change, after - p, atol=1e-5, rtol=2e-3)


def test_polar_express():
    """Three steps bring singular values of very different sizes to between 0.2 and 1.9."""
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(24, 24, generator=generator)).Q for _ in range(2))
    s = torch.linalg.svdvals(orthogonalize((u @ torch.logspace(0, -2, 24).diag() @ v)[None], POLAR_EXPRESS)[0].float())
    assert 0.2 < s.min() and s.max() < 1.9


@pytest.mark.parametrize('rule', ['muon', 'normuon'])
def test_stacked_matrices_equal_separate_ones(rule, precision):
    generator = torch.Generator().manual_seed(1)
    separate = [torch.randn(rows, 24, generator=generator).requires_grad_() for rows in (32, 16, 16, 24)]
    stacked = [torch.cat(separate[:3]).detach().requires_grad_(), separate[3].detach().clone().requires_grad_()]
    stacked_muon = muon(stacked, [[32, 16, 16], [24]], rule)
    separate_muon = muon(separate, rule=rule)
    for _ in range(3):
        for p in separate:
            p.grad = torch.randn(p.shape, generator=generator)
        stacked[0].grad = torch.cat([p.grad for p in separate[:3]])
        stacked[1].grad = separate[3].grad.clone()
        stacked_muon.step()
        separate_muon.step()
    assert torch.equal(stacked[0], torch.cat(separate[:3]))
    assert torch.equal(stacked[1], separate[3])


@pytest.mark.parametrize('shape', [(3, 16, 48), (3, 48, 16), (1, 64, 24)], ids=str)
def test_orthogonalize(shape, precision):
    """Against the singular value decomposition U S V: S becomes about 1, U and V stay the same."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 1e-3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    s = u.mT @ orthogonalize(matrices).float() @ v.mT
    diagonal = s.diagonal(dim1=1, dim2=2)
    assert diagonal.min() > 0.6 and diagonal.max() < 1.3
    error = (s - diagonal.diag_embed()).abs().max()
    assert error < 1e-5 if precision == torch.float32 else 1e-3 < error < 0.03
    assert not orthogonalize(torch.zeros(shape)).any()


@pytest.mark.parametrize('style', STYLES)
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_state_dict_round_trip(style, name, tmp_path):
    """Through a file: the copy goes on as the original does."""
    models = [new_model(style), new_model(style)]
    opts = [configure_optimizer(model, name, 0.1, 1e-2, (0.9, 0.99), 0.02) for model in models]
    torch.manual_seed(1)
    for _ in range(3):
        train_step(models[:1], opts[:1])
    torch.save(opts[0].state_dict(), tmp_path / 'state.pt')
    models[1].load_state_dict(models[0].state_dict())
    opts[1].load_state_dict(torch.load(tmp_path / 'state.pt', weights_only=True))
    train_step(models, opts)
    train_step(models, opts)
    assert equal(*models)
    assert not torch.equal(models[0].lm_head.weight, new_model(style).lm_head.weight)


@pytest.mark.parametrize('style', STYLES)
@pytest.mark.parametrize('name, other', list(itertools.permutations(OPTIMIZERS, 2)))
def test_another_optimizers_state_is_refused(style, name, other):
    ours, others = (configure_optimizer(new_model(style), kind, 0.1, 1e-2, (0.9, 0.99), 0.02) for kind in (name, other))
    with pytest.raises(ValueError):
        ours.load_state_dict(others.state_dict())


@pytest.mark.parametrize('device', ['cpu', 'cuda', 'mps'])
def test_fused_adamw(device):
    """torch has a kernel for these devices; the counter of steps is then on the device."""
    supported = pytest.importorskip('torch.utils._foreach_utils')._get_fused_kernels_supported_devices()
    assert device in supported
    assert optimizer_file.has_fused_adamw(SimpleNamespace(device=torch.device(device)))
