"""doctor.py: each check on faked facts, what it finds out on this machine, and what it keeps to itself."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TOY, environment, flags, run_script, train

import doctor as script
from nanofit import machine
from nanofit.tools.doctor import gather
from nanofit.tools.doctor.checks import CHECKS, OK, STOP, WARNING, verdicts_on
from nanofit.tools.doctor.facts import Checkpoint, DataSet, Facts, Fit, Gpu
from nanofit.units import GIB

RTX_3060 = Gpu("NVIDIA GeForce RTX 3060", 28, (8, 6), 12 * GIB, 11 * GIB + GIB // 2)
CONFIG = dict(
    device="cuda", dtype="bfloat16", compile=True, compile_mode="default", compile_min_sms=68, auto_fit=False,
    batch_size=12, recompute=False, out_dir="out", dataset="openwebtext",
)  # fmt: skip
SOUND = Facts(
    system="Linux", python="3.11.7", cores=8, memory_bytes=32 * GIB, compilers=("cc", "c++"), driver_cuda=(12, 4),
    packages={"triton": "3.4.0"}, torch="2.9.1+cu128", torch_cuda="12.8", architectures=("sm_80", "sm_86", "sm_90"),
    driver="550.54", gpus=(RTX_3060,), config=CONFIG, data_sets=(DataSet("openwebtext", {"train": 9_000, "val": 90}),),
    vocab_size=50304, largest_token=50256, checkpoints=(Checkpoint("ckpt.pt", GIB, 2000),), disk_free_bytes=100 * GIB,
    checkpoint_bytes=GIB, environment={"PYTORCH_ALLOC_CONF": "expandable_segments:True"},
    fit=Fit(11 * GIB, 12, 8 * GIB, False, "batch_size 12 -> 12"),
)  # fmt: skip
NO_GPU = dict(gpus=(), driver="", driver_cuda=None, config={**CONFIG, "device": "cpu"})
DRIVER_ALONE = {**NO_GPU, "driver": "550.54", "driver_cuda": (12, 4)}


def gpu(**changed):
    return {"gpus": (replace(RTX_3060, **changed),)}


def keys(*given, **changed):
    return {"config": {**CONFIG, **changed}, "given": given}


TABLE = [  # (check, what is different, level or None where it has nothing to say, words, what to type)
    ("torch", {}, OK, "torch 2.9.1+cu128, built for CUDA 12.8", ""),
    ("torch", {"torch_failure": "ImportError: x"}, STOP, "torch can't be imported: ImportError: x", "pip install"),
    ("gpu", {}, OK, "RTX 3060", ""),
    ("gpu", {"torch_failure": "x"}, None, "", ""),
    ("gpu", NO_GPU, OK, "no NVIDIA driver", ""),
    ("gpu", {**NO_GPU, "device_failure": "x"}, STOP, "no NVIDIA driver", "--device=cpu"),
    ("gpu", {**DRIVER_ALONE, "torch_cuda": ""}, WARNING, "a build without CUDA", "pip install torch"),
    ("gpu", {**DRIVER_ALONE, "torch_cuda": "", "device_failure": "x"}, STOP, "without CUDA", "pip install torch"),
    ("gpu", {**DRIVER_ALONE, "gpus_hidden": True}, WARNING, "CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES"),
    ("gpu", {**DRIVER_ALONE, "cuda_said": "CUDA unknown error"}, WARNING, "CUDA unknown error", "nvidia-smi"),
    ("gpu", {"device_failure": "device='cuda:2', but there are 1 GPUs"}, STOP, "there are 1 GPUs", "--device=cuda:0"),
    ("driver", {}, OK, "CUDA up to 12.4", ""),
    ("driver", NO_GPU, None, "", ""),
    ("driver", {"driver_cuda": (11, 8)}, WARNING, "too old", "a newer NVIDIA driver"),
    ("driver", {"driver_cuda": (11, 8), **keys("device")}, STOP, "too old", "a newer NVIDIA driver"),
    ("kernels", {}, OK, "8.6", ""),
    ("kernels", NO_GPU, None, "", ""),
    ("kernels", {"architectures": ("sm_80",)}, OK, "8.6", ""),
    ("kernels", {"architectures": ("sm_70", "compute_75")}, OK, "8.6", ""),
    ("kernels", gpu(capability=(6, 1)), STOP, "no kernels for compute capability 6.1", "an older one"),
    ("kernels", {**gpu(capability=(12, 0)), "architectures": ("sm_90",)}, STOP, "capability 12.0", "a newer one"),
    ("gpu memory", {}, OK, "11.50 GiB of 12.00 GiB are free", ""),
    ("gpu memory", NO_GPU, None, "", ""),
    ("gpu memory", gpu(holders=((77, "python", 4300),)), WARNING, "python (pid 77) 4,300 MiB", "kill 77"),
    ("gpu memory", gpu(free_bytes=4 * GIB, holders=None), WARNING, "4.00 GiB of 12.00 GiB", "nvidia-smi"),
    ("gpu memory", gpu(free_bytes=4 * GIB), WARNING, "by whom isn't known", "nvidia-smi"),
    ("gpu memory", gpu(free_bytes=None), None, "", ""),
    ("bfloat16", {}, OK, "computes in bfloat16", ""),
    ("bfloat16", gpu(capability=(7, 5)), WARNING, "emulated", "--dtype=float16"),
    ("bfloat16", {**gpu(capability=(7, 5)), **keys(dtype="float16")}, OK, "no bfloat16", ""),
    ("bfloat16", NO_GPU, None, "", ""),
    ("allocator", {}, OK, "grow in place", ""),
    ("allocator", {"environment": {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}}, WARNING, "fragment", "unset"),
    ("allocator", {"is_wsl": True, "environment": {}}, None, "", ""),
    ("max-autotune", {}, OK, "28 SMs", ""),
    ("max-autotune", keys(compile_mode="max-autotune"), STOP, "compile_mode='max-autotune' needs", "=default"),
    ("max-autotune", {**gpu(sm_count=82), **keys(compile_mode="max-autotune")}, OK, "82 SMs", ""),
    ("max-autotune", keys(compile=False, compile_mode="max-autotune"), None, "", ""),
    ("triton", {}, OK, "Triton 3.4.0", ""),
    ("triton", {"packages": {"triton": ""}}, WARNING, "Triton is not installed", "--compile=False"),
    ("triton", gpu(capability=(6, 1)), WARNING, "Triton needs compute capability 7.0", "--compile=False"),
    ("triton", NO_GPU, None, "", ""),
    ("compiler", {}, OK, "cc is there", ""),
    ("compiler", {"compilers": ("c++",)}, WARNING, "none of the compilers cc", "apt install g++"),
    ("compiler", {**NO_GPU, "compilers": ("cc",)}, WARNING, "none of the compilers c++", "apt install g++"),
    ("compiler", keys(compile=False), None, "", ""),
    ("wsl", {}, None, "", ""),
    ("wsl", {"is_wsl": True}, OK, ".wslconfig", ""),
    ("wsl", {"is_wsl": True, "on_windows_disk": True}, WARNING, "Windows' disk", "cp -r . ~/nanogpt-fit"),
    ("keys", {}, None, "", ""),
    ("keys", {"refusal": "batch_size must be at least 1"}, STOP, "batch_size must be", "python train.py --help"),
    ("data", {}, OK, "9,000 train tokens", ""),
    (
        "data", {"data_failure": "a/train.bin does not exist: run: python data/a/prepare.py"}, STOP, "does not exist",
        "python data/a/prepare.py",
    ),
    ("data", {"data_failure": "b/train.bin does not exist"}, STOP, "does not exist", "openwebtext"),
    ("vocabulary", {}, OK, "50304", ""),
    ("vocabulary", {"vocab_size": 65}, STOP, "token 50256, but the model's vocabulary has 65", "prepare.py"),
    ("vocabulary", {"data_vocab_size": 65, "largest_token": 64}, WARNING, "meta.pkl", "prepare.py"),
    ("vocabulary", {"data_failure": "x"}, None, "", ""),
    ("folder", {}, None, "", ""),
    ("folder", {"holder": "process 7, since 9:00"}, STOP, "out_dir='out' is in use by process 7", "--out_dir="),
    ("checkpoint", {}, OK, "ckpt.pt of iteration 2,000", ""),
    ("checkpoint", {"checkpoints": ()}, None, "", ""),
    ("checkpoint", {"checkpoints": (Checkpoint("ckpt.pt", 1, None),)}, WARNING, "ckpt.pt: damaged", "--out_dir"),
    (
        "checkpoint",
        {"checkpoints": (Checkpoint("ckpt.pt", 1, None), Checkpoint("ckpt.prev.pt", 1, 7)), "resume_failure": "x"},
        STOP, "x", "mv out/ckpt.prev.pt out/ckpt.pt",
    ),
    (
        "checkpoint",
        {"checkpoints": (Checkpoint("ckpt.pt", 1, 7), Checkpoint("ckpt.last.pt", 1, None)), "resume_failure": "x"},
        STOP, "x", "rm out/ckpt.last.pt",
    ),
    ("checkpoint", {"checkpoints": (), "resume_failure": "there is no checkpoint"}, STOP, "no checkpoint", "scratch"),
    ("disk", {}, OK, "100.00 GiB are free", ""),
    ("disk", {"disk_free_bytes": 2 * GIB}, WARNING, "3 are there while one is written", "--out_dir"),
    ("disk", {"disk_free_bytes": GIB // 2}, STOP, "none could be written", "--out_dir"),
    ("disk", {"disk_free_bytes": GIB // 2, "checkpoint_bytes": None}, OK, "0.50 GiB are free", ""),
    ("disk", {"disk_free_bytes": None}, None, "", ""),
    ("fit", {}, OK, "batch_size 12 fits: it takes 8.00 GiB", ""),
    ("fit", {"fit": Fit(GIB, 24, GIB, False, "12 -> 24")}, OK, "batch_size 12 fits: even 24 takes 1.00 GiB", ""),
    ("fit", {"fit": None}, None, "", ""),
    ("fit", {"fit": Fit(GIB, 4, GIB, False, "12 -> 4")}, STOP, "would not fit, 4 would", "--auto_fit=True"),
    ("fit", {"fit": Fit(GIB, 12, GIB, True, "12 -> 12")}, STOP, "would not fit", "--auto_fit=True"),
    ("fit", {"fit": Fit(GIB, 4, GIB, False, "12 -> 4"), **keys(auto_fit=True)}, OK, "auto_fit makes it fit", ""),
    ("fit", {"fit": Fit(failure="nothing fits\n  --block_size=512")}, STOP, "nothing fits", "--block_size=512"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "changes", "level", "says", "do"), TABLE)
def test_each_check_by_a_faked_fact(check, changes, level, says, do):
    verdict = CHECKS[check](replace(SOUND, **changes))
    if level is None:
        assert verdict is None
        return
    assert verdict.level == level
    assert says in verdict.says
    assert do in verdict.do
    assert bool(verdict.do) == (level != OK), "a trouble has something to do"


def test_every_check_has_a_row_with_its_trouble_and_one_without():
    for name in CHECKS:
        levels = {level for check, _, level, _, _ in TABLE if check == name}
        assert levels & {WARNING, STOP}, name
        assert levels & {OK, None}, name


def test_a_sound_machine_is_told_so():
    found = verdicts_on(SOUND)
    assert {verdict.level for verdict in found.values()} == {OK}
    assert set(CHECKS) - set(found) == {"wsl", "keys", "folder"}


def test_next_to_nothing_known_is_no_reason_to_fail():
    assert verdicts_on(Facts(torch_failure="No module named 'torch'"))["torch"].level == STOP
    verdicts_on(Facts(config=CONFIG))


# ---- what it finds out -------------------------------------------------------------------------------------

TRAINED = {**TOY, "batch_size": 1, "max_iters": 10}
SMALL = flags(**TRAINED)


def doctor(*argv, code=0):
    """What doctor.py answers, as --json gives it; it must end with this exit code."""
    with pytest.raises(SystemExit) as stop:
        run_script("doctor.py", "--json", *argv)
    told = json.loads(stop.value.text)
    assert (stop.value.code, bool(told["stopped_by"])) == (code, bool(code)), told["checks"]
    return told


def test_what_a_run_finds_is_what_it_is_told_and_nothing_is_written():
    run = train(**TRAINED)
    assert script.keys_of_train(machine) == run.names["defaults"]
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    told = doctor(*SMALL, "--init_from=resume")
    facts = told["facts"]
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before
    assert [(saved["name"], saved["iteration"]) for saved in facts["checkpoints"]] == [("ckpt.pt", 10)]
    assert facts["data_sets"] == [
        {"name": "markov", "tokens": {"train": 60000, "val": 6000}, "vocab_size": 65, "failure": ""}
    ]
    assert (facts["vocab_size"], facts["data_vocab_size"], facts["largest_token"]) == (65, 65, 64)
    assert facts["config"] == {**run.names["config"], "init_from": "resume"}
    assert told["checks"]["fit"]["level"] == OK
    assert 2.5 < facts["checkpoint_bytes"] / (4 * sum(p.numel() for p in run.names["raw_model"].parameters())) < 3.5
    shutil.copy("out/ckpt.pt", "out/ckpt.prev.pt")
    Path("out/ckpt.pt").write_bytes(Path("out/ckpt.pt").read_bytes()[:-3000])
    told = doctor(*SMALL, "--init_from=resume", code=1)
    assert told["stopped_by"] == ["checkpoint"]
    assert told["checks"]["checkpoint"]["do"] == "mv out/ckpt.prev.pt out/ckpt.pt"


def test_auto_is_resume_where_there_is_a_checkpoint_and_else_scratch(monkeypatch):
    monkeypatch.setattr(gather, "_fit", lambda *_: None)
    assert "keys" not in doctor(*SMALL, "--init_from=auto")["checks"]
    Path("out").mkdir()
    Path("out/ckpt.pt").write_text("no checkpoint")
    assert doctor(*SMALL, "--init_from=auto", code=1)["stopped_by"] == ["checkpoint"]


def test_a_folder_in_which_another_run_is_alive(monkeypatch):
    monkeypatch.setattr(gather, "_fit", lambda *_: None)
    Path("out").mkdir()
    with open("out/run.lock", "w") as lock:
        print("process 7 on engine.of.ada, since 2026-11-22 02:39:48", file=lock, flush=True)
        doctor(*SMALL)
        fcntl.flock(lock, fcntl.LOCK_EX)
        told = doctor(*SMALL, code=1)
        assert told["stopped_by"] == ["folder"]
        says = "out_dir='out' is in use by process 7, since 2026-11-22 02:39:48"
        assert told["checks"]["folder"]["says"] == says
        doctor(*SMALL, "--eval_only=True")
        doctor(*SMALL, "--out_dir=another")


def test_sizes_are_told_in_a_unit_that_shows_them():
    facts = replace(SOUND, memory_free_bytes=None, checkpoints=(Checkpoint("ckpt.pt", 3 * 2**20, 7),))
    told = dict(script.lines_on(facts))
    assert told["checkpoint"] == "ckpt.pt: iteration 7, 3.0 MiB"
    assert "32.00 GiB of memory, unknown free" in told["system"]


@pytest.mark.parametrize(
    ("argv", "stopped_by", "says"),
    [
        (["--dataset=nowhere"], "data", "data/nowhere/train.bin does not exist"),
        (["--block_size=100000"], "data", "too few for block_size=100000"),
        (["--batchsize=1"], "keys", "did you mean 'batch_size'?"),
        (["--beta1=1.5"], "keys", "beta1 must be below 1"),
        (["--init_from=resume"], "checkpoint", "there is no checkpoint out/ckpt.pt"),
        (["--device=cuda:99"], "gpu", ""),
    ],
)
def test_what_would_stop_a_run(monkeypatch, argv, stopped_by, says):
    monkeypatch.setattr(gather, "_fit", lambda *_: None)
    told = doctor(*SMALL, *argv, code=1)
    assert told["stopped_by"] == [stopped_by]
    assert says in told["checks"][stopped_by]["says"]


def test_a_batch_that_would_not_fit_and_its_plan():
    larger = flags(**{**TOY, "n_embd": 32, "block_size": 4096, "batch_size": 2, "memory_limit_gb": 0.03})
    told = doctor(*larger, code=1)
    assert told["stopped_by"] == ["fit"]
    assert told["checks"]["fit"]["do"] == "--auto_fit=True"
    assert told["facts"]["fit"]["limit_bytes"] == pytest.approx(0.03 * GIB, rel=1e-3)
    assert "batch_size 2 -> 1, " in told["facts"]["fit"]["split"]


def test_a_card_that_is_here(monkeypatch):
    """What torch would say of an RTX 3060."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    properties = type("Properties", (), {"total_memory": 12 * GIB, "multi_processor_count": 28, "uuid": "12-34"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 3060")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (11 * GIB, 12 * GIB))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_86"])
    lines = {"apps": ["GPU-12-34, 77, /home/ada/bin/python, 700"], "driver": ["550.54"]}
    monkeypatch.setattr(machine, "_nvidia_smi", lambda query: lines["apps" if "apps" in query else "driver"])
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/usr/bin/{name}")
    simulated = []
    monkeypatch.setattr(gather, "_fit", lambda *arguments: simulated.append(arguments[-1]))
    told = doctor(*SMALL, "--device=cuda")
    [gpu] = told["facts"]["gpus"]
    assert gpu == {
        "name": "NVIDIA GeForce RTX 3060", "sm_count": 28, "capability": [8, 6], "total_bytes": 12 * GIB,
        "free_bytes": 11 * GIB, "holders": [[77, "…/python", 700]],
    }  # fmt: skip
    assert told["checks"]["gpu memory"]["level"] == WARNING
    assert told["facts"]["driver"] == "550.54"

    def in_distress(device):
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "mem_get_info", in_distress)
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    [gpu] = machine.cuda_facts()["gpus"]
    assert (gpu["free_bytes"], gpu["holders"]) == (None, None)
    doctor(*SMALL, "--device=cuda")
    assert simulated == [11 * GIB], "where nothing is known of free memory, nothing is simulated"


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')", "No module named 'torch'"),
        ("raise OSError('/home/ada/lib/libcudart.so.12: cannot open shared object file')", "libcudart.so.12: cannot"),
    ],
)
def test_it_works_without_torch(broken, says):
    Path("elsewhere").mkdir()
    Path("elsewhere/torch.py").write_text(broken)
    command = [sys.executable, str(ROOT / "doctor.py"), "--json", "--dataset=markov"]
    path = os.pathsep.join(["elsewhere", str(ROOT)])
    done = subprocess.run(command, capture_output=True, text=True, env={**environment(), "PYTHONPATH": path})
    assert (done.returncode, done.stderr) == (1, "")
    told = json.loads(done.stdout)
    assert told["stopped_by"] == ["torch"]
    assert says in told["checks"]["torch"]["says"]
    assert "ada" not in done.stdout
    assert told["checks"]["data"]["says"] == "markov: 60,000 train tokens, 6,000 val tokens"
    if "Module" in broken:
        command = [sys.executable, str(ROOT / "sample.py")]
        done = subprocess.run(command, capture_output=True, text=True, env={**environment(), "PYTHONPATH": path})
        expected = "error: torch is not installed: pip install torch; python doctor.py looks for more\n"
        assert (done.returncode, done.stderr) == (1, expected)


# ---- what it keeps to itself -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ROOT/data/x/train.bin is gone", "data/x/train.bin is gone"),
        ("/home/ada/runs/out/ckpt.pt is damaged", "…/ckpt.pt is damaged"),
        ("('/opt/venv/lib/libtorch.so: no such file')", "('…/libtorch.so: no such file')"),
        ("C:\\Users\\ada\\x.pt", "…/x.pt"),
        ("9 / 10 of https://pytorch.org/get-started and a/b", "9 / 10 of https://pytorch.org/get-started and a/b"),
        ("HOME, HOME/out and HOME/runs/out", "~, ~/out and …/out"),
        ("run of USER on HOST.local", "run of … on ….local"),
        ("HOSTED by a USERland", "HOSTED by a USERland"),
    ],
)
def test_what_is_taken_out_of_a_text(monkeypatch, text, shown):
    monkeypatch.setattr(gather.getpass, "getuser", lambda: "USER")
    monkeypatch.setattr(gather.socket, "gethostname", lambda: "HOST")
    monkeypatch.setenv("HOME", "HOME")
    assert gather.private({"a": (text.replace("ROOT", str(ROOT)),)}, str(ROOT)) == {"a": (shown,)}


def test_nothing_tells_whose_machine_it_is(monkeypatch, tmp_path, capsys):
    home = tmp_path / "home" / "ada.lovelace"
    shutil.copytree("data", home / "data")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(gather.getpass, "getuser", lambda: "ada.lovelace")
    monkeypatch.setattr(gather.socket, "gethostname", lambda: "engine")
    monkeypatch.setenv("TORCH_HOME", f"{home}/models")
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    monkeypatch.setattr(gather, "_fit", lambda *_: None)
    (home / "engine").mkdir()
    (home / "engine" / "ckpt.pt").write_text("no checkpoint")
    monkeypatch.chdir(home)
    for argv in (["--init_from=resume", f"--out_dir={home}/engine"], [f"{home}/config.py"], [f"--dataset={home}/x"]):
        for form in ([], ["--json"]):
            with pytest.raises(SystemExit) as stop:
                run_script("doctor.py", *form, *SMALL, *argv)
            told = stop.value.text
            assert len(told) > 500
            for private in ("ada", "lovelace", "engine", str(tmp_path), "s3cret", "SECRET"):
                assert private not in told, told
