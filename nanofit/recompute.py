"""Blocks that compute their activations again in the backward pass (Chen et al. 2016, arXiv:1604.06174)."""

import collections
import contextlib
import copy
import random

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

OF_ANY_MODULE = {*vars(torch.nn.Module()), "forward"}  # attributes that every module has


def recomputed(block):
    """A block's forward that keeps only its input, and computes the rest again in the backward pass.

    The second computation starts from the same random numbers and the same state of the block, and its changes to
    them are undone: a running mean moves once.
    """
    forward, state = block.forward, _State(block)

    def call(*args, **options):
        if not torch.is_grad_enabled():
            return forward(*args, **options)
        if torch.compiler.is_compiling():  # the compiler refuses a block that changes its state
            return checkpoint(forward, *args, use_reentrant=False, **options)
        before, passes = state.taken(), []

        def run(*args, **options):
            passes.append(1)
            if len(passes) == 1:
                return forward(*args, **options)
            with state.put_back(before):
                return forward(*args, **options)

        return checkpoint(run, *args, use_reentrant=False, **options)

    return call


class _State:
    """What a block's forward may change: buffers, attributes, and the random numbers of Python and numpy."""

    def __init__(self, block):
        self.modules = list(block.modules())

    def taken(self):
        """A copy of the current state."""
        buffers = [{n: b.clone() for n, b in m._buffers.items() if b is not None} for m in self.modules]
        return buffers, [_attributes(module) for module in self.modules], random.getstate(), np.random.get_state()

    @contextlib.contextmanager
    def put_back(self, before):
        """A context in which the state is as it was before."""
        now = [dict(module._buffers) for module in self.modules], *self.taken()[1:]
        self._set(([{n: b.clone() for n, b in buffers.items()} for buffers in before[0]], *before[1:]))
        try:
            yield
        finally:
            self._set(now)

    def _set(self, state):
        for module, buffers, attributes in zip(self.modules, *state[:2], strict=True):
            module._buffers.update(buffers)
            vars(module).update(attributes)
        random.setstate(state[2])
        np.random.set_state(state[3])


def _attributes(module):
    """A block's own attributes, with copies of lists and the like."""
    own = {name: value for name, value in vars(module).items() if name not in OF_ANY_MODULE}
    return {n: copy.copy(v) if isinstance(v, (list, dict, set, collections.deque)) else v for n, v in own.items()}
