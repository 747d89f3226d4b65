"""What a reader sees: the site, JupyterLab and the dashboards, in Chromium. Skipped where there is no
Chromium."""
import functools
import http.server
import threading

import nbformat
import pytest
from conftest import (DASHBOARDS, another_picture, code_notebook, drawn, jupyterlab, open_view, press, voila,
                      written)
from explorers import BACKDOOR

from visionbench.systems.backdoor.config import BackdoorConfig
from visionbench.systems.backdoor.explorer import VIEWS, BackdoorExplorer
from visionbench.systems.backdoor.fit import fit

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


def test_jupyterlab_runs_a_notebook(page, tmp_path):
    small = code_notebook("from visionbench.core.config import Config",
                          "answer = 6 * 7\nprint('the bench says', answer, Config.__name__)")
    nbformat.write(small, tmp_path / "small.ipynb")
    with jupyterlab(tmp_path / "small.ipynb", tmp_path, page):
        page.locator(".jp-OutputArea-output", has_text="the bench says 42 Config").wait_for()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return fit(BackdoorConfig.start("quick", **BACKDOOR, out=str(tmp_path_factory.mktemp("runs"))))


def check_dashboard(page, run):
    """Move controls with the keyboard and read from the figure what a reader would see."""
    expected = BackdoorExplorer(run)
    written(page, "Attack success").wait_for()
    assert page.locator(".js-plotly-plot").count() == 1
    press(page, "knob", "ArrowLeft")  # 0.9 → 0.85
    page.wait_for_function(
        drawn("gd => gd.layout.shapes.length && Math.abs(gd.layout.shapes[0].x0 - .85) < 1e-9"))
    expected.knob.value = .85
    want = [t["y"][0] for t in expected.draw("Policies")["board"]["data"] if t.get("mode") == "markers"
            and t["yaxis"] == "y2"][0]
    page.wait_for_function(drawn("gd => gd.data.some(t => t.yaxis === 'y2' && t.mode === 'markers' "
                                 f"&& Math.abs(t.y[0] - {want}) < 1e-9)"))
    press(page, "min-exit", "ArrowRight")
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
        open_view(page, view, titles[view])
    page.get_by_role("button", name="One image", exact=True).click()
    page.wait_for_function("[...document.querySelectorAll('.widget-image')]"
                           ".filter(i => i.naturalWidth > 200).length === 2")
    with another_picture(page):
        page.locator(".trigger input").click()
    page.wait_for_function(drawn(
        "gd => { const c = gd.data.find(t => t.name === 'relative change of the features'); "
        "return c && c.y.every(v => v === 0); }"))


def test_voila_serves_the_dashboard(page, finished, tmp_path):
    with voila("backdoor", tmp_path, page, finished):
        check_dashboard(page, finished)
        assert page.get_by_text("Threat simulation").count() == 1


def test_jupyterlab_runs_the_dashboard(page, finished, tmp_path):
    with jupyterlab(DASHBOARDS / "backdoor.ipynb", tmp_path, page, finished):
        check_dashboard(page, finished)
