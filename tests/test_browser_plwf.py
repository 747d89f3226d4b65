"""The stream explorer as a reader sees it, in Voila and in JupyterLab. Skipped where there is no Chromium."""
import pytest
from conftest import DASHBOARDS, another_picture, drawn, jupyterlab, open_view, press, voila, written
from explorers import PLWF

from visionbench.systems.plwf.config import PlwfConfig
from visionbench.systems.plwf.explorer import VIEWS, StreamExplorer
from visionbench.systems.plwf.fit import fit

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return fit(PlwfConfig.start("quick", **PLWF, out=str(tmp_path_factory.mktemp("runs"))))


def check_dashboard(page, run):
    """Move controls with the keyboard and read from the figure what a reader would see."""
    expected = StreamExplorer(run)
    written(page, "PLwF + credit, λ = 2").first.wait_for()
    assert page.locator(".js-plotly-plot").count() == 1
    A = expected.cached.matrix("digits-seen-plwf+credit-2").mean(0)
    page.wait_for_function(drawn(f"gd => Math.abs(gd.data[0].z[0][0] - {100 * A[-1, 0]}) < 1e-9"))
    page.locator(".kind select").first.select_option("over all classes seen (C-IL)")
    C = expected.cached.matrix("digits-seen-plwf+credit-2", "class").mean(0)
    page.wait_for_function(drawn(f"gd => Math.abs(gd.data[0].z[0][0] - {100 * C[-1, 0]}) < 1e-9"))
    titles = dict(zip(VIEWS, ("PLwF + credit", "Mean of all tasks seen", "Forgetting against plasticity",
                              "Cosine of g_n and g_o", "Soft-max at τ", "Where answers go",
                              "Teacher forwards", "every task")))
    for view in (*VIEWS[1:], VIEWS[0]):  # there and back again on the one figure
        open_view(page, view, titles[view])
    page.get_by_role("button", name="Conflict", exact=True).click()
    for key in ("Home", "ArrowRight"):
        press(page, "step", key)
    cosine = float(expected.cached.conflicts("digits-seen-plwf+credit-2").value[1])
    mark = f"t.mode === 'markers' && t.x.length === 1 && t.x[0] === 1 && Math.abs(t.y[0] - {cosine}) < 1e-9"
    page.wait_for_function(drawn(f"gd => gd.data.some(t => {mark})"))
    page.get_by_role("button", name="Knowledge space", exact=True).click()
    page.wait_for_function("[...document.querySelectorAll('.widget-image')].some(i => i.naturalWidth > 50)")
    with another_picture(page):
        press(page, "image", "ArrowRight")
    written(page, "test image 1").first.wait_for()
    press(page, "stage", "ArrowLeft")  # a student of four tasks
    page.locator(".js-plotly-plot .ytick", has_text="student f4").first.wait_for()


def test_voila_serves_the_dashboard(page, finished, tmp_path):
    with voila("plwf", tmp_path, page, finished):
        check_dashboard(page, finished)
        assert page.get_by_text("re-implementation from the paper's abstract").count() == 1


def test_jupyterlab_runs_the_dashboard(page, finished, tmp_path):
    with jupyterlab(DASHBOARDS / "plwf.ipynb", tmp_path, page, finished):
        check_dashboard(page, finished)
