"""Steps on fake tensors: the bars of memory, and that parts add up to what they should."""

import sys

import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "tests" / "models"))
import tiny

from model import GPT, GPTConfig
from nanofit.autofit.plan import Job
from nanofit.autofit.simulate import PARTS, STATE_SHARES, step_memory
from nanofit.units import GIB, GPT2_SIZES, MemoryLevers


class NanoGPTsWay(GPT):
    """All logits in memory, and held on to as nanoGPT's loop does."""

    def forward(self, idx, targets=None):
        self.logits, loss = super().forward(idx, targets)
        return self.logits, loss


RECOMPUTE = {"recompute": True}


def take(name="gpt2", micro_batch_size=1, model=GPT, micro_steps=2, levers=None, ranks=1, **sizes):
    """GiB by part for a step of a GPT-2 in bfloat16. levers: fields of MemoryLevers."""
    shape = {**dict(block_size=1024, vocab_size=50304, dropout=0.0, bias=False), **GPT2_SIZES[name], **sizes}
    job = Job(
        source={}, model_args=shape, device="cuda", dtype="bfloat16", grad_clip=1.0,
        micro_batch_size=micro_batch_size, micro_steps=micro_steps, ranks=ranks,
    )  # fmt: skip
    levers = MemoryLevers(**levers or {}).within(0)
    return {part: size / GIB for part, size in step_memory(model, GPTConfig, job, levers).items()}


def brought(kind="plain", model=tiny.GPT):
    """Bytes by part for a step of a model that people bring."""
    job = Job({}, {**tiny.SIZES, "kind": kind}, "cpu", "float32", 1.0, micro_batch_size=2, micro_steps=2)
    return step_memory(model, tiny.GPTConfig, job, tiny.PLAIN)


def test_blocks_that_run_again_drop_out_as_the_first_time():
    sizes = dict(n_layer=4, n_embd=64, n_head=4, block_size=64, vocab_size=65, dropout=0.2)
    again, once = (sum(take(levers=levers, micro_batch_size=8, **sizes).values()) for levers in (RECOMPUTE, None))
    assert again < once


def test_frozen_weights_have_no_gradients():
    frozen = brought("frozen")
    assert frozen["gradients"] < frozen["weights"] == brought()["weights"]


class Telling(tiny.GPT):
    """It keeps its loss as a number."""

    def forward(self, idx, targets=None):
        logits, loss = super().forward(idx, targets)
        self.told = loss.item() + float(logits.detach().mean())
        return logits, loss


def test_a_model_that_reads_its_loss_takes_what_it_takes_without():
    assert brought(model=Telling) == brought()


@pytest.mark.proof
def test_the_logits_take_no_memory_and_blocks_little():
    """124M at 64 x 1024, of which nanoGPT's way takes 65 GiB."""
    theirs = sum(take(micro_batch_size=64, model=NanoGPTsWay).values())
    assert sum(take(micro_batch_size=64).values()) <= 0.40 * theirs
    assert sum(take(micro_batch_size=64, levers=RECOMPUTE).values()) <= 0.11 * theirs


def test_a_single_sequence_takes_no_more_than_in_nanogpts_way():
    assert sum(take().values()) <= 1.03 * sum(take(model=NanoGPTsWay).values())


def test_parts_are_what_their_names_say():
    parts = take(n_layer=2)
    parameters = (2 * 7.1e6 + 50304 * 768 + 1024 * 768) * 4 / GIB
    assert tuple(parts) == PARTS
    assert parts["weights"] == pytest.approx(parameters, rel=0.01)
    assert parts["gradients"] == pytest.approx(parameters, rel=0.01)
    assert parts["optimizer state"] == pytest.approx(2 * parameters, rel=0.01)
    assert parts["activations"] > 5 * take(n_layer=2, levers=RECOMPUTE)["activations"]
    alone = take(n_layer=2, micro_steps=1)
    assert alone["gradients"] < parts["gradients"], "without accumulation, the forward pass finds none"
    shared = take(n_layer=2, ranks=4, levers={"shard": True})
    assert shared["optimizer state"] == pytest.approx(parts["optimizer state"] / 4, rel=0.01)
    outside, block = (50304 + 1024 + 1) * 768 / GIB, (12 * 768**2 + 2 * 768) / GIB
    assert shared["weights"] == pytest.approx(parts["weights"] / 4 + 4 * outside + 2 * 2 * block, rel=0.01)
    assert shared["gradients"] == pytest.approx(parts["gradients"] / 4 + 4 * outside + (2 + 4) * block, rel=0.01)
    once = take(n_layer=3, ranks=4, levers={"shard": True, "gather_once": True})
    each = take(n_layer=3, ranks=4, levers={"shard": True})
    assert once["weights"] - each["weights"] == pytest.approx(2 * block, rel=0.01), "of all blocks, not of two"
    together = take(n_layer=2, micro_steps=1, ranks=2)
    assert together["gradients"] == parts["gradients"], "several ranks' have memory of their own"
    assert take(n_layer=2, levers={"optimizer_state": "offload"})["optimizer state"] == 0
    compact = take(n_layer=2, levers={"optimizer_state": "8bit"})["optimizer state"]
    assert compact == pytest.approx(parts["optimizer state"] / 4, rel=0.05)


def test_the_state_in_8_bits_is_the_size_of_the_real_one():
    pytest.importorskip("torchao")
    from torchao.optim import AdamW8bit

    sizes = [(64, 64), (64, 128), (64, 256)]
    params = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = AdamW8bit(params)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    held = 0
    for p in params:
        tensors = [v for v in optimizer.state[p].values() if v.numel() > 1]
        inner = [part for v in tensors for part in ((v.codes, v.scale) if hasattr(v, "codes") else (v,))]
        held += sum(v.numel() * v.element_size() for v in inner)
    assert held == STATE_SHARES["8bit"] * sum(8 * p.numel() for p in params)
