"""Auto-fit: the decisions with a simulated memory, the trials with real child processes, whole runs."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, TOY, environment, flags, train
from hypothesis import given, settings
from hypothesis import strategies as st

from nanofit import autofit, runtime
from nanofit.autofit import GIB, Fitter, Plan, Trial, choose, divisors, search
from nanofit.errors import UsageError

# ---- the search --------------------------------------------------------------------------------------------


def device(limit, memory, speed=lambda size: float(size) / (size + 4)):
    """A measure() over a made-up memory, and the list of the sizes it was asked for."""
    asked = []

    def measure(size):
        asked.append(size)
        peak = memory(size)
        if peak is None or peak > 1.2 * limit:  # far beyond the limit there is no figure, only a failure
            return Trial(size, False, failure="out of memory")
        return Trial(size, peak <= limit, int(peak), speed(size))

    return measure, asked


def check_search(batch_size, limit, memory, speed=lambda size: float(size) / (size + 4)):
    """Search, and check what must hold whatever the memory does."""
    measure, asked = device(limit, memory, speed)
    choice, trials = search(batch_size, limit, measure)
    assert len(asked) <= autofit.MAX_PROBES
    assert len(set(asked)) == len(asked), "no size is tried twice"
    assert all(batch_size % size == 0 for size in asked)
    assert [t.batch_size for t in trials] == asked
    if choice is None:
        assert not any(t.fits for t in trials)
        assert asked == [1], "where a single sequence doesn't fit, nothing does"
    else:
        assert choice.fits
        assert choice in trials, "only what was tried is chosen"
    return choice, asked


sizes = st.integers(1, 512)
figures = st.floats(0, 1e12, allow_nan=False)


@settings(max_examples=300, deadline=None)
@given(sizes, figures, figures, st.floats(1, 1e12), st.integers(0, 2**32))
def test_the_search_is_sound_whatever_the_memory_does(batch_size, a, k, limit, seed):
    """Noisy, falling, jumping and failing memories: the same size always answers the same."""

    def memory(size):
        r = hash((seed, size)) % 1000 / 1000
        kind = seed % 4
        if kind == 0:
            return a + k * size * (0.9 + 0.2 * r)  # noise
        if kind == 1:
            return a * r + k  # no relation to the size at all
        if kind == 2:
            return None if r < 0.3 else a + k * size  # crashes now and then
        return a + k * size * size  # not a line

    check_search(batch_size, limit, memory, speed=lambda size: hash((seed, size, 1)) % 1000 + 1.0)


@settings(max_examples=300, deadline=None)
@given(sizes, st.floats(0, 0.999), st.floats(0.001, 1), st.floats(0, 64))
def test_on_a_line_the_choice_is_the_exhaustive_best_within_two_percent(batch_size, a, k, half):
    def speed(size):
        return 1000.0 * size / (size + half)

    choice, _ = check_search(batch_size, GIB, lambda size: (a + k * size) * GIB, speed)
    fitting = [s for s in divisors(batch_size) if (a + k * s) * GIB <= GIB]
    if choice is None:
        # Measured and compared in whole bytes.
        assert not fitting or math.isclose((a + k) * GIB, GIB, rel_tol=1e-6)
    elif len(divisors(batch_size)) <= 5 or k * batch_size > 1e-3:
        best = max((speed(s) for s in fitting), default=0)
        assert choice.tokens_per_second >= 0.98 * best - 1e-9


def line(size):
    return 2 + 0.6 * size


@pytest.mark.parametrize(
    ("batch_size", "limit", "memory", "expected", "probes"),
    [
        (64, 10, line, 8, [1, 2, 8, 4]),
        (64, 100, line, 64, [1, 2, 64, 32, 8]),  # 32 is nearly as fast as 64, so that one more is tried below
        (64, 2.7, line, 1, [1, 2]),
        (64, 2.5, line, None, [1]),
        (64, 3.3, line, 2, [1, 2]),
        (1, 10, line, 1, [1]),
        (13, 5, line, 1, [1, 13]),
        (13, 50, line, 13, [1, 13]),
        # The line through 1 and 2 promises 64; beyond 8 memory is steeper.
        (64, 12, lambda b: 2 + 0.1 * b + max(0, b - 8), 8, [1, 2, 64, 32, 8]),
    ],
)
def test_the_order_of_trials(batch_size, limit, memory, expected, probes):
    choice, asked = check_search(batch_size, limit * GIB, lambda b: memory(b) * GIB, speed=lambda b: b / (b + 2))
    assert (choice and choice.batch_size) == expected
    assert asked == probes


def test_where_speed_is_level_a_smaller_size_may_be_the_best():
    """As on a CPU, where what no longer fits its caches is slower again."""
    speeds = {1: 50.0, 2: 70.0, 4: 90.0, 8: 100.0, 16: 92.0, 32: 93.0}
    choice, asked = check_search(32, 100 * GIB, lambda b: line(b) * GIB, speeds.get)
    assert asked == [1, 2, 32, 16, 8]
    assert choice.batch_size == 8


def test_the_smallest_within_two_percent_of_the_fastest():
    def trial(size, speed, fits=True):
        return Trial(size, fits, 1, speed)

    assert choose([trial(1, 50.0), trial(4, 98.5), trial(8, 100.0)]).batch_size == 4
    assert choose([trial(1, 50.0), trial(4, 97.0), trial(8, 100.0)]).batch_size == 8
    assert choose([trial(1, 50.0), trial(8, 100.0, fits=False)]).batch_size == 1
    assert choose([trial(1, 0.0), trial(2, 0.0)]).batch_size == 2, "a simulation tells no speed"
    assert choose([trial(1, 1.0, fits=False)]) is None


@settings(max_examples=200, deadline=None)
@given(sizes, st.integers(1, 64), st.integers(1, 8), st.data())
def test_the_effective_batch_is_exact(batch_size, per_rank, world_size, data):
    accumulation = per_rank * world_size
    micro = data.draw(st.sampled_from(divisors(batch_size)))
    plan = Plan(batch_size, accumulation, micro, False, 1)
    assert plan.micro_batch_size * plan.accumulation == batch_size * accumulation
    assert plan.accumulation % world_size == 0, "every rank takes as many micro-steps"
    assert str(plan) == (
        f"batch_size {batch_size} -> {micro}, gradient_accumulation_steps {accumulation} -> {plan.accumulation}, "
        f"effective batch {batch_size * accumulation}"
    )


def test_a_split_that_drifts_cannot_be_planned():
    with pytest.raises(AssertionError, match="divides the batch"):
        Plan(64, 1, 5, False, 1)


def test_the_limit():
    assert autofit.memory_limit(100, 0.0) == 95
    assert autofit.memory_limit(100 * GIB, 0.0) == 99 * GIB, "the margin is at most 1 GiB"
    assert autofit.memory_limit(100 * GIB, 12.0) == 12 * GIB
    assert autofit.memory_limit(10 * GIB, 12.0) == pytest.approx(9.5 * GIB, abs=1)


# ---- torch.compile -----------------------------------------------------------------------------------------

GPU = dict(asked=True, device_type="cuda", capability=(8, 0), sm_count=108, min_sms=68, has_triton=True,
           platform="linux")  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "verdict", "why"),
    [
        (dict(), "yes", "108 SMs"),  # A100
        (dict(capability=(9, 0), sm_count=132), "yes", "132 SMs"),  # H200
        (dict(capability=(8, 6), sm_count=82), "yes", "82 SMs"),  # RTX 3090
        (dict(capability=(7, 5), sm_count=68), "yes", "68 SMs"),  # RTX 2080 Ti
        (dict(capability=(7, 5), sm_count=40), "prove", "40 SMs are fewer than compile_min_sms=68"),  # T4
        (dict(capability=(8, 6), sm_count=28), "prove", "28 SMs are fewer"),  # RTX 3060
        (dict(capability=(8, 9), sm_count=46), "prove", "46 SMs are fewer"),  # RTX 4070
        (dict(sm_count=14), "prove", "14 SMs are fewer"),  # A100 MIG 1g.5gb
        (dict(sm_count=42), "prove", "42 SMs are fewer"),  # A100 MIG 3g.20gb
        (dict(sm_count=28, min_sms=20), "yes", "compile_min_sms=20"),
        (dict(capability=(6, 1), sm_count=28), "no", "capability 7.0, this GPU has 6.1"),  # GTX 1080 Ti
        (dict(capability=(6, 0), sm_count=80), "no", "capability 7.0"),  # P100, were it larger
        (dict(platform="win32", has_triton=False), "no", "no Triton for win32"),
        (dict(has_triton=False), "no", "Triton is not installed"),
        (dict(asked=False), "no", "compile=False"),
        (dict(device_type="cpu", capability=(0, 0), sm_count=0), "prove", "on a CPU"),
        (dict(device_type="mps", capability=(0, 0), sm_count=0), "no", "prototype"),
    ],
)
def test_who_may_compile(changes, verdict, why):
    got, reason = autofit.may_compile(**{**GPU, **changes})
    assert got == verdict
    assert why in reason


def test_max_autotune_is_refused_on_small_gpus():
    assert "needs a GPU of compile_min_sms=68 SMs, this one has 28" in autofit.refuse_mode("max-autotune", 28, 68)
    assert autofit.refuse_mode("max-autotune-no-cudagraphs", 28, 68)
    assert not autofit.refuse_mode("max-autotune", 68, 68)
    assert not autofit.refuse_mode("reduce-overhead", 28, 68)


def test_compiling_must_save_more_than_it_costs():
    eager = Trial(8, True, 1, 1000.0)
    compiled = Trial(8, True, 1, 1250.0, compile_seconds=60.0)
    worth, why = autofit.pays_off(eager, compiled, tokens_left=1_000_000)  # 1,000 s without, 800 s with
    assert worth
    assert why == "compiling takes 1.0 min and saves 3.3 min of 16.7 min"
    assert not autofit.pays_off(eager, compiled, tokens_left=250_000)[0]
    assert not autofit.pays_off(eager, replace(compiled, tokens_per_second=900.0), 10**12)[0]


# ---- a fitter over made-up probes --------------------------------------------------------------------------

FACTS = {"kind": "facts", "name": "NVIDIA GeForce RTX 3060", "device_type": "cuda", "sm_count": 28,
         "capability": (8, 6), "has_triton": True, "total_bytes": int(11.69 * GIB), "free_bytes": int(11.21 * GIB),
         "limit_bytes": int(10.65 * GIB), "neighbours": []}  # fmt: skip


def fitter(answer, facts=FACTS, **changes):
    """A Fitter whose probes are answered by answer(job), and the list of the lines that it says."""
    said, jobs = [], []

    def probe(job, on_facts=lambda facts: None):
        jobs.append(job)
        if facts:
            on_facts(facts)
        got = answer(job)
        return (got, "") if isinstance(got, list) else ([], got)

    made = Fitter(
        job={
            "model_args": {"block_size": 1024, "n_layer": 12},
            "activation_checkpointing": False,
            "optimizer_state": "float32",
        },
        **{**dict(batch_size=64, gradient_accumulation_steps=1, probe=probe, say=said.append), **changes},
    )
    return made, said, jobs


def answer_3060(job):
    size = job["batch_size"]
    if job["compile"]:
        speed, seconds = 21_000.0, 90.0
    else:
        speed, seconds = 26_000.0 * size / (size + 2), 0.0
    peak = int((2.02 + 0.59 * size) * GIB)
    if job["activation_checkpointing"]:
        speed, peak = 0.75 * speed, int((2.02 + 0.1 * size) * GIB)
    if peak > 11 * GIB:
        return [{"peak_bytes": 0, "tokens_per_second": 0.0, "failure": "out of memory"}]
    return [{"peak_bytes": peak, "tokens_per_second": speed, "failure": "", "compile_seconds": seconds, "retries": 0}]


def test_what_the_user_of_a_3060_reads():
    made, said, jobs = fitter(answer_3060, asked_compile=True, iterations_left=20_000)
    plan = made.plan()
    assert said[:8] == [
        "auto-fit: NVIDIA GeForce RTX 3060, 28 SMs, 11.69 GiB, 11.21 GiB free, limit 10.65 GiB",
        "auto-fit: batch_size 1   peak 2.61 GiB   8,667 tok/s   fits",
        "auto-fit: batch_size 2   peak 3.20 GiB   13,000 tok/s   fits",
        "auto-fit: memory is 2.02 + 0.59 x batch_size GiB: 8 should fit",
        "auto-fit: batch_size 8   peak 6.74 GiB   20,800 tok/s   fits",
        "auto-fit: batch_size 4   peak 4.38 GiB   17,333 tok/s   fits",
        "auto-fit: batch_size 32, activation checkpointing   peak 5.22 GiB   18,353 tok/s   fits",
        "auto-fit: activation_checkpointing off: what fits without it is faster",
    ]
    assert said[8].startswith("auto-fit: batch_size 8, compiled")
    assert said[9] == (
        "auto-fit: compile on: 28 SMs are fewer than compile_min_sms=68, and compiling takes 1.5 min and saves "
        "10.0 min of 17.5 h"
    )
    assert str(plan) == "batch_size 64 -> 8, gradient_accumulation_steps 1 -> 8, effective batch 64"
    assert plan.compile
    assert {job["limit_bytes"] for job in jobs[1:]} == {FACTS["limit_bytes"]}, "all trials are held to one limit"
    assert [job["micro_steps"] for job in jobs] == [64, 32, 8, 16, 2, 8]


def test_a_short_run_does_not_even_try_to_compile():
    made, said, jobs = fitter(answer_3060, asked_compile=True, iterations_left=10)
    assert not made.plan().compile
    assert not any(job["compile"] for job in jobs)
    assert "and the run takes 32 s without" in said[-1]


def test_a_compiled_model_that_does_not_fit_or_fails_stays_eager():
    def answer(job):
        if job["compile"]:
            return [{"peak_bytes": 0, "tokens_per_second": 0.0, "failure": "fails to compile (X: no)"}]
        return answer_3060(job)

    made, said, _ = fitter(answer, {**FACTS, "sm_count": 132}, asked_compile=True)
    assert not made.plan().compile
    assert said[-1] == "auto-fit: compile off: the compiled trial failed: fails to compile (X: no)"


def test_enough_sms_compile_as_asked():
    made, said, _ = fitter(answer_3060, {**FACTS, "sm_count": 108}, asked_compile=True, iterations_left=1)
    assert made.plan().compile
    assert said[-1] == "auto-fit: compile on: 108 SMs, compile_min_sms=68"


def test_fragmentation_counts_and_so_do_retries():
    def answer(job):
        [figures] = answer_3060(job)
        return [{**figures, "retries": 3 if job["batch_size"] > 2 else 0}]

    made, _, _ = fitter(answer)
    assert made.plan().micro_batch_size == 2


def test_who_holds_the_memory_is_told_when_it_made_the_fit_smaller():
    neighbours = [(1234, "python", 4300)]
    made, said, _ = fitter(answer_3060, {**FACTS, "neighbours": neighbours})
    made.plan()
    assert "auto-fit: python (pid 1234) holds 4,300 MiB of this GPU: more would fit without it" in said
    roomy, said, _ = fitter(lambda job: answer_3060({**job, "batch_size": 1}), {**FACTS, "neighbours": neighbours})
    roomy.batch_size = 1
    roomy.plan()
    assert not any("1234" in line for line in said)


@pytest.mark.parametrize("trouble", ["was killed by signal 9", "took longer than 600 s", "gave no answer (no message)"])
def test_a_probe_that_ends_badly_counts_as_too_large(trouble):
    made, said, _ = fitter(lambda job: trouble if job["batch_size"] == 8 else answer_3060(job))
    assert made.plan().micro_batch_size == 4
    assert f"auto-fit: batch_size 8   the probe {trouble}   does not fit" in said


def needs(shares, batch_size_weight=0.3):
    """An answer of probes whose memory is the sum of shares, in GiB, and of activations without checkpointing."""

    def answer(job):
        parts = {**shares, "activations": 0.0 if job["activation_checkpointing"] else batch_size_weight}
        if job["optimizer_state"] != "float32":
            parts["optimizer state"] = 0.0
        scale = job["model_args"]["block_size"] / 1024 * job["model_args"]["n_layer"] / 12
        parts["loss and backward"] = shares["loss and backward"] * scale
        if job["simulate"]:
            return [{"peak_bytes": 1, "failure": "", "parts": {name: int(n * GIB) for name, n in parts.items()}}]
        peak = int(sum(parts.values()) * GIB) * job["batch_size"]
        return [{"peak_bytes": peak, "tokens_per_second": 1e3, "failure": "", "retries": 0}]

    return answer


SHARES = {"weights": 0.5, "gradients": 0.5, "optimizer state": 0.9, "loss and backward": 0.8}


def test_what_fits_only_with_activation_checkpointing_is_trained_with_it():
    made, said, _ = fitter(needs(SHARES), {**FACTS, "limit_bytes": int(2.8 * GIB)})
    made.job["simulate"] = False
    plan = made.plan()
    assert plan.activation_checkpointing
    assert plan.micro_batch_size == 1
    assert "auto-fit: batch_size 1   peak 3.00 GiB   1,000 tok/s   does not fit" in said
    assert "auto-fit: batch_size 1, activation checkpointing   peak 2.70 GiB   1,000 tok/s   fits" in said
    assert "auto-fit: activation_checkpointing on: not even batch_size 1 fits without it" in said


def test_what_the_user_says_about_activation_checkpointing_stands():
    made, _, jobs = fitter(needs(SHARES), {**FACTS, "limit_bytes": int(2.8 * GIB)}, may_checkpoint=False, advises=False)
    made.job["simulate"] = False
    with pytest.raises(UsageError, match="nothing fits: batch_size 1 takes 3.00 GiB"):
        made.plan()
    made, _, jobs = fitter(needs(SHARES), {**FACTS, "limit_bytes": 100 * GIB})
    made.job.update(simulate=False, activation_checkpointing=True)
    assert made.plan().activation_checkpointing
    assert all(job["activation_checkpointing"] for job in jobs)


def test_activation_checkpointing_is_taken_where_it_is_faster():
    """A wide GPU on which only one sequence fits, and is slow."""

    def answer(job):
        peak, speed = (0.1, 0.75) if job["activation_checkpointing"] else (1.0, 1.0)
        size = job["batch_size"]
        figures = dict(tokens_per_second=speed * 1000.0 * size / (size + 8), failure="", retries=0)
        return [dict(peak_bytes=int((9 + peak * size) * GIB), **figures)]

    made, said, _ = fitter(answer)
    plan = made.plan()
    assert (plan.micro_batch_size, plan.activation_checkpointing) == (4, True)
    assert "auto-fit: activation_checkpointing on: larger micro-batches make up for computing" in said[-2]
    assert plan.trials[-1].checkpointing


@pytest.mark.parametrize(
    ("speeds", "expected"),
    [
        ({1: 100.0}, 4),  # nothing is known of larger ones
        ({1: 100.0, 2: 180.0, 4: 300.0}, 16),  # speed still grows
        ({1: 100.0, 2: 180.0, 4: 200.0}, None),  # it hardly does
        ({1: 100.0, 64: 3000.0}, None),  # all of the batch fits
    ],
)
def test_when_activation_checkpointing_may_be_faster(speeds, expected):
    trials = [Trial(size, True, 1, speed) for size, speed in speeds.items()]
    assert autofit.size_to_try_checkpointed(divisors(64), trials) == expected


def test_nothing_fits_is_an_error_with_numbers_and_with_what_would_fit():
    made, _, jobs = fitter(needs(SHARES), {**FACTS, "limit_bytes": int(2.3 * GIB)})
    made.job["simulate"] = False
    with pytest.raises(UsageError) as error:
        made.plan()
    assert str(error.value).splitlines() == [
        "auto-fit: nothing fits: batch_size 1 with activation checkpointing takes 2.70 GiB (measured), the limit is "
        "2.30 GiB of 11.21 GiB free",
        "of 2.70 GiB (simulated): weights 0.50, gradients 0.50, optimizer state 0.90, loss and backward 0.80, "
        "activations 0.00",
        "each of these would fit, with batch_size 1:",
        "  --optimizer_state=8bit",
        "  --optimizer_state=offload",
        "  --block_size=256",
    ]
    assert all(job["simulate"] for job in jobs[2:]), "what is proposed has been simulated"


def test_a_model_that_is_given_is_not_proposed_smaller():
    def answer(job):
        smaller = job["model_args"]["n_layer"] < 24
        return needs({name: n / 9 if smaller else n for name, n in SHARES.items()})(job)

    for may_shrink in (True, False):
        made, _, _ = fitter(answer, {**FACTS, "limit_bytes": GIB}, may_shrink=may_shrink)
        made.job.update(simulate=False, model_args={"block_size": 1024, "n_layer": 24})
        with pytest.raises(UsageError) as error:
            made.plan()
        proposal = "--n_layer=12 --n_head=12 --n_embd=768" in str(error.value)
        assert proposal == may_shrink
        assert ("no setting that was tried would fit" in str(error.value)) == (not may_shrink)


def test_a_trial_that_fails_for_another_reason_is_not_called_a_want_of_memory():
    made, _, _ = fitter(lambda job: "ended with exit code 1 and no answer (ValueError: a bug)")
    with pytest.raises(UsageError, match="the trial of batch_size 1 failed: the probe ended with exit code 1.*a bug"):
        made.plan()


def test_a_device_that_cannot_be_looked_at():
    made, _, _ = fitter(lambda job: "ended with exit code 1 and no answer (no driver)", facts=None)
    with pytest.raises(UsageError, match="could not look at the device: the probe ended with exit code 1.*no driver"):
        made.plan()


# ---- the answer beside the run -----------------------------------------------------------------------------

KEY = {"device": "GPU", "torch": "2", "model": {"n_layer": 1}, "batch_size": 64, "memory_limit_gb": 0.0}
KEPT = Plan(64, 1, 8, True, 10 * GIB, 7 * GIB, ("because",), (Trial(8, True, 7 * GIB, 1.0),))


def test_an_answer_is_kept_and_found_again(workplace):
    autofit.remember("out", KEY, KEPT)
    choice, why = autofit.recall("out", KEY)
    assert why == ""
    assert choice == {
        "micro_batch_size": 8, "compile": True, "activation_checkpointing": False, "limit_bytes": 10 * GIB,
        "reasons": ["because"],
    }  # fmt: skip
    assert json.loads((workplace / "out" / "auto_fit.json").read_text())["trials"][0]["batch_size"] == 8


@pytest.mark.parametrize("name", list(KEY))
def test_an_answer_for_another_run_is_ignored_with_a_sentence(name):
    autofit.remember("out", KEY, KEPT)
    sentence = f"out/auto_fit.json is for another {name} and is ignored"
    assert autofit.recall("out", {**KEY, name: "other"}) == (None, sentence)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": 3}', '{"key": {}, "choice": {"micro_batch_size": 8}}'])
def test_a_half_written_answer_is_ignored(workplace, text):
    (workplace / "out").mkdir()
    (workplace / "out" / "auto_fit.json").write_text(text)
    choice, why = autofit.recall("out", KEY)
    assert choice is None
    assert "ignored" in why


AS_CHOSEN = dict(compile=False, activation_checkpointing=False, limit_bytes=FACTS["limit_bytes"], reasons=[])


def test_one_trial_confirms_a_kept_answer():
    choice = {
        "micro_batch_size": 4,
        "compile": False,
        "activation_checkpointing": False,
        "limit_bytes": FACTS["limit_bytes"],
        "reasons": [],
    }
    made, said, jobs = fitter(answer_3060)
    assert made.plan(choice).micro_batch_size == 4
    assert len(jobs) == 1
    assert said[-1] == "auto-fit: the answer kept beside the run holds"


def test_a_kept_answer_that_does_not_hold_is_looked_for_again():
    too_large = {
        "micro_batch_size": 32,
        "compile": False,
        "activation_checkpointing": False,
        "limit_bytes": FACTS["limit_bytes"],
        "reasons": [],
    }
    made, said, _ = fitter(answer_3060)
    assert made.plan(too_large).micro_batch_size == 8
    assert "auto-fit: the answer kept beside the run does not fit any more: looking again" in said
    other_limit = {
        "micro_batch_size": 2,
        "compile": False,
        "activation_checkpointing": False,
        "limit_bytes": 4 * GIB,
        "reasons": [],
    }
    made, said, _ = fitter(answer_3060)
    assert made.plan(other_limit).micro_batch_size == 8
    assert "auto-fit: the limit was 4.00 GiB and is 10.65 GiB: looking again" in said


# ---- ranks -------------------------------------------------------------------------------------------------


class Ranks(runtime.World):
    """A world whose other ranks' answers are given."""

    def gather(self, value):
        return [value, *self.others.pop(0)]


def test_all_ranks_stop_with_the_sentence_of_the_one_that_failed():
    world = Ranks(0, 0, 2)
    object.__setattr__(world, "others", [[(None, "its GPU is on fire")]])
    with pytest.raises(UsageError, match="rank 1: its GPU is on fire"):
        autofit.agree(world, lambda: 3)


def test_a_size_that_another_rank_chose_is_tried_before_it_is_taken():
    made, _, jobs = fitter(answer_3060)
    plan = made.plan()
    made.check(plan, 4, False)
    tried = len(jobs)
    made, _, jobs = fitter(answer_3060)
    made.check(replace(plan, trials=()), 4, False)
    assert (tried, len(jobs)) == (5, 1)
    with pytest.raises(UsageError, match="batch_size 32, which another rank chose, does not fit here"):
        made.check(plan, 32, False)


# ---- child processes ---------------------------------------------------------------------------------------

GOOD = json.dumps({"kind": "result", "batch_size": 1, "peak_bytes": 5, "tokens_per_second": 1.0, "failure": ""})


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "was killed by signal 9, as the system does when"),
        (f"import os; print('''{GOOD}''', flush=True); os.kill(os.getpid(), 9)", "was killed by signal 9"),
        ("import time; time.sleep(60)", "took longer than 1 s"),
        ("import subprocess; subprocess.run(['sleep', '60'])", "took longer than 1 s"),
        ("print('garbage'); print('{'); print('[1]'); print('3')", "gave no answer"),
        ("print('{\"kind\": \"result\", \"batch_size\": 1}')", "gave no answer"),
        (f"import sys; sys.stdout.write('''{GOOD}''')", "gave no answer"),  # no line end: it may have been cut
        ("raise SystemExit('error: no such GPU')", "ended with exit code 1 and no answer (no such GPU)"),
    ],
)  # fmt: skip
def test_a_child_that_ends_badly_is_a_sentence(workplace, monkeypatch, script, sentence):
    (workplace / "fake.py").write_text(script)
    monkeypatch.setattr(autofit, "PROBE_SCRIPT", str(workplace / "fake.py"))
    results, failure = autofit.run_probe({}, seconds=1 if "longer" in sentence else 20)
    assert results == []
    assert sentence in failure


def test_a_probe_ends_when_nobody_waits_any_more():
    """Its parent may be killed: then standard input ends."""
    probe = subprocess.Popen(
        [sys.executable, autofit.PROBE_SCRIPT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    probe.stdin.write(json.dumps({**JOB, "confirm_steps": 10**9}) + "\n")
    probe.stdin.flush()
    assert '"facts"' in probe.stdout.readline()
    probe.stdin.close()
    assert probe.wait(timeout=30) == 1
    probe.stdout.close()


def test_noise_around_an_answer_does_not_matter(workplace, monkeypatch):
    (workplace / "fake.py").write_text(f"print('hello'); print('''{GOOD}'''); print('bye')")
    monkeypatch.setattr(autofit, "PROBE_SCRIPT", str(workplace / "fake.py"))
    assert autofit.run_probe({}) == ([json.loads(GOOD)], "")


JOB = dict(
    model_args=dict(n_layer=2, n_head=2, n_embd=64, block_size=32, bias=False, vocab_size=65, dropout=0.1),
    activation_checkpointing=False, optimizer_state="float32", dtype="float32", device="cpu",
    grad_clip=1.0, batch_size=8, micro_steps=4, compile=False,
    simulate=False, memory_limit_gb=4.0,
)  # fmt: skip


def test_a_probe_measures_memory_and_speed():
    facts = []
    [result], failure = autofit.run_probe(JOB, facts.append)
    assert failure == ""
    assert facts[0]["limit_bytes"] <= 4 * GIB
    assert 0.1 * GIB < result["peak_bytes"] < 2 * GIB
    assert result["tokens_per_second"] > 100


@pytest.mark.slow
def test_dropout_costs_a_plan_no_attention_matrices():
    peaks = []
    for dropout in (0.0, 0.2):
        shape = {**JOB["model_args"], "block_size": 256, "dropout": dropout}
        [result], _ = autofit.run_probe({**JOB, "model_args": shape, "simulate": True})
        peaks.append(result["peak_bytes"])
    assert peaks[0] < peaks[1] < 1.25 * peaks[0], "masks are a byte for each value that they drop"


def test_a_size_far_beyond_the_limit_ends_in_the_probe_alone():
    [result], failure = autofit.run_probe({**JOB, "batch_size": 200_000, "memory_limit_gb": 0.5})
    assert failure == ""
    assert result["failure"].startswith("RuntimeError: ")
    assert result["peak_bytes"] == 0


@pytest.fixture
def large_blocks_go_back(monkeypatch):
    """glibc keeps freed blocks of less than 32 MiB for later, up to a third more than the tensors take.

    Then a process takes what its tensors take, as under a GPU's allocator with expandable segments, which is
    what the simulation stands for. It costs speed, so that only this comparison asks for it.
    """
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**20))


@pytest.fixture(scope="module")
def a_process_takes():
    """Bytes of a probe with a model of next to nothing: Python, torch and its libraries."""
    [process], _ = autofit.run_probe(JOB)
    return process["peak_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [(2, 128, 16384, 128), (3, 256, 8192, 256), (1, 512, 32768, 64)], ids=lambda s: "x".join(map(str, s))
)
def test_the_simulation_agrees_with_what_a_process_takes(shape, a_process_takes, large_blocks_go_back):
    n_layer, n_embd, vocab_size, block_size = shape
    sizes = dict(n_layer=n_layer, n_head=4, n_embd=n_embd, vocab_size=vocab_size, block_size=block_size)
    job = {**JOB, "model_args": {**JOB["model_args"], **sizes, "dropout": 0.0}, "batch_size": 8}
    [measured], _ = autofit.run_probe(job)
    [simulated], _ = autofit.run_probe({**job, "simulate": True})
    taken = measured["peak_bytes"] - a_process_takes
    assert simulated["peak_bytes"] == pytest.approx(taken, rel=0.1)
    assert taken > GIB // 6, "large enough to tell"


# ---- whole runs --------------------------------------------------------------------------------------------


def split_by_hand(monkeypatch, micro_batch_size):
    """Let train.py's auto-fit answer this split without a probe."""

    def fit(world, out_dir, model_args, device, planned, config, *_):
        return Plan(config["batch_size"], config["gradient_accumulation_steps"], micro_batch_size, False, 0)

    monkeypatch.setattr(autofit, "fit", fit)


@pytest.mark.slow
def test_a_run_that_auto_fit_started_is_the_run_split_by_hand_bit_for_bit(monkeypatch, workplace):
    keys = dict(auto_fit=True, batch_size=4, max_iters=12, dropout=0.1)
    fitted = train(**keys)
    micro = json.loads((workplace / "out" / "auto_fit.json").read_text())["choice"]["micro_batch_size"]
    expected = f"batch_size 4 -> {micro}, gradient_accumulation_steps 1 -> {4 // micro}, effective batch 4"
    assert f"auto-fit: {expected}\n" in fitted.text
    split_by_hand(monkeypatch, micro)
    by_hand = train(**keys)
    assert by_hand.iter_loss == fitted.iter_loss
    assert by_hand.eval_loss == fitted.eval_loss
    for a, b in zip(by_hand.names["raw_model"].parameters(), fitted.names["raw_model"].parameters(), strict=True):
        assert torch.equal(a, b)


def test_64_x_1_and_4_x_16_see_the_same_batches(monkeypatch):
    keys = dict(batch_size=64, max_iters=30, eval_interval=10)
    whole = train(**keys)
    split_by_hand(monkeypatch, 4)
    split = train(**keys, auto_fit=True)
    assert split.names["micro_steps"] == 16
    assert split.iter_loss == pytest.approx(whole.iter_loss, abs=1e-4)
    for i, losses in whole.eval_loss.items():
        assert split.eval_loss[i] == pytest.approx(losses, abs=1e-4)


def test_a_resumed_run_keeps_the_effective_batch_on_another_split(monkeypatch):
    whole = train(max_iters=20)
    train(max_iters=10, out_dir="parts")
    split_by_hand(monkeypatch, 2)
    rest = train(max_iters=20, out_dir="parts", init_from="resume", auto_fit=True)
    assert rest.iter_loss == pytest.approx({i: whole.iter_loss[i] for i in range(10, 21)}, abs=1e-4)
    assert torch.load("parts/ckpt.pt", weights_only=True)["config"]["batch_size"] == 8, (
        "config keeps what was asked for"
    )


@pytest.mark.slow
def test_a_dry_run_plans_and_leaves_nothing(workplace):
    keys = {**TOY, "batch_size": 2, "dry_run": True, "memory_limit_gb": 2.0}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *flags(**keys)], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("auto-fit: batch_size 2 -> ")
    assert not (workplace / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_a_dry_run_for_a_card_that_is_elsewhere():
    keys = {**TOY, "device": "cuda", "dataset": "openwebtext", "dry_run": True, "memory_limit_gb": 3.0}
    command = [str(ROOT / "train.py"), *flags(**{**keys, "n_embd": 512, "block_size": 1024, "batch_size": 2})]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert "simulated on fake tensors: nothing is measured" in done.stdout
    assert re.search(r"^auto-fit: of [\d.]+ GiB \(simulated\): weights 0\.12, ", done.stdout, re.MULTILINE)
    assert done.stdout.splitlines()[-1].startswith("auto-fit: batch_size 2 -> 2, ")
    with pytest.raises(UsageError, match="there is no cuda here: to plan for one, say how much memory it has"):
        train(**{**keys, "memory_limit_gb": 0.0})


RANK = """
import os, sys, runpy
sys.argv[0] = "train.py"
from nanofit import autofit
from nanofit.autofit import Trial
LIMITS = {limits}
def measure(self, size, compile=False, checkpointing=False):
    limit = LIMITS[int(os.environ["RANK"])]
    if limit is None:
        return Trial(size, False, failure="the probe was killed by signal 9")
    self.facts = {{"limit_bytes": limit, "device_type": "cpu"}}
    return Trial(size, size <= limit, size, float(size))
autofit.Fitter.measure = measure
runpy.run_path({train!r}, run_name="__main__")
"""


def ranks(workplace, limits, **keys):
    (workplace / "rank.py").write_text(RANK.format(limits=limits, train=str(ROOT / "train.py")))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    keys = {**TOY, "backend": "gloo", "auto_fit": True, "gradient_accumulation_steps": 4, "max_iters": 2, **keys}
    command = [*launcher, str(workplace / "rank.py"), *flags(**keys)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment())


@pytest.mark.slow
def test_two_ranks_agree_on_the_smaller_answer(workplace):
    done = ranks(workplace, limits=[8, 2])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "auto-fit: the ranks chose batch_size 8, 2: all take 2\n" in done.stdout
    assert "auto-fit: batch_size 8 -> 2, gradient_accumulation_steps 4 -> 16, effective batch 32\n" in done.stdout
    assert "iter 2: loss" in done.stdout


@pytest.mark.slow
def test_two_ranks_stop_together_where_one_fails(workplace):
    done = ranks(workplace, limits=[8, None])
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if "error: rank 1: auto-fit" in line]
    assert told, done.stderr[:3000]
    assert "the probe was killed by signal 9" in told[0]
    assert "iter 0" not in done.stdout


@pytest.mark.slow
def test_the_matrix_of_choices_runs_at_toy_size(workplace):
    argv = flags(device="cpu", limits="'0.1,2'", models="1x2x32", block_size=16, batch_size=2, vocab_size=65,
                 confirm_steps=12, save="cells.json")  # fmt: skip
    command = [sys.executable, str(ROOT / "benchmarks" / "fit_matrix.py"), *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((workplace / "cells.json").read_text())
    none, roomy = result["cells"]
    assert (none["choice"], none["best"]) == (None, None), "torch alone takes more than 0.1 GiB"
    assert roomy["choice"] in (1, 2)
    assert roomy["confirmed"]
    assert 0 < roomy["ratio"] <= 1
