"""Which size is tried next and which wins, over made-up memories."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanofit.autofit.plan import OUT_OF_MEMORY, Facts, Trial
from nanofit.autofit.search import MAX_TRIALS, choose, may_compile, next_size
from nanofit.units import GIB, divisors


def device(limit, memory, speed=lambda size: float(size) / (size + 4)):
    """A measure() over a made-up memory, and the list of the sizes it was asked for."""
    asked = []

    def measure(size):
        asked.append(size)
        peak = memory(size)
        if peak is None or peak > 1.2 * limit:  # far beyond the limit there is no figure, only a failure
            return Trial(size, limit_bytes=limit, failure=OUT_OF_MEMORY)
        return Trial(size, peak_bytes=int(peak), tokens_per_second=speed(size), limit_bytes=limit)

    return measure, asked


def check_search(batch_size, limit, memory, speed=lambda size: float(size) / (size + 4)):
    """Search, and check what must hold whatever the memory does."""
    measure, asked = device(limit, memory, speed)
    trials = []
    while len(trials) < MAX_TRIALS and (size := next_size(divisors(batch_size), trials, limit, batch_size)):
        trials.append(measure(size))
    choice, _ = choose(trials, batch_size)
    assert len(asked) <= MAX_TRIALS
    assert len(set(asked)) == len(asked), "no size is tried twice"
    assert all(batch_size % size == 0 for size in asked)
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
@given(sizes, st.floats(0, 0.999), st.floats(0.001, 1))
def test_on_a_line_the_choice_is_the_largest_that_fits(batch_size, a, k):
    choice, _ = check_search(batch_size, GIB, lambda size: (a + k * size) * GIB)
    fitting = [s for s in divisors(batch_size) if (a + k * s) * GIB <= GIB]
    if choice is None:
        # Measured and compared in whole bytes.
        assert not fitting or math.isclose((a + k) * GIB, GIB, rel_tol=1e-6)
    elif k * batch_size > 1e-3:
        largest = max(fitting, default=0)
        assert choice.micro_batch_size >= largest or math.isclose(a + k * largest, 1, rel_tol=1e-6)


def line(size):
    return 2 + 0.6 * size


@pytest.mark.parametrize(
    ("batch_size", "limit", "memory", "expected", "probes"),
    [
        (64, 10, line, 8, [1, 2, 8]),
        (64, 100, line, 64, [1, 2, 64]),
        (64, 2.7, line, 1, [1, 2]),
        (64, 2.5, line, None, [1]),
        (1, 10, line, 1, [1]),
        (13, 5, line, 1, [1, 13]),
        (13, 50, line, 13, [1, 13]),
        # The line through 1 and 2 promises 64; beyond 8 memory is steeper.
        (64, 12, lambda b: 2 + 0.1 * b + max(0, b - 8), 16, [1, 2, 64, 32, 16]),
    ],
)
def test_the_order_of_trials(batch_size, limit, memory, expected, probes):
    choice, asked = check_search(batch_size, limit * GIB, lambda b: memory(b) * GIB, speed=lambda b: b / (b + 2))
    assert (choice and choice.micro_batch_size) == expected
    assert asked == probes


GPU = Facts("a card", "cuda", sm_count=108, capability=(8, 0), has_triton=True)


@pytest.mark.parametrize(
    ("changes", "verdict", "why"),
    [
        (dict(), "yes", "108 SMs"),  # A100
        (dict(capability=(9, 0), sm_count=132), "yes", "132 SMs"),  # H200
        (dict(capability=(7, 5), sm_count=40), "prove", "40 SMs are fewer than compile_min_sms=68"),  # T4
        (dict(capability=(8, 6), sm_count=28), "prove", "28 SMs are fewer"),  # RTX 3060
        (dict(sm_count=28, min_sms=20), "yes", "compile_min_sms=20"),
        (dict(capability=(6, 1), sm_count=28), "no", "capability 7.0, this GPU has 6.1"),  # GTX 1080 Ti
        (dict(has_triton=False), "no", "Triton is not installed"),
        (dict(asked=False), "no", "compile=False"),
        (dict(device_type="cpu", capability=(0, 0), sm_count=0), "prove", "on a CPU"),
        (dict(device_type="mps", capability=(0, 0), sm_count=0), "no", "prototype"),
    ],
)
def test_who_may_compile(changes, verdict, why):
    asked, min_sms = changes.pop("asked", True), changes.pop("min_sms", 68)
    got, reason = may_compile(asked, replace(GPU, **changes), min_sms)
    assert got == verdict
    assert why in reason
