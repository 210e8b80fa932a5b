"""The house: arrows between the rooms of nanofit/ point down."""

import ast
import json
import subprocess
import sys

import pytest
from conftest import ROOT, environment

PACKAGE = ROOT / "nanofit"
# Each floor may use those below it, and nothing of its own.
FLOORS = (
    (
        "allocator",
        "errors",
        "progress",
        "metrics_file",
        "pickles",
        "autofit.plan",
        "autofit.compiling",
        "report",
        "doctor",
    ),
    (
        "runtime",
        "models",
        "optimizers",
        "batches",
        "codec",
        "files",
        "gradients",
        "autofit.search",
        "autofit.trial",
        "doctor.facts",
        "early",
    ),
    (
        "distributed",
        "settings",
        "sharding",
        "recovery",
        "metrics",
        "autofit.advice",
        "autofit.cache",
        "report.log",
        "report.charts",
        "doctor.checks",
    ),
    ("checkpoint", "step", "autofit.fitter", "report.run", "report.page"),
    ("folder", "weights", "autofit.simulate", "report.picture", "report.server"),
    ("autofit", "autofit.probe", "huggingface", "report.memory"),
    ("doctor.gather",),
)
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
}


def imports_of(path):
    """Full names of all modules that a file imports anywhere in it; `from a import b` gives a.b where that is one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports name the whole path"
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in below if name.removeprefix("nanofit.") in MODULES]
            found |= set(modules) if len(modules) == len(below) else {node.module, *modules}
    return found


def ours_of(name):
    """What a module imports of nanofit, without that name before it."""
    return {used.removeprefix("nanofit.") for used in imports_of(MODULES[name]) if used.split(".")[0] == "nanofit"}


def test_every_module_has_its_floor():
    placed = [name for floor in FLOORS for name in floor]
    assert sorted(placed) == sorted(MODULES), "a new module of nanofit/ gets a place among FLOORS"


@pytest.mark.parametrize(("floor", "name"), [(i, name) for i, floor in enumerate(FLOORS) for name in floor])
def test_a_module_uses_only_what_stands_below_it(floor, name):
    below = {other for lower in FLOORS[:floor] for other in lower}
    assert ours_of(name) <= below


def test_values_and_errors_use_nothing_of_ours():
    for name in ("autofit.plan", "autofit.compiling", "errors"):
        assert not ours_of(name)
        assert "torch" not in {used.split(".")[0] for used in imports_of(MODULES[name])}, "and are there at once"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_the_package_is_handed_its_model_and_its_keys(name):
    roots = {path.stem for path in ROOT.glob("*.py")}
    assert {"model", "train", "configurator"} <= roots
    assert not {used.split(".")[0] for used in imports_of(MODULES[name])} & roots


@pytest.mark.parametrize("script", ["model.py", "configurator.py"])
def test_what_people_copy_uses_no_more_than_it_says(script):
    ours = {used for used in imports_of(ROOT / script) if used.split(".")[0] == "nanofit"}
    assert ours == (set() if script == "model.py" else {"nanofit.errors"})


def test_a_trials_child_has_nothing_of_its_parent_but_values():
    code = """
import json, sys
from nanofit.autofit import probe
probe.REPORT.write(json.dumps(sorted(name for name in sys.modules if not name.startswith("torch"))))
probe.REPORT.flush()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    there = set(json.loads(done.stdout))
    assert {"nanofit.autofit.plan", "nanofit.step"} <= there
    parents = {f"nanofit.autofit.{room}" for room in ("fitter", "trial", "search", "compiling", "advice", "cache")}
    assert not there & {*parents, "configurator", "model", "train", "nanofit.settings", "nanofit.checkpoint"}
