"""Facts about the system without torch: memory and processors that this process may use, and NVIDIA's driver.

A process is in nested control groups, and the tightest limit of all levels counts. Versions 1 and 2 of control groups
have different file names, and a system may have both.
"""

import contextlib
import ctypes
import math
import os
import re
import subprocess
import sys
from pathlib import Path

from nanofit.errors import UsageError

# Files of the limit and of what is used, and the entry in memory.stat for what is freed when memory is needed.
MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # version 1
)


def _groups(controller, root):
    """Folders of all control groups of this process that it can see."""
    found = []
    with contextlib.suppress(OSError):  # no Linux
        for line in Path(root, "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or controller in controllers.split(","):
                top = Path(root, "sys/fs/cgroup", controller if controllers else "")  # version 2 names no controller
                group = top / path.lstrip("/")  # in a container it may not exist, but its top does
                found += [folder for folder in (group, *group.parents) if folder.is_relative_to(top)]
    return found


def group_memory(root="/"):
    """(the smallest memory limit of all control groups, the least memory left), in bytes; (None, None) if none."""
    limits, free = [], []
    for folder in _groups("memory", root):
        for most, used, cached in MEMORY_FILES:
            with contextlib.suppress(OSError, ValueError, TypeError):  # not this version; no limit ('max')
                limit = int((folder / most).read_text())
                if limit < 2**60:  # version 1's number for no limit is larger
                    limits.append(limit)
                    kept = re.search(rf"^{cached} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
                    taken = int(_text(folder / used) or 0) - int(kept[1] if kept else 0)
                    free.append(max(0, limit - taken))
    return (min(limits), min(free)) if limits else (None, None)


def _text(path):
    """A file's text, '' if it can't be read."""
    with contextlib.suppress(OSError):
        return path.read_text()
    return ""


def processors(root="/"):
    """How many processors this process may keep busy."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _groups("cpu", root):
        for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
            with contextlib.suppress(OSError, ValueError):  # not this version; no limit ('max')
                quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
                if quota > 0:
                    count = min(count, math.ceil(quota / period))
    return count


def machine_memory():
    """All memory of this machine in bytes; sys.maxsize if unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has other ways
        return sys.maxsize


def free_memory(root="/"):
    """Bytes that this process can still take. UsageError if unknown."""
    available, left = proc("meminfo", "MemAvailable", root), group_memory(root)[1]
    return available if left is None else min(available, left)


def proc(file, name, root="/"):
    """A figure of Linux's /proc, in bytes."""
    try:
        with open(f"{root}proc/{file}") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith(f"{name}:"))
    except (OSError, StopIteration) as e:
        raise UsageError("auto_fit measures memory on a CPU by Linux's /proc, which isn't here: set batch_size") from e


def cap_memory(limit_bytes):
    """On Linux, let allocations of this process fail beyond about limit_bytes of the machine's memory."""
    if sys.platform == "linux":
        import resource

        # This counts memory that is asked for, used or not: 1 GiB more for threads' stacks and libraries.
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes + 2**30, resource.RLIM_INFINITY))


def nvidia_smi(query):
    """Lines of nvidia-smi's answer to a query; none if it isn't installed or fails."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def driver_version():
    """The version of NVIDIA's driver, '' if unknown."""
    return next(iter(nvidia_smi("--query-gpu=driver_version")), "")


MALLOC_NAMES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
TRIM_THRESHOLD, MMAP_MAX = -1, -4  # parameters of glibc's mallopt


def _of_glibc(name):
    """A function of glibc, or one that does nothing if the C library is another."""
    return getattr(ctypes.CDLL(None), name, lambda *_: 0) if sys.platform == "linux" else lambda *_: 0


def keep_memory():
    """Let this process keep freed memory for its next allocations, as torch does on GPUs, unless the user has set it.

    glibc gives large blocks back at once. In each training step on a CPU, the system would clear gigabytes anew.
    """
    if not set(MALLOC_NAMES) & set(os.environ):
        _of_glibc("mallopt")(MMAP_MAX, 0)
        _of_glibc("mallopt")(TRIM_THRESHOLD, -1)


def give_back_memory():
    """Give the system back the free memory that this process keeps."""
    _of_glibc("malloc_trim")(0)
