"""What would stop a run: runs train.py's own first lines, and then the functions that train.py calls next.

An error's sentence is the one that train.py would end with. No file changes.
"""

import ast
import contextlib
import io
import itertools
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from nanofit import autofit, checkpoint, machine, models
from nanofit.codec import differs
from nanofit.errors import UsageError, first_line
from nanofit.folder import LOCK
from nanofit.metrics import require_readers
from nanofit.tokens import open_data
from nanofit.tools.doctor.checks import OK, STOP, WARNING, Verdict
from nanofit.units import GPT2_SIZES, gib

LOOKED_AT = 8  # batches of each split whose tokens are checked
OF_RANKS = ("--shard", "--gather_once")  # they need torchrun's ranks, and this is one process


def look(train, argv):
    """(the run's final keys, {name of a check: its Verdict}). train: the path of train.py.

    If the first check fails, there are no others. The last one is left out if any before it has failed.
    """
    try:
        run = begin(train, [argument for argument in argv if argument.partition("=")[0] not in OF_RANKS])
    except UsageError as e:
        return {}, {"run": Verdict(STOP, str(e))}
    begins = f"goes on at iteration {run.iter_num:,}" if run.saved else "begins anew"
    found = {"run": Verdict(OK, "\n".join([*run.opening, begins]))}
    run.saved, run.origin = None, bool(run.origin)  # whole models
    for name, step in STEPS.items():
        if name == "fit" and any(verdict.level == STOP for verdict in found.values()):
            break  # it takes longest
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # what training would tell
                verdict = step(run)
        except (UsageError, OSError) as e:
            verdict = Verdict(STOP, str(e))
        if verdict:
            found[name] = verdict
    return run.config, found


def begin(train, argv):
    """train.py's globals after its first lines, which set and check the keys, and write nothing."""
    names, before = {"__name__": "__main__", "__file__": train}, sys.argv
    with open(train, encoding="utf-8") as file:
        body = ast.parse(file.read()).body
    first = itertools.takewhile(lambda statement: "folder.take" not in ast.unparse(statement), body)
    sys.argv = [train, *argv]
    os.environ.pop("RANK", None)  # there are no other ranks to meet
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(ast.Module([*first], []), train, "exec"), names)
    finally:
        sys.argv = before
    return SimpleNamespace(**names)


def _no_effect(run):
    return Verdict(WARNING, "\n".join(run.without_effect), "leave them out") if run.without_effect else None


def _vocabulary(run):
    do = f"python data/{run.dataset}/prepare.py, or --out_dir=... of a model of this data set"
    lines = differs(run.meta, run.model_args["vocab_size"])
    return Verdict(WARNING, lines[0].removeprefix("warning: "), do) if lines else None


def _kernels(run):
    if isinstance(run.device, torch.device) and run.device.type == "cuda":
        machine.require_kernels(run.device)


def _data(run):
    """Check the tokens of some batches, as a run checks each batch."""
    if run.dry_run:  # which reads no data
        return None
    files = open_data(run.data_dir, run.block_size, run.model_args["vocab_size"])
    for file in files.values():
        file.read(file.draw(LOOKED_AT * run.batch_size, torch.Generator()))
    counts = ", ".join(f"{file.tokens:,} {split} tokens" for split, file in files.items())
    return Verdict(OK, f"{run.dataset}: {counts}")


def _weights(run):
    """Whether pretrained weights that a run starts from are on this machine."""
    name = run.init_from
    if name == "scratch" or run.origin:
        return None
    if name not in GPT2_SIZES:
        there = [*Path(name).glob("*.safetensors"), *Path(name).glob("*.bin")]
        return None if there else Verdict(STOP, f"{name} holds no weights: neither .safetensors nor .bin")
    with contextlib.suppress(ImportError):
        from huggingface_hub import try_to_load_from_cache

        if any(isinstance(try_to_load_from_cache(name, f), str) for f in ("model.safetensors", "pytorch_model.bin")):
            return Verdict(OK, f"the weights of {name} are in the hub's cache")
    says = f"the weights of {name} are not in the hub's cache: transformers must fetch them"
    return Verdict(WARNING, says, "--init_from=... a folder with a copy of them")


def _readers(run):
    if not run.dry_run:
        require_readers(run.config, run.world)


def _folder(run):
    """Take the folder as a run does, and leave it as it was."""
    if run.eval_only or run.dry_run:  # which write nothing there
        return None
    path = Path(os.path.abspath(run.out_dir))
    made = [place for place in (path, *path.parents) if not os.path.lexists(place)]
    lock = [] if os.path.lexists(run.folder.path(LOCK)) else [run.folder.path(LOCK)]
    try:
        run.folder.take()
    finally:
        run.folder.release()
        with contextlib.suppress(OSError):  # it wasn't made, or another run uses it now
            for file in lock:
                os.remove(file)
            for place in made:
                os.rmdir(place)
    kept = [file for file in path.glob("kept-*/*") if file.is_file()]
    earlier = f"; kept-*/ of earlier runs take {gib(sum(file.stat().st_size for file in kept))}" if kept else ""
    return Verdict(OK, f"{run.out_dir} can be written to{earlier}")


def _disk(run):
    """Whether there is room for checkpoints."""
    if run.eval_only or run.dry_run:
        return None
    try:
        with torch.device("meta"):
            model = run.GPT(models.config_of(run.GPTConfig, run.model_args))
    except Exception as e:  # a model that reads values while it is built
        return Verdict(WARNING, f"what a checkpoint takes isn't known ({first_line(e)})")
    size = 3 * sum(p.numel() * p.element_size() for p in model.parameters())  # with AdamW's two moments
    says, has_room_for, wanted = checkpoint.room(run.out_dir, size, run.keep)
    if has_room_for < 1:
        return Verdict(STOP, f"{says}: none could be written", "--out_dir=... on a larger disk")
    return Verdict(WARNING, says, "--out_dir=... on a larger disk") if has_room_for < wanted else Verdict(OK, says)


def _fit(run):
    """Whether the batch fits, by the plan of --dry_run=True; always simulated."""
    held = run.auto_fit or run.dry_run or run.device.type == "cuda"  # to memory_limit_gb
    asked = {**run.config, "dry_run": True, "shard": False, "memory_limit_gb": run.memory_limit_gb if held else 0.0}
    classes = run.GPT, run.GPTConfig
    try:
        plan = autofit.fit(run.world, run.device, asked, run.given, run.model_args, classes, run.max_iters)
    except Exception as e:  # a model that can't be simulated, a device that fails
        nothing_fits = isinstance(e, UsageError) and "nothing fits" in str(e)
        return Verdict(STOP, str(e)) if nothing_fits else Verdict(WARNING, f"whether it fits can't be simulated: {e}")
    size, limit = run.batch_size, f"{gib(plan.limit_bytes)} may be taken, simulated"
    if plan.micro_batch_size >= size and plan.levers.recompute == run.recompute:
        return Verdict(OK, f"batch_size {size} fits: it takes {gib(plan.peak_bytes)}, {limit}")
    if run.auto_fit:
        return Verdict(OK, f"auto_fit makes it fit: {plan}; {limit}")
    says = f"batch_size {size} would not fit, {plan.micro_batch_size} would with {gib(plan.peak_bytes)}; {limit}"
    return Verdict(WARNING, says, "--auto_fit=True")


STEPS = {  # in train.py's order, except that the longest comes last
    "no effect": _no_effect,
    "vocabulary": _vocabulary,
    "kernels": _kernels,
    "data": _data,
    "weights": _weights,
    "readers": _readers,
    "folder": _folder,
    "disk": _disk,
    "fit": _fit,
}
