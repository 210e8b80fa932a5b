"""A Fitter over made-up trials: what it tries, decides and says; and the advice where nothing fits."""

from dataclasses import replace

import pytest

from model import GPT, GPTConfig
from nanofit import cards, models
from nanofit.autofit.advice import what_would_fit
from nanofit.autofit.fit import Fitter
from nanofit.autofit.plan import FAILS, OUT_OF_MEMORY, UNSIMULATED, Facts, Job, Plan, Trial
from nanofit.errors import UsageError
from nanofit.units import GIB, GPT2_SIZES, MemoryLevers

FACTS = Facts(
    name="NVIDIA GeForce RTX 3060", device_type="cuda", sm_count=28, capability=(8, 6), has_triton=True,
    total_bytes=int(11.69 * GIB), free_bytes=int(11.21 * GIB), limit_bytes=int(10.65 * GIB),
)  # fmt: skip
JOB = Job(source={}, model_args={"block_size": 1024, "n_layer": 12}, device="cuda", dtype="bfloat16", grad_clip=1.0)
RECOMPUTE = MemoryLevers(recompute=True)


class Made:
    """A Fitter whose trials are answered by answer(job), and the list of their jobs.

    answer: gives the figures of a Trial as a dict, or a failure.
    """

    def __init__(self, answer, facts=FACTS, job=JOB, steps=1, compile=False, free=("recompute",), left=1, **options):
        batch_size = options.pop("batch_size", 64)
        asked = Plan(batch_size, steps, batch_size, job.levers, compile)
        self.jobs, self.facts, self.answer = [], facts, answer
        options = dict(compile_min_sms=68, iterations_left=left, run_trial=self.run_trial, **options)
        self.fitter = Fitter(job, asked, set(free), **options)

    def run_trial(self, job, on_facts=lambda facts: None):
        self.jobs.append(job)
        if self.facts:
            on_facts(self.facts)
        got = self.answer(job)
        figures = got if isinstance(got, dict) else {"failure": got}
        limit = self.facts.limit_bytes if self.facts else 0
        return Trial(job.micro_batch_size, job.levers, job.compile, limit_bytes=limit, **figures)

    def plan(self, kept=None, advises=True, init_from="scratch"):
        return self.fitter.plan(kept, advises, init_from)


def said(capsys):
    return [line.removeprefix("auto-fit: ") for line in capsys.readouterr().out.splitlines()]


def compiling(capsys):
    """The line that says whether it compiles, and why."""
    return [line for line in said(capsys) if line.startswith("compile ")][-1]


def answer_3060(job):
    size = job.micro_batch_size
    speed, seconds = (21_000.0, 90.0) if job.compile else (26_000.0 * size / (size + 2), 0.0)
    peak = int((2.02 + 0.59 * size) * GIB)
    if job.levers.recompute:
        speed, peak = 0.75 * speed, int((2.02 + 0.1 * size) * GIB)
    if peak > 11 * GIB:
        return OUT_OF_MEMORY
    return dict(peak_bytes=peak, tokens_per_second=speed, compile_seconds=seconds)


def test_what_the_user_of_a_3060_reads(capsys):
    made = Made(answer_3060, compile=True, left=20_001)
    plan = made.plan()
    device, _, _, line, eight, *_, compiles, time = said(capsys)
    assert device.startswith("NVIDIA GeForce RTX 3060, 28 SMs, 11.69 GiB, 11.21 GiB free")
    assert line == "by these two, memory is at most 2.02 + 0.59 x batch_size GiB: 8 should fit"
    assert eight == "batch_size 8   peak 6.74 GiB   20,800 tok/s   fits"
    assert compiles.endswith("compiling takes 1.5 min and saves 10.0 min of 17.5 h")
    assert time == "20,001 iterations: 1.3 billion tokens, about 17.3 h"
    assert str(plan) == "batch_size 64 -> 8, gradient_accumulation_steps 1 -> 8, effective batch 64"
    assert (plan.compile, plan.levers, plan.limit_bytes) == (True, MemoryLevers(), FACTS.limit_bytes)
    assert plan.reasons == ("the largest that fits, as 16 would take 11.5 of 10.6 GiB", compiles)
    assert {job.limit_bytes for job in made.jobs[1:]} == {FACTS.limit_bytes}, "all trials are held to one limit"
    assert [job.micro_steps for job in made.jobs] == [64, 32, 8, 8]


def steady(*factors):
    """Trials of a roomy device, all alike fast, but for factors on the speed of one size: its first trial's, ..."""
    size, *factors = factors
    left = iter(factors)

    def answer(job):
        faster = next(left, 1.0) if job.micro_batch_size == size else 1.0
        return dict(peak_bytes=GIB, tokens_per_second=1e5 * faster)

    return answer


@pytest.mark.parametrize(
    ("size", "factors", "chosen", "why"),
    [
        (2, (1.09,), 12, "it fits as a whole"),
        (2, (1.2, 1.0), 12, "it fits as a whole"),  # the first time it was noise
        (2, (1.2, 1.15), 2, "15% faster than 12"),
    ],
)
def test_the_configured_batch_stays_unless_another_is_faster_twice(size, factors, chosen, why):
    made = Made(steady(size, *factors), batch_size=12, steps=40)
    plan = made.plan()
    assert (plan.micro_batch_size, plan.reasons[0]) == (chosen, why)
    tried = [job.micro_batch_size for job in made.jobs]
    assert tried == [1, 2, 12] + ([12, 2] if factors[0] > 1.1 else []), "in turns"


@pytest.mark.parametrize(("gain", "chosen"), [(1.2, 60), (1.05, 12)])
def test_batches_are_joined_where_that_is_faster_and_no_further(gain, chosen):
    def answer(job):
        speed = 1e5 * job.micro_batch_size / (job.micro_batch_size + 4)
        return dict(peak_bytes=GIB, tokens_per_second=7.5e4 * gain if job.micro_batch_size > 12 else speed)

    made = Made(answer, batch_size=12, steps=40)
    assert made.plan().micro_batch_size == chosen
    assert max(job.micro_batch_size for job in made.jobs) == 60, "96 x 1,024 tokens gain nothing more"


@pytest.mark.parametrize(
    ("sms", "left", "limit_gib", "compiled", "says"),
    [
        (132, 10, 10.65, [], "compile on: 132 SMs, compile_min_sms=68, and not tried, as the run takes 32 s without"),
        (132, 10, 7.0, [8], "compile on: 132 SMs, compile_min_sms=68"),  # the eager peak is 6.74 GiB
        (132, 20_000, 10.65, [8], "compile on: 132 SMs, compile_min_sms=68"),
        (28, 10, 10.65, [], "compile off: 28 SMs are fewer than compile_min_sms=68, and the run takes 32 s without"),
    ],
)
def test_compiling_is_tried_where_it_is_in_doubt(sms, left, limit_gib, compiled, says, capsys):
    made = Made(answer_3060, replace(FACTS, sm_count=sms, limit_bytes=int(limit_gib * GIB)), compile=True, left=left)
    assert made.plan().compile == (sms > 68)
    assert [job.micro_batch_size for job in made.jobs if job.compile] == compiled
    assert compiling(capsys).startswith(says)


@pytest.mark.parametrize(
    ("trouble", "tried", "chosen", "says"),
    [
        (lambda job: f"{FAILS} (X: no)", [8], (8, False), "compile off: the compiled trial failed: fails to compile"),
        (lambda job: dict(answer_3060(job), peak_bytes=11 * GIB), [8, 4], (8, False), "it does not fit"),
        (lambda job: OUT_OF_MEMORY if job.micro_batch_size == 8 else answer_3060(job), [8, 4], (4, True), "132 SMs"),
        (
            lambda job: OUT_OF_MEMORY if job.micro_batch_size == 8 else {**answer_3060(job), "tokens_per_second": 2e4},
            [8, 4], (8, False), "compile off: compiled, batch_size 8 does not run, and a smaller one is slower",
        ),
    ],
)  # fmt: skip
def test_what_does_not_compile_or_fit_compiled_is_trained_smaller_or_eager(trouble, tried, chosen, says, capsys):
    made = Made(lambda job: trouble(job) if job.compile else answer_3060(job), replace(FACTS, sm_count=132),
                compile=True, left=20_000)  # fmt: skip
    plan = made.plan()
    assert [job.micro_batch_size for job in made.jobs if job.compile] == tried
    assert (plan.micro_batch_size, plan.compile) == chosen
    assert says in compiling(capsys)


def timed(seconds, **changes):
    """Made of trials that take so many seconds each, by a clock of its own."""
    now = [0.0]

    def answer(job):
        now[0] += seconds
        return answer_3060(job)

    return Made(answer, clock=lambda: now[0], **changes)


def test_trials_take_a_minute_or_two_percent_of_the_run():
    made = timed(31.0)
    plan = made.plan()
    assert plan.micro_batch_size == 2
    assert plan.reasons[0] == "the largest that was tried and fits, as trials take 2% of the run at most, or a minute"
    made = timed(31.0, left=10_000)  # 21 h at the first trial's speed
    assert made.plan().micro_batch_size == 8


def test_a_trial_in_distress_or_that_ends_badly_counts_as_too_large(capsys):
    made = Made(lambda job: {**answer_3060(job), "retries": 3 if job.micro_batch_size > 2 else 0})
    assert made.plan().micro_batch_size == 2
    assert any(line.endswith("does not fit (the allocator ran short 3 times)") for line in said(capsys))
    made = Made(lambda job: "the probe was killed by signal 9" if job.micro_batch_size == 8 else answer_3060(job))
    assert made.plan().micro_batch_size == 4


# ---- levers ------------------------------------------------------------------------------------------------


def needs(shares, per_sequence=0.3):
    """An answer of trials whose memory is the sum of shares, in GiB, and of activations without recompute."""

    def answer(job):
        parts = {**shares, "activations": 0.0 if job.levers.recompute else per_sequence}
        if job.levers.optimizer_state != "float32":
            parts["optimizer state"] = 0.0
        scale = job.model_args["block_size"] / 1024 * job.model_args["n_layer"] / 12
        parts["loss and backward"] = shares["loss and backward"] * scale
        if job.simulate:
            return dict(peak_bytes=1, parts={name: int(n * GIB) for name, n in parts.items()})
        peak = int(sum(parts.values()) * GIB) * job.micro_batch_size
        return dict(peak_bytes=peak, tokens_per_second=1e3)

    return answer


SHARES = {"weights": 0.5, "gradients": 0.5, "optimizer state": 0.9, "loss and backward": 0.8}


def test_what_fits_only_with_recompute_is_trained_with_it():
    plan = Made(needs(SHARES), replace(FACTS, limit_bytes=int(2.8 * GIB))).plan()
    assert (plan.micro_batch_size, plan.levers) == (1, RECOMPUTE)
    assert plan.reasons[1] == "recompute on: not even batch_size 1 fits without it"


def test_what_the_user_says_about_levers_stands():
    made = Made(needs(SHARES), replace(FACTS, limit_bytes=int(2.8 * GIB)), free=())
    with pytest.raises(UsageError, match="nothing fits: batch_size 1 takes 3.00 GiB"):
        made.plan(advises=False)
    assert not any(job.levers.recompute for job in made.jobs)
    asked = MemoryLevers(recompute=True, optimizer_state="offload", loss_chunk_mb=5)
    made = Made(answer_3060, job=replace(JOB, levers=asked))
    assert made.plan().levers == asked
    assert {job.levers for job in made.jobs} == {asked}


def answer_of_ranks(job):
    """A model that fits four ranks of 12 GB together."""
    if not job.levers.shard:
        return OUT_OF_MEMORY
    assert job.ranks == 4
    return dict(peak_bytes=int((12 if not job.levers.recompute else 7 + job.micro_batch_size) * GIB))


FOUR = dict(job=replace(JOB, ranks=4), steps=4, free=("recompute", "shard"))


def test_ranks_share_a_model_out_where_it_does_not_fit_one():
    made = Made(answer_of_ranks, **FOUR, compile=True)
    plan = made.plan()
    assert (plan.micro_batch_size, plan.levers) == (2, MemoryLevers(recompute=True, shard=True))
    assert plan.compile, "as asked: its gain can't be measured"
    assert "shard on: whole, not even batch_size 1 fits a rank" in plan.reasons
    assert [job.levers.shard for job in made.jobs] == [False, False, True, True, True]
    made = Made(answer_3060, **FOUR)
    assert not made.plan().levers.shard
    assert not any(job.levers.shard for job in made.jobs), "where it fits, a model stays whole"


# ---- where nothing fits ------------------------------------------------------------------------------------


def test_nothing_fits_is_an_error_with_numbers_and_with_what_would_fit():
    made = Made(needs(SHARES), replace(FACTS, limit_bytes=int(2.3 * GIB)))
    with pytest.raises(UsageError) as error:
        made.plan()
    first, parts, *options = str(error.value).splitlines()
    assert "batch_size 1, recompute takes 2.70 GiB (measured), the limit is 2.30 GiB of 11.21 GiB free" in first
    assert parts.startswith("of 2.70 GiB (simulated): weights 0.50, gradients 0.50, optimizer state 0.90, ")
    assert options[1:] == ["  --optimizer_state=8bit", "  --optimizer_state=offload", "  --block_size=256"]
    assert all(job.simulate and job.levers.recompute for job in made.jobs[2:]), "what is proposed was simulated"


def advice(gib, process_gib=0.0, device_type="cuda", init_from="resume", n_layer=12, **levers):
    """What is proposed to a recomputing job of 1.8 GiB and 0.9 of state in float32, for a device of so many GiB.

    With other n_layer, weights, gradients and state are as many times more or less.
    """
    levers = MemoryLevers(recompute=True, **levers)
    job = replace(JOB, levers=levers, model_args={"block_size": 1024, "n_layer": n_layer})
    facts = Facts("x", device_type, limit_bytes=int(gib * GIB), process_bytes=int(process_gib * GIB))

    def answer(job):
        sizes = job.model_args["n_layer"] / 12
        return needs({**{name: n * sizes for name, n in SHARES.items()}, "loss and backward": 0.8 / sizes})(job)

    made = Made(answer)
    first, *lines = what_would_fit(job, facts, made.run_trial, init_from)
    assert first.startswith("of ")
    assert len(made.jobs) <= 7, "each takes seconds"
    return [line.removeprefix("  ") for line in lines if not line.endswith(" would fit, with batch_size 1:")]


EIGHT = 1.8 + 0.9 * 65 / 256  # GiB with the state in 8 bits


def test_advice_leaves_room_for_fragments_and_for_the_process():
    assert advice(1.04 * EIGHT)[:2] == ["--optimizer_state=8bit", "--optimizer_state=offload"]
    assert advice(1.02 * EIGHT)[0] == "--optimizer_state=offload"
    assert advice(1.04 * EIGHT + 0.5, process_gib=0.5)[:2] == advice(1.04 * EIGHT)[:2]
    assert advice(1.04 * EIGHT + 0.5, process_gib=0.6)[0] == "--optimizer_state=offload"
    [refused] = advice(1.02)
    assert refused.startswith("none of these would fit either: --optimizer_state=8bit, --optimizer_state=offload, --b")


def test_advice_leaves_out_what_is_set_already_and_what_frees_nothing():
    assert advice(1.04 * 1.8, optimizer_state="8bit") == ["--optimizer_state=offload", "--block_size=512"]
    assert advice(1.04 * 1.8, shard=True)[0].startswith("none of these"), "the state of shares is not to be chosen"
    assert "offload" not in str(advice(1.04 * EIGHT, device_type="cpu")), "offloading stays in its memory"


def test_advice_combines_the_state_with_the_largest_model_and_with_the_longest_block():
    assert advice(1.04 * 1.4) == ["--block_size=512 --optimizer_state=offload"]
    larger_first = advice(4.7, n_layer=48, init_from="scratch")[-1]
    assert larger_first == "--n_layer=36 --n_head=20 --n_embd=1280 --optimizer_state=8bit"
    assert advice(4.7, n_layer=48, init_from="gpt2-xl")[-1] == "--init_from=gpt2-large --optimizer_state=8bit"


@pytest.mark.parametrize(
    ("failure", "changes", "says"),
    [
        (None, dict(facts=replace(FACTS, limit_bytes=1, process_bytes=GIB // 5)), "Python and torch, takes 0.20 GiB"),
        ("the probe gave no answer (ValueError: a bug)", {}, "the trial of batch_size 1 failed: the probe .*a bug"),
        ("the probe gave no answer (no driver)", dict(facts=None), "could not look at the device: .*no driver"),
        (f"{UNSIMULATED} (X: no)", dict(job=replace(JOB, simulate=True)), "this model can't be simulated .X: no."),
    ],
    ids=["the process alone", "a mistake", "no device", "not simulated"],
)  # fmt: skip
def test_what_is_no_want_of_memory_for_the_model_gets_no_advice(failure, changes, says):
    made = Made(needs(SHARES) if failure is None else lambda job: failure, **changes)
    with pytest.raises(UsageError, match=says):
        made.plan()
    assert not any(job.simulate for job in made.jobs[1:])


# ---- an earlier answer -------------------------------------------------------------------------------------


def kept(micro_batch_size, limit_bytes=FACTS.limit_bytes, **changes):
    return Plan(64, 1, micro_batch_size, limit_bytes=limit_bytes, reasons=("because",), **changes)


def test_one_trial_confirms_a_kept_answer_and_times_it_again(capsys):
    made = Made(answer_3060)
    plan = made.plan(kept(4, levers=RECOMPUTE, compile=True, tokens_per_second=20_900.0))
    assert (plan.micro_batch_size, plan.levers, plan.compile) == (4, RECOMPUTE, True)
    assert (plan.reasons, plan.tokens_per_second) == (("because",), 15_750.0)
    assert [(job.micro_batch_size, job.levers, job.compile) for job in made.jobs] == [(4, RECOMPUTE, True)]
    assert said(capsys)[-1] == "the answer kept beside the run holds (20,900 tok/s when it was found)"


@pytest.mark.parametrize(
    ("answer", "says"),
    [(kept(32), "does not fit any more"), (kept(2, limit_bytes=4 * GIB), "was found for a limit of 4.00 GiB")],
)
def test_a_kept_answer_that_does_not_hold_is_looked_for_again(answer, says, capsys):
    assert Made(answer_3060).plan(answer).micro_batch_size == 8
    assert any(says in line and line.endswith(": looking again") for line in said(capsys))


SIZES = dict(GPT2_SIZES["gpt2"], block_size=1024, vocab_size=50304, dropout=0.0, bias=False)


@pytest.mark.parametrize(
    ("gpu", "facts", "compiles", "time"),
    [
        ("RTX 3060", "RTX 3060, 28 SMs, 12.00 GiB, 11.50 GiB", "compile if it pays: 28 SMs", "1.0 days to 1.4 days"),
        ("H100", "H100, 132 SMs, 79.60 GiB", "compile on: 132 SMs", "37.8 min to 53.9 min"),
        ("12GB", "a card, 12.00 GiB, 11.50 GiB free", "compile if it pays: how many", "isn't known without a card's"),
    ],
)  # fmt: skip
def test_a_plan_by_a_cards_name_tells_memory_compiling_and_time(capsys, gpu, facts, compiles, time):
    card, job = cards.named(gpu), replace(JOB, simulate=True, source=models.source_of(GPT, GPTConfig), model_args=SIZES)
    answer = dict(peak_bytes=GIB, parts={"weights": GIB})
    made = Made(lambda job: answer, Facts.of_card(card), job, compile=True, left=20_001)
    made.fitter.tell_more(made.plan(), card, None)
    told = said(capsys)
    assert told[0].startswith(facts)
    assert any(line.startswith(compiles) for line in told), told
    assert told[-1].startswith("20,001 iterations: 1.3 billion tokens")
    assert time in told[-1]
