"""
Quantised and packed Linear layers.

    PackedLinear, Int8Linear    for inference: the weights in the layout that a CPU reads fastest, or one byte each
    FrozenLinear                for the frozen base under LoRA adapters: int8, or nf4 (QLoRA)
"""
import functools
import logging
import sys

import torch
import torch.nn as nn
from torch.nn import functional as F

MIN_WEIGHTS = 2**18  # for smaller layers, calling oneDNN costs more than packing gains


def replace_modules(model, cls, make):
    """Replace each child module of class `cls` with make(child)."""
    parents = [module for module in model.modules() if not isinstance(module, cls)]  # a list, as the tree changes
    for parent in parents:
        for name, child in parent.named_children():
            if isinstance(child, cls):
                setattr(parent, name, make(child))

# --- inference


def prepare_for_inference(model, dtype, rows=1):
    """
    Prepare a model, in place, to compute only; it can no longer be trained or saved. Return it.

    dtype: 'float32', 'bfloat16' or 'float16'; or 'int8', for the weights of the Linears, and the rest in float32
    rows: tokens computed at a time. The layout of packed weights depends on it.
    """
    model.eval().requires_grad_(False)
    on_cpu = model.transformer.wte.weight.device.type == 'cpu'
    model.to(torch.float32 if dtype == 'int8' else getattr(torch, dtype))
    if on_cpu and torch.backends.mkl.is_available():
        # In fp32 without oneDNN: for one row its GELU takes 9 us, PyTorch's own takes 1.
        torch.backends.mkldnn.set_flags(dtype != 'float32')
    if dtype == 'int8':
        replace_modules(model, nn.Linear, Int8Linear)
    elif on_cpu and (dtype != 'float32' or rows >= 4) and packed_matmul_is_correct(dtype):  # few rows: MKL is faster
        replace_modules(model, nn.Linear, lambda linear: pack_if_large(linear, rows))
    return model


def pack_if_large(linear, rows):
    return PackedLinear(linear, rows) if linear.weight.numel() >= MIN_WEIGHTS else linear


class PackedLinear(nn.Module):
    """
    A Linear whose weights are stored in the blocks that oneDNN multiplies. For few rows it is up to twice as fast as
    F.linear, which reorders the weights in every call (docs/RECORDS.md). torch.compile freezes models with the same
    operators.
    """

    def __init__(self, linear, rows):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self.bias = linear.bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, 'none', [], '')


class Int8Linear(nn.Module):
    """
    A Linear with int8 weights: -127 to 127, times one factor per output channel. As LLM.int8() (Dettmers et al. 2022:
    https://arxiv.org/abs/2208.07339), but without separate outliers, because activations keep 16 bits.

    oneDNN multiplies bytes by bytes on CPUs. So each row of x becomes two rows of bytes, the low and the high byte of
    16-bit steps, and both are multiplied in one pass over the weights.
    """

    def __init__(self, linear):
        super().__init__()
        self.weight, self.factors = quantize_int8(linear.weight.detach().float())  # (out, in), (out,)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.bytewise = self.weight.device.type == 'cpu' and packed_matmul_is_correct('int8')
        if self.bytewise:
            self.zeros = torch.zeros(len(self.weight), dtype=torch.int32)
            self.weight = torch.ops.onednn.qlinear_prepack(self.weight, None)
            if self.bias is not None:
                self.bias = self.bias.float() / 257  # added to the low row, and to the high row, which counts 256 times
            self.middle = torch.tensor(128 * 257 + 0.5)

    def forward(self, x):
        if not self.bytewise:
            y = F.linear(x, self.weight.to(x.dtype)) * self.factors.to(x.dtype)
            return y if self.bias is None else y + self.bias
        step = max(torch.linalg.vector_norm(x, float('inf')).item(), 1e-30) / (127 * 256)
        steps = torch.add(self.middle, x.view(-1, x.size(-1)), alpha=1 / step).int()  # (N, in), 0 to 65,535
        low_and_high = steps.view(torch.uint8).view(*steps.shape, 4)[..., :2]  # (N, in, 2)
        rows = low_and_high.permute(2, 0, 1).flatten(0, 1)  # (2 N, in): all low bytes, then all high bytes
        y = torch.ops.onednn.qlinear_pointwise(rows, step, 128, self.weight, self.factors, self.zeros, self.bias,
                                               1.0, 0, torch.float32, 'none', [], '')
        low, high = y.view(2, *x.shape[:-1], -1)
        return low.add_(high, alpha=256)


def quantize_int8(weight):
    """Return a matrix (out, in) as int8, -127 to 127, and the factor of each row (out,)."""
    factors = (weight.abs().amax(dim=1) / 127).clamp(min=1e-30)
    return (weight / factors[:, None]).round().to(torch.int8), factors


@functools.cache
def packed_matmul_is_correct(dtype):
    """
    Whether this PyTorch and CPU can multiply packed weights of this dtype, with the right result: CPUs without VNNI
    overflow where bytes are large.
    """
    try:
        if dtype == 'int8':
            weight = torch.ops.onednn.qlinear_prepack(torch.full((64, 64), 127, dtype=torch.int8), None)
            x = torch.full((2, 64), 255, dtype=torch.uint8)
            ones = torch.ones(64)
            zeros = torch.zeros(64, dtype=torch.int32)
            y = torch.ops.onednn.qlinear_pointwise(x, 1.0, 0, weight, ones, zeros, None,
                                                   1.0, 0, torch.float32, 'none', [], '')
            return bool((y == 255 * 127 * 64).all())
        linear = nn.Linear(64, 64, bias=False, dtype=getattr(torch, dtype))
        linear.weight.data.fill_(1.0)
        x = torch.full((1, 64), 3.0, dtype=getattr(torch, dtype))
        return bool((PackedLinear(linear, 1)(x) == 3 * 64).all())
    except (AttributeError, RuntimeError, NotImplementedError):
        return False

# --- the frozen base under LoRA adapters


class FrozenLinear(nn.Module):
    """
    A Linear that is not trained, but passes gradients on to its input. Its weights are quantised to 'int8', or by
    bitsandbytes to 'nf4': four bits each, and a factor for every 64 (QLoRA, Dettmers et al. 2023:
    https://arxiv.org/abs/2305.14314). They are dequantised for each product, so only for one layer at a time.
    """

    def __init__(self, linear, kind, device='cpu'):
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.kind = kind
        self.bias = linear.bias
        # quantised on the linear's own device, so that a base is the same wherever it is used
        weight = linear.weight.detach()
        if kind == 'nf4':
            self.functional = import_bitsandbytes()
            weight, self.factors = self.functional.quantize_4bit(
                weight, quant_type='nf4', compress_statistics=True)  # the factors in eight bits, too
            self.factors.to(device)  # in place
        else:
            weight, factors = quantize_int8(weight)
            self.factors = factors.to(device)
        self.register_buffer('weight', weight.to(device))

    def dequantized(self, dtype):
        """Return the weights (out, in)."""
        if self.kind == 'nf4':
            return self.functional.dequantize_4bit(self.weight, self.factors).to(dtype)
        return self.weight.to(dtype) * self.factors.to(dtype)[:, None]

    def forward(self, x):
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type):
            x = x.to(torch.get_autocast_dtype(device_type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return FrozenProduct.apply(x, self, bias)

    def linear(self):
        """Return a plain Linear with these weights."""
        new = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device=self.weight.device)
        new.weight.data = self.dequantized(torch.float32)
        new.bias = self.bias
        return new

    def nbytes(self):
        """Return the bytes of the weights and their factors."""
        tensors = [self.weight]
        if self.kind == 'nf4':
            tensors += [self.factors.absmax, self.factors.code, self.factors.state2.absmax, self.factors.state2.code]
        else:
            tensors.append(self.factors)
        return sum(tensor.nbytes for tensor in tensors)

    def __deepcopy__(self, memo):
        return self  # it never changes


def import_bitsandbytes():
    logging.getLogger('bitsandbytes').setLevel(logging.ERROR)  # on CPUs it warns of a missing kernel; not used here
    try:
        from bitsandbytes import functional
    except ImportError:
        sys.exit('quantize_base=nf4 needs another package: pip install bitsandbytes; '
                 'or --quantize_base=int8, which needs none')
    return functional


class FrozenProduct(torch.autograd.Function):
    """x (..., in) times a FrozenLinear -> (..., out). The backward pass dequantises the weights again."""

    @staticmethod
    def forward(ctx, x, layer, bias):
        ctx.layer = layer
        return F.linear(x, layer.dequantized(x.dtype), bias)

    @staticmethod
    def backward(ctx, dy):
        return dy @ ctx.layer.dequantized(dy.dtype), None, None
