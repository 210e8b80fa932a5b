"""Ways to train that must come to the same: batches cut and joined, several ranks, shares, models of uneven passes.

In float64, so that the order of sums is all that is left: AdamW makes much of the rounding of a gradient that is nearly
0. Losses and weights are those of a plain run of one process; tests/test_reference.py holds that to nanoGPT's figures.
"""

import json
import sys

import pytest
import torch
import uneven
from conftest import train, train_on_ranks, weights_of_ranks

WITHIN = 1e-6
KEYS = dict(
    n_layer=2, n_head=2, n_embd=32, block_size=16, batch_size=4, gradient_accumulation_steps=6, max_iters=30,
    eval_interval=10, eval_iters=3, learning_rate=3e-3, min_lr=3e-4, lr_decay_iters=25, grad_clip=0.7, bias=False,
    dtype="float32",
)  # fmt: skip
FIRST = """
import torch
from nanofit import gradients
from nanofit.batches import Batches
if {model!r}:
    sys.modules["model"] = __import__({model!r})
torch.set_default_dtype(torch.float64)
gradients.BUCKET_BYTES = 20_000  # several, of which some wait for weights that aren't used
made = Batches.__init__
def cut(self, *arguments, **options):
    made(self, *arguments, **{{**options, **{cut}}})
Batches.__init__ = cut
"""
WAYS = {
    "cut": dict(micro_batch_size=2),
    "joined": dict(micro_batch_size=12),
    "recompute": dict(recompute=True),
    "ranks": dict(ranks=2),
    "joined ranks": dict(ranks=2, micro_batch_size=12),
    "sharded": dict(ranks=3, shard=True),
    "gathered once": dict(ranks=2, shard=True, gather_once=True),
}


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def run(ranks=1, micro_batch_size=0, model="", **keys):
    """A run under torchrun, in the folder out."""
    cut = dict(micro_batch_size=micro_batch_size) if micro_batch_size else {}
    return train_on_ranks(ranks, first=FIRST.format(model=model, cut=cut), **{**KEYS, **keys})[0]


def figures(out_dir):
    """{(iteration, figure): value} of metrics.jsonl."""
    with open(f"{out_dir}/metrics.jsonl") as file:
        records = [json.loads(line) for line in file]
    names = ("loss", "grad_norm", "train_loss", "val_loss")
    return {(r["iter"], name): r[name] for r in records if "iter" in r for name in names if name in r}


def assert_same(out_dir, other, buffers_apart=False):
    """buffers_apart: each rank has running means of its own, by which evaluations differ."""
    ours, theirs = ({k: v for k, v in figures(name).items() if not (buffers_apart and k[1].endswith("_loss"))}
                    for name in (out_dir, other))  # fmt: skip
    assert ours == pytest.approx(theirs, abs=WITHIN)
    ours, theirs = (torch.load(f"{name}/ckpt.pt", weights_only=True)["model"] for name in (out_dir, other))
    for name in theirs:
        if not (buffers_apart and ".running." in name):
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=WITHIN, msg=name)


@pytest.mark.parametrize("way", [way if way == "ranks" else pytest.param(way, marks=pytest.mark.proof) for way in WAYS])
def test_every_way_comes_to_the_same(way):
    train(**KEYS, out_dir="whole")
    run(**WAYS[way])
    assert_same("out", "whole")


@pytest.mark.proof
def test_a_run_that_resumes_through_all_ways_comes_to_the_same():
    train(**KEYS, out_dir="whole")
    for way, last in zip(WAYS, (4, 9, 13, 17, 20, 25, 30), strict=True):
        run(**{"recompute": False, "shard": False, "gather_once": False, **WAYS[way]}, max_iters=last, init_from="auto")
    assert_same("out", "whole")


KINDS = [(kind, shard) for kind in ("random_buffers", "running", "unused", "frozen", "rare") for shard in (False, True)]
KINDS += [("layer_drop", False), ("experts", True)]  # sharded ranks must call the same blocks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "shard"), [("experts", False), *(pytest.param(*each, marks=pytest.mark.proof) for each in KINDS)]
)
def test_ranks_learn_like_one_process_whatever_a_model_leaves_out_or_changes(monkeypatch, kind, shard):
    keys = dict(kind=kind, n_head=1, max_iters=8, eval_interval=4, grad_clip=1.0)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "model", uneven)
        train(**{**KEYS, **keys}, out_dir="whole")
    run(ranks=2, model="uneven", shard=shard, **keys)
    assert_same("out", "whole", buffers_apart=kind == "running")
    assert shard or len({weights["digest"] for weights in weights_of_ranks()}) == 1
