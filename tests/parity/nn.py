"""Networks, exits and their metrics against hand formulas, plain numpy and scikit-learn."""
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from scipy.optimize import minimize_scalar
from sklearn.metrics import accuracy_score, auc
from torch import nn
from torch.utils.data import DataLoader

from visionbench.core.tensors import DictData, batches
from visionbench.metrics.classify import (accuracy, attack_success_rate, efficacy, exit_histogram,
                                          expected_cost)
from visionbench.nn.adapters import Cut, cut
from visionbench.nn.calibrate import policy_sweep, stored_logits
from visionbench.nn.exits import (BudgetedPolicy, ConfidencePolicy, EntropyPolicy, FixedPolicy,
                                  InternalClassifier, MultiExitNet, OraclePolicy, PatienceConfidencePolicy,
                                  PatiencePolicy, calibrate, fit_temperature, run_early_exit,
                                  stages_of, train_exits)
from visionbench.nn.mobilenet import MOBILENET, mobilenet_v1_cifar
from visionbench.nn.programs import export_stages, load_stages
from visionbench.nn.resnet import Normalize, cifar_resnet, init_weights
from visionbench.nn.stages import SDN_COSTS, block_cost, stage_macs
from visionbench.nn.vgg import VGG16, vgg16_bn_cifar


def seeded(n):
    return torch.Generator().manual_seed(n)


def same_state(a, b):
    return list(a) == list(b) and all(torch.equal(p, q) for p, q in zip(a.values(), b.values()))


def by_hand(depth, K, C, width, size, stem_stride=1):
    """Parameters, multiply-adds after each block and in all, of a 6n+2 ResNet: counted layer by layer,
    without torch."""
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


@pytest.mark.parametrize("depth,K,C,width,size,stride",
                         [(56, 10, 3, 16, 32, 1), (14, 10, 1, 8, 16, 1), (8, 3, 2, 4, 20, 1),
                          (20, 200, 3, 16, 64, 2), (110, 43, 3, 16, 32, 1)])
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


def vgg_by_hand(plan, fc, K, C, size):
    """Parameters, multiply-adds after each block and in all, units an exit sees: counted layer by layer,
    without torch."""
    params, macs, after, seen, c, h = 0, 0, [], [], C, size
    for i, w in enumerate(plan):
        if w == "M": continue
        params, macs, c = params + 9*c*w + 3*w, macs + 9*c*w*h*h, w
        if plan[i + 1:i + 2] == ("M",): h //= 2
        after.append(macs)
        seen.append(c * (h // max(h // 4, 1))**2)
    units = (c*h*h, *fc, K)
    linear = [a*b for a, b in zip(units, units[1:])]
    return (params + sum(linear) + sum(units[1:]), [*after, macs + linear[0], macs + sum(linear)],
            [*seen, fc[0]])


def mobilenet_by_hand(width, K, C, size):
    c, h, seen, after = round(32*width), size, [], []
    params, macs = 9*C*c + 2*c, 9*C*c*h*h
    for p in MOBILENET:
        w, stride = p if isinstance(p, tuple) else (p, 1)
        w, h = round(w*width), -(-h // stride)
        params, macs, c = params + 9*c + 2*c + c*w + 2*w, macs + 9*c*h*h + c*w*h*h, w
        after.append(macs)
        seen.append(c * (h // max(h // 4, 1))**2)
    return params + c*K + K, [*after, macs + c*K], seen


@pytest.mark.parametrize("name,K,C,width,size",
                         [("vgg", 10, 3, 1, 32), ("vgg", 200, 3, .5, 64), ("vgg", 43, 1, .25, 32),
                          ("mobilenet", 10, 3, 1, 32), ("mobilenet", 200, 3, .25, 64),
                          ("mobilenet", 5, 1, .25, 16), ("mobilenet", 7, 2, .5, 28)])
def test_vgg_and_mobilenet_counts_equal_the_hand_formula(name, K, C, width, size):
    if name == "vgg":
        net, fc = vgg16_bn_cifar(K, C, width, size), (2048, 1024) if size == 64 else (512, 512)
        scale = lambda plan: tuple(w if w == "M" else round(w*width) for w in plan)
        params, macs, seen = vgg_by_hand(scale(VGG16), scale(fc), K, C, size)
    else:
        net = mobilenet_v1_cifar(K, C, width, size)
        params, macs, seen = mobilenet_by_hand(width, K, C, size)
    assert sum(p.numel() for p in net.parameters()) == params and stage_macs(net, (C, size, size)) == macs
    mx = MultiExitNet.from_vanilla(net)                              # the size is the net's own
    assert mx.input_shape == (C, size, size) and [g.linear.in_features for g in mx.heads] == seen
    assert np.allclose(mx.exit_cost(), np.array(macs) / macs[-1], rtol=1e-12)


def test_published_counts_of_vgg_and_mobilenet():
    """Spec of the audit: parameters, exits at 10 and at 200 classes, from the layer-by-layer count."""
    for (params, macs, seen), size, total, ics in [
            (vgg_by_hand(VGG16, (512, 512), 10, 3, 32), 15_253_578, 313.73, 419_980),
            (mobilenet_by_hand(1, 10, 3, 32), 3_217_226, 46.35, 706_690)]:
        assert params == size and round(macs[-1]/1e6, 2) == total and sum(10*s + 10 for s in seen) == ics
    exits = lambda seen: round(sum(200*s + 200 for s in seen)/1e6, 1)
    assert exits(vgg_by_hand(VGG16, (2048, 1024), 200, 3, 64)[2]) == 12.7
    assert exits(mobilenet_by_hand(1, 200, 3, 64)[2]) == 19.0
    r56 = MultiExitNet.from_vanilla(cifar_resnet(56, 200, stem_stride=2), input_shape=(3, 64, 64))
    assert round(sum(p.numel() for p in r56.head_parameters())/1e6, 1) == 3.2
    assert round(sum(p.numel() for p in r56.backbone_parameters())/1e6, 2) == .87


def test_published_placements():
    """The vectors of Kaya et al.'s network definitions."""
    for net, vector in [(vgg16_bn_cifar(10), "01010110110000"),
                        (cifar_resnet(56, 10), "000100010001000100010001000"),
                        (mobilenet_v1_cifar(10), "0010101010010")]:
        mx = MultiExitNet.from_vanilla(net, "sdn6")
        assert mx.exits == [i for i, v in enumerate(vector) if v == "1"] and len(vector) == len(net.blocks)
    other = cifar_resnet(20, 10)
    cost = block_cost(other, (3, 32, 32)).numpy()
    wanted = sorted({int(np.abs(cost[:-1] - f).argmin()) for f in SDN_COSTS})
    assert MultiExitNet.from_vanilla(other, "sdn6").exits == wanted and other.sdn_exits is None
    assert MultiExitNet.from_vanilla(other, [cost[1] + .01, cost[4] - .01]).exits == [1, 4]


def conv2d(x, w, stride=1):
    """Plain loops: x (C,H,W), w (O,C,k,k), 'same' padding."""
    pad, k = w.shape[-1] // 2, w.shape[-1]
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    side = range(0, x.shape[1] - k + 1, stride)
    return np.stack([[(w * x[:, r:r + k, c:c + k]).sum((1, 2, 3)) for c in side]
                     for r in side]).transpose(2, 0, 1)


def test_resnet_equals_numpy():
    net = cifar_resnet(8, 3, 2, 2, mean=[.4, .6], std=[.2, .3], generator=seeded(5)).double()
    with torch.no_grad():
        # statistics that are not 0 and 1
        for _ in range(3): net(torch.rand(8, 2, 8, 8, generator=seeded(6)).double())
    net.eval()
    x = torch.rand(1, 2, 8, 8, generator=seeded(7)).double()
    p = {k: v.numpy() for k, v in net.state_dict().items()}

    def norm(z, name):
        scale = p[f"{name}.weight"] / np.sqrt(p[f"{name}.running_var"] + 1e-5)
        return (scale[:, None, None] * (z - p[f"{name}.running_mean"][:, None, None])
                + p[f"{name}.bias"][:, None, None])

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


@pytest.mark.parametrize("shape",
                         [(3, 32, 32), (2, 9, 9), (2, 7, 12), (4, 4, 4), (4, 3, 8), (4, 2, 2), (6, 1, 1)])
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
    return nn.Sequential(Normalize([.5]*3, [.25]*3), nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4),
                         nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, padding=1),
                         nn.GroupNorm(2, 8), nn.PReLU(), nn.Dropout2d(.2), nn.AvgPool2d(2), nn.Flatten(),
                         nn.Dropout(.5), nn.Linear(8*16, 12), nn.ReLU(inplace=True), nn.Linear(12, 5))


NETS = {
    "resnet": (lambda: cifar_resnet(14, 5, 3, 4, mean=[.5]*3, std=[.25]*3, generator=seeded(3)), 6),
    "vgg-like": (vgg_like, 3),
    "all-conv": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1),
                                       nn.AdaptiveAvgPool2d(1), nn.Flatten()), 1),
    "vgg": (lambda: vgg16_bn_cifar(5, 3, input_size=16, plan=(4, "M", 8, "M"), fc=(12, 8),
                                   generator=seeded(3)), 3),
    "mobilenet": (lambda: mobilenet_v1_cifar(5, 3, .05, 16, generator=seeded(3)), 13),
    "perceptron": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3*16*16, 8), nn.BatchNorm1d(8), nn.Tanh(),
                                         nn.Linear(8, 5)), 1),}


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
    # a last batch of one is no trouble either
    train_heads(mx, x[:1], y[:1])
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
    # the injection step: exits held, backbone free
    train_heads(mx.freeze(backbone=False, heads=True), x, y)
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


def decide_by_hand(policy, p, label):
    """One sample after the other, one output after the other, on probabilities (M,B,K) in float64."""
    exits = []
    for b in range(p.shape[1]):
        said, count = p[:, b].argmax(-1), 0
        for i in range(policy.min_exit, len(p)):
            q, top = p[i, b], p[i, b].max()
            match policy:
                case ConfidencePolicy(): go = top > policy.threshold
                case EntropyPolicy(): go = -(q * np.log(np.maximum(q, 1e-300))).sum() < policy.threshold
                case PatiencePolicy():
                    count = count + 1 if i > policy.min_exit and said[i] == said[i - 1] else 0
                    go = count == policy.patience > 0
                case PatienceConfidencePolicy():
                    count = count + 1 if top > policy.threshold else 0
                    go = count == policy.patience > 0
                case BudgetedPolicy(): go = i == len(p) - 1 or top > policy.thresholds[i]
                case FixedPolicy(): go = i == policy.exit
                case OraclePolicy(): go = said[i] == label[b]
            if go: break
        exits.append(i)
    return exits


def some_policy(n, rng, logits, label):
    """One of seven kinds, with values that let samples leave everywhere; none of `threshold` lies on
    a sample."""
    M, K, start = *logits.shape[::2], int(rng.integers(3))
    tau = (None, 2., tuple(rng.uniform(.5, 2, M)))[n % 3]
    return [lambda: ConfidencePolicy(rng.uniform(.15, 1.02), start, "final", tau),
            lambda: EntropyPolicy(rng.uniform(0, np.log(K)), start, tau),
            lambda: PatiencePolicy(int(rng.integers(5)), start), lambda: FixedPolicy(int(rng.integers(M))),
            lambda: PatienceConfidencePolicy(int(rng.integers(4)), rng.uniform(.15, .9), start, tau),
            lambda: BudgetedPolicy(float(rng.uniform(.3, 3)), start, tau).fit(logits),
            lambda: OraclePolicy(label, start)][n % 7]()


def test_policies_equal_a_loop_in_numpy():
    rng, left = np.random.default_rng(3), {}
    for n in range(700):
        M, B, K = rng.integers(3, 9), rng.integers(1, 9), rng.integers(2, 12)
        logits = torch.tensor((rng.normal(size=(M, B, K)) * rng.uniform(.3, 5)).astype(np.float32))
        label = torch.tensor(rng.integers(K, size=B))
        policy = some_policy(n, rng, logits, label)
        tau = np.reshape(getattr(policy, "temperature", None) or 1., (-1, 1, 1))
        got, p = policy(logits), softmax(logits.numpy().astype(float)/tau)
        assert got.exit.tolist() == decide_by_hand(policy, p, label), policy
        assert torch.equal(got.pred, logits.argmax(-1)[got.exit, torch.arange(B)])
        order = torch.tensor(rng.permutation(B))
        turned = OraclePolicy(label[order], policy.min_exit) if isinstance(policy, OraclePolicy) else policy
        assert torch.equal(turned(logits[:, order]).exit, got.exit[order])
        left.setdefault(type(policy).__name__, set()).update(got.exit.tolist())
    assert len(left) == 7 and all(len(exits) > 3 for exits in left.values())


def test_entropy_of_certain_and_masked_classes():
    K = 7
    assert torch.allclose(EntropyPolicy(0)(torch.zeros(1, 2, K)).score, torch.tensor(float(K)).log())
    sure = torch.full((2, 3, K), -torch.inf)
    sure[..., 2] = 0
    d = EntropyPolicy(1e-9)(sure)
    assert (d.score == 0).all() and (d.exit == 0).all() and (EntropyPolicy(0)(sure).exit == 1).all()


def test_budgets_are_met():
    logits = torch.randn(5, 1000, 6, generator=seeded(0)) * 3
    for share in [(.1, .2, .3, .15, .25), (0., 0., 0., 0., 1.), (1., 0., 0., 0., 0.),
                  (.333, 0, .333, .334, 0)]:
        left = torch.bincount(BudgetedPolicy(share).fit(logits)(logits).exit, minlength=5)
        assert (left - 1000*torch.tensor(share)).abs().max() <= 1
    left = torch.bincount(BudgetedPolicy(.5, min_exit=2).fit(logits)(logits).exit, minlength=5)
    assert left.tolist() == [0, 0, 571, 286, 143]                     # 4 : 2 : 1
    # nobody is surer than another: nobody can be let go
    same = torch.zeros(3, 8, 4)
    assert (BudgetedPolicy((.5, .25, .25)).fit(same)(same).exit == 2).all()


def test_temperatures_have_the_smallest_likelihood_loss():
    logits, label = torch.randn(4, 400, 5, generator=seeded(1)), torch.arange(400) % 5
    logits = (logits + 2*F.one_hot(label, 5)) * torch.tensor([.3, 1., 4., 9.]).view(4, 1, 1)
    tau = fit_temperature(logits, label)
    for o, t in zip(logits.double(), tau):
        loss = lambda u: F.cross_entropy(o/u, label).item()
        best = minimize_scalar(loss, bounds=(.05, 50), method="bounded", options=dict(xatol=1e-9)).x
        assert abs(t.item()/best - 1) < 1e-4
    blown = torch.cat([7*logits[:1], logits[:1]])
    # scaled logits, scaled temperature
    assert abs(torch.div(*fit_temperature(blown, label)).item() - 7) < 1e-3
    # always wrong: as unsure as allowed
    assert 9 < fit_temperature(-9*F.one_hot(label, 5)[None].float(), label).item()


def test_calibration_finds_what_a_search_finds():
    label = torch.arange(500) % 4
    logits = (torch.randn(6, 500, 4, generator=seeded(2))
              + F.one_hot(label, 4) * torch.linspace(1, 4, 6).view(6, 1, 1))
    cost = torch.linspace(.2, 1, 6, dtype=torch.float64)
    full = (logits[-1].argmax(-1) == label).double().mean()
    for policy, make, grid in [
        (ConfidencePolicy(.5, 1), lambda v: ConfidencePolicy(v, 1), [.05*k for k in range(1, 20)]),
        (PatiencePolicy(1), PatiencePolicy, range(1, 6)), (FixedPolicy(0), FixedPolicy, range(6)),
        (PatienceConfidencePolicy(2, .5), lambda v: PatienceConfidencePolicy(2, v),
         [.05*k for k in range(1, 20)]),
        (EntropyPolicy(.5), EntropyPolicy, [.05*k*np.log(4) for k in range(1, 20)])]:
        made = [make(v)(logits) for v in grid]
        acc, spent = [(d.pred == label).double().mean() for d in made], [cost[d.exit].mean() for d in made]
        got = calibrate(policy, cost, (logits, label), max_rad=.06)(logits)
        assert cost[got.exit].mean() == min(c for a, c in zip(acc, spent) if 1 - a/full <= .06)
        assert 1 - (got.pred == label).double().mean()/full <= .06
        got = calibrate(policy, cost, (logits, label), target_cost=.7)(logits)
        assert (got.pred == label).double().mean() == max(a for a, c in zip(acc, spent) if c <= .7)
        assert cost[got.exit].mean() <= .7
    rows = policy_sweep(BudgetedPolicy(1.), logits, label, cost)
    assert [r["cost"] for r in rows] == sorted(r["cost"] for r in rows) and rows[0]["cost"] < .3
    assert rows[-1]["cost"] > .9
    assert len(calibrate(BudgetedPolicy(1.), cost, (logits, label), target_cost=.6).thresholds) == 5


def tiny(name, scale=40.):
    mx = MultiExitNet.from_vanilla(NETS[name][0](), input_shape=(3, 16, 16)).eval()
    # answers that differ in confidence
    for g in mx.heads: g.linear.weight.data *= scale / g.linear.in_features**.5
    return mx


def test_leaving_early_decides_as_the_policy_does_on_1000_batches():
    """Exits and answers equal, scores close: a convolution over fewer rows may round the last bit
    differently."""
    mx, rng, left = tiny("resnet"), np.random.default_rng(1), np.zeros((8, 7))
    for n in range(1000):
        x = torch.rand(int(rng.integers(1, 9)), 3, 16, 16, generator=seeded(n)) ** rng.uniform(.3, 4)
        with torch.no_grad(): logits = mx(x)
        label = torch.tensor(rng.integers(5, size=len(x)))
        policy = (some_policy(n, rng, logits, label) if n % 8 < 7
                  else ConfidencePolicy(rng.uniform(.15, 1), int(rng.integers(7)), "max_conf"))
        whole, early = policy(logits), run_early_exit(mx, x, policy)
        assert torch.equal(whole.exit, early.exit) and torch.equal(whole.pred, early.pred), (n, policy)
        assert torch.allclose(whole.score.float(), early.score, atol=1e-4)
        left[n % 7 if n % 8 < 7 else 7] += np.bincount(early.exit, minlength=7)
    # every exit was used, by each policy at least three
    assert (left.sum(0) > 20).all() and ((left > 0).sum(1) >= 3).all()


@pytest.mark.parametrize("name", ["vgg-like", "all-conv", "perceptron", "vgg"])
def test_leaving_early_from_a_chain(name):
    mx = tiny(name)
    x = torch.rand(64, 3, 16, 16, generator=seeded(0))
    with torch.no_grad(): logits = mx(x)
    # half of them leave at exit 0
    T = logits[0].softmax(-1).amax(-1).sort().values[31:33].mean().item()
    whole, early = ConfidencePolicy(T)(logits), run_early_exit(mx, x, ConfidencePolicy(T))
    assert torch.equal(whole.exit, early.exit) and torch.equal(whole.pred, early.pred)
    assert (early.exit == 0).sum() == 32


def test_blocks_nobody_needs_are_not_run():
    mx = tiny("resnet")
    calls = []
    for i, b in enumerate(mx.backbone.blocks):
        b.register_forward_hook(lambda m, a, z, i=i: calls.append((i, len(z))))
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
    for d, e in zip(run_early_exit(mx, x, ConfidencePolicy(.8)),
                    run_early_exit(mx, x[order], ConfidencePolicy(.8))):
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
        # so at least one image is of another class
        target = int((label[0] + 1) % K)
        hits = [[p == target for p, y in zip(row, label) if y != target] for row in pred.tolist()]
        assert np.allclose(attack_success_rate(logits, label, target), [np.mean(h) for h in hits])
        exit, cost = rng.integers(M, size=B), np.sort(rng.uniform(.01, 1, M))
        cost[-1] = 1
        done = np.cumsum([(exit == i).mean() for i in range(M)])
        assert np.isclose(efficacy(torch.tensor(exit), torch.tensor(cost)), auc([0, *cost], [0, *done]))
        assert np.isclose(expected_cost(torch.tensor(exit), torch.tensor(cost)), cost[exit].mean())
        assert np.allclose(exit_histogram(torch.tensor(exit), M).cumsum(0), done)


def timm_net(name, **options):
    return pytest.importorskip("timm").create_model(name, num_classes=6, **options)


def slim(vgg):
    """Its linear layers with 32 units instead of 4,096, to be quick."""
    for i, sizes in ((0, (25088, 32)), (3, (32, 32)), (6, (32, 6))): vgg.classifier[i] = nn.Linear(*sizes)
    return vgg


FOREIGN = {  # maker, side of the images, blocks, shapes at the first and the last exit
    "timm resnet18": (lambda: timm_net("resnet18"), 64, 8, (64, 16, 16), (512, 2, 2)),
    "timm vit_tiny": (lambda: timm_net("vit_tiny_patch16_224", img_size=64), 64, 12, (17, 192), (17, 192)),
    "timm mobilenetv3": (lambda: timm_net("mobilenetv3_small_050"), 64, 12, (16, 8, 8), (1024, 1, 1)),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=6), 64, 8, (64, 16, 16), (512, 2, 2)),
    "mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(num_classes=6), 64, 13, (16, 16, 16),
                           (1024,)),
    "vgg11_bn": (lambda: slim(torchvision.models.vgg11_bn(num_classes=6, init_weights=False)), 32, 10,
                 (64, 16, 16), (32,)),
    "swin_t": (lambda: torchvision.models.swin_t(num_classes=6), 64, 15, (16, 16, 96), (2, 2, 768)),
    "densenet121": (lambda: torchvision.models.densenet121(num_classes=6), 32, 7, (256, 8, 8), (1024, 1, 1)),
    "wrapped resnet18": (lambda: nn.Sequential(Normalize([.5]*3, [.2]*3),
                                               torchvision.models.resnet18(num_classes=6)), 64, 8,
                         (64, 16, 16), (512, 2, 2)),}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_peoples_networks_without_special_code(name):
    make, side, L, first, last = FOREIGN[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = make()
        for m in net.modules():  # running statistics that are not 0 and 1
            if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(0, .05), m.running_var.uniform_(.5, 1.5)
    before, x = deepcopy(net.state_dict()), torch.rand(5, 3, side, side, generator=seeded(1))
    mx = MultiExitNet.from_vanilla(net, pool="mixed", input_shape=(3, side, side))
    assert net.training and same_state(net.state_dict(), before) and isinstance(mx.backbone, Cut)
    net.eval()
    assert mx.M == L + 1 and mx.heads[0].shape == first and mx.heads[-1].shape == last
    with torch.no_grad(): logits, plain = mx(x), net(x)
    assert torch.equal(logits[-1], plain) and torch.equal(mx.vanilla(x), plain)
    assert logits.shape == (L + 1, 5, 6)
    assert torch.equal(mx.classify(mx.features(x)), logits[:-1])
    cost = mx.exit_cost()
    assert len(cost) == L + 1 and (cost.diff() >= 0).all() and cost[0] > 0 and cost[-1] == 1
    back, again = mx.to_vanilla(), deepcopy(mx)
    assert type(back) is type(net) and same_state(back.state_dict(), before) and torch.equal(again(x), logits)
    T = logits[0].softmax(-1).amax(-1).sort().values[2:4].mean().item()                # some leave at exit 0
    for policy in (ConfidencePolicy(T), PatiencePolicy(1), FixedPolicy(L // 2)):
        whole, early = policy(logits), run_early_exit(mx, x, policy)
        assert torch.equal(whole.exit, early.exit) and torch.equal(whole.pred, early.pred)
    assert 0 < (ConfidencePolicy(T)(logits).exit == 0).sum() < 5


def test_a_cut_shares_weights_and_survives_copies(tmp_path):
    net = torchvision.models.resnet18(num_classes=4).eval()
    c, x = cut(net, ["layer1", "layer3"], (3, 32, 32)), torch.rand(2, 3, 32, 32, generator=seeded(0))
    def parts(c):
        stem, blocks, head = c.stages()
        z = stem(x)
        for b in blocks: z = b(z)
        return head(z)
    with torch.no_grad():
        net.fc.bias += 1
        net.layer2[0].bn1.running_mean += .1
        assert torch.equal(parts(c), net(x))                          # trained on, the cut follows
        torch.save(c, tmp_path / "cut.pt")
        loaded = torch.load(tmp_path / "cut.pt", weights_only=False)
        copied = deepcopy(c).double()
        assert torch.equal(parts(loaded), net(x)) and copied.net.fc.weight is not net.fc.weight
        stem, blocks, head = copied.stages()
        assert head(blocks[1](blocks[0](stem(x.double())))).dtype == torch.float64
        mx = MultiExitNet.from_vanilla(c, input_shape=(3, 32, 32))
        assert mx.M == 3 and type(mx.to_vanilla()) is type(net) and torch.equal(mx.vanilla(x), net(x))


def test_a_buffer_read_by_foreign_code_follows_the_network():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.tensor(2.))
            self.shift = nn.Parameter(torch.tensor(1.))
            self.a, self.b, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.fc((self.b(self.a(x*self.scale) + self.shift)*self.scale).mean((2, 3)))

    net, x = Scaled().eval(), torch.rand(2, 3, 9, 9, generator=seeded(0))
    mx = MultiExitNet.from_vanilla(net, input_shape=(3, 9, 9))
    state = {k: v + 1 for k, v in net.state_dict().items()}
    mx.double().float()                                               # moving replaces buffers
    mx.backbone.net.load_state_dict(state)
    net.load_state_dict(state)
    assert mx.M == 3 and torch.equal(mx(x)[-1], net(x))


def noise(n=40):
    return DictData(image=torch.rand(n, 3, 16, 16, generator=seeded(8)), label=torch.arange(n) % 5)


def test_exits_train_on_data_and_on_loaders_alike():
    nets = [MultiExitNet.from_vanilla(NETS["resnet"][0](), input_shape=(3, 16, 16)) for _ in range(4)]
    items = [noise()[i] for i in range(40)]                           # somebody's own data set of dicts
    options = dict(epochs=3, seed=5, device="cpu")
    train_exits(nets[0], noise(), size=8, **options)
    train_exits(nets[1], DataLoader(items, 8), **options)
    train_exits(nets[2], batches(noise(), 8), **options)
    train_exits(nets[3], DataLoader(items, 8, shuffle=True), cache_features=False, **options)
    assert all(same_state(nets[0].state_dict(), mx.state_dict()) for mx in nets[1:3])
    pairs = zip(nets[0].state_dict().values(), nets[3].state_dict().values())
    assert all(torch.allclose(a.float(), b.float(), atol=1e-3) for a, b in pairs)


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "vgg"])
def test_norms_drift_when_tracked_and_only_then(name):
    frozen, tracked = (MultiExitNet.from_vanilla(NETS[name][0](), input_shape=(3, 16, 16)) for _ in range(2))
    before = deepcopy(frozen.backbone.state_dict())
    train_exits(frozen, noise(), 2, size=8, device="cpu")
    train_exits(tracked, noise(), 2, bn="track", size=8, device="cpu")
    weights, buffers = dict(tracked.backbone.named_parameters()), dict(tracked.backbone.named_buffers())
    assert same_state(frozen.backbone.state_dict(), before)
    assert all(torch.equal(w, before[k]) for k, w in weights.items())
    assert any(not torch.equal(b, before[k]) for k, b in buffers.items())
    assert tracked.frozen and not tracked.train().backbone.training    # after the fit nothing drifts any more


def test_train_exits_takes_another_fit():
    seen = []
    def fit(mx, data, epochs, lr, **more):
        seen.append((data, epochs, lr, more))
        return mx
    mx = tiny("resnet")
    assert train_exits(mx, "data", 2, .1, fit=fit, size=3) is mx
    assert seen == [("data", 2, .1, dict(bn="frozen", cache_features=True, size=3))]


def test_calibration_on_a_loader_equals_stored_logits():
    mx, data = tiny("resnet"), noise()
    stored = stored_logits(mx, data)
    assert torch.equal(stored[1], data.tensors["label"])
    assert torch.allclose(stored[0], mx(data.tensors["image"]), atol=1e-4)
    by_loader = calibrate(ConfidencePolicy(.5), mx, batches(data, 7, shuffle=False), target_cost=.8)
    assert by_loader == calibrate(ConfidencePolicy(.5), mx, data, target_cost=.8) \
        == calibrate(ConfidencePolicy(.5), mx.exit_cost(), stored, target_cost=.8)


PROGRAMS = [("resnet", "pt2"), ("vgg", "pt2"), ("mobilenet_v3_small", "pt2"), ("timm vit_tiny", "pt2"),
            ("resnet", "onnx")]


@pytest.mark.parametrize("name,format", PROGRAMS)
def test_exported_stages_decide_as_the_network(name, format, tmp_path):
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"): pytest.importorskip(package)
    if name in NETS: mx, side = tiny(name), 16
    else:
        make, side = FOREIGN[name][:2]
        mx = MultiExitNet.from_vanilla(init_weights(make(), seeded(0)), [1, 4], "mixed", (3, side, side),
                                       seeded(1)).eval()
    programs = load_stages(export_stages(mx, tmp_path / "stages", format=format).parent)
    rng = np.random.default_rng(0)
    for n, B in enumerate([1, 7, 16, 3, 12, 5, 1]):
        x = torch.rand(B, 3, side, side, generator=seeded(n)) ** rng.uniform(.3, 4)
        with torch.no_grad(): logits = mx(x)
        policy = (some_policy(n, rng, logits, torch.arange(B) % 5) if n
                  else ConfidencePolicy(logits[0].softmax(-1).amax().item() - .01))
        early, outside = run_early_exit(mx, x, policy), programs.run(x, policy)
        assert torch.equal(early.exit, outside.exit) and torch.equal(early.pred, outside.pred), policy
        assert torch.allclose(programs(x), logits, rtol=1e-3, atol=1e-3)
    assert programs.manifest["cost"] == mx.exit_cost().tolist()
