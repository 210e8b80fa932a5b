"""A memory lever is one value: a key of train.py, a part of a trial's job, and what training and simulation do by it.

A field that is added to MemoryLevers and not to one of these places fails here.
"""

import ast
from dataclasses import asdict, fields, replace

import pytest
import torch
from conftest import ROOT, train

from model import GPT, GPTConfig
from nanofit import autofit, machine, models
from nanofit.autofit.plan import Job
from nanofit.autofit.simulate import step_memory
from nanofit.optimizers import make_optimizer
from nanofit.units import MemoryLevers

CPU = torch.device("cpu")
SIZES = dict(n_layer=3, n_head=2, n_embd=64, block_size=64, bias=False, vocab_size=65, dropout=0.0)
JOB = Job({}, SIZES, "cuda", "bfloat16", 1.0, micro_batch_size=4, micro_steps=2, ranks=2)
MOVED = {
    "recompute": True,
    "optimizer_state": "offload",
    "loss_chunk_mb": 256,
    "shard": True,
    "gather_once": True,
}  # another value of each lever
PLAIN = MemoryLevers().within(0, "cpu")  # as a trial and a run settle them

LEVERS = [field.name for field in fields(MemoryLevers)]
lever = pytest.mark.parametrize("name", LEVERS)
# What several ranks share out is shown on several: tests/test_sharding.py, test_ranks.py.
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


def keys_of_train():
    """The keys of train.py with their defaults, as its source has them."""
    found = {}
    for node in ast.parse((ROOT / "train.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found.setdefault(node.targets[0].id, ast.literal_eval(node.value))
            except ValueError:
                continue  # computed: not a plain key
    return found


@lever
def test_it_is_a_key_of_train_with_the_same_default(name):
    default = asdict(MemoryLevers())[name]
    key = keys_of_train()[name]
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


@lever_of_one
def test_a_run_with_it_says_so_in_its_checkpoint(name, workplace):
    train(**{name: MOVED[name]}, max_iters=2, eval_interval=2)
    saved = torch.load("out/ckpt.pt", weights_only=True)
    asked = MemoryLevers(**{name: MOVED[name]})
    assert saved["split"]["levers"] == asdict(asked.within(machine.total_memory_bytes(CPU), "cpu"))
