"""What only a GPU can show. Toy sizes: at most 2 GB of its memory."""

import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TOY, environment, flags, run_script, train

import autofit
import runtime
from model import GPT, GPTConfig
from step import dry_step, try_compile

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def gpu_only_while_it_lasts():
    yield
    torch.cuda.empty_cache()


def test_facts_about_the_gpu():
    assert runtime.best_device() == "cuda"
    assert runtime.open_device("cuda") == GPU
    runtime.take_device(GPU)
    assert torch.cuda.current_device() == 0
    assert runtime.device_name(GPU) == torch.cuda.get_device_name()
    assert runtime.best_dtype("cuda") in ("bfloat16", "float16")


def test_peak_memory_counts_what_tensors_hold():
    torch.cuda.reset_peak_memory_stats()
    before = runtime.peak_memory_bytes(GPU)
    block = torch.empty(64 * 2**20, dtype=torch.uint8, device=GPU)
    del block
    assert runtime.peak_memory_bytes(GPU) - before >= 64 * 2**20


def test_generators_are_put_back():
    state = runtime.rng_state(GPU)
    first = torch.rand(3, device=GPU)
    runtime.set_rng_state(state, GPU)
    assert torch.equal(torch.rand(3, device=GPU), first)


def test_facts_about_memory():
    assert runtime.sm_count(GPU) > 0
    assert runtime.capability(GPU) >= (5, 0)
    assert 0 < runtime.free_memory_bytes(GPU) <= runtime.total_memory_bytes(GPU)
    assert runtime.versions(GPU)["device"] == torch.cuda.get_device_name()
    assert all(pid > 0 and mib >= 0 for pid, _, mib in runtime.neighbours(GPU))


def test_peaks_count_what_the_allocator_reserves():
    runtime.empty_cache(GPU)
    runtime.reset_peak_memory(GPU)
    before = runtime.peak_reserved_bytes(GPU)
    block = torch.empty(256 * 2**20, dtype=torch.uint8, device=GPU)
    assert runtime.peak_reserved_bytes(GPU) >= before + 256 * 2**20
    del block
    runtime.empty_cache(GPU)
    runtime.reset_peak_memory(GPU)
    assert runtime.peak_reserved_bytes(GPU) < before + 256 * 2**20
    assert runtime.allocator_retries(GPU) >= 0


def test_a_cap_makes_an_overrun_an_error():
    runtime.empty_cache(GPU)
    runtime.take_device(GPU, 512 * 2**20)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2**30, dtype=torch.uint8, device=GPU)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


PROBE = dict(
    model_args=dict(n_layer=3, n_head=4, n_embd=256, block_size=256, bias=False, vocab_size=8192, dropout=0.0),
    activation_checkpointing=False, optimizer_state="float32", dtype="bfloat16", device="cuda",
    grad_clip=1.0, batch_size=16, micro_steps=4,
    compile=False, simulate=False, memory_limit_gb=2.0,
)  # fmt: skip


def test_the_simulation_agrees_with_the_gpu():
    [measured], failure = autofit.run_probe(PROBE)
    assert not failure
    assert not measured["failure"]
    assert measured["allocated_bytes"] <= measured["peak_bytes"] <= 2 * 2**30
    [simulated], _ = autofit.run_probe({**PROBE, "simulate": True})
    assert simulated["peak_bytes"] == pytest.approx(measured["allocated_bytes"], rel=0.1)


def test_a_size_beyond_the_limit_ends_in_the_probe_alone():
    [result], failure = autofit.run_probe({**PROBE, "batch_size": 4096, "memory_limit_gb": 1.0})
    assert not failure
    assert result["failure"] == "out of memory"


def test_a_run_that_auto_fit_started_is_the_run_split_by_hand_bit_for_bit(monkeypatch, workplace):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    keys = dict(device="cuda", auto_fit=True, memory_limit_gb=1.5, batch_size=16, max_iters=12, dropout=0.1)
    try:
        fitted = train(**keys)
        micro = json.loads((workplace / "out" / "auto_fit.json").read_text())["choice"]["micro_batch_size"]
        plan = autofit.Plan(16, 1, micro, False, int(1.5 * 2**30))
        monkeypatch.setattr(autofit, "fit", lambda *_: plan)
        by_hand = train(**keys)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert f"auto-fit: {plan}\n" in fitted.text
    assert by_hand.iter_loss == fitted.iter_loss
    assert by_hand.eval_loss == fitted.eval_loss


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_losses_agree_with_nanogpts_on_the_cpu(reference, dtype):
    args = {**reference["plain"]["args"], "device": "cuda", "dtype": dtype}
    run = run_script("train.py", *flags(**args))
    tolerance = 0.01 if dtype == "float32" else 0.03  # TF32 products, or 8 to 11 bits of mantissa
    expected = {int(i): v for i, v in reference["plain"]["iter_loss"].items()}
    assert run.iter_loss == pytest.approx(expected, abs=tolerance)
    assert run.names["scaler"].is_enabled() == (dtype == "float16")
    assert re.search(r"tok/s, peak \d+\.\d\d GiB$", run.text, re.M)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_resuming_goes_on(dtype):
    keys = dict(device="cuda", dtype=dtype, dropout=0.1, gradient_accumulation_steps=2)
    whole = train(max_iters=20, out_dir="whole", **keys)
    train(max_iters=14, out_dir="parts", **keys)
    rest = train(max_iters=20, out_dir="parts", init_from="resume", **keys)
    assert rest.iter_loss == pytest.approx({i: whole.iter_loss[i] for i in range(10, 21)}, abs=2e-3)
    assert rest.names["scaler"].state_dict() == whole.names["scaler"].state_dict()


def test_compiling_keeps_the_losses():
    eager = train(device="cuda", max_iters=10)
    compiled = train(device="cuda", max_iters=10, compile=True)
    assert "compile failed" not in compiled.text
    assert compiled.iter_loss == pytest.approx(eager.iter_loss, abs=0.02)


def test_a_trial_leaves_the_gpus_generator_alone():
    model = GPT(GPTConfig(block_size=8, vocab_size=65, n_layer=1, n_head=2, n_embd=32, dropout=0.5)).to(GPU)
    x = torch.zeros((2, 8), dtype=torch.long, device=GPU)
    state = torch.cuda.get_rng_state()
    _, failure = try_compile(model, lambda m: dry_step(m, (x, x), runtime.autocast(GPU, "float32")), GPU)
    assert not failure
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_sampling_and_benchmark():
    train(device="cuda", max_iters=10)
    assert (
        "---------------"
        in run_script("sample.py", *flags(device="cuda", start="A", num_samples=1, max_new_tokens=9)).text
    )
    keys = dict(
        device="cuda", n_layer=1, n_head=1, n_embd=16, block_size=16, batch_size=2, compile=False, real_data=False
    )
    assert run_script("bench.py", *flags(**keys)).text.splitlines()[-1].startswith("time per iteration: ")


def test_one_nccl_rank():
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    keys = {**TOY, "device": "cuda", "max_iters": 10}
    done = subprocess.run(
        [*launcher, str(ROOT / "train.py"), *flags(**keys)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "saving checkpoint to out" in done.stdout
