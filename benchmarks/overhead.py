"""What it costs to survive and to be watched: train.py's loop against barer ones, in turns in one process.

    python benchmarks/overhead.py

The guards: generators and place in the data kept for each iteration, the signal looked at, the part that may run
out of memory wrapped, gradients that are not finite left out. The figures: those of every iteration, made, printed into
a file and written to metrics.jsonl. Prints a table, and one line of JSON last.
"""

import contextlib
import os
import statistics
import tempfile
import time
from functools import partial

import numpy as np
import torch
from common import finish
from nanogpt import their_update

from configurator import configure
from model import GPT, GPTConfig
from nanofit import checkpoint, machine, settings
from nanofit.batches import Batches
from nanofit.folder import RunFolder
from nanofit.metrics import Metrics, open_readers
from nanofit.ranks import ALONE
from nanofit.recovery import Recovery, StopSignals, Watch
from nanofit.step import accumulate, clip, update
from nanofit.tokens import open_data

# ---- keys: --key=value overrides them ----------------------------------------------------------------------
batch_size = 8
block_size = 256
n_layer = 4
n_head = 4
n_embd = 128
vocab_size = 65
rounds = 40  # pairs of turns
steps = 10  # of each side in a turn
device = machine.best_device()
dtype = machine.best_dtype(device)
save = ""  # a file for the result
config, given = configure(globals())
settings.at_least(1, config, "batch_size", "block_size", "rounds", "steps")
dtype = config["dtype"] = settings.dtype(config, given)
device = machine.find_device(device)
machine.set_device(device)
autocast = machine.autocast(device, dtype)
MICRO_STEPS = 2


class Bare:
    """A loop that survives nothing."""

    def __init__(self, folder):
        torch.manual_seed(0)
        self.model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout=0.0, bias=False)).to(device)
        self.optimizer = self.model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
        self.scaler = machine.grad_scaler(device, dtype)
        data = open_data(folder, block_size, vocab_size)
        self.batches = Batches(data, batch_size=batch_size, device=device, per_iter=MICRO_STEPS)
        self.gradients = partial(accumulate, self.model, self.scaler, self.batches, autocast)

    def iteration(self):
        loss = self.gradients()
        their_update(self.model, self.optimizer, self.scaler)
        return loss.item()


class Guarded(Bare):
    """A loop that survives what train.py's does, and tells nothing."""

    def __init__(self, folder):
        super().__init__(folder)
        self.signals, self.watch, self.count = StopSignals(), Watch("the gradient's norm"), 0
        self.recovery = Recovery(ALONE, device, self.batches, self.model, self.scaler, give_up=lambda: "")

    def iteration(self):
        here = checkpoint.rng_of(self.batches, device)
        assert not ALONE.all_reduce_max(self.signals.received), here
        loss, norm = self.recovery.run(self.gradients, partial(clip, self.model, self.optimizer, self.scaler, 1.0))
        self.recovery.update(partial(update, self.optimizer, self.scaler, norm), self.optimizer)
        self.watch.note(self.count, norm)
        loss = self.tell(loss, norm)
        self.count += 1
        self.watch.check()
        return loss

    def tell(self, loss, norm):
        return loss.item()


class Told(Guarded):
    """train.py's loop, with a line for every iteration."""

    def __init__(self, folder):
        super().__init__(folder)
        self.losses, self.out = [], open(os.path.join(folder, "lines"), "w")  # noqa: SIM115  # open as long as this
        tokens = MICRO_STEPS * batch_size * block_size
        self.metrics = Metrics(device, 0, 10**6, 10**6, tokens, lambda seconds: 1e-3 / seconds)
        keys = {"eval_only": False, "wandb_log": False, "tensorboard_log": False}
        readers = open_readers(keys, RunFolder(os.path.join(folder, "out")), 0)
        self.metrics.start([*readers, lambda figures: self.losses.append(figures.get("loss"))], {})

    def tell(self, loss, norm):
        with contextlib.redirect_stdout(self.out):
            self.metrics.iterated(self.count, 1e-3, loss, norm)
        return self.losses.pop()


def turn(side):
    """(seconds an iteration, losses)."""
    machine.synchronize(device)
    start = time.perf_counter()
    losses = [side.iteration() for _ in range(steps)]
    return (time.perf_counter() - start) / steps, losses


with tempfile.TemporaryDirectory() as folder:
    tokens = np.random.default_rng(0).integers(vocab_size, size=1_000_000, dtype=np.uint16)
    for split in ("train", "val"):
        tokens.tofile(os.path.join(folder, f"{split}.bin"))
    sides = {"bare": Bare(folder), "guarded": Guarded(folder), "told": Told(folder)}
    seconds = {name: [] for name in sides}
    for index in range(rounds + 1):
        order = list(sides) if index % 2 else list(reversed(sides))
        found = {name: turn(sides[name]) for name in order}
        for a, *others in zip(*(found[name][1] for name in sides), strict=True):
            assert all(abs(a - b) < 1e-2 for b in others), "all compute the same"
        if index:  # the first turn warms up
            for name in seconds:
                seconds[name].append(found[name][0])

median = {name: statistics.median(took) for name, took in seconds.items()}
for name, took in median.items():
    print(f"{name:10} {took * 1000:10.3f} ms an iteration")
figures = {"seconds_per_iteration": median}
for what, less, more in (("guards", "bare", "guarded"), ("figures", "guarded", "told")):
    ratios = [b / a for a, b in zip(seconds[less], seconds[more], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    print(f"time with {what}, ratio {statistics.median(ratios):.4f} (quartiles {low:.4f}, {high:.4f})")
    print(f"{what} cost {(median[more] - median[less]) * 1e6:.0f} microseconds an iteration")
    figures[f"time_ratio_{what}"] = {"median": statistics.median(ratios), "quartiles": [low, high]}
finish("overhead", config, device, figures, save)
