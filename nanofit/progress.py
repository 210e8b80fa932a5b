"""Progress of long work, shown only on a terminal."""

import contextlib
import math
import os
import sys
import threading
import time

from nanofit.errors import PatientOutput


def _screen():
    """Standard error if it is a terminal and this is the first rank of the machine, else None."""
    shown = sys.stderr.isatty() and os.environ.get("LOCAL_RANK", "0") == "0"
    return PatientOutput(sys.stderr) if shown else None  # closing the terminal doesn't end the run


@contextlib.contextmanager
def waiting(what, seconds_left=math.inf):
    """Show the seconds that some work takes. what: a word for it, such as 'compiling'. seconds_left: its limit."""
    if not (screen := _screen()):
        yield
        return
    done = threading.Event()
    of = f" of {max(0.0, seconds_left):.0f}" if seconds_left < math.inf else ""
    start = time.perf_counter()

    def tick():
        while not done.wait(1.0):
            # \r: whatever is printed next replaces this line.
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
    """The items, counted as they are taken."""
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
