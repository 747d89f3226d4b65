"""What a reader sees: the site and JupyterLab, in Chromium. Skipped where there is no Chromium."""
import functools
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from urllib.request import urlopen

import nbformat
import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]
FLAGS = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
         "--disable-sync").split()
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


@pytest.fixture(scope="module")
def address(site):
    """The built site, served on localhost."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_home_page_shows_a_figure_and_leads_on(page, address):
    page.goto(address + "/index.html")
    assert page.title().startswith("visionbench")
    widths = page.eval_on_selector_all("main img", "images => images.map(i => i.naturalWidth)")
    assert widths and min(widths) > 200, f"widths of the figures on the home page: {widths}"
    page.locator("#quarto-sidebar a[href$='start/01_first_run.html']").first.click()
    page.wait_for_url("**/start/01_first_run.html")
    assert page.locator("h1").first.inner_text().strip() and not page.thrown


def test_a_chapter_shows_signature_source_and_result(page, address):
    page.goto(address + "/docs.html")
    page.locator("#plotly_outputs").wait_for()
    text = page.locator("main").inner_text()
    assert "a notebook cell; changed in place" in text and "three bars" in text and "_docs/start/01_run.html" in text
    assert not page.thrown


@pytest.fixture
def lab(tmp_path):
    """JupyterLab on a folder with one small notebook, and configuration of its own; ended with its kernels, whatever happens."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    cells = ["from visionbench.core.config import Config", "answer = 6 * 7\nprint('the bench says', answer, Config.__name__)"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nb.metadata.kernelspec = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(nb, folder / "small.ipynb")
    port, log = free_port(), tmp_path / "lab.log"
    private = {f"JUPYTER{name}": str(tmp_path / name) for name in ("_CONFIG_DIR", "_DATA_DIR", "_RUNTIME_DIR", "LAB_SETTINGS_DIR", "LAB_WORKSPACES_DIR")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ServerApp.port_retries=0",
               "--IdentityProvider.token=", "--expose-app-in-browser", f"--ServerApp.root_dir={folder}"]
    with log.open("w") as out:
        server = subprocess.Popen(command, env={**os.environ, **private}, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    try:
        wait_for_server(f"http://127.0.0.1:{port}/api", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def wait_for_server(url, server, log, seconds=90):
    """Wait until the server answers; show its log when it does not."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            return urlopen(url, timeout=5).read()
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"no answer from {url}:\n{log.read_text()[-3000:]}")


def test_jupyterlab_runs_a_notebook(page, lab):
    page.goto(lab + "/lab/tree/small.ipynb")
    page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for()
    # run-all before the kernel is ready is lost without a word, and a promise that is returned here hangs
    page.evaluate("""() => {
        const app = window.jupyterapp, panel = app.shell.currentWidget;
        panel.sessionContext.ready.then(() => app.commands.execute('notebook:run-all-cells'));
    }""")
    page.locator(".jp-OutputArea-output", has_text="the bench says 42 Config").wait_for()
    assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
