"""Checkpoints between evaluations, the last few of them, and what ends a run early."""

import errno
import glob
import os
import re
import shutil
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import train, train_on_ranks

from nanofit import checkpoint, host, step
from nanofit.errors import UsageError

KEYS = dict(n_layer=1, n_embd=32, block_size=16, batch_size=4, eval_interval=4, eval_iters=2, dropout=0.1)
EACH_ITERATION = 1e-9  # minutes


@pytest.fixture
def in_the_background(monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr("nanofit.run.WAIT_FOR_FILES", ())


def held(name="ckpt.pt"):
    return torch.load(f"out/{name}", weights_only=True)


def alike(one, other):
    weights = [(weight, other["model"][name]) for name, weight in one["model"].items()]
    return one["iter_num"] == other["iter_num"] and all(torch.equal(a, b) for a, b in weights)


def test_the_clock_saves_between_evaluations_and_the_run_goes_on_bit_for_bit():
    whole = train(**KEYS, max_iters=12, out_dir="whole")
    run = train(**KEYS, max_iters=6, save_minutes=EACH_ITERATION)
    assert held()["iter_num"] == 6
    assert held("ckpt.prev.pt")["iter_num"] == 5
    assert run.text.count("saving checkpoint to out") > 6
    rest = train(**KEYS, max_iters=12, init_from="resume")
    assert rest.iter_loss == {i: loss for i, loss in whole.iter_loss.items() if i >= 6}


def test_the_clock_leaves_the_best_checkpoint_alone():
    train(**KEYS, max_iters=6, save_minutes=EACH_ITERATION, always_save_checkpoint=False)
    best = held()["iter_num"]
    assert best in (1, 4), "the first there is, or the best evaluation's"
    assert held("ckpt.last.pt")["iter_num"] == 6
    assert min(train(**KEYS, max_iters=7, init_from="resume").iter_loss) == 6


@pytest.mark.usefixtures("in_the_background")
def test_a_best_that_is_still_being_written_stays(monkeypatch):
    losses, real = iter([3.0, 2.0, 9.0]), checkpoint.save
    monkeypatch.setattr(step, "mean_losses", lambda own, world: {"train": 1.0, "val": next(losses)})
    monkeypatch.setattr(checkpoint, "save", lambda *given: (time.sleep(0.2), real(*given)))
    train(**KEYS, max_iters=8, keep=1, always_save_checkpoint=False)
    assert (held()["iter_num"], held("ckpt.last.pt")["iter_num"]) == (4, 8)


def test_sparse_tensors_are_copied_and_not_counted():
    given = {"dense": torch.ones(3), "sparse": torch.eye(3).to_sparse()}
    copy = checkpoint.on_host(given)
    assert copy["sparse"] is not given["sparse"]
    assert torch.equal(copy["sparse"].to_dense(), torch.eye(3))
    assert checkpoint.size_of(given) == 12


def test_the_last_few_are_kept_by_their_iterations_and_anothers_are_moved_aside():
    train(**KEYS, max_iters=16, keep=2)
    assert {name for name in os.listdir("out") if name.startswith("ckpt")} == {
        "ckpt.pt", "ckpt.prev.pt", "ckpt-12.pt", "ckpt-16.pt"
    }  # fmt: skip
    assert os.path.samefile("out/ckpt.pt", "out/ckpt-16.pt")
    assert held("ckpt-12.pt")["iter_num"] == 12
    before = held("ckpt-12.pt")
    train(**KEYS, max_iters=4, keep=2)
    assert {name for name in os.listdir("out") if "ckpt" in name} == {"ckpt.pt", "ckpt-4.pt"}
    [aside] = [name for name in os.listdir("out") if name.startswith("kept-of-run-")]
    assert alike(held(f"{aside}/ckpt-12.pt"), before)


def test_on_a_full_disk_the_oldest_kept_make_room(monkeypatch):
    """There is room for three files of a checkpoint, the one that is being written among them."""

    def sync(file):
        if len({os.stat(path).st_ino for path in glob.glob("out/ckpt*")}) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", sync)
    train(**KEYS, max_iters=20, keep=5)
    assert {held(os.path.basename(path))["iter_num"] for path in glob.glob("out/ckpt-*.pt")} == {12, 16, 20}
    assert held()["iter_num"] == 20


def test_a_run_on_a_cpu_takes_no_copy(monkeypatch):
    monkeypatch.setattr(checkpoint, "on_host", lambda _: pytest.fail("a copy"))
    train(**KEYS, max_iters=4)
    assert held()["iter_num"] == 4


@pytest.mark.usefixtures("in_the_background")
@pytest.mark.parametrize("room", [True, False])
def test_what_is_written_late_is_the_run_as_it_was(monkeypatch, room):
    """The thread waits until three more iterations are done; without room for a copy, the run waits for it."""
    train(**KEYS, max_iters=4, out_dir="peace")
    saves, steps, real, step = [], [], checkpoint.save, torch.optim.AdamW.step
    moved_on = threading.Event()

    def late(*arguments):
        saves.append(moved_on.wait(60) if room or saves else not moved_on.is_set())
        real(*arguments)

    def counted(optimizer):
        steps.append(1)
        if len(steps) == 7:
            moved_on.set()
        return step(optimizer)

    monkeypatch.setattr(checkpoint, "save", late)
    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    if not room:
        monkeypatch.setattr(host, "free_memory", lambda: 0)
    train(**KEYS, max_iters=7)
    assert saves == [True, True], "after the evaluation, and at the end"
    assert alike(held("ckpt.prev.pt"), torch.load("peace/ckpt.pt", weights_only=True))


@pytest.mark.usefixtures("in_the_background")
def test_a_write_that_fails_in_the_background_is_told_and_ends_with_an_error(monkeypatch):
    def fail(*_):
        raise ValueError("odd")

    monkeypatch.setattr(checkpoint, "save", fail)
    with pytest.raises(UsageError, match="not saved: ValueError: odd"):
        train(**KEYS, max_iters=8)


def test_patience_ends_a_run_and_resuming_keeps_the_count():
    keys = dict(KEYS, learning_rate=0.0, min_lr=0.0, eval_interval=2, dropout=0.0, max_iters=100)
    run = train(**keys, patience=3)
    losses = {i: val for i, (_, val) in run.eval_loss.items()}
    best = min(losses, key=losses.get)
    assert max(losses) == best + 6
    assert max(run.iter_loss) == best + 5
    assert "no better val loss in 3 evaluations in a row, patience=3: checkpoint saved to out" in run.text
    assert held()["iter_num"] == best + 6
    again = train(**keys, patience=4, init_from="resume")
    assert max(again.iter_loss) == best + 7
    assert min(again.eval_loss) == best + 6


def test_a_loss_that_stays_the_same_is_not_better(monkeypatch):
    monkeypatch.setattr(step, "mean_losses", lambda own, world: {"train": 1.0, "val": 1.0})
    assert max(train(**KEYS, max_iters=100, patience=2).eval_loss) == 8


def test_a_disk_that_is_nearly_full_is_told_at_the_start(monkeypatch):
    assert "left, and a checkpoint takes" not in train(**KEYS, max_iters=0).text
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**10))
    told = train(**KEYS, max_iters=0).text
    assert told.count("the disk of out has 0.00 GiB left, and a checkpoint takes ") == 1


@pytest.mark.proof
def test_the_clock_of_one_rank_decides_for_all():
    keys = dict(KEYS, gradient_accumulation_steps=2, save_minutes=EACH_ITERATION, keep=1, eval_interval=100)
    run, *_ = train_on_ranks(2, **keys, max_iters=3)
    assert re.findall(r"^saving", run.text, re.MULTILINE)
    assert held()["iter_num"] == 3
    assert len(held()["rng"]) == 2
