"""What draws the sequences of training: --sampling=epoch."""

import random

import numpy as np
import pytest
import torch
from conftest import train
from test_batches import iteration

from nanofit.batches import Batches, EpochStarts
from nanofit.errors import UsageError
from nanofit.tokens import open_data

BLOCK, TOKENS, PER_ITER = 8, 1003, 16  # 125 blocks, or 124


def stream(ranks=1, batch_size=4, micro=None, state=None, tokens=TOKENS, block_size=BLOCK):
    """The Batches of each rank."""
    for split in ("train", "val"):
        np.arange(tokens).astype("<u2").tofile(f"data/{split}.bin")
    data = open_data("data", block_size, 2**16)
    torch.manual_seed(1337)
    sizes = dict(batch_size=batch_size, per_iter=PER_ITER // batch_size // ranks, micro_batch_size=micro)
    made = [
        Batches(data, device=torch.device("cpu"), rank=rank, ranks=ranks, starts=EpochStarts(), **sizes)
        for rank in range(ranks)
    ]
    for part in made if state else ():
        part.load_state_dict(state)
    return made


def test_each_block_once_an_epoch_in_another_order_from_another_offset():
    [batches] = stream()
    starts = [start for _ in range(25) for start in iteration([batches])]
    offsets, orders = [], []
    for _ in range(3):
        offset = starts[0] % BLOCK
        blocks = (TOKENS - 1 - offset) // BLOCK
        epoch, starts = starts[:blocks], starts[blocks:]
        assert sorted(epoch) == list(range(offset, offset + blocks * BLOCK, BLOCK))
        offsets.append(offset)
        orders.append([start // BLOCK for start in epoch][:100])
    assert len(set(offsets)) > 1
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_it_goes_on_in_the_middle_on_any_ranks_and_by_any_split(ranks):
    [whole] = stream()
    expected = [iteration([whole]) for _ in range(30)]
    draw = random.Random(ranks)
    parts, found = stream(ranks), []
    while len(found) < 30:
        found += [iteration(parts) for _ in range(draw.randrange(1, 7))]
        states = [part.state_dict() for part in parts]
        again = iteration(parts)
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)  # as after an iteration that is dropped
        assert iteration(parts) == again
        size = draw.choice([1, 2, 4])
        parts = stream(ranks, size, draw.choice([None, 1]), state=states[0])
    assert found[:30] == expected


def test_it_tells_how_much_of_the_text_is_trained_on():
    parts = stream(2)
    blocks = parts[0].starts.blocks
    for number in range(1, 5):
        iteration(parts)
        assert parts[0].figures == parts[1].figures == {"epoch": pytest.approx(number * PER_ITER / blocks)}
    assert stream(2, state=parts[0].state_dict())[1].figures == parts[0].figures
    assert stream()[0].figures == {"epoch": 0}


@pytest.mark.parametrize("change", [{"tokens": 503}, {"block_size": 4}], ids=str)
def test_another_text_or_block_size_begins_the_next_epoch(change):
    parts = stream()
    iteration(parts)
    [part] = stream(state=parts[0].state_dict(), **change)
    starts = [start for _ in range(3) for start in iteration([part])]
    assert part.figures["epoch"] > 1
    assert len(set(starts)) == len(starts)


def test_a_run_by_epochs_tells_them_and_resumes_as_it_was():
    keys = dict(sampling="epoch", n_layer=1, n_embd=16, eval_interval=100)
    whole = train(max_iters=6, out_dir="whole", **keys)
    train(max_iters=3, **keys)
    rest = train(max_iters=6, init_from="resume")  # which takes the key from the checkpoint
    assert rest.iter_loss == {i: whole.iter_loss[i] for i in range(4, 7)}
    assert ", epoch 0.0" in rest.text
    assert "epoch" not in train(max_iters=1, n_layer=1, n_embd=16, out_dir="random").text
    with pytest.raises(UsageError, match="sampling must be one of 'random', 'epoch', not 'all'"):
        train(sampling="all")
