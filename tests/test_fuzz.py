"""Whatever a user hands over, however odd or damaged: it works, or ends in a UsageError, and nothing in it runs."""

import contextlib
import io
import itertools
import os
import pickle
import random
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configurator import configure
from nanofit import checkpoint, codec
from nanofit.batches import Batches
from nanofit.errors import UsageError
from nanofit.tokens import open_data

CPU = torch.device("cpu")


def cases(count):
    """This many cases, the same ones each time."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


def result_of(seen, action, names):
    """What action returns; None where it raises a UsageError, whose sentence must name one of names."""
    try:
        result, sentence = action(), None
    except UsageError as error:
        result, sentence = None, str(error)
    named = sentence is None or (any(name in sentence for name in names) and "line None" not in sentence)
    assert named, f"{sentence!r} does not say where to look: {names}"
    seen["works" if sentence is None else "refused"] += 1
    seen["longest sentence"] = max(seen["longest sentence"], len(sentence or ""))
    return result


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


def damaged(*originals):
    """One of originals with damage; or, now and then, bytes that never were a file."""
    seeds = st.integers(0, 2**32 - 1)
    return st.builds(
        lambda original, seed: damage(original, seed) if seed % 8 else random.Random(seed).randbytes(seed // 8 % 32),
        st.sampled_from(originals),
        seeds,
    )


# ---- configuration -----------------------------------------------------------------------------------------

DEFAULTS = {"batch_size": 12, "learning_rate": 6e-4, "compile": True, "out_dir": "out"}
ODD_LITERALS = (
    "", " 1", "1 # one", "1_0", "-0", "1e3", "1.5", "1e999", "nan", "inf", "-True", "None", "...", "1+2j", "b'x'",
    "'\\ud800'", "\ud800", "\0", "\uff11", "\\", "'", "x=y", "{[]}", "{[]: 1}", "{**{}}", "set()", "f'{1}'",
    "9" * 400, "9" * 5000, "9" * 400 + "+1j", "0x" + "f" * 5000, "[0x" + "f" * 5000 + "]", "2**64", str(2**64),
    "(" * 300, "[" * 90 + "]" * 90, "-" * 9000 + "1", "-0x" + "f" * 5000, "1+" * 3000 + "1", "not " * 3000 + "1",
    "False", "false", "0",
)  # fmt: skip


def configured(argv):
    """configure() for a script with the keys of DEFAULTS. Output is UTF-8 and strict, as on a terminal."""
    names = {"__file__": "train.py", "print": print, **DEFAULTS}
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        config, given_keys = configure(names, argv)
    assert {key: type(value) for key, value in config.items()} == {k: type(v) for k, v in DEFAULTS.items()}
    assert given_keys <= set(DEFAULTS)
    assert names["print"] is print
    return config


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_any_odd_value_of_any_key_is_taken_or_refused():
    seen = Counter()
    for key, text in itertools.product(DEFAULTS, ODD_LITERALS):
        typed = result_of(seen, partial(configured, [f"--{key}={text}"]), [key])
        Path("a.py").write_bytes(f"{key} = {text}\n".encode("utf-8", "surrogatepass"))
        written = result_of(seen, lambda: configured(["a.py"]), ["a.py"])
        assert not (typed and written) or key == "out_dir" or typed[key] == written[key]
    assert min(seen["works"], seen["refused"]) >= 20
    assert seen["longest sentence"] < 400, "what was given may have thousands of characters"


def test_a_value_written_as_python_writes_it_arrives():
    whole, real = st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False, allow_infinity=False)
    plain = st.text(st.characters(codec="utf-8", exclude_characters="\0~"))  # ~ is the home folder

    @cases(60)
    @given(st.tuples(whole, real, st.booleans(), plain))
    def check(values):
        expected = dict(zip(DEFAULTS, values, strict=True))
        assert configured([f"--{key}={value!r}" for key, value in expected.items()]) == expected
        Path("typed.py").write_text("".join(f"{key} = {value!r}\n" for key, value in expected.items()), "utf-8")
        assert configured(["typed.py"]) == expected

    check()


ODD_LINES = (
    "batch_size = 10 ** 5000", "learning_rate = 10 ** 400", "compile = 10 ** 5000", "out_dir = 10 ** 5000",
    "x = []\nfor _ in range(9999): x = [x]\nbatch_size = x", "del batch_size", "batch_size: int = 5",
    "globals()['batch_size'] = 'x'", "globals().clear()", "__builtins__ = None", "raise KeyError",
    "from nowhere import *", "exec('batch_size = (')", "if 1:", "return", "yield", "import math as out_dir",
    "batch_size = batch_size", "learning_rate = float('nan')", "compile = None", "def batch_size(): pass",
    "print = 3", "x = \0", "raise SyntaxError", "(" * 300, "batch_size = " + "1+" * 3000 + "1",
    "out_dir = '\\ud800'", "import numpy\nbatch_size = numpy.arange(3)", "\udcff", "\ufeffbatch_size = 3",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_any_line_of_a_config_file_configures_or_is_refused():
    seen = Counter()
    for line in ODD_LINES:
        Path("a.py").write_bytes(line.encode("utf-8", "surrogatepass"))
        config = result_of(seen, lambda: configured(["a.py"]), ["a.py"])
        assert config is None or set(config) == set(DEFAULTS)
    assert min(seen["works"], seen["refused"]) >= 5


# ---- pickles that want to run something --------------------------------------------------------------------


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


def nothing_ran():
    return not os.path.exists("ran")


# ---- meta.pkl ----------------------------------------------------------------------------------------------

SYMBOLS = "abcdefghijklmn\u00e9"
META = {"vocab_size": 15, "stoi": {s: i for i, s in enumerate(SYMBOLS)}, "itos": dict(enumerate(SYMBOLS))}


def use_meta(seen, data):
    """Read and use meta.pkl of these bytes, as train.py and sample.py do."""
    Path("meta.pkl").write_bytes(data)
    meta = result_of(seen, lambda: codec.load_meta("."), ["meta.pkl"])
    made = meta and result_of(Counter(), lambda: codec.codec_of("."), ["meta.pkl"])
    assert nothing_ran()
    if made:
        assert type(meta["vocab_size"]) is int
        assert meta["vocab_size"] > 0
        assert isinstance(made.decode(range(100)), str)
        ids = result_of(Counter(), lambda: made.encode("ab"), ["meta.pkl"])
        assert ids is None or all(0 <= i < meta["vocab_size"] for i in ids)


def test_a_meta_file_that_wants_to_run_something_runs_nothing():
    for data in evil_pickles(META):
        use_meta(Counter(), data)


def test_a_damaged_meta_file_works_or_is_refused():
    seen = Counter()
    originals = [pickle.dumps(meta, n) for meta in (META, {**META, "itos": list(SYMBOLS)}) for n in range(6)]

    @cases(100)
    @given(damaged(*originals))
    def check(data):
        use_meta(seen, data)

    check()
    assert min(seen["works"], seen["refused"]) >= 5


# ---- checkpoints -------------------------------------------------------------------------------------------

TYPES = {"model": dict, "model_args": dict, "iter_num": int}


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


def load(data, seen):
    """Load ckpt.pt with these bytes: a UsageError, or all that a run goes on with."""
    Path("ckpt.pt").write_bytes(data)
    found = result_of(seen, lambda: checkpoint.load(".", for_training=True), ["ckpt.pt"])
    assert found is None or all(isinstance(found[name], TYPES.get(name, object)) for name in checkpoint.OF_A_RUN)
    assert nothing_ran()


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_a_damaged_checkpoint_loads_or_is_refused():
    seen, good = Counter(), good_checkpoint()
    originals = [saved(good), saved({**good, "rng": []}), saved(good, zipped=False), pickle.dumps({"a": 1})]

    @cases(150)
    @given(damaged(*originals))
    def check(data):
        load(data, seen)

    check()
    assert min(seen["works"], seen["refused"]) >= 5


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_a_checkpoint_that_wants_to_run_something_is_refused():
    good, seen = good_checkpoint(), Counter()
    by_torch = [saved({**good, key: [x]}, z) for key, x, z in itertools.product(good, EVIL, (True, False))]
    for data in [*by_torch, *evil_pickles({"a": 1})]:
        load(data, seen)
    assert seen["works"] == 0


# ---- token files -------------------------------------------------------------------------------------------


def test_any_token_files_give_batches_or_are_refused():
    seen = Counter()
    small = st.binary(max_size=40).map(lambda data: (np.frombuffer(data, "u1") % 10).astype("<u2").tobytes())
    content = small | small | st.binary(max_size=80)

    @cases(200)  # what hypothesis draws depends on constants in the code
    @given(content, content, st.integers(1, 12), st.integers(8, 2**17))
    def check(train, val, block_size, vocab_size):
        Path("train.bin").write_bytes(train)
        Path("val.bin").write_bytes(val)

        def use():
            batches = Batches(open_data(".", block_size, vocab_size), batch_size=4, device=CPU, micro_batch_size=2)
            found = [batches.current]
            batches.advance()
            of_val = [micro_batch for batch in batches.evaluation("val", 2) for micro_batch in batch]
            return [*found, batches.current, *of_val]

        for x, y in result_of(seen, use, ["train.bin", "val.bin"]) or ():
            assert x.shape == y.shape == (2, block_size)
            assert x.dtype == y.dtype == torch.int64
            assert torch.equal(x[:, 1:], y[:, :-1])
            assert min(x.min(), y.min()) >= 0
            assert max(x.max(), y.max()) < vocab_size

    check()
    assert min(seen["works"], seen["refused"]) >= 5
