"""Blocks that compute their activations again in the backward pass (Chen et al. 2016, arXiv:1604.06174)."""

import contextlib
import random

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint


def recomputed(block):
    """A block's forward that keeps only what enters it, and computes the rest again in the backward pass.

    Then random numbers and the block's state are what they were, and afterwards what they are now: a running mean
    moves once.
    """
    forward, state = block.forward, _State(block)

    def call(*args, **options):
        if not torch.is_grad_enabled():
            return forward(*args, **options)
        if torch.compiler.is_compiling():  # which refuses a block that changes its state
            return checkpoint(forward, *args, use_reentrant=False, **options)
        before, passes = state.taken(), []

        def run(*args, **options):
            passes.append(1)
            if len(passes) == 1:
                return forward(*args, **options)
            with state.put_back(before):
                return forward(*args, **options)

        found = checkpoint(run, *args, use_reentrant=False, **options)
        state.look(before)
        return found

    return call


class _State:
    """What a block's forward may change beside its weights: buffers, attributes, Python's and numpy's random numbers.

    taken: copies of the buffers, of all at first, then of those that have been seen to change.
    """

    def __init__(self, block):
        self.modules = list(block.modules())
        self.changing = None  # names of buffers, by module

    def taken(self):
        taken = []
        for i, module in enumerate(self.modules):
            buffers = {name: b for name, b in module._buffers.items() if b is not None}
            copied = {n: b.clone() for n, b in buffers.items() if self.changing is None or (i, n) in self.changing}
            taken.append((copied, {n: (b, b._version) for n, b in buffers.items()}, _attributes(module)))
        return taken, (random.getstate(), np.random.get_state())

    def look(self, before):
        """Note which buffers a pass has changed since."""
        now = {
            (i, name)
            for i, (_, versions, _) in enumerate(before[0])
            for name, (buffer, version) in versions.items()
            if self.modules[i]._buffers.get(name) is not buffer or buffer._version != version
        }
        self.changing = now | (self.changing or set())

    @contextlib.contextmanager
    def put_back(self, before):
        buffers = [dict(module._buffers) for module in self.modules]
        attributes = [_attributes(module) for module in self.modules]
        drawn = random.getstate(), np.random.get_state()
        for module, (copied, _, were) in zip(self.modules, before[0], strict=True):
            module._buffers.update({name: buffer.clone() for name, buffer in copied.items()})
            vars(module).update(were)
        _set_random(before[1])
        try:
            yield
        finally:
            for module, now, are in zip(self.modules, buffers, attributes, strict=True):
                module._buffers.update(now)
                vars(module).update(are)
            _set_random(drawn)


def _attributes(module):
    """Attributes that a forward pass may set."""
    return {name: value for name, value in vars(module).items() if name[0] != "_" and name != "forward"}


def _set_random(state):
    random.setstate(state[0])
    np.random.set_state(state[1])
