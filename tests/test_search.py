"""Which size is tried next and which wins, over made-up memories."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanofit.autofit.plan import OUT_OF_MEMORY, Trial
from nanofit.autofit.search import MAX_TRIALS, choose, search, size_to_try_recomputed
from nanofit.units import GIB, divisors, micro_batch_sizes


def trial(size, speed, fits=True):
    return Trial(size, peak_bytes=1 if fits else 2, tokens_per_second=speed, limit_bytes=1)


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
    choice, trials = search(divisors(batch_size), lambda: limit, measure)
    assert len(asked) <= MAX_TRIALS
    assert len(set(asked)) == len(asked), "no size is tried twice"
    assert all(batch_size % size == 0 for size in asked)
    assert [t.micro_batch_size for t in trials] == asked
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
        (64, 10, line, 8, [1, 2, 8]),  # 4 would be a sixth slower
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
    assert (choice and choice.micro_batch_size) == expected
    assert asked == probes


def test_where_speed_is_level_a_smaller_size_may_be_the_best():
    """As on a CPU, where what no longer fits its caches is slower again."""
    speeds = {1: 50.0, 2: 70.0, 4: 90.0, 8: 100.0, 16: 92.0, 32: 93.0}
    choice, asked = check_search(32, 100 * GIB, lambda b: line(b) * GIB, speeds.get)
    assert asked == [1, 2, 32, 16, 8]
    assert choice.micro_batch_size == 8


@pytest.mark.parametrize(
    ("half", "limit", "expected", "probes"),
    [
        (0.2, 1000, 6, [1, 2, 12, 6, 4]),  # no more is to be gained beyond 12: smaller sizes are looked at
        (8, 1000, 480, [1, 2, 12, 96, 480]),  # speed grows and grows
        (2, 1000, 60, [1, 2, 12, 96, 60]),  # it does from 12 to 96, but would hardly go on to
        (8, 30, 24, [1, 2, 12, 24]),  # memory ends it
    ],
)
def test_batches_are_joined_as_long_as_that_is_faster(half, limit, expected, probes):
    measure, asked = device(limit * GIB, lambda b: (2 + b) * GIB, speed=lambda b: b / (b + half))
    choice, _ = search(micro_batch_sizes(12, 40), lambda: limit * GIB, measure, batch_size=12)
    assert asked == probes
    assert choice.micro_batch_size == expected


@pytest.mark.parametrize(("batch_size", "steps", "expected"), [(12, 37, 444), (2, 13, 26), (1, 64, 64)])
def test_a_step_that_is_long_is_taken_where_it_promises_speed(batch_size, steps, expected):
    sizes = micro_batch_sizes(batch_size, steps)
    measure, _ = device(1000 * GIB, lambda b: (2 + b) * GIB, speed=lambda b: b / (b + 8))
    choice, _ = search(sizes, lambda: 1000 * GIB, measure, batch_size=batch_size)
    assert choice.micro_batch_size == expected


def test_two_small_sizes_do_not_tell_what_large_ones_gain():
    speeds = {1: 100.0, 2: 101.0, 16: 200.0, 64: 200.0, 32: 200.0, 8: 190.0, 4: 150.0}
    measure, asked = device(100 * GIB, lambda b: line(b) * GIB, speeds.get)
    choice, _ = search(micro_batch_sizes(1, 64), lambda: 100 * GIB, measure, batch_size=1)
    assert asked[:3] == [1, 2, 16]
    assert choice.micro_batch_size == 16


def test_without_speed_all_that_fits_is_joined():
    measure, asked = device(1000 * GIB, lambda b: (2 + b) * GIB, speed=lambda b: 0.0)
    choice, _ = search(micro_batch_sizes(12, 40), lambda: 1000 * GIB, measure, batch_size=12)
    assert asked == [1, 2, 480]
    assert choice.micro_batch_size == 480


def test_the_smallest_within_two_percent_of_the_fastest():
    assert choose([trial(1, 50.0), trial(4, 98.5), trial(8, 100.0)]).micro_batch_size == 4
    assert choose([trial(1, 50.0), trial(4, 97.0), trial(8, 100.0)]).micro_batch_size == 8
    assert choose([trial(1, 50.0), trial(8, 100.0, fits=False)]).micro_batch_size == 1
    assert choose([trial(1, 0.0), trial(2, 0.0)]).micro_batch_size == 2, "a simulation tells no speed"
    assert choose([trial(1, 1.0, fits=False)]) is None


@pytest.mark.parametrize(
    ("speeds", "expected"),
    [
        ({1: 100.0}, 4),  # nothing is known of larger ones
        ({1: 100.0, 2: 180.0, 4: 300.0}, 16),  # speed still grows
        ({1: 100.0, 2: 180.0, 4: 200.0}, None),  # it hardly does
        ({1: 100.0, 64: 3000.0}, None),  # all of the batch fits
    ],
)
def test_when_recompute_may_be_faster(speeds, expected):
    trials = [trial(size, speed) for size, speed in speeds.items()]
    assert size_to_try_recomputed(divisors(64), trials) == expected


@given(st.integers(1, 5000))
def test_divisors(n):
    assert divisors(n) == [d for d in range(1, n + 1) if n % d == 0]
