"""Continual learning with settings, data and folders that do not fit.

Refused before training, saying what was given and expected."""
import json
import re
import warnings

import pytest
import torch
from torch import nn

from visionbench.core.config import ConfigError
from visionbench.core.tensors import DictData
from visionbench.data.partition import TaskStream
from visionbench.nn.growing import (GrowingHead, GrowingNet, growing_cnn, growing_mlp, growing_net,
                                    growing_resnet)
from visionbench.runs.record import Run, RunError
from visionbench.systems.plwf.baselines import AGEM, EWC, GPM, MAS, SI, FineTune, Joint, LwF
from visionbench.systems.plwf.claims import CLAIMS
from visionbench.systems.plwf.config import PlwfConfig
from visionbench.systems.plwf.fit import PLwF, compare, fit, run_stream
from visionbench.systems.plwf.methods import Stage
from visionbench.systems.plwf.nets import member_snapshots, networks, run_stream_of
from visionbench.systems.plwf.results import paired
from visionbench.systems.plwf.search import LambdaSearch, hold_back
from visionbench.systems.plwf.snapshots import Snapshots
from visionbench.systems.plwf.stream import Training, learn
from visionbench.train.learner import NonFiniteLoss

QUICKEST = dict(streams=("digits",), networks=("mlp",), hidden=8, epochs=(1,), replicas=1, lams=(1.,),
                limit_batches=1, methods=("fine-tune", "plwf"), local_methods=(), device="cpu")


def says(*parts, error=ValueError):
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, parts)))


def toy(tasks=3, per_class=8, size=8):
    g, y = torch.Generator().manual_seed(0), torch.arange(2 * tasks * per_class) % (2 * tasks)
    x = torch.rand(len(y), 1, size, size, generator=g)
    return TaskStream.from_arrays(x, y, x.clone(), y.clone(), increment=2)


SHORT = dict(model="mlp", model_options=dict(hidden=(8,)), epochs=1, seeds=[0])


@pytest.mark.parametrize("lam", [-1., float("nan")])
@pytest.mark.parametrize("kind", [PLwF, LwF, EWC, SI, MAS])
def test_a_weight_below_zero(kind, lam):
    with says(f"lam = {lam}", "0 or more"): kind(lam)


@pytest.mark.parametrize("make,text", [
    (lambda: PLwF(temperature=0.), "temperature=0.0 given, expected τ > 0"),
    (lambda: PLwF(temperature=-1), "expected τ > 0"),
    (lambda: PLwF(kd="jiont"), "kd='jiont' given"), (lambda: PLwF(weights="average"), "weights='average'"),
    (lambda: PLwF(teachers="lst"), "teachers='lst', expected all"),
    (lambda: PLwF(teacher_forward="map"), "teacher_forward='map'"),
    (lambda: EWC(fisher="exakt"), "Did you mean 'exact'?"),
    (lambda: SI(damping=0.), "damping = 0.0: ξ must be above 0"),
    (lambda: GPM(threshold=0.), "threshold = 0.0: ε must lie in (0,1]"),
    (lambda: GPM(threshold=1.1), "ε must lie in (0,1]"),
    (lambda: AGEM(per_class=0), "per_class = 0"), (lambda: AGEM(batch=0), "batch = 0"),
    (lambda: LambdaSearch(decay=1.), "decay=1.0"), (lambda: LambdaSearch(start=0.), "start=0.0"),
    (lambda: LambdaSearch(drop=1.), "drop=1.0"), (lambda: LambdaSearch(most=0), "at least one trial"),
    (lambda: Training(epochs=0), "epochs = 0"), (lambda: Training(batch_size=0), "batch_size = 0"),
    (lambda: Training(lr=0.), "lr = 0.0"), (lambda: Training(clip=-1.), "clip = -1.0")])
def test_settings_that_make_no_sense(make, text):
    with says(text): make()


@pytest.mark.parametrize("kind", [FineTune, Joint, PLwF, EWC, SI, MAS, GPM, AGEM])
def test_a_cross_entropy_that_does_not_exist(kind):
    with says("unknown cross-entropy 'lokal'", "Did you mean 'local'?"):
        kind(ce="lokal") if kind not in (EWC, SI, MAS) else kind(1., ce="lokal")


def test_elastic_weights_need_a_softmax():
    with says("unknown cross-entropy 'bce'"): EWC(ce="bce")


@pytest.mark.parametrize("teachers,text", [
    ([5], "names task 5"), ([2], "names task 2"), ([-1], "names task -1"), ([0, 0], "twice")])
def test_teachers_that_never_come(teachers, text):
    trained = []
    class Watch(PLwF):
        def begin(self, stage): trained.append(stage.index)
    with says(text): run_stream(Watch(teachers=teachers), toy(), **SHORT)
    with says(text): learn(Watch(teachers=teachers), toy())
    assert not trained


def test_kept_answers_under_random_augmentation():
    class Shift:
        def __init__(self, seed): pass
    with says("cache='always' with random augmentation", "would have seen other images"):
        run_stream(PLwF(cache="always"), toy(), augment=Shift, **SHORT)
    assert len(run_stream(PLwF(), toy(), augment=Shift, **SHORT).cost) == 3


def test_a_batch_of_one_and_batchnorm():
    with says("16 images in batches of 5 leave a batch of one", "BatchNorm"):
        run_stream(FineTune(), toy(), model=lambda **k: growing_resnet(depth=8, width=2, **k), epochs=1,
                   seeds=[0], batch_size=5)
    assert (run_stream(FineTune(), toy(), model="mlp", epochs=1, seeds=[0], batch_size=5).cost.steps.tolist()
            == [4] * 3)


@pytest.mark.parametrize("method", [FineTune(), PLwF(), EWC(samples=4)])
def test_a_loss_that_is_not_finite_names_task_and_step(method):
    with says(f"task 0, {method.name}: loss is not finite at step", "learning rate", error=NonFiniteLoss):
        run_stream(method, toy(), lr=1e20, clip=0, model="mlp", epochs=50, seeds=[0])


def test_networks_that_cannot_be():
    with says("network 'resnet' is unknown: there are mlp, cnn-small, resnet32"):
        run_stream(FineTune(), toy(), model="resnet", seeds=[0])
    with says("expected one with grow", error=TypeError):
        run_stream(FineTune(), toy(), model=lambda **k: nn.Linear(2, 2), seeds=[0])
    for make, bad in ((growing_mlp, dict(hidden=(0,))), (growing_cnn, dict(width=0)),
                      (growing_cnn, dict(hidden=-1)), (growing_mlp, dict(capacity=0))):
        with says("=", "expected at least 1"): make(**{"shape": (1, 8, 8), "capacity": 4, **bad})


def test_more_classes_than_there_is_room_for():
    head = GrowingHead(4, 3).grow(2)
    for more in (2, 0, -1):
        with says(f"{more} classes after 2: there is room for 1 … 1"): head.grow(more)
    assert head.classes == 2 and head.weight[2].eq(0).all()
    with says("no classes yet: call grow"): GrowingNet(nn.Flatten(), 4, 3)(torch.rand(1, 1, 2, 2))


def test_a_state_of_another_width():
    with says("size mismatch", error=RuntimeError):
        GrowingHead(4, 3).load_state_dict(GrowingHead(4, 5).grow(5).state_dict())


def test_gpm_and_grouped_convolutions():
    def grouped(shape, capacity, generator=None, **more):
        return GrowingNet(nn.Sequential(nn.Conv2d(1, 2, 3, padding="same"), nn.Flatten()), 2 * 64, capacity)
    with says("GPM: plain convolutions", "padding='same'"):
        run_stream(GPM(), toy(), model=grouped, epochs=1, seeds=[0])


def test_nothing_to_compare():
    with says("no seeds given"): run_stream(FineTune(), toy(), model="mlp", seeds=[])
    with says("reference 'LwF' is not among the methods: a"):
        compare({"a": FineTune()}, toy(), "LwF", **SHORT)
    with says("none given"): compare({}, toy(), **SHORT)
    with says("3 and 2 replicas cannot be paired"): paired(torch.zeros(3), torch.zeros(2))
    with says("kind is 'task' or 'class', got 'tag'"): run_stream(FineTune(), toy(), **SHORT).accuracy("tag")


def test_too_few_images_to_hold_some_back():
    data = DictData(image=torch.rand(2, 1, 4, 4), label=torch.arange(2))
    with says("holding back 0.1 of 2 images leaves a class none to train on"): hold_back(data, .1, 0)
    with says("fraction must lie strictly between 0 and 1"): hold_back(data, 1., 0)


def test_a_stream_of_one_task_has_no_forgetting():
    one = toy(1)
    found = run_stream(PLwF(), one, **SHORT)
    assert (found.metric("forgetting").isnan().all() and found.metric("ACC").isfinite().all()
            and found.metric("learning").isfinite().all())


def test_a_last_task_of_one_class():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = torch.arange(40) % 5
        uneven = TaskStream.from_arrays(torch.rand(40, 1, 8, 8), y, torch.rand(40, 1, 8, 8), y, increment=2)
    found = run_stream(PLwF(ce="local"), uneven, **SHORT)
    # one class: nothing to confuse it with
    assert uneven.bounds == (2, 4, 5) and found.accuracy("task")[0, 2, 2] == 1


# ---- settings of a run

@pytest.mark.parametrize("changes,text", [
    (dict(epochs=(1, 2)), "epochs = (1, 2): expected 1 value"),
    (dict(networks=()), "networks = (): expected 1 value"),
    (dict(streams=()), "at least one"), (dict(streams=("digits", "digits")), "none twice"),
    (dict(streams=("folder", "digits")), "'folder' stands alone"),
    (dict(streams=("mnist",)), "Did you mean 'mnist5k'?"),
    (dict(methods=("plwf+kredit",)), "Did you mean 'plwf+credit'?"),
    (dict(methods=(), local_methods=()), "nothing to train"), (dict(lams=(-1.,)), "outside 0 … ∞"),
    (dict(temperature=0.), "outside"), (dict(replicas=0), "outside 1 … ∞"),
    (dict(credit_mode="newest"), "unknown choice 'newest'"),
    (dict(lambda_=2.), "unknown plwf setting 'lambda_'"), (dict(kd=3), "kd = 3 is int, expected str")])
def test_settings_of_a_run(changes, text):
    with says(text, error=ConfigError): PlwfConfig.start("quick", **changes)


def test_an_increment_that_does_not_divide_the_classes_warns():
    config = PlwfConfig.start("quick", **QUICKEST).replace(increments=(3,))
    from visionbench.systems.plwf.plan import load_stream
    with pytest.warns(UserWarning): stream = load_stream(config, "digits")
    assert stream.bounds == (3, 6, 9, 10)


def test_folders_without_pictures(tmp_path):
    config = PlwfConfig.start("paper", out=str(tmp_path / "runs"), data=str(tmp_path), device="cpu",
                              limit_batches=1)
    with pytest.raises((FileNotFoundError, ValueError)): fit(config)
    run = Run.open(tmp_path / "runs" / "plwf" / config.name)
    assert (run.state == "failed" and str(tmp_path) in run.status["reason"]
            and not [*run.path.rglob("*.safetensors")])


# ---- run folders

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fit(PlwfConfig.start("quick", out=str(tmp_path_factory.mktemp("runs")), **QUICKEST))


def test_a_dry_run_proves_no_claim(run):
    assert (run.state == "done" and all(c["holds"] is None for c in run.claims if c["name"] != "quick_time")
            and len(run.claims) == len(CLAIMS))


def test_members_that_are_not_there(run):
    with says("no networks of 'digits-seen-lwf-1'", "digits-seen-fine-tune, digits-seen-plwf-1",
              error=RunError):
        member_snapshots(run, "digits-seen-lwf-1")
    with says("no stream 'glyphs', only digits", error=RunError): run_stream_of(run, "glyphs")


def test_runs_of_another_system_or_version(run, tmp_path):
    for change, text in ((dict(system="backdoor"), "is a run of 'backdoor', expected 'plwf'"),
                         (dict(lambda_=1), "does not know: lambda_")):
        (tmp_path / "settings.json").write_text(json.dumps(run.settings | change))
        with says(text, error=RunError): Run.open(tmp_path).settings_as(PlwfConfig)


def test_a_damaged_snapshot_is_refused(run, tmp_path):
    import shutil
    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy)
    victim, content = max((copy / "checkpoints" / "digits-seen-plwf-1").glob("task-*.safetensors")), None
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(Exception, match="damaged|digest"): networks(Run.open(copy))


def test_a_member_that_did_not_end_is_trained_anew(run, tmp_path):
    """Snapshots without the file that a finished member leaves are of an attempt that was cut short."""
    config = PlwfConfig.start("quick", out=str(tmp_path), **QUICKEST)
    folder = tmp_path / "plwf" / config.name / "checkpoints" / "digits-seen-plwf-1"
    folder.mkdir(parents=True)
    (folder / "task-000.safetensors").write_bytes(b"half a file")
    again = fit(config)
    rows = [r.metrics.query("stage == 'evaluate'").reset_index(drop=True) for r in (run, again)]
    assert rows[0].equals(rows[1]) and len([*folder.glob("*.safetensors")]) == 5


def test_a_search_in_a_run_is_written_down(tmp_path):
    config = PlwfConfig.start("quick", out=str(tmp_path),
                              **QUICKEST | dict(search_lambda=True, methods=("plwf",)))
    rows = fit(config).metrics.query("stage == 'search'")
    assert ({*rows.task} == {1, 2, 3, 4} and rows.value.max() == 10.
            and {"accuracy", "fine_tuning", "accepted"} <= {*rows})


def test_abstract_methods_say_what_is_missing():
    from visionbench.systems.plwf.penalties import Anchored
    anchored = Anchored(1.)
    anchored.begin(Stage(0, (2,), growing_net("mlp", (1, 4, 4), 2).grow(2),
                         DictData(image=torch.rand(2, 1, 4, 4), label=torch.arange(2)),
                         Snapshots(lambda c: None)))
    with says("Anchored does not define measure", error=NotImplementedError): anchored.end()
