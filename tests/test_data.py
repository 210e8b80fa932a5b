"""The prepare.py files, run as a user runs them, on copies of their folders."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiktoken
from conftest import ROOT, environment, flags, run_script

from nanofit.codec import load_meta


@pytest.fixture
def project(workplace):
    """A copy of what prepare.py needs, so that the checkout's own data stays as it is."""
    for path in ("codec.py", "configurator.py"):
        shutil.copy(ROOT / path, workplace)
    ignore = shutil.ignore_patterns("*.bin", "*.pkl", "input.txt", "__pycache__")
    shutil.copytree(ROOT / "data", workplace / "data", ignore=ignore, dirs_exist_ok=True)
    return workplace


def prepare(name, *argv, **variables):
    command = [sys.executable, f"data/{name}/prepare.py", *argv]
    variables = {"HF_HOME": os.path.abspath("hf-home"), "HF_HUB_OFFLINE": "1", **variables}
    return subprocess.run(command, capture_output=True, text=True, env=environment(PYTHONPATH="", **variables))


def tokens(name, split):
    return np.fromfile(f"data/{name}/{split}.bin", dtype="<u2")


def test_shakespeare_by_characters(project, shared):
    text = shared / "text" / "tinyshakespeare.txt"
    done = prepare("shakespeare_char", "--input", str(text))
    assert done.returncode == 0, done.stderr
    train, val = tokens("shakespeare_char", "train"), tokens("shakespeare_char", "val")
    assert (len(train), len(val)) == (1_003_854, 111_540)
    meta = load_meta("data/shakespeare_char")
    assert meta["vocab_size"] == 65
    assert "".join(meta["itos"][i] for i in np.concatenate([train, val])) == text.read_text()
    assert meta["stoi"] == {c: i for i, c in meta["itos"].items()}


def test_shakespeare_in_bpe(project, shared):
    cache = str(shared / "tiktoken_cache")
    done = prepare("shakespeare", "--input", str(shared / "text" / "tinyshakespeare.txt"), TIKTOKEN_CACHE_DIR=cache)
    assert done.returncode == 0, done.stderr
    assert (len(tokens("shakespeare", "train")), len(tokens("shakespeare", "val"))) == (301_966, 36_059)
    assert not os.path.exists("data/shakespeare/meta.pkl")


def test_any_text_of_ones_own(project):
    (project / "mine.txt").write_text("zażółć\n" * 10, encoding="utf-8")
    assert prepare("shakespeare_char", "--input", "mine.txt").returncode == 0
    meta = load_meta("data/shakespeare_char")
    train, val = tokens("shakespeare_char", "train"), tokens("shakespeare_char", "val")
    assert "".join(meta["itos"][i] for i in np.concatenate([train, val])) == "zażółć\n" * 10
    assert len(train) == 63


def test_python_by_characters(project):
    done = prepare("python_char")
    assert done.returncode == 0, done.stderr
    meta = load_meta("data/python_char")
    train = tokens("python_char", "train")
    assert 8e6 < len(train) < 20e6
    assert len(train) == int(0.9 * (len(train) + len(tokens("python_char", "val"))))
    assert all(ord(c) < 128 for c in meta["stoi"])
    assert '"""' in "".join(meta["itos"][i] for i in train[:20_000])
    with open("data/python_char/meta.pkl", "rb") as f:
        assert set(pickle.load(f)) == {"vocab_size", "itos", "stoi"}


@pytest.mark.parametrize(
    ("argv", "content", "sentence"),
    [
        (["--input", "nowhere.txt"], None, "nowhere.txt can't be read as UTF-8 text"),
        (["--input", "bad.txt"], b"\xff\xfe\xff", "bad.txt can't be read as UTF-8 text"),
        (["--input", "empty.txt"], b"", "the text is empty"),
        ([], None, "can't be fetched .*: connect to the network, or give the text with --input FILE"),
    ],
)
def test_mistakes_with_text(project, argv, content, sentence):
    if content is not None:
        (project / argv[1]).write_bytes(content)
    # A proxy that refuses stands for no network, on any machine.
    done = prepare("shakespeare_char", *argv, https_proxy="http://127.0.0.1:9")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert re.search(sentence, done.stderr)
    assert len(done.stderr.splitlines()) == 1
    assert not list((project / "data" / "shakespeare_char").glob("*.bin"))


DOCUMENTS = [f"Document number {i}: " + "word " * i for i in range(40)]


def write_documents(folder, kind):
    if kind == "jsonl":
        (folder / "docs.jsonl").write_text("".join(json.dumps({"text": t, "url": "x"}) + "\n" for t in DOCUMENTS))
    elif kind == "txt":
        (folder / "docs.txt").write_text("\n\n".join(DOCUMENTS))
    else:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({"text": DOCUMENTS})
        pyarrow.parquet.write_table(table.slice(0, 15), folder / "docs-0.parquet")
        pyarrow.parquet.write_table(table.slice(15), folder / "docs-1.parquet")
        return "docs-*.parquet"
    return f"docs.{kind}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt"])
def test_openwebtext_from_local_files(project, shared, bpe, kind):
    cache = str(shared / "tiktoken_cache")
    source = write_documents(project, kind)
    done = prepare("openwebtext", "--source", source, "--num_proc", "2", TIKTOKEN_CACHE_DIR=cache)
    assert done.returncode == 0, done.stderr
    gpt2 = tiktoken.get_encoding("gpt2")
    splits = {split: gpt2.decode(tokens("openwebtext", split).tolist()) for split in ("train", "val")}
    documents = {split: text.split("<|endoftext|>")[:-1] for split, text in splits.items()}
    assert len(documents["val"]) == 1
    found = sorted(t.strip() for part in documents.values() for t in part)
    assert found == sorted(t.strip() for t in DOCUMENTS)
    assert all(text.endswith("<|endoftext|>") for text in splits.values())


@pytest.mark.slow
def test_openwebtext_mistakes(project, shared):
    cache = {"TIKTOKEN_CACHE_DIR": str(shared / "tiktoken_cache")}

    def error(*argv, **variables):
        done = prepare("openwebtext", *argv, **{**cache, **variables})
        assert done.returncode == 1, done.stdout
        assert "Traceback" not in done.stderr
        return done.stderr.splitlines()[-1]

    assert "can't be fetched from the hub" in error()
    assert "can't be fetched from the hub" in error("--source", "somebody/corpus")
    assert "no such file" in error("--source", "nowhere.parquet")
    (project / "one.txt").write_text("a single document")
    assert "has 1 document(s): at least two" in error("--source", "one.txt")
    (project / "other.jsonl").write_text('{"body": "x"}\n')
    assert "has the columns body: expected one named 'text'" in error("--source", "other.jsonl")
    (project / "broken.parquet").write_text("not parquet")
    assert "--source broken.parquet can't be read" in error("--source", "broken.parquet")
    (project / "docs.csv").write_text("a,b")
    assert "expected files that end in .parquet, .jsonl" in error("--source", "docs.csv")
    assert not list((project / "data" / "openwebtext").glob("*.bin"))


def test_a_prepared_set_trains_and_speaks(project):
    (project / "mine.txt").write_text("to be or not to be, that is the question\n" * 200)
    prepare("shakespeare_char", "--input", "mine.txt")
    keys = dict(dataset="shakespeare_char", device="cpu", compile=False, n_layer=1, n_head=1, n_embd=32, block_size=16,
                batch_size=16, gradient_accumulation_steps=1, max_iters=150, eval_interval=150, eval_iters=2,
                learning_rate=1e-2, warmup_iters=5, beta2=0.99)  # fmt: skip
    run = run_script("train.py", *flags(**keys))
    assert run.eval_loss[150][1] < 1.0 < run.eval_loss[0][1]
    text = run_script("sample.py", *flags(start="to be", num_samples=1, max_new_tokens=30, device="cpu")).text
    assert "question" in text or "not" in text or "that" in text
