"""
The two ways in which kernels.attention() computes on this CPU, forward and backward; its choice rests on these times:

    python bench.py --what=attention

A row is a shape (batch, heads, tokens, head size), a dtype and a dropout. Its figures are median milliseconds of the
fused kernel and of plain operations, first with causal attention, then with a mask of four packed documents a row.
The last rows compare a sliding window with attention to all tokens, each in the faster of the two ways.
"""
import torch

from benchmarks.common import median_ms
from core.device import setup
from kernels import attention

SHAPES = [  # B, nh, T, hs
    (12, 4, 64, 32),
    (16, 4, 128, 40),
    (8, 4, 256, 32),
    (64, 6, 256, 64),
    (4, 12, 512, 64),
    (1, 12, 1024, 64),
]
DOCUMENTS = 4  # in a packed row
WINDOWS = [  # B, nh, T, hs, window
    (1, 12, 1024, 64, 256),
    (1, 8, 4096, 64, 256),
    (1, 8, 4096, 64, 512),
]


def time_attention(runs):
    setup('cpu', training=True)
    print('B x nh x T x hs        dtype     dropout   fused ms   plain ms   '
          'of packed rows: fused ms   plain ms   (forward and backward)')
    for B, nh, T, hs in SHAPES:
        repeats = 10 * runs if T < 256 else 2 * runs
        document = torch.arange(T) // (T // DOCUMENTS)
        packed = (document[:, None] == document).tril().expand(B, 1, T, T)
        for dtype in (torch.float32, torch.bfloat16):
            for dropout in (0.0, 0.2):
                causal_fused, causal_plain = time_both(B, nh, T, hs, dtype, dropout, None, repeats)
                packed_fused, packed_plain = time_both(B, nh, T, hs, dtype, dropout, packed, repeats)
                shape = f'{B} x {nh} x {T} x {hs}'
                dtype_name = str(dtype).removeprefix('torch.')
                print(f'{shape:22} {dtype_name:10} {dropout:6} {causal_fused:10.2f} {causal_plain:10.2f} '
                      f'{packed_fused:26.2f} {packed_plain:10.2f}', flush=True)
    print('B x nh x T x hs        dtype      window   all tokens ms   window ms')
    for B, nh, T, hs, window in WINDOWS:
        for dtype in (torch.float32, torch.bfloat16):
            full = min(time_both(B, nh, T, hs, dtype, 0.0, None, runs))
            limited = min(time_both(B, nh, T, hs, dtype, 0.0, None, runs, window))
            dtype_name = str(dtype).removeprefix('torch.')
            shape = f'{B} x {nh} x {T} x {hs}'
            print(f'{shape:22} {dtype_name:10} {window:6} {full:15.2f} {limited:11.2f}', flush=True)


def time_both(B, nh, T, hs, dtype, dropout, mask, repeats, window=0):
    """Return the median milliseconds of the fused kernel and of plain operations. mask, window: of attention()."""
    x = torch.randn(3, nh, B, T, hs, dtype=dtype, requires_grad=True)  # laid out as the network lays it out
    gradient = torch.randn(nh, B, T, hs, dtype=dtype)
    times = []
    for blockwise in (False, True):
        times.append(median_ms(lambda: attention(*x, dropout, blockwise, mask, window).backward(gradient), repeats))
    return times
