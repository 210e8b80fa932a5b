"""Memory levers, applied to a model from outside: it keeps less, and computes the same numbers."""

import random
from dataclasses import asdict

import pytest
import tiny
import torch
from conftest import run_script, train

from model import GPT, GPTConfig
from nanofit import models
from nanofit.units import MemoryLevers

RECOMPUTE = MemoryLevers(recompute=True)
GIB = 2**30


def pair(**changes):
    """Two models with the same weights, the second of which computes activations again."""
    made = []
    for levers in (MemoryLevers(), RECOMPUTE):
        torch.manual_seed(0)
        made.append(GPT(GPTConfig(**{**dict(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=32), **changes})))
        models.apply_levers(made[-1], levers)
    return made


def tokens():
    return torch.randint(65, (3, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_changes_no_bit(dropout):
    idx, found = tokens(), []
    for model in pair(dropout=dropout):
        torch.manual_seed(1)
        loss = models.loss_of(model.train(), idx, idx)
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters())), torch.rand(1)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", [*tiny.KINDS, "python's layer drop"])
def test_recomputing_trains_alike_whatever_a_block_draws_returns_or_keeps(kind):
    found = []
    for levers in (tiny.PLAIN, RECOMPUTE):
        random.seed(0)
        model, optimizer = tiny.made(kind, levers=levers)
        found.append((tiny.iterations(model, optimizer, 0, 30), model.state_dict(), random.random()))
    (losses, state, drawn), (again, state_again, drawn_again) = found
    assert again == pytest.approx(losses, abs=1e-6)
    assert drawn_again == drawn
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(state_again[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("grad", [True, False])
def test_blocks_run_again_in_the_backward_pass_alone(grad):
    passes = []
    _, model = pair()
    for block in model.transformer.h:
        block.mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    with torch.set_grad_enabled(grad):
        loss = models.loss_of(model, tokens(), tokens())
    assert len(passes) == 2
    if grad:
        loss.backward()
        assert len(passes) == 4


@torch.no_grad()
def test_a_model_that_recomputes_generates_and_saves_as_before():
    drawn, names = [], []
    for model in pair():
        torch.manual_seed(2)
        drawn.append(model.eval().generate(tokens()[:, :3], 20, temperature=0.9, top_k=20))
        names.append(list(model.state_dict()))
    assert torch.equal(*drawn)
    assert names[0] == names[1]


@pytest.mark.parametrize("chunk_mb", [64, 512])
def test_a_model_that_cuts_its_loss_is_told_how(chunk_mb):
    model, _ = pair()
    model.loss_chunk_mb = 0
    models.apply_levers(model, MemoryLevers(loss_chunk_mb=chunk_mb))
    assert model.loss_chunk_mb == chunk_mb


@pytest.mark.parametrize(
    ("asked", "limit_bytes", "chunk_mb"),
    [(0, 0, 128), (0, 4 * GIB, 128), (0, 11 * GIB, 384), (0, 80 * GIB, 3200), (64, 80 * GIB, 64)],
)
def test_how_much_of_the_logits_exists_at_a_time(asked, limit_bytes, chunk_mb):
    """Where it isn't said, four percent of the memory in steps of 128 MiB."""
    assert MemoryLevers(loss_chunk_mb=asked).within(limit_bytes).loss_chunk_mb == chunk_mb


def test_levers_in_words():
    assert str(MemoryLevers(loss_chunk_mb=128)) == ""
    assert str(MemoryLevers(recompute=True, optimizer_state="8bit")) == ", recompute, optimizer_state 8bit"


def test_mfu_is_the_share_of_the_devices_peak():
    model, _ = pair()
    flops_per_token = 6 * model.get_num_params() + 12 * 2 * 32 * 16
    share = models.share_of_peak(model, sequences=4, seconds=0.5, peak_flops=1e9)
    assert share == pytest.approx(flops_per_token * 16 * 4 / 0.5 / 1e9)


def recomputing(run):
    """Whether the blocks of a run's model compute their activations again: a block's forward is no more its class's."""
    replaced = {"forward" in vars(block) for block in run.names["raw_model"].transformer.h}
    assert len(replaced) == 1, "all blocks or none"
    return replaced.pop()


def test_resuming_takes_the_levers_that_were_fitted_unless_they_are_named():
    train(max_iters=10, loss_chunk_mb=64)
    saved = torch.load("out/ckpt.pt", weights_only=True)
    assert saved["split"]["levers"] == asdict(MemoryLevers(loss_chunk_mb=64))
    saved["split"]["levers"] = {"recompute": True, "optimizer_state": "8bit", "loss_chunk_mb": 256}  # as auto-fit may
    torch.save(saved, "out/ckpt.pt")
    run = train(init_from="resume", max_iters=10)
    assert run.names["levers"] == MemoryLevers(True, "float32", 256), "what changes numbers is the user's to choose"
    assert recomputing(run)
    torch.save(saved, "out/ckpt.pt")
    named = train(init_from="resume", max_iters=10, recompute=False)
    assert named.names["levers"] == MemoryLevers(False, "float32", 256)
    assert not recomputing(named)


def test_a_checkpoint_of_a_run_that_recomputes_samples():
    train(max_iters=10, recompute=True)
    text = run_script("sample.py", "--device=cpu", "--start=A", "--num_samples=1", "--max_new_tokens=3").text
    assert text.endswith("\n---------------\n")
