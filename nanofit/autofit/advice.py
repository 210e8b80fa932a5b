"""Where memory goes, how long a run takes, and what would fit if nothing does."""

import contextlib
from dataclasses import replace
from itertools import islice

from nanofit import cards, machine, models
from nanofit.autofit.simulate import STATE, STATE_SHARES, quietly
from nanofit.optimizers import OPTIMIZER_STATES
from nanofit.units import FRAGMENTED, GIB, GPT2_SIZES, duration

SMALLEST_BLOCK = 64  # tokens; a shorter block_size is no proposal
SHARES = {  # shares of the peak FLOP/s that a plan assumes, and what was measured
    "cuda": (0.35, 0.5, "an H200 reached 36% eager and 43 to 48% compiled, others aren't measured"),
    "cpu": (0.5, 0.9, "GPT-2 124M reached 75 to 87% on two cores"),
}


def where_it_goes(parts):
    """One line: what each part of a simulated peak takes."""
    total = sum(parts.values())
    unit, name = (GIB, "GiB") if total > GIB / 10 else (2**20, "MiB")
    shares = ", ".join(f"{part} {size / unit:.2f}" for part, size in parts.items())
    return f"of {total / unit:.2f} {name} (simulated): {shares}"


def time_of(job, sequences, card, device):
    """How long a Job's device takes for so many sequences, in words, by SHARES of its peak.

    card: a Card, or None for device, a torch.device. recompute computes a third more, which MFU doesn't count.
    """
    flops = 0.0
    with contextlib.suppress(Exception), quietly():  # a model.py of the user's may raise anything
        model = models.build(*models.from_source(job.source), job.model_args, empty=True)
        flops = models.share_of_peak(model, sequences, seconds=1.0, peak_flops=1.0)
    kind = "cuda" if card else device.type
    if kind == "cpu":
        peak = machine.peak_flops(device, job.dtype)[0]
    else:
        card = card or cards.of_driver(machine.device_name(device))
        card = card if card and card.tflops else None
        peak = card.tflops * 1e12 if card and job.dtype != "float32" else 0.0
    if not (flops and peak):
        lacking = "without the model's estimate_mfu" if not flops else "in float32" if card else "without a card's name"
        return f"; how long they take isn't known {lacking}"
    low, high, measured = SHARES[kind]
    flops *= 4 / 3 if job.levers.recompute else 1
    fast, slow = (duration(flops / peak / share) for share in (high, low))
    alone = ", without the time of their messages" if job.ranks > 1 else ""
    return f", {fast} to {slow}, at {high:.0%} to {low:.0%} of {peak / 1e12:.3g} TFLOPS ({measured}){alone}"


def what_would_fit(job, facts, run_trial, init_from):
    """Lines that say where a Job's memory goes, and name settings that would fit the device of these Facts.

    init_from: of the run. For a new model or OpenAI's, the largest of GPT-2's sizes that fits is proposed as well.
    """
    asked, known = job.levers.optimizer_state, {}
    # On a CPU, offloading to the machine's memory frees nothing.
    no_help = ("float32", asked, *(["offload"] if facts.device_type == "cpu" else []))
    others = [kind for kind in OPTIMIZER_STATES if kind not in no_help]
    if job.levers.shard or job.optimizer != "adamw":  # the state can't be chosen
        others = []

    def parts_of(sizes, state):
        """Parts of the peak. One simulation, which takes seconds, gives them for all states."""
        key = tuple(sizes.items())
        if key not in known:
            levers = replace(job.levers, optimizer_state="float32")
            model_args = {**job.model_args, **sizes}
            known[key] = run_trial(replace(job, simulate=True, model_args=model_args, levers=levers)).parts
        return {part: int(n * STATE_SHARES[state]) if part == STATE else n for part, n in known[key].items()}

    def fits(parts):
        return bool(parts) and FRAGMENTED * sum(parts.values()) + facts.process_bytes <= facts.limit_bytes

    def first(family, states):
        """[flags] of the first sizes and the first state that fit, else []."""
        found = ((sizes, state) for sizes in family for state in states if fits(parts_of(sizes, state)))
        return [flags(sizes, state) for sizes, state in islice(found, 1)]

    def flags(sizes, state):
        names = [name for name in GPT2_SIZES if init_from in GPT2_SIZES and sizes == GPT2_SIZES[name]]
        changed = {"init_from": names[0]} if names else dict(sizes)
        changed |= {"optimizer_state": state} if state != asked else {}
        return " ".join(f"--{key}={value}" for key, value in changed.items())

    shorter = [{"block_size": n} for n in _halves(job.model_args["block_size"])]
    larger_first = reversed(GPT2_SIZES.values()) if init_from in ("scratch", *GPT2_SIZES) else ()
    smaller = [sizes for sizes in larger_first if sizes["n_layer"] < job.model_args["n_layer"]]
    own = parts_of({}, asked)
    lines = [where_it_goes(own)] if own else []
    options = [flags({}, state) for state in others if fits(parts_of({}, state))]
    options += first(shorter, [asked]) or ([] if options else first(shorter, others))
    options += first(smaller, [asked, *others])
    if not options:
        tried = [*(flags({}, state) for state in others), *(flags(s, asked) for s in shorter[-1:])]
        tried += [flags(sizes, asked) for sizes in smaller[-1:]]
        what = f"none of these would fit either: {', '.join(tried)}" if tried else "there is no setting left to try"
        return [*lines, f"{what}: a smaller model, or more memory, is needed"]
    which = "each of these would fit" if len(options) > 1 else "this would fit"
    return [*lines, f"{which}, with batch_size 1:", *(f"  {option}" for option in options)]


def _halves(block_size):
    while (block_size := block_size // 2) >= SMALLEST_BLOCK:
        yield block_size
