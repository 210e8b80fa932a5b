"""Models of which passes use different parts, or that draw or change what is no weight: GPTConfig's kind says how.

What a pass uses is told by its tokens, so that it doesn't depend on how many processes there are.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    block_size: int = 16
    vocab_size: int = 65
    n_layer: int = 2
    n_head: int = 1
    n_embd: int = 32
    dropout: float = 0.0
    bias: bool = False
    kind: str = "experts"


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.kind = config.kind
        self.norm = nn.LayerNorm(C)
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C)) for _ in range(4))
        self.running = nn.BatchNorm1d(C, affine=False) if config.kind == "running" else None

    def forward(self, x, route):
        """x: (B, T, C); route: an expert of each sequence, int64 (B,)."""
        if self.running is not None:
            x = self.running(x.transpose(1, 2)).transpose(1, 2)
        if self.kind != "experts":
            return x + sum(expert(self.norm(x)) for expert in self.mlp)
        parts = [x]
        for number, expert in enumerate(self.mlp):
            mine = route == number
            if mine.any():  # a pass of few sequences leaves some experts out
                parts.append(torch.zeros_like(x).masked_scatter(mine[:, None, None].expand_as(x), expert(x[mine])))
        return sum(parts)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        C = config.n_embd
        self.transformer = nn.ModuleDict(dict(h=nn.ModuleList(Block(config) for _ in range(config.n_layer))))
        self.wte, self.wpe = nn.Embedding(config.vocab_size, C), nn.Embedding(config.block_size, C)
        self.lm_head = nn.Linear(C, config.vocab_size, bias=False)
        if config.kind == "frozen":
            self.wpe.requires_grad_(False)
            self.transformer.h[0].mlp.requires_grad_(False)
        if config.kind in ("unused", "rare"):
            self.more = nn.Parameter(torch.randn(C))
        if config.kind == "random_buffers":
            self.register_buffer("proj", torch.randn(C, C) / C)
            self.register_buffer("turn", torch.polar(torch.ones(C), torch.randn(C)))  # complex
            self.register_buffer("mask", torch.rand(C) < 0.5)
            self.register_buffer("scale", torch.rand(()).expand(C))

    def forward(self, idx, targets=None):
        kind, first = self.config.kind, int(idx[0, 0])
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        if kind == "random_buffers":
            x = x + (x @ self.proj * self.turn).real * self.mask * self.scale
        if kind == "rare" and first % 8 == 1:
            x = x + self.more
        for number, block in enumerate(self.transformer.h):
            dropped = first % 3 == number
            if not (kind == "layer_drop" and self.training and dropped):
                x = block(x, idx[:, 0] % 4)
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten()) if targets is not None else None

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
