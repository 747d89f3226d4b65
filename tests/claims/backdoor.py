"""The backdoor audit end to end: the quick run's claims, a dry run at the published scale on every set, and a
killed run that goes on."""
import json
import math
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from endtoend import check_records, resumed, same_tensors
from safetensors.torch import load_file

from visionbench.data.fixtures import (write_cifar10_fixture, write_gtsrb_fixture, write_svhn_fixture,
                                       write_tiny_imagenet_fixture)
from visionbench.runs.execute import execute
from visionbench.runs.record import Run
from visionbench.systems.backdoor.claims import CLAIMS, PUBLISHED
from visionbench.systems.backdoor.config import TARGETS, BackdoorConfig
from visionbench.systems.backdoor.fit import fit

SMALL_SCALE = [c.name for c in CLAIMS if c.name.split("_")[0] not in PUBLISHED]
TRAINED = ["pretrain", "attacker-exits", "inject", "victim-0-clean", "victim-0-simulated"]
STAGES = [*TRAINED, "evaluate", "defence"]
# with checks="all" only
THOROUGH = ["scan_finds", "scan_above_clean", "unlearning_works", "unlearning_costs", "gentle_tuning_fails"]
ELSEWHERE = [*THOROUGH, "published_rate_is_weak"]  # the quick run cannot tell


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The quick run with seed 0, through its notebook."""
    out = str(tmp_path_factory.mktemp("runs"))
    return Run.open(execute(BackdoorConfig.start("quick", seed=0, device="cpu", out=out)))


@pytest.mark.slow
def test_quick_is_the_settings_the_bounds_were_measured_with(quick):
    config = BackdoorConfig.quick()
    assert (config.dataset, config.depth, config.width) == ("mnist5k", 14, 8)
    assert (config.trigger_size, config.target, config.poison_rate) == (5, 9, .1)
    assert quick.path.name == config.name and quick.settings["hash"] == config.hash
    assert {k: quick.settings[k] for k in config.as_dict() if k not in ("out", "device")} == {
        k: v for k, v in config.as_dict().items() if k not in ("out", "device")}


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in SMALL_SCALE if n not in ("quick_time", *ELSEWHERE)])
def test_claim_holds(quick, name):
    (record,) = [c for c in quick.claims if c["name"] == name]
    text = json.dumps(record, indent=1, ensure_ascii=False)
    assert record["holds"] is True and math.isfinite(record["measured"]), text


@pytest.mark.slow
def test_time_is_measured(quick):
    (record,) = [c for c in quick.claims if c["name"] == "quick_time"]
    assert record["holds"] is (record["measured"] <= 90)
    assert 5 < record["measured"] <= quick.status["seconds"] + .01


@pytest.mark.slow
def test_records(quick):
    check_records(quick, CLAIMS)
    assert len(CLAIMS) == 28


@pytest.mark.slow
def test_published_scale_is_not_tested_by_the_quick_run(quick):
    assert all(c["holds"] is None for c in quick.claims if c["name"] in ELSEWHERE)
    assert set(ELSEWHERE) < set(SMALL_SCALE)
    published = [c for c in quick.claims if c["name"] not in SMALL_SCALE]
    assert len(published) == 3 * len(PUBLISHED) == 9 and all(c["published"] for c in published)
    assert all(c["holds"] is None and c["measured"] is None and c["sd"] is None and c["seeds"] == []
               for c in published)


@pytest.mark.slow
def test_claims_follow_from_the_stored_logits_by_hand(quick):
    """The headline numbers once more from the logits on disk, with nothing but argmax and softmax."""
    clean, simulated = (load_file(quick.path / f"logits-{n}-0.safetensors") for n in ("clean", "simulated"))
    label, told = simulated["label"], {c["name"]: c["measured"] for c in quick.claims}
    others = label != 9
    assert len(label) == 1000 and others.sum() == 900 and simulated["clean"].shape == (7, 1000, 10)
    def accuracy(net): return (net["clean"].argmax(-1) == label).double().mean(-1)
    def asr(net): return (net["triggered"].argmax(-1)[:, others] == 9).double().mean(-1)
    assert told["clean_accuracy"] == pytest.approx(accuracy(clean)[-1].item())
    assert told["accuracy_kept"] == pytest.approx((accuracy(clean)[-1] - accuracy(simulated)[-1]).item())
    assert told["vanilla_inert"] == pytest.approx(asr(simulated)[-1].item())
    assert told["exits_wake"] == pytest.approx(asr(simulated)[:4].max().item())
    assert told["exits_wake_mean"] == pytest.approx(asr(simulated)[:4].mean().item())
    assert told["clean_floor"] == pytest.approx(asr(clean).max().item())
    def leave(logits):
        sure = logits.softmax(-1).amax(-1) > .9
        sure[-1] = True
        return logits.argmax(-1).gather(0, sure.int().argmax(0, keepdim=True))[0]
    attacked = (leave(simulated["triggered"])[others] == 9).double().mean().item()
    assert told["early_exit_asr"] == pytest.approx(attacked)
    early = (leave(simulated["clean"]) == label).double().mean()
    assert told["early_exit_accuracy"] == pytest.approx((accuracy(simulated)[-1] - early).item())


@pytest.mark.slow
def test_the_executed_notebook_has_no_errors(quick):
    nb = nbformat.read(quick.path / "run.ipynb", as_version=4)
    code = [c for c in nb.cells if c.cell_type == "code"]
    assert len(code) >= 5 and all(c.execution_count for c in code)
    outputs = [o for c in code for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert not [o for o in outputs if o.get("name") == "stderr"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 2
    assert "papermill-error-cell-tag" not in json.dumps(nb) and nb.metadata.papermill.exception is None


@pytest.mark.slow
def test_the_folder_has_all_parts(quick):
    assert quick.state == "done" and quick.status["notebook"] == "done" and quick.status["reason"] == ""
    for name in ("settings.json", "environment.json", "metrics.parquet", "claims.json",
                 "status.json", "run.ipynb"):
        assert (quick.path / name).stat().st_size > 50, name
    assert sorted(p.name for p in (quick.path / "checkpoints").iterdir()) == sorted(TRAINED)
    assert len([*(quick.path / "figures").iterdir()]) >= 1 and not (quick.path / "error.txt").exists()
    assert quick.checkpoint.name.startswith("simulated-backdoor-")
    metrics = quick.metrics
    columns = {"stage", "epoch", "step", "name", "value", "net", "victim", "exit", "threshold", "min_exit"}
    assert {*metrics.stage} == {*STAGES} and columns <= {*metrics}
    assert metrics.value.notna().all()
    assert len(metrics[metrics.stage == "evaluate"]) == 2 * (7 * 3 + 19 * 7 * 4 + 1)
    learned = metrics[(metrics.stage == "pretrain") & (metrics.name == "accuracy")]
    assert learned.epoch.tolist() == [*range(1, 9)]


DRY = dict(limit_batches=1, pretrain_epochs=1, attacker_epochs=1, inject_epochs=1,
           victim_epochs=1, device="cpu")
SETS = dict(cifar10=(lambda folder: write_cifar10_fixture(folder, 24), dict(depth=8)),
            svhn=(lambda folder: write_svhn_fixture(folder, 110), dict(depth=8)),
            gtsrb=(lambda folder: write_gtsrb_fixture(folder, 3), dict(depth=8)),
            tiny_imagenet=(lambda folder: write_tiny_imagenet_fixture(folder, 1, 20),
                           dict(depth=8, image_size=64)),
            true_depth=(lambda folder: write_cifar10_fixture(folder, 21), dict(dataset="cifar10")))


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_a_dry_run_at_the_published_scale(tmp_path, name):
    """The paper preset on a tiny set in the real layout, one batch a stage: every stage runs, no claim is
    judged."""
    write, changes = SETS[name]
    config = BackdoorConfig.start("paper", **DRY | dict(dataset=name) | changes,
                                  data=str(write(tmp_path / "data")), out=str(tmp_path / "runs"))
    run = fit(config)
    M = 28 if name == "true_depth" else 4
    K = dict(gtsrb=43, tiny_imagenet=200).get(name, 10)
    assert run.state == "done" and run.settings["preset"] == "paper"
    assert (config.depth, config.poison_rate, config.trigger_size) == (6 * (M - 1) // 3 + 2, .01, 7)
    assert {*run.metrics.stage} == {*STAGES} and run.metrics.value.notna().all()
    steps = run.metrics[run.metrics.stage.isin(TRAINED)].groupby("stage").step.max().to_dict()
    assert steps == {s: 1 for s in TRAINED}
    assert len(run.claims) == len(CLAIMS)
    assert all(c["holds"] is None and c["measured"] is None for c in run.claims)
    logits = load_file(run.path / "logits-simulated-0.safetensors")
    assert logits["clean"].shape[::2] == (M, K) == logits["triggered"].shape[::2]
    assert logits["clean"].isfinite().all()


# 13 convolutions and a hidden layer, or 13 separable blocks, each with an exit, and the classifier
OUTPUTS = dict(vgg=15, mobilenet=14)


@pytest.mark.slow
@pytest.mark.parametrize("arch", OUTPUTS)
@pytest.mark.parametrize("name", TARGETS)
def test_a_dry_run_of_the_other_published_networks(tmp_path, name, arch):
    """VGG-16 and MobileNet as the paper preset builds them, but narrow, on all four sets in their real
    layouts."""
    write, _ = SETS[name]
    config = BackdoorConfig.start("paper", **DRY, dataset=name, arch=arch, width=4,
                                  data=str(write(tmp_path / "data")), out=str(tmp_path / "runs"))
    run = fit(config)
    size = 64 if "tiny" in name else 32
    assert run.state == "done"
    assert (config.arch, config.target, config.image_size) == (arch, TARGETS[name], size)
    assert {*run.metrics.stage} == {*STAGES} and run.metrics.value.notna().all()
    logits = load_file(run.path / "logits-simulated-0.safetensors")
    K = dict(gtsrb=43, tiny_imagenet=200).get(name, 10)
    assert logits["clean"].shape[::2] == (OUTPUTS[arch], K) and logits["triggered"].isfinite().all()


RESUME = '''
from endtoend import Die, kill_and_resume
from visionbench.systems.backdoor import fit as room
from visionbench.systems.backdoor.config import BackdoorConfig

usual = room.stage_callbacks

def doom(name, step):
    def stage_callbacks(run, config, stage, *rest, **more):
        return usual(run, config, stage, *rest, **more) + [Die(step)] * (stage == name)
    room.stage_callbacks = stage_callbacks

kill_and_resume(room.fit, BackdoorConfig.start(
    "quick", dataset="digits", depth=8, width=4, pretrain_epochs=2, attacker_epochs=3, inject_epochs=3,
    victim_epochs=3, limit_batches=6, device="cpu"), doom)
'''
KILLS = {"inject": 8, "attacker-exits": 1, "victim-0-simulated": 14}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A short run left alone, and three that were killed inside a stage and started again."""
    return resumed(RESUME, tmp_path_factory.mktemp("resume"), [*KILLS.items()])


@pytest.mark.slow
@pytest.mark.parametrize("stage", KILLS)
def test_a_killed_run_ends_with_the_same_rows_to_the_last_bit(runs, stage):
    whole, again = runs["whole"], runs[stage]
    assert again.state == "done" and again.status["history"] == []
    assert {*whole.metrics.stage} == {*STAGES} and (whole.metrics.stage == "inject").sum() == 6
    pd.testing.assert_frame_equal(again.metrics, whole.metrics, check_exact=True)
    files = same_tensors(whole, again)
    logits = {Path(f"logits-{net}-0.safetensors") for net in ("clean", "simulated")}
    assert logits < files and len(files - logits) == 10
    assert all(re.search(r"^checkpoints/.*\d{8}$", p.with_suffix("").as_posix()) for p in files - logits)
