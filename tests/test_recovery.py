"""What a run survives: kills, signals, full disks, memory that vanishes, numbers that go bad, data that changes."""

import builtins
import contextlib
import errno
import functools
import io
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial, wraps
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TOY, environment, flags, started, train

from model import GPT
from nanofit import checkpoint as checkpoints
from nanofit import files, machine, recovery
from nanofit.batches import Batches
from nanofit.errors import UsageError
from nanofit.folder import RunFolder
from nanofit.ranks import World
from nanofit.recovery import Recovery, StopSignals
from nanofit.tokens import TokenFile, open_data

CPU = torch.device("cpu")

# ---- saving ------------------------------------------------------------------------------------------------


def small(value):
    """A checkpoint that is nearly none."""
    return {"model": {"w": torch.full((50,), float(value))}, "iter_num": value}


def kept(name="ckpt.pt"):
    return torch.load(f"out/{name}", weights_only=True)["iter_num"]


@pytest.fixture
def disk(monkeypatch):
    """Files count writes here; number fail_at finds a full disk after half of what it writes."""

    class File(io.FileIO):
        writes = fail_at = 0

        def write(self, data):
            File.writes += 1
            if File.writes == File.fail_at:
                super().write(bytes(data)[: len(data) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    def opened(path, mode="r", *args, **options):
        return File(path, mode) if mode == "wb" else builtins.open(path, mode, *args, **options)

    monkeypatch.setattr(files, "open", opened, raising=False)
    return File


def test_a_disk_that_is_full_at_any_write_leaves_the_checkpoint_before(disk):
    checkpoints.save(small(1), "out")
    writes = disk.writes
    assert writes > 3
    for at in range(1, writes + 1):
        disk.writes, disk.fail_at = 0, at
        with pytest.raises(checkpoints.SaveError, match=r"out/ckpt.pt can't be written \(No space left on device\)"):
            checkpoints.save(small(2), "out")
        assert kept() == 1
        assert os.listdir("out") == ["ckpt.pt"]


def test_the_previous_checkpoint_makes_room_for_the_new_one(disk):
    checkpoints.save(small(1), "out")
    checkpoints.save(small(2), "out")
    assert (kept(), kept("ckpt.prev.pt")) == (2, 1)
    disk.writes, disk.fail_at = 0, 3  # once: the second try finds room
    checkpoints.save(small(3), "out")
    assert (kept(), kept("ckpt.prev.pt")) == (3, 2)
    assert sorted(os.listdir("out")) == ["ckpt.prev.pt", "ckpt.pt"]


def in_a_fork(act):
    """The exit code of a child of this process that does this, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            act()
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_kill_before_the_file_gets_its_name_leaves_the_checkpoint_before():
    checkpoints.save(small(1), "out")
    replace = os.replace

    def dies(*names):
        return os.kill(os.getpid(), signal.SIGKILL) if names[1].endswith("ckpt.pt") else replace(*names)

    def save_and_die():
        os.replace = dies
        checkpoints.save(small(2), "out")

    assert in_a_fork(save_and_die) == -signal.SIGKILL
    assert kept() == 1
    checkpoints.save(small(3), "out")  # what was left lying about doesn't matter
    assert (kept(), kept("ckpt.prev.pt")) == (3, 1)
    assert len(os.listdir("out")) == 3
    RunFolder("out").take()
    assert sorted(os.listdir("out")) == ["ckpt.prev.pt", "ckpt.pt", "run.lock"], "what was left lying about is removed"


def test_weights_that_are_not_finite_overwrite_nothing():
    run = train(max_iters=10).names["run"]
    with torch.no_grad():
        next(run.model.parameters())[0, 0] = math.nan
    run.iter_num = 20
    run.save()
    assert run.written().startswith("not saved: the weights are not finite")
    assert kept() == 10


# ---- signals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["SIGINT", *(pytest.param(name, marks=pytest.mark.proof) for name in ("SIGTERM", "SIGUSR1"))]
)
def test_a_signal_ends_the_run_after_a_checkpoint_that_goes_on(name):
    number = getattr(signal, name)
    keys = dict(max_iters=200, eval_interval=25, dropout=0.2, eval_iters=1, n_layer=1)
    whole = train(**keys)
    python = [sys.executable, "-Werror", "-Wignore::ResourceWarning"]
    command = [*python, str(ROOT / "train.py"), *flags(**{**TOY, **keys}), "--out_dir=other"]
    with started(*command, until="iter 8:") as process:
        process.send_signal(number)
        assert process.wait(timeout=60) == 128 + number
    *before, last = Path("log").read_text().splitlines()
    assert f"{name} before iteration" in last
    assert last.endswith("train.py --out_dir=other --init_from=resume"), "no warnings either"
    resumed = train(**keys, out_dir="other", init_from="resume")
    first = min(resumed.iter_loss)
    assert first > 8
    assert before[-1].startswith(f"iter {first - 1}: ")
    assert resumed.iter_loss == {i: v for i, v in whole.iter_loss.items() if i >= first}
    assert resumed.eval_loss == {i: v for i, v in whole.eval_loss.items() if i >= first}


def stopped_at(monkeypatch, evaluation):
    """Let SIGTERM come in the middle of an evaluation, counted from 1."""
    calls, give = [], Batches.evaluation

    def give_and_stop(batches, split, *args):
        calls.append(split)
        for pieces in give(batches, split, *args):
            if len(calls) == 2 * evaluation:
                os.kill(os.getpid(), signal.SIGTERM)
            yield pieces

    monkeypatch.setattr(Batches, "evaluation", give_and_stop)


def test_a_stop_in_an_evaluation_leaves_the_best_checkpoint_where_only_that_is_kept(monkeypatch, workplace):
    keys = dict(eval_interval=5, dropout=0.2, always_save_checkpoint=False)
    train(**keys, max_iters=5)
    shutil.copytree(workplace / "out", workplace / "whole")
    keys.update(init_from="resume", max_iters=30, decay_lr=False, learning_rate=0.3)  # from here on it gets worse
    whole = train(**keys, out_dir="whole")
    for evaluation, iteration in ((3, 15), (2, 20)):
        with monkeypatch.context() as patch:
            stopped_at(patch, evaluation)
            with pytest.raises(SystemExit, match="143"):
                train(**keys)
        assert (kept(), kept("ckpt.last.pt")) == (5, iteration)
    rest = train(**keys)
    assert rest.eval_loss == {i: v for i, v in whole.eval_loss.items() if i >= 20}, "it is done again"
    assert rest.iter_loss == {i: v for i, v in whole.iter_loss.items() if i >= 20}
    assert kept() == 5
    train(**{**keys, "always_save_checkpoint": True, "max_iters": 35})
    assert kept() == 35
    assert not os.path.exists("out/ckpt.last.pt"), "what is older than ckpt.pt goes"


def test_a_second_signal_ends_it_at_once(monkeypatch):
    monkeypatch.setattr(recovery, "SAME_SIGNAL_SECONDS", 0.3)

    def stubborn():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signals = StopSignals()
        with signals.listening():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.received
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # to the whole group of processes, and again from torchrun
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.received == signal.SIGINT
            time.sleep(0.4)
            os.kill(os.getpid(), signal.SIGINT)

    assert in_a_fork(stubborn) == 130


# ---- memory that vanishes ----------------------------------------------------------------------------------

# Places of an iteration with two micro-steps in which memory can run out.
PLACES = ["forward 1", "forward 2", "backward 1", "backward 2", "clipping", "evaluation"]
# As torch raises it on a GPU; tests/test_errors.py has the words of others.
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.14 GiB.\nmore words")


class Thief:
    """Lets memory run out in chosen places of an iteration, so many times."""

    def __init__(self, monkeypatch, place, iteration, times=1, error=FULL):
        self.place, self.times, self.taken, self.error = place, times, 0, error
        self.iteration, self.count = iteration, {}
        forward, backward, move = GPT.forward, torch.Tensor.backward, torch.optim.AdamW.step
        clip = torch.nn.utils.clip_grad_norm_
        self.updates = 0

        def steal(name):
            if name == self.place and self.updates == self.iteration and self.taken < self.times:
                self.taken += 1
                self.count = {}
                raise self.error

        def number(name):
            self.count[name] = self.count.get(name, 0) + 1
            return f"{name} {self.count[name]}"

        @wraps(forward)  # what it offers is read off its parameters
        def new_forward(model, *args, **options):
            steal(number("forward") if model.training else "evaluation")
            return forward(model, *args, **options)

        def new_backward(tensor, *args, **options):
            backward(tensor, *args, **options)  # the gradients are there already
            steal(number("backward"))

        def new_clip(*args):
            norm = clip(*args)  # the gradients are clipped already
            steal("clipping")
            return norm

        def new_step(optimizer, *args, **options):
            self.updates += 1
            self.count = {}
            return move(optimizer, *args, **options)

        monkeypatch.setattr(GPT, "forward", new_forward)
        monkeypatch.setattr(torch.Tensor, "backward", new_backward)
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", new_clip)
        monkeypatch.setattr(torch.optim.AdamW, "step", new_step)


RUN = dict(max_iters=8, eval_interval=4, gradient_accumulation_steps=2, eval_iters=2)


@functools.cache
def in_peace(scaled=False, **keys):
    """A run to compare with, made once."""
    return train(**{**RUN, **keys}, out_dir="peace")


@pytest.mark.parametrize(("place", "scaled"), [*((place, False) for place in PLACES), ("clipping", True)])
def test_where_memory_ran_out_once_the_same_is_done_again(monkeypatch, place, scaled):
    if scaled:  # as for float16, where train.py has none; the scale changes while the run goes on
        scaler = partial(torch.amp.GradScaler, "cpu", init_scale=1024.0, growth_interval=3)
        monkeypatch.setattr(machine, "grad_scaler", lambda device, dtype: scaler())
    whole = in_peace(scaled, dropout=0.2)
    thief = Thief(monkeypatch, place, iteration=4)
    run = train(**RUN, dropout=0.2)
    assert thief.taken == 1
    assert run.iter_loss == whole.iter_loss
    assert run.eval_loss == whole.eval_loss
    assert len(run.iter_loss) == thief.updates == 9, "one an iteration"
    pairs = zip(run.names["raw_model"].parameters(), whole.names["raw_model"].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    scalers = [r.names["scaler"].state_dict() for r in (run, whole)]
    assert scalers[0] == scalers[1]
    assert scalers[0].get("scale") == (8192.0 if scaled else None)


def test_another_error_ends_the_run_with_its_traceback(monkeypatch):
    Thief(monkeypatch, "backward 2", iteration=4, error=RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="^shapes cannot be multiplied$"):
        train(**RUN)


@pytest.mark.parametrize("place", ["forward 2", "clipping", "evaluation"])
def test_where_memory_stays_away_the_micro_batches_get_smaller(monkeypatch, place):
    whole = in_peace()
    thief = Thief(monkeypatch, place, iteration=4, times=3)
    run = train(**RUN)
    assert thief.taken == 3
    again = re.findall("^memory ran out on asking for 6.14 GiB: the same batches again, (.*)$", run.text, re.MULTILINE)
    assert again == ["at the same size", "batch_size 8 -> 4", "batch_size 4 -> 2"]
    assert run.names["batches"].micro_steps == 8
    assert run.iter_loss == pytest.approx(whole.iter_loss, abs=1e-4)  # four digits are printed
    assert list(run.eval_loss) == [0, 4, 8]
    for i in whole.eval_loss:
        assert run.eval_loss[i] == pytest.approx(whole.eval_loss[i], abs=1e-4)
    for a, b in zip(run.names["raw_model"].parameters(), whole.names["raw_model"].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)  # AdamW's first steps magnify rounding
    resumed = train(**{**RUN, "max_iters": 10}, init_from="resume")
    assert resumed.names["batches"].micro_batch_size == 2


def test_where_not_even_one_sequence_fits_a_checkpoint_and_the_numbers_are_left(monkeypatch):
    whole = in_peace(max_iters=12)
    with monkeypatch.context() as patch:
        Thief(patch, "forward 1", iteration=6, times=10**9)
        sentence = "^memory ran out on asking for 6.14 GiB at batch_size 1 .*; checkpoint saved to out; this goes on: "
        with pytest.raises(UsageError, match=sentence):
            train(**RUN)
    rest = train(**{**RUN, "max_iters": 12}, init_from="resume")
    assert min(rest.iter_loss) == 6
    assert rest.iter_loss == pytest.approx({i: v for i, v in whole.iter_loss.items() if i >= 6}, abs=1e-4)


@pytest.mark.parametrize("call", [1, 9])
def test_memory_that_runs_out_while_the_optimizers_state_is_made(monkeypatch, call):
    whole = in_peace()
    zeros_like, calls = torch.zeros_like, []

    def failing(tensor, **options):
        calls.append(1)
        if len(calls) == call:
            raise torch.OutOfMemoryError("full")
        return zeros_like(tensor, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros_like", failing)
        assert train(**RUN).iter_loss == whole.iter_loss


def poisoned(monkeypatch, iterations):
    """Gradients that are not finite in some iterations, told by how often the optimizer has been called."""
    calls = []
    clip = torch.nn.utils.clip_grad_norm_

    def bad_clip(params, limit):
        params = list(params)
        if len(calls) in iterations:
            params[0].grad[0, 0] = float("nan")
        calls.append(1)
        return clip(params, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", bad_clip)
    return calls


def test_two_bad_gradients_are_named_and_leave_the_weights_alone(monkeypatch):
    poisoned(monkeypatch, {4, 5})
    run = train(max_iters=9)
    for i in (4, 5):
        assert f"iteration {i}: the gradient's norm is nan: the weights stay as they were" in run.text
    assert len(run.iter_loss) == 10
    assert all(math.isfinite(v) for v in run.iter_loss.values())
    steps = {float(s["step"]) for s in run.names["optimizer"].state_dict()["state"].values()}
    assert steps == {8.0}


def test_three_bad_gradients_in_a_row_end_the_run_and_the_checkpoint_stays(monkeypatch):
    poisoned(monkeypatch, {12, 13, 14, 15})
    with pytest.raises(UsageError, match="not finite in 3 iterations in a row, the last was 14"):
        train(max_iters=30, log_interval=7)
    assert kept() == 10


def test_data_that_changes_in_mid_run_leaves_a_checkpoint_that_goes_on(workplace, monkeypatch):
    whole = in_peace(max_iters=12, dropout=0.2)
    path = workplace / "data" / "markov" / "train.bin"
    content = path.read_bytes()
    draw, drawn = TokenFile.draw, []

    def draw_and_cut(file, count, generator):
        drawn.append(count)
        if len(drawn) == 20:
            path.write_bytes(content[:1000])
        return draw(file, count, generator)

    with monkeypatch.context() as patch:
        patch.setattr(TokenFile, "draw", draw_and_cut)
        sentence = "train.bin has changed since the run began.*; checkpoint saved to out; this goes on: python "
        with pytest.raises(UsageError, match=sentence):
            train(**{**RUN, "max_iters": 12}, dropout=0.2)
    path.write_bytes(content)
    rest = train(**{**RUN, "max_iters": 12}, dropout=0.2, init_from="resume")
    assert min(rest.iter_loss) > 0
    assert rest.iter_loss == {i: v for i, v in whole.iter_loss.items() if i >= min(rest.iter_loss)}


# ---- the parts ---------------------------------------------------------------------------------------------


def recovery_of(batches):
    scaler = machine.grad_scaler(CPU, "float32")
    return Recovery(World(), CPU, batches, torch.nn.Linear(1, 1), scaler, give_up=lambda: "")


def tried(recovery, *parts):
    """What parts return, called in turn in the attempt that succeeds."""
    for attempt in recovery.attempts():
        with attempt:
            values = [part() for part in parts]
    return values


@pytest.mark.parametrize("batch_size", [1, 7, 8, 12, 30, 45])
def test_smaller_micro_batches_keep_the_effective_batch(batch_size):
    """Down to one sequence, through sizes such as 15, of which the next, 6, is no divisor."""
    batches = Batches(open_data("data/markov", 8, 65), batch_size=batch_size, device=CPU, per_iter=3)
    made = recovery_of(batches)
    seen = []

    def part():
        seen.append(batches.micro_batch_size)
        assert batch_size % batches.micro_batch_size == 0
        assert batches.micro_batch_size * batches.micro_steps == 3 * batch_size
        if batches.micro_batch_size > 1 or len(seen) == 1:
            raise torch.OutOfMemoryError("full")
        return "done"

    assert tried(made, part) == ["done"]
    assert len(seen) >= 2
    assert seen[0] == batch_size
    assert seen[-1] == 1
    assert all(b <= max(1, a // 2) for a, b in pairwise(seen[1:]))


def test_memory_is_not_held_by_the_error_that_told_of_its_end():
    """The traceback holds the frames, and they the tensors: only behind the except block they are gone."""
    import weakref

    batches = Batches(open_data("data/markov", 8, 65), batch_size=4, device=CPU)
    made = recovery_of(batches)
    held = []

    def part():
        if held:
            return held[0]() is None
        large = torch.zeros(10)
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError("full")

    assert tried(made, part) == [True]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks")
def test_a_torture_in_short():
    """Kills at random moments; `make torture` does many more."""
    command = [sys.executable, str(ROOT / "tests" / "torture.py"), "--kills=2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("2 kills")
