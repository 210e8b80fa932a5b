"""Facts about the machine, with torch's answers put in its place where there is no such machine."""

import pytest
import torch

from nanofit import host, machine
from nanofit.errors import UsageError


@pytest.fixture
def fake_gpu(monkeypatch):
    def put(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return put


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 0), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16"), ((8, 6), "bfloat16"), ((9, 0), "bfloat16")],
)
def test_bfloat16_only_where_the_hardware_has_it(fake_gpu, capability, dtype):
    fake_gpu(capability)
    assert machine.best_device() == "cuda"
    assert machine.best_dtype("cuda") == dtype
    assert machine.best_dtype("cuda:1") == dtype
    assert machine.best_dtype("cpu") == "float32"


def test_a_gpu_that_is_not_there(fake_gpu, monkeypatch):
    fake_gpu((8, 0))
    with pytest.raises(UsageError, match="device='cuda:2', but there are 2 GPUs, numbered from 0"):
        machine.find_device("cuda:2")
    assert machine.find_device("cuda") == torch.device("cuda", 0), "set_device refuses a device without a number"
    assert machine.find_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA H100 PCIe", 756),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 88.2),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
    ],
)
def test_peak_flops_by_name(monkeypatch, name, tflops):
    monkeypatch.setattr(machine, "device_name", lambda device: name)
    assert machine.peak_flops(torch.device("cuda"), "float16") == (tflops * 1e12, "")


@pytest.mark.parametrize("name", ["NVIDIA RTX A1000", "NVIDIA RTX A2000", "NVIDIA T400 4GB", "Voodoo 2"])
def test_part_of_a_name_is_not_the_name_and_an_unknown_one_counts_as_an_a100(monkeypatch, name):
    monkeypatch.setattr(machine, "device_name", lambda device: name)
    flops, note = machine.peak_flops(torch.device("cuda"), "float16")
    assert (flops, name in note) == (312e12, True)


def test_nvidia_smi_may_answer_anything(monkeypatch):
    properties = type("Properties", (), {"uuid": "12-34"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    lines = ["GPU-12-34, 77, python, train.py, 4300", "GPU-99, 78, python, 1", "GPU-12-34, 79, x, [N/A]", "?"]
    monkeypatch.setattr(host, "nvidia_smi", lambda query: lines)
    assert machine.gpu_processes(torch.device("cuda", 0)) == [(77, "python, train.py", 4300)]


def test_a_cpus_peak_is_measured_and_told():
    flops, note = machine.peak_flops(torch.device("cpu"), "float32")
    assert 1e8 < flops < 1e14
    assert note == f"mfu: a share of the {flops / 1e9:,.0f} GFLOP/s that a matrix product reaches on this CPU"


@pytest.mark.parametrize(
    ("device", "dtype", "enabled"),
    [("cuda", "float16", True), ("cuda", "bfloat16", False), ("cpu", "float16", False), ("mps", "float16", False)],
)
def test_losses_are_scaled_for_float16_on_cuda_alone(monkeypatch, device, dtype, enabled):
    asked = []
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: asked.append((device, enabled)))
    machine.grad_scaler(torch.device(device), dtype)
    assert asked == [(device, enabled)]


def test_a_driver_that_is_too_old_is_named(monkeypatch):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update it")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(UsageError, match="no CUDA GPU .* CUDA 13.0; .* driver .* too old .found version 11040"):
        machine.find_device("cuda")


@pytest.mark.parametrize(
    ("capability", "built", "advice"),
    [
        ((8, 9), "sm_75 sm_80 sm_86 sm_90", ""),  # within a major version, kernels of an older GPU run
        ((12, 0), "sm_80 sm_90 compute_90", ""),  # PTX is compiled on the spot
        ((9, 0), "sm_90a sm_100a", ""),
        ((8, 6), "gfx90a", ""),  # not NVIDIA's
        ((6, 1), "sm_75 sm_80 compute_120", "6.1, and torch .* for sm_75 sm_80 compute_120 alone: install another"),
        ((8, 0), "sm_75 sm_86", "8.0, and torch .* has kernels for sm_75 sm_86 alone"),
    ],
)
def test_a_gpu_for_which_torch_has_no_kernels_is_named(monkeypatch, capability, built, advice):
    monkeypatch.setattr(machine, "capability", lambda device: capability)
    monkeypatch.setattr(machine, "device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "get_arch_list", built.split)
    if not advice:
        machine.require_kernels(torch.device("cuda"))
        return
    with pytest.raises(UsageError, match=f"a card has compute capability {advice}"):
        machine.require_kernels(torch.device("cuda"))
