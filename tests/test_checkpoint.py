"""ckpt.pt, whatever model, optimizer or loss is in it: what is written is read again."""

import pathlib

import numpy as np
import pytest
import torch
from conftest import TOY, run_script, train

from model import GPT
from nanofit import checkpoint
from nanofit.errors import UsageError

TINY = dict(n_layer=1, n_embd=32, block_size=16, batch_size=4, eval_interval=5, eval_iters=2)


@pytest.mark.parametrize(
    ("state", "named"), [(lambda: 1, ""), (pathlib.PurePosixPath("a"), "a pathlib.PurePosixPath")], ids=["def", "path"]
)
def test_what_cant_be_saved_is_found_out_before_the_first_iteration(monkeypatch, state, named):
    steps = []
    monkeypatch.setattr(GPT, "get_extra_state", lambda model: state)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: steps.append(1))
    with pytest.raises(UsageError, match=f"could not be written and read again: its entry 'model' holds {named}"):
        train(**TINY, max_iters=5)
    assert not steps


def test_the_prefix_of_torch_compile_is_taken_off():
    train(**TINY, max_iters=5)
    saved = torch.load("out/ckpt.pt", weights_only=True)
    torch.save({**saved, "model": {f"_orig_mod.{n}": w for n, w in saved["model"].items()}}, "out/ckpt.pt")
    assert list(checkpoint.load("out")["model"]) == list(saved["model"])


def test_numbers_may_be_tensors_as_in_nanogpt():
    train(**TINY, max_iters=5)
    saved = torch.load("out/ckpt.pt", weights_only=True)
    loss = torch.tensor(saved["best_val_loss"], dtype=torch.float64)
    torch.save({**saved, "iter_num": torch.tensor(5), "best_val_loss": loss}, "out/ckpt.pt")
    loaded = checkpoint.load("out", for_training=True)
    assert (loaded["iter_num"], loaded["best_val_loss"]) == (5, saved["best_val_loss"])
    assert type(loaded["iter_num"]) is int
    assert 5 in train(**TINY, max_iters=6, init_from="resume").iter_loss


@pytest.mark.parametrize(
    ("value", "named"),
    [(np.float64(1.5), "a numpy number"), (pathlib.PurePosixPath("x"), "a pathlib.PurePosixPath")],
    ids=["numpy", "path"],
)
def test_what_is_not_plain_data_is_named_with_the_way_out(value, named):
    train(**TINY, max_iters=5)
    saved = torch.load("out/ckpt.pt", weights_only=True)
    torch.save({**saved, "config": {**saved["config"], "mine": value}}, "out/ckpt.pt")
    with pytest.raises(UsageError, match=rf"out/ckpt.pt holds {named}, and only .*weights_only=False"):
        checkpoint.load("out")


def test_what_cant_be_read_now_is_not_called_damaged(monkeypatch):
    train(**TINY, max_iters=10)

    def refuse(path, *args, **options):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(UsageError, match=r"out/ckpt.pt can't be read now \(Permission denied\)") as error:
        checkpoint.load("out", for_training=True)
    assert "damaged" not in str(error.value)
    assert "rename" not in str(error.value), "the one before would take the place of what may be whole"


def test_resuming_takes_every_key_that_is_not_named_from_the_checkpoint():
    keys = {**TOY, **TINY, "gradient_accumulation_steps": 2, "warmup_iters": 3}
    whole = train(**{**keys, "max_iters": 10, "out_dir": "whole"})
    train(**{**keys, "max_iters": 5})
    rest = run_script("train.py", "--init_from=resume", "--max_iters=10", "--device=cpu")
    assert rest.iter_loss == {i: loss for i, loss in whole.iter_loss.items() if i >= min(rest.iter_loss)}
    assert rest.names["config"]["warmup_iters"] == 3
    assert rest.names["dataset"] == "markov"
