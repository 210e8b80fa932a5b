"""The house: arrows between the rooms of nanofit/ point down."""

import ast
import graphlib

from conftest import ROOT

PACKAGE = ROOT / "nanofit"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
VALUES = ("nanofit.units", "nanofit.errors")  # which are there at once, whatever else isn't


def imports_of(path):
    """Full names of what a file imports anywhere in it; of ours, modules alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports name the whole path"
            modules = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            found |= modules if len(modules) == len(node.names) else {node.module, *modules}
    return found


ARROWS = {name: {used for used in imports_of(path) if used in MODULES} for name, path in MODULES.items()}


def test_no_arrow_points_up():
    arrows = {name: used - {"nanofit"} for name, used in ARROWS.items()}  # a package's parent is always imported
    from_below = list(graphlib.TopologicalSorter(arrows).static_order())  # raises CycleError, which names a circle
    assert set(MODULES) <= set(from_below)


def test_only_auto_fit_uses_its_rooms_and_nothing_uses_the_tools():
    for name, used in ARROWS.items():
        if not name.startswith(("nanofit.autofit", "nanofit.tools")):
            assert not [u for u in used if u.startswith("nanofit.autofit.")], name
        if not name.startswith("nanofit.tools"):
            assert not [u for u in used if u.startswith("nanofit.tools")], name


def packages(path):
    return {used.split(".")[0] for used in imports_of(path)}


def test_values_use_nothing_of_ours_nor_torch():
    for name in VALUES:
        assert not ARROWS[name] - set(VALUES)
        assert "torch" not in packages(MODULES[name])


def test_the_package_is_handed_its_model_and_its_keys_and_model_py_needs_torch_alone():
    roots = {path.stem for path in ROOT.glob("*.py")}
    for name, path in MODULES.items():
        assert not packages(path) & roots, name
    assert not packages(ROOT / "model.py") & {"nanofit", *roots}
