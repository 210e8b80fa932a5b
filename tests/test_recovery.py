"""What a run survives: kills, signals, full disks, memory that vanishes, numbers that go bad, data that changes."""

import builtins
import errno
import io
import math
import os
import shutil
import signal
import subprocess
import sys
from functools import partial, wraps
from itertools import pairwise

import pytest
import torch
from conftest import RANK as TOLD_BY_RANK
from conftest import ROOT, TOY, environment, flags, train, train_on_ranks, weights_of_ranks

from model import GPT
from nanofit import checkpoint as checkpoints
from nanofit import files, machine, recovery, step
from nanofit.batches import Batches
from nanofit.errors import UsageError
from nanofit.folder import RunFolder
from nanofit.ranks import World
from nanofit.recovery import Recovery, StopRequested, StopSignals, Watch
from nanofit.tokens import TokenFile, open_data

CPU = torch.device("cpu")

# ---- saving ------------------------------------------------------------------------------------------------


def small(value):
    """A checkpoint that is nearly none."""
    return {"model": {"w": torch.full((50,), float(value))}, "iter_num": value}


def kept(name="ckpt.pt"):
    return torch.load(f"out/{name}", weights_only=True)["iter_num"]


class Failing(io.FileIO):
    """A file whose write number fail_at fails, after half of it."""

    writes, fail_at, error = 0, None, None

    def write(self, data):
        Failing.writes += 1
        if Failing.writes == Failing.fail_at:
            super().write(bytes(data)[: len(data) // 2])
            raise OSError(Failing.error, os.strerror(Failing.error))
        return super().write(data)


@pytest.fixture
def failing_files(monkeypatch):
    def opened(path, mode="r", *args, **options):
        return Failing(path, mode) if mode == "wb" else builtins.open(path, mode, *args, **options)

    monkeypatch.setattr(files, "open", opened, raising=False)

    def fail(at, error=errno.ENOSPC):
        Failing.writes, Failing.fail_at, Failing.error = 0, at, error

    fail(None)
    yield fail
    fail(None)


def test_the_checkpoint_before_is_kept_beside_the_new_one():
    for value in (1, 2, 3):
        checkpoints.save(small(value), "out")
    assert (kept(), kept("ckpt.prev.pt")) == (3, 2)
    assert sorted(os.listdir("out")) == ["ckpt.prev.pt", "ckpt.pt"]


def test_a_disk_that_is_full_at_any_write_leaves_the_checkpoint_before(failing_files):
    checkpoints.save(small(1), "out")
    writes = Failing.writes
    assert writes > 3
    for at in range(1, writes + 1):
        failing_files(at)
        with pytest.raises(checkpoints.SaveError, match=r"out/ckpt.pt can't be written \(No space left on device\)"):
            checkpoints.save(small(2), "out")
        assert kept() == 1
        assert os.listdir("out") == ["ckpt.pt"]


def test_the_previous_checkpoint_makes_room_for_the_new_one(failing_files):
    checkpoints.save(small(1), "out")
    checkpoints.save(small(2), "out")
    failing_files(3)  # once: the second try finds room
    checkpoints.save(small(3), "out")
    assert (kept(), kept("ckpt.prev.pt")) == (3, 2)


def test_no_permission_leaves_the_checkpoint_before(monkeypatch):
    checkpoints.save(small(1), "out")

    def refused(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    for name in ("open", "replace"):  # the file, and the folder
        with monkeypatch.context() as patch:
            patch.setattr(files if name == "open" else os, name, refused, raising=False)
            with pytest.raises(checkpoints.SaveError, match="Permission denied"):
                checkpoints.save(small(2), "out")
        assert kept() == 1


def test_a_kill_before_the_file_gets_its_name_leaves_the_checkpoint_before(workplace):
    code = (
        "import os, signal, sys, torch\n"
        "from nanofit import checkpoint\n"
        "save = lambda n: checkpoint.save({'model': {'w': torch.ones(9)}, 'iter_num': n}, 'out')\n"
        "save(1)\n"
        "replace = os.replace\n"
        "is_its_name = lambda target: target.endswith('ckpt.pt')\n"
        "os.replace = lambda *names: os.kill(os.getpid(), 9) if is_its_name(names[1]) else replace(*names)\n"
        "save(2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment())
    assert done.returncode == -signal.SIGKILL
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
    assert run.save().startswith("not saved: the weights are not finite")
    assert kept() == 10


def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(workplace):
    train(max_iters=20)
    path = workplace / "out" / "ckpt.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # one bit, which torch.load alone would take
    path.write_bytes(data)
    offer = "checksum.*ckpt.prev.pt beside it is whole, of iteration 10: to go on from there, rename it to ckpt.pt"
    with pytest.raises(UsageError, match=offer):
        train(init_from="resume")
    path.unlink()
    with pytest.raises(UsageError, match="there is no checkpoint.*ckpt.prev.pt beside it is whole, of iteration 10"):
        train(init_from="resume")
    (workplace / "out" / "ckpt.prev.pt").write_bytes(b"")
    path.write_bytes(data)
    with pytest.raises(UsageError, match="checksum of .* is wrong") as error:
        train(init_from="resume")
    assert "prev" not in str(error.value)


def test_training_goes_on_where_saving_fails_and_says_so_at_the_end(monkeypatch):
    steps, update = [], step.update
    monkeypatch.setattr(step, "update", lambda *a, **k: (steps.append(1), update(*a, **k))[1])

    def full(path, mode="r", *args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    train(max_iters=10)
    monkeypatch.setattr(files, "open", full, raising=False)
    with pytest.raises(UsageError, match="not saved: out/ckpt.pt can't be written"):
        train(max_iters=20)
    assert len(steps) == 11 + 21, "it went on to the end"
    assert kept() == 10


def test_a_folder_that_is_gone_is_made_again(monkeypatch):
    real = step.evaluate

    def evaluate(*args, **options):
        shutil.rmtree("out", ignore_errors=True)
        return real(*args, **options)

    monkeypatch.setattr(step, "evaluate", evaluate)
    train(max_iters=10)
    assert kept() == 10


# ---- signals -----------------------------------------------------------------------------------------------


def started(*argv, on_ctrl_c=signal.SIG_DFL, **keys):
    command = [sys.executable, "-u", str(ROOT / "train.py"), *flags(**{**TOY, **keys}), *argv]
    # A shell that starts tests in the background lets them ignore SIGINT, and a run would go on doing so.
    heard = partial(signal.signal, signal.SIGINT, on_ctrl_c)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, **pipes, env=environment(), preexec_fn=heard)


def wait_for(process, word):
    text = ""
    for line in process.stdout:
        text += line
        if line.startswith(word):
            return text
    raise AssertionError(f"no {word!r} in {text}")


@pytest.mark.parametrize(
    "name", ["SIGINT", *(pytest.param(name, marks=pytest.mark.proof) for name in ("SIGTERM", "SIGUSR1"))]
)
def test_a_signal_ends_the_run_after_a_checkpoint_that_goes_on(name):
    number = getattr(signal, name)
    keys = dict(max_iters=200, eval_interval=75, dropout=0.2, eval_iters=1)
    whole = train(**keys)
    process = started(**keys, out_dir="other")
    text = wait_for(process, "iter 20:")
    process.send_signal(number)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert f"{name} before iteration" in rest
    assert "checkpoint saved to other, --init_from=resume goes on" in rest
    resumed = train(**keys, out_dir="other", init_from="resume")
    first = min(resumed.iter_loss)
    assert first > 20
    assert f"iter {first - 1}: " in text + rest
    assert resumed.iter_loss == {i: v for i, v in whole.iter_loss.items() if i >= first}
    assert resumed.eval_loss == {i: v for i, v in whole.eval_loss.items() if i >= first}


def stopped_at(monkeypatch, evaluation, number=signal.SIGTERM):
    """Let a signal come in the middle of an evaluation, counted from 1."""
    calls, give = [], Batches.evaluation

    def give_and_stop(batches, split, *args):
        calls.append(split)
        for pieces in give(batches, split, *args):
            if len(calls) == 2 * evaluation:
                os.kill(os.getpid(), number)
            yield pieces

    monkeypatch.setattr(Batches, "evaluation", give_and_stop)


def test_a_signal_ends_an_evaluation_which_is_done_again_on_resuming(monkeypatch, capsys):
    keys = dict(max_iters=12, eval_interval=6, dropout=0.2)
    whole = train(**keys, out_dir="whole")
    with monkeypatch.context() as patch:
        stopped_at(patch, evaluation=2)
        with pytest.raises(SystemExit) as stop:
            train(**keys)
    assert stop.value.code == 143
    assert kept() == 6
    rest = train(**keys, init_from="resume")
    assert rest.eval_loss == {i: v for i, v in whole.eval_loss.items() if i >= 6}
    assert rest.iter_loss == {i: v for i, v in whole.iter_loss.items() if i >= 6}


def test_a_stop_leaves_the_best_checkpoint_where_only_the_best_is_kept(monkeypatch, workplace):
    keys = dict(eval_interval=5, dropout=0.2, always_save_checkpoint=False)
    train(**keys, max_iters=5)
    shutil.copytree(workplace / "out", workplace / "whole")
    keys.update(init_from="resume", max_iters=30, decay_lr=False, learning_rate=0.3)  # from here on it gets worse
    whole = train(**keys, out_dir="whole")
    for evaluation, iteration in ((3, 15), (2, 20)):
        with monkeypatch.context() as patch:
            stopped_at(patch, evaluation)
            with pytest.raises(SystemExit):
                train(**keys)
        assert (kept(), kept("ckpt.last.pt")) == (5, iteration)
    rest = train(**keys)
    assert rest.iter_loss == {i: v for i, v in whole.iter_loss.items() if i >= 20}
    assert kept() == 5
    train(**{**keys, "always_save_checkpoint": True, "max_iters": 35})
    assert kept() == 35
    assert not os.path.exists("out/ckpt.last.pt"), "what is older than ckpt.pt goes"


def test_a_signal_before_anything_is_trained_saves_nothing(monkeypatch):
    stopped_at(monkeypatch, evaluation=1)
    with pytest.raises(SystemExit) as stop:
        train(max_iters=12)
    assert stop.value.code == 128 + signal.SIGTERM
    assert "SIGTERM before iteration 0: nothing is trained yet, and nothing saved" in stop.value.text
    assert os.listdir("out") == ["run.lock"]


def test_a_second_signal_ends_it_at_once():
    code = (
        "import signal, os, time\n"
        "from nanofit import recovery\n"
        "recovery.SAME_SIGNAL_SECONDS = 0.3\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"  # as nohup does
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signals = recovery.StopSignals()\n"
        "with signals.listening():\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    assert not signals.received\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"  # to the whole group of processes, and again from torchrun
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(signals.received, flush=True)\n"
        "    time.sleep(0.4)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout == "2\n"
    assert done.returncode == 130


@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_before_the_loop_is_not_lost_where_an_exception_would_be(ignored, workplace):
    (workplace / "lost.py").write_text(
        "class Lost:\n"
        "    def __del__(self):\n"
        "        import os, signal\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "Lost()\n"
    )
    process = started("lost.py", max_iters=0, on_ctrl_c=signal.SIG_IGN if ignored else signal.SIG_DFL)
    text, errors = process.communicate(timeout=60)
    if ignored:  # a shell's script in the background
        assert (process.returncode, "iter 0:" in text) == (0, True), errors
    else:
        assert (process.returncode, errors) == (130, "interrupted\n")
        assert text.endswith("Overriding config with lost.py:\n")


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    signals = StopSignals()
    with signals.listening():
        signals.check()
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(StopRequested):
            signals.check()
    assert signal.getsignal(signal.SIGTERM) is before


# ---- memory that vanishes ----------------------------------------------------------------------------------

# Places of an iteration with two micro-steps in which memory can run out.
PLACES = ["forward 1", "forward 2", "backward 1", "backward 2", "clipping", "optimizer", "evaluation"]
# What torch raises on a GPU, where cuBLAS gets no memory, and on a CPU; and what a user reads of it.
ENDS = {
    "GPU": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.14 GiB.\nmore words"),
        "memory ran out on asking for 6.14 GiB",
    ),
    "cuBLAS": (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        "memory ran out",
    ),
    "CPU": (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 34359738368 bytes. Error code 12 (Cannot allocate memory)"
        ),
        "memory ran out on asking for 32.00 GiB",
    ),
    "Python": (MemoryError(), "memory ran out"),
}


class Thief:
    """Lets memory run out in chosen places of an iteration, so many times."""

    def __init__(self, monkeypatch, place, iteration, times=1, error=ENDS["GPU"][0]):
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
            steal("optimizer")
            self.updates += 1
            self.count = {}
            return move(optimizer, *args, **options)

        monkeypatch.setattr(GPT, "forward", new_forward)
        monkeypatch.setattr(torch.Tensor, "backward", new_backward)
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", new_clip)
        monkeypatch.setattr(torch.optim.AdamW, "step", new_step)


def scaled_on_the_cpu(monkeypatch):
    """float16's scaler at work where train.py has none, with a scale that changes while the run goes on."""
    scaler = partial(torch.amp.GradScaler, "cpu", init_scale=1024.0, growth_interval=3)
    monkeypatch.setattr(machine, "grad_scaler", lambda device, dtype: scaler())


def weights_are_alike(run, other):
    pairs = zip(run.names["raw_model"].parameters(), other.names["raw_model"].parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


RUN = dict(max_iters=8, eval_interval=4, gradient_accumulation_steps=2, eval_iters=2)


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("place", PLACES)
def test_where_memory_ran_out_once_the_same_is_done_again(monkeypatch, place, scaled):
    if scaled:
        scaled_on_the_cpu(monkeypatch)
    whole = train(**RUN, dropout=0.2)
    thief = Thief(monkeypatch, place, iteration=4)
    run = train(**RUN, dropout=0.2)
    assert thief.taken == 1
    assert run.iter_loss == whole.iter_loss
    assert run.eval_loss == whole.eval_loss
    assert len(run.iter_loss) == thief.updates == 9, "one an iteration"
    assert weights_are_alike(run, whole)
    scalers = [r.names["scaler"].state_dict() for r in (run, whole)]
    assert scalers[0] == scalers[1]
    assert scalers[0].get("scale") == (8192.0 if scaled else None)


@pytest.mark.parametrize("end", ENDS)
def test_whoever_says_that_memory_ran_out_is_understood(monkeypatch, end):
    error, sentence = ENDS[end]
    whole = train(**RUN)
    thief = Thief(monkeypatch, "backward 2", iteration=4, error=error)
    run = train(**RUN)
    assert thief.taken == 1
    assert f"\n{sentence}: the same batches again, at the same size\n" in run.text
    assert run.iter_loss == whole.iter_loss
    assert weights_are_alike(run, whole)


def test_another_error_ends_the_run_with_its_traceback(monkeypatch):
    Thief(monkeypatch, "backward 2", iteration=4, error=RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="^shapes cannot be multiplied$"):
        train(**RUN)


@pytest.mark.parametrize("place", [place for place in PLACES if place != "optimizer"])
def test_where_memory_stays_away_the_micro_batches_get_smaller(monkeypatch, place):
    whole = train(**RUN)
    thief = Thief(monkeypatch, place, iteration=4, times=3)
    run = train(**RUN)
    assert thief.taken == 3
    assert "\nmemory ran out on asking for 6.14 GiB: the same batches again, at the same size\n" in run.text
    assert "the same batches again, batch_size 8 -> 4" in run.text
    assert "the same batches again, batch_size 4 -> 2" in run.text
    assert run.names["batches"].micro_steps == 8
    assert run.iter_loss == pytest.approx(whole.iter_loss, abs=1e-4)  # four digits are printed
    assert list(run.eval_loss) == list(whole.eval_loss) == [0, 4, 8]
    for i in whole.eval_loss:
        assert run.eval_loss[i] == pytest.approx(whole.eval_loss[i], abs=1e-4)
    for a, b in zip(run.names["raw_model"].parameters(), whole.names["raw_model"].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)  # AdamW's first steps magnify rounding
    resumed = train(**{**RUN, "max_iters": 10}, init_from="resume")
    assert resumed.names["batches"].micro_batch_size == 2
    assert "batch_size 8 -> 2, as when the checkpoint was saved; to have it fitted anew, give" in resumed.text


def test_where_not_even_one_sequence_fits_a_checkpoint_and_the_numbers_are_left(monkeypatch):
    whole = train(**{**RUN, "max_iters": 12}, out_dir="whole")
    with monkeypatch.context() as patch:
        Thief(patch, "forward 1", iteration=6, times=10**9)
        sentence = (
            r"^memory ran out on asking for 6.14 GiB at batch_size 1 \(on cpu\): end what else uses this device, or "
            "start with --auto_fit=True.*; checkpoint saved to out, --init_from=resume goes on$"
        )
        with pytest.raises(UsageError, match=sentence):
            train(**RUN)
    rest = train(**{**RUN, "max_iters": 12}, init_from="resume")
    assert min(rest.iter_loss) == 6
    assert rest.iter_loss == pytest.approx({i: v for i, v in whole.iter_loss.items() if i >= 6}, abs=1e-4)


@pytest.mark.parametrize("call", [1, 2, 9])
def test_memory_that_runs_out_while_the_optimizers_state_is_made(monkeypatch, call):
    from test_step import toy

    from nanofit.optimizers import allocate_state

    whole = train(**RUN)
    zeros_like, calls = torch.zeros_like, []

    def failing(tensor, **options):
        calls.append(1)
        if len(calls) == call:
            raise torch.OutOfMemoryError("full")
        return zeros_like(tensor, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros_like", failing)
        assert train(**RUN).iter_loss == whole.iter_loss
    # The state is what AdamW would have made.
    made, own = (toy().configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu") for _ in range(2))
    allocate_state(made)
    for optimizer in (made, own):
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            p.grad = torch.ones_like(p)
        optimizer.step()
    for a, b in zip(made.state_dict()["state"].values(), own.state_dict()["state"].values(), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def test_an_optimizer_that_may_have_moved_is_not_called_again(monkeypatch):
    Thief(monkeypatch, "optimizer", iteration=2)
    fused = GPT.configure_optimizers

    def foreach(*args):
        optimizer = fused(*args)
        return torch.optim.AdamW([dict(params=g["params"]) for g in optimizer.param_groups], fused=False)

    monkeypatch.setattr(GPT, "configure_optimizers", foreach)
    with pytest.raises(torch.OutOfMemoryError):
        train(**RUN)


RANK = """
import os, runpy, sys
import torch
sys.argv[0] = "train.py"
sys.path.insert(0, {tests!r})
import pytest
from test_recovery import Thief
from nanofit import gradients
gradients.BUCKET_BYTES = 20_000  # several, which are on their way when memory runs out
rank = int(os.environ["RANK"])
patch = pytest.MonkeyPatch()
if rank == {failing}:
    thief = Thief(patch, {place!r}, iteration=4, times={times})
names = runpy.run_path({rank!r}, run_name="__main__")
if rank == {failing}:
    assert thief.taken == {times} and thief.updates == 9, (thief.taken, thief.updates)
"""


def two_ranks(**keys):
    """(what two ranks printed, {digest of a rank's weights: their sum})."""
    run, _, _ = train_on_ranks(2, **{**RUN, **keys})
    return run, {told["digest"]: told["sum"] for told in weights_of_ranks()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "times"),
    [
        ("backward 1", 1),
        pytest.param("clipping", 1, marks=pytest.mark.proof),
        pytest.param("forward 1", 2, marks=pytest.mark.proof),
    ],
)
def test_all_ranks_go_back_where_memory_runs_out_on_one(workplace, place, times):
    keys = dict(gradient_accumulation_steps=2)  # the only micro-step of each rank
    peace, expected = two_ranks(**keys)
    assert len(peace.iter_loss) == 9
    script = workplace / "rank.py"
    tests = str(ROOT / "tests")
    script.write_text(RANK.format(tests=tests, failing=1, place=place, times=times, rank=str(TOLD_BY_RANK)))
    run, weights = two_ranks(script=script, **keys)
    assert "rank 1: memory ran out on asking for 6.14 GiB: the same batches again, at the same size" in run.text
    assert len(weights) == len(expected) == 1, "the ranks hold the same weights"
    if times == 1:
        assert weights == expected, place
        assert (run.iter_loss, run.eval_loss) == (peace.iter_loss, peace.eval_loss)
    else:
        assert list(weights.values()) == pytest.approx(list(expected.values()), abs=1e-2)
        assert "batch_size 8 -> 4" in run.text


@pytest.mark.slow
def test_ranks_share_an_evaluation_and_stop_together():
    one = train(**RUN, eval_only=True)
    run, _ = two_ranks(eval_only=True)
    assert run.eval_loss == one.eval_loss
    assert list(run.eval_loss) == [0]
    assert not run.iter_loss


@pytest.mark.slow
def test_a_signal_to_one_rank_ends_both_with_one_checkpoint(workplace):
    (workplace / "rank.py").write_text(
        "import os, runpy, signal, threading\n"
        "from nanofit.recovery import StopSignals\n"
        "listening = StopSignals.listening\n"
        "def and_one_comes(self):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()\n"
        "    return listening(self)\n"
        "StopSignals.listening = and_one_comes\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    keys = {**RUN, "max_iters": 10**6, "eval_interval": 10**6}
    run, _, code = train_on_ranks(2, script=workplace / "rank.py", check=False, **keys)
    assert code != 0
    saved = torch.load("out/ckpt.pt", weights_only=True)
    assert len(saved["rng"]) == 2
    assert f"SIGUSR1 before iteration {saved['iter_num']}: checkpoint saved" in run.text


# ---- numbers that go bad -----------------------------------------------------------------------------------


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


@pytest.mark.parametrize("log_interval", [1, 7])
def test_three_bad_gradients_in_a_row_end_the_run_and_the_checkpoint_stays(monkeypatch, log_interval):
    poisoned(monkeypatch, {12, 13, 14, 15})
    sentence = "the gradient's norm was not finite in 3 iterations in a row, the last was 14"
    with pytest.raises(UsageError, match=sentence):
        train(max_iters=30, log_interval=log_interval)
    assert kept() == 10


def test_a_long_interval_of_logging_does_not_hide_them(monkeypatch):
    poisoned(monkeypatch, set(range(3, 300)))
    with pytest.raises(UsageError, match="the last was 5"):
        train(max_iters=250, log_interval=1000, eval_interval=1000)


@pytest.mark.parametrize("kind", ["float32", "offload"])
def test_a_bad_gradient_moves_nothing(kind):
    from test_step import batch, toy

    from nanofit.optimizers import make_optimizer

    model = toy()
    optimizer = make_optimizer(model, kind, 0.1, 1e-2, (0.9, 0.95), CPU)
    before = [p.clone() for p in model.parameters()]
    for bad in (True, False):
        model(*batch(2))[1].backward()
        if bad:
            next(model.parameters()).grad[0, 0] = float("inf")
        scaler = machine.grad_scaler(CPU, "float32")
        norm = step.clip(model, optimizer, scaler, grad_clip=0.0)
        step.update(optimizer, scaler, norm)
        assert math.isfinite(norm) != bad
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert same == bad
        assert all(p.grad is None for p in model.parameters())


def test_the_scaler_may_leave_out_more_before_that_is_an_error(capsys):
    watch = Watch("the norm", scaled=True)
    for i in range(39):
        watch.note(i, torch.tensor(math.inf))
    watch.check()
    assert capsys.readouterr().out == ""
    watch.note(39, torch.tensor(math.inf))
    with pytest.raises(UsageError, match="the norm was not finite in 40 iterations in a row, the last was 39"):
        watch.check()


def test_a_watch_looks_by_itself_after_a_while(monkeypatch, capsys):
    monkeypatch.setattr(recovery, "LOOK_EVERY", 4)
    watch = Watch("the loss")
    for i, value in enumerate([1.0, math.inf, 1.0]):
        watch.note(i, torch.tensor(value))
    assert capsys.readouterr().out == ""
    watch.note(3, torch.tensor(math.nan))
    assert capsys.readouterr().out.splitlines() == [
        "iteration 1: the loss is inf: the weights stay as they were",
        "iteration 3: the loss is nan: the weights stay as they were",
    ]


# ---- data that changes -------------------------------------------------------------------------------------


def test_data_that_changes_in_mid_run_leaves_a_checkpoint_that_goes_on(workplace, monkeypatch):
    whole = train(**{**RUN, "max_iters": 12}, dropout=0.2, out_dir="whole")
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
        sentence = "train.bin has changed since the run began.*; checkpoint saved to out, --init_from=resume goes on"
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


def test_what_is_no_lack_of_memory_is_passed_on():
    batches = Batches(open_data("data/markov", 8, 65), batch_size=4, device=CPU)
    made = recovery_of(batches)

    def bug():
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        tried(made, bug)
    assert tried(made, lambda: 3, lambda: 4) == [3, 4]


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


def test_the_parts_before_are_done_again_with_the_same_batches_and_random_numbers():
    batches = Batches(open_data("data/markov", 8, 65), batch_size=4, device=CPU)
    made = recovery_of(batches)
    seen = []

    def first():
        seen.append((batches.current[0].clone(), torch.rand(3)))
        batches.advance()
        return "first"

    def second():
        if len(seen) == 1:
            raise torch.OutOfMemoryError("full")
        return "second"

    assert tried(made, first, second) == ["first", "second"]
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_what_was_stopped_leaves_batches_and_random_numbers_where_they_were():
    batches = Batches(open_data("data/markov", 8, 65), batch_size=4, device=CPU)
    made = recovery_of(batches)
    before = batches.state_dict(), torch.get_rng_state()

    def stopped():
        list(batches.evaluation("val", 2))
        torch.rand(3)
        raise StopRequested

    with pytest.raises(StopRequested):
        tried(made, stopped)
    after = batches.state_dict(), torch.get_rng_state()
    assert all(torch.equal(before[0][name], after[0][name]) for name in ("starts", "generator"))
    assert torch.equal(before[1], after[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks")
def test_a_torture_in_short():
    """Kills at random moments; `make torture` does many more."""
    command = [sys.executable, str(ROOT / "tests" / "torture.py"), "--kills=4"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("4 kills")
