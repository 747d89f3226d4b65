"""The stream explorer as a reader sees it, in Voila and in JupyterLab. Skipped where there is no Chromium."""
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(Path(__file__).parent))
from test_browser import free_port, page, serving  # noqa: F401  (page is a fixture)

from visionbench.systems.plwf.config import PlwfConfig
from visionbench.systems.plwf.explorer import VIEWS, StreamExplorer
from visionbench.systems.plwf.fit import fit

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A dry run on the 8×8 digits with two λ: the dashboard needs a folder, not good numbers."""
    out = str(tmp_path_factory.mktemp("runs"))
    return fit(PlwfConfig.start("quick", streams=("digits",), networks=("mlp",), hidden=16, epochs=(1,),
                                replicas=2, lams=(.5, 2.),
                                methods=("fine-tune", "lwf", "plwf+credit", "joint"), local_methods=("lwf",),
                                device="cpu", out=out))


def drawn(function):
    """A condition on the one figure of the page."""
    return ("(() => { const gd = document.querySelector('.js-plotly-plot'); "
            f"return gd && gd.data && gd.layout && ({function})(gd); }})()")


def press(page, name, key):
    """One key on a slider, by its class on the page."""
    page.locator(f".{name} .noUi-handle").press(key)


def check_dashboard(page, run):
    """Move controls with the keyboard and read from the figure what a reader would see."""
    expected = StreamExplorer(run)
    page.locator(".js-plotly-plot .annotation-text", has_text="PLwF + credit, λ = 2").first.wait_for()
    assert page.locator(".js-plotly-plot").count() == 1
    A = expected.cached.matrix("digits-seen-plwf+credit-2").mean(0)
    page.wait_for_function(drawn(f"gd => Math.abs(gd.data[0].z[0][0] - {100 * A[-1, 0]}) < 1e-9"))
    page.locator(".kind select").first.select_option("over all classes seen (C-IL)")
    C = expected.cached.matrix("digits-seen-plwf+credit-2", "class").mean(0)
    page.wait_for_function(drawn(f"gd => Math.abs(gd.data[0].z[0][0] - {100 * C[-1, 0]}) < 1e-9"))
    titles = dict(zip(VIEWS, ("PLwF + credit", "Mean of all tasks seen", "Forgetting against plasticity",
                              "Cosine of g_n and g_o",
                              "Soft-max at τ", "Where answers go", "Teacher forwards", "every task")))
    for view in (*VIEWS[1:], VIEWS[0]):                               # there and back again on the one figure
        page.get_by_role("button", name=view, exact=True).click()
        page.locator(".js-plotly-plot .annotation-text", has_text=titles[view]).first.wait_for()
        assert page.locator(".trouble").count() == 0
    page.get_by_role("button", name="Conflict", exact=True).click()
    for key in ("Home", "ArrowRight"): press(page, "step", key)
    cosine = float(expected.cached.conflicts("digits-seen-plwf+credit-2").value[1])
    mark = f"t.mode === 'markers' && t.x.length === 1 && t.x[0] === 1"
    mark += f" && Math.abs(t.y[0] - {cosine}) < 1e-9"
    page.wait_for_function(drawn(f"gd => gd.data.some(t => {mark})"))
    page.get_by_role("button", name="Knowledge space", exact=True).click()
    page.wait_for_function("[...document.querySelectorAll('.widget-image')].some(i => i.naturalWidth > 50)")
    before = page.locator(".widget-image").first.get_attribute("src")
    press(page, "image", "ArrowRight")
    page.wait_for_function("old => document.querySelector('.widget-image').src !== old", arg=before)
    page.locator(".js-plotly-plot .annotation-text", has_text="test image 1").first.wait_for()
    press(page, "stage", "ArrowLeft")                                    # a student of four tasks
    page.locator(".js-plotly-plot .ytick", has_text="student f4").first.wait_for()
    assert not page.thrown


def test_voila_serves_the_dashboard(page, finished, tmp_path):  # noqa: F811
    port = free_port()
    command = [sys.executable, "-m", "voila", str(ROOT / "nbs" / "dashboards"), "--no-browser",
               f"--port={port}"]
    with serving(command, tmp_path, f"http://127.0.0.1:{port}/", VISIONBENCH_RUN=str(finished.path)):
        page.goto(f"http://127.0.0.1:{port}/")
        page.get_by_text("plwf.ipynb").first.wait_for()                          # the gallery
        page.goto(f"http://127.0.0.1:{port}/voila/render/plwf.ipynb")
        check_dashboard(page, finished)
        assert page.get_by_text("re-implementation from the paper's abstract").count() == 1
        assert not page.get_by_text("skip_exec").first.is_visible()


def test_jupyterlab_runs_the_dashboard(page, finished, tmp_path):  # noqa: F811
    folder, port = tmp_path / "notebooks", free_port()
    folder.mkdir()
    shutil.copy(ROOT / "nbs" / "dashboards" / "plwf.ipynb", folder)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}",
               "--ServerApp.port_retries=0",
               "--IdentityProvider.token=", "--expose-app-in-browser", f"--ServerApp.root_dir={folder}"]
    with serving(command, tmp_path, f"http://127.0.0.1:{port}/api", VISIONBENCH_RUN=str(finished.path)):
        page.goto(f"http://127.0.0.1:{port}/lab/tree/plwf.ipynb")
        page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for()
        page.evaluate("""() => {
            const app = window.jupyterapp, panel = app.shell.currentWidget;
            panel.sessionContext.ready.then(() => app.commands.execute('notebook:run-all-cells'));
        }""")
        check_dashboard(page, finished)
        assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
