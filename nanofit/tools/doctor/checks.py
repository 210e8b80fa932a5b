"""Checks of this machine. torch may be missing here, or fail.

A check is a function of facts() and of the run's keys. It returns a Verdict, or None if it doesn't apply. TROUBLES.md
has a row for each.
"""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import warnings
from dataclasses import dataclass

from nanofit import host
from nanofit.autofit.search import TRITON_CAPABILITY
from nanofit.errors import UsageError, first_line, is_out_of_memory
from nanofit.units import GIB, gib

OK, WARNING, STOP = "ok", "warning", "stop"
MOSTLY_FREE = 0.9  # of a GPU's memory; if less is free, another process holds much of it
LEAST_MEMORY = 2 * GIB  # of the machine, for Python, torch and a compiler
PACKAGES = (
    "numpy", "triton", "tiktoken", "datasets", "safetensors", "transformers", "torchao", "wandb", "tensorboard", "bokeh"
)  # fmt: skip
TORCHS = ("PYTORCH_", "TORCH_", "TORCHINDUCTOR_", "TORCHDYNAMO_")  # how torch's variables begin


@dataclass(frozen=True)
class Verdict:
    """level: OK, WARNING, or STOP for what would stop the run. do: a command, or what to do."""

    level: str
    says: str
    do: str = ""


def facts(environment):
    """Facts about this machine, as a dict. Memory is in bytes, or None if unknown.

    environment: variables as the user set them, before a script or torch adds its own. Call it before anything else
    asks torch for GPUs: torch warns only the first time.
    """
    known = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "wsl": "microsoft" in platform.release().lower(),
        "packages": {d.name: d.version for d in importlib.metadata.distributions() if d.name in PACKAGES},
        "variables": {name: value for name, value in sorted(environment.items()) if name.startswith(TORCHS)},
        "driver": host.driver_version(),
        "memory": host.machine_memory(),
        "free": None,
        "container": host.group_memory()[0],
    }
    with contextlib.suppress(UsageError):
        known["free"] = host.free_memory()
    try:
        import numpy  # noqa: F401
        import torch
    except Exception as e:  # a library that it lacks, another version of numpy, half an installation
        return {**known, "torch": None, "torch_failure": f"{type(e).__name__}: {first_line(e)}"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        **known,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",  # that torch is built for
        "said": " ".join(first_line(warning.message) for warning in caught),
        "gpus": [_facts_of(torch.device("cuda", index)) for index in range(count)],
    }


def _facts_of(device):
    """Facts about a GPU. Asking for free memory takes some of it, for CUDA's context, as training does."""
    from nanofit import machine

    try:
        free = machine.free_memory_bytes(device)
    except RuntimeError as e:  # no room for CUDA's context, or a GPU in distress
        free = 0 if is_out_of_memory(e) else None
    return {
        "name": machine.device_name(device),
        "sm_count": machine.sm_count(device),
        "capability": machine.capability(device),
        "total_bytes": machine.total_memory_bytes(device),
        "free_bytes": free,
        "holders": machine.gpu_processes(device),
    }


def _capability(gpu):
    return "compute capability {}.{}".format(*gpu["capability"])


def _gpu(facts, config):
    """The GPU that the run would use, from facts(); None if it is another device."""
    kind, _, index = config.get("device", "cpu").partition(":")
    at = int(index) if index.isdigit() else 0
    gpus = facts.get("gpus", ())
    return gpus[at] if kind == "cuda" and at < len(gpus) else None


def system(facts, config):
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    variables = "".join(f", {name}={value}" for name, value in facts["variables"].items())
    return Verdict(OK, f"{facts['system']}, Python {platform.python_version()}, {packages}{variables}")


def torch_there(facts, config):
    if not facts["torch"]:
        says = f"torch can't be imported: {facts['torch_failure']}"
        return Verdict(STOP, says, "pip install --force-reinstall torch numpy")
    built = f"for CUDA {facts['cuda']}" if facts["cuda"] else "without CUDA"
    return Verdict(OK, f"torch {facts['torch']}, built {built}")


def gpu_seen(facts, config):
    if not facts["torch"]:
        return None
    if facts["gpus"]:
        told = [f"{gpu['name']} ({gpu['sm_count']} SMs, {_capability(gpu)})" for gpu in facts["gpus"]]
        return Verdict(OK, f"torch sees {', '.join(told)}; driver {facts['driver'] or 'unknown'}")
    if not facts["driver"]:
        return Verdict(OK, "no NVIDIA driver is found, and torch sees no CUDA GPU")
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return Verdict(WARNING, "CUDA_VISIBLE_DEVICES hides every GPU", "unset CUDA_VISIBLE_DEVICES")
    if not facts["cuda"]:
        says = f"NVIDIA's driver {facts['driver']} is here, but torch {facts['torch']} is a build without CUDA"
        return Verdict(WARNING, says, "pip uninstall -y torch && pip install torch")
    says = f"torch, built for CUDA {facts['cuda']}, sees no GPU, though NVIDIA's driver {facts['driver']} is here"
    return Verdict(WARNING, says + (f" ({facts['said']})" if facts["said"] else ""), "nvidia-smi")


def memory_held_by_others(facts, config):
    gpu = _gpu(facts, config)
    if gpu is None or gpu["free_bytes"] is None:
        return None
    free = f"{gib(gpu['free_bytes'])} of {gib(gpu['total_bytes'])} are free"
    if gpu["holders"]:
        who = ", ".join(f"{name} (pid {pid}) {mib:,} MiB" for pid, name, mib in gpu["holders"])
        return Verdict(WARNING, f"{free}; held by {who}", f"kill {gpu['holders'][0][0]}, if that may end")
    if gpu["free_bytes"] < MOSTLY_FREE * gpu["total_bytes"]:
        return Verdict(WARNING, f"{free}; by whom the rest is held isn't known", "nvidia-smi")
    return Verdict(OK, free)


def bfloat16_in_hardware(facts, config):
    gpu = _gpu(facts, config)
    if gpu is None or config["dtype"] != "bfloat16" or tuple(gpu["capability"]) >= (8, 0):
        return None
    return Verdict(WARNING, f"{_capability(gpu)} has no bfloat16: it is emulated, and slow", "--dtype=float16")


def allocator_asked(facts, config):
    told = [value for name, value in facts["variables"].items() if name.endswith("ALLOC_CONF")]
    if _gpu(facts, config) is None or facts["wsl"] or not told or "expandable_segments:True" in "".join(told):
        return None
    says = f"torch's allocator is told {told[0]!r}, without expandable_segments: memory may be lost to fragmentation"
    return Verdict(WARNING, says, "unset PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF")


def compiler_there(facts, config):
    if not config.get("compile"):
        return None
    gpu = _gpu(facts, config)
    if gpu and tuple(gpu["capability"]) < TRITON_CAPABILITY:
        says = f"Triton needs compute capability 7.0, this GPU has {_capability(gpu)}: nothing is compiled"
        return Verdict(WARNING, says, "--compile=False")
    if gpu and "triton" not in facts["packages"]:
        return Verdict(WARNING, "Triton is not installed: torch.compile fails without it", "--compile=False")
    kinds = ("cc", "gcc", "clang", "cl") if gpu else ("c++", "g++", "clang++", "cl")
    if found := [name for name in kinds if shutil.which(name)]:
        return Verdict(OK, f"{found[0]} is there for torch.compile")
    says = f"none of the compilers {', '.join(kinds)} is found: torch.compile fails, and training goes on without it"
    return Verdict(WARNING, says, "apt install g++, or --compile=False")


def memory_left(facts, config):
    if facts.get("free") is None:
        return None
    limit = f", the container's limit is {gib(facts['container'])}" if facts["container"] else ""
    says = f"{gib(facts['free'])} of {gib(facts['memory'])} are free{limit}"
    if facts["free"] < LEAST_MEMORY:
        return Verdict(WARNING, f"{says}: Linux may kill the run", "free -h, and end what needn't run")
    return Verdict(OK, says)


def wsl_disk(facts, config):
    if facts["wsl"] and os.getcwd().startswith("/mnt/"):
        return Verdict(WARNING, "this folder is on Windows' disk, which WSL2 reads slowly", "cp -r . ~/nanogpt-fit")
    return None


CHECKS = {  # in the order in which they are told
    "system": system,
    "torch": torch_there,
    "gpu": gpu_seen,
    "gpu memory": memory_held_by_others,
    "bfloat16": bfloat16_in_hardware,
    "allocator": allocator_asked,
    "compiler": compiler_there,
    "memory": memory_left,
    "wsl": wsl_disk,
}


def verdicts_on(facts, config):
    """{name of a check: its Verdict} for the checks that apply. config: {} if the keys aren't known."""
    found = {name: check(facts, config) for name, check in CHECKS.items()}
    return {name: verdict for name, verdict in found.items() if verdict}
