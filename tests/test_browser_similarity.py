"""The similarity explorer in Chromium, served by Voila and run in JupyterLab. Skipped where there is no
Chromium."""
import pytest
from conftest import DASHBOARDS, another_picture, drawn, jupyterlab, open_view, press, voila, written
from explorers import DAENR

from visionbench.systems.daenr.config import DaenrConfig
from visionbench.systems.daenr.explorer import VIEWS, SimilarityExplorer
from visionbench.systems.daenr.fit import fit

pytestmark = [pytest.mark.browser, pytest.mark.slow]
GD = "document.querySelector('.js-plotly-plot')"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The first of two seeds in one folder."""
    dry = DaenrConfig.start("quick", **DAENR, out=str(tmp_path_factory.mktemp("runs")))
    return [fit(dry.replace(seed=seed)) for seed in (0, 1)][0]


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
    written(page, "Principal axes").wait_for()
    assert page.locator(".js-plotly-plot").count() == 1
    wide = "[...document.querySelectorAll('.widget-image')].filter(i => i.naturalWidth > 200)"
    page.wait_for_function(f"{wide}.length === 3")
    with another_picture(page):
        press(page, "image", "ArrowRight")
        page.get_by_text("Image 1, a repeated test image").wait_for()
    titles = dict(zip(VIEWS, ("Principal axes", "Feature weights", "Drawing and predicting", "Bias at",
                              "Gain of joint training")))
    for view in (*VIEWS[1:], VIEWS[0], "Similarity"):  # there and back again on the one figure
        open_view(page, view, titles[view])
        pictures = 16 if view == "Similarity" else 0
        page.wait_for_function(drawn(f"gd => (gd.layout.images || []).length === {pictures}"))
        assert page.locator(".trouble").count() == 0
    page.mouse.move(*place(page, "", 9, 4))  # the first matrix
    page.get_by_text("Stimuli 4 and 9.").wait_for()
    page.wait_for_function(frames(4, 9))
    page.mouse.move(*place(page, "2", 3, 12))  # the second
    page.get_by_text("Stimuli 12 and 3.").wait_for()
    page.wait_for_function(frames(12, 3))
    find = f"const t = {GD}.data.find(t => t.meta === 'stimuli')"
    spot = page.evaluate(f"() => {{ {find}; return [t.x[7], t.y[7]]; }}")
    with another_picture(page):
        page.mouse.move(*place(page, "3", *spot))  # the plane, where another stimulus may lie on top
        page.get_by_text("Point at another cell for a pair.").wait_for()
    page.locator(".estimator button", has_text="biased").last.click()
    written(page, "Biased CKA, 16 stimuli").wait_for()
    expected.comparison.estimator.value = "biased"
    z = next(t for t in expected.draw("Similarity")["board"]["data"] if t.get("meta") == "cka")["z"]
    heat = "gd.data.find(t => t.meta === 'cka').z[2][3]"
    page.wait_for_function(drawn(f"gd => Math.abs({heat} - {z[2][3]}) < 1e-6"))
    page.mouse.click(*place(page, "4", 0, 1))  # layer h1 of A, pixels of B
    written(page, "B pixels").wait_for()
    page.locator(".run-b select").select_option(index=1)
    page.get_by_text("-s1, AE").wait_for()
    page.locator(".net-b select").select_option("the recorded neurons")
    written(page, "choose those").wait_for()  # not what they saw
    page.locator(".stimuli select").select_option(index=2)
    written(page, "B neurons").first.wait_for()


def test_voila_serves_the_dashboard(page, finished, tmp_path):
    page.set_viewport_size({"width": 1400, "height": 1500})
    with voila("similarity", tmp_path, page, finished):
        check_dashboard(page, finished)


def test_jupyterlab_runs_the_dashboard(page, finished, tmp_path):
    page.set_viewport_size({"width": 1700, "height": 1700})
    with jupyterlab(DASHBOARDS / "similarity.ipynb", tmp_path, page, finished):
        check_dashboard(page, finished)
