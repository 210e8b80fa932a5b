"""A run's figures: each made once, as a dict, and handed to all that show or keep it.

Metrics keeps the clock and makes the figures, at train.py's word; the readers are the printed lines,
out_dir/metrics.jsonl, Weights & Biases and TensorBoard, and rank 0 alone has some.
"""

import atexit
import contextlib
import math
import os
import platform
import time
from dataclasses import asdict

import torch

from nanofit import machine
from nanofit.errors import first_line, usage_errors
from nanofit.metrics_file import MetricsFile
from nanofit.units import duration

WARM_UP = 5  # iterations after which speed is worth telling
INERTIA = 0.9  # of the means that follow speed


class Metrics:
    """The clock of a run, and its figures.

    mfu_of: seconds of an iteration -> model FLOP/s utilisation, a fraction of 1. saved: the checkpoint that the run
    goes on from, or None; its "metrics" is what state() gave, and nanoGPT's lacks it.
    """

    def __init__(self, device, iter_num, max_iters, eval_interval, tokens_per_iter, mfu_of, saved=None):
        self.device, self.mfu_of, self.readers = device, mfu_of, []
        self.max_iters, self.eval_interval, self.tokens_per_iter = max_iters, eval_interval, tokens_per_iter
        state = (saved or {}).get("metrics", {"tokens": iter_num * tokens_per_iter, "best_val_loss": math.inf})
        self.best_val_loss, self._tokens, self._start = state["best_val_loss"], state["tokens"], iter_num
        self._mfu = self._seconds = self._pause = None  # running means, and the last pause
        self.start_clock()

    def start_clock(self):
        """The next iteration begins now."""
        self._last, self._clock = self._start - 1, time.perf_counter()

    def state(self, iter_num):
        """What a checkpoint for the beginning of iteration iter_num keeps of these figures."""
        return {"tokens": self._tokens_before(iter_num), "best_val_loss": self.best_val_loss}

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

    def evaluated(self, iter_num, lr, losses):
        """Tell the readers of an evaluation before iteration iter_num. losses: {'train': nats, 'val': nats}."""
        self.best_val_loss = min(self.best_val_loss, losses["val"])
        self._tell(
            {
                "iter": iter_num,
                "tokens": self._tokens_before(iter_num),
                "lr": lr,
                "train_loss": losses["train"],
                "val_loss": losses["val"],
                "best_val_loss": self.best_val_loss,
            }
        )

    def iterated(self, iter_num, lr, loss, norm):
        """Tell the readers of iteration iter_num. loss, norm: scalar tensors on the device."""
        loss, norm = torch.stack((loss, norm)).tolist()  # waits for the GPU, so that the clock tells the truth
        now = time.perf_counter()
        seconds = (now - self._clock) / (iter_num - self._last)  # of an iteration, since the last line
        self._clock, self._last = now, iter_num
        self._mfu, self._seconds = self._mean(self._mfu, self.mfu_of(seconds)), self._mean(self._seconds, seconds)
        peak_bytes, memory_bytes = machine.memory_in_use(self.device)
        self._tell(
            {
                "iter": iter_num,
                "tokens": self._tokens_before(iter_num + 1),
                "lr": lr,
                "loss": loss,
                "grad_norm": norm,
                "seconds": seconds,
                "tokens_per_second": self.tokens_per_iter / seconds,
                "mfu": self._mfu,
                "peak_bytes": peak_bytes,
                "memory_bytes": memory_bytes,
                "seconds_left": self._seconds_left(iter_num),
            }
        )

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
        for reader in self.readers:
            reader(figures)


def run_facts(device, world, config, defaults, model_args, plan, levers):
    """What the first line of metrics.jsonl tells of a run. plan: autofit.plan.Plan; levers: with nothing left open."""
    return {
        **machine.device_info(device),
        "python": platform.python_version(),
        "ranks": world.size,
        "config": config,
        "changed": sorted(key for key in config if config[key] != defaults.get(key)),
        "model_args": model_args,
        "plan": asdict(plan),
        "levers": asdict(levers),
    }


def is_state(value):
    """Whether a value, of a checkpoint that may be damaged, is what Metrics.state gives."""
    return isinstance(value, dict) and {k: type(v) for k, v in value.items()} == {"tokens": int, "best_val_loss": float}


# ---- readers: each is called with every dict of figures ----------------------------------------------------


def require_readers(config, world):
    """Import what wandb_log and tensorboard_log ask for on rank 0; UsageError where it is missing."""
    if not world.is_main:
        return
    if config["wandb_log"]:
        with usage_errors(ImportError, prefix="wandb_log=True: pip install wandb, or --wandb_log=False. "):
            import wandb  # noqa: F401
    if config["tensorboard_log"]:
        prefix = "tensorboard_log=True: pip install tensorboard, or --tensorboard_log=False. "
        with usage_errors(ImportError, prefix=prefix):
            from torch.utils.tensorboard import SummaryWriter  # noqa: F401


def open_readers(config, folder, iter_num, facts):
    """The readers that a run's keys ask for. folder: its RunFolder; facts: as run_facts gives them."""
    readers = [print_line]
    if not config["eval_only"]:  # which evaluates a run, and is none
        file = MetricsFile(folder.out_dir, folder.run_id, folder.kept_in, iter_num, facts)
        readers.append(_while_it_works(file.path, file))
    if config["wandb_log"]:
        readers.append(_wandb(config))
    if config["tensorboard_log"]:
        readers.append(_while_it_works("TensorBoard's file", _tensorboard(folder.out_dir, iter_num)))
    return readers


def _while_it_works(name, reader):
    """reader, up to the first time that the system refuses, of which one line tells: a full disk ends no run."""
    working = True

    def call(figures):
        nonlocal working
        if working:
            try:
                reader(figures)
            except OSError as e:
                working = False
                print(f"{name} can't be written ({e.strerror or first_line(e)}): training goes on without it")

    return call


def print_line(figures):
    """Print nanoGPT's line, which goes on with what it doesn't tell."""
    if "val_loss" in figures:
        print("step {iter}: train loss {train_loss:.4f}, val loss {val_loss:.4f}".format_map(figures))
        return
    line = "iter {iter}: loss {loss:.4f}".format_map(figures)
    line += f", time {figures['seconds'] * 1000:.2f}ms, mfu {figures['mfu'] * 100:.2f}%"
    line += f", {figures['tokens_per_second']:,.0f} tok/s, norm {figures['grad_norm']:.2f}"
    if figures["peak_bytes"]:
        line += f", peak {figures['peak_bytes'] / 2**30:.2f} GiB"
    if figures["seconds_left"]:
        line += f", {duration(figures['seconds_left'])} left"
    print(line)


def _wandb(config):
    import wandb

    wandb.init(project=config["wandb_project"], name=config["wandb_run_name"], config=config)
    mfu = -100.0  # percent, of the last iteration; nanoGPT's word for unknown

    def log(figures):
        nonlocal mfu
        if "val_loss" in figures:
            seen = {"train/loss": figures["train_loss"], "val/loss": figures["val_loss"]}
        else:
            mfu = figures["mfu"] * 100
            seen = {name: figures[name] for name in ("loss", "grad_norm", "tokens_per_second")}
        wandb.log({"iter": figures["iter"], "lr": figures["lr"], "mfu": mfu, **seen})

    return log


def _tensorboard(out_dir, iter_num):
    from torch.utils.tensorboard import SummaryWriter

    # What an earlier part of the run, or another run, wrote from here on is hidden.
    with usage_errors(OSError, prefix="tensorboard_log=True: its files can't be written: "):
        writer = SummaryWriter(os.path.join(out_dir, "tensorboard"), purge_step=iter_num)
    atexit.register(writer.close)

    def log(figures):
        for name, value in figures.items():
            if name not in ("iter", "seconds_left") and value is not None:
                writer.add_scalar(name, value, figures["iter"])
        if "val_loss" in figures:
            writer.flush()

    return log
