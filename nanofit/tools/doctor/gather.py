"""Find out the Facts, and take out of them what a person wouldn't paste into a public issue.

torch may be missing here, or fail: what needs it is imported where that is known.
"""

import contextlib
import ctypes
import getpass
import importlib.metadata
import io
import os
import platform
import re
import shutil
import socket
import sys
from dataclasses import fields, is_dataclass, replace

from nanofit.codec import load_meta
from nanofit.errors import UsageError, first_line
from nanofit.tools.doctor.facts import Checkpoint, DataSet, Facts, Fit, Gpu
from nanofit.units import CONTEXT_BYTES, GIB, memory_limit

PACKAGES = (
    "torch", "numpy", "triton", "tiktoken", "datasets", "safetensors", "huggingface_hub", "transformers", "torchao",
    "wandb", "tensorboard", "bokeh", "matplotlib",
)  # fmt: skip
COMPILERS = ("cc", "gcc", "clang", "cl", "c++", "g++", "clang++")
TORCHS = ("PYTORCH_", "TORCH_", "TORCHINDUCTOR_", "TORCHDYNAMO_")  # how torch's variables begin
ENDS = 2**20  # tokens at each end of a file that are looked at


# ---- the machine -------------------------------------------------------------------------------------------


def of_machine():
    """Facts of this machine and its torch. It must look before anything else asks torch for GPUs: see cuda_facts."""
    release = platform.release()
    is_wsl = "microsoft" in release.lower()
    known = {
        "system": f"{platform.system()} {release} {platform.machine()}",
        "is_wsl": is_wsl,
        "on_windows_disk": is_wsl and os.getcwd().startswith("/mnt/"),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        "compilers": tuple(name for name in COMPILERS if shutil.which(name)),
        "driver_cuda": _driver_cuda(),
        "gpus_hidden": os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(TORCHS)},
        "packages": {name: _version(name) for name in PACKAGES},
    }
    try:
        import numpy  # noqa: F401
        import torch
    except Exception as e:  # a library that it lacks, another version of numpy, half an installation
        return Facts(**known, torch_failure=f"{type(e).__name__}: {first_line(e)}")
    from nanofit import machine

    cuda = machine.cuda_facts()
    total, free, container = machine.host_memory_facts()
    return Facts(
        **known,
        memory_bytes=total,
        memory_free_bytes=free,
        container_bytes=container,
        torch=torch.__version__,
        torch_cuda=cuda["cuda"],
        architectures=cuda["architectures"],
        driver=cuda["driver"],
        cuda_said=cuda["said"],
        gpus=tuple(Gpu(**gpu) for gpu in cuda["gpus"]),
    )


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _driver_cuda():
    """(major, minor) of the newest CUDA that NVIDIA's driver runs, None where there is none."""
    version = ctypes.c_int()
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


# ---- the run -----------------------------------------------------------------------------------------------


def run(facts, config, given, model=None, refusal=""):
    """facts with those of the run that these keys ask for; nothing is written and nothing trained.

    model: (GPT, GPTConfig, own fields), None where torch is missing. refusal: why the keys can't be read.
    """
    data_dir = os.path.join("data", config["dataset"])
    known = {"config": config, "given": tuple(sorted(given)), "refusal": refusal, "data_sets": _data_sets()}
    with contextlib.suppress(OSError):
        known["disk_free_bytes"] = shutil.disk_usage(_nearest_folder(config["out_dir"])).free
    meta = None
    try:
        meta = load_meta(data_dir)
        known["data_vocab_size"] = meta and meta["vocab_size"]
    except UsageError as e:
        known["data_failure"] = str(e)
    facts = replace(facts, **known)
    with contextlib.redirect_stdout(io.StringIO()):  # what training would tell
        return _with_torch(facts, meta, data_dir, *model) if model else facts


def _data_sets():
    found = []
    for name in sorted(os.listdir("data")) if os.path.isdir("data") else ():
        paths = {split: os.path.join("data", name, f"{split}.bin") for split in ("train", "val")}
        tokens = {split: os.path.getsize(path) // 2 for split, path in paths.items() if os.path.isfile(path)}
        if tokens:
            try:
                meta = load_meta(os.path.join("data", name))
                found.append(DataSet(name, tokens, meta and meta["vocab_size"]))
            except UsageError as e:
                found.append(DataSet(name, tokens, failure=str(e)))
    return tuple(found)


def _nearest_folder(path):
    path = os.path.abspath(path)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def _with_torch(facts, meta, data_dir, model_class, config_class, own_fields):
    from nanofit import machine, models, settings
    from nanofit.batches import Batches
    from nanofit.folder import RunFolder
    from nanofit.metrics import require_readers
    from nanofit.ranks import ALONE

    folder = RunFolder(facts.config["out_dir"])
    config = {**facts.config, "init_from": folder.settle(facts.config["init_from"])}
    given = facts.given
    cpu, elsewhere = machine.find_device("cpu"), settings.is_elsewhere(config)
    known = {"checkpoints": _checkpoints(config["out_dir"])}
    if not (config["eval_only"] or config["dry_run"]):  # which write nothing there
        known["holder"] = re.sub(" on [^,]*", "", folder.holder())  # whose host may be another one than this

    def attempt(entry, ask, *arguments):
        """ask(*arguments); where it refuses, None, and its sentence becomes this fact, unless there is one already."""
        try:
            return ask(*arguments)
        except (UsageError, OSError) as e:
            known[entry] = known.get(entry) or getattr(facts, entry) or str(e)
            return None

    device = None if elsewhere else attempt("device_failure", machine.find_device, config["device"])
    # What the device lacks has checks of its own.
    checked = {**config, "compile": False, "device": config["device"] if elsewhere else "cpu"}
    attempt("refusal", settings.check, checked, ALONE)
    attempt("refusal", require_readers, config, ALONE)
    saved = model_args = None
    if config["init_from"] == "resume":
        saved = attempt("resume_failure", folder.load)
    if saved or config["init_from"] != "resume":
        model_args = attempt("refusal", models.sizes_of, config["init_from"], config, saved, meta, own_fields)
    if model_args:
        known["vocab_size"] = model_args["vocab_size"]
        known["checkpoint_bytes"] = 3 * _weight_bytes(model_args)  # and AdamW's two moments
        attempt("refusal", models.config_of, config_class, model_args)
        if not saved or "block_size" in given:
            trained_with, asked = model_args["block_size"], config["block_size"]
            model_args["block_size"] = attempt("refusal", settings.crop_to, asked, trained_with, config["init_from"])
    saved = None  # a whole second model
    if "refusal" not in known:
        block_size = model_args["block_size"] if model_args else config["block_size"]
        sizes = {"batch_size": config["batch_size"], "block_size": block_size, "device": cpu}
        if attempt("data_failure", lambda: Batches(data_dir, **sizes)):
            known["largest_token"] = attempt("data_failure", _largest_token, data_dir)
        free = None
        if device:
            with contextlib.suppress(UsageError):  # where nothing tells of a CPU's memory
                free = facts.gpu.free_bytes if facts.gpu else machine.free_memory_bytes(device)
        if model_args and (free is not None or elsewhere):
            known["fit"] = _fit(config, given, model_args, model_class, free)
    return replace(facts, **known)


def _weight_bytes(model_args):
    """What the weights of a GPT of these sizes take in float32."""
    layers, width = model_args["n_layer"], model_args["n_embd"]
    return 4 * (layers * 12 * width**2 + (model_args["vocab_size"] + model_args["block_size"]) * width)


def _checkpoints(out_dir):
    from nanofit import checkpoint

    found = []
    for name in (checkpoint.NAME, checkpoint.PREVIOUS, checkpoint.LAST):
        path = os.path.join(out_dir, name)
        if os.path.isfile(path):
            held = checkpoint.peek(path, whole=True)
            found.append(Checkpoint(name, os.path.getsize(path), held["iter_num"] if held else None))
    return tuple(found)


def _largest_token(data_dir):
    """The largest token at the ends of a data set's files: all of them may be gigabytes."""
    import numpy as np

    ends = []
    for split in ("train", "val"):
        tokens = np.memmap(os.path.join(data_dir, f"{split}.bin"), dtype="<u2", mode="r")
        ends += [int(tokens[:ENDS].max()), int(tokens[-ENDS:].max())]
    return max(ends)


def _fit(config, given, model_args, model_class, free):
    """The plan of `--dry_run=True`, always by simulation. free: bytes, None for a card that isn't here."""
    from nanofit import autofit
    from nanofit.ranks import ALONE

    card = config["memory_limit_gb"]
    if free is not None:
        limit = memory_limit(free, card)
        # Of a simulated card, CUDA's context and the margin are taken off: a card that leaves this limit.
        card = (limit + min(limit / 19, GIB) + CONTEXT_BYTES * config["device"].startswith("cuda")) / GIB
    asked = {**config, "memory_limit_gb": card, "dry_run": True}
    try:
        plan = autofit.fit(ALONE, config["device"], asked, given, model_args, model_class, config["max_iters"])
    except UsageError as e:
        return Fit(failure=str(e))
    return Fit(plan.limit_bytes, plan.micro_batch_size, plan.peak_bytes, plan.levers.recompute, str(plan))


# ---- what is nobody's business -----------------------------------------------------------------------------


def private(value, root):
    """value, Facts or a part of them, whose texts name no user, no host and no path but those below root, relative."""
    if is_dataclass(value):
        return replace(value, **{f.name: private(getattr(value, f.name), root) for f in fields(value)})
    if isinstance(value, dict):
        return {name: private(inner, root) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(private(inner, root) for inner in value)
    return _private_text(value, root) if isinstance(value, str) else value


def _private_text(text, root):
    for folder in {os.path.realpath(root), root, os.getcwd()} - {"/"}:
        text = text.replace(folder + os.sep, "")
    if len(home := os.path.expanduser("~")) > 1:
        text = text.replace(home, "~")
    # Of other absolute paths, the last name: whose they are is in what precedes it. Neither 1 / 2 nor a URL is one.
    text = re.sub(r"(?:(?<![\w.…/])/(?!/)|~/|\b[A-Za-z]:\\)(?:[^\s'\":,;()]*[/\\])+", "…/", text)
    for name in {_user(), socket.gethostname(), socket.gethostname().split(".")[0]} - {""}:
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "…", text)
    return text


def _user():
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return ""
