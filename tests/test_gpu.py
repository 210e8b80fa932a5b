"""What only a GPU can show. Toy sizes: at most 2 GB of its memory.

Those that need more than memory that is taken and given back, as it can be simulated, are marked as numbers.
"""

import gc
import json
import os
import re
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import flags, run_script, train, train_on_ranks

from model import GPT, GPTConfig
from nanofit import autofit, machine, models
from nanofit.autofit.plan import OUT_OF_MEMORY, Job, Plan, from_dict
from nanofit.autofit.trials import Trials
from nanofit.batches import Batches
from nanofit.step import clip, update
from nanofit.units import MemoryLevers

pytestmark = pytest.mark.gpu
numbers = pytest.mark.numbers
GPU = torch.device("cuda", 0)


def computes():
    """Whether this GPU computes: where its memory alone is real, weights are what that held."""
    return torch.ones(2, device=GPU).sum().item() == 2


@pytest.fixture(autouse=True)
def gpu_only_while_it_lasts(monkeypatch):
    if not computes():
        monkeypatch.setattr(models, "not_finite", lambda model: set())
    yield
    gc.collect()  # models in a run's globals hold each other
    torch.cuda.empty_cache()


JOB = Job(
    source=models.source_of(GPT, GPTConfig),
    model_args=dict(n_layer=3, n_head=4, n_embd=256, block_size=256, bias=False, vocab_size=8192, dropout=0.0),
    device="cuda", dtype="bfloat16", grad_clip=1.0, micro_batch_size=16, micro_steps=4, memory_limit_gb=2.0,
)  # fmt: skip


def test_the_simulation_agrees_with_the_gpu():
    with Trials() as run_trial:
        measured, simulated = run_trial(JOB), run_trial(replace(JOB, simulate=True))
    assert measured.fits, measured.failure
    assert measured.allocated_bytes <= measured.peak_bytes <= 2 * 2**30
    assert simulated.peak_bytes == pytest.approx(measured.allocated_bytes, rel=0.01)


def test_a_size_beyond_the_limit_ends_in_the_probe_alone():
    with Trials() as run_trial:
        tried = run_trial(replace(JOB, micro_batch_size=4096, memory_limit_gb=1.0))
    assert tried.failure == OUT_OF_MEMORY


@numbers
def test_a_run_that_auto_fit_started_is_the_run_split_by_hand_bit_for_bit(monkeypatch, workplace):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    keys = dict(device="cuda", auto_fit=True, memory_limit_gb=1.5, batch_size=16, max_iters=12, dropout=0.1)
    try:
        fitted = train(**keys)
        kept = json.loads((workplace / "out" / "auto_fit.json").read_text())["plan"]
        levers = from_dict(MemoryLevers, kept["levers"])
        plan = Plan(16, 1, kept["micro_batch_size"], levers, limit_bytes=int(1.5 * 2**30))
        monkeypatch.setattr(autofit, "fit", lambda *_: plan)
        by_hand = train(**keys)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert f"auto-fit: {plan}, found in " in fitted.text
    assert by_hand.iter_loss == fitted.iter_loss
    assert by_hand.eval_loss == fitted.eval_loss


@numbers
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_losses_agree_with_nanogpts_on_the_cpu(reference, dtype):
    args = {**reference["plain"]["args"], "device": "cuda", "dtype": dtype}
    run = run_script("train.py", *flags(**args))
    tolerance = 0.01 if dtype == "float32" else 0.03  # TF32 products, or 8 to 11 bits of mantissa
    expected = {int(i): v for i, v in reference["plain"]["iter_loss"].items()}
    assert run.iter_loss == pytest.approx(expected, abs=tolerance)
    assert run.names["scaler"].is_enabled() == (dtype == "float16")
    assert re.search(r"tok/s, peak \d+\.\d\d GiB$", run.text, re.M)


@numbers
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_resuming_goes_on(dtype):
    keys = dict(device="cuda", dtype=dtype, dropout=0.1, gradient_accumulation_steps=2)
    whole = train(max_iters=20, out_dir="whole", **keys)
    train(max_iters=14, out_dir="parts", **keys)
    rest = train(max_iters=20, out_dir="parts", init_from="resume", **keys)
    assert rest.iter_loss == pytest.approx({i: whole.iter_loss[i] for i in range(10, 21)}, abs=2e-3)
    assert rest.names["scaler"].state_dict() == whole.names["scaler"].state_dict()


def test_memory_that_vanishes_in_mid_run_makes_micro_batches_smaller_and_changes_no_loss(monkeypatch):
    """Within a cap of 2 GiB, a ballast leaves 60% of what a step needs."""
    keys = dict(
        device="cuda", dtype="float32", n_embd=256, n_head=4, n_layer=4, block_size=256, batch_size=64, max_iters=12,
        memory_limit_gb=2.0,
    )  # fmt: skip
    torch.cuda.reset_peak_memory_stats()
    whole = train(**keys)
    whole.names = None
    gc.collect()
    peak = torch.cuda.max_memory_allocated()
    ballast, asked, current = [], [], Batches.current.fget

    def current_and_fill(batches):  # before there are activations
        asked.append(1)
        if len(asked) == 5:
            torch.cuda.empty_cache()
            held = torch.cuda.memory_reserved()
            size = 2 * 2**30 - held - int(0.6 * (peak - held))
            ballast.append(torch.empty(size, dtype=torch.uint8, device=GPU))
        return current(batches)

    monkeypatch.setattr(Batches, "current", property(current_and_fill))
    try:
        run = train(**keys)
    finally:
        ballast.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "the same batches again, batch_size 64 -> 32" in run.text
    assert list(run.iter_loss) == list(range(13))
    if computes():
        assert run.iter_loss == pytest.approx(whole.iter_loss, abs=0.01)  # TF32 products
        assert {float(s["step"]) for s in run.names["optimizer"].state_dict()["state"].values()} == {13.0}


@numbers
def test_a_bad_gradient_is_left_out_without_waiting():
    model = GPT(GPTConfig(block_size=8, vocab_size=65, n_layer=1, n_head=2, n_embd=32)).to(GPU)
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cuda")
    x = torch.zeros((2, 8), dtype=torch.long, device=GPU)
    before = [p.clone() for p in model.parameters()]
    for bad in (True, False):
        model(x, x, return_logits=False)[1].backward()
        if bad:
            next(model.parameters()).grad.fill_(float("nan"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this is a prototype
            torch.cuda.set_sync_debug_mode("error")  # waiting for the GPU is an error here
            try:
                scaler = machine.grad_scaler(GPU, "float32")
                update(optimizer, scaler, clip(model, optimizer, scaler, grad_clip=1.0))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)) == bad


WIDE = dict(device="cuda", n_layer=6, n_embd=256, n_head=4, block_size=256, batch_size=32, max_iters=3, dropout=0.1)


def test_recompute_takes_less_and_changes_nothing():
    peaks, losses = [], []
    for on in (False, True):
        torch.cuda.reset_peak_memory_stats()
        losses.append(train(**WIDE, recompute=on).iter_loss)
        peaks.append(torch.cuda.max_memory_allocated())
        gc.collect()
    assert peaks[1] < 0.6 * peaks[0]
    if computes():
        assert losses[1] == pytest.approx(losses[0], abs=1e-3)


def test_auto_fit_from_start_to_checkpoint_and_resume(workplace):
    keys = dict(device="cuda", auto_fit=True, memory_limit_gb=1.5, batch_size=16, eval_interval=5, max_iters=8)
    assert "saving checkpoint to out" in train(**keys).text
    gc.collect()
    os.replace("out/ckpt.prev.pt", "out/ckpt.pt")  # of the evaluation at 5
    rest = train(**keys, init_from="resume")
    assert "auto-fit: the answer kept beside the run holds" in rest.text
    assert "resuming from out at iteration 5" in rest.text


@numbers
@pytest.mark.parametrize("mode", ["reduce-overhead", "auto"])
def test_cuda_graphs_train_alike(mode):
    eager = train(device="cuda", max_iters=10, gradient_accumulation_steps=2)
    graphs = train(device="cuda", max_iters=10, gradient_accumulation_steps=2, compile=True, compile_mode=mode)
    assert "compile failed" not in graphs.text
    assert graphs.iter_loss == pytest.approx(eager.iter_loss, abs=0.02)


@numbers
def test_one_nccl_rank():
    run, _, _ = train_on_ranks(1, device="cuda", backend="nccl", max_iters=10)
    assert "saving checkpoint to out" in run.text
