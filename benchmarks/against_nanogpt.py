"""Training steps of this project and of nanoGPT's way of computing: speed in turns, and peak memory.

    python benchmarks/against_nanogpt.py --batch_size=8 --block_size=1024

nanoGPT's way: a batch stacked from single rows, attention by split and transposes, the logits of every
position in memory, AdamW that is fused on CUDA alone, and on a CPU float32 whatever dtype says. Both start from
the same weights and see the same batches; their losses are compared. Each side is a process of its own, so that
each has its own peak; they take turns, and one waits while the other works. Prints a table, and one line of JSON
last.
"""

import os
import statistics
import sys
import tempfile
import time
from functools import partial

import numpy as np
import torch
from common import Player, finish, take_turns
from nanogpt import TheirForward, their_batch, their_optimizer, their_update

from configurator import configure
from model import GPT, GPTConfig
from nanofit import ALLOCATOR_VARIABLES, machine, models, settings
from nanofit.batches import Batches
from nanofit.optimizers import allocate_state
from nanofit.step import train_step
from nanofit.tokens import open_data
from nanofit.units import MemoryLevers

# ---- keys: --key=value overrides them ----------------------------------------------------------------------
batch_size = 4
block_size = 256
n_layer = 12
n_head = 12
n_embd = 768
rounds = 5  # turns that are counted
steps = 4  # of each side in a turn
device = machine.best_device()
dtype = machine.best_dtype(device)
compile = device == "cuda"  # both sides
recompute = False  # ours
same_autocast = False  # on a CPU, let nanoGPT's way compute in dtype too
side = ""  # 'ours' or 'nanogpt': the process of one side, which this script starts itself
folder = ""  # the data of a side
save = ""  # a file for the result
config, given = configure(globals())
settings.at_least(1, config, "batch_size", "block_size", "rounds", "steps")
dtype = config["dtype"] = settings.dtype(config, given)
settings.one_of(("", "ours", "nanogpt"), config, "side")
device = machine.find_device(device)
if side == "ours" or device.type != "cpu":  # of the C library, too, nanoGPT asks nothing
    machine.set_device(device)
VOCAB_SIZE = 50304


class Theirs:
    """A training step as nanoGPT takes it."""

    def __init__(self, model, folder):
        self.model, self.path = model, os.path.join(folder, "train.bin")
        self.forward = torch.compile(TheirForward(model)) if compile else TheirForward(model)
        self.dtype = dtype if same_autocast or device.type == "cuda" else "float32"
        self.autocast = machine.autocast(device, self.dtype)
        self.scaler = machine.grad_scaler(device, self.dtype)
        self.optimizer = their_optimizer(model, device)
        self.generator = torch.Generator().manual_seed(1)
        self.x, self.y = self.batch()

    def batch(self):
        return their_batch(self.path, batch_size, block_size, device, self.generator)

    def step(self):
        with self.autocast:
            self.logits, loss = self.forward(self.x, self.y)  # nanoGPT's script holds on to the logits too
        self.x, self.y = self.batch()
        self.scaler.scale(loss).backward()
        their_update(self.model, self.optimizer, self.scaler)
        return loss.detach()


class Ours:
    """A training step as train.py takes it."""

    def __init__(self, model, folder):
        levers = MemoryLevers(recompute=recompute).within(machine.total_memory_bytes(device), device.type)
        models.apply_levers(model, levers)
        self.model = torch.compile(model) if compile else model
        self.autocast, self.scaler = machine.autocast(device, dtype), machine.grad_scaler(device, dtype)
        self.optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
        allocate_state(self.optimizer)
        torch.manual_seed(1)  # as theirs
        self.batches = Batches(open_data(folder, block_size, VOCAB_SIZE), batch_size=batch_size, device=device)

    def step(self):
        return train_step(self.model, self.optimizer, self.scaler, self.batches, self.autocast, grad_clip=1.0)


SIDES = {"nanogpt": Theirs, "ours": Ours}


def build(name, folder):
    torch.manual_seed(1337)
    shape = GPTConfig(block_size, VOCAB_SIZE, n_layer, n_head, n_embd, dropout=0.0, bias=False)
    return SIDES[name](GPT(shape).to(device), folder)


def turn(model):
    """[seconds a step, losses, peak bytes so far] of one turn."""
    losses = [model.step()]  # untimed: it takes again the memory that the last turn gave back
    machine.synchronize(device)
    start = time.perf_counter()
    losses += [model.step() for _ in range(steps)]
    machine.synchronize(device)
    seconds = (time.perf_counter() - start) / steps
    losses = [loss.item() for loss in losses]
    peak = machine.peak_reserved_bytes(device)
    machine.empty_cache(device)  # the other side may need it
    return [seconds, losses, peak]


with tempfile.TemporaryDirectory() as place:
    if side:
        take_turns(partial(turn, build(side, folder)))
        sys.exit(0)
    for split in ("train", "val"):
        rng = np.random.default_rng(0)
        rng.integers(50257, size=1_000_000, dtype=np.uint16).tofile(os.path.join(place, f"{split}.bin"))
    command = [sys.executable, __file__, *sys.argv[1:], f"--folder={place}", "--save="]
    # nanoGPT asks nothing of torch's allocator; an empty wish is the user's, and stands.
    asks = {"nanogpt": dict.fromkeys(ALLOCATOR_VARIABLES, ""), "ours": {}}
    players = [Player(name, [*command, f"--side={name}"], asks[name]) for name in SIDES]
    turns = [[player.play() for player in players] for _ in range(rounds + 1)]
    for player in players:
        player.end()

seconds, losses, peaks = {}, {}, {}
for name, found in zip(SIDES, zip(*turns, strict=True), strict=True):
    took, told, until = zip(*found, strict=True)
    seconds[name] = took[1:]  # the first turn warms up
    losses[name] = [loss for of_a_turn in told for loss in of_a_turn]
    peaks[name] = until[-1]
tokens = batch_size * block_size
ratios = [a / b for a, b in zip(seconds["nanogpt"], seconds["ours"], strict=True)]
difference = max(abs(a - b) for a, b in zip(losses["nanogpt"], losses["ours"], strict=True))
for name in SIDES:
    median = statistics.median(seconds[name])
    speed = f"{median * 1000:10.1f} ms a step {tokens / median:12,.0f} tok/s"
    print(f"{name:10} {speed} {peaks[name] / 2**30:8.2f} GiB")
print(f"ratio of tok/s {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f} over {rounds} turns)")
print(f"ratio of peaks {peaks['ours'] / peaks['nanogpt']:.3f}")
print(f"largest difference of a loss {difference:.1e}")
figures = {
    "seconds_per_step": {name: statistics.median(took) for name, took in seconds.items()},
    "tokens_per_second_ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    "peak_bytes": peaks,
    "peak_ratio": peaks["ours"] / peaks["nanogpt"],
    "largest_loss_difference": difference,
}
del config["side"], config["folder"]
finish("against_nanogpt", config, device, figures, save)
