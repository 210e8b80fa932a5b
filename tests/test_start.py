"""What a script changes of its process before torch is there, in one call; importing changes nothing."""

import ast
import importlib.metadata
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

import nanofit
from nanofit import ALLOCATOR_VARIABLES


def asked(monkeypatch, release="2.13.0", kernel="6.1.0", system="linux", **variables):
    """The allocator's variables after asking, on a machine of this kind."""
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(importlib.metadata, "version", lambda package: {"torch": release}[package])
    monkeypatch.setattr(platform, "release", lambda: kernel)
    monkeypatch.setattr(sys, "platform", system)
    nanofit._prefer_expandable_segments()
    return {name: nanofit.os.environ[name] for name in ALLOCATOR_VARIABLES if name in nanofit.os.environ}


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (dict(release="2.6.0"), {ALLOCATOR_VARIABLES[0]: "expandable_segments:True"}),
        (dict(release="2.9.1+cu128"), {ALLOCATOR_VARIABLES[0]: "expandable_segments:True"}),
        (dict(release="2.10.0"), {ALLOCATOR_VARIABLES[1]: "expandable_segments:True"}),
        (dict(release="2.15.0a0"), {ALLOCATOR_VARIABLES[1]: "expandable_segments:True"}),
        (dict(kernel="5.15.167.4-microsoft-standard-WSL2"), {}),  # where it would fail
        (dict(system="win32"), {}),
        *(({name: "max_split_size_mb:64"}, {name: "max_split_size_mb:64"}) for name in ALLOCATOR_VARIABLES),  # set
    ],
)
def test_the_allocator_is_asked_for_memory_that_grows_where_that_works(monkeypatch, machine, expected):
    assert asked(monkeypatch, **machine) == expected


EMBEDDED = """
import importlib, os, pkgutil, signal, sys

def state():
    allocator = {name: value for name, value in os.environ.items() if name.endswith("ALLOC_CONF")}
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    return [sys.excepthook, sys.stdin, sys.stdout, sys.stderr, sys.stdout.errors, list(sys.path), allocator, handlers]

before = state()
import nanofit
assert not {"torch", "numpy"} & set(sys.modules)
import configurator, model
for module in pkgutil.walk_packages(nanofit.__path__, "nanofit."):
    if not module.name.endswith(".child"):  # a script of its own
        importlib.import_module(module.name)
learning_rate = 0.5
configurator.configure(globals(), ["--learning_rate=1"])
assert state() == before, [pair for pair in zip(before, state()) if pair[0] != pair[1]]
nanofit.start()
assert sys.excepthook is not before[0]
"""


def test_modules_in_a_notebook_change_nothing_of_it(workplace):
    variables = {k: v for k, v in environment().items() if k not in ALLOCATOR_VARIABLES}
    done = subprocess.run([sys.executable, "-c", EMBEDDED], capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr


OF_AN_OPERATOR = """
import torch

@torch.library.custom_op("own::scaled", mutates_args=())
def scaled(x: torch.Tensor) -> torch.Tensor:
    return 2.0 * x

scaled.register_fake(torch.empty_like)
scaled.register_autograd(lambda ctx, grad: 2.0 * grad)

class Same(torch.autograd.Function):  # as in model.py
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.clone()

def forward(x):
    return Same.apply(scaled(1.0 + x))
"""
COMPILED = """
import nanofit

nanofit.start()
import torch
import model

x = torch.zeros(8, requires_grad=True)
torch.compile(model.forward)(x).sum().backward()
print(x.grad[0].item())
"""


@pytest.mark.slow
def test_a_compiled_step_from_the_cache_is_the_one_that_model_py_has_now(workplace):
    shutil.copytree(ROOT / "nanofit", "nanofit")
    variables = environment(TORCHINDUCTOR_CACHE_DIR=str(workplace / "cache"), PYTHONPATH=str(workplace))
    variables.pop("TORCH_COMPILE_CACHE_KEY_TAG", None)  # of a script that ran in this process
    for source in (OF_AN_OPERATOR, OF_AN_OPERATOR.replace("2.0 * grad", "5.0 * grad")):
        Path("model.py").write_text(source)
        done = subprocess.run([sys.executable, "-Bc", COMPILED], capture_output=True, text=True, env=variables)
        assert done.stdout == source.partition("grad: ")[2][:3] + "\n", done.stderr


@pytest.mark.parametrize("script", ["train.py", "sample.py", "bench.py", "export.py", "report.py", "doctor.py"])
def test_scripts_start_before_torch_is_imported(script):
    """And find what lies beside them where Python leaves that out of its path."""
    body = ast.parse((ROOT / script).read_text()).body
    [first] = [i for i, line in enumerate(body) if ast.unparse(line).startswith("nanofit.start(")]
    imported = [line.names[0].name if isinstance(line, ast.Import) else line.module
                for line in body[:first] if isinstance(line, (ast.Import, ast.ImportFrom))]  # fmt: skip
    assert set(imported) <= sys.stdlib_module_names | {"nanofit"}
    assert "sys.path" in ast.unparse(body[:first])
