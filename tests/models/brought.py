"""What people change in nanoGPT's model.py, one change at a time: GPTConfig.kind and .moved_by name it.

It stands beside nanogpt_like.py, whose layers it takes, as forks do that keep their additions apart.

Shapes: B sequences, T tokens of each, C = n_embd, nh = n_head, hs = C // nh.
"""

import random
from dataclasses import dataclass

import nanogpt_like
import torch
import torch.nn as nn
from torch.nn import functional as F

# Those of the second line draw random numbers or keep state in a block's forward, those of the third are of GPT.
KINDS = (
    "plain", "infinite mask", "complex", "random", "experts", "tuple", "scalar", "frozen", "unused",
    "dropout", "layer drop", "running",
    "bfloat16", "double", "extra state", "reads values",
)  # fmt: skip


@dataclass
class GPTConfig(nanogpt_like.GPTConfig):
    kind: str = "plain"
    moved_by: str = "AdamW"
    checkpoint: bool = False  # a name that train.py uses
    rate: float = 1  # of the groups that "factors" makes: a number, though its default is whole


class Attention(nanogpt_like.CausalSelfAttention):
    """With a mask that is a buffer, as before PyTorch had an operation of its own, or with rotary positions."""

    def __init__(self, config):
        super().__init__(config)
        self.kind, size = config.kind, config.block_size
        if self.kind == "infinite mask":
            self.register_buffer("mask", torch.triu(torch.full((size, size), float("-inf")), 1))
        if self.kind == "complex":
            angles = torch.outer(torch.arange(size), 100.0 ** -torch.arange(0, 1, 2 * config.n_head / config.n_embd))
            self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))  # (T, hs / 2)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in self.c_attn(x).chunk(3, dim=-1))
        if self.kind == "complex":
            q, k = (torch.view_as_complex(t.float().unflatten(-1, (-1, 2))) * self.turns[:T] for t in (q, k))
            q, k = (torch.view_as_real(t).flatten(-2).type_as(v) for t in (q, k))
        mask = dict(attn_mask=self.mask[:T, :T]) if self.kind == "infinite mask" else dict(is_causal=True)
        return self.c_proj(F.scaled_dot_product_attention(q, k, v, **mask).transpose(1, 2).reshape(B, T, C))


class Experts(nn.Module):
    """Each token goes to the one of three that a router likes best; balance is the loss that evens their shares."""

    def __init__(self, config):
        super().__init__()
        self.router = nn.Linear(config.n_embd, 3, bias=False)
        self.experts = nn.ModuleList(nanogpt_like.MLP(config) for _ in range(3))

    def forward(self, x):
        flat = x.flatten(0, 1)
        shares = self.router(flat).softmax(-1)  # (B * T, 3)
        best = shares.argmax(-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            if (chosen := best == i).any():
                out[chosen] = expert(flat[chosen]) * shares[chosen, i : i + 1]
        self.balance = 3 * (shares.mean(0) * F.one_hot(best, 3).float().mean(0)).sum()
        return out.view_as(x)


class Block(nanogpt_like.Block):
    def __init__(self, config):
        super().__init__(config)
        self.kind, self.attn = config.kind, Attention(config)
        if self.kind == "experts":
            self.mlp = Experts(config)
        if self.kind == "dropout":
            self.drop = nn.Dropout(0.5)
        if self.kind == "scalar":
            self.scale = nn.Parameter(torch.tensor(0.5))
        if self.kind == "running":
            self.register_buffer("mean", torch.zeros(config.n_embd))
        if self.kind == "random":
            self.register_buffer("project", torch.randn(config.n_embd, config.n_embd) / config.n_embd)

    def forward(self, x):
        if self.kind == "layer drop" and self.training and torch.rand(()) < 0.3:
            return x
        if self.kind == "python's layer drop" and self.training and random.random() < 0.3:
            return x
        if self.kind == "running":
            if self.training:
                self.mean.lerp_(x.detach().mean((0, 1)), 0.1)
            x = x - self.mean
        if self.kind == "random":
            x = x + x @ self.project
        y = super().forward(x)
        if self.kind == "dropout":
            y = self.drop(y)
        if self.kind == "scalar":
            y = x + self.scale * (y - x)
        return (y, {"mean": y.mean()}) if self.kind == "tuple" else y


class GPT(nanogpt_like.GPT):
    block, calls = Block, 0

    def __init__(self, config):
        super().__init__(config)
        if config.kind == "frozen":
            self.transformer.h[0].requires_grad_(False)
        if config.kind == "unused":
            self.spare = nn.Linear(config.n_embd, config.n_embd)
        if config.kind == "reads values":
            self.rates = [rate.item() for rate in torch.linspace(0, 0.1, config.n_layer)]
            nn.init.trunc_normal_(self.lm_head.weight, std=0.02)
            while (self.lm_head.weight.abs() > 0.05).any():
                nn.init.normal_(self.lm_head.weight, std=0.01)
        if config.kind in ("bfloat16", "double"):
            self.to(getattr(torch, config.kind))

    def forward(self, idx, targets=None):
        T = idx.shape[1]
        self.calls += self.training
        x, more = self.transformer.wte(idx) + self.transformer.wpe.weight[:T], 0.0  # (B, T, C)
        for block in self.transformer.h:
            x = block(x)
            if self.config.kind == "tuple":
                x, told = x
                more = more + 0.01 * told["mean"] ** 2
            if self.config.kind == "experts":
                more = more + 0.01 * block.mlp.balance
        x = self.transformer.ln_f(x)
        told = () if self.config.kind == "plain" else (x,)  # forks return more than logits and a loss
        if targets is None:
            return self.lm_head(x[:, [-1]]), None, *told
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1) + more, *told

    def get_extra_state(self):
        return {"calls": self.calls if self.config.kind == "extra state" else 0}

    def set_extra_state(self, state):
        self.calls = state["calls"]

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        params = [p for p in self.parameters() if p.requires_grad]
        matrices, rest = [p for p in params if p.dim() == 2], [p for p in params if p.dim() != 2]
        name, lr = self.config.moved_by, learning_rate
        if name == "AdamW":
            return super().configure_optimizers(weight_decay, learning_rate, betas, device_type)
        if name == "AMSGrad":
            return torch.optim.AdamW(params, lr=lr, betas=betas, amsgrad=True)
        if name == "momentum":
            return torch.optim.SGD(params, lr=lr, momentum=0.9, nesterov=True)
        if name == "factors":
            slow = dict(params=matrices, lr=0.1 * lr, weight_decay=weight_decay, of="matrices")
            return torch.optim.AdamW([slow, dict(params=rest, weight_decay=0.0)], lr=self.config.rate * lr)
        if name == "two":
            return Two(torch.optim.SGD(matrices, lr=10 * lr, momentum=0.9), torch.optim.Adam(rest, lr=lr, fused=True))
        if name == "lookahead":
            return Lookahead(torch.optim.AdamW(params, lr=lr))
        if name == "factored":
            return Factored(params, lr)
        if name == "Muon":
            return [torch.optim.Muon(matrices, lr=lr), torch.optim.AdamW(rest, lr=lr)]
        return getattr(torch.optim, name)(params, lr=lr)


class Two:
    """Two optimizers that are one to train.py."""

    def __init__(self, *both):
        self.both, self.param_groups = both, [group for one in both for group in one.param_groups]

    def step(self):
        for one in self.both:
            one.step()

    def zero_grad(self, set_to_none=True):
        for one in self.both:
            one.zero_grad(set_to_none)

    def state_dict(self):
        return {f"optimizer{i}": one.state_dict() for i, one in enumerate(self.both)}

    def load_state_dict(self, state):
        for i, one in enumerate(self.both):
            one.load_state_dict(state[f"optimizer{i}"])


class Lookahead:
    """As its users write it: around another optimizer, whose groups it takes again on loading."""

    def __init__(self, inner):
        self.inner, self.param_groups = inner, inner.param_groups

    def step(self):
        self.inner.step()

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)

    def state_dict(self):
        return [self.inner.state_dict()]

    def load_state_dict(self, state):
        self.inner.load_state_dict(state[0])
        self.param_groups = self.inner.param_groups


class Factored(torch.optim.Optimizer):
    """State that has more rows than its weight, and moments in float64."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None and p.dim() == 2):
            state = self.state[p]
            if not state:
                state["right"] = torch.zeros(p.shape[1], p.shape[1])
                state["moment"] = torch.zeros(p.shape, dtype=torch.double)
            state["right"] += p.grad.T @ p.grad
            state["moment"].lerp_(p.grad.double(), 0.1)
            rate, eye = self.param_groups[0]["lr"], torch.eye(p.shape[1])
            p -= rate * state["moment"].float() @ (eye + state["right"]).inverse()
