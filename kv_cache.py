"""
What makes generating text fast: a cache of keys and values, and on CUDA the step of a token captured as a graph.

    cache = new_cache(config, idx, ...)     then GPT.hidden(idx, cache) reads only the new tokens idx
    read = captured(step, cache)            step(token, cache), which reads one token, without the host's work

Shapes: B batch, T tokens, nh query heads, nkv key/value heads, hs channels per head, V vocabulary.
"""
import copy
import sys
from functools import partial

import torch
from torch.nn import functional as F

from kernels import attention

MIN_NEW_SLOTS = 256  # tokens by which a cache grows at least
CAPTURED_ON = ('cuda',)  # devices on which steps are captured


def cache_bytes(config, slots, number_bytes):
    """Return the bytes of a cache of one row of so many tokens. number_bytes: of a number."""
    slots_of_layers = sum(min(window or slots, slots) for window in config.windows())
    return 2 * slots_of_layers * config.n_kv_head * config.head_size * number_bytes


def new_cache(config, idx, pads, dtype):
    """Return an empty cache for the prompts idx (B, T). dtype: of keys and values, where autocast has no other."""
    B, T = idx.shape
    device_type = idx.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    windows = config.windows()
    shapes = [(2, config.n_kv_head, B, min(window or T, T), config.head_size) for window in windows]
    layers = [tuple(torch.zeros(shape, dtype=dtype, device=idx.device)) for shape in shapes]
    return KVCache(layers, windows, pads)


class KVCache:
    """
    Keys and values of earlier tokens, so that only new tokens go through the network.
    layers: (keys, values) of each layer, (nkv, B, slots, hs) each. They are ring buffers: when they are full and do not
        grow(), a new token overwrites the oldest.
    windows: the window of each layer (see attention), the most slots that it needs; 0: as many as the context.
    pads (B,): left-padding tokens of each row, which no other token attends to.
    length: tokens so far, overwritten ones included. An int; or a tensor (), for a graph that serves any length.
    """

    def __init__(self, layers, windows, pads=None, length=0):
        self.layers = layers
        self.windows = windows
        self.pads = pads
        self.length = length
        self.shortest = min(keys.size(2) for keys, _ in layers)  # slots of the layer that is full first

    def repeat(self, copies):
        """Return a cache in which each row stands `copies` times, side by side."""
        layers = [tuple(x.repeat_interleave(copies, dim=1) for x in layer) for layer in self.layers]
        pads = None if self.pads is None else self.pads.repeat_interleave(copies)
        return KVCache(layers, self.windows, pads, self.length)

    def grow(self, most):
        """Where the next token would overwrite the oldest, add some slots, up to `most` or the layer's window."""
        if self.length < self.shortest:
            return
        for i, (layer, window) in enumerate(zip(self.layers, self.windows)):
            slots, limit = layer[0].size(2), min(window or most, most)
            if self.length == slots < limit:
                more = min(limit - slots, max(MIN_NEW_SLOTS, slots // 4))  # a share, so that copying stays cheap
                self.layers[i] = tuple(F.pad(x, (0, 0, 0, more)) for x in layer)  # so few are in memory twice
        self.shortest = min(keys.size(2) for keys, _ in self.layers)

    def restart(self):
        """Empty the cache for a context that begins one token later, which drops one token of padding."""
        self.length = 0
        if self.pads is not None:
            self.pads = (self.pads - 1).clamp(min=0)

    def extend(self, T):
        """
        Make room for T new tokens: the whole prompt, or one token. Return (start, offset, attends): the index of the
        first new token; the padding before each row's text, (B, 1) or 0; and for each layer a function with
        attention()'s signature that stores the new keys and values and attends to all of them.
        """
        start = self.length
        self.length = start + T
        places = {}  # window: what its layers share
        attends = []
        for (keys, values), window in zip(self.layers, self.windows):
            if window not in places:
                places[window] = self.places(start, T, keys.size(2), window, keys.device)
            attends.append(partial(self.attend, keys, values, window, *places[window]))
        return start, 0 if self.pads is None else self.pads[:, None], attends

    def places(self, start, T, slots, window, device):
        """
        Return the slots of the new tokens, without those that newer ones overwrite; how many slots are in use; and the
        mask (B, T, n) of the keys that the tokens may attend to: those of the prompt, or the n slots in use. None: all.
        """
        if torch.is_tensor(start):  # in a graph, which has to be right for any start
            index, used = start + torch.arange(T, device=device), slots
            new_slots = index % slots
        else:
            index, used = torch.arange(start, start + T, device=device), min(start + T, slots)  # index (T,)
            new_slots = index if start + T <= slots else index[-slots:] % slots
        if self.pads is None:
            return new_slots, used, None
        if T > 1:
            key = index  # (n,)
        else:
            slot = torch.arange(used, device=device)  # (n,)
            key = self.length - 1 - (self.length - 1 - slot) % slots  # the token in each
        query = index[:, None]  # (T, 1)
        in_window = query - key < window if window else True
        # padding attends to itself, so that no softmax row is fully masked (NaN)
        return new_slots, used, (self.pads[:, None, None] <= key) & (key <= query) & in_window | (key == query)

    def attend(self, keys, values, window, new_slots, used, mask, q, k, v, dropout):
        """Store k and v (nkv, B, T, hs) of new tokens. Return the attention (nh, B, T, hs) of q over the cache."""
        nh, B, T, hs = q.shape
        if T > 1:  # the prompt: nothing is in the cache before it
            n = len(new_slots)  # fewer than T if the prompt is longer than the window
            keys.index_copy_(2, new_slots, k[:, :, -n:])
            values.index_copy_(2, new_slots, v[:, :, -n:])
            return attention(q, k, v, mask=None if mask is None else mask[:, None], window=window)
        keys.index_copy_(2, new_slots, k)
        values.index_copy_(2, new_slots, v)
        keys, values = keys.narrow(2, 0, used), values.narrow(2, 0, used)
        if mask is not None:
            mask = mask[None]  # (1, B, 1, n)
        if len(k) == nh:
            return F.scaled_dot_product_attention(q, keys, values, mask)
        q = q.view(len(k), nh // len(k), B, hs).transpose(1, 2)  # (nkv, B, nh / nkv, hs): query heads that share keys
        return F.scaled_dot_product_attention(q, keys, values, mask).transpose(1, 2).reshape(nh, B, 1, hs)


def captured(step, cache):
    """Return a function of a token (B,) alone that is step(token, cache); on CUDA it is captured as a graph."""
    on = cache.layers[0][0].device.type in CAPTURED_ON
    return CapturedStep(step, cache) if on else partial(step, cache=cache)


class CapturedStep:
    """
    Replace step(token (B,), cache), which reads a token into a KVCache and returns the logits (B, V), by a CUDA graph:
    the host starts the graph instead of each kernel, so that the GPU does not wait for the host. It is captured again
    when the cache has grown. If that fails, a warning says so once, and step() is called as it is.
    The logits are overwritten by the next call.
    """
    works = True  # False in all of this process once it has failed

    def __init__(self, step, cache):
        self.step = step
        self.cache = cache
        self.slots = None  # of each layer of the cache, for which the graph was captured

    def __call__(self, token):
        slots = [keys.size(2) for keys, _ in self.cache.layers]
        if CapturedStep.works and slots != self.slots:
            self.slots = slots
            self.capture(token)
        if not CapturedStep.works:
            return self.step(token, self.cache)
        self.token.copy_(token)
        self.position.fill_(self.cache.length)
        self.graph.replay()
        self.cache.length += 1
        return self.logits

    def capture(self, token):
        """Capture step() at any position: the position is a tensor, and a mask leaves out the slots beyond it."""
        self.token = token.clone()
        self.position = torch.full((), self.cache.length, device=token.device)
        self.pads = torch.zeros_like(token) if self.cache.pads is None else self.cache.pads
        self.graph = None  # frees the memory of the one before

        def run():  # what it stores is what the next replay() stores again
            cache = copy.copy(self.cache)
            cache.length, cache.pads = self.position, self.pads
            return self.step(self.token, cache)

        try:
            self.graph, self.logits = cuda_graph(run, token.device)
        except Exception as error:
            CapturedStep.works = False
            reason = f'{type(error).__name__}: {error}'.splitlines()[0]
            print(f'warning: no CUDA graph for sampling; going on without it, more slowly ({reason})', file=sys.stderr)


def cuda_graph(function, device):
    """Capture function() on tensors that stay in place. Return the graph, to replay(), and what function() returned."""
    with torch.cuda.device(device):  # a new thread begins on GPU 0, whose stream would capture nothing
        graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(graph, capture_error_mode='thread_local')  # other threads may go on using CUDA
        main, side = torch.cuda.current_stream(), capture.capture_stream
        try:
            side.wait_stream(main)
            with torch.cuda.stream(side):
                function()  # loads kernels and libraries, which cannot be captured
            main.wait_stream(side)
            with capture:
                output = function()
        finally:
            torch.cuda.set_stream(main)  # if the capture fails, the current stream is still the other one
    return graph, output
