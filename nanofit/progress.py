"""What shows that long work goes on: on a terminal alone, and nothing in a file."""

import contextlib
import math
import os
import sys
import threading
import time


def _is_shown():
    """Whether standard error is a terminal; of a machine's ranks, one speaks."""
    return sys.stderr.isatty() and os.environ.get("LOCAL_RANK", "0") == "0"


@contextlib.contextmanager
def waiting(what, seconds_left=math.inf):
    """Count the seconds of work that can't be counted otherwise; what is done is told as 'compiling'.

    seconds_left: what it may take, if there is a limit; below 0 where that is used up already.
    """
    if not _is_shown():
        yield
        return
    done = threading.Event()
    of = f" of {max(0.0, seconds_left):.0f}" if seconds_left < math.inf else ""
    start = time.perf_counter()

    def tick():
        while not done.wait(1.0):
            # At the beginning of the line again, where whatever is printed meanwhile takes its place.
            print(f"{what}: {time.perf_counter() - start:.0f}{of} s \033[K\r", end="", file=sys.stderr, flush=True)

    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield
    finally:
        done.set()
        ticker.join()
        print("\033[K", end="", file=sys.stderr, flush=True)


def bar(items, what, total):
    """items, with a bar that counts them."""
    if not _is_shown():
        return items
    from tqdm import tqdm  # comes with datasets

    return tqdm(items, desc=what, total=total, leave=False)
