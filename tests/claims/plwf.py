"""Continual learning end to end.

The quick run's claims, positive and negative, dry runs of the paper preset on real layouts, and a killed run
that goes on."""
import json
import math

import numpy as np
import pandas as pd
import pytest
from endtoend import check_records, resumed, same_tensors

from visionbench.data.fixtures import write_cifar100_fixture, write_tiny_imagenet_fixture
from visionbench.systems.plwf.claims import CLAIMS
from visionbench.systems.plwf.config import PlwfConfig
from visionbench.systems.plwf.fit import fit
from visionbench.systems.plwf.nets import member_snapshots, networks, run_images, run_members
from visionbench.systems.plwf.stream import all_logits

# the quick run cannot tell
ELSEWHERE = [c.name for c in CLAIMS if c.name.startswith("long_stream")] + ["cifar100_lwf"]
NEGATIVE = ["local_tie", "not_above_ewc", "class_incremental_fails", "class_incremental_tie"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The quick run with seed 0: five replicas of nine members."""
    return fit(PlwfConfig.start("quick", seed=0, device="cpu", out=str(tmp_path_factory.mktemp("runs"))))


def results(run, member):
    """What the replicas of a member left in their files."""
    return [json.loads((run.path / "checkpoints" / member / f"replica-{r}.json").read_text())
            for r in range(run.settings["replicas"])]


def ends(run, member, kind="task"):
    """Mean accuracy over tasks in the end, one value a replica, straight from the files."""
    return np.array([np.mean(r[kind][-1]) for r in results(run, member)])


@pytest.mark.slow
def test_quick_is_the_settings_the_bounds_were_measured_with(quick):
    c = PlwfConfig.quick()
    assert ((c.streams, c.networks, c.increments, c.epochs, c.lrs, c.lams, c.temperature)
            == (("mnist5k",), ("cnn-small",), (2,), (4,), (.02,), (2.,), 2.))
    assert c.replicas >= 5 and quick.settings["hash"] == c.hash and c.class_order == "replica"


@pytest.mark.slow
@pytest.mark.parametrize("name", [c.name for c in CLAIMS if c.name not in ("quick_time", *ELSEWHERE)])
def test_claim_holds(quick, name):
    (record,) = [c for c in quick.claims if c["name"] == name]
    assert record["holds"] is True and math.isfinite(record["measured"]), json.dumps(
        record, indent=1, ensure_ascii=False)


@pytest.mark.slow
def test_records(quick):
    check_records(quick, CLAIMS)
    assert [c["name"] for c in quick.claims if c["holds"] is None] == ELSEWHERE
    assert set(NEGATIVE) <= {c.name for c in CLAIMS}


@pytest.mark.slow
def test_claims_by_hand_from_the_files(quick):
    told = {c["name"]: c["measured"] for c in quick.claims}
    e = {m: ends(quick, f"mnist5k-seen-{m}")
         for m in ("fine-tune", "joint", "lwf-2", "plwf-2", "plwf+credit-2", "ewc")}
    assert (told["fine_tuning_forgets"] == pytest.approx(e["fine-tune"].mean())
            and told["joint_learns_all"] == pytest.approx(e["joint"].mean()))
    assert told["all_teachers_help"] == pytest.approx((e["plwf-2"] - e["lwf-2"]).mean())
    assert told["credit_beats_lwf"] == pytest.approx((e["plwf+credit-2"] - e["lwf-2"]).mean())
    assert told["not_above_ewc"] == pytest.approx((e["plwf-2"] - e["ewc"]).mean())
    local = [ends(quick, f"mnist5k-local-{m}", kind) for kind in ("task", "cls") for m in ("plwf-2", "lwf-2")]
    assert (told["local_tie"] == pytest.approx((local[0] - local[1]).mean())
            and told["class_incremental_tie"] == pytest.approx((local[2] - local[3]).mean()))
    best = max(ends(quick, f"mnist5k-seen-{m}", "cls").mean() for m in e if m != "joint")
    assert told["class_incremental_fails"] == pytest.approx(best - .2)
    def lost(member):
        A = [np.array(r["task"], dtype=float) for r in results(quick, member)]
        return np.mean([[a[i:-1, i].max() - a[-1, i] for i in range(4)] for a in A])
    assert told["credit_forgetting"] == pytest.approx(lost("mnist5k-seen-plwf+credit-2"))
    shares = [s["conflict_share"] for r in results(quick, "mnist5k-seen-plwf+credit-2") for s in r["shares"]]
    assert len(shares) == 20 and told["steps_conflict"] == pytest.approx(np.mean(shares))
    assert told["quick_time"] == pytest.approx(quick.status["seconds"], abs=1)


@pytest.mark.slow
def test_credit_assignment_wins_on_most_replicas(quick):
    d = ends(quick, "mnist5k-seen-plwf+credit-2") - ends(quick, "mnist5k-seen-lwf-2")
    assert (d > 0).sum() >= len(d) - 1


@pytest.mark.slow
def test_conflict_shares_are_those_of_the_single_steps(quick):
    rows = quick.metrics.query("stage == 'conflict' and replica == 0")
    steps = rows[rows.name == "cosine"]
    assert len(steps) == 4 * 100 and steps.value.between(-1.001, 1.001).all() and (steps.task > 0).all()
    share = rows[rows.name == "conflict_share"].set_index("task").value
    assert np.allclose((steps.value < 0).groupby(steps.task).mean(), share.sort_index())
    assert (steps.projected == (steps.value < 0)).all() and (steps.coefficient <= 0).all()


@pytest.mark.slow
def test_replicas_are_paired(quick):
    """The first task is learned alike by all methods of a replica, in an order of classes of its own."""
    first = {m: [r["task"][0][0] for r in results(quick, m)] for m in run_members(quick) if "joint" not in m}
    assert len({tuple(v) for v in first.values()}) == 1 and len({*next(iter(first.values()))}) > 1


@pytest.mark.slow
def test_networks_answer_as_they_were_judged(quick):
    images, told = run_images(quick), results(quick, "mnist5k-seen-plwf+credit-2")[0]
    assert [*networks(quick)] == [*run_members(quick)] and len(run_members(quick)) == 9
    for t, net in enumerate(member_snapshots(quick, "mnist5k-seen-plwf+credit-2")):
        z, block = all_logits(net, images.image), images.label // 2
        assert z.shape == (1000, 2 * t + 2)
        for k in range(t + 1):
            mine = block == k
            assert ((z[mine].argmax(1) == images.label[mine]).double().mean().item()
                    == pytest.approx(told["cls"][t][k]))
            assert ((z[mine][:, 2*k:2*k + 2].argmax(1) + 2*k == images.label[mine]).double().mean().item()
                    == pytest.approx(told["task"][t][k]))


PAPER = dict(limit_batches=1, epochs=(1,), replicas=1, device="cpu", threads=1, local_methods=("lwf",))
DRY = {
    "cifar100": (lambda folder: write_cifar100_fixture(folder, 2),
                 dict(methods=("plwf+credit", "joint"))),  # 10 × 10, as published
    "twenty tasks": (lambda folder: write_cifar100_fixture(folder, 1),
                     dict(increments=(5,), search_lambda=False, methods=("plwf",), local_methods=())),
    "other methods": (lambda folder: write_cifar100_fixture(folder, 1),
                      dict(increments=(50,), search_lambda=False, fisher_samples=2,
                           methods=("fine-tune", "ewc", "si", "mas", "gpm", "agem"), local_methods=())),
    "tiny": (lambda folder: write_tiny_imagenet_fixture(folder, 2, 400),
             dict(increments=(100,), image_size=64, search_lambda=False, methods=("plwf+credit",),
                  local_methods=())),
}


@pytest.mark.slow
@pytest.mark.parametrize("which", DRY)
def test_the_paper_preset_runs_on_files_in_their_real_layout(which, tmp_path):
    write, changes = DRY[which]
    write(tmp_path / "data")
    run = fit(PlwfConfig.start("paper", data=str(tmp_path / "data"), out=str(tmp_path), **PAPER | changes))
    rows = run.metrics[run.metrics["stage"] == "evaluate"]
    classes = 200 if which == "tiny" else 100
    T = classes // run.settings["increments"][0]
    assert run.state == "done" and rows.task_of.max() == T - 1 and rows.value.between(0, 1).all()
    assert all(c["holds"] is None for c in run.claims)
    assert all(len(member_snapshots(run, m)) == (1 if "joint" in m else T) and net.classes == classes
               for m, net in networks(run).items())
    if which == "cifar100":
        assert {*run.metrics[run.metrics["stage"] == "search"].task} == {*range(1, 10)}
        assert run_images(run).classes[0] != run_images(run).classes[1] and len(run_images(run)) == 200


RESUME = '''
from pathlib import Path
from endtoend import die, kill_and_resume
from visionbench.systems.plwf import fit as room
from visionbench.systems.plwf.config import PlwfConfig
from visionbench.train.learner import Learner

usual, last, steps = Learner.one_batch, None, 0

def one_batch(self):
    global steps
    steps += 1
    if steps == last: die()
    usual(self)
Learner.one_batch = one_batch

def doom(name, step):
    global last
    last = step

def fit(config):
    global steps
    steps = 0
    run = room.fit(config)
    Path(config.out, "steps").write_text(str(steps))
    return run

kill_and_resume(fit, PlwfConfig.start(
    "quick", streams=("digits",), networks=("mlp",), hidden=8, epochs=(2,), replicas=2, lams=(1.,),
    limit_batches=4, methods=("lwf", "plwf+credit", "ewc"), local_methods=("lwf",), device="cpu"), doom)
'''


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_rows(tmp_path):
    """Killed in the fourth member and again in the second it tried.

    What was finished is not trained again."""
    whole, again = resumed(RESUME, tmp_path, [("killed", 130), ("killed", 60)]).values()
    all_steps, last_steps = (int((tmp_path / name / "steps").read_text()) for name in ("whole", "killed"))
    # 40 steps a member: three done before the first end, one before the second
    assert all_steps == 8 * 5 * 8 and last_steps == (8 - 3 - 1) * 5 * 8
    tables = [r.metrics[r.metrics["stage"] != "cost"].reset_index(drop=True) for r in (whole, again)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    assert len(same_tensors(whole, again)) == 20 and again.state == "done"
