"""ckpt.pt: written whole or not at all, and read from nanoGPT's format as well."""

import contextlib
import errno
import io
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from nanofit import host
from nanofit.errors import UsageError, first_line, is_out_of_memory, reason, shown, system_error
from nanofit.files import replacing
from nanofit.units import gib

NAME = "ckpt.pt"
PREVIOUS = "ckpt.prev.pt"
LAST = "ckpt.last.pt"  # where a run stopped, if ckpt.pt is the best and must stay
NUMBERED = "ckpt-{}.pt"  # the last few, with --keep
OF_A_MODEL = ("model", "model_args")
NUMBERS = ("iter_num", "best_val_loss")
OF_A_RUN = (*OF_A_MODEL, "optimizer", *NUMBERS)
OURS = ("rng", "data", "metrics", "split")  # in the checkpoint of another train.py, they may be anything
# torch.save raises a file's own error, or another one while it handles that.
_FAILURES = (OSError, RuntimeError, MemoryError)


class SaveError(Exception):
    """A checkpoint could not be written, and the one before is unchanged. The message is a sentence."""


# ---- writing -----------------------------------------------------------------------------------------------


def save(checkpoint, out_dir, name=NAME, make_way=lambda: None, previous_is_ours=True, keep=0):
    """Write a checkpoint to out_dir/ckpt.pt, and keep the one before as ckpt.prev.pt. (For LAST, none is kept.)

    Until the new file is whole on disk, ckpt.pt is the old one. Then make_way() is called, which may move files that
    must not be replaced. previous_is_ours: ckpt.prev.pt may be removed if the disk is full. keep: this many of the last
    ones also stay as ckpt-ITERATION.pt, or fewer on a full disk. Raises SaveError if there is still no room, or if the
    disk can't be written to.
    """
    path, previous, last = (os.path.join(out_dir, n) for n in (name, PREVIOUS, LAST))
    try:
        older = _too_many(out_dir, checkpoint.get("iter_num"), 1) if keep else []
        spare = [one for one in (previous, *older) if previous_is_ours and os.path.exists(one)]
        _write(checkpoint, path, make_way, spare)
        if name == NAME and os.path.exists(last):
            os.remove(last)  # it is of an earlier iteration now
        if keep:
            _second_name(path, os.path.join(out_dir, NUMBERED.format(checkpoint["iter_num"])))
            for one in _too_many(out_dir, checkpoint["iter_num"], keep):
                os.remove(one)
    except _FAILURES as e:
        raise SaveError(
            f"not saved: {path} can't be written ({reason(e)}); a checkpoint that is there stays as it is"
        ) from e


def size_of(checkpoint):
    """Bytes of its tensors, without sparse ones; tied ones count twice."""
    return sum(t.nbytes for t in tree_leaves(checkpoint) if isinstance(t, torch.Tensor) and t.layout == torch.strided)


def on_host(checkpoint):
    """A copy of a checkpoint in the machine's memory, or None if there is no room.

    Training may change the weights while the copy is written. Tied tensors stay one.
    """
    copies = {}

    def copied(tensor):
        if tensor.layout != torch.strided:  # a sparse one has no place of its own
            return tensor.detach().to("cpu", copy=True)
        place = tensor.data_ptr() or id(tensor), tensor.device, tensor.dtype, tensor.shape, tensor.stride()
        if place not in copies:
            copies[place] = tensor.detach().to("cpu", copy=True)
        return copies[place]

    size = size_of(checkpoint)
    with contextlib.suppress(UsageError):  # a system that doesn't tell what is free
        if 2 * size > host.free_memory():
            return None
    try:
        return tree_map_only(torch.Tensor, copied, checkpoint)
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        return None


def short_of_room(out_dir, size, keep):
    """A sentence if the disk of a folder may not hold a run's checkpoints of this size; else ''."""
    free, most = shutil.disk_usage(out_dir).free, 3 + keep  # the last, the one before, and the one being written
    if free >= size * max(1, most - len(list(Path(out_dir).glob("ckpt*.pt")))):
        return ""
    return f"the disk of {out_dir} has {gib(free)} left, and a checkpoint takes {gib(size)}; up to {most} are there"


def _write(checkpoint, path, make_way, spare=()):
    """spare: paths of files that may be removed, one after the other, if the disk is full."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)  # it may have been removed during the run
    try:
        with replacing(path, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())  # before an old file is replaced
            make_way()
            if os.path.basename(path) == NAME and os.path.exists(path):
                # A second name, no renaming: ckpt.pt always exists. If that fails, an older one stays, or none is kept.
                with contextlib.suppress(OSError):
                    _second_name(path, os.path.join(os.path.dirname(path), PREVIOUS), copies=False)
    except _FAILURES as e:
        if not spare or getattr(system_error(e), "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
            raise
        os.remove(spare[0])
        _write(checkpoint, path, make_way, spare[1:])


def _second_name(path, other, copies=True):
    """Give a file another name as well. copies: make a copy if the file system has no hard links."""
    spare = f"{path}.{os.getpid()}.second.part"
    try:
        try:
            os.link(path, spare)
        except OSError:
            if not copies:
                raise
            shutil.copyfile(path, spare)
        os.replace(spare, other)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(spare)  # os.replace leaves it if both are names of one file


def numbered(out_dir):
    """{iteration: path} of the checkpoints ckpt-ITERATION.pt in out_dir."""
    found = {path: re.fullmatch(NUMBERED.format(r"(\d+)"), path.name) for path in Path(out_dir).glob("ckpt-*.pt")}
    return {int(match[1]): path for path, match in found.items() if match}


def _too_many(out_dir, iteration, keep):
    """Paths of the numbered checkpoints up to an iteration, without the last `keep`.

    Those of later iterations, from before the run was resumed from an earlier one, stay until it gets there.
    """
    passed = sorted(item for item in numbered(out_dir).items() if item[0] <= iteration)
    return [path for _, path in passed[: max(0, len(passed) - keep)]]


def rehearse(checkpoint):
    """Raise a UsageError before training if a checkpoint could not be saved or read again.

    The tensors are empty, so that it takes no time.
    """
    _require_entries(checkpoint, "a checkpoint of this run", OF_A_RUN)
    without_numbers = tree_map_only(torch.Tensor, lambda t: torch.empty(0, dtype=t.dtype), checkpoint)
    for entry, value in without_numbers.items():
        file = io.BytesIO()
        try:
            torch.save(value, file)
            file.seek(0)
            torch.load(file, weights_only=True)
        except Exception as e:  # pickle, or an object's own __reduce__, may raise anything
            raise UsageError(
                f"a checkpoint of this run could not be written and read again: its entry {entry!r} holds "
                f"{_type_in_the_way(e) or first_line(e)}, and only numbers, strings, lists, dicts and tensors may be "
                "in it: let the model, the optimizer or the config hold one of these instead"
            ) from e


# ---- reading -----------------------------------------------------------------------------------------------


def _type_in_the_way(error):
    """The type that torch.load refused because it isn't plain data; '' if the error doesn't tell."""
    found = re.search(r"GLOBAL ([A-Za-z_][\w.]*\.\w+)", str(error))
    if not found:
        return ""
    return "a numpy number" if found[1].endswith("multiarray.scalar") else f"a {found[1]}"


def _says_nothing(error):
    """Whether a file's content may be whole although it could not be read. (torch finds a cut file invalid.)"""
    return isinstance(error, OSError) and error.errno != errno.EINVAL


def _read(path, whole=True):
    """What torch.load gives for a file; UsageError if it can't be read. whole: compare its checksums, too."""
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped and whole:  # torch.load doesn't compare checksums
            with zipfile.ZipFile(path) as file:
                if damaged := file.testzip():
                    raise UsageError(f"{path} is damaged: the checksum of {damaged} is wrong")
        # Mapped, not read: auto-fit measures free memory while this is open.
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        for entry in NUMBERS if isinstance(held, dict) else ():
            if hasattr(held.get(entry), "item"):  # torch's, with which nanoGPT computes as well
                held[entry] = held[entry].item()
        return held
    except UsageError:
        raise
    except Exception as e:  # zip, pickle and torch raise many kinds for a damaged file
        if is_out_of_memory(e):
            raise
        if _says_nothing(e):
            raise UsageError(
                f"{path} can't be read now ({e.strerror or e}): this says nothing about what is in it; start again "
                "when it can be read"
            ) from e
        said = shown(first_line(e), str)
        if isinstance(e, pickle.UnpicklingError):  # torch's message advises to run its code
            if found := _type_in_the_way(e):
                raise UsageError(
                    f"{path} holds {found}, and only numbers, strings, lists, dicts and tensors are read. Where you "
                    "trust the file: torch.load it with weights_only=False, put float(...), int(...) or str(...) in "
                    "that place, and torch.save it again"
                ) from e
            said = "it holds more than plain data, or its end is missing"
        raise UsageError(f"{path} is damaged or not a checkpoint ({said})") from e


def peek(path, whole=False):
    """What a checkpoint file holds, its weights not in memory; None if it can't be read. whole: as in _read."""
    try:
        held = _read(path, whole)
    except UsageError:
        return None
    return held if isinstance(held, dict) and type(held.get("iter_num")) is int else None


def name_of_model(out_dir):
    """The file of a run's model: ckpt.pt, or ckpt.last.pt if there is no ckpt.pt yet."""
    last_alone = not os.path.isfile(os.path.join(out_dir, NAME)) and os.path.isfile(os.path.join(out_dir, LAST))
    return LAST if last_alone else NAME


def path_of_model(init_from):
    """The path of the checkpoint that init_from names, as a .pt file or a folder; None if it names none.

    A folder with a config.json is Hugging Face's.
    """
    if os.path.isdir(init_from) and not os.path.lexists(os.path.join(init_from, "config.json")):
        path = os.path.join(init_from, name_of_model(init_from))
        return path if os.path.lexists(path) else None
    return init_from if init_from.endswith(".pt") else None


def load_model(init_from):
    """The checkpoint that path_of_model names, or None."""
    path = path_of_model(init_from)
    return load(*os.path.split(path)) if path else None


def load(out_dir, name=NAME, for_training=False):
    """A checkpoint file in out_dir, with its tensors on the CPU, and without torch.compile's prefix.

    for_training: it must hold all that a run resumes from, not just a model. Raises UsageError if there is none, if it
    can't be read, or if an entry is missing.
    """
    path, previous = os.path.join(out_dir, name), os.path.join(out_dir, PREVIOUS)
    try:
        if not os.path.lexists(path):
            way = f"train with --out_dir={out_dir} first, or set out_dir" if out_dir else "look at its name"
            raise UsageError(f"there is no checkpoint {path}: {way}")
        checkpoint = _read(path)
        _require_entries(checkpoint, path, OF_A_RUN if for_training else OF_A_MODEL)
    except UsageError as e:
        if _says_nothing(e.__cause__) or not (before := peek(previous, whole=True)):
            raise
        raise UsageError(
            f"{e}; {previous} beside it is whole, of iteration {before['iter_num']}: to go on from there, rename it to "
            f"{NAME}"
        ) from e
    checkpoint["model"] = {str(name).removeprefix("_orig_mod."): w for name, w in checkpoint["model"].items()}
    foreign = () if isinstance(checkpoint.get("rng"), list) else OURS  # ours has a dict for each rank
    # A checkpoint that somebody made smaller may have None in an entry.
    held = {k: v for k, v in checkpoint.items() if k not in foreign and (v is not None or k == "optimizer")}
    return {"config": {}, **held}


def _require_entries(checkpoint, path, entries):
    if not isinstance(checkpoint, dict):
        raise UsageError(f"{path} is not a checkpoint of a training run, but a {type(checkpoint).__name__}")
    # An optimizer's state may be empty or None.
    missing = [e for e in entries if e not in checkpoint or (e != "optimizer" and checkpoint[e] in (None, {}))]
    if missing:
        raise UsageError(f"{path} is not a checkpoint of a training run: it lacks {', '.join(missing)}")
    expected = {"model": dict, "model_args": dict, "iter_num": int}
    for entry in entries:
        if not isinstance(checkpoint[entry], expected.get(entry, object)):
            raise UsageError(f"{path} is damaged: its {entry} must be a {expected[entry].__name__}")
