"""Choose the micro-batch that fits the device, activation checkpointing and compiling, before training starts.

batch_size x gradient_accumulation_steps is split again; the product stays what it was, and so do the batches,
the schedule and the model. A micro-batch always divides batch_size, because batches are drawn whole and then
cut. Sizes are tried in child processes (probe.py), one a trial, which end before training starts: a crash, a
leak or a failed compilation there costs nothing.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass, field, replace

from model import PRETRAINED
from nanofit import runtime
from nanofit.errors import UsageError
from nanofit.optimizers import OPTIMIZER_STATES

GIB = 2**30
MAX_PROBES = 5
NEAR_ENOUGH = 0.98  # of the fastest: headroom is worth more than 2% of speed
LEVEL = 0.9  # of the fastest: too close to tell which size is the best
WORTH_CHECKPOINTING = 1.15  # speed gained by doubling the size, from where two doublings make up for computing again
CHECKPOINTED_TIMES = 4  # as many sequences, at least, fit with activation checkpointing
CONTEXT_BYTES = GIB // 2  # what CUDA itself takes of a card, where there is no card to ask
PROBE_SECONDS = 600  # a trial that takes longer hangs
FRAGMENTED = 1.03  # what an allocator reserves for what tensors hold, where only the latter is simulated
SMALLEST_BLOCK = 64  # tokens; a shorter block_size is no proposal
CACHE = "auto_fit.json"
OUT_OF_MEMORY = "out of memory"  # the failure of a trial that was too large
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PROBE_SCRIPT = os.path.join(ROOT, "nanofit", "autofit", "probe.py")


# ---- decisions: pure functions -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """What trying one micro-batch size showed."""

    batch_size: int
    fits: bool
    peak_bytes: int = 0  # most that was reserved; 0 where it isn't known
    tokens_per_second: float = 0.0  # 0 where it wasn't measured
    failure: str = ""  # why there are no figures
    compile_seconds: float = 0.0
    checkpointing: bool = False  # activations were computed again in the backward pass


@dataclass(frozen=True)
class Plan:
    """How the effective batch is split, and why."""

    batch_size: int  # as configured
    gradient_accumulation_steps: int  # as configured, of all ranks together
    micro_batch_size: int
    compile: bool
    limit_bytes: int
    peak_bytes: int = 0
    reasons: tuple = ()
    trials: tuple = field(default=(), compare=False)
    activation_checkpointing: bool = False

    def __post_init__(self):
        assert self.batch_size % self.micro_batch_size == 0, "a micro-batch divides the batch"
        assert self.micro_batch_size * self.accumulation == self.batch_size * self.gradient_accumulation_steps

    @property
    def accumulation(self):
        """Micro-steps of an iteration, of all ranks together."""
        return self.gradient_accumulation_steps * (self.batch_size // self.micro_batch_size)

    def __str__(self):
        return (
            f"batch_size {self.batch_size} -> {self.micro_batch_size}, gradient_accumulation_steps "
            f"{self.gradient_accumulation_steps} -> {self.accumulation}, effective batch "
            f"{self.batch_size * self.gradient_accumulation_steps}"
        )


def divisors(n):
    """All divisors of n, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def memory_limit(free_bytes, memory_limit_gb):
    """Bytes that training may reserve: what is free, less a margin of 5% (at most 1 GiB), or the given limit."""
    limit = int(free_bytes - min(0.05 * free_bytes, GIB))
    return min(limit, int(memory_limit_gb * GIB)) if memory_limit_gb else limit


def line_through(trials):
    """(a, k) of memory = a + k x batch_size bytes, through the smallest and the largest trial with a known peak."""
    known = sorted((t.batch_size, t.peak_bytes) for t in trials if t.peak_bytes)
    if not known:
        return 0.0, 0.0
    (b0, m0), (b1, m1) = known[0], known[-1]
    k = max(0.0, (m1 - m0) / (b1 - b0)) if b1 > b0 else 0.0
    return m1 - k * b1, k


def next_size(sizes, trials, limit_bytes):
    """The micro-batch size to try next, or None where the trials so far suffice.

    First the two smallest, for the line that memory follows; then the largest that the line allows; then what
    lies between what fits and what doesn't; then the neighbours of the fastest; last, where speed is level there,
    the middle of the sizes below.
    """
    tried = {t.batch_size for t in trials}
    fitting = [t for t in trials if t.fits]
    for size in sizes[:2]:
        if size not in tried:
            return size
        if sizes[0] in tried and not fitting:
            return None
    low = max(t.batch_size for t in fitting)
    too_large = [t.batch_size for t in trials if not t.fits and t.batch_size > low]
    high = min(too_large, default=sizes[-1] + 1)
    between = [s for s in sizes if low < s < high and s not in tried]
    a, k = line_through(trials)
    allowed = [s for s in between if a + k * s <= limit_bytes]
    if allowed:
        # A line that has been wrong twice is no guide any more.
        return between[len(between) // 2] if len(too_large) > 1 else allowed[-1]
    fastest = max(fitting, key=lambda t: t.tokens_per_second)
    if not fastest.tokens_per_second:
        return None
    at = sizes.index(fastest.batch_size)
    for neighbour in sizes[max(0, at - 1) : at] + sizes[at + 1 : at + 2]:
        if neighbour not in tried and neighbour < high and a + k * neighbour <= limit_bytes:
            return neighbour
    level = [t for t in fitting if t.tokens_per_second >= LEVEL * fastest.tokens_per_second]
    below = [s for s in sizes if s < fastest.batch_size and s not in tried]
    return below[len(below) // 2] if below and len(level) > 1 else None


def choose(trials):
    """Of the trials that fit, the smallest within 2% of the fastest; the largest where speed wasn't measured.

    None where nothing fits.
    """
    fitting = sorted((t for t in trials if t.fits), key=lambda t: t.batch_size)
    if not fitting:
        return None
    fastest = max(t.tokens_per_second for t in fitting)
    if not fastest:
        return fitting[-1]
    return next(t for t in fitting if t.tokens_per_second >= NEAR_ENOUGH * fastest)


def search(batch_size, limit_bytes, measure):
    """(choice, trials): at most MAX_PROBES calls of measure(size, limit_bytes or None), which gives a Trial.

    limit_bytes may be a function, for a limit that only the first trial finds out. The choice is a trial that
    was measured to fit, or None.
    """
    sizes = divisors(batch_size)
    trials = []
    while len(trials) < MAX_PROBES:
        size = next_size(sizes, trials, limit_bytes() if callable(limit_bytes) else limit_bytes)
        if size is None:
            break
        trials.append(measure(size))
    return choose(trials), trials


def size_to_try_checkpointed(sizes, trials):
    """The size at which activation checkpointing may be faster than the sizes that fit without it, or None.

    Checkpointing costs about a third more arithmetic and makes room for larger sizes. That can only pay where
    memory, not batch_size, ends the search, and where speed was still growing with the size.
    """
    fitting = sorted((t for t in trials if t.fits and t.tokens_per_second), key=lambda t: t.batch_size)
    if not fitting or fitting[-1].batch_size == sizes[-1]:
        return None
    largest = fitting[-1]
    if len(fitting) > 1:
        smaller = fitting[-2]
        doublings = math.log2(largest.batch_size / smaller.batch_size)
        if (largest.tokens_per_second / smaller.tokens_per_second) ** (1 / doublings) < WORTH_CHECKPOINTING:
            return None
    return max(size for size in sizes if size <= CHECKPOINTED_TIMES * largest.batch_size)


def may_compile(*, asked, device_type, capability, sm_count, min_sms, has_triton, platform):
    """(verdict, why): 'yes', 'no', or 'prove' where compiling must pay for itself in a probe.

    capability: CUDA compute capability (major, minor).
    """
    if not asked:
        return "no", "compile=False"
    if device_type == "mps":
        return "no", "torch.compile on mps is a prototype"
    if device_type == "cpu":
        return "prove", "on a CPU compiling pays in long runs alone"
    if capability < (7, 0):
        return "no", f"Triton needs compute capability 7.0, this GPU has {capability[0]}.{capability[1]}"
    if not has_triton:
        return "no", f"there is no Triton for {platform}" if platform == "win32" else "Triton is not installed"
    if sm_count < min_sms:
        return "prove", f"{sm_count} SMs are fewer than compile_min_sms={min_sms}"
    return "yes", f"{sm_count} SMs, compile_min_sms={min_sms}"


def refuse_mode(mode, sm_count, min_sms):
    """A sentence where the GPU is too small for this mode of torch.compile, else ''."""
    if mode.startswith("max-autotune") and sm_count < min_sms:
        return (
            f"compile_mode={mode!r} needs a GPU of compile_min_sms={min_sms} SMs, this one has {sm_count}: Inductor "
            "would only warn and not tune matrix products; set compile_mode to 'default' or 'reduce-overhead'"
        )
    return ""


def pays_off(eager, compiled, tokens_left):
    """(whether compiling saves more time over tokens_left than it costs, why): two Trials of one size."""
    saved = tokens_left / eager.tokens_per_second - tokens_left / compiled.tokens_per_second
    why = (
        f"compiling takes {_duration(compiled.compile_seconds)} and saves {_duration(saved)} of "
        f"{_duration(tokens_left / eager.tokens_per_second)}"
    )
    return saved > compiled.compile_seconds, why


def _duration(seconds):
    if abs(seconds) >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if abs(seconds) >= 60 else f"{seconds:.0f} s"


# ---- trials: child processes -------------------------------------------------------------------------------


def run_probe(job, on_facts=lambda facts: None, seconds=PROBE_SECONDS):
    """Run probe.py on a job; the list of its results, and a sentence where it ended without one.

    Only whole lines of JSON with the expected fields count, so that a child that is killed, hangs or prints
    garbage can't be taken for an answer.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
    results, facts = [], {}
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        child = subprocess.Popen(
            [sys.executable, PROBE_SCRIPT],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace", env=environment,
            start_new_session=True,
        )  # fmt: skip
        late = threading.Event()
        watch = threading.Timer(seconds, lambda: (late.set(), _kill(child)))
        watch.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # it died at once; the exit code below says how
                child.stdin.write(json.dumps(job) + "\n")
                child.stdin.flush()
            for line in child.stdout:
                answer = _answer(line)
                if answer.get("kind") == "facts":
                    on_facts(answer)
                    facts = answer
                elif answer.get("kind") == "result":
                    results.append(answer)
            code = child.wait()
        finally:
            watch.cancel()
            _kill(child)
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
        errors.seek(0)
        said = [line for line in errors.read().splitlines() if line.strip()]
    if results and code == 0:
        return results, ""
    if late.is_set():
        return [], f"took longer than {seconds:.0f} s"
    if code < 0:
        cause = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
        return [], f"was killed by signal {-code}{cause}"
    last = said[-1].removeprefix("error: ") if said else "no message"
    return [], f"ended with exit code {code} and no answer ({last})" if facts or code else f"gave no answer ({last})"


FIELDS = {
    "facts": {"name": str, "limit_bytes": int, "free_bytes": int, "total_bytes": int, "sm_count": int},
    "result": {"batch_size": int, "peak_bytes": int, "tokens_per_second": float, "failure": str},
}


def _answer(line):
    """A line of probe.py as a dict; an empty one where it isn't a whole and well-formed answer."""
    try:
        answer = json.loads(line) if line.endswith("\n") else {}
    except ValueError:
        return {}
    fields = FIELDS.get(answer.get("kind")) if isinstance(answer, dict) else None
    if fields is None or not all(type(answer.get(name)) is kind for name, kind in fields.items()):
        return {}
    return answer


def _kill(child):
    """End a child and what it has started."""
    if child.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
        child.wait()


# ---- the whole ---------------------------------------------------------------------------------------------


@dataclass
class Fitter:
    """Auto-fit for one device. job is what probe.py must know of the run: see there."""

    job: dict
    batch_size: int
    gradient_accumulation_steps: int
    world_size: int = 1
    asked_compile: bool = False
    compile_mode: str = "default"
    compile_min_sms: int = 68
    iterations_left: int = 1
    simulated: bool = False
    may_checkpoint: bool = True  # activation checkpointing is ours to choose
    may_shrink: bool = True  # the model's size is free to be proposed smaller
    advises: bool = True  # where nothing fits, look for what would
    say: callable = print
    probe: callable = run_probe
    facts: dict = field(default_factory=dict)

    def plan(self, remembered=None):
        """A Plan, from the trials or from an earlier answer that one trial confirms. UsageError where nothing fits."""
        if remembered and (plan := self._confirm(remembered)):
            return plan
        choice, trials, why = self._search()
        if choice is None:
            raise UsageError(self._nothing_fits(trials))
        use_compile, compile_why = self._compile(choice)
        if choice.batch_size < self.batch_size:
            for pid, name, mib in self.facts.get("neighbours", ()):
                self.say(f"auto-fit: {name} (pid {pid}) holds {mib:,} MiB of this GPU: more would fit without it")
        return self._plan(choice, use_compile, (*why, compile_why), trials)

    def measure(self, size, compile=False, checkpointing=None):
        """Try one micro-batch size; says how it went. checkpointing: None for as configured."""
        if checkpointing is None:
            checkpointing = self.job["activation_checkpointing"]
        job = {**self.job_of(size), "compile": compile, "activation_checkpointing": checkpointing}
        if compile:
            job["compile_mode"] = self.compile_mode
        if self.facts:
            job["limit_bytes"] = self._limit()  # the first trial found it; all are held to the same
        results, failure = self.probe(job, self._on_facts)
        result = results[0] if results else {"failure": f"the probe {failure}", "peak_bytes": 0}
        fits = not result["failure"] and 0 < result["peak_bytes"] <= self._limit() and not result.get("retries")
        trial = Trial(
            size,
            fits,
            result["peak_bytes"],
            result.get("tokens_per_second", 0.0),
            result["failure"],
            result.get("compile_seconds", 0.0),
            checkpointing,
        )
        speed = f"   {trial.tokens_per_second:,.0f} tok/s" if trial.tokens_per_second else ""
        peak = f"peak {trial.peak_bytes / GIB:.2f} GiB" if trial.peak_bytes else trial.failure
        verdict = "fits" if fits else "does not fit"
        how = f"{', activation checkpointing' if checkpointing else ''}{', compiled' if compile else ''}"
        self.say(f"auto-fit: batch_size {size}{how}   {peak}{speed}   {verdict}")
        return trial

    def job_of(self, size):
        """What probe.py must know to try this size."""
        micro_steps = self.gradient_accumulation_steps * (self.batch_size // size) // self.world_size
        return {**self.job, "batch_size": size, "micro_steps": micro_steps}

    def _search(self):
        """(choice, trials, reasons): without activation checkpointing, and with it where that helps."""
        asked = self.job["activation_checkpointing"]
        choice, trials = self._search_sizes(asked)
        if asked or not self.may_checkpoint:
            return choice, trials, ()
        if choice is None:
            if not self.facts:
                return None, trials, ()  # there was no device to look at
            choice, more = self._search_sizes(True)
            why = "activation_checkpointing on: not even batch_size 1 fits without it"
        else:
            size = size_to_try_checkpointed(divisors(self.batch_size), trials)
            if size is None:
                return choice, trials, ()
            more = [self.measure(size, checkpointing=True)]
            faster = more[0].fits and more[0].tokens_per_second * NEAR_ENOUGH > choice.tokens_per_second
            if faster:
                why = "activation_checkpointing on: larger micro-batches make up for computing activations twice"
                choice = more[0]
            else:
                why = "activation_checkpointing off: what fits without it is faster"
        if choice:
            self.say(f"auto-fit: {why}")
        return choice, [*trials, *more], (why,)

    def _search_sizes(self, checkpointing):
        """search(), and a word about the line once two trials have shown it."""
        trials = []

        def measure(size):
            trials.append(self.measure(size, checkpointing=checkpointing))
            if len(trials) == 2 and all(t.peak_bytes for t in trials):
                a, k = line_through(trials)
                following = next_size(divisors(self.batch_size), trials, self._limit())
                hope = f": {following} should fit" if following and following > size else ""
                self.say(f"auto-fit: memory is {a / GIB:.2f} + {k / GIB:.2f} x batch_size GiB{hope}")
            return trials[-1]

        return search(self.batch_size, self._limit, measure)

    def check(self, plan, size, checkpointing):
        """Make sure that a size which other ranks chose fits here too; UsageError where it doesn't."""
        known = any(t.fits and (t.batch_size, t.checkpointing) == (size, checkpointing) for t in plan.trials)
        if not known and not self.measure(size, checkpointing=checkpointing).fits:
            raise UsageError(f"batch_size {size}, which another rank chose, does not fit here")

    def _on_facts(self, facts):
        if not self.facts:
            self.facts = facts
            sms = f"{facts['sm_count']} SMs, " if facts["sm_count"] else ""
            simulated = ", simulated on fake tensors: nothing is measured" if self.simulated else ""
            self.say(
                f"auto-fit: {facts['name']}, {sms}{facts['total_bytes'] / GIB:.2f} GiB, "
                f"{facts['free_bytes'] / GIB:.2f} GiB free, limit {facts['limit_bytes'] / GIB:.2f} GiB{simulated}"
            )

    def _limit(self):
        return self.facts.get("limit_bytes", 0)

    def _compile(self, choice):
        """(use, why) for torch.compile at the chosen size, tried there if it may pay."""
        if self.simulated:
            return False, "compile: decided on the device itself"
        facts = self.facts
        verdict, why = may_compile(
            asked=self.asked_compile,
            device_type=facts.get("device_type", "cpu"),
            capability=tuple(facts.get("capability", (0, 0))),
            sm_count=facts.get("sm_count", 0),
            min_sms=self.compile_min_sms,
            has_triton=facts.get("has_triton", False),
            platform=sys.platform,
        )
        if verdict == "prove":
            # The time that compiling could save at the very best; where that is less than a minute, don't try.
            tokens = self._tokens_left()
            if tokens / choice.tokens_per_second < 120:
                verdict, why = "no", f"{why}, and the run takes {_duration(tokens / choice.tokens_per_second)} without"
        if verdict != "no":
            compiled = self.measure(choice.batch_size, compile=True, checkpointing=choice.checkpointing)
            if not compiled.fits:
                verdict, why = "no", f"the compiled trial failed: {compiled.failure or 'it does not fit'}"
            elif verdict == "prove":
                worth, sums = pays_off(choice, compiled, self._tokens_left())
                verdict, why = ("yes" if worth else "no"), f"{why}, and {sums}"
        decision = f"compile {'on' if verdict == 'yes' else 'off'}: {why}"
        self.say(f"auto-fit: {decision}")
        return verdict == "yes", decision

    def _tokens_left(self):
        """Tokens that this rank has still to train."""
        sequences = self.batch_size * self.gradient_accumulation_steps // self.world_size
        return max(1, self.iterations_left) * sequences * self.job["model_args"]["block_size"]

    def _plan(self, trial, use_compile, reasons, trials):
        return Plan(
            self.batch_size,
            self.gradient_accumulation_steps,
            trial.batch_size,
            use_compile,
            self._limit(),
            trial.peak_bytes,
            tuple(reasons),
            tuple(trials),
            trial.checkpointing,
        )

    def _confirm(self, remembered):
        """The remembered Plan, if one trial shows that it still holds; else None, with a sentence."""
        size, use_compile, limit = remembered["micro_batch_size"], remembered["compile"], remembered["limit_bytes"]
        trial = self.measure(size, compile=use_compile, checkpointing=remembered["activation_checkpointing"])
        if not trial.fits:
            self.say("auto-fit: the answer kept beside the run does not fit any more: looking again")
        elif abs(self._limit() - limit) > 0.05 * limit:
            now, then = self._limit() / GIB, limit / GIB
            self.say(f"auto-fit: the limit was {then:.2f} GiB and is {now:.2f} GiB: looking again")
        else:
            self.say("auto-fit: the answer kept beside the run holds")
            return self._plan(trial, use_compile, remembered["reasons"], [trial])
        self.facts = {}
        return None

    def _nothing_fits(self, trials):
        smallest = trials[-1]  # with activation checkpointing, where that was tried
        if not self.facts:
            return f"auto-fit could not look at the device: {smallest.failure}"
        if smallest.failure not in ("", OUT_OF_MEMORY):
            return (
                f"auto-fit: the trial of batch_size 1 failed: {smallest.failure}; if that is for want of memory (the "
                f"limit is {self._limit() / GIB:.2f} GiB), set a smaller block_size or model; else start without "
                "auto_fit to see the whole error"
            )
        how = smallest.failure or ("simulated" if self.simulated else "measured")
        need = f"{smallest.peak_bytes / GIB:.2f} GiB" if smallest.peak_bytes else "more than there is"
        levers = " with activation checkpointing" if smallest.checkpointing else ""
        sentence = (
            f"auto-fit: nothing fits: batch_size 1{levers} takes {need} ({how}), the limit is "
            f"{self._limit() / GIB:.2f} GiB of {self.facts['free_bytes'] / GIB:.2f} GiB free"
        )
        if not self.advises:
            return sentence
        self.say("auto-fit: nothing fits: looking for settings that would, by simulation")
        job = {**self.job_of(1), "activation_checkpointing": smallest.checkpointing or self.may_checkpoint}
        return "\n".join([sentence, *what_would_fit(job, self._limit(), self.probe, self.may_shrink)])


def simulated(job, probe=run_probe):
    """Bytes at the peak of a simulated step by part, a dict; None where the simulation fails."""
    results, _ = probe({**job, "simulate": True})
    return results[0].get("parts") if results else None


def where_it_goes(parts):
    """One line: what each part of the peak takes."""
    shares = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    return f"of {sum(parts.values()) / GIB:.2f} GiB (simulated): {shares}"


def what_would_fit(job, limit_bytes, probe, may_shrink):
    """Lines that say where memory goes and name settings that would fit, each of them simulated.

    may_shrink: whether another size of model may be proposed.
    """

    def fits(**changes):
        parts = simulated({**job, **changes}, probe)
        return bool(parts) and FRAGMENTED * sum(parts.values()) <= limit_bytes

    def fits_shape(**changes):
        return fits(model_args={**job["model_args"], **changes})

    parts = simulated(job, probe)
    lines = [where_it_goes(parts)] if parts else []
    options = [f"--optimizer_state={kind}" for kind in OPTIMIZER_STATES[1:] if fits(optimizer_state=kind)]
    block_size = job["model_args"]["block_size"] // 2
    while block_size >= SMALLEST_BLOCK and not fits_shape(block_size=block_size):
        block_size //= 2
    if block_size >= SMALLEST_BLOCK:
        options.append(f"--block_size={block_size}")
    smaller = [m for m in PRETRAINED.values() if m["n_layer"] < job["model_args"]["n_layer"]] if may_shrink else []
    for sizes in reversed(smaller):
        if fits_shape(**sizes):
            options.append(" ".join(f"--{key}={value}" for key, value in sizes.items()))
            break
    if not options:
        return [*lines, "no setting that was tried would fit: a smaller model, or more memory, is needed"]
    return [*lines, "each of these would fit, with batch_size 1:", *(f"  {option}" for option in options)]


# ---- the answer beside the run -----------------------------------------------------------------------------


ASKED = (  # keys of the run that an answer depends on
    "batch_size", "gradient_accumulation_steps", "dtype", "compile", "compile_mode", "compile_min_sms", "max_iters",
    "memory_limit_gb", "grad_clip", "activation_checkpointing", "optimizer_state",
)  # fmt: skip
CHOICE = {
    "micro_batch_size": int,
    "compile": bool,
    "activation_checkpointing": bool,
    "limit_bytes": int,
    "reasons": list,
}


def recall(out_dir, key):
    """The choice kept in out_dir for a run of the same key, or (None, why not)."""
    path = os.path.join(out_dir, CACHE)
    if not os.path.exists(path):
        return None, ""
    try:
        with open(path, encoding="utf-8") as f:
            kept = json.load(f)
        if differs := [name for name in key if kept["key"].get(name) != json.loads(json.dumps(key[name]))]:
            return None, f"{path} is for another {differs[0]} and is ignored"
        choice = {name: kept["choice"][name] for name in CHOICE}
        sound = [type(value) for value in choice.values()] == list(CHOICE.values())
        if not sound or choice["micro_batch_size"] not in divisors(key["batch_size"]):
            raise ValueError("not an answer")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, f"{path} can't be read and is ignored"
    return choice, ""


def remember(out_dir, key, plan):
    """Keep a plan in out_dir/auto_fit.json, readable for people, whole or not at all."""
    os.makedirs(out_dir, exist_ok=True)
    path = os.path.join(out_dir, CACHE)
    choice = {k: v for k, v in asdict(plan).items() if k != "trials"}
    with open(path + ".part", "w", encoding="utf-8") as f:
        json.dump({"key": key, "choice": choice, "trials": [asdict(t) for t in plan.trials]}, f, indent=2)
        f.write("\n")
    os.replace(path + ".part", path)


def agree(world, attempt):
    """Call attempt() on every rank; all their values, or a UsageError on all of them where it fails on any."""
    value, failure = None, ""
    try:
        value = attempt()
    except UsageError as e:
        failure = str(e)
    answers = world.gather((value, failure))
    failures = [f"rank {rank}: {said}" if world.size > 1 else said for rank, (_, said) in enumerate(answers) if said]
    if failures:
        raise UsageError(failures[0])
    return [value for value, _ in answers]


def fit(world, out_dir, model_args, device, planned, config, given, iterations_left):
    """The Plan for a run, the same split on every rank. All ranks must call it.

    planned: the device isn't here, so that steps are simulated. config: the run's keys; given: those that were
    named. Raises UsageError on every rank where nothing fits or a rank can't tell.
    """
    fitter = Fitter(
        job={
            "model_args": model_args,
            "dtype": config["dtype"],
            "device": str(device),
            "grad_clip": config["grad_clip"],
            "memory_limit_gb": config["memory_limit_gb"],
            "activation_checkpointing": config["activation_checkpointing"],
            "optimizer_state": config["optimizer_state"],
            "simulate": planned,
        },
        batch_size=config["batch_size"],
        gradient_accumulation_steps=config["gradient_accumulation_steps"],
        world_size=world.size,
        asked_compile=config["compile"],
        compile_mode=config["compile_mode"],
        compile_min_sms=config["compile_min_sms"],
        iterations_left=iterations_left,
        simulated=planned,
        may_checkpoint="activation_checkpointing" not in given,
        may_shrink=config["init_from"] == "scratch",
        advises=world.is_main,
    )
    key = {
        **({} if planned else runtime.versions(device)),
        "model": model_args,
        "ranks": world.size,
        "activation_checkpointing_is_free": fitter.may_checkpoint,
        **{name: config[name] for name in ASKED},
    }
    # Rank 0 keeps the answer and tells it, so that ranks on other machines look at the same one.
    remembered = None
    if world.is_main and not config["dry_run"]:
        remembered, why = recall(out_dir, key)
        if why:
            print(f"auto-fit: {why}")
    remembered = world.gather(remembered)[0]

    plans = agree(world, lambda: fitter.plan(remembered))
    size = min(plan.micro_batch_size for plan in plans)
    checkpointing = any(plan.activation_checkpointing for plan in plans)
    plan = replace(
        plans[world.rank],
        micro_batch_size=size,
        compile=all(plan.compile for plan in plans),
        activation_checkpointing=checkpointing,
    )
    if world.size > 1:
        sizes = ", ".join(str(plan.micro_batch_size) for plan in plans)
        print(f"auto-fit: the ranks chose batch_size {sizes}: all take {size}")
        agree(world, lambda: fitter.check(plans[world.rank], size, checkpointing))
    if world.is_main and config["dry_run"]:
        parts = simulated({**fitter.job_of(size), "activation_checkpointing": checkpointing})
        print(f"auto-fit: {where_it_goes(parts)}" if parts else "auto-fit: the simulation of where memory goes failed")
    elif world.is_main:
        remember(out_dir, key, plan)
    return plan
