"""The similarity explorer without a browser: what a control's value does, what linked hover moves, what is
said when a run lacks something."""
import shutil
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from explorers import (BACKDOOR, DAENR, change_settings, check_drawing, classes, follow, notes,
                       open_dashboard, seconds)

from visionbench.runs.record import Run, RunError
from visionbench.similarity.cka import cka
from visionbench.similarity.rdm import rdm
from visionbench.systems.backdoor.config import BackdoorConfig
from visionbench.systems.backdoor.fit import fit as fit_backdoor
from visionbench.systems.daenr.bench import Layers
from visionbench.systems.daenr.config import DaenrConfig
from visionbench.systems.daenr.explorer import VIEWS, SimilarityExplorer
from visionbench.systems.daenr.fit import fit
from visionbench.systems.daenr.nets import load_recording, networks
from visionbench.view.panels import figure

OURS = ("Stimulus", "Neurons", "Trade-off", "Taps")  # views that need a run of daenr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two dry seeds of daenr with two taps and two weights, and a dry run of another system."""
    out = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        fit(DaenrConfig.start("quick", **DAENR, taps=(2, 3), seed=seed, out=str(out)))
    fit_backdoor(BackdoorConfig.start("quick", **BACKDOOR, out=str(out)))
    return out


@pytest.fixture
def run(folder):
    return Run.open(next((folder / "daenr").glob("*-s0")))


@pytest.fixture(scope="module")
def computed():
    """Networks and layers that explorers of the same runs share."""
    return {}


@pytest.fixture
def explorer(run, computed):
    made = SimilarityExplorer(run)
    made.bench.kept = computed
    return made


def said(shown):
    """Everything that is written on a view."""
    return shown.get("text", "") + notes(shown)


def other_system(explorer):
    return next(name for name in explorer.bench.runs if name.startswith("backdoor/"))


def both_seeds(run):
    """The run and its neighbour."""
    return [Run.open(run.path.parent / run.path.name.replace("-s0", f"-s{seed}")) for seed in (0, 1)]


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_is_a_figure_of_plain_data(explorer, view):
    shown = explorer.draw(view)
    check_drawing(shown)
    assert shown["board"]["data"]


def test_scores_of_pictures_are_what_the_run_recorded(explorer, run):
    shown = explorer.draw("Stimulus")
    gain = [t["y"] for t in shown["board"]["data"] if len(t["x"]) == 40][0]  # 16 test images, 24 unseen
    rows = run.metrics.query("stage == 'evaluate' and name == 'psnr'")
    main = rows.query("variant == 'dae_nr' and tap == 2 and weight == 1").value.item()
    assert np.mean(gain[16:]) == pytest.approx(main - rows.query("variant == 'ae'").value.item(), abs=1e-3)
    before = shown["images"]
    explorer.image.value = 20
    moved = explorer.draw("Stimulus")
    assert "unseen patch" in moved["text"] and moved["images"] != before
    explorer.axis.value = 5
    other = explorer.draw("Stimulus")["images"]
    assert other[0] == moved["images"][0] and other[1:] != moved["images"][1:] and explorer.axis.max == 16


def test_the_neuron_table_is_sorted_by_what_was_chosen(explorer, run):
    rows = run.metrics.query("variant == 'nr' and tap == 2 and name == 'reliability'").dropna(subset="neuron")
    best = int(rows.sort_values("value", ascending=False).neuron.iloc[0])
    explorer.draw("Neurons")
    explorer.reader.value, explorer.number.value = "nr-tap2", "reliability"
    assert f"<td>1</td><td>{best}</td>" in explorer.draw("Neurons")["text"]
    shown = explorer.draw("Neurons")
    scatter = [t for t in shown["board"]["data"] if "error_x" in t][0]
    trials = load_recording(explorer.kept.config).test_trials[:, :, best]
    assert np.allclose(scatter["x"], trials.mean(0))
    assert np.allclose(scatter["error_x"]["array"], trials.std(0) / 2, atol=1e-6)  # four trials
    explorer.rank.value = explorer.rank.max
    assert explorer.rank.max == 10 and explorer.draw("Neurons")["images"] != shown["images"]


def test_trade_off_and_taps_join_the_seeds_of_a_folder(explorer, run):
    board = explorer.draw("Trade-off")["board"]
    which = "variant == 'dae_nr' and tap == 2 and weight == 0.1 and name == 'psnr'"
    values = [r.metrics.query(which).value.item() for r in both_seeds(run)]
    large = [t for t in board["data"] if t.get("name") == "λ = 0.1"][0]
    assert large["x"] == [pytest.approx(np.mean(values))]
    explorer.weight.value = .1
    data = explorer.draw("Trade-off")["board"]["data"]
    ring = {t["name"]: t["marker"]["line"]["width"] for t in data if "line" in t["marker"]}
    assert ring["λ = 0.1"] == 3 and ring["λ = 1"] == 0
    explorer.weight.value = 1.
    shown = explorer.draw("Taps")
    assert "0, 1" in shown["text"] and shown["board"]["layout"]["xaxis"]["tickvals"] == [2, 3]
    gain = [t for t in shown["board"]["data"] if t.get("name") == "DAE-NR − AE" and t["yaxis"] == "y4"][0]
    assert len(gain["y"]) == 2 and all(v > 0 for v in gain["error_y"]["array"])  # two taps, two seeds


def test_layers_of_two_runs_are_compared_as_the_kit_does(explorer, run):
    view = explorer.comparison
    view.b.run.value = view.b.run.options[2][1]
    explorer.draw("Similarity")
    view.b.net.value = "nr-tap2"
    board = explorer.draw("Similarity")["board"]
    drawn = next(t for t in board["data"] if t.get("meta") == "cka")["z"]
    images = load_recording(explorer.kept.config).test_images
    h = [networks(r)[n].layers(images, "h2")["h2"].flatten(1).detach()
         for r, n in zip(both_seeds(run), ("dae_nr-tap2-w1", "nr-tap2"))]
    names = [[label for label, _ in s.layer.options] for s in (view.a, view.b)]
    assert drawn[names[0].index("h2")][names[1].index("h2")] == pytest.approx(cka(*h).item(), abs=1e-5)
    distance = [t["z"] for t in board["data"] if t.get("meta") == "rdm"]
    for z, x in zip(distance, h):
        assert torch.allclose(torch.tensor(z)[0, 1:], rdm(x, "correlation")[:15].float(), atol=1e-4)
    view.estimator.value = "biased"
    with pytest.warns(UserWarning, match="biased CKA"):
        want = cka(*h, debiased=False).item()
    drawn = next(t for t in explorer.draw("Similarity")["board"]["data"] if t.get("meta") == "cka")["z"]
    assert drawn[names[0].index("h2")][names[1].index("h2")] == pytest.approx(want, abs=1e-5)


def test_networks_of_other_systems(explorer):
    """A residual network on 16×16 digits beside an auto-encoder on 31×31 patches."""
    view = explorer.comparison
    explorer.draw("Similarity")
    view.b.run.value = other_system(explorer)
    shown = explorer.draw("Similarity")
    assert "B sees the 1×31×31 stimuli as 1×16×16" in shown["text"]
    assert "SIMULATED BACKDOOR" in shown["text"] and view.b.net.value == "clean"
    assert [label for label, _ in view.b.layer.options][:2] == ["pixels", "stem"]
    view.stimuli.index = len(view.stimuli.options) - 1  # the other run's images
    shown = explorer.draw("Similarity")
    assert "No neurons saw these images" in said(shown)
    assert "A sees the 1×16×16 stimuli as 1×31×31" in shown["text"]
    assert view.n.options[-1][1] == 256


def test_neurons_stand_in_for_a_network(explorer):
    view = explorer.comparison
    explorer.draw("Similarity")
    view.b.net.value = "neurons"
    shown = explorer.draw("Similarity")
    assert [len(t["z"][0]) for t in shown["board"]["data"] if t.get("meta") == "cka"] == [1]
    view.a.run.value = other_system(explorer)
    explorer.draw("Similarity")
    view.stimuli.index = 0  # images that no neuron saw
    assert "choose those" in said(explorer.draw("Similarity"))
    view.stimuli.index = 1
    assert "A to neurons" in said(explorer.draw("Similarity"))  # the other system beside a recording


def test_layers_by_name_and_pattern(explorer):
    view = explorer.comparison
    view.a.only.value = "encoder.stages.h[12]"
    explorer.draw("Similarity")
    assert [label for label, _ in view.a.layer.options] == ["pixels", "h1", "h2"]
    view.a.only.value = "encoder.stages.h9"
    assert "Did you mean 'encoder.stages.h" in said(explorer.draw("Similarity"))
    view.a.only.value = ""
    assert "Did you mean" not in said(explorer.draw("Similarity"))


@pytest.mark.parametrize("measure", ["cka", "biased", "rsa", "whitened", "predictivity"])
def test_each_measure_has_its_band_where_it_has_a_ceiling(explorer, measure):
    view = explorer.comparison
    view.measure.value = measure
    board = explorer.draw("Similarity")["board"]
    band = [t for t in board["data"] if t.get("fill") == "toself"]
    assert len(band) == (measure != "biased") and all(0 <= v <= 1 for t in band for v in t["y"])
    view.stimuli.index = 1  # true rates: no noise
    board = explorer.draw("Similarity")["board"]
    assert not [t for t in board["data"] if t.get("fill") == "toself"]
    assert ("not defined here" in said(explorer.draw("Similarity"))) == (measure == "whitened")


def test_linked_hover_and_click_on_the_page(explorer):
    box, canvas = follow(explorer, VIEWS)
    explorer.page.view.value = "Similarity"
    picture = explorer.page.images.children[0]
    first, old = [t for t in canvas.data if t.meta == "rdm"], picture.value
    first[1]._dispatch_on_hover(SimpleNamespace(xs=[9], ys=[4], point_inds=[[4, 9]]), None)
    frames = [list(t.x[:2]) for t in canvas.data if t.meta == "pair"]
    assert frames == [[8.5, 9.5], [3.5, 4.5]] * 2  # in both matrices
    assert "Stimuli 4 and 9" in explorer.page.text.value and picture.value != old
    spots = next(t for t in canvas.data if t.meta == "stimuli")
    spots._dispatch_on_hover(SimpleNamespace(xs=[spots.x[7]], ys=[spots.y[7]], point_inds=[7]), None)
    ring = next(t for t in canvas.data if t.meta == "ring")
    assert tuple(ring.x) == (spots.x[7],) and "Stimulus 7" in explorer.page.text.value
    heat = next(t for t in canvas.data if t.meta == "cka")
    heat._dispatch_on_click(SimpleNamespace(xs=[0], ys=[1], point_inds=[[1, 0]]), None)
    assert explorer.comparison.b.layer.value == "pixels" and "B pixels" in str(canvas.layout.annotations)
    assert classes(box) >= {"view", "run-a", "net-b", "stimuli", "n", "estimator", "layer-a", "only-b",
                            "measure"}


def test_another_run_brings_its_networks_without_drawing_twice(explorer, monkeypatch):
    explorer.show()
    explorer.page.view.value = "Similarity"
    drawn, draw = [], explorer.comparison.draw
    monkeypatch.setattr(explorer.comparison, "draw", lambda: (drawn.append(1), draw())[1])
    explorer.comparison.b.run.value = other_system(explorer)  # network, layer and stimuli change after it
    assert len(drawn) == 1 and explorer.comparison.b.net.value == "clean"


def test_a_folder_without_our_runs(folder, tmp_path):
    shutil.copytree(folder / "backdoor", tmp_path / "backdoor")
    explorer = SimilarityExplorer(tmp_path)
    for view in OURS:
        assert "visionbench run daenr" in said(explorer.draw(view))
    shown = explorer.draw("Similarity")
    assert "No neurons saw" in said(shown) and explorer.comparison.b.net.value == "clean"
    explorer.show()
    explorer.page.view.value = "Similarity"
    assert explorer.page.canvas.figure.data
    with pytest.raises(RunError, match="no finished run"):
        SimilarityExplorer(tmp_path / "backdoor" / "nowhere")


def test_what_a_run_lacks_is_said_and_leaves_other_views_alone(copy):
    shutil.rmtree(copy.path / "checkpoints" / "ae")
    explorer = SimilarityExplorer(copy)
    for view in ("Stimulus", "Neurons", "Similarity"):
        assert "no usable checkpoint of ae" in said(explorer.draw(view))
    assert explorer.draw("Trade-off")["board"]["data"]
    assert "An interval needs more" in explorer.draw("Taps")["text"]
    change_settings(copy, copy.settings | {"wings": 2})
    assert "does not know: wings" in said(SimilarityExplorer(copy).draw("Trade-off"))


@pytest.mark.parametrize(("variants", "view", "words"), [
    (["nr"], "Stimulus", "neural predictors only"), (["nr"], "Trade-off", "No joint network"),
    (["ae"], "Trade-off", "No joint network")])
def test_runs_of_few_variants(copy, variants, view, words):
    change_settings(copy, copy.settings | {"variants": variants})
    rows = copy.metrics
    few = rows[rows.variant.isin([*variants, "pca", "random"]).fillna(False)]
    few.to_parquet(copy.path / "metrics.parquet")
    explorer = SimilarityExplorer(copy)
    assert words in said(explorer.draw(view))
    for other in VIEWS:
        figure(explorer.draw(other)["board"])
    assert explorer.draw("Similarity")["board"]["data"]


def test_a_run_without_rows_about_neurons(copy):
    rows = copy.metrics
    rows[rows.neuron.isna()].to_parquet(copy.path / "metrics.parquet")
    assert "no numbers about single neurons" in said(SimilarityExplorer(copy).draw("Neurons"))


def test_a_layer_that_leaves_one_stimulus_blank(folder):
    """All features equal: no correlation distance, no RSA, but everything else."""
    explorer = SimilarityExplorer(folder)
    view = explorer.comparison
    explorer.draw("Similarity")
    name, key = view.a.run.value, view.stimuli.value
    stimuli = explorer.bench.stimuli(key[0])[key[1]]
    stimuli.images[3] = .5
    explorer = SimilarityExplorer(folder)
    explorer.bench.kept["stimuli", name] = [stimuli]
    explorer.draw("Similarity")
    explorer.comparison.a.layer.value = "pixels"
    shown = explorer.draw("Similarity")
    assert "correlation distance is not defined" in said(shown)
    assert "RSA, Spearman is left out" in shown["text"]
    explorer.comparison.metric.value = "euclidean"
    assert "not defined" not in notes(explorer.draw("Similarity"))


def test_nothing_is_computed_twice(folder):
    bench = Layers(folder)
    name = bench.ours[0]
    assert bench.grams(name, "ae", (name, 0)) is bench.grams(name, "ae", (name, 0))
    assert bench.sweep(name) is bench.sweep(bench.ours[1])  # two seeds of the same settings


def test_a_move_takes_less_than_a_tenth_of_a_second(explorer, capsys):
    explorer.show()
    view = explorer.comparison
    moves = {}
    choices = ([explorer.second], [explorer.reader, explorer.number], [explorer.weight, explorer.score],
               [view.n, view.estimator, view.metric, view.a.layer, view.measure], [explorer.similar])
    sliders = ("Stimulus", explorer.image), ("Stimulus", explorer.axis), ("Neurons", explorer.rank)
    for title, control in (*((t, c) for t, those in zip(VIEWS, choices) for c in those), *sliders):
        explorer.page.view.value = title  # brings the options
        chosen = hasattr(control, "options")
        values = range(min(len(control.options), 6)) if chosen else range(1, 9)
        for _ in range(2):  # the first round computes
            took = seconds(partial(setattr, control, "index" if chosen else "value"), values,
                           time.process_time)
        moves[title, control._dom_classes[-1]] = took
    explorer.page.view.value = "Similarity"
    matrix = next(t for t in explorer.page.canvas.figure.data if t.meta == "rdm")
    moves["Similarity", "hover"] = seconds(lambda i: matrix._dispatch_on_hover(
        SimpleNamespace(xs=[i], ys=[i + 2], point_inds=[[i + 2, i]]), None), range(8), time.process_time)
    with capsys.disabled():
        told = {" ".join(k): round(v, 4) for k, v in moves.items()}
        print("\nprocessor seconds a move, page included:", told)
    assert max(moves.values()) < .1, moves


def test_the_dashboard_notebook(run, monkeypatch):
    bench = open_dashboard("similarity", run, monkeypatch).bench
    assert bench.runs[bench.start].path == run.path and len(bench.runs) == 3
