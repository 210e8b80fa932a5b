"""A run's figures: what is made of them, and what their readers keep."""

import json
import math
import os
import re
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import TOY, files_of_at_most, train

from nanofit import metrics as figures_of
from nanofit import models
from nanofit.errors import UsageError
from nanofit.folder import RunFolder
from nanofit.metrics import Metrics, open_readers, print_line, require_readers
from nanofit.ranks import ALONE, World

CPU = torch.device("cpu")
KEYS = {
    "eval_only": False, "wandb_log": False, "wandb_project": "p", "wandb_run_name": "n",
    "tensorboard_log": False,
}  # fmt: skip


def metrics_of(iter_num=0, state=None, max_iters=100, run_id="aaaaaaaa", **changed):
    """Metrics of a small run, with the readers that its keys ask for."""
    folder = RunFolder("out")
    folder.run_id = run_id
    saved = state and {"metrics": state}
    made = Metrics(CPU, iter_num, max_iters, 10, 64, lambda seconds: 0.01 / seconds, saved)
    made.start(open_readers({**KEYS, **changed}, folder, iter_num), {"device": "CPU"})
    return made


def iterate(metrics, iterations, loss=2.0, norm=0.5):
    for it in iterations:
        metrics.iterated(it, 1e-3, torch.tensor(loss + it), torch.tensor(norm))


def records(path="out/metrics.jsonl"):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in Path(path).read_text().splitlines()]


def iterations(path="out/metrics.jsonl"):
    return [r["iter"] for r in records(path) if "loss" in r]


class Clock:
    """time.perf_counter, moved by hand."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(figures_of.time, "perf_counter", lambda: self.now)


def test_an_iterations_figures(monkeypatch):
    clock, seen = Clock(monkeypatch), []
    metrics = Metrics(CPU, 0, 100, 50, 64, lambda seconds: 0.01 / seconds)
    metrics.readers = [seen.append]
    for it in range(9):
        clock.now += 0.5
        if it % 2 == 0:  # log_interval=2
            iterate(metrics, [it])
    last = seen[-1]
    assert (last["iter"], last["tokens"], last["loss"], last["lr"], last["grad_norm"]) == (8, 9 * 64, 10.0, 1e-3, 0.5)
    assert last["seconds"] == pytest.approx(0.5)
    assert last["tokens_per_second"] == pytest.approx(128)
    assert last["mfu"] == pytest.approx(0.02)
    assert [f["seconds_left"] is None for f in seen] == [True, True, True, False, False]
    assert last["seconds_left"] == pytest.approx((100 - 8) * 0.5)


def test_an_evaluations_figures_know_the_best():
    seen = []
    metrics = Metrics(CPU, 0, 40, 10, 64, lambda seconds: 0.0)
    metrics.readers = [seen.append]
    for it, val in ((0, 3.0), (10, 2.0), (20, 2.5), (30, math.nan)):
        metrics.evaluated(it, 1e-3, {"train": val - 0.1, "val": val})
    assert [f["best_val_loss"] for f in seen] == [3.0, 2.0, 2.0, 2.0]
    assert [f["tokens"] for f in seen] == [0, 640, 1280, 1920]
    again = Metrics(CPU, 30, 40, 10, 1000, lambda seconds: 0.0, {"metrics": metrics.state(30)})
    again.readers = [seen.append]
    again.evaluated(40, 1e-3, {"train": 2.4, "val": 2.5})
    assert seen[-1]["best_val_loss"] == 2.0
    assert seen[-1]["tokens"] == 30 * 64 + 10 * 1000  # an iteration has another number of tokens now


def test_the_device_is_read_once_an_iteration(monkeypatch):
    reads = []
    for name in ("item", "tolist", "cpu", "numpy", "__float__", "__bool__", "__int__", "__index__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *a, _name=name, _real=real, **k: (reads.append(_name), _real(*a, **k))[1]
        )
    iterate(metrics_of(), [0])
    assert reads == ["tolist"]


def test_a_line_tells_everything(capsys):
    print_line({
        "iter": 10, "loss": 3.12344, "seconds": 0.1352, "mfu": 0.312, "tokens_per_second": 12345.4, "grad_norm": 0.834,
        "peak_bytes": int(3.2 * 2**30), "seconds_left": 11.2 * 3600,
    })  # fmt: skip
    assert capsys.readouterr().out == (
        "iter 10: loss 3.1234, time 135.20ms, mfu 31.20%, 12,345 tok/s, norm 0.83, peak 3.20 GiB, 11.2 h left\n"
    )


def test_figures_of_ones_own_are_printed_and_kept(capsys):
    metrics = metrics_of()
    metrics.evaluated(0, 1e-3, {"train": 4.0, "val": 4.1}, hellaswag=torch.tensor(0.25))
    metrics.iterated(0, 1e-3, torch.tensor(2.0), torch.tensor(0.5), weight_norm=12.5, odd="a word", pair=torch.ones(2))
    evaluation, iteration = capsys.readouterr().out.splitlines()
    assert evaluation == "step 0: train loss 4.0000, val loss 4.1000, hellaswag 0.25"
    assert iteration.startswith("iter 0: loss 2.0000, time ")
    assert ", weight_norm 12.5, odd unknown, pair unknown" in iteration
    _, evaluation, iteration = records()
    assert evaluation["hellaswag"] == 0.25
    assert (iteration["weight_norm"], iteration["odd"]) == (12.5, None)
    with pytest.raises(UsageError, match="'val_loss' is a figure of every run: call your own something else"):
        metrics.iterated(1, 1e-3, torch.tensor(2.0), torch.tensor(0.5), val_loss=1.0)


def test_a_model_that_cannot_tell_its_mfu_costs_that_figure(capsys):
    metrics = metrics_of()
    metrics.mfu_of = models.mfu_of(object(), 1, torch.device("cpu"), "float32")
    iterate(metrics, range(2))
    printed = capsys.readouterr().out
    assert printed.count("mfu is not known") == 1
    assert printed.count("mfu -100.00%") == 2


def test_what_is_not_finite_is_null():
    metrics = metrics_of()
    metrics.evaluated(0, 1e-3, {"train": math.nan, "val": math.inf})
    iterate(metrics, [0], loss=math.nan, norm=math.inf)
    _, evaluation, iteration = records()
    assert (evaluation["train_loss"], evaluation["val_loss"], evaluation["best_val_loss"]) == (None, None, None)
    assert (iteration["loss"], iteration["grad_norm"], iteration["lr"]) == (None, None, 1e-3)


def test_a_full_disk_ends_the_file_and_not_the_run(capsys):
    metrics = metrics_of()
    iterate(metrics, range(3))
    with files_of_at_most(os.path.getsize("out/metrics.jsonl") + 20):
        iterate(metrics, range(3, 6))
    iterate(metrics, [6])
    printed = capsys.readouterr().out
    assert printed.count("out/metrics.jsonl failed") == 1
    assert printed.count("the run goes on without it") == 1
    assert len(re.findall(r"^iter ", printed, re.MULTILINE)) == 7
    iterate(metrics_of(3, metrics.state(3)), [3])  # what there was room for of a line is cut
    assert iterations() == [0, 1, 2, 3]


def figures(folder):
    """What a run's file tells, without what clocks and the allocator say."""
    timed = ("time", "seconds", "tokens_per_second", "mfu", "peak_bytes", "memory_bytes", "seconds_left")
    told = [r for r in records(f"{folder}/metrics.jsonl") if "run" not in r]
    return [{name: value for name, value in r.items() if name not in timed} for r in told]


def test_a_run_that_went_on_has_the_file_of_one_that_never_stopped():
    whole = train(out_dir="whole", max_iters=25, always_save_checkpoint=True)
    train(out_dir="parts", max_iters=25)
    os.replace("parts/ckpt.prev.pt", "parts/ckpt.pt")  # of iteration 20, which is not the last
    train(out_dir="parts", init_from="resume", max_iters=25)
    assert figures("parts") == figures("whole")
    assert [r["iter"] for r in records("parts/metrics.jsonl") if "run" in r] == [0, 20]
    told = {r["iter"]: r["loss"] for r in figures("whole") if "loss" in r}
    assert told == pytest.approx(whole.iter_loss, abs=1e-4)
    changed = records("whole/metrics.jsonl")[0]["run"]["changed"]
    assert {"n_layer", "out_dir", "dataset"} <= set(changed) <= {*TOY, "out_dir"}
    assert "log_interval" not in changed  # named, and what it is anyway


@pytest.mark.parametrize(("key", "package"), [("wandb_log", "wandb"), ("tensorboard_log", "tensorboard")])
def test_a_missing_package_is_told(monkeypatch, key, package):
    for name in ("wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    require_readers(KEYS, ALONE)
    require_readers({**KEYS, key: True}, World(rank=1, size=2))
    with pytest.raises(UsageError, match=f"{key}=True: pip install {package}, or --{key}=False"):
        require_readers({**KEYS, key: True}, ALONE)


def test_wandb_gets_evaluations_as_before_and_iterations(monkeypatch):
    seen = []
    fake = types.SimpleNamespace(init=lambda **k: seen.append(k), log=lambda d: seen.append(d))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    metrics = metrics_of(wandb_log=True)
    metrics.evaluated(0, 1e-3, {"train": 4.0, "val": 4.1})
    iterate(metrics, range(7))
    start, evaluation, first, *_, last = seen
    assert (start["project"], start["name"], start["config"]["wandb_log"]) == ("p", "n", True)
    assert (start["id"], start["resume"]) == ("aaaaaaaa", "allow"), "a run that goes on is one run there, too"
    assert evaluation == {"iter": 0, "train/loss": 4.0, "val/loss": 4.1, "lr": 1e-3, "mfu": -100.0}
    assert set(first) == {"iter", "loss", "lr", "grad_norm", "mfu", "tokens_per_second"}
    assert last["mfu"] > 0


needs_tensorboard = pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")


@needs_tensorboard
def test_tensorboard_itself_reads_them_back():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = metrics_of(tensorboard_log=True)
    first.evaluated(0, 1e-3, {"train": 4.0, "val": 4.1})
    iterate(first, range(10))
    first.evaluated(10, 1e-3, {"train": 3.0, "val": 3.1})  # flushes
    again = metrics_of(8, first.state(8), tensorboard_log=True)
    iterate(again, range(8, 10), loss=5.0)
    again.evaluated(10, 1e-3, {"train": 2.0, "val": 2.1})
    events = EventAccumulator("out/tensorboard")
    events.Reload()
    losses = [(e.step, e.value) for e in events.Scalars("loss")]
    assert losses == [(i, 2.0 + i) for i in range(8)] + [(i, 5.0 + i) for i in (8, 9)]
    assert {e.step: e.value for e in events.Scalars("val_loss")} == pytest.approx({0: 4.1, 10: 2.1})
    assert {"lr", "grad_norm", "tokens_per_second", "seconds", "memory_bytes"} <= set(events.Tags()["scalars"])


def failing(error, after=0):
    """Something of W&B's that raises when it has been called so many times."""
    calls = []

    def fail(*args, **keys):
        calls.append(args)
        if len(calls) > after:
            raise error

    return fail


@pytest.mark.parametrize(
    "stub",
    [
        dict(log=failing(BrokenPipeError(32, "Broken pipe"))),
        dict(log=failing(MemoryError(), after=4)),
        dict(init=failing(RuntimeError("api_key not configured (no-tty)"))),
    ],
    ids=["log fails", "log fails later", "init fails"],
)
def test_whatever_wandb_raises_the_run_goes_on_and_is_saved(monkeypatch, stub):
    calls = {"init": lambda **keys: None, "log": lambda figures: None, **stub}
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(**calls))
    told = train(wandb_log=True, max_iters=10, eval_interval=5).text
    assert told.count("W&B failed") == 1
    if "init" in stub:
        assert "wandb login, or set WANDB_MODE=offline, or give --wandb_log=False" in told
        assert told.index("W&B failed") < told.index("number of parameters"), "before there is a model"
    assert iterations() == list(range(11))
    assert torch.load("out/ckpt.pt", weights_only=True)["iter_num"] == 10
