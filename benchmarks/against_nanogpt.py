"""nanoGPT's own train.py and ours, run in turns as people run them: speed, peak memory, seconds until the first line.

    python benchmarks/against_nanogpt.py --nanogpt=../nanoGPT --batch_size=8
    python benchmarks/against_nanogpt.py --nanogpt=../before --ours="--auto_fit=True" --theirs="--auto_fit=True"

Each is a process in its own checkout, with the same keys, data and seed. Read off their lines: the median time of the
iterations after the first five, and the losses. The peak is the process's resident memory; on a GPU, what the GPU lacks
while it runs. Any checkout whose train.py prints nanoGPT's lines can be compared with, an earlier one of this project
too. Prints a table, and one line of JSON last.
"""

import os
import re
import shlex
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
nanogpt = ""  # the folder of nanoGPT, or of another checkout
rounds = 3  # runs of each
iterations = 20  # of a run that are timed
ours = ""  # more flags for ours, "--auto_fit=True --memory_limit_gb=12"
theirs = ""  # more flags for the other one
save = ""  # a file for the result
# as in train.py
batch_size = 4
gradient_accumulation_steps = 1
block_size = 256
n_layer = 12
n_head = 12
n_embd = 768
device = machine.best_device()
dtype = machine.best_dtype(device)  # on a CPU, nanoGPT computes in float32 whatever this says
compile = device == "cuda"
config, given = configure(globals())
OF_A_RUN = ("batch_size", "gradient_accumulation_steps", "block_size", "n_layer", "n_head", "n_embd", "device", "dtype",
            "compile")  # fmt: skip
WARM_UP = 5  # iterations that aren't timed
settings.at_least(1, config, "batch_size", "block_size", "rounds", "iterations")
sides = {"nanogpt": (os.path.abspath(nanogpt), theirs), "ours": (common.ROOT, ours)}
for path, _ in sides.values():
    if not nanogpt or not os.path.isfile(os.path.join(path, "train.py")):
        raise UsageError(f"nanogpt={nanogpt!r} has no train.py: name the folder of a checkout of nanoGPT")
device = machine.find_device(device)


def run(checkout, more, place):
    """What one run shows: seconds of an iteration, seconds until the first, peak bytes, {iteration: val loss}."""
    keys = {
        **{name: config[name] for name in OF_A_RUN}, "dataset": place, "out_dir": os.path.join(place, "out"),
        "max_iters": WARM_UP + iterations, "eval_interval": WARM_UP + iterations, "eval_iters": 2, "log_interval": 1,
    }  # fmt: skip
    command = [sys.executable, "train.py", *(f"--{key}={value}" for key, value in keys.items()), *shlex.split(more)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": ""}
    free = machine.free_memory_bytes(device)
    began, first, taken, times, losses, said = time.perf_counter(), None, 0, {}, {}, []
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command, env=environment, cwd=checkout, **pipes) as process:
        for line in process.stdout:
            said.append(line)
            if found := re.match(r"iter (\d+): loss \S+, time (\S+)ms", line):
                first = first or time.perf_counter() - began
                times[int(found[1])] = float(found[2]) / 1000
                taken = max(taken, free - machine.free_memory_bytes(device))  # an allocator keeps what it had
            elif found := re.match(r"step (\d+): train loss \S+, val loss (\S+)", line):
                losses[int(found[1])] = float(found[2])
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    timed = [seconds for number, seconds in times.items() if number >= WARM_UP]
    if process.returncode or not timed:
        raise UsageError(f"{shlex.join(command)} in {checkout} failed:\n{''.join(said[-20:])}")
    resident = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return statistics.median(timed), first, taken if device.type == "cuda" else resident, losses


found = {name: [] for name in sides}
with tempfile.TemporaryDirectory() as place:
    for split in ("train", "val"):
        tokens = np.random.default_rng(0).integers(50257, size=1_000_000, dtype=np.uint16)
        tokens.tofile(os.path.join(place, f"{split}.bin"))
    for _ in range(rounds):
        for name, side in sides.items():
            found[name].append(run(*side, place))

tokens = batch_size * gradient_accumulation_steps * block_size
figures = {}
for name, runs in found.items():
    seconds, first, peaks, _ = zip(*runs, strict=True)
    figures[name] = {
        "seconds_per_iteration": statistics.median(seconds),
        "seconds_to_first_iteration": statistics.median(first),
        "peak_bytes": max(peaks),
    }
    speed = (
        f"{figures[name]['seconds_per_iteration'] * 1000:10.1f} ms {tokens / statistics.median(seconds):12,.0f} tok/s"
    )
    print(f"{name:10} {speed} {max(peaks) / 2**30:8.2f} GiB, first iteration after {statistics.median(first):.1f} s")
ratios = [a[0] / b[0] for a, b in zip(found["nanogpt"], found["ours"], strict=True)]
peak_ratio = figures["ours"]["peak_bytes"] / figures["nanogpt"]["peak_bytes"]
losses = [runs[0][3] for runs in found.values()]
difference = max(abs(losses[0][number] - losses[1][number]) for number in losses[0])
print(f"ratio of tok/s {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f} over {rounds} runs)")
print(f"ratio of peaks {peak_ratio:.3f}")
print(f"largest difference of a validation loss {difference:.4f}")
figures["tokens_per_second_ratio"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
figures |= {"peak_ratio": peak_ratio, "largest_loss_difference": difference}
common.finish("against_nanogpt", {key: config[key] for key in (*OF_A_RUN, "ours", "theirs")}, device, figures, save)
