"""What a run survives: signals, memory that vanishes, numbers that go bad."""

import math
import os
import signal
import time
from contextlib import contextmanager

import torch

from nanofit import runtime
from nanofit.errors import UsageError

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
SAME_SIGNAL_SECONDS = 2  # a signal may come twice: to the whole group of processes, and again from torchrun
BAD_IN_A_ROW = 3  # iterations without a finite gradient, after which a run stops
SCALED_BAD_IN_A_ROW = 40  # with float16, whose scaler needs a few to find its scale
LOOK_EVERY = 100  # iterations, at least, after which that is noticed


class StopRequested(Exception):
    """A signal asked for the end while something long was going on that can be done again."""


class StopSignals:
    """SIGINT, SIGTERM and SIGUSR1 become a request that the training loop looks at."""

    def __init__(self):
        self.received = 0  # the signal's number
        self._since = 0.0

    @contextmanager
    def listening(self):
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        # What is ignored stays so: nohup and shell scripts see to that.
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


class Recovery:
    """Runs parts of training, again in smaller pieces where memory runs out in them.

    Holds the split of the batch: micro_batch_size, and micro_steps of this rank. give_up(): saves what can be
    saved before an error ends the run on all ranks, and tells why that failed, else ''.
    """

    def __init__(self, world, device, batches, model, micro_steps, give_up):
        self.world, self.device, self.batches, self.model = world, device, batches, model
        self.micro_steps, self.give_up = micro_steps, give_up
        self._ran_out = 0  # parts in which memory ran out so far

    @property
    def micro_batch_size(self):
        return self.batches.micro_batch_size

    def run(self, part):
        """The value of part(), which computes but moves nothing other than the batches and random generators.

        All ranks must call it, and all of them try again if memory ran out on one: first as before, with what the
        allocator kept given back, and then, or where that has happened before, with micro-batches of half the size.
        Raises StopRequested, or a UsageError where the data can't be read or not even one sequence fits any more.
        """
        mark, generators = self.batches.mark(), runtime.rng_state(self.device)
        attempts = 0
        while True:
            value = None
            kind, said = "", ""
            try:
                if attempts:
                    self.batches.rewind(mark)
                    runtime.set_rng_state(generators, self.device)
                value = part()
            except OUT_OF_MEMORY as e:
                kind, said = "memory", (str(e).strip().splitlines() or ["out of memory"])[0]
            except StopRequested:
                kind = "stop"
            except (UsageError, OSError) as e:
                kind, said = "data", str(e)
            # Here, behind the except block, the traceback and the tensors of its frames are gone.
            if not self.world.most(int(bool(kind))):
                return value
            value = None
            self.model.zero_grad(set_to_none=True)
            runtime.empty_cache(self.device)
            told = [(rank, *answer) for rank, answer in enumerate(self.world.gather((kind, said))) if answer[0]]
            kinds = {kind for _, kind, _ in told}
            if "data" in kinds:
                self._fail(next(said for _, kind, said in told if kind == "data"))
            if "stop" in kinds:
                raise StopRequested
            rank, _, said = told[0]
            self._ran_out += not attempts
            self._make_room(rank, said, same_size=not attempts and self._ran_out <= 2)
            attempts += 1

    def _make_room(self, rank, said, same_size):
        size = self.micro_batch_size
        where = f" on rank {rank}" if self.world.size > 1 else ""
        smaller = next((d for d in range(size // 2, 0, -1) if self.batches.batch_size % d == 0), None)
        if smaller is None and not same_size:
            self._fail(
                f"memory ran out{where} at batch_size 1 ({said}; {runtime.memory_now(self.device)}): end what else "
                "uses this device, or start with --auto_fit=True, which tries what takes less"
            )
        if same_size:
            print(f"memory ran out{where} ({said}): the same batches again, at the same size")
            return
        self.micro_steps = self.micro_steps * size // smaller  # exact: whole batches, of which smaller is a divisor
        self.batches.micro_batch_size = smaller
        print(f"memory ran out{where} ({said}): the same batches again, batch_size {size} -> {smaller}")

    def _fail(self, sentence):
        unsaved = self.give_up()
        raise UsageError(f"{sentence}; {unsaved or 'a checkpoint is saved, and --init_from=resume goes on from it'}")


class Watch:
    """Notices what is not finite, without waiting for the device in each iteration.

    what: the name of the figure that is watched, for messages. scaled: float16's scaler leaves bad steps out, which
    is nothing to speak of unless it happens too often.
    """

    def __init__(self, what, scaled=False):
        self._what, self._scaled, self._noted, self._in_a_row = what, scaled, [], 0
        self._limit = SCALED_BAD_IN_A_ROW if scaled else BAD_IN_A_ROW

    def note(self, iteration, figure):
        """Keep a scalar tensor for the next check, which comes by itself once there are LOOK_EVERY."""
        self._noted.append((iteration, figure.detach()))
        if len(self._noted) == LOOK_EVERY:
            self.check()

    def check(self):
        """Look at what was noted since the last look; UsageError after too many in a row that are not finite."""
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
                    "smaller learning_rate, more warmup_iters or a smaller grad_clip may help; a checkpoint that was "
                    "written is as it was, and --init_from=resume goes on from it"
                )
