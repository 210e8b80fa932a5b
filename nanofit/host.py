"""What the system tells without torch: memory and processors that this process may use, and NVIDIA's driver.

A process is in one control group for each resource, and that one is within others: the tightest limit counts, whichever
level sets it. Version 1 and 2 of control groups differ in the names of their files, and may be there side by side.
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

# The limit, what is used of it, and, in memory.stat, the part of that which is given up where memory is asked for.
MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # version 1
)


def _groups(controller, root):
    """Folders of all control groups that this process is in, as far as it sees them."""
    found = []
    with contextlib.suppress(OSError):  # no Linux
        for line in Path(root, "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or controller in controllers.split(","):
                top = Path(root, "sys/fs/cgroup", controller if controllers else "")  # version 2 names no controller
                group = top / path.lstrip("/")  # may lie outside of what a container sees: then its top is there
                found += [folder for folder in (group, *group.parents) if folder.is_relative_to(top)]
    return found


def group_memory(root="/"):
    """(the smallest limit on memory, the least that is left of one) of control groups, in bytes; None without any."""
    limits, free = [], []
    for folder in _groups("memory", root):
        for most, used, cached in MEMORY_FILES:
            with contextlib.suppress(OSError, ValueError, TypeError):  # not this version; no limit ('max')
                limit = int((folder / most).read_text())
                if limit < 2**60:  # version 1 says so that there is none
                    limits.append(limit)
                    kept = re.search(rf"^{cached} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
                    taken = int(_text(folder / used) or 0) - int(kept[1] if kept else 0)
                    free.append(max(0, limit - taken))
    return (min(limits), min(free)) if limits else (None, None)


def _text(path):
    """What a file holds, '' where it can't be read."""
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
    """All memory of this machine in bytes; a number that nothing exceeds where the system doesn't tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has other ways
        return sys.maxsize


def free_memory(root="/"):
    """Bytes that this process can still take. UsageError where the system doesn't tell."""
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
    """Let this process's allocations in the machine's memory fail beyond about limit_bytes, where Linux can."""
    if sys.platform == "linux":
        import resource

        # What is asked for counts here, used or not: threads' stacks and libraries get room beside the limit.
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes + 2**30, resource.RLIM_INFINITY))


def nvidia_smi(query):
    """Lines of nvidia-smi's answer to a query; none where it isn't installed or fails."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def driver_version():
    """Of NVIDIA's driver, '' where nvidia-smi doesn't tell it."""
    return next(iter(nvidia_smi("--query-gpu=driver_version")), "")


MALLOC_NAMES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
TRIM_THRESHOLD, MMAP_MAX = -1, -4  # parameters of glibc's mallopt


def _of_glibc(name):
    """A function of the C library, or one that does nothing where it is another library."""
    return getattr(ctypes.CDLL(None), name, lambda *_: 0) if sys.platform == "linux" else lambda *_: 0


def keep_memory():
    """Let this process keep what it has freed of the machine's memory for what it needs next, as torch does on GPUs.

    glibc would give back blocks of some MiB at once, and in each step of training on a CPU the system would have to
    find and clear gigabytes anew. What the user has set stands.
    """
    if not set(MALLOC_NAMES) & set(os.environ):
        _of_glibc("mallopt")(MMAP_MAX, 0)
        _of_glibc("mallopt")(TRIM_THRESHOLD, -1)


def give_back_memory():
    """Give back to the system what this process keeps without need."""
    _of_glibc("malloc_trim")(0)
