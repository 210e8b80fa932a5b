"""nanoGPT's way of computing, for the benchmarks that compare with it: written anew, after what its train.py does."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def their_attention(layer, x):
    """The attention of a layer's weights, from x (B, T, C): by split and transposes."""
    B, T, C = x.shape
    heads = layer.n_head
    parts = layer.c_attn(x).split(C, dim=2)
    q, k, v = (p.view(B, T, heads, C // heads).transpose(1, 2) for p in parts)  # (B, nh, T, hs)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return layer.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class TheirForward(nn.Module):
    """A GPT's weights, run as nanoGPT runs them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, idx, targets):
        gpt = self.model.transformer
        x = gpt.wte(idx) + gpt.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in gpt.h:
            x = x + their_attention(block.attn, block.ln_1(x))
            x = x + block.mlp(block.ln_2(x))
        logits = self.model.lm_head(gpt.ln_f(x))
        return logits, F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=-1)


def their_optimizer(model, device):
    """AdamW that is fused on CUDA alone."""
    groups = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type).param_groups
    groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups]
    return torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=device.type == "cuda")


def their_update(model, optimizer, scaler, grad_clip=1.0):
    """Clip the gradients that a backward pass has left, and let the weights move."""
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def their_batch(path, batch_size, block_size, device, generator):
    """(x, y), each int64 (B, T), stacked from single rows."""
    data = np.memmap(path, dtype=np.uint16, mode="r")
    starts = torch.randint(len(data) - block_size, (batch_size,), generator=generator)
    x = torch.stack([torch.from_numpy(data[i : i + block_size].astype(np.int64)) for i in starts])
    y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + block_size].astype(np.int64)) for i in starts])
    if device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
    return x.to(device), y.to(device)
