"""What a script changes of its process before torch is there, in one call; importing changes nothing."""

import importlib.metadata
import platform
import subprocess
import sys

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
    ("release", "name"),
    [("2.6.0", ALLOCATOR_VARIABLES[0]), ("2.9.1+cu128", ALLOCATOR_VARIABLES[0]), ("2.10.0", ALLOCATOR_VARIABLES[1]),
     ("2.15.0a0", ALLOCATOR_VARIABLES[1])],
)  # fmt: skip
def test_the_variable_that_the_release_reads(monkeypatch, release, name):
    assert asked(monkeypatch, release) == {name: "expandable_segments:True"}


@pytest.mark.parametrize(
    "machine", [dict(kernel="5.15.167.4-microsoft-standard-WSL2"), dict(system="win32"), dict(system="darwin")], ids=str
)
def test_where_it_would_fail_it_is_not_asked_for(monkeypatch, machine):
    assert asked(monkeypatch, **machine) == {}


@pytest.mark.parametrize("name", ALLOCATOR_VARIABLES)
def test_what_the_user_has_set_stands(monkeypatch, name):
    assert asked(monkeypatch, **{name: "max_split_size_mb:64"}) == {name: "max_split_size_mb:64"}


EMBEDDED = """
import importlib, os, pkgutil, signal, sys

def state():
    allocator = {name: value for name, value in os.environ.items() if name.endswith("ALLOC_CONF")}
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    return [sys.excepthook, sys.stdin, sys.stdout, sys.stderr, sys.stdout.errors, list(sys.path), allocator, handlers]

before = state()
import configurator, model, nanofit
for module in pkgutil.walk_packages(nanofit.__path__, "nanofit."):
    if not module.name.endswith((".probe", ".child")):  # a script of its own
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


@pytest.mark.parametrize("script", ["train.py", "sample.py", "bench.py", "export.py", "report.py", "doctor.py"])
def test_scripts_start_before_torch_is_imported(script):
    code = (
        "import ast, os, sys\n"
        f"before, after = open({script!r}).read().split('nanofit.start(')\n"
        f"exec(before, {{'__file__': os.path.abspath({script!r})}})\n"
        "import nanofit\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
        "nanofit.start()\n"
        "print(*(name for name in os.environ if name.endswith('ALLOC_CONF')))\n"
    )
    variables = {k: v for k, v in environment().items() if k not in ALLOCATOR_VARIABLES}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ALLOCATOR_VARIABLES


@pytest.mark.parametrize(
    "script",
    ["train.py", "sample.py", "bench.py", "export.py", "report.py", "doctor.py", "data/from_text/prepare.py"],
)
def test_scripts_find_what_lies_beside_them_and_need_no_docstring(script):
    command = [sys.executable, "-P", "-OO", str(ROOT / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(PYTHONPATH=""))
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage" in done.stdout
