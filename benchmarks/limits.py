"""Speed under memory limits, as a share of the speed without one: what a small card loses.

    python benchmarks/limits.py --limits=8,12,16,24
    python benchmarks/limits.py --device=cpu --limits=0.5 --n_layer=2 --n_head=2 --n_embd=64 --block_size=64

Auto-fit plans the same effective batch for each limit; its choice is then timed, compiled if it chose so. Prints a
table, and one line of JSON last.
"""

from common import finish, keep

from configurator import configure
from model import GPT, GPTConfig
from nanofit import machine, models, settings
from nanofit.autofit.fit import Fitter
from nanofit.autofit.plan import Job, Plan
from nanofit.autofit.trials import Trials
from nanofit.errors import UsageError, usage_errors

# ---- keys: --key=value overrides them ----------------------------------------------------------------------
limits = "8,12,16,24"  # GiB
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
vocab_size = 50304
batch_size = 64  # sequences of the effective batch
compile = True
iterations = 100_000  # of the run that compiling must pay off in
device = machine.best_device()
dtype = machine.best_dtype(device)
save = ""  # a file for the result
config, given = configure(globals())
settings.at_least(1, config, "block_size", "vocab_size", "batch_size", "iterations")
dtype = config["dtype"] = settings.dtype(config, given)
device = machine.find_device(device)
with usage_errors(ValueError, prefix=f"limits={limits!r} must be numbers of GiB with commas between: "):
    limits = sorted(float(limit) for limit in str(limits).split(","))
with usage_errors(ValueError):
    shape = GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout=0.0, bias=False)
model = GPT(shape)  # for its arithmetic
peak_flops, note = machine.peak_flops(device, dtype)


def row_of(limit):
    """What auto-fit chose under a limit (0 for none), and how fast that is."""
    job = Job(models.source_of(GPT, GPTConfig), vars(shape), str(device), dtype, grad_clip=1.0, memory_limit_gb=limit)
    with Trials() as run_trial:
        asked = Plan(batch_size, 1, batch_size, compile=compile)
        fitter = Fitter(job, asked, {"recompute", "loss_chunk_mb"}, 68, iterations, run_trial)
        try:
            plan = fitter.plan()
        except UsageError as e:
            return {"limit_gb": limit, "failure": str(e)}
        trial = fitter.measure(plan.micro_batch_size, plan.levers, plan.compile)
    if not trial.fits:
        return {"limit_gb": limit, "failure": f"the choice did not fit again: {trial.failure}"}
    seconds = batch_size * block_size / trial.tokens_per_second
    return {
        "limit_gb": limit,
        "micro_batch_size": plan.micro_batch_size,
        "recompute": plan.levers.recompute,
        "compile": plan.compile,
        "peak_bytes": trial.peak_bytes,
        "tokens_per_second": trial.tokens_per_second,
        "mfu": models.share_of_peak(model, batch_size, seconds, peak_flops),
    }


rows = []
yes = {True: "yes", False: "no"}
print(f"{'limit':>10}{'micro-batch':>13}{'recompute':>11}{'compiled':>10}{'tok/s':>13}{'share':>8}{'MFU':>8}")
for limit in (0.0, *limits):
    rows.append(row := row_of(limit))
    name = f"{limit:g} GiB" if limit else "none"
    if "failure" in row:
        print(f"{name:>10}  {row['failure'].splitlines()[0]}")
    else:
        row["share"] = row["tokens_per_second"] / rows[0].get("tokens_per_second", row["tokens_per_second"])
        print(
            f"{name:>10}{row['micro_batch_size']:>13}{yes[row['recompute']]:>11}{yes[row['compile']]:>10}"
            f"{row['tokens_per_second']:>13,.0f}{row['share']:>8.3f}{row['mfu']:>8.1%}",
            flush=True,
        )
    keep("limits", config, device, {"rows": rows}, save)
if note:
    print(note)
finish("limits", config, device, {"rows": rows}, save)
