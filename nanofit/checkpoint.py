"""ckpt.pt: written whole or not at all, read whether nanoGPT or this project wrote it."""

import contextlib
import errno
import math
import mmap
import os
import pickle
import sys
import zipfile
from dataclasses import asdict, replace

import torch

from nanofit import machine
from nanofit.autofit import cache
from nanofit.autofit.plan import from_dict
from nanofit.errors import UsageError, first_line, is_out_of_memory, shown, usage_errors
from nanofit.files import replacing
from nanofit.metrics import is_state
from nanofit.models import SIZES
from nanofit.pickles import refuse_endless
from nanofit.sharding import share_like
from nanofit.units import FITTED, MemoryLevers, micro_batch_sizes

NAME = "ckpt.pt"
PREVIOUS = "ckpt.prev.pt"
LAST = "ckpt.last.pt"  # where a run stopped, if ckpt.pt is the best and must stay
REQUIRED = ("model", "model_args", "optimizer", "iter_num", "best_val_loss", "config")  # the first two make a model
# How AdamW computes, not what: these follow the machine that runs, not the one that saved.
_IMPLEMENTATION = ("fused", "foreach", "capturable")
_ANOTHER_OPTIMIZER = ("maximize", "amsgrad", "differentiable")
ZIP = b"PK\3\4"  # how a zip file begins; whether it is one, its end tells
OLD_PICKLES = 5  # that follow each other in a file of torch.save's before 1.6; then numbers come
_REAL = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip


def all_finite(tensors):
    """Whether no tensor holds an infinite number or a nan."""
    extremes = [x.float() for t in tensors if t.numel() for x in torch.aminmax(t)]  # takes no memory, unlike a mask
    return bool(torch.isfinite(torch.stack(extremes)).all()) if extremes else True


class SaveError(Exception):
    """A checkpoint could not be written; the one before is as it was. Its message is a sentence."""


def save(checkpoint, out_dir, name=NAME, make_way=lambda: None, previous_is_ours=True):
    """Write a checkpoint to out_dir/ckpt.pt, and keep the one before as ckpt.prev.pt; or to LAST, which keeps none.

    ckpt.pt is the old one until the new one is whole on disk, whatever happens meanwhile; then make_way() is called,
    which may move what isn't to be replaced. previous_is_ours: ckpt.prev.pt may go where the disk is full. Raises
    SaveError where the disk is full or can't be written to, or where weights are not finite.
    """
    path, previous, last = (os.path.join(out_dir, n) for n in (name, PREVIOUS, LAST))
    try:
        if not all_finite(checkpoint["model"].values()):
            raise SaveError("not saved: the weights are not finite; a checkpoint that is there stays as it is")
        try:
            _write(checkpoint, path, make_way)
        except _FAILURES as e:
            if not (_is_full(e) and previous_is_ours and os.path.exists(previous)):
                raise
            os.remove(previous)  # it makes room
            _write(checkpoint, path, make_way)
        if name == NAME and os.path.exists(last):
            os.remove(last)  # it is of an earlier iteration now
    except _FAILURES as e:
        raise SaveError(
            f"not saved: {path} can't be written ({_reason(e)}); a checkpoint that is there stays as it is"
        ) from e


# torch.save passes on a file's own error, or fails with another one while it handles that.
_FAILURES = (OSError, RuntimeError, MemoryError)


def _systems(error):
    """The first error in a chain of them that comes from the system, or None."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _is_full(error):
    inner = _systems(error)
    return inner is not None and inner.errno in (errno.ENOSPC, errno.EDQUOT)


def _reason(error):
    """What the system said, or else the error itself."""
    inner = _systems(error)
    return (inner.strerror if inner is not None else None) or first_line(error)


def _write(checkpoint, path, make_way):
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)  # somebody may have removed it in mid-run
    with replacing(path, "wb") as f:
        torch.save(checkpoint, f)
        f.flush()
        os.fsync(f.fileno())  # before anything gives way to it
        make_way()
        if os.path.basename(path) == NAME:
            _keep_previous(path)


def _keep_previous(path):
    """Give ckpt.pt a second name, so that it is never without its own."""
    if not os.path.exists(path):
        return
    previous = os.path.join(os.path.dirname(path), PREVIOUS)
    spare = f"{path}.{os.getpid()}.previous.part"
    try:
        os.link(path, spare)
    except OSError:
        return  # some file systems have no second names: then an older one stays, or none is kept
    try:
        os.replace(spare, previous)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(spare)  # which still is there where both were names of one file


def _read(path):
    """What torch.load gives for a file whose bytes are those that were written; a UsageError where they aren't."""
    try:
        return _open(path, whole=True)
    except Exception as e:  # zip, pickle and torch each have their own way to say that a file is damaged
        if is_out_of_memory(e):
            raise
        # torch advises to load what isn't plain data all the same, which would run it.
        said = "it holds more than plain data" if isinstance(e, pickle.UnpicklingError) else shown(first_line(e), str)
        raise UsageError(f"{path} can't be read, it is damaged or not a checkpoint ({said})") from e


def _open(path, whole=False):
    zipped = zipfile.is_zipfile(path)
    if zipped:
        with zipfile.ZipFile(path) as file:
            if any(part.compress_type != zipfile.ZIP_STORED for part in file.infolist()):
                raise UsageError("it is compressed")  # a few bytes may stand for all memory; torch.save does no such
            if whole and (damaged := file.testzip()):  # torch.load doesn't compare checksums
                raise UsageError(f"the checksum of {damaged} is wrong")
            for part in file.namelist():
                if part.endswith("data.pkl"):
                    with file.open(part) as pickled:
                        refuse_endless(pickled)
    # Mapped, not read: while auto-fit measures what is free, the weights are in the file alone.
    if zipped and path.isprintable():
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    with open(path, "rb") as f:  # torch maps only a file whose name is text
        if not zipped:
            if f.read(len(ZIP)) == ZIP:
                raise UsageError("its end is missing")  # of a copy that was cut short, mostly
            f.seek(0)
            # Mapped, because a file makes room for whatever length a damaged pickle asks it to read.
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as pickles:
                for _ in range(OLD_PICKLES):
                    if pickles.tell() < len(pickles):
                        refuse_endless(pickles)
        return torch.load(f, map_location="cpu", weights_only=True)


def peek(path, whole=False):
    """What a checkpoint file holds, its weights not read, or None where it is damaged or no checkpoint.

    whole: look at every byte.
    """
    if not os.path.isfile(path):
        return None
    try:
        held = _open(path, whole)
        fits = _is_iteration(held.get("iter_num")) and isinstance(held.get("config", {}), dict)
        return held if fits else None
    except Exception as e:  # as in _read
        if is_out_of_memory(e):
            raise
        return None


def name_of_model(out_dir):
    """The file of a run's model: ckpt.pt, or ckpt.last.pt where a run that keeps its best stopped before it had one."""
    last_alone = not os.path.isfile(os.path.join(out_dir, NAME)) and os.path.isfile(os.path.join(out_dir, LAST))
    return LAST if last_alone else NAME


def load(out_dir, name=NAME, for_training=False):
    """A checkpoint file in out_dir with its tensors on the CPU, and torch.compile's prefix taken off its names.

    for_training: with all that a run goes on with, and not just a model. Raises UsageError where there is none, where
    it is damaged, or where an entry is missing or isn't what training saves.
    """
    path, previous = os.path.join(out_dir, name), os.path.join(out_dir, PREVIOUS)
    try:
        if not os.path.isfile(path):
            raise UsageError(f"there is no checkpoint {path}: train with --out_dir={out_dir} first, or set out_dir")
        checkpoint = _read(path)
    except UsageError as e:
        if not (before := peek(previous, whole=True)):
            raise
        raise UsageError(
            f"{e}; {previous} beside it is whole, of iteration {before['iter_num']}: to go on from there, rename it to "
            f"{NAME}"
        ) from e
    if isinstance(checkpoint, dict):  # one that was made smaller, to be shared, may hold None or nothing in an entry
        checkpoint = {k: v for k, v in checkpoint.items() if v is not None and not (isinstance(v, dict) and not v)}
    required = REQUIRED if for_training else REQUIRED[:2]
    missing = [k for k in required if k not in checkpoint] if isinstance(checkpoint, dict) else required
    if missing:
        raise UsageError(f"{path} is not a checkpoint of a training run: it lacks {', '.join(missing)}")
    check(checkpoint, path, for_training)
    checkpoint["model"] = {name.removeprefix("_orig_mod."): w for name, w in checkpoint["model"].items()}
    return checkpoint


# ---- what a checkpoint may hold ----------------------------------------------------------------------------


def _maps(value, keys, values):
    return isinstance(value, dict) and all(isinstance(k, keys) and isinstance(v, values) for k, v in value.items())


def _is_plain(value):
    """Whether a value is a tensor of real numbers that are all there: none is made of others, or of no memory."""
    return (
        isinstance(value, torch.Tensor)
        and (value.layout, value.device.type) == (torch.strided, "cpu")
        and value.dtype in _REAL
        and value.untyped_storage().nbytes() >= value.numel() * value.element_size()
    )


def _is_finite(value, least=-sys.float_info.max):
    """Whether a value is a number from least on, or a tensor of one as nanoGPT saves its loss, and not a nan."""
    if _is_plain(value) and value.numel() == 1:
        value = value.item()
    return type(value) in (int, float) and least <= value <= sys.float_info.max


def _is_iteration(value):
    return type(value) is int and 0 <= value < 2**63


def _is_adamw(value):
    if not isinstance(value, dict) or not isinstance(groups := value.get("param_groups"), list):
        return False
    if not all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups):
        return False
    numbers = [index for group in groups for index in group["params"]]
    return numbers == list(range(len(numbers))) and _maps(value.get("state"), int, dict)


def _is_split(value):
    """Whether a value is how train.py cut a batch: the same product, and no remainder."""
    if not isinstance(value, dict) or from_dict(MemoryLevers, value.get("levers", {})) is None:
        return False
    for pair in (value.get("of"), value.get("into")):
        if not isinstance(pair, list) or len(pair) != 2 or not all(type(n) is int and n > 0 for n in pair):
            return False
    (batch_size, accumulation), (micro_batch_size, micro_steps) = value["of"], value["into"]
    whole = batch_size % micro_batch_size == 0 or micro_batch_size % batch_size == 0
    return whole and batch_size * accumulation == micro_batch_size * micro_steps


def _is_fingerprints(value):
    return _maps(value, str, list) and all(type(n) is int for known in value.values() for n in known)


_EXPECTED = {  # what an entry must be, and whether a value is that
    "model": (
        "tensors of real numbers by name",
        lambda value: _maps(value, str, torch.Tensor) and all(map(_is_plain, value.values())),
    ),
    "optimizer": ("the state_dict of AdamW", _is_adamw),
    "model_args": ("a dict of sizes", lambda value: _maps(value, str, object)),
    "iter_num": ("a whole number from 0 on, of 64 bits", _is_iteration),
    "best_val_loss": ("a finite number", _is_finite),
    "config": ("a dict of keys", lambda value: _maps(value, str, object) and isinstance(value.get("dataset", ""), str)),
    "scaler": ("a dict", lambda value: isinstance(value, dict)),
    "data": ("two whole numbers for each split", _is_fingerprints),
    "split": ("two pairs of whole numbers", lambda value: _is_split(value)),
    "metrics": ("the state of a run's figures", is_state),
}


def check(checkpoint, path, for_training):
    """Raise a UsageError for the first entry that is not what a training run saves, contents included."""
    # What isn't asked for may be anything: whoever shares a checkpoint may have emptied it.
    looked_at = checkpoint if for_training else ("model", "model_args", "config")
    for entry, (expected, fits) in _EXPECTED.items():
        if entry in checkpoint and entry in looked_at and not fits(checkpoint[entry]):
            raise UsageError(f"{path} is damaged or not a checkpoint of this model: {entry} must be {expected}")
    if not all_finite(checkpoint["model"].values()):
        raise UsageError(f"{path} holds weights that are not finite: {_elsewhere(path)}")
    if for_training:
        _check_moments(checkpoint["optimizer"], path)
    sizes = checkpoint["model_args"]
    lacking = [k for k in SIZES if k not in sizes]
    if lacking:
        raise UsageError(f"{path}: its model_args lack {', '.join(lacking)}: it is not a checkpoint of this model")
    for key in SIZES:
        types = {"bias": (bool,), "dropout": (float, int)}.get(key, (int,))
        if type(sizes[key]) not in types:
            raise UsageError(f"{path}: {key} in its model_args must be of type {types[0].__name__}: it is damaged")
    if not for_training:
        return
    with usage_errors(LookupError, TypeError, RuntimeError, AttributeError, prefix=f"{path}: its rng is damaged: "):
        for rank in checkpoint.get("rng", ()):
            if isinstance(rank["data"], torch.Tensor):  # as saved by version 0.1
                rank["data"] = {"before": rank["data"]}
            for state in (rank["data"]["before"], *rank["data"].values(), rank["generators"]["cpu"]):
                torch.Generator().set_state(state)


def _elsewhere(path):
    """What to do about a checkpoint that can't be gone on from."""
    best, previous = (os.path.join(os.path.dirname(path), name) for name in (NAME, PREVIOUS))
    if os.path.basename(path) == LAST and os.path.isfile(best):
        return f"to go on from {best}, remove it"
    if path == best and os.path.isfile(previous):
        return f"to go on from the one before it, rename {previous} to {NAME}"
    return "take another"


def _check_moments(optimizer, path):
    """Raise a UsageError where AdamW's state can't come from training: it would be believed, and spoil the weights."""
    for group in optimizer["param_groups"]:
        for option in _ANOTHER_OPTIMIZER:
            if group.get(option):
                raise UsageError(f"{path}: its optimizer has {option} set, which no training run here does")
        for name in ("lr", "eps", "weight_decay"):
            if not _is_finite(group.get(name, 0.0), least=0.0):
                raise UsageError(
                    f"{path}: its optimizer has {name}={shown(group[name])}: it must be a number from 0 on"
                )
        betas = group.get("betas", (0.0, 0.0))
        if type(betas) not in (tuple, list) or len(betas) != 2 or not all(_is_finite(b, 0.0) and b < 1 for b in betas):
            raise UsageError(f"{path}: its optimizer has betas={shown(betas)}: they must be two numbers from 0 to 1")
    for index, moments in optimizer["state"].items():
        for name in ("step", "exp_avg", "exp_avg_sq") if moments else ():
            value, least = moments.get(name), -math.inf if name == "exp_avg" else 0.0
            if name == "step":
                sound = _is_finite(value, least)
            else:
                sound = _is_plain(value) and all_finite([value]) and (not value.numel() or value.min() >= least)
            if not sound:
                raise UsageError(
                    f"{path}: {name} of weight {index} in its optimizer is missing, negative, not finite or no number"
                )


def restore(saved, optimizer, scaler, batches, world, device):
    """Let a run go on where a checkpoint was made: AdamW's moments, the scaler, this rank's data and generators.

    What a checkpoint lacks, as nanoGPT's does, begins anew.
    """
    for split, known in batches.fingerprints.items():
        if saved.get("data", {}).get(split, known) != known:
            print(f"{split}.bin is not what it was when the checkpoint was saved: the run goes on with what is there")
    load_optimizer(optimizer, saved["optimizer"])
    with usage_errors(LookupError, TypeError, RuntimeError, prefix="the checkpoint's scaler or rng is damaged: "):
        if scaler.is_enabled() and saved.get("scaler"):
            scaler.load_state_dict(saved["scaler"])
        ranks = saved.get("rng", ())
        if world.rank < len(ranks):
            machine.set_rng_state(ranks[world.rank]["generators"], device)
        if ranks:
            batches.load_state_dict(ranks[0]["data"])  # the stream is one, of however many ranks


def rng_of(batches, device):
    """Where this rank's random numbers stand: what a checkpoint's rng holds of each rank."""
    return {"data": batches.state_dict(), "generators": machine.rng_state(device)}


def split_of(batches, world, levers):
    """How the batch is cut now: [batch_size, gradient_accumulation_steps] as configured, and as they are."""
    return {
        "of": [batches.batch_size, batches.per_iter * world.size],
        "into": [batches.micro_batch_size, batches.micro_steps * world.size],
        "levers": asdict(levers),
    }


def split_as_saved(saved, plan, config, given, ranks=1):
    """plan, cut as when the checkpoint was saved: memory may have run out since the start of that run.

    config: the run's keys; given: those that were named, which stand. Where the cut isn't what is configured, it is
    told, with the way to another: auto-fit looks again, but first tries the answer that is kept in out_dir.
    ranks: how many train now. Where they are too many to join as many batches as before, it is the next smaller size.
    """
    split = saved.get("split", {})
    if split.get("of") != [plan.batch_size, plan.gradient_accumulation_steps]:
        return plan
    chosen = {name: value for name, value in split.get("levers", {}).items() if name in FITTED and name not in given}
    if plan.levers.optimizer_state != "float32":
        chosen.pop("shard", None)  # settings.py's check_shard says why
    sizes = micro_batch_sizes(plan.batch_size, plan.gradient_accumulation_steps // ranks)
    size = max(size for size in sizes if size <= split["into"][0])
    answer = os.path.join(config["out_dir"], cache.NAME)
    if size != plan.batch_size and not config["auto_fit"]:
        first = f"remove {answer} and " if os.path.lexists(answer) else ""
        print(
            f"batch_size {plan.batch_size} -> {size}, as when the checkpoint was saved; to have it fitted anew, "
            f"{first}give --auto_fit=True"
        )
    return replace(plan, micro_batch_size=size, levers=replace(plan.levers, **chosen))


def load_optimizer(optimizer, state):
    """Give AdamW its saved moments. Rows that a cropped block_size dropped are dropped here too.

    Raises UsageError where they are not of this model's weights.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    prefix = "the checkpoint's optimizer does not belong to its model: "
    with usage_errors(LookupError, TypeError, ValueError, prefix=prefix):
        for index, moments in state["state"].items():
            shape = params[index].shape
            for name, value in moments.items():
                if name == "step":
                    continue
                kept = value[: shape[0]] if isinstance(value, torch.Tensor) else None
                if kept is None or kept.shape != shape:
                    raise UsageError(f"{prefix}{name} of weight {index} must be a tensor of shape {tuple(shape)}")
                kept = share_like(kept, params[index])
                moments[name] = kept.clone()  # of its own, and not the file's
        for saved, ours in zip(state["param_groups"], optimizer.param_groups, strict=True):
            saved.update({k: ours[k] for k in _IMPLEMENTATION if k in ours})
        optimizer.load_state_dict(state)
