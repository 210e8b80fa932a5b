"""Seconds from the command to the first iteration, here and in another checkout, in turns.

    python benchmarks/start.py --other=../before --rounds=5

With auto_fit, every start looks for a size anew, in an empty folder with a data set of random tokens. Prints a table,
and one line of JSON last.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time

import common
import numpy as np

from configurator import configure
from nanofit import machine, settings
from nanofit.errors import UsageError

# ---- keys: --key=value overrides them ----------------------------------------------------------------------
other = ""  # the other checkout; none: this one alone
rounds = 5  # starts of each
batch_size = 12
gradient_accumulation_steps = 1
block_size = 64
n_layer = 4
n_head = 4
n_embd = 128
max_iters = 2000
compile = False
auto_fit = True
device = machine.best_device()
save = ""  # a file for the result
config, given = configure(globals())
settings.at_least(1, config, "batch_size", "block_size", "rounds")
checkouts = {"here": common.ROOT, **({"other": os.path.abspath(other)} if other else {})}
for path in checkouts.values():
    if not os.path.isfile(os.path.join(path, "train.py")):
        raise UsageError(f"other: {path} is no checkout, it has no train.py")


OF_A_RUN = ("batch_size", "gradient_accumulation_steps", "block_size", "n_layer", "n_head", "n_embd", "max_iters",
            "compile", "auto_fit", "device")  # fmt: skip


def start(checkout, folder):
    """Seconds until train.py of a checkout has printed its first iteration; it is ended then."""
    asked = {name: config[name] for name in OF_A_RUN}
    keys = {**asked, "dataset": "random", "eval_iters": 1, "out_dir": folder}
    command = [sys.executable, os.path.join(checkout, "train.py"), *(f"--{key}={value}" for key, value in keys.items())]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": checkout}
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=os.path.dirname(folder),
    )
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("iter 0:"):
            break
    seconds = time.perf_counter() - began
    process.kill()
    process.wait()
    if not said or not said[-1].startswith("iter 0:"):
        raise UsageError(f"train.py of {checkout} printed no iteration: {said[-1].strip() if said else 'nothing'}")
    return seconds


seconds = {name: [] for name in checkouts}
with tempfile.TemporaryDirectory() as place:
    data = os.path.join(place, "data", "random")
    os.makedirs(data)
    for split in ("train", "val"):
        np.random.default_rng(0).integers(50257, size=100_000, dtype=np.uint16).tofile(f"{data}/{split}.bin")
    for turn in range(rounds + 1):  # the first reads files that are then in the system's memory
        for name, checkout in checkouts.items():
            took = start(checkout, os.path.join(place, f"{name}-{turn}"))
            if turn:
                seconds[name].append(took)

figures = {"seconds": {name: statistics.median(found) for name, found in seconds.items()}}
for name, found in seconds.items():
    print(f"{name:8} {statistics.median(found):8.2f} s ({min(found):.2f} to {max(found):.2f})")
if other:
    ratios = [a / b for a, b in zip(seconds["here"], seconds["other"], strict=True)]
    figures["ratio"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    print(f"ratio    {statistics.median(ratios):8.2f} ({min(ratios):.2f} to {max(ratios):.2f} over {rounds} turns)")
del config["other"]
common.finish("start", config, machine.find_device(device), figures, save)
