"""Auto-fit as train.py sees it: whole runs, and ranks that agree."""

import json
import os
import re
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace

import pytest
import torch
from conftest import train, train_on_ranks

from model import GPT, GPTConfig
from nanofit import autofit
from nanofit.autofit.fit import Fitter, smallest
from nanofit.autofit.plan import Facts, Plan, Trial, from_dict
from nanofit.ranks import ALONE, World
from nanofit.units import GIB, MemoryLevers

fit_room = sys.modules["nanofit.autofit.fit"]  # the package's own fit is the function
CPU = torch.device("cpu")
CONFIG = {  # the keys that auto-fit looks at
    "batch_size": 8, "gradient_accumulation_steps": 1, "dtype": "float32", "optimizer": "adamw", "grad_clip": 1.0,
    "compile": False, "compile_mode": "default", "compile_min_sms": 68, "memory_limit_gb": 0.0, "max_iters": 20,
    "dry_run": False, "eval_only": False, "init_from": "scratch", "out_dir": "out", "gpu": "", "device": "cuda",
    "ranks": 1, **asdict(MemoryLevers()),
}  # fmt: skip
SIZES = dict(n_layer=1, n_head=1, n_embd=8, block_size=8, bias=False, vocab_size=65, dropout=0.0)


@pytest.fixture
def trials(monkeypatch):
    """Let fit() run on made-up trials, in which each sequence takes a GiB, and give the list of their jobs."""
    jobs = []

    def run_trial(job, on_facts=lambda facts: None):
        jobs.append(job)
        on_facts(Facts("a card", limit_bytes=5 * GIB, total_bytes=6 * GIB, free_bytes=6 * GIB))
        size, levers = job.micro_batch_size, job.levers.within(5 * GIB)
        peak = size * GIB // (2 if job.levers.recompute else 1)
        speed = (500.0 if job.levers.recompute else 1000.0) * size
        figures = dict(tokens_per_second=speed, limit_bytes=5 * GIB, parts={"weights": GIB})
        return Trial(size, levers, job.compile, peak, **figures)

    monkeypatch.setattr(fit_room, "Trials", lambda: nullcontext(run_trial))
    return jobs


def fit(world=ALONE, device=CPU, given=(), **changes):
    return autofit.fit(world, device, {**CONFIG, **changes}, set(given), SIZES, (GPT, GPTConfig), 20)


def test_the_plan_is_kept_and_a_second_run_confirms_it(trials, capsys):
    plan = fit()
    assert str(plan) == "batch_size 8 -> 4, gradient_accumulation_steps 1 -> 2, effective batch 8"
    assert plan.levers == MemoryLevers(loss_chunk_mb=128), "settled"
    last = rf"auto-fit: {plan}, found in \d+ s: the largest that fits, as 8 would take 8.0 of 5.0 GiB"
    assert re.fullmatch(last, capsys.readouterr().out.splitlines()[-1])
    tried = len(trials)
    assert fit() == plan
    assert len(trials) == tried + 1
    said = capsys.readouterr().out.splitlines()
    assert "auto-fit: the answer kept beside the run holds (4,000 tok/s when it was found)" in said
    assert re.fullmatch(last, said[-1])


@pytest.mark.parametrize("change", [dict(dry_run=True), dict(dry_run=True, gpu="T4"), dict(eval_only=True)])
def test_what_does_not_train_keeps_no_answer(trials, workplace, change):
    fit(**change)
    assert all(job.simulate == ("dry_run" in change) for job in trials)
    assert not (workplace / "out").exists()


def test_an_answer_that_cannot_be_kept_is_told_and_taken(trials, workplace, capsys):
    (workplace / "out").write_text("a file where a folder should be")
    plan = fit()
    said = capsys.readouterr().out.splitlines()
    assert said[-2].startswith("auto-fit: out/auto_fit.json can't be written (")
    assert said[-1].startswith(f"auto-fit: {plan}, found in ")


class Ranks(World):
    """A world of two whose other rank's answers are given."""

    def __init__(self, others, rank=0):
        super().__init__(rank=rank, size=2)
        self.others = iter(others)

    def all_gather(self, value):
        values = [value, next(self.others)]
        return values if self.is_main else values[::-1]


@pytest.mark.parametrize("compiles", [True, False])
def test_the_plan_of_all_ranks_fits_each_of_them(compiles):
    own = Plan(64, 2, 16, MemoryLevers(loss_chunk_mb=256), compile=True, limit_bytes=9, peak_bytes=7, reasons=("a",))
    others = Plan(64, 2, 4, MemoryLevers(recompute=True, loss_chunk_mb=128), compile=compiles, limit_bytes=5)
    plan = smallest([own, others], own)
    both = dict(levers=MemoryLevers(recompute=True, loss_chunk_mb=256), compile=compiles)
    assert plan == replace(own, micro_batch_size=4, reasons=("what each rank can take",), **both)


def test_ranks_of_one_machine_share_the_memory_of_its_cpu(trials):
    for local_size in (1, 2):
        world = Ranks([None, (Plan(8, 2, 4), "")])
        world.local_size = local_size
        fit(world, gradient_accumulation_steps=2)
        assert trials[-1].sharers == local_size


def test_the_first_ranks_kept_answer_is_everybodys(trials, workplace):
    kept = Plan(8, 2, 2, MemoryLevers(loss_chunk_mb=128), limit_bytes=5 * GIB)
    plan = fit(Ranks([kept, (kept, "")], rank=1), gradient_accumulation_steps=2)
    assert plan.micro_batch_size == 2
    assert [job.micro_batch_size for job in trials] == [2]
    assert not (workplace / "out").exists(), "and it alone keeps one"


def split_by_hand(monkeypatch, micro_batch_size, levers=None):
    """Let train.py's auto-fit answer this split without a trial."""

    def fit(world, device, config, *_):
        sizes = config["batch_size"], config["gradient_accumulation_steps"], micro_batch_size
        return Plan(*sizes, levers or autofit.levers_of(config))

    monkeypatch.setattr(autofit, "fit", fit)


@pytest.mark.slow
def test_a_run_that_auto_fit_started_is_the_run_split_by_hand_bit_for_bit(monkeypatch, workplace):
    keys = dict(auto_fit=True, batch_size=2, max_iters=8, dropout=0.1)
    fitted = train(**keys)
    kept = json.loads((workplace / "out" / "auto_fit.json").read_text())["plan"]
    micro = kept["micro_batch_size"]
    assert f"auto-fit: {Plan(2, 1, micro)}, found in " in fitted.text
    split_by_hand(monkeypatch, micro, from_dict(MemoryLevers, kept["levers"]))
    by_hand = train(**keys)
    assert by_hand.iter_loss == fitted.iter_loss
    assert by_hand.eval_loss == fitted.eval_loss
    for a, b in zip(by_hand.names["raw_model"].parameters(), fitted.names["raw_model"].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("batch_size", "steps", "micro"), [(16, 1, 4), (4, 6, 12)], ids=["parts", "joined"])
def test_another_split_sees_the_same_batches(monkeypatch, batch_size, steps, micro):
    """An evaluation in between sees what it would have, too."""
    keys = dict(batch_size=batch_size, gradient_accumulation_steps=steps, max_iters=12, eval_interval=4, n_layer=1)
    whole = train(**keys)
    split_by_hand(monkeypatch, micro)
    split = train(**keys, auto_fit=True)
    assert split.names["batches"].micro_steps == batch_size * steps // micro
    assert split.iter_loss == pytest.approx(whole.iter_loss, abs=1e-4)
    for i, losses in whole.eval_loss.items():
        assert split.eval_loss[i] == pytest.approx(losses, abs=1e-4)


def test_a_resumed_run_keeps_the_effective_batch_on_another_split(monkeypatch):
    whole = train(max_iters=20)
    train(max_iters=10, out_dir="parts")
    split_by_hand(monkeypatch, 2)
    rest = train(max_iters=20, out_dir="parts", init_from="resume", auto_fit=True)
    assert rest.iter_loss == pytest.approx({i: whole.iter_loss[i] for i in range(10, 21)}, abs=1e-4)
    saved = torch.load("parts/ckpt.pt", weights_only=True)
    assert saved["config"]["batch_size"] == 8, "config keeps what was asked for"
    assert (saved["split"]["of"], saved["split"]["into"]) == ([8, 1], [2, 4])


def test_a_run_that_was_fitted_goes_on_in_the_same_split_until_it_is_fitted_anew_as_it_says(monkeypatch):
    def goes_on(best, **more):
        known = Plan(8, 1, best, reasons=("known",))
        monkeypatch.setattr(Fitter, "plan", lambda self, kept, *_: kept or known)
        run = train(max_iters=2, eval_interval=2, **more)
        return run.text, run.names["batches"].micro_batch_size

    assert goes_on(1, auto_fit=True)[1] == 1
    assert goes_on(4, init_from="resume")[1] == 1, "the answer kept beside the run"
    text, size = goes_on(4, init_from="resume", auto_fit=False)
    anew = "to have it fitted anew, give --auto_fit=True"
    assert f"\nbatch_size 8 -> 1, as when the checkpoint was saved; {anew}\n" in text
    assert size == 1
    os.remove("out/auto_fit.json")
    assert goes_on(4, init_from="resume", auto_fit=True)[1] == 4


UNLIKE = """
from nanofit.autofit.fit import Fitter
from nanofit.autofit.plan import Facts, Trial
def measure(self, size, levers, compile=False):
    limit = (8, 2)[int(os.environ["RANK"])]
    self.facts = Facts("made up", limit_bytes=limit)
    return Trial(size, levers, peak_bytes=size, tokens_per_second=float(size), limit_bytes=limit)
Fitter.measure = measure
"""


@pytest.mark.slow
def test_two_ranks_agree_on_the_smaller_answer():
    run, *_ = train_on_ranks(2, first=UNLIKE, auto_fit=True, gradient_accumulation_steps=4, max_iters=2)
    assert "auto-fit: the ranks chose batch_size 8; 2: all take 2\n" in run.text
    assert "batch_size 8 -> 2, gradient_accumulation_steps 4 -> 16, effective batch 32" in run.text
    assert max(run.iter_loss) == 2
