"""Whatever a user hands over, however odd or damaged: it works, or ends in a UsageError, and nothing in it runs."""

import contextlib
import copy
import copyreg
import io
import itertools
import os
import pickle
import random
import struct
import sys
import zipfile
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configurator import configure
from nanofit import checkpoint as checkpoints
from nanofit import codec
from nanofit.autofit.plan import Plan
from nanofit.batches import Batches
from nanofit.errors import UsageError
from nanofit.models import SIZES as MODEL_KEYS
from nanofit.tokens import open_data
from nanofit.units import MemoryLevers

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
ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | st.text() | st.binary()
NESTED = st.recursive(ATOMS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)
VALUES = st.sampled_from(ODD_LITERALS) | NESTED.map(repr) | st.text()
NAMES = st.sampled_from([*DEFAULTS, "batchsize", "top_k", "print", "__file__", "", "-"]) | st.text(max_size=5)
ARGUMENTS = (
    st.builds("--{}={}".format, st.sampled_from(list(DEFAULTS)), VALUES)
    | st.builds("{}{}{}".format, st.sampled_from(("", "-", "--")), NAMES, st.just("=") | VALUES)
    | st.binary(max_size=9).map(os.fsdecode)
    | st.sampled_from(("-h", "--help", ".", "/", "data", "a/../b.py", "x" * 5000, "\udcff.py"))
)


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


@pytest.fixture
def quiet_hook(monkeypatch):
    """configure() replaces the hook for uncaught exceptions."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_any_command_line_configures_or_is_refused(quiet_hook):
    seen = Counter()
    names = [*DEFAULTS, "config file", "has no key", "has no value"]

    @cases(400)
    @given(st.lists(ARGUMENTS, max_size=2))
    def check(argv):
        try:
            config, code = result_of(seen, lambda: configured(argv), names), None
        except SystemExit as stop:
            config, code = None, stop.code
        assert config is None or set(config) == set(DEFAULTS)
        assert code is None or (code == 0 and {"-h", "--help"} & set(argv))

    check()
    assert min(seen["works"], seen["refused"]) >= 10


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_any_odd_value_of_any_key_is_taken_or_refused(quiet_hook):
    seen = Counter()
    for key, text in itertools.product(DEFAULTS, ODD_LITERALS):
        typed = result_of(seen, partial(configured, [f"--{key}={text}"]), [key])
        Path("a.py").write_bytes(f"{key} = {text}\n".encode("utf-8", "surrogatepass"))
        written = result_of(seen, lambda: configured(["a.py"]), ["a.py"])
        assert not (typed and written) or key == "out_dir" or typed[key] == written[key]
    assert min(seen["works"], seen["refused"]) >= 20
    assert seen["longest sentence"] < 400, "what was given may have thousands of characters"


def test_a_value_written_as_python_writes_it_arrives(quiet_hook):
    whole, real = st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False, allow_infinity=False)

    @cases(150)
    @given(st.tuples(whole, real, st.booleans(), st.text()))
    def check(values):
        expected = dict(zip(DEFAULTS, values, strict=True))
        assert configured([f"--{key}={value!r}" for key, value in expected.items()]) == expected
        Path("typed.py").write_text("".join(f"{key} = {value!r}\n" for key, value in expected.items()), "utf-8")
        assert configured(["typed.py"]) == expected

    check()


GOOD_CONFIG = b"# a run\nbatch_size = 4 * 8\nlearning_rate = 1e-3\ncompile = False\nout_dir = 'out-' + 'x'\n"
LINES = st.builds("{} = {}".format, NAMES, VALUES) | st.sampled_from(
    (
        "batch_size = 10 ** 5000", "learning_rate = 10 ** 400", "compile = 10 ** 5000", "out_dir = 10 ** 5000",
        "x = []\nfor _ in range(9999): x = [x]\nbatch_size = x", "del batch_size", "del out_dir", "batch_size: int = 5",
        "globals()['batch_size'] = 'x'", "globals().clear()", "__builtins__ = None", "raise KeyError",
        "from nowhere import *", "exec('batch_size = (')", "if 1:", "return", "yield", "import math as out_dir",
        "batch_size = batch_size", "learning_rate = float('nan')", "compile = None", "def batch_size(): pass",
        "print = 3", "x = \0", "raise SyntaxError", "raise SyntaxError('x')",
        "(" * 300, "batch_size = " + "-" * 3000 + "1", "batch_size = " + "1+" * 3000 + "1", "out_dir = '\\ud800'",
    )
)  # fmt: skip


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_any_config_file_configures_or_is_refused(quiet_hook):
    seen = Counter()
    texts = st.lists(LINES, max_size=3).map(lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass"))

    @cases(300)
    @given(texts | damaged(GOOD_CONFIG))
    def check(content):
        Path("a.py").write_bytes(content)
        config = result_of(seen, lambda: configured(["a.py"]), ["a.py"])
        assert config is None or set(config) == set(DEFAULTS)

    check()
    assert min(seen["works"], seen["refused"]) >= 20


def test_a_folder_that_may_not_be_listed_hides_its_files_and_no_more(quiet_hook):
    if os.geteuid() == 0:
        pytest.skip("root may list every folder")
    os.mkdir("closed", 0o300)
    try:
        for wanted in (
            lambda: configured(["closed/a.py"]),
            lambda: open_data("closed/x", 1, 65),
        ):
            with pytest.raises(UsageError, match="does not exist"):
                wanted()
    finally:
        os.chmod("closed", 0o700)


# ---- pickles that want to run something --------------------------------------------------------------------


class Spy:
    """Remembers that it was called in any of the ways in which a pickle can call."""

    calls = ()

    def __new__(cls, *args, **keys):
        cls.calls += ("made",)
        return super().__new__(cls)

    def __setstate__(self, state):
        Spy.calls += ("restored",)


class Evil:
    """Pickled, it is a call of this function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def nothing_ran():
    return not Spy.calls and not os.path.exists("ran")


def string(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def opcode_programs():
    """Pickles of Spy() put together by hand, one for each way in which an opcode imports or calls."""
    module = Spy.__module__
    spy = f"c{module}\nSpy\n".encode()
    return [
        spy + b")R",  # REDUCE
        string(module) + string("Spy") + b"\x93)R",  # STACK_GLOBAL
        f"(i{module}\nSpy\n".encode(),  # INST
        b"(" + spy + b"o",  # OBJ
        spy + b")\x81",  # NEWOBJ
        spy + b")}\x92",  # NEWOBJ_EX
        spy + b")\x81" + string("state") + b"b",  # BUILD
        b"\x82\xc8)R",  # EXT1
        b"\x83\xc8\0)R",  # EXT2
        b"\x84\xc8\0\0\0)R",  # EXT4
        f"P{module}.Spy\n".encode(),  # PERSID
        string(f"{module}.Spy") + b"Q",  # BINPERSID
    ]


EVIL_OBJECTS = st.sampled_from(
    (Evil(os.system, "touch ran"), Evil(eval, "open('ran', 'w')"), Evil(open, "ran", "w"), Evil(Spy), Evil(Spy, 1))
)


def evil_pickles(holder):
    """Pickles of holder, a dict, in which something at any depth wants to run."""
    deeper = st.sampled_from((lambda x: [x], lambda x: (x, x), lambda x: {"a": x}, lambda x: [0, {1: x}]))
    nested = st.recursive(EVIL_OBJECTS, lambda inner: st.builds(lambda way, x: way(x), deeper, inner), max_leaves=3)
    dumped = st.builds(lambda x, protocol: pickle.dumps({**holder, "x": x}, protocol), nested, st.integers(0, 5))
    start = pickle.dumps(holder, 2)[:-1]
    # As a value, popped again at once, as a key.
    ways = st.sampled_from((lambda p: string("x") + p + b"s", lambda p: p + b"0", lambda p: p + string("v") + b"s"))
    programs = st.sampled_from(opcode_programs())
    return dumped | st.builds(lambda program, way: start + way(program) + b".", programs, ways)


@pytest.fixture
def spy():
    """Spy, which has not been called, and which a pickle may also name by the number 200."""
    Spy.calls = ()
    copyreg.add_extension(Spy.__module__, "Spy", 200)
    yield
    copyreg.remove_extension(Spy.__module__, "Spy", 200)
    Spy.calls = ()


def test_the_evil_pickles_do_run_under_plain_pickle(spy):
    for program in opcode_programs()[:-2]:
        Spy.calls = ()
        pickle.loads(b"\x80\x04" + program + b".")
        assert not nothing_ran(), program


# ---- meta.pkl ----------------------------------------------------------------------------------------------

SYMBOLS = "abcdefghijklmné"
META = {"vocab_size": 15, "stoi": {s: i for i, s in enumerate(SYMBOLS)}, "itos": dict(enumerate(SYMBOLS))}


def write_meta(data):
    Path("meta.pkl").write_bytes(data)


def use_codec(seen):
    """encode and decode as sample.py does, with the meta.pkl in the current folder."""
    made = result_of(seen, lambda: codec.codec_of("."), ["meta.pkl"])
    if made is None:
        return
    encode, decode, _ = made
    vocab_size = codec.load_meta(".")["vocab_size"]
    assert isinstance(decode(range(100)), str)
    ids = result_of(Counter(), lambda: encode("ab"), ["meta.pkl"])
    assert ids is None or all(0 <= i < vocab_size for i in ids)


def test_a_meta_file_that_wants_to_run_something_runs_nothing(spy):
    @cases(100)
    @given(evil_pickles(META))
    def check(data):
        write_meta(data)
        result_of(Counter(), lambda: codec.load_meta("."), ["meta.pkl"])
        assert nothing_ran()

    check()


def test_a_damaged_meta_file_works_or_is_refused(spy):
    seen = Counter()
    with_list = {**META, "itos": list(SYMBOLS)}
    originals = [pickle.dumps(meta, protocol) for meta in (META, with_list) for protocol in range(6)]

    @cases(300)
    @given(damaged(*originals))
    def check(data):
        write_meta(data)
        meta = result_of(seen, lambda: codec.load_meta("."), ["meta.pkl"])
        if meta is not None:
            assert type(meta["vocab_size"]) is int
            assert meta["vocab_size"] > 0
            use_codec(Counter())
        assert nothing_ran()

    check()
    assert seen["works"] >= 10, "most damage makes so short a pickle unreadable"
    assert seen["refused"] >= 20


def test_odd_symbols_work_or_are_refused():
    seen = Counter()
    ids, symbols = st.integers(-1, 3) | ATOMS, st.sampled_from("abc") | ATOMS
    itos = st.dictionaries(st.integers(0, 2), st.text(max_size=1)) | st.dictionaries(ids, symbols) | st.lists(symbols)
    stoi = st.dictionaries(st.sampled_from("abc"), st.integers(0, 2)) | st.dictionaries(symbols, ids)

    @cases(200)
    @given(st.integers(1, 4), stoi, itos | st.text().map(list))
    def check(vocab_size, stoi, itos):
        write_meta(pickle.dumps({"vocab_size": vocab_size, "stoi": stoi, "itos": itos}))
        use_codec(seen)

    check()
    assert min(seen["works"], seen["refused"]) >= 20


# ---- checkpoints -------------------------------------------------------------------------------------------

LEVER_TYPES = {name: type(value) for name, value in asdict(MemoryLevers()).items()}
SIZES = dict(n_layer=1, n_head=1, n_embd=2, block_size=4, bias=False, vocab_size=3, dropout=0.0)


def optimizer_of(weights):
    return torch.optim.AdamW([torch.nn.Parameter(w) for w in weights])


def good_checkpoint():
    """What train.py saves, with two small weights."""
    weights = {"_orig_mod.a": torch.ones(4, 2), "_orig_mod.b": torch.ones(2)}
    optimizer = optimizer_of(weights.values())
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = torch.get_rng_state()
    return {
        "model": weights, "optimizer": optimizer.state_dict(), "model_args": dict(SIZES), "iter_num": 5,
        "best_val_loss": torch.tensor(1.5), "config": {"dataset": "markov"}, "scaler": {},
        "rng": [{"data": {"before": state, "after": state}, "generators": {"cpu": state}}],
        "split": {"of": [8, 2], "into": [4, 4], "levers": asdict(MemoryLevers(recompute=True))},
    }  # fmt: skip


def saved(value, zipped=True):
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def zip_of(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def load_and_use(data, seen):
    """Load ckpt.pt with these bytes; what comes back must be fit for what train.py and sample.py do."""
    Path("ckpt.pt").write_bytes(data)
    checkpoint = result_of(seen, lambda: checkpoints.load(".", for_training=True), ["ckpt.pt"])
    if checkpoint is None:
        return
    assert set(checkpoints.REQUIRED) <= set(checkpoint)
    assert all(isinstance(w, torch.Tensor) and n[:10] != "_orig_mod." for n, w in checkpoint["model"].items())
    assert all(type(checkpoint["model_args"][k]) is type(SIZES[k]) for k in MODEL_KEYS if k != "dropout")
    assert isinstance(float(checkpoint["best_val_loss"]), float)
    assert isinstance(checkpoint["iter_num"], int)
    assert isinstance(checkpoint["model_args"]["dropout"], (int, float))
    assert isinstance(checkpoint.get("scaler", {}), dict)
    assert isinstance(os.path.join("data", checkpoint["config"].get("dataset", "")), str)
    for rank in checkpoint.get("rng", ()):
        torch.Generator().set_state(rank["data"]["before"])
        torch.Generator().set_state(rank["data"].get("after", rank["data"]["before"]))
    plan = checkpoints.split_as_saved(checkpoint, Plan(8, 2, 8), dict(out_dir="out", auto_fit=False), given=())
    assert 8 % plan.micro_batch_size == 0
    assert {name: type(value) for name, value in asdict(plan.levers).items()} == LEVER_TYPES
    optimizer = optimizer_of([torch.ones(4, 2), torch.ones(2)])
    result_of(seen, partial(checkpoints.load_optimizer, optimizer, checkpoint["optimizer"]), ["checkpoint's optimizer"])
    assert all(m[k].shape == p.shape for p, m in optimizer.state.items() for k in m if k != "step")


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_a_damaged_checkpoint_loads_or_is_refused(spy):
    seen = Counter()
    good = good_checkpoint()
    small = {**good, "rng": []}
    originals = [saved(good), saved(small), saved(small), saved(small, zipped=False), pickle.dumps(SIZES)]

    @cases(400)
    @given(damaged(*originals))
    def check(data):
        Path("ckpt.pt").write_bytes(data)
        checkpoint = result_of(seen, lambda: checkpoints.load(".", for_training=True), ["ckpt.pt"])
        assert checkpoint is None or set(checkpoints.REQUIRED) <= set(checkpoint)
        assert nothing_ran()

    check()
    assert min(seen["works"], seen["refused"]) >= 20


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_a_checkpoint_that_wants_to_run_something_is_refused(spy):
    good = good_checkpoint()
    entry, zipped = st.sampled_from([*good]), st.booleans()
    by_torch = st.builds(lambda x, key, z: saved({**good, key: x}, z), EVIL_OBJECTS, entry, zipped)
    plain = evil_pickles({"a": 1})
    names = st.sampled_from(("archive/data.pkl", "data.pkl", "x/constants.pkl"))
    in_a_zip = st.builds(lambda name, data: zip_of({name: data, "archive/version": b"3\n"}), names, plain)

    @cases(250)
    @given(by_torch | plain | in_a_zip)
    def check(data):
        Path("ckpt.pt").write_bytes(data)
        with pytest.raises(UsageError, match="ckpt.pt can't be read"):
            checkpoints.load(".", for_training=True)
        assert nothing_ran()

    check()


ODD = (
    None, -1, 1.5, True, "x", [], [{}], {}, {1: 2}, {"a": 1}, {"cpu": torch.ones(1)}, torch.ones(2), torch.ones(9, 2),
    torch.ones(4, 3), torch.tensor(1j), torch.zeros(16, dtype=torch.uint8),
)  # fmt: skip
PLACES = (  # () is the whole, ("model_args", "bias") its entry "bias" in its entry "model_args"
    (), *((entry,) for entry in (*checkpoints.REQUIRED, "scaler", "rng")), *(("model_args", key) for key in SIZES),
    ("model", "_orig_mod.a"), ("model", 3), ("config", "dataset"), ("rng", 0), ("rng", 0, "data"),
    ("rng", 0, "generators"), ("rng", 0, "generators", "cpu"), ("optimizer", "param_groups"),
    ("optimizer", "param_groups", 0), ("optimizer", "param_groups", 0, "params"), ("optimizer", "state"),
    *(("optimizer", "state", *key) for key in ((0,), (0, "exp_avg"), (0, "step"), (7,), ("x",))),
    ("rng", 0, "data", "before"), ("rng", 0, "data", "after"), ("split",), ("split", "of"), ("split", "into"),
    ("split", "levers"), ("split", "levers", "recompute"), ("split", "levers", "loss_chunk_mb"),
)  # fmt: skip


def put(value, place, odd):
    """value with what stands at place, a path of keys, replaced by odd."""
    if not place:
        return odd
    changed = copy.copy(value)
    changed[place[0]] = put(value[place[0]], place[1:], odd) if place[1:] else odd
    return changed


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_with_an_odd_entry_loads_or_is_refused():
    seen = Counter()
    good = saved(good_checkpoint())
    for place, odd in itertools.product(PLACES, ODD):
        original = torch.load(io.BytesIO(good), weights_only=True)
        load_and_use(saved(put(original, place, odd)), seen)
    assert min(seen["works"], seen["refused"]) >= 20


@pytest.mark.parametrize("nothing", [None, {}])
def test_a_checkpoint_without_its_optimizer_is_enough_for_sampling(nothing):
    Path("ckpt.pt").write_bytes(saved({**good_checkpoint(), "optimizer": nothing, "config": nothing, "rng": None}))
    with pytest.raises(UsageError, match="it lacks optimizer, config"):
        checkpoints.load(".", for_training=True)
    for_sampling = checkpoints.load(".")
    assert list(for_sampling["model"]) == ["a", "b"]
    assert for_sampling.get("config", {}) == {}, "sample.py looks up its data set like this"


# ---- token files -------------------------------------------------------------------------------------------


def fitting(data, block_size, vocab_size):
    """Whether a .bin file with these bytes is long enough and all its tokens are in the vocabulary."""
    return len(data) % 2 == 0 and len(data) // 2 > block_size and max(np.frombuffer(data, "<u2")) < vocab_size


def check_batch(batch, rows, tokens, block_size, vocab_size):
    x, y = batch
    assert x.shape == y.shape == (rows, block_size)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert min(x.min(), y.min()) >= 0
    assert max(x.max(), y.max()) < vocab_size
    windows = {tuple(tokens[i : i + block_size + 1]) for i in range(len(tokens) - block_size)}
    assert {(*a, b[-1]) for a, b in zip(x.tolist(), y.tolist(), strict=True)} <= windows


def test_any_token_files_give_batches_or_are_refused():
    seen = Counter()
    small = st.binary(max_size=40).map(lambda data: (np.frombuffer(data, "u1") % 10).astype("<u2").tobytes())
    content = small | small | st.binary(max_size=80)

    @cases(500)
    @given(content, content, st.integers(1, 3), st.integers(1, 2), st.integers(1, 12), st.integers(8, 2**17))
    def check(train, val, micro, count, block_size, vocab_size):
        files = {"train": train, "val": val}
        for split, data in files.items():
            Path(f"{split}.bin").write_bytes(data)

        def use():
            torch.manual_seed(len(train))
            data = open_data(".", block_size, vocab_size)
            batches = Batches(data, batch_size=micro * count, device=CPU, micro_batch_size=micro)
            found = [("train", batches.current)]
            for _ in range(count):
                batches.advance()
                found.append(("train", batches.current))
            return found + [
                (split, batch) for split in files for pieces in batches.evaluation(split, 2) for batch in pieces
            ]

        found = result_of(seen, use, ["train.bin", "val.bin"])
        if found is None:
            assert not all(fitting(data, block_size, vocab_size) for data in files.values())
            return
        assert len(found) == 1 + count + 2 * 2 * count
        for split, batch in found:
            numbers = np.frombuffer(files[split], "<u2").tolist()
            check_batch(batch, micro, numbers, block_size, vocab_size)

    check()
    assert min(seen["works"], seen["refused"]) >= 20
