"""A model that users bring: model.py replaced by another, and the scripts run as they are.

tests/models/ holds nanoGPT's interface as nanoGPT has it, and a fork with other blocks and a GPTConfig of its own.
"""

import dataclasses
import os
import re
import shutil
import sys
from pathlib import Path

import modern
import nanogpt_like
import pytest
import tiny
import torch
from conftest import REFERENCE, TOY, flags, run_script, train
from test_interface import listed
from test_reference import assert_evaluations_agree, assert_iterations_agree
from torch._subclasses.fake_tensor import FakeTensorMode

from nanofit import models
from nanofit.errors import UsageError
from nanofit.units import MemoryLevers


@pytest.fixture
def nanogpt(monkeypatch):
    monkeypatch.setitem(sys.modules, "model", nanogpt_like)


@pytest.fixture
def fork(monkeypatch):
    monkeypatch.setitem(sys.modules, "model", modern)


def sampled(out_dir, *argv):
    """(the Run, the text that sample.py draws)."""
    keys = dict(out_dir=out_dir, device="cpu", num_samples=1, max_new_tokens=40, start="AB", top_k=5, seed=7)
    run = run_script("sample.py", *argv, *flags(**keys))
    [text] = re.findall(r"^(AB.{40})\n-{15}$", run.text, re.MULTILINE | re.DOTALL)
    return run, text


def shape(run):
    """The config of a run's model."""
    return vars(run.names["raw_model" if "raw_model" in run.names else "model"].config)


def checkpoint(out_dir):
    return torch.load(f"{out_dir}/ckpt.pt", weights_only=True)


@pytest.mark.parametrize("name", ["plain", "resumed"])
def test_nanogpts_model_trains_as_in_nanogpt(nanogpt, reference, name):
    expected = reference[name]
    if name == "resumed":
        os.mkdir(expected["args"]["out_dir"])
        shutil.copy(REFERENCE / "upstream_ckpt.pt", Path(expected["args"]["out_dir"], "ckpt.pt"))
    run = run_script("train.py", *flags(**expected["args"]))
    assert_iterations_agree(run, expected)
    assert_evaluations_agree(run, expected)
    assert run.text.count("model.py offers") == 1, "what it lacks is told in one line"
    assert re.search(r"^model\.py offers no return_logits.*all logits are held.*$", run.text, re.MULTILINE)


def test_nanogpts_model_samples_what_ours_samples_and_goes_on_with_a_shorter_block(monkeypatch):
    os.mkdir("theirs")
    shutil.copy(REFERENCE / "upstream_ckpt.pt", "theirs/ckpt.pt")
    _, ours = sampled("theirs")
    monkeypatch.setitem(sys.modules, "model", nanogpt_like)
    assert sampled("theirs")[1] == ours
    run = train(max_iters=22, out_dir="theirs", init_from="resume", block_size=16)
    assert shape(run)["block_size"] == 16
    assert set(run.iter_loss) == {20, 21, 22}


def test_what_nanogpts_model_refuses_is_a_sentence(nanogpt):
    """Its asserts have no words of their own."""
    for keys, sentence in (
        (dict(init_from="gpt3"), "init_from must be 'scratch', 'resume', .*gpt2-xl.*not 'gpt3'"),
        (dict(n_head=3), r"nanogpt_like.py, line \d+, refuses: assert config.n_embd % config.n_head == 0"),
    ):
        with pytest.raises(UsageError, match=sentence):
            train(**keys)


FIELDS = dict(n_kv_head=1, rope_base=5000.0)


def test_a_fork_trains_resumes_bit_for_bit_and_samples(fork):
    """Fields given by a config file or by flags, and after that taken from the checkpoint."""
    Path("mine.py").write_text("n_kv_head = 1\nrope_base = 5e3\n")
    whole = train("mine.py", max_iters=23, out_dir="whole", dropout=0.1)
    part = train(max_iters=17, dropout=0.1, **FIELDS)
    rest = train(max_iters=23, dropout=0.1, init_from="resume", n_kv_head=2)
    assert "differs, but stays as it is in the checkpoint: n_kv_head 1, not 2\n" in rest.text
    assert rest.iter_loss == {i: loss for i, loss in whole.iter_loss.items() if i >= 18}
    assert rest.eval_loss == {i: loss for i, loss in whole.eval_loss.items() if i >= 18}
    ours, theirs = checkpoint("whole"), checkpoint("out")
    assert all(torch.equal(weight, theirs["model"][name]) for name, weight in ours["model"].items())
    assert ours["model_args"] == shape(whole)
    for run in (part, rest, sampled("out", "mine.py")[0]):
        assert FIELDS.items() <= shape(run).items()


def test_a_forks_fields_are_keys_like_any_other(fork):
    found, _ = listed("train.py")
    assert (found["n_kv_head"], found["rope_base"]) == (None, 10000.0)
    train(max_iters=1, eval_interval=1, eval_iters=1)
    untouched = checkpoint("out")
    assert (untouched["model_args"]["n_kv_head"], untouched["model_args"]["rope_base"]) == (None, 10000.0)
    assert untouched["model"]["transformer.h.0.attention.to_kv.weight"].shape == (128, 64), "as many as n_head"
    assert FIELDS.keys() <= untouched["config"].keys()
    for script, key, sentence in (
        ("train.py", "--n_kv_head=two", "n_kv_head must be a whole number.*not 'two'"),
        ("train.py", "--n_kv_heads=1", r"train.py has no key 'n_kv_heads': did you mean 'n_kv_head'\?"),
        ("sample.py", "--n_kv_head=2", "sample.py has no key 'n_kv_head'"),
        ("train.py", "--init_from=gpt2", "init_from='gpt2': model.py offers no from_pretrained: start from scratch"),
    ):
        small = flags(**TOY) if script == "train.py" else []
        with pytest.raises(UsageError, match=sentence):
            run_script(script, *small, key)


def test_a_fork_is_planned_for_with_the_logits_that_it_holds(fork):
    os.remove("data/markov/meta.pkl")  # without it the vocabulary has 50304 tokens
    with pytest.raises(SystemExit) as stop:
        train(n_layer=1, n_embd=32, n_kv_head=1, batch_size=1, block_size=2048, gpu="3GB")
    assert "\nauto-fit: batch_size 1, gradient_accumulation_steps 1, effective batch 1, found in " in stop.value.text
    [loss] = re.findall(r"^auto-fit: of .*\(simulated\): .*, loss and backward ([\d.]+)", stop.value.text, re.MULTILINE)
    assert float(loss) > 2 * 2048 * 50304 * 4 / 2**30, "logits and their gradient in float32"


def test_a_model_that_reads_values_is_built_of_fake_tensors():
    mode = FakeTensorMode()
    model = models.build_fake(tiny.GPT, tiny.GPTConfig, {**tiny.SIZES, "kind": "reads values"}, mode)
    with mode:
        loss = models.loss_of(model, *torch.zeros((2, 4, 8), dtype=torch.int64))
        loss.backward()
    assert model.lm_head.weight.grad.shape == (65, 16)
    assert model.lm_head.weight is model.transformer.wte.weight


@dataclasses.dataclass
class Config:
    """A GPTConfig whose author had ideas."""

    dropout: float = 0.0
    noise: float = 0.1
    window: int | None = None
    pattern: tuple = ("local", "global")
    exits: list[int] = None


@dataclasses.dataclass
class Annotated:
    rope_theta: float = 10000.0
    seen: "Unknown" = 2  # noqa: F821


def test_a_loaded_model_keeps_nothing_that_lies_in_the_checkpoints_file():
    class Counting(torch.nn.Linear):
        def get_extra_state(self):
            return self.counted

        def set_extra_state(self, counted):
            self.counted = counted  # as it comes

    model, counted = Counting(2, 2), torch.ones(3)
    weights = {"weight": torch.ones(2, 2), "bias": torch.ones(2), "_extra_state": counted}
    models.load_weights(model, {"model": weights}, "ckpt.pt")
    counted.zero_()
    assert model.counted.tolist() == [1, 1, 1]


def test_fields_become_keys_where_a_key_can_set_them():
    assert models.own_fields(Config) == {"noise": (float, 0.1), "window": (int, None), "exits": (list, None)}
    kinds = {name: kind for name, (kind, _) in models.own_fields(Annotated).items()}
    assert kinds == {"rope_theta": float, "seen": int}
    assert models.config_of(Config, {"n_layer": 2, "noise": 0.2}) == Config(noise=0.2)


def test_a_model_without_transformer_h_is_told_when_recompute_is_asked_for(capsys):
    model = torch.nn.Linear(2, 2)
    model.config = Config()
    models.apply_levers(model, MemoryLevers())
    assert capsys.readouterr().out == ""
    models.apply_levers(model, MemoryLevers(recompute=True))
    assert capsys.readouterr().out == "model.py has no transformer.h: recompute does nothing\n"
