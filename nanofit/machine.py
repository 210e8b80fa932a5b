"""Facts about the machine: device, precision, memory, speed of the hardware, random generators.

The only file that calls torch.cuda or torch.mps. Nothing here decides anything about the run.
"""

import contextlib
import os
import random
import re
import sys
import time

import numpy as np
import torch

from nanofit import cards, host
from nanofit.errors import UsageError, first_line
from nanofit.units import gib

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# ---- device and precision ----------------------------------------------------------------------------


def best_device():
    """'cuda' if there is a GPU, else 'mps', else 'cpu'."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def best_dtype(device):
    """The default precision: cards.best_dtype on CUDA GPUs, else float32."""
    on_gpu = device.startswith("cuda") and torch.cuda.is_available()
    return cards.best_dtype(capability(find_device(device))) if on_gpu else "float32"


def is_here(name):
    """Whether this machine has the device of this name."""
    with contextlib.suppress(UsageError):
        return bool(find_device(name))
    return False


def find_device(name):
    """torch.device for a name such as 'cuda', 'cuda:1', 'mps' or 'cpu'; UsageError if it isn't there.

    This takes no memory of a GPU; set_device does.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cuda", "mps", "cpu"):
        raise UsageError(f"device must be 'cuda', 'cuda:N', 'mps' or 'cpu', not {name!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise UsageError(f"device={name!r}, but {_why_no_gpu()}, or leave --device out to use {best_device()!r}")
        if (device.index or 0) >= count:
            raise UsageError(f"device={name!r}, but there are {count} GPUs, numbered from 0")
        device = torch.device("cuda", device.index or 0)  # torch.cuda.set_device wants a number
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"device='mps', but there is no Metal GPU: leave --device out to use {best_device()!r}")
    return device


def _why_no_gpu():
    """Why torch sees no CUDA GPU: no driver, a driver that is too old, a build without CUDA."""
    build = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a build without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as e:
        build += f"; it says: {first_line(e).partition('. ')[0]}"
    return f"torch sees no CUDA GPU (torch {torch.__version__} {build}): python doctor.py says why"


def require_kernels(device):
    """UsageError if the installed torch has no kernels for a GPU."""
    mine, architectures = capability(device), " ".join(torch.cuda.get_arch_list())  # 'sm_80 sm_90 compute_90'
    built = [(kind, *divmod(int(n), 10)) for kind, n in re.findall(r"(sm|compute)_(\d+)", architectures)]
    # A kernel runs on its own major version, from its minor version on; PTX ("compute") runs on all newer ones.
    fitting = [v for kind, *v in built if tuple(v) <= mine and (kind == "compute" or v[0] == mine[0])]
    if fitting or not built:
        return
    raise UsageError(
        f"{device_name(device)} has compute capability {mine[0]}.{mine[1]}, and torch {torch.__version__} has kernels "
        f"for {architectures} alone: install another (pytorch.org/get-started/previous-versions), for a newer GPU a "
        "newer one, for an older GPU an older one, or use --device=cpu"
    )


def set_device(device, limit_bytes=None):
    """Make device the current one. On a CPU, let the process keep freed memory. On CUDA, its context takes memory.

    limit_bytes: what tensors may take of a GPU. More raises torch.OutOfMemoryError; some drivers would crawl instead.
    """
    if device.type == "cuda":
        require_kernels(device)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where products stay in float32
    elif device.type == "cpu":
        host.keep_memory()
        if "OMP_NUM_THREADS" not in os.environ:  # torch counts the machine's processors, not the container's
            torch.set_num_threads(min(torch.get_num_threads(), host.processors()))
    if limit_bytes:
        cap_memory(device, limit_bytes)


def autocast(device, dtype, keep_weights=False):
    """A reusable context in which products run in dtype ('float32', 'bfloat16' or 'float16').

    keep_weights: keep the converted weights until the context ends, for many passes in one context.
    """
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.amp.autocast(device_type=device.type, dtype=DTYPES[dtype], cache_enabled=keep_weights)


def grad_scaler(device, dtype):
    """Loss scaling against float16's underflow; it does nothing except on CUDA with float16."""
    return torch.amp.GradScaler(device.type, enabled=device.type == "cuda" and dtype == "float16")


def device_name(device):
    """The GPU's name as its driver gives it, else 'CPU' or 'MPS'."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def sm_count(device):
    """Streaming multiprocessors of a GPU; 0 for anything else."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def capability(device):
    """CUDA compute capability (major, minor); (0, 0) for anything else."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def device_info(device):
    """What memory and speed depend on: the device, its memory, driver and torch, as a dict."""
    return {
        "device": device_name(device),
        "memory": total_memory_bytes(device),
        "driver": host.driver_version() if device.type == "cuda" else "",
        "torch": torch.__version__,
    }


def gpu_processes(device):
    """Other processes that hold memory of this GPU, according to nvidia-smi: [(pid, name, MiB)]."""
    if device.type != "cuda":
        return []
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    found = []
    for line in host.nvidia_smi("--query-compute-apps=gpu_uuid,pid,process_name,used_memory"):
        match = re.fullmatch(r"(\S+), (\d+), (.*), (\d+)", line.strip())  # some systems answer [N/A]
        if match and match[1].endswith(uuid) and int(match[2]) not in (os.getpid(), os.getppid()):
            found.append((int(match[2]), match[3], int(match[4])))
    return found


def peak_flops(device, dtype):
    """(peak FLOP/s of a device in dtype, note). note: a line if it isn't from the table of cards.

    GPU: dense 16-bit products; an unknown one counts as an A100. CPU: measured with a large product.
    """
    if device.type == "cpu":
        a = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
        flops = 2 * 1024**3 / min(seconds_of(lambda: a @ a, device)[0] for _ in range(10))
        return flops, f"mfu: a share of the {flops / 1e9:,.0f} GFLOP/s that a matrix product reaches on this CPU"
    name, a100 = device_name(device), cards.A100.tflops
    if card := cards.of_driver(name):
        return card.tflops * 1e12, ""
    return a100 * 1e12, f"mfu: no peak FLOP/s is known for {name}, so it is a share of an A100's {a100} TFLOPS"


# ---- time, memory, random numbers -------------------------------------------------------------------


def synchronize(device):
    """Wait until the device has done all its work."""
    getattr(torch, device.type).synchronize()


def seconds_of(act, device):
    """(seconds of act() and all its work on the device, seconds until act() returned)."""
    synchronize(device)
    start = time.perf_counter()
    act()
    returned = time.perf_counter() - start
    synchronize(device)
    return time.perf_counter() - start, returned


def total_memory_bytes(device):
    """All memory of the device; on a CPU, that of the machine or of the container."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return min(host.machine_memory(), host.group_memory()[0] or sys.maxsize)


def free_memory_bytes(device):
    """Free memory of the device; on a CPU, what the system or the container can still give."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return host.free_memory()


def memory_now(device):
    """A few words about the device's memory now, for messages."""
    if device.type != "cuda":
        return f"on {device.type}"
    free, total = map(gib, torch.cuda.mem_get_info(device))
    return f"{free} of {total} are free, this process holds {gib(torch.cuda.memory_reserved(device))}"


def cap_memory(device, limit_bytes):
    """Let this process's allocations on a GPU fail beyond limit_bytes."""
    if device.type == "cuda":
        fraction = min(1.0, limit_bytes / total_memory_bytes(device))
        torch.cuda.set_per_process_memory_fraction(fraction, device)


def empty_cache(device):
    """Give the device back the free memory that the allocator keeps."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    else:
        host.give_back_memory()


def reset_peak_memory(device):
    """Count peaks from here on. (On a CPU, the peak counts from the start of the process.)"""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_reserved_bytes(device):
    """Most bytes of a GPU that the allocator has reserved, fragmentation included.

    On a CPU, the most that was resident of this process (VmHWM); on mps, what the driver has given so far.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return torch.mps.driver_allocated_memory() if device.type == "mps" else host.proc("self/status", "VmHWM")


def peak_allocated_bytes(device):
    """Most bytes of a GPU that tensors have held; 0 if torch doesn't count them."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def allocator_retries(device):
    """How often the allocator had to free its cache to find memory."""
    return torch.cuda.memory_stats(device).get("num_alloc_retries", 0) if device.type == "cuda" else 0


def memory_in_use(device):
    """(most bytes that tensors have held so far, bytes that the allocator holds now), each None if unknown.

    On a CPU: what is resident of this process.
    """
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)  # once: it takes longer than all else here
        return stats.get("allocated_bytes.all.peak", 0), stats.get("reserved_bytes.all.current", 0)
    if device.type == "mps":
        return None, torch.mps.driver_allocated_memory()
    try:
        return host.proc("self/status", "VmHWM"), host.proc("self/status", "VmRSS")
    except UsageError:
        return None, None


def rng_state(device):
    """States of torch's, Python's and numpy's random generators, as tensors and plain values."""
    kind, words, *rest = np.random.get_state()
    own = {} if device.type == "cpu" else {device.type: getattr(torch, device.type).get_rng_state()}
    state = {"cpu": torch.get_rng_state(), **own}
    return {**state, "python": random.getstate(), "numpy": (kind, words.tolist(), *rest)}


def set_rng_state(state, device):
    """Restore what rng_state gave. A generator that is missing there, or of another device, is left alone."""
    torch.set_rng_state(state["cpu"])
    if "python" in state:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
    if device.type != "cpu" and device.type in state:
        getattr(torch, device.type).set_rng_state(state[device.type])
