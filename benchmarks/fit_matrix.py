"""Auto-fit's choice against an exhaustive search, for a list of memory limits and models.

    python benchmarks/fit_matrix.py --limits=8,12,16,24 --models=gpt2,gpt2-medium
    python benchmarks/fit_matrix.py --device=cpu --limits=0.4,0.6 --models=2x2x64 --block_size=64 --batch_size=16

Every divisor of batch_size is measured at the highest limit; of those whose peak is within a cell's limit, the
fastest is the best that the cell could have. Then what auto-fit chose is tried again under the limit. Prints a table,
and one line of JSON last.
"""

import contextlib
import io
from dataclasses import replace

from common import finish, keep

from configurator import configure
from model import GPT, GPTConfig
from nanofit import machine, settings
from nanofit.autofit.fit import Fitter
from nanofit.autofit.plan import Job, Plan
from nanofit.autofit.trials import Trials
from nanofit.errors import UsageError, usage_errors
from nanofit.models import GPT2_SIZES, source_of
from nanofit.units import divisors

# ---- keys: --key=value overrides them ----------------------------------------------------------------------
limits = "8,12,16,24"  # GiB
models = "gpt2,gpt2-medium"  # names of GPT-2's sizes, or n_layer x n_head x n_embd as in 2x2x64
batch_size = 64
block_size = 1024
vocab_size = 50304
rounds = 1  # times that each size is measured; the fastest counts
device = machine.best_device()
dtype = machine.best_dtype(device)
save = ""  # a file for the result
config, given = configure(globals())
settings.at_least(1, config, "batch_size", "block_size", "vocab_size", "rounds")
dtype = config["dtype"] = settings.dtype(config, given)
device = machine.find_device(device)
with usage_errors(ValueError, prefix=f"limits={limits!r} must be numbers of GiB with commas between: "):
    limits = sorted(float(limit) for limit in str(limits).split(","))


def shape_of(model):
    """A GPTConfig as a dict for a name of GPT-2's sizes or for 'LxHxC'."""
    sizes = GPT2_SIZES.get(model)
    if sizes is None:
        with usage_errors(ValueError, prefix=f"models: {model!r} must be one of {', '.join(GPT2_SIZES)} or LxHxC: "):
            n_layer, n_head, n_embd = map(int, model.split("x"))
        sizes = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    with usage_errors(ValueError):
        return vars(GPTConfig(block_size=block_size, vocab_size=vocab_size, dropout=0.0, bias=False, **sizes))


def run_trial(job):
    with Trials() as run:
        return run(job)


def job_of(shape, limit, **more):
    return Job(source_of(GPT, GPTConfig), shape, str(device), dtype, grad_clip=1.0, memory_limit_gb=limit, **more)


def exhaustive(shape):
    """A Trial for every divisor of batch_size that runs at the highest limit, the fastest of some rounds."""
    trials = {}
    for size in divisors(batch_size):
        job = job_of(shape, max(limits), micro_batch_size=size, micro_steps=batch_size // size)
        found = [trial for trial in (run_trial(job) for _ in range(rounds)) if not trial.failure]
        if not found:
            break  # larger ones don't fit either
        peak, speed = max(t.peak_bytes for t in found), max(t.tokens_per_second for t in found)
        trials[size] = replace(found[0], peak_bytes=peak, tokens_per_second=speed)
    return trials


def cell(model, shape, every, limit):
    """One row of the table: what auto-fit chose under this limit, and what there was to choose."""
    row = {"model": model, "limit_gb": limit, "probes": 0}
    row.update(dict.fromkeys(("choice", "best", "ratio", "confirmed")))
    fitting = [t for t in every.values() if t.peak_bytes <= limit * 2**30]
    if fitting:
        best = max(fitting, key=lambda t: t.tokens_per_second)
        row["best"], row["best_tokens_per_second"] = best.micro_batch_size, best.tokens_per_second
    asked = Plan(batch_size, 1, batch_size)
    with Trials() as trials, contextlib.redirect_stdout(io.StringIO()):
        fitter = Fitter(job_of(shape, limit), asked, {"recompute", "loss_chunk_mb"}, 68, 1, trials)
        try:
            plan = fitter.plan()
        except UsageError:
            return row
    row.update(choice=plan.micro_batch_size, peak_bytes=plan.peak_bytes, probes=len(plan.trials))
    if plan.micro_batch_size in every and fitting:
        row["ratio"] = every[plan.micro_batch_size].tokens_per_second / best.tokens_per_second
    row["confirmed"] = run_trial(replace(fitter.job_of(plan.micro_batch_size), levers=plan.levers)).fits
    return row


rows = []
print(f"{'model':14}{'limit':>8}{'chosen':>8}{'best':>8}{'of best':>9}{'peak':>11}{'probes':>8}  again")
for model in models.split(","):
    shape = shape_of(model.strip())
    every = exhaustive(shape)
    for limit in limits:
        row = cell(model, shape, every, limit)
        rows.append(row)
        chosen, best = row["choice"] or "none", row["best"] or "none"
        ratio = f"{row['ratio']:.3f}" if row["ratio"] else "-"
        peak = f"{row['peak_bytes'] / 2**30:.2f} GiB" if row["choice"] else "-"
        verdict = {True: "ran", False: "FAILED", None: "-"}[row["confirmed"]]
        print(
            f"{model:14}{limit:8.2f}{chosen:>8}{best:>8}{ratio:>9}{peak:>11}{row['probes']:>8}  {verdict}", flush=True
        )
        keep("fit_matrix", config, device, {"cells": rows}, save)
finish("fit_matrix", config, device, {"cells": rows}, save)
