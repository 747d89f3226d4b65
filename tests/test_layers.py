"""Imports point one way (CONTRIBUTING.md, "Where does this line go?"), and importing the package is light."""
import ast
import sys

import pytest
from conftest import ROOT, run

KITS = {"data", "nn", "physics", "metrics", "similarity"}
BELOW = {  # what a room may import, beside itself
    "core": set(),
    "data": {"core", "physics"},
    **{room: {"core"} for room in KITS - {"data"}},
    "runs": {"core", "metrics", "similarity"},
    "view": {"core", "metrics", "similarity"},
    "train": {"core"} | KITS,
    "federated": {"core", "train"} | KITS,
}
BELOW["systems"] = {*BELOW}
BELOW["docs"] = {"core", "runs"}  # it executes notebooks as a run does
BELOW["configure"] = {"core", "data"}
BELOW["cli"] = {*BELOW}


def only_here(package, room, path, inside_function):
    """May a module import this third-party package?"""
    return {
        "ipywidgets": path == "view/controls.py" or (room == "systems" and path.endswith("/explorer.py")),
        "papermill": path == "runs/execute.py",
        "nvflare": path == "federated/nvflare.py",
        "nbdev": room in ("cli", "docs") and inside_function,
    }.get(package, True)


def imports(tree, package):
    """(absolute name, inside a function?, line) of every import in a module that lies in `package`."""
    inner = {id(n) for f in ast.walk(tree)
             if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name.split("."), id(node) in inner, node.lineno


def breaks(source, path):
    """The imports of a module, given its path below visionbench/, that go against the order."""
    parts = path.removesuffix(".py").split("/")
    room, package = parts[0], ["visionbench", *parts[:-1]]
    for name, inside, line in imports(ast.parse(source), package):
        where = f"{path}:{line} imports {'.'.join(name)}"
        if name[0] != "visionbench":
            if not only_here(name[0], room, path, inside):
                yield where
        elif len(name) > 1 and name[1] in BELOW:
            if name[1] != room and name[1] not in BELOW[room]:
                yield where
            elif room == name[1] == "systems" and name[2:3] != parts[1:2]:
                yield where


def modules():
    """Every exported module, as its path below visionbench/."""
    return [p.relative_to(ROOT / "visionbench").as_posix()
            for p in sorted((ROOT / "visionbench").rglob("*.py")) if p.name[0] != "_"]


@pytest.mark.parametrize("path", modules())
def test_imports_point_down(path):
    assert path.split("/")[0].removesuffix(".py") in BELOW, f"{path} lies in no known room"
    assert not [*breaks((ROOT / "visionbench" / path).read_text(encoding="utf-8"), path)]


@pytest.mark.parametrize(("path", "source"), [
    ("core/config.py", "from ..nn.resnet import ResNet"),
    ("core/config.py", "def f():\n    from visionbench.nn import resnet"),
    ("nn/exits.py", "from ..data.images import mnist"),
    ("data/images.py", "import visionbench.nn.resnet"),
    ("runs/record.py", "from ..train.learner import Learner"),
    ("train/learner.py", "from ..view import style"),
    ("train/learner.py", "from .. import systems"),
    ("systems/mar/fit.py", "from ..backdoor.trigger import stamp"),
    ("systems/mar/fit.py", "from ...cli import main"),
    ("view/curves.py", "import ipywidgets"),
    ("runs/record.py", "def f():\n    import papermill as pm"),
    ("train/learner.py", "from nvflare import collab"),
    ("docs.py", "from nbdev.config import get_config"),
    ("nn/exits.py", "def f():\n    import nbdev.test"),
])
def test_a_planted_break_is_found(path, source):
    assert len([*breaks(source, path)]) == 1


@pytest.mark.parametrize(("path", "source"), [
    ("data/slices.py", "from ..physics.ct import project"),
    ("systems/mar/fit.py",
     "from .config import Config\nfrom ...train.learner import Learner\nfrom ...view.curves import plot"),
    ("systems/mar/explorer.py", "import ipywidgets"),
    ("view/controls.py", "import ipywidgets as w"),
    ("runs/execute.py", "def f():\n    import papermill"),
    ("docs.py", "def f():\n    from nbdev.config import get_config"),
    ("cli.py", "from visionbench import __version__\nfrom .runs import record"),])
def test_an_allowed_import_passes(path, source):
    assert not [*breaks(source, path)]


@pytest.mark.parametrize("module", ["visionbench", "visionbench.cli"])
def test_importing_the_package_is_light(module):
    heavy = "torch torchvision nbdev papermill plotly ipywidgets matplotlib sklearn"
    code = f"import sys, {module}; print('loaded:', *[m for m in '{heavy}'.split() if m in sys.modules])"
    assert run(sys.executable, "-c", code, cwd=ROOT, timeout=60).stdout.strip() == "loaded:"
