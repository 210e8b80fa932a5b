"""What to tell where nothing fits: where memory goes, and which settings would fit, each of them simulated."""

from dataclasses import replace

from nanofit.autofit.plan import FRAGMENTED, GIB
from nanofit.models import GPT2_SIZES
from nanofit.optimizers import OPTIMIZER_STATES

SMALLEST_BLOCK = 64  # tokens; a shorter block_size is no proposal


def where_it_goes(parts):
    """One line: what each part of a simulated peak takes."""
    shares = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    return f"of {sum(parts.values()) / GIB:.2f} GiB (simulated): {shares}"


def what_would_fit(job, facts, run_trial, may_shrink):
    """Lines that say where a Job's memory goes and name settings that would fit the device of these Facts.

    may_shrink: whether another size of model may be proposed.
    """

    def simulated(**changes):
        return run_trial(replace(job, simulate=True, **changes)).parts

    def fits(**changes):
        parts = simulated(**changes)
        return bool(parts) and FRAGMENTED * sum(parts.values()) + facts.process_bytes <= facts.limit_bytes

    def fits_shape(**changes):
        return fits(model_args={**job.model_args, **changes})

    parts = simulated()
    lines = [where_it_goes(parts)] if parts else []
    # On a CPU, the machine's memory is the device's: nothing is freed by offloading to it.
    no_help = ("float32", job.levers.optimizer_state, *(["offload"] if facts.device_type == "cpu" else []))
    states = [kind for kind in OPTIMIZER_STATES if kind not in no_help]
    tried = [f"optimizer_state={kind}" for kind in states]
    options = [f"--optimizer_state={kind}" for kind in states if fits(levers=replace(job.levers, optimizer_state=kind))]
    block_size = job.model_args["block_size"] // 2
    while block_size >= SMALLEST_BLOCK and not fits_shape(block_size=block_size):
        block_size //= 2
    tried += [f"a block_size down to {SMALLEST_BLOCK}"] if job.model_args["block_size"] > SMALLEST_BLOCK else []
    if block_size >= SMALLEST_BLOCK:
        options.append(f"--block_size={block_size}")
    smaller = [m for m in GPT2_SIZES.values() if m["n_layer"] < job.model_args["n_layer"]] if may_shrink else []
    tried += [f"n_layer={sizes['n_layer']}" for sizes in reversed(smaller)]
    for sizes in reversed(smaller):
        if fits_shape(**sizes):
            options.append(" ".join(f"--{key}={value}" for key, value in sizes.items()))
            break
    if not options:
        what = f"none of these would fit either: {', '.join(tried)}" if tried else "there is no setting left to try"
        return [*lines, f"{what}: a smaller model, or more memory, is needed"]
    return [*lines, "each of these would fit, with batch_size 1:", *(f"  {option}" for option in options)]
