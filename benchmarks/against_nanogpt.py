"""Training steps of this project and of nanoGPT's way of computing, in turns in one process.

    python benchmarks/against_nanogpt.py --batch_size=4 --block_size=256

nanoGPT's way: a batch stacked from single rows, attention by split and transposes, the logits of every
position in memory, AdamW that is fused on CUDA alone. Both start from the same weights and see the same
batches; their losses are compared. Prints a table, and one line of JSON last.
"""

import os
import statistics
import tempfile
import time

import numpy as np
import torch
from common import finish
from torch.nn import functional as F

import runtime
from batches import Batches
from configurator import at_least, configure
from model import GPT, GPTConfig
from step import train_step

# ---- keys: --key=value overrides them ----------------------------------------------------------------------
batch_size = 4
block_size = 256
n_layer = 12
n_head = 12
n_embd = 768
rounds = 5  # turns that are counted
steps = 4  # of each side in a turn
device = runtime.best_device()
dtype = runtime.best_dtype(device)
save = ""  # a file for the result
config, given = configure(globals())
at_least(1, config, "batch_size", "block_size", "rounds", "steps")
if "dtype" not in given:
    dtype = config["dtype"] = runtime.best_dtype(device)
device = runtime.open_device(device)
runtime.take_device(device)
autocast = runtime.autocast(device, dtype)
VOCAB_SIZE = 50304


class Theirs:
    """A training step as nanoGPT takes it."""

    def __init__(self, model, folder):
        self.model, self.path = model, os.path.join(folder, "train.bin")
        self.scaler = runtime.grad_scaler(device, dtype)
        groups = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type).param_groups
        groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups]
        self.optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=device.type == "cuda")
        self.generator = torch.Generator().manual_seed(1)
        self.x, self.y = self.batch()

    def batch(self):
        data = np.memmap(self.path, dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - block_size, (batch_size,), generator=self.generator)
        x = torch.stack([torch.from_numpy(data[i : i + block_size].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + block_size].astype(np.int64)) for i in starts])
        if device.type == "cuda":
            return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
        return x.to(device), y.to(device)

    def attention(self, layer, x):
        B, T, C = x.shape
        parts = layer.c_attn(x).split(C, dim=2)
        q, k, v = (p.view(B, T, n_head, C // n_head).transpose(1, 2) for p in parts)  # (B, nh, T, hs)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return layer.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))

    def logits_and_loss(self):
        gpt = self.model.transformer
        x = gpt.wte(self.x) + gpt.wpe(torch.arange(block_size, device=device))
        for block in gpt.h:
            x = x + self.attention(block.attn, block.ln_1(x))
            x = x + block.mlp(block.ln_2(x))
        logits = self.model.lm_head(gpt.ln_f(x))
        return logits, F.cross_entropy(logits.view(-1, VOCAB_SIZE), self.y.view(-1), ignore_index=-1)

    def step(self):
        with autocast:
            self.logits, loss = self.logits_and_loss()  # nanoGPT's script holds on to the logits too
        self.x, self.y = self.batch()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


class Ours:
    """A training step as train.py takes it."""

    def __init__(self, model, folder):
        self.model = model
        self.scaler = runtime.grad_scaler(device, dtype)
        self.optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
        self.batches = Batches(folder, batch_size=batch_size, block_size=block_size, device=device)
        self.batches.start(VOCAB_SIZE, torch.Generator().manual_seed(1).get_state())

    def step(self):
        return train_step(
            self.model, self.optimizer, self.scaler, self.batches, autocast=autocast, micro_steps=1, grad_clip=1.0
        )


def turn(side):
    """(seconds a step, losses) of one turn."""
    runtime.synchronize(device)
    start = time.perf_counter()
    losses = [side.step() for _ in range(steps)]
    runtime.synchronize(device)
    return (time.perf_counter() - start) / steps, [loss.item() for loss in losses]


with tempfile.TemporaryDirectory() as folder:
    for split in ("train", "val"):
        rng = np.random.default_rng(0)
        rng.integers(50257, size=1_000_000, dtype=np.uint16).tofile(os.path.join(folder, f"{split}.bin"))
    sides = {}
    for name, side in (("nanoGPT's way", Theirs), ("ours", Ours)):
        torch.manual_seed(1337)
        shape = GPTConfig(block_size, VOCAB_SIZE, n_layer, n_head, n_embd, dropout=0.0, bias=False)
        sides[name] = side(GPT(shape).to(device), folder)
    seconds = {name: [] for name in sides}
    difference = 0.0
    for index in range(rounds + 1):
        losses = {}
        for name, side in sides.items():
            took, losses[name] = turn(side)
            if index:  # the first turn warms up
                seconds[name].append(took)
        difference = max(difference, *(abs(a - b) for a, b in zip(*losses.values(), strict=True)))

tokens = batch_size * block_size
theirs, ours = seconds.values()
ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
for name, took in seconds.items():
    median = statistics.median(took)
    print(f"{name:14} {median * 1000:10.1f} ms a step {tokens / median:12,.0f} tok/s")
print(f"ratio of tok/s {statistics.median(ratios):10.3f} ({min(ratios):.3f} to {max(ratios):.3f} over {rounds} turns)")
print(f"largest difference of a loss {difference:.1e}")
figures = {
    "seconds_per_step": {"nanogpt_way": statistics.median(theirs), "ours": statistics.median(ours)},
    "tokens_per_second_ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    "largest_loss_difference": difference,
}
finish("against_nanogpt", config, device, figures, save)
