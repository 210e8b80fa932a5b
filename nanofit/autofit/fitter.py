"""Auto-fit for one device: which trials to run, what they mean, and what is said of them."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from nanofit.autofit.advice import nothing_fits, what_would_fit
from nanofit.autofit.compiling import judge, may_compile, too_short
from nanofit.autofit.plan import FAILS, Facts, Job, Plan
from nanofit.autofit.search import MAX_TRIALS, NEAR_ENOUGH, line_through, next_size, search, size_to_try_recomputed
from nanofit.autofit.trial import run_trial
from nanofit.errors import UsageError
from nanofit.progress import waiting
from nanofit.units import GIB, LIKES_SMALL_CHUNKS, duration, gib, micro_batch_sizes

SHARE_OF_RUN, AT_LEAST_SECONDS = 0.02, 60.0  # what trials of sizes may take together
MICRO_STEPS_OF_A_TRIAL = 7  # about: a brief one runs five, and the forward pass of four more


@dataclass
class Fitter:
    """Finds the Plan for one device, by trials of a Job.

    plan() is the story; what it calls follows in that order, then what time there is, then what is said.
    """

    job: Job  # of the run as configured
    batch_size: int
    gradient_accumulation_steps: int
    world_size: int = 1
    asked_compile: bool = False
    compile_min_sms: int = 68
    iterations_left: int = 1
    may_recompute: bool = True  # recompute is ours to choose
    may_shard: bool = False  # shard is
    may_gather_once: bool = False  # gather_once is
    may_shrink: bool = True  # the model's size is free to be proposed smaller
    advises: bool = True  # where nothing fits, look for what would
    say: Callable = print
    run_trial: Callable = run_trial
    clock: Callable = time.monotonic  # seconds
    facts: Facts | None = field(default=None, init=False)
    budget_seconds: float = field(default=math.inf, init=False)  # known with the first speed
    _speed: float = field(default=0.0, init=False)  # tokens per second of the last trial that told it

    def __post_init__(self):
        self._began = self.clock()
        self._sizes = micro_batch_sizes(self.batch_size, self.gradient_accumulation_steps // self.world_size)

    def plan(self, remembered=None):
        """A Plan, from trials or from an earlier one that a single trial confirms. UsageError where nothing fits."""
        if remembered and (plan := self._confirm(remembered)):
            return plan
        choice, trials, why = self._search_ranks()
        if choice is None:
            raise UsageError(self._advice(trials[-1]))  # with recompute, where that was tried
        choice, gather_why = self._gathered_once(choice)
        choice = self._in_one_chunk(choice)
        choice, use_compile, compile_why = self._compile(choice)
        if choice.micro_batch_size < self.batch_size:
            for pid, name, mib in self.facts.neighbours:
                self.say(f"auto-fit: {name} (pid {pid}) holds {mib:,} MiB of this GPU: more would fit without it")
        return self._plan(choice, use_compile, (*why, *gather_why, compile_why), trials)

    def check(self, plan, size, levers):
        """Make sure that a size which other ranks chose fits here too; UsageError where it doesn't."""
        wanted = size, levers.recompute, levers.shard
        fitting = {(t.micro_batch_size, t.levers.recompute, t.levers.shard) for t in plan.trials if t.fits}
        if wanted not in fitting and not self.measure(size, levers=levers).fits:
            raise UsageError(f"batch_size {size}, which another rank chose, does not fit here")

    def measure(self, size, compile=False, levers=None, note=""):
        """Try one micro-batch size; says how it went. levers: None for those of the job. note: what they don't tell."""
        levers, brief = levers or self.job.levers, self._elapsed() > self.budget_seconds / 2
        job = replace(self.job_of(size), compile=compile, levers=levers, limit_bytes=self.limit, brief=brief)
        what = f"batch_size {size}{levers}{note}{', compiled' if compile else ''}"
        with waiting(f"auto-fit: trying {what}", self.budget_seconds - self._elapsed()):
            trial = self.run_trial(job, self._on_facts)
        self._speed = trial.tokens_per_second or self._speed
        if levers.shard:  # without other ranks' messages that is too fast to be told or compared
            trial = replace(trial, tokens_per_second=0.0)
        if self._speed and self.budget_seconds == math.inf:
            self.budget_seconds = max(AT_LEAST_SECONDS, SHARE_OF_RUN * self._tokens_left() / self._speed)
        self.say(f"auto-fit: {what}   {trial}")
        return trial

    def job_of(self, size):
        """The Job of this micro-batch size."""
        micro_steps = self.gradient_accumulation_steps * self.batch_size // size // self.world_size
        return replace(self.job, micro_batch_size=size, micro_steps=micro_steps, ranks=self.world_size)

    @property
    def limit(self):
        """Bytes that training may take; 0 before the first trial has found out. All others are held to the same."""
        return self.facts.limit_bytes if self.facts else 0

    def _confirm(self, kept):
        """A Plan as the kept one, if one trial shows that it still holds; else None, with a sentence."""
        compile = kept.compile and not kept.levers.shard  # sharded, it wasn't tried either
        trial = self.measure(kept.micro_batch_size, compile=compile, levers=kept.levers)
        if not trial.fits:
            self.say("auto-fit: the answer kept beside the run does not fit any more: looking again")
        elif abs(self.limit - kept.limit_bytes) > 0.05 * kept.limit_bytes:
            self.say(f"auto-fit: the limit was {gib(kept.limit_bytes)} and is {gib(self.limit)}: looking again")
        else:
            self.say("auto-fit: the answer kept beside the run holds")
            return self._plan(trial, kept.compile, kept.reasons, [trial])
        self.facts = None
        return None

    def _search_ranks(self):
        """(choice, trials, reasons): each rank with the whole model, and with a share where that doesn't fit."""
        choice, trials, reasons = self._search(self.job.levers)
        if not self.may_shard or self.world_size == 1 or self.job.levers.shard or not self.facts:
            return choice, trials, reasons
        why = "shard off: the whole model fits each rank, and need not be gathered in every micro-step"
        if choice is None:
            choice, more, reasons = self._search(replace(self.job.levers, shard=True))
            trials, why = [*trials, *more], "shard on: whole, not even batch_size 1 fits a rank"
        if choice:
            self.say(f"auto-fit: {why}")
        return choice, trials, (*reasons, why)

    def _search(self, levers):
        """(choice, trials, reasons): without recompute, and with it where that helps."""
        choice, trials = self._search_sizes(levers)
        if levers.recompute or not self.may_recompute or not self.facts:  # there was no device to look at
            return choice, trials, ()
        recompute = replace(levers, recompute=True)
        if choice is None:
            choice, more = self._search_sizes(recompute)
            why = "recompute on: not even batch_size 1 fits without it"
        else:
            size = size_to_try_recomputed(self._sizes, trials)
            if size is None or not self._affordable(size):
                return choice, trials, ()
            tried = self.measure(size, levers=recompute)
            more, why = [tried], "recompute off: what fits without it is faster"
            if tried.fits and tried.tokens_per_second * NEAR_ENOUGH > choice.tokens_per_second:
                choice, why = tried, "recompute on: larger micro-batches make up for computing activations twice"
        if choice:
            self.say(f"auto-fit: {why}")
        return choice, [*trials, *more], (why,)

    def _search_sizes(self, levers):
        """search(), and a word about the line once two trials have shown it."""
        trials = []

        def following():
            return next_size(self._sizes, trials, self.limit, self.batch_size)

        def measure(size):
            trials.append(self.measure(size, levers=levers))
            if len(trials) == 2 and all(t.peak_bytes for t in trials):
                a, k = line_through(trials)
                larger = following()
                hope = f": {larger} should fit" if larger and larger > size else ""
                self.say(f"auto-fit: memory is {a / GIB:.2f} + {k / GIB:.2f} x batch_size GiB{hope}")
            return trials[-1]

        found = search(self._sizes, lambda: self.limit, measure, self._affordable, self.batch_size)
        if len(trials) < MAX_TRIALS and following():
            self.say(
                f"auto-fit: no more sizes are tried: trials have taken {duration(self._elapsed())}, and may take "
                f"{duration(self.budget_seconds)} (2% of the run, at least a minute)"
            )
        return found

    def _gathered_once(self, choice):
        """(choice, reasons): a sharded one with its weights gathered once an iteration, where that fits."""
        size, levers = choice.micro_batch_size, choice.levers
        if not levers.shard or levers.gather_once or not self.may_gather_once:
            return choice, ()
        why = "gather_once off: there is no time left to try it"
        if self._affordable(size):
            tried = self.measure(size, levers=replace(levers, gather_once=True))
            why = f"gather_once {'on: it fits' if tried.fits else 'off: it does not fit'}"
            choice = tried if tried.fits else choice
        self.say(f"auto-fit: {why}")
        return choice, (why,)

    def _in_one_chunk(self, choice):
        """The choice with its logits in one chunk, where that is ours to say, fits, and isn't slower."""
        args, size = self.job.model_args, choice.micro_batch_size
        logits_bytes = 4 * size * args["block_size"] * args.get("vocab_size", 0)
        more = logits_bytes - choice.levers.loss_chunk_mb * 2**20
        may_try = 0 < more <= self.limit - choice.peak_bytes and choice.tokens_per_second and self._affordable(size)
        if self.job.levers.loss_chunk_mb or self.facts.device_type in LIKES_SMALL_CHUNKS or not may_try:
            return choice
        levers = replace(choice.levers, loss_chunk_mb=math.ceil(logits_bytes / 2**20))
        tried = self.measure(size, levers=levers, note=", all logits in one chunk")
        return tried if tried.fits and tried.tokens_per_second > choice.tokens_per_second else choice

    def _compile(self, choice):
        """(trial, use, why) for torch.compile at the chosen size or the next smaller one, tried there if it may pay."""
        if self.job.simulate:
            return choice, False, "compile: decided on the device itself"
        if choice.levers.shard:
            why = "compile: as configured, because the speed of sharded ranks isn't measured"
            return choice, self.asked_compile, why
        facts, use = self.facts, False
        verdict, why = may_compile(
            asked=self.asked_compile, device_type=facts.device_type, capability=facts.capability,
            sm_count=facts.sm_count, min_sms=self.compile_min_sms, has_triton=facts.has_triton, platform=sys.platform,
        )  # fmt: skip
        if verdict == "prove" and (short := too_short(choice, self._tokens_left())):
            verdict, why = "no", f"{why}, and {short}"
        if verdict != "no":
            compiled = self._compiled_trial(choice)
            use, why = judge(verdict, why, choice, compiled, self._tokens_left())
        decision = f"compile {'on' if use else 'off'}: {why}"
        self.say(f"auto-fit: {decision}")
        return (compiled if use else choice), use, decision

    def _compiled_trial(self, choice):
        """A compiled trial of the chosen size; of the next smaller one, if that doesn't fit or takes too long."""
        sizes = [size for size in self._sizes if size <= choice.micro_batch_size]
        for size in sizes[:-3:-1]:
            compiled = self.measure(size, compile=True, levers=choice.levers)
            if compiled.fits or compiled.failure.startswith(FAILS):
                break
        return compiled

    def _plan(self, trial, use_compile, reasons, trials):
        return Plan(
            self.batch_size, self.gradient_accumulation_steps, trial.micro_batch_size, trial.levers, use_compile,
            limit_bytes=self.limit, peak_bytes=trial.peak_bytes, reasons=tuple(reasons), trials=tuple(trials),
        )  # fmt: skip

    def _elapsed(self):
        return self.clock() - self._began

    def _affordable(self, size):
        """Whether there is time left to try this size."""
        if not self._speed:
            return True
        seconds = MICRO_STEPS_OF_A_TRIAL * size * self.job.model_args["block_size"] / self._speed
        return self._elapsed() + seconds <= self.budget_seconds

    def _tokens_left(self):
        """Tokens that this rank has still to train."""
        sequences = self.batch_size * self.gradient_accumulation_steps // self.world_size
        return max(1, self.iterations_left) * sequences * self.job.model_args["block_size"]

    def _on_facts(self, facts):
        if self.facts:
            return
        self.facts = facts
        limits = self.job.memory_limit_gb and not self.job.simulate  # of a planned card it is the size, not a limit
        asked = " (memory_limit_gb)" if limits and facts.limit_bytes == int(self.job.memory_limit_gb * GIB) else ""
        simulated = ", simulated on fake tensors: nothing is measured" if self.job.simulate else ""
        self.say(f"auto-fit: {facts}{asked}{simulated}")

    def _advice(self, smallest):
        """Why nothing fits, not even this Trial, and what would."""
        sentence, may_help = nothing_fits(smallest, self.facts)
        if not may_help or not self.advises:
            return sentence
        self.say("auto-fit: nothing fits: looking for settings that would, by simulation")
        levers = replace(smallest.levers, recompute=smallest.levers.recompute or self.may_recompute)
        job = replace(self.job_of(1), levers=levers)
        proposals = what_would_fit(job, self.facts, self.run_trial, self.may_shrink, smallest.peak_bytes)
        return "\n".join([sentence, *proposals])
