"""What is asked of torch's allocator, before torch is there, and of the C library's."""

import importlib.metadata
import platform
import subprocess
import sys

import pytest
from conftest import ROOT, environment

from nanofit import allocator


def asked(monkeypatch, release="2.13.0", kernel="6.1.0", system="linux", **variables):
    """The allocator's variables after asking, on a machine of this kind."""
    for name in allocator.NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(importlib.metadata, "version", lambda package: {"torch": release}[package])
    monkeypatch.setattr(platform, "release", lambda: kernel)
    monkeypatch.setattr(sys, "platform", system)
    allocator.prefer_expandable_segments()
    return {name: allocator.os.environ[name] for name in allocator.NAMES if name in allocator.os.environ}


@pytest.mark.parametrize(
    ("release", "name"),
    [("2.6.0", allocator.NAMES[0]), ("2.9.1+cu128", allocator.NAMES[0]), ("2.10.0", allocator.NAMES[1]),
     ("2.15.0a0", allocator.NAMES[1])],
)  # fmt: skip
def test_the_variable_that_the_release_reads(monkeypatch, release, name):
    assert asked(monkeypatch, release) == {name: "expandable_segments:True"}


@pytest.mark.parametrize(
    "machine", [dict(kernel="5.15.167.4-microsoft-standard-WSL2"), dict(system="win32"), dict(system="darwin")], ids=str
)
def test_where_it_would_fail_it_is_not_asked_for(monkeypatch, machine):
    assert asked(monkeypatch, **machine) == {}


@pytest.mark.parametrize("name", allocator.NAMES)
def test_what_the_user_has_set_stands(monkeypatch, name):
    assert asked(monkeypatch, **{name: "max_split_size_mb:64"}) == {name: "max_split_size_mb:64"}


@pytest.mark.parametrize("script", ["train.py", "sample.py", "bench.py"])
def test_scripts_ask_before_torch_is_imported(script):
    code = (
        "import ast, sys\n"
        f"imports = [n for n in ast.parse(open({script!r}).read()).body if isinstance(n, ast.Import)]\n"
        "names = [n.names[0].name.split('.')[0] for n in imports]\n"
        "assert names.index('nanofit') < names.index('torch'), names\n"
        "import os, nanofit\n"
        "assert 'torch' not in sys.modules\n"
        "print(*(name for name in os.environ if name.endswith('ALLOC_CONF')))\n"
    )
    variables = {k: v for k, v in environment().items() if k not in allocator.NAMES}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in allocator.NAMES


GLIBC = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
TWICE = """
import resource, sys
sys.path.insert(0, {root!r})
from nanofit import machine
import torch

device = torch.device("cpu")
machine.set_device(device)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def taken():
    before = faults()
    torch.ones(2**24)  # 64 MiB, freed at once
    return faults() - before


torch.ones(2**25)
again = taken()
machine.empty_cache(device)
print(again, taken())
"""


def faults(**variables):
    """(pages that the system had to find for 64 MiB where 128 were freed, and after memory was given back)."""
    done = subprocess.run(
        [sys.executable, "-c", TWICE.format(root=str(ROOT))],
        capture_output=True, text=True, env={**environment(), **variables}, check=True,
    )  # fmt: skip
    return tuple(map(int, done.stdout.split()))


@pytest.mark.skipif(not GLIBC, reason="another C library than glibc")
def test_a_cpu_keeps_its_memory_until_it_is_asked_for():
    again, given_back = faults()
    assert again < 20
    assert given_back > again + 50  # of 4 KiB or, as huge ones, of 2 MiB


@pytest.mark.skipif(not GLIBC, reason="another C library than glibc")
def test_what_the_user_tells_the_c_library_stands():
    again, _ = faults(MALLOC_TRIM_THRESHOLD_="131072")
    assert again > 50  # a page may have 2 MiB
