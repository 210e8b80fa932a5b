"""--optimizer=muon against AdamW: validation loss by iteration and by time, over several seeds.

    python data/python_char/prepare.py && python benchmarks/muon.py

Each run is train.py with config/train_python_char.py, in turns. Time is that of iterations, without evaluations. Prints
a table, and one line of JSON last.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile

import common
import numpy as np
import torch

from configurator import configure
from nanofit import settings
from nanofit.errors import UsageError

# ---- keys: --key=value overrides them ----------------------------------------------------------------------
iterations = 400
seeds = 3
learning_rate = 2e-3  # the highest, for both
more = ""  # further flags of train.py, as "--n_layer=6"
save = ""  # a file for the result
config, given = configure(globals())
settings.at_least(8, config, "iterations")
settings.at_least(1, config, "seeds")
# train.py has no key for its seed: this adds to the numbers that it gives to torch.
RUN = """
import os, runpy, sys
del sys.argv[0]  # which is -c
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import nanofit, torch
seeded = torch.manual_seed
torch.manual_seed = lambda seed: seeded(seed + int(os.environ["SEED"]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(name, seed):
    """{iteration: (val loss, seconds of training until then)} of one run."""
    with tempfile.TemporaryDirectory() as out_dir:
        keys = dict(
            optimizer=name, out_dir=out_dir, max_iters=iterations, lr_decay_iters=iterations, device="cpu",
            warmup_iters=iterations // 8, eval_interval=iterations // 4, log_interval=1,
            learning_rate=learning_rate, min_lr=learning_rate / 10, always_save_checkpoint=False,
        )  # fmt: skip
        flags = ["config/train_python_char.py", *(f"--{key}={value}" for key, value in keys.items()), *more.split()]
        command = [sys.executable, "-c", RUN, os.path.join(common.ROOT, "train.py"), *flags]
        environment = {**os.environ, "SEED": str(seed)}
        done = subprocess.run(command, cwd=common.ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise UsageError(f"train.py failed: {done.stderr or done.stdout}")
        found, seconds = {}, 0.0
        with open(os.path.join(out_dir, "metrics.jsonl")) as file:
            for record in map(json.loads, file):
                seconds += record.get("seconds", 0.0)
                if "val_loss" in record:
                    found[record["iter"]] = record["val_loss"], seconds
        return found


runs = {"adamw": [], "muon": []}
for seed in range(seeds):
    for name, its in runs.items():
        its.append(run(name, seed))
figures = {}
for name, its in runs.items():
    figures[name] = [
        {"iteration": i, "val_loss": statistics.mean(r[i][0] for r in its),
         "spread": max(r[i][0] for r in its) - min(r[i][0] for r in its),
         "seconds": statistics.mean(r[i][1] for r in its)} for i in its[0] if i
    ]  # fmt: skip
print(f"{'':9} {'AdamW':>28} {'Muon':>28}")
for a, m in zip(*figures.values(), strict=True):
    columns = (f"{x['val_loss']:10.4f} ({x['spread']:.4f}) {x['seconds']:6.1f} s" for x in (a, m))
    print(f"{a['iteration']:9}", *columns)
adamw, muon = figures.values()
end = min(adamw[-1]["seconds"], muon[-1]["seconds"])  # both have got so far
after = {
    name: float(np.interp(end, [x["seconds"] for x in it], [x["val_loss"] for x in it])) for name, it in figures.items()
}
print(f"after {end:.1f} s of training: AdamW {after['adamw']:.4f}, Muon {after['muon']:.4f}")
common.finish("muon", config, torch.device("cpu"), {**figures, "seconds": end, "val_loss_after": after}, save)
