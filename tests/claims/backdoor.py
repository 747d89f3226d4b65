"""The backdoor audit end to end: the quick run's claims, a dry run at the published scale on every set, and a
killed run that goes on."""
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from safetensors.torch import load_file

from visionbench.data.fixtures import (write_cifar10_fixture, write_gtsrb_fixture, write_svhn_fixture,
                                       write_tiny_imagenet_fixture)
from visionbench.runs.execute import execute
from visionbench.runs.record import Run
from visionbench.systems.backdoor.claims import CLAIMS, PUBLISHED
from visionbench.systems.backdoor.config import TARGETS, BackdoorConfig
from visionbench.systems.backdoor.fit import fit
from visionbench.train.checkpoint import digest

ROOT = Path(__file__).resolve().parents[2]
FIELDS = ["system", "name", "source", "statement", "published", "measured", "sd", "seeds", "holds"]
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
def test_records_have_exactly_the_fixed_keys(quick):
    assert [c["name"] for c in quick.claims] == [c.name for c in CLAIMS]
    assert len({c.name for c in CLAIMS}) == len(CLAIMS) == 28
    for record, claim in zip(quick.claims, CLAIMS):
        assert list(record) == FIELDS and record["system"] == "backdoor" and record["source"]
        assert record["statement"] == claim.statement
        assert record["holds"] in (True, False, None) and record["sd"] is None
        assert record["seeds"] == ([] if record["holds"] is None else [0])


@pytest.mark.slow
def test_published_scale_is_not_tested_by_the_quick_run(quick):
    assert all(c["holds"] is None for c in quick.claims if c["name"] in ELSEWHERE)
    assert set(ELSEWHERE) < set(SMALL_SCALE)
    published = [c for c in quick.claims if c["name"] not in SMALL_SCALE]
    assert len(published) == 3 * len(PUBLISHED) == 9 and all(c["published"] for c in published)
    assert all(c["holds"] is None and c["measured"] is None and c["sd"] is None and c["seeds"] == []
               for c in published)


@pytest.mark.slow
def test_claims_measured_again_from_the_folder_are_the_same(quick):
    for stored, claim in zip(quick.claims, CLAIMS):
        again = claim.record("backdoor", {0: claim.measure(quick)})
        if claim.name == "quick_time":
            assert again.pop("measured") == pytest.approx(stored["measured"], abs=1)
            assert again.pop("holds") in (True, False)
        assert again == {k: stored[k] for k in again}


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
import os, signal, sys
from visionbench.systems.backdoor import fit as room
from visionbench.systems.backdoor.config import TARGETS, BackdoorConfig
from visionbench.core.tensors import DictData, batches
from visionbench.train.learner import Learner
import torch

config = BackdoorConfig.start("quick", dataset="digits", depth=8, width=4, pretrain_epochs=2,
                              attacker_epochs=3, inject_epochs=3, victim_epochs=3,
                              limit_batches=6, device="cpu")
usual, deadly = room.stage_callbacks, {}

class Die:
    def after_step(self, learner):
        if learner.iteration == deadly["step"]: os.kill(os.getpid(), signal.SIGKILL)

def stage_callbacks(run, config, stage, *rest, **more):
    return usual(run, config, stage, *rest, **more) + [Die()] * (stage == deadly.get("stage"))
room.stage_callbacks = stage_callbacks

def killed(out, stage, step):
    "`fit` in a process of its own, which is to die; the signal that ended it."
    pid = os.fork()
    if pid: return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    deadly.update(stage=stage, step=int(step))
    try: room.fit(config.replace(out=out))
    except BaseException as e: print(repr(e), file=sys.stderr, flush=True)
    os._exit(1)

root, kills = sys.argv[1], [k.split(",") for k in sys.argv[2:]]
once = torch.nn.Linear(1, 1)  # what is imported on first use shall be there before the forks
Learner(once, lambda out, b: dict(out=out.sum()), batches(DictData(image=torch.ones(1, 1)), 1),
        torch.optim.Adam(once.parameters(), .1), device="cpu").fit(1)
print(*[killed(f"{root}/{stage}", stage, step) for stage, step in kills])
for name in ("whole", *[stage for stage, _ in kills]):
    print(room.fit(config.replace(out=f"{root}/{name}")).path)
'''
KILLS = {"inject": 8, "attacker-exits": 1, "victim-0-simulated": 14}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A short run left alone, and three that were killed inside a stage and started again."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "resume.py").write_text(RESUME)
    command = [sys.executable, folder / "resume.py", folder,
               *[f"{stage},{step}" for stage, step in KILLS.items()]]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    process = subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
    assert process.returncode == 0, out + err
    signals, *paths = out.splitlines()
    assert list(map(int, signals.split())) == [-signal.SIGKILL] * len(KILLS), err
    return {name: Run.open(path) for name, path in zip(("whole", *KILLS), paths)}


@pytest.mark.slow
@pytest.mark.parametrize("stage", KILLS)
def test_a_killed_run_ends_with_the_same_rows_to_the_last_bit(resumed, stage):
    whole, again = resumed["whole"], resumed[stage]
    assert whole.path.name == again.path.name and again.state == "done" and again.status["history"] == []
    assert {*whole.metrics.stage} == {*STAGES} and (whole.metrics.stage == "inject").sum() == 6
    pd.testing.assert_frame_equal(again.metrics, whole.metrics, check_exact=True)
    for name in ("logits-clean-0", "logits-simulated-0"):
        one, two = (digest(load_file(run.path / f"{name}.safetensors")) for run in (whole, again))
        assert one == two, name
    files = {p.relative_to(whole.path) for p in (whole.path / "checkpoints").rglob("*.safetensors")}
    assert files == {p.relative_to(again.path) for p in (again.path / "checkpoints").rglob("*.safetensors")}
    assert len(files) == 10
    for p in files: assert digest(load_file(whole.path / p)) == digest(load_file(again.path / p)), p
    assert all(re.search(r"\d{8}$", p.stem) for p in files)
