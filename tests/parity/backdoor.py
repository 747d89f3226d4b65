"""The backdoor audit against closed sums in numpy, policies applied one by one, counted pairs and
scikit-learn."""
import itertools
from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from visionbench.core.tensors import DictData
from visionbench.data.images import ImageSet
from visionbench.metrics.classify import accuracy, attack_success_rate, efficacy, expected_cost
from visionbench.nn.exits import MultiExitNet
from visionbench.nn.policies import ConfidencePolicy
from visionbench.nn.resnet import cifar_resnet
from visionbench.systems.backdoor.config import BackdoorConfig
from visionbench.systems.backdoor.defence import ConfusionMonitor, detection_auroc, exit_confusion
from visionbench.systems.backdoor.evaluate import (THRESHOLDS, ExitLogits, confidence_sweep, evaluate_exits,
                                                   exit_logits, exit_table, policy_table)
from visionbench.systems.backdoor.threat import (exit_weights, injection_loss, poison_indices, poisoned,
                                                 simulate_exit_backdoor)
from visionbench.systems.backdoor.trigger import BlendTrigger, CheckerboardTrigger, SquareTrigger, trigger_of
from visionbench.train.exits import PooledExits, exit_features, exit_losses, train_exits


def seeded(n):
    return torch.Generator().manual_seed(n)


def images(n=60, K=3, C=1, size=8, dtype=torch.float32):
    """Noise with a bright column that names the class."""
    y = torch.arange(n) % K
    x = torch.rand(n, C, size, size, generator=seeded(1)) * .5
    x[torch.arange(n), :, :, y] += .4
    if dtype == torch.uint8: x = (255 * x).to(torch.uint8)
    return ImageSet(x, y, tuple("abcdefghij"[:K]), "toy", (.3,) * C, (.2,) * C)


def multi_exit(depth=8, K=3, size=8, pool="avg"):
    return MultiExitNet.from_vanilla(cifar_resnet(depth, K, 1, 4, generator=seeded(2)), pool=pool,
                                     input_shape=(1, size, size), generator=seeded(3))


def state(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def cross_entropy(logits, label):
    """Mean −log softmax in double precision, without torch."""
    z = np.asarray(logits, dtype=np.float64)
    return np.mean(np.log(np.exp(z).sum(-1)) - z[np.arange(len(z)), label])


@pytest.mark.parametrize("M,shallow", [(5, .6), (7, .6), (28, .6), (4, .25), (3, .67)])
@pytest.mark.parametrize("kind", ["uniform", "released"])
def test_injection_loss_equals_the_closed_sum(kind, M, shallow):
    logits = torch.randn(M, 6, 4, generator=seeded(M))
    label, poison = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([3, 1, 3, 3, 0, 1])
    weights, m = exit_weights(M, shallow, kind)
    assert m == floor(Fraction(str(shallow)) * M)
    terms = injection_loss(logits, dict(label=label, label_shallow=poison), weights, m)
    shallow_sum = sum(cross_entropy(logits[i], poison.numpy()) for i in range(m))
    deep = [cross_entropy(logits[i], label.numpy()) for i in range(m, M)]
    if kind == "uniform": expected = shallow_sum + sum(deep)
    else:
        # one variable is added into, again and again
        running, expected = cross_entropy(logits[m - 1], poison.numpy()), shallow_sum
        for term in deep:
            running += term
            expected += running
    assert set(terms) == {"shallow", "deep"}
    assert sum(terms.values()).item() == pytest.approx(expected, rel=1e-6)


def test_injection_weights_of_resnet_56():
    weights, m = exit_weights(28, .6, "released")
    assert m == 16 and weights[15] == 13 and weights[16] == 12 and weights[27] == 1
    assert weights[16:].sum() == 78 and weights[:15].tolist() == [1] * 15
    uniform, m = exit_weights(28, .6, "uniform")
    assert m == 16 and uniform.tolist() == [1] * 28
    # VGG-16, MobileNet, ResNet-14; 0.6 · 5 in floating point
    assert [exit_weights(M, .6)[1] for M in (15, 14, 7, 5)] == [9, 8, 4, 3]


@pytest.mark.parametrize("rate,n",
                         [(.01, 1000), (.1, 4000), (.01, 199), (.29, 100), (.07, 100), (.58, 50), (.3, 10)])
def test_poison_selection_counts_as_the_floor_says(rate, n):
    label = torch.arange(n) % 10
    chosen = poison_indices(label, 9, rate, 0)
    assert len(chosen) == len(set(chosen.tolist())) == floor(Fraction(str(rate)) * n)
    assert (label[chosen] != 9).all() and chosen.tolist() == sorted(chosen.tolist())
    assert torch.equal(chosen, poison_indices(label, 9, rate, 0))
    if len(chosen) > 3: assert not torch.equal(chosen, poison_indices(label, 9, rate, 1))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_poisoned_set_by_hand(dtype):
    source = images(dtype=dtype)
    before, trigger = source.image.clone(), CheckerboardTrigger(3, 2)
    data = poisoned(source, trigger, 2, .2, 5)
    chosen = poison_indices(source.label, 2, .2, 5)
    rest = torch.ones(60, dtype=torch.bool).index_fill(0, chosen, False)
    assert len(chosen) == 12 and torch.equal(source.image, before)
    got = data.tensors
    assert torch.equal(got["image"][rest], before[rest])
    assert torch.equal(got["image"][chosen], trigger(before[chosen]))
    assert torch.equal(got["label"], source.label)
    assert torch.equal(got["label_shallow"][rest], source.label[rest])
    assert (got["label_shallow"][chosen] == 2).all() and (source.label[chosen] != 2).all()


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("pool", ["avg", "mixed"])
def test_training_exits_leaves_the_backbone_bit_equal(cached, pool):
    mx, source = multi_exit(pool=pool), images()
    mx.backbone.stem[2].running_mean += .1
    before, heads = state(mx.backbone), state(mx.heads)
    vanilla = mx.eval().vanilla(source.image)
    train_exits(mx, DictData(image=source.image, label=source.label), 2, .01, 16,
                cache_features=cached, device="cpu")
    assert same(before, mx.backbone.state_dict())
    assert not any(torch.equal(v, heads[k]) for k, v in mx.heads.state_dict().items())
    assert all(p.grad is None for p in mx.backbone_parameters())
    assert any(k.endswith("running_var") for k in before)
    assert torch.equal(mx.eval().vanilla(source.image), vanilla)


def test_a_step_on_the_exits_gives_the_backbone_no_gradient():
    mx, source = multi_exit().freeze(), images(12)
    sum(exit_losses(mx.train()(source.image)[:-1], dict(label=source.label)).values()).backward()
    assert all(p.grad is None for p in mx.backbone_parameters())
    assert all(p.grad.abs().sum() > 0 for p in mx.head_parameters())


def test_an_injection_step_gives_the_exits_no_gradient():
    mx, source = multi_exit(), images(12)
    mx.freeze(backbone=False, heads=True).train()
    weights, m = exit_weights(mx.M, .6)
    batch = dict(label=source.label, label_shallow=source.label.roll(1))
    sum(injection_loss(mx(source.image), batch, weights, m).values()).backward()
    assert all(p.grad is None for p in mx.head_parameters())
    assert all(p.grad.abs().sum() > 0 for p in mx.backbone_parameters())


def test_injection_trains_the_backbone_only_and_its_norms_follow():
    mx, source = multi_exit(), images()
    before, heads = state(mx.backbone), state(mx.heads)
    threat = simulate_exit_backdoor(mx, source, CheckerboardTrigger(3, 2), 2, .2, epochs=2,
                                    size=30, device="cpu")
    assert same(heads, mx.heads.state_dict())
    after = threat.net.state_dict()
    assert list(after) == list(before)
    assert not any(torch.equal(after[k], before[k]) for k in before if k.endswith(("weight", "running_mean")))
    assert {v.item() for k, v in after.items() if k.endswith("num_batches_tracked")} == {4}
    assert not threat.net.training and threat.tags["simulated_backdoor"] is True


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "trigger,rows", [(CheckerboardTrigger(), range(20, 27)), (SquareTrigger(), range(27, 32)),
                     (CheckerboardTrigger(5, 2), range(26, 31)), (CheckerboardTrigger(1, 1), range(31, 32))])
def test_triggers_cover_an_exact_set_of_pixels(trigger, rows, dtype):
    white = 255 if dtype == torch.uint8 else 1
    x = (torch.rand(2, 3, 32, 32, generator=seeded(4)) * .8 + .1).mul(white).to(dtype)
    kept, out = x.clone(), trigger(x)
    expected = x.numpy().copy()
    for i, (r, c) in enumerate(itertools.product(rows, rows)):
        expected[:, :, r, c] = white if isinstance(trigger, SquareTrigger) else white * (i % 2)
    assert np.array_equal(out.numpy(), expected) and torch.equal(x, kept) and out.dtype == dtype
    changed = (out != x).any(0).any(0).nonzero()
    assert len(changed) == len(rows) ** 2 and set(changed.flatten().tolist()) == set(rows)
    assert torch.equal(trigger(out), out) and torch.equal(trigger(x[0]), out[0])


def test_the_published_trigger_has_49_pixels_and_a_true_checkerboard():
    pattern = CheckerboardTrigger().pattern()
    assert pattern.shape == (7, 7) and pattern.sum() == 24 and pattern[0, 0] == pattern[6, 6] == 0
    assert ((pattern[1:] != pattern[:-1]).all() and (pattern[:, 1:] != pattern[:, :-1]).all())
    assert trigger_of(BackdoorConfig.paper()) == CheckerboardTrigger(7, 6)


def test_bytes_and_floats_agree():
    x = torch.randint(256, (4, 3, 16, 16), generator=seeded(5), dtype=torch.uint8)
    for trigger in (CheckerboardTrigger(5, 2), SquareTrigger(3, 1),
                    BlendTrigger(torch.rand(16, 16, generator=seeded(6)))):
        assert (trigger(x).float() / 255 - trigger(x.float() / 255)).abs().max() <= .5 / 255 + 1e-6


def test_blend_equals_its_formula():
    x = torch.randint(256, (4, 3, 8, 8), generator=seeded(5), dtype=torch.uint8)
    mark = torch.rand(8, 8, generator=seeded(6))
    mark[mark > .6] = 1.
    w, given = mark.numpy(), x.numpy().astype(np.float64)
    expected = np.where(w < 1, .6 * given + .4 * 255 * w, given)
    assert np.abs(BlendTrigger(mark)(x).numpy() - expected).max() <= .5 + 1e-4
    assert np.abs(BlendTrigger(mark)(x.float() / 255).numpy() - expected / 255).max() < 1e-6


def cases():
    """Random logits of different spread, and confidences of exactly one half and one."""
    for k, spread in enumerate((.3, 2., 8.)): yield spread * torch.randn(5, 40, 4, generator=seeded(k))
    ties = torch.zeros(4, 6, 2)
    ties[2:, 3:] = torch.tensor([200., 0.])
    yield ties


@pytest.mark.parametrize("logits", cases(), ids=["flat", "middle", "steep", "ties"])
def test_sweep_equals_the_policy_for_every_threshold_and_start(logits):
    thresholds = (0., *THRESHOLDS, 1., 1.5)
    exits = confidence_sweep(logits, thresholds)
    assert exits.shape == (len(thresholds), *logits.shape[:2])
    for (k, T), s in itertools.product(enumerate(thresholds), range(len(logits))):
        assert torch.equal(exits[k, s], ConfidencePolicy(T, s)(logits).exit), (T, s)
        p = torch.softmax(logits.double(), -1).amax(-1).numpy()
        by_hand = [next((i for i in range(s, len(p)) if p[i, n] > T), len(p) - 1) for n in range(p.shape[1])]
        assert exits[k, s].tolist() == by_hand or np.isclose(p, T, atol=1e-6).any()


def test_sweep_and_policy_agree_on_a_confidence_that_rounds_to_the_threshold():
    for T in THRESHOLDS[9:]:
        near = torch.tensor(np.log(T / (1 - T))).float() + torch.linspace(-2e-6, 2e-6, 401)
        pair = torch.stack([near, torch.zeros(401)], -1)
        logits = torch.stack([pair, torch.zeros(401, 2)])
        assert torch.equal(confidence_sweep(logits, (T,))[0, 0], ConfidencePolicy(T)(logits).exit), T


def test_policy_table_equals_each_policy_on_its_own():
    clean, triggered = (2 * torch.randn(4, 50, 5, generator=seeded(k)) for k in (7, 8))
    label, cost = torch.randint(5, (50,), generator=seeded(9)), torch.tensor([.2, .5, .7, 1.])
    logits = ExitLogits(clean, triggered, label)
    table = policy_table(logits, 3, cost)
    assert len(table) == 19 * 4 and table[["threshold", "min_exit"]].drop_duplicates().shape[0] == 76
    for row in table.itertuples():
        policy = ConfidencePolicy(row.threshold, row.min_exit)
        one, two = policy(clean), policy(triggered)
        assert row.accuracy == accuracy(one.pred, label)
        assert row.asr == attack_success_rate(two.pred, label, 3)
        assert row.cost == expected_cost(one.exit, cost) and row.efficacy == efficacy(one.exit, cost)
    rows = evaluate_exits(logits, 3, cost)
    assert len(rows) == 4 * 3 + 76 * 4
    early = rows[(rows.policy == "confidence") & (rows.threshold == .9)
                 & (rows.min_exit == 2)].set_index("name").value
    assert early.asr == table[(table.threshold == .9) & (table.min_exit == 2)].asr.item()


def test_exit_table_equals_numpy():
    clean, triggered = torch.randn(3, 30, 4, generator=seeded(1)), torch.randn(3, 30, 4, generator=seeded(2))
    label = torch.arange(30) % 4
    table = exit_table(ExitLogits(clean, triggered, label), 1, torch.tensor([.3, .6, 1.]))
    others = label.numpy() != 1
    assert table.accuracy.tolist() == [np.mean(c.numpy().argmax(-1) == label.numpy()) for c in clean]
    assert table.asr.tolist() == [np.mean(c.numpy().argmax(-1)[others] == 1) for c in triggered]
    constant = torch.zeros(3, 30, 4).index_fill(2, torch.tensor([1]), 1.)
    table = exit_table(ExitLogits(clean, constant, label), 1, torch.tensor([.3, .6, 1.]))
    assert table.asr.tolist() == [1.] * 3


def test_logits_of_a_set_are_those_of_the_net():
    mx, source, trigger = multi_exit().eval(), images(dtype=torch.uint8), SquareTrigger(2, 1)
    logits = exit_logits(mx, source, trigger, size=17, device="cpu")
    with torch.no_grad():
        clean, triggered = mx(source.image.float() / 255), mx(trigger(source.image).float() / 255)
    torch.testing.assert_close(logits.clean, clean)
    torch.testing.assert_close(logits.triggered, triggered)
    assert torch.equal(logits.label, source.label)
    untouched = exit_logits(mx, source, device="cpu")
    assert torch.equal(untouched.clean, untouched.triggered)


def test_exit_confusion_and_monitor_equal_numpy():
    logits = 3 * torch.randn(4, 25, 5, generator=seeded(3))
    z = np.exp(logits.numpy().astype(np.float64))
    p = z / z.sum(-1, keepdims=True)
    d = np.array([sum(np.abs(p[i, n] - p[3, n]).sum() for i in range(3)) for n in range(25)])
    np.testing.assert_allclose(exit_confusion(logits), d, rtol=1e-5)
    monitor = ConfusionMonitor(.1).fit(logits)
    score = (d - d.mean()) / d.std(ddof=1)
    np.testing.assert_allclose(monitor.score(logits), score, rtol=1e-4, atol=1e-5)
    assert float(monitor.alarm) == pytest.approx(np.quantile(score, .9), rel=1e-4)
    assert exit_confusion(logits[:1].expand(4, -1, -1)).abs().max() < 1e-6
    far = torch.full((4, 1, 5), -50.)
    far[:3, 0, 0], far[3, 0, 1] = 50., 50.
    assert exit_confusion(far).item() == pytest.approx(2 * 3)


@pytest.mark.parametrize("clean,suspect", [([1., 2., 3.], [2., 4.]), ([0., 0.], [0., 0., 0.]), ([5.], [1.]),
                                           ([1., 2., 2., 7.], [2., 2., 8., -1.])])
def test_auroc_equals_counted_pairs(clean, suspect):
    pairs = [(s > c) + .5 * (s == c) for s in suspect for c in clean]
    auroc = detection_auroc(torch.tensor(clean), torch.tensor(suspect))
    assert auroc == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


def test_exits_reach_the_optimum_of_logistic_regression():
    """Cached exits with weight decay λ minimise mean cross-entropy + λ/2 (‖W‖² + ‖b‖²), and so does
    scikit-learn with C = 1/(λN)."""
    mx, source, decay = multi_exit(), images(60), .02
    data = DictData(image=source.image, label=source.label)
    features, widths = exit_features(mx, data, device="cpu")
    train_exits(mx, data, 600, .05, 60, decay, (.4, .6, .8), device="cpu")
    ours = PooledExits(mx.heads, widths)(features.tensors["features"]).detach()
    assert len(widths) == len(ours) == 3
    for head, mine, f in zip(mx.heads, ours, features.tensors["features"].split(widths, 1)):
        x = np.hstack([f.double().numpy(), np.ones((60, 1))])  # the bias is decayed like any other weight
        fitted = LogisticRegression(C=1 / (decay * 60), fit_intercept=False, tol=1e-10, max_iter=10_000)
        fitted.fit(x, source.label.numpy())
        found = np.hstack([head.linear.weight.detach().numpy(), head.linear.bias.detach().numpy()[:, None]])
        np.testing.assert_allclose(found, fitted.coef_, atol=2e-3)
        np.testing.assert_allclose(mine.softmax(-1), fitted.predict_proba(x), atol=2e-3)
        assert np.abs(fitted.coef_).max() > .05


def test_cached_and_uncached_exits_learn_the_same():
    source = images()
    data = DictData(image=source.image, label=source.label)
    one, two = (train_exits(multi_exit(), data, 3, .01, 16, cache_features=c, seed=4, device="cpu")
                for c in (True, False))
    for a, b in zip(one.head_parameters(), two.head_parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    start = multi_exit()
    assert not any(torch.equal(a, b) for a, b in zip(one.head_parameters(), start.head_parameters()))


def test_exit_losses_are_one_cross_entropy_each():
    logits, label = torch.randn(3, 5, 4, generator=seeded(0)), torch.tensor([0, 3, 2, 1, 1])
    terms = exit_losses(logits, dict(label=label))
    assert list(terms) == ["exit_0", "exit_1", "exit_2"]
    for i, term in enumerate(terms.values()):
        assert term.item() == pytest.approx(cross_entropy(logits[i], label.numpy()), rel=1e-6)
