"""What a reader sees: the site, JupyterLab and the dashboards, in Chromium. Skipped where there is no
Chromium."""
import functools
import http.server
import shutil
import sys
import threading

import nbformat
import pytest
from conftest import ROOT, free_port, page, serving  # noqa: F401  (other files take these from here)

pytestmark = [pytest.mark.browser, pytest.mark.slow]


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
    assert "a notebook cell; changed in place" in text and "three bars" in text
    assert "_docs/start/01_run.html" in text
    assert not page.thrown


@pytest.fixture
def lab(tmp_path):
    """JupyterLab on a folder with one small notebook, and configuration of its own; ended with its kernels,
    whatever happens."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    cells = ["from visionbench.core.config import Config",
             "answer = 6 * 7\nprint('the bench says', answer, Config.__name__)"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nb.metadata.kernelspec = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(nb, folder / "small.ipynb")
    port = free_port()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}",
               "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--expose-app-in-browser",
               f"--ServerApp.root_dir={folder}"]
    with serving(command, tmp_path, f"http://127.0.0.1:{port}/api"):
        yield f"http://127.0.0.1:{port}"


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


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A dry run of a small network: the dashboard needs a folder, not good numbers."""
    from visionbench.systems.backdoor.config import BackdoorConfig
    from visionbench.systems.backdoor.fit import fit

    return fit(BackdoorConfig.start("quick", depth=8, width=4, limit_batches=2, pretrain_epochs=1,
                                    attacker_epochs=1, inject_epochs=1, victim_epochs=1,
                                    out=str(tmp_path_factory.mktemp("runs")), device="cpu"))


def check_dashboard(page, run):
    """Move controls with the keyboard and read from the figure what a reader would see."""
    from visionbench.systems.backdoor.explorer import VIEWS, BackdoorExplorer

    def drawn(function):
        return ("(() => { const gd = document.querySelector('.js-plotly-plot'); "
                f"return gd && gd.data && gd.layout && ({function})(gd); }})()")

    expected = BackdoorExplorer(run)
    page.locator(".js-plotly-plot .annotation-text", has_text="Attack success").wait_for()
    assert page.locator(".js-plotly-plot").count() == 1
    page.locator(".knob .noUi-handle").press("ArrowLeft")                        # 0.9 → 0.85
    page.wait_for_function(
        drawn("gd => gd.layout.shapes.length && Math.abs(gd.layout.shapes[0].x0 - .85) < 1e-9"))
    expected.knob.value = .85
    want = [t["y"][0] for t in expected.draw("Policies")["board"]["data"] if t.get("mode") == "markers"
            and t["yaxis"] == "y2"][0]
    page.wait_for_function(drawn("gd => gd.data.some(t => t.yaxis === 'y2' && t.mode === 'markers' "
                                 f"&& Math.abs(t.y[0] - {want}) < 1e-9)"))
    page.locator(".min-exit .noUi-handle").press("ArrowRight")
    expected.start.value = 1
    cost = next(t["y"] for t in expected.draw("Policies")["board"]["data"] if t["type"] == "bar")
    page.wait_for_function(drawn(
        "gd => { const bar = gd.data.find(t => t.type === 'bar'); "
        f"return bar && bar.y[0] === 0 && Math.abs(bar.y[1] - {cost[1]}) < 1e-9; }}"))
    page.locator(".policy select").select_option("patience")
    page.locator(".js-plotly-plot .xtitle", has_text="repetitions P").wait_for()
    titles = dict(zip(VIEWS, (
        "Accuracy, clean", "How far the trigger moves", "Attack success of each output alone",
        "AUROC, triggered", "not been scanned", "Confusion of all exits")))
    for view in (*VIEWS[1:], VIEWS[0]):  # there and back again on the one figure
        page.get_by_role("button", name=view, exact=True).click()
        page.locator(".js-plotly-plot .annotation-text", has_text=titles[view]).first.wait_for()
        assert page.locator(".trouble").count() == 0
    page.get_by_role("button", name="One image", exact=True).click()
    page.wait_for_function("[...document.querySelectorAll('.widget-image')]"
                           ".filter(i => i.naturalWidth > 200).length === 2")
    before = page.locator(".widget-image").first.get_attribute("src")
    page.locator(".trigger input").click()
    page.wait_for_function("old => document.querySelector('.widget-image').src !== old", arg=before)
    page.wait_for_function(drawn(
        "gd => { const c = gd.data.find(t => t.name === 'relative change of the features'); "
        "return c && c.y.every(v => v === 0); }"))


def test_voila_serves_the_dashboard(page, finished, tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "voila", str(ROOT / "nbs" / "dashboards"), "--no-browser",
               f"--port={port}"]
    with serving(command, tmp_path, f"http://127.0.0.1:{port}/", VISIONBENCH_RUN=str(finished.path)):
        page.goto(f"http://127.0.0.1:{port}/")
        page.get_by_text("backdoor.ipynb").first.wait_for()                      # the gallery
        page.goto(f"http://127.0.0.1:{port}/voila/render/backdoor.ipynb")
        check_dashboard(page, finished)
        assert page.get_by_text("Threat simulation").count() == 1
        assert not page.get_by_text("skip_exec").first.is_visible()


def test_jupyterlab_runs_the_dashboard(page, finished, tmp_path):
    folder, port = tmp_path / "notebooks", free_port()
    folder.mkdir()
    shutil.copy(ROOT / "nbs" / "dashboards" / "backdoor.ipynb", folder)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}",
               "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--expose-app-in-browser",
               f"--ServerApp.root_dir={folder}"]
    with serving(command, tmp_path, f"http://127.0.0.1:{port}/api", VISIONBENCH_RUN=str(finished.path)):
        page.goto(f"http://127.0.0.1:{port}/lab/tree/backdoor.ipynb")
        page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for()
        page.evaluate("""() => {
            const app = window.jupyterapp, panel = app.shell.currentWidget;
            panel.sessionContext.ready.then(() => app.commands.execute('notebook:run-all-cells'));
        }""")
        check_dashboard(page, finished)
        assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
