"""What shows that long work goes on: on a terminal alone, and nothing in a file."""

import contextlib
import math
import os
import sys
import threading
import time

from nanofit.errors import PatientOutput


def _screen():
    """Standard error, where that is a terminal, else None; of a machine's ranks, one speaks."""
    shown = sys.stderr.isatty() and os.environ.get("LOCAL_RANK", "0") == "0"
    return PatientOutput(sys.stderr) if shown else None  # a terminal that is closed ends no run


@contextlib.contextmanager
def waiting(what, seconds_left=math.inf):
    """Count the seconds of work that can't be counted otherwise; what is done is told as 'compiling'.

    seconds_left: what it may take, if there is a limit; below 0 where that is used up already.
    """
    if not (screen := _screen()):
        yield
        return
    done = threading.Event()
    of = f" of {max(0.0, seconds_left):.0f}" if seconds_left < math.inf else ""
    start = time.perf_counter()

    def tick():
        while not done.wait(1.0):
            # At the beginning of the line again, where whatever is printed meanwhile takes its place.
            print(f"{what}: {time.perf_counter() - start:.0f}{of} s \033[K\r", end="", file=screen, flush=True)

    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield
    finally:
        done.set()
        ticker.join()
        print("\033[K", end="", file=screen, flush=True)


def bar(items, what, total):
    """items, counted as they are asked for."""
    if not (screen := _screen()):
        yield from items
        return
    shown = -math.inf
    try:
        for count, item in enumerate(items):
            if (now := time.perf_counter()) - shown > 0.1:
                print(f"{what}: {count} of {total} \033[K\r", end="", file=screen, flush=True)
                shown = now
            yield item
    finally:
        print("\033[K", end="", file=screen, flush=True)
