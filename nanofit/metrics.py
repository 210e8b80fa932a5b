"""A run's figures. Each is computed once, put into a dict, and handed to the readers: functions that show or keep it.

The readers are the printed lines, out_dir/metrics.jsonl, Weights & Biases and TensorBoard. Rank 0 alone has readers.
If a reader raises, a line says so, and the run goes on without it.

metrics.jsonl has a line of JSON for each dict, in the order of iterations, and none twice:

    {"iter": 0, "time": ..., "run": {"id": ..., ...}}     at the start, and at each resume: see run_facts
    {"iter": 0, "time": ..., "tokens": 0, "lr": ..., "train_loss": ..., "val_loss": ..., "best_val_loss": ...}
    {"iter": 0, "time": ..., "tokens": 491520, "lr": ..., "loss": ..., "grad_norm": ..., "seconds": ...,
     "tokens_per_second": ..., "mfu": ..., "peak_bytes": ..., "memory_bytes": ..., "seconds_left": ...}

An evaluation comes before the iteration of the same number, and its tokens are those trained before. Losses are nats
per token. grad_norm is the gradient's norm before clipping. "time" is seconds since 1970, "seconds" is the time of an
iteration without evaluations. mfu is a fraction of 1, or -1 if the model can't tell. Bytes: see machine.memory_in_use.
Your own figures have their own names. A figure that is unknown or not finite is null.
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
from nanofit.errors import UsageError, reason, usage_errors
from nanofit.units import duration

FILE = "metrics.jsonl"
WARM_UP = 5  # iterations before speed is averaged
INERTIA = 0.9  # weight of the past in the running means of speed
OURS = {  # every other name is a user's own figure
    "iter", "time", "run", "tokens", "lr", "loss", "grad_norm", "seconds", "tokens_per_second", "mfu", "peak_bytes",
    "memory_bytes", "seconds_left", "train_loss", "val_loss", "best_val_loss",
}  # fmt: skip


class Metrics:
    """The clock of a run, and its figures.

    mfu_of: seconds of an iteration -> model FLOP/s utilisation, a fraction of 1. saved: the checkpoint to resume from,
    or None. Its "metrics" came from state(); a checkpoint of nanoGPT has none.
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
        """The first iteration begins now. readers get all figures, and before them the facts (see run_facts)."""
        self.readers, self._facts = readers, facts
        self._last, self._clock = self._start - 1, time.perf_counter()

    def state(self, iter_num):
        """What a checkpoint at the beginning of iteration iter_num keeps of these figures."""
        best = {"best_val_loss": self.best_val_loss, "best_iter": self._best_iter}
        return {"tokens": self._tokens_before(iter_num), **best}

    def evaluations_since_best(self, iter_num):
        """How many evaluations have passed since the best one, at iteration iter_num."""
        return (iter_num - self._best_iter) // self.eval_interval

    @contextlib.contextmanager
    def paused(self):
        """Leave out of the iteration's time what happens here: an evaluation, and saving after it."""
        machine.synchronize(self.device)
        since = time.perf_counter()
        try:
            yield
        finally:
            self._pause = time.perf_counter() - since
            self._clock += self._pause

    def evaluated(self, iter_num, lr, losses, /, **more):
        """Hand an evaluation before iteration iter_num to the readers. losses: {'train': nats, 'val': nats}.

        more: your own figures, numbers or scalar tensors.
        """
        if losses["val"] < self.best_val_loss:
            self.best_val_loss, self._best_iter = losses["val"], iter_num
        self._tell(dict(
            iter=iter_num, tokens=self._tokens_before(iter_num), lr=lr, train_loss=losses["train"],
            val_loss=losses["val"], best_val_loss=self.best_val_loss, **_numbers(more),
        ))  # fmt: skip

    def iterated(self, iter_num, lr, loss, norm, **more):
        """Hand iteration iter_num to the readers. loss, norm: scalar tensors on the device; more: as in evaluated."""
        loss, norm = torch.stack((loss, norm)).tolist()  # waits for the GPU, so that the time is right
        now = time.perf_counter()
        seconds = (now - self._clock) / (iter_num - self._last)  # of an iteration, since the last line
        self._clock, self._last = now, iter_num
        self._mfu, self._seconds = self._mean(self._mfu, self.mfu_of(seconds)), self._mean(self._seconds, seconds)
        peak_bytes, memory_bytes = machine.memory_in_use(self.device)
        self._tell(dict(
            iter=iter_num, tokens=self._tokens_before(iter_num + 1), lr=lr, loss=loss, grad_norm=norm, seconds=seconds,
            tokens_per_second=self.tokens_per_iter / seconds, mfu=self._mfu, peak_bytes=peak_bytes,
            memory_bytes=memory_bytes, seconds_left=self._seconds_left(iter_num), **_numbers(more),
        ))  # fmt: skip

    @property
    def _warms_up(self):
        return self._last - self._start < WARM_UP

    def _mean(self, mean, new):
        return new if self._warms_up or mean is None else INERTIA * mean + (1 - INERTIA) * new

    def _tokens_before(self, iter_num):
        return self._tokens + (iter_num - self._start) * self.tokens_per_iter

    def _seconds_left(self, iter_num):
        """Seconds until the end of the run, evaluations included; None before speed is known."""
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
    """A user's own figures as floats, None for what is no number."""
    if taken := OURS & set(more):
        raise UsageError(f"{min(taken)!r} is a figure of every run: call your own something else")
    for name, value in more.items():
        try:
            more[name] = float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):  # RuntimeError: a tensor of several numbers
            more[name] = None
    return more


def run_facts(device, world, config, defaults, model_args, plan, levers):
    """The facts about a run for metrics.jsonl. plan: autofit's Plan; levers: as they are applied."""
    changed = sorted(key for key in config if config[key] != defaults.get(key))
    return dict(
        machine.device_info(device), python=platform.python_version(), ranks=world.size, config=config, changed=changed,
        model_args=model_args, plan=asdict(plan), levers=asdict(levers),
    )  # fmt: skip


# ---- readers: each is called with every dict of figures ----------------------------------------------------


def require_readers(config, world):
    """Import what wandb_log and tensorboard_log need, on rank 0; UsageError if that fails."""
    for key, package in (("wandb_log", "wandb"), ("tensorboard_log", "tensorboard")):
        if world.is_main and config[key]:
            with usage_errors(Exception, prefix=f"{key}=True: pip install {package}, or --{key}=False. "):
                module = importlib.import_module(package)
            if key == "wandb_log" and not hasattr(module, "init"):  # the folder wandb/ of earlier runs was imported
                raise UsageError("wandb_log=True: pip install wandb, or --wandb_log=False")


def open_readers(config, folder, iter_num):
    """The readers that a run's keys ask for; a line for each that can't be opened.

    folder: the RunFolder. iter_num: the first iteration.
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
    """The reader that make() returns, given up with a line when it raises. If make() raises, the line adds way_out."""

    def attempt(act, *given, also=""):
        nonlocal reader
        try:
            return act(*given)
        except KeyboardInterrupt:
            raise
        except BaseException as e:  # a full disk, a lost connection, anything that W&B raises
            reader = None
            with contextlib.suppress(Exception):  # the screen may be what failed
                print(f"{name} failed ({reason(e)}): the run goes on without it{also}")

    reader = None
    reader = attempt(make, also=way_out)
    return lambda figures: reader and attempt(reader, figures)


def print_line(figures):
    """Print nanoGPT's line, and after it what nanoGPT doesn't tell."""
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

    same_run = {} if config["eval_only"] else {"id": run_id, "resume": "allow"}  # an evaluation is a new one
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

    # Hide what was written before for this iteration and later ones.
    writer = SummaryWriter(folder.path("tensorboard"), purge_step=iter_num)

    def log(figures):
        for name, value in figures.items():
            if name not in ("iter", "time", "run", "seconds_left") and value is not None:
                writer.add_scalar(name, value, figures["iter"], figures["time"])
        writer.flush()  # raises what went wrong in its thread

    return log


# ---- metrics.jsonl -----------------------------------------------------------------------------------------


def _file(folder, iter_num):
    """The reader that writes figures to metrics.jsonl. It opens the file when the first figure comes.

    Lines of iteration iter_num and later ones are cut off. Another run's file is moved to that run's folder, and comes
    back when that run goes on.
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
            os.fsync(file)  # before the checkpoint, so that the file never lacks what the checkpoint knows

    def opened():
        path, own = folder.path(FILE), os.path.join(folder.kept_in(folder.run_id), FILE)
        os.makedirs(folder.out_dir, exist_ok=True)
        if os.path.lexists(path) and (other := run_of(path)) != folder.run_id:
            folder.move_aside(FILE, other)
        if not os.path.exists(path) and run_of(own) == folder.run_id:
            os.rename(own, path)
        file, end = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), 0  # open until the process ends
        with open(path, "rb") as written:
            for line in written:
                if record_of(line).get("iter", iter_num) >= iter_num:
                    break
                end += len(line)
        os.ftruncate(file, end)
        return file

    return write


def record_of(line):
    """A line of the file (bytes) as a dict, which is empty if the line isn't a whole record."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else {}
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) and type(record.get("iter")) is int else {}


def run_of(path):
    """The id of the run whose file this is, None if that can't be told."""
    if os.path.islink(path) or not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        run = record_of(file.readline()).get("run")
    run_id = run.get("id") if isinstance(run, dict) else None
    return run_id if isinstance(run_id, str) and re.fullmatch("[0-9a-f]{8}", run_id) else None  # part of a path
