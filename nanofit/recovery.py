"""What a run survives: signals, memory that runs out, gradients that are not finite."""

import math
import os
import signal
import sys
import time
from contextlib import contextmanager

import torch

from nanofit import machine
from nanofit.errors import UsageError, is_out_of_memory, memory_sentence
from nanofit.units import micro_batch_sizes

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
SAME_SIGNAL_SECONDS = 2  # a signal may come twice: to the whole process group, and again from torchrun
BAD_IN_A_ROW = 3  # iterations without a finite gradient, after which a run stops
SCALED_BAD_IN_A_ROW = 40  # with float16, whose scaler needs a few iterations to find its scale
LOOK_EVERY = 100  # iterations, at most, between two checks


class StopRequested(Exception):
    """A signal has come during something long that will be repeated on resuming."""


class StopSignals:
    """Turns SIGNALS into a request that the training loop looks at."""

    def __init__(self):
        self.received = 0  # the signal's number
        self._since = 0.0

    @contextmanager
    def listening(self):
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        # An ignored signal stays ignored: nohup and shell scripts rely on it.
        heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._receive) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number, frame):
        now = time.monotonic()
        if not self.received:
            self.received, self._since = number, now
        elif now - self._since > SAME_SIGNAL_SECONDS:
            os._exit(128 + number)

    def check(self):
        """Raise StopRequested if a signal has come."""
        if self.received:
            raise StopRequested


class _Attempt:
    """One try of an iteration or an evaluation: a `with` block that catches errors after which it may be repeated."""

    def __init__(self):
        self.kind, self.said = "", ""  # what went wrong on this rank: '', 'stop', 'data' or 'memory'; a sentence

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, StopRequested):
            self.kind = "stop"
        elif is_out_of_memory(error):
            self.kind, self.said = "memory", memory_sentence(error)
        elif isinstance(error, (UsageError, OSError)):
            self.kind, self.said = "data", str(error)
        return bool(self.kind)


class Recovery:
    """Repeats parts of training in which memory runs out, in smaller pieces if need be:

        for attempt in recovery.attempts():
            with attempt:
                ...  # may compute, draw batches and random numbers; must change nothing else

    batches: whose micro_batch_size becomes smaller. give_up(): saves before an error ends the run on all ranks, and
    returns a sentence about it. note_smaller(batch_size, size): keeps the size for the next start of a sharded run.
    """

    def __init__(self, world, device, batches, model, scaler, give_up, note_smaller=lambda batch_size, size: None):
        self.world, self.device, self.batches, self.model = world, device, batches, model
        self.scaler, self.give_up, self.note_smaller = scaler, give_up, note_smaller
        self._ran_out = 0  # iterations and evaluations so far in which memory ran out

    def attempts(self):
        """Attempts, up to the first that succeeds on all ranks. All ranks must go through them.

        If memory runs out on one rank, all ranks repeat: first at the same size, after the allocator's cache is freed;
        then with micro-batches of half the size. If memory has run out twice before, they halve at once. Raises
        StopRequested, or a UsageError if the data can't be read or not even one sequence fits. A sharded run ends with
        a UsageError whenever memory runs out.
        """
        place, generators = self.batches.state_dict(), machine.rng_state(self.device)
        tried = 0
        while True:
            attempt = _Attempt()
            if tried:
                with attempt:  # reading the data again may fail
                    self._go_back(place, generators)
            if not attempt.kind:
                yield attempt
            # Here, after the with block, the error's traceback and the tensors in its frames are freed.
            if attempt.kind and self.world.sharded:
                self._leave(attempt.kind, attempt.said)
            if not self.world.all_reduce_max(int(bool(attempt.kind))):
                return
            self._drop_gradients()
            answers = self.world.all_gather((attempt.kind, attempt.said))
            told = [(rank, kind, said) for rank, (kind, said) in enumerate(answers) if kind]
            if spoiled := [said for _, kind, said in told if kind == "data"]:
                self._fail(spoiled[0])
            if any(kind == "stop" for _, kind, _ in told):
                self._go_back(place, generators)  # resuming repeats from here
                raise StopRequested
            rank, _, said = told[0]
            self._ran_out += not tried
            where = f"rank {rank}: {said}" if self.world.size > 1 else said
            self._make_room(where, same_size=not tried and self._ran_out <= 2)
            tried += 1

    def _go_back(self, place, generators):
        self.batches.load_state_dict(place)
        machine.set_rng_state(generators, self.device)

    def _leave(self, kind, said):
        """End a sharded run from one rank. The others wait for its shares and can't be asked."""
        sentence = f"rank {self.world.rank}: {said}"
        if kind == "memory":
            sentence += f" at batch_size {self.batches.micro_batch_size}, and sharded ranks can't go back one by one"
            if smaller := self._smaller():
                self.note_smaller(self.batches.batch_size, smaller)
                sentence += f"; the next start takes {smaller}"
            else:
                sentence += ": one sequence is too much, use more ranks, --recompute=True or --gather_once=False"
        raise UsageError(f"{sentence}; --init_from=auto goes on from the last checkpoint", of_rank=True)

    def _smaller(self):
        """The next micro-batch size, half the current or less, or None."""
        sizes = micro_batch_sizes(self.batches.batch_size, self.batches.per_iter)
        return max((s for s in sizes if s <= self.batches.micro_batch_size // 2), default=None)

    def _drop_gradients(self):
        self.model.zero_grad(set_to_none=True)
        machine.empty_cache(self.device)
        if self.scaler.is_enabled():
            # It remembers that it has unscaled these gradients. Setting its scale makes it forget.
            self.scaler.scale(torch.zeros((), device=self.device))
            self.scaler.update(self.scaler.get_scale())

    def _make_room(self, what, same_size):
        size, smaller = self.batches.micro_batch_size, self._smaller()
        if smaller is None and not same_size:
            self._fail(
                f"{what} at batch_size 1 ({machine.memory_now(self.device)}): end what else uses this device, or start "
                "with --auto_fit=True, which tries what takes less"
            )
        if same_size:
            print(f"{what}: the same batches again, at the same size")
            return
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # frees the memory of CUDA graphs for the old size
            machine.empty_cache(self.device)
        self.batches.micro_batch_size = smaller
        print(f"{what}: the same batches again, batch_size {size} -> {smaller}")

    def _fail(self, sentence):
        raise UsageError(f"{sentence}; {self.give_up()}")


class Watch:
    """Notices figures that are not finite, without waiting for the device in each iteration.

    what: the figure's name, for messages. way_on(): a sentence on how to resume. scaled: float16's scaler skips bad
    steps as it should, so that only too many in a row are told.
    """

    def __init__(self, what, way_on=lambda: "", scaled=False):
        self._what, self._way_on, self._scaled, self._noted, self._in_a_row = what, way_on, scaled, [], 0
        self._limit = SCALED_BAD_IN_A_ROW if scaled else BAD_IN_A_ROW

    def note(self, iteration, figure):
        """Keep a scalar tensor for the next check, which comes after LOOK_EVERY iterations at the latest."""
        self._noted.append((iteration, figure.detach()))
        if len(self._noted) == LOOK_EVERY:
            self.check()

    def check(self):
        """Look at the figures since the last check; UsageError after too many in a row that are not finite."""
        if not self._noted:
            return
        iterations, figures = zip(*self._noted, strict=True)
        self._noted = []
        for iteration, figure in zip(iterations, torch.stack(figures).tolist(), strict=True):
            if math.isfinite(figure):
                self._in_a_row = 0
                continue
            self._in_a_row += 1
            if not self._scaled:
                print(f"iteration {iteration}: {self._what} is {figure}: the weights stay as they were")
            if self._in_a_row == self._limit:
                raise UsageError(
                    f"{self._what} was not finite in {self._limit} iterations in a row, the last was {iteration}: a "
                    f"smaller learning_rate, more warmup_iters or a smaller grad_clip may help; {self._way_on()}"
                )
