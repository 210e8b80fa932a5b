"""sample.py --stop: where a sample ends."""

import contextlib
import io
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import REFERENCE, as_a_process, flags, run_script

from model import GPT, GPTConfig
from nanofit.codec import codec_of

TOKENS = 40
KEYS = dict(init_from="ckpt.pt", device="cpu", max_new_tokens=TOKENS, temperature=1.2, top_k=0, seed=7)
PROMPTS = ["A", "HELLO", "TO_BE", "!", "THE", "AND", "?", "ROMEO:", "Q", "MY"]


@pytest.fixture(autouse=True)
def model(workplace):
    """nanoGPT's checkpoint of the toy data set, whose symbols come in almost any order."""
    shutil.copy(REFERENCE / "upstream_ckpt.pt", "ckpt.pt")
    saved = torch.load("ckpt.pt")
    saved["config"]["dataset"] = "markov"
    torch.save(saved, "ckpt.pt")
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    return model.eval()


def texts_of(printed):
    return re.split(r"symbols: .*\n(?:a sample ends.*\n)?", printed)[1].split("\n---------------\n")[:-1]


def sample(**keys):
    return texts_of(run_script("sample.py", *flags(**{**KEYS, **keys})).text)


def drawn_whole(model, prompts, rows, stop=None):
    """What GPT.generate draws for each prompt, so many texts in a batch, cut before the stop."""
    codec, texts = codec_of("data/markov"), []
    torch.manual_seed(KEYS["seed"])
    GPT(model.config)  # sample.py draws weights before it loads them
    for prompt in prompts:
        idx = torch.tensor([codec.encode(prompt)] * rows)
        drawn = model.generate(idx, TOKENS, temperature=KEYS["temperature"])
        texts += [prompt + codec.decode(row.tolist())[len(prompt) :].split(stop)[0] for row in drawn]
    return texts


@pytest.mark.parametrize("symbols", [1, 2])
def test_each_of_a_batch_ends_before_its_stop(model, monkeypatch, symbols):
    whole = drawn_whole(model, PROMPTS, 3)
    stop = whole[1][20 : 20 + symbols]
    expected = drawn_whole(model, PROMPTS, 3, stop)
    assert len({len(text) for text in expected[:3]}) > 1, "they end at different places"
    assert sum(map(len, expected)) < sum(map(len, whole))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(PROMPTS).encode())))
    assert sample(start="-", num_samples=3, stop=stop) == expected


def test_a_text_that_is_shown_while_it_is_drawn_holds_no_part_of_the_stop(model):
    [whole] = drawn_whole(model, ["A"], 1)
    shown = []

    class Terminal(io.StringIO):
        def isatty(self):
            return True

        def write(self, text):
            shown.append(text)
            return super().write(text)

    for stop in (whole[10:14], whole[-2:] + "AAAA"):
        out = Terminal()
        keys = flags(**{**KEYS, "start": "A", "num_samples": 1, "stop": stop})
        with as_a_process("sample.py", *keys) as path, contextlib.redirect_stdout(out):
            runpy.run_path(path, run_name="__main__")
        assert texts_of(out.getvalue()) == [whole.split(stop)[0]]
    assert len(shown) > TOKENS


def test_a_hugging_face_folder_says_where_its_texts_end(bpe, hf):
    keys = {**KEYS, "init_from": "hf", "start": "Hello", "num_samples": 1}
    ran = run_script("sample.py", *flags(**keys))
    assert "a sample ends before <|endoftext|> (--stop= lets it go on)" in ran.text
    [whole] = texts_of(ran.text)
    end = list(ran.names["drawn_ids"])[7]
    said = json.loads(Path("hf/generation_config.json").read_text())
    Path("hf/generation_config.json").write_text(json.dumps({**said, "eos_token_id": [50256, end]}))
    assert sample(**keys) == ["Hello" + whole[5:].split(codec_of(None).decode([end]))[0]]
    assert sample(**keys, stop="") == [whole]
