"""A run's figures: each made once, as a dict, and handed to the readers: functions that show or keep it.

The readers are the printed lines, out_dir/metrics.jsonl, Weights & Biases and TensorBoard; rank 0 alone has some.
One that raises is given up with a line: the run goes on without it.

metrics.jsonl has a line of JSON for each dict, in the order of iterations, each of them once:

    {"iter": 0, "time": ..., "run": {"id": ..., ...}}     first, and where the run goes on: see run_facts
    {"iter": 0, "time": ..., "tokens": 0, "lr": ..., "train_loss": ..., "val_loss": ..., "best_val_loss": ...}
    {"iter": 0, "time": ..., "tokens": 491520, "lr": ..., "loss": ..., "grad_norm": ..., "seconds": ...,
     "tokens_per_second": ..., "mfu": ..., "peak_bytes": ..., "memory_bytes": ..., "seconds_left": ...}

An evaluation stands before its iteration, and its tokens are those trained before. Losses are nats a token. The norm
is the gradient's before clipping. "time" is seconds since 1970; "seconds" are an iteration's, without evaluations. mfu
is a fraction of 1, or -1 where the model can't tell. Bytes are as machine.memory_in_use says. Figures of one's own
stand under their own names. What isn't known, and what isn't finite, is null.
"""

import contextlib
import importlib
import json
import math
import os
import platform
import re
import time
from dataclasses import asdict

import torch

from nanofit import machine
from nanofit.errors import UsageError, first_line, usage_errors
from nanofit.units import duration

FILE = "metrics.jsonl"
WARM_UP = 5  # iterations after which speed is worth telling
APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND
INERTIA = 0.9  # of the means that follow speed
OURS = {  # every other name is a figure of one's own
    "iter", "time", "run", "tokens", "lr", "loss", "grad_norm", "seconds", "tokens_per_second", "mfu", "peak_bytes",
    "memory_bytes", "seconds_left", "train_loss", "val_loss", "best_val_loss",
}  # fmt: skip


class Metrics:
    """The clock of a run, and its figures.

    mfu_of: seconds of an iteration -> model FLOP/s utilisation, a fraction of 1. saved: the checkpoint that the run
    goes on from, or None; its "metrics" is what state() gave, and nanoGPT's lacks it.
    """

    def __init__(self, device, iter_num, max_iters, eval_interval, tokens_per_iter, mfu_of, saved=None):
        self.device, self.mfu_of = device, mfu_of
        self.max_iters, self.eval_interval, self.tokens_per_iter = max_iters, eval_interval, tokens_per_iter
        state = (saved or {}).get("metrics", {"tokens": iter_num * tokens_per_iter, "best_val_loss": math.inf})
        self.best_val_loss, self._tokens, self._start = state["best_val_loss"], state["tokens"], iter_num
        self._best_iter = state.get("best_iter", iter_num)
        self._mfu = self._seconds = self._pause = None  # running means, and the last pause
        self.start()

    def start(self, readers=(), facts=None):
        """The first iteration begins now, and figures go to these readers. facts: as run_facts gives them."""
        self.readers, self._facts = readers, facts  # which readers are told before the first figures
        self._last, self._clock = self._start - 1, time.perf_counter()

    def state(self, iter_num):
        """What a checkpoint for the beginning of iteration iter_num keeps of these figures."""
        best = {"best_val_loss": self.best_val_loss, "best_iter": self._best_iter}
        return {"tokens": self._tokens_before(iter_num), **best}

    def evaluations_since_best(self, iter_num):
        """How many evaluations up to that of iteration iter_num have not been better than the best."""
        return (iter_num - self._best_iter) // self.eval_interval

    @contextlib.contextmanager
    def paused(self):
        """Time that isn't an iteration's: an evaluation, and what is saved after it."""
        machine.synchronize(self.device)
        since = time.perf_counter()
        try:
            yield
        finally:
            self._pause = time.perf_counter() - since
            self._clock += self._pause

    def evaluated(self, iter_num, lr, losses, **more):
        """Tell the readers of an evaluation before iteration iter_num. losses: {'train': nats, 'val': nats}.

        more: figures of one's own, numbers or scalar tensors.
        """
        if losses["val"] <= self.best_val_loss:  # equal where resuming does the best evaluation again
            self.best_val_loss, self._best_iter = losses["val"], iter_num
        self._tell(dict(
            iter=iter_num, tokens=self._tokens_before(iter_num), lr=lr, train_loss=losses["train"],
            val_loss=losses["val"], best_val_loss=self.best_val_loss, **_numbers(more),
        ))  # fmt: skip

    def iterated(self, iter_num, lr, loss, norm, **more):
        """Tell the readers of iteration iter_num. loss, norm: scalar tensors on the device; more: as in evaluated."""
        loss, norm = torch.stack((loss, norm)).tolist()  # waits for the GPU, so that the clock tells the truth
        now = time.perf_counter()
        seconds = (now - self._clock) / (iter_num - self._last)  # of an iteration, since the last line
        self._clock, self._last = now, iter_num
        self._mfu, self._seconds = self._mean(self._mfu, self._mfu_now(seconds)), self._mean(self._seconds, seconds)
        peak_bytes, memory_bytes = machine.memory_in_use(self.device)
        self._tell(dict(
            iter=iter_num, tokens=self._tokens_before(iter_num + 1), lr=lr, loss=loss, grad_norm=norm, seconds=seconds,
            tokens_per_second=self.tokens_per_iter / seconds, mfu=self._mfu, peak_bytes=peak_bytes,
            memory_bytes=memory_bytes, seconds_left=self._seconds_left(iter_num), **_numbers(more),
        ))  # fmt: skip

    def _mfu_now(self, seconds):
        try:
            return self.mfu_of(seconds)
        except Exception as e:  # of a model that somebody wrote
            print(f"mfu is not known: the model's estimate_mfu can't tell ({_why(e)})")
            self.mfu_of = lambda seconds: -1.0  # nanoGPT's word for unknown
        return -1.0

    @property
    def _warms_up(self):
        return self._last - self._start < WARM_UP

    def _mean(self, mean, new):
        return new if self._warms_up or mean is None else INERTIA * mean + (1 - INERTIA) * new

    def _tokens_before(self, iter_num):
        return self._tokens + (iter_num - self._start) * self.tokens_per_iter

    def _seconds_left(self, iter_num):
        """Until the end of the run, evaluations included; None before speed is known."""
        if self._warms_up:
            return None
        evaluations = self.max_iters // self.eval_interval - iter_num // self.eval_interval
        return (self.max_iters - iter_num) * self._seconds + evaluations * (self._pause or 0.0)

    def _tell(self, figures):
        facts, self._facts = self._facts, None
        for told in ([{"iter": self._start, "run": facts}] if facts else []) + [figures]:
            told["time"] = round(time.time(), 1)
            for reader in self.readers:
                reader(told)


def _numbers(more):
    """Figures of one's own as floats, None for what is no number."""
    if taken := OURS & set(more):
        raise UsageError(f"{min(taken)!r} is a figure of every run: call your own something else")
    for name, value in more.items():
        try:
            more[name] = float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):  # RuntimeError: a tensor of several numbers
            more[name] = None
    return more


def run_facts(device, world, config, defaults, model_args, plan, levers):
    """What metrics.jsonl tells of a run. plan: autofit's Plan; levers: with nothing left open."""
    changed = sorted(key for key in config if config[key] != defaults.get(key))
    return dict(
        machine.device_info(device), python=platform.python_version(), ranks=world.size, config=config, changed=changed,
        model_args=model_args, plan=asdict(plan), levers=asdict(levers),
    )  # fmt: skip


# ---- readers: each is called with every dict of figures ----------------------------------------------------


def require_readers(config, world):
    """Import what wandb_log and tensorboard_log ask for on rank 0; UsageError where it can't be imported."""
    for key, package in (("wandb_log", "wandb"), ("tensorboard_log", "tensorboard")):
        if world.is_main and config[key]:
            with usage_errors(Exception, prefix=f"{key}=True: pip install {package}, or --{key}=False. "):
                module = importlib.import_module(package)
            if key == "wandb_log" and not hasattr(module, "init"):  # a folder wandb/ that earlier runs have left here
                raise UsageError("wandb_log=True: pip install wandb, or --wandb_log=False")


def open_readers(config, folder, iter_num):
    """The readers that a run's keys ask for. Called before what takes long: what can't be opened is told here.

    folder: its RunFolder. iter_num: the iteration that it begins with.
    """
    readers = [_guarded("the printed line", lambda: print_line)]
    if not config["eval_only"]:  # which changes no file
        readers.append(_guarded(folder.path(FILE), lambda: _file(folder, iter_num)))
        if config["tensorboard_log"]:
            way_out = "; --tensorboard_log=False does without it"
            readers.append(_guarded("TensorBoard's file", lambda: _tensorboard(folder, iter_num), way_out))
    if config["wandb_log"]:
        way_out = "; run wandb login, or set WANDB_MODE=offline, or give --wandb_log=False"
        readers.append(_guarded("W&B", lambda: _wandb(config, folder.run_id), way_out))
    return readers


def _guarded(name, make, way_out=""):
    """The reader that make() gives, until it raises anything, which a line tells; where make() does, with way_out."""

    def attempt(act, *given, also=""):
        nonlocal reader
        try:
            return act(*given)
        except KeyboardInterrupt:
            raise
        except BaseException as e:  # a full disk, a lost connection, whatever others' software raises
            reader = None
            with contextlib.suppress(Exception):  # what failed may be the screen
                print(f"{name} failed ({_why(e)}): the run goes on without it{also}")

    reader = None
    reader = attempt(make, also=way_out)
    return lambda figures: reader and attempt(reader, figures)


def _why(error):
    return (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {first_line(error)}"


def print_line(figures):
    """Print nanoGPT's line, which goes on with what it doesn't tell."""
    if "run" in figures:
        return
    if "val_loss" in figures:
        line = "step {iter}: train loss {train_loss:.4f}, val loss {val_loss:.4f}".format_map(figures)
    else:
        line = "iter {iter}: loss {loss:.4f}".format_map(figures)
        line += f", time {figures['seconds'] * 1000:.2f}ms, mfu {figures['mfu'] * 100:.2f}%"
        line += f", {figures['tokens_per_second']:,.0f} tok/s, norm {figures['grad_norm']:.2f}"
    if figures.get("peak_bytes"):
        line += f", peak {figures['peak_bytes'] / 2**30:.2f} GiB"
    for name, value in _own(figures).items():
        line += f", {name} unknown" if value is None else f", {name} {value:.4g}"
    if figures.get("seconds_left"):
        line += f", {duration(figures['seconds_left'])} left"
    print(line)


def _own(figures):
    return {name: value for name, value in figures.items() if name not in OURS}


def _wandb(config, run_id):
    import wandb

    same_run = {} if config["eval_only"] else {"id": run_id, "resume": "allow"}  # an evaluation is none of its points
    wandb.init(project=config["wandb_project"], name=config["wandb_run_name"], config=dict(config), **same_run)
    mfu = -100.0  # percent, of the last iteration

    def log(figures):
        nonlocal mfu
        if "run" in figures:
            return
        if "val_loss" in figures:
            seen = {"train/loss": figures["train_loss"], "val/loss": figures["val_loss"]}
        else:
            mfu = figures["mfu"] * 100
            seen = {name: figures[name] for name in ("loss", "grad_norm", "tokens_per_second")}
        wandb.log({"iter": figures["iter"], "lr": figures["lr"], "mfu": mfu, **seen, **_own(figures)})

    return log


def _tensorboard(folder, iter_num):
    from torch.utils.tensorboard import SummaryWriter

    # What an earlier part of the run, or another run, wrote from this iteration on is hidden.
    writer = SummaryWriter(folder.path("tensorboard"), purge_step=iter_num)

    def log(figures):
        for name, value in figures.items():
            if name not in ("iter", "time", "run", "seconds_left") and value is not None:
                writer.add_scalar(name, value, figures["iter"], figures["time"])
        writer.flush()  # which tells what went wrong in its thread

    return log


# ---- metrics.jsonl -----------------------------------------------------------------------------------------


def _file(folder, iter_num):
    """The reader that keeps figures in metrics.jsonl, which it opens with the first of them.

    What the file tells of iteration iter_num and of later ones is cut off. Another run's file is kept in that run's
    folder, and comes back when that run goes on.
    """
    file = None

    def write(figures):
        nonlocal file
        file = opened() if file is None else file
        if "run" in figures:
            figures = {**figures, "run": {"id": folder.run_id, **figures["run"]}}
        finite = json.loads(json.dumps(figures), parse_constant=lambda infinity_or_nan: None)
        line = (json.dumps(finite, separators=(",", ":")) + "\n").encode()
        if os.write(file, line) < len(line):
            raise OSError("there is no room for a whole line")
        if "val_loss" in figures:
            os.fsync(file)  # before a checkpoint is, which then never knows more than the file

    def opened():
        path, own = folder.path(FILE), os.path.join(folder.kept_in(folder.run_id), FILE)
        os.makedirs(folder.out_dir, exist_ok=True)
        if os.path.lexists(path) and (other := run_of(path)) != folder.run_id:
            target = os.path.join(folder.kept_in(other), FILE)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            while os.path.lexists(target):
                target += "~"
            os.rename(path, target)
        if not os.path.exists(path) and run_of(own) == folder.run_id:
            os.rename(own, path)
        file, end = os.open(path, APPEND, 0o666), 0  # as long as the process
        with open(path, "rb") as written:
            for line in written:
                if record_of(line).get("iter", iter_num) >= iter_num:
                    break
                end += len(line)
        os.ftruncate(file, end)
        return file

    return write


def record_of(line):
    """A line of the file, bytes, as a dict; an empty one where it isn't a whole and well-formed record."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else {}
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) and type(record.get("iter")) is int else {}


def run_of(path):
    """The id of the run whose file this is, None where it doesn't say, or is a link, a pipe, a folder, a device."""
    if os.path.islink(path) or not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        run = record_of(file.readline()).get("run")
    run_id = run.get("id") if isinstance(run, dict) else None
    return run_id if isinstance(run_id, str) and re.fullmatch("[0-9a-f]{8}", run_id) else None  # part of a path
