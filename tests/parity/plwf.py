"""PLwF's teachers and credit assignment against independent computations.

Term-by-term KL in torch, hand-made projections, torchjd and Avalanche's LwF formula.
"""
import copy
import gc
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import launch
from torch import nn
from torch.distributions import Bernoulli, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from visionbench.core.tensors import DictData, batches, generator
from visionbench.data.hygiene import RawDataError, TaskGuard, guard_tensor
from visionbench.nn.resnet import cifar_resnet
from visionbench.systems.plwf.collapse import (FORMS, HEADS, Collapse, SoftTargets, block_logsumexp,
                                               soften, softmax_spans)
from visionbench.systems.plwf.credit import CreditAssignment, CreditAssignmentCB, project
from visionbench.systems.plwf.projection import MOVES
from visionbench.systems.plwf.snapshots import Snapshots
from visionbench.systems.plwf.teachers import KnowledgeSpace, teacher_set
from visionbench.train.callbacks import CheckpointCB, ClipGradientCB
from visionbench.train.learner import Learner

BOUNDS = {"equal": (3, 6, 9, 12), "unequal": (2, 3, 9, 13), "one class": (1, 2, 3, 4)}
WEIGHTS = {"mean": "mean", "sum": "sum", "own": (.1, 2.5, 0., .7)}


def seeded(n):
    return torch.Generator().manual_seed(n)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


class Says(nn.Module):
    """A teacher whose logits for image i are fixed: the image holds nothing but its number."""
    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x): return self.logits[x.flatten().long()]


def teachers_and_student(bounds, n=20, dtype=torch.float64, scale=3.):
    nets = [Says(scale * randn(n, c, seed=i, dtype=dtype)) for i, c in enumerate(bounds[:-1])]
    return (nets, (scale * randn(n, bounds[-1], seed=99, dtype=dtype)).requires_grad_(),
            torch.arange(n, dtype=torch.float64).view(n, 1, 1, 1))


def term_by_term(student, nets, bounds, ids, weights, kd, tau):
    """Spec of the knowledge space, one KL after the other through torch's own kl_div."""
    total = 0
    for i, w in zip(ids, weights):
        if kd == "sigmoid":
            p, q = (Bernoulli(logits=z[:, :bounds[i]] / tau) for z in (nets[i].logits, student))
            total = total + w * tau**2 * kl_divergence(p, q).sum(1).mean()
            continue
        spans = dict(joint=[(0, bounds[i])], per_task=[*zip((0, *bounds), bounds[:i + 1])],
                     own=[(([0] + [*bounds])[i], bounds[i])])[kd]
        for a, b in spans:
            log_q, p = (student[:, a:b] / tau).log_softmax(1), (nets[i].logits[:, a:b] / tau).softmax(1)
            total = total + w * tau**2 * F.kl_div(log_q, p, reduction="batchmean")
    return total


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("kd", HEADS)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_collapsed_equals_term_by_term(dtype, tolerance, kd, bounds, weights):
    bounds, weights = BOUNDS[bounds], WEIGHTS[weights]
    nets, student, x = teachers_and_student(bounds, dtype=dtype, scale=1. if dtype == torch.float32 else 3.)
    for teachers in ("all", "last", 2, "first_last", [1]):
        space = KnowledgeSpace(nets, bounds, 2., weights, kd, teachers)
        ours = space.loss(student, space.prepare(x))
        separate = space.terms(student, space.prepare(x, separate=True))
        ids = teacher_set(teachers, 3)
        expected = term_by_term(student, nets, bounds, ids, space.weights, kd, 2.)
        assert list(separate) == [f"teacher{i}" for i in ids]
        for loss in (ours, sum(separate.values())):
            grad, reference = (torch.autograd.grad(v, student, retain_graph=True)[0]
                               for v in (loss, expected))
            assert (abs(loss - expected) <= tolerance * max(1., abs(expected))
                    and (grad - reference).abs().max() <= tolerance)


@pytest.mark.parametrize("kd", HEADS)
def test_gradcheck_of_loss_and_terms(kd):
    nets, student, x = teachers_and_student((2, 3, 6, 8), n=3, scale=1.)
    space = KnowledgeSpace(nets, (2, 3, 6, 8), 1.7, (.3, 1., 2.), kd)
    both, each = space.prepare(x), space.prepare(x, separate=True)
    assert torch.autograd.gradcheck(lambda z: space.loss(z, both), student)
    assert torch.autograd.gradcheck(lambda z: torch.stack([*space.terms(z, each).values()]), student)


@pytest.mark.parametrize("kd", FORMS)
def test_a_constant_on_a_softmax_changes_nothing(kd):
    bounds = (2, 5, 6, 8)
    nets, student, x = teachers_and_student(bounds)
    before = KnowledgeSpace(nets, bounds, kd=kd)
    loss = before.loss(student, before.prepare(x))
    shifted = copy.deepcopy(nets)
    for i, net in enumerate(shifted):
        for k, (a, b) in enumerate(softmax_spans(kd, bounds, i)):
            net.logits.data[:, a:b] += 10. * (k + 1) - 7 * i
    space = KnowledgeSpace(shifted, bounds, kd=kd)
    moved = student.clone()
    for k, (a, b) in enumerate([(0, 6)] if kd == "joint" else [*zip((0, *bounds), bounds)]):
        moved[:, a:b] += 5. * k - 11
    assert abs(space.loss(moved, space.prepare(x)) - loss) < 1e-12
    moved[:, 6:] += 1e3  # classes that no teacher knows
    assert abs(space.loss(moved, space.prepare(x)) - loss) < 1e-12


@pytest.mark.parametrize("kd", HEADS)
@pytest.mark.parametrize("seed", range(5))
def test_divergence_is_positive_and_zero_for_the_teacher_itself(kd, seed):
    logits = 4 * randn(12, 9, seed=seed)
    bounds = (3, 4, 9)
    nets = [Says(logits[:, :c].clone()) for c in bounds]
    x = torch.arange(12.).view(-1, 1, 1, 1)
    space = KnowledgeSpace(nets, bounds, kd=kd, weights=(.2, 3., 1.))
    each = space.prepare(x, separate=True)
    assert abs(space.loss(logits, each.summed())) < 1e-12
    z = logits.clone().requires_grad_()
    assert torch.autograd.grad(space.loss(z, each), z)[0].abs().max() < 1e-13
    other = logits + randn(12, 9, seed=seed + 50)
    terms = torch.stack([*space.terms(other, each).values()])
    assert (terms >= 0).all() and terms.max() > 1e-3


def test_very_high_temperature_compares_centred_logits():
    C, tau, lam = 7, 1e4, 1.5
    nets, student, x = teachers_and_student((C, C + 2), scale=1.)
    space = KnowledgeSpace(nets, (C, C + 2), tau)
    grad = torch.autograd.grad(lam * space.loss(student, space.prepare(x)), student)[0]
    z, f = (v[:, :C] - v[:, :C].mean(1, keepdim=True) for v in (student, nets[0].logits))
    torch.testing.assert_close(grad[:, :C], lam * (z - f) / C / len(z), rtol=1e-3, atol=1e-7)
    assert not grad[:, C:].any()


def test_equals_avalanche_times_temperature_squared():
    """Avalanche 0.6, `avalanche/training/regularization.py`, LearningWithoutForgetting, as a formula.

    The last network teaches the classes seen, kl_div(log_softmax(out/T), softmax(prev/T), 'batchmean') with
    T = 2, and no T² in front."""
    bounds, T = (2, 4, 6), 2.
    nets, student, x = teachers_and_student(bounds)
    seen = [0, 1, 2, 3]
    avalanche = F.kl_div((student[:, seen] / T).log_softmax(1), (nets[-1].logits[:, seen] / T).softmax(1),
                         reduction="batchmean")
    lwf = KnowledgeSpace(nets, bounds, T, teachers="last")
    assert abs(lwf.loss(student, lwf.prepare(x)) - T**2 * avalanche) < 1e-14


def test_equal_supports_are_the_mean_teacher():
    """With one soft-max that all share, distilling from several teachers is distilling from their mean, up to
    a constant."""
    spans = ((0, 5),)
    z, a, b = randn(9, 5, seed=1).requires_grad_(), randn(9, 5, seed=2), randn(9, 5, seed=3)
    mean = ((a / 2).softmax(1) + (b / 2).softmax(1)) / 2
    both = SoftTargets(*(x + y for x, y in zip(soften(a, spans, 2., .5), soften(b, spans, 2., .5))))
    space = Collapse("joint", (5,), (0,), (1.,), 2.)
    expected = 4 * F.kl_div((z / 2).log_softmax(1), mean, reduction="batchmean")
    assert torch.allclose(torch.autograd.grad(space.loss(z, both), z)[0],
                          torch.autograd.grad(expected, z)[0], atol=1e-15)


def test_the_step_does_not_grow_with_the_teachers():
    """Operations of a loss with its gradient, and stored floats, for 2 to 20 teachers of up to 40 classes."""
    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.ops.append(op)
            return op(*args, **kwargs or {})
    found, count = {}, Count()
    for T in (3, 5, 11, 21):  # 2 … 20 teachers
        bounds = tuple(range(2, 2 * T + 1, 2))
        space = Collapse("joint", bounds[:-1], tuple(range(T - 1)), (1 / (T - 1),) * (T - 1), 2.)
        z, P = (randn(4, 2 * T, seed=T).requires_grad_(),
                torch.full((4, 2 * T - 2), 1 / (2 * T - 2), dtype=torch.float64))
        targets = SoftTargets(P, torch.zeros(4, dtype=torch.float64))
        space.loss(z, targets)  # tables are made once
        count.ops = []
        with count: space.loss(z, targets).backward()
        found[T] = [str(op) for op in count.ops]
        assert targets.bytes == 4 * 8 * (space.classes + 1)
    assert len(found[3]) > 5 and all(ops == found[3] for ops in found.values()), found


def test_large_logits_stay_finite():
    edges = (1, 4, 6)
    z = torch.tensor([[1e4, -1e4, 0., 3e4, -3e4, 2e4]])
    assert torch.equal(block_logsumexp(z, edges), torch.tensor([[1e4, 3e4, 2e4]]))
    space = Collapse("joint", edges, (0, 1, 2), (1., 1., 1.), 2.)
    shares = [soften(z, s, 2.) for s in space.spans]
    targets = SoftTargets(sum(F.pad(s.P, (0, 6 - s.P.shape[1])) for s in shares),
                          sum(s.const for s in shares))
    student = z.flip(1).requires_grad_()
    assert torch.autograd.grad(space.loss(student, targets), student)[0].isfinite().all()


def small_cnn(classes):
    return nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1),
                         nn.ReLU(), nn.Flatten(), nn.Dropout(.5), nn.Linear(256, classes))


def resnet(classes):
    return cifar_resnet(8, classes, in_chans=1, width=4)


def trained(build, classes, seed=0, steps=20):
    torch.manual_seed(seed)
    net = build(classes)
    x, y = torch.rand(64, 1, 14, 14), torch.randint(classes, (64,))
    optimizer = torch.optim.SGD(net.parameters(), .05, momentum=.9)
    for _ in range(steps):
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


@pytest.mark.parametrize("kd", HEADS)
@pytest.mark.parametrize("build", [small_cnn, resnet])
def test_loop_vmap_and_cache_agree(build, kd):
    bounds = (2, 5, 6, 8)
    nets = [trained(build, c, seed=c) for c in bounds[:-1]]
    x = torch.rand(30, 1, 14, 14, generator=seeded(5))
    spaces = [KnowledgeSpace(nets, bounds, kd=kd, teacher_forward=f, batch_size=7) for f in ("loop", "vmap")]
    for separate in (False, True):
        cached = spaces[0].prepare(x, separate)
        for found in (spaces[0].online(x, separate), spaces[1].online(x, separate)):
            assert found.P.shape == cached.P.shape and (found.P - cached.P).abs().max() <= 1e-5
            assert (found.const - cached.const).abs().max() <= 1e-5
    student = randn(30, 8, dtype=torch.float32)
    losses = [s.loss(student, t).item() for s, t in ((spaces[0], cached), (spaces[0], spaces[0].online(x)),
                                                     (spaces[1], spaces[1].online(x)))]
    assert max(losses) - min(losses) <= 1e-5
    # the given nets are left alone
    assert [n.training for n in nets] == [True] * 3 and all(p.requires_grad
                                                            for n in nets for p in n.parameters())


def test_bytes_are_images_too():
    nets = [trained(small_cnn, 2)]
    x = torch.randint(256, (9, 1, 14, 14), dtype=torch.uint8, generator=seeded(1))
    space = KnowledgeSpace(nets, (2, 4))
    assert torch.allclose(space.prepare(x).P, space.online(x.float() / 255).P, atol=1e-6)


def test_batches_gather_the_targets_of_their_images():
    nets = [trained(small_cnn, c, seed=c) for c in (2, 4)]
    x = torch.rand(40, 1, 14, 14, generator=seeded(6))
    space = KnowledgeSpace(nets, (2, 4, 6))
    loader = batches(DictData(image=x, **space.prepare(x).columns()), 16, seed=3)
    loader.batch_sampler.start(1)
    for batch in loader:
        online = space.online(batch["image"])
        for a, b in zip(space.targets(batch), online): assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("forward", ["loop", "vmap"])
def test_guarded_images_teach_in_their_own_task_only(forward):
    guard, plain = TaskGuard(), torch.rand(10, 1, 14, 14, generator=seeded(1))
    x = guard_tensor(plain, guard, frozenset({2}))
    space = KnowledgeSpace([trained(small_cnn, 2), trained(small_cnn, 4)], (2, 4, 6), teacher_forward=forward)
    with guard.during(2): found = [space.prepare(x), space.online(x), space.targets(dict(image=x))]
    expected = space.prepare(plain)
    assert all(type(t) is torch.Tensor and torch.allclose(t, e, atol=1e-6)
               for f in found for t, e in zip(f, expected))
    with guard.during(1):
        for ask in (space.prepare, space.online):
            with pytest.raises(RawDataError, match="task 2 was used during task 1"): ask(x)


def test_cached_mode_holds_one_teacher_and_counts_what_it_costs(tmp_path):
    snapshots = Snapshots(small_cnn, tmp_path)
    for c in (2, 4, 6): snapshots.append(trained(small_cnn, c, seed=c, steps=2), c)
    space = KnowledgeSpace(snapshots, (2, 4, 6, 8))
    x = torch.rand(50, 1, 14, 14, generator=seeded(0))
    alive, build = [], snapshots.build
    def counted(classes):
        gc.collect()
        alive.append(sum(isinstance(o, nn.Sequential) for o in gc.get_objects()))
        return build(classes)
    snapshots.build = counted
    space.prepare(x)
    # no network more when the third is built than when the first was
    assert len(set(alive)) == 1 and len(alive) == 3
    cost = space.cost
    assert ((cost.teachers, cost.forwards, cost.resident, cost.cache_bytes) == (3, 150, 1, 50 * 7 * 4)
            and cost.prepare_seconds > 0)
    assert cost.snapshot_bytes == snapshots.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    space.online(x[:10])
    assert cost.resident == 3 and cost.forwards == 180


def test_snapshots_survive_the_next_task_untouched(tmp_path):
    net = trained(small_cnn, 2)
    snapshots = Snapshots(small_cnn, tmp_path)
    file = snapshots.append(net, 2)
    x, content, said = torch.rand(8, 1, 14, 14), file.read_bytes(), snapshots[0](torch.ones(3, 1, 14, 14))
    space = KnowledgeSpace(snapshots, (2, 4))
    for _ in range(3):  # train on with the teacher in use
        loss = space.loss(net(x), space.online(x)) + F.cross_entropy(net(x), torch.ones(8).long())
        loss.backward()
        torch.optim.SGD(net.parameters(), .5).step()
    teacher = snapshots[0]
    assert file.read_bytes() == content and torch.equal(teacher(torch.ones(3, 1, 14, 14)), said)
    assert (not teacher.training and not any(m.training for m in teacher.modules())
            and not any(p.requires_grad for p in teacher.parameters()))
    before = teacher.state_dict()["1.running_mean"].clone()
    space.online(x + 5)
    assert torch.equal(space.awake[x.device][0].state_dict()["1.running_mean"], before)
    assert not space.online(x).P.requires_grad and not space.prepare(x).P.requires_grad


def test_bfloat16_snapshots_keep_logits_within_two_per_cent(tmp_path):
    for build in (small_cnn, resnet):
        net = trained(build, 6).eval()
        half, full = (Snapshots(build, tmp_path / f"{build.__name__}-{d}", d)
                      for d in (torch.bfloat16, torch.float32))
        for s in (half, full): s.append(net, 6)
        x = torch.rand(100, 1, 14, 14, generator=seeded(7))
        with torch.no_grad(): exact = net(x)
        assert torch.equal(full[0](x), exact)
        error = ((half[0](x) - exact).norm() / exact.norm()).item()
        assert (0 < error <= .02 and half.bytes < full.bytes
                and next(half[0].parameters()).dtype == torch.float32)
        assert half[0].state_dict().keys() == net.state_dict().keys()
        if build is small_cnn: assert half[0].state_dict()["1.num_batches_tracked"] == 20


# credit assignment

def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def by_hand(new, old, mode):
    """Spec equations of `project` for flat gradients."""
    dot = min(0., (new @ old).item())
    n, o = new, old
    if mode in ("new", "both", "per_teacher", "pcgrad"): n = new - dot / (old @ old) * old
    if mode in ("old", "both", "pcgrad"): o = old - dot / (new @ new) * new
    return n + o


@pytest.mark.parametrize("mode", MOVES)
@pytest.mark.parametrize("seed", range(8))
def test_projection_equals_the_equations(mode, seed):
    new, old = randn(200, seed=seed), randn(200, seed=seed + 100)
    update, about = project(new, old, mode)
    assert (update - by_hand(new, old, mode)).abs().max() < 1e-12
    assert abs(about.cosine - F.cosine_similarity(new, old, 0)) < 1e-14
    assert about.projected == float(new @ old < 0 and mode != "off")


def test_analytic_case():
    update, about = project(torch.tensor([1., 0.]), torch.tensor([-1., 1.]))
    assert (update.tolist() == [-.5, 1.5] and about.coefficient == -.5
            and (update - torch.tensor([-1., 1.])).tolist() == [.5, .5])


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("size", [1e-8, 1e-3, 1., 1e5])
def test_orthogonal_on_conflict_and_untouched_without(size, dtype, tolerance):
    conflicts = 0
    for seed in range(40):
        new, old = randn(5000, seed=seed, dtype=dtype), size * randn(5000, seed=seed + 100, dtype=dtype)
        if size == 1e-8 and dtype == torch.float32: old = old * 1e4  # an eps above what counts as rounding
        update, about = project(new, old)
        (new, old, update), a = (t.double() for t in (new, old, update)), about.coefficient.double()
        both = new.norm() * old.norm()
        assert (update - (new + (1 + a.abs()) * old)).abs().max() <= 10 * tolerance * max(1., size)
        assert update @ old >= (1 - 1e-5) * (old @ old) - tolerance * both
        if about.projected:
            conflicts += 1
            assert a < 0 and abs((new - a * old) @ old) <= tolerance * both
        else: assert a == 0 and new @ old >= -tolerance * both
    assert 5 < conflicts < 35


@pytest.mark.parametrize("mode", MOVES)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_zero_gradients_are_left_alone(mode, scope):
    new, nothing = ([randn(3, 4), randn(5)],
                    [torch.zeros(3, 4, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)])
    for a, b in ((new, nothing), (nothing, new), (nothing, nothing)):
        update, about = project(a, b, mode, scope)
        assert (torch.equal(flat(update), flat(a) + flat(b)) and not about.projected.any()
                and not about.cosine.any())


@pytest.mark.parametrize("mode", MOVES)
def test_layer_scope_is_one_projection_per_tensor(mode):
    new, old = ([randn(*s, seed=k + 10 * i) for i, s in enumerate(((4, 5), (7,), (2, 3, 3)))] for k in (1, 2))
    update, about = project(new, old, mode, "layer")
    for k, (u, n, o) in enumerate(zip(update, new, old)):
        alone, one = project(n, o, mode)
        assert u.shape == n.shape and torch.allclose(u, alone, atol=1e-14)
        assert all(torch.allclose(a[k], b, atol=1e-14) for a, b in zip(about, one))
    whole = about.whole()
    assert (torch.allclose(whole.cosine, F.cosine_similarity(flat(new), flat(old), 0))
            and torch.allclose(whole.norm_new, flat(new).norm()))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("teachers", [1, 2, 5])
def test_pcgrad_equals_torchjd(seed, teachers):
    aggregation = pytest.importorskip("torchjd.aggregation", reason="torchjd is the reference for PCGrad")
    rows = randn(1 + teachers, 300, seed=seed) - .05
    torch.manual_seed(seed)  # torchjd draws its orders from the global state
    expected = aggregation.PCGrad()(rows)
    got, _ = project(rows[0], rows[1:], "pcgrad", generator=seeded(seed))
    assert (got - expected).abs().max() <= 1e-10
    if teachers == 1: assert (project(rows[0], rows[1], "both")[0] - expected).abs().max() <= 1e-10


def test_per_teacher_yields_in_turn():
    new, old = randn(50, seed=1), randn(4, 50, seed=2)
    order = [j for j in torch.randperm(5, generator=seeded(3)).tolist() if j]
    g = new.clone()
    for j in order: g -= min(0., (g @ old[j - 1]).item()) / (old[j - 1] @ old[j - 1]) * old[j - 1]
    update, _ = project(new, old, "per_teacher", generator=seeded(3))
    assert (update - g - old.sum(0)).abs().max() < 1e-13
    listed = project([new[:20], new[20:]], [[o[:20], o[20:]] for o in old], "per_teacher",
                     generator=seeded(3))[0]
    assert (flat(listed) - update).abs().max() < 1e-13
    # other modes add the teachers up
    assert torch.allclose(project(new, old, "new")[0], project(new, old.sum(0))[0])


def stream(n=64, seed=0, classes=6):
    """Data of a third task, and a loss with the two earlier networks as teachers, each a term."""
    nets = [trained(small_mlp, c, seed=c) for c in (2, 4)]
    x, y = (torch.rand(n, 1, 14, 14, generator=seeded(seed)),
            torch.randint(4, classes, (n,), generator=seeded(seed + 1)))
    space = KnowledgeSpace(nets, (2, 4, 6))
    def loss(out, batch):
        targets = space.online(batch["image"], separate=True)
        return dict(new=F.cross_entropy(out, batch["label"]),
                    **{k: 2 * v for k, v in space.terms(out, targets).items()})
    return DictData(image=x, label=y), loss


def small_mlp(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(196, 20), nn.ReLU(), nn.Linear(20, classes))


def fit(*callbacks, steps=3, precision="no"):
    torch.manual_seed(4)
    net = small_mlp(6)
    data, loss = stream()
    learner = Learner(net, loss, batches(data, 16, seed=2), torch.optim.SGD(net.parameters(), .1), callbacks,
                      device="cpu", precision=precision, limit_batches=steps)
    return net, learner.fit(1)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("mode", MOVES)
def test_the_callback_steps_along_the_projected_gradient(mode, scope):
    """Three SGD steps with the callback equal three by hand from full gradients."""
    net, _ = fit(CreditAssignmentCB(mode, scope, seed=7))
    torch.manual_seed(4)
    copy_ = small_mlp(6)
    data, loss = stream()
    loader = batches(data, 16, seed=2)
    loader.batch_sampler.start(0)
    for step, batch in zip(range(3), loader):
        terms = loss(copy_(batch["image"]), batch)
        ps = [*copy_.parameters()]
        new, *old = [list(torch.autograd.grad(v, ps, retain_graph=True)) for v in terms.values()]
        update, _ = project(new, old, mode, scope, generator(7, "credit", step))
        with torch.no_grad():
            for p, u in zip(ps, update): p -= .1 * u
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(net.parameters(), copy_.parameters()))


def test_off_equals_backward_and_new_does_not():
    plain, off, new = (fit(*c)[0] for c in ((), (CreditAssignmentCB("off"),), (CreditAssignmentCB("new"),)))
    apart = [max((a - b).abs().max().item() for a, b in zip(plain.parameters(), n.parameters()))
             for n in (off, new)]
    assert apart[0] < 1e-6 and apart[1] > 1e-3


def test_same_seed_gives_the_same_weights_to_the_last_bit():
    for mode in ("new", "pcgrad"):
        one, two = (fit(CreditAssignmentCB(mode, seed=3))[0] for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


def test_without_stability_terms_it_is_plain_training():
    def loss(out, batch):
        return dict(new=F.cross_entropy(out, batch["label"]), distillation=out.new_zeros(()))
    ends = []
    for callbacks in ([], [cb := CreditAssignmentCB()]):
        torch.manual_seed(0)
        net = small_mlp(6)
        data, _ = stream()
        Learner(net, loss, batches(data, 16), torch.optim.SGD(net.parameters(), .1, momentum=.9), callbacks,
                device="cpu").fit(2)
        ends.append(net)
    assert all(torch.equal(a, b) for a, b in zip(*(n.parameters() for n in ends))) and cb.rows == []


def test_parameters_that_no_term_reaches_have_no_gradient():
    """Weight decay must not act on what plain training would leave alone."""
    net = nn.ModuleDict(dict(used=nn.Linear(3, 2), idle=nn.Linear(3, 2), frozen=nn.Linear(3, 2)))
    net["frozen"].requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    x = torch.randn(8, 3, generator=seeded(0))
    seen = []
    spy = SimpleNamespace(after_backward=lambda learner: seen.append({k: p.grad is not None
                                                                      for k, p in net.named_parameters()}))
    Learner(net, lambda out, b: dict(new=out.square().mean(), keep=(out - 1).square().mean()),
            batches(DictData(x=x), 4),
            torch.optim.SGD([p for p in net.parameters() if p.requires_grad], .1, weight_decay=.5),
            [CreditAssignmentCB(), spy],
            forward=lambda m, b: m["used"](b["x"]), device="cpu").fit(1)
    assert seen[0] == {k: k.startswith("used") for k in before}
    assert all(torch.equal(v, before[k]) == (not k.startswith("used")) for k, v in net.state_dict().items())


@pytest.mark.parametrize("build", [small_mlp, small_cnn, resnet])
def test_the_first_step_of_the_second_task_is_not_projected(build):
    """Student and teacher are one network there: what rounding leaves of g_o must not decide, whatever its
    cosine."""
    for seed in range(3):
        teacher = trained(build, 2, seed=seed).eval()
        student = build(4).eval()
        state = student.state_dict()
        for k, v in teacher.state_dict().items():
            if v.ndim: state[k][:len(v)] = v
        student.load_state_dict(state)
        x = torch.rand(200, 1, 14, 14, generator=seeded(seed))
        space = KnowledgeSpace([teacher], (2, 4))
        targets, rows = space.prepare(x), torch.randperm(200, generator=seeded(seed))[:32]
        z = student(x[rows])
        ps = [*student.parameters()]
        new = torch.autograd.grad(F.cross_entropy(z, torch.randint(2, 4, (32,), generator=seeded(0))), ps,
                                  retain_graph=True)
        old = torch.autograd.grad(8 * space.loss(z, SoftTargets(*(t[rows] for t in targets))), ps)
        update, about = project(list(new), list(old))
        assert about.norm_old < 3e-6 * about.norm_new and about.projected == 0
        assert all(torch.equal(u, a + b) and u.isfinite().all() for u, a, b in zip(update, new, old))


def test_clipping_acts_on_the_projected_gradient():
    norms = []
    spy = SimpleNamespace(after_backward=lambda learner: norms.append(
        torch.stack([p.grad.norm() for p in learner.model.parameters()]).norm().item()))
    fit(CreditAssignmentCB(), spy, ClipGradientCB(.01), spy)
    assert all(before > .1 and abs(after - .01) < 1e-5 for before, after in zip(norms[::2], norms[1::2]))


def test_float16_scale_changes_gradients_but_not_what_is_said():
    """A GradScaler multiplies both losses.

    p.grad carries its factor, for the optimizer to take off; cosine, a and norms do not."""
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.)):
        torch.manual_seed(0)
        net = small_mlp(6)
        data, loss = stream()
        batch = data[list(range(16))]
        accelerator = SimpleNamespace(scaler=scaler, num_processes=1, no_sync=lambda model: nullcontext())
        learner = SimpleNamespace(terms=loss(net(batch["image"]), batch), model=net, accelerator=accelerator,
                                  iteration=0, epoch=0)
        cb = CreditAssignmentCB()
        cb.before_batch(learner), cb.backward(learner), cb.after_epoch(learner)
        found.append((cb.rows[0], [p.grad for p in net.parameters()]))
    (plain, grads), (scaled, big) = found
    assert all(abs(plain[k] - scaled[k]) < 1e-5
               for k in ("value", "projected", "coefficient", "norm_new", "norm_old"))
    assert all(torch.allclose(1024 * a, b, rtol=1e-4, atol=1e-4) for a, b in zip(grads, big))


def test_infinite_gradients_are_passed_on():
    """So that a float16 scaler sees them and skips the step."""
    new, old = torch.tensor([1., float("inf")]), torch.tensor([-1., 1.])
    for mode in MOVES:
        assert (not project(new, old, mode)[0].isfinite().all()
                and not project(old, new, mode)[0].isfinite().all())


def test_bfloat16_training_steps():
    net, learner = fit(CreditAssignmentCB(), precision="bf16")
    exact, _ = fit(CreditAssignmentCB())
    assert learner.iteration == 3 and all(torch.allclose(a, b, atol=.02)
                                          for a, b in zip(net.parameters(), exact.parameters()))


def test_rows_tell_step_cosine_share_coefficient_and_norms():
    cb = CreditAssignmentCB("new", layers_every=2, stage="task2", task=2, method="PLwF")
    fit(cb, steps=4)
    steps, layers = ([r for r in cb.rows if r["name"] == n] for n in ("cosine", "layer_cosine"))
    assert ([r["step"] for r in steps] == [0, 1, 2, 3] and {r["stage"] for r in cb.rows} == {"task2"}
            and {r["task"] for r in cb.rows} == {2})
    assert set(steps[0]) == {"stage", "epoch", "step", "name", "value", "projected", "coefficient",
                             "norm_new", "norm_old", "task", "method"}
    assert len(layers) == 2 * 4 and {r["layer"] for r in layers} == {"1.weight", "1.bias",
                                                                     "3.weight", "3.bias"}
    for r in steps:
        assert (r["projected"] == float(r["value"] < 0) and (r["coefficient"] < 0) == (r["value"] < 0)
                and r["norm_new"] > 0)
        if r["value"] < 0: assert abs(r["coefficient"] - r["value"] * r["norm_new"] / r["norm_old"]) < 1e-5
    whole = sum(r["value"] * r["norm_new"] * r["norm_old"] for r in layers[:4])
    assert abs(whole / steps[0]["norm_new"] / steps[0]["norm_old"] - steps[0]["value"]) < 1e-5


def test_rows_go_to_a_record_and_are_there_before_a_checkpoint(tmp_path):
    logged, flushed = [], []
    record = SimpleNamespace(log=lambda **row: logged.append(row), flush=lambda: flushed.append(len(logged)))
    cb = CreditAssignmentCB(record=record, every=2)
    fit(cb, CheckpointCB(tmp_path, every=3), steps=4)
    # steps 0 and 2 lie before the checkpoint at 3
    assert flushed[0] == 2 and [r["step"] for r in logged] == [0, 2] and cb.rows == []


PARTY = '''
import os, sys
import torch
from torch import nn
from visionbench.core.tensors import DictData, batches
from visionbench.systems.plwf.credit import CreditAssignmentCB
from visionbench.train.learner import Learner

def run(size):
    found = {}
    for mode in ("new", "pcgrad"):
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
        x = torch.randn(48, 5)
        def loss(o, b):
            return dict(new=(o - b["y"]).square().mean(), a=(o + b["y"]).square().mean(),
                        b=(o - 1).abs().mean())
        cb = CreditAssignmentCB(mode)
        learner = Learner(net, loss, batches(DictData(x=x, y=x.sin().sum(1, keepdim=True)), size, seed=1),
                          torch.optim.SGD(net.parameters(), .1, momentum=.9), [cb],
                          forward=lambda m, b: m(b["x"]), device="cpu").fit(2)
        found[mode] = net.state_dict()
        found[mode + "-rows"] = torch.tensor([[r["value"], r["projected"], r["norm_new"]] for r in cb.rows])
    learner.accelerator.wait_for_everyone()
    return dict(found, processes=learner.accelerator.num_processes)

if __name__ == "__main__": torch.save(run(int(sys.argv[1])), f"rank-{os.environ['RANK']}.pt")
'''


@pytest.mark.slow
def test_two_processes_project_the_gradient_of_the_whole_batch(tmp_path):
    """Two processes with batches of four make the steps of one with batches of eight."""
    (tmp_path / "party.py").write_text(PARTY)
    launch("party", 4, cwd=tmp_path)
    exec(PARTY, here := dict(__name__="party"))
    one, (a, b) = here["run"](8), (torch.load(tmp_path / f"rank-{k}.pt") for k in (0, 1))
    assert (one["processes"], a["processes"]) == (1, 2)
    for mode in ("new", "pcgrad"):
        for k, v in one[mode].items():
            assert torch.equal(a[mode][k], b[mode][k])
            torch.testing.assert_close(a[mode][k], v, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a[f"{mode}-rows"], one[f"{mode}-rows"], rtol=1e-4, atol=1e-5)
        assert one[f"{mode}-rows"][:, 1].any()


def test_settings_name_the_callback():
    settings = CreditAssignment("per_teacher", "layer")
    cb = CreditAssignmentCB.of(settings, seed=5, task=1)
    assert (cb.settings == settings and settings.separate and not CreditAssignment().separate
            and cb.about == dict(task=1))
    assert CreditAssignmentCB().settings == CreditAssignment() == CreditAssignment("new", "global")
