"""Models and optimizers that people bring, through train.py and sample.py: what they train, they go on from."""

import sys

import brought
import pytest
import torch
from conftest import flags, run_script, train

KEYS = dict(
    n_layer=2, n_embd=16, block_size=16, batch_size=4, eval_interval=10, eval_iters=1, warmup_iters=2, max_iters=12,
    learning_rate=1e-3, gradient_accumulation_steps=2,
)  # fmt: skip


@pytest.fixture(autouse=True)
def model_py(monkeypatch):
    """brought.py in the place of model.py."""
    monkeypatch.setitem(sys.modules, "model", brought)


ODD = ("infinite mask", "complex", "scalar", "double")
OWN = ("SGD", "two", "lookahead", "factored")


@pytest.mark.parametrize(
    ("kind", "name"), [*((kind, "AdamW") for kind in ODD), *(("plain", name) for name in OWN)]
)  # all kinds and optimizers, without train.py: test_optimizers.py
def test_eight_iterations_and_four_are_twelve(kind, name):
    keys = dict(KEYS, kind=kind, moved_by=name, eval_interval=4)
    whole = train(**keys, out_dir="whole")
    train(**{**keys, "max_iters": 8})
    rest = train(**keys, init_from="resume")
    first = min(rest.iter_loss)
    assert first > 4
    assert rest.iter_loss == pytest.approx({i: x for i, x in whole.iter_loss.items() if i >= first}, abs=1e-4)
    ours, theirs = (run.names["raw_model"].state_dict() for run in (whole, rest))
    for entry, value in ours.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(theirs[entry], value, atol=1e-6, rtol=1e-6, equal_nan=True)
    text = run_script("sample.py", *flags(num_samples=2, max_new_tokens=5, device="cpu", start="a")).text
    assert text.count("-" * 15) == 2


def test_a_weight_that_never_was_finite_and_odd_buffers_are_saved_and_resumed(monkeypatch):
    init = brought.GPT.__init__

    def more(self, config):
        init(self, config)
        self.floor = torch.nn.Parameter(torch.full((4,), float("-inf")))
        self.module = torch.nn.Linear(2, 2)
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("empty", torch.zeros(0))

    monkeypatch.setattr(brought.GPT, "__init__", more)
    train(**{**KEYS, "max_iters": 10})
    rest = train(**{**KEYS, "max_iters": 12}, init_from="resume")
    assert max(rest.iter_loss) == 12
    assert not rest.names["run"].unsaved


def test_an_optimizer_within_that_lists_no_group_moves_its_weights_at_its_own_rate(monkeypatch):
    class Beside(brought.Two):
        """The schedule reaches the second alone."""

        def __init__(self, *both):
            super().__init__(*both)
            self.param_groups = both[1].param_groups

    def own(model, weight_decay, lr, betas, device_type):
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        rest = [p for p in model.parameters() if p.dim() < 2]
        return Beside(torch.optim.SGD(matrices, lr=0.05), torch.optim.AdamW(rest, lr=lr))

    monkeypatch.setattr(brought.GPT, "configure_optimizers", own)
    run = train(**{**KEYS, "max_iters": 5})
    assert [group["lr"] for group in run.names["optimizer"].both[0].param_groups] == [0.05]
    torch.manual_seed(1337)
    begun = brought.GPT(run.names["raw_model"].config)
    assert not torch.equal(begun.lm_head.weight, run.names["raw_model"].lm_head.weight)
