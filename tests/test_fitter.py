"""A Fitter over made-up trials: what it tries, decides and says; and the advice where nothing fits."""

from dataclasses import replace

import pytest

from nanofit.autofit.advice import what_would_fit
from nanofit.autofit.fitter import Fitter
from nanofit.autofit.plan import FAILS, OUT_OF_MEMORY, Facts, Job, Plan, Trial
from nanofit.errors import UsageError
from nanofit.units import GIB, MemoryLevers

FACTS = Facts(
    name="NVIDIA GeForce RTX 3060", device_type="cuda", sm_count=28, capability=(8, 6), has_triton=True,
    total_bytes=int(11.69 * GIB), free_bytes=int(11.21 * GIB), limit_bytes=int(10.65 * GIB),
)  # fmt: skip
JOB = Job(
    model_file="model.py", model_args={"block_size": 1024, "n_layer": 12}, device="cuda", dtype="bfloat16",
    grad_clip=1.0,
)  # fmt: skip
RECOMPUTE = MemoryLevers(recompute=True)


def fitter(answer, facts=FACTS, job=JOB, chunk_mb=0, **changes):
    """A Fitter whose trials are answered by answer(job), and lists of the lines that it says and of the jobs.

    answer: gives the figures of a Trial as a dict, or a failure. chunk_mb: what an open loss_chunk_mb is settled as.
    """
    said, jobs = [], []

    def run_trial(job, on_facts=lambda facts: None):
        jobs.append(job)
        if facts:
            on_facts(facts)
        got = answer(job)
        figures = got if isinstance(got, dict) else {"failure": got}
        limit = facts.limit_bytes if facts else 0
        levers = replace(job.levers, loss_chunk_mb=job.levers.loss_chunk_mb or chunk_mb)
        return Trial(job.micro_batch_size, levers, job.compile, limit_bytes=limit, **figures)

    options = dict(batch_size=64, gradient_accumulation_steps=1, run_trial=run_trial, say=said.append)
    return Fitter(job=job, **{**options, **changes}), said, jobs


def answer_3060(job):
    size = job.micro_batch_size
    speed, seconds = (21_000.0, 90.0) if job.compile else (26_000.0 * size / (size + 2), 0.0)
    peak = int((2.02 + 0.59 * size) * GIB)
    if job.levers.recompute:
        speed, peak = 0.75 * speed, int((2.02 + 0.1 * size) * GIB)
    if peak > 11 * GIB:
        return OUT_OF_MEMORY
    return dict(peak_bytes=peak, tokens_per_second=speed, compile_seconds=seconds)


def test_what_the_user_of_a_3060_reads():
    made, said, jobs = fitter(answer_3060, asked_compile=True, iterations_left=20_000)
    plan = made.plan()
    assert said == [
        "auto-fit: NVIDIA GeForce RTX 3060, 28 SMs, 11.69 GiB, 11.21 GiB free, limit 10.65 GiB",
        "auto-fit: batch_size 1   peak 2.61 GiB   8,667 tok/s   fits",
        "auto-fit: batch_size 2   peak 3.20 GiB   13,000 tok/s   fits",
        "auto-fit: memory is 2.02 + 0.59 x batch_size GiB: 8 should fit",
        "auto-fit: batch_size 8   peak 6.74 GiB   20,800 tok/s   fits",
        "auto-fit: batch_size 32, recompute   peak 5.22 GiB   18,353 tok/s   fits",
        "auto-fit: recompute off: what fits without it is faster",
        "auto-fit: batch_size 8, compiled   peak 6.74 GiB   21,000 tok/s   fits",
        "auto-fit: compile on: 28 SMs are fewer than compile_min_sms=68, and compiling takes 1.5 min and saves "
        "10.0 min of 17.5 h",
    ]
    assert str(plan) == "batch_size 64 -> 8, gradient_accumulation_steps 1 -> 8, effective batch 64"
    assert plan.compile
    assert plan.levers == MemoryLevers()
    assert plan.limit_bytes == FACTS.limit_bytes
    assert plan.reasons == tuple(line.removeprefix("auto-fit: ") for line in (said[6], said[8]))
    assert {job.limit_bytes for job in jobs[1:]} == {FACTS.limit_bytes}, "all trials are held to one limit"
    assert [job.micro_steps for job in jobs] == [64, 32, 8, 2, 8]


def test_a_ranks_trials_take_its_share_of_the_micro_steps():
    made, _, jobs = fitter(answer_3060, gradient_accumulation_steps=4, world_size=2)
    plan = made.plan()
    assert all(job.micro_steps * job.micro_batch_size == 2 * 64 for job in jobs)
    assert plan.accumulation * plan.micro_batch_size == 4 * 64, "a plan is of all ranks"


def test_a_short_run_does_not_even_try_to_compile():
    made, said, jobs = fitter(answer_3060, asked_compile=True, iterations_left=10)
    assert not made.plan().compile
    assert not any(job.compile for job in jobs)
    assert "and the run takes 32 s without" in said[-1]


def test_a_compiled_model_that_does_not_fit_or_fails_stays_eager():
    def answer(job):
        return "fails to compile (X: no)" if job.compile else answer_3060(job)

    made, said, _ = fitter(answer, replace(FACTS, sm_count=132), asked_compile=True)
    assert not made.plan().compile
    assert said[-1] == "auto-fit: compile off: the compiled trial failed: fails to compile (X: no)"

    def larger(job):
        return dict(answer_3060(job), peak_bytes=11 * GIB) if job.compile else answer_3060(job)

    made, said, _ = fitter(larger, replace(FACTS, sm_count=132), asked_compile=True)
    assert not made.plan().compile
    assert said[-1] == "auto-fit: compile off: the compiled trial failed: it does not fit"


@pytest.mark.parametrize("trouble", [OUT_OF_MEMORY, "the probe took longer than 1800 s"])
def test_where_compiling_takes_too_much_the_next_smaller_size_is_tried(trouble):
    def answer(job):
        return trouble if job.compile and job.micro_batch_size == 8 else answer_3060(job)

    made, said, _ = fitter(answer, replace(FACTS, sm_count=132), asked_compile=True)
    plan = made.plan()
    assert (plan.micro_batch_size, plan.compile) == (4, True)
    assert said[-3] == f"auto-fit: batch_size 8, compiled   {trouble}   does not fit"
    assert said[-2].startswith("auto-fit: batch_size 4, compiled   peak 4.38 GiB   21,000 tok/s   fits")

    def slow(job):
        got = answer(job)
        return {**got, "tokens_per_second": 20_000.0} if job.compile and isinstance(got, dict) else got

    made, said, _ = fitter(slow, replace(FACTS, sm_count=132), asked_compile=True)
    plan = made.plan()
    assert (plan.micro_batch_size, plan.compile) == (8, False)
    assert said[-1] == "auto-fit: compile off: compiled, batch_size 8 does not run, and a smaller one is slower"


def test_what_fails_to_compile_is_not_tried_again():
    def answer(job):
        return f"{FAILS} (X: no)" if job.compile else answer_3060(job)

    made, _, jobs = fitter(answer, replace(FACTS, sm_count=132), asked_compile=True)
    made.plan()
    assert [job.micro_batch_size for job in jobs if job.compile] == [8]


# ---- time --------------------------------------------------------------------------------------------------


def timed(seconds_of, **changes):
    """A Fitter whose trials take seconds_of(job) each, by a clock of its own."""
    now = [0.0]

    def answer(job):
        now[0] += seconds_of(job)
        return answer_3060(job)

    return fitter(answer, clock=lambda: now[0], **changes)


def test_trials_take_a_minute_where_the_run_is_short():
    made, said, jobs = timed(lambda job: 31.0)
    assert made.plan().micro_batch_size == 2
    assert [(job.micro_batch_size, job.brief) for job in jobs] == [(1, False), (2, True)], "then fewer steps are timed"
    assert said[-2] == (
        "auto-fit: no more sizes are tried: trials have taken 1.0 min, and may take 1.0 min (2% of the run, at least a "
        "minute)"
    )


def test_trials_take_two_percent_of_a_long_run():
    made, said, jobs = timed(lambda job: 31.0, iterations_left=10_000)  # 21 h at the first trial's speed
    assert made.plan().micro_batch_size == 8
    assert len(jobs) == 4
    assert not any("no more sizes" in line for line in said)
    assert made.budget_seconds == pytest.approx(0.02 * 10_000 * 64 * 1024 / (26_000 / 3))


def test_a_size_that_would_take_too_long_is_not_begun():
    """Two CPU cores: 500 tokens a second, whatever the size."""
    made, said, jobs = fitter(lambda job: dict(peak_bytes=GIB, tokens_per_second=500.0), clock=lambda: 0.0)
    assert made.plan().micro_batch_size == 1
    assert [job.micro_batch_size for job in jobs] == [1, 2, 4], "8 sequences: 115 s"
    assert "no more sizes are tried" in said[-2]


# ---- the loss's chunk --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gain", "room", "chosen"), [(1.1, 4.0, 1572), (0.9, 4.0, 384), (1.1, 1.0, 384)])
def test_all_logits_are_one_chunk_where_that_fits_and_is_faster(gain, room, chosen):
    limit = int((2.02 + 0.59 * 8 + room) * GIB)

    def answer(job):
        got = answer_3060(job)
        if isinstance(got, dict) and job.levers.loss_chunk_mb > 384:
            got["tokens_per_second"] *= gain
        return got

    job = replace(JOB, model_args={**JOB.model_args, "vocab_size": 50304})
    made, _, jobs = fitter(answer, replace(FACTS, limit_bytes=limit), job=job, batch_size=8, chunk_mb=384)
    plan = made.plan()
    assert (plan.micro_batch_size, plan.levers.loss_chunk_mb) == (8, chosen)
    assert any(job.levers.loss_chunk_mb == 1572 for job in jobs) == (room > 1.5)


def test_a_cpu_does_not_try_one_chunk():
    job = replace(JOB, model_args={**JOB.model_args, "vocab_size": 50304})
    made, _, jobs = fitter(answer_3060, replace(FACTS, device_type="cpu"), job=job, batch_size=8, chunk_mb=128)
    assert made.plan().levers.loss_chunk_mb == 128
    assert {job.levers.loss_chunk_mb for job in jobs} == {0}


def test_the_users_chunk_stands():
    job = replace(JOB, model_args={**JOB.model_args, "vocab_size": 50304}, levers=MemoryLevers(loss_chunk_mb=64))
    made, _, jobs = fitter(answer_3060, job=job, batch_size=8)
    made.plan()
    assert {job.levers.loss_chunk_mb for job in jobs} == {64}


def test_enough_sms_compile_as_asked():
    made, said, _ = fitter(answer_3060, replace(FACTS, sm_count=108), asked_compile=True, iterations_left=1)
    assert made.plan().compile
    assert said[-1] == "auto-fit: compile on: 108 SMs, compile_min_sms=68"


def test_fragmentation_counts_and_so_do_retries():
    def answer(job):
        return {**answer_3060(job), "retries": 3 if job.micro_batch_size > 2 else 0}

    made, said, _ = fitter(answer)
    assert made.plan().micro_batch_size == 2
    assert any(line.endswith("does not fit (the allocator ran short 3 times)") for line in said)


def test_who_holds_the_memory_is_told_when_it_made_the_fit_smaller():
    facts = replace(FACTS, neighbours=((1234, "python", 4300),))
    made, said, _ = fitter(answer_3060, facts)
    made.plan()
    assert "auto-fit: python (pid 1234) holds 4,300 MiB of this GPU: more would fit without it" in said
    roomy, said, _ = fitter(answer_3060, facts, batch_size=1)
    roomy.plan()
    assert not any("1234" in line for line in said)


@pytest.mark.parametrize("trouble", ["was killed by signal 9", "took longer than 600 s", "gave no answer (no message)"])
def test_a_trial_that_ends_badly_counts_as_too_large(trouble):
    failure = f"the probe {trouble}"
    made, said, _ = fitter(lambda job: failure if job.micro_batch_size == 8 else answer_3060(job))
    assert made.plan().micro_batch_size == 4
    assert f"auto-fit: batch_size 8   {failure}   does not fit" in said


# ---- recompute ---------------------------------------------------------------------------------------------


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
    made, said, _ = fitter(needs(SHARES), replace(FACTS, limit_bytes=int(2.8 * GIB)))
    plan = made.plan()
    assert plan.levers == RECOMPUTE
    assert plan.micro_batch_size == 1
    assert "auto-fit: batch_size 1   peak 3.00 GiB   1,000 tok/s   does not fit" in said
    assert "auto-fit: batch_size 1, recompute   peak 2.70 GiB   1,000 tok/s   fits" in said
    assert "auto-fit: recompute on: not even batch_size 1 fits without it" in said
    assert plan.reasons[0] == "recompute on: not even batch_size 1 fits without it"


def test_what_the_user_says_about_recompute_stands():
    small = replace(FACTS, limit_bytes=int(2.8 * GIB))
    made, _, jobs = fitter(needs(SHARES), small, may_recompute=False, advises=False)
    with pytest.raises(UsageError, match="nothing fits: batch_size 1 takes 3.00 GiB"):
        made.plan()
    assert not any(job.levers.recompute for job in jobs)
    made, _, jobs = fitter(needs(SHARES), replace(FACTS, limit_bytes=100 * GIB), job=replace(JOB, levers=RECOMPUTE))
    assert made.plan().levers.recompute
    assert all(job.levers.recompute for job in jobs)


def test_what_the_user_says_about_other_levers_goes_with_every_trial():
    asked = MemoryLevers(optimizer_state="offload", loss_chunk_mb=5)
    made, said, jobs = fitter(answer_3060, job=replace(JOB, levers=asked))
    assert made.plan().levers == asked
    assert all(replace(job.levers, recompute=False) == asked for job in jobs)
    assert said[1] == "auto-fit: batch_size 1, optimizer_state offload   peak 2.61 GiB   8,667 tok/s   fits"


def test_recompute_is_taken_where_it_is_faster():
    """A wide GPU on which only one sequence fits, and is slow."""

    def answer(job):
        peak, speed = (0.1, 0.75) if job.levers.recompute else (1.0, 1.0)
        size = job.micro_batch_size
        return dict(peak_bytes=int((9 + peak * size) * GIB), tokens_per_second=speed * 1000.0 * size / (size + 8))

    made, said, _ = fitter(answer, iterations_left=20_000)
    plan = made.plan()
    assert (plan.micro_batch_size, plan.levers.recompute) == (4, True)
    assert "auto-fit: recompute on: larger micro-batches make up for computing activations twice" in said[-2]
    assert plan.trials[-1].levers.recompute


def answer_of_ranks(job):
    """A model that fits four ranks of 12 GB together."""
    if not job.levers.shard:
        return OUT_OF_MEMORY
    assert job.ranks == 4
    return dict(peak_bytes=int((12 if not job.levers.recompute else 7 + job.micro_batch_size) * GIB))


def test_ranks_share_a_model_out_where_it_does_not_fit_one():
    made, said, jobs = fitter(
        answer_of_ranks, world_size=4, gradient_accumulation_steps=4, may_shard=True, asked_compile=True
    )
    plan = made.plan()
    assert (plan.micro_batch_size, plan.levers) == (2, MemoryLevers(recompute=True, shard=True))
    assert plan.compile, "as asked: its gain can't be measured"
    assert "auto-fit: shard on: whole, not even batch_size 1 fits a rank" in said
    assert [job.levers.shard for job in jobs] == [False, False, True, True, True]
    made, _, _ = fitter(answer_of_ranks, world_size=4, gradient_accumulation_steps=4, advises=False)
    with pytest.raises(UsageError, match="nothing fits"):
        made.plan()


@pytest.mark.parametrize(("peak", "fits"), [(10, True), (11, False)])
def test_shares_are_gathered_once_an_iteration_where_that_fits(peak, fits):
    def answer(job):
        return dict(peak_bytes=peak * GIB) if job.levers.gather_once else answer_of_ranks(job)

    keys = dict(world_size=4, gradient_accumulation_steps=4, may_shard=True)
    made, said, jobs = fitter(answer, **keys, may_gather_once=True)
    plan = made.plan()
    assert plan.levers == MemoryLevers(recompute=True, shard=True, gather_once=fits)
    assert said[-1] == f"auto-fit: gather_once {'on: it fits' if fits else 'off: it does not fit'}"
    assert said[-1] == f"auto-fit: {plan.reasons[-2]}"
    assert [job.levers.gather_once for job in jobs] == [False] * (len(jobs) - 1) + [True]
    assert jobs[-1].micro_batch_size == plan.micro_batch_size
    made, _, jobs = fitter(answer, **keys)
    assert not made.plan().levers.gather_once, "what the user says stands"
    assert not any(job.levers.gather_once for job in jobs)


def test_whether_anything_fits_is_found_out_whatever_time_it_takes():
    def answer(job):
        return dict(peak_bytes=(9 if job.levers.recompute else 99) * GIB, tokens_per_second=30.0)

    now = iter(range(0, 10_000, 70))
    made, _, _ = fitter(answer, clock=lambda: next(now))
    plan = made.plan()
    assert (plan.micro_batch_size, plan.levers.recompute) == (1, True)


def test_the_speed_of_a_share_alone_counts_for_the_budget_and_is_not_told():
    def answer(job):
        return dict(peak_bytes=GIB, tokens_per_second=100.0)

    job = replace(JOB, levers=MemoryLevers(shard=True))
    made, said, _ = fitter(answer, job=job, world_size=2, gradient_accumulation_steps=2)
    assert made.measure(1).tokens_per_second == 0
    assert made.budget_seconds == 60, "known, where none was before"
    assert said[-1] == "auto-fit: batch_size 1, shard   peak 1.00 GiB   fits"


def test_ranks_keep_a_model_whole_where_it_fits():
    made, said, jobs = fitter(answer_3060, world_size=2, gradient_accumulation_steps=2, may_shard=True)
    assert not made.plan().levers.shard
    assert "auto-fit: shard off: the whole model fits each rank, and need not be gathered in every micro-step" in said
    assert not any(job.levers.shard for job in jobs)


# ---- where nothing fits ------------------------------------------------------------------------------------


def test_nothing_fits_is_an_error_with_numbers_and_with_what_would_fit():
    made, _, jobs = fitter(needs(SHARES), replace(FACTS, limit_bytes=int(2.3 * GIB)))
    with pytest.raises(UsageError) as error:
        made.plan()
    assert str(error.value).splitlines() == [
        "auto-fit: nothing fits: batch_size 1, recompute takes 2.70 GiB (measured), the limit is 2.30 GiB of "
        "11.21 GiB free",
        "of 2.70 GiB (simulated): weights 0.50, gradients 0.50, optimizer state 0.90, loss and backward 0.80, "
        "activations 0.00",
        "each of these would fit, with batch_size 1:",
        "  --optimizer_state=8bit",
        "  --optimizer_state=offload",
        "  --block_size=256",
    ]
    assert [job.simulate for job in jobs[:2]] == [False, False]
    assert all(job.simulate for job in jobs[2:]), "what is proposed has been simulated"
    assert all(job.levers.recompute and job.micro_batch_size == 1 for job in jobs[2:])


def test_a_model_that_is_given_is_not_proposed_smaller():
    def answer(job):
        smaller = job.model_args["n_layer"] < 24
        return needs({name: n / 9 if smaller else n for name, n in SHARES.items()})(job)

    job = replace(JOB, model_args={"block_size": 1024, "n_layer": 24})
    for may_shrink in (True, False):
        made, _, _ = fitter(answer, replace(FACTS, limit_bytes=GIB), job=job, may_shrink=may_shrink)
        with pytest.raises(UsageError) as error:
            made.plan()
        proposal = "--n_layer=12 --n_head=12 --n_embd=768" in str(error.value)
        assert proposal == may_shrink
        assert ("none of these would fit either: " in str(error.value)) == (not may_shrink)


def advice(gib, process_gib=0.0, device_type="cuda", measured_gib=0.0, limit_gib=0.0, **levers):
    """What is proposed to a recomputing job of 1.8 GiB, plus 0.9 with float32 states, for a device of so many GiB."""
    run_trial = fitter(needs(SHARES))[0].run_trial
    job = replace(JOB, levers=MemoryLevers(recompute=True, **levers), memory_limit_gb=limit_gib)
    sizes = dict(limit_bytes=int(gib * GIB), process_bytes=int(process_gib * GIB), free_bytes=8 * GIB)
    measured = int(measured_gib * GIB)
    first, *lines = what_would_fit(job, Facts("x", device_type, **sizes), run_trial, False, measured)
    assert first.startswith("of ")
    return [line.removeprefix("  ") for line in lines if not line.endswith(" would fit, with batch_size 1:")]


def test_advice_leaves_room_for_fragments_and_for_the_process():
    assert advice(1.04 * 1.8) == ["--optimizer_state=8bit", "--optimizer_state=offload"]
    refused = "none of these would fit either: optimizer_state=8bit, optimizer_state=offload, a block_size down to 64"
    assert advice(1.02 * 1.8) == [f"{refused}: a smaller model, or more memory, is needed"]
    assert advice(1.04 * 1.8 + 0.5, process_gib=0.5)[:2] == advice(1.04 * 1.8)
    assert advice(1.04 * 1.8 + 0.5, process_gib=0.6)[0].startswith(refused)
    measured = dict(process_gib=0.5, measured_gib=2.7 + 0.6)  # the process took 0.1 more to run it
    assert advice(1.04 * 1.8 + 0.5, **measured)[0].startswith(refused)
    assert advice(1.04 * 1.8 + 0.6, **measured)[:2] == advice(1.04 * 1.8)


def test_a_limit_that_was_asked_for_is_proposed_larger():
    assert advice(3.0, measured_gib=3.3, limit_gib=3.0)[-1] == "--memory_limit_gb=3.4", "and a little room"
    assert advice(1.0, measured_gib=3.3, limit_gib=1.0) == ["--memory_limit_gb=3.4"]
    for beyond in (7.5, 9.0):  # what a run may take of 8 GiB is less than 7.6
        assert advice(3.0, measured_gib=beyond, limit_gib=3.0) == advice(3.0, measured_gib=beyond)


def test_advice_leaves_out_what_is_set_already_and_what_frees_nothing():
    assert advice(1.04 * 1.8, optimizer_state="8bit") == ["--optimizer_state=offload", "--block_size=512"]
    assert advice(1.04 * 1.8, shard=True)[0].startswith("none of these"), "the state of shares is not to be chosen"
    assert advice(1.04 * 1.8, device_type="cpu") == ["--optimizer_state=8bit"], "offloading stays in its memory"


def test_where_the_process_alone_is_too_much_no_setting_is_looked_for():
    facts = replace(FACTS, limit_bytes=int(0.1 * GIB), process_bytes=int(0.2 * GIB))
    made, _, jobs = fitter(needs(SHARES), facts)
    with pytest.raises(UsageError) as error:
        made.plan()
    assert str(error.value).endswith(
        "the process alone, Python and torch, takes 0.20 GiB: no setting helps, memory_limit_gb must be more than that"
    )
    assert not any(job.simulate for job in jobs)


def test_a_trial_that_fails_for_another_reason_is_not_called_a_want_of_memory():
    made, _, jobs = fitter(lambda job: "the probe ended with exit code 1 and no answer (ValueError: a bug)")
    with pytest.raises(UsageError, match="the trial of batch_size 1 failed: the probe ended with exit code 1.*a bug"):
        made.plan()
    assert not any(job.simulate for job in jobs), "nor is there advice about memory"


def test_a_device_that_cannot_be_looked_at():
    made, _, jobs = fitter(lambda job: "the probe ended with exit code 1 and no answer (no driver)", facts=None)
    with pytest.raises(UsageError, match="could not look at the device: the probe ended with exit code 1.*no driver"):
        made.plan()
    assert len(jobs) == 1


# ---- an earlier answer, and another rank's -----------------------------------------------------------------


def kept(micro_batch_size, limit_bytes=FACTS.limit_bytes, **changes):
    return Plan(64, 1, micro_batch_size, limit_bytes=limit_bytes, reasons=("because",), **changes)


def test_one_trial_confirms_a_kept_answer():
    made, said, jobs = fitter(answer_3060)
    plan = made.plan(kept(4, levers=RECOMPUTE, compile=True))
    assert (plan.micro_batch_size, plan.levers, plan.compile) == (4, RECOMPUTE, True)
    assert plan.reasons == ("because",)
    assert [(job.micro_batch_size, job.levers, job.compile) for job in jobs] == [(4, RECOMPUTE, True)]
    assert said[-1] == "auto-fit: the answer kept beside the run holds"


def test_a_kept_answer_of_shares_is_confirmed_without_compiling():
    shares = MemoryLevers(shard=True)
    made, _, jobs = fitter(lambda job: dict(peak_bytes=GIB, tokens_per_second=100.0), world_size=4,
                           gradient_accumulation_steps=4)  # fmt: skip
    assert made.plan(kept(4, levers=shares, compile=True)).compile
    assert [(job.levers, job.compile) for job in jobs] == [(shares, False)]


def test_a_kept_answer_that_does_not_hold_is_looked_for_again():
    made, said, _ = fitter(answer_3060)
    assert made.plan(kept(32)).micro_batch_size == 8
    assert "auto-fit: the answer kept beside the run does not fit any more: looking again" in said
    made, said, _ = fitter(answer_3060)
    assert made.plan(kept(2, limit_bytes=4 * GIB)).micro_batch_size == 8
    assert "auto-fit: the limit was 4.00 GiB and is 10.65 GiB: looking again" in said


def test_a_size_that_another_rank_chose_is_tried_before_it_is_taken():
    made, _, jobs = fitter(answer_3060)
    plan = made.plan()
    tried = len(jobs)
    made.check(plan, 2, MemoryLevers())
    assert len(jobs) == tried == 4, "that size was among its own"
    made.check(plan, 4, RECOMPUTE)
    made.check(replace(plan, trials=()), 4, MemoryLevers())
    assert [(job.micro_batch_size, job.levers) for job in jobs[4:]] == [(4, RECOMPUTE), (4, MemoryLevers())]
    with pytest.raises(UsageError, match="batch_size 32, which another rank chose, does not fit here"):
        made.check(plan, 32, MemoryLevers())
