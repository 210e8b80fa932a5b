"""A model that no rank holds whole: what each holds, what it may be combined with, what ends it."""

import json
import subprocess
import sys

import pytest
import torch
import uneven
from conftest import environment, train, train_on_ranks

from nanofit import models, sharding
from nanofit.errors import UsageError

GATHERS = """
import json
import torch
from model import GPT, GPTConfig
from nanofit import gradients, models, machine, sharding
from nanofit.errors import UsageError
from nanofit.units import MemoryLevers
from nanofit.batches import RandomBatch
from nanofit.ranks import World
from nanofit.step import accumulate, evaluate
from torch.utils._python_dispatch import TorchDispatchMode

class Gathers(TorchDispatchMode):
    count = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "allgather" in func.name()
        return func(*args, **(kwargs or {}))

def held(model):
    tensors = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in map(torch.Tensor.detach, tensors_of(model))}
    return sum(storage.nbytes() for storage in tensors.values())

def tensors_of(model):
    return [t.to_local() if hasattr(t, "to_local") else t for t in model.parameters()]

device, world, told = torch.device("cpu"), World.imagined(2), []
for once in (False, True):
    levers = MemoryLevers(shard=True, gather_once=once)
    model = models.build(GPT, GPTConfig, dict(block_size=16, vocab_size=64, n_layer=3, n_head=2, n_embd=32, bias=False))
    whole = held(model)
    sharding.place(model, world, device, "float32", levers)
    batches, own = RandomBatch(2, 16, 64, device, micro_steps=4), gradients.of(model, world, levers)
    scaler, autocast = machine.grad_scaler(device, "float32"), machine.autocast(device, "float32")
    for _ in range(2):  # iterations: the second begins as the first
        with Gathers() as gathers:
            accumulate(model, scaler, batches, autocast, own)
        told.append((gathers.count, 2 * held(model) <= 1.05 * whole))
    with Gathers() as gathers:
        evaluate(model, batches, 2, autocast)
    told.append(gathers.count)

class Tied(GPT):
    def __init__(self, config):
        super().__init__(config)
        self.transformer.h[1].mlp = self.transformer.h[0].mlp

tied = models.build(Tied, GPTConfig, dict(block_size=16, vocab_size=64, n_layer=3, n_head=2, n_embd=32))
try:
    sharding.place(tied, world, device, "float32", levers)
except UsageError as refused:
    told.append(str(refused))
print(json.dumps(told))
"""


def test_weights_are_gathered_for_each_use_or_once_an_iteration_and_refused_if_blocks_share_them():
    """Three blocks and what is outside of them, in four micro-steps; of two ranks, of which one is imagined."""
    done = subprocess.run([sys.executable, "-c", GATHERS], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    *each, evaluation_of_each, one, again, evaluation, refused = json.loads(done.stdout.splitlines()[-1])
    assert refused.startswith("shard=True: model.py ties weights of different blocks")
    assert each == 2 * [[28, True]], "a block twice in a micro-step, what is outside once; then it holds its share"
    assert [one, again] == 2 * [[4, True]]
    assert [evaluation_of_each, evaluation] == [13, 4], "of four batches"


def test_trying_the_order_of_blocks_changes_nothing():
    running, drops = (models.build(uneven.GPT, uneven.GPTConfig, dict(kind=kind)) for kind in ("running", "layer_drop"))
    before, drawn = {name: t.clone() for name, t in running.state_dict().items()}, torch.get_rng_state()
    sharding._require_fixed_order(running)
    assert all(torch.equal(t, before[name]) for name, t in running.state_dict().items())
    with pytest.raises(UsageError, match="doesn't call the same blocks in each pass"):
        sharding._require_fixed_order(drops)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not any("forward" in vars(block) for model in (running, drops) for block in model.transformer.h)


RUNS_OUT = """
import torch
from functools import wraps
from model import GPT
forward, calls = GPT.forward, []
@wraps(forward)
def runs_out(self, idx, *args, **options):
    calls.append(1)
    if os.environ["RANK"] == "1" and self.training and len(calls) > 12 and len(idx) > 4:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.14 GiB.")
    return forward(self, idx, *args, **options)
GPT.forward = runs_out
"""


@pytest.mark.proof
def test_memory_that_runs_out_ends_the_attempt_and_the_next_takes_less():
    keys = dict(gradient_accumulation_steps=2, eval_interval=4, max_iters=16)
    sharded = dict(keys, first=RUNS_OUT, shard=True, init_from="auto")
    _, said, code = train_on_ranks(2, check=False, **sharded)
    assert code != 0
    told = "sharded ranks can't go back one by one; the next start takes 4; --init_from=auto goes on"
    ours, torchruns = said.split("Traceback (most recent call last):")  # which tells at its end what it was told
    assert (ours.count(told), torchruns.count(told)) == (1, 1), said
    run, _, _ = train_on_ranks(2, **sharded)
    assert "resuming from out at iteration 4" in run.text
    assert "batch_size 8 -> 4: memory ran out before" in run.text
    alone = train(**keys, out_dir="alone")
    assert run.iter_loss == pytest.approx({i: loss for i, loss in alone.iter_loss.items() if i >= 4}, abs=2e-4)


def test_sharding_is_not_combined_with_a_state_elsewhere(monkeypatch):
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=2).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UsageError, match="keeps the state of whole weights"):
        train(shard=True, gradient_accumulation_steps=2, optimizer_state="offload")
