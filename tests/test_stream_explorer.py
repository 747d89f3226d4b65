"""The stream explorer without a browser: what controls do, how fast, and what a run may lack."""
import math
import shutil
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from explorers import PLWF, change_settings, check_drawing, follow, notes, open_dashboard, seconds

from visionbench.metrics.continual import forgetting, learning_accuracy
from visionbench.runs.record import Run, RunError
from visionbench.similarity.cka import cka
from visionbench.systems.plwf.cached import CachedRun
from visionbench.systems.plwf.config import PlwfConfig
from visionbench.systems.plwf.explorer import VIEWS, StreamExplorer
from visionbench.systems.plwf.fit import fit
from visionbench.systems.plwf.ledger import ledger
from visionbench.systems.plwf.space import confusion, knowledge
from visionbench.systems.plwf.teachers import KnowledgeSpace
from visionbench.systems.plwf.tug import arrows
from visionbench.view.panels import figure

CREDIT, LWF, FINE, JOINT = (f"digits-seen-{m}" for m in ("plwf+credit-2", "lwf-2", "fine-tune", "joint"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Seconds of training on the 8×8 digits: two λ, two replicas."""
    return fit(PlwfConfig.start("quick", **PLWF, out=str(tmp_path_factory.mktemp("runs"))))


@pytest.fixture
def explorer(run):
    return StreamExplorer(run)


def rewrite(run, rows):
    """Other metrics for a copy."""
    rows.to_parquet(run.path / "metrics.parquet")
    return StreamExplorer(Run.open(run.path))


def member_rows(run, name):
    """Rows of one name of the member that most tests look at."""
    rows = run.metrics
    return rows[(rows["name"] == name) & (rows.method == "plwf+credit") & (rows.lam == 2)]


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_is_a_figure_of_plain_data(explorer, view):
    shown = explorer.draw(view)
    check_drawing(shown)
    assert shown["board"]["data"]


def test_every_member_in_every_view(explorer):
    """Joint training has one stage, fine-tuning no teachers, LwF no telemetry: drawn or noted."""
    for name in explorer.cached.members:
        explorer.member.value = explorer.beside.value = explorer.lines[0].value = name
        for view in VIEWS:
            shown = explorer.draw(view)
            figure(shown["board"])
            assert shown["board"]["data"] or notes(shown), (name, view)
    explorer.member.value = JOINT
    assert "no teachers for task 5" in notes(explorer.draw("Knowledge space"))
    assert "no credit assignment" in notes(explorer.draw("Conflict"))


def test_the_matrix_is_what_the_run_recorded(explorer, run):
    rows = member_rows(run, "accuracy").query("kind == 'class'")
    table = rows.pivot_table(index=["replica", "task_after"], columns="task_of", values="value")
    explorer.kind.value = "class"
    for value, want in ((-1, table.groupby("task_after").mean()), (0, table.loc[0]), (1, table.loc[1])):
        explorer.replica.value = value
        z = np.array(explorer.draw("Accuracy")["board"]["data"][0]["z"], float)[::-1] / 100
        np.testing.assert_allclose(z, want.to_numpy(float), atol=1e-12)


def test_numbers_and_bands_by_hand(explorer):
    A = explorer.cached.matrix(CREDIT)
    text = explorer.draw("Accuracy")["text"]
    acc = 100 * A[:, -1].mean(1)
    assert f"{acc.mean():.1f} ± {acc.std(ddof=1):.1f}" in text
    assert f"{100 * forgetting(A).mean():.1f} ±" in text
    explorer.lines[0].value, explorer.task.value = CREDIT, 3
    band, line = explorer.draw("Tasks over stages")["board"]["data"][:2]
    mean, sd = A[:, 2:, 2].mean(0), A[:, 2:, 2].std(0, ddof=1)
    assert line["x"] == [3, 4, 5] and np.allclose(line["y"], mean)
    assert np.allclose(band["y"], [*(mean - sd), *(mean + sd)[::-1]])


def test_the_sweep_is_plasticity_against_forgetting(explorer):
    shown = next(t for t in explorer.draw("λ")["board"]["data"] if t.get("name") == "PLwF + credit")
    members = [explorer.cached.matrix(f"digits-seen-plwf+credit-{lam}") for lam in ("0.5", "2")]
    assert shown["text"] == ["0.5", "2"]
    assert np.allclose(shown["x"], [learning_accuracy(A).mean() for A in members])
    assert np.allclose(shown["y"], [forgetting(A).mean() for A in members])
    explorer.ce.value = "local"
    assert {t.get("name") for t in explorer.draw("λ")["board"]["data"]} == {"LwF"}


@pytest.mark.parametrize("cosine, new, old", [(-.7, 1., 2.), (-1., 3., 1.), (.3, 1., 1.), (0., 1., 1.),
                                              (1., 1., 0.)])
def test_arrows_are_the_projection(cosine, new, old):
    a = min(0., cosine * new * old) / old**2 if old else 0.
    found = {k: np.array(v) for k, v in arrows(cosine, new, old, a).items()}
    g_n, g_o, kept, update = (found[k] for k in ("g_n, new", "g_o, old", "g_n projected", "update"))
    assert math.isclose(np.linalg.norm(g_n), new, abs_tol=1e-12)
    assert np.allclose(update, g_n + (1 + abs(a)) * g_o)
    assert kept @ g_o >= -1e-12 and (cosine >= 0 or abs(kept @ g_o) < 1e-12)


def test_the_step_slider_marks_its_step(explorer, run):
    rows = member_rows(run, "cosine").query("replica == 0").reset_index()
    assert explorer.step.max == len(rows) - 1
    for at in (0, 5, len(rows) - 1):
        explorer.step.value = at
        marks = [t for t in explorer.draw("Conflict")["board"]["data"] if t["type"] == "scatter"
                 and t["mode"] == "markers"]
        assert marks[0]["x"] == [at] and marks[0]["y"] == [rows.value[at]]
    shown = next(t for t in explorer.draw("Conflict")["board"]["data"] if t["type"] == "bar")
    share = member_rows(run, "conflict_share").groupby("task").value.mean()
    assert np.allclose(shown["y"], share)


@pytest.mark.parametrize("teachers", ["all", "last", "first_last", "own"])
@pytest.mark.parametrize("temperature", [.5, 2.])
def test_the_target_is_the_one_that_was_trained_on(explorer, teachers, temperature):
    c = explorer.cached
    images = c.stream("digits").test.image
    for t in (1, 3, 4):
        real = KnowledgeSpace(c.snapshots(CREDIT)[:t], c.stream("digits").bounds, temperature,
                              teachers=teachers).prepare(images)
        shown = knowledge(c, CREDIT, t, temperature, teachers)
        assert torch.allclose(shown.P[:, :real.P.shape[1]], real.P, atol=1e-5)
        assert not shown.P[:, real.P.shape[1]:].any()


def test_kl_by_hand(explorer):
    c = explorer.cached
    z, space = c.logits(CREDIT), knowledge(c, CREDIT, 2, 2.)
    p, q = (z[1] / 2).softmax(1).double(), (z[2][:, :4] / 2).softmax(1).double()
    assert torch.allclose(space.kl[1].double(), (p * (p / q).log()).sum(1), atol=1e-5)


def test_confusion_by_hand_and_against_the_run(explorer):
    logits, label = torch.eye(4)[[0, 1, 1, 3, 2]], torch.tensor([0, 0, 1, 3, 3])
    assert confusion(logits, label).tolist() == [[.5, .5, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, .5, .5]]
    for stage in (1, 3, 5):
        explorer.stage.value = stage
        right = next(t["y"] for t in explorer.draw("Confusion")["board"]["data"]
                     if t.get("name") == "class is right")
        assert np.allclose(right, explorer.cached.matrix(CREDIT, "class")[0, stage - 1, :stage])


def test_costs_by_hand(explorer):
    book = ledger(explorer.cached, CREDIT)  # 240 images a task, one epoch, two classes a task
    assert book.forwards.tolist() == book.naive_forwards.tolist() == [0, 240, 480, 720, 960]
    assert book.cache_bytes.tolist() == [0, *[960 * (2 * k + 1) for k in (1, 2, 3, 4)]]
    assert book.apart_bytes.tolist() == [k * b for k, b in enumerate(book.cache_bytes)]
    assert ledger(explorer.cached, LWF).teachers.tolist() == [0, 1, 1, 1, 1]


def test_drift_is_cka_of_snapshots(explorer):
    c = explorer.cached
    task = c.stream("digits").tasks[1].test
    before, after = (c.snapshots(FINE)[t](task.image).detach() for t in (1, 4))
    explorer.lines[0].value, explorer.task.value = FINE, 2
    shown = [t for t in explorer.draw("Drift")["board"]["data"] if str(t.get("name")).startswith("layer")]
    assert len(task) <= 200 and shown[-1]["y"][0] == pytest.approx(1) and shown[-1]["x"] == [2, 3, 4, 5]
    assert shown[-1]["y"][-1] == pytest.approx(float(cka(before, after)), abs=1e-6)


def test_another_stream_brings_its_own_members_and_images(tmp_path):
    two = dict(streams=("digits", "glyphs"), increments=(5, 25), methods=("lwf", "plwf+credit"),
               local_methods=(), replicas=1, lams=(2.,))
    explorer = StreamExplorer(fit(PlwfConfig.start("quick", **PLWF | two, out=str(tmp_path))))
    explorer.show()
    assert [v for _, v in explorer.member.options] == ["digits-seen-lwf-2", "digits-seen-plwf+credit-2"]
    assert explorer.image.max == 539
    explorer.stream.value = "glyphs"
    assert all(v.startswith("glyphs") for _, v in explorer.member.options)
    assert explorer.image.max == 50 * 40 - 1 and explorer.stage.max == 2
    for view in VIEWS:
        explorer.page.view.value = view
        assert explorer.page.canvas.figure.data and not explorer.page.text.value.count("trouble"), view


def test_a_page_has_one_interactive_figure_and_follows_its_controls(explorer):
    _, canvas = follow(explorer, VIEWS)
    explorer.page.view.value = "Accuracy"
    explorer.member.value = FINE
    assert canvas.data[0].z[0][0] == 100 * explorer.cached.matrix(FINE)[:, -1, 0].mean()


def test_networks_that_are_gone_leave_the_other_views_alone(copy):
    shutil.rmtree(copy.path / "checkpoints" / CREDIT)
    explorer = StreamExplorer(copy)
    explorer.member.value = CREDIT
    for view in ("Knowledge space", "Confusion"):
        assert "files of its networks are missing" in notes(explorer.draw(view))
    for view in ("Accuracy", "Tasks over stages", "λ", "Conflict", "Cost"):
        assert explorer.draw(view)["board"]["data"], view
    assert any(str(t.get("name")).startswith("LwF") for t in explorer.draw("Drift")["board"]["data"])


def test_a_damaged_network_is_a_note(copy):
    path = copy.path / "checkpoints" / CREDIT / "task-001.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    explorer = StreamExplorer(copy)
    explorer.show()
    explorer.page.view.value = "Confusion"
    assert "task-001" in notes(explorer.draw("Confusion")) and not explorer.draw("Confusion")["board"]["data"]
    explorer.page.view.value = "Accuracy"
    assert explorer.page.canvas.figure.data


def test_a_run_without_telemetry_or_costs_says_so(copy):
    rows = copy.metrics
    explorer = rewrite(copy, rows[rows.stage == "evaluate"])
    assert "No member of this run has" in notes(explorer.draw("Conflict"))
    assert "were not noted" in notes(explorer.draw("Cost"))
    explorer = rewrite(copy, rows[rows["name"] != "layer_cosine"])
    assert "single layers" in notes(explorer.draw("Conflict")) and explorer.draw("Conflict")["board"]["data"]


def test_half_a_run_is_drawn(copy):
    rows = copy.metrics
    kept = rows[~((rows.replica == 1) & (rows.method == "plwf+credit")) & (rows.method != "joint")]
    explorer = rewrite(copy, kept)
    assert JOINT not in explorer.cached.members and explorer.cached.matrix(CREDIT).shape[0] == 1
    for view in VIEWS:
        assert explorer.draw(view)["board"]["data"], view
    unpaired = rewrite(copy, rows[(rows.replica == 0) | (rows.method != "lwf")])
    unpaired.beside.value = LWF
    assert "–" in unpaired.draw("Accuracy")["text"]


def test_what_cannot_be_opened(copy, tmp_path):
    with pytest.raises(RunError, match="no run folder"):
        StreamExplorer(tmp_path)
    settings = copy.settings
    for change, message in ((dict(wings=2), "does not know: wings"),
                            (dict(system="backdoor"), "run of 'backdoor'")):
        change_settings(copy, settings | change)
        with pytest.raises(RunError, match=message):
            StreamExplorer(copy)
    change_settings(copy, settings)
    rows = pd.DataFrame([dict(stage="cost", name="train", value=1.)])
    rows.to_parquet(copy.path / "metrics.parquet")
    with pytest.raises(RunError, match="holds no accuracies yet"):
        StreamExplorer(copy)


def test_a_move_takes_less_than_a_tenth_of_a_second(explorer, capsys):
    explorer.show()
    moves = {}
    for view, control in (("Tasks over stages", explorer.task), ("Conflict", explorer.step),
                          ("Knowledge space", explorer.image), ("Knowledge space", explorer.stage),
                          ("Confusion", explorer.stage), ("Drift", explorer.task)):
        explorer.page.view.value = view
        values = range(control.min, min(control.max, control.min + 12) + 1)
        move = partial(setattr, control, "value")
        if view == "Drift":
            seconds(move, values)  # the first look computes
        moves[view, control._dom_classes[-1]] = seconds(move, values)
    with capsys.disabled():
        print("\nseconds a move, page included:", {" ".join(k): round(v, 4) for k, v in moves.items()})
    assert max(moves.values()) < .1, moves


def test_the_dashboard_notebook(run, monkeypatch):
    assert open_dashboard("plwf", run, monkeypatch).cached.run.path == run.path


def test_a_run_is_read_once(run):
    cached = CachedRun(run)
    assert cached.logits(CREDIT) is cached.logits(CREDIT)
    assert cached.matrix(FINE, "class") is cached.matrix(FINE, "class")
