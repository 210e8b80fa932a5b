"""--init_from: a new run that begins with the weights of one's own checkpoint."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import flags, run_script, train

from nanofit import checkpoint, models
from nanofit.errors import UsageError
from nanofit.folder import run_id_of

SMALL = dict(n_layer=1, n_embd=16, eval_interval=3, eval_iters=1)


def a_run(out_dir="a", **keys):
    train(out_dir=out_dir, max_iters=6, **{**SMALL, **keys})
    return checkpoint.load(out_dir)


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("init_from", ["a/ckpt.pt", "a"])
def test_it_has_the_weights_and_nothing_else_of_the_other(init_from, monkeypatch):
    source = a_run(bias=True)
    before = contents("a")
    begun = train(init_from=init_from, out_dir="b", max_iters=5, learning_rate=1e-3, dropout=0.1, **SMALL)
    assert f"a new run with the weights of {init_from}, of iteration 6" in begun.text
    assert contents("a") == before

    # nanoGPT's way to begin, with weights that are put there by hand.
    by_hand = os.path.join(os.getcwd(), "by_hand.pt")
    torch.save(source["model"], by_hand)
    build = models.build

    def built(*args, **keys):
        model = build(*args, **keys)
        model.load_state_dict(torch.load(by_hand))
        return model

    monkeypatch.setattr(models, "build", built)
    expected = train(out_dir="c", max_iters=5, learning_rate=1e-3, dropout=0.1, **{**SMALL, "bias": True})
    assert list(begun.iter_loss) == [0, 1, 2, 3, 4, 5]
    assert begun.iter_loss == expected.iter_loss
    assert begun.eval_loss == expected.eval_loss
    saved = checkpoint.load("b")
    assert run_id_of(saved) != run_id_of(source)
    assert saved["model_args"] == {**source["model_args"], "dropout": 0.1}
    assert saved["metrics"]["tokens"] == checkpoint.load("c")["metrics"]["tokens"]
    assert list(train(init_from="resume", out_dir="b", max_iters=7).iter_loss) == [6, 7], "as any other run"


def test_a_shorter_block_size_crops_and_is_told_and_a_longer_one_is_refused():
    source = a_run()
    begun = train(init_from="a", out_dir="b", max_iters=3, block_size=16, **SMALL)
    assert "block_size 32 -> 16: the model is cropped" in begun.text
    assert checkpoint.load("b")["model_args"]["block_size"] == 16
    assert checkpoint.load("a")["model_args"] == source["model_args"]
    with pytest.raises(UsageError, match="block_size=64 is more than the 32 positions that the model of init_from='a'"):
        train(init_from="a", out_dir="b", block_size=64, **SMALL)


def test_into_the_folder_that_it_comes_from_loses_nothing():
    source = a_run()
    begun = train(init_from="a", out_dir="a", max_iters=3, **SMALL)
    kept = checkpoint.load(f"a/kept-of-run-{run_id_of(source)}")
    assert kept["iter_num"] == source["iter_num"]
    assert all(torch.equal(kept["model"][name], source["model"][name]) for name in source["model"])
    assert "is another run's: kept as" in begun.text


def test_a_file_of_weights_alone_and_its_size_that_is_named_to_no_effect():
    a_run(always_save_checkpoint=False)
    run_script("export.py", *flags(out_dir="a", weights_only_to="w.pt"))
    shutil.rmtree("a")
    begun = train(init_from="w.pt", out_dir="b", max_iters=1, **{**SMALL, "n_layer": 3})
    assert "n_layer, " in begun.text
    assert "no effect, the model of init_from='w.pt' has its own" in begun.text
    assert list(begun.iter_loss) == [0, 1]


def test_what_there_is_not():
    os.mkdir("empty")
    for init_from, sentence in (
        ("gone.pt", "there is no checkpoint gone.pt"),
        ("gone", "a checkpoint such as out/ckpt.pt, or a folder that holds one"),
        ("empty", "init_from='empty' expects a folder that holds a ckpt.pt, or a Hugging Face"),
    ):
        with pytest.raises(UsageError, match=sentence):
            train(init_from=init_from, out_dir="b")
    assert not os.path.exists("b")


def test_sample_takes_the_same_names():
    a_run()
    keys = dict(device="cpu", num_samples=1, max_new_tokens=20, start="HELLO")
    sides = [dict(out_dir="a"), dict(init_from="a"), dict(init_from="a/ckpt.pt")]
    said = [run_script("sample.py", *flags(**side, **keys)).text.split("symbols:")[1] for side in sides]
    assert said[0] == said[1] == said[2]
