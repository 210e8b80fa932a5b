"""Steps on fake tensors: the bars of memory, and that parts add up to what they should."""

import pytest
import torch

from model import PRETRAINED
from nanofit.autofit.simulate import PARTS, step_memory

GIB = 2**30


def take(name="gpt2", batch_size=1, forward=None, checkpointing=False, state="float32", micro_steps=2, **sizes):
    """GiB by part for a step of a GPT-2 in bfloat16."""
    shape = dict(block_size=1024, vocab_size=50304, dropout=0.0, bias=False, **{**PRETRAINED[name], **sizes})
    job = dict(
        model_args=shape, batch_size=batch_size, micro_steps=micro_steps, dtype="bfloat16", grad_clip=1.0,
        activation_checkpointing=checkpointing, optimizer_state=state,
    )  # fmt: skip
    return {part: size / GIB for part, size in step_memory(job, forward).items()}


def as_nanogpt(model, x, y):
    return model(x, y)


def test_the_logits_take_no_memory_and_blocks_little():
    """124M at 64 x 1024, of which nanoGPT's way takes 65 GiB."""
    theirs = sum(take(batch_size=64, forward=as_nanogpt).values())
    assert sum(take(batch_size=64).values()) <= 0.40 * theirs
    assert sum(take(batch_size=64, checkpointing=True).values()) <= 0.11 * theirs


def test_a_single_sequence_takes_no_more_than_in_nanogpts_way():
    assert sum(take().values()) <= 1.03 * sum(take(forward=as_nanogpt).values())


def test_parts_are_what_their_names_say():
    parts = take(n_layer=2)
    parameters = (2 * 7.1e6 + 50304 * 768 + 1024 * 768) * 4 / GIB
    assert tuple(parts) == PARTS
    assert parts["weights"] == pytest.approx(parameters, rel=0.01)
    assert parts["gradients"] == pytest.approx(parameters, rel=0.01)
    assert parts["optimizer state"] == pytest.approx(2 * parameters, rel=0.01)
    assert parts["activations"] > 5 * take(n_layer=2, checkpointing=True)["activations"]
    alone = take(n_layer=2, micro_steps=1)
    assert alone["gradients"] < parts["gradients"], "without accumulation, the forward pass finds none"
    assert take(n_layer=2, state="offload")["optimizer state"] == 0
    assert take(n_layer=2, state="8bit")["optimizer state"] == pytest.approx(parts["optimizer state"] / 4, rel=0.05)


@pytest.mark.slow
def test_350m_fits_a_card_of_8_gb():
    limit = (8 - 0.5) * 0.95  # less CUDA's context and the margin
    assert sum(take("gpt2-medium", checkpointing=True).values()) < limit


def test_the_stand_in_for_8_bits_is_the_size_of_the_real_state():
    pytest.importorskip("torchao")
    from torchao.optim import AdamW8bit

    from nanofit.autofit.simulate import Compact8bit

    sizes = [(100,), (64, 64), (65, 128), (64, 256)]
    held = []
    for kind in (Compact8bit, AdamW8bit):
        params = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = kind([{"params": params}])
        with torch.compiler.set_stance("force_eager"):
            optimizer.step()
        held.append([])
        for p in params:
            tensors = [v for v in optimizer.state[p].values() if v.numel() > 1]
            inner = [part for v in tensors for part in ((v.codes, v.scale) if hasattr(v, "codes") else (v,))]
            held[-1].append(sum(v.numel() * v.element_size() for v in inner))
    assert held[0] == held[1]
