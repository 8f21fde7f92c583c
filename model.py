"""
A GPT, whole, in this file: GPT-2's network as nanoGPT writes it, weight for weight (the same state-dict names).
References:
1) nanoGPT: https://github.com/karpathy/nanoGPT/blob/master/model.py
2) GPT-2 (Radford et al. 2019): https://github.com/openai/gpt-2/blob/master/src/model.py
3) transformers: https://github.com/huggingface/transformers/blob/main/src/transformers/models/gpt2/modeling_gpt2.py
Letters in the shapes: B rows, T positions, C = n_embd channels, nh heads of hs = C / nh channels, V vocabulary.
"""
import json
import math
import os
import sys
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50,257 rounded up to a multiple of 64, which matrix units like
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linears and LayerNorms, like GPT-2; False is a bit better and faster
    activation: str = 'gelu'  # 'gelu': the exact one, nanoGPT's; 'gelu_tanh': OpenAI's GPT-2 weights want this one


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias, under nanoGPT's names."""

    def __init__(self, ndim, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


def attention(qkv, dropout, plain=None):
    """
    Causal softmax attention: queries, keys and values (3, B, nh, T, hs) -> (B, nh, T, hs).
    By PyTorch's fused kernel, but for one corner that measurements mark out (docs/RECORDS.md): on CPUs its backward is 1.5 to 5 times slower
    in bf16 than three plain operations, up to T of about 512. `plain` overrules that.
    """
    _, B, nh, T, hs = qkv.shape
    if plain is None:
        plain = qkv.device.type == 'cpu' and qkv.dtype == torch.bfloat16 and T <= 512 and torch.is_grad_enabled()
    if not plain:
        q, k, v = qkv
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    q, k, v = qkv.reshape(3, B * nh, T, hs)  # one copy, of all three
    future = q.new_full((T, T), float('-inf')).triu(1)
    att = torch.baddbmm(future, q, k.transpose(1, 2), alpha=1 / math.sqrt(hs))  # (B * nh, T, T)
    att = F.dropout(F.softmax(att, dim=-1), dropout)
    return (att @ v).view(B, nh, T, hs)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key, value of all heads in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (3, B, nh, T, hs)
        y = attention(qkv, self.dropout if self.training else 0.0)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU('tanh' if config.activation == 'gelu_tanh' else 'none')
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=LayerNorm(config.n_embd, config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied: one matrix reads tokens in and out (Press & Wolf 2017)
        self.apply(self._init_weights)
        for name, p in self.named_parameters():  # GPT-2 paper: what is added to the residual stream starts smaller in deeper networks
            if name.endswith('c_proj.weight'):
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
            if getattr(module, 'bias', None) is not None:
                nn.init.zeros_(module.bias)

    def hidden(self, idx):
        """Token ids (B, T) -> the last layer's normalised activations (B, T, C)."""
        T = idx.shape[1]
        assert T <= self.config.block_size, f'{T} positions do not fit into block_size={self.config.block_size}'
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[:T]  # (B, T, C) + (T, C)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """
        Token ids (B, T) -> logits (B, T, V); given targets (B, T) -> the loss of each, in nats (B, T), 0 where the target is -1.
        Losses per token, not their mean: who calls decides over what to average.
        """
        logits = self.lm_head(self.hidden(idx))  # (B, T, V)
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)).float(), targets.reshape(-1), ignore_index=-1, reduction='none')
        return loss.view(targets.shape)

    def num_params(self):
        """Parameters that multiply: all but the position embeddings (nanoGPT's count; the token embeddings are the head's matrix)."""
        return sum(p.numel() for p in self.parameters()) - self.transformer.wpe.weight.numel()

    def flops_per_token(self):
        """Floating-point operations that training spends per token (PaLM, appendix B: https://arxiv.org/abs/2204.02311)."""
        config = self.config
        return 6 * self.num_params() + 12 * config.n_layer * config.n_embd * config.block_size

    def crop_block_size(self, block_size):
        """Shorten the context: a network trained on 1,024 positions works on its first 256."""
        assert block_size <= self.config.block_size
        self.config.block_size = block_size
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].detach().clone())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, vocab_size=None, allowed=None):
        """
        Continue idx (B, T); yields the next token of every row, (B,), up to max_new_tokens times.
        temperature 0 is greedy; top_k > 0 keeps the k most likely tokens; top_p < 1 the smallest set with that much probability
        (Holtzman et al. 2019); ids from vocab_size on (rows that only pad the matrix) are never drawn; allowed() says before each draw which
        of the others may be, (B, vocab_size) bool.
        The whole context is computed anew for each token; a cache of keys and values would live in this method.
        """
        for _ in range(max_new_tokens):
            x = self.hidden(idx[:, -self.config.block_size:])  # (B, T, C)
            logits = self.lm_head(x[:, -1]).float()[:, :vocab_size]  # (B, V)
            if allowed:
                logits = logits.masked_fill(~allowed()[:, :logits.size(1)].to(logits.device), float('-inf'))
            if temperature == 0:
                token = logits.argmax(dim=-1)
            else:
                token = torch.multinomial(sampling_probs(logits / temperature, top_k, top_p), num_samples=1).squeeze(1)
            idx = torch.cat((idx, token[:, None]), dim=1)
            yield token

    @classmethod
    def from_pretrained(cls, name, dropout=0.0):
        """
        OpenAI's GPT-2 weights: name is a folder that holds a `GPT2LMHeadModel` (config.json and model.safetensors or pytorch_model.bin),
        or 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl' or another repository on the Hugging Face hub.
        """
        folder = download_pretrained(name)
        with open(os.path.join(folder, 'config.json'), encoding='utf-8') as f:
            hf = json.load(f)
        wanted = {'model_type': 'gpt2', 'layer_norm_epsilon': 1e-5, 'n_inner': None, 'tie_word_embeddings': True, 'scale_attn_weights': True,
                  'scale_attn_by_inverse_layer_idx': False, 'add_cross_attention': False}
        odd = {key: hf[key] for key, value in wanted.items() if hf.get(key, value) not in (value, key == 'n_inner' and 4 * hf['n_embd'])}
        activation = {'gelu': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh'}.get(hf.get('activation_function', 'gelu_new'))
        if odd or activation is None:
            sys.exit(f'{name}: expected a GPT-2, its config.json says {odd or hf["activation_function"]}')
        model = cls(GPTConfig(block_size=hf['n_positions'], vocab_size=hf['vocab_size'], n_layer=hf['n_layer'], n_head=hf['n_head'],
                              n_embd=hf['n_embd'], dropout=dropout, bias=True, activation=activation))
        state = {key.removeprefix('transformer.'): value for key, value in load_weights(folder).items()}
        with torch.no_grad():
            for key, p in model.transformer.named_parameters():
                # OpenAI's Conv1D keeps its matrices transposed
                p.copy_(state[key].t() if key.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')) else state[key])
        return model


def sampling_probs(logits, top_k=0, top_p=1.0):
    """Logits (B, V) -> the probabilities to draw from (B, V), after top-k and top-p."""
    if top_k > 0:
        kth = torch.topk(logits, min(top_k, logits.size(-1))).values[:, [-1]]
        logits = logits.masked_fill(logits < kth, float('-inf'))
    probs = F.softmax(logits, dim=-1)
    if top_p < 1.0:
        ordered, order = probs.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered > top_p] = 0.0  # what comes before it already reaches top_p
        probs = torch.zeros_like(probs).scatter(-1, order, ordered)
    return probs


def download_pretrained(name):
    """The folder of a Hugging Face model: name itself if it is one, else its copy from the hub (HF_ENDPOINT and HF_HOME are honoured)."""
    folder = os.path.expanduser(name)
    if os.path.isfile(os.path.join(folder, 'config.json')):
        return folder
    if os.path.isdir(folder):
        sys.exit(f'{name}: no config.json in this folder; expected a Hugging Face model')
    try:
        from huggingface_hub import snapshot_download
        return snapshot_download(name, allow_patterns=['config.json', '*.safetensors', 'tokenizer.json', 'vocab.json', 'merges.txt'])
    except Exception as error:  # every kind of network failure has a class of its own there
        sys.exit(f'{name}: no such folder, and no such model could be had from the Hugging Face hub ({type(error).__name__}); '
                 'without network, give the path of a folder with config.json and model.safetensors')


def load_weights(folder):
    """The tensors of a Hugging Face folder, by name: *.safetensors, or pytorch_model.bin (never unpickled beyond tensors)."""
    files = sorted(name for name in os.listdir(folder) if name.endswith('.safetensors'))
    if files:
        from safetensors.torch import load_file
        return {key: value for name in files for key, value in load_file(os.path.join(folder, name)).items()}
    path = os.path.join(folder, 'pytorch_model.bin')
    if not os.path.exists(path):
        sys.exit(f'{folder}: no weights; expected model.safetensors or pytorch_model.bin')
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # nearly every kind there is
        sys.exit(f'{path}: not a file of tensors alone, or a damaged one ({type(error).__name__})')
