"""One token's pass through a model as a CUDA graph: one launch instead of a few hundred."""

import copy

import torch

from nanofit.errors import first_line

MOST_ROWS = 16  # sequences; with more, reading all positions should cost more than launching (an estimate)
CLOSE = 0.05  # largest difference of logits, relative to the largest logit, that is rounding in 16 bits


class FixedCache:
    """A model.KeyValueCache in the same memory, for one token at a time, at a position that a CUDA graph reads anew.

    Attention computes with all positions, of which a mask hides those after the token.
    """

    def __init__(self, cache):
        self.keys_values, self.seen = cache.keys_values, 0
        self.keys_values[..., cache.seen :, :] = 0.0  # what is hidden must be finite
        device = self.keys_values.device
        self.place = torch.full((1,), cache.seen, device=device)
        self.positions = torch.arange(self.keys_values.shape[-2], device=device)

    def places(self, T):
        self.mask = (self.positions <= self.place)[None]  # (1, positions)
        return self.place

    def add(self, layer, k, v):
        kept = self.keys_values[layer].index_copy_(3, self.place, torch.stack((k, v)))  # (2, B, nh, positions, hs)
        return *kept.unbind(0), self.mask


class Graphed:
    """Takes a model's place in GPT.generate on a CUDA device. The graph is used if its first logits are the model's."""

    def __init__(self, model):
        self.model, self.cache = model, None

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, idx, cache=None):
        # A model.py of the user's may have another cache.
        if not (cache and cache.seen and hasattr(cache, "add")) or len(idx) > MOST_ROWS:
            return self.model(idx, cache=cache)
        if cache is not self.cache:
            self.cache, self.graph = cache, self._captured(idx, cache)
        if not self.graph:
            return self.model(idx, cache=cache)
        self.token.copy_(idx)
        self.fixed.place.fill_(cache.seen)
        self.graph.replay()
        cache.seen += 1
        return self.logits, None

    def _captured(self, idx, cache):
        """The graph for a token of each sequence, idx (B, 1), at any later position; None if that fails."""
        expected, _ = self.model(idx, cache=copy.copy(cache))
        self.token, self.fixed, graph = idx.clone(), FixedCache(cache), torch.cuda.CUDAGraph()
        try:
            self.model(self.token, cache=self.fixed)  # loads kernels, which a capture can't
            with torch.cuda.graph(graph):
                self.logits, _ = self.model(self.token, cache=self.fixed)
            graph.replay()
            if not (self.logits - expected).abs().max() <= CLOSE * expected.abs().max():
                raise RuntimeError("its logits are not the model's")
        except RuntimeError as e:
            print(f"sampling goes on without a CUDA graph ({first_line(e)})")
            return None
        return graph
