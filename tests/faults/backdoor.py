"""The backdoor audit with settings and data that do not fit: refused before training, with the reason in the
run folder."""
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from visionbench.core.config import ConfigError
from visionbench.data.fixtures import write_cifar10_fixture
from visionbench.data.images import ImageSet
from visionbench.nn.exits import MultiExitNet
from visionbench.nn.resnet import cifar_resnet
from visionbench.runs.record import Run
from visionbench.systems.backdoor.config import BackdoorConfig
from visionbench.systems.backdoor.defence import ConfusionMonitor, detection_auroc
from visionbench.systems.backdoor.evaluate import (ExitLogits, confidence_sweep, evaluate_exits,
                                                   exit_logits, policy_table)
from visionbench.systems.backdoor.fit import fit
from visionbench.systems.backdoor.threat import exit_weights, poison_indices, poisoned, simulate_exit_backdoor
from visionbench.systems.backdoor.trigger import BlendTrigger, CheckerboardTrigger, SquareTrigger
from visionbench.train.checkpoint import load_checkpoint

LABEL = torch.arange(40) % 10
SHORT = dict(dataset="digits", depth=8, width=4, pretrain_epochs=1, attacker_epochs=1, inject_epochs=1,
             victim_epochs=1, limit_batches=1, device="cpu")


def says(*parts, error=ValueError):
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, parts)))


def digits(size=8):
    return ImageSet(torch.rand(40, 1, size, size, generator=torch.Generator().manual_seed(0)), LABEL,
                    tuple("0123456789"), "toy", (.3,), (.2,))


@pytest.mark.parametrize("rate", [0, 0., 1., -.1, 1.5, float("nan"), float("inf")])
def test_a_poison_rate_outside_0_1(rate):
    with says(f"poison rate {rate}", "outside 0 … 1"): poison_indices(LABEL, 9, rate)


def test_a_poison_rate_that_poisons_nothing_or_too_much():
    with says("0.01 of 40 images poisons none", "at least 0.025"): poison_indices(LABEL, 9, .01)
    assert len(poison_indices(LABEL, 9, .025)) == 1 and len(poison_indices(LABEL, 9, .9)) == 36
    with says("asks for 38 images, only 36", "not of class 9"): poison_indices(LABEL, 9, .95)
    with says("asks for 20 images, only 0", "class 3"): poison_indices(torch.full((40,), 3), 3, .5)


@pytest.mark.parametrize("target", [-1, 10, 99])
def test_a_target_that_is_no_class(target):
    with says(f"target class {target} does not exist", "toy has 0 … 9"):
        poisoned(digits(), SquareTrigger(2, 1), target, .1)
    mx = MultiExitNet.from_vanilla(cifar_resnet(8, 10, 1, 4), input_shape=(1, 8, 8))
    with says(f"target class {target} does not exist"):
        simulate_exit_backdoor(mx, digits(), SquareTrigger(2, 1), target, .1, device="cpu")
    logits = ExitLogits(torch.zeros(2, 40, 10), torch.zeros(2, 40, 10), LABEL)
    with says(f"target={target}, expected a class 0 … 9"):
        evaluate_exits(logits, target, torch.tensor([.5, 1.]))


@pytest.mark.parametrize("M,shallow,m", [(7, .1, 0), (7, 0., 0), (7, 1., 7), (2, .4, 0)])
def test_a_share_of_outputs_that_leaves_none(M, shallow, m):
    with says(f"shallow = {shallow} of {M} outputs makes m = {m}", f"1 … {M - 1}"): exit_weights(M, shallow)


def test_weights_of_another_kind():
    with says("loss weights 'sqrt'", "'uniform' or 'released'"): exit_weights(7, .6, "sqrt")
    with says("loss_weights", "unknown choice 'sqrt'", error=ConfigError):
        BackdoorConfig.quick().replace(loss_weights="sqrt")


@pytest.mark.parametrize("size", [2, 4, 6, 8])
def test_an_even_checkerboard(size):
    with says(f"even size {size}", f"take {size - 1} or {size + 1}"): CheckerboardTrigger(size)


@pytest.mark.parametrize("size,offset", [(0, 1), (-3, 1), (3, 0), (3, -2)])
def test_a_trigger_of_no_size_or_place(size, offset):
    for family in (CheckerboardTrigger, SquareTrigger):
        with says("at least 1 pixel", f"got {size} and {offset}"): family(size, offset)


@pytest.mark.parametrize("trigger,shape,need",
                         [(CheckerboardTrigger(), (1, 11, 32), 12), (SquareTrigger(9, 1), (3, 8, 8), 9),
                          (SquareTrigger(3, 7), (3, 8, 8), 9)])
def test_a_trigger_larger_than_the_image(trigger, shape, need):
    with says(f"a trigger of {trigger.size} pixels at offset {trigger.offset} needs {need}×{need} pixels",
              f"the image has {shape[1]}×{shape[2]}"):
        trigger(torch.rand(*shape))
    assert trigger(torch.rand(1, need, need)).shape == (1, need, need)


def test_a_watermark_that_does_not_fit():
    with says("a watermark of (4, 4)", "images of (8, 8)"):
        BlendTrigger(torch.rand(4, 4))(torch.rand(1, 8, 8))
    with says("a watermark is (H,W), got (1, 4, 4)"): BlendTrigger(torch.rand(1, 4, 4))
    for opacity in (-.1, 1.1, float("nan")):
        with says(f"opacity = {opacity}"): BlendTrigger(torch.rand(4, 4), opacity)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_no_decision(bad):
    logits = torch.zeros(3, 4, 2)
    logits[1, 2, 0] = bad
    with says("output 1", "NaN or infinite"): confidence_sweep(logits, (.5,))
    given = ExitLogits(logits, torch.zeros(3, 4, 2), torch.tensor([0, 1, 0, 1]))
    with says("NaN"): policy_table(given, 1, torch.tensor([.3, .6, 1.]), (.5,))
    with says("NaN"):
        policy_table(ExitLogits(given.triggered, logits, given.label), 1, torch.tensor([.3, .6, 1.]), (.5,))
    with says("NaN"): ConfusionMonitor().fit(logits)


def test_evaluation_without_images_or_others():
    cost = torch.tensor([.5, 1.])
    with says("all 3 images are of the target class 1"):
        evaluate_exits(ExitLogits(torch.zeros(2, 3, 2), torch.zeros(2, 3, 2), torch.ones(3).long()), 1, cost)
    with says("no images: B=0"):
        evaluate_exits(ExitLogits(torch.zeros(2, 0, 2), torch.zeros(2, 0, 2), torch.zeros(0).long()), 1, cost)
    with says("rising from above 0 to 1"):
        evaluate_exits(ExitLogits(torch.zeros(2, 3, 2), torch.zeros(2, 3, 2), torch.tensor([0, 1, 0])), 1,
                       torch.tensor([.5, .9]))
    mx = MultiExitNet.from_vanilla(cifar_resnet(8, 10, 1, 4), input_shape=(1, 8, 8))
    with says("needs 9×9 pixels"): exit_logits(mx, digits(), SquareTrigger(9, 1), device="cpu")


@pytest.mark.parametrize("share", [0, 1, -.2, 1.2, float("nan")])
def test_a_monitor_with_a_share_outside_0_1(share):
    with says(f"false_alarms = {share}"): ConfusionMonitor(share)


@pytest.mark.parametrize("shape", [(3, 1, 2), (3, 0, 2), (3, 2)])
def test_a_monitor_of_too_few_images(shape):
    with says(f"logits {shape} given"): ConfusionMonitor().fit(torch.zeros(shape))


def test_scores_that_cannot_be_compared():
    for clean, suspect in ((torch.zeros(0), torch.ones(2)), (torch.zeros(2), torch.ones(0)),
                           (torch.tensor([0., float("nan")]), torch.ones(2))):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ValueError): detection_auroc(clean, suspect)


@pytest.mark.parametrize("name,value,reason", [
    ("target", -1, "outside 0"), ("target", 9., "float, expected int"),
    ("poison_rate", 1.2, "outside 0 … 1 fraction"), ("poison_rate", -.1, "outside"),
    ("poison_rate", float("nan"), "outside"), ("pretrain_epochs", 0, "outside 1 … ∞ epochs"),
    ("victims", 0, "outside 1"), ("depth", 7, "outside 8"),
    ("dataset", "cifar", "unknown choice 'cifar'. Did you mean 'cifar10'"),
    ("trigger", "blend", "Known: checkerboard, square"), ("pool", "max", "unknown choice"),
    ("exit_batch", 0, "images"), ("inject_lr", -1., "outside 0")])
def test_settings_out_of_range(name, value, reason):
    with says(name, reason, error=ConfigError): BackdoorConfig.quick().replace(**{name: value})


def failed(config, *reason, error=ValueError):
    """Assert that `fit` refuses the settings, that the folder says why, and that nothing was trained for
    it."""
    with says(*reason, error=error): fit(config)
    (path,) = (Path(config.out) / "backdoor").iterdir()
    run = Run.open(path)
    assert run.state == "failed" and all(part in run.status["reason"] for part in reason)
    assert run.status["reason"].startswith(error.__name__)
    assert error.__name__ in (path / "error.txt").read_text()
    assert run.checkpoint is None and run.metrics.empty and run.claims == []
    return path


@pytest.mark.parametrize("changes,reason", [
    (dict(target=10), ["target class 10 does not exist", "digits has 0 … 9"]),
    (dict(trigger_size=4), ["even size 4"]),
    (dict(trigger_size=17, trigger_offset=3), ["needs 19×19 pixels, the image has 16×16"]),
    (dict(poison_rate=1e-4), ["poisons none"]), (dict(poison_rate=0.), ["poison rate 0.0"]),
    (dict(poison_rate=1.), ["poison rate 1.0"]), (dict(poison_rate=.99), ["asks for", "are not of class 9"]),
    (dict(shallow=.1), ["makes m = 0"]), (dict(shallow=1.), ["makes m = 4"]),
    (dict(depth=12), ["depth=12 is not 6n+2"]),
    (dict(image_size=20), ["digits can be 16, 8, 32 pixels", "size=20"]),
    (dict(data="/somewhere"), ["digits comes with the install", "/somewhere"])])
def test_settings_that_do_not_fit_the_images_fail_before_training(tmp_path, changes, reason):
    failed(BackdoorConfig.start("quick", **SHORT | changes, out=str(tmp_path)), *reason)


def test_a_published_set_without_its_folder(tmp_path):
    config = BackdoorConfig.start("paper", out=str(tmp_path / "a"))
    failed(config, "cifar10 is not part of the install", "data=FOLDER", "cifar-10-batches-py",
           error=FileNotFoundError)
    config = BackdoorConfig.start("paper", data=str(tmp_path / "absent"), out=str(tmp_path / "b"))
    failed(config, "cifar10", "absent", error=FileNotFoundError)
    (tmp_path / "empty").mkdir()
    config = BackdoorConfig.start("paper", data=str(tmp_path / "empty"), out=str(tmp_path / "c"))
    failed(config, "cifar10", "empty", error=FileNotFoundError)


def test_a_failed_run_is_made_again_when_the_folder_has_come(tmp_path):
    once = dict(pretrain_epochs=1, attacker_epochs=1, inject_epochs=1, victim_epochs=1, limit_batches=1,
                device="cpu", depth=8, width=4)
    config = BackdoorConfig.start("paper", **once, poison_rate=.1, data=str(tmp_path / "data"),
                                  out=str(tmp_path / "runs"))
    path = failed(config, "cifar10", error=FileNotFoundError)
    write_cifar10_fixture(tmp_path / "data", 10)
    run = fit(config)
    assert run.path == path and run.state == "done" and not (path / "error.txt").exists()
    (past,) = run.status["history"]
    assert past["state"] == "failed" and "cifar10" in past["reason"]


def test_a_threshold_off_the_grid_is_judged_like_any_other(tmp_path):
    """The claims ask for the run's own threshold after hours of training."""
    changes = SHORT | dict(dataset="mnist5k", limit_batches=0, pretrain_epochs=1, width=2, threshold=.87)
    run = fit(BackdoorConfig.start("quick", **changes, out=str(tmp_path)))
    claims = {c["name"]: c["measured"] for c in run.claims}
    assert run.state == "done" and claims["early_exit_asr"] is not None and 0 <= claims["early_exit_asr"] <= 1


def test_what_a_simulation_writes_says_so(tmp_path):
    run = fit(BackdoorConfig.start("quick", **SHORT, out=str(tmp_path)))
    files = sorted((run.path / "checkpoints").rglob("*.safetensors"))
    simulated = [p for p in files if p.parent.name == "inject" or p.parent.name.endswith("simulated")]
    assert simulated and all(p.name.startswith("simulated-backdoor") for p in simulated)
    for p in files:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            tags = load_checkpoint(p).tags
        assert bool(tags) == (p in simulated)
        assert any("SIMULATED BACKDOOR" in str(w.message) for w in said) == (p in simulated)
        if p in simulated:
            assert tags["simulated_backdoor"] is True and tags["target"] == 9 and tags["seed"] == 0
            assert "CheckerboardTrigger(size=5, offset=2)" in tags["trigger"]
    mx = MultiExitNet.from_vanilla(cifar_resnet(8, 10, 1, 4), input_shape=(1, 8, 8))
    threat = simulate_exit_backdoor(mx, digits(), SquareTrigger(2, 1), 3, .1, epochs=1, seed=4, device="cpu")
    saved = threat.save(tmp_path / "zoo")
    assert saved.name == "simulated-backdoor-t3-s4.safetensors"
    with pytest.warns(UserWarning, match="SIMULATED BACKDOOR.*target class 3"):
        loaded = load_checkpoint(saved)
    assert np.array_equal(loaded.tensors["model/head.2.weight"], threat.net.head[2].weight.detach())


def test_a_run_whose_claims_file_is_damaged_is_named(tmp_path):
    run = fit(BackdoorConfig.start("quick", **SHORT, out=str(tmp_path)))
    assert all(c["holds"] is None and c["measured"] is None
               for c in json.loads((run.path / "claims.json").read_text()))
    (run.path / "claims.json").write_text("[{")
    with pytest.raises(RuntimeError, match="claims.json is damaged"): run.claims
