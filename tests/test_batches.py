"""The stream of batches: nanoGPT's order, micro-batches, going on, and bad files."""

import json
import os
import pickle
import shutil
from collections import OrderedDict

import numpy as np
import pytest
import torch

from nanofit.batches import Batches
from nanofit.codec import codec_of, differs, load_meta
from nanofit.errors import UsageError
from nanofit.tokens import TokenFile, open_data, token_type

CPU = torch.device("cpu")


def stream(folder="data/markov", vocab_size=65, seed=1337, **sizes):
    data = open_data(folder, 32, vocab_size)
    torch.manual_seed(seed)
    return Batches(data, **{**dict(batch_size=8, device=CPU), **sizes})


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


@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (1, 16), (4, 8), (2, 2), (2, 16)])
def test_batches_cut_joined_and_dealt_are_those_of_one_process_with_evaluations_in_between(ranks, micro):
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
                torch.rand(7)  # whatever else draws
                whole = [torch.cat(part).split(8) for part in zip(*pieces, strict=True)]
                found.append(list(zip(*whole, strict=True)))
        for number in range(4):
            assert same(found[number % ranks][number // ranks], alone.current)
            alone.advance()


def test_missing_data_names_what_to_run_or_what_was_meant(tmp_path):
    (tmp_path / "data" / "mine").mkdir()
    (tmp_path / "data" / "mine" / "prepare.py").touch()
    (tmp_path / "data" / "noval").mkdir()
    shutil.copy("data/markov/train.bin", "data/noval")
    for folder, sentence in (
        ("data/mine", "data/mine/train.bin does not exist: run: python data/mine/prepare.py"),
        ("data/markow", "did you mean --dataset=markov"),
        ("data/data/markov", "did you mean --dataset=markov"),
        ("data/noval", "data/noval/val.bin does not exist: there is no data/noval/prepare.py that could make it"),
        ("data/novel", "data/novel/train.bin does not exist: there is no data/novel/prepare.py"),
    ):
        with pytest.raises(UsageError, match=sentence):
            stream(folder)


def test_a_start_in_another_folder_is_told(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="does not exist: there is no folder data in .*elsewhere: start beside it"):
        stream("data/markov")


def write_ids(folder, kind, ids):
    for split in ("train", "val"):
        np.asarray(ids, kind).tofile(folder / f"{split}.bin")
    return str(folder)


def ids_below(vocab_size, count=4000, least=0):
    return np.random.default_rng(0).integers(least, vocab_size, count)


@pytest.mark.parametrize("kind", ["<u2", "<u4", "<i4", "<i8"])
@pytest.mark.parametrize("vocab_size", [2, 65536, 100_277])
def test_ids_of_any_width_are_read_as_what_they_are(tmp_path, kind, vocab_size):
    if kind == "<u2" and vocab_size > 65536:  # its file may hold the smaller ids alone
        assert token_type(write_ids(tmp_path, kind, ids_below(300)) + "/train.bin", vocab_size) == np.dtype(kind)
        return
    ids = ids_below(vocab_size)
    folder = write_ids(tmp_path, kind, ids)
    data = open_data(folder, 32, vocab_size)["val"]
    assert data.tokens == 4000
    assert data.read(torch.tensor([7])).tolist() == [ids[7:40].tolist()]


@pytest.mark.parametrize("named", ["uint8", np.uint32, np.dtype("int64")], ids=str)
@pytest.mark.parametrize("name", ["meta.pkl", "prepared.json"])
def test_the_type_that_the_data_set_names_is_believed(tmp_path, named, name):
    folder = write_ids(tmp_path, named, ids_below(65, least=1))
    if name == "meta.pkl":
        write_meta(tmp_path, vocab_size=65, dtype=named)
    else:
        (tmp_path / name).write_text(json.dumps({"dtype": np.dtype(named).name}))
    assert open_data(folder, 32, 65)["train"].tokens == 4000


@pytest.mark.parametrize(
    ("kind", "ids", "named", "says"),
    [
        ("<u4", ids_below(100_277), None, "it looks like uint32"),  # of another tokenizer
        ("<u2", ids_below(65), "uint32", "it looks like uint16"),
        ("<u4", ids_below(65)[:1999], "int64", "it looks like uint32"),
    ],
    ids=["larger than the vocabulary", "narrower than named", "of another size than named"],
)
def test_a_file_that_cannot_be_what_it_is_taken_for(tmp_path, kind, ids, named, says):
    folder = write_ids(tmp_path, kind, ids)
    if named:
        write_meta(tmp_path, vocab_size=65, dtype=named)
    with pytest.raises(UsageError, match=f"train.bin h.*{says}"):
        stream(folder, vocab_size=50304 if named is None else 65)


class Tokenizer:
    """Somebody's, which making runs something."""

    def __reduce__(self):
        return (open, ("ran", "w"))


def write_meta(folder, protocol=None, **meta):
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
    return str(folder)


def test_training_needs_vocab_size_alone_whatever_else_there_is(tmp_path):
    for vocab_size, protocol in ((65, None), (np.int64(65), 2), (np.uint16(65), None)):
        more = dict(tokenizer=Tokenizer(), table=np.arange(3))
        meta = load_meta(write_meta(tmp_path, protocol, vocab_size=vocab_size, **more))
        assert type(meta["vocab_size"]) is int
        assert meta["vocab_size"] == 65
    assert not os.path.exists("ran")


def test_the_longest_symbol_that_fits_is_taken(tmp_path):
    stoi = OrderedDict({"a": np.int64(0), "ab": 1, "b": 2, "abcd": 3, "<end>": 4, "<": 5, "c": 6})
    codec = codec_of(write_meta(tmp_path, vocab_size=7, stoi=stoi))
    assert codec.encode("abcabcd<<end>ba") == [1, 6, 3, 5, 4, 2, 0]
    assert codec.decode([1, 6, 3, 5, 4, 2, 0]) == "abcabcd<<end>ba"
    with pytest.raises(UsageError, match="the 7 symbols of .* lack 'd', 'e': use only"):
        codec.encode("ade")


def test_what_no_text_has_is_left_out_of_the_symbols(tmp_path):
    stoi, itos = {"a": 0, "b": 1, "<pad>": -1, "<unk>": 3, 2: 2}, {0: "a", 1: "b", 2: None, 3: "<unk>"}
    for tables in (dict(stoi=stoi), dict(itos=itos), dict(stoi=stoi, itos=itos)):
        codec = codec_of(write_meta(tmp_path, vocab_size=3, **tables))
        assert codec.encode("abba") == [0, 1, 1, 0]
        assert codec.decode([0, 1, 2]) == "ab"
    for nothing in (dict(stoi={"a": 5}), dict(itos=[None]), dict(stoi={"a": 0.5}), dict(itos={"0": "a"})):
        with pytest.raises(UsageError, match="stoi must give the id of each symbol"):
            codec_of(write_meta(tmp_path, vocab_size=3, **nothing))


def test_symbols_must_fit_the_model(tmp_path):
    assert codec_of("data/markov", 65)
    assert codec_of("data/markov", 128), "padded"
    with pytest.raises(UsageError, match="vocabulary of 64, and data/markov/meta.pkl has 65 symbols"):
        codec_of("data/markov", 64)
    with pytest.raises(UsageError, match="vocabulary of 65, and GPT-2 BPE has 50,257 symbols: data/x/meta.pkl is not"):
        codec_of("data/x", 65)
    with pytest.raises(UsageError, match="vocabulary of 100,288, and GPT-2 BPE has 50,257 symbols: data/x/meta.pkl"):
        codec_of("data/x", 100_288)  # of another tokenizer, which was left behind
    assert differs(load_meta("data/markov"), 65) == differs(None, 65) == []
    assert "names 65 symbols, and the model has a vocabulary of 50,257" in differs({"vocab_size": 65}, 50257)[0]


class Noted(TokenFile):
    """A file that keeps where the sequences begin that are drawn from it."""

    def draw(self, count, generator):
        starts = super().draw(count, generator)
        self.drawn = [*getattr(self, "drawn", []), *starts.tolist()]
        return starts


def iteration(parts):
    """What ranks train on in an iteration: where each sequence begins, in the order in which batches are dealt.

    A sequence's first token must tell where it begins.
    """
    seen = []
    for part in parts:
        list(part.evaluation("val", 2))  # which draws from the same stream
        taken = []
        for _ in range(part.micro_steps):
            taken += part.current[0][:, 0].tolist()
            part.advance()
        seen.append([taken[i : i + part.batch_size] for i in range(0, len(taken), part.batch_size)])
    return [start for together in zip(*seen, strict=True) for batch in together for start in batch]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("sizes", [(4, 8), (4, 8, 2, 16), (12, 5, 8)], ids=str)
def test_each_sequence_is_trained_on_once_however_batches_are_cut_on_resuming(tmp_path, sizes, ranks):
    """Twice 4 go on as once 8, and so on."""
    folder = write_ids(tmp_path, "<u2", np.arange(60_000))
    drawn, trained, state = [], [], None
    for size in sizes:
        parts = []
        for rank in range(ranks):
            data = {split: Noted(f"{folder}/{split}.bin", 32, 65536) for split in ("train", "val")}
            torch.manual_seed(1337)
            parts.append(Batches(data, batch_size=size, device=CPU, per_iter=4 // ranks, rank=rank, ranks=ranks))
            if state:
                data["train"].drawn = []
                parts[-1].load_state_dict(state)
        for _ in range(3):
            trained += iteration(parts)
            state = parts[0].state_dict()
            assert all(same(part.state_dict().values(), state.values()) for part in parts)
        drawn += parts[0].data["train"].drawn
    assert trained + state["starts"].tolist() == drawn


@pytest.mark.parametrize("change", ["shortened", "replaced", "removed", "cut while it is read"])
def test_data_that_changes_in_mid_run(tmp_path, monkeypatch, change):
    a = stream(write_ids(tmp_path, "<u2", np.zeros(1000)))
    path = tmp_path / "train.bin"
    if change == "removed":
        path.unlink()
        sentence = "train.bin does not exist"
    elif change == "cut while it is read":
        monkeypatch.setattr(TokenFile, "_look", lambda file: (file.tokens, file._changed))
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
