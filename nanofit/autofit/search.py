"""Which micro-batch size to try next, and which wins. Pure: whoever calls it measures."""

import bisect
import math
from operator import attrgetter

MAX_TRIALS = 5
NEAR_ENOUGH = 0.98  # of the fastest: headroom is worth more than 2% of speed
LIKELY = 0.95  # of the fastest: what promises less is not tried
LEVEL = 0.9  # of the fastest: too close to tell which size is the best
JOINED_TIMES = 8  # a size beyond the configured one may be so many times the largest that was tried
# Recomputing costs about a third more arithmetic. Where doubling the size gains so much speed, two doublings, for which
# recomputing makes room, make up for it: 1.15 ** 2 = 1.32.
WORTH_RECOMPUTING = 1.15
RECOMPUTED_TIMES = 4  # as many sequences, at least, fit with recompute
size_of, speed_of = attrgetter("micro_batch_size"), attrgetter("tokens_per_second")


def line_through(trials):
    """(a, k) of memory = a + k x size bytes, through the smallest and the largest trial with a known peak."""
    known = sorted((size_of(t), t.peak_bytes) for t in trials if t.peak_bytes)
    if not known:
        return 0.0, 0.0
    (b0, m0), (b1, m1) = known[0], known[-1]
    k = max(0.0, (m1 - m0) / (b1 - b0)) if b1 > b0 else 0.0
    return m1 - k * b1, k


def expected_speed(fitting, size):
    """Tokens per second at a size, were a micro-step's time a fixed part and one for each sequence.

    By the trials around it, or the two that come nearest from below; inf where there aren't two that tell.
    """
    known = sorted((size_of(t), speed_of(t)) for t in fitting if speed_of(t))
    if len(known) < 2:
        return math.inf
    at = min(max(1, bisect.bisect(known, (size,))), len(known) - 1)
    (b0, v0), (b1, v1) = known[at - 1 : at + 1]
    # A token takes its own time, and its share of what a micro-step takes at any size: a line over 1 / size.
    slope = (1 / v0 - 1 / v1) / (1 / b0 - 1 / b1)
    time = 1 / v1 + slope * (1 / size - 1 / b1)
    return 1 / time if time > 0 else math.inf


def next_size(sizes, trials, limit_bytes, batch_size=math.inf):
    """The micro-batch size to try next, or None where the trials so far suffice.

    First the two smallest, for the line that memory follows; then upwards, as far as memory and speed promise; last,
    where speed is measured, what may be as fast with less memory.
    """
    fitting = [t for t in trials if t.fits]
    if trials and not fitting:
        return None
    tried = set(map(size_of, trials))
    untried = [s for s in sizes if s not in tried]
    if not tried.issuperset(sizes[:2]):
        return untried[0]
    a, k = line_through(trials)
    allowed = [s for s in untried if a + k * s <= limit_bytes]
    if size := _upwards(untried, allowed, trials, _furthest(sizes, fitting, batch_size)):
        return size
    fastest = max(fitting, key=speed_of)
    if not speed_of(fastest):
        return None
    return _beside(fastest, sizes, allowed, fitting) or _amid_level_speed(fastest, untried, fitting)


def _furthest(sizes, fitting, batch_size):
    """The largest size worth a trial: to join batches takes time to try, and buys speed alone."""
    low, fastest = max(map(size_of, fitting)), max(map(speed_of, fitting))
    if not fastest:
        return math.inf  # it isn't measured: all that fits is joined
    if low < batch_size:
        return batch_size
    step = max(JOINED_TIMES * low, min((s for s in sizes if s > low), default=low))
    promised = expected_speed(fitting, step) if len(fitting) > 2 else math.inf  # two small ones can't tell
    return step if NEAR_ENOUGH * promised > fastest else low


def _upwards(untried, allowed, trials, furthest):
    """Between what fits and what doesn't: the largest that is allowed, or the middle."""
    low = max(size_of(t) for t in trials if t.fits)
    too_large = [size_of(t) for t in trials if size_of(t) > low]
    between = [s for s in untried if low < s <= furthest and s < min(too_large, default=math.inf)]
    likely = [s for s in between if s in allowed]
    if len(too_large) > 1 and likely:  # a line that has been wrong twice is no guide any more
        return between[len(between) // 2]
    return likely[-1] if likely else None


def _beside(fastest, sizes, allowed, fitting):
    """A neighbour of the fastest that promises to be about as fast. Above all that fit, none is looked for any more."""
    low, at = max(map(size_of, fitting)), sizes.index(size_of(fastest))
    near = (s for s in sizes[max(0, at - 1) : at + 2] if s in allowed and s < low)
    return next((s for s in near if expected_speed(fitting, s) >= LIKELY * speed_of(fastest)), None)


def _amid_level_speed(fastest, untried, fitting):
    """The middle of the sizes below the fastest, where another comes so close to it that the best may be any."""
    level = [t for t in fitting if speed_of(t) >= LEVEL * speed_of(fastest)]
    below = [s for s in untried if s < size_of(fastest)]
    return below[len(below) // 2] if below and len(level) > 1 else None


def choose(trials):
    """Of the trials that fit, the smallest within 2% of the fastest; the largest where speed wasn't measured.

    None where nothing fits.
    """
    fitting = [t for t in trials if t.fits]
    fastest = max(map(speed_of, fitting), default=0)
    if not fastest:
        return max(fitting, key=size_of, default=None)
    return min((t for t in fitting if speed_of(t) >= NEAR_ENOUGH * fastest), key=size_of)


def search(sizes, limit_bytes, measure, affordable=lambda size: True, batch_size=math.inf):
    """(choice, trials): at most MAX_TRIALS calls of measure(size), which gives a Trial.

    sizes: ascending; those beyond batch_size join batches. limit_bytes: a function, as only the first trial finds it
    out. affordable(size): whether there is time for it. The choice is a trial that was measured to fit, or None.
    """
    trials = []
    while len(trials) < MAX_TRIALS:
        tried = set(map(size_of, trials))
        # Whether anything fits must be known, whatever time it takes.
        within_time = [s for s in sizes if s in tried or s == sizes[0] or affordable(s)]
        size = next_size(within_time, trials, limit_bytes(), batch_size)
        if size is None:
            break
        trials.append(measure(size))
    return choose(trials), trials


def size_to_try_recomputed(sizes, trials):
    """The size at which recompute may be faster than the sizes that fit without it, or None.

    That can only be where memory, not batch_size, ends the search, and where speed was still growing with the size.
    """
    known = sorted((size_of(t), speed_of(t)) for t in trials if t.fits and speed_of(t))
    if not known:
        return None
    largest, speed = known[-1]
    if len(known) > 1:
        smaller, its_speed = known[-2]
        if (speed / its_speed) ** (1 / math.log2(largest / smaller)) < WORTH_RECOMPUTING:
            return None
    return max((s for s in sizes if largest < s <= RECOMPUTED_TIMES * largest), default=None)
