"""What to tell where nothing fits: where memory goes, and which settings would fit, by simulation."""

import math
from dataclasses import replace

from nanofit.optimizers import OPTIMIZER_STATES
from nanofit.units import FRAGMENTED, GIB, GPT2_SIZES, gib, memory_limit

SMALLEST_BLOCK = 64  # tokens; a shorter block_size is no proposal


def where_it_goes(parts):
    """One line: what each part of a simulated peak takes."""
    total = sum(parts.values())
    unit, name = (GIB, "GiB") if total > GIB / 10 else (2**20, "MiB")
    shares = ", ".join(f"{part} {size / unit:.2f}" for part, size in parts.items())
    return f"of {total / unit:.2f} {name} (simulated): {shares}"


def nothing_fits(trial, facts):
    """(sentence, whether other settings may help) about a Trial of the smallest size, on a device of these Facts."""
    if not facts:
        return f"auto-fit could not look at the device: {trial.failure}; python doctor.py says more", False
    limit, process = f"the limit is {gib(facts.limit_bytes)}", facts.process_bytes
    if not trial.out_of_memory:
        failed = f"auto-fit: the trial of batch_size 1 failed: {trial.failure}"
        smaller = f"if that is for want of memory ({limit}), set a smaller block_size or model"
        return f"{failed}; {smaller}; else start without auto_fit to see the whole error", False
    need = gib(trial.peak_bytes) if trial.peak_bytes else "more than there is"
    how = trial.failure or ("simulated" if trial.parts else "measured")
    there = f"{limit} of {gib(facts.free_bytes)} free"
    if process:
        there += f"; the process alone, Python and torch, takes {gib(process)}"
    may_help = process < facts.limit_bytes
    if not may_help:
        there += ": no setting helps, memory_limit_gb must be more than that"
    return f"auto-fit: nothing fits: batch_size 1{trial.levers} takes {need} ({how}), {there}", may_help


def what_would_fit(job, facts, run_trial, may_shrink, measured_bytes=0):
    """Lines that say where a Job's memory goes and name settings that would fit the device of these Facts.

    may_shrink: whether another size of model may be proposed. measured_bytes: what the job took, where that is known.
    """

    def simulated(**changes):
        return run_trial(replace(job, simulate=True, **changes)).parts

    def fits(**changes):
        parts = simulated(**changes)
        return bool(parts) and FRAGMENTED * sum(parts.values()) + beside <= facts.limit_bytes

    def fits_shape(**changes):
        return fits(model_args={**job.model_args, **changes})

    parts = simulated()
    # Where the process counts, so does what it took to run the job, beyond its tensors.
    beside = facts.process_bytes and max(facts.process_bytes, measured_bytes - sum(parts.values()))
    lines = [where_it_goes(parts)] if parts else []
    # On a CPU, the machine's memory is the device's: nothing is freed by offloading to it.
    no_help = ("float32", job.levers.optimizer_state, *(["offload"] if facts.device_type == "cpu" else []))
    states = [] if job.levers.shard else [kind for kind in OPTIMIZER_STATES if kind not in no_help]
    tried = [f"optimizer_state={kind}" for kind in states]
    options = [f"--optimizer_state={kind}" for kind in states if fits(levers=replace(job.levers, optimizer_state=kind))]
    block_size = job.model_args["block_size"] // 2
    while block_size >= SMALLEST_BLOCK and not fits_shape(block_size=block_size):
        block_size //= 2
    tried += [f"a block_size down to {SMALLEST_BLOCK}"] if job.model_args["block_size"] > SMALLEST_BLOCK else []
    options += [f"--block_size={block_size}"] if block_size >= SMALLEST_BLOCK else []
    larger_first = reversed(GPT2_SIZES.values()) if may_shrink else ()
    smaller = [sizes for sizes in larger_first if sizes["n_layer"] < job.model_args["n_layer"]]
    tried += [f"n_layer={sizes['n_layer']}" for sizes in smaller]
    if fitting := next((sizes for sizes in smaller if fits_shape(**sizes)), None):
        options.append(" ".join(f"--{key}={value}" for key, value in fitting.items()))
    asked = math.ceil(100 * FRAGMENTED * measured_bytes / GIB) / 100
    if (
        job.memory_limit_gb
        and not job.simulate
        and facts.limit_bytes < asked * GIB <= memory_limit(facts.free_bytes, 0)
    ):
        options.append(f"--memory_limit_gb={asked}")
    if not options:
        what = f"none of these would fit either: {', '.join(tried)}" if tried else "there is no setting left to try"
        return [*lines, f"{what}: a smaller model, or more memory, is needed"]
    which = "each of these would fit" if len(options) > 1 else "this would fit"
    return [*lines, f"{which}, with batch_size 1:", *(f"  {option}" for option in options)]
