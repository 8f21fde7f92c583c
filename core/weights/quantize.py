"""The weights of a network, or of what is frozen in it, that are only read from now on: in half the bytes, in a quarter, in an eighth, and laid out as the CPU reads them fastest."""
import functools
import logging
import sys

import torch
import torch.nn as nn
from torch.nn import functional as F

SMALL = 2**18  # weights; what fewer of them gain is less than what calling oneDNN costs


def prepare_for_inference(model, dtype, rows=1):
    """
    Turn a network, in place, into one that only computes: weights in `dtype` ('float32', 'bfloat16', 'float16'; 'int8': those of its Linears, and the
    rest in float32, on a GPU in bfloat16), laid out for `rows` tokens at a time. It can be neither trained nor saved any more. Returns it.
    """
    model.eval().requires_grad_(False)
    cpu = model.transformer.wte.weight.device.type == 'cpu'
    model.to(getattr(torch, dtype if dtype != 'int8' else 'float32' if cpu else 'bfloat16'))
    if cpu and torch.backends.mkl.is_available():
        torch.backends.mkldnn.set_flags(dtype != 'float32')  # for one row in fp32 its GELU takes 9 us, PyTorch's own one
    if dtype == 'int8':
        new = Int8Linear
    elif cpu and (dtype != 'float32' or rows >= 4) and packed_matmul_is_correct(dtype):  # few rows in fp32 are MKL's fastest case
        new = functools.partial(PackedLinear, rows=rows)
    else:
        return model
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and (dtype == 'int8' or child.weight.numel() >= SMALL):
                setattr(module, name, new(child))
    return model


class PackedLinear(nn.Module):
    """
    A Linear whose weights lie in the blocks in which oneDNN multiplies them: for few rows up to twice as fast as F.linear, which has to find its way
    through them anew each time (docs/RECORDS.md). These are the operators with which torch.compile freezes a network.
    """

    def __init__(self, linear, rows):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self.bias = linear.bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, 'none', [], '')


class Int8Linear(nn.Module):
    """
    A Linear with weights of eight bits, -127 to 127 times one factor for each output channel (LLM.int8(), Dettmers et al. 2022:
    https://arxiv.org/abs/2208.07339, without its outliers: activations keep 16 bits). On a CPU oneDNN multiplies bytes by bytes, so x goes in as two
    rows of them, high and low, through one reading of the weights.
    """

    def __init__(self, linear):
        super().__init__()
        self.weight, self.factors = eight_bits(linear.weight.detach().float())  # (out, in), (out,)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.bytewise = self.weight.device.type == 'cpu' and packed_matmul_is_correct('int8')
        if self.bytewise:
            self.zeros = torch.zeros(len(self.weight), dtype=torch.int32)
            self.weight = torch.ops.onednn.qlinear_prepack(self.weight, None)
            self.bias = None if self.bias is None else self.bias.float() / 257  # it is added to the high row, which counts 256 times, and to the low one
            self.middle = torch.tensor(128 * 257 + 0.5)

    def forward(self, x):
        if not self.bytewise:
            y = F.linear(x, self.weight.to(x.dtype)) * self.factors.to(x.dtype)
            return y if self.bias is None else y + self.bias
        step = max(torch.linalg.vector_norm(x, float('inf')).item(), 1e-30) / (127 * 256)
        steps = torch.add(self.middle, x.view(-1, x.size(-1)), alpha=1 / step).int()  # (N, in), 0 to 65,535
        rows = steps.view(torch.uint8).view(*steps.shape, 4)[..., :2].permute(2, 0, 1).flatten(0, 1)  # (2 N, in): all low bytes, then all high ones
        y = torch.ops.onednn.qlinear_pointwise(rows, step, 128, self.weight, self.factors, self.zeros, self.bias, 1.0, 0, torch.float32, 'none', [], '')
        low, high = y.view(2, *x.shape[:-1], -1)
        return low.add_(high, alpha=256)


def eight_bits(weight):
    """A matrix (out, in) as int8, -127 to 127, and the factor of each row (out,)."""
    factors = (weight.abs().amax(dim=1) / 127).clamp(min=1e-30)
    return (weight / factors[:, None]).round().to(torch.int8), factors


class FrozenLinear(nn.Module):
    """
    A Linear that is not trained, but through which gradients go: its weights in 'int8', or in 'nf4', four bits each and a factor for every 64, by bitsandbytes
    (QLoRA, Dettmers et al. 2023: https://arxiv.org/abs/2305.14314). They are unpacked whenever they multiply, so never more than one layer's at a time.
    """

    def __init__(self, linear, kind, device='cpu'):
        super().__init__()
        self.in_features, self.out_features, self.kind, self.bias = linear.in_features, linear.out_features, kind, linear.bias
        weight = linear.weight.detach()
        if kind == 'nf4':
            logging.getLogger('bitsandbytes').setLevel(logging.ERROR)  # on a CPU it misses a kernel that nothing here calls
            try:
                from bitsandbytes import functional
            except ImportError:
                sys.exit("quantize_base=nf4 needs another package: pip install bitsandbytes; or --quantize_base=int8, which needs none")
            self.functional = functional
            weight, self.factors = functional.quantize_4bit(weight, quant_type='nf4', compress_statistics=True)  # the factors in eight bits, too
            self.factors.to(device)  # quantised where the linear is, so that a base is the same wherever it is used
        else:
            weight, factors = eight_bits(weight)
            self.factors = factors.to(device)
        self.register_buffer('weight', weight.to(device))

    def unpacked(self, dtype):
        """The weights (out, in)."""
        if self.kind == 'nf4':
            return self.functional.dequantize_4bit(self.weight, self.factors).to(dtype)
        return self.weight.to(dtype) * self.factors.to(dtype)[:, None]

    def forward(self, x):
        device = x.device.type
        x = x.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype)
        return FrozenProduct.apply(x, self, None if self.bias is None else self.bias.to(x.dtype))

    def linear(self):
        """A plain Linear with these weights."""
        new = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device=self.weight.device)
        new.weight.data, new.bias = self.unpacked(torch.float32), self.bias
        return new

    def nbytes(self):
        """Bytes of the weights and their factors."""
        f = self.factors
        return sum(tensor.nbytes for tensor in ([self.weight, f] if self.kind == 'int8' else [self.weight, f.absmax, f.code, f.state2.absmax, f.state2.code]))

    def __deepcopy__(self, memo):
        return self  # it never changes


class FrozenProduct(torch.autograd.Function):
    """x (..., in) -> (..., out) by a FrozenLinear, whose weights the backward pass unpacks once more rather than keep."""

    @staticmethod
    def forward(ctx, x, layer, bias):
        ctx.layer = layer
        return F.linear(x, layer.unpacked(x.dtype), bias)

    @staticmethod
    def backward(ctx, dy):
        return dy @ ctx.layer.unpacked(dy.dtype), None, None


@functools.cache
def packed_matmul_is_correct(dtype):
    """Whether this PyTorch and CPU multiply packed weights of this dtype, and right: CPUs without VNNI overflow where bytes are large."""
    weight = nn.Linear(64, 64, bias=False)
    weight.weight.data.fill_(1.0)
    x = torch.full((1, 64), 3.0)
    try:
        if dtype == 'int8':
            packed = torch.ops.onednn.qlinear_prepack(torch.full((64, 64), 127, dtype=torch.int8), None)
            ones, zeros = torch.ones(64), torch.zeros(64, dtype=torch.int32)
            y = torch.ops.onednn.qlinear_pointwise(torch.full((2, 64), 255, dtype=torch.uint8), 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, 'none', [], '')
            return bool((y == 255 * 127 * 64).all())
        kind = getattr(torch, dtype)
        return bool((PackedLinear(weight.to(kind), 1)(x.to(kind)) == 192).all())
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
