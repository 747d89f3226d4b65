"""The similarity explorer in Chromium, served by Voila and run in JupyterLab. Skipped where there is no
Chromium."""
import shutil
import sys

import pytest
from conftest import ROOT, free_port, serving

from visionbench.systems.daenr.config import DaenrConfig
from visionbench.systems.daenr.explorer import VIEWS, SimilarityExplorer
from visionbench.systems.daenr.fit import fit

pytestmark = [pytest.mark.browser, pytest.mark.slow]
GD = "document.querySelector('.js-plotly-plot')"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two dry seeds: the dashboard needs a folder, not good numbers."""
    dry = DaenrConfig.start("quick", images=48, neurons=10, test_images=16, repeats=4, unseen=24, epochs=2,
                            limit_batches=2, latent=16, device="cpu",
                            out=str(tmp_path_factory.mktemp("runs")))
    return [fit(dry.replace(seed=seed)) for seed in (0, 1)][0]


def drawn(function):
    """A condition on the figure, once it is there."""
    return f"(() => {{ const gd = {GD}; return gd && gd.data && gd.layout && ({function})(gd); }})()"


def place(page, axis, x, y):
    """Where a point of a panel is on the page, in pixels."""
    page.locator(".js-plotly-plot").scroll_into_view_if_needed()
    return page.evaluate(f"""() => {{
        const gd = {GD}, box = gd.getBoundingClientRect();
        const xa = gd._fullLayout['xaxis{axis}'], ya = gd._fullLayout['yaxis{axis}'];
        return [box.left + xa._offset + xa.c2p({x}), box.top + ya._offset + ya.c2p({y})];
    }}""")


def frames(i, j):
    """Are both matrices framed at this pair?"""
    return drawn(f"""gd => {{
        const marks = gd.data.filter(t => t.meta === 'pair').map(t => [t.x[0] + .5, t.y[0] + .5].join());
        return marks.join(' ') === '{j},{i} {i},{j} {j},{i} {i},{j}';
    }}""")


def check_dashboard(page, run):
    """Move controls with the keyboard, point with the mouse, and read from the figure what a reader would
    see."""
    expected = SimilarityExplorer(run)
    page.locator(".js-plotly-plot .annotation-text", has_text="Principal axes").wait_for()
    assert page.locator(".js-plotly-plot").count() == 1
    wide = "[...document.querySelectorAll('.widget-image')].filter(i => i.naturalWidth > 200)"
    page.wait_for_function(f"{wide}.length === 3")
    before = page.locator(".widget-image").first.get_attribute("src")
    page.locator(".image .noUi-handle").press("ArrowRight")
    page.get_by_text("Image 1, a repeated test image").wait_for()
    page.wait_for_function("old => document.querySelector('.widget-image').src !== old", arg=before)
    titles = dict(zip(VIEWS, ("Principal axes", "Feature weights", "Drawing and predicting", "Bias at",
                              "Gain of joint training")))
    for view in (*VIEWS[1:], VIEWS[0], "Similarity"):  # there and back again on the one figure
        page.get_by_role("button", name=view, exact=True).click()
        page.locator(".js-plotly-plot .annotation-text", has_text=titles[view]).first.wait_for()
        pictures = 16 if view == "Similarity" else 0
        page.wait_for_function(drawn(f"gd => (gd.layout.images || []).length === {pictures}"))
        assert page.locator(".trouble").count() == 0
    page.mouse.move(*place(page, "", 9, 4))  # the first matrix
    page.get_by_text("Stimuli 4 and 9.").wait_for()
    page.wait_for_function(frames(4, 9))
    page.mouse.move(*place(page, "2", 3, 12))  # the second
    page.get_by_text("Stimuli 12 and 3.").wait_for()
    page.wait_for_function(frames(12, 3))
    picture = page.locator(".widget-image").first.get_attribute("src")
    find = f"const t = {GD}.data.find(t => t.meta === 'stimuli')"
    spot = page.evaluate(f"() => {{ {find}; return [t.x[7], t.y[7]]; }}")
    page.mouse.move(*place(page, "3", *spot))  # the plane, where another stimulus may lie on top
    page.get_by_text("Point at another cell for a pair.").wait_for()
    page.wait_for_function("old => document.querySelector('.widget-image').src !== old", arg=picture)
    page.locator(".estimator button", has_text="biased").last.click()
    page.locator(".js-plotly-plot .annotation-text", has_text="Biased CKA, 16 stimuli").wait_for()
    expected.comparison.estimator.value = "biased"
    z = next(t for t in expected.draw("Similarity")["board"]["data"] if t.get("meta") == "cka")["z"]
    heat = "gd.data.find(t => t.meta === 'cka').z[2][3]"
    page.wait_for_function(drawn(f"gd => Math.abs({heat} - {z[2][3]}) < 1e-6"))
    page.mouse.click(*place(page, "4", 0, 1))  # layer h1 of A, pixels of B
    page.locator(".js-plotly-plot .annotation-text", has_text="B pixels").wait_for()
    page.locator(".run-b select").select_option(index=1)
    page.get_by_text("-s1, AE").wait_for()
    page.locator(".net-b select").select_option("the recorded neurons")
    page.locator(".js-plotly-plot .annotation-text", has_text="choose those").wait_for()  # not what they saw
    page.locator(".stimuli select").select_option(index=2)
    page.locator(".js-plotly-plot .annotation-text", has_text="B neurons").first.wait_for()
    assert not page.thrown


def test_voila_serves_the_dashboard(page, finished, tmp_path):
    port = free_port()
    pages = str(ROOT / "nbs" / "dashboards")
    command = [sys.executable, "-m", "voila", pages, "--no-browser", f"--port={port}"]
    with serving(command, tmp_path, f"http://127.0.0.1:{port}/", VISIONBENCH_RUN=str(finished.path)):
        page.set_viewport_size({"width": 1400, "height": 1500})
        page.goto(f"http://127.0.0.1:{port}/voila/render/similarity.ipynb")
        check_dashboard(page, finished)
        assert not page.get_by_text("skip_exec").first.is_visible()


def test_jupyterlab_runs_the_dashboard(page, finished, tmp_path):
    folder, port = tmp_path / "notebooks", free_port()
    folder.mkdir()
    shutil.copy(ROOT / "nbs" / "dashboards" / "similarity.ipynb", folder)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}",
               "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--expose-app-in-browser",
               f"--ServerApp.root_dir={folder}"]
    with serving(command, tmp_path, f"http://127.0.0.1:{port}/api", VISIONBENCH_RUN=str(finished.path)):
        page.set_viewport_size({"width": 1700, "height": 1700})
        page.goto(f"http://127.0.0.1:{port}/lab/tree/similarity.ipynb")
        page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for()
        page.evaluate("""() => {
            const app = window.jupyterapp, panel = app.shell.currentWidget;
            panel.sessionContext.ready.then(() => app.commands.execute('notebook:run-all-cells'));
        }""")
        check_dashboard(page, finished)
        assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
