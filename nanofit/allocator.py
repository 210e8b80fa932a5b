"""How torch's allocator takes a GPU's memory: settled in the environment before torch is imported."""

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
