"""Dashboards without a browser: what a control's value does to the figure, how long that takes, and what
happens when a run lacks something."""
import shutil
import time
import warnings
from functools import partial

import pandas as pd
import pytest
import torch
from explorers import (BACKDOOR, change_settings, check_drawing, classes, follow, notes, open_dashboard,
                       seconds)

from visionbench.nn.sweeps import RULES, STEPS
from visionbench.runs.record import RunError
from visionbench.systems.backdoor.cached import CachedNet, cached_logits
from visionbench.systems.backdoor.cards import read_scan, write_scan
from visionbench.systems.backdoor.config import BackdoorConfig
from visionbench.systems.backdoor.evaluate import ExitLogits
from visionbench.systems.backdoor.explorer import VIEWS, BackdoorExplorer
from visionbench.systems.backdoor.fit import fit
from visionbench.systems.backdoor.flips import RecoveredPatch
from visionbench.systems.backdoor.nets import load_nets
from visionbench.systems.backdoor.verdict import ExitScanReport
from visionbench.view.panels import figure


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A dry run of a small network with three exits: one epoch of two batches a stage, judged on all 1,000
    test images."""
    return fit(BackdoorConfig.start("quick", **BACKDOOR, victims=2, out=str(tmp_path_factory.mktemp("runs"))))


@pytest.fixture
def explorer(run):
    return BackdoorExplorer(run)


def marks(board, axis):
    """Where a panel says that the control stands: one mark for each network."""
    return [(t["x"][0], t["y"][0]) for t in board["data"] if t.get("mode") == "markers" and len(t["x"]) == 1
            and t["yaxis"] == axis]


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_is_a_figure_of_plain_data(explorer, view):
    check_drawing(explorer.draw(view))


@pytest.mark.parametrize("rule", RULES)
def test_every_policy_at_both_ends_of_its_knob(explorer, rule):
    explorer.policy.value = rule
    for index in (0, len(explorer.values) - 1):
        explorer.knob.index = index
        for start in (0, explorer.start.max):
            explorer.start.value = start
            for view in ("Policies", "Exits", "One image"):
                figure(explorer.draw(view)["board"])
    assert marks(explorer.draw("Policies")["board"], "y2")[0][0] == explorer.values[-1]


def test_the_marks_are_what_the_run_recorded(explorer, run):
    rows = run.metrics.query("stage == 'evaluate' and policy == 'confidence' and victim == 1 "
                             "and net == 'simulated'").set_index(["name", "threshold", "min_exit"]).value
    explorer.net.value = ("simulated", 1)
    for T, start in ((.9, 0), (.35, 2), (.05, 3)):
        explorer.knob.value, explorer.start.value = T, start
        board = explorer.draw("Policies")["board"]
        for name, axis in (("accuracy", "y"), ("asr", "y2"), ("efficacy", "y3")):
            x, y = marks(board, axis)[0]
            assert x == T and y == pytest.approx(rows[name, T, start], abs=1e-9), (name, T, start)


def test_the_heat_map_is_the_recorded_grid(explorer, run):
    rows = run.metrics.query("stage == 'evaluate' and policy == 'confidence' and victim == 0 "
                             "and net == 'clean' and name == 'asr'")
    grid = rows.pivot_table(index="threshold", columns="min_exit", values="value")
    explorer.net.value = ("clean", 0)
    drawn = [t for t in explorer.draw("Exits")["board"]["data"] if t["type"] == "heatmap"][1]["z"]
    recorded = torch.tensor(grid.to_numpy(float), dtype=torch.float32)
    assert torch.allclose(torch.tensor(drawn[:19]), recorded, atol=1e-6)
    assert drawn[STEPS.index(.95)] == pytest.approx(grid.loc[.95].tolist())


def test_the_walker_shows_the_networks_of_the_run(explorer, run):
    at = explorer.image.value = 17
    explorer.net.value = ("simulated", 1)
    board = explorer.draw("One image")["board"]
    logits = cached_logits(run, "simulated", 1)
    label = int(logits.label[at])
    for axis, part in (("y", "clean"), ("y2", "triggered")):
        p = getattr(logits, part)[:, at].softmax(-1)[:, label]
        drawn = next(t["y"] for t in board["data"] if t["yaxis"] == axis
                     and t["name"].startswith("true class"))
        assert torch.allclose(torch.tensor(drawn), p, atol=1e-4)


def test_trigger_controls(explorer):
    def change():
        return sum(next(t["y"] for t in explorer.draw("One image")["board"]["data"]
                        if t.get("name") == "relative change of the features"))

    full = change()
    explorer.opacity.value = .2
    faint = change()
    explorer.trigger.value = False
    assert full > faint > change() == 0
    explorer.trigger.value, explorer.opacity.value = True, 1.
    explorer.row.value = explorer.column.value = explorer.row.max  # kept inside the image
    explorer.size.value = 15
    assert change() > 0


def test_a_page_has_one_interactive_figure_and_follows_its_controls(explorer):
    box, canvas = follow(explorer, VIEWS)
    explorer.page.view.value = "Policies"
    explorer.knob.value = .5
    assert canvas.layout.shapes[0].x0 == .5
    explorer.policy.value = "patience"
    assert canvas.layout.xaxis.title.text == explorer.knob.description == "repetitions P"
    assert tuple(canvas.data[0].x) == (1, 2, 3)
    assert {"view", "net", "policy", "knob", "min-exit"} <= classes(box)


def test_one_broken_view_leaves_the_others_alone(copy):
    shutil.rmtree(copy.path / "checkpoints" / "inject")
    explorer = BackdoorExplorer(copy)
    explorer.show()
    explorer.page.view.value = "One image"
    assert "no usable checkpoint of stage inject" in explorer.page.text.value
    assert not explorer.page.canvas.figure.data
    explorer.page.view.value = "Policies"
    assert "simulated" in explorer.page.text.value and explorer.page.canvas.figure.data


def test_what_cannot_be_opened(copy, tmp_path):
    with pytest.raises(RunError, match="no run folder"):
        BackdoorExplorer(tmp_path)
    settings = copy.settings
    change_settings(copy, settings | {"wings": 2})
    with pytest.raises(RunError, match="does not know: wings"):
        BackdoorExplorer(copy)
    change_settings(copy, settings | {"system": "mar"})
    with pytest.raises(RunError, match="run of 'mar'"):
        BackdoorExplorer(copy)
    change_settings(copy, settings)
    for path in copy.path.glob("logits-*"):
        path.unlink()
    with pytest.raises(RunError, match="holds no logits"):
        BackdoorExplorer(copy)


def test_weights_of_another_network_are_refused(copy):
    change_settings(copy, copy.settings | {"width": 8})
    with pytest.raises(RunError, match="do not fit the settings"):
        load_nets(copy)


def test_a_simulation_says_what_it_is(run):
    with pytest.warns(UserWarning, match="SIMULATED BACKDOOR"):
        nets = load_nets(run, 1)
    assert len(nets.warnings) == 1 and not nets.clean.training
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # on the page the banner says it
        explorer = BackdoorExplorer(run)
        explorer.draw("One image")
    assert "Threat simulation" in explorer.material.title and "not for use" in explorer.material.title


def scan_report():
    rows = [dict(exit=e, cls=c, method="refine", window=3, ef=.9 if (e, c) == (2, 9) else .1, vanilla=0.,
                 pattern="free")
            for e in (2, 3, 6) for c in range(10)]
    mask = torch.zeros(1, 16, 16)
    mask[:, 10:15, 10:15] = 1
    patches = [RecoveredPatch(torch.ones(1, 16, 16), mask, r["exit"], r["cls"], "refine", r["ef"])
               for r in rows]
    return ExitScanReport(pd.DataFrame(rows), patches,
                          dict(exits=[2, 3], blocks=6, classes=10, shape=(1, 16, 16), accuracy=.97))


def test_a_scan_kept_in_the_run_is_shown(copy):
    report = scan_report()
    write_scan(copy.path, report)
    shown = BackdoorExplorer(copy).draw("ExitScan")
    heat = shown["board"]["data"][0]
    # the mask is the trigger's square
    assert heat["z"][0][9] == .9 and report.verdict in shown["text"] and "exit 2: 1.00" in shown["text"]
    assert read_scan(copy.path).min_exit == report.min_exit == 3 and "start at exit 3" in shown["text"]
    direct = BackdoorExplorer(copy, scan=report).draw("ExitScan")
    assert direct["board"]["data"] == shown["board"]["data"]


def test_defences_of_the_run_are_shown(explorer, run):
    heat = explorer.draw("Defences")["board"]["data"][0]
    rows = run.metrics.query("stage == 'defence' and name == 'auroc' and net == 'simulated' "
                             "and defence == 'STRIP'").set_index("view").value
    recorded = rows[["vanilla", "exit 0", "exit 1", "exit 2"]].tolist()
    assert heat["z"][heat_rows(explorer).index("STRIP")][:4] == pytest.approx(recorded)
    explorer.number.value = "asr_change"
    assert "checks=all" in notes(explorer.draw("Defences"))


def heat_rows(explorer):
    return explorer.draw("Defences")["board"]["layout"]["yaxis"]["ticktext"]


def test_strip_appears_when_computed(explorer):
    assert "Compute STRIP" in notes(explorer.draw("Monitors"))
    explorer.material.strip(*explorer.net.value, n=20, blends=4)
    explorer.show()
    assert explorer.blend.description == "Compute STRIP"
    explorer.blend.click()  # kept, not computed again
    assert "STRIP on the vanilla output" in notes(explorer.draw("Monitors"))


def test_a_move_takes_less_than_a_tenth_of_a_second(explorer, capsys):
    explorer.show()
    moves = {}
    for view, control in (("Policies", explorer.knob), ("Policies", explorer.start), ("Exits", explorer.knob),
                          ("One image", explorer.image), ("One image", explorer.row)):
        explorer.page.view.value = view
        values = explorer.values if control is explorer.knob else range(control.min, min(control.max, 12) + 1)
        moves[view, control._dom_classes[-1]] = seconds(partial(setattr, control, "value"), values)
    with capsys.disabled():
        print("\nseconds a move, page included:", {" ".join(k): round(v, 4) for k, v in moves.items()})
    assert max(moves.values()) < .1, moves


def test_published_scale_stays_interactive(capsys):
    """28 outputs, 10,000 images: a first look at a starting exit, and moves of the knob after it."""
    g = torch.Generator().manual_seed(0)
    logits = ExitLogits(*(torch.randn(28, 10_000, 10, generator=g) * 3 for _ in range(2)),
                        torch.randint(10, (10_000,), generator=g))
    net = CachedNet(logits, 9, torch.linspace(.05, 1, 28, dtype=torch.float64))
    began = time.perf_counter()
    net.sweep("confidence", 3)
    first = time.perf_counter() - began
    began = time.perf_counter()
    for _ in range(20):
        net.sweep("confidence", 3)
    again = (time.perf_counter() - began) / 20
    with capsys.disabled():
        print(f"\n28 outputs, 10,000 images: first sweep {first:.3f} s, kept {again * 1e6:.0f} µs")
    assert first < 1 and again < first / 100


def test_the_dashboard_notebook(run, monkeypatch):
    explorer = open_dashboard("backdoor", run, monkeypatch)
    assert explorer.material.run.path == run.path
