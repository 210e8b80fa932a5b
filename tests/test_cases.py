"""A table of what may go wrong: what a run is given, what it must print, how it must end, what it must leave alone.

A new case is a row. Each runs a script in an empty folder that has the toy data set, and checks besides that no
traceback was printed, that no line is longer than a person reads, and that no half-written file is left.
"""

import contextlib
import errno
import fnmatch
import hashlib
import io
import math
import os
import pickle
import re
import runpy
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import REFERENCE, as_a_process, flags

from nanofit import machine
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
            found[path] = "a folder" if os.path.isdir(path) else hashlib.sha256(Path(path).read_bytes()).hexdigest()
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


def gone(path):
    return lambda patch: os.remove(path)


def moved(path, target):
    return lambda patch: os.rename(path, target)


def damaged(path):
    """Bytes are turned in the middle of a file: more than the padding between a checkpoint's records, which may lie
    there and which nobody reads."""

    def turn(patch):
        content = bytearray(Path(path).read_bytes())
        for place in range(len(content) // 2, min(len(content) // 2 + 256, len(content))):
            content[place] ^= 1
        Path(path).write_bytes(content)

    return turn


def cut(path, size):
    return lambda patch: os.truncate(path, size)


def held(change, path="out/ckpt.pt"):
    """A checkpoint whose content change(content) has changed in place."""

    def do(patch):
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)

    return do


def entry(name, value, path="out/ckpt.pt"):
    return held(lambda c: c.update({name: value}), path)


def trained(patch):
    """train.py has run before."""
    assert end_of("train.py", *flags(**KEYS["train.py"]))[0] == 0


def last_of(number, path="out/ckpt.last.pt", **more):
    """A checkpoint as where a run stopped, beside its best."""

    def make(patch):
        content = torch.load("out/ckpt.pt", weights_only=True)
        torch.save({**content, "iter_num": number, **more}, path)

    return make


def environment(**values):
    return lambda patch: [patch.setenv(name, value) for name, value in values.items()]


def no_gpu(patch):
    patch.setattr(torch.cuda, "is_available", lambda: False)


def fails(place, number=0, message=None, error=OSError):
    """place, 'module.name', raises: a system's error of this number, or error(message)."""

    def fail(*args, **options):
        raise error(message) if message else OSError(number, os.strerror(number), "that file")

    return lambda patch: patch.setattr(place, fail)


class Broken(io.StringIO):
    """A standard output that takes three lines, and then its disk is full."""

    lines, heard = 3, None

    def write(self, text):
        self.flush()
        self.lines -= text.count("\n")
        return self.heard.write(text)

    def flush(self):
        if self.lines <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# fmt: off
# ---- runs in one folder ------------------------------------------------------------------------------------
BOTH_KEPT = (
    "ckpt.prev.pt, of iteration 2, is another run's: kept as",
    "ckpt.pt, of iteration 4, is another run's: kept",
)
row("a run in a new folder", code=0, changes=("out", *SAVED), says="saving checkpoint to out")
row("a run that goes on", a_run, init_from="resume", max_iters=6, code=0, changes=SAVED, never="another run")
row("from scratch over another run", a_run, code=0, changes=("out/*",), says=BOTH_KEPT)
row("from scratch, nothing trained", a_run, max_iters=0, code=0, changes="out/*", says=BOTH_KEPT)
row("another run's last", a_run, last_of(3, run_id="0" * 8), init_from="resume", max_iters=6, code=0,
    says="ckpt.last.pt is of another run than out/ckpt.pt and is left alone", changes=("out/*",))
row("this run's last is where it goes on", a_run, last_of(5), init_from="resume", max_iters=5, code=0,
    says="resuming from out at iteration 5", changes=("out/ckpt*", *STARTED))
row("a damaged last beside a whole best", a_run, last_of(5), damaged("out/ckpt.last.pt"), init_from="resume",
    says="to go on from there, move out/ckpt.last.pt elsewhere")
row("a damaged checkpoint beside the one before", a_run, damaged("out/ckpt.pt"), init_from="resume", says=("damaged",
    "out/ckpt.prev.pt beside it is whole, of iteration 2: to go on from there, rename it to ckpt.pt"))
row("a checkpoint that is gone beside the one before", a_run, gone("out/ckpt.pt"), init_from="resume",
    says="out/ckpt.prev.pt beside it is whole, of iteration 2")
row("a damaged checkpoint, and the advice", a_run, damaged("out/ckpt.pt"), gone("out/ckpt.pt"),
    moved("out/ckpt.prev.pt", "out/ckpt.pt"), init_from="resume", max_iters=6, code=0, changes=SAVED,
    says="resuming from out at iteration 2")
row("a damaged checkpoint, from scratch: it is kept", a_run, damaged("out/ckpt.pt"), code=0,
    says="out/ckpt.pt, of iteration 4, is another run's: kept", changes=("out/*",))
row("a cropped block_size keeps what was before", a_run, init_from="resume", block_size=4, max_iters=6, code=0,
    says=("block_size 8 -> 4: the model is cropped", *BOTH_KEPT), changes=("out/*",))
WITH_AN_ID = [a_run, *(entry("run_id", "0123abcd", f"out/ckpt{n}.pt") for n in ("", ".prev"))]
KEPT = "out/kept-of-run-0123abcd"
row("a run that was kept goes on where it is", *WITH_AN_ID, trained, init_from="resume", out_dir=KEPT, max_iters=6,
    code=0, says=f"resuming from {KEPT} at iteration 4", never="another run", changes=(f"{KEPT}/*",))
row("parts of a killed run", a_run, file("out/ckpt.pt.abc.part", "half"), file("out/auto_fit.json.x.part"),
    file("out/sample.txt.x.part"), file("out/report.html.x.part"), init_from="resume", max_iters=6, code=0,
    changes=(*SAVED, "out/*.part"))
row("no locks on this file system", fails("fcntl.lockf", errno.ENOLCK), code=0, changes=("out", *SAVED),
    says="out can't be locked (No locks available): make sure that no other run writes there")
row("somebody holds the lock", a_run, file(LOCK, "process 7 on there\n"), fails("fcntl.lockf", errno.EWOULDBLOCK),
    init_from="resume", says="out_dir='out' is in use by process 7 on there: let it end, or give another --out_dir")

# ---- folders -----------------------------------------------------------------------------------------------
row("out_dir is a file", file("out", "words"), says="out_dir='out' can't be made")
row("out_dir where nobody may write", out_dir="/proc/out", says="out_dir='/proc/out' can't be made")
row("a read-only disk", fails("os.makedirs", errno.EROFS), says="Read-only file system")
row("nothing to resume", init_from="resume", says="there is no checkpoint out/ckpt.pt: train with --out_dir=out first")

# ---- the disk ----------------------------------------------------------------------------------------------
row("a full disk", fails("os.fsync", errno.ENOSPC), changes=("out", *STARTED),
    says=("not saved: out/ckpt.pt can't be written (No space left on device)", "training goes on"))
row("a full disk in a run that goes on", a_run, fails("os.fsync", errno.ENOSPC), init_from="resume", max_iters=6,
    changes=SAVED, says="not saved")
row("a disk that can't rename", a_run, fails("os.replace", errno.EIO), init_from="resume", max_iters=6,
    says="not saved", changes=STARTED)

# ---- what a checkpoint holds -------------------------------------------------------------------------------


def refused(what, *given, says, **keys):
    """A checkpoint that resuming refuses; nothing is changed."""
    row(f"a checkpoint with {what}", a_run, *given, init_from="resume", max_iters=6, says=says, **keys)


FC = "transformer.h.0.mlp.c_fc.weight"
refused("a weight that is nan", held(lambda c: c["model"][FC][0].fill_(math.nan)), says="not finite", changes=SAVED)
refused("no weights", entry("model", {}), says="it lacks model")
refused("a weight missing", held(lambda c: c["model"].pop(FC)), says="Missing key")
refused("no optimizer", held(lambda c: c.pop("optimizer")), says="it lacks optimizer")
refused("no zip and no pickle", file("out/ckpt.pt", b"words" * 99), says="damaged or not a checkpoint")
refused("its end missing", cut("out/ckpt.pt", 9000),
    says=("damaged or not a checkpoint", "out/ckpt.prev.pt beside it is whole"))
refused("code in it", file("out/ckpt.pt", pickle.dumps(print)), says="it holds more than plain data")
THEIRS = {"rng": torch.get_rng_state(), "data": "markov", "metrics": {"loss": 1.5}, "split": [0.9, 0.1], "epoch": 3}
row("generators and figures of another train.py", a_run, held(lambda c: c.update(THEIRS)), init_from="resume",
    max_iters=6, code=0, changes=SAVED)

# ---- numbers -----------------------------------------------------------------------------------------------
row("a learning rate that is infinite", argv=["--learning_rate=1e999"], says="learning_rate must be a finite number")
row("a learning rate beyond reason", learning_rate=1e30, max_iters=3, says="finite", changes=("out", *SAVED))
row("a width beyond reason", n_embd=2**42, says="memory", changes=("out", *STARTED))
row("a batch of none", batch_size=0, says="batch_size must be at least 1")

# ---- keys and config files ---------------------------------------------------------------------------------
row("a config file that isn't there, and scripts that are", file("doctor.py"), file("configurator.py"),
    argv=["dokter.py"], says="config file 'dokter.py' does not exist (a key is set by", never="did you mean")
row("a config file that isn't there, and one of config/", file("config/train_tiny.py"), argv=["trian_tiny.py"],
    says="config file 'trian_tiny.py' does not exist; did you mean 'config/train_tiny.py'?")
row("a config file without its ending", file("mine.py"), argv=["mine"], says="did you mean 'mine.py'?")
row("a config file that Windows wrote", file("c.py", b"\xef\xbb\xbfmax_iters = 2\r\n"), argv=["c.py"], code=0,
    says="max_iters = 2", changes=("out", *SAVED))
row("ranks of a plan for no card", no_gpu, ranks=2, device="cuda", dry_run=True, gradient_accumulation_steps=2,
    says="there is no CUDA GPU here: name the card that the plan is for, as in --gpu='RTX 3060'", never="torchrun")
row("shard on one process", shard=True, says="shard=True shares a model out among several ranks")

# ---- data --------------------------------------------------------------------------------------------------
row("train.bin of an odd size", cut("data/markov/train.bin", 4001), says="expected uint16 tokens")
row("tokens beyond the vocabulary", file("data/markov/train.bin", b"\xff" * 4000), says="holds token 65535",
    changes=("out", *STARTED))
row("other data of the same size", a_run, file("data/markov/train.bin", bytes(120000)), init_from="resume", max_iters=6,
    code=0, changes=SAVED, says="train.bin is not what it was when the checkpoint was saved")
row("a vocabulary too small for the data", file("data/markov/meta.pkl", pickle.dumps({"vocab_size": 3})),
    says="but the vocabulary has 3", changes=("out", *STARTED))

# ---- auto_fit's answer, which is only a cache --------------------------------------------------------------


def fitted(what, *given, **case):
    """A run that would fit the device, and whose search is known."""
    answer = Plan(2, 1, 1, reasons=("known",))
    known = lambda patch: patch.setattr(Fitter, "plan", lambda self, kept, *_: kept or answer)  # noqa: E731
    case = {"code": 0, "changes": ("out", *SAVED, "out/auto_fit.json"), "says": "batch_size 2 -> 1", **case}
    row(f"an answer that {what}", known, *given, auto_fit=True, max_iters=1, **case)


FULL = fails("nanofit.models.build", message="CUDA out of memory. Tried to allocate 6.14 GiB. GPU 0 has a total",
             error=torch.OutOfMemoryError)
row("no memory for the model", FULL, changes=("out", *STARTED), says="error: memory ran out on asking for 6.14 GiB\n")
fitted("is new")
fitted("is no JSON", file("out/auto_fit.json", "{"))
# ---- ranks -------------------------------------------------------------------------------------------------
row("a rank without a meeting place", environment(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2"),
    gradient_accumulation_steps=2, says="torchrun")

# ---- the machine -------------------------------------------------------------------------------------------
row("output on a full disk", lambda patch: patch.setattr(sys, "stdout", Broken()), changes=("out", *SAVED),
    says="standard output could not be written (No space left on device); all else was done")


# ---- sampling ----------------------------------------------------------------------------------------------


def sample(what, *given, **case):
    row(f"sampling: {what}", *given, **{"script": "sample.py", **case})
sample("a few tokens", a_run, code=0, says="out/ckpt.pt, of iteration 4")
sample("where only a last one is", a_run, last_of(5), gone("out/ckpt.pt"), code=0,
    says="out/ckpt.last.pt, of iteration 5")
sample("a temperature of none", a_run, temperature=0.0, says="use --top_k=1")
sample("a prompt from nowhere", a_run, start="FILE:nowhere", says="the prompt can't be read")
sample("lines that Windows wrote", a_run, lambda patch: patch.setattr(sys, "stdin",
    io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfa\r\n\r\nA"), encoding="latin-1", newline="\n")), start="-", code=0,
    says="---------------")

# ---- the benchmark -----------------------------------------------------------------------------------------
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
