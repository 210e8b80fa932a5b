"""export.py and what it writes, read by transformers alone, by train.py, by sample.py and by nanoGPT's."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REFERENCE, flags, random_texts, run_script, train
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from model import GPT, GPTConfig
from nanofit import checkpoint, models
from nanofit.codec import codec_of
from nanofit.errors import UsageError
from nanofit.tools import huggingface


def export(**keys):
    pytest.importorskip("transformers")
    return run_script("export.py", *flags(**keys)).text


def trained():
    """nanoGPT's checkpoint of the toy data set, in out."""
    os.makedirs("out", exist_ok=True)
    shutil.copy(REFERENCE / "upstream_ckpt.pt", "out/ckpt.pt")


def save(model, **entries):
    """A checkpoint of a model, in out."""
    os.makedirs("out", exist_ok=True)
    sizes = {name: getattr(model.config, name) for name in models.SIZES}
    torch.save({"model": model.state_dict(), "model_args": sizes, **entries}, "out/ckpt.pt")


def drawn(kind=GPT, **sizes):
    """A model with random weights so large that its logits differ widely."""
    torch.manual_seed(0)
    sizes = {**dict(block_size=16, vocab_size=50304, n_layer=2, n_head=2, n_embd=16, bias=False), **sizes}
    model = kind(GPTConfig(**sizes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8)
    return model


def ours():
    """The model that is in out, with its activation."""
    saved = checkpoint.load("out")
    model = models.build(GPT, GPTConfig, saved["model_args"])
    model.load_state_dict(saved["model"])
    models.set_activation(model, saved.get("activation"))
    return model.eval()


@torch.no_grad()
def difference(a, b, vocab_size=None):
    """The largest difference between logits of two of our models, at every position that they have."""
    size = min(a.config.vocab_size, b.config.vocab_size)
    idx = torch.randint(size, (2, a.config.block_size), generator=torch.Generator().manual_seed(1))
    return (a(idx, idx)[0][..., :size] - b(idx, idx)[0][..., :size]).abs().max().item()


STRANGER = """
import json, sys, torch, transformers
from pathlib import Path
assert not any(name.split(".")[0] in ("model", "nanofit", "configurator") for name in sys.modules)
told = {}
for folder, texts in json.loads(Path("texts.json").read_text()).items():
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        torch.save(model(torch.load(folder + ".idx.pt")).logits, folder + ".logits.pt")
    ids = [tokenizer(text).input_ids for text in texts]
    prompt = tokenizer.decode(ids[0][:3])
    said = transformers.pipeline("text-generation", model=folder)(prompt, max_new_tokens=5)[0]["generated_text"]
    told[folder] = dict(ids=ids, texts=[tokenizer.decode(i) for i in ids], model=type(model).__name__,
                        goes_on=said.startswith(prompt) and said != prompt, vocabulary=len(tokenizer))
Path("told.json").write_text(json.dumps(told))
"""


@pytest.mark.slow
def test_transformers_alone_reads_what_was_exported(bpe, shared):
    trained()
    export(to="char")
    folders = {"char": ours()}
    save(drawn(bias=True, dropout=0.1))
    export(to="words")
    folders["words"] = ours()
    codec = codec_of("data/markov")
    words = (shared / "text" / "tinyshakespeare.txt").read_text()[:50_000]
    texts = {"char": [codec.decode(list(range(65))) * 3], "words": [words, *random_texts(300)]}
    for folder, model in folders.items():
        torch.save(torch.randint(min(50257, model.config.vocab_size), (2, model.config.block_size)), f"{folder}.idx.pt")
    Path("texts.json").write_text(json.dumps(texts))
    Path("stranger.py").write_text(STRANGER)
    done = subprocess.run([sys.executable, "-I", "stranger.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(Path("told.json").read_text())
    for folder, model in folders.items():
        assert told[folder]["model"] == "GPT2LMHeadModel"
        theirs, idx = torch.load(f"{folder}.logits.pt"), torch.load(f"{folder}.idx.pt")
        with torch.no_grad():
            expected = model(idx, idx)[0][..., : theirs.shape[-1]]
        assert theirs.std() > 0.2
        assert (theirs - expected).abs().max() < 1e-4
        assert told[folder]["goes_on"]
    assert [told[folder]["vocabulary"] for folder in folders] == [65, 50257]
    assert told["char"]["texts"] == texts["char"]
    assert told["char"]["ids"] == [codec.encode(texts["char"][0])]
    bpe = codec_of(None)
    for text, ids, back in zip(texts["words"], told["words"]["ids"], told["words"]["texts"], strict=True):
        assert ids == bpe.encode(text)
        assert back == bpe.decode(ids) == text


def test_what_the_folder_holds():
    trained()
    os.umask(0o022)
    text = export(to="new/hf")
    assert "out/ckpt.pt -> new/hf: transformers' logits differ from ours by at most" in text
    config = json.loads(Path("new/hf/config.json").read_text())
    assert config["activation_function"] == "gelu"
    assert (config["n_positions"], config["n_ctx"], config["vocab_size"], config["eos_token_id"]) == (32, 32, 65, None)
    weights_there = load_file("new/hf/model.safetensors")
    assert "lm_head.weight" not in weights_there
    assert not weights_there["transformer.h.1.mlp.c_fc.bias"].any()  # the model has none
    assert {path.stat().st_mode & 0o777 for path in Path("new/hf").iterdir()} == {0o644}
    card = Path("new/hf/README.md").read_text()
    assert "4.1481" in card
    assert "learning_rate = 0.003" in card
    assert "out-to_resume" not in card  # the folder of the run is nobody else's business
    assert os.listdir("new") == ["hf"]


def test_the_vocabulary_is_cut_to_the_tokenizers_or_kept(bpe):
    save(drawn(n_layer=1))
    export(to="cut")
    export(to="kept", keep_padding=True)
    assert load_file("cut/model.safetensors")["transformer.wte.weight"].shape == (50257, 16)
    assert torch.equal(load_file("kept/model.safetensors")["transformer.wte.weight"], ours().lm_head.weight)
    config = json.loads(Path("kept/config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (50304, 50256)


def test_the_activation_survives_training_and_resuming():
    model = drawn(vocab_size=65, block_size=32, bias=True)
    models.set_activation(model, "gelu_new")
    save(model, activation="gelu_new", config={"dataset": "markov"})
    export(to="hf")
    train(init_from="hf", max_iters=10)
    assert checkpoint.load("out")["activation"] == "gelu_new"
    resumed = train(init_from="resume", max_iters=12)
    assert models.activation_of(resumed.names["raw_model"]) == "gelu_new"
    export(to="again")
    assert difference(GPT.from_pretrained("again").eval(), ours()) < 1e-4


class Squared(GPT):
    """GPT-2's weights, another activation."""

    def __init__(self, config):
        super().__init__(config)
        for block in self.transformer.h:
            block.mlp.gelu = type("ReLU2", (nn.Module,), {"forward": lambda self, x: F.relu(x) ** 2})()


class Untied(GPT):
    """A head of its own."""

    def __init__(self, config):
        super().__init__(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)


def export_model(model):
    pytest.importorskip("transformers")
    return huggingface.export(model, {"config": {}}, "hf", title="x", data_dir="data/markov", keep_padding=False)


def test_what_transformers_can_not_express_is_said_and_not_written():
    with pytest.raises(UsageError, match="can't express it: with GPT-2's weights it computes something else .logits"):
        export_model(drawn(Squared, vocab_size=65))
    assert sorted(os.listdir()) == ["data"]


def test_a_head_of_its_own_is_expressed():
    assert export_model(drawn(Untied, vocab_size=65)) < 1e-4
    assert json.loads(Path("hf/config.json").read_text())["tie_word_embeddings"] is False


def test_weights_alone_are_a_checkpoint_without_its_optimizer():
    trained()
    assert "out/ckpt.pt -> shared/ckpt.pt" in export(weights_only_to="shared/ckpt.pt")
    whole, alone = torch.load("out/ckpt.pt"), torch.load("shared/ckpt.pt", weights_only=True)
    assert set(alone) == {"model", "model_args", "config", "iter_num", "best_val_loss"}
    assert all(torch.equal(alone["model"][name], whole["model"][name]) for name in whole["model"])
    assert alone["config"]["dataset"] == "markov"
    assert not {"out_dir", "device", "wandb_project"} & set(alone["config"])  # they tell of the machine
    assert os.path.getsize("shared/ckpt.pt") < 0.36 * os.path.getsize("out/ckpt.pt")
    GPT(GPTConfig(**alone["model_args"])).load_state_dict(alone["model"])  # as nanoGPT's sample.py


def other_meta():
    symbols = [chr(i) for i in range(300)]
    meta = {"vocab_size": 300, "stoi": {s: i for i, s in enumerate(symbols)}, "itos": dict(enumerate(symbols))}
    Path("data/markov/meta.pkl").write_bytes(pickle.dumps(meta))


@pytest.mark.parametrize(
    ("act", "keys", "sentence"),
    [
        (lambda: os.remove("out/ckpt.pt"), {"to": "hf"}, "there is no checkpoint out/ckpt.pt"),
        (lambda: None, {"to": "data"}, "data is not empty: name another one, or remove it first"),
        (lambda: Path("w.pt").write_text("mine"), {"weights_only_to": "w.pt"}, "w.pt is there"),
        (other_meta, {"to": "hf"}, "vocabulary of 65, and data/markov/meta.pkl has 300 symbols"),
    ],
)
def test_a_mistake_is_a_sentence_and_leaves_nothing(act, keys, sentence):
    trained()
    act()
    before = {path: path.stat().st_size for path in Path().rglob("*")}
    with pytest.raises(UsageError, match=sentence):
        export(**keys)
    assert {path: path.stat().st_size for path in Path().rglob("*")} == before


def test_a_run_that_stopped_before_it_had_a_best_is_exported():
    trained()
    os.rename("out/ckpt.pt", f"out/{checkpoint.LAST}")
    assert "out/ckpt.last.pt -> w.pt" in export(weights_only_to="w.pt")


def test_pushing_uploads_the_whole_folder(monkeypatch):
    trained()
    uploaded = {}

    class Hub:
        def create_repo(self, name, exist_ok):
            return f"https://hub/{name}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            uploaded[repo_id] = sorted(os.listdir(folder_path))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert "pushed to https://hub/me/markov" in export(push_to="me/markov")
    assert {"config.json", "model.safetensors", "tokenizer.json"} < set(uploaded["me/markov"])
    assert sorted(os.listdir()) == ["data", "out"]
