"""Which micro-batch size to try next, and which wins. Pure: whoever calls it measures."""

import bisect
import math

MAX_TRIALS = 5
NEAR_ENOUGH = 0.98  # of the fastest: headroom is worth more than 2% of speed
LIKELY = 0.95  # of the fastest: what promises less is not tried
LEVEL = 0.9  # of the fastest: too close to tell which size is the best
JOINED_TIMES = 8  # a size beyond the configured one may be so many times the largest that was tried
# Recomputing costs about a third more arithmetic. Where doubling the size gains so much speed, two doublings, for which
# recomputing makes room, make up for it: 1.15 ** 2 = 1.32.
WORTH_RECOMPUTING = 1.15
RECOMPUTED_TIMES = 4  # as many sequences, at least, fit with recompute


def line_through(trials):
    """(a, k) of memory = a + k x size bytes, through the smallest and the largest trial with a known peak."""
    known = sorted((t.micro_batch_size, t.peak_bytes) for t in trials if t.peak_bytes)
    if not known:
        return 0.0, 0.0
    (b0, m0), (b1, m1) = known[0], known[-1]
    k = max(0.0, (m1 - m0) / (b1 - b0)) if b1 > b0 else 0.0
    return m1 - k * b1, k


def expected_speed(fitting, size):
    """Tokens per second at a size, were a micro-step's time a fixed part and one for each sequence.

    By the trials around it, or the two that come nearest from below; inf where there aren't two that tell.
    """
    known = sorted((t.micro_batch_size, t.tokens_per_second) for t in fitting if t.tokens_per_second)
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

    First the two smallest, for the line that memory follows; then the largest up to batch_size that the line allows,
    and on from there in steps as long as that promises speed; then what lies between what fits and what doesn't; then
    the neighbours of the fastest, where they may be as fast; last, where speed is level, the middle of the sizes below.
    """
    tried = {t.micro_batch_size for t in trials}
    fitting = [t for t in trials if t.fits]
    for size in sizes[:2]:
        if size not in tried:
            return size
        if sizes[0] in tried and not fitting:
            return None
    low = max(t.micro_batch_size for t in fitting)
    too_large = [t.micro_batch_size for t in trials if not t.fits and t.micro_batch_size > low]
    high = min(too_large, default=sizes[-1] + 1)
    fastest = max(fitting, key=lambda t: t.tokens_per_second)
    if fastest.tokens_per_second:  # to join batches takes time to try, and buys speed alone
        following = next((size for size in sizes if size > low), low)
        further = max(following, JOINED_TIMES * low)
        promised = expected_speed(fitting, further) if len(fitting) > 2 else math.inf  # two small ones can't tell
        gains = low >= batch_size and NEAR_ENOUGH * promised > fastest.tokens_per_second
        high = min(high, max(batch_size, further if gains else low) + 1)
    between = [s for s in sizes if low < s < high and s not in tried]
    a, k = line_through(trials)
    allowed = [s for s in between if a + k * s <= limit_bytes]
    if allowed:
        # A line that has been wrong twice is no guide any more.
        return between[len(between) // 2] if len(too_large) > 1 else allowed[-1]
    if not fastest.tokens_per_second:
        return None
    at = sizes.index(fastest.micro_batch_size)
    likely = LIKELY * fastest.tokens_per_second
    for neighbour in sizes[max(0, at - 1) : at] + sizes[at + 1 : at + 2]:
        fits = neighbour < high and a + k * neighbour <= limit_bytes
        if neighbour not in tried and fits and expected_speed(fitting, neighbour) >= likely:
            return neighbour
    level = [t for t in fitting if t.tokens_per_second >= LEVEL * fastest.tokens_per_second]
    below = [s for s in sizes if s < fastest.micro_batch_size and s not in tried]
    return below[len(below) // 2] if below and len(level) > 1 else None


def choose(trials):
    """Of the trials that fit, the smallest within 2% of the fastest; the largest where speed wasn't measured.

    None where nothing fits.
    """
    fitting = sorted((t for t in trials if t.fits), key=lambda t: t.micro_batch_size)
    if not fitting:
        return None
    fastest = max(t.tokens_per_second for t in fitting)
    if not fastest:
        return fitting[-1]
    return next(t for t in fitting if t.tokens_per_second >= NEAR_ENOUGH * fastest)


def search(sizes, limit_bytes, measure, affordable=lambda size: True, batch_size=math.inf):
    """(choice, trials): at most MAX_TRIALS calls of measure(size), which gives a Trial.

    sizes: ascending; those beyond batch_size join batches. limit_bytes: a function, as only the first trial finds it
    out. affordable(size): whether there is time for it. The choice is a trial that was measured to fit, or None.
    """
    trials = []
    while len(trials) < MAX_TRIALS:
        tried = {t.micro_batch_size for t in trials}
        size = next_size([s for s in sizes if s in tried or affordable(s)], trials, limit_bytes(), batch_size)
        if size is None:
            break
        trials.append(measure(size))
    return choose(trials), trials


def size_to_try_recomputed(sizes, trials):
    """The size at which recompute may be faster than the sizes that fit without it, or None.

    That can only be where memory, not batch_size, ends the search, and where speed was still growing with the size.
    """
    fitting = sorted((t for t in trials if t.fits and t.tokens_per_second), key=lambda t: t.micro_batch_size)
    if not fitting or fitting[-1].micro_batch_size == sizes[-1]:
        return None
    largest = fitting[-1]
    if len(fitting) > 1:
        smaller = fitting[-2]
        doublings = math.log2(largest.micro_batch_size / smaller.micro_batch_size)
        if (largest.tokens_per_second / smaller.tokens_per_second) ** (1 / doublings) < WORTH_RECOMPUTING:
            return None
    size = max(size for size in sizes if size <= RECOMPUTED_TIMES * largest.micro_batch_size)
    return size if size > largest.micro_batch_size else None
