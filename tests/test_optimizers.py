"""Where AdamW keeps its state: the same numbers offloaded, nearly the same in 8 bits, one format of checkpoint."""

import copy
import importlib.util
import io

import pytest
import torch
from conftest import train

from model import GPT, GPTConfig
from nanofit import checkpoint as checkpoints
from nanofit.errors import UsageError
from nanofit.optimizers import OPTIMIZER_STATES, make_optimizer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def eager():
    """torchao compiles its update, which takes longer than these tests."""
    with torch.compiler.set_stance("force_eager"):
        yield


def make(kind, model=None):
    if model is None:
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=1, n_head=2, n_embd=64, bias=True))
    return model, make_optimizer(model, kind, 0.1, 1e-3, (0.9, 0.95), CPU)


def step(model, optimizer, steps, seed=0, scaler=None):
    """Steps with a learning rate that changes, clipping and accumulation; returns the last loss."""
    g = torch.Generator().manual_seed(seed)
    for i in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 / (i + 1)
        for _ in range(2):
            idx = torch.randint(64, (4, 16), generator=g)
            loss = model(idx, idx, return_logits=False)[1]
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def needs(kind):
    if kind == "8bit":
        pytest.importorskip("torchao")


def test_an_offloaded_state_changes_no_bit():
    plain, offloaded = make("float32"), make("offload")
    assert step(*plain, 5) == step(*offloaded, 5)
    assert all(torch.equal(a, b) for a, b in zip(plain[0].parameters(), offloaded[0].parameters(), strict=True))
    assert all(p.grad is None for p in offloaded[0].parameters())


def test_an_offloaded_step_is_dropped_where_the_scaler_finds_an_overflow():
    class Scaler(torch.amp.GradScaler):
        """The CPU's scaler, which train.py doesn't use."""

    model, optimizer = make("offload")
    scaler = Scaler("cpu", init_scale=8.0)
    before = [p.clone() for p in model.parameters()]
    scaler.scale(model(torch.zeros((1, 4), dtype=torch.long), torch.zeros((1, 4), dtype=torch.long))[1]).backward()
    next(model.parameters()).grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert scaler.get_scale() == 4.0


def test_eight_bits_train_nearly_alike_in_a_quarter_of_the_memory():
    needs("8bit")
    plain, compact = make("float32"), make("8bit")
    assert step(*compact, 30) == pytest.approx(step(*plain, 30), abs=0.02)
    large = next(p for p in compact[0].parameters() if p.numel() % 256 == 0 and p.numel() >= 4096)
    moment = compact[1].state[large]["exp_avg"]
    assert moment.codes.dtype == torch.uint8
    assert moment.scale.numel() == large.numel() // 256


@pytest.mark.parametrize("kind", OPTIMIZER_STATES)
def test_a_saved_state_goes_on_bit_for_bit(kind):
    needs(kind)
    model, optimizer = make(kind)
    step(model, optimizer, 6)
    state, weights = saved_and_loaded(optimizer.state_dict()), saved_and_loaded(model.state_dict())
    whole = step(model, optimizer, 6, seed=1)
    again, _ = make(kind)
    again.load_state_dict(weights)
    again, resumed = make(kind, again)
    checkpoints.load_optimizer(resumed, state)
    assert step(again, resumed, 6, seed=1) == whole
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("before", OPTIMIZER_STATES)
@pytest.mark.parametrize("after", OPTIMIZER_STATES)
def test_a_checkpoint_can_be_resumed_with_another_state(before, after):
    needs(before)
    needs(after)
    model, optimizer = make(before)
    step(model, optimizer, 6)
    state = saved_and_loaded(optimizer.state_dict())
    assert {s["exp_avg"].dtype for s in state["state"].values()} == {torch.float32}
    twin, other = make(after, copy.deepcopy(model))
    checkpoints.load_optimizer(other, state)
    assert step(twin, other, 4, seed=1) == pytest.approx(step(model, optimizer, 4, seed=1), abs=0.01)
    assert {float(s["step"]) for s in other.state_dict()["state"].values()} == {10.0}


def test_a_missing_torchao_is_a_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="optimizer_state='8bit' is kept by torchao: pip install torchao"):
        train(optimizer_state="8bit")


@pytest.mark.parametrize("kind", ["8bit", "offload"])
def test_a_run_resumes_with_its_optimizer_state(kind):
    needs(kind)
    keys = dict(optimizer_state=kind, gradient_accumulation_steps=2, dropout=0.1)
    whole = train(**keys, max_iters=16, out_dir="whole")
    train(**keys, max_iters=12, out_dir="parts")
    rest = train(**keys, max_iters=16, out_dir="parts", init_from="resume")
    assert rest.iter_loss == {i: v for i, v in whole.iter_loss.items() if i >= 13}
    plain = train(max_iters=16, gradient_accumulation_steps=2, dropout=0.1)
    assert rest.iter_loss[16] == pytest.approx(plain.iter_loss[16], abs=0.02 if kind == "8bit" else 1e-4)
