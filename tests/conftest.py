"""What several test files need: the checkout, a copy of it to work on, a process with a time limit, the built site, Chromium."""
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRACKED = ("settings.ini", "setup.py", "_quarto.yml", "README.md", "nbs", "visionbench")
os.environ.setdefault("MPLBACKEND", "agg")


def notebooks(folder=ROOT / "nbs"):
    """Every notebook below `folder` that is part of the project."""
    return sorted(p for p in folder.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(folder).parts))


def copy_tree(to):
    """Copy what notebooks, modules and site are made from to the folder `to`."""
    leave = shutil.ignore_patterns("__pycache__", ".*")
    for name in TRACKED:
        if (ROOT / name).is_dir():
            shutil.rmtree(to / name, ignore_errors=True)
            shutil.copytree(ROOT / name, to / name, symlinks=True, ignore=leave)
        else:
            shutil.copy2(ROOT / name, to / name)
    return to


def run(*command, cwd, timeout=300, check=True, **env):
    """Run a process of its own on the tree in `cwd`; when it takes longer than `timeout` seconds, end it and its children."""
    env = {**{k: v for k, v in os.environ.items() if k != "IN_TEST"}, "PYTHONPATH": str(cwd), **env}
    process = subprocess.Popen([str(c) for c in command], cwd=cwd, env=env, text=True, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        out, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"{command} took longer than {timeout} s:\n{process.communicate()[0]}") from None
    assert not check or process.returncode == 0, f"{command} failed with {process.returncode}:\n{out}"
    return subprocess.CompletedProcess(command, process.returncode, out)


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture
def tree(tmp_path):
    """A copy of the checkout that a test may change."""
    return copy_tree(tmp_path)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The site, built from a copy of the checkout; `tests/check` names one folder in VISIONBENCH_SITE for all its parts."""
    folder = Path(os.environ.get("VISIONBENCH_SITE") or tmp_path_factory.mktemp("checkout"))
    if not (folder / "_docs" / ".sources").exists():
        run(sys.executable, "-m", "visionbench.docs", cwd=copy_tree(folder), timeout=400)
    return folder / "_docs"


@pytest.fixture(scope="session")
def chromium():
    """The path of an installed Chromium or Chrome; the test is skipped where there is none."""
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next((found for name in names if name and (found := shutil.which(name))), None)
    return path or pytest.skip("no Chromium on PATH (Debian: apt-get install chromium; or name one in CHROMIUM)")
