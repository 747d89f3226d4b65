"""Defences against closed forms, brute force, loops over classes, and reference libraries where they are
installed."""
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from visionbench.core.tensors import DictData, generator
from visionbench.nn.exits import MultiExitNet
from visionbench.nn.policies import ConfidencePolicy
from visionbench.nn.resnet import cifar_resnet
from visionbench.systems.backdoor.cleanse import CleanseCB, PatchInversion
from visionbench.systems.backdoor.defence import (
    ANP, CLP, DFTND, IBAU, ActivationClustering, FinePruning, FineTune, NeuralCleanse,
    SpectralSignature, Strip, anomaly_index, detection_auroc, hypergradient)
from visionbench.systems.backdoor.prune import conv_norm_pairs, lipschitz_bounds
from visionbench.systems.backdoor.tune import block_of, keep_channels
from visionbench.systems.backdoor.views import OutputView


class Rule(nn.Module):
    """A classifier without weights."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def forward(self, x): return self.rule(x)


def images(n, size=8, seed=0): return torch.rand(n, 1, size, size, generator=generator(seed, "images"))


def labelled(n=60, size=8, seed=0):
    return DictData(image=images(n, size, seed),
                    label=torch.randint(4, (n,), generator=generator(seed, "labels")))


def net(depth=8, width=4, seed=0):
    return cifar_resnet(depth, 4, 1, width, generator=generator(seed, "net")).eval()


def converted(**kw):
    return MultiExitNet.from_vanilla(net(**kw), input_shape=(1, 8, 8), generator=generator(0, "heads")).eval()


def state(module): return {k: v.clone() for k, v in module.state_dict().items()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# views

def test_views_equal_the_outputs_of_the_net():
    mx, x, policy = converted(), images(40), ConfidencePolicy(.4, fallback="max_conf")
    logits = mx(x)
    for i in range(mx.M - 1): assert torch.equal(OutputView.exit(mx, i)(x), logits[i])
    assert torch.equal(OutputView.vanilla(mx)(x), logits[-1])
    assert torch.equal(OutputView.policy(mx, policy)(x).argmax(1), policy(logits).pred)


def test_exit_views_skip_the_blocks_behind_them():
    mx, ran = converted(), []
    for i, block in enumerate(mx.backbone.blocks): block.register_forward_hook(lambda *_, i=i: ran.append(i))
    OutputView.exit(mx, 1)(images(2))
    assert ran == [0, 1]


# Neural Cleanse

def test_anomaly_index_by_hand():
    v = np.array([3., 9, 10, 11, 40])
    gap = v - np.median(v)
    assert np.allclose(anomaly_index(torch.tensor(v)), gap / (1.4826 * np.median(abs(gap))))
    assert anomaly_index(torch.full((7,), 3.3)).eq(0).all()


@pytest.mark.parametrize("view", [lambda mx: OutputView.vanilla(mx), lambda mx: OutputView.exit(mx, 1),
                                  lambda mx: OutputView.policy(mx, ConfidencePolicy(.3))])
def test_classes_in_one_batch_equal_the_loop_over_classes(view):
    mx, kw = converted(), dict(epochs=3, size=16, patience=1, device="cpu")
    together = NeuralCleanse(**kw).scan(view(mx), images(24))
    alone = [NeuralCleanse(classes=(c,), **kw).scan(view(mx), images(24)) for c in range(4)]
    for name in ("mask", "pattern", "success"):
        looped = torch.cat([getattr(r, name) for r in alone])
        assert torch.allclose(getattr(together, name), looped, atol=2e-4), name


def test_the_weight_of_the_norm_doubles_and_falls():
    cb = CleanseCB(PatchInversion(OutputView(net()), [0, 1], (1, 8, 8)), None, 1e-3, .99, 5, 25)
    for _ in range(5): cb.move(torch.arange(2), torch.tensor([True, False]))
    assert torch.allclose(cb.weight, torch.tensor([2e-3, 1e-3 / 2**1.5])) and cb.raised.tolist() == [1, 0]
    assert cb.lowered.tolist() == [0, 1]
    for _ in range(4): cb.move(torch.arange(2), torch.tensor([True, True]))
    assert torch.allclose(cb.weight, torch.tensor([2e-3, 1e-3 / 2**1.5]))
    cb.move(torch.arange(2), torch.tensor([False, True]))
    assert torch.allclose(cb.weight, torch.tensor([2e-3, 2e-3 / 2**1.5]))


def test_finished_classes_rest():
    sizes = []
    model = net()
    def note(m, args):
        if torch.is_grad_enabled(): sizes.append(len(args[0]))
    model.register_forward_pre_hook(note)
    report = NeuralCleanse(epochs=80, size=16, patience=1, stop=3, device="cpu").scan(model, images(16))
    worked = [n // 16 for n in sizes[1:]]  # classes in each step; the first call only counts the classes
    assert worked == sorted(worked, reverse=True) and worked[0] == 4 and worked[-1] < 4
    assert len(worked) == report.epochs.max()
    assert sum(worked) == report.epochs.sum()


# STRIP

def test_strip_of_a_constant_and_of_an_undecided_net():
    K, x = 7, images(30)
    always = Rule(lambda x: 1e4*F.one_hot(torch.zeros(len(x), dtype=torch.long), K))
    never = Rule(lambda x: torch.zeros(len(x), K))
    assert Strip(n=9).fit(always, x).score(x).abs().max() == 0
    assert torch.allclose(Strip(n=9).fit(never, x).score(x), torch.tensor(math.log(K)))


def test_strip_is_the_mean_over_blends_of_the_entropy_over_classes():
    model, x = net(), images(25)
    strip = Strip(n=6, size=13).fit(model, x)
    with torch.no_grad(): p = torch.stack([model((x + o) / 2) for o in strip.overlay]).softmax(-1)
    assert torch.allclose(strip.score(x), -(p * p.log()).sum(-1).mean(0), atol=1e-5)
    eight_bit = (255*x).round().byte()
    assert torch.allclose(strip.score(eight_bit), strip.score(eight_bit.float() / 255))


def test_a_trojan_scores_lower_than_clean_images():
    def rule(x): return torch.cat([1e3*(x[:, 0, :1, 0] - .49), 9*x[:, 0, 4, 2:6]], 1)
    x = .9 * images(60)
    x[:, 0, 0, 0] *= .4
    woken = x.clone()
    woken[:, 0, 0, 0] = 1
    strip = Strip(n=20).fit(Rule(rule), x)
    assert strip.score(woken).max() < strip.score(x).min()
    assert detection_auroc(-strip.score(x), -strip.score(woken)) == 1
    assert strip.suspects(woken).all() and strip.suspects(x).float().mean() <= .05


def test_strip_scores_all_outputs_at_once():
    mx, x = converted(), images(30)
    together = Strip(n=8).fit(mx, x)
    for i in range(mx.M - 1):
        one = Strip(n=8).fit(OutputView.exit(mx, i), x)
        assert torch.allclose(one.score(x), together.score(x)[i], atol=1e-5)
        assert torch.allclose(one.alarm, together.alarm[i], atol=1e-5)


# DF-TND

def test_logit_increase_grows_with_a_planted_path_and_depends_on_the_seed_only():
    torch.manual_seed(0)
    calm = converted()
    wild = converted()
    with torch.no_grad(): wild.backbone.head[2].weight[2].abs_().mul_(20)
    scan = DFTND(images=4, iterations=20)
    low, high = scan.scan(calm), scan.scan(wild, references=(calm,))
    assert high.suspect == 2 and high.score > 3*abs(low.score)
    assert high.references == [pytest.approx(low.score, rel=1e-5)] and high.rank == 1
    torch.manual_seed(1)
    assert torch.equal(scan.scan(calm).increase, low.increase)


# training set

def test_spectral_signature_finds_a_rank_one_shift_and_equals_the_covariance():
    g = generator(0, "rank one")
    z, label = torch.randn(300, 20, generator=g), torch.arange(300) % 2
    bad = torch.zeros(300, dtype=torch.bool)
    bad[1:60:2] = True
    z[bad] += 6*F.normalize(torch.randn(20, generator=g), dim=0)
    found = SpectralSignature(rate=.2).scan(z, label)
    assert detection_auroc(found.score[~bad & (label == 1)], found.score[bad]) > .97
    assert found.suspects[label == 1].sum() == 45
    assert found.suspects[bad].all()
    rows = (z[label == 1] - z[label == 1].mean(0)).double().numpy()
    v = np.linalg.eigh(np.cov(rows.T))[1][:, -1]
    assert np.allclose(found.score[label == 1], (rows @ v)**2, rtol=1e-3, atol=1e-4)


def test_activation_clustering_splits_two_gaussians():
    g = generator(0, "two")
    z = torch.cat([torch.randn(90, 6, generator=g),
                   torch.randn(30, 6, generator=g) + 8*F.one_hot(torch.tensor(0), 6)])
    found = ActivationClustering(components=6).scan(z, torch.zeros(120, dtype=torch.long))
    truth = torch.arange(120) >= 90
    assert torch.equal(found.suspects, truth) and found.table.share[0] == .25 and found.flagged == [0]
    assert detection_auroc(found.score[~truth], found.score[truth]) == 1


def test_clustering_takes_dead_channels():
    z = torch.zeros(60, 30)
    z[:, :3] = torch.randn(60, 3, generator=generator(0, "dead"))
    assert ActivationClustering().scan(z, torch.zeros(60, dtype=torch.long)).score.isfinite().all()


def test_against_the_adversarial_robustness_toolbox():
    art = pytest.importorskip("art.defences.detector.poison.spectral_signature_defense")
    z = torch.randn(80, 12, generator=generator(0, "art"))
    ours = SpectralSignature().scan(z, torch.zeros(80, dtype=torch.long)).score
    theirs = art.SpectralSignatureDefense.spectral_signature_scores(z.numpy())
    assert np.corrcoef(np.argsort(np.argsort(ours)), np.argsort(np.argsort(theirs.ravel())))[0, 1] > .999


# repairs

TUNE = FineTune(epochs=1, size=20, device="cpu")
REPAIRS = {"fine-tuning": TUNE, "fine-pruning": FinePruning("exit:1", max_drop=1., most=.5, tune=TUNE),
           "CLP": CLP(u=1.), "ANP": ANP(iterations=4, size=20, lr=2., max_drop=1., device="cpu"),
           "I-BAU": IBAU(rounds=1, size=30, lr=1e-2, device="cpu")}


@pytest.mark.parametrize("name", REPAIRS)
@pytest.mark.parametrize("kind", ["vanilla", "multi-exit", "exit view"])
def test_a_repair_changes_a_copy_and_nothing_else(name, kind):
    makers = {"vanilla": net, "multi-exit": converted, "exit view": lambda: OutputView.exit(converted(), 1)}
    given = makers[kind]()
    before, flags, data = state(given), [p.requires_grad for p in given.parameters()], labelled()
    rng = torch.get_rng_state()
    first, second = REPAIRS[name].apply(given, data), REPAIRS[name].apply(given, data)
    assert same(state(given), before) and torch.equal(rng, torch.get_rng_state())
    assert all(p.grad is None for p in given.parameters())
    assert same(state(first), state(second))
    assert any(not torch.equal(v, before[k]) for k, v in first.state_dict().items() if k in before)
    assert [p.requires_grad for p in first.parameters()] == flags
    assert [type(m) for m in first.modules()] == [type(m) for m in given.modules()]
    assert first.training is False and first(data[:]["image"]).shape == given(data[:]["image"]).shape
    if kind == "vanilla": MultiExitNet.from_vanilla(first, input_shape=(1, 8, 8))


def test_fine_tuning_is_plain_sgd():
    model, data = net(), labelled(24)
    tuned = FineTune(lr=.1, epochs=1, size=24, momentum=0., weight_decay=.01, device="cpu").apply(model, data)
    by_hand = net().train()
    F.cross_entropy(by_hand(data[:]["image"]), data[:]["label"]).backward()
    with torch.no_grad(): [p.sub_(.1*(p.grad + .01*p)) for p in by_hand.parameters()]
    for (k, a), b in zip(tuned.named_parameters(), by_hand.parameters()):
        assert torch.allclose(a, b, atol=1e-5), k


def test_the_learning_rate_of_fine_tuning_matters():
    model, data = net(), labelled(40)
    def distance(tuned):
        return sum((a - b).square().sum() for a, b in zip(tuned.parameters(), model.parameters())).item()
    far = [distance(FineTune(lr=lr, epochs=2, device="cpu").apply(model, data)) for lr in (1e-4, 1e-2, 1e-1)]
    assert far[0] < far[1] < far[2]


def test_pruned_channels_stay_silent_and_travel_with_the_state():
    model, x = net(), images(5)
    kept = torch.tensor([1., 0, 1, 1, 0, 1, 1, 1])
    keep_channels(block_of(model, "exit:1"), kept)
    z = model.blocks[1](model.blocks[0](model.stem(x)))
    assert (z[:, kept == 0] == 0).all() and (z[:, kept == 1] != 0).any()
    assert torch.equal(model.state_dict()["blocks.1.kept"], kept)
    twin = net()
    keep_channels(block_of(twin, "exit:1"), torch.ones(8))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), model(x))


def test_blocks_of_a_sequential_net_are_pruned_too():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.MaxPool2d(2),
                          nn.Flatten(), nn.Linear(24, 4)).eval()
    pruned = FinePruning("exit:1", max_drop=1., most=.5, tune=FineTune(epochs=0)).apply(model, labelled(20))
    assert pruned[:5](images(3))[:, pruned[4].kept == 0].eq(0).all() and pruned[4].kept.sum() == 3


def test_one_planted_channel_is_the_only_one_pruned():
    model = net(width=16, seed=1)
    for seed in range(20):  # random weights have outliers of their own in some draws
        model = net(width=16, seed=seed)
        if not CLP().table(model, images(1)).pruned.any(): break
    with torch.no_grad(): model.blocks[2].bn1.weight[3] *= 50
    pruned = CLP(u=3).apply(model, images(1))
    assert not same(state(model), state(pruned))
    changed = {k: (v != pruned.state_dict()[k]).nonzero().flatten().tolist()
               for k, v in model.state_dict().items() if not torch.equal(v, pruned.state_dict()[k])}
    assert changed == {"blocks.2.bn1.weight": [3]} and pruned.blocks[2].bn1.bias[3] == 0


@pytest.mark.parametrize("conv", [nn.Conv2d(5, 7, 3), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(4, 6, 1)])
def test_lipschitz_bounds_equal_brute_force(conv):
    norm = nn.BatchNorm2d(conv.out_channels).eval()
    with torch.no_grad():
        norm.weight.normal_(generator=generator(0, "w"))
        norm.running_var.uniform_(.1, 2, generator=generator(0, "v"))
    brute = [np.linalg.svd(w.flatten(1).detach().double().numpy(), compute_uv=False)[0] * abs(a.item())
             / math.sqrt(v.item() + norm.eps) for w, a, v in zip(conv.weight, norm.weight, norm.running_var)]
    assert np.allclose(lipschitz_bounds(conv, norm), brute, rtol=1e-5)


def test_norms_are_paired_by_data_and_not_by_order():
    class Crossed(nn.Module):
        def __init__(self):
            super().__init__()
            self.n2, self.c1, self.n1 = nn.BatchNorm2d(3), nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)
            self.c2, self.free = nn.Conv2d(1, 3, 1), nn.BatchNorm2d(1)

        def forward(self, x):
            return torch.cat([self.n1(self.c1(self.free(x))), self.n2(self.c2(x))], 1).mean((2, 3))

    model = Crossed().eval()
    assert {n: c for n, c, _ in conv_norm_pairs(model, images(1))} == {"n1": model.c1, "n2": model.c2}


def test_the_hypergradient_of_a_quadratic_problem():
    g = generator(1, "bilevel")
    B, c = torch.randn(5, 3, generator=g).double(), torch.randn(5, generator=g).double()
    theta = torch.randn(3, generator=g).double().requires_grad_()
    A = torch.diag(torch.linspace(.5, 3., 5).double())
    def best(t): return torch.linalg.solve(A, B @ t)
    def outer(d): return (d - c).pow(2).sum() / 2 + theta.square().sum()
    def inner(d): return d @ A @ d / 2 - d @ B @ theta
    probe = theta.detach().clone().requires_grad_()
    ((best(probe) - c).pow(2).sum() / 2 + probe.square().sum()).backward()
    loss, (got,) = hypergradient(outer, inner, best(theta), [theta], steps=80, rate=.3)
    assert (got - probe.grad).norm() / probe.grad.norm() <= 1e-3 and loss == outer(best(theta))
    near = torch.diag(torch.linspace(.9, 1.1, 5).double())
    def inner(d): return d @ near @ d / 2 - d @ B @ theta
    star = torch.linalg.solve(near, B @ theta).detach()
    truth = 2*theta.detach() + B.T @ torch.linalg.solve(near, star - c)
    (got,) = hypergradient(outer, inner, star, [theta], steps=5, rate=1.)[1]
    assert (got - truth).norm() / truth.norm() <= 1e-3
