"""Bad input to teachers and credit assignment: the message says what was given and what was expected."""
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from visionbench.core.tensors import DictData, batches
from visionbench.systems.plwf.collapse import SoftTargets, softmax_spans
from visionbench.systems.plwf.credit import CreditAssignment, CreditAssignmentCB, project
from visionbench.systems.plwf.roster import stack_teachers, teacher_set, teacher_weights, use_cache
from visionbench.systems.plwf.snapshots import Snapshots
from visionbench.systems.plwf.teachers import KnowledgeSpace
from visionbench.train.checkpoint import CheckpointError
from visionbench.train.learner import Learner, NonFiniteLoss

NAN, INF = float("nan"), float("inf")
X = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def build(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, classes))


def says(text, error=ValueError):
    return pytest.raises(error, match=re.escape(text))


def space(**changes):
    return KnowledgeSpace(**{"snapshots": [build(2), build(4)], "bounds": (2, 4, 6), **changes})


@pytest.mark.parametrize("teachers,text", [
    ("lwf", "teachers='lwf', expected all, last, first_last, own, a number ≥ 0 or task ids"),
    ("", "teachers=''"), (-1, "teachers=-1"), (True, "teachers=True"), (None, "teachers=None"),
    (1.5, "teachers=1.5"), ([0, 1.], "teachers=[0, 1.0]"), ([True], "teachers=[True]"),
    ([0, 4], "teachers=[0, 4] names task 4, which teaches no later task: of 5 tasks, those below 4 do"),
    ([7], "names task 7"), ([-1], "names task -1"), ([1, 1], "teachers=[1, 1] names a task twice")])
def test_teachers_that_cannot_be(teachers, text):
    with says(text): teacher_set(teachers, 3, total=5)


def test_a_task_still_to_come_joins_later():
    assert [teacher_set([0, 2], t, total=5) for t in range(5)] == [(), (0,), (0,), (0, 2), (0, 2)]
    assert [teacher_set(3, t) for t in range(5)] == [(), (0,), (0, 1), (0, 1, 2), (1, 2, 3)]
    assert teacher_set(0, 4) == teacher_set([], 4) == () and teacher_set("first_last", 2) == (0, 1)


@pytest.mark.parametrize("weights,text", [
    ("max", "weights='max' given, expected mean, sum or one number per task"),
    ([.5], "1 weights given, task 1 teaches too: expected one per task"),
    ([1, -1], "weights=[1, -1] given, expected finite ones ≥ 0"), ([1, NAN], "weights=[1, nan]"),
    ([INF, 1], "weights=[inf, 1]")])
def test_weights_that_do_not_fit(weights, text):
    with says(text): teacher_weights(weights, (0, 1))
    with says(text): space(weights=weights)


@pytest.mark.parametrize("changes,text", [
    (dict(temperature=0), "temperature=0 given, expected τ > 0"), (dict(temperature=-2.), "temperature=-2.0"),
    (dict(temperature=NAN), "temperature=nan"), (dict(temperature=INF), "temperature=inf"),
    (dict(kd="multi"), "kd='multi' given, expected one of joint, per_task, own"),
    (dict(teacher_forward="gpu"), "teacher_forward='gpu' given, expected auto, loop or vmap"),
    (dict(bounds=(2,)), "bounds=(2,) given with 2 snapshots, expected rising class counts, one per task"),
    (dict(bounds=(4, 2)), "bounds=(4, 2) given"), (dict(bounds=(0, 2)), "bounds=(0, 2) given"),
    (dict(bounds=(2, 2, 4)), "bounds=(2, 2, 4)"),
    (dict(teachers="previous"), "teachers='previous'")])
def test_a_space_with_senseless_settings(changes, text):
    with says(text): space(**changes)


def test_a_head_form_that_does_not_exist():
    with says("kd='sum' given"): softmax_spans("sum", (2, 4), 0)


def test_random_augmentation_and_kept_answers():
    with says("cache='always' with random augmentation: "
              "the teachers would have seen other images than the student"):
        use_cache("always", True)
    with says("cache='yes' given, expected auto, always or never"): use_cache("yes", False)
    assert not use_cache("auto", True) and use_cache("auto", False) and not use_cache("never", False)


def test_a_teacher_that_knows_too_few_classes():
    few = space(bounds=(2, 5, 7))
    with says("teacher 1 gave logits (6, 4), expected (B,≥5)"): few.prepare(X)
    with says("teacher 1 gave logits (6, 4), expected (B,≥5)"): few.online(X)


def test_a_teacher_that_answers_nan_is_named():
    nets = [build(2), build(4)]
    nn.init.constant_(nets[1][3].bias, NAN)
    with says("teacher 1 gives NaN or infinite logits"): space(snapshots=nets).prepare(X)


def test_a_teacher_that_answers_nan_online_stops_training():
    nets = [build(2)]
    nn.init.constant_(nets[0][3].bias, INF)
    ks, net = KnowledgeSpace(nets, (2, 4)), build(4)
    def loss(out, batch): return dict(new=out.square().mean(), distillation=ks.loss(out, ks.targets(batch)))
    learner = Learner(net, loss, batches(DictData(image=X), 3), torch.optim.SGD(net.parameters(), .1),
                      [CreditAssignmentCB()], device="cpu")
    with says("loss is not finite at step 0 (epoch 0, batch 0): distillation = ", NonFiniteLoss):
        learner.fit(1)


def test_targets_of_other_images_or_too_few_logits():
    ks = space()
    targets = ks.prepare(X)
    with says("logits (5, 6) and soft targets (6, 4) given, expected (B,≥4) and (B,4) or (B,2,4)"):
        ks.loss(torch.zeros(5, 6), targets)
    with says("logits (6, 3) and soft targets (6, 4) given"): ks.loss(torch.zeros(6, 3), targets)
    with says("logits (6,) and soft targets (6, 4) given"): ks.loss(torch.zeros(6), targets)
    with says("soft targets (6, 4) are added up, expected (B,K,c)"): ks.terms(torch.zeros(6, 6), targets)
    with says("soft targets (6, 3, 4)"):
        ks.terms(torch.zeros(6, 6), SoftTargets(torch.zeros(6, 3, 4), torch.zeros(6, 3)))


def test_nobody_teaches():
    for ks in (space(teachers=[]), space(teachers=0), KnowledgeSpace([], ()), KnowledgeSpace([], (2, 4))):
        logits = torch.zeros(6, 6, requires_grad=True)
        assert (len(ks) == ks.classes == 0 and ks.prepare(X).P.shape == (6, 0)
                and ks.online(X, separate=True).P.shape == (6, 0, 0))
        assert ks.loss(logits, ks.prepare(X)) == 0 and not ks.loss(logits, ks.prepare(X)).requires_grad
        assert ks.terms(logits, ks.prepare(X, separate=True)) == {}


def test_networks_that_cannot_be_stacked():
    other = nn.Sequential(nn.Flatten(), nn.Linear(16, 7), nn.ReLU(), nn.Linear(7, 4))
    with says("'1.weight' has shapes [(5, 16), (7, 16)], and only rows per class may differ; "
              "use teacher_forward='loop'"):
        stack_teachers([build(2), other], (2, 4))
    with says("not all teachers have '3.weight'; use teacher_forward='loop'"):
        stack_teachers([nn.Sequential(nn.Flatten(), nn.Linear(16, 5)), build(4)], (2, 4))
    with says("only rows per class may differ"):
        space(snapshots=[build(2), other], teacher_forward="vmap").online(X)
    assert space(snapshots=[build(2), other], teacher_forward="loop").online(X).P.shape == (6, 4)


# snapshots

def test_snapshots_of_the_wrong_kind(tmp_path):
    with says("snapshot dtype torch.float16 given, expected torch.bfloat16, float32 or float64"):
        Snapshots(build, dtype=torch.float16)
    s = Snapshots(build, tmp_path)
    for classes in (0, -1):
        with says(f"{classes} classes after a snapshot of 0: tasks add classes"): s.append(build(2), classes)
    s.append(build(2), 2)
    with says("2 classes after a snapshot of 2: tasks add classes"): s.append(build(2), 2)
    with says("the network has '3.weight' (4, 5), build(6) makes (6, 5)"): s.append(build(4), 6)
    with says("the network has '0.weight' (2, 16), build(4) makes None"):
        s.append(nn.Sequential(nn.Linear(16, 2)), 4)
    assert len(s) == 1 and len([*tmp_path.iterdir()]) == 1
    for i in (1, -2):
        with says(f"snapshot {i} asked for, there are 1", IndexError): s[i]
    assert len(s[:5]) == 1


def test_snapshots_of_other_settings_are_refused(tmp_path):
    Snapshots(build, tmp_path, signature="a").append(build(2), 2)
    with says("is of other settings ('a', expected 'b')", CheckpointError):
        Snapshots(build, tmp_path, signature="b")
    assert len(Snapshots(build, tmp_path, signature="a")) == 1


def test_a_missing_snapshot_is_named(tmp_path):
    s = Snapshots(build, tmp_path)
    for c in (2, 4, 6): s.append(build(c), c)
    s.path(1).unlink()
    with says("task-001.safetensors is missing", CheckpointError): Snapshots(build, tmp_path)
    with says("no checkpoint at", CheckpointError): s[1]


def test_a_damaged_or_exchanged_snapshot_is_refused(tmp_path):
    s = Snapshots(build, tmp_path)
    for c in (2, 4): s.append(build(c), c)
    whole = s.path(1).read_bytes()
    s.path(1).write_bytes(whole[:-20])
    with says("is damaged", CheckpointError): s[1]
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    s.path(1).write_bytes(bytes(flipped))
    with says("its content does not match its digest", CheckpointError): s[1]
    s.path(1).write_bytes(whole)
    assert s[1][3].out_features == 4
    shutil.copy(s.path(0), s.path(1))
    with says("changed after it was taken", CheckpointError): s[1]


def test_snapshots_of_another_network_are_refused(tmp_path):
    Snapshots(build, tmp_path).append(build(2), 2)
    other = Snapshots(lambda c: nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, c)),
                      tmp_path)
    with says("is of another network", CheckpointError): other[0]


# credit assignment

@pytest.mark.parametrize("bad,text", [
    (dict(mode="gem"), "mode='gem' given, expected one of off, new, old, both, per_teacher, pcgrad"),
    (dict(scope="tensor"), "scope='tensor' given, expected global or layer")])
def test_words_that_do_not_exist(bad, text):
    for make in (CreditAssignment, CreditAssignmentCB,
                 lambda **b: project(torch.ones(2), torch.ones(2), **b)):
        with says(text): make(**bad)


@pytest.mark.parametrize("new,old", [
    (torch.ones(3), torch.ones(4)), (torch.ones(3), torch.ones(2, 4)),
    ([torch.ones(3)], [torch.ones(3), torch.ones(1)]),
    ([torch.ones(3), torch.ones(2)], [torch.ones(2), torch.ones(3)]),
    ([torch.ones(3)], [[torch.ones(3)], [torch.ones(2)]]),
    (torch.ones(3), torch.ones(0, 3)), ([torch.ones(3)], [])])
def test_gradients_of_other_shapes(new, old):
    with says("expected the same ones"): project(new, old)


def test_intervals_that_make_no_sense():
    with says("every=0, layers_every=0 given, expected ≥ 1 and ≥ 0"): CreditAssignmentCB(every=0)
    with says("layers_every=-1"): CreditAssignmentCB(layers_every=-1)


def test_a_loss_without_the_learning_term():
    net = build(4)
    learner = Learner(net, lambda out, b: dict(plasticity=out.square().mean()), batches(DictData(image=X), 3),
                      torch.optim.SGD(net.parameters(), .1), [CreditAssignmentCB()], device="cpu")
    with says("loss terms plasticity given, expected 'new' among them"): learner.fit(1)
    assert not [p for p in net.parameters() if p.grad is not None]


def test_settings_cannot_be_changed_later():
    with pytest.raises(AttributeError): CreditAssignment().mode = "old"


def test_a_record_that_cannot_flush_is_enough():
    rows = []
    net = build(4)
    cb = CreditAssignmentCB(record=SimpleNamespace(log=lambda **row: rows.append(row)))
    Learner(net, lambda out, b: dict(new=out.square().mean(), keep=(out - 1).square().mean()),
            batches(DictData(image=X), 3), torch.optim.SGD(net.parameters(), .1), [cb], device="cpu").fit(1)
    assert [r["step"] for r in rows] == [0, 1] and cb.state_dict() == {} and cb.pending == []
