"""meta.pkl, however damaged: it is used, or refused in a UsageError, and nothing in it runs."""

import itertools
import os
import pickle
import random
from pathlib import Path

import pytest

from nanofit import codec
from nanofit.errors import UsageError

SYMBOLS = "abcdefghijklmn\u00e9"
META = {"vocab_size": 15, "stoi": {s: i for i, s in enumerate(SYMBOLS)}, "itos": dict(enumerate(SYMBOLS))}


def damage(original, seed):
    """The bytes of a file cut short, or with a bit flipped, or with a piece replaced by other bytes."""
    draw, data = random.Random(seed), bytearray(original)
    place, kind = draw.randrange(len(data)), draw.choice(("cut", "flip", "flip", "replace"))
    if kind == "cut":
        return bytes(data[:place])
    if kind == "flip":
        data[place] ^= 1 << draw.randrange(8)
    else:
        data[place : place + draw.randrange(9)] = draw.randbytes(draw.randrange(9))
    return bytes(data)


class Evil:
    """Pickled, it is a call of this function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def use_meta(data):
    """Read and use meta.pkl of these bytes, as train.py and sample.py do."""
    Path("meta.pkl").write_bytes(data)
    try:
        meta, made = codec.load_meta("."), codec.codec_of(".")
        ids = made.encode("ab")
    except UsageError as error:
        sentence = str(error)
    else:
        assert all(0 <= i < meta["vocab_size"] for i in ids)
        assert isinstance(made.decode(range(100)), str)
        return "works"
    assert "meta.pkl" in sentence
    assert len(sentence) < 400, "what was given may have thousands of characters"
    return "refused"


@pytest.mark.parametrize(
    "evil", [Evil(os.system, "touch ran"), Evil(eval, "open('ran', 'w')"), Evil(open, "ran", "w")], ids=range(3)
)
def test_a_meta_file_that_wants_to_run_something(evil):
    for value, protocol in itertools.product((evil, [(evil,)]), range(6)):
        use_meta(pickle.dumps({**META, "x": value}, protocol))
    assert not os.path.exists("ran")


def test_a_meta_file_that_is_damaged():
    originals = [pickle.dumps(meta, n) for meta in (META, {**META, "itos": list(SYMBOLS)}) for n in range(6)]
    ends = {use_meta(damage(original, seed)) for original in originals for seed in range(20)}
    assert ends == {"works", "refused"}
