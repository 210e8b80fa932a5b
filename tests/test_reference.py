"""The same figures as nanoGPT: losses of whole runs, outputs of a checkpoint, going on from one."""

import json
import os
import shutil

import pytest
import torch
from conftest import REFERENCE, flags, run_script

from model import GPT, GPTConfig
from nanofit import checkpoint as checkpoints

TOLERANCE = 3e-4  # what other processors' rounding allows in four printed digits


def run_of(reference, name):
    return run_script("train.py", *flags(**reference[name]["args"]))


def assert_evaluations_agree(run, expected):
    assert {str(i) for i in run.eval_loss} == set(expected["eval_loss"])
    for i, losses in expected["eval_loss"].items():
        assert run.eval_loss[int(i)] == pytest.approx(losses, abs=TOLERANCE), f"evaluation at {i}"


def assert_iterations_agree(run, expected):
    assert {str(i) for i in run.iter_loss} == set(expected["iter_loss"])
    for i, loss in expected["iter_loss"].items():
        assert run.iter_loss[int(i)] == pytest.approx(loss, abs=TOLERANCE), f"iteration {i}"


@pytest.mark.parametrize("name", ["plain", "to_resume"])
def test_losses_of_every_iteration_and_evaluation(reference, name):
    run = run_of(reference, name)
    assert_iterations_agree(run, reference[name])
    assert_evaluations_agree(run, reference[name])
    assert f"tokens per iteration will be: {reference[name]['tokens_per_iter']}" in run.text
    assert f"number of parameters: {reference[name]['parameters_M']}M" in run.text


@pytest.mark.parametrize("name", ["accumulated", "biased"])
def test_evaluations_of_accumulating_runs(reference, name):
    """nanoGPT prints the last micro-batch's loss where ours is the mean, so only evaluations compare."""
    assert_evaluations_agree(run_of(reference, name), reference[name])


def test_going_on_from_nanogpts_checkpoint(reference):
    args = reference["resumed"]["args"]
    os.makedirs(args["out_dir"])
    shutil.copy(REFERENCE / "upstream_ckpt.pt", f"{args['out_dir']}/ckpt.pt")
    run = run_of(reference, "resumed")
    assert_iterations_agree(run, reference["resumed"])
    assert_evaluations_agree(run, reference["resumed"])


def test_outputs_of_nanogpts_checkpoint(tmp_path):
    shutil.copy(REFERENCE / "upstream_ckpt.pt", tmp_path / "ckpt.pt")
    saved = checkpoints.load(str(tmp_path))
    model = GPT(GPTConfig(**saved["model_args"])).eval()
    model.load_state_dict(saved["model"])
    expected = json.loads((REFERENCE / "checkpoint_outputs.json").read_text())
    idx, targets = torch.tensor(expected["idx"]), torch.tensor(expected["targets"])

    logits, loss = model(idx, targets)
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), atol=1e-5, rtol=0)
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-5)

    last, none = model(idx)
    torch.testing.assert_close(last, torch.tensor(expected["last_logits"]), atol=1e-5, rtol=0)
    assert none is None

    torch.manual_seed(1337)
    assert model.generate(idx, 20, temperature=0.8, top_k=10).tolist() == expected["generated_seed_1337_t0p8_k10"]
