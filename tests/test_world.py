"""Ranks: how they meet and agree, and go on when memory runs out on one or one is killed."""

import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from conftest import torchrun, train, train_on_ranks, weights_of_ranks

from nanofit.errors import UsageError
from nanofit.folder import RunFolder
from nanofit.ranks import World


def pretend(monkeypatch, **variables):
    """Set what torchrun tells a rank."""
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def test_torchruns_variables_tell_which_rank_this_is(monkeypatch):
    pretend(monkeypatch, RANK=5, LOCAL_RANK=1, WORLD_SIZE=8)
    assert World.of_torchrun().local_size == 1, "where a launcher doesn't tell"
    pretend(monkeypatch, LOCAL_WORLD_SIZE=4)
    world = World.of_torchrun()
    assert world.local_size == 4
    assert (world.rank, world.local_rank, world.size, world.is_main) == (5, 1, 8, False)


def test_accumulation_that_the_ranks_cannot_share(monkeypatch):
    pretend(monkeypatch, RANK=0, LOCAL_RANK=0, WORLD_SIZE=3)
    with pytest.raises(UsageError, match="gradient_accumulation_steps=40 .* a multiple of 3"):
        train(gradient_accumulation_steps=40)


def test_ranks_meet_in_a_store_that_an_earlier_attempt_has_left():
    store, before = torch.distributed.HashStore(), []
    for _ in range(2):  # attempts: torchrun may keep its store
        with ThreadPoolExecutor(3) as pool:
            patience = timedelta(seconds=30)
            late = [pool.submit(World(rank=rank, size=3)._meet, store, patience) for rank in (0, 1)]
            time.sleep(0.1)
            late.append(pool.submit(World(rank=2, size=3)._meet, store, patience))
            names = {told.result() for told in late}
        assert len(names) == 1
        assert not names & {*before}, "of its own"
        before.append(names.pop())
    with pytest.raises(UsageError, match="ranks 1, 2 of 3 did not come in 0 minutes: look at what"):
        World(rank=0, size=3)._meet(torch.distributed.HashStore(), timedelta(0))


AGREE = """
import json
from pathlib import Path
import torch
from nanofit.ranks import World
from nanofit.errors import UsageError

world = World.of_torchrun()
device = world.init("nccl", "cpu")
weights, gradients = torch.full((3,), float(world.rank + 1)), [torch.tensor(float(world.rank)), torch.ones(2) * 4]
mine = float(world.rank)
kinds = [torch.tensor([True, mine > 0]), torch.tensor(1j + mine), torch.ones(2, 3).t() * mine, torch.ones(0),
         torch.tensor(mine, dtype=torch.bfloat16).expand(3), torch.tensor(mine < 1)]
world.broadcast([weights, *kinds])
world.all_reduce_mean(gradients)

def attempt():
    if world.rank == 1:
        raise UsageError("no room")
    return world.rank

try:
    sentence = world.agree(attempt)
except UsageError as e:
    sentence = str(e)
told = dict(
    device=str(device), weights=weights.tolist(), gradients=[g.tolist() for g in gradients],
    most=world.all_reduce_max(10 * world.rank), all=world.all_gather({"rank": world.rank}),
    kinds=[str(tensor.tolist()) for tensor in kinds], any=world.any_of([False, world.rank == 1]),
    agreed=world.agree(lambda: world.rank), sentence=sentence,
)
Path(f"told-{world.rank}.json").write_text(json.dumps(told))
world.destroy()
"""


@pytest.mark.slow
def test_what_ranks_tell_each_other(workplace):
    (workplace / "agree.py").write_text(AGREE)
    run, _, _ = torchrun("--standalone", "--nproc_per_node=2", "agree.py")
    assert run.text == "backend nccl needs CUDA: gloo joins the ranks on cpu\n", "one rank speaks"
    told = [json.loads(Path(f"told-{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0] == told[1]
    assert told[0] == {
        "device": "cpu", "weights": [1.0] * 3, "gradients": [0.5, [4.0, 4.0]], "most": 10,
        "kinds": ["[True, False]", "1j", "[[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]", "[]", "[0.0, 0.0, 0.0]", "True"],
        "any": [False, True],
        "all": [{"rank": 0}, {"rank": 1}], "agreed": [0, 1], "sentence": "rank 1: no room",
    }  # fmt: skip


ROBBED = """
import pytest
from test_recovery import Thief
from nanofit import gradients
gradients.BUCKET_BYTES = 20_000  # several, which are on their way when memory runs out
thief = Thief(pytest.MonkeyPatch(), {place!r}, iteration=2, times={times} * (os.environ["RANK"] == "1"))
"""
AS_OFTEN = "assert thief.taken == thief.times and thief.updates == 5, (thief.taken, thief.updates)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "times"),
    [
        ("backward 1", 1),
        pytest.param("clipping", 1, marks=pytest.mark.proof),
        pytest.param("forward 1", 2, marks=pytest.mark.proof),
    ],
)
def test_two_ranks_resume_and_go_back_exactly_where_memory_runs_out_on_one(place, times):
    keys = dict(dropout=0.1, gradient_accumulation_steps=2, max_iters=8, eval_interval=4, eval_iters=2)
    whole, _, _ = train_on_ranks(2, **keys)
    expected = weights_of_ranks()
    os.replace("out/ckpt.prev.pt", "out/ckpt.pt")  # of the evaluation at 4
    robbed = ROBBED.format(place=place, times=times)
    rest, _, _ = train_on_ranks(2, first=robbed, then=AS_OFTEN, **keys, init_from="resume")
    assert "rank 1: memory ran out on asking for 6.14 GiB: the same batches again, at the same size" in rest.text
    weights = weights_of_ranks()
    assert weights[0]["digest"] == weights[1]["digest"], "the ranks hold the same weights"
    if times == 1:
        assert weights == expected
        assert rest.iter_loss == {i: loss for i, loss in whole.iter_loss.items() if i >= 4}
        assert len(rest.iter_loss) == 5
    else:
        assert "batch_size 8 -> 4" in rest.text


KILLED_THRICE = """
import signal
from nanofit import step
update, rank, attempt = step.update, os.environ["RANK"], int(os.environ["TORCHELASTIC_RESTART_COUNT"])
updates = 0
def and_dies(*arguments):
    global updates
    updates += 1
    if (attempt, rank, updates) in ((0, "1", 3), (1, "1", 7), (2, "0", 6)):  # before there is a checkpoint, and later
        os.kill(os.getpid(), signal.SIGKILL)
    return update(*arguments)
step.update = and_dies
"""


@pytest.mark.proof
def test_a_run_whose_ranks_are_killed_goes_on_by_itself():
    keys = dict(gradient_accumulation_steps=2, dropout=0.1, max_iters=16, eval_interval=4)
    whole, _, _ = train_on_ranks(2, **keys, out_dir="whole")
    expected = weights_of_ranks()
    run, said, _ = train_on_ranks(2, "--max-restarts=3", first=KILLED_THRICE, **keys, init_from="auto")
    assert "Traceback" not in said
    assert len(re.findall("^tokens per iteration will be", run.text, re.MULTILINE)) == 4
    # A checkpoint that was still being written when its rank was killed is none.
    assert set(re.findall(r"^resuming from out at iteration (\d+)$", run.text, re.MULTILINE)) <= {"4", "8"}
    assert run.iter_loss == whole.iter_loss
    assert weights_of_ranks() == expected


def test_ranks_that_see_different_checkpoints_are_told(monkeypatch):
    folder = RunFolder("out", World(rank=0, size=2))
    monkeypatch.setattr(World, "all_gather", lambda world, value: [value, 40])
    with pytest.raises(UsageError, match=r"\(rank 0 none, rank 1 iteration 40\): it must be a folder that all"):
        folder.take()
    assert not Path("out").exists()
