"""Token files to batches.

A data set is a folder with train.bin and val.bin: token ids, headerless little-endian uint16. The stream of
batches owns its generator, so that nothing else that draws random numbers can move it, and its place in the
stream can be kept in a checkpoint.

Shapes: B = batch_size sequences of T = block_size tokens.
"""

import difflib
import os
import zlib

import numpy as np
import torch

from nanofit.errors import UsageError, usage_errors
from nanofit.units import micro_batch_sizes

TOKEN_BYTES = 2  # uint16
ENDS = 2**16  # bytes at each end of a file by which it is known again


def _missing(folder):
    """The sentence for a data set that isn't there: what to run, or what the name may have meant."""
    prepare = os.path.join(folder, "prepare.py")
    if os.path.exists(prepare):
        return f"run: python {prepare}"
    parent, name = os.path.split(folder)
    there = sorted(os.listdir(parent)) if os.path.isdir(parent) and os.access(parent, os.R_OK) else []
    near = difflib.get_close_matches(name, there, n=1)
    return f"did you mean --dataset={near[0]}?" if near else f"there is no {prepare} that could make it"


def _count_tokens(path, block_size):
    """(tokens of a .bin file, what tells whether it is still the same file), after a look at its size."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(f"{path} is not a file: prepare the data again")
    if not os.path.isfile(path):
        raise UsageError(f"{path} does not exist: {_missing(os.path.dirname(path))}")
    found = os.stat(path)
    size = found.st_size
    if size == 0 or size % TOKEN_BYTES:
        raise UsageError(
            f"{path} has {size:,} bytes: expected uint16 tokens, two bytes each, and not none; prepare it again"
        )
    if size // TOKEN_BYTES <= block_size:
        raise UsageError(
            f"{path} has {size // TOKEN_BYTES:,} tokens: too few for block_size={block_size}, which needs at least "
            f"{block_size + 1:,}; use a smaller block_size or more text"
        )
    return size // TOKEN_BYTES, found.st_mtime_ns


def _fingerprint(path):
    """A checksum of a file's two ends."""
    with usage_errors(OSError, prefix=f"{path} can't be read: "), open(path, "rb") as f:
        head = f.read(ENDS)
        f.seek(max(0, os.path.getsize(path) - ENDS))
        return zlib.crc32(f.read(ENDS), zlib.crc32(head))


class RandomBatch:
    """Random tokens, the same each time, where training would read a data set: for measuring."""

    def __init__(self, batch_size, block_size, vocab_size, device, micro_steps=1, on_current=lambda: None):
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(vocab_size, (2, batch_size, block_size), generator=generator)
        self.micro_steps = micro_steps
        self.generator = generator
        self._batch = tuple(tokens.to(device))
        self._on_current = on_current

    @property
    def current(self):
        """(x, y), each int64 (B, T); on_current is called first."""
        self._on_current()
        return self._batch

    def advance(self):
        """There is no other batch."""

    def evaluation(self, split, count, rank=0, ranks=1, even=False):
        """The batch, as often as this rank's share of count."""
        yield from [[self._batch]] * len(range(rank, count, ranks))


class Batches:
    """A random stream of training batches, cut into or joined to micro-batches, and of evaluation batches.

    Offsets come from one generator: first a training batch, and each next one when the one before has been used; an
    evaluation draws from the same stream in between, when one training batch is drawn already.

    The stream is the run's: all ranks draw it alike, and the batches of an iteration are dealt to them in turn, so that
    an iteration sees the same tokens on any number of ranks.

    per_iter: batches in an iteration of this rank.
    """

    def __init__(self, folder, *, batch_size, block_size, device, per_iter=1, rank=0, ranks=1):
        self.folder, self.batch_size, self.block_size, self.device = folder, batch_size, block_size, device
        self.per_iter, self.rank, self.ranks = per_iter, rank, ranks
        self.micro_batch_size = batch_size  # one of micro_batch_sizes; may change between two iterations
        self.generator = torch.Generator()
        self._files = {}  # split: (tokens, time of the last change, fingerprint)
        for split in ("train", "val"):
            path = self._path(split)
            self._files[split] = (*_count_tokens(path, block_size), _fingerprint(path))

    @property
    def fingerprints(self):
        """{split: [tokens, checksum]}, by which a file is known again."""
        return {split: [tokens, checksum] for split, (tokens, _, checksum) in self._files.items()}

    @property
    def micro_steps(self):
        """Micro-batches in an iteration of this rank."""
        return self.per_iter * self.batch_size // self.micro_batch_size

    def start(self, vocab_size, micro_batch_size=None, state=None):
        """Draw the first training batch. state: a generator's, the same on all ranks; None for torch's global one."""
        self.vocab_size = vocab_size
        self.micro_batch_size = micro_batch_size or self.batch_size
        if self.micro_batch_size not in micro_batch_sizes(self.batch_size, self.per_iter):
            raise ValueError(
                f"micro_batch_size {micro_batch_size} neither divides nor joins batches of {self.batch_size}"
            )
        self.generator.set_state(torch.get_rng_state() if state is None else state)
        self._begin()

    def state_dict(self):
        """Where the stream stands between two iterations: the generator's states before and after the current batch."""
        assert self._row == self._number == 0, "an iteration ends with its last batch"
        return {"before": self._before, "after": self.generator.get_state()}

    def load_state_dict(self, state):
        """Go on from what state_dict gave: the current batch is read again, cut by micro_batch_size as it is now."""
        self.generator.set_state(state["before"])
        self._begin()
        if "after" in state:
            self.generator.set_state(state["after"])

    def _path(self, split):
        return os.path.join(self.folder, f"{split}.bin")

    def _draw_starts(self, split):
        """Where the sequences of the next batch begin, int64 (B,)."""
        path, (tokens, changed, fingerprint) = self._path(split), self._files[split]
        now, touched = _count_tokens(path, self.block_size)
        if now != tokens or (touched != changed and _fingerprint(path) != fingerprint):
            raise UsageError(
                f"{path} has changed since the run began (it had {tokens:,} tokens, and now has {now:,}, or others): "
                "put the old file back, or start again for the new one"
            )
        self._files[split] = tokens, touched, fingerprint
        return torch.randint(tokens - self.block_size, (self.batch_size,), generator=self.generator)

    def _load(self, split, starts):
        """The batch that begins at starts: (x, y), each int64 (B, T) on the device; y is x a token later."""
        path = self._path(split)
        rows = np.empty((self.batch_size, self.block_size + 1), "<u2")  # (B, T + 1)
        # Read, not mapped: a mapping keeps the pages that it touched, and kills the process if the file shrinks.
        with usage_errors(OSError, prefix=f"{path} can't be read: "), open(path, "rb", buffering=0) as f:
            for row, start in zip(rows, starts.tolist(), strict=True):
                f.seek(start * TOKEN_BYTES)
                if f.readinto(memoryview(row).cast("B")) != row.nbytes:
                    raise UsageError(f"{path} ends before token {start + len(row):,}: it was cut short in mid-run")
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

    def _begin(self):
        """Draw the first batch of an iteration, whoever's it is: an evaluation finds it drawn, and no more."""
        self._number, self._row = 0, 0  # of the batch in the iteration, and of the row in it that comes next
        self._draw()

    def _draw(self):
        """Draw the starts of batch self._number, and read it if it is this rank's."""
        self._before = self.generator.get_state()
        self._starts = self._draw_starts("train")
        own = self._number % self.ranks == self.rank
        self._batch = self._load("train", self._starts) if own else None

    def _go_to(self, number):
        """Draw on to the batch of this number in the iteration."""
        while self._number < number:
            self._number += 1
            self._draw()

    @property
    def current(self):
        """The training micro-batch whose turn it is: (x, y), each int64 (micro_batch_size, T)."""
        self._go_to(self.rank)  # this rank's first
        if self.micro_batch_size > len(self._batch[0]):  # only now, as in _begin
            parts = [self._batch]
            while len(parts) < self.micro_batch_size // self.batch_size:
                self._go_to(self._number + self.ranks)
                parts.append(self._batch)
            self._batch = tuple(torch.cat(part) for part in zip(*parts, strict=True))
        rows = slice(self._row, self._row + self.micro_batch_size)
        return tuple(part[rows] for part in self._batch)

    @property
    def like_current(self):
        """Tokens in the shape of a micro-batch, of the batch that is drawn already: (x, y)."""
        several = -(-self.micro_batch_size // self.batch_size)
        drawn = self._batch or self._load("train", self._starts)
        return tuple(part.repeat(several, 1)[: self.micro_batch_size] for part in drawn)

    def advance(self):
        """Go on to the next micro-batch, and draw a batch if this one is used up."""
        self._row += self.micro_batch_size
        if self._row < self.batch_size:
            return
        self._row = 0
        following, several = self._number + self.ranks, self.per_iter * self.ranks
        self._go_to(min(following, several - 1))
        if following >= several:
            self._begin()

    def evaluation(self, split, count, rank=0, ranks=1, even=False):
        """Draw count batches of a split; of those that are this rank's, give each as a list of micro-batches.

        The batches are dealt to the ranks in turn, so that together they see what one alone would. even: those with
        one less than others get the last once more, to do as much.
        """
        idle = even and count % ranks and rank >= count % ranks
        for number in range(count):
            starts = self._draw_starts(split)
            if number % ranks == rank or (idle and number == count - 1):
                x, y = self._load(split, starts)
                yield list(zip(x.split(self.micro_batch_size), y.split(self.micro_batch_size), strict=True))
