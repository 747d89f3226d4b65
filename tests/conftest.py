"""What several test files need: the checkout, a copy of it to work on, a process with a time limit, the built
site, and Chromium with servers for it."""
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

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
DASHBOARDS = ROOT / "nbs" / "dashboards"
TRACKED = ("settings.ini", "setup.py", "_quarto.yml", "README.md", "nbs", "visionbench")
os.environ.setdefault("MPLBACKEND", "agg")
sys.path.insert(0, str(ROOT / "tests"))  # for the modules that several test files share
pytest.register_assert_rewrite("endtoend", "explorers")


def notebooks(folder=ROOT / "nbs"):
    """Every notebook below `folder` that is part of the project."""
    return sorted(p for p in folder.rglob("*.ipynb")
                  if not any(part[0] in "._" for part in p.relative_to(folder).parts))


def code_notebook(*sources):
    """A notebook of code cells, for the kernel under the usual name."""
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    nb.metadata.kernelspec = {"name": "python3", "display_name": "python3", "language": "python"}
    return nb


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


def run(*command, cwd, timeout=300, check=True, stderr=subprocess.STDOUT, **env):
    """Run a process of its own on the tree in `cwd`; when it takes longer than `timeout` seconds, end it and
    its children. The result's stdout holds the errors too, unless `stderr` is a PIPE."""
    env = {**{k: v for k, v in os.environ.items() if k != "IN_TEST"}, "PYTHONPATH": str(cwd), **env}
    process = subprocess.Popen([str(c) for c in command], cwd=cwd, env=env, text=True,
                               stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=stderr, start_new_session=True)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"{command} took longer than {timeout} s:\n{out}{err or ''}") from None
    done = subprocess.CompletedProcess(command, process.returncode, out, err)
    assert not check or not done.returncode, f"{command} failed with {done.returncode}:\n{out}{err or ''}"
    return done


def launch(*module, cwd, processes=2, **more):
    """A module of the tree in `cwd` or of the checkout, in several processes that talk to each other; the
    test is skipped where torch has no gloo. `more` as for `run`."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this build of torch has no gloo, so two CPU processes cannot talk")
    many = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes)
    return run(sys.executable, *(many if processes > 1 else ()), "-m", *module, cwd=cwd, OMP_NUM_THREADS="1",
               PYTHONPATH=os.pathsep.join([str(cwd), str(ROOT)]), **more)


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture
def tree(tmp_path):
    """A copy of the checkout that a test may change."""
    return copy_tree(tmp_path)


@pytest.fixture
def copy(run, tmp_path):
    """The run that a file's fixture `run` gives, in a folder of its own, to be damaged."""
    from visionbench.runs.record import Run

    return Run.open(shutil.copytree(run.path, tmp_path / "runs" / run.path.parent.name / run.path.name))


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


@contextlib.contextmanager
def voila(name, folder, page, run):
    """A dashboard of this checkout on the page, served by Voila as one of its gallery, on a run; its server
    writes to `folder`."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "voila", str(DASHBOARDS), "--no-browser", f"--port={port}"]
    with serving(command, folder, f"{url}/", VISIONBENCH_RUN=str(run.path)):
        page.goto(f"{url}/")
        page.get_by_text(f"{name}.ipynb").first.wait_for()
        page.goto(f"{url}/voila/render/{name}.ipynb")
        yield
        assert not page.get_by_text("skip_exec").first.is_visible()
        assert page.locator(".trouble").count() == 0 and not page.thrown


@contextlib.contextmanager
def jupyterlab(notebook, folder, page, run=None):
    """A copy of a notebook on the page, in JupyterLab, all its cells run, a dashboard on a run; no cell may
    write to stderr."""
    pages, port, env = folder / "notebooks", free_port(), {"VISIONBENCH_RUN": str(run.path)} if run else {}
    pages.mkdir()
    shutil.copy(notebook, pages)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}",
               "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--expose-app-in-browser",
               f"--ServerApp.root_dir={pages}"]
    with serving(command, folder, f"http://127.0.0.1:{port}/api", **env):
        page.goto(f"http://127.0.0.1:{port}/lab/tree/{notebook.name}")
        page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for()
        # run-all before the kernel is ready is lost without a word, and a promise that is returned here hangs
        page.evaluate("""() => {
            const app = window.jupyterapp, panel = app.shell.currentWidget;
            panel.sessionContext.ready.then(() => app.commands.execute('notebook:run-all-cells'));
        }""")
        yield
        assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
        assert page.locator(".trouble").count() == 0 and not page.thrown


def drawn(function):
    """A condition on the one figure of a page, once it is there."""
    return ("(() => { const gd = document.querySelector('.js-plotly-plot'); "
            f"return gd && gd.data && gd.layout && ({function})(gd); }})()")


def press(page, name, key):
    """One key on a slider, by its class on the page."""
    page.locator(f".{name} .noUi-handle").press(key)


def written(page, text):
    """The titles and notes on the figure of a page that hold a text."""
    return page.locator(".js-plotly-plot .annotation-text", has_text=text)


def open_view(page, view, title):
    """Choose a view of a dashboard, and wait until it is drawn on the one figure there is."""
    page.get_by_role("button", name=view, exact=True).click()
    written(page, title).first.wait_for()
    assert page.locator(".js-plotly-plot").count() == 1 and page.locator(".trouble").count() == 0


@contextlib.contextmanager
def another_picture(page):
    """What is done in the block changes the first picture of a page."""
    before = page.locator(".widget-image").first.get_attribute("src")
    yield
    page.wait_for_function("old => document.querySelector('.widget-image').src !== old", arg=before)
