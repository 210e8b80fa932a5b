"""Memory levers: a model keeps less and computes the same numbers; each is one value in all places.

A field that is added to MemoryLevers and not to one of these places fails here: a key of train.py, a part of a trial's
job, what training does by it, what a simulation does.
"""

import random
import types
from dataclasses import asdict, fields, replace

import pytest
import tiny
import torch
from conftest import train
from test_interface import listed

from model import GPT, GPTConfig
from nanofit import autofit, machine, models
from nanofit.autofit.plan import Job
from nanofit.autofit.simulate import step_memory
from nanofit.optimizers import make_optimizer
from nanofit.units import MemoryLevers

RECOMPUTE = MemoryLevers(recompute=True)


def test_recomputing_changes_no_bit():
    idx, found = torch.randint(65, (3, 16), generator=torch.Generator().manual_seed(0)), []
    for levers in (MemoryLevers(), RECOMPUTE):
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=32, dropout=0.3))
        models.apply_levers(model, levers)
        loss = models.loss_of(model, idx, idx)
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters())), torch.rand(1)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", [*tiny.KINDS, "python's layer drop"])
def test_recomputing_trains_alike_whatever_a_block_draws_returns_or_keeps(kind):
    found = []
    for levers in (tiny.PLAIN, RECOMPUTE):
        random.seed(0)
        model, optimizer = tiny.made(kind, levers=levers)
        found.append((tiny.iterations(model, optimizer, 0, 6), model.state_dict(), random.random()))
    (losses, state, drawn), (again, state_again, drawn_again) = found
    assert again == pytest.approx(losses, abs=1e-6)
    assert drawn_again == drawn
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(state_again[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_blocks_run_again_in_the_backward_pass_alone():
    model, passes, idx = tiny.made(levers=RECOMPUTE)[0], [], torch.zeros((2, 8), dtype=torch.int64)
    for block in model.transformer.h:
        block.mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        models.loss_of(model, idx, idx)
    assert len(passes) == 2
    models.loss_of(model, idx, idx).backward()
    assert len(passes) == 6


def test_a_step_that_is_faster_than_a_cpus_measured_peak_raises_it(monkeypatch):
    monkeypatch.setattr(machine, "peak_flops", lambda device, dtype: (1e9, ""))
    model = types.SimpleNamespace(estimate_mfu=lambda sequences, seconds: 2e9 / seconds / 312e12)
    mfu = models.mfu_of(model, 1, torch.device("cpu"), "float32")
    assert [mfu(4.0), mfu(1.0), mfu(4.0)] == [0.5, 1.0, 0.25]


def test_resuming_takes_the_levers_that_were_fitted_unless_they_are_named():
    train(max_iters=10, loss_chunk_mb=64)
    saved = torch.load("out/ckpt.pt", weights_only=True)
    assert saved["split"]["levers"] == asdict(MemoryLevers(loss_chunk_mb=64))
    saved["split"]["levers"] = {"recompute": True, "optimizer_state": "8bit", "loss_chunk_mb": 256}  # as auto-fit may
    torch.save(saved, "out/ckpt.pt")
    for named in ({}, dict(recompute=False)):
        run = train(init_from="resume", max_iters=10, **named)
        levers = MemoryLevers(not named, "float32", 256)  # what changes numbers is the user's to choose
        assert run.names["levers"] == levers
        assert {"forward" in vars(block) for block in run.names["raw_model"].transformer.h} == {levers.recompute}
        torch.save(saved, "out/ckpt.pt")


CPU = torch.device("cpu")
SIZES = dict(n_layer=3, n_head=2, n_embd=64, block_size=64, bias=False, vocab_size=65, dropout=0.0)
JOB = Job({}, SIZES, "cuda", "bfloat16", 1.0, micro_batch_size=4, micro_steps=2, ranks=2)
# Another value of each lever.
MOVED = dict(recompute=True, optimizer_state="offload", loss_chunk_mb=256, shard=True, gather_once=True)
PLAIN = MemoryLevers().within(0, "cpu")  # as a trial and a run settle them

LEVERS = [field.name for field in fields(MemoryLevers)]
lever = pytest.mark.parametrize("name", LEVERS)
# What several ranks share out is shown on several: tests/test_sharding.py, test_ways.py.
lever_of_one = pytest.mark.parametrize("name", [name for name in LEVERS if name not in ("shard", "gather_once")])


def moved(name):
    assert name in MOVED, "a new lever gets a value here that isn't its default"
    assert getattr(PLAIN, name) != MOVED[name]
    return replace(PLAIN, **{name: MOVED[name]})


class WithChunks(GPT):
    """Stands for a model that holds so many MiB of logits at a time."""

    loss_chunk_mb = 0

    def forward(self, idx, targets=None, return_logits=True):
        found = super().forward(idx, targets, return_logits)
        self.chunk = torch.empty(self.loss_chunk_mb * 2**20, dtype=torch.uint8)
        return found


@lever
def test_it_is_a_key_of_train_with_the_same_default(name):
    default = asdict(MemoryLevers())[name]
    key = listed("train.py")[0][name]
    assert (type(key), key) == (type(default), default)
    config = {**asdict(PLAIN), name: MOVED[name], "batch_size": 3}
    assert autofit.levers_of(config) == moved(name), "and the run's key is what auto-fit begins with"


def applied(levers):
    """What training with these levers is: bytes that a forward pass saves, the model's chunk, the optimizer's kind."""
    torch.manual_seed(0)
    model = models.build(WithChunks, GPTConfig, SIZES)
    models.apply_levers(model, levers)
    saved = {}
    x = torch.zeros((4, 64), dtype=torch.int64)

    def keep(tensor):
        saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = models.loss_of(model, x, x)
    loss.backward()
    optimizer = make_optimizer(model, levers.optimizer_state, 0.1, 1e-3, (0.9, 0.95), CPU)
    return sum(saved.values()), model.loss_chunk_mb, type(optimizer).__name__, loss.item()


@lever_of_one
def test_it_changes_how_training_computes_and_not_what(name):
    (*plain, loss), (*changed, same_loss) = applied(PLAIN), applied(moved(name))
    assert changed != plain
    assert same_loss == loss


@lever
def test_it_changes_what_is_simulated(name):
    plain = replace(PLAIN, shard=name == "gather_once")  # which says something of shares alone
    changed = replace(plain, **{name: MOVED[name]})
    assert step_memory(WithChunks, GPTConfig, JOB, changed) != step_memory(WithChunks, GPTConfig, JOB, plain)
