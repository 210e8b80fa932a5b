"""Token files to batches.

A data set is a folder with train.bin and val.bin: token ids, headerless little-endian uint16. The stream of
batches owns its generator, so that nothing else that draws random numbers can move it, and its place in the
stream can be kept in a checkpoint.

Shapes: B = batch_size sequences of T = block_size tokens.
"""

import difflib
import os

import numpy as np
import torch

from configurator import UsageError

TOKEN_BYTES = 2  # uint16


def _missing(folder):
    """The sentence for a data set that isn't there: what to run, or what the name may have meant."""
    prepare = os.path.join(folder, "prepare.py")
    if os.path.exists(prepare):
        return f"run: python {prepare}"
    parent, name = os.path.split(folder)
    there = sorted(os.listdir(parent)) if os.path.isdir(parent) and os.access(parent, os.R_OK) else []
    near = difflib.get_close_matches(name, there, n=1)
    return f"did you mean --dataset={near[0]}?" if near else f"there is no {prepare} that could make it"


def _open_tokens(path, block_size):
    """The tokens of a .bin file as a uint16 array on disk, after a look at its size."""
    if not os.path.isfile(path):
        raise UsageError(f"{path} does not exist: {_missing(os.path.dirname(path))}")
    size = os.path.getsize(path)
    if size == 0 or size % TOKEN_BYTES:
        raise UsageError(
            f"{path} has {size:,} bytes: expected uint16 tokens, two bytes each, and not none; prepare it again"
        )
    if size // TOKEN_BYTES <= block_size:
        raise UsageError(
            f"{path} has {size // TOKEN_BYTES:,} tokens: too few for block_size={block_size}, which needs at least "
            f"{block_size + 1:,}; use a smaller block_size or more text"
        )
    return np.memmap(path, dtype="<u2", mode="r")


class RandomBatch:
    """Random tokens, the same each time, where training would read a data set: for measuring."""

    def __init__(self, batch_size, block_size, vocab_size, device, on_current=lambda: None):
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(vocab_size, (2, batch_size, block_size), generator=generator)
        self._batch = tuple(tokens.to(device))
        self._on_current = on_current

    @property
    def current(self):
        """(x, y), each int64 (B, T); on_current is called first."""
        self._on_current()
        return self._batch

    def advance(self):
        """There is no other batch."""

    def evaluation(self, split, count):
        """The batch, count times."""
        yield from [self._batch] * count


class Batches:
    """A random stream of training batches, cut into micro-batches, and of evaluation batches.

    Offsets come from one generator: first a training batch, and each next one when the one before has been
    fetched; an evaluation draws from the same stream in between.
    """

    def __init__(self, folder, *, batch_size, block_size, device):
        self.folder, self.batch_size, self.block_size, self.device = folder, batch_size, block_size, device
        self._generator = torch.Generator()
        for split in ("train", "val"):
            _open_tokens(self._path(split), block_size)

    def start(self, vocab_size, state=None, micro_batch_size=None):
        """Draw the first training batch, from state or else from where torch's global generator stands.

        micro_batch_size: sequences of a micro-batch, a divisor of batch_size (default: all of it).
        """
        self.vocab_size = vocab_size
        self.micro_batch_size = micro_batch_size or self.batch_size
        if self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {micro_batch_size} does not divide batch_size {self.batch_size}")
        self._generator.set_state(torch.get_rng_state() if state is None else state)
        self._fetch()

    def _path(self, split):
        return os.path.join(self.folder, f"{split}.bin")

    def draw(self, split):
        """Draw a batch of 'train' or 'val': (x, y), each int64 (B, T) on the device; y is x a token later."""
        path = self._path(split)
        # The file is mapped anew each time: a mapping that lives on keeps every page that it touched.
        tokens = _open_tokens(path, self.block_size)
        starts = torch.randint(len(tokens) - self.block_size, (self.batch_size,), generator=self._generator)
        rows = np.lib.stride_tricks.sliding_window_view(tokens, self.block_size + 1)[starts.numpy()]  # (B, T + 1)
        if rows.max() >= self.vocab_size:
            row, column = np.argwhere(rows >= self.vocab_size)[0]
            raise UsageError(
                f"{path} holds token {rows[row, column]} at position {starts[row] + column:,}, but the vocabulary has "
                f"{self.vocab_size} (0 to {self.vocab_size - 1}): prepare the data for this model, or check meta.pkl"
            )
        x, y = (torch.from_numpy(part.astype(np.int64)) for part in (rows[:, :-1], rows[:, 1:]))
        if self.device.type == "cuda":  # pinned memory is copied while the GPU computes
            x, y = x.pin_memory(), y.pin_memory()
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def _fetch(self):
        self._state_before = self._generator.get_state()
        self._batch = self.draw("train")
        self._row = 0

    @property
    def current(self):
        """The training micro-batch whose turn it is: (x, y), each int64 (micro_batch_size, T)."""
        x, y = self._batch
        rows = slice(self._row, self._row + self.micro_batch_size)
        return x[rows], y[rows]

    def advance(self):
        """Go on to the next micro-batch, and draw a batch if this one is used up."""
        self._row += self.micro_batch_size
        if self._row == self.batch_size:
            self._fetch()

    def evaluation(self, split, count):
        """Draw count batches of a split and give them as micro-batches."""
        for _ in range(count):
            x, y = self.draw(split)
            yield from zip(x.split(self.micro_batch_size), y.split(self.micro_batch_size), strict=True)

    def state(self):
        """Where the stream stands, as a uint8 tensor: start(state=...) draws the current batch again.

        Taken between steps and before an evaluation; what comes after replays that evaluation too.
        """
        return self._state_before
