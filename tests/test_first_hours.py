"""What someone who knows nanoGPT reads in the first two hours."""

import hashlib
import re
from importlib.util import find_spec
from pathlib import Path

import torch
from conftest import TOY, flags, run_script, torchrun, train

from nanofit.autofit.fit import Fitter

SHORT = {"eval_interval": 5, "eval_iters": 2, "max_iters": 4}


def short(**keys):
    return train(**{**SHORT, **keys}).text


def files():
    """{path: its bytes' hash} of what a run leaves, but for the lock, which tells who held the folder last."""
    found = [path for path in Path("out").rglob("*") if path.is_file() and path.name != "run.lock"]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def test_eval_only_evaluates_once_and_changes_no_file():
    short(tensorboard_log=find_spec("tensorboard") is not None)
    before = files()
    text = short(eval_only=True, init_from="resume", max_iters=1000)
    assert re.findall(r"^step (\d+): train loss \d\.\d{4}, val loss \d\.\d{4}$", text, re.MULTILINE) == ["5"]
    assert "\niter " not in text
    assert files() == before


def test_a_run_that_ends_before_its_first_save_is_saved():
    text = short(eval_interval=1000)
    told = "checkpoint saved to out; with a larger --max_iters, this goes on: python .*--init_from=resume"
    assert re.search(rf"\niteration 4 was the last: {told}\n", text)
    sampled = run_script("sample.py", *flags(num_samples=1, max_new_tokens=5, device="cpu", start="!")).text
    assert "\nout/ckpt.pt, of iteration 5" in sampled


def test_a_run_that_keeps_its_best_and_has_none_yet_is_one_that_nanogpt_reads():
    short(eval_interval=1000, always_save_checkpoint=False)
    assert torch.load("out/ckpt.pt", weights_only=True)["iter_num"] == 5
    keys = dict(eval_interval=1000, always_save_checkpoint=False, init_from="resume")
    assert "nothing is left to train: max_iters=4 was the last iteration\n" in short(**keys)
    assert "nothing is left" not in short(**keys, max_iters=7)
    assert torch.load("out/ckpt.last.pt", weights_only=True)["iter_num"] == 8, "what is there may be the best"


def test_where_nothing_is_left_that_is_told_and_nothing_is_fitted_or_compiled(monkeypatch):
    short()

    def never(*_, **__):
        raise AssertionError("there is nothing to do it for")

    monkeypatch.setattr(Fitter, "plan", never)
    monkeypatch.setattr(torch, "compile", never)
    text = short(init_from="resume", auto_fit=True, compile=True, max_iters=3)
    assert text.count("\nnothing is left to train: max_iters=3 was the last iteration\n") == 1
    assert "resuming from out at iteration 5\n" in text


def test_named_keys_that_do_nothing_are_told():
    keys = dict(memory_limit_gb=4, gather_once=True, ranks=2, decay_lr=False, min_lr=1e-4, wandb_project="x")
    text = short(**keys, compile=False, compile_mode="max-autotune")
    told = ["memory_limit_gb", "gather_once", "ranks", "warmup_iters, lr_decay_iters, min_lr", "wandb_project"]
    assert set(re.findall("^(.*): no effect, ", text, re.MULTILINE)) == {*told, "compile_mode"}
    assert "no effect" not in short(wandb_log=False, wandb_project="x", out_dir="out-b"), "as nanoGPT's configs have it"


def test_a_run_says_first_where_it_computes_and_on_what():
    first = short().splitlines()
    assert "device cpu, dtype float32 (the best for it), vocab_size 65 (of data/markov/meta.pkl)" in first
    argv = [f for f in flags(**{**TOY, **SHORT, "dtype": "bfloat16", "max_iters": 0}) if "device" not in f]
    first = run_script("train.py", *argv).text
    assert re.search(r"^device \w+ \(the best one here\), dtype bfloat16, vocab_size 65 ", first, re.MULTILINE)


def test_what_differs_from_a_checkpoint_is_told_with_what_becomes_of_it():
    short()
    text = short(init_from="resume", n_layer=3, dropout=0.25, batch_size=4, weight_decay=0.5, max_iters=6)
    assert (
        "\ndiffers from the checkpoint, and is taken: batch_size 8 -> 4, dropout 0.0 -> 0.25, max_iters 4 -> 6\n"
        "differs, but stays as it is in the checkpoint: n_layer 2, not 3, weight_decay 0.1, not 0.5\n"
    ) in text
    assert "vocab_size 65 (the checkpoint's)\n" in text
    assert "differs" not in short(init_from="resume", n_layer=2, dropout=0.25, batch_size=4, max_iters=6)


FAILS = """
import os, time
import nanofit
from nanofit.errors import UsageError
nanofit.start()
if os.environ["RANK"] == "0":  # learns of it by a closed connection while rank 1 is still about to end
    raise RuntimeError("Connection closed by peer")
time.sleep(0.5)
raise UsageError("rank 1: no", of_rank=True)
"""


def test_torchrun_names_the_rank_that_failed_as_the_cause(workplace):
    (workplace / "fails.py").write_text(FAILS)
    _, said, code = torchrun("--standalone", "--nproc_per_node=2", "fails.py", check=False)
    ours, root_cause = said.split("Root Cause")
    assert code == 1
    assert ours.count("error: rank 1: no\n") == 1, "one rank speaks, and torchrun repeats it"
    assert "message format" not in said, "torchrun knows the form in which it is told"
    assert "traceback : error: rank 1: no\n" in root_cause, said
    assert "exitcode  : 1 " in root_cause
    assert "SIGTERM" not in root_cause
