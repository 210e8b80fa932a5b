"""The stream of batches: nanoGPT's order, micro-batches, going on, and bad files."""

import os
import pickle
from itertools import chain

import numpy as np
import pytest
import torch

from nanofit.batches import Batches, RandomBatch
from nanofit.codec import codec_of, load_meta
from nanofit.errors import UsageError

CPU = torch.device("cpu")


def stream(folder="data/markov", start=True, vocab_size=65, micro_batch_size=None, **sizes):
    batches = Batches(folder, **{**dict(batch_size=8, block_size=32, device=CPU), **sizes})
    if start:
        torch.manual_seed(1337)
        batches.start(vocab_size, micro_batch_size=micro_batch_size)
    return batches


def nanogpts_batch(split, batch_size, block_size):
    """A batch as nanoGPT draws it, from torch's global generator."""
    data = np.fromfile(f"data/markov/{split}.bin", dtype=np.uint16).astype(np.int64)
    starts = torch.randint(len(data) - block_size, (batch_size,))
    x = torch.stack([torch.from_numpy(data[i : i + block_size]) for i in starts])
    y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + block_size]) for i in starts])
    return x, y


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_batches_come_in_nanogpts_order_with_evaluations_in_between():
    ours = stream()
    torch.manual_seed(1337)
    pending = nanogpts_batch("train", 8, 32)
    for step in range(6):
        if step % 3 == 0:
            for split in ("train", "val"):
                for [batch] in ours.evaluation(split, 2):
                    assert same(batch, nanogpts_batch(split, 8, 32))
        assert same(ours.current, pending)
        pending = nanogpts_batch("train", 8, 32)
        ours.advance()


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_are_the_configured_batch_cut_up(micro):
    whole, cut = stream(), stream(micro_batch_size=micro)
    for _ in range(3):
        pieces = []
        for _ in range(8 // micro):
            pieces.append(cut.current)
            cut.advance()
        assert same([torch.cat(p) for p in zip(*pieces, strict=True)], whole.current)
        whole.advance()
    parts = [torch.cat(p) for p in zip(*chain(*cut.evaluation("val", 2)), strict=True)]
    assert same(parts, [torch.cat(p) for p in zip(*chain(*whole.evaluation("val", 2)), strict=True)])


def test_joined_batches_are_those_that_come_one_by_one_with_evaluations_in_between():
    apart, joined = stream(), stream(start=False, per_iter=4)
    torch.manual_seed(1337)
    joined.start(65, micro_batch_size=16)
    assert joined.micro_steps == 2
    for _ in range(3):
        place = joined.state_dict()
        for a, b in zip(apart.evaluation("val", 2), joined.evaluation("val", 2), strict=True):
            assert same(a[0], b[0])
        assert joined.like_current[0].shape == (16, 32)
        after = joined.state_dict()
        for again in range(2):
            if again:  # as after an iteration that is dropped
                assert not same(place.values(), after.values())
                joined.load_state_dict(after)
            found = []
            for _ in range(2):
                found.append(joined.current)
                joined.advance()
        expected = []
        for _ in range(4):
            expected.append(apart.current)
            apart.advance()
        assert same(*([torch.cat(p) for p in zip(*batches, strict=True)] for batches in (found, expected)))


@pytest.mark.parametrize(("ranks", "micro"), [(2, 8), (4, 8), (2, 2), (2, 16)])
def test_ranks_are_dealt_what_one_process_would_see_with_evaluations_in_between(ranks, micro):
    alone = stream(per_iter=4)
    dealt = [stream(per_iter=4 // ranks, rank=r, ranks=ranks, micro_batch_size=micro) for r in range(ranks)]
    for _ in range(3):
        states = [one.state_dict() for one in (alone, *dealt)]
        assert all(same(state.values(), states[0].values()) for state in states)
        for number, [batch] in enumerate(alone.evaluation("val", 4)):
            for rank, one in enumerate(dealt):
                if number == 0:
                    one.evaluated = list(one.evaluation("val", 4, rank, ranks))
            pieces = dealt[number % ranks].evaluated[number // ranks]
            assert same([torch.cat(part) for part in zip(*pieces, strict=True)], batch)
        after = [one.state_dict() for one in dealt]
        for again in range(2):
            found = []
            for one, place in zip(dealt, after, strict=True):
                if again:  # as after an iteration that is dropped
                    one.load_state_dict(place)
                assert one.like_current[0].shape == (micro, 32)
                pieces = []
                for _ in range(one.micro_steps):
                    pieces.append(one.current)
                    one.advance()
                whole = [torch.cat(part).split(8) for part in zip(*pieces, strict=True)]
                found.append(list(zip(*whole, strict=True)))
        for number in range(4):
            assert same(found[number % ranks][number // ranks], alone.current)
            alone.advance()


def test_a_micro_batch_that_does_not_divide_the_batch():
    with pytest.raises(ValueError, match="3 neither divides nor joins batches of 8"):
        stream(micro_batch_size=3)


def test_nothing_else_that_draws_moves_the_stream():
    a, b = stream(), stream()
    for _ in range(3):
        torch.rand(7)
        a.advance()
    for _ in range(3):
        b.advance()
    assert same(a.current, b.current)


def test_a_stream_goes_on_from_its_state():
    a = stream()
    for _ in range(3):
        a.advance()
    state, expected = a.state_dict(), [a.current]
    expected += chain(*a.evaluation("val", 2))
    a.advance()
    expected.append(a.current)

    b = stream(start=False)
    torch.manual_seed(5)
    b.start(65)
    b.load_state_dict(state)
    found = [b.current, *chain(*b.evaluation("val", 2))]
    b.advance()
    found.append(b.current)
    assert all(same(p, q) for p, q in zip(found, expected, strict=True))


def write(folder, train=None, val=None):
    for name, tokens in (("train", train), ("val", val)):
        data = np.zeros(100, "<u2") if tokens is None else tokens
        (folder / f"{name}.bin").write_bytes(data if isinstance(data, bytes) else np.asarray(data, "<u2").tobytes())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "train.bin has 0 bytes: expected uint16 tokens"),
        (b"abc", "train.bin has 3 bytes: expected uint16 tokens"),
        (np.zeros(32, "<u2"), "train.bin has 32 tokens: too few for block_size=32, which needs at least 33"),
    ],
)
def test_files_that_cannot_be_tokens(tmp_path, content, sentence):
    write(tmp_path, content)
    with pytest.raises(UsageError, match=sentence):
        stream(str(tmp_path), start=False)


def test_the_shortest_file_that_will_do(tmp_path):
    write(tmp_path, np.arange(33))
    x, y = stream(str(tmp_path)).current
    assert x[0].tolist() == list(range(32))
    assert y[0].tolist() == list(range(1, 33))


def test_a_token_beyond_the_vocabulary_is_named(tmp_path):
    tokens = np.zeros(33)
    tokens[7] = 300
    write(tmp_path, tokens)
    with pytest.raises(UsageError, match="train.bin holds token 300 at position 7, but the vocabulary has 65"):
        stream(str(tmp_path))


def test_missing_data_names_what_to_run(tmp_path):
    (tmp_path / "data" / "mine").mkdir()
    (tmp_path / "data" / "mine" / "prepare.py").touch()
    with pytest.raises(UsageError, match="data/mine/train.bin does not exist: run: python data/mine/prepare.py"):
        stream("data/mine", start=False)
    with pytest.raises(UsageError, match="did you mean --dataset=markov"):
        stream("data/markow", start=False)


class Evil:
    def __reduce__(self):
        return (open, ("ran", "w"))


def test_a_meta_file_that_wants_to_run_code_is_refused(tmp_path):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": Evil()}))
    with pytest.raises(UsageError, match="meta.pkl can't be read .it wants to run"):
        load_meta(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps([1]), pickle.dumps({"vocab_size": "65"})])
def test_a_meta_file_that_is_none(tmp_path, content):
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(UsageError, match="meta.pkl"):
        load_meta(str(tmp_path))


def test_symbols_there_and_back():
    encode, decode, _ = codec_of("data/markov")
    assert decode(encode("HELLO!")) == "HELLO!"
    with pytest.raises(UsageError, match="'é', which is not among the 65 symbols of data/markov/meta.pkl"):
        encode("Hé")


def test_bpe_there_and_back(bpe):
    encode, decode, _ = codec_of(None)
    assert encode("Hello<|endoftext|>") == [15496, 50256]
    assert decode([15496, 50300]) == "Hello", "the padding of the vocabulary stands for nothing"


def test_going_back_to_a_state_repeats_the_batches_that_follow():
    a = stream()
    list(a.evaluation("val", 3))  # which moves the generator beyond the current batch
    state, expected = a.state_dict(), []
    for _ in range(3):
        expected.append(a.current)
        a.advance()
    a.micro_batch_size = 4
    a.load_state_dict(state)
    found = []
    for _ in range(6):
        found.append(a.current)
        a.advance()
    whole = [tuple(torch.cat(pair) for pair in zip(*found[i : i + 2], strict=True)) for i in (0, 2, 4)]
    assert all(same(p, q) for p, q in zip(whole, expected, strict=True))


def test_ranks_share_the_batches_that_one_would_draw():
    alone, *shared = (stream() for _ in range(4))
    expected = list(alone.evaluation("train", 5))
    shares = [list(s.evaluation("train", 5, rank, 3)) for rank, s in enumerate(shared)]
    assert [len(share) for share in shares] == [2, 2, 1]
    dealt = [shares[i % 3][i // 3] for i in range(5)]
    assert all(same(a[0], b[0]) for a, b in zip(dealt, expected, strict=True))
    assert all(torch.equal(s.generator.get_state(), alone.generator.get_state()) for s in shared)


def test_a_state_in_the_middle_of_a_batch_is_a_mistake_of_ours():
    a = stream(micro_batch_size=4)
    a.advance()
    with pytest.raises(AssertionError, match="an iteration ends with its last batch"):
        a.state_dict()


@pytest.mark.parametrize(("per_iter", "micro", "micro_steps"), [(1, 8, 1), (5, 8, 5), (5, 2, 20), (3, 1, 24)])
def test_micro_steps_of_an_iteration(per_iter, micro, micro_steps):
    assert stream(per_iter=per_iter, micro_batch_size=micro).micro_steps == micro_steps


def test_random_batches_stand_in_for_a_data_set():
    looks = []
    made = RandomBatch(3, 5, 65, CPU, micro_steps=2, on_current=lambda: looks.append(1))
    x, y = made.current
    assert x.shape == y.shape == (3, 5)
    assert 0 <= min(x.min(), y.min()) < max(x.max(), y.max()) < 65
    made.advance()
    assert same(made.current, RandomBatch(3, 5, 65, CPU).current)
    assert len(looks) == 2
    assert [len(list(made.evaluation("val", 5, rank, 2))) for rank in (0, 1)] == [3, 2]


@pytest.mark.parametrize("change", ["shortened", "replaced", "removed", "cut while it is read"])
def test_data_that_changes_in_mid_run(tmp_path, monkeypatch, change):
    write(tmp_path, np.zeros(1000))
    a = stream(str(tmp_path))
    path = tmp_path / "train.bin"
    if change == "removed":
        path.unlink()
        sentence = "train.bin does not exist"
    elif change == "cut while it is read":
        monkeypatch.setattr("nanofit.batches._count_tokens", lambda *_: a._files["train"][:2])
        path.write_bytes(b"")
        sentence = r"train.bin ends before token [\d,]+: it was cut short in mid-run"
    else:
        os.utime(path, (1, 1))
        a.advance()  # a file that was only touched is the same
        np.ones(500 if change == "shortened" else 1000, "<u2").tofile(path)
        os.utime(path, (2, 2))
        sentence = r"train.bin has changed since the run began \(it had 1,000 tokens"
    with pytest.raises(UsageError, match=sentence):
        a.advance()
