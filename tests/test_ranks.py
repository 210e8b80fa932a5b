"""Runs on several ranks, as torchrun starts them: they go on when one is killed, and learn like one process."""

import re
from pathlib import Path

import pytest
from conftest import RANK, TOY, flags, torchrun, train_on_ranks, weights_of_ranks

from nanofit.distributed import World
from nanofit.errors import UsageError
from nanofit.folder import RunFolder

KILLED_ONCE = """
import os, runpy, signal, sys
from nanofit.recovery import Recovery

update, rank, attempt = Recovery.update, os.environ["RANK"], int(os.environ["TORCHELASTIC_RESTART_COUNT"])
updates = 0
def and_dies(self, *arguments):
    global updates
    updates += 1
    if (attempt, rank, updates) in ({kills}):
        os.kill(os.getpid(), signal.SIGKILL)
    return update(self, *arguments)
Recovery.update = and_dies
sys.argv[0] = {rank!r}
runpy.run_path({rank!r}, run_name="__main__")
"""


@pytest.mark.slow
def test_a_run_whose_ranks_are_killed_goes_on_by_itself(workplace):
    keys = dict(gradient_accumulation_steps=2, dropout=0.1, max_iters=16, eval_interval=4)
    whole, _, _ = train_on_ranks(2, **keys, out_dir="whole")
    expected = weights_of_ranks()
    kills = '(0, "1", 3), (1, "1", 7), (2, "0", 6)'  # before there is a checkpoint, and later
    (workplace / "killed.py").write_text(KILLED_ONCE.format(kills=kills, rank=str(RANK)))
    keys = flags(**{**TOY, **keys, "backend": "gloo", "init_from": "auto"})
    run, said, _ = torchrun("--standalone", "--nproc_per_node=2", "--max-restarts=3", "killed.py", *keys)
    assert "Traceback" not in said
    assert re.findall(r"^resuming from out at iteration (\d+)$", run.text, re.MULTILINE) == ["4", "8"]
    assert run.iter_loss == whole.iter_loss
    assert weights_of_ranks() == expected


def test_ranks_that_see_different_checkpoints_are_told(monkeypatch):
    folder = RunFolder("out", World(rank=0, size=2))
    monkeypatch.setattr(World, "all_gather", lambda world, value: [value, 40])
    with pytest.raises(
        UsageError, match=r"\(rank 0 none, rank 1 iteration 40\): it must be a folder that all machines"
    ):
        folder.take()
    assert not Path("out").exists()
