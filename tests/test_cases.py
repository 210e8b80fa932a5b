"""A table of what may go wrong: what a run is given, what it must print, how it must end, what it must leave alone.

A new case is a row. Each runs a script in an empty folder that has the toy data set, and checks besides that no
traceback was printed, that no line is longer than a person reads, and that no half-written file is left.
"""

import contextlib
import errno
import fcntl
import fnmatch
import hashlib
import io
import json
import math
import os
import pickle
import re
import runpy
import shutil
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import REFERENCE, as_a_process, flags

from nanofit import machine, step
from nanofit.autofit.fit import Fitter
from nanofit.autofit.plan import Plan

KEYS = {
    "train.py": dict(
        device="cpu", dataset="markov", compile=False, n_layer=1, n_head=1, n_embd=16, block_size=8, batch_size=2,
        gradient_accumulation_steps=1, eval_iters=1, eval_interval=2, max_iters=2, warmup_iters=1, learning_rate=1e-3,
    ),
    "sample.py": dict(device="cpu", num_samples=1, max_new_tokens=4, start="a"),
    "bench.py": dict(
        device="cpu", compile=False, real_data=False, n_layer=1, n_head=1, n_embd=16, block_size=8, batch_size=2
    ),
}  # fmt: skip
LONGEST_LINE = 1050  # characters that a line of a message may have
LOCK, SAMPLE = "out/run.lock", "out/sample.txt"
STARTED = (LOCK, "out/metrics.jsonl")  # what a run that trains may write
SAVED = (*STARTED, "out/ckpt.pt", "out/ckpt.prev.pt")  # what a run that trains and saves may write


@dataclass(frozen=True)
class Case:
    """given: functions of pytest's MonkeyPatch that prepare the folder and the machine, called in turn. says: patterns
    that must all be found in what is printed, on standard output or error. changes: paths, as patterns, that may
    change, appear or go; all others must be as they were.
    """

    what: str
    given: tuple
    script: str
    argv: tuple
    keys: dict
    code: int
    says: tuple
    never: tuple
    changes: tuple


TABLE = []


def row(what, *given, says=(), code=1, changes=(), never=(), script="train.py", argv=(), **keys):
    """One row of the table; keys are the script's, given as --key=value."""
    says, never, changes = ((told,) if isinstance(told, str) else told for told in (says, never, changes))
    TABLE.append(Case(what, given, script, tuple(argv), keys, code, says, never, changes))


def end_of(script, *argv):
    """(exit code, all that was printed) of a script, run in this process with its top frame at work."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), as_a_process(script, *argv) as path:
        if isinstance(sys.stdout, Broken):
            sys.stdout.heard = printed
        else:
            sys.stdout = printed
        try:
            runpy.run_path(path, run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
            code = 1
    return code, printed.getvalue()


def tree():
    """{path: what it is} of all that lies in the current folder."""
    found = {}
    for folder, folders, files in os.walk("."):
        for name in folders + files:
            path = os.path.relpath(os.path.join(folder, name))
            if path in (LOCK, SAMPLE):  # who held the folder last, and what was sampled last: nobody's work
                continue
            if os.path.islink(path):
                found[path] = f"link to {os.readlink(path)}"
            elif os.path.isfile(path) and os.path.getsize(path) < 2**30:
                found[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            else:
                found[path] = "a folder" if os.path.isdir(path) else "a pipe, or too large"
    return found


# ---- what may be given -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def a_run_before(tmp_path_factory):
    """A run that ended: ckpt.pt of iteration 4, ckpt.prev.pt of iteration 2."""
    place = tmp_path_factory.mktemp("before")
    shutil.copytree(REFERENCE / "markov", place / "data" / "markov")
    with contextlib.chdir(place):
        code, printed = end_of("train.py", *flags(**{**KEYS["train.py"], "max_iters": 4}))
    assert code == 0, printed
    a_run.folder = place / "out"


def a_run(patch):
    shutil.copytree(a_run.folder, "out")


def file(path, content=b""):
    """A file of these bytes."""

    def make(patch):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def folder(path):
    return lambda patch: os.makedirs(path)


def pipe(path):
    def make(patch):
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(path)

    return make


def link(path, target):
    def make(patch):
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(target, path)

    return make


def endless(zipped):
    """A checkpoint one of whose keys is a tuple that holds another twice, and so on: hashing it takes forever."""

    def make(patch):
        # {0: (), 1: ((), ()), ..., the last of them: 1}, each tuple from the one before, by its number
        tuples = b"".join(b"K%ch%ch%c\x86q%c" % (i, i - 1, i - 1, i) for i in range(1, 99))
        pickled = b"\x80\x02}(K\x00)q\x00" + tuples + b"hbK\x01u."
        if not zipped:
            os.remove("out/ckpt.pt")
            heads = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
            Path("out/ckpt.pt").write_bytes(b"".join([*heads, pickled, pickle.dumps([], 2)]))
            return
        with zipfile.ZipFile("out/ckpt.pt") as old, zipfile.ZipFile("new", "w") as new:
            for name in old.namelist():
                new.writestr(name, pickled if name.endswith("data.pkl") else old.read(name))
        os.replace("new", "out/ckpt.pt")

    return make


def gone(path):
    return lambda patch: os.remove(path)


def moved(path, target):
    return lambda patch: os.rename(path, target)


def copied(path, target):
    return lambda patch: (shutil.copytree if os.path.isdir(path) else shutil.copy)(path, target)


def damaged(path):
    """A bit is turned in the middle of a file."""

    def turn(patch):
        content = bytearray(Path(path).read_bytes())
        content[len(content) // 2] ^= 1
        Path(path).write_bytes(content)

    return turn


def cut(path, size):
    return lambda patch: os.truncate(path, size)


def held(change, path="out/ckpt.pt"):
    """A checkpoint whose content was changed: change(content) does, or gives what is there instead."""

    def do(patch):
        content = torch.load(path, weights_only=True)
        new = change(content)
        torch.save(content if new is None else new, path)

    return do


def entry(name, value, path="out/ckpt.pt"):
    return held(lambda c: {**c, name: value}, path)


def trained(**keys):
    """train.py has run before, with these keys."""

    def train(patch):
        code, printed = end_of("train.py", *flags(**{**KEYS["train.py"], **keys}))
        assert code == 0, printed

    return train


def of_model(name, change):
    """A checkpoint in which a weight is changed in place."""
    return held(lambda c: (change(c["model"][name]), None)[1])


def moments(change):
    """A checkpoint in which change(moments) was called on those of its first weight."""
    return held(lambda c: (change(c["optimizer"]["state"][0]), None)[1])


def group(**values):
    return held(lambda c: c["optimizer"]["param_groups"][0].update(values))


def size(**values):
    return held(lambda c: c["model_args"].update(values))


def last_of(number, path="out/ckpt.last.pt", **more):
    """A checkpoint as where a run stopped, beside its best."""

    def make(patch):
        content = torch.load("out/ckpt.pt", weights_only=True)
        torch.save({**content, "iter_num": number, **more}, path)

    return make


def environment(**values):
    def put(patch):
        for name, value in values.items():
            patch.setenv(name, value) if value is not None else patch.delenv(name, raising=False)

    return put


def no_gpu(patch):
    patch.setattr(torch.cuda, "is_available", lambda: False)


def meta(**more):
    """meta.pkl with these entries changed."""

    def make(patch):
        content = pickle.loads(Path("data/markov/meta.pkl").read_bytes())
        Path("data/markov/meta.pkl").write_bytes(pickle.dumps({**content, **more}))

    return make


def fails(place, number=0, message=None, error=OSError):
    """place, 'module.name', raises: a system's error of this number, or error(message)."""

    def fail(*args, **options):
        raise error(message) if message else OSError(number, os.strerror(number), "that file")

    return lambda patch: patch.setattr(place, fail)


def meanwhile(*acts):
    """These happen in the first iteration, before the weights move."""

    def prepare(patch):
        def act(*args):
            while left:
                left.pop(0)(patch)
            return move(*args)

        left, move = list(acts), step.update
        patch.setattr(step, "update", act)

    return prepare


def hugging_face(text=None, **more):
    """A folder hf whose config.json is that of a small GPT-2 with these entries, or this text."""
    sizes = dict(model_type="gpt2", n_layer=1, n_head=1, n_embd=16, vocab_size=65, n_positions=16)
    return file("hf/config.json", text or json.dumps({**sizes, **more}))


def lock(patch):
    """A lock that another run holds. (Its file is never closed: the lock goes with this process.)"""
    fcntl.lockf(os.open(LOCK, os.O_CREAT | os.O_RDWR), fcntl.LOCK_EX)


class Broken(io.StringIO):
    """A standard output that takes some lines, and then fails with this error number."""

    def __init__(self, number, lines=0):
        super().__init__()
        self.number, self.lines, self.heard = number, lines, None

    def write(self, text):
        if self.lines <= 0:
            raise OSError(self.number, os.strerror(self.number))
        self.lines -= text.count("\n")
        return self.heard.write(text)

    def flush(self):
        if self.lines <= 0:
            raise OSError(self.number, os.strerror(self.number))


def output(make):
    return lambda patch: patch.setattr(sys, "stdout", make())


# fmt: off
# ---- runs in one folder ------------------------------------------------------------------------------------
OTHERS = ("out/kept-of-run-*", "out/ckpt.prev.pt", LOCK)
BOTH_KEPT = (
    "ckpt.prev.pt, of iteration 2, is another run's: kept as",
    "ckpt.pt, of iteration 4, is another run's: kept",
)
row("a run in a new folder", code=0, changes=("out", *SAVED), says="saving checkpoint to out")
row("a run that goes on", a_run, init_from="resume", max_iters=6, code=0, changes=SAVED, never="another run")
row("a run that has nothing left to do", a_run, init_from="resume", max_iters=4, code=0, changes=SAVED)
row("from scratch over another run", a_run, code=0, changes=("out/*",), says=BOTH_KEPT)
row("from scratch, and no iteration that saves", a_run, eval_only=True, code=0)
row("from scratch, nothing trained", a_run, max_iters=0, code=0, changes="out/*", says=BOTH_KEPT)
row("what is moved aside twice has two names", a_run, code=0, says="kept as", changes=("out/*",))
row("a kept folder that is a file", a_run, file("out/kept-of-run-x"), code=0, changes=("out/*",), says=BOTH_KEPT)
row("another run's last", a_run, last_of(3, run_id="0" * 8), init_from="resume", max_iters=6, code=0,
    says="ckpt.last.pt is of another run than out/ckpt.pt and is left alone", changes=("out/*",))
row("this run's last is where it goes on", a_run, last_of(5), init_from="resume", max_iters=5, code=0,
    says="resuming from out at iteration 5", changes=("out/ckpt*", *STARTED))
row("an earlier last is left", a_run, last_of(3), init_from="resume", max_iters=6, code=0,
    says="resuming from out at iteration 4", changes=("out/ckpt*", *STARTED))
row("a damaged last beside a whole best", a_run, last_of(5), damaged("out/ckpt.last.pt"), init_from="resume",
    says="to go on from there, move out/ckpt.last.pt elsewhere")
row("a last that is empty", a_run, file("out/ckpt.last.pt"), init_from="resume", says="move out/ckpt.last.pt elsewhere")
row("a damaged last, and the advice", a_run, last_of(5), damaged("out/ckpt.last.pt"), gone("out/ckpt.last.pt"),
    init_from="resume", max_iters=6, code=0, says="resuming from out at iteration 4", changes=SAVED)
row("a damaged checkpoint beside the one before", a_run, damaged("out/ckpt.pt"), init_from="resume", says=("damaged",
    "out/ckpt.prev.pt beside it is whole, of iteration 2: to go on from there, rename it to ckpt.pt"))
row("a damaged checkpoint, and the advice", a_run, damaged("out/ckpt.pt"), gone("out/ckpt.pt"),
    moved("out/ckpt.prev.pt", "out/ckpt.pt"), init_from="resume", max_iters=6, code=0, changes=SAVED,
    says="resuming from out at iteration 2")
row("all three damaged", a_run, last_of(5), *(damaged(f"out/ckpt{n}.pt") for n in ("", ".prev", ".last")),
    init_from="resume", says="out/ckpt.pt is damaged", never="is whole")
row("a damaged checkpoint, from scratch: it is kept", a_run, damaged("out/ckpt.pt"), code=0,
    says="out/ckpt.pt, of iteration 4, is another run's: kept", changes=("out/*",))
row("a cropped block_size keeps what was before", a_run, init_from="resume", block_size=4, max_iters=6, code=0,
    says=("block_size 8 -> 4: the model is cropped for good", *BOTH_KEPT), changes=("out/*",))
WITH_AN_ID = [a_run, *(entry("run_id", "0123abcd", f"out/ckpt{n}.pt") for n in ("", ".prev"))]
KEPT = "out/kept-of-run-0123abcd"
row("a run that was kept goes on where it is", *WITH_AN_ID, trained(), init_from="resume", out_dir=KEPT, max_iters=6,
    code=0, says=f"resuming from {KEPT} at iteration 4", never="another run", changes=(f"{KEPT}/*",))
row("what was there before a crop goes on where it was kept", *WITH_AN_ID, trained(init_from="resume", block_size=4,
    max_iters=6), init_from="resume", out_dir=KEPT, max_iters=6, code=0, never="cropped", changes=(f"{KEPT}/*",),
    says=(f"resuming from {KEPT} at iteration 4", "tokens per iteration will be: 16"))
row("a larger block_size", a_run, init_from="resume", block_size=16, says="set --block_size=8 or less")
row("a part of another program", a_run, file("out/film.part", "half"), init_from="resume", max_iters=6, code=0,
    changes=SAVED)
row("parts of a killed run", a_run, file("out/ckpt.pt.abc.part", "half"), file("out/auto_fit.json.x.part"),
    file("out/sample.txt.x.part"), file("out/report.html.x.part"), init_from="resume", max_iters=6, code=0,
    changes=(*SAVED, "out/*.part"))
row("no locks on this file system", fails("fcntl.lockf", errno.ENOLCK), code=0, changes=("out", *SAVED),
    says="out can't be locked (No locks available): make sure that no other run writes there")
row("no locks at all", fails("fcntl.lockf", errno.ENOSYS), code=0, changes=("out", *SAVED), says="can't be locked")
row("somebody holds the lock", a_run, file(LOCK, "process 7 on there\n"), fails("fcntl.lockf", errno.EWOULDBLOCK),
    init_from="resume", says="out_dir='out' is in use by process 7 on there: let it end, or give another --out_dir")
row("somebody holds the lock, who wrote no name", file(LOCK), fails("fcntl.lockf", errno.EWOULDBLOCK),
    says="in use by another process")
row("a lock that is really held", folder("out"), lock, says="in use by another process")
row("a folder that is removed in mid-run", a_run, meanwhile(lambda patch: shutil.rmtree("out")), init_from="resume",
    max_iters=6, code=0, changes="out/*", never="not saved")
row("a lock that is a folder", folder(LOCK), says="out_dir='out' can't be written to")
row("no second names on this file system", a_run, fails("os.link", errno.EPERM), init_from="resume", max_iters=6,
    code=0, changes=(*STARTED, "out/ckpt.pt"))
row("a checkpoint that is a folder", folder("out/ckpt.pt"), code=0, says="kept-unreadable", changes=("out/*",))
row("a checkpoint that is a link to nothing", folder("out"), link("out/ckpt.pt", "nowhere"), code=0,
    says="kept-unreadable", changes=("out/*",))

# ---- folders -----------------------------------------------------------------------------------------------
row("out_dir is a file", file("out", "words"), says="out_dir='out' can't be made")
row("out_dir is a pipe", pipe("out"), says="out_dir='out' can't be made")
row("out_dir in a file", file("out", "words"), out_dir="out/run", says="out_dir='out/run' can't be made")
row("out_dir where nobody may write", out_dir="/proc/out", says="out_dir='/proc/out' can't be made")
row("out_dir that can't hold files", out_dir="/proc/self", says="out_dir='/proc/self' can't be written to")
row("out_dir of no name", out_dir="", says="out_dir")
row("out_dir with a zero byte", argv=["--out_dir='a\\0b'"], says="out_dir holds a zero byte")
row("out_dir with a name too long", out_dir="x" * 300, says="File name too long")
row("out_dir with a name far too long", out_dir="x" * 30000, says="xxx...")
row("out_dir with bytes that are no text", out_dir=os.fsdecode(b"out-\xff"), code=0, changes="out-*")
row("and a run that goes on there", a_run, moved("out", os.fsdecode(b"out-\xff")), out_dir=os.fsdecode(b"out-\xff"),
    init_from="resume", max_iters=6, code=0, changes="out-*/*")
row("a read-only disk", fails("os.makedirs", errno.EROFS), says="Read-only file system")
row("a read-only folder", folder("out"), fails("os.open", errno.EROFS), says="Read-only file system")
row("nothing to resume", init_from="resume", says="there is no checkpoint out/ckpt.pt: train with --out_dir=out first")

# ---- the disk ----------------------------------------------------------------------------------------------
row("a full disk", fails("torch.save", errno.ENOSPC), changes=("out", *STARTED),
    says=("not saved: out/ckpt.pt can't be written (No space left on device)", "training goes on"))
row("a full disk in a run that goes on", a_run, fails("torch.save", errno.ENOSPC), init_from="resume", max_iters=6,
    changes=SAVED, says="not saved")
row("a quota", fails("torch.save", errno.EDQUOT), changes=("out", *STARTED), says="not saved")
row("a disk that fails", fails("os.fsync", errno.EIO), changes=("out", *STARTED), says="Input/output error")
row("a disk that can't rename", a_run, fails("os.replace", errno.EIO), init_from="resume", max_iters=6,
    says="not saved", changes=STARTED)
row("another run's can't be moved", a_run, fails("os.rename", errno.EPERM), changes=(*STARTED, "out/kept-*"),
    says="can't be moved")
row("no memory to save with", fails("torch.save", message="no", error=MemoryError), changes=("out", *STARTED),
    says="not saved")

# ---- what lies where the figures belong --------------------------------------------------------------------
FIGURES = "out/metrics.jsonl"
row("figures in a pipe", a_run, gone(FIGURES), pipe(FIGURES), init_from="resume", max_iters=6, code=0, changes="out/*")
row("figures in a folder", a_run, gone(FIGURES), folder(FIGURES), init_from="resume", max_iters=6, code=0,
    changes="out/*")
row("figures in a device", a_run, gone(FIGURES), link(FIGURES, "/dev/zero"), init_from="resume", max_iters=6, code=0,
    changes="out/*")
row("figures in a link to somebody's file", a_run, file("theirs", "words"), gone(FIGURES), link(FIGURES, "../theirs"),
    init_from="resume", max_iters=6, code=0, changes="out/*")

# ---- what a checkpoint holds -------------------------------------------------------------------------------


def refused(what, *given, says, **keys):
    """A checkpoint that resuming refuses; nothing is changed."""
    row(f"a checkpoint with {what}", a_run, *given, init_from="resume", max_iters=6, says=says, **keys)


WTE, FC = "transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"
NAN = of_model(FC, lambda w: w[0, 0].fill_(math.nan))
refused("a weight that is nan", NAN, says="weights that are not finite")
refused("a weight of another shape", held(lambda c: c["model"].update({FC: torch.zeros(3, 3)})), says="size mismatch")
refused("no weights", entry("model", {}), says="it lacks model")
refused("a weight missing", held(lambda c: (c["model"].pop(FC), None)[1]), says="Missing key")
refused("one group", held(lambda c: (c["optimizer"]["param_groups"].pop(), None)[1]), says="optimizer")
refused("groups without weights", group(params=[]), says="optimizer")
refused("no optimizer", entry("optimizer", None), says="it lacks optimizer")
refused("no layers", size(n_layer=0), says="n_layer must be at least 1")
refused("no zip and no pickle", file("out/ckpt.pt", b"words" * 99), says="damaged or not a checkpoint")
refused("nothing in it", cut("out/ckpt.pt", 0), says="damaged or not a checkpoint")
refused("a list in it", held(lambda c: [1, 2]), says="not a checkpoint of a training run: it lacks")
refused("code in it", file("out/ckpt.pt", pickle.dumps(print)),
    says="it holds more than plain data")
row("a config of odd values", a_run, held(lambda c: c["config"].update(batch_size=torch.ones(3), seed=None)),
    init_from="resume", max_iters=6, code=0, changes=SAVED)
row("an id that is a path", a_run, entry("run_id", "../../x"), code=0, changes="out/*", never="kept-of-run-\\.\\.")
row("an id that is a list", a_run, entry("run_id", [[]]), init_from="resume", max_iters=6, code=0, changes="out/*")
row("an iteration after the last", a_run, entry("iter_num", 10**9), init_from="resume", code=0, changes=LOCK)
row("no data and generators, as nanoGPT's", a_run, entry("rng", None), entry("data", None), entry("split", None),
    init_from="resume", max_iters=6, code=0, changes=SAVED)

# ---- numbers -----------------------------------------------------------------------------------------------
row("a learning rate that is infinite", argv=["--learning_rate=1e999"], says="learning_rate must be a finite number")
row("a learning rate that is nan", learning_rate="nan", says="learning_rate must be a number")
row("a learning rate beyond reason", learning_rate=1e30, max_iters=3, says="finite", changes=("out", *SAVED))
row("a learning rate beyond reason, one iteration", learning_rate=1e38, max_iters=0, says="finite", changes=("out",
    *STARTED))
row("decay beyond reason", weight_decay=1e300, says="finite", changes=("out", *STARTED))
row("a batch beyond any number", batch_size=10**30, says="whole numbers of at most 64 bits")
row("a batch of a hundred thousand digits", argv=["--batch_size=" + "9" * 100000], says="batch_size")
row("a width beyond reason", n_embd=2**42, says="memory", changes=("out", *STARTED))
row("heads beyond reason", n_head=10**15, says="is not divisible by n_head")
row("steps beyond reason on no ranks", gradient_accumulation_steps=0,
    says="gradient_accumulation_steps must be at least 1")
row("a batch of none", batch_size=0, says="batch_size must be at least 1")
row("a negative batch", batch_size=-4, says="batch_size must be at least 1")
row("dropout that is nan", argv=["--dropout=nan"], says="dropout must be a number")
row("dropout of one", dropout=1.0, says="dropout must be at least 0 and below 1")
row("beta of one", beta1=1.0, says="beta1 must be below 1")
row("an infinite memory", memory_limit_gb="1e999", says="memory_limit_gb must be a finite number")
row("a negative memory", memory_limit_gb=-1.0, says="memory_limit_gb must be at least 0")
row("an evaluation of none", eval_iters=0, says="eval_iters must be at least 1")
row("a chunk beyond reason", loss_chunk_mb=10**18, code=0, changes=("out", *SAVED))
row("iterations beyond reason", max_iters=2**63, eval_only=True, code=0)
row("a schedule that ends before it begins", warmup_iters=5, lr_decay_iters=-3, code=0, changes=("out", *SAVED))

# ---- keys and config files ---------------------------------------------------------------------------------
row("an unknown key", argv=["--batchsize=3"], says="train.py has no key 'batchsize'")
row("a key without a value", argv=["--batch_size"], says="has no value")
row("a key of NULs", argv=["--\\0=3"], says="has no key")
row("a config file that isn't there", argv=["nowhere.py"], says="config file 'nowhere.py' does not exist")
row("a config file that isn't there, and scripts that are", file("doctor.py"), file("train.py"), argv=["dokter.py"],
    says="config file 'dokter.py' does not exist (a key is set by", never="did you mean")
row("a config file that isn't there, and one of config/", file("config/train_tiny.py"), argv=["trian_tiny.py"],
    says="config file 'trian_tiny.py' does not exist; did you mean 'config/train_tiny.py'?")
row("a config file without its ending", file("mine.py"), argv=["mine"], says="did you mean 'mine.py'?")
row("a config file that is a folder", folder("c.py"), argv=["c.py"], says="config file 'c.py' is not a file")
row("a config file that is a pipe", pipe("c.py"), argv=["c.py"], says="config file 'c.py' is not a file")
row("a config file that is a device", argv=["/dev/zero"], says="is not a file")
row("a config file that ends the program", file("c.py", "import sys\nsys.exit(0)"), argv=["c.py"],
    says="c.py ends the program")
row("a config file that is no Python", file("c.py", "batch size = 3"), argv=["c.py"], says="c.py, line 1")
row("a config file that is no text", file("c.py", b"\xff\xfe\x00"), argv=["c.py"], never="codec",
    says="c.py is no UTF-8 text (byte 0 is 0xff): a config file is Python text: save it as UTF-8")
row("a config file in Latin-1", file("c.py", b"# caf\xe9\nmax_iters = 1"), argv=["c.py"], says="byte 5 is 0xe9")
row("a config file that Windows wrote", file("c.py", b"\xef\xbb\xbfmax_iters = 2\r\n"), argv=["c.py"], code=0,
    says="max_iters = 2", changes=("out", *SAVED))
row("a config file that reads what is no text", file("b", b"\xff"), file("c.py", "open('b', encoding='utf-8').read()"),
    argv=["c.py"], says="c.py, line 1: UnicodeDecodeError")
row("a config file with a zero byte", file("c.py", b"x = 1\0"), argv=["c.py"], says="c.py")
row("a config file that calls itself", file("c.py", "def f(): f()\nf()"), argv=["c.py"], says="RecursionError")
row("a config file too deep", file("c.py", "batch_size = " + "(" * 5000 + "1" + ")" * 5000), argv=["c.py"], says="c.py")
row("a config file that asserts", file("c.py", "assert 1 > 2"), argv=["c.py"], says="c.py, line 1: AssertionError")
row("a config file that takes a builtin's name", file("c.py", "print = len = max = min = None"), argv=["c.py"], code=0,
    changes=("out", *SAVED))
row("a value too deep", argv=["--batch_size=" + "[" * 9000], says="batch_size must be a whole number")
row("no time to wait for a rank", wait_minutes=0, says="wait_minutes must be above 0")
row("ranks of a plan without a memory", no_gpu, ranks=2, device="cuda", dry_run=True, gradient_accumulation_steps=2,
    says="there is no cuda here: to plan for one, say how much memory it has: --memory_limit_gb=12", never="torchrun")
row("a plan for a card that CUDA fills", no_gpu, device="cuda", dry_run=True, memory_limit_gb=0.3,
    says="memory_limit_gb=0.3 is the whole memory of a planned cuda, of which CUDA itself takes 0.50 GiB: give more",
    never="auto-fit")
row("shard on one process", shard=True, says="shard=True shares a model out among several ranks")
row("an unknown init_from", init_from="gpt5", says="init_from must be")
row("init_from with a zero byte", argv=["--init_from='a\\0'"], says="zero byte")
row("a dtype of tomorrow", dtype="float4", says="dtype must be one of")
row("a device of tomorrow", device="tpu", says="device must be")
row("a device of nothing", device="", says="device must be")
row("a GPU that isn't here", no_gpu, device="cuda:7", says="torch sees no CUDA GPU")

# ---- data --------------------------------------------------------------------------------------------------
row("no such data set", dataset="marcov", says="did you mean --dataset=markov")
row("a data set of no name", dataset="", says="train.bin does not exist")
row("train.bin is a pipe", pipe("data/markov/train.bin"), says="train.bin is not a file")
row("train.bin is a folder", gone("data/markov/train.bin"), folder("data/markov/train.bin"), says="is not a file")
row("train.bin is a device", link("data/markov/train.bin", "/dev/zero"), says="train.bin is not a file")
row("train.bin is a link to nothing", link("data/markov/train.bin", "nowhere"), says="train.bin does not exist")
row("val.bin is gone", gone("data/markov/val.bin"), says="val.bin does not exist")
row("train.bin of an odd size", cut("data/markov/train.bin", 4001), says="expected uint16 tokens")
row("train.bin of nothing", cut("data/markov/train.bin", 0), says="has 0 bytes")
row("train.bin of too few", cut("data/markov/train.bin", 16), says="too few for block_size=8")
row("tokens beyond the vocabulary", file("data/markov/train.bin", b"\xff" * 4000), says="holds token 65535",
    changes=("out", *STARTED))
row("val tokens beyond the vocabulary", file("data/markov/val.bin", b"\xff" * 4000), says="holds token 65535",
    changes=("out", *STARTED))
row("other data of the same size", a_run, file("data/markov/train.bin", bytes(120000)), init_from="resume", max_iters=6,
    code=0, changes=SAVED, says="train.bin is not what it was when the checkpoint was saved")
row("other data of another size", a_run, cut("data/markov/val.bin", 8000), init_from="resume", max_iters=6, code=0,
    changes=SAVED, says="val.bin is not what it was")
row("data on a disk that fails", fails("nanofit.tokens._fingerprint", errno.EIO), says="Input/output error")
row("meta.pkl is a pipe", pipe("data/markov/meta.pkl"), says="meta.pkl is not a file")
row("meta.pkl is a folder", gone("data/markov/meta.pkl"), folder("data/markov/meta.pkl"), says="meta.pkl is not a file")
row("meta.pkl is empty", cut("data/markov/meta.pkl", 0), says="meta.pkl can't be read")
row("meta.pkl is damaged", cut("data/markov/meta.pkl", 99), says="meta.pkl can't be read")
row("meta.pkl holds code", file("data/markov/meta.pkl", pickle.dumps(print)), says="must hold a dict with vocab_size")
row("meta.pkl holds a list", file("data/markov/meta.pkl", pickle.dumps([])), says="must hold a dict with vocab_size")
row("meta.pkl as large as a disk", cut("data/markov/meta.pkl", 2**40), says="meta.pkl can't be read")
row("a vocabulary of none", meta(vocab_size=0), says="vocab_size must be at least 1")
row("a vocabulary that is true", meta(vocab_size=True), says="vocab_size is a bool: write int(...)")
row("a vocabulary too small for the data", meta(vocab_size=3), says="but the vocabulary has 3", changes=("out",
    *STARTED))

# ---- weights from elsewhere --------------------------------------------------------------------------------
row("an empty folder", folder("hf"), init_from="hf", says="expects a folder")
row("a config that is a list", hugging_face("[1, 2]"), init_from="hf", says="expects a folder")
row("a config that is no JSON", hugging_face("{"), init_from="hf", says="expects a folder")



def safetensors(path, tensors, data=b"", length=None):
    """A safetensors file of this header and this data, whose header says to be so long."""
    header = json.dumps({"__metadata__": {"format": "pt"}, **tensors}).encode()
    return file(path, (len(header) if length is None else length).to_bytes(8, "little") + header + data)


def tensor(begin, end, dtype="F32", shape=(4,)):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


for what, made in {
    "beyond the file": dict(tensors={}, length=2**60),
    "of tensors that overlap": dict(tensors={"a": tensor(0, 16), "b": tensor(8, 24)}, data=bytes(24)),
    "of a tensor beyond the file": dict(tensors={"a": tensor(0, 2**42, shape=[2**40])}, data=bytes(24)),
    "of numbers of tomorrow": dict(tensors={"a": tensor(0, 16, "F99")}, data=bytes(16)),
}.items():
    row(f"a folder's weights, with a header {what}", hugging_face(), safetensors("hf/model.safetensors", **made),
        init_from="hf", says="init_from='hf'", changes=("out", *STARTED))

# ---- auto_fit's answer, which is only a cache --------------------------------------------------------------


def fitted(what, *given, **case):
    """A run that would fit the device, and whose search is known."""
    answer = Plan(2, 1, 1, reasons=("known",))
    known = lambda patch: patch.setattr(Fitter, "plan", lambda self, kept, *_: kept or answer)  # noqa: E731
    case = {"code": 0, "changes": ("out", *SAVED, "out/auto_fit.json"), **case}
    row(f"an answer that {what}", known, *given, auto_fit=True, max_iters=1, says="batch_size 2 -> 1", **case)


fitted("is new")
fitted("is a folder", folder("out/auto_fit.json/in"), never="Error")
fitted("is a pipe", pipe("out/auto_fit.json"))
fitted("is a device", folder("out"), link("out/auto_fit.json", "/dev/zero"))
fitted("is a link to nothing", folder("out"), link("out/auto_fit.json", "nowhere"))
fitted("is no JSON", file("out/auto_fit.json", "{"))
fitted("is no text", file("out/auto_fit.json", b"\xff\xfe"))
fitted("is a list", file("out/auto_fit.json", "[1]"))
fitted("is deep", file("out/auto_fit.json", "[" * 200000))
fitted("can't be read", file("out/auto_fit.json", "{}"), fails("json.load", errno.EIO))
fitted("can't be written", fails("tempfile.mkstemp", errno.ENOSPC), code=1, changes=("out", *STARTED))
fitted("can't be renamed", fails("nanofit.files.os.replace", errno.EIO), code=1, changes=("out", *STARTED))
# ---- ranks -------------------------------------------------------------------------------------------------
row("a rank that is a word", environment(RANK="first"), says="are not what torchrun sets")
row("a negative rank", environment(RANK="-1", WORLD_SIZE="2"), says="are not what torchrun sets")
row("a rank beyond the others", environment(RANK="2", LOCAL_RANK="0", WORLD_SIZE="2"),
    says="are not what torchrun sets")
row("a world of none", environment(WORLD_SIZE="0"), says="are not what torchrun sets")
row("a world beyond reason", environment(WORLD_SIZE="1" + "0" * 5000), says="WORLD_SIZE")
row("a rank without a meeting place", environment(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR=None),
    says="torchrun")
row("a world without a meeting place", environment(WORLD_SIZE="2", MASTER_ADDR=None), gradient_accumulation_steps=2,
    says="torchrun")
row("a meeting place that is no number", environment(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost",
    MASTER_PORT="x"), says="torchrun")
row("a meeting place beyond the numbers", environment(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost",
    MASTER_PORT="99999999"), says="torchrun")

# ---- the machine -------------------------------------------------------------------------------------------
row("a clock that jumps", lambda patch: patch.setattr("time.time", iter(range(10**9, 0, -(10**6))).__next__), code=0,
    changes=("out", *SAVED), never=", -|time -")
row("no home", environment(HOME=None, USER=None, LOGNAME=None, TMPDIR="/nowhere"), code=0, changes=("out", *SAVED))
row("output on a full disk", output(lambda: Broken(errno.ENOSPC, 3)), changes=("out", *SAVED),
    says="standard output could not be written (No space left on device); all else was done")
row("output that nobody reads", output(lambda: Broken(errno.EPIPE, 3)), changes=("out", *SAVED),
    says="standard output could not be written (its reader has gone)")
row("output to a terminal that was closed", output(lambda: Broken(errno.EIO, 3)), changes=("out", *SAVED),
    says="standard output could not be written (Input/output error)")
row("output that was never there", output(lambda: None), changes=("out", *SAVED), code=0)


# ---- sampling ----------------------------------------------------------------------------------------------


def sample(what, *given, **case):
    row(f"sampling: {what}", *given, **{"script": "sample.py", **case})
sample("a few tokens", a_run, code=0, says="out/ckpt.pt, of iteration 4")
sample("nothing there", says="there is no checkpoint out/ckpt.pt")
sample("where only a last one is", a_run, last_of(5), gone("out/ckpt.pt"), code=0,
    says="out/ckpt.last.pt, of iteration 5")
sample("a damaged checkpoint", a_run, damaged("out/ckpt.pt"), says="damaged")
sample("weights that are nan", a_run, of_model(FC, lambda w: w.fill_(math.nan)), says="weights that are not finite")
sample("a temperature that underflows", a_run, temperature=1e-320, says="temperature must be from 0.0001 on")
sample("a temperature of none", a_run, temperature=0.0, says="use --top_k=1")
sample("an infinite temperature", a_run, temperature="1e999", says="temperature must be")
sample("a negative top_k", a_run, top_k=-1, says="top_k must be at least 0")
sample("a top_k beyond reason", a_run, top_k=2**62, code=0)
sample("a seed beyond reason", a_run, seed=2**63, code=0)
sample("a seed below reason", a_run, seed=-(2**63), code=0)
sample("samples beyond reason", a_run, num_samples=0, says="num_samples must be at least 1")
sample("a prompt from nowhere", a_run, start="FILE:nowhere", says="the prompt can't be read")
sample("a prompt from a pipe", a_run, pipe("p"), start="FILE:p", says="p is not a file")
sample("a prompt from a folder", a_run, start="FILE:out", says="out is not a file")
sample("a prompt that is no text", a_run, file("p", b"\xff\xfe"), start="FILE:p", says="the prompt can't be read")
sample("a prompt of nothing", a_run, start="", says="start is empty")
sample("a prompt of unknown characters", a_run, start="\N{SNOWMAN}" * 9, says="not among the 65 symbols")
sample("no standard input", a_run, lambda patch: patch.setattr(sys, "stdin", None), start="-", code=0)
sample("standard input that is no text", a_run, lambda patch: patch.setattr(sys, "stdin",
    io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8")), start="-", says="standard input")
sample("lines that Windows wrote", a_run, lambda patch: patch.setattr(sys, "stdin",
    io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfa\r\n\r\nA"), encoding="latin-1", newline="\n")), start="-", code=0,
    says="---------------")
sample("a file with a byte order mark", a_run, file("p", b"\xef\xbb\xbfa"), start="FILE:p", code=0)
sample("symbols of another data set", a_run, meta(vocab_size=200, stoi={"a": 150}, itos={150: "a"}),
    says="the model has a vocabulary of 65, and data/markov/meta.pkl has 200 symbols")
sample("a vocabulary beyond reason", a_run, size(vocab_size=2**42), says="memory ran out")
sample("dropout beyond one", a_run, size(dropout=2.0), says="dropout must be")
sample("ids beyond the symbols", a_run, meta(itos={i: 7 for i in range(65)}), says="itos the symbol of each id")

# ---- the benchmark -----------------------------------------------------------------------------------------
row("bench: a batch beyond reason", script="bench.py", batch_size=10**13, says="memory ran out")
row("bench: no data", script="bench.py", real_data=True, says="data/openwebtext/train.bin does not exist")


# fmt: on
# ---- the test ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [pytest.param(c, id=f"{i}: {c.what}") for i, c in enumerate(TABLE)])
def test_case(case, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(machine, "peak_flops", lambda device, dtype: (1e12, ""))  # it would be measured each time
        for prepare in case.given:
            prepare(patch)
        before = tree()
        code, printed = end_of(case.script, *flags(**{**KEYS[case.script], **case.keys}), *case.argv)
    assert "Traceback" not in printed, printed
    assert code == case.code, printed
    for told in case.says:
        assert told in printed, printed
    for told in case.never:
        assert not re.search(told, printed), printed
    lines = [line for line in printed.splitlines() if not line.startswith("Overriding")]  # which tells what was given
    assert max(map(len, lines), default=0) <= LONGEST_LINE, printed
    after = tree()
    changed = {path for path in before | after if before.get(path) != after.get(path)}
    assert [p for p in sorted(changed) if not any(fnmatch.fnmatch(p, allowed) for allowed in case.changes)] == []
    assert not [p for p in after.keys() - before.keys() if p.endswith(".part")]
