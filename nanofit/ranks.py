"""Ranks: who they are, how they agree, how tensors travel between them.

A process without torchrun is rank 0 of 1, and the methods here do nothing. Of several ranks, all must call them.
"""

import atexit
import contextlib
import os
import signal
import sys
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from nanofit import machine
from nanofit.errors import UsageError, shown, usage_errors

MEETING = timedelta(minutes=10)  # how long ranks wait for each other at the start, as torchrun does


@contextlib.contextmanager
def ctrl_c_ends_at_once():
    """Leave SIGINT to the system, which ends the process even while it waits in C++. If ignored, it stays so."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass
class World:
    """Which of torchrun's processes this one is."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1  # ranks on this machine
    on_host: object = None  # a group whose messages don't wait for the devices
    sharded: bool = False  # no rank holds the whole model: see sharding.place

    @classmethod
    def of_torchrun(cls):
        """The World that torchrun's environment variables describe; without RANK, a process alone."""
        if "RANK" not in os.environ:
            return cls()
        variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
        with usage_errors(ValueError, prefix="RANK is set, but not as torchrun sets it: unset it, or use torchrun: "):
            return cls(*(int(os.environ.get(name, alone)) for name, alone in variables.items()))

    @classmethod
    def imagined(cls, size):
        """A World of size ranks, of which only this one, the first, exists (torch's "fake" backend).

        Messages arrive at once. Tensors take the memory that they would take among real ranks. Their values and the
        time mean nothing.
        """
        from torch.testing._internal.distributed.fake_pg import FakeStore

        hook = sys.excepthook
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
        sys.excepthook = hook  # as in init
        return cls(size=size, on_host=dist.group.WORLD)

    @property
    def is_main(self):
        return self.rank == 0

    def init(self, backend, device_name, wait_minutes=180.0, shared=None):
        """Meet the other ranks; returns this rank's torch.device: of several GPUs, that of its local rank.

        backend: 'nccl' (GPUs) or 'gloo' (anything). wait_minutes: a rank that doesn't answer for so long is lost.
        shared: {key: value} that must be the same on all ranks; else a UsageError on all of them.
        """
        device = machine.find_device(device_name)
        if self.size == 1:
            return device
        options = {}
        if device.type == "cuda":
            try:
                options["device_id"] = device = machine.find_device(f"cuda:{self.local_rank}")
            except UsageError as e:
                raise UsageError(f"rank {self.rank}: {e}", of_rank=True) from e
            machine.set_device(device)
        elif backend == "nccl":
            backend = "gloo"
            if self.is_main:
                print(f"backend nccl needs CUDA: gloo joins the ranks on {device_name}")
        if not dist.is_backend_available(backend):
            raise UsageError(f"backend={backend!r} is not in this build of torch: use 'nccl' on GPUs, 'gloo' elsewhere")
        prefix = "the ranks can't meet, start with torchrun, or unset RANK and WORLD_SIZE: "
        wait, hook = timedelta(minutes=wait_minutes), sys.excepthook
        # While torch waits in C++, no Python signal handler runs: Ctrl-C ends the process without a word.
        with usage_errors(ValueError, RuntimeError, OverflowError, TypeError, prefix=prefix), ctrl_c_ends_at_once():
            meeting = min(MEETING, wait)
            store, *_ = next(dist.rendezvous("env://", timeout=meeting))
            store = dist.PrefixStore(self._meet(store, meeting), store)
            store.set_timeout(wait)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=wait, **options)
        sys.excepthook = hook  # torch has replaced it by one that delays what ours prints
        self.on_host = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo", timeout=wait)
        # gloo's threads release their last tensors a moment after the call that waited for them. If Python is
        # shutting down by then, the process aborts.
        atexit.register(time.sleep, 0.1)
        self.require_alike(shared or {})
        return device

    def require_alike(self, keys):
        """Raise a UsageError on all ranks if one has other values for these keys than rank 0."""
        first, *others = self.all_gather(keys)
        for rank, theirs in enumerate(others, start=1):
            for key, value in first.items():
                if (other := theirs.get(key)) != value:
                    raise UsageError(
                        f"{key} is {shown(value)} for rank 0 and {shown(other)} for rank {rank}: give all ranks the "
                        f"same --{key}, by the same command and config files"
                    )

    def _meet(self, store, patience):
        """A name for this attempt of the run, the same on all ranks, and not used by an attempt before a restart.

        torchrun may keep its store over restarts, with the addresses of ranks that are gone. So each rank tells rank 0
        a random name, and rank 0 answers under that name. Raises UsageError if ranks don't come within patience, a
        timedelta.
        """
        own = uuid.uuid4().hex
        if not self.is_main:
            store.set(f"here/{self.rank}", own)
            try:
                attempt = store.get(f"answer/{own}").decode()  # waits
            except dist.DistStoreError as e:
                raise self._without([0], patience) from e
            store.set(f"joined/{attempt}/{self.rank}", "")
            return attempt
        missing, end = list(range(1, self.size)), time.monotonic() + patience.total_seconds()
        while missing:
            for rank in missing:
                if store.check([f"here/{rank}"]):  # it may be left by a rank that is gone; a new one replaces it
                    store.set(f"answer/{store.get(f'here/{rank}').decode()}", own)
            time.sleep(0.02)
            missing = [rank for rank in missing if not store.check([f"joined/{own}/{rank}"])]
            if missing and time.monotonic() > end:
                raise self._without(missing, patience)
        return own

    def _without(self, missing, patience):
        """The UsageError that these ranks did not come."""
        ranks = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
        waited = f"{patience.total_seconds() / 60:g} minutes"
        return UsageError(f"{ranks} of {self.size} did not come in {waited}: look at what {ranks} printed")

    def destroy(self):
        """Leave the group of ranks, at the end of a run."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()

    def leave(self, exit_code=0):
        """End this process before the end of a run."""
        self.destroy()
        sys.exit(exit_code)

    def broadcast(self, tensors):
        """Replace the values of each tensor, of any dtype, by rank 0's."""
        if self.size == 1:
            return
        for tensor in tensors:
            sent = tensor.detach().contiguous()
            # As bytes: no backend takes all dtypes.
            group = self.on_host if tensor.device.type == "cpu" else None
            dist.broadcast(sent.view(-1).view(torch.uint8), 0, group=group)
            if not tensor.is_contiguous():
                tensor.data = sent  # an expanded tensor can't be written to

    def all_reduce_mean(self, tensors):
        """Replace each tensor by its mean over the ranks."""
        if self.size > 1:
            for pending in [dist.all_reduce(t, async_op=True) for t in tensors]:
                pending.wait()
            torch._foreach_div_(tensors, self.size)

    def all_reduce_max(self, number):
        """The largest of the ranks' whole numbers, on every rank."""
        if self.size == 1:
            return number
        number = torch.tensor(number)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self.on_host)
        return number.item()

    def any_of(self, flags):
        """For each of the ranks' flags, whether it is set on any rank: a list of bool."""
        if self.size == 1 or not flags:
            return flags
        flags = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.on_host)
        return flags.bool().tolist()

    def all_gather(self, value):
        """A list of every rank's value (plain Python and tensors on the CPU), on every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.on_host)
        return values

    def agree(self, attempt):
        """Call attempt() on every rank. Returns the values of all; if it fails on any, UsageError on all ranks."""
        value, failure = None, ""
        try:
            value = attempt()
        except UsageError as e:
            failure = str(e)
        answers = self.all_gather((value, failure))
        for rank, (_, said) in enumerate(answers):
            if said:
                raise UsageError(f"rank {rank}: {said}" if self.size > 1 else said)
        return [value for value, _ in answers]


ALONE = World()
