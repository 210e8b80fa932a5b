"""What would stop a run: runs train.py up to where it would write, then looks at its data, its folder and its memory.

An error's sentence is the one that train.py would end with. No file changes.
"""

import contextlib
import io
import os
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch

from nanofit import autofit, metrics
from nanofit.errors import UsageError, reason
from nanofit.folder import LOCK, RunFolder
from nanofit.tools.doctor.checks import OK, STOP, WARNING, Verdict
from nanofit.units import gib

LOOKED_AT = 8  # batches of each split whose tokens are checked
OF_RANKS = ("--shard", "--gather_once")  # they need torchrun's ranks, and this is one process


class _Enough(BaseException):
    """train.py has come to where it would write or fit."""


def look(train, argv):
    """(the run's keys, {name of a check: its Verdict}). train: the path of train.py.

    The first one that would stop the run is the last.
    """
    names, printed = {"__name__": "__main__", "__file__": train}, io.StringIO()
    argv = [argument for argument in argv if argument.partition("=")[0] not in OF_RANKS]
    os.environ.pop("RANK", None)  # there are no other ranks to meet
    try:
        with (
            patch.object(RunFolder, "take", side_effect=_Enough),
            patch.object(metrics, "open_readers", side_effect=_Enough),
            patch.object(autofit, "choose", side_effect=_Enough),
            patch.object(autofit, "Trials"),  # no process starts
            patch.object(sys, "argv", [train, *argv]),
            contextlib.redirect_stdout(printed),
            contextlib.suppress(_Enough),
        ):
            exec(compile(Path(train).read_bytes(), train, "exec"), names)
    except Exception as e:  # the user's own model.py or train.py may raise anything
        at = traceback.extract_tb(e.__traceback__)[-1]
        is_told = isinstance(e, (UsageError, OSError))
        says = str(e) if is_told else f"{os.path.basename(at.filename)}, line {at.lineno}: {reason(e)}"
        return names.get("config", {}), {"run": Verdict(STOP, says)}
    run = SimpleNamespace(**names)
    told = [line for line in printed.getvalue().splitlines() if not line.startswith(("Overriding", "  "))]  # not keys
    told += [f"goes on at iteration {run.iter_num:,}" if run.saved else "a new run"]
    found = {"run": Verdict(WARNING if any(line.startswith("warning") for line in told) else OK, "\n".join(told))}
    for name, step in STEPS.items():
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # what training would tell
                found[name] = step(run)
        except (UsageError, OSError) as e:
            found[name] = Verdict(STOP, str(e))
            break
    return run.config, found


def _data(run):
    """Check the tokens of some batches, as a run checks each batch."""
    if run.dry_run:
        return Verdict(OK, "a plan needs none")
    for file in run.data.values():
        file.read(file.draw(LOOKED_AT * run.batch_size, torch.Generator()))
    return Verdict(OK, ", ".join(f"{file.tokens:,} {split} tokens" for split, file in run.data.items()))


def _folder(run):
    """Whether the run could have its folder."""
    if run.eval_only or run.dry_run:
        return Verdict(OK, "nothing will be written there")
    if os.path.lexists(run.folder.path(LOCK)):  # of a run that may be alive
        run.folder.take()
        run.folder.release()
    path = Path(os.path.abspath(run.out_dir))
    there = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UsageError(f"out_dir={run.out_dir!r} can't be written to: give another --out_dir")
    return Verdict(OK, f"{run.out_dir} can be written to")


def _fit(run):
    """Whether the batch fits, by the plan of --dry_run=True; always simulated."""
    asked, classes = {**run.config, "dry_run": True, "shard": False}, (run.GPT, run.GPTConfig)
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
    # A GPU's run goes on with smaller micro-batches; the system kills one on a CPU.
    return Verdict(STOP if str(run.device) == "cpu" else WARNING, says, "--auto_fit=True")


STEPS = {"data": _data, "folder": _folder, "fit": _fit}  # the longest last
