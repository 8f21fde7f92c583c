"""
A GPT, whole, in this file, in two styles that plain settings choose between:
GPT-2's network as nanoGPT writes it, weight for weight (the same state-dict names), which the defaults give; and Qwen3's (rope_theta,
norm='rmsnorm', activation='swiglu', qk_norm, n_kv_head, tied or not), which without qk_norm is Llama's.
References:
1) nanoGPT: https://github.com/karpathy/nanoGPT/blob/master/model.py
2) GPT-2 (Radford et al. 2019): https://github.com/openai/gpt-2/blob/master/src/model.py
3) Qwen3: https://github.com/huggingface/transformers/blob/main/src/transformers/models/qwen3/modeling_qwen3.py
Letters in the shapes: B rows, T positions, C = n_embd channels, nh heads of hs channels, nkv heads of keys and values, V vocabulary.
"""
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50,257 rounded up to a multiple of 64, which matrix units like
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linears and LayerNorms, like GPT-2; False is a bit better and faster
    activation: str = 'gelu'  # 'gelu': the exact one, nanoGPT's; 'gelu_tanh': OpenAI's GPT-2 weights want this one; 'swiglu'
    norm: str = 'layernorm'  # or 'rmsnorm'
    norm_eps: float = 1e-5
    rope_theta: float = 0.0  # base of the rotary frequencies; 0: learned positions
    qk_norm: bool = False  # normalise queries and keys, head by head
    tied: bool = True  # one matrix reads tokens in and out
    n_kv_head: int = 0  # heads of keys and values, each shared by n_head / n_kv_head heads of queries; 0: n_head
    head_size: int = 0  # channels of a head; 0: n_embd / n_head
    reward: bool = False  # a head of one number, how good the text is so far, instead of one for the vocabulary
    n_inner: int = 0  # width inside the MLP; 0: 4 * n_embd, or for SwiGLU, which has three matrices, 8/3 of it, rounded up to a multiple of 64

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_size = self.head_size or self.n_embd // self.n_head
        self.n_inner = self.n_inner or (-(-8 * self.n_embd // 192) * 64 if self.activation == 'swiglu' else 4 * self.n_embd)


NORMS = ('layernorm', 'rmsnorm')
ACTIVATIONS = ('gelu', 'gelu_tanh', 'swiglu')
BLOCK = 256  # queries that attention on a CPU takes at a time
PART = 2**22  # logits in fp32 at a time, eagerly on a CPU: as many as its cache holds; elsewhere 32 times as many
KEPT = 2**30  # bytes of the logits' gradients that are kept for the backward pass; on CUDA four times as many


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias, under nanoGPT's names."""

    def __init__(self, ndim, bias, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None
        self.eps = eps

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """RMSNorm (Zhang & Sennrich 2019) with its gain in the precision of what comes in, which PyTorch's fused kernel wants."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def new_norm(config):
    return RMSNorm(config.n_embd, config.norm_eps) if config.norm == 'rmsnorm' else LayerNorm(config.n_embd, config.bias, config.norm_eps)


def rotary(T, head_size, theta, device, start=0):
    """
    Cosines and sines (2, T, hs / 2) by which the channels of positions start to start + T - 1 are rotated (RoPE, Su et al. 2021:
    https://arxiv.org/abs/2104.09864), channel i together with channel i + hs / 2.
    """
    frequencies = 1 / theta ** (torch.arange(0, head_size, 2, device=device) / head_size)  # (hs / 2,)
    angles = torch.outer(torch.arange(start, start + T, device=device), frequencies)  # (T, hs / 2)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x, rope):
    """Rotate queries or keys (..., T, hs) by their positions."""
    cos, sin = rope.to(x.dtype)  # (T, hs / 2) each
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def dropout_factors(x: torch.Tensor, p: float) -> torch.Tensor:
    """
    What dropout multiplies x by, for CPUs: from a random byte for each number, so the nearest multiple of 1/256 to p is dropped, in a tenth of the
    time that F.dropout's random doubles take (docs/LOG.md).
    """
    if torch.compiler.is_compiling():
        return opaque_dropout_factors(x, p)
    dropped = min(255, round(256 * p))
    noise = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-2**63, None).view(torch.uint8)[:x.numel()].view(x.shape)
    return noise.ge_(dropped).to(x.dtype).mul_(256 / (256 - dropped))


# as one operator, which torch.compile leaves as it is; eagerly the first call of one takes two seconds
opaque_dropout_factors = torch.library.custom_op('stonegpt::dropout_factors', dropout_factors, mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
opaque_dropout_factors.register_fake(lambda x, p: x.new_empty(x.shape))


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """F.dropout, on CPUs by dropout_factors."""
    if not p:
        return x
    return x * dropout_factors(x.detach(), p) if x.device.type == 'cpu' else F.dropout(x, p)


class BlockAttention(torch.autograd.Function):
    """
    Causal attention of queries, keys and values (N, T, hs) in plain operations, BLOCK queries at a time: what they cannot see is not computed, and
    over a long context no weights are held, but computed again in the backward pass (Dao et al. 2022: https://arxiv.org/abs/2205.14135).
    mask: None or (N, T, T), of bools that say who sees whom.
    """

    @staticmethod
    def weights(q, k, mask, i, j):
        """Of queries i to j, on the keys before j: (N, j - i, j)."""
        if mask is None:
            unseen = q.new_full((j - i, j), float('-inf')).triu(i + 1)
        else:
            unseen = q.new_zeros(len(q), j - i, j).masked_fill_(~mask[:, i:j, :j], float('-inf'))
        return torch.baddbmm(unseen, q[:, i:j], k[:, :j].transpose(1, 2), alpha=1 / math.sqrt(q.size(2))).softmax(dim=-1)

    @staticmethod
    def forward(ctx, q, k, v, dropout, mask):
        y, held, factors = torch.empty_like(q), [], []
        ctx.blocks = [(i, min(i + BLOCK, q.size(1))) for i in range(0, q.size(1), BLOCK)]
        for i, j in ctx.blocks:
            att = BlockAttention.weights(q, k, mask, i, j)
            if len(ctx.blocks) <= 2:
                held.append(att)
            if dropout:
                factors.append(dropout_factors(att, dropout))
                att = att * factors[-1]
            y[:, i:j] = att @ v[:, :j]
        ctx.save_for_backward(q, k, v, mask, *held, *factors)
        ctx.held = len(held)
        return y

    @staticmethod
    def backward(ctx, dy):
        q, k, v, mask, *rest = ctx.saved_tensors
        held, factors = rest[:ctx.held], rest[ctx.held:]
        dq, dk, dv, scale = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v), 1 / math.sqrt(q.size(2))
        for n, (i, j) in enumerate(ctx.blocks):
            att = held[n] if held else BlockAttention.weights(q, k, mask, i, j)
            datt = dy[:, i:j] @ v[:, :j].transpose(1, 2)
            dv[:, :j] += (att * factors[n] if factors else att).transpose(1, 2) @ dy[:, i:j]
            datt = torch._softmax_backward_data(datt.mul_(factors[n]) if factors else datt, att, -1, att.dtype)  # now of the scores
            dq[:, i:j] = (datt @ k[:, :j]).mul_(scale)
            dk[:, :j].add_(datt.transpose(1, 2) @ q[:, i:j], alpha=scale)
        return dq, dk, dv, None, None


def attention(q, k, v, dropout=0.0, plain=None, mask=None):
    """
    Causal softmax attention: queries (nh, B, T, hs), keys and values (nkv, B, T, hs) -> (nh, B, T, hs); or a mask (B, 1, T, T) says who sees whom.
    By PyTorch's fused kernel, except in a corner that measurements mark out (docs/RECORDS.md): on CPUs it is up to 5 times as slow in bf16, or
    with dropout, as plain operations. `plain` overrules that.
    """
    nh, B, T, hs = q.shape
    if len(k) < nh:
        k, v = (x.repeat_interleave(nh // len(k), dim=0) for x in (k, v))  # grouped-query attention: neighbours share
    if plain is None:
        plain = q.device.type == 'cpu' and (q.dtype == torch.bfloat16 or dropout > 0)
    if plain:
        seen = None if mask is None else mask.expand(B, nh, T, T).transpose(0, 1).reshape(nh * B, T, T)
        return BlockAttention.apply(*(x.reshape(nh * B, T, hs) for x in (q, k, v)), dropout, seen).view(nh, B, T, hs)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None).transpose(0, 1)


class Cache:
    """
    The keys and values of the tokens so far, so that a new token needs only its own row of the network: kv (n_layer, 2, nkv, B, slots, hs).
    Once all slots are taken, a token takes that of the oldest. pads (B,): how many of a row's first tokens are padding, which nobody sees.
    """

    def __init__(self, kv, pads=None, length=0):
        self.kv, self.layers = kv, [layer.unbind() for layer in kv]
        self.pads, self.length = pads, length

    def repeat(self, copies, slots):
        """Each row so many times, side by side, with room for more tokens."""
        kv = F.pad(self.kv.repeat_interleave(copies, dim=3), (0, 0, 0, slots - self.kv.size(4)))
        return Cache(kv, None if self.pads is None else self.pads.repeat_interleave(copies), self.length)

    def extend(self, T):
        """Make room for the next tokens: the first T, or a single one. Returns, layer by layer, what to call in the place of attention()."""
        slots, at = self.kv.size(4), torch.arange(self.length, self.length + T, device=self.kv.device)  # the tokens' numbers (T,)
        self.length += T
        mask = None
        if self.pads is not None:
            kept = torch.arange(min(self.length, slots), device=at.device)
            kept = self.length - 1 - (self.length - 1 - kept) % slots  # which token each slot has (n,)
            mask = (self.pads[:, None, None] <= kept) & (kept <= at[:, None]) | (kept == at[:, None])  # (B, T, n); padding sees itself, to have no 0 / 0
        places = at % slots
        return [partial(self.attend, keys, values, places, mask) for keys, values in self.layers]

    def attend(self, keys, values, places, mask, q, k, v, dropout):
        """Keep the keys and values (nkv, B, T, hs) of new tokens; what these see by their queries, all (nh, B, T, hs)."""
        nh, B, T, hs = q.shape
        keys.index_copy_(2, places, k)
        values.index_copy_(2, places, v)
        if T > 1:
            return attention(q, k, v, mask=None if mask is None else mask[:, None])
        n = min(self.length, keys.size(2))
        keys, values, mask = keys.narrow(2, 0, n), values.narrow(2, 0, n), None if mask is None else mask[None]
        if len(k) == nh:
            return F.scaled_dot_product_attention(q, keys, values, mask)
        q = q.view(len(k), nh // len(k), B, hs).transpose(1, 2)  # (nkv, B, nh / nkv, hs): those that share keys side by side
        return F.scaled_dot_product_attention(q, keys, values, mask).transpose(1, 2).reshape(nh, B, 1, hs)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_size, self.dropout = config.n_head, config.n_kv_head, config.head_size, config.dropout
        width = (self.n_head + 2 * self.n_kv_head) * self.head_size
        self.c_attn = nn.Linear(config.n_embd, width, bias=config.bias)  # query, key, value of all heads in one product
        self.c_proj = nn.Linear(self.n_head * self.head_size, config.n_embd, bias=config.bias)
        self.q_norm = RMSNorm(self.head_size, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_size, config.norm_eps) if config.qk_norm else None

    def forward(self, x, rope, attend=attention):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, -1, self.head_size).permute(2, 0, 1, 3).contiguous()  # (nh + 2 nkv, B, T, hs): one copy, of all three
        q, k, v = qkv.split([self.n_head, self.n_kv_head, self.n_kv_head])
        if self.q_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        p = self.dropout if self.training else 0.0
        y = attend(q, k, v, p)  # (nh, B, T, hs)
        y = y.permute(1, 2, 0, 3).reshape(B, T, -1)  # the heads side by side again
        return dropout(self.c_proj(y), p)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.swiglu = config.activation == 'swiglu'  # Shazeer 2020: https://arxiv.org/abs/2002.05202
        self.c_fc = nn.Linear(config.n_embd, (1 + self.swiglu) * config.n_inner, bias=config.bias)  # SwiGLU's gate and values in one product
        self.gelu = nn.GELU('tanh' if config.activation == 'gelu_tanh' else 'none')
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x):
        x = self.c_fc(x)
        if self.swiglu:
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x  # (B, T, n_inner)
        else:
            x = self.gelu(x)
        return dropout(self.c_proj(x), self.dropout if self.training else 0.0)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = new_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = new_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, rope, attend=attention):
        x = x + self.attn(self.ln_1(x), rope, attend)
        x = x + self.mlp(self.ln_2(x))
        return x


def losses_and_gradients(x, weight, targets):
    """Cross-entropies (N,) of activations (N, C) by the head's matrix (V, C) for targets (N,), and their gradients to the logits (N, V)."""
    losses, logits = x.new_empty(len(x), dtype=torch.float32), x @ weight.t()  # (N,), (N, V)
    cached = x.device.type == 'cpu' and not torch.compiler.is_compiling()
    rows = max(1, PART * (1 if cached else 32) // len(weight))
    for part, wanted, loss in zip(logits.split(rows), targets.split(rows), losses.split(rows)):
        wanted = wanted.clamp(min=0)[:, None]  # (n, 1)
        probs = part.softmax(dim=-1, dtype=torch.float32)  # (n, V)
        loss.copy_(part.amax(dim=-1) - probs.amax(dim=-1).log() - part.gather(1, wanted).squeeze(1))  # log of the sum of all exp(logits), less the target's
        part.copy_(probs.scatter_add_(1, wanted, probs.new_full(wanted.shape, -1.0)))
        del probs  # before the next part's are computed
    return losses, logits


class TokenLosses(torch.autograd.Function):
    """
    Cross-entropy in nats (N,) of activations (N, C) by the head's matrix (V, C) for targets (N,), 0 where the target is -1.
    With many tokens and a large vocabulary the logits are the largest thing in memory. So never all of them are held in fp32, and the backward pass
    finds their gradients in their place, in the precision of x; where these would be too large, they are computed some rows at a time, and again there.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):
        ctx.rows = max(1, KEPT * (4 if x.is_cuda else 1) // (len(weight) * x.element_size()))
        losses = []
        for part, wanted in zip(x.split(ctx.rows), targets.split(ctx.rows)):
            loss, gradient = losses_and_gradients(part, weight, wanted)
            losses.append(loss)
            if len(part) < len(x):
                del gradient  # before the next part's is computed
        ctx.save_for_backward(x, weight, targets, *([gradient] if len(losses) == 1 else []))
        return torch.cat(losses).masked_fill(targets < 0, 0.0)  # in place the compiler of PyTorch 2.11 would lose all gradients

    @staticmethod
    def backward(ctx, factors):
        """Each loss counts with a factor, which is one of its row in either product."""
        x, weight, targets, *gradients = ctx.saved_tensors
        factors = factors.masked_fill(targets < 0, 0.0)[:, None]  # (N, 1)
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        for i in range(0, len(x), ctx.rows):
            some = slice(i, i + ctx.rows)
            gradient = gradients[0] if gradients else losses_and_gradients(x[some], weight, targets[some])[1]  # (n, V)
            dx[some] = (gradient @ weight).float().mul_(factors[some])
            if ctx.needs_input_grad[1]:
                dweight += gradient.t() @ (x[some].float() * factors[some]).to(x.dtype)
        return dx, dweight.to(weight.dtype), None


class GPT(nn.Module):
    gradient_checkpointing = False  # keep only each block's input for the backward pass and compute the rest again: less memory, a third more time
    lora = None  # of a network with adapters: what they are (core/lora.py)

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            **({} if config.rope_theta else {'wpe': nn.Embedding(config.block_size, config.n_embd)}),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=new_norm(config),
        ))
        self.lm_head = nn.Linear(config.n_embd, 1 if config.reward else config.vocab_size, bias=False)
        if config.tied and not config.reward:
            self.transformer.wte.weight = self.lm_head.weight  # Press & Wolf 2017
        self.apply(self._init_weights)
        for name, p in self.named_parameters():  # GPT-2 paper: what is added to the residual stream starts smaller in deeper networks
            if name.endswith('c_proj.weight'):
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
            if getattr(module, 'bias', None) is not None:
                nn.init.zeros_(module.bias)

    def hidden(self, idx, cache=None, documents=None):
        """
        Token ids (B, T) -> the last layer's normalised activations (B, T, C). With a cache, idx are those that follow what it has. documents (B, T) int:
        which one of its row a token belongs to; it sees no other, and learned positions are those within it.
        """
        config, T = self.config, idx.shape[1]
        start, pads = (cache.length, cache.pads) if cache else (0, None)
        assert T <= config.block_size, f'{T} positions do not fit into block_size={config.block_size}'
        before, how = pads[:, None] if pads is not None else None, attention  # tokens of a row that a token's position does not count
        if documents is not None:
            same = documents[:, :, None] == documents[:, None, :]  # (B, T, T)
            before, how = same.int().argmax(dim=-1), partial(attention, mask=same[:, None].tril())  # (B, T): where its document begins
        x = self.transformer.wte(idx)  # (B, T, C)
        rope = None
        if config.rope_theta:
            rope = rotary(T, config.head_size, config.rope_theta, idx.device, start)  # (2, T, hs / 2); only distances count, so what comes before does not matter
        elif before is None:
            x = x + self.transformer.wpe.weight[start:start + T]  # + (T, C)
        else:
            x = x + self.transformer.wpe((torch.arange(start, start + T, device=idx.device) - before).clamp(min=0))  # + (B, T, C)
        x = dropout(x, config.dropout if self.training else 0.0)
        for block, attend in zip(self.transformer.h, cache.extend(T) if cache else [how] * config.n_layer):
            x = checkpoint(block, x, rope, attend, use_reentrant=False) if self.gradient_checkpointing and self.training else block(x, rope, attend)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None, documents=None):
        """
        Token ids (B, T) -> logits (B, T, V); given targets (B, T) -> the loss of each, in nats (B, T), 0 where the target is -1.
        Losses per token, not their mean: who calls decides over what to average. documents: see hidden(). A reward model gives its rewards (B, T).
        """
        x = self.hidden(idx, documents=documents)
        if self.config.reward:
            return self.lm_head(x).squeeze(2)  # (B, T)
        if targets is None:
            return self.lm_head(x)  # (B, T, V)
        device = x.device.type
        if not torch.is_grad_enabled():
            x, wanted, rows = x.flatten(0, 1), targets.flatten(), max(1, PART // self.config.vocab_size * (1 if device == 'cpu' else 32))
            return torch.cat([F.cross_entropy(self.lm_head(part).float(), right, ignore_index=-1, reduction='none')
                              for part, right in zip(x.split(rows), wanted.split(rows))]).view(idx.shape)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return TokenLosses.apply(x.flatten(0, 1).to(dtype), self.lm_head.weight.to(dtype), targets.flatten()).view(idx.shape)

    def matrices(self):
        """What Muon is for: the matrices of the blocks, each with the rows of those that are stacked in it, [(parameter, [rows, ...])]."""
        config = self.config
        for block in self.transformer.h:
            yield block.attn.c_attn.weight, [heads * config.head_size for heads in (config.n_head, config.n_kv_head, config.n_kv_head)]
            yield block.attn.c_proj.weight, [config.n_embd]
            yield block.mlp.c_fc.weight, [config.n_inner] * (1 + block.mlp.swiglu)
            yield block.mlp.c_proj.weight, [config.n_embd]

    def num_params(self):
        """Parameters that multiply: all but the position embeddings (nanoGPT's count) and an untied token embedding."""
        return sum(p.numel() for name, p in self.named_parameters() if 'wpe' not in name and ('wte' not in name or self.config.tied))

    def flops_per_token(self):
        """Floating-point operations that training spends per token (PaLM, appendix B: https://arxiv.org/abs/2204.02311)."""
        config = self.config
        return 6 * self.num_params() + 12 * config.n_layer * config.n_head * config.head_size * config.block_size

    def crop_block_size(self, block_size):
        """Shorten the context: a network trained on 1,024 positions works on its first 256."""
        assert block_size <= self.config.block_size
        self.config.block_size = block_size
        if not self.config.rope_theta:
            self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].detach().clone())

    @torch.inference_mode()
    def generate(self, idx, max_new_tokens, choose=lambda logits: logits.argmax(dim=-1), pads=None, copies=1):
        """
        Continue prompts idx (B, T); yields the next token of every row, (B * copies,), up to max_new_tokens times. Each prompt is read once, for all of
        its copies, which stand side by side. choose(logits (B * copies, V)) draws the tokens: by default the most likely ones. Of prompts that
        differ in length the shorter ones begin with pads (B,) tokens of padding; each is continued as it would be alone.
        Beyond block_size learned positions cannot go: there the last block_size tokens are read anew for every token, as nanoGPT does.
        Rotary ones can: each token sees the block_size before it, through which older ones have passed on what they knew.
        """
        c, block_size = self.config, self.config.block_size
        if pads is not None:
            pads = (pads - max(0, idx.size(1) - block_size)).clamp(min=0)
        idx = idx[:, -block_size:]
        weight, device = self.transformer.wte.weight, idx.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        cache = Cache(weight.new_zeros(c.n_layer, 2, c.n_kv_head, *idx.shape, c.head_size, dtype=dtype), pads)
        logits = self.lm_head(self.hidden(idx, cache)[:, -1])  # (B, V)
        cache = cache.repeat(copies, min(idx.size(1) + max_new_tokens, block_size))
        logits, idx = (x.repeat_interleave(copies, dim=0) for x in (logits, idx))
        for i in range(max_new_tokens):
            token = choose(logits.float())  # (B * copies,)
            yield token
            if i == max_new_tokens - 1:
                return
            idx = torch.cat((idx, token[:, None]), dim=1)
            new = idx[:, -1:]
            if cache.length == block_size and not c.rope_theta:
                cache.length, new = 0, idx[:, -block_size:]
                cache.pads = None if cache.pads is None else (cache.pads - 1).clamp(min=0)
            logits = self.lm_head(self.hidden(new, cache)[:, -1])  # (B * copies, V)
