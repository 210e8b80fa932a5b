"""The answer beside the run."""

import json
import os
from dataclasses import asdict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanofit.autofit import cache
from nanofit.autofit.plan import Plan, Trial
from nanofit.units import GIB, MemoryLevers

KEY = {
    "device": "GPU", "memory": 24 * GIB, "driver": "550.54", "torch": "2", "model": {"n_layer": 1, "n_embd": 8},
    "levers_that_are_set": [], "batch_size": 64, "gradient_accumulation_steps": 1,
    "memory_limit_gb": 0.0, "recompute": False,
}  # fmt: skip
LEVERS = MemoryLevers(recompute=True, loss_chunk_mb=128)
KEPT = Plan(
    64, 1, 8, LEVERS, compile=True, limit_bytes=10 * GIB, peak_bytes=7 * GIB, reasons=("because", "of that"),
    trials=(Trial(8, LEVERS, compiled=True, peak_bytes=7 * GIB, tokens_per_second=1.0, limit_bytes=10 * GIB),),
)  # fmt: skip


def test_an_answer_is_kept_and_found_again(workplace):
    cache.remember("out", KEY, KEPT)
    assert cache.recall("out", KEY) == (KEPT, "")
    told = json.loads((workplace / "out" / "auto_fit.json").read_text())
    assert told["trials"][0]["micro_batch_size"] == 8
    assert told["plan"]["levers"] == asdict(MemoryLevers(recompute=True, loss_chunk_mb=128))
    assert os.listdir("out") == ["auto_fit.json"], "and nothing half-written beside it"


def test_where_there_is_none_there_is_nothing_to_say():
    assert cache.recall("out", KEY) == (None, "")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"device": "GTX"}, "device GPU (now GTX)"),
        ({"memory": 12 * GIB}, "memory 24.00 GiB (now 12.00 GiB)"),
        ({"driver": ""}, "driver 550.54 (now none)"),
        ({"model": {"n_layer": 2, "n_embd": 8, "n_kv_head": 1}}, "n_layer 1 (now 2), n_kv_head none (now 1)"),
        ({"model": {"n_layer": 1}}, "n_embd 8 (now none)"),
        ({"levers_that_are_set": ["recompute", "shard"]}, "levers set by hand none (now recompute and shard)"),
        ({"batch_size": 16, "recompute": True}, "batch_size 64 (now 16), recompute False (now True)"),
        ({"memory_limit_gb": 8.5}, "memory_limit_gb 0.0 (now 8.5)"),
        ({"new_key": 1}, "no new_key"),
        (dict.fromkeys("abcdef", 1), "no a, no b, no c, no d, and 2 more"),
    ],
)
def test_an_answer_for_another_run_is_not_taken_and_what_differs_is_told(change, told):
    cache.remember("out", KEY, KEPT)
    assert cache.recall("out", {**KEY, **change}) == (None, f"out/auto_fit.json was found with {told}: looking again")


def ignored(workplace, text):
    (workplace / "out").mkdir(exist_ok=True)
    (workplace / "out" / "auto_fit.json").write_text(text, encoding="utf-8")
    return cache.recall("out", KEY) == (None, "out/auto_fit.json can't be read and is ignored")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"key": 3}', '{"key": {}}', "[" * 100_000])
def test_a_half_written_answer_is_ignored(workplace, text):
    (workplace / "out").mkdir()
    (workplace / "out" / "auto_fit.json").write_text(text)
    choice, why = cache.recall("out", KEY)
    assert choice is None
    assert why.endswith((" can't be read and is ignored", ": looking again"))


def test_an_answer_that_was_cut_anywhere_is_ignored(workplace):
    cache.remember("out", KEY, KEPT)
    whole = (workplace / "out" / "auto_fit.json").read_text().rstrip()
    assert not ignored(workplace, whole)
    for length in range(0, len(whole), 7):
        assert ignored(workplace, whole[:length])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(
        ["batch_size", "gradient_accumulation_steps", "micro_batch_size", "levers", "limit_bytes", "reasons"]
    ),
    st.none() | st.integers(-3, 3) | st.text(max_size=3) | st.lists(st.none()) | st.just({"turbo": 1}),
)
def test_an_answer_that_was_changed_by_hand_is_ignored_or_is_one(workplace, name, value):
    plan = {"batch_size": 64, "gradient_accumulation_steps": 1, "micro_batch_size": 8}
    if ignored(workplace, json.dumps({"key": KEY, "plan": {**plan, name: value}})):
        return
    found, _ = cache.recall("out", KEY)
    assert found.micro_batch_size * found.accumulation == 64
    assert found.micro_batch_size > 0
