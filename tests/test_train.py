"""train.py as its user meets it: lines, resuming, compiling, ranks, and every mistake of the contract."""

import ast
import os
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, TOY, environment, flags, run_script, train

from nanofit.batches import Batches


def test_log_lines():
    text = train(max_iters=6, eval_interval=3, always_save_checkpoint=False, gradient_accumulation_steps=2).text
    assert "tokens per iteration will be: 512\n" in text
    assert "number of parameters: 0.10M\n" in text
    begins = r"^iter \d+: loss \d\.\d{4}, time \d+\.\d\dms, mfu -?\d+\.\d\d%, [\d,]+ tok/s, norm \d+\.\d\d"
    lines = re.findall(begins, text, re.M)
    assert len(lines) == 7, text
    assert len(re.findall(r"^step \d+: train loss \d\.\d{4}, val loss \d\.\d{4}$", text, re.M)) == 3
    assert "saving checkpoint to out\n" in text


def test_iteration_zero_never_saves_and_eval_only_stops_there(workplace):
    run = train(eval_only=True)
    assert list(run.eval_loss) == [0]
    assert not run.iter_loss
    assert not (workplace / "out" / "ckpt.pt").exists()


def test_learning_rate_schedule():
    schedule = dict(learning_rate=0.003, min_lr=0.0003, warmup_iters=5, lr_decay_iters=40)
    get_lr = partial(train(max_iters=0, eval_iters=1).names["get_lr"], **schedule)
    assert get_lr(0) == pytest.approx(0.003 / 6)
    assert get_lr(5) == pytest.approx(0.003)
    assert get_lr(22.5) == pytest.approx((0.003 + 0.0003) / 2)
    assert get_lr(40) == get_lr(1000) == 0.0003


@pytest.mark.parametrize(
    "keys", [{}, {"gradient_accumulation_steps": 3, "dropout": 0.1, "bias": True, "dtype": "bfloat16"}], ids=str
)
def test_a_resumed_run_goes_on_bit_for_bit(keys):
    keys = {**keys, "eval_interval": 5}
    whole = train(max_iters=15, out_dir="whole", **keys)
    train(max_iters=8, out_dir="parts", **keys)
    shutil.copytree("parts", "earlier")
    os.replace("earlier/ckpt.prev.pt", "earlier/ckpt.pt")  # of the evaluation at 5, as if the run had been killed
    for folder, first, evaluations in (("parts", 9, (10, 15)), ("earlier", 5, (5, 10, 15))):
        rest = train(max_iters=15, out_dir=folder, init_from="resume", **keys)
        assert list(rest.iter_loss) == list(range(first, 16))
        assert rest.eval_loss == {i: whole.eval_loss[i] for i in evaluations}
        assert rest.iter_loss == {i: whole.iter_loss[i] for i in rest.iter_loss}
        for name, weight in whole.names["raw_model"].state_dict().items():
            assert torch.equal(weight, rest.names["raw_model"].state_dict()[name]), name


def test_the_checkpoint_is_what_nanogpt_reads():
    run = train(max_iters=10)
    # As nanoGPT's train.py and sample.py open it.
    saved = torch.load("out/ckpt.pt", map_location="cpu", weights_only=True)
    assert {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"} <= set(saved)
    args = saved["model_args"]
    assert list(args) == ["n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"]
    assert saved["iter_num"] == 10
    assert saved["best_val_loss"] == pytest.approx(run.eval_loss[10][1], abs=1e-4)
    upstream = torch.load(ROOT / "tests/reference/upstream_ckpt.pt", map_location="cpu", weights_only=True)
    assert list(saved["model"]) == list(upstream["model"])
    assert set(upstream["config"]) <= set(saved["config"])
    assert saved["config"] == run.names["config"]
    ours, theirs = saved["optimizer"], upstream["optimizer"]
    assert [g["params"] for g in ours["param_groups"]] == [g["params"] for g in theirs["param_groups"]]
    weights = {n: torch.nn.Parameter(torch.zeros_like(w)) for n, w in saved["model"].items() if n != "lm_head.weight"}
    decayed = [w for w in weights.values() if w.dim() >= 2]  # the tied head is listed once
    plain = torch.optim.AdamW([{"params": decayed}, {"params": [w for w in weights.values() if w.dim() < 2]}])
    plain.load_state_dict(ours)
    assert len(plain.state) == len(saved["model"]) - 1
    for p, state in plain.state.items():
        assert state["exp_avg"].shape == p.shape


def as_version_0_1(patch, **keys):
    """The checkpoint of a run that saves as version 0.1: no memory lever, no mark of the data and no run's id was kept.

    Where the data stood was the generator's state before the batch that is drawn.
    """
    take = Batches._take

    def note_and_take(batches):
        batches.before = batches.generator.get_state()
        take(batches)

    patch.setattr(Batches, "_take", note_and_take)
    patch.setattr(Batches, "state_dict", lambda batches: batches.before)
    train(**keys)
    saved = torch.load("out/ckpt.pt", weights_only=True)
    del saved["split"]["levers"]
    return {entry: value for entry, value in saved.items() if entry not in ("data", "run_id")}


def test_auto_begins_and_goes_on_by_the_same_command():
    whole = train(max_iters=20, out_dir="whole")
    first = train(max_iters=10, init_from="auto")
    assert "resuming" not in first.text
    rest = train(max_iters=20, init_from="auto")
    assert "resuming from out at iteration 10" in rest.text
    assert {**first.iter_loss, **rest.iter_loss} == whole.iter_loss
    assert torch.load("out/ckpt.pt", weights_only=True)["config"]["init_from"] == "resume"


def test_a_checkpoint_of_version_0_1_goes_on_bit_for_bit(monkeypatch):
    keys = dict(dropout=0.2, gradient_accumulation_steps=2)
    whole = train(max_iters=14, out_dir="whole", **keys)
    with monkeypatch.context() as patch:
        saved = as_version_0_1(patch, max_iters=10, **keys)
    torch.save(saved, "out/ckpt.pt")
    rest = train(max_iters=14, init_from="resume", **keys)
    assert rest.iter_loss == {i: loss for i, loss in whole.iter_loss.items() if i >= 10}
    assert rest.eval_loss == {i: losses for i, losses in whole.eval_loss.items() if i >= 10}
    assert len(rest.iter_loss) == 5


def test_pretrained_weights_are_finetuned_at_a_cropped_block(hugging_face_gpt2):
    run = train(init_from=hugging_face_gpt2[0], max_iters=10, dropout=0.1)
    model = run.names["raw_model"]
    assert (model.config.vocab_size, model.config.block_size, model.config.dropout) == (257, 32, 0.1)
    assert run.iter_loss[10] < run.iter_loss[0]


def test_a_compile_that_fails_goes_on_in_eager(monkeypatch):
    plain = train(max_iters=3, dropout=0.2)

    def broken(model, **options):
        def call(*args, **options):  # what a failing compiler may have done
            torch.rand(3)
            model.eval()
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            raise RuntimeError("no C++ compiler\nand a long story")

        module = torch.nn.Identity()
        module.forward = call
        return module

    monkeypatch.setattr(torch, "compile", broken)
    run = train(max_iters=3, compile=True, dropout=0.2)
    assert "compile failed, training goes on without it (RuntimeError: no C++ compiler)" in run.text
    assert run.iter_loss == plain.iter_loss


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_an_eager_one():
    eager, compiled = (train(max_iters=5, n_layer=1, eval_interval=5, compile=on) for on in (False, True))
    assert "compile failed" not in compiled.text
    assert compiled.iter_loss == pytest.approx(eager.iter_loss, abs=3e-4)
    assert "_orig_mod." not in "".join(torch.load("out/ckpt.pt", weights_only=True)["model"])


@pytest.mark.proof
def test_the_compilers_cache_keeps_whole_steps():
    counted = "from torch._dynamo.utils import counters; print(dict(counters['aot_autograd']))"
    lines = ("import runpy, sys", "sys.argv[0] = 'train.py'", f"runpy.run_path({str(ROOT / 'train.py')!r})", counted)
    command = [sys.executable, "-c", "\n".join(lines), *flags(**{**TOY, "compile": True, "n_layer": 1, "max_iters": 0})]
    for found in ("miss", "hit"):
        variables = environment(TORCHINDUCTOR_CACHE_DIR=os.path.abspath("cache"))
        text = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=240).stdout
        last = ast.literal_eval(text.splitlines()[-1])
        assert last["total"] == last[f"autograd_cache_{found}"] > 0, text


def test_a_dtype_asked_for_on_the_cpu_is_used():
    default, half = train(max_iters=3), train(max_iters=3, dtype="bfloat16")
    assert default.names["dtype"] == "float32"
    assert half.names["dtype"] == "bfloat16"
    assert half.iter_loss == pytest.approx(default.iter_loss, abs=0.02)


def test_a_plan_needs_no_data_set_and_makes_no_folder(workplace):
    keys = dict(dataset="nowhere", batch_size=1, block_size=32, gpu="rtx 3060", wandb_log=True)
    with pytest.raises(SystemExit) as stop:
        train(**keys)
    assert stop.value.code == 0
    last = "auto-fit: batch_size 1, gradient_accumulation_steps 1, effective batch 1, found in "
    assert stop.value.text.splitlines()[-1].startswith(last)
    assert "number of parameters" not in stop.value.text, "no model is made for it"
    assert [path.name for path in workplace.iterdir()] == ["data"]


TINY = dict(
    dataset="markov", n_layer=1, n_head=1, n_embd=16, block_size=16, batch_size=2, gradient_accumulation_steps=2,
    max_iters=1, eval_iters=1, compile=False, device="cpu", wandb_log=False,
)  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_file_runs(path, hugging_face_gpt2, capsys):
    pretrained = "gpt2" in path.read_text().split("init_from")[-1] and "init_from" in path.read_text()
    keys = {**TINY, **({"init_from": hugging_face_gpt2[0]} if pretrained else {})}
    run = run_script("train.py", str(path), *flags(**keys))
    assert 0 in run.eval_loss
    assert bool(run.iter_loss) != path.stem.startswith("eval_")
    assert "has no key" not in capsys.readouterr().err
