"""What several test files need: the checkout, a copy of it to work on, a process with a time limit, the built
site, Chromium and servers for it."""
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRACKED = ("settings.ini", "setup.py", "_quarto.yml", "README.md", "nbs", "visionbench")
os.environ.setdefault("MPLBACKEND", "agg")


def notebooks(folder=ROOT / "nbs"):
    """Every notebook below `folder` that is part of the project."""
    return sorted(p for p in folder.rglob("*.ipynb")
                  if not any(part[0] in "._" for part in p.relative_to(folder).parts))


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
    """Run a process of its own on the tree in `cwd`; when it takes longer than `timeout` seconds, end it and
    its children."""
    env = {**{k: v for k, v in os.environ.items() if k != "IN_TEST"}, "PYTHONPATH": str(cwd), **env}
    process = subprocess.Popen([str(c) for c in command], cwd=cwd, env=env, text=True,
                               stdin=subprocess.DEVNULL,
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
    """The site, built from a copy of the checkout; `tests/check` names one folder in VISIONBENCH_SITE for all
    its parts."""
    folder = Path(os.environ.get("VISIONBENCH_SITE") or tmp_path_factory.mktemp("checkout"))
    if not (folder / "_docs" / ".sources").exists():
        run(sys.executable, "-m", "visionbench.docs", cwd=copy_tree(folder), timeout=400)
    return folder / "_docs"


@pytest.fixture(scope="session")
def chromium():
    """The path of an installed Chromium or Chrome; the test is skipped where there is none."""
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome",
             "google-chrome-stable")
    path = next((found for name in names if name and (found := shutil.which(name))), None)
    return path or pytest.skip("no Chromium on PATH (Debian: apt-get install chromium; or name one "
                               "in CHROMIUM)")


FLAGS = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync").split()
PATIENCE = 90_000  # milliseconds for one thing to appear on a page


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def page(chromium):
    """An empty page; what scripts on it throw is collected in `page.thrown`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS, timeout=PATIENCE)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(PATIENCE)
        page.thrown = []
        page.on("pageerror", lambda error: page.thrown.append(str(error)))
        yield page
        browser.close()


def wait_for_server(url, server, log, seconds=90):
    """Wait until the server answers; show its log when it does not."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            return urlopen(url, timeout=5).read()
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"no answer from {url}:\n{log.read_text()[-3000:]}")


@contextlib.contextmanager
def serving(command, folder, url, **env):
    """A server with configuration of its own, until the end of the block; ended with its kernels, whatever
    happens."""
    log = folder / "server.log"
    private = {f"JUPYTER{name}": str(folder / name) for name in (
        "_CONFIG_DIR", "_DATA_DIR", "_RUNTIME_DIR", "LAB_SETTINGS_DIR", "LAB_WORKSPACES_DIR")}
    with log.open("w") as out:
        server = subprocess.Popen(command, env={**os.environ, **private, **env}, stdin=subprocess.DEVNULL,
                                  stdout=out, stderr=out, start_new_session=True)
    try:
        wait_for_server(url, server, log)
        yield
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
