"""A run's folder: held by one run at a time, and never written over by another.

    ckpt.pt            the checkpoint; with always_save_checkpoint=False, the best one
    ckpt.prev.pt       the checkpoint before it
    ckpt.last.pt       where the run stopped, if ckpt.pt is the best and must stay
    ckpt-ITERATION.pt  the last few, with --keep

Each carries the id of its run. Checkpoints of another run are moved aside before this run writes its first.
"""

import contextlib
import errno
import os
import re
import socket
import tempfile
import time
import uuid
import zlib
from pathlib import Path

from nanofit import checkpoint
from nanofit.checkpoint import LAST, NAME, PREVIOUS, SaveError
from nanofit.errors import UsageError, usage_errors
from nanofit.ranks import ALONE

LOCK = "run.lock"


def run_id_of(saved):
    """The id of the run that a checkpoint belongs to. nanoGPT's have none: theirs is computed from their entries."""
    own = saved.get("run_id")
    if isinstance(own, str) and re.fullmatch("[0-9a-f]{8}", own):  # it becomes part of a file's name
        return own
    told = [saved.get("iter_num"), saved.get("best_val_loss"), *sorted(map(str, saved.get("config", {}).items()))]
    return f"{zlib.crc32(repr(told).encode(errors='replace')):08x}"


class RunFolder:
    """out_dir as one run sees it. run_id: the id of the run that goes on, or a new one."""

    def __init__(self, out_dir, world=ALONE):
        self.out_dir, self.world = out_dir, world
        self.begin_anew()
        self._loaded = None  # the iteration of the checkpoint to resume from
        self._alone = False  # no checkpoint here belongs to another run
        self._lock = None  # the open file, while this run holds the folder

    def path(self, name=NAME):
        return os.path.join(self.out_dir, name)

    def kept_in(self, run_id):
        """The folder for the files of another run; run_id: None if the run is unknown."""
        return self.path(f"kept-of-run-{run_id}" if run_id else "kept-unreadable")

    def settle(self, init_from):
        """init_from; 'auto' becomes 'resume' if this folder holds a checkpoint, else 'scratch'."""
        if init_from != "auto":
            return init_from
        return "resume" if any(os.path.lexists(self.path(name)) for name in (NAME, LAST, PREVIOUS)) else "scratch"

    def load(self):
        """The checkpoint to resume from: where the run stopped last. Raises UsageError as checkpoint.load."""
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
        """Save from here on as a new run: the checkpoints that are here will be moved aside."""
        self.run_id = uuid.uuid4().hex[:8]

    def take(self):
        """Make the folder, and let rank 0 hold it until its process ends. All ranks must call it.

        UsageError if it can't be written to, if another run holds it, or if the ranks loaded different checkpoints:
        then each machine has a folder of its own.
        """
        found = self.world.all_gather(self._loaded)
        if len(set(found)) > 1:
            told = ", ".join(f"rank {rank} {'none' if i is None else f'iteration {i}'}" for rank, i in enumerate(found))
            raise UsageError(
                f"out_dir={self.out_dir!r} does not hold the same checkpoint for all ranks ({told}): it must be a "
                "folder that all machines share"
            )
        self.world.agree(self._take if self.world.is_main else lambda: None)

    def _take(self):
        with usage_errors(OSError, prefix=f"out_dir={self.out_dir!r} can't be made: "):
            os.makedirs(self.out_dir, exist_ok=True)
        with usage_errors(OSError, prefix=f"out_dir={self.out_dir!r} can't be written to: "):
            with tempfile.TemporaryFile(dir=self.out_dir):
                pass
            lock = open(self.path(LOCK), "a+", errors="replace")  # noqa: SIM115  # held as long as it is open
        try:
            import fcntl

            # Held by the process: in a notebook, a run that has failed doesn't block the next one.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            return  # Windows: nothing keeps two runs out of one folder
        except OSError as e:
            if e.errno in (errno.EWOULDBLOCK, errno.EACCES):  # another process holds it
                lock.seek(0)
                holder = lock.read(200).strip() or "another process"
                raise UsageError(
                    f"out_dir={self.out_dir!r} is in use by {holder}: let it end, or give another --out_dir"
                ) from e
            print(f"{self.out_dir} can't be locked ({e.strerror}): make sure that no other run writes there")
            return
        self._lock = lock
        with contextlib.suppress(OSError):  # on a full disk the lock holds without the words
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            lock.flush()
        for name in ("ckpt*.pt", "auto_fit.json", "sample.txt", "report.html"):
            # A run that is killed while it writes leaves a part.
            for part in Path(self.out_dir).glob(f"{name}.*.part"):
                with contextlib.suppress(OSError):
                    part.unlink()

    def release(self):
        """Let another run have the folder. When a process ends, that happens by itself."""
        if self._lock:
            with contextlib.suppress(OSError):
                self._lock.truncate(0)
            self._lock.close()
            self._lock = None

    def place_to_stop(self, always_save):
        """The file to save in when the run stops: LAST if ckpt.pt is this run's best and must stay, else ckpt.pt."""
        has_best = not always_save and os.path.isfile(self.path()) and NAME not in self._others()
        return LAST if has_best else NAME

    def save(self, snapshot, name=NAME, keep=0):
        """Write a checkpoint of this run: as checkpoint.save. For rank 0 alone; a thread may call it."""
        whole = {**snapshot, "run_id": self.run_id}
        checkpoint.save(whole, self.out_dir, name, self._move_others_aside, not self._others(), keep)

    def _others(self):
        """{name: content, None if it can't be read} of the checkpoints here that belong to another run."""
        if self._alone:
            return {}
        names = [LAST, PREVIOUS, NAME, *(path.name for path in checkpoint.numbered(self.out_dir).values())]
        held = {n: checkpoint.peek(self.path(n)) for n in names if os.path.lexists(self.path(n))}
        return {name: saved for name, saved in held.items() if saved is None or run_id_of(saved) != self.run_id}

    def _move_others_aside(self):
        for name, saved in self._others().items():
            try:
                target = self.move_aside(name, saved and run_id_of(saved))
            except OSError as e:
                raise SaveError(f"not saved: {self.path(name)}, of another run, can't be moved ({e.strerror})") from e
            iteration = f", of iteration {saved['iter_num']}," if saved else ""
            print(f"{self.path(name)}{iteration} is another run's: kept as {target}")
        self._alone = True

    def move_aside(self, name, run_id):
        """Move a file into the folder of the run it belongs to, and return its new path. Nothing there is replaced."""
        # The folder is named by the run's id, so that an interrupted move goes on in the same folder.
        target = os.path.join(self.kept_in(run_id), name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        while os.path.lexists(target):
            target += "~"
        os.rename(self.path(name), target)
        return target
