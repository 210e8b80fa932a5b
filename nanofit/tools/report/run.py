"""A run's folder as the report sees it."""

import os
from dataclasses import dataclass, field

from nanofit.autofit.plan import Plan, Trial, from_dict
from nanofit.tools.report.log import Log, smoothed, thinned
from nanofit.units import GIB

MOST_ROWS = 8000  # of a run that are drawn; a picture has fewer columns of pixels
ROWS_OF_ALL = 16000  # of all runs together
SAMPLE = "sample.txt"
CHECKPOINTS = ("ckpt.pt", "ckpt.last.pt")


@dataclass
class Run:
    """label: how the report calls it. memory, checkpoints, failure: as memory.Question answers."""

    folder: str
    label: str
    log: Log
    memory: list = field(default_factory=list)
    checkpoints: dict = field(default_factory=dict)
    failure: str = ""

    @property
    def facts(self):
        """What the last line of its kind tells: how the run went on."""
        return self.log.starts[-1] if self.log.starts else {}

    @property
    def plan(self):
        """autofit's Plan, None where the file doesn't tell one."""
        return from_dict(Plan, {**self.facts.get("plan", {}), "trials": []})

    @property
    def trials(self):
        """Its Trials, as far as they are whole."""
        told = self.facts.get("plan", {}).get("trials", [])
        return [trial for trial in (from_dict(Trial, dict(t)) for t in told if isinstance(t, dict)) if trial]

    @property
    def limit_bytes(self):
        """What training may take: the limit, or else all memory of the device; 0 where neither is known."""
        return (self.plan.limit_bytes if self.plan else 0) or self.facts.get("memory", 0)

    def drawn(self, runs):
        """(iterations, evaluations) with as many rows as a report of so many runs draws, and what is derived."""
        columns = self.log.iterations
        columns.pop("seconds_left")
        columns["smoothed"] = smoothed(columns["loss"])
        most = min(MOST_ROWS, ROWS_OF_ALL // runs)
        rows = thinned(columns, most)
        for name in ("peak", "memory"):
            rows[f"{name}_gib"] = rows[f"{name}_bytes"] / GIB
        return rows, thinned(self.log.evaluations, most)

    @property
    def written(self):
        """What changes when the run goes on or writes a checkpoint."""
        paths = [os.path.join(self.folder, name) for name in CHECKPOINTS]
        return len(self.log.starts), [os.stat(path).st_mtime_ns for path in paths if os.path.exists(path)]

    @property
    def sample(self):
        """The last text that sample.py drew, '' where there is none."""
        try:
            with open(os.path.join(self.folder, SAMPLE), encoding="utf-8", errors="replace") as file:
                return file.read(20_000)
        except OSError:
            return ""


def labels_of(folders):
    """A short name for each folder, and no two alike."""
    short = [os.path.basename(os.path.normpath(os.path.abspath(folder))) for folder in folders]
    return [name if short.count(name) == 1 else folder for name, folder in zip(short, folders, strict=True)]
