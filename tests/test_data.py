"""The prepare.py files, on copies of their folders: what a user runs, what they write, and what stops them."""

import contextlib
import gzip
import importlib
import json
import os
import runpy
import shutil
import signal
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import tiktoken
from conftest import ROOT, files_of_at_most
from pyarrow.parquet import write_table

from nanofit.codec import load_meta
from nanofit.errors import UsageError

DOCUMENTS = [f"Document number {i}: " + "word " * i for i in range(40)]


@pytest.fixture
def project(workplace, monkeypatch):
    """A copy of what prepare.py needs, so that the checkout's own data stays as it is."""
    ignore = shutil.ignore_patterns("*.bin", "*.pkl", "*.part", "prepared.json", "input.txt", "__pycache__")
    for name in ("data", "config", "nanofit"):
        shutil.copytree(ROOT / name, workplace / name, ignore=ignore, dirs_exist_ok=True)
    monkeypatch.syspath_prepend(workplace / "data")
    monkeypatch.delitem(sys.modules, "corpus", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    handler = signal.getsignal(signal.SIGTERM)
    yield workplace
    signal.signal(signal.SIGTERM, handler)
    sys.modules.pop("corpus", None)


@pytest.fixture
def corpus(project):
    return importlib.import_module("corpus")


def prepare(name, *argv):
    """Run a prepare.py as python would, in this process: a UsageError is what ends it with a sentence."""
    before = sys.argv
    sys.argv = [f"data/{name}/prepare.py", *map(str, argv)]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv = before


def tokens(name, split):
    return np.fromfile(f"data/{name}/{split}.bin", dtype="<u2")


def symbols(name):
    """The text of a character-level data set, train before val."""
    meta = load_meta(f"data/{name}")
    return "".join(meta["itos"][i] for i in np.concatenate([tokens(name, "train"), tokens(name, "val")]).tolist())


def documents(name, split):
    return tiktoken.get_encoding("gpt2").decode(tokens(name, split).tolist()).split("<|endoftext|>")[:-1]


def contents(name):
    """{file: its bytes} of a data set, without its prepare.py."""
    folder = Path("data") / name
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != "prepare.py"}


def write_parquet(path, **columns):
    write_table(pyarrow.table(columns), path)


def test_shakespeare_by_characters(project, shared):
    text = shared / "text" / "tinyshakespeare.txt"
    prepare("shakespeare_char", "--input", text)
    assert (len(tokens("shakespeare_char", "train")), len(tokens("shakespeare_char", "val"))) == (1_003_854, 111_540)
    meta = load_meta("data/shakespeare_char")
    assert meta["vocab_size"] == 65
    assert meta["stoi"] == {c: i for i, c in meta["itos"].items()}
    assert symbols("shakespeare_char") == text.read_text()
    prepare("from_text", text, "--characters")
    ours, theirs = contents("tinyshakespeare"), contents("shakespeare_char")
    assert all(ours[name] == theirs[name] for name in ("train.bin", "val.bin", "meta.pkl"))


def test_shakespeare_in_bpe(project, shared, bpe):
    prepare("shakespeare", "--input", shared / "text" / "tinyshakespeare.txt")
    assert (len(tokens("shakespeare", "train")), len(tokens("shakespeare", "val"))) == (301_966, 36_059)
    assert set(contents("shakespeare")) == {"train.bin", "val.bin", "prepared.json"}
    record = json.loads(contents("shakespeare")["prepared.json"])
    assert record == {"encoding": "GPT-2 BPE", "dtype": "uint16", "tokens": {"train": 301_966, "val": 36_059}}


@pytest.mark.parametrize(
    ("argv", "content", "sentence"),
    [
        (["--input", "nowhere.txt"], None, "nowhere.txt can't be read as UTF-8 text"),
        (["--input", "bad.txt"], b"\xff\xfe\xff", "bad.txt can't be read as UTF-8 text"),
        ([], None, "can't be fetched .*: connect to the network, or give the text with --input FILE"),
    ],
)
def test_mistakes_with_text(project, monkeypatch, argv, content, sentence):
    if content is not None:
        (project / argv[1]).write_bytes(content)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # it refuses: no network, on any machine
    with pytest.raises(UsageError, match=sentence) as error:
        prepare("shakespeare_char", *argv)
    assert len(str(error.value).splitlines()) == 1
    assert contents("shakespeare_char") == {}


def write_documents(kind):
    """Write DOCUMENTS in a way that --source takes; returns what to give it."""
    lines = "".join(json.dumps({"text": t, "url": "x"}) + "\n" for t in DOCUMENTS).encode()
    if kind == "folder":
        Path("docs/more").mkdir(parents=True)
        write_parquet("docs/0.parquet", text=DOCUMENTS[:15], url=["x"] * 15)
        write_parquet("docs/more/1.parquet", text=DOCUMENTS[15:], url=["x"] * 25)
        return "docs"
    content = {"jsonl.gz": gzip.compress(lines), "txt": "\n\n".join(DOCUMENTS).encode(),
               "list.json": json.dumps([{"text": t} for t in DOCUMENTS], indent=1).encode()}  # fmt: skip
    Path(f"docs.{kind}").write_bytes(content[kind])
    return f"docs.{kind}"


def test_the_block_sizes_of_config_are_those_that_a_split_is_checked_for(corpus):
    sizes = {runpy.run_path(str(path)).get("block_size", 1024) for path in ROOT.glob("config/*.py")}
    assert tuple(sorted(sizes)) == corpus.BLOCK_SIZES


@pytest.mark.parametrize("kind", ["folder", "jsonl.gz", "list.json", "txt"])
def test_openwebtext_from_local_files(project, bpe, corpus, monkeypatch, kind):
    monkeypatch.setattr(corpus, "BLOCK_SIZES", (1,))
    prepare("openwebtext", "--source", write_documents(kind), "--num_proc=2")
    assert len(documents("openwebtext", "val")) == 1
    found = [document.strip() for split in ("train", "val") for document in documents("openwebtext", split)]
    assert sorted(found) == sorted(document.strip() for document in DOCUMENTS)
    assert found != [document.strip() for document in DOCUMENTS], "they are shuffled"
    assert not os.path.exists("data/openwebtext/meta.pkl")


def test_the_split_is_nanogpts(project, bpe, corpus, monkeypatch):
    """datasets.train_test_split with nanoGPT's arguments, then one document after the other: the same bytes."""
    import datasets

    texts = [f"{i} is a number" * (i % 3) for i in range(4001)]
    gpt2 = tiktoken.get_encoding("gpt2")
    splits = datasets.Dataset.from_dict({"text": texts}).train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    expected = {name: [[*gpt2.encode_ordinary(t), 50256] for t in splits[name]["text"]] for name in ("train", "test")}
    write_parquet("docs.parquet", text=texts)
    monkeypatch.setattr(corpus, "BLOCK_SIZES", (1,))
    prepare("openwebtext", "--source=docs.parquet")
    assert len(expected["test"]) == 3
    assert tokens("openwebtext", "train").tolist() == list(chain(*expected["train"]))
    assert tokens("openwebtext", "val").tolist() == list(chain(*expected["test"]))


def test_max_tokens_takes_the_first_documents(project, bpe):
    texts = [f"number {i} " + "word " * (i % 50) for i in range(2000)]
    write_parquet("docs.parquet", text=texts)
    prepare("openwebtext", "--source=docs.parquet", "--max_tokens=20_000", "--out=first")
    train, val = documents("first", "train"), documents("first", "val")
    taken = len(train) + len(val)
    assert sorted(train + val) == sorted(texts[:taken])
    counts = {split: len(tokens("first", split)) for split in ("train", "val")}
    assert 20_000 <= sum(counts.values()) < 20_000 + 60
    record = json.loads(contents("first")["prepared.json"])
    assert (record["tokens"], record["documents"]) == (counts, {"train": len(train), "val": len(val)})
    assert (record["source"], record["max_tokens"]) == ("docs.parquet", 20_000)


def test_the_hub_is_read_as_a_stream(project, bpe, monkeypatch):
    import datasets

    asked, given = [], []

    def rows():
        for i in range(10_000):
            given.append(i)
            yield {"body": f"row {i} " * 20, "url": "x"}

    def load_dataset(*args, **keys):
        asked.append((args, keys))
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = ["--source=somebody/corpus", "--name=sample", "--text_column=body"]
    prepare("openwebtext", *hub, "--max_tokens=2_000", "--out=sample")
    assert asked == [(("somebody/corpus", "sample"), {"split": "train", "streaming": True, "num_proc": None})]
    assert len(given) < 10_000, "not all of it was fetched"
    assert sorted(documents("sample", "train") + documents("sample", "val"))[0] == "row 0 " * 20

    with pytest.raises(UsageError, match="somebody/corpus has the columns body, url: expected one named 'text'"):
        prepare("openwebtext", "--source=somebody/corpus", "--max_tokens=2_000", "--out=sample")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"text": DOCUMENTS}))
    prepare("openwebtext", "--source=somebody/corpus", "--out=whole")
    assert sorted(documents("whole", "train") + documents("whole", "val")) == sorted(DOCUMENTS)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty.jsonl", b"", "--source empty.jsonl is empty"),
        ("one.txt", b"a single document", "has 1 document: at least two"),
        ("other.jsonl", b'{"body": "x"}\n', "other.jsonl has the columns body: expected one named 'text'"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:30], "cut.jsonl.gz can't be read: "),
        ("latin.txt", b"caf\xe9\n\nx\n", "latin.txt can't be read: .*utf-8"),
        ("broken.parquet", b"not parquet", "broken.parquet can't be read as parquet"),
    ],
)
def test_files_that_cannot_be_prepared(project, bpe, name, content, sentence):
    (project / name).write_bytes(content)
    with pytest.raises(UsageError, match=sentence):
        prepare("openwebtext", f"--source={name}", "--out=new")
    assert not os.path.exists("data/new"), "nothing is left of it"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--source=somebody/corpus"], "can't be fetched from the hub .* --name and the network"),
        (["--source=mixed"], "has .jsonl and .txt files: choose, as with --source='mixed/[*][*]/[*].jsonl'"),
        (["--out=shakespeare", "--source=mixed/a.jsonl"], "shakespeare is made by a prepare.py of its own"),
    ],
)
def test_arguments_that_cannot_be(project, bpe, argv, sentence):
    os.mkdir("mixed")
    for name in ("a.jsonl", "b.txt"):
        (project / "mixed" / name).touch()
    with pytest.raises(UsageError, match=sentence):
        prepare("openwebtext", *argv)
    assert contents("openwebtext") == {}


def test_documents_without_text_are_left_out_aloud(project, bpe, capsys):
    write_parquet("docs.parquet", text=["a", None, "b", "c", None])
    prepare("openwebtext", "--source=docs.parquet")
    assert sorted(documents("openwebtext", "train") + documents("openwebtext", "val")) == ["a", "b", "c"]
    assert "warning: left out: 2 documents without a text" in capsys.readouterr().err


def test_a_small_corpus_takes_a_larger_share_and_says_so(project, bpe, capsys):
    Path("docs.txt").write_text("\n\n".join("word " * 300 for _ in range(100)))
    prepare("openwebtext", "--source=docs.txt")
    assert len(documents("openwebtext", "val")) == 10
    assert "it takes 10 of 100 documents, 10.0% of the tokens\n" in capsys.readouterr().out


def test_five_characters_do_not_replace_good_data(project, capsys):
    (project / "long.txt").write_text("to be or not to be\n" * 500)
    (project / "five.txt").write_text("hello")
    prepare("shakespeare_char", "--input=long.txt")
    before = contents("shakespeare_char")
    with pytest.raises(UsageError, match="val has 1 tokens, too few for .* in config/, so that it doesn't"):
        prepare("shakespeare_char", "--input=five.txt")
    assert contents("shakespeare_char") == before
    prepare("shakespeare_char", "--input=five.txt", "--force")
    assert symbols("shakespeare_char") == "hello"


@pytest.fixture
def tales(project):
    folder = project / "my tales"
    (folder / "more").mkdir(parents=True)
    (folder / "a.txt").write_text("Once upon a time.\n" * 100)
    polish = "\ufeffZażółć gęślą jaźń!\r\n\r\n  Twice." * 100
    (folder / "more" / "b.md").write_text(polish, encoding="utf-8", newline="")
    (folder / "c").write_text("The end")
    others = {".hidden": b" \n", "blank.txt": b" \n", "picture.jpg": b"\xff\xd8\xff", "utf16.txt": b"a\0b\0"}
    for name, content in others.items():
        (folder / name).write_bytes(content)
    return ["Once upon a time.\n" * 100, polish[1:].replace("\r\n", "\n"), "The end"]


def test_a_folder_becomes_a_data_set(project, tales, bpe, capsys):
    prepare("from_text", "my tales")
    said = capsys.readouterr()
    gpt2 = tiktoken.get_encoding("gpt2")
    both = np.concatenate([tokens("my_tales", "train"), tokens("my_tales", "val")])
    assert sorted(gpt2.decode(both.tolist()).split("<|endoftext|>")) == sorted(["", *tales])
    assert len(tokens("my_tales", "train")) == int(0.9 * len(both))
    assert "left out, because not UTF-8 text: my tales/picture.jpg, my tales/utf16.txt (it holds a NUL" in said.err
    assert "python train.py config/train_shakespeare_char.py --dataset=my_tales" in said.out


@pytest.mark.parametrize(
    "text", ["a line\n" * 50, "line\n\n  spaced\n \nline's\r\n'll\n" * 20, "no line end", "\n\n\n"]
)
def test_pieces_have_the_tokens_of_the_whole(project, bpe, text):
    names = runpy.run_path("data/from_text/prepare.py")
    names["pieces"].__globals__["PIECE"] = 40
    Path("text.txt").write_text(text, newline="")
    pieces = list(names["pieces"]("text.txt"))
    text = text.replace("\r\n", "\n")
    assert "".join(piece for piece, _ in pieces) == text
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
    assert len(pieces) > 1 or "\n" not in text.strip()
    gpt2 = tiktoken.get_encoding("gpt2")
    assert list(chain(*(gpt2.encode_ordinary(piece) for piece, _ in pieces))) == gpt2.encode_ordinary(text)


@pytest.fixture
def mine(project, bpe):
    """A text, and a data set data/mine; returns what is in its folder."""
    (project / "words.txt").write_text("that is the question\n" * 900)
    prepare("from_text", "words.txt", "--characters", "--out=mine")
    return contents("mine")


def test_no_symbols_stay_beside_tokens_of_bpe(mine):
    assert set(mine) == {"train.bin", "val.bin", "meta.pkl", "prepared.json"}
    prepare("from_text", "words.txt", "--out=mine")
    assert set(contents("mine")) == {"train.bin", "val.bin", "prepared.json"}
    prepare("from_text", "words.txt", "--characters", "--out=mine")
    assert contents("mine") == mine


@pytest.mark.parametrize("order", [("characters", "words"), ("words", "characters")])
def test_a_kill_between_any_two_files_leaves_old_or_new_or_nothing_to_train_on(corpus, order):
    def make(kind):
        with corpus.DataSet("data/mine") as made:
            if kind == "characters":
                made.write_meta(2, stoi={"a": 0, "b": 1})
            for split in ("train", "val"):
                made.write(split, np.full(2000, len(kind)))

    def contents_of(kind):
        make(kind)
        return contents("mine")

    new, old = contents_of(order[1]), contents_of(order[0])
    states = []
    for last in range(100):
        assert contents_of(order[0]) == old
        child = os.fork()
        if child == 0:
            left = iter(range(last))

            def dies(act, left=left):
                return lambda *args, **keys: act(*args, **keys) if next(left, None) is not None else os._exit(9)

            with contextlib.suppress(BaseException):
                for place, name in [(os, "rename"), (os, "fsync"), (Path, "unlink"), (Path, "rmdir")]:
                    setattr(place, name, dies(getattr(place, name)))
                make(order[1])
                os._exit(0)
            os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9)
        found = contents("mine")
        states.append("old" if found == old else "new" if found == new else "neither")
        can_train = {"train.bin", "val.bin"} <= set(found)
        assert not can_train or states[-1] != "neither", f"killed after {last} operations"
        with contextlib.suppress(KeyError), corpus.DataSet("data/mine"):
            raise KeyError("the next prepare.py, which comes to nothing")
        after = contents("mine")
        assert after == new or after == found == old, "the next one ends what was begun"
        assert not list(Path("data/mine").glob("*.part"))
        if code == 0:
            break
    assert code == 0
    assert set(states) == {"old", "new", "neither"}


def test_a_full_disk_ends_in_a_sentence(mine, project):
    (project / "long.txt").write_text("to be or not to be\n\n" * 10_000)
    ways = (["from_text", "long.txt"], ["from_text", "long.txt", "--characters"], ["openwebtext", "--source=long.txt"])
    for argv in ways:
        full = pytest.raises(UsageError, match="can't be written .File too large.: make room")
        with files_of_at_most(4096), full:
            prepare(*argv, "--out=mine")
    assert contents("mine") == mine
    assert sorted(os.listdir("data/mine")) == sorted(mine)
