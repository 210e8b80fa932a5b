"""Runs on several ranks, as torchrun starts them: they go on when one is killed, and learn like one process."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import RANK, TOY, environment, flags, torchrun, train, train_on_ranks, weights_of_ranks

from nanofit.errors import UsageError
from nanofit.folder import RunFolder
from nanofit.ranks import World

KILLED_ONCE = """
import os, runpy, signal, sys
from nanofit.recovery import Recovery

moves, rank, attempt = Recovery.moves, os.environ["RANK"], int(os.environ["TORCHELASTIC_RESTART_COUNT"])
updates = 0
def and_dies(self, *arguments):
    global updates
    updates += 1
    if (attempt, rank, updates) in ({kills}):
        os.kill(os.getpid(), signal.SIGKILL)
    return moves(self, *arguments)
Recovery.moves = and_dies
sys.argv[0] = {rank!r}
runpy.run_path({rank!r}, run_name="__main__")
"""


@pytest.mark.proof
def test_a_run_whose_ranks_are_killed_goes_on_by_itself(workplace):
    keys = dict(gradient_accumulation_steps=2, dropout=0.1, max_iters=16, eval_interval=4)
    whole, _, _ = train_on_ranks(2, **keys, out_dir="whole")
    expected = weights_of_ranks()
    kills = '(0, "1", 3), (1, "1", 7), (2, "0", 6)'  # before there is a checkpoint, and later
    (workplace / "killed.py").write_text(KILLED_ONCE.format(kills=kills, rank=str(RANK)))
    keys = flags(**{**TOY, **keys, "backend": "gloo", "init_from": "auto"})
    run, said, _ = torchrun("--standalone", "--nproc_per_node=2", "--max-restarts=3", "killed.py", *keys)
    assert "Traceback" not in said
    assert re.findall("^attempt .*", run.text, re.MULTILINE) == [f"attempt {i} of 4" for i in (2, 3, 4)]
    assert re.findall(r"^resuming from out at iteration (\d+)$", run.text, re.MULTILINE) == ["4", "8"]
    assert run.iter_loss == whole.iter_loss
    assert weights_of_ranks() == expected


@pytest.mark.parametrize(("rank", "restarts", "said"), [(0, 1, "attempt 2 of 4\n"), (1, 1, "")])
def test_an_attempt_after_the_first_says_so_before_anything_else(rank, restarts, said):
    told = dict(RANK=f"{rank}", TORCHELASTIC_RESTART_COUNT=f"{restarts}", TORCHELASTIC_MAX_RESTARTS="3")
    command = [sys.executable, "-c", "import nanofit; nanofit.start(); print('the rest')"]
    assert (
        subprocess.run(command, env=environment(**told), capture_output=True, text=True).stdout == f"{said}the rest\n"
    )


def test_ranks_that_see_different_checkpoints_are_told(monkeypatch):
    folder = RunFolder("out", World(rank=0, size=2))
    monkeypatch.setattr(World, "all_gather", lambda world, value: [value, 40])
    with pytest.raises(
        UsageError, match=r"\(rank 0 none, rank 1 iteration 40\): it must be a folder that all machines"
    ):
        folder.take()
    assert not Path("out").exists()


# ---- several ranks are one run -----------------------------------------------------------------------------

SAME = dict(gradient_accumulation_steps=4, max_iters=30, eval_interval=10, eval_iters=5)


def figures(out_dir):
    """{(iteration, figure): value} of metrics.jsonl."""
    with open(Path(out_dir, "metrics.jsonl")) as file:
        records = [json.loads(line) for line in file]
    names = ("loss", "grad_norm", "train_loss", "val_loss")
    return {(r["iter"], name): r[name] for r in records if "iter" in r for name in names if name in r}


def weights(out_dir):
    return torch.load(Path(out_dir, "ckpt.pt"), weights_only=True)["model"]


def assert_same_weights(out_dir, other, within=1e-5):
    ours, theirs = weights(out_dir), weights(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=within, msg=name)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Where the run lies that one process made of SAME."""
    return tmp_path_factory.mktemp("one") / "out"


@pytest.fixture
def whole(one_process):
    if not one_process.exists():
        train(**SAME, out_dir=one_process)
    return one_process


WHOLE, SHARED, GATHERED_ONCE = dict(), dict(shard=True), dict(shard=True, gather_once=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "levers"),
    [(2, WHOLE), *(pytest.param(n, way, marks=pytest.mark.proof) for n, way in ((2, GATHERED_ONCE), (4, SHARED)))],
)
def test_ranks_learn_what_one_process_learns(whole, ranks, levers):
    train_on_ranks(ranks, **SAME, **levers)
    ours, alone = figures("out"), figures(whole)
    assert len(ours) == 2 * 31 + 2 * 4, "one rank writes"
    assert ours == pytest.approx(alone, abs=1e-5)
    assert_same_weights("out", whole)
