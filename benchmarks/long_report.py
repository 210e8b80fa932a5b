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
from dataclasses import asdict

import common
import torch

from configurator import configure
from nanofit import metrics_file, settings
from nanofit.autofit.plan import Plan
from nanofit.units import MemoryLevers

# ---- keys: --key=value overrides them ----------------------------------------------------------------------
lines = 1_000_000  # iterations in the run's file
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
batch_size = 4
save = ""  # a file for the result
config, given = configure(globals())
settings.at_least(1, config, "lines", "n_layer", "n_head", "n_embd", "block_size", "batch_size")

FACTS = {
    "id": "00000000", "device": "CPU", "memory": 2**34, "torch": torch.__version__, "ranks": 1, "changed": [],
    "config": {"dtype": "bfloat16", "grad_clip": 1.0, "max_iters": lines},
    "model_args": dict(
        n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, vocab_size=50304, dropout=0.0, bias=False
    ),
    "plan": asdict(Plan(batch_size, 8, batch_size)), "levers": asdict(MemoryLevers(loss_chunk_mb=128)),
}  # fmt: skip


def records():
    draw = random.Random(0).random
    yield {"iter": 0, "run": FACTS}
    for i in range(lines):
        yield {
            "iter": i, "tokens": 2048 * (i + 1), "lr": 6e-4 * draw(), "loss": 3 + draw(), "grad_norm": draw(),
            "seconds": 0.1 + draw() / 100, "tokens_per_second": 2e4 * draw(), "mfu": draw(), "peak_bytes": 2**32,
            "memory_bytes": 2**32 + i, "seconds_left": 1e5 * draw(),
        }  # fmt: skip


with tempfile.TemporaryDirectory() as folder:
    with open(os.path.join(folder, metrics_file.FILE), "w") as file:
        file.writelines(json.dumps(record, separators=(",", ":")) + "\n" for record in records())
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, os.path.join(common.ROOT, "report.py"), folder], check=True, stdout=subprocess.DEVNULL
    )
    seconds = time.perf_counter() - start
    read, written = (os.path.getsize(os.path.join(folder, name)) for name in (metrics_file.FILE, "report.html"))
print(f"{lines:,} lines of {read / 1e6:.0f} MB: a page of {written / 1e6:.2f} MB in {seconds:.1f} s")
common.finish("long_report", config, torch.device("cpu"), {"seconds": seconds, "page_bytes": written}, save)
