"""Models that people bring (tests/models/brought.py), at a size at which thirty iterations take no time."""

import contextlib
import io

import torch
from brought import GPT, KINDS, GPTConfig  # noqa: F401

from nanofit import optimizers
from nanofit.models import apply_levers, build
from nanofit.step import train_step
from nanofit.units import MemoryLevers

CPU = torch.device("cpu")
SIZES = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=65, dropout=0.0, bias=True)
LEARNING_RATE = 1e-2
PLAIN = MemoryLevers()


class Batches:
    """Random batches: which ones, the iteration's number says."""

    def __init__(self, micro_steps=1):
        self.micro_steps, self.generator = micro_steps, torch.Generator()

    def begin(self, iteration):
        self.generator.manual_seed(iteration)
        self.advance()

    def advance(self):
        self.current = torch.randint(65, (2, 4, 8), generator=self.generator)


def made(kind="plain", optimizer="AdamW", levers=PLAIN, **more):
    """(model, optimizer) as train.py makes them."""
    torch.manual_seed(1)
    with contextlib.redirect_stdout(io.StringIO()):
        model = build(GPT, GPTConfig, {**SIZES, "kind": kind, "moved_by": optimizer, **more})
        apply_levers(model, levers)
        optimizer = optimizers.make_optimizer(model, levers.optimizer_state, 0.1, LEARNING_RATE, (0.9, 0.95), CPU)
    optimizers.allocate_state(optimizer)
    return model, optimizer


def iterations(model, optimizer, first, last, micro_steps=2):
    """The losses of these iterations, under a schedule."""
    batches, losses = Batches(micro_steps), []
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for iteration in range(first, last):
        torch.manual_seed(iteration)
        batches.begin(iteration)
        optimizers.set_learning_rate(optimizer, LEARNING_RATE / (1 + iteration / 10))
        losses.append(train_step(model, optimizer, scaler, batches, contextlib.nullcontext(), 1.0).item())
    return losses


def resumed(model, optimizer, /, **same):
    """A new model and optimizer that go on where these are, through a file as train.py reads it."""
    torch.save([model.state_dict(), optimizer.state_dict()], "checkpoint.pt")
    other, its_optimizer = made(**same)
    weights, state = torch.load("checkpoint.pt", weights_only=True, mmap=True)
    other.load_state_dict(weights)
    optimizers.load(its_optimizer, state)
    return other, its_optimizer
