"""The search for a Plan, in the training process: it runs trials, decides by their results, and prints them."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from nanofit import cards
from nanofit.autofit import search
from nanofit.autofit.plan import FAILS, UNSIMULATED, Facts, Job, Plan, as_configured, recall, remember
from nanofit.autofit.trials import Trials
from nanofit.errors import UsageError
from nanofit.progress import waiting
from nanofit.units import FITTED, GIB, amount, duration, gib, micro_batch_sizes

SHARE_OF_RUN, AT_LEAST_SECONDS = 0.02, 60.0  # how long all trials of sizes may take together
WHY = {  # why a lever is moved
    "recompute": "recompute on: not even batch_size 1 fits without it",
    "shard": "shard on: whole, not even batch_size 1 fits a rank",
}
MICRO_STEPS_OF_A_TRIAL = 7  # about: a slow trial runs five, and four more forward passes


def fit(world, device, config, given, model_args, classes, iterations_left, trials=None):
    """The Plan for a run, the same split on every rank. All ranks must call it.

    device: a torch.device; not used with config['gpu']. config: the run's keys, given: those that the user gave. With
    dry_run, steps are simulated. classes: (GPT, GPTConfig). trials: a Trials, which is closed; None for a new one.
    Raises UsageError on every rank if nothing fits, if a rank can't find out, or if steps can't be simulated.
    """
    from nanofit import machine, models  # they import torch, which takes seconds

    began, plans, limit_gb = time.monotonic(), config["dry_run"], config["memory_limit_gb"]
    card = cards.named(config["gpu"]) if config["gpu"] else None
    asked, ranks = as_configured(config), config["ranks"] if card else world.size
    of_run = {name: config[name] for name in ("dtype", "grad_clip", "optimizer", "compile_mode", "memory_limit_gb")}
    where = dict(
        device=config["device"] if card else str(device),
        ranks=ranks,
        sharers=1 if card or device.type != "cpu" else world.local_size,
    )
    job = Job(models.source_of(*classes), model_args, **where, **of_run, levers=asked.levers, simulate=plans)
    may_shard = ranks > 1 and config["optimizer_state"] == "float32"
    free = [name for name in FITTED if name not in given and (name != "shard" or may_shard)]
    of_job = asdict(replace(job, source={}))  # a moved model.py is the same model
    key = dict(machine.device_info(device) if not card else {}, job=of_job, asked=asdict(asked), free=free)
    key |= {name: config[name] for name in ("compile_min_sms", "max_iters")}
    with trials or Trials() as run_trial:
        fitter = Fitter(job, asked, free, config["compile_min_sms"], iterations_left, run_trial)
        kept, why = None, ""
        if plans:
            fitter.see(Facts.of_card(card, limit_gb) if card else Facts.here(device, limit_gb, job.sharers))
        elif world.is_main:
            kept, why = recall(config["out_dir"], key, asked, free, fitter.sizes)
        if why:
            print(f"auto-fit: {why}")
        # Rank 0 alone reads the kept answer, so that ranks on other machines get the same one.
        plan = _of_all_ranks(world, fitter, world.all_gather(kept)[0], config["init_from"])
        if plans and world.is_main:
            fitter.tell_more(plan, card, device)
    if world.is_main and not (plans or config["eval_only"]) and (why := remember(config["out_dir"], key, plan)):
        print(f"auto-fit: {why}")
    why = f": {plan.reasons[0]}" if plan.reasons else ""  # a kept answer may have none
    print(f"auto-fit: {plan}, found in {duration(time.monotonic() - began)}{why}")
    return plan


def _of_all_ranks(world, fitter, kept, init_from):
    """The Plan that fits on every rank. init_from: of the run."""
    if world.size == 1:
        return fitter.plan(kept, True, init_from)
    plans = world.agree(lambda: fitter.plan(kept, world.is_main, init_from))
    plan = smallest(plans, plans[world.rank])
    all_take, *chosen = [f"{p.micro_batch_size}{p.levers}" for p in (plan, *plans)]
    if set(chosen) != {all_take}:
        print(f"auto-fit: the ranks chose batch_size {'; '.join(chosen)}: all take {all_take}")
    return plan


def smallest(plans, own):
    """The Plan that all ranks take: the smallest size; limits and figures are this rank's own."""
    size = min(plan.micro_batch_size for plan in plans)
    moved = {name: any(getattr(plan.levers, name) for plan in plans) for name in ("recompute", "shard")}
    why = own.reasons if size == own.micro_batch_size else ("what each rank can take", *own.reasons[1:])
    compile = all(plan.compile for plan in plans)
    return replace(own, micro_batch_size=size, levers=replace(own.levers, **moved), compile=compile, reasons=tuple(why))


class Budget:
    """The time that trials may take: a share of the run's time at the speed of the last trial."""

    def __init__(self, tokens, clock):
        """tokens: that this rank still has to train. clock(): seconds."""
        self.tokens, self._clock = tokens, clock
        self.start()

    def start(self):
        self._began, self.speed = self._clock(), 0.0

    @property
    def seconds(self):
        return max(AT_LEAST_SECONDS, SHARE_OF_RUN * self.tokens / self.speed) if self.speed else math.inf

    @property
    def elapsed(self):
        return self._clock() - self._began

    def allows(self, tokens):
        """Whether there is time for a trial with micro-steps of so many tokens."""
        return not self.speed or self.elapsed + MICRO_STEPS_OF_A_TRIAL * tokens / self.speed <= self.seconds


@dataclass
class Fitter:
    """Finds the Plan for one device, by trials of a Job. plan() is the story."""

    job: Job  # of the run as configured
    asked: Plan  # the run as configured
    free: list  # names of the levers that may be chosen
    compile_min_sms: int
    iterations_left: int
    run_trial: Callable
    clock: Callable = time.monotonic

    def __post_init__(self):
        asked, self.block_size = self.asked, self.job.model_args["block_size"]
        per_rank = asked.gradient_accumulation_steps // self.job.ranks
        self.facts = None  # of the device, once they are known
        self.budget = Budget(max(1, self.iterations_left) * asked.batch_size * per_rank * self.block_size, self.clock)
        largest = max(asked.batch_size, search.TOKENS // self.block_size)
        self.sizes = [size for size in micro_batch_sizes(asked.batch_size, per_rank) if size <= largest]

    def see(self, facts):
        """Keep and print the Facts about the device, the first time that they are known."""
        if not self.facts:
            self.facts = facts
            asked = " (memory_limit_gb)" if facts.limit_bytes == int(self.job.memory_limit_gb * GIB) else ""
            simulated = ", simulated on fake tensors: nothing is measured" if self.job.simulate else ""
            print(f"auto-fit: {facts}{asked}{simulated}")

    @property
    def limit(self):
        """Bytes that training may take, and the limit of all trials; 0 until the first trial has found it."""
        return self.facts.limit_bytes if self.facts else 0

    def plan(self, kept=None, advises=False, init_from="resume"):
        """A Plan, from trials, or the kept one if a single trial confirms it.

        UsageError if nothing fits. advises: it names settings that would fit, for a run with this init_from.
        """
        if kept and (plan := self._confirm(kept)):
            return plan
        choice, reasons, trials = self._search_levers()
        if choice is None:
            raise UsageError("\n".join(self._nothing_fits(trials[-1], advises, init_from)))
        if choice.micro_batch_size < self.asked.batch_size:
            for pid, name, mib in self.facts.neighbours:
                print(f"auto-fit: {name} (pid {pid}) holds {mib:,} MiB of this GPU: more would fit without it")
        choice, use_compile, why = self._compile(choice)
        print(f"auto-fit: {why}")
        return self._plan(choice, use_compile, (*reasons, why), trials)

    def measure(self, size, levers, compile=False):
        """Run the Trial of one micro-batch size, and print its result."""
        job = replace(self.job_of(size), compile=compile, levers=levers, limit_bytes=self.limit)
        what = f"batch_size {size}{levers}{', compiled' if compile else ''}"
        with waiting(f"auto-fit: trying {what}", self.budget.seconds - self.budget.elapsed):
            trial = self.run_trial(job, self.see)
        self.budget.speed = trial.tokens_per_second or self.budget.speed
        if levers.shard:  # without other ranks' messages the speed is not the real one
            trial = replace(trial, tokens_per_second=0.0)
        if self.job.simulate and trial.peak_bytes:
            trial = replace(trial, peak_bytes=trial.peak_bytes + self.facts.process_bytes)
        print(f"auto-fit: {what}   {trial}")
        if trial.failure.startswith(UNSIMULATED):
            raise UsageError(f"auto-fit: {trial.failure}: only --auto_fit=True on {job.device} itself can tell")
        return trial

    def job_of(self, size):
        """The Job of this micro-batch size."""
        sequences = self.asked.batch_size * self.asked.gradient_accumulation_steps // self.job.ranks
        return replace(self.job, micro_batch_size=size, micro_steps=sequences // size)

    def _confirm(self, kept):
        """The kept Plan, if one trial shows that it still holds; else None, and a line says why."""
        # A sharded plan was found without a compiled trial.
        trial = self.measure(kept.micro_batch_size, kept.levers, kept.compile and not kept.levers.shard)
        if trial.fits and abs(self.limit - kept.limit_bytes) <= 0.05 * kept.limit_bytes:
            was = f" ({kept.tokens_per_second:,.0f} tok/s when it was found)" if kept.tokens_per_second else ""
            print(f"auto-fit: the answer kept beside the run holds{was}")
            return self._plan(trial, kept.compile, kept.reasons, [trial])
        why = f"was found for a limit of {gib(kept.limit_bytes)}" if trial.fits else "does not fit any more"
        print(f"auto-fit: the answer kept beside the run {why}: looking again")
        self.facts = None
        self.budget.start()
        return None

    def _search_levers(self):
        """(choice, reasons, trials): the first combination of levers that fits, in WHY's order; choice may be None."""
        ways, trials = [self.job.levers], []
        for lever in WHY:
            if lever in self.free and not getattr(self.job.levers, lever):
                ways += [replace(levers, **{lever: True}) for levers in ways]
        for levers in ways:
            found = self._search_sizes(levers)
            trials += found
            choice, why = self._choose(found)
            if choice:
                moved = [why for name, why in WHY.items() if getattr(levers, name) != getattr(self.job.levers, name)]
                for reason in moved:
                    print(f"auto-fit: {reason}")
                return choice, (why, *moved), trials
            if not self.facts:  # the device could not be used at all
                break
        return None, (), trials

    def _search_sizes(self, levers):
        """The Trials of some sizes. After two, a line tells how memory grows with the size."""
        trials, batch_size = [], self.asked.batch_size
        # Joining batches is for speed, which a simulation doesn't know.
        sizes = [s for s in self.sizes if s <= batch_size or levers.shard or not self.job.simulate]
        while len(trials) < search.MAX_TRIALS:
            tried = [t.micro_batch_size for t in trials]
            # The smallest size is tried however long it takes.
            within_time = [s for s in sizes if s in (sizes[0], *tried) or self.budget.allows(s * self.block_size)]
            size = search.next_size(within_time, trials, self.limit, batch_size)
            if size is None:
                break
            if len(trials) == 2 and all(t.peak_bytes for t in trials):
                a, k = search.line_through(trials)
                line = f"{a / GIB:.2f} + {k / GIB:.2f} x batch_size GiB"  # less at larger sizes: chunks of logits stay
                print(f"auto-fit: by these two, memory is at most {line}: {size} should fit")
            trials.append(self.measure(size, levers))
        return trials

    def _choose(self, trials):
        """(Trial or None, why). A size replaces the configured one only if it is faster in two trials."""
        choice, rival = search.choose(trials, self.asked.batch_size)
        if not choice:
            return None, ""
        size = choice.micro_batch_size
        if rival:
            levers = replace(choice.levers, loss_chunk_mb=self.job.levers.loss_chunk_mb)  # as the first time
            again, faster = (self.measure(t.micro_batch_size, levers) for t in (choice, rival))
            if search.is_faster(faster, again):
                return faster, f"{faster.tokens_per_second / again.tokens_per_second - 1:.0%} faster than {size}"
        larger = next((s for s in self.sizes if size < s <= self.asked.batch_size), None)
        return choice, search.why_no_larger(larger, trials, self.limit) if larger else "it fits as a whole"

    def _compile(self, choice):
        """(trial, whether to compile, why), at the chosen size or the next smaller one."""
        if choice.levers.shard:
            return choice, self.asked.compile, "compile: as configured, the speed of sharded ranks isn't measured"
        verdict, why = search.may_compile(self.asked.compile, self.facts, self.compile_min_sms)
        use = verdict == "yes"
        if self.job.simulate:
            if verdict == "prove":
                return choice, False, f"compile if it pays: {why}, so a trial decides when the run starts"
        elif untried := search.needs_no_trial(verdict, choice, self._seconds(choice)):
            use, why = untried[0], f"{why}, and {untried[1]}"
        elif verdict != "no":
            for size in [size for size in self.sizes if size <= choice.micro_batch_size][:-3:-1]:
                compiled = self.measure(size, choice.levers, compile=True)
                if compiled.fits or compiled.failure.startswith(FAILS):
                    break
            use, why = search.judge(verdict, why, choice, compiled, self.budget.tokens)
            choice = compiled if use else choice
        return choice, use, f"compile {'on' if use else 'off'}: {why}"

    def _seconds(self, trial):
        """How long the run takes at the speed of a Trial."""
        return self.budget.tokens / trial.tokens_per_second if trial.tokens_per_second else math.inf

    def _plan(self, trial, use_compile, reasons, trials):
        if trial.tokens_per_second and self.iterations_left > 1:
            less = ", less when compiled" if use_compile and not trial.compiled else ""
            print(f"auto-fit: {self._work()}, about {duration(self._seconds(trial))}{less}")
        return replace(
            self.asked, micro_batch_size=trial.micro_batch_size, levers=trial.levers, compile=use_compile,
            limit_bytes=self.limit, peak_bytes=trial.peak_bytes, tokens_per_second=trial.tokens_per_second,
            reasons=tuple(reasons), trials=tuple(trials),
        )  # fmt: skip

    def _work(self):
        """What is left of the run, in words."""
        return f"{self.iterations_left:,} iterations: {amount(self.budget.tokens * self.job.ranks)} tokens"

    def tell_more(self, plan, card, device):
        """Print what the parts of a plan take, and how long the run takes, on a Card or, if it is None, a device."""
        from nanofit.autofit import advice

        ranks, job = self.job.ranks, self.job_of(plan.micro_batch_size)
        ways = {"": plan.levers.shard}
        if ranks > 1:
            ways = {f"each of {ranks} ranks, whole: ": False, f"each of {ranks} ranks, sharded: ": True}
        for who, shard in ways.items():
            levers = replace(plan.levers, shard=shard)
            tried = [t for t in plan.trials if (t.micro_batch_size, t.levers) == (job.micro_batch_size, levers)]
            trial = tried[0] if tried else self.run_trial(replace(job, levers=levers))
            print(f"auto-fit: {who}{advice.where_it_goes(trial.parts) if trial.parts else trial.failure}")
        if self.iterations_left > 1:
            time = advice.time_of(replace(job, levers=plan.levers), self.budget.tokens / self.block_size, card, device)
            print(f"auto-fit: {self._work()}{time}")

    def _nothing_fits(self, trial, advises, init_from):
        """Lines about a Trial of the smallest size, and about settings that would fit."""
        facts = self.facts
        if not facts:
            return [f"auto-fit could not look at the device: {trial.failure}; python doctor.py says more"]
        limit = f"the limit is {gib(self.limit)}"
        if not trial.out_of_memory:
            return [
                f"auto-fit: the trial of batch_size 1 failed: {trial.failure}; if that is for want of memory "
                f"({limit}), set a smaller block_size or model; else start without auto_fit to see the whole error"
            ]
        need = gib(trial.peak_bytes) if trial.peak_bytes else "more than there is"
        how = trial.failure or ("simulated" if trial.parts else "measured")
        free = gib(facts.free_bytes)
        said = f"auto-fit: nothing fits: batch_size 1{trial.levers} takes {need} ({how}), {limit} of {free} free"
        if facts.process_bytes:
            said += f"; the process alone, Python and torch, takes {gib(facts.process_bytes)}"
        if facts.process_bytes >= self.limit:
            return [f"{said}: no setting helps, memory_limit_gb must be more than that"]
        if not advises:
            return [said]
        from nanofit.autofit import advice

        print("auto-fit: nothing fits: looking for settings that would, by simulation")
        levers = replace(trial.levers, recompute=trial.levers.recompute or "recompute" in self.free)
        return [said, *advice.what_would_fit(replace(self.job_of(1), levers=levers), facts, self.run_trial, init_from)]
