"""The values that auto-fit's rooms hand to each other, and their way through JSON."""

import json
import os
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanofit import autofit
from nanofit.autofit.plan import Facts, Job, Plan, Trial, from_json, recall, remember, to_json
from nanofit.ranks import ALONE
from nanofit.units import GIB, MemoryLevers, duration, memory_limit, micro_batch_sizes

KINDS = (MemoryLevers, Job, Facts, Trial, Plan)
LEVERS = MemoryLevers(recompute=True, loss_chunk_mb=128)
FOUND = Plan(
    64, 4, 8, LEVERS, compile=True, limit_bytes=10 * GIB, peak_bytes=7 * GIB, tokens_per_second=9.5, reasons=("so",),
    trials=(Trial(8, LEVERS, compiled=True, peak_bytes=7 * GIB, tokens_per_second=1.0, limit_bytes=10 * GIB),),
)  # fmt: skip
VALUES = [
    LEVERS, Job({"path": ["a", "b"]}, {"n_layer": 1}, "cuda", "bfloat16", 1.0, "muon", LEVERS, 2, 3, 4),
    Facts("a\nGPU", "cuda", 28, (8, 6), neighbours=((1, "x", 2),)), FOUND.trials[0], replace(FOUND, trials=()),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_comes_back_from_its_line_and_what_is_no_number_is_none(value):
    line = to_json(value)
    assert "\n" not in line
    assert from_json(line, *KINDS) == value
    assert from_json(line, *(kind for kind in KINDS if kind is not type(value))) is None, "that kind isn't expected"
    told = json.loads(line)
    for name, field in told.items():
        if type(field) in (int, float, dict):
            assert from_json(json.dumps({**told, name: "word"}), *KINDS) is None, name


def test_levers_name_what_was_moved_and_the_losss_chunk_follows_the_memory_unless_it_is_given():
    assert str(MemoryLevers(loss_chunk_mb=128)) == "", "it is settled for every run"
    moved = MemoryLevers(recompute=True, optimizer_state="8bit")
    assert str(moved) == ", recompute, optimizer_state 8bit"
    assert moved.within(GIB) == replace(moved, loss_chunk_mb=128)
    assert MemoryLevers().within(80 * GIB).loss_chunk_mb == 3200, "4%, in steps of 128 MiB"
    assert MemoryLevers().within(80 * GIB, "cpu").loss_chunk_mb == 64, "larger ones are not faster there"
    assert MemoryLevers(loss_chunk_mb=5).within(80 * GIB).loss_chunk_mb == 5


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 512), st.integers(1, 64), st.integers(1, 8), st.data())
def test_the_effective_batch_is_exact(batch_size, per_rank, world_size, data):
    accumulation = per_rank * world_size
    micro = data.draw(st.sampled_from(micro_batch_sizes(batch_size, per_rank)))
    plan = Plan(batch_size, accumulation, micro)
    assert plan.micro_batch_size * plan.accumulation == batch_size * accumulation
    assert plan.accumulation % world_size == 0, "every rank takes as many micro-steps"
    sizes = ((batch_size, micro), (accumulation, plan.accumulation))
    size, steps = (f"{was} -> {now}" if batch_size != micro else str(was) for was, now in sizes)
    effective = batch_size * accumulation
    assert str(plan) == f"batch_size {size}, gradient_accumulation_steps {steps}, effective batch {effective}"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (60, "1.0 min"), (63_000, "17.5 h"), (-90, "-1.5 min"), (2.5e9, "28,935 days")],
)
def test_durations_for_people(seconds, text):
    assert duration(seconds) == text


def test_the_limit():
    assert memory_limit(100, 0.0) == 95
    assert memory_limit(100 * GIB, 0.0) == 99 * GIB, "the margin is at most 1 GiB"
    assert memory_limit(100 * GIB, 12.0) == 12 * GIB
    assert memory_limit(10 * GIB, 12.0) == pytest.approx(9.5 * GIB, abs=1)


KEY = {"device": "GPU", "memory": 24 * GIB, "model": {"n_layer": 1}, "batch_size": 64, "recompute": False}
ASKED = Plan(64, 4, 64, compile=True)


def recalled(key=KEY, asked=ASKED, free=("recompute", "loss_chunk_mb"), sizes=(1, 2, 4, 8, 64, 128)):
    return recall("out", key, asked, free, sizes)


def test_an_answer_is_kept_and_found_again(workplace):
    assert recalled() == (None, ""), "where there is none there is nothing to say"
    assert remember("out", KEY, FOUND) == ""
    assert recalled() == (FOUND, "")
    assert recalled(asked=replace(ASKED, compile=False))[0] == replace(FOUND, compile=False)
    told = json.loads((workplace / "out" / "auto_fit.json").read_text())
    assert told["trials"][0]["micro_batch_size"] == 8
    assert told["plan"]["levers"] == asdict(LEVERS)
    assert os.listdir("out") == ["auto_fit.json"], "and nothing half-written beside it"


@pytest.mark.parametrize("change", [{"device": "GTX"}, {"model": {"n_layer": 2}}, {"new": 1}], ids=str)
def test_an_answer_for_another_run_is_not_taken(workplace, change):
    remember("out", KEY, FOUND)
    assert recalled({**KEY, **change}) == (
        None,
        "out/auto_fit.json was found for other keys or another device: looking again",
    )


@pytest.mark.parametrize("text", ["{", "[]", "null", "[" * 9999, '{"plan": {}}', '{"key": 3, "plan": 3}'], ids=range(6))
def test_what_is_no_answer_is_ignored(workplace, text):
    (workplace / "out").mkdir()
    (workplace / "out" / "auto_fit.json").write_text(text)
    assert recalled()[0] is None


def test_a_sharded_run_that_ran_out_of_memory_begins_smaller_whatever_is_kept(workplace):
    sharded = Plan(64, 4, 64, MemoryLevers(shard=True))
    autofit.note_smaller("out", 64, 8)
    assert autofit.no_larger(sharded, "out", ALONE) == replace(sharded, micro_batch_size=8)
    assert recalled() == (None, ""), "that is no answer of auto-fit's"
    remember("out", KEY, FOUND)
    assert autofit.no_larger(sharded, "out", ALONE).micro_batch_size == 8
    autofit.note_smaller("out", 64, 4)
    assert autofit.no_larger(sharded, "out", ALONE).micro_batch_size == 4
    assert recalled() == (FOUND, "")
    smaller = replace(sharded, micro_batch_size=2)
    assert autofit.no_larger(smaller, "out", ALONE) == smaller
    whole = Plan(64, 4, 64)
    assert autofit.no_larger(whole, "out", ALONE) == whole
    (workplace / "out" / "auto_fit.json").write_text('{"smaller": [64, -5]}')
    assert autofit.no_larger(sharded, "out", ALONE) == sharded


def test_a_resumed_run_is_cut_as_it_was(workplace, capsys):
    config = {"out_dir": "out", "auto_fit": False}
    split = {"of": [64, 4], "into": [128, 2], "levers": {**asdict(LEVERS), "gather_once": True}}
    plan = Plan(64, 4, 64)
    now = autofit.as_saved({"split": split}, plan, config, (), ranks=1)
    assert (now.micro_batch_size, now.levers) == (128, LEVERS), "as gather_once is the user's"
    assert "batch_size 64 -> 128, as when the checkpoint was saved" in capsys.readouterr().out
    of_four = autofit.as_saved({"split": split}, plan, config, ("recompute",), ranks=4)
    assert of_four.micro_batch_size == 64, "one batch a rank"
    assert not autofit.as_saved({"split": split}, plan, config, ("recompute",)).levers.recompute
    for other in ({}, {**split, "of": [32, 8]}):
        assert autofit.as_saved({"split": other}, plan, config, ()) == plan
