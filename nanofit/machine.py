"""Facts about the machine: device, precision, memory, speed of the hardware, random generators.

The one file that calls torch.cuda or torch.mps. Nothing here decides anything about the run; differences between
torch releases live here too, one place each.
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
    """'cuda' where there is a GPU, else 'mps', else 'cpu'."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def best_dtype(device):
    """The precision to train in when none is asked for: 16 bits on CUDA GPUs, as cards.best_dtype, else float32."""
    on_gpu = device.startswith("cuda") and torch.cuda.is_available()
    return cards.best_dtype(capability(find_device(device))) if on_gpu else "float32"


def is_here(name):
    """Whether this machine has the device of this name."""
    with contextlib.suppress(UsageError):
        return bool(find_device(name))
    return False


def find_device(name):
    """torch.device for a name such as 'cuda', 'cuda:1', 'mps' or 'cpu', after a look whether it is there.

    Looking takes no memory of a GPU; set_device does.
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
    """What torch tells of the CUDA GPU that it doesn't see: no driver, one that is too old, a build without CUDA."""
    build = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a build without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as e:
        build += f"; it says: {first_line(e).partition('. ')[0]}"
    return f"torch sees no CUDA GPU (torch {torch.__version__} {build}): python doctor.py says why"


def require_kernels(device):
    """UsageError where the installed torch has no kernels for a GPU, which would be an error at the first of them."""
    mine, architectures = capability(device), " ".join(torch.cuda.get_arch_list())  # 'sm_80 sm_90 compute_90'
    built = [(kind, *divmod(int(n), 10)) for kind, n in re.findall(r"(sm|compute)_(\d+)", architectures)]
    # A kernel runs within its major version, on its minor version and above; PTX ("compute") on all that is newer.
    fitting = [v for kind, *v in built if tuple(v) <= mine and (kind == "compute" or v[0] == mine[0])]
    if fitting or not built:
        return
    raise UsageError(
        f"{device_name(device)} has compute capability {mine[0]}.{mine[1]}, and torch {torch.__version__} has kernels "
        f"for {architectures} alone: install another (pytorch.org/get-started/previous-versions), for a newer GPU a "
        "newer one, for an older GPU an older one, or use --device=cpu"
    )


def set_device(device, limit_bytes=None):
    """Make device the current one, and let the process keep its memory. On CUDA this takes some, for its context.

    limit_bytes: what tensors may take of a GPU; more raises torch.OutOfMemoryError, where some drivers would crawl on.
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

    keep_weights: keep the converted weights until the context ends, for many passes in one; training has one.
    """
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.amp.autocast(device_type=device.type, dtype=DTYPES[dtype], cache_enabled=keep_weights)


def grad_scaler(device, dtype):
    """Loss scaling against float16's underflow: at work on CUDA with float16 alone, else it does nothing."""
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
    """What an answer about memory and speed depends on: the device, its memory, driver and torch, as a dict."""
    return {
        "device": device_name(device),
        "memory": total_memory_bytes(device),
        "driver": host.driver_version() if device.type == "cuda" else "",
        "torch": torch.__version__,
    }


def gpu_processes(device):
    """Other processes that hold memory of this GPU, as far as nvidia-smi sees them: [(pid, name, MiB)]."""
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
    """(FLOP/s, note) that a device can do in dtype; note says where that isn't from a table.

    A GPU's are those of dense 16-bit products, an A100's where it isn't known; a CPU's those of a large product here.
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
    """Wait until the device has done all that was asked of it, so that a clock tells the truth."""
    getattr(torch, device.type).synchronize()


def seconds_of(act, device):
    """(seconds that act() and all that it asks of the device take, seconds until it has returned)."""
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
    """Memory that nobody holds now; on a CPU, what the system or the container can still give."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return host.free_memory()


def memory_now(device):
    """A few words on the device's memory as it is now, for messages."""
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
    """Give back to the device what the allocator keeps without need."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    else:
        host.give_back_memory()


def reset_peak_memory(device):
    """Count peaks from here on. A CPU's process keeps the highest since it began."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_reserved_bytes(device):
    """Most bytes that the allocator has held of a GPU, what fragmentation wastes included.

    On a CPU, the most that was resident of this process (VmHWM); on mps, what the driver has given by now.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return torch.mps.driver_allocated_memory() if device.type == "mps" else host.proc("self/status", "VmHWM")


def peak_allocated_bytes(device):
    """Most bytes that tensors have held of a GPU; 0 where torch doesn't count them."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def allocator_retries(device):
    """How often the allocator had to give up its cache to find memory: a sign that it is full."""
    return torch.cuda.memory_stats(device).get("num_alloc_retries", 0) if device.type == "cuda" else 0


def memory_in_use(device):
    """(bytes that tensors have held at most so far, bytes that the allocator holds now, with what it keeps in reserve).

    On a CPU both are what is resident of this process. None where the system doesn't tell.
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
    """States of the generators that a model may draw from, torch's, Python's and numpy's: tensors and plain values."""
    kind, words, *rest = np.random.get_state()
    own = {} if device.type == "cpu" else {device.type: getattr(torch, device.type).get_rng_state()}
    state = {"cpu": torch.get_rng_state(), **own}
    return {**state, "python": random.getstate(), "numpy": (kind, words.tolist(), *rest)}


def set_rng_state(state, device):
    """Put back what rng_state gave; a generator that it lacks, or of a device that isn't used now, is left alone."""
    torch.set_rng_state(state["cpu"])
    if "python" in state:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
    if device.type != "cpu" and device.type in state:
        getattr(torch, device.type).set_rng_state(state[device.type])
