"""Whatever a user hands over, however odd or damaged: it works, or ends in a UsageError, and nothing in it runs."""

import contextlib
import io
import itertools
import os
import pickle
import random
from functools import partial
from pathlib import Path

import pytest
import torch

from configurator import configure
from nanofit import checkpoint, codec
from nanofit.errors import UsageError

WORKS, REFUSED = "works", "refused"


def end_of(action, name):
    """(WORKS or REFUSED, what action returned): where it raises a UsageError, that must say where to look."""
    try:
        return WORKS, action()
    except UsageError as error:
        sentence = str(error)
    assert name in sentence
    assert len(sentence) < 400, "what was given may have thousands of characters"
    return REFUSED, None


def damage(original, seed):
    """The bytes of a file cut short, or with a bit or two flipped, or with a piece replaced by other bytes."""
    draw, data = random.Random(seed), bytearray(original)
    # What tells how to read a file stands at its ends, so half of the damage is done there.
    end = min(len(data), 200)
    place = draw.choice((draw.randrange(end), len(data) - 1 - draw.randrange(end), *draw.sample(range(len(data)), 2)))
    kind = draw.choice(("cut", "flip", "flip", "replace"))
    if kind == "cut":
        return bytes(data[:place])
    if kind == "replace":
        data[place : place + draw.randrange(9)] = draw.randbytes(draw.randrange(9))
        return bytes(data)
    for _ in range(draw.choice((1, 2))):
        data[place] ^= 1 << draw.randrange(8)
        place = min(place + draw.randrange(20), len(data) - 1)
    return bytes(data)


class Evil:
    """Pickled, it is a call of this function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


EVIL = (Evil(os.system, "touch ran"), Evil(eval, "open('ran', 'w')"), Evil(open, "ran", "w"))


def evil_pickles(holder):
    """Pickles of holder, a dict, in which something wants to run: as a value, or within one."""
    for evil, protocol in itertools.product(EVIL, range(6)):
        yield from (pickle.dumps({**holder, "x": x}, protocol) for x in (evil, [(evil,)]))


@pytest.fixture(autouse=True)
def nothing_ran():
    yield
    assert not os.path.exists("ran")


# ---- values of keys ----------------------------------------------------------------------------------------

DEFAULTS = {"batch_size": 12, "learning_rate": 6e-4, "compile": True, "out_dir": "out"}
ODD_LITERALS = (
    "", " 1", "1 # one", "1_0", "-0", "1e3", "1.5", "1e999", "nan", "inf", "-True", "None", "...", "1+2j", "b'x'",
    "'\\ud800'", "\ud800", "\0", "\uff11", "\\", "'", "x=y", "{[]}", "{[]: 1}", "{**{}}", "set()", "f'{1}'",
    "9" * 400, "9" * 5000, "9" * 400 + "+1j", "0x" + "f" * 5000, "2**64", str(2**64), "(" * 300, "-" * 9000 + "1",
    "1+" * 3000 + "1", "not " * 3000 + "1", "False", "false", "0", "10 ** 5000", "float('nan')", "[]", "print",
)  # fmt: skip
ODD_LINES = (
    "x = []\nfor _ in range(9999): x = [x]\nbatch_size = x", "del batch_size", "batch_size: int = 5", "raise KeyError",
    "globals()['batch_size'] = 'x'", "globals().clear()", "__builtins__ = None", "exec('batch_size = (')", "return",
    "import math as out_dir", "batch_size = batch_size", "def batch_size(): pass", "print = 3", "raise SyntaxError",
    "import numpy\nbatch_size = numpy.arange(3)", "\udcff", "\ufeffbatch_size = 3", "from nowhere import *",
)  # fmt: skip


def configured(argument):
    """configure() for a script with the keys of DEFAULTS. Output is UTF-8 and strict, as on a terminal."""
    names = {"__file__": "train.py", "print": print, **DEFAULTS}
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")), contextlib.redirect_stderr(io.StringIO()):
        config, _ = configure(names, [argument])
    assert {key: type(value) for key, value in config.items()} == {k: type(v) for k, v in DEFAULTS.items()}
    assert names["print"] is print
    return config


def written(text):
    Path("a.py").write_bytes(f"{text}\n".encode("utf-8", "surrogatepass"))
    return end_of(partial(configured, "a.py"), "a.py")


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_any_odd_value_of_any_key_is_taken_or_refused():
    ends = [written(line)[0] for line in ODD_LINES]
    for key, text in itertools.product(DEFAULTS, ODD_LITERALS):
        end, typed = end_of(partial(configured, f"--{key}={text}"), key)
        ends.append(end)
        in_file = written(f"{key} = {text}")[1]
        assert not (typed and in_file) or key == "out_dir" or typed[key] == in_file[key]
    assert {WORKS, REFUSED} == set(ends)


# ---- meta.pkl ----------------------------------------------------------------------------------------------

SYMBOLS = "abcdefghijklmn\u00e9"
META = {"vocab_size": 15, "stoi": {s: i for i, s in enumerate(SYMBOLS)}, "itos": dict(enumerate(SYMBOLS))}


def use_meta(data):
    """Read and use meta.pkl of these bytes, as train.py and sample.py do."""
    Path("meta.pkl").write_bytes(data)
    end, meta = end_of(partial(codec.load_meta, "."), "meta.pkl")
    made = meta and end_of(partial(codec.codec_of, "."), "meta.pkl")[1]
    if made:
        assert meta["vocab_size"] > 0
        assert isinstance(made.decode(range(100)), str)
        ids = end_of(partial(made.encode, "ab"), "meta.pkl")[1]
        assert ids is None or all(0 <= i < meta["vocab_size"] for i in ids)
    return end


def test_a_meta_file_that_is_damaged_or_wants_to_run_something():
    for data in evil_pickles(META):
        use_meta(data)
    originals = [pickle.dumps(meta, n) for meta in (META, {**META, "itos": list(SYMBOLS)}) for n in range(6)]
    ends = {use_meta(damage(original, seed)) for original in originals for seed in range(12)}
    assert ends == {WORKS, REFUSED}


# ---- checkpoints -------------------------------------------------------------------------------------------


def good_checkpoint():
    """What train.py saves, with two small weights."""
    weights = {"_orig_mod.a": torch.ones(4, 2), "_orig_mod.b": torch.ones(2)}
    optimizer = torch.optim.AdamW([torch.nn.Parameter(w) for w in weights.values()])
    state = torch.get_rng_state()
    return {
        "model": weights, "optimizer": optimizer.state_dict(), "model_args": dict(n_layer=1, n_head=1, n_embd=2),
        "iter_num": 5, "best_val_loss": torch.tensor(1.5), "config": {"dataset": "markov"},
        "rng": [{"data": {"before": state}, "generators": {"cpu": state}}],
    }  # fmt: skip


def saved(value, zipped=True):
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def load(data):
    """Load ckpt.pt with these bytes."""
    Path("ckpt.pt").write_bytes(data)
    end, found = end_of(lambda: checkpoint.load(".", for_training=True), "ckpt.pt")
    assert found is None or set(checkpoint.OF_A_RUN) <= set(found)
    return end


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_a_checkpoint_that_is_damaged_or_wants_to_run_something():
    good = good_checkpoint()
    originals = [saved(good), saved({**good, "rng": []}), saved(good, zipped=False)]
    assert {load(damage(original, seed)) for original in originals for seed in range(50)} == {WORKS, REFUSED}
    by_torch = [saved({**good, key: [x]}, z) for key, x, z in itertools.product(good, EVIL, (True, False))]
    assert {load(data) for data in [*by_torch, *evil_pickles({"a": 1})]} == {REFUSED}
