"""What the tests of all explorers share: settings of small runs, what a page shows, and how fast it follows
its controls."""
import json
import time

import nbformat
import plotly.graph_objects as go
from conftest import DASHBOARDS

from visionbench.view.panels import figure

# dry runs: an explorer needs a folder, not good numbers
BACKDOOR = dict(depth=8, width=4, limit_batches=2, pretrain_epochs=1, attacker_epochs=1, inject_epochs=1,
                victim_epochs=1, device="cpu")
DAENR = dict(images=48, neurons=10, test_images=16, repeats=4, unseen=24, epochs=2, limit_batches=2,
             latent=16, device="cpu")
PLWF = dict(streams=("digits",), networks=("mlp",), hidden=16, epochs=(1,), replicas=2, lams=(.5, 2.),
            methods=("fine-tune", "lwf", "plwf+credit", "joint"), local_methods=("lwf",), device="cpu")


def check_drawing(shown):
    """A view is a figure of plain data, every setting of which plotly knows, with pictures as PNG."""
    assert isinstance(figure(shown["board"]), go.Figure)
    assert json.loads(json.dumps(shown["board"])) == shown["board"]
    assert all(picture.startswith(b"\x89PNG") for picture in shown.get("images", []))


def notes(shown):
    """Everything written on a figure."""
    return " ".join(a["text"] for a in shown["board"]["layout"]["annotations"]).replace("<br>", " ")


def widgets(box):
    """A widget and all below it."""
    yield box
    for child in getattr(box, "children", ()):
        yield from widgets(child)


def follow(explorer, views):
    """Go through the views of a page, there and back again; the page and its one interactive figure."""
    box = explorer.show()
    (canvas,) = [w for w in widgets(box) if isinstance(w, go.FigureWidget)]
    for view in (*views, *views[::-1]):
        explorer.page.view.value = view
        shown = explorer.draw(view)["board"]
        assert len(canvas.data) == len(shown["data"]), view
        assert canvas.layout.height == shown["layout"]["height"], view
        assert len(canvas.layout.images) == len(shown["layout"].get("images", [])), view
    return box, canvas


def classes(box):
    """The names by which controls are found on a page."""
    return {name for w in widgets(box) for name in w._dom_classes}


def change_settings(run, settings):
    """Other settings for a copy of a run."""
    (run.path / "settings.json").write_text(json.dumps(settings))


def seconds(move, values, clock=time.perf_counter):
    """Median time of `move(value)`; with the page shown, from a control's value to new figure data."""
    took = []
    for value in values:
        began = clock()
        move(value)
        took.append(clock() - began)
    return sorted(took)[len(took) // 2]


def open_dashboard(name, run, monkeypatch):
    """Execute the three cells of a dashboard: imports, the run that the environment names, and the page."""
    nb = nbformat.read(DASHBOARDS / f"{name}.ipynb", 4)
    cells = [c for c in nb.cells if c.cell_type == "code"]
    assert len(cells) == 3 and not any(c.outputs for c in cells) and "widgets" not in nb.metadata
    assert all(f"{flag}: true" in nb.cells[0].source for flag in ("skip_exec", "skip_showdoc"))
    monkeypatch.setenv("VISIONBENCH_RUN", str(run.path))
    space = {}
    for cell in cells[:2]:
        exec(cell.source, space)
    assert len(eval(cells[2].source, space).children) == 6
    return space["explorer"]
