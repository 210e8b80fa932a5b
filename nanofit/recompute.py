"""Blocks that compute their activations again in the backward pass (Chen et al. 2016, arXiv:1604.06174)."""

import contextlib
import random

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint


def recomputed(block):
    """A block's forward that keeps only its input, and computes the rest again in the backward pass.

    The second computation starts from the same random numbers and buffers, and its changes to them are undone: a
    running mean moves once.
    """
    forward, modules = block.forward, list(block.modules())

    def call(*args, **options):
        if not torch.is_grad_enabled():
            return forward(*args, **options)
        if torch.compiler.is_compiling():  # the compiler refuses a block that changes its state
            return checkpoint(forward, *args, use_reentrant=False, **options)
        before, passes = _copied(_state(modules)), []

        def run(*args, **options):
            passes.append(1)
            if len(passes) == 1:
                return forward(*args, **options)
            with _put_back(modules, before):
                return forward(*args, **options)

        return checkpoint(run, *args, use_reentrant=False, **options)

    return call


def _state(modules):
    """Buffers, and the random numbers of Python and numpy; checkpoint() itself sees to torch's."""
    return [dict(module._buffers) for module in modules], random.getstate(), np.random.get_state()


def _copied(state):
    buffers, *generators = state
    return [{name: b if b is None else b.clone() for name, b in held.items()} for held in buffers], *generators


def _set(modules, state):
    for module, buffers in zip(modules, state[0], strict=True):
        module._buffers.update(buffers)
    random.setstate(state[1])
    np.random.set_state(state[2])


@contextlib.contextmanager
def _put_back(modules, before):
    """A context in which the state is as it was before."""
    now = _state(modules)
    _set(modules, _copied(before))
    try:
        yield
    finally:
        _set(modules, now)
