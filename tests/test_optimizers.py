"""Whatever optimizer a model configures; and where AdamW keeps its state: the same numbers offloaded, nearly the same
in 8 bits, one format of checkpoint.
"""

import copy
import importlib.util
import io

import pytest
import torch
from conftest import train
from tiny import KINDS, LEARNING_RATE, iterations, made, resumed

from model import GPT, GPTConfig
from nanofit import optimizers
from nanofit.errors import UsageError
from nanofit.optimizers import OPTIMIZER_STATES, make_optimizer, set_learning_rate
from nanofit.step import clip, update

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


def step(model, optimizer, steps, seed=0):
    """Steps with a learning rate that changes, clipping and accumulation; returns the last loss."""
    g = torch.Generator().manual_seed(seed)
    for i in range(steps):
        set_learning_rate(optimizer, 1e-3 / (i + 1))
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


NEEDS_MORE = ("Optimizer", "LBFGS", "SparseAdam", "Muon")  # a closure, sparse gradients, matrices alone
OF_TORCH = [name for name, kind in vars(torch.optim).items() if isinstance(kind, type) and name not in NEEDS_MORE]
OTHERS = ["momentum", "AMSGrad", "factors", "two", "lookahead", "factored"]  # of tests/models/brought.py
ANY = [*OF_TORCH, *OTHERS, *(["Muon"] if hasattr(torch.optim, "Muon") else [])]


@pytest.mark.parametrize(("name", "kind"), [
    *((name, "plain") for name in ANY), ("momentum", "bfloat16"),
    *(("AdamW", kind) for kind in KINDS if kind != "plain"),
])  # fmt: skip
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(name, kind):
    same = dict(optimizer=name, kind=kind)
    whole, parts = made(**same), made(**same)
    losses = iterations(*whole, 0, 9)
    iterations(*parts, 0, 6)
    rest = resumed(*parts, **same)
    assert iterations(*rest, 6, 9) == losses[6:]
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), rest[0].parameters(), strict=True))
    with open("/proc/self/maps") as maps:
        assert "checkpoint.pt" not in maps.read(), "the file is let go of, so that removing it makes room"


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", ANY)
def test_a_step_without_a_finite_gradient_is_left_out(name, scaled):
    model, optimizer = made(optimizer=name)
    iterations(model, optimizer, 0, 2)
    before = [p.clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("inf"))
    scaler.scale(torch.zeros(()))
    update(optimizer, scaler, clip(model, optimizer, scaler, 0.0))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    iterations(model, optimizer, 2, 3)
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(("name", "rate", "shares"), [
    ("SGD", 1, {1.0}), ("factors", 1, {1.0, 0.1}), ("factors", 0.1, {1.0}), ("two", 1, {1.0, 10.0}),
])  # fmt: skip
def test_each_group_keeps_its_share_of_the_schedules_learning_rate(name, rate, shares):
    """Where groups have one rate, that is the schedule's, as in nanoGPT, whatever it was."""
    same = dict(optimizer=name, rate=rate)
    model, optimizer = made(**same)
    for lr in (LEARNING_RATE, 0.5, 0.0):
        set_learning_rate(optimizer, lr)
        assert {group["lr"] for group in optimizer.param_groups} == {lr * share for share in shares}
    iterations(model, optimizer, 0, 1)
    state = optimizer.state_dict()
    for part in state.values() if name == "two" else [state]:
        for group in part["param_groups"]:
            group.pop(optimizers.SHARE, None)  # as nanoGPT saves it
    optimizers.load(optimizer, state)
    set_learning_rate(optimizer, 2.0)
    assert {group["lr"] for group in optimizer.param_groups} == {2.0 * share for share in shares}


@pytest.mark.parametrize("name", ["AMSGrad", "momentum", "Adafactor", "Adagrad", "two"])
def test_a_cropped_model_goes_on_with_the_state_of_its_rows(name):
    model, optimizer = made(optimizer=name)
    iterations(model, optimizer, 0, 3)
    shorter, its_optimizer = made(optimizer=name, block_size=6)
    optimizers.load(its_optimizer, optimizer.state_dict(), cropped=True)
    parts = getattr(its_optimizer, "both", [its_optimizer])
    state = next(part.state[shorter.transformer.wpe.weight] for part in parts if part.state)
    wide = {key: value.shape for key, value in state.items() if value.dim() and len(value) > 1}
    assert wide
    assert {shape[0] for shape in wide.values()} == {6}


def test_how_a_step_is_computed_stays_as_it_is_here():
    model, optimizer = made(optimizer="two")
    iterations(model, optimizer, 0, 2)
    state = optimizer.state_dict()
    state["optimizer1"]["param_groups"][0].update(fused=None, foreach=True, weight_decay=0.25)
    optimizers.load(optimizer, state)
    group = optimizer.both[1].param_groups[0]
    assert (group["fused"], group["foreach"], group["weight_decay"]) == (True, None, 0.25)
    optimizers.set_learning_rate(optimizer, 0.5)
    assert group["lr"] == optimizer.param_groups[1]["lr"] > 0, "the schedule reaches it, whichever groups are listed"


@pytest.mark.parametrize("name", ["AdamW", "two"])
def test_a_state_that_load_state_dict_refuses_is_a_sentence(name):
    _, optimizer = made(optimizer=name)
    for damaged in ({}, None, made(optimizer="Adam")[1].state_dict()):
        with pytest.raises(UsageError, match="the checkpoint's optimizer does not belong to its model: "):
            optimizers.load(optimizer, damaged)


def test_where_adamw_keeps_its_state_is_told_to_be_of_no_use_to_another(capsys):
    model, _ = made(optimizer="AMSGrad")
    optimizer = make_optimizer(model, "offload", 0.1, 1e-3, (0.9, 0.95), CPU)
    assert type(optimizer) is torch.optim.AdamW
    assert "optimizer_state='offload' is for plain AdamW: the optimizer here (AdamW)" in capsys.readouterr().out


def test_an_offloaded_state_changes_no_bit():
    plain, offloaded = make("float32"), make("offload")
    assert step(*plain, 5) == step(*offloaded, 5)
    assert all(torch.equal(a, b) for a, b in zip(plain[0].parameters(), offloaded[0].parameters(), strict=True))
    assert all(p.grad is None for p in offloaded[0].parameters())


def test_eight_bits_train_nearly_alike_in_a_quarter_of_the_memory():
    needs("8bit")
    plain, compact = make("float32"), make("8bit")
    assert step(*compact, 30) == pytest.approx(step(*plain, 30), abs=0.02)
    large = next(p for p in compact[0].parameters() if p.numel() % 256 == 0 and p.numel() >= 4096)
    moment = compact[1].state[large]["exp_avg"]
    assert moment.codes.dtype == torch.uint8
    assert moment.scale.numel() == large.numel() // 256


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
    optimizers.load(other, state)
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
