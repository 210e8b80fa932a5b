"""Which micro-batch size to try next, which one to choose, and whether to use torch.compile.

Nothing is measured here: the functions take facts and measurements, and return decisions with their reasons.
"""

import math
from operator import attrgetter

from nanofit.units import GIB, duration

MAX_TRIALS = 5
FASTER = 1.1  # a smaller gain may be noise
TOKENS = 65_536  # in a micro-step; joining more batches than that gained nothing on an H200
TRITON_CAPABILITY = (7, 0)  # the oldest GPUs that Triton makes kernels for
SHORT_RUN_SECONDS = 3000  # a trial of compiling takes about a minute, more than 2% of a shorter run
UNTRIED_SECONDS = 3600  # in a shorter run, a GPU with enough SMs compiles without a trial
ROOMY = 0.75  # share of the limit, for an eager peak; compiled peaks were 8 to 16% higher on an H200
size_of, speed_of = attrgetter("micro_batch_size"), attrgetter("tokens_per_second")


# ---- sizes -------------------------------------------------------------------------------------------------


def line_through(trials):
    """(a, k) of memory = a + k x size bytes, through the smallest and the largest trial with a known peak."""
    known = sorted((size_of(t), t.peak_bytes) for t in trials if t.peak_bytes)
    if not known:
        return 0.0, 0.0
    (b0, m0), (b1, m1) = known[0], known[-1]
    k = max(0.0, (m1 - m0) / (b1 - b0)) if b1 > b0 else 0.0
    return m1 - k * b1, k


def next_size(sizes, trials, limit_bytes, batch_size):
    """The micro-batch size to try next, or None if the trials so far are enough.

    First the two smallest, for the line that memory follows; then the largest that should fit, up to batch_size. If it
    doesn't fit, a size between; if batch_size itself fits, the largest that joins batches.
    """
    fitting = [size_of(t) for t in trials if t.fits]
    if trials and not fitting:
        return None
    tried = set(map(size_of, trials))
    untried = [s for s in sizes if s not in tried]
    if not tried.issuperset(sizes[:2]):
        return untried[0]
    low = max(fitting)
    furthest = batch_size if low < batch_size or not _may_gain(trials, sizes[-1]) else sizes[-1]
    too_large = [size for size in tried if size > low]
    between = [s for s in untried if low < s <= furthest and s < min(too_large, default=math.inf)]
    if too_large:  # the line was wrong
        middle = (low + min(too_large)) / 2
        return max((s for s in between if s <= middle), default=between[0] if between else None)
    a, k = line_through(trials)
    return max((s for s in between if a + k * s <= limit_bytes), default=None)


def _may_gain(trials, size):
    """Whether this size may be faster than the largest that fits, judged by the two largest that fit.

    The time of a micro-step is modelled as a fixed part and a part for each sequence.
    """
    known = sorted((size_of(t), speed_of(t)) for t in trials if t.fits and speed_of(t))
    if len(known) < 2:
        return True  # unknown
    (b0, v0), (b1, v1) = known[-2:]
    fixed = (1 / v0 - 1 / v1) / (1 / b0 - 1 / b1)
    promised = 1 / v1 - fixed * (1 / b1 - 1 / size)  # seconds a token
    return promised < 1 / v1 / FASTER


def choose(trials, batch_size):
    """(choice, rival), each a Trial or None: batch_size or the largest below it that fits; and a faster one.

    If speed wasn't measured, the choice is the largest of all.
    """
    fitting = [t for t in trials if t.fits]
    configured = [t for t in fitting if size_of(t) <= batch_size] if any(map(speed_of, fitting)) else fitting
    choice = max(configured, key=size_of, default=None)
    rival = max(fitting, key=speed_of, default=None)
    return choice, rival if rival and is_faster(rival, choice) else None


def why_no_larger(larger, trials, limit_bytes):
    """Why the next larger size than the choice was not chosen, in words. larger: that size."""
    tried = next((t for t in trials if size_of(t) == larger), None)
    a, k = line_through(trials)
    would_take = (tried and tried.peak_bytes) or int(a + k * larger)
    if would_take > limit_bytes:
        return f"the largest that fits, as {larger} would take {would_take / GIB:.1f} of {limit_bytes / GIB:.1f} GiB"
    if tried:
        return f"the largest that fits, as {larger} did not run"
    return "the largest that was tried and fits, as trials take 2% of the run at most, or a minute"


def is_faster(trial, other):
    """Whether a Trial is faster than another by more than noise."""
    return trial.fits and speed_of(trial) >= FASTER * speed_of(other) > 0


# ---- torch.compile -----------------------------------------------------------------------------------------


def may_compile(asked, facts, min_sms):
    """(verdict, why): 'yes', 'no', or 'prove' if a trial must show that compiling pays.

    facts: the device's. min_sms: with at least so many streaming multiprocessors, compiling is assumed to pay. Inductor
    draws the same line, at 68, for tuning matrix products.
    """
    if not asked:
        return "no", "compile=False"
    if facts.device_type == "mps":
        return "no", "torch.compile on mps is a prototype"
    if facts.device_type == "cpu":
        return "prove", "on a CPU compiling pays in long runs alone"
    if facts.capability < TRITON_CAPABILITY:
        return "no", "Triton needs compute capability 7.0, this GPU has {}.{}".format(*facts.capability)
    if not facts.has_triton:
        return "no", "Triton is not installed"
    if not facts.sm_count:
        return "prove", "how many SMs it has isn't known"
    if facts.sm_count < min_sms:
        return "prove", f"{facts.sm_count} SMs are fewer than compile_min_sms={min_sms}"
    return "yes", f"{facts.sm_count} SMs, compile_min_sms={min_sms}"


def needs_no_trial(verdict, eager, seconds_left):
    """(whether to compile, why) if that can be decided without a compiled trial; else None.

    eager: the Trial without compiling. seconds_left: how long the run takes without compiling.
    """
    takes = f"the run takes {duration(seconds_left)} without"
    if verdict == "prove" and seconds_left < SHORT_RUN_SECONDS:
        return False, takes
    if verdict == "yes" and seconds_left < UNTRIED_SECONDS and eager.peak_bytes <= ROOMY * eager.limit_bytes:
        return True, f"not tried, as {takes}, and there is memory to spare"
    return None


def judge(verdict, why, eager, compiled, tokens_left):
    """(whether to compile, why), from may_compile's 'yes' or 'prove' and an eager and a compiled Trial."""
    if not compiled.fits:
        return False, f"the compiled trial failed: {compiled.failure or 'it does not fit'}"
    if verdict == "prove":
        without, cost = tokens_left / eager.tokens_per_second, compiled.compile_seconds
        saved = without - tokens_left / compiled.tokens_per_second
        sums = f"compiling takes {duration(cost)} and saves {duration(saved)} of {duration(without)}"
        return saved > cost, f"{why}, and {sums}"
    if size_of(compiled) < size_of(eager) and speed_of(compiled) <= speed_of(eager):
        return False, f"compiled, batch_size {size_of(eager)} does not run, and a smaller one is slower"
    return True, why
