"""A run's folder: held by one run at a time, and never written over by another.

ckpt.pt is the run's checkpoint, the best where only that is kept; ckpt.prev.pt the one before; ckpt.last.pt, where a
run stopped whose ckpt.pt is the best and must stay. All three are of one run, told by the id that they carry. Those
of another run are moved aside, whole, before this one writes its first.
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import socket
import time
import uuid
from dataclasses import replace

from nanofit import checkpoint
from nanofit.checkpoint import LAST, NAME, PREVIOUS, SaveError
from nanofit.errors import UsageError, shown, usage_errors
from nanofit.files import replacing
from nanofit.ranks import ALONE
from nanofit.units import micro_batch_sizes

LOCK = "run.lock"
SMALLER = "smaller.json"  # [batch_size, the micro-batch that the next attempt of a sharded run begins with]
HELD = (errno.EWOULDBLOCK, errno.EACCES)  # what the system says of a lock that another process has
_held = {}  # folder: this process's hold on it. A run that ended in an error, as in a notebook, may have left it


def run_id_of(saved):
    """The id of the run that a checkpoint belongs to. nanoGPT's have none: theirs is made of what they hold."""
    own = saved.get("run_id")
    if isinstance(own, str) and re.fullmatch("[0-9a-f]{8}", own):  # it becomes part of a file's name
        return own
    config = sorted(map(shown, saved.get("config", {}).items()))
    told = [shown(saved.get("iter_num")), shown(saved.get("best_val_loss")), *config]
    return hashlib.sha256("\n".join(told).encode(errors="replace")).hexdigest()[:8]


def _named_in(lock):
    """Whom a lock file, open for reading, names as its holder."""
    holder = ""
    with contextlib.suppress(OSError):  # a pipe tells nothing
        holder = os.read(lock, 200).decode(errors="replace").strip()
    return holder or "another process"


class RunFolder:
    """out_dir as one run sees it. run_id: of the run that goes on, or a new one."""

    def __init__(self, out_dir, world=ALONE):
        self.out_dir, self.world = out_dir, world
        self.begin_anew()
        self._loaded = None  # the iteration of the checkpoint that the run goes on from
        self._alone = False  # what lies in the folder is of this run

    def path(self, name=NAME):
        return os.path.join(self.out_dir, name)

    def kept_in(self, run_id):
        """The folder for what another run left here; run_id: None where it can't be told whose it is."""
        return self.path(f"kept-of-run-{run_id}" if run_id else "kept-damaged")

    def settle(self, init_from):
        """init_from, 'auto' made 'resume' where this folder holds a checkpoint, else 'scratch'."""
        if init_from != "auto":
            return init_from
        return "resume" if any(os.path.lexists(self.path(name)) for name in (NAME, LAST, PREVIOUS)) else "scratch"

    def load(self):
        """The checkpoint to go on from: where the run stopped last. Raises UsageError as checkpoint.load."""
        name = NAME
        if os.path.isfile(self.path(LAST)):
            last, best = (checkpoint.peek(self.path(n), whole=True) for n in (LAST, NAME))
            if last is None and best is not None:
                raise UsageError(
                    f"{self.path(LAST)}, where the run stopped, is damaged; {self.path()} is whole, of iteration "
                    f"{best['iter_num']}: to go on from there, remove {self.path(LAST)}"
                )
            if last and best and run_id_of(last) != run_id_of(best):
                print(f"{self.path(LAST)} is of another run than {self.path()} and is left alone")
            elif last and (not best or last["iter_num"] >= best["iter_num"]):
                name = LAST
        saved = checkpoint.load(self.out_dir, name, for_training=True)
        self.run_id = run_id_of(saved)
        self._loaded = saved["iter_num"]
        return saved

    def note_smaller(self, batch_size, size):
        """Let the next attempt begin with micro-batches of this size; any rank may call it, for want of memory."""
        # A full disk: the message that ends the attempt says the same.
        with contextlib.suppress(OSError), replacing(self.path(SMALLER)) as file:
            json.dump([batch_size, size], file)

    def no_larger(self, plan):
        """plan, or as note_smaller wants it where that is less. All ranks must call it."""
        if not plan.levers.shard:
            return plan
        noted = None
        if self.world.is_main:
            with contextlib.suppress(OSError, ValueError, RecursionError), open(self.path(SMALLER)) as file:
                noted = json.load(file)
        noted = self.world.all_gather(noted)[0]
        sizes = micro_batch_sizes(plan.batch_size, plan.gradient_accumulation_steps // self.world.size)
        smaller = [size for size in sizes if noted == [plan.batch_size, size] and size < plan.micro_batch_size]
        if not smaller:
            return plan
        print(
            f"batch_size {plan.micro_batch_size} -> {smaller[0]}: memory ran out before ({self.path(SMALLER)}); on "
            "larger GPUs, remove that file"
        )
        return replace(plan, micro_batch_size=smaller[0])

    def begin_anew(self):
        """What is saved from here on is another run's than what was loaded, which will be kept beside it."""
        self.run_id = uuid.uuid4().hex[:8]

    def take(self):
        """Make the folder and hold it until this process ends. All ranks must call it; rank 0 holds.

        UsageError where they don't all go on from the same checkpoint: each machine may have a folder of its own.
        """
        found = self.world.all_gather(self._loaded)
        if len(set(found)) > 1:
            if holder := self.world.all_gather(self.holder() if self.world.is_main else "")[0]:
                raise self._in_use(holder)  # by a run that saved while the ranks were loading
            told = ", ".join(f"rank {rank} {'none' if i is None else f'iteration {i}'}" for rank, i in enumerate(found))
            raise UsageError(
                f"out_dir={self.out_dir!r} does not hold the same checkpoint for all ranks ({told}): it must be a "
                "folder that all machines share"
            )
        self.world.agree(self._take if self.world.is_main else lambda: None)

    def _take(self):
        with usage_errors(OSError, prefix=f"out_dir={self.out_dir!r} can't be made: "):
            os.makedirs(self.out_dir, exist_ok=True)
        try:
            import fcntl
        except ImportError:
            return  # Windows has other locks; there, two runs in one folder are the user's to avoid
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK  # neither a link nor a wait for a pipe's end
        with usage_errors(OSError, prefix=f"out_dir={self.out_dir!r} can't be written to: "):
            lock = os.open(self.path(LOCK), flags, 0o666)
        if self._is_held(os.fstat(lock)):
            self.release()  # by this process, which would stand in its own way
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            holder = _named_in(lock)
            os.close(lock)
            if e.errno in HELD:
                raise self._in_use(holder) from e
            print(f"{self.out_dir} can't be locked ({e.strerror}): make sure that no other run writes there")
            return
        self.release()
        _held[os.path.realpath(self.out_dir)] = lock
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError):  # a full disk: the lock holds without the words
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode(), 0)
        for name in ("ckpt*.pt", "auto_fit.json", SMALLER, "sample.txt", "report.html"):
            # Of a run that was killed while it wrote.
            for part in glob.glob(os.path.join(glob.escape(self.out_dir), f"{name}.*.part")):
                with contextlib.suppress(OSError):
                    os.remove(part)

    def holder(self):
        """Who else holds the folder, in words; '' where nobody does or that can't be known. Nothing is written."""
        try:
            import fcntl

            lock = os.open(self.path(LOCK), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (ImportError, OSError):
            return ""
        try:
            if not self._is_held(os.fstat(lock)):
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as e:
            return _named_in(lock) if e.errno in HELD else ""
        finally:
            os.close(lock)  # and with it the lock, if it was free
        return ""

    def _in_use(self, holder):
        return UsageError(f"out_dir={self.out_dir!r} is in use by {holder}: let it end, or give another --out_dir")

    def _is_held(self, status):
        """Whether the lock file of this status is the one that this process holds."""
        lock = _held.get(os.path.realpath(self.out_dir))
        return lock is not None and os.path.samestat(os.fstat(lock), status)

    def _hold_on(self):
        """Take the folder again where somebody has removed the lock file. Raises SaveError where another run has it."""
        there = os.path.exists(self.path(LOCK))
        if os.path.realpath(self.out_dir) not in _held or (there and self._is_held(os.stat(self.path(LOCK)))):
            return
        try:
            self._take()
        except UsageError as e:
            raise SaveError(f"not saved: {self.path(LOCK)} was removed, and {e}") from e
        if there:  # of a run that came meanwhile: what it left may be newer than what this one went on from
            self.begin_anew()
            self._alone = False

    def release(self):
        """Let another run have the folder; when a process ends, that happens by itself."""
        lock = _held.pop(os.path.realpath(self.out_dir), None)
        if lock is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(lock, 0)
            os.close(lock)

    def place_to_stop(self, always_save):
        """Where a run that stops is saved: in ckpt.pt, but beside it where that is this run's best and must stay."""
        has_best = not always_save and os.path.isfile(self.path()) and NAME not in self._others()
        return LAST if has_best else NAME

    def save(self, snapshot, name=NAME):
        """Write a checkpoint of this run. All ranks must call it; rank 0 writes, and the others wait for it.

        Raises SaveError on all of them where that fails: what was there is as it was.
        """
        failure = ""
        if self.world.is_main:
            try:
                self._hold_on()
                whole = {**snapshot, "run_id": self.run_id}
                checkpoint.save(whole, self.out_dir, name, self._move_others_aside, not self._others())
            except SaveError as e:
                failure = str(e)
        if failure := self.world.all_gather(failure)[0]:
            raise SaveError(failure)

    def _others(self):
        """{name: what is in it, None for what can't be read} of another run's checkpoints that lie here."""
        if self._alone:
            return {}
        held = {n: checkpoint.peek(self.path(n)) for n in (LAST, PREVIOUS, NAME) if os.path.lexists(self.path(n))}
        return {name: saved for name, saved in held.items() if saved is None or run_id_of(saved) != self.run_id}

    def _move_others_aside(self):
        """Give another run's checkpoints a folder of their own."""
        for name, saved in self._others().items():
            # By id, so that a move that was interrupted goes on in the same folder.
            target = os.path.join(self.kept_in(saved and run_id_of(saved)), name)
            try:
                os.makedirs(os.path.dirname(target), exist_ok=True)
                while os.path.lexists(target):
                    target += "~"
                os.rename(self.path(name), target)
            except OSError as e:
                raise SaveError(f"not saved: {self.path(name)}, of another run, can't be moved ({e.strerror})") from e
            iteration = f", of iteration {saved['iter_num']}," if saved else ""
            print(f"{self.path(name)}{iteration} is another run's: kept as {target}")
        self._alone = True
