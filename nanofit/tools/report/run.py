"""What the report reads from a run's folder: metrics.jsonl as columns of numbers, the last sample, checkpoints."""

import os
import re
from array import array
from datetime import UTC, datetime

import numpy as np

from nanofit.autofit.plan import Plan, from_dict
from nanofit.errors import UsageError
from nanofit.metrics import FILE, OURS, record_of
from nanofit.units import GIB

MOST_ROWS = 8000  # that are drawn of a run; a screen has fewer pixels
ROWS_OF_ALL = 16000  # that are drawn of all runs together
ITERATION = (
    "loss", "iter", "tokens", "lr", "grad_norm", "seconds", "tokens_per_second", "mfu", "peak_bytes", "memory_bytes",
    "seconds_left",
)  # fmt: skip
EVALUATION = ("val_loss", "iter", "tokens", "train_loss", "best_val_loss")


class Run:
    """A run's figures. label: its name in the report.

    iterations, evaluations: {name: float64 (n,)}, nan for what is unknown or not finite. starts: [(iteration, date,
    facts)] for the start and each resume. seconds: its duration, without the pauses before it was resumed.
    """

    def __init__(self, folder, label):
        self.folder, self.label, self.starts, self.seconds = folder, label, [], 0.0
        if os.path.isfile(folder):
            raise UsageError(f"{folder} is a file: report.py takes the out_dir of a run, such as out")
        if not os.path.isfile(os.path.join(folder, FILE)):
            raise UsageError(f"there are no figures in {folder}: train.py --out_dir={folder} writes them to {FILE}")
        columns = {kind: {name: array("d") for name in kind} for kind in (ITERATION, EVALUATION)}
        before = np.nan
        with open(os.path.join(folder, FILE), "rb") as lines:
            for record in map(record_of, lines):
                now = _number(record.get("time"))
                if isinstance(record.get("run"), dict):
                    self.starts.append((record["iter"], date_of(now), record["run"]))
                elif now > before:
                    self.seconds += now - before
                before = now
                for kind, column in columns.items():
                    if kind[0] in record:
                        _append(column, record)
        self.iterations, self.evaluations = (
            {name: np.array(column) for name, column in columns[kind].items()} for kind in (ITERATION, EVALUATION)
        )
        self.iterations["mfu"][self.iterations["mfu"] < 0] = np.nan  # unknown

    @property
    def facts(self):
        """The facts of the last start, see metrics.run_facts."""
        return self.starts[-1][2] if self.starts else {}

    @property
    def plan(self):
        """The run's Plan, or None if unknown."""
        return from_dict(Plan, self.facts.get("plan"))

    @property
    def limit_bytes(self):
        """What training may take: the limit, else all memory of the device; 0 if neither is known."""
        return (self.plan and self.plan.limit_bytes) or self.facts.get("memory") or 0

    def drawn(self, runs):
        """(iterations, evaluations), thinned for a report of so many runs, with derived columns."""
        most = min(MOST_ROWS, ROWS_OF_ALL // runs)
        columns = {**self.iterations, "smoothed": smoothed(self.iterations["loss"])}
        columns.pop("seconds_left")
        rows = thinned(columns, most)
        for name in ("peak", "memory"):
            rows[f"{name}_gib"] = rows[f"{name}_bytes"] / GIB
        return rows, thinned(self.evaluations, most)

    @property
    def sample(self):
        """(iteration, text) of the last sample of this run, or None."""
        try:
            with open(os.path.join(self.folder, "sample.txt"), encoding="utf-8", errors="replace") as file:
                told, text = re.fullmatch(r"run (\w+), iteration (\d+)", file.readline().rstrip()), file.read(20_000)
        except OSError:
            return None
        return (int(told[2]), text) if told and told[1] == self.facts.get("id") else None

    @property
    def checkpoints(self):
        """{name: size and date} of its checkpoints."""
        found = {}
        for name in ("ckpt.pt", "ckpt.last.pt"):
            if os.path.isfile(path := os.path.join(self.folder, name)):
                stat = os.stat(path)
                found[name] = f"{stat.st_size / 2**20:,.1f} MiB, written {date_of(stat.st_mtime)}"
        return found


def _number(value):
    return float(value) if type(value) in (int, float) and abs(value) < 1e300 else np.nan


def _append(columns, record):
    """Add a record's numbers to columns. A new column gets nan in the rows before."""
    rows = len(columns["iter"])
    for name in record.keys() - columns.keys() - OURS:
        columns[name] = array("d", [np.nan]) * rows
    for name, column in columns.items():
        column.append(_number(record.get(name)))


def date_of(seconds):
    """Seconds since 1970 as a date, '' for nan."""
    return "" if np.isnan(seconds) else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def labels_of(folders):
    """A short name for each folder, all different."""
    short = [os.path.basename(os.path.normpath(os.path.abspath(folder))) for folder in folders]
    return [name if short.count(name) == 1 else folder for name, folder in zip(short, folders, strict=True)]


def smoothed(values):
    """Running mean of values, float64 (n,), over a window of 2% of them; nans are left out."""
    half = len(values) // 100
    known = np.concatenate([[0], np.cumsum(~np.isnan(values))])  # (n + 1,)
    total = np.concatenate([[0.0], np.cumsum(np.nan_to_num(values))])  # (n + 1,)
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (total[high] - total[low]) / (known[high] - known[low])


def thinned(columns, most):
    """columns, {name: float64 (n,)}, with at most `most` rows: from each stretch, each column's minimum and maximum."""
    n = len(columns["iter"])
    if n <= most:
        return columns
    stretches = max(1, (most - 2) // (2 * len(columns)))
    size = -(-n // stretches)
    rows = [[0, n - 1]]
    for values in columns.values():
        padded = np.full(stretches * size, np.nan)
        padded[:n] = values
        padded = padded.reshape(stretches, size)
        for unknown, extreme in ((np.inf, np.argmin), (-np.inf, np.argmax)):
            rows.append(np.arange(stretches) * size + extreme(np.where(np.isnan(padded), unknown, padded), axis=1))
    rows = np.unique(np.concatenate(rows))
    rows = rows[rows < n]
    return {name: values[rows] for name, values in columns.items()}
