"""report.py on a long run: how long it takes, and how large its page is.

    python benchmarks/long_report.py --lines=1000000

The figures are made up; the rest is what a user starts. Prints one line of JSON last.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time

import common
import torch

from configurator import configure
from nanofit import settings
from nanofit.metrics import FILE

# ---- keys: --key=value overrides them ----------------------------------------------------------------------
lines = 1_000_000  # iterations in the run's file
save = ""  # a file for the result
config, given = configure(globals())
settings.at_least(1, config, "lines")


def records():
    draw = random.Random(0).random
    yield {"iter": 0, "time": 1.7e9, "run": {"id": "00000000", "device": "CPU", "config": {"max_iters": lines}}}
    for i in range(lines):
        yield {
            "iter": i, "time": 1.7e9 + i, "tokens": 2048 * (i + 1), "lr": 6e-4 * draw(), "loss": 3 + draw(),
            "grad_norm": draw(),
            "seconds": 0.1 + draw() / 100, "tokens_per_second": 2e4 * draw(), "mfu": draw(), "peak_bytes": 2**32,
            "memory_bytes": 2**32 + i, "seconds_left": 1e5 * draw(),
        }  # fmt: skip


with tempfile.TemporaryDirectory() as folder:
    with open(os.path.join(folder, FILE), "w") as file:
        file.writelines(json.dumps(record, separators=(",", ":")) + "\n" for record in records())
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, os.path.join(common.ROOT, "report.py"), folder], check=True, stdout=subprocess.DEVNULL
    )
    seconds = time.perf_counter() - start
    read, written = (os.path.getsize(os.path.join(folder, name)) for name in (FILE, "report.html"))
print(f"{lines:,} lines of {read / 1e6:.0f} MB: a page of {written / 1e6:.2f} MB in {seconds:.1f} s")
common.finish("long_report", config, torch.device("cpu"), {"seconds": seconds, "page_bytes": written}, save)
