"""A run's folder: held by one run at a time, and never written over by another.

ckpt.pt is the run's checkpoint, the best where only that is kept; ckpt.prev.pt the one before; ckpt.last.pt, where a
run stands whose ckpt.pt is the best and must stay; ckpt-ITERATION.pt the last few, with --keep. All are of one run,
told by the id that they carry. Those of another run are moved aside, whole, before this one writes its first.
"""

import contextlib
import errno
import glob
import os
import re
import socket
import tempfile
import time
import uuid
import zlib

from nanofit import checkpoint
from nanofit.checkpoint import LAST, NAME, PREVIOUS, SaveError
from nanofit.errors import UsageError, usage_errors
from nanofit.ranks import ALONE

LOCK = "run.lock"
HELD = (errno.EWOULDBLOCK, errno.EACCES)  # what the system says of a lock that another process has


def run_id_of(saved):
    """The id of the run that a checkpoint belongs to. nanoGPT's have none: theirs is made of what they hold."""
    own = saved.get("run_id")
    if isinstance(own, str) and re.fullmatch("[0-9a-f]{8}", own):  # it becomes part of a file's name
        return own
    told = [saved.get("iter_num"), saved.get("best_val_loss"), *sorted(map(str, saved.get("config", {}).items()))]
    return f"{zlib.crc32(repr(told).encode(errors='replace')):08x}"


class RunFolder:
    """out_dir as one run sees it. run_id: of the run that goes on, or a new one."""

    def __init__(self, out_dir, world=ALONE):
        self.out_dir, self.world = out_dir, world
        self.begin_anew()
        self._loaded = None  # the iteration of the checkpoint that the run goes on from
        self._alone = False  # what lies in the folder is of this run
        self._lock = None  # the open file, while this run holds the folder

    def path(self, name=NAME):
        return os.path.join(self.out_dir, name)

    def kept_in(self, run_id):
        """The folder for what another run left here; run_id: None where it can't be told whose it is."""
        return self.path(f"kept-of-run-{run_id}" if run_id else "kept-unreadable")

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
                    f"{self.path(LAST)}, where the run stopped, can't be read; {self.path()} is whole, of iteration "
                    f"{best['iter_num']}: to go on from there, move {self.path(LAST)} elsewhere"
                )
            if last and best and run_id_of(last) != run_id_of(best):
                print(f"{self.path(LAST)} is of another run than {self.path()} and is left alone")
            elif last and (not best or last["iter_num"] >= best["iter_num"]):
                name = LAST
        saved = checkpoint.load(self.out_dir, name, for_training=True)
        self.run_id = run_id_of(saved)
        self._loaded = saved["iter_num"]
        return saved

    def begin_anew(self):
        """What is saved from here on is another run's than what was loaded, which will be kept beside it."""
        self.run_id = uuid.uuid4().hex[:8]

    def take(self):
        """Make the folder and hold it until this process ends. All ranks must call it; rank 0 holds.

        UsageError where it can't be written to, or is another run's; and where the ranks don't all go on from the same
        checkpoint: each machine may have a folder of its own.
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

    def try_out(self):
        """Make the folder and write a file there, which is gone at once; UsageError where that can't be done."""
        with usage_errors(OSError, prefix=f"out_dir={self.out_dir!r} can't be made: "):
            os.makedirs(self.out_dir, exist_ok=True)
        with (
            usage_errors(OSError, prefix=f"out_dir={self.out_dir!r} can't be written to: "),
            tempfile.TemporaryFile(dir=self.out_dir),
        ):
            pass

    def _take(self):
        self.try_out()
        try:
            import fcntl
        except ImportError:
            return  # Windows has other locks; there, two runs in one folder are the user's to avoid
        with usage_errors(OSError, prefix=f"out_dir={self.out_dir!r} can't be written to: "):
            self._lock = open(self.path(LOCK), "a+", errors="replace")  # noqa: SIM115  # held as long as it is open
        try:
            # A lock of the process, so that a run in a notebook that has failed doesn't stand in the next one's way.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno in HELD:
                holder = self._named()
                self._lock.close()
                self._lock = None  # release() would take its holder's name off it
                raise self._in_use(holder) from e
            print(f"{self.out_dir} can't be locked ({e.strerror}): make sure that no other run writes there")
            return
        with contextlib.suppress(OSError):  # a full disk: the lock holds without the words
            self._lock.truncate(0)
            self._lock.write(
                f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
            )
            self._lock.flush()
        for name in ("ckpt*.pt", "auto_fit.json", "sample.txt", "report.html"):
            # Of a run that was killed while it wrote.
            for part in glob.glob(os.path.join(glob.escape(self.out_dir), f"{name}.*.part")):
                with contextlib.suppress(OSError):
                    os.remove(part)

    def _named(self):
        """Whom the lock file names as its holder."""
        self._lock.seek(0)
        return self._lock.read(200).strip() or "another process"

    def holder(self):
        """Who else holds the folder, in words; '' where nobody does or that can't be known. Nothing is written.

        Not for a run that holds the folder itself: to look would give it up.
        """
        with contextlib.suppress(ImportError, OSError), open(self.path(LOCK), errors="replace") as lock:
            import fcntl

            try:
                fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as e:
                return (lock.read(200).strip() or "another process") if e.errno in HELD else ""
        return ""

    def _in_use(self, holder):
        return UsageError(f"out_dir={self.out_dir!r} is in use by {holder}: let it end, or give another --out_dir")

    def release(self):
        """Let another run have the folder; when a process ends, that happens by itself."""
        if self._lock:
            with contextlib.suppress(OSError):
                self._lock.truncate(0)
            self._lock.close()
            self._lock = None

    def place_to_stop(self, always_save):
        """Where a run is saved as it stands: in ckpt.pt, but beside it where that is this run's best and must stay."""
        has_best = not always_save and os.path.isfile(self.path()) and NAME not in self._others()
        return LAST if has_best else NAME

    def save(self, snapshot, name=NAME, keep=0):
        """Write a checkpoint of this run: as checkpoint.save. For rank 0 alone; a thread may call it."""
        whole = {**snapshot, "run_id": self.run_id}
        checkpoint.save(whole, self.out_dir, name, self._move_others_aside, not self._others(), keep)

    def _others(self):
        """{name: what is in it, None for what can't be read} of another run's checkpoints that lie here."""
        if self._alone:
            return {}
        names = [LAST, PREVIOUS, NAME, *map(os.path.basename, checkpoint.numbered(self.out_dir).values())]
        held = {n: checkpoint.peek(self.path(n)) for n in names if os.path.lexists(self.path(n))}
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
