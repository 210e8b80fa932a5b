"""metrics.jsonl as columns of numbers, and fewer of them where there are too many to draw."""

import io
import os
from array import array

import numpy as np
import pyarrow
import pyarrow.json  # comes with datasets; an order of magnitude faster than json

from nanofit.errors import UsageError
from nanofit.metrics_file import FILE, record_of, starts_in

ITERATION = (
    "iter", "tokens", "lr", "loss", "grad_norm", "seconds", "tokens_per_second", "mfu", "peak_bytes", "memory_bytes",
    "seconds_left",
)  # fmt: skip
EVALUATION = ("iter", "tokens", "train_loss", "val_loss", "best_val_loss")
BLOCK = 2**23  # bytes that are read and parsed together
NAMES = tuple(dict.fromkeys(ITERATION + EVALUATION))
AS_NUMBERS = pyarrow.json.ParseOptions(
    explicit_schema=pyarrow.schema([(name, pyarrow.float64()) for name in NAMES]), unexpected_field_behavior="ignore"
)


class Log:
    """A run's figures, as far as they are written: update() reads on.

    iterations, evaluations: {name: float64 (n,)}, nan where a figure isn't known or isn't finite. starts: the run's
    facts, once for each time that it began or went on. version: another number with each change.
    """

    def __init__(self, folder):
        self.path, self.version = os.path.join(folder, FILE), 0
        if os.path.isfile(folder):
            raise UsageError(f"{folder} is a file: report.py takes the out_dir of a run, such as out")
        if not os.path.isfile(self.path):
            raise UsageError(f"there are no figures in {folder}: train.py --out_dir={folder} writes them to {FILE}")
        self._forget()

    def _forget(self):
        self.starts, self.version = [], self.version + 1
        self._columns = {kind: {name: array("d") for name in kind} for kind in (ITERATION, EVALUATION)}
        self._end, self._last = 0, b""  # bytes read so far, and the last line of them

    @property
    def iterations(self):
        return self._numbers(ITERATION)

    @property
    def evaluations(self):
        return self._numbers(EVALUATION)

    def _numbers(self, kind):
        return {name: np.array(column, dtype=float) for name, column in self._columns[kind].items()}

    def update(self):
        """Read what was written since the last time: all of it again, if the file was cut back meanwhile."""
        with open(self.path, "rb") as file:
            file.seek(self._end - len(self._last))
            if file.read(len(self._last)) != self._last:
                self._forget()
                file.seek(0)
            while block := file.read(BLOCK):
                block += file.readline()
                whole = block[: block.rfind(b"\n") + 1]  # a line that is being written waits for the next time
                self._add(whole)
                self.version += 1
                self._end += len(whole)
                self._last = whole[whole.rfind(b"\n", 0, -1) + 1 :] or self._last
        return self

    def _add(self, lines):
        self.starts += starts_in(lines)
        try:
            options = pyarrow.json.ReadOptions(block_size=2 * BLOCK)
            table = pyarrow.json.read_json(io.BytesIO(lines), options, AS_NUMBERS)
            found = {name: table.column(name).to_numpy() for name in NAMES}
        except pyarrow.ArrowInvalid:  # a damaged line, which the others don't have to suffer from
            records = [record_of(line) for line in lines.splitlines(keepends=True)]
            found = {name: np.array([_number(record.get(name)) for record in records]) for name in NAMES}
        of_iteration = ~np.isnan(found["seconds"])  # which a clock gives: it is finite
        of_evaluation = ~np.isnan(found["tokens"]) & ~of_iteration
        for kind, rows in ((ITERATION, of_iteration), (EVALUATION, of_evaluation)):
            for name, column in self._columns[kind].items():
                column.frombytes(found[name][rows].tobytes())


def _number(value):
    return float(value) if type(value) in (int, float) else np.nan


def smoothed(values, share=0.02):
    """The mean of a stretch around each value, which is this share of them wide; nans are left out.

    values: float64 (n,).
    """
    half = int(len(values) * share / 2)
    known = np.concatenate([[0], np.cumsum(~np.isnan(values))])  # (n + 1,)
    total = np.concatenate([[0.0], np.cumsum(np.nan_to_num(values))])  # (n + 1,)
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (total[high] - total[low]) / (known[high] - known[low])


def thinned(columns, most):
    """columns with at most `most` rows: in each stretch of rows, those with a column's lowest or highest figure.

    columns: {name: float64 (n,)}.
    """
    n = len(columns["iter"])
    if n <= most:
        return columns
    stretches = (most - 2) // (2 * len(columns))
    size = -(-n // stretches)
    begins = np.arange(stretches) * size
    rows = [[0, n - 1]]
    for values in columns.values():
        padded = np.full(stretches * size, np.nan)
        padded[:n] = values
        padded = padded.reshape(stretches, size)
        rows.append(begins + np.where(np.isnan(padded), np.inf, padded).argmin(axis=1))
        rows.append(begins + np.where(np.isnan(padded), -np.inf, padded).argmax(axis=1))
    rows = np.unique(np.concatenate(rows))
    rows = rows[rows < n]
    return {name: values[rows] for name, values in columns.items()}
