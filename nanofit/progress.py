"""What shows that long work goes on: on a terminal alone, and nothing in a file."""

import contextlib
import sys
import threading
import time


@contextlib.contextmanager
def waiting(what):
    """Count the seconds of work that can't be counted otherwise; what is done is told as 'compiling'."""
    if not sys.stderr.isatty():
        yield
        return
    done = threading.Event()
    start = time.perf_counter()

    def tick():
        while not done.wait(1.0):
            print(f"\r{what}: {time.perf_counter() - start:.0f} s ", end="", file=sys.stderr, flush=True)

    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield
    finally:
        done.set()
        ticker.join()
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def bar(items, what, total):
    """items, with a bar that counts them."""
    if not sys.stderr.isatty():
        return items
    from tqdm import tqdm  # comes with datasets

    return tqdm(items, desc=what, total=total, leave=False)
