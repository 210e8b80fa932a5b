"""How memory is taken: a GPU's by torch's allocator, as the environment says before torch is imported; the machine's by
the C library's, which a process tells while it runs.
"""

import ctypes
import importlib.metadata
import os
import platform
import sys

NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # the second, newer one is read from torch 2.10 on


def prefer_expandable_segments():
    """Ask for memory that grows in place, which fragments less; what the user has set stands.

    Not under WSL2, whose drivers refuse it at the first allocation.
    """
    if sys.platform != "linux" or "microsoft" in platform.release().lower() or set(NAMES) & set(os.environ):
        return
    try:
        release = tuple(int(n) for n in importlib.metadata.version("torch").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return  # importing torch will say so
    os.environ[NAMES[release >= (2, 10)]] = "expandable_segments:True"


MALLOC_NAMES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
TRIM_THRESHOLD, MMAP_MAX = -1, -4  # parameters of glibc's mallopt


def _of_glibc(name):
    """A function of the C library, or one that does nothing where it is another library."""
    return getattr(ctypes.CDLL(None), name, lambda *_: 0) if sys.platform == "linux" else lambda *_: 0


def keep_host_memory():
    """Let this process keep what it has freed of the machine's memory for what it needs next, as torch does on GPUs.

    glibc would give back blocks of some MiB at once, and in each step of training on a CPU the system would have to
    find and clear gigabytes anew. What the user has set stands.
    """
    if not set(MALLOC_NAMES) & set(os.environ):
        _of_glibc("mallopt")(MMAP_MAX, 0)
        _of_glibc("mallopt")(TRIM_THRESHOLD, -1)


def give_back_host_memory():
    """Give back what this process keeps of the machine's memory without need."""
    _of_glibc("malloc_trim")(0)
