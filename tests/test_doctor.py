"""doctor.py: each check on made-up facts, what it says of a run, and what it keeps to itself."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TOY, environment, flags, run_script, train

from nanofit import autofit
from nanofit.autofit.plan import Plan
from nanofit.errors import UsageError
from nanofit.tools.doctor import checks, private, run
from nanofit.tools.doctor.checks import CHECKS, OK, STOP, WARNING, Verdict
from nanofit.units import GIB, MemoryLevers

RTX_3060 = dict(
    name="NVIDIA GeForce RTX 3060", sm_count=28, capability=(8, 6), total_bytes=12 * GIB, free_bytes=11.5 * GIB,
    holders=(),
)  # fmt: skip
CONFIG = dict(device="cuda", dtype="bfloat16", compile=True)
SOUND = dict(
    system="Linux", wsl=False, packages={"triton": "3.4.0"}, variables={}, torch="2.9.1+cu128",
    torch_failure="", cuda="12.8", driver="550.54", said="", gpus=[RTX_3060], memory=32 * GIB, free=30 * GIB,
    container=None,
)  # fmt: skip
NO_GPU = dict(gpus=[], driver="")
DRIVER_ALONE = dict(gpus=[])


def gpu(**changed):
    return {"gpus": [{**RTX_3060, **changed}]}


TABLE = [  # (check, facts that differ, keys that differ, level or None where it has nothing to say, words, what to do)
    ("system", {}, {}, OK, "triton 3.4.0", ""),
    ("torch", {}, {}, OK, "torch 2.9.1+cu128, built for CUDA 12.8", ""),
    ("torch", dict(torch=None, torch_failure="ImportError: x"), {}, STOP, "torch can't be imported: I", "pip install"),
    ("gpu", {}, {}, OK, "RTX 3060 (28 SMs, compute capability 8.6)", ""),
    ("gpu", NO_GPU, {}, OK, "no NVIDIA driver", ""),
    ("gpu", {**DRIVER_ALONE, "cuda": ""}, {}, WARNING, "a build without CUDA", "pip install torch"),
    ("gpu", {**DRIVER_ALONE, "said": "CUDA unknown error"}, {}, WARNING, "CUDA unknown error", "nvidia-smi"),
    ("gpu memory", {}, {}, OK, "11.50 GiB of 12.00 GiB are free", ""),
    ("gpu memory", gpu(holders=((77, "python", 4300),)), {}, WARNING, "python (pid 77) 4,300 MiB", "kill 77"),
    ("gpu memory", gpu(free_bytes=4 * GIB), {}, WARNING, "4.00 GiB of 12.00 GiB are free", "nvidia-smi"),
    ("bfloat16", gpu(capability=(7, 5)), {}, WARNING, "emulated", "--dtype=float16"),
    ("bfloat16", gpu(capability=(7, 5)), dict(dtype="float16"), None, "", ""),
    ("allocator", dict(variables={"PYTORCH_ALLOC_CONF": "expandable_segments:True"}), {}, None, "", ""),
    ("allocator", dict(variables={"PYTORCH_CUDA_ALLOC_CONF": "x:64"}), {}, WARNING, "fragmentation", "unset PYTORCH"),
    ("compiler", dict(packages={}), {}, WARNING, "Triton is not installed", "--compile=False"),
    ("compiler", gpu(capability=(6, 1)), {}, WARNING, "Triton needs compute capability 7.0", "--compile=False"),
    ("compiler", {}, {}, OK, "cc is there", ""),
    ("compiler", {}, dict(device="cpu"), WARNING, "none of the compilers c++", "apt install g++"),
    ("memory", {}, {}, OK, "30.00 GiB of 32.00 GiB are free", ""),
    ("memory", dict(container=4 * GIB, free=GIB), {}, WARNING, "the container's limit is 4.00 GiB", "free -h"),
    ("wsl", {}, {}, None, "", ""),
]  # fmt: skip


@pytest.mark.parametrize(("check", "changes", "keys", "level", "says", "do"), TABLE)
def test_each_check_by_made_up_facts(monkeypatch, check, changes, keys, level, says, do):
    monkeypatch.setattr(checks.shutil, "which", lambda name: name == "cc")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    verdict = CHECKS[check]({**SOUND, **changes}, {**CONFIG, **keys})
    if level is None:
        assert verdict is None
        return
    assert verdict.level == level
    assert says in verdict.says
    assert do in verdict.do
    assert bool(verdict.do) == (level != OK), "a trouble has something to do"


def test_every_check_has_a_row_and_gets_along_without_torch_and_keys():
    assert {check for check, *_ in TABLE} == set(CHECKS)
    known = {**SOUND, "torch": None, "torch_failure": "No module named 'torch'"}
    known = {name: known[name] for name in ("system", "wsl", "packages", "variables", "torch_failure")}
    assert checks.verdicts_on({**known, "torch": None}, {})["torch"].level == STOP


# ---- what it says of a run ---------------------------------------------------------------------------------

TRAINED = {**TOY, "batch_size": 1, "max_iters": 10}
SMALL = flags(**TRAINED)


def doctor(*argv, code=0):
    """What doctor.py answers, as --json gives it; it must end with this exit code."""
    with pytest.raises(SystemExit) as stop:
        run_script("doctor.py", "--json", *argv)
    told = json.loads(stop.value.text)
    assert (stop.value.code, bool(told["stopped_by"])) == (code, bool(code)), told["checks"]
    return told


@pytest.fixture
def no_plan(monkeypatch):
    monkeypatch.setitem(run.STEPS, "fit", lambda asked: Verdict(OK, "not looked at"))


def held():
    """{path: (its bytes, when it was written)} of all files here."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path().rglob("*") if path.is_file()}


def test_a_sound_run_is_told_so_and_nothing_is_changed():
    names = train(**TRAINED).names
    os.remove("out/run.lock")
    before = held()
    told = doctor(*SMALL, "--init_from=resume", "--max_iters=20")
    assert held() == before
    of_run = {name: told["checks"][name]["level"] for name in ("run", *run.STEPS) if name in told["checks"]}
    assert of_run == dict.fromkeys(("run", "data", "folder", "fit"), OK)
    assert told["checks"]["run"]["says"].endswith("goes on at iteration 10")
    assert "60,000 train tokens, 6,000 val tokens" in told["checks"]["data"]["says"]
    assert told["config"] == {**names["config"], "init_from": "resume", "max_iters": 20}
    doctor(*SMALL, "--out_dir=new/below")
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("argv", "stopped_by", "says"),
    [
        (["--dataset=nowhere"], "run", "data/nowhere/train.bin does not exist"),
        (["--block_size=100000"], "run", "too few for block_size=100000"),
        (["--batchsize=1"], "run", "did you mean 'batch_size'?"),
        (["--n_head=3"], "run", "is not divisible by n_head=3"),
        (["--init_from=resume"], "run", "there is no checkpoint out/ckpt.pt"),
        (["--init_from=data"], "run", "expects a folder that holds a ckpt.pt, or a Hugging Face GPT-2"),
        (["--device=cuda:99"], "run", "device='cuda:99', but"),
        (["--out_dir=a-file"], "folder", "out_dir='a-file' can't be written to"),
        (["--out_dir=locked"], "folder", "out_dir='locked'"),
        (["--dataset=wide"], "data", "data/wide/val.bin holds token 999"),
    ],
)
def test_what_would_stop_a_run_in_train_pys_own_words(no_plan, argv, stopped_by, says):
    Path("a-file").touch()
    Path("locked/run.lock").mkdir(parents=True)  # where train.py would write its name
    shutil.copytree("data/markov", "data/wide")
    Path("data/wide/val.bin").write_bytes((999).to_bytes(2, "little") * 1000)
    told = doctor(*SMALL, *argv, code=1)
    assert told["stopped_by"] == [stopped_by]
    assert says in told["checks"][stopped_by]["says"]


def test_what_a_patched_train_py_raises_would_stop_the_run():
    Path("train.py").write_text("learning_rate = 1.0\nimport nowhere\n")
    _, found = run.look("train.py", [])
    assert found == {"run": Verdict(STOP, "train.py, line 2: ModuleNotFoundError: No module named 'nowhere'")}


def test_what_train_py_prints_itself_is_told(no_plan, hugging_face_gpt2):
    told = doctor(*SMALL, f"--init_from={hugging_face_gpt2[0]}", "--decay_lr=False")["checks"]["run"]
    assert told["level"] == WARNING
    assert "warmup_iters, lr_decay_iters, min_lr: no effect, decay_lr=False" in told["says"]
    assert "warning: meta.pkl of the data names 65 symbols" in told["says"]


def test_variables_that_the_user_has_not_set_are_not_listed(no_plan, monkeypatch):
    for name in [name for name in os.environ if name.startswith(checks.TORCHS)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    assert doctor(*SMALL)["facts"]["variables"].keys() == {"PYTORCH_NO_CUDA_MEMORY_CACHING"}


def plan(size, **levers):
    return Plan(12, 1, size, MemoryLevers(**levers), False, limit_bytes=GIB, peak_bytes=GIB // 2)


@pytest.mark.parametrize(
    ("answer", "keys", "level", "says"),
    [
        (plan(12), {}, OK, "batch_size 12 fits: it takes 0.50 GiB"),
        (plan(4), {}, STOP, "batch_size 12 would not fit, 4 would with 0.50 GiB"),
        (plan(12, recompute=True), {}, STOP, "would not fit"),
        (plan(4), {"auto_fit": True}, OK, "auto_fit makes it fit"),
        (UsageError("auto-fit: nothing fits: batch_size 1"), {}, STOP, "nothing fits"),
        (UsageError("auto-fit could not look at the device"), {}, WARNING, "can't be simulated"),
        (RuntimeError("Tensor.item() cannot be called on meta tensors"), {}, WARNING, "can't be simulated"),
    ],
)
def test_whether_the_batch_fits(monkeypatch, answer, keys, level, says):
    def fit(*_):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(autofit, "fit", fit)
    told = doctor(*flags(**{**TOY, "batch_size": 12, **keys}), code=int(level == STOP))["checks"]["fit"]
    assert told["level"] == level
    assert says in told["says"]


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
        ("in use by process 7 on engine.of.ada, since 9:00", "in use by process 7, since 9:00"),
        ("run of USER on HOST.local", "run of … on ….local"),
        ("HOSTED by a USERland", "HOSTED by a USERland"),
        ("/tmp/torchinductor_USER", "…/torchinductor_…"),
    ],
)
def test_what_is_taken_out_of_a_text(monkeypatch, text, shown):
    monkeypatch.setattr(private.getpass, "getuser", lambda: "USER")
    monkeypatch.setattr(private.socket, "gethostname", lambda: "HOST")
    monkeypatch.setenv("HOME", "HOME")
    assert private.private({"a": (text.replace("ROOT", str(ROOT)),)}, str(ROOT)) == {"a": (shown,)}
