"""The stream of batches.

It has its own random generator. So nothing else that draws random numbers changes the order of the data, and a
checkpoint can keep the place in it.

Shapes: B = batch_size sequences of T = block_size tokens.
"""

import numpy as np
import torch

from nanofit.units import micro_batch_sizes


class RandomBatch:
    """Random tokens in place of a data set, always the same: for measuring."""

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
        """Nothing to do: there is only one batch."""

    def evaluation(self, split, count, rank=0, ranks=1, even=False):
        """Give the batch once for each of this rank's share of count batches."""
        yield from [[self._batch]] * len(range(rank, count, ranks))


class RandomStarts:
    """A sequence begins anywhere in the text, as in nanoGPT."""

    def draw(self, file, count, generator):
        """Where the next sequences of a TokenFile begin, int64 (count,)."""
        return file.draw(count, generator)

    def figures(self, pending):
        """{name: number} for the lines of a run. pending: how many sequences are drawn and not trained on yet."""
        return {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        """Nothing to do: the generator belongs to the stream."""


class EpochStarts:
    """Draws each block of the text once before any twice. The order and the first block differ in each epoch.

    epoch: how many epochs have been drawn. place: blocks drawn of the current one. blocks: how many it has.
    """

    def __init__(self):
        self.epoch, self.place, self.blocks = 0, 0, 0
        self._order = None  # where the blocks of this epoch begin, shuffled

    def draw(self, file, count, generator):
        """As RandomStarts.draw. Only the generator's seed is used."""
        found = [torch.empty(0, dtype=torch.int64)]
        while count:
            if self._order is None:
                self._order = self._shuffled(file, generator.initial_seed())
                if self.place and self.blocks != len(self._order):  # the text or block_size has changed
                    self.epoch, self.place = self.epoch + 1, 0
                    self._order = self._shuffled(file, generator.initial_seed())
                self.blocks = len(self._order)
            found.append(self._order[self.place : self.place + count])
            self.place, count = self.place + len(found[-1]), count - len(found[-1])
            if self.place == self.blocks:
                self.epoch, self.place, self._order = self.epoch + 1, 0, None
        return torch.cat(found)

    def _shuffled(self, file, seed):
        generator = torch.Generator().manual_seed((seed + self.epoch) % 2**63)
        size = file.block_size
        offset = torch.randint(min(size, file.tokens - size), (), generator=generator)
        return offset + size * torch.randperm((file.tokens - 1 - int(offset)) // size, generator=generator)

    def figures(self, pending):
        return {"epoch": self.epoch + (self.place - pending) / self.blocks}

    def state_dict(self):
        return {name: getattr(self, name) for name in ("epoch", "place", "blocks")}

    def load_state_dict(self, state):
        """Go on from what state_dict gave. A state of RandomStarts begins the first epoch."""
        self.epoch, self.place, self.blocks = (state.get(name, 0) for name in ("epoch", "place", "blocks"))
        self._order = None


SAMPLINGS = {"random": RandomStarts, "epoch": EpochStarts}


class Batches:
    """A random stream of training batches, which are cut or joined into micro-batches, and of evaluation batches.

    A batch is drawn as soon as the one before has been used. So the first batch of an iteration is already drawn when
    an evaluation begins. The evaluation draws from the same stream.

    All ranks draw the same stream. The batches of an iteration are dealt to them in turn, so that an iteration sees
    the same tokens on any number of ranks.

    data: what open_data gave. per_iter: batches of this rank in an iteration. micro_batch_size: one of
    micro_batch_sizes; it may change between two iterations. state: the generator's, the same on all ranks; None for
    that of torch's global one. starts: an instance of one of SAMPLINGS, which decides where sequences begin.
    """

    def __init__(
        self, data, *, batch_size, device, per_iter=1, rank=0, ranks=1, micro_batch_size=None, state=None, starts=None
    ):
        self.data, self.batch_size, self.device = data, batch_size, device
        self.per_iter, self.rank, self.ranks = per_iter, rank, ranks
        self.micro_batch_size = micro_batch_size or batch_size
        if self.micro_batch_size not in micro_batch_sizes(batch_size, per_iter):
            raise ValueError(f"micro_batch_size {micro_batch_size} neither divides nor joins batches of {batch_size}")
        self.generator = torch.Generator()
        self.generator.set_state(torch.get_rng_state() if state is None else state)
        self.starts = starts or RandomStarts()
        self._begin(torch.empty(0, dtype=torch.int64))

    @property
    def fingerprints(self):
        """{split: [tokens, checksum]}, to recognise the files."""
        return {split: [file.tokens, file.checksum] for split, file in self.data.items()}

    @property
    def micro_steps(self):
        """Micro-batches of this rank in an iteration."""
        return self.per_iter * self.batch_size // self.micro_batch_size

    @property
    def figures(self):
        """{name: number} of how far training has come in the text."""
        return self.starts.figures(len(self._starts) + len(self._ahead))

    # ---- the place in the stream

    def state_dict(self):
        """The place in the stream between two iterations.

        starts: int64, those of the sequences that are drawn and not trained on yet. generator: its state after that.
        The other entries are those of self.starts.
        """
        assert self._row == self._number == 0, "an iteration ends with its last batch"
        place = {"starts": torch.cat([self._starts, self._ahead]), "generator": self.generator.get_state()}
        return {**place, **self.starts.state_dict()}

    def load_state_dict(self, state, drawn=None):
        """Go on from what state_dict gave. batch_size and micro_batch_size may have changed since.

        drawn: the old batch_size. Older versions saved the generator's state before and after a batch.
        """
        train = self.data["train"]
        if "starts" in state:
            starts = state["starts"].clone()  # not a part of the checkpoint's file
            self.generator.set_state(state["generator"])
        else:
            self.generator.set_state(state["before"])
            starts = train.draw(drawn or self.batch_size, self.generator)
            self.generator.set_state(state.get("after", self.generator.get_state()))
        self.starts.load_state_dict(state)
        self._begin(starts[starts < train.tokens - train.block_size])  # the file may be shorter now

    def _begin(self, ahead):
        """Take the first batch of an iteration. ahead: starts of sequences that are already drawn."""
        self._ahead = ahead
        self._number, self._row = 0, 0  # the batch's number in the iteration, and the next row in it
        self._take()

    def _take(self):
        """Take the next batch from the stream, and read it if it is this rank's."""
        missing = self.batch_size - len(self._ahead)
        if missing > 0:
            self._ahead = torch.cat([self._ahead, self.starts.draw(self.data["train"], missing, self.generator)])
        self._starts, self._ahead = self._ahead.split([self.batch_size, len(self._ahead) - self.batch_size])
        own = self._number % self.ranks == self.rank
        self._batch = self._load("train", self._starts) if own else None

    def _go_to(self, number):
        """Take batches up to the one of this number in the iteration."""
        while self._number < number:
            self._number += 1
            self._take()

    def _load(self, split, starts):
        """The batch of the sequences at starts: (x, y), each int64 (B, T) on the device; y is x shifted by a token."""
        rows = self.data[split].read(starts)
        x, y = (torch.from_numpy(np.ascontiguousarray(part)) for part in (rows[:, :-1], rows[:, 1:]))
        if self.device.type == "cuda":  # pinned memory is copied while the GPU computes
            x, y = x.pin_memory(), y.pin_memory()
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    # ---- what training and evaluation ask for

    @property
    def current(self):
        """The current training micro-batch: (x, y), each int64 (micro_batch_size, T)."""
        self._go_to(self.rank)  # this rank's first
        if self.micro_batch_size > len(self._batch[0]):  # joined only now, so that one batch at a time is drawn ahead
            parts = [self._batch]
            while len(parts) < self.micro_batch_size // self.batch_size:
                self._go_to(self._number + self.ranks)
                parts.append(self._batch)
            self._batch = tuple(torch.cat(part) for part in zip(*parts, strict=True))
        rows = slice(self._row, self._row + self.micro_batch_size)
        return tuple(part[rows] for part in self._batch)

    @property
    def like_current(self):
        """(x, y) in the shape of a micro-batch, repeated from the batch that is already drawn."""
        several = -(-self.micro_batch_size // self.batch_size)
        drawn = self._batch or self._load("train", self._starts)
        return tuple(part.repeat(several, 1)[: self.micro_batch_size] for part in drawn)

    def advance(self):
        """Go to the next micro-batch, and draw a batch if this one is used up."""
        self._row += self.micro_batch_size
        if self._row < self.batch_size:
            return
        self._row = 0
        following, several = self._number + self.ranks, self.per_iter * self.ranks
        self._go_to(min(following, several - 1))
        if following >= several:
            self._begin(self._ahead)

    def evaluation(self, split, count, rank=0, ranks=1, even=False):
        """Draw count batches of a split, and give each of this rank's as a list of micro-batches.

        The batches are dealt to the ranks in turn, so that all ranks together see what a single one would see. even:
        ranks that would get one batch less get the last one again, so that all make as many passes.
        """
        idle = even and count % ranks and rank >= count % ranks
        for number in range(count):
            starts = self.data[split].draw(self.batch_size, self.generator)
            if number % ranks == rank or (idle and number == count - 1):
                x, y = self._load(split, starts)
                yield list(zip(x.split(self.micro_batch_size), y.split(self.micro_batch_size), strict=True))
