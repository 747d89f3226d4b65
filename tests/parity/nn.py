"""Networks, exits and their metrics against hand formulas, plain numpy and scikit-learn."""
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, auc
from torch import nn

from visionbench.metrics.classify import accuracy, attack_success_rate, efficacy, exit_histogram, expected_cost
from visionbench.nn.exits import InternalClassifier, MultiExitNet, run_early_exit, stages_of
from visionbench.nn.policies import ConfidencePolicy, ExitPolicy
from visionbench.nn.resnet import Normalize, cifar_resnet


def seeded(n):
    return torch.Generator().manual_seed(n)


def same_state(a, b):
    return list(a) == list(b) and all(torch.equal(p, q) for p, q in zip(a.values(), b.values()))


def by_hand(depth, K, C, width, size, stem_stride=1):
    """Parameters, multiply-adds after each block and in all, of a 6n+2 ResNet: counted layer by layer, without torch."""
    n, h = (depth - 2) // 6, -(-size // stem_stride)
    params, macs, after, c_in = 9*C*width + 2*width, 9*C*width*h*h, [], width
    for stage in range(3):
        c = width << stage
        for b in range(n):
            if b == 0 and stage:
                h = -(-h // 2)
                params += c_in*c + 2*c
                macs += c_in*c*h*h
            params += 9*c_in*c + 9*c*c + 4*c
            macs += 9*(c_in*c + c*c)*h*h
            after.append(macs)
            c_in = c
    return params + c_in*K + K, [*after, macs + c_in*K]


@pytest.mark.parametrize("depth,K,C,width,size,stride", [
    (56, 10, 3, 16, 32, 1), (14, 10, 1, 8, 16, 1), (8, 3, 2, 4, 20, 1), (20, 200, 3, 16, 64, 2), (110, 43, 3, 16, 32, 1)])
def test_resnet_counts_and_costs_equal_the_hand_formula(depth, K, C, width, size, stride):
    params, macs = by_hand(depth, K, C, width, size, stride)
    net = cifar_resnet(depth, K, C, width, stem_stride=stride)
    assert sum(p.numel() for p in net.parameters()) == params
    cost = MultiExitNet.from_vanilla(net, input_shape=(C, size, size)).exit_cost()
    assert np.allclose(cost, np.array(macs) / macs[-1], rtol=1e-12)


def test_published_counts():
    params, macs = by_hand(56, 10, 3, 16, 32)
    assert params == 855_770 and round(macs[-1] / 1e6, 2) == 125.75 and len(macs) == 28
    percent = [round(100*macs[i]/macs[-1], 1) for i in (0, 3, 8, 9, 15, 17, 18, 21, 26)]
    assert percent == [4.1, 15.4, 34.1, 37.0, 59.6, 67.1, 70.0, 81.2, 100.0]
    params, macs = by_hand(14, 10, 1, 8, 16)
    assert params == 44_226 and round(macs[-1] / 1e6, 2) == 1.66
    assert [round(100*m/macs[-1], 1) for m in macs[:6]] == [18.9, 36.7, 50.5, 68.3, 82.2, 100.0]
    for pool, size in (("avg", 161_550), ("mixed", 161_550 + 27)):
        mx = MultiExitNet.from_vanilla(cifar_resnet(56, 10), pool=pool)
        assert sum(p.numel() for p in mx.head_parameters()) == size
        assert [i.shape[1] for i in mx.eval().features(torch.rand(1, 3, 32, 32))] == \
            [k * (1 + (pool == "mixed")) for k in [256]*9 + [512]*9 + [1024]*9]


def conv2d(x, w, stride=1):
    """Plain loops: x (C,H,W), w (O,C,k,k), 'same' padding."""
    pad, k = w.shape[-1] // 2, w.shape[-1]
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    side = range(0, x.shape[1] - k + 1, stride)
    return np.stack([[(w * x[:, r:r + k, c:c + k]).sum((1, 2, 3)) for c in side] for r in side]).transpose(2, 0, 1)


def test_resnet_equals_numpy():
    net = cifar_resnet(8, 3, 2, 2, mean=[.4, .6], std=[.2, .3], generator=seeded(5)).double()
    with torch.no_grad():
        for _ in range(3): net(torch.rand(8, 2, 8, 8, generator=seeded(6)).double())      # statistics that are not 0 and 1
    net.eval()
    x = torch.rand(1, 2, 8, 8, generator=seeded(7)).double()
    p = {k: v.numpy() for k, v in net.state_dict().items()}

    def norm(z, name):
        scale = p[f"{name}.weight"] / np.sqrt(p[f"{name}.running_var"] + 1e-5)
        return scale[:, None, None] * (z - p[f"{name}.running_mean"][:, None, None]) + p[f"{name}.bias"][:, None, None]

    z = (x[0].numpy() - np.float32([.4, .6])[:, None, None]) / np.float32([.2, .3])[:, None, None]
    z = np.maximum(norm(conv2d(z, p["stem.1.weight"]), "stem.2"), 0)
    for i in range(3):
        b, stride = f"blocks.{i}", 1 + (i > 0)
        y = np.maximum(norm(conv2d(z, p[f"{b}.conv1.weight"], stride), f"{b}.bn1"), 0)
        y = norm(conv2d(y, p[f"{b}.conv2.weight"]), f"{b}.bn2")
        if i: z = norm(conv2d(z, p[f"{b}.shortcut.0.weight"], 2), f"{b}.shortcut.1")
        z = np.maximum(z + y, 0)
    logits = p["head.2.weight"] @ z.mean((1, 2)) + p["head.2.bias"]
    assert np.allclose(logits, net(x).detach().numpy()[0], atol=1e-10)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 9, 9), (2, 7, 12), (4, 4, 4), (4, 3, 8), (4, 2, 2), (6, 1, 1)])
@pytest.mark.parametrize("pool", ["avg", "mixed"])
def test_internal_classifier_equals_numpy(shape, pool):
    ic = InternalClassifier(shape, 5, pool, seeded(1))
    z = torch.randn(3, *shape, generator=seeded(2))
    f = z.numpy()
    if min(shape[1:]) >= 4:
        kh, kw = shape[1] // 4, shape[2] // 4
        rows, cols = shape[1] // kh, shape[2] // kw
        cells = f[:, :, :rows*kh, :cols*kw].reshape(3, shape[0], rows, kh, cols, kw)
        a = ic.alpha.item() if pool == "mixed" else 0
        f = a*cells.max((3, 5)) + (1 - a)*cells.mean((3, 5))
    logits = f.reshape(3, -1) @ ic.linear.weight.detach().numpy().T + ic.linear.bias.detach().numpy()
    assert np.allclose(logits, ic(z).detach().numpy(), atol=1e-5)


def vgg_like():
    return nn.Sequential(
        Normalize([.5]*3, [.25]*3), nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.PReLU(), nn.Dropout2d(.2), nn.AvgPool2d(2),
        nn.Flatten(), nn.Dropout(.5), nn.Linear(8*16, 12), nn.ReLU(inplace=True), nn.Linear(12, 5))


NETS = {
    "resnet": (lambda: cifar_resnet(14, 5, 3, 4, mean=[.5]*3, std=[.25]*3, generator=seeded(3)), 6),
    "vgg-like": (vgg_like, 3),
    "all-conv": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1),
                                       nn.Flatten()), 1),
    "perceptron": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3*16*16, 8), nn.BatchNorm1d(8), nn.Tanh(),
                                         nn.Linear(8, 5)), 1),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("pool", ["avg", "mixed"])
def test_conversion_keeps_every_bit(name, pool):
    make, L = NETS[name]
    net = make()
    for _ in range(3): net.train()(torch.rand(4, 3, 16, 16, generator=seeded(1)))
    before, x = deepcopy(net.state_dict()), torch.rand(6, 3, 16, 16, generator=seeded(2))
    mx = MultiExitNet.from_vanilla(net, pool=pool, input_shape=(3, 16, 16))
    assert net.training and same_state(net.state_dict(), before)
    net.eval()
    assert len(stages_of(net)[1]) == L and mx.M == L + 1 == len(mx.heads) + 1
    assert mx(x).shape == (L + 1, 6, 5)
    assert torch.equal(mx.vanilla(x), net(x)) and torch.equal(mx(x)[-1], net(x))
    assert torch.equal(mx.classify(mx.features(x)), mx(x)[:-1])
    back = mx.to_vanilla()
    assert type(back) is type(net) and same_state(back.state_dict(), before) and torch.equal(back(x), net(x))
    again = MultiExitNet.from_vanilla(back, pool=pool, input_shape=(3, 16, 16))
    assert same_state(again.state_dict(), mx.state_dict())
    cost = mx.exit_cost()
    assert len(cost) == mx.M and (cost.diff() >= 0).all() and cost[0] > 0 and cost[-1] == 1
    assert same_state(mx.to_vanilla().state_dict(), before)


def train_heads(mx, x, y, steps=3):
    opt = torch.optim.SGD(mx.parameters(), lr=.1)
    for _ in range(steps):
        loss = sum(F.cross_entropy(o, y) for o in mx.train()(x))
        opt.zero_grad()
        loss.backward()
        opt.step()


@pytest.mark.parametrize("name", NETS)
def test_a_frozen_backbone_does_not_move(name):
    mx = MultiExitNet.from_vanilla(NETS[name][0](), pool="mixed", input_shape=(3, 16, 16))
    x, y = torch.rand(4, 3, 16, 16, generator=seeded(0)), torch.tensor([0, 1, 2, 3])
    before, heads = deepcopy(mx.backbone.state_dict()), deepcopy(mx.heads.state_dict())
    train_heads(mx, x, y)
    train_heads(mx, x[:1], y[:1])                                    # a last batch of one is no trouble either
    assert same_state(mx.backbone.state_dict(), before) and not same_state(mx.heads.state_dict(), heads)
    assert all(p.grad is None for p in mx.backbone_parameters())


def test_other_ways_to_freeze():
    mx = MultiExitNet.from_vanilla(NETS["resnet"][0](), input_shape=(3, 16, 16)).freeze(track=True)
    x, y = torch.rand(4, 3, 16, 16, generator=seeded(0)), torch.tensor([0, 1, 2, 3])
    weights, buffers = deepcopy(mx.backbone_parameters()), deepcopy(dict(mx.backbone.named_buffers()))
    train_heads(mx, x, y)
    assert all(torch.equal(p, q) for p, q in zip(weights, mx.backbone_parameters()))
    assert not same_state(buffers, dict(mx.backbone.named_buffers()))
    heads = deepcopy(mx.heads.state_dict())
    train_heads(mx.freeze(backbone=False, heads=True), x, y)         # the injection step: exits held, backbone free
    assert same_state(mx.heads.state_dict(), heads)
    assert not all(torch.equal(p, q) for p, q in zip(weights, mx.backbone_parameters()))
    assert all(p.grad is None for p in mx.head_parameters())


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def confident_by_hand(logits, T, start, fallback, tau):
    """One sample after the other, one output after the other, in float64."""
    p = softmax(logits.astype(float) / np.reshape(tau, (-1, 1, 1)))
    out = []
    for b in range(p.shape[1]):
        best = start
        for i in range(start, len(p)):
            if p[i, b].max() > p[best, b].max(): best = i
            if p[i, b].max() > T or i == len(p) - 1: break
        answer = best if fallback == "max_conf" and p[i, b].max() <= T else i
        out.append((i, p[answer, b].argmax(), p[answer, b].max()))
    return map(np.array, zip(*out))


def test_confidence_policy_equals_numpy():
    rng = np.random.default_rng(0)
    for _ in range(300):
        M, B, K = rng.integers(1, 8), rng.integers(1, 9), rng.integers(2, 12)
        logits = (rng.normal(size=(M, B, K)) * rng.uniform(.1, 6)).astype(np.float32)
        T, start, fallback = rng.uniform(0, 1.1), int(rng.integers(M)), rng.choice(["final", "max_conf"])
        tau = tuple(rng.uniform(.3, 3, M))
        got = ConfidencePolicy(T, start, str(fallback), tau)(torch.tensor(logits))
        exit, pred, score = confident_by_hand(logits, T, start, fallback, tau)
        assert (got.exit.numpy() == exit).all() and (got.pred.numpy() == pred).all()
        assert np.allclose(got.score, score, atol=1e-5)


class Patience(ExitPolicy):
    """Leave after P agreements in a row: a policy with a state, as later chapters will have."""
    def __init__(self, P, min_exit=0):
        self.P, self.min_exit = P, min_exit

    def step(self, i, logits, state):
        score, pred = logits.softmax(-1).max(-1)
        count = torch.where(pred == state["last"], state["count"] + 1, 0) if state else torch.zeros_like(pred)
        return count >= self.P, pred, score, {"last": pred, "count": count}


def patient_by_hand(said, P, start):
    exits = []
    for row in said.T:
        count = 0
        for i in range(start, len(row)):
            count = count + 1 if i > start and row[i] == row[i - 1] else 0
            if count == P: break
        exits.append(i)
    return exits


def tiny(name, scale=40.):
    mx = MultiExitNet.from_vanilla(NETS[name][0](), input_shape=(3, 16, 16)).eval()
    for g in mx.heads: g.linear.weight.data *= scale / g.linear.in_features**.5      # answers that differ in confidence
    return mx


def test_leaving_early_decides_as_the_policy_does_on_1000_batches():
    """Exits and answers equal, scores close: a convolution over fewer rows may round the last bit differently."""
    mx, rng, left = tiny("resnet"), np.random.default_rng(1), np.zeros(7)
    for n in range(1000):
        x = torch.rand(int(rng.integers(1, 9)), 3, 16, 16, generator=seeded(n)) ** rng.uniform(.3, 4)
        if n % 4 == 3: policy = Patience(int(rng.integers(1, 4)), int(rng.integers(3)))
        else: policy = ConfidencePolicy(rng.uniform(.15, 1.02), int(rng.integers(7)), ("final", "max_conf")[n % 2],
                                        (None, 2., tuple(rng.uniform(.5, 2, 7)))[n % 3])
        with torch.no_grad(): logits = mx(x)
        whole, early = policy(logits), run_early_exit(mx, x, policy)
        assert torch.equal(whole.exit, early.exit) and torch.equal(whole.pred, early.pred), (n, policy)
        assert torch.allclose(whole.score, early.score, atol=1e-4)
        if n % 4 == 3: assert early.exit.tolist() == patient_by_hand(logits.argmax(-1).numpy(), policy.P, policy.min_exit)
        left += np.bincount(early.exit, minlength=7)
    assert (left > 20).all()                                         # every exit was used, so the claim is not empty


@pytest.mark.parametrize("name", ["vgg-like", "all-conv", "perceptron"])
def test_leaving_early_from_a_sequential(name):
    mx = tiny(name)
    x = torch.rand(64, 3, 16, 16, generator=seeded(0))
    with torch.no_grad(): logits = mx(x)
    T = logits[0].softmax(-1).amax(-1).sort().values[31:33].mean().item()            # half of them leave at exit 0
    whole, early = ConfidencePolicy(T)(logits), run_early_exit(mx, x, ConfidencePolicy(T))
    assert torch.equal(whole.exit, early.exit) and torch.equal(whole.pred, early.pred)
    assert (early.exit == 0).sum() == 32


def test_blocks_nobody_needs_are_not_run():
    mx = tiny("resnet")
    calls = []
    for i, b in enumerate(mx.backbone.blocks): b.register_forward_hook(lambda m, a, z, i=i: calls.append((i, len(z))))
    x = torch.rand(32, 3, 16, 16, generator=seeded(0))
    exit = run_early_exit(mx, x, ConfidencePolicy(.9)).exit
    assert calls == [(i, n) for i in range(6) if (n := int((exit >= i).sum()))]
    calls.clear()
    assert (run_early_exit(mx, x, ConfidencePolicy(0, min_exit=2)).exit == 2).all() and len(calls) == 3


def test_edges_of_the_threshold():
    mx, x = tiny("resnet", 4000.), torch.rand(16, 3, 16, 16, generator=seeded(0))
    with torch.no_grad(): logits = mx(x)
    assert (logits.softmax(-1).amax(-1)[:-1] == 1).any()              # float32 does reach 1
    for T in (1, 1.5, float("inf")):
        for d in (ConfidencePolicy(T)(logits), run_early_exit(mx, x, ConfidencePolicy(T))):
            assert (d.exit == 6).all() and torch.equal(d.pred, logits[-1].argmax(-1))
    for T in (.199, 0, -1):
        for start in (0, 3): assert (ConfidencePolicy(T, start)(torch.zeros(7, 4, 5)).exit == start).all()
    order = torch.randperm(16, generator=seeded(1))
    mx = tiny("resnet")
    for d, e in zip(run_early_exit(mx, x, ConfidencePolicy(.8)), run_early_exit(mx, x[order], ConfidencePolicy(.8))):
        assert torch.allclose(d[order].float(), e.float(), atol=1e-4)
    half = logits.half().clamp(-6e4, 6e4)
    assert torch.equal(ConfidencePolicy(.9)(half).score, ConfidencePolicy(.9)(half.float()).score)


def test_metrics_equal_scikit_learn_and_hand_sums():
    rng = np.random.default_rng(0)
    for _ in range(50):
        M, B, K = rng.integers(2, 6), rng.integers(4, 30), rng.integers(2, 7)
        logits, label = torch.tensor(rng.normal(size=(M, B, K))), torch.tensor(rng.integers(K, size=B))
        pred = logits.argmax(-1)
        assert np.allclose(accuracy(logits, label), [accuracy_score(label, p) for p in pred])
        target = int((label[0] + 1) % K)                              # so at least one image is of another class
        hits = [[p == target for p, y in zip(row, label) if y != target] for row in pred.tolist()]
        assert np.allclose(attack_success_rate(logits, label, target), [np.mean(h) for h in hits])
        exit, cost = rng.integers(M, size=B), np.sort(rng.uniform(.01, 1, M))
        cost[-1] = 1
        done = np.cumsum([(exit == i).mean() for i in range(M)])
        assert np.isclose(efficacy(torch.tensor(exit), torch.tensor(cost)), auc([0, *cost], [0, *done]))
        assert np.isclose(expected_cost(torch.tensor(exit), torch.tensor(cost)), cost[exit].mean())
        assert np.allclose(exit_histogram(torch.tensor(exit), M).cumsum(0), done)
