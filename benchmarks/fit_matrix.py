"""Auto-fit's choice against an exhaustive search, for a list of memory limits and models.

    python benchmarks/fit_matrix.py --limits=8,12,16,24 --models=gpt2,gpt2-medium
    python benchmarks/fit_matrix.py --device=cpu --limits=0.4,0.6 --models=2x2x64 --block_size=64 --batch_size=16

Every divisor of batch_size is measured at the highest limit; of those whose peak is within a cell's limit, the
fastest is the best that the cell could have. Then what auto-fit chose runs confirm_steps optimizer steps under
the limit, with evaluations. Prints a table, and one line of JSON last.
"""

from common import finish

from configurator import at_least, configure
from model import PRETRAINED, GPTConfig
from nanofit import autofit, runtime
from nanofit.autofit import Fitter, Trial, divisors, run_probe
from nanofit.errors import UsageError, usage_errors

# ---- keys: --key=value overrides them ----------------------------------------------------------------------
limits = "8,12,16,24"  # GiB
models = "gpt2,gpt2-medium"  # names of GPT-2's sizes, or n_layer x n_head x n_embd as in 2x2x64
batch_size = 64
block_size = 1024
vocab_size = 50304
confirm_steps = 50
rounds = 1  # times that each size is measured; the fastest counts
device = runtime.best_device()
dtype = runtime.best_dtype(device)
save = ""  # a file for the result
config, given = configure(globals())
at_least(1, config, "batch_size", "block_size", "vocab_size", "confirm_steps", "rounds")
if "dtype" not in given:
    dtype = config["dtype"] = runtime.best_dtype(device)
device = runtime.open_device(device)
with usage_errors(ValueError, prefix=f"limits={limits!r} must be numbers of GiB with commas between: "):
    limits = sorted(float(limit) for limit in str(limits).split(","))


def shape_of(model):
    """A GPTConfig as a dict for a name of GPT-2's sizes or for 'LxHxC'."""
    sizes = PRETRAINED.get(model)
    if sizes is None:
        with usage_errors(ValueError, prefix=f"models: {model!r} must be one of {', '.join(PRETRAINED)} or LxHxC: "):
            n_layer, n_head, n_embd = map(int, model.split("x"))
        sizes = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    with usage_errors(ValueError):
        return vars(GPTConfig(block_size=block_size, vocab_size=vocab_size, dropout=0.0, bias=False, **sizes))


def job_of(shape, limit):
    return dict(
        model_args=shape, dtype=dtype, device=str(device), grad_clip=1.0, memory_limit_gb=limit,
        simulate=False, compile=False,
        activation_checkpointing=False, optimizer_state="float32",
    )  # fmt: skip


def exhaustive(shape):
    """A Trial for every divisor of batch_size that runs at the highest limit, the fastest of some rounds."""
    trials = {}
    for size in divisors(batch_size):
        job = {**job_of(shape, max(limits)), "batch_size": size, "micro_steps": batch_size // size}
        found = [result for _ in range(rounds) for result in run_probe(job)[0] if not result["failure"]]
        if not found:
            break  # larger ones don't fit either
        peak, speed = max(r["peak_bytes"] for r in found), max(r["tokens_per_second"] for r in found)
        trials[size] = Trial(size, True, peak, speed)
    return trials


def cell(model, shape, every, limit):
    """One row of the table: what auto-fit chose under this limit, and what there was to choose."""
    row = {"model": model, "limit_gb": limit, "probes": 0}
    row.update(dict.fromkeys(("choice", "best", "ratio", "confirmed")))
    fitting = [t for t in every.values() if t.peak_bytes <= limit * autofit.GIB]
    if fitting:
        best = max(fitting, key=lambda t: t.tokens_per_second)
        row["best"], row["best_tokens_per_second"] = best.batch_size, best.tokens_per_second
    fitter = Fitter(job_of(shape, limit), batch_size, 1, say=lambda line: None, advises=False)
    try:
        plan = fitter.plan()
    except UsageError:
        return row
    row.update(choice=plan.micro_batch_size, peak_bytes=plan.peak_bytes, probes=len(plan.trials))
    if plan.micro_batch_size in every and fitting:
        row["ratio"] = every[plan.micro_batch_size].tokens_per_second / best.tokens_per_second
    micro_steps = batch_size // plan.micro_batch_size
    job = {**job_of(shape, limit), "batch_size": plan.micro_batch_size, "micro_steps": micro_steps}
    results, failure = run_probe({**job, "confirm_steps": confirm_steps}, seconds=3600)
    row["confirmed"] = failure == "" and not results[0]["failure"] and not results[0]["retries"]
    return row


rows = []
print(f"{'model':14}{'limit':>8}{'chosen':>8}{'best':>8}{'of best':>9}{'peak':>11}{'probes':>8}  {confirm_steps} steps")
for model in models.split(","):
    shape = shape_of(model.strip())
    every = exhaustive(shape)
    for limit in limits:
        row = cell(model, shape, every, limit)
        rows.append(row)
        chosen, best = row["choice"] or "none", row["best"] or "none"
        ratio = f"{row['ratio']:.3f}" if row["ratio"] else "-"
        peak = f"{row['peak_bytes'] / autofit.GIB:.2f} GiB" if row["choice"] else "-"
        verdict = {True: "ran", False: "FAILED", None: "-"}[row["confirmed"]]
        print(f"{model:14}{limit:8.2f}{chosen:>8}{best:>8}{ratio:>9}{peak:>11}{row['probes']:>8}  {verdict}")
finish("fit_matrix", config, device, {"cells": rows}, save)
