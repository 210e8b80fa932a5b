"""Kill a small run at random moments, saves included, and resume it each time.

    python tests/torture.py --kills=100

Every resume must work, and the losses and the final weights must be those of a run that was left in peace, bit for
bit. Prints what went wrong, and ends with exit code 1 if something did.
"""

import argparse
import glob
import hashlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from conftest import REFERENCE, ROOT, TOY, flags

ITERATIONS_A_KILL = 12  # so that the run is long enough for all of them
KEYS = dict(TOY, gradient_accumulation_steps=2, dropout=0.2, eval_iters=1, eval_interval=2, save_minutes=0.0005, keep=2)


def attempt(folder, out_dir, log, iterations, kill_after=None):
    """train.py in a fork of this process; its exit status.

    kill_after: (lines, seconds): it is killed so long after it has printed so many iterations. A fork starts in a
    moment, as torch is imported already. It has no threads of its parent: conftest asks for one.
    """
    resume = os.path.exists(os.path.join(folder, out_dir, "ckpt.pt"))
    keys = {**KEYS, "out_dir": out_dir, "max_iters": iterations, "init_from": "resume" if resume else "scratch"}
    Path(log).touch()
    before = len(Path(log).read_text())
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(folder)
            sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115
            sys.argv = ["train.py", *flags(**keys)]
            names = runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
            weights = b"".join(p.detach().numpy().tobytes() for p in names["raw_model"].parameters())
            print(f"weights {hashlib.sha256(weights).hexdigest()}")
            code = 0
        finally:
            os._exit(code)
    if kill_after is not None:
        lines, seconds = kill_after
        while len(re.findall(r"^iter ", Path(log).read_text()[before:], re.MULTILINE)) < lines:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return status
            time.sleep(0.001)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def weights(log):
    """The digests of weights that a log tells, of one run that ended."""
    return re.findall(r"^weights (\S+)$", log, re.MULTILINE)


def figures(folder, out_dir):
    """[(iteration, kind, losses)] in the order in which metrics.jsonl has them."""
    with open(os.path.join(folder, out_dir, "metrics.jsonl")) as file:
        records = [json.loads(line) for line in file]
    evaluation, iteration = ("train_loss", "val_loss", "best_val_loss"), ("loss", "grad_norm", "lr")
    kinds = [(r, evaluation if "val_loss" in r else iteration) for r in records if "run" not in r]
    return [(r["iter"], r["tokens"], *(r[name] for name in kind)) for r, kind in kinds]


def run(kills, folder, seed=0):
    """A list of complaints; folder: an empty one, with the data set in data/markov."""
    choose = random.Random(seed)
    iterations = ITERATIONS_A_KILL * kills
    logs = {name: os.path.join(folder, f"{name}.log") for name in ("whole", "killed")}
    if status := attempt(folder, "whole", logs["whole"], iterations):
        return [f"the run that is left in peace ended with status {status}:\n{Path(logs['whole']).read_text()}"]
    whole = Path(logs["whole"]).read_text()
    # An evaluation and a checkpoint come every other iteration: a kill at any moment of two may fall into them.
    both = 2 * statistics.mean(float(ms) / 1000 for ms in re.findall(r", time ([\d.]+)ms", whole))
    complaints, died, saving = [], 0, 0
    while died < kills:
        moment = choose.randint(1, ITERATIONS_A_KILL // 2), choose.random() * both
        status = attempt(folder, "killed", logs["killed"], iterations, moment)
        if not os.WIFSIGNALED(status):
            break
        died += 1
        saving += bool(glob.glob(os.path.join(folder, "killed", "ckpt.pt.*.part")))
    if os.WIFSIGNALED(status):
        status = attempt(folder, "killed", logs["killed"], iterations)
    log = Path(logs["killed"]).read_text()
    if status:
        complaints.append(f"after {died} kills it ended with status {status}:\n{log[-3000:]}")
    if weights(log) != weights(whole):
        complaints.append(f"weights {weights(log)}, not {weights(whole)}")
    if figures(folder, "killed") != figures(folder, "whole"):
        complaints.append("metrics.jsonl is not that of the run in peace: each figure once, in order, with its value")
    names = os.listdir(os.path.join(folder, "killed"))
    if left := [name for name in names if name.startswith("kept-") or ".part" in name]:
        complaints.append(f"left in the folder: {left}")
    if died < kills:
        complaints.append(f"the run was through after {died} of {kills} kills")
    resumed = len(re.findall(r"^resuming from killed at iteration", log, re.MULTILINE))
    if resumed < died / 2:
        complaints.append(f"only {resumed} of {died} kills were followed by a resume: the others came too early")
    print(f"{died} kills, {saving} of them while saving, {resumed} resumed, {len(complaints)} complaints")
    return complaints


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(REFERENCE / "markov", os.path.join(place, "data", "markov"))
        wrong = run(options.kills, place, options.seed)
    print(*wrong[:20], sep="\n")
    sys.exit(bool(wrong))
