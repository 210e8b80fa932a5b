"""Known troubles, each a function of the Facts that says whether it is there and what to do.

TROUBLES.md has a row of each. A check that has nothing to look at returns None.
"""

import re
from dataclasses import dataclass

from nanofit.autofit.compiling import TRITON_CAPABILITY, refuse_mode
from nanofit.units import GIB

OK, WARNING, STOP = "ok", "warning", "stop"
BFLOAT16_CAPABILITY = (8, 0)  # the oldest GPUs that compute in it
MOSTLY_FREE = 0.9  # of a GPU's memory, where nobody else holds much of it
CHECKPOINTS_AT_ONCE = 3  # the last, the one before, and the one that is being written


@dataclass(frozen=True)
class Verdict:
    """level: OK, WARNING or STOP, which ends the run or keeps it from beginning. do: a line to type, or what to do."""

    level: str
    says: str
    do: str = ""


def size_of(count):
    """A number of bytes for people, None where it isn't known."""
    if count is None:
        return "unknown"
    return f"{count / GIB:.2f} GiB" if count >= GIB // 10 else f"{count / 2**20:.1f} MiB"


def _version(pair):
    return ".".join(map(str, pair))


# ---- torch and the GPU -------------------------------------------------------------------------------------


def torch_there(facts):
    if facts.torch_failure:
        says = f"torch can't be imported: {facts.torch_failure}"
        return Verdict(STOP, says, "pip install --force-reinstall torch numpy")
    return Verdict(
        OK, f"torch {facts.torch}, built {f'for CUDA {facts.torch_cuda}' if facts.torch_cuda else 'without CUDA'}"
    )


def gpu_seen(facts):
    if facts.torch_failure:
        return None
    if facts.gpus:
        return Verdict(STOP, facts.device_failure, "--device=cuda:0") if facts.device_failure else _gpus(facts)
    level = STOP if facts.device_failure else WARNING
    if facts.driver_cuda is None and not facts.driver:
        says = "no NVIDIA driver is found, and torch sees no CUDA GPU"
        if facts.device_failure:
            return Verdict(STOP, says, "--device=cpu, or install NVIDIA's driver")
        return Verdict(OK, f"{says}: the device is {facts.config.get('device', 'cpu')}")
    if facts.gpus_hidden:
        return Verdict(level, "CUDA_VISIBLE_DEVICES hides every GPU", "unset CUDA_VISIBLE_DEVICES")
    if not facts.torch_cuda:
        says = f"NVIDIA's driver is here, but torch {facts.torch} is a build without CUDA"
        return Verdict(level, says, "pip uninstall -y torch && pip install torch")
    why = f" ({facts.cuda_said})" if facts.cuda_said else ""
    return Verdict(level, f"torch sees no CUDA GPU, though NVIDIA's driver is here{why}", "nvidia-smi")


def _gpus(facts):
    return Verdict(OK, "torch sees " + ", ".join(gpu.name for gpu in facts.gpus))


def driver_new_enough(facts):
    if facts.driver_cuda is None or not facts.torch_cuda:
        return None
    runs = f"NVIDIA's driver runs CUDA up to {_version(facts.driver_cuda)}"
    # Within a major version, a driver runs what was built for a later minor one.
    if facts.driver_cuda[0] < int(facts.torch_cuda.split(".")[0]):
        level = STOP if facts.asks_cuda else WARNING
        says = f"{runs}, and torch {facts.torch} is built for CUDA {facts.torch_cuda}: the driver is too old"
        return Verdict(level, says, "install a newer NVIDIA driver, or a torch that is built for an older CUDA")
    return Verdict(OK, f"{runs}, torch is built for {facts.torch_cuda}")


def kernels_built(facts):
    if facts.gpu is None or not facts.architectures:
        return None
    capability = facts.gpu.capability
    for kind, digits in re.findall(r"(sm|compute)_(\d+)", " ".join(facts.architectures)):
        major, minor = int(digits[:-1]), int(digits[-1])
        # Machine code runs within its major version, PTX on whatever comes later.
        if (kind == "compute" or major == capability[0]) and (major, minor) <= tuple(capability):
            return Verdict(OK, f"torch has kernels for compute capability {_version(capability)}")
    says = f"torch {facts.torch} has no kernels for compute capability {_version(capability)} of this GPU"
    return Verdict(STOP, says, "install a torch that has them: an older one for an old GPU, a newer one for a new GPU")


def memory_held_by_others(facts):
    gpu = facts.gpu
    if gpu is None or gpu.free_bytes is None:
        return None
    free = f"{size_of(gpu.free_bytes)} of {size_of(gpu.total_bytes)} are free"
    if gpu.holders:
        who = ", ".join(f"{name} (pid {pid}) {mib:,} MiB" for pid, name, mib in gpu.holders)
        return Verdict(WARNING, f"{free}; held by {who}", f"kill {gpu.holders[0][0]}, if that may end")
    if gpu.free_bytes < MOSTLY_FREE * gpu.total_bytes:
        who = "nvidia-smi, which isn't here, would tell by whom" if gpu.holders is None else "by whom isn't known"
        return Verdict(WARNING, f"{free}; {who}", "nvidia-smi")
    return Verdict(OK, free)


def bfloat16_in_hardware(facts):
    if facts.gpu is None:
        return None
    capability = tuple(facts.gpu.capability)
    if capability >= BFLOAT16_CAPABILITY:
        return Verdict(OK, f"compute capability {_version(capability)} computes in bfloat16")
    says = f"compute capability {_version(capability)} has no bfloat16"
    if facts.config.get("dtype") == "bfloat16":
        return Verdict(WARNING, f"{says}: it is emulated, and slow", "--dtype=float16")
    return Verdict(OK, f"{says}: the dtype is {facts.config.get('dtype')}")


def allocator_asked(facts):
    if facts.gpu is None or facts.is_wsl:
        return None
    told = [value for name, value in facts.environment.items() if name.endswith("ALLOC_CONF")]
    if told and not any("expandable_segments:True" in value for value in told):
        says = (
            f"torch's allocator is told {told[0]!r}, without expandable_segments: memory may be lost to fragmentation"
        )
        return Verdict(WARNING, says, "unset PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF")
    return Verdict(OK, "segments of the GPU's memory grow in place")


# ---- compiling ---------------------------------------------------------------------------------------------


def sms_for_max_autotune(facts):
    if facts.gpu is None or not facts.config.get("compile"):
        return None
    sm_count, min_sms = facts.gpu.sm_count, facts.config["compile_min_sms"]
    if refusal := refuse_mode(facts.config["compile_mode"], sm_count, min_sms):
        return Verdict(STOP, refusal, "--compile_mode=default")
    few = ": under auto_fit, compiling must pay for itself in a trial" if sm_count < min_sms else ""
    return Verdict(OK, f"{sm_count} SMs, compile_min_sms={min_sms}{few}")


def triton_there(facts):
    if facts.gpu is None or not facts.config.get("compile"):
        return None
    if tuple(facts.gpu.capability) < TRITON_CAPABILITY:
        says = (
            f"Triton needs compute capability 7.0, this GPU has {_version(facts.gpu.capability)}: nothing is compiled"
        )
        return Verdict(WARNING, says, "--compile=False")
    if not facts.packages.get("triton"):
        return Verdict(WARNING, "Triton is not installed: torch.compile fails without it", "--compile=False")
    return Verdict(OK, f"Triton {facts.packages['triton']}")


def compiler_there(facts):
    if facts.torch_failure or not facts.config.get("compile"):
        return None
    kinds = ("cc", "gcc", "clang", "cl") if facts.gpu else ("c++", "g++", "clang++", "cl")
    if found := [name for name in kinds if name in facts.compilers]:
        return Verdict(OK, f"{found[0]} is there for torch.compile")
    says = f"none of the compilers {', '.join(kinds)} is found: torch.compile fails, and training goes on without it"
    return Verdict(WARNING, says, "apt install g++, or --compile=False")


# ---- the machine -------------------------------------------------------------------------------------------


def wsl_disk(facts):
    if not facts.is_wsl:
        return None
    if facts.on_windows_disk:
        says = "this folder is on Windows' disk, which WSL2 reads slowly"
        return Verdict(WARNING, says, "cp -r . ~/nanogpt-fit")
    memory = size_of(facts.memory_bytes) if facts.memory_bytes else "part"
    return Verdict(OK, f"WSL2, with {memory} of the machine's memory: [wsl2] memory= in .wslconfig gives it more")


def disk_for_a_checkpoint(facts):
    if facts.disk_free_bytes is None:
        return None
    free = f"{size_of(facts.disk_free_bytes)} are free where out_dir is"
    if facts.checkpoint_bytes is None:
        return Verdict(OK, free)
    says = f"{free}, a checkpoint takes about {size_of(facts.checkpoint_bytes)}"
    if facts.disk_free_bytes < facts.checkpoint_bytes:
        return Verdict(STOP, f"{says}: none could be written", "--out_dir=... on a larger disk")
    if facts.disk_free_bytes < CHECKPOINTS_AT_ONCE * facts.checkpoint_bytes:
        says += f", and {CHECKPOINTS_AT_ONCE} are there while one is written"
        return Verdict(WARNING, says, "--out_dir=... on a larger disk")
    return Verdict(OK, says)


# ---- the run -----------------------------------------------------------------------------------------------


def keys_possible(facts):
    return Verdict(STOP, facts.refusal, "python train.py --help") if facts.refusal else None


def data_there(facts):
    dataset = facts.config.get("dataset", "")
    if facts.data_failure:
        # A sentence of batches.py, which may end with the command that prepares the data.
        command = re.search(r"python \S+prepare\.py", facts.data_failure)
        there = ", ".join(data.name for data in facts.data_sets)
        do = command[0] if command else f"--dataset=... of those that are prepared: {there}" if there else ""
        return Verdict(STOP, facts.data_failure, do or "python data/python_char/prepare.py")
    known = next((data for data in facts.data_sets if data.name == dataset), None)
    if known is None:
        return None
    return Verdict(OK, f"{dataset}: " + ", ".join(f"{count:,} {split} tokens" for split, count in known.tokens.items()))


def vocabulary_of_the_data(facts):
    if facts.vocab_size is None or facts.data_failure or facts.torch_failure:
        return None
    if facts.largest_token is not None and facts.largest_token >= facts.vocab_size:
        says = f"the data hold token {facts.largest_token}, but the model's vocabulary has {facts.vocab_size}"
        return Verdict(STOP, says, _prepare(facts))
    if facts.data_vocab_size is not None and facts.data_vocab_size != facts.vocab_size:
        says = (
            f"meta.pkl of the data names {facts.data_vocab_size} symbols, the model's vocabulary has {facts.vocab_size}"
        )
        return Verdict(WARNING, says, _prepare(facts))
    return Verdict(OK, f"the model's vocabulary has {facts.vocab_size}")


def _prepare(facts):
    return f"python data/{facts.config['dataset']}/prepare.py, or --out_dir=... of a model of this data set"


def folder_free(facts):
    if not facts.holder:
        return None
    says = f"out_dir={facts.config['out_dir']!r} is in use by {facts.holder}"
    return Verdict(STOP, says, "--out_dir=... of its own, or let that run end")


def checkpoint_whole(facts):
    if facts.resume_failure:
        out_dir, whole = facts.config["out_dir"], {s.name for s in facts.checkpoints if s.iteration is not None}
        if "ckpt.pt" in whole:
            do = f"rm {out_dir}/ckpt.last.pt" if "ckpt.last.pt" not in whole else "--init_from=scratch"
        else:
            do = f"mv {out_dir}/ckpt.prev.pt {out_dir}/ckpt.pt" if "ckpt.prev.pt" in whole else "--init_from=scratch"
        return Verdict(STOP, facts.resume_failure, do)
    damaged = [saved.name for saved in facts.checkpoints if saved.iteration is None]
    if damaged:
        return Verdict(WARNING, f"{', '.join(damaged)}: damaged, or no checkpoint", "--out_dir=... to leave it alone")
    if facts.checkpoints:
        told = ", ".join(f"{saved.name} of iteration {saved.iteration:,}" for saved in facts.checkpoints)
        return Verdict(OK, f"{told}: --init_from=resume goes on")
    return None


def batch_fits(facts):
    fit, config = facts.fit, facts.config
    if fit is None:
        return None
    if fit.failure:
        # A sentence of auto-fit's, and below it the settings that would fit.
        options = [line.strip() for line in fit.failure.splitlines() if line.startswith("  --")]
        return Verdict(STOP, fit.failure, options[0] if options else "a smaller model, or more memory")
    size, limit = config["batch_size"], f"{size_of(fit.limit_bytes)} may be taken, simulated"
    if fit.micro_batch_size >= size and fit.recompute == config["recompute"]:
        what = "it" if fit.micro_batch_size == size else f"even {fit.micro_batch_size}"
        return Verdict(OK, f"batch_size {size} fits: {what} takes {size_of(fit.peak_bytes)}, {limit}")
    if config["auto_fit"]:
        return Verdict(OK, f"auto_fit makes it fit: {fit.split}; {limit}")
    says = f"batch_size {size} would not fit, {fit.micro_batch_size} would with {size_of(fit.peak_bytes)}; {limit}"
    return Verdict(STOP, says, "--auto_fit=True")


CHECKS = {  # in the order in which they are told
    "torch": torch_there,
    "gpu": gpu_seen,
    "driver": driver_new_enough,
    "kernels": kernels_built,
    "gpu memory": memory_held_by_others,
    "bfloat16": bfloat16_in_hardware,
    "allocator": allocator_asked,
    "max-autotune": sms_for_max_autotune,
    "triton": triton_there,
    "compiler": compiler_there,
    "wsl": wsl_disk,
    "keys": keys_possible,
    "data": data_there,
    "vocabulary": vocabulary_of_the_data,
    "folder": folder_free,
    "checkpoint": checkpoint_whole,
    "disk": disk_for_a_checkpoint,
    "fit": batch_fits,
}


def verdicts_on(facts):
    """{name of a check: its Verdict}, of those that have one."""
    found = {name: check(facts) for name, check in CHECKS.items()}
    return {name: verdict for name, verdict in found.items() if verdict}
