"""out_dir/metrics.jsonl: a run's figures, a line of JSON for each dict of them.

They stand in the order of iterations, each of them once:

    {"iter": 0, "run": {"id": ..., "time": ..., ...}}   first, and where the run goes on: facts, see metrics.run_facts
    {"iter": 0, "tokens": 0, "lr": ..., "train_loss": ..., "val_loss": ..., "best_val_loss": ...}
    {"iter": 0, "tokens": 491520, "lr": ..., "loss": ..., "grad_norm": ..., "seconds": ..., "tokens_per_second": ...,
     "mfu": ..., "peak_bytes": ..., "memory_bytes": ..., "seconds_left": ...}

An evaluation stands before its iteration, and its tokens are those trained before. Losses are nats a token, the norm is
the gradient's before clipping, seconds are an iteration's without evaluations, mfu is a fraction of 1, and bytes are as
machine.memory_in_use says. What isn't known, and what isn't finite, is null.
"""

import atexit
import errno
import json
import math
import os
import re
import time

FILE = "metrics.jsonl"
_START = b',"run":{'  # nothing else in the file has these bytes


class MetricsFile:
    """The file of one run, opened with the first figures.

    Where the run goes on at iteration iter_num, what the file tells of it and of later ones is cut off. Another run's
    file is kept in kept_in(its id), and comes back when that run goes on. facts: plain values. Raises OSError.
    """

    def __init__(self, out_dir, run_id, kept_in, iter_num, facts):
        self.path, self.run_id, self.kept_in = os.path.join(out_dir, FILE), run_id, kept_in
        self.iter_num, self.facts, self._file = iter_num, facts, None

    def __call__(self, figures):
        if self._file is None:
            self._open()
        self._write(figures)
        if "val_loss" in figures:
            os.fsync(self._file.fileno())  # before a checkpoint is, which then never knows more than the file

    def _open(self):
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        if os.path.lexists(self.path) and (other := run_of(self.path)) != self.run_id:
            self._keep(other)
        own = os.path.join(self.kept_in(self.run_id), FILE)
        if not os.path.exists(self.path) and run_of(own) == self.run_id:
            os.rename(own, self.path)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  # open as long as the run
        atexit.register(self._file.close)
        self._file.truncate(_bytes_before(self.path, self.iter_num))
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._write({"iter": self.iter_num, "run": {"id": self.run_id, "time": started, **self.facts}})

    def _keep(self, other):
        target = os.path.join(self.kept_in(other), FILE)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        while os.path.lexists(target):
            target += "~"
        os.rename(self.path, target)

    def _write(self, record):
        """Add a line in one go, or nothing."""
        line = (json.dumps(_finite(record), separators=(",", ":")) + "\n").encode()
        before = os.fstat(self._file.fileno()).st_size
        if self._file.write(line) < len(line):
            self._file.truncate(before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _finite(value):
    """value with None for what is not finite, which JSON can't say."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def record_of(line):
    """A line of the file, bytes, as a dict; an empty one where it isn't a whole and well-formed record."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else {}
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) and type(record.get("iter")) is int else {}


def run_of(path):
    """The id of the run whose file this is, None where it doesn't say, or is a link, a pipe, a folder, a device."""
    if os.path.islink(path) or not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        run = record_of(file.readline()).get("run")
    run_id = run.get("id") if isinstance(run, dict) else None
    return run_id if isinstance(run_id, str) and re.fullmatch("[0-9a-f]{8}", run_id) else None  # part of a path


def starts_in(lines):
    """The facts of each start of the run in whole lines of the file, bytes or what is searched like bytes."""
    at = lines.find(_START)
    while at >= 0:
        end = lines.find(b"\n", at) + 1
        if isinstance(run := record_of(lines[lines.rfind(b"\n", 0, at) + 1 : end]).get("run"), dict):
            yield run
        at = lines.find(_START, end or len(lines))


def _bytes_before(path, iter_num):
    """The bytes of the whole lines that precede what the file tells of iteration iter_num and of later ones."""
    end = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n") or record_of(line).get("iter", -1) >= iter_num:
                break
            end += len(line)
    return end
