"""core/weights/quantize.py: converted weights against the weights themselves."""
import pytest
import torch
from test_generation import each_style, new_model

from core.weights.quantize import Int8Linear, PackedLinear, packed_matmul_is_correct, prepare_for_inference

TOLERANCE = {'float32': 1e-6, 'bfloat16': 3e-2, 'float16': 4e-3, 'int8': 3e-4}


def round_to_int8(model, tied):
    """Replace the weight of each Linear by its 8-bit values."""
    embedding = model.transformer.wte.weight.clone()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            step = module.weight.abs().amax(1, keepdim=True) / 127
            module.weight = torch.nn.Parameter((module.weight / step).round() * step)
    if tied:
        model.transformer.wte.weight = torch.nn.Parameter(embedding)  # which stays as precise as it was
    return model


@each_style
@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('rows', [1, 8])
def test_prepare_for_inference(style, dtype, rows, monkeypatch):
    """Logits of converted weights are close to those of the weights; int8 to a plain product with rounded weights."""
    monkeypatch.setattr('core.weights.quantize.MIN_WEIGHTS', 0)
    model = new_model(style)
    idx = torch.randint(97, (rows, 7))
    peer = round_to_int8(new_model(style), style.get('tied', True)) if dtype == 'int8' else model
    expected = peer(idx)
    logits = prepare_for_inference(model, dtype, rows)(idx).float()
    assert (logits - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    classes = {type(module) for module in model.modules()}
    if dtype == 'int8':
        assert Int8Linear in classes
    else:
        worth_it = dtype != 'float32' or rows >= 4
        assert (PackedLinear in classes) == (worth_it and packed_matmul_is_correct(dtype))


def test_int8_without_int8_products(monkeypatch):
    """If the CPU cannot multiply bytes by bytes, a plain product gives the same numbers."""
    torch.manual_seed(1)
    linear, x = torch.nn.Linear(64, 48), 5 * torch.randn(3, 2, 64)
    x[0, 0] = 0
    y = Int8Linear(linear)(x)
    monkeypatch.setattr('core.weights.quantize.packed_matmul_is_correct', lambda dtype: False)
    torch.testing.assert_close(y, Int8Linear(linear)(x), atol=2e-3, rtol=0)
    assert Int8Linear(linear)(torch.zeros(1, 64)).allclose(linear.bias)
