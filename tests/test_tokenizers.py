"""Tokenizers that people bring: --tokenizer of the prepare.py files, and what finds them again."""

import io
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from conftest import flags, random_texts, run_script, train
from test_data import prepare, project  # noqa: F401

from nanofit.codec import codec_named, codec_of, differs, load_meta
from nanofit.errors import UsageError
from nanofit.tools import huggingface

pytestmark = pytest.mark.usefixtures("project")  # a copy of data/
CL100K = 100_277  # symbols, of which some ids stand for nothing
STORIES = ["Once upon a time there was a fox.", "The end.\n\nOr not?", "été 日本語 🙂", "It's 12345, they'll say."]


def byte_level(path="tokenizer.json"):
    """A byte-level BPE of Hugging Face's, trained on a few lines; truncation is on, as some files have it."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(STORIES * 5, vocab_size=300, min_frequency=1, special_tokens=["</s>"], show_progress=False)
    made.enable_truncation(4)
    made.save(path)
    return path


def sentencepiece(path="spm.model"):
    """A SentencePiece model that keeps a text as it is; what it hasn't seen it spells in bytes."""
    library = pytest.importorskip("sentencepiece", reason="pip install sentencepiece")
    model = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(STORIES * 20), model_writer=model, vocab_size=320, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    Path(path).write_bytes(model.getvalue())
    return path


@pytest.fixture
def cl100k(monkeypatch, bpe):
    """tiktoken's cl100k_base by its number of symbols, pattern and special tokens; its merges are made of GPT-2's."""
    from tiktoken_ext import openai_public

    gpt2 = tiktoken.get_encoding("gpt2")
    ranks = {token: i for i, token in enumerate(sorted(gpt2.token_byte_values(), key=gpt2.encode_single_token))}
    words = [token for token in ranks if len(token) > 2]
    numbers = itertools.count(len(ranks))
    while len(ranks) < 100_256:
        a, b = divmod(next(numbers) * 7919, len(words))
        ranks.setdefault(words[a % len(words)] + words[b], len(ranks))
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **keys: ranks)
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "cl100k_base", tiktoken.Encoding(**openai_public.cl100k_base()))
    return "cl100k_base"


def gpt2():
    return "gpt2"


@pytest.mark.parametrize("make", [gpt2, byte_level, sentencepiece], ids=lambda make: make.__name__)
def test_any_text_comes_back(make, bpe):
    codec = codec_named(make())
    for text in random_texts(1000):
        ids = codec.encode_ordinary(text)
        assert codec.decode(ids) == text
        assert codec.decode(codec.encode(text)) == text
        assert max(ids, default=0) < codec.symbols
    special = codec.decode([codec.end])
    assert codec.encode(f"a{special}").count(codec.end) == 1
    assert codec.end not in codec.encode_ordinary(f"a{special}")
    padding = [codec.symbols, codec.symbols + 50]
    assert codec.decode([*codec.encode("Hello"), *padding]) == "Hello"
    nothing = {i for i in range(codec.symbols + 50) if not codec.decode([i, i])} - {1}  # SentencePiece's <s>
    assert nothing == set(range(codec.symbols, codec.symbols + 50))


def test_any_text_comes_back_by_100_277_symbols_and_as_a_tokenizer_json(cl100k):
    pytest.importorskip("tokenizers")
    codec = codec_named(cl100k)
    assert (codec.symbols, codec.decode([100_256])) == (CL100K, ""), "that id is a gap"
    theirs = huggingface.tokenizer_of(codec)
    for text in random_texts(1000):
        ids = codec.encode(text)
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids, skip_special_tokens=False) == codec.decode(ids) == text


def prepared(tokenizer, texts=STORIES):
    """Make data/mine of a folder of these texts; the documents that it then holds, sorted, and prepared.json."""
    os.makedirs("texts", exist_ok=True)
    for i, text in enumerate(texts):
        Path("texts", f"{i}.txt").write_text(text, encoding="utf-8")
    prepare("from_text", "texts", "--tokenizer", tokenizer, "--out=mine")
    return documents("mine"), json.loads(Path("data/mine/prepared.json").read_text())


def documents(name):
    codec, kind = codec_of(f"data/{name}"), json.loads(Path(f"data/{name}/prepared.json").read_text())["dtype"]
    ids = [i for split in ("train", "val") for i in np.fromfile(f"data/{name}/{split}.bin", kind).tolist()]
    *found, rest = codec.decode(ids).split(codec.decode([codec.end]) if codec.end is not None else "\0")
    return sorted(found) or rest


SMALL = dict(n_layer=1, n_head=1, n_embd=8, block_size=8, batch_size=2, eval_iters=1, eval_interval=2, max_iters=2)
DRAW = dict(device="cpu", num_samples=1, max_new_tokens=5, start="Once")


@pytest.mark.parametrize("make", [byte_level, sentencepiece], ids=lambda make: make.__name__)
def test_the_tokenizer_is_kept_beside_the_data_and_in_an_exported_folder(make):
    pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    found, record = prepared(make(), texts=STORIES * 3)
    codec = codec_of("data/mine")
    assert found == sorted(STORIES * 3)
    meta = load_meta("data/mine")
    assert meta["vocab_size"] % 64 == 0
    assert meta["symbols"] == codec.symbols <= meta["vocab_size"] < codec.symbols + 64
    assert differs(meta, meta["vocab_size"]) == differs(meta, codec.symbols) == []
    assert record["dtype"] == "uint16"

    train(dataset="mine", **SMALL)
    name = os.path.basename(codec.name)
    assert f"symbols: data/mine/{name}\nOnce" in run_script("sample.py", *flags(**DRAW)).text
    run_script("export.py", "--to=hf")
    assert codec_of("hf").encode("Once upon") == codec.encode("Once upon")
    assert f"symbols: hf/{name}\nOnce" in run_script("sample.py", *flags(**DRAW, init_from="hf", stop="")).text

    if name == "tokenizer.json":
        stripping = tokenizers.Tokenizer.from_file("hf/tokenizer.json")
        stripping.normalizer = tokenizers.normalizers.Strip()
        stripping.save("hf/tokenizer.json")
        with pytest.raises(UsageError, match=r"hf/tokenizer.json makes no tokens of the prompt '\\n': give another"):
            run_script("sample.py", *flags(device="cpu", init_from="hf"))

    prepare("from_text", "texts", "--characters", "--out", "mine", "--force")
    assert not Path("data/mine", name).exists(), "another tokenizer takes its place"
    assert codec_of("data/mine").name == "data/mine/meta.pkl"


def test_a_model_of_100_277_symbols_trains_samples_exports_and_comes_back(cl100k):
    transformers = pytest.importorskip("transformers")
    found, record = prepared(cl100k)
    assert found == sorted(STORIES)
    assert (record["encoding"], record["dtype"]) == ("cl100k_base", "uint32")
    ran = train(dataset="mine", **{**SMALL, "block_size": 2})
    assert "vocab_size 100288 (of data/mine/meta.pkl)" in ran.text
    sampled = run_script("sample.py", *flags(**DRAW)).text
    assert "symbols: cl100k_base\n" in sampled
    run_script("export.py", "--to=hf")
    config = json.loads(Path("hf/config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (CL100K, 100_257)
    theirs = transformers.AutoTokenizer.from_pretrained("hf")
    assert theirs("It's 12345!<|endoftext|>").input_ids == codec_named(cl100k).encode("It's 12345!<|endoftext|>")
    back = run_script("sample.py", *flags(**DRAW, init_from="hf")).text
    assert "symbols: hf/tokenizer.json\na sample ends before <|endoftext|>" in back
    assert train(dataset="mine", init_from="hf", out_dir="again", **{**SMALL, "block_size": 2}).iter_loss


def test_documents_follow_each_other_where_a_tokenizer_names_no_end(capsys):
    tokenizers = pytest.importorskip("tokenizers")
    symbols = {c: i for i, c in enumerate(sorted(set("".join(STORIES))))}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(symbols, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    os.mkdir("folder")
    made.save("folder/tokenizer.json")
    assert prepared("folder", texts=["aaa", "eee"])[0] in ("aaaeee", "eeeaaa")
    assert "names no end of a text" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--tokenizer=cl100k"], "there is no tokenizer 'cl100k': expected .* gpt2, .*cl100k_base"),
        (["--tokenizer=gone.json"], "gone.json can't be read"),
        (["--tokenizer=bad.model"], "bad.model can't be read, it is damaged or no SentencePiece model"),
        (["--tokenizer=texts"], "the folder texts has neither a tokenizer.json nor a tokenizer.model"),
        (["--tokenizer=cl100k_base", "--characters"], "--characters and --tokenizer .* choose one"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(argv, sentence):
    if "model" in argv[0]:
        pytest.importorskip("sentencepiece")
    os.mkdir("texts")
    Path("texts/a.txt").write_text("a text")
    Path("bad.model").write_text("?")
    with pytest.raises(UsageError, match=sentence):
        prepare("from_text", "texts", *argv)
    assert not Path("data/texts").exists()
