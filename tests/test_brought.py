"""Models and optimizers that people bring, through train.py and sample.py: what they train, they go on from."""

import sys

import pytest
import torch
from conftest import ROOT, flags, run_script, train

sys.path.append(str(ROOT / "tests" / "models"))
import brought

OPTIMIZERS = (
    "AdamW", "AMSGrad", "momentum", "factors", "two", "Muon", "SGD", "RMSprop", "Adam", "Adagrad", "Adadelta",
    "Adamax", "NAdam", "RAdam", "Rprop", "ASGD", "Adafactor",
)  # fmt: skip
IN_SHORT = ("infinite mask", "complex", "SGD", "two")
KEYS = dict(
    n_layer=2, n_embd=16, block_size=16, batch_size=4, eval_interval=10, eval_iters=1, warmup_iters=2, max_iters=30,
    learning_rate=1e-3, gradient_accumulation_steps=2,
)  # fmt: skip


def variants():
    every = [(kind, "AdamW") for kind in brought.KINDS] + [("plain", name) for name in OPTIMIZERS[1:]]
    for kind, name in every:
        marks = () if {kind, name} & set(IN_SHORT) else pytest.mark.proof
        yield pytest.param(kind, name, id=f"{kind}, {name}", marks=marks)


@pytest.fixture(autouse=True)
def model_py(monkeypatch):
    """brought.py in the place of model.py."""
    monkeypatch.setitem(sys.modules, "model", brought)


@pytest.mark.parametrize(("kind", "name"), list(variants()))
def test_twenty_iterations_and_ten_are_thirty(kind, name):
    if not hasattr(torch.optim, name) and name not in ("AMSGrad", "momentum", "factors", "two"):
        pytest.skip(f"this torch has no {name}")
    keys = dict(KEYS, kind=kind, optimizer=name)
    whole = train(**keys, out_dir="whole")
    train(**{**keys, "max_iters": 20})
    rest = train(**keys, init_from="resume")
    first = min(rest.iter_loss)
    assert first > 10
    assert rest.iter_loss == pytest.approx({i: x for i, x in whole.iter_loss.items() if i >= first}, abs=1e-4)
    ours, theirs = (run.names["raw_model"].state_dict() for run in (whole, rest))
    for entry, value in ours.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(theirs[entry], value, atol=1e-6, rtol=1e-6, equal_nan=True)
    text = run_script("sample.py", *flags(num_samples=2, max_new_tokens=5, device="cpu", start="a")).text
    assert text.count("-" * 15) == 2


@pytest.mark.proof
@pytest.mark.parametrize("kind", brought.KINDS)
def test_auto_fit_takes_them(kind):
    run = train(**{**KEYS, "max_iters": 2}, kind=kind, auto_fit=True, memory_limit_gb=2.0)
    assert "effective batch 8" in run.text
    assert len(run.iter_loss) == 3
