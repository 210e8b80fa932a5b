"""A stand-in for a fork of nanoGPT's model.py: RMSNorm, rotary positions, grouped heads, nothing pretrained.

tests/test_models.py puts it in the place of model.py, with nanogpt_like.py beside it, of which it takes what its author
left as it was. Of nanoGPT's names for modules it keeps transformer.h, where the blocks are; its GPTConfig has two
fields more.

Shapes: B sequences, T tokens of each, C = n_embd, nh = n_head, nkv = n_kv_head, hs = C // nh, V = vocab_size.
"""

from dataclasses import dataclass

import nanogpt_like
import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class GPTConfig(nanogpt_like.GPTConfig):
    n_kv_head: int = None  # heads of keys and values, each shared by as many heads of queries; None: n_head
    rope_base: float = 10000.0  # the longest wavelength of positions, over 2 pi


def rotate(x, cos, sin):
    """Turn each pair of features by its position's angles. x: (B, heads, T, hs); cos, sin: (T, hs // 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Rotary positions (Su et al. 2021, arXiv:2104.09864), grouped heads (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head or config.n_head
        self.head_size = config.n_embd // config.n_head
        self.to_q = nn.Linear(config.n_embd, self.n_head * self.head_size, bias=False)
        self.to_kv = nn.Linear(config.n_embd, 2 * self.n_kv_head * self.head_size, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.dropout = nn.Dropout(config.dropout)  # a module, where nanoGPT keeps a number under this name

    def forward(self, x, cos, sin):
        B, T, C = x.shape
        q = self.to_q(x).view(B, T, self.n_head, self.head_size).transpose(1, 2)  # (B, nh, T, hs)
        k, v = self.to_kv(x).view(B, T, 2 * self.n_kv_head, self.head_size).transpose(1, 2).chunk(2, dim=1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for t in (k, v))  # (B, nh, T, hs)
        dropout = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.dropout(self.out(y.transpose(1, 2).reshape(B, T, C)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(config.n_embd), nn.RMSNorm(config.n_embd)
        self.attention, self.feed_forward = Attention(config), nanogpt_like.MLP(config)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.norm_1(x), cos, sin)
        return x + self.feed_forward(self.norm_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        modules = dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            norm=nn.RMSNorm(config.n_embd),
        )
        self.transformer = nn.ModuleDict(modules)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)  # not tied
        for p in self.parameters():
            if p.dim() >= 2:
                nn.init.normal_(p, std=0.02)
        half = config.n_embd // config.n_head // 2
        wavelengths = config.rope_base ** (torch.arange(half) / half)
        angles = torch.arange(config.block_size)[:, None] / wavelengths  # (block_size, hs // 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        print(f"number of parameters: {self.get_num_params() / 1e6:.2f}M")

    def get_num_params(self, non_embedding=True):
        embedding = self.transformer.wte.weight.numel() if non_embedding else 0
        return sum(p.numel() for p in self.parameters()) - embedding

    def forward(self, idx, targets=None):
        T = idx.shape[1]
        assert self.config.block_size >= T
        x = self.transformer.wte(idx)  # (B, T, C)
        for block in self.transformer.h:
            x = block(x, self.cos[:T], self.sin[:T])
        x = self.transformer.norm(x)
        if targets is None:
            return self.lm_head(x[:, [-1]]), None  # (B, 1, V)
        logits = self.lm_head(x)  # (B, T, V)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def crop_block_size(self, block_size):
        self.config.block_size = block_size  # no weight belongs to a position

    configure_optimizers = nanogpt_like.GPT.configure_optimizers
    estimate_mfu = nanogpt_like.GPT.estimate_mfu
    generate = nanogpt_like.GPT.generate
