"""Helpers that every test may use: the reference figures, a toy data set, and train.py run in this process."""

import contextlib
import io
import json
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # these tensors are so small that threads would only be in the way
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test depends on a network, nor waits until there is none
if narrow := os.environ.get("ATEN_CPU_CAPABILITY"):  # what Inductor keeps of other instructions doesn't compile with it
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"inductor-{narrow}"))
import torch

ROOT = Path(__file__).resolve().parent.parent
WRITER = "checkpoint"  # the thread that writes one, by nanofit/run.py
REFERENCE = ROOT / "tests" / "reference"
RANK = ROOT / "tests" / "rank.py"  # train.py, and then a file that tells a rank's weights
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / "tests" / "models"))  # model.py as people bring it

TOY = {  # the reference runs' model, on the reference runs' data
    "dataset": "markov", "device": "cpu", "compile": False, "n_layer": 2, "n_head": 2, "n_embd": 64,
    "block_size": 32, "batch_size": 8, "gradient_accumulation_steps": 1, "eval_iters": 4, "eval_interval": 10,
    "log_interval": 1, "warmup_iters": 5, "learning_rate": 0.003, "min_lr": 0.0003, "max_iters": 20,
    "lr_decay_iters": 40,
}  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups here too
def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.xdist_group("gpu"))  # there may be memory for one of them at a time
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@dataclass
class Run:
    """What a script printed and, if it ran in this process, its globals when it ended."""

    text: str
    names: dict | None = None

    @property
    def iter_loss(self):
        """{iteration: loss as printed}"""
        return {int(i): float(v) for i, v in re.findall(r"^iter (\d+): loss (\S+), time ", self.text, re.MULTILINE)}

    @property
    def eval_loss(self):
        """{iteration: (train, val) as printed}"""
        found = re.findall(r"^step (\d+): train loss (\S+), val loss (\S+)$", self.text, re.MULTILINE)
        return {int(i): (float(a), float(b)) for i, a, b in found}


def flags(**keys):
    return [f"--{k}={v}" for k, v in keys.items()]


@contextlib.contextmanager
def as_a_process(name, *argv):
    """What python sets up for a script of the project, put back at the end; the value is the script's path."""
    before = sys.argv, sys.excepthook, sys.stdout, sys.stderr
    interrupted = signal.getsignal(signal.SIGINT)
    sys.argv = [name, *argv]
    try:
        yield str(ROOT / name)
    finally:
        for thread in threading.enumerate():
            if thread.name == WRITER:
                thread.join()  # as python waits for it; those of the compiler's pools would wait for us
        sys.argv, sys.excepthook, sys.stdout, sys.stderr = before
        signal.signal(signal.SIGINT, interrupted)


def run_script(name, *argv):
    """Run a script of the project as python would, in the current folder: much faster than a new process.

    Where it ends with a SystemExit, what it had printed is that one's .text.
    """
    out = io.StringIO()
    try:
        with as_a_process(name, *argv) as path, contextlib.redirect_stdout(out):
            names = runpy.run_path(path, run_name="__main__")
    except SystemExit as stop:
        stop.text = out.getvalue()
        raise
    return Run(out.getvalue(), names)


def train(*argv, **keys):
    return run_script("train.py", *argv, *flags(**{**TOY, **keys}))


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def torchrun(*arguments, check=True):
    """What follows the word torchrun, run in the current folder: (Run, what went to standard error, exit code).

    check: let the test fail where a rank did.
    """
    done = subprocess.run([*TORCHRUN, *arguments], capture_output=True, text=True, timeout=240, env=environment())
    assert done.returncode == 0 or not check, done.stderr[-3000:]
    return Run(done.stdout), done.stderr, done.returncode


def ranks_of(count, *options, first="", then="", **keys):
    """What torchrun is given for so many processes of this machine's CPU: train.py at toy size in each.

    first, then: Python that each of them runs before and after it.
    """
    lines = ("import os, runpy, sys", f"sys.path += {[str(ROOT / 'tests'), str(ROOT / 'tests' / 'models')]}", first)
    Path("ranks.py").write_text("\n".join((*lines, f"runpy.run_path({str(RANK)!r}, run_name='__main__')", then)))
    options = ("--standalone", f"--nproc_per_node={count}", *options)
    return [*options, "ranks.py", *flags(**{**TOY, "backend": "gloo", **keys})]


def train_on_ranks(count, *options, check=True, **more):
    """As torchrun() of ranks_of()."""
    return torchrun(*ranks_of(count, *options, **more), check=check)


@contextlib.contextmanager
def started(*command, until, **more):
    """A process whose output, in the file log, has come to these words; it is killed at the end if it hasn't ended."""
    # A shell that starts tests in the background lets them ignore SIGINT, and what they start would go on doing so.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with open("log", "w") as log:
        options = dict(env=environment(PYTHONUNBUFFERED="1", **more), preexec_fn=heard)
        child = subprocess.Popen(command, stdout=log, stderr=log, **options)
    try:
        end = time.monotonic() + 240
        while until not in Path("log").read_text():
            assert child.poll() is None, Path("log").read_text()
            assert time.monotonic() < end
            time.sleep(0.01)
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Every test runs in an empty folder of its own that has the toy data set, outside any torchrun."""
    shutil.copytree(REFERENCE / "markov", tmp_path / "data" / "markov")
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture(scope="session")
def reference():
    return json.loads((REFERENCE / "losses.json").read_text())


@pytest.fixture(scope="session")
def shared():
    """Material that lies beside the checkout on some machines: GPT-2's BPE tables and a text."""
    folder = ROOT.parent / "shared"
    if not (folder / "tiktoken_cache").is_dir():
        pytest.skip("no ../shared/tiktoken_cache with GPT-2's BPE tables")
    return folder


@pytest.fixture
def bpe(shared, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "tiktoken_cache"))


@pytest.fixture(scope="session")
def hugging_face_gpt2(tmp_path_factory):
    """(folder, model): a GPT-2 with two layers and random weights, saved as Hugging Face does."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=64, n_positions=64, vocab_size=257)
    model = transformers.GPT2LMHeadModel(config).eval()
    folder = tmp_path_factory.mktemp("hf") / "gpt2-tiny"
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
    return str(folder), model


def random_texts(count):
    """Unicode of all kinds, ASCII, white space and what tokenizers cut at more often.

    Without NUL, and without U+2581, which SentencePiece gives back as a space.
    """
    draw = random.Random(0)
    ranges = ((0, 0x110000), (0, 0x3000), (0, 128), (32, 127))
    kinds = [lambda low=low, high=high: chr(draw.randrange(low, high)) for low, high in ranges]
    words = [*" \t\n\r\x0b\x1c\x85\xa0\u2003\u200b\u3000'sdmtlvre1\u0661a\u0301", "  ", "\r\n", "'ll", "123", "Ab"]
    words += ["<|endoftext|>", "</s>", "\U0001f469\u200d\U0001f680"]
    kinds.append(lambda: draw.choice(words))
    texts = ["".join(draw.choice(kinds)() for _ in range(draw.randrange(1, 50))) for _ in range(count)]
    return ["".join(c for c in text if not "\ud800" <= c < "\ue000" and c not in "\0\u2581") for text in texts]


@contextlib.contextmanager
def files_of_at_most(size):
    """Writes beyond size bytes of a file fail, the one that crosses the limit after its first part."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def hf(workplace):
    """A GPT-2 of one layer in the folder hf, in the place of the one that would come from the hub."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained("hf")


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def weights_of_ranks():
    """What tests/rank.py told of each rank's weights in this folder, in the order of ranks."""
    return [json.loads(path.read_text()) for path in sorted(Path().glob("weights-*.json"))]
