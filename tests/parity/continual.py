"""Continual-learning metrics against hand computation, loops like the definitions, and peers' formulas."""
import numpy as np
import pytest
import torch

from visionbench.metrics.classify import accuracy
from visionbench.metrics.continual import (accuracy_matrix, average_accuracy, average_incremental_accuracy,
                                           backward_transfer, forgetting, forward_transfer, intransigence,
                                           learning_accuracy, stability, stage_accuracies)

NAN = float("nan")
# after task 0: .9 · after task 1: .5 (task 0), .8 · after task 2: .7, .6, .95; every metric below by hand
HAND = np.array([[.9, NAN, NAN], [.5, .8, NAN], [.7, .6, .95]])


def stream(T=5, S=None, seed=0):
    """Random lower triangles, NaN above."""
    rng = np.random.default_rng(seed)
    A = rng.uniform(size=(*([S] if S else []), T, T))
    A[..., np.triu(np.ones((T, T), bool), 1)] = NAN
    return A


def test_a_matrix_by_hand():
    assert average_accuracy(HAND) == pytest.approx(.75)
    assert learning_accuracy(HAND) == pytest.approx((.9 + .8 + .95) / 3)
    assert backward_transfer(HAND) == pytest.approx((-.2 - .2) / 2)
    assert forgetting(HAND, "max") == pytest.approx((.2 + .2) / 2)
    assert forgetting(HAND, "max", per_task=True) == pytest.approx([.2, .2])
    assert stability(HAND) == pytest.approx(.8)
    assert intransigence(HAND, [1, 1, .95]) == pytest.approx((.1 + .2 + 0) / 3)
    assert average_incremental_accuracy(HAND) == pytest.approx((.9 + .65 + .75) / 3)
    assert average_incremental_accuracy(HAND, [10, 30, 60]) == pytest.approx(
        (.9 + (5 + 24) / 40 + (7 + 18 + 57) / 100) / 3)
    ahead = HAND.copy()
    ahead[0, 1], ahead[1, 2] = .55, .4
    assert forward_transfer(ahead, [.1, .5, .5]) == pytest.approx((.05 - .1) / 2)


def test_the_three_definitions_of_forgetting_differ_as_published():
    """Task 0: learned .5, best .9 in between, .8 at last; task 1 is best in the last row."""
    A = np.array([[.5, NAN, NAN, NAN], [.9, .6, NAN, NAN], [.7, .5, .8, NAN], [.8, .7, .6, .9]])
    assert forgetting(A, "max", True) == pytest.approx([.1, -.1, .2])
    assert forgetting(A, "first", True) == pytest.approx([-.3, -.1, .2])
    assert forgetting(A, "max_all", True) == pytest.approx([.1, 0, .2])
    assert forgetting(A, "first") == -backward_transfer(A)


def test_definitions_against_loops():
    for seed in range(20):
        A = stream(seed=seed)
        T = len(A)
        chaudhry = [max(A[l, i] for l in range(i, T - 1)) - A[T - 1, i] for i in range(T - 1)]
        mammoth = [max(A[l, i] if l >= i else 0 for l in range(T)) - A[T - 1, i] for i in range(T - 1)]
        avalanche = [A[i, i] - A[T - 1, i] for i in range(T - 1)]
        for name, loop in (("max", chaudhry), ("max_all", mammoth), ("first", avalanche)):
            assert (forgetting(A, name, True) == pytest.approx(loop)
                    and forgetting(A, name) == pytest.approx(np.mean(loop)))
        assert forgetting(A, "max_all", True).min() >= 0


def test_never_rising_accuracies_give_bwt_of_minus_forgetting():
    A = -np.sort(-stream(6, S=50), axis=-2)  # each column falls; NaN sort last, so put them back on top
    for a in A:
        for i in range(6):
            a[:, i] = np.r_[[NAN] * i, a[:6 - i, i]]
    for name in ("max", "first", "max_all"):
        assert forgetting(A, name) == pytest.approx(-backward_transfer(A)) and (forgetting(A, name) > 0).all()


def test_the_last_task_and_the_last_row_are_where_they_belong():
    """Off by one: the maximum stops before the last row, the mean before the last task."""
    A = stream(4)
    up, last = A.copy(), A.copy()
    up[3, :3], last[3, 3] = 1, 0
    assert forgetting(up) == pytest.approx(np.mean([A[i:3, i].max() for i in range(3)]) - 1)
    assert forgetting(last) == forgetting(A) and average_accuracy(last) != average_accuracy(A)
    two = np.array([[.9, NAN], [.4, .8]])
    assert forgetting(two) == pytest.approx(.5) and backward_transfer(two) == pytest.approx(-.5)


def test_what_stands_above_the_diagonal_does_not_count():
    A = stream(5)
    full = np.where(np.isnan(A), 1., A)
    for metric in (average_accuracy, average_incremental_accuracy, backward_transfer, forgetting,
                   learning_accuracy, stability, lambda a: forgetting(a, "max_all"),
                   lambda a: intransigence(a, .9)):
        assert metric(full) == metric(A)


def test_seeds_are_a_leading_axis_and_torch_gives_torch():
    A = stream(4, S=3)
    joint = np.random.default_rng(1).uniform(size=(3, 4))
    ahead = np.where(np.isnan(A), .3, A)
    cases = [(average_accuracy,), (average_incremental_accuracy, [1, 2, 3, 4]), (backward_transfer,),
             (forgetting,), (learning_accuracy,), (stability, "first"), (intransigence, joint)]
    for f, *args in cases:
        per = [f(a, *(x[i] if x is joint else x for x in args)) for i, a in enumerate(A)]
        assert f(A, *args) == pytest.approx(np.array(per))
        out = f(torch.from_numpy(A), *args)
        assert (isinstance(out, torch.Tensor) and out.dtype == torch.float64
                and out.tolist() == pytest.approx(per))
    assert forward_transfer(ahead, joint) == pytest.approx([forward_transfer(a, j)
                                                            for a, j in zip(ahead, joint)])
    assert forgetting(torch.from_numpy(A).float(), per_task=True).shape == (3, 3)


def test_one_task_has_an_accuracy_but_nothing_to_forget():
    A = np.array([[.8]])
    assert average_accuracy(A) == average_incremental_accuracy(A, [7]) == learning_accuracy(A) == .8
    assert intransigence(A, .9) == pytest.approx(.1)
    for f in (forgetting, backward_transfer, stability, lambda a: forward_transfer(a, 0)):
        with pytest.raises(ValueError, match="T=1 tasks: forgetting and transfer need at least 2"):
            f(A)


def test_stages_against_a_loop_over_images():
    rng, bounds = np.random.default_rng(0), (3, 4, 7)
    label = rng.integers(0, 7, 200)
    task = np.searchsorted(bounds, label, side="right")
    stages = [rng.normal(size=(200, c)) for c in bounds]
    A = {kind: accuracy_matrix(stages, label, bounds, kind) for kind in ("task", "class")}
    for t, z in enumerate(stages):
        for i in range(t + 1):
            mine = np.flatnonzero(task == i)
            first = (0, *bounds)[i]
            blocked = np.mean([first + np.argmax(z[n, first:bounds[i]]) == label[n] for n in mine])
            free = np.mean([np.argmax(z[n]) == label[n] for n in mine])
            assert A["task"][t, i] == blocked and A["class"][t, i] == free
    assert (np.isnan(A["task"][np.triu_indices(3, 1)]).all()
            and (A["task"] >= A["class"])[np.tril_indices(3)].all())


def test_class_incremental_average_is_the_plain_accuracy_on_all_images_seen():
    rng, bounds = torch.Generator().manual_seed(0), (2, 6, 9)
    label = torch.randint(9, (300,), generator=rng)
    stages = [torch.randn(300, c, generator=rng) for c in bounds]
    A = accuracy_matrix(stages, label, bounds, "class")
    counts = [int(((label >= a) & (label < b)).sum()) for a, b in zip((0, *bounds), bounds)]
    plain = [accuracy(z[label < c], label[label < c]) for z, c in zip(stages, bounds)]
    assert average_incremental_accuracy(A, counts) == pytest.approx(torch.stack(plain).mean().item())


def test_a_wide_head_is_read_up_to_the_classes_seen():
    """Logits of classes to come must not win: the same rows with the head cut or left wide."""
    rng, bounds = torch.Generator().manual_seed(1), (2, 5, 6)
    label = torch.arange(6).repeat(20)
    wide = [torch.randn(120, 6, generator=rng) + 5 * (torch.arange(6) >= c) for c in bounds]
    for kind in ("task", "class"):
        cut = accuracy_matrix([z[:, :c] for z, c in zip(wide, bounds)], label, bounds, kind)
        assert torch.equal(cut.nan_to_num(-1), accuracy_matrix(wide, label, bounds, kind).nan_to_num(-1))
    assert torch.equal(stage_accuracies(wide[1][:, :5], label, bounds)[:2], cut[1, :2])


def test_scores_ahead_are_for_forward_transfer():
    bounds, label = (2, 4, 6), torch.arange(6).repeat(4)
    # always right, even before learning
    wide = [torch.nn.functional.one_hot(label, 6).double() for _ in bounds]
    rows = [stage_accuracies(z, label, bounds, "task", stage=t, ahead=True) for t, z in enumerate(wide)]
    A = torch.stack(rows)
    assert forward_transfer(A, [.5, .5, .5]) == .5 and A.isnan().sum() == 0
    with pytest.raises(ValueError, match=r"A\[i-1,i\] holds NaN: score every stage with ahead=True"):
        forward_transfer(accuracy_matrix(wide, label, bounds, "task"), .5)


def test_half_precision_logits_are_read():
    logits = torch.eye(4)[:, :4]
    for dtype in (torch.bfloat16, torch.float16):
        assert stage_accuracies(logits.to(dtype), torch.arange(4), (2, 4)).tolist() == [1, 1]


@pytest.mark.parametrize("call,message", [
    (lambda: average_accuracy(np.ones((2, 3))), r"shape \(2, 3\), expected \(T,T\)"),
    (lambda: average_accuracy([.5]), r"shape \(1,\)"),
    (lambda: average_accuracy(100 * HAND), r"50 … 95 on or below the diagonal, expected fractions"),
    (lambda: forgetting(np.full((2, 2), NAN)), "nan … nan on or below"),
    (lambda: forgetting(HAND.T), "nan"),
    (lambda: forgetting(HAND, "last"), r"definition='last': expected one of \['max', 'max_all', 'first'\]"),
    (lambda: average_incremental_accuracy(HAND, [1, 2]), "expected 3 positive numbers"),
    (lambda: average_incremental_accuracy(HAND, [1, 0, 2]), "expected 3 positive numbers"),
    (lambda: intransigence(HAND, 95), "fractions"),
])
def test_matrices_that_are_none_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


LABEL = np.array([0, 1, 2, 3])


@pytest.mark.parametrize("call,message", [
    (lambda z: stage_accuracies(z, LABEL, (2, 4), "TIL"), "kind='TIL': expected 'task' or 'class'"),
    (lambda z: stage_accuracies(z, LABEL, (2, 2)), r"bounds=\[2, 2\]: expected class counts that rise"),
    (lambda z: stage_accuracies(z, LABEL, (0, 4)), r"bounds=\[0, 4\]"),
    (lambda z: stage_accuracies(z, LABEL, ()), r"bounds=\[\]"),
    (lambda z: stage_accuracies(z[:, :3], LABEL, (2, 4)),
     r"3 logits end no task of bounds=\[2, 4\]; give the stage"),
    (lambda z: stage_accuracies(z[:, :3], LABEL, (2, 4), stage=1), "stage=1 with 3 logits"),
    (lambda z: stage_accuracies(z, LABEL, (2, 4), stage=2), "stage=2 with 4 logits: expected 0 … 1"),
    (lambda z: stage_accuracies(z, LABEL + 1, (2, 4)), "labels 1 … 4: expected 0 … 3"),
    (lambda z: stage_accuracies(z, LABEL[:3], (2, 4)), r"logits \(4, 4\) and labels \(3,\)"),
    (lambda z: stage_accuracies(z, LABEL / 1, (2, 4)), "float64: expected .* integers"),
    (lambda z: stage_accuracies(z, LABEL % 2, (2, 4)),
     "task 1 was learned by stage 1, but has no test image"),
    (lambda z: stage_accuracies(z * NAN, LABEL, (2, 4)), "stage 1: 4 of 4 rows of logits hold NaN"),
    (lambda z: stage_accuracies(z, LABEL, (2, 4), "class", ahead=True), "ahead=True needs kind='task'"),
    (lambda z: accuracy_matrix([z], LABEL, (2, 4)), "1 stages of logits for 2 tasks"),
])
def test_logits_that_fit_no_stage_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.ones((4, 4)))
