"""Continual methods on the one loop: closed forms in numpy, per-sample loops and GPM's original SVD.

Methods that are equal in theory must agree to the last bit.
"""
import ast
import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import visionbench.systems.plwf
from visionbench.core.tensors import DictData, batches, generator
from visionbench.data.hygiene import RawDataError
from visionbench.data.partition import TaskStream
from visionbench.nn.growing import GrowingHead, growing_cnn, growing_mlp, growing_resnet
from visionbench.systems.plwf.baselines import AGEM, EWC, GPM, MAS, SI, FineTune, Joint, LwF
from visionbench.systems.plwf.claims import accuracies, final
from visionbench.systems.plwf.credit import CreditAssignment
from visionbench.systems.plwf.fit import PLwF, compare, run_stream
from visionbench.systems.plwf.memories import extend_basis, input_rows, weight_rows
from visionbench.systems.plwf.methods import Stage, mixed_loss, new_loss
from visionbench.systems.plwf.penalties import fisher_diagonal
from visionbench.systems.plwf.results import METRICS, paired
from visionbench.systems.plwf.search import LambdaSearch, hold_back
from visionbench.systems.plwf.snapshots import Snapshots
from visionbench.systems.plwf.stream import Training, learn, train_task
from visionbench.train.learner import Learner

SHORT = Training("mlp", dict(hidden=(16,)), epochs=1, lr=.05)
EVERY = {"fine-tune": FineTune, "lwf": lambda: LwF(1.), "plwf": lambda: PLwF(1.),
         "credit": lambda: PLwF(1., credit=CreditAssignment()),
         "per_teacher": lambda: PLwF(1., credit=CreditAssignment("per_teacher")),
         "ewc": lambda: EWC(10., samples=20), "si": lambda: SI(1.), "mas": lambda: MAS(1., samples=20),
         "gpm": lambda: GPM(samples=20), "agem": lambda: AGEM(5), "joint": Joint}


def seeded(n):
    return torch.Generator().manual_seed(n)


def toy_stream(tasks=3, per_class=16, seed=0, **more):
    """Noise with a bright column that names the class; two classes a task."""
    g, y = seeded(seed), torch.arange(2 * tasks * per_class) % (2 * tasks)
    x = torch.rand(len(y), 1, 8, 8, generator=g) * .5
    x[torch.arange(len(y)), 0, :, y] += .4
    return TaskStream.from_arrays(x, y, x.clone(), y.clone(), increment=2, **more)


@pytest.fixture(scope="module")
def toy():
    return toy_stream()


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def weights(replica):
    return replica.net.state_dict()


def stage_of(net, x, y, t=0, bounds=(2, 4), **more):
    return Stage(t, bounds, net, DictData(image=x, label=y), Snapshots(lambda c: copy.deepcopy(net)), **more)


# ---- the cross-entropies

@pytest.mark.parametrize("first", [0, 2, 5])
def test_new_loss_is_the_closed_form(first):
    z, y = torch.randn(9, 8, generator=seeded(1), dtype=torch.float64), torch.arange(9) % (8 - first) + first
    a = z.numpy()
    def nll(lo): return np.mean(np.log(np.exp(a[:, lo:]).sum(1)) - a[np.arange(9), y])
    assert new_loss(z, y, first, "seen").item() == pytest.approx(nll(0), rel=1e-12)
    assert new_loss(z, y, first, "local").item() == pytest.approx(nll(first), rel=1e-12)
    sign = np.where(np.arange(first, 8) == y.numpy()[:, None], -1, 1)  # a yes to y, a no to all others
    by_class = np.log1p(np.exp(sign * a[:, first:])).sum(1).mean()
    assert new_loss(z, y, first, "bce").item() == pytest.approx(by_class, rel=1e-12)
    assert mixed_loss(z, y, (first or 4, 8), "bce").isclose(new_loss(z, y, 0, "bce"))


@pytest.mark.parametrize("bounds", [(2, 4, 8), (1, 5, 8), (8,)])
def test_mixed_loss_takes_the_block_of_each_image(bounds):
    z, y = (torch.randn(16, 8, generator=seeded(2), dtype=torch.float64, requires_grad=True),
            torch.arange(16) % 8)
    terms = []
    for row, label in zip(z.detach().numpy(), y.tolist()):
        first = max([b for b in (0, *bounds) if b <= label])
        stop = min(b for b in bounds if b > label)
        terms.append(math.log(np.exp(row[first:stop]).sum()) - row[label])
    loss = mixed_loss(z, y, bounds, "local")
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-12)
    loss.backward()
    assert z.grad.isfinite().all() and mixed_loss(z, y, bounds, "seen").isclose(F.cross_entropy(z, y))


# ---- growing

@pytest.mark.parametrize("make,shape", [(growing_mlp, (1, 8, 8)), (growing_cnn, (1, 14, 14)),
                                        (growing_resnet, (3, 32, 32))])
@pytest.mark.parametrize("steps", [(2, 2, 2, 2, 2), (5, 1, 4), (1,) * 10])
def test_growing_keeps_old_logits_to_the_last_bit(make, shape, steps):
    net, x, before = (make(shape, 10, generator=seeded(0)).eval(),
                      torch.rand(7, *shape, generator=seeded(1)), None)
    for i, more in enumerate(steps):
        z = net.grow(more, seeded(i))(x).detach()
        assert z.shape == (7, sum(steps[:i + 1]))
        assert before is None or torch.equal(z[:, :before.shape[1]], before)
        before = z


def test_closed_rows_do_not_move_whatever_the_optimizer():
    head = GrowingHead(4, 6).grow(2)
    opt = torch.optim.SGD(head.parameters(), .1, momentum=.9, weight_decay=.01)
    for _ in range(5):
        head(torch.ones(3, 4)).square().sum().backward()
        opt.step()
    assert head.weight[2:].eq(0).all() and head.bias[2:].eq(0).all()


def test_first_rows_are_drawn_as_a_linear_layer_draws_them():
    head, linear = GrowingHead(400, 1000).grow(1000, seeded(0)), nn.Linear(400, 1000)
    for p, q in ((head.weight, linear.weight), (head.bias, linear.bias)):
        assert p.abs().max() <= 400**-.5 and p.std().item() == pytest.approx(q.std().item(), rel=.05)


# ---- methods that must agree

@pytest.mark.parametrize("ce", ["seen", "local"])
@pytest.mark.parametrize("credit", [None, CreditAssignment()])
def test_lwf_is_plwf_with_the_last_teacher_to_the_last_bit(toy, ce, credit):
    a, b = (learn(m, toy, SHORT, 3) for m in (LwF(1.5, ce=ce, credit=credit),
                                              PLwF(1.5, ce=ce, teachers="last", credit=credit)))
    assert same(weights(a), weights(b)) and torch.equal(a.task.nan_to_num(), b.task.nan_to_num())
    assert not same(weights(a), weights(learn(PLwF(1.5, ce=ce, credit=credit), toy, SHORT, 3)))


@pytest.mark.parametrize("nobody", [[], 0])
def test_plwf_without_teachers_is_fine_tuning(toy, nobody):
    assert same(weights(learn(PLwF(7., teachers=nobody), toy, SHORT)), weights(learn(FineTune(), toy, SHORT)))


@pytest.mark.parametrize("teachers", ["all", "first_last", 1, 5, [0]])
def test_with_two_tasks_all_teachers_are_the_last(teachers):
    two = toy_stream(2)
    assert same(weights(learn(PLwF(1., teachers=teachers), two, SHORT)), weights(learn(LwF(1.), two, SHORT)))


def test_lambda_zero_is_fine_tuning_up_to_rounding(toy):
    a, b = weights(learn(PLwF(0.), toy, SHORT)), weights(learn(FineTune(), toy, SHORT))
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)


def test_credit_off_adds_the_gradients(toy):
    a, b = (weights(learn(PLwF(1., credit=c), toy, SHORT)) for c in (CreditAssignment("off"), None))
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


def test_cached_and_online_targets_train_alike(toy):
    a, b = (weights(learn(PLwF(1., cache=c), toy, SHORT)) for c in ("always", "never"))
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


@pytest.mark.parametrize("name", [n for n in EVERY if n != "joint"])
def test_all_methods_learn_the_first_task_alike(toy, name, tmp_path):
    first = [learn(m, toy, SHORT, 5, tmp_path / k).snapshots[0].state_dict()
             for k, m in (("a", EVERY[name]()), ("b", FineTune()))]
    assert same(*first)


@pytest.mark.parametrize("name", EVERY)
def test_a_seed_is_a_result_to_the_last_bit(toy, name):
    a, b, other = (learn(EVERY[name](), toy, SHORT, s) for s in (1, 1, 2))
    assert same(weights(a), weights(b)) and not same(weights(a), weights(other))


@pytest.mark.parametrize("name", EVERY)
def test_settings_do_not_learn(toy, name):
    method = EVERY[name]()
    before = copy.deepcopy(vars(method))
    learn(method, toy, SHORT)
    assert (vars(method).keys() == before.keys()
            and {k: v for k, v in vars(method).items() if k != "credit"}
            == {k: v for k, v in before.items() if k != "credit"})


def test_snapshots_are_what_was_trained_and_stay_so(toy, tmp_path):
    result = learn(PLwF(1.), toy, SHORT, 0, tmp_path)
    again = learn(PLwF(1.), toy_stream(), SHORT, 0)
    assert result.snapshots.digests == again.snapshots.digests and result.snapshots.bounds == (2, 4, 6)
    assert same(result.snapshots[-1].state_dict(), weights(result)) and not result.snapshots[0].training
    assert not any(p.requires_grad for p in result.snapshots[1].parameters())


# ---- data hygiene

@pytest.mark.parametrize("name", EVERY)
def test_nobody_touches_old_images_without_saying_so(toy, name):
    method = EVERY[name]()
    assert method.uses_raw_data == (name in ("agem", "joint"))
    guarded, free = learn(method, toy, SHORT, guard=True), learn(method, toy, SHORT)
    assert same(weights(guarded), weights(free))


@pytest.mark.parametrize("kind", [AGEM, Joint])
def test_who_keeps_images_and_does_not_say_so_is_caught(toy, kind):
    class Quiet(kind): uses_raw_data = False
    with pytest.raises(RawDataError, match="uses_raw_data"): learn(Quiet(), toy, SHORT, guard=True)


def test_the_search_for_lambda_sees_the_newest_task_only(toy):
    search = LambdaSearch(most=2)
    learn(PLwF(), toy, SHORT, guard=True, choose=search)
    assert {r["task"] for r in search.trials} == {1, 2}


# ---- EWC, SI, MAS

def small_net(classes=4, more=2):
    net = growing_cnn((1, 8, 8), 6, 2, 5, generator=seeded(4)).grow(classes)
    x, y = torch.rand(11, 1, 8, 8, generator=seeded(5)), torch.arange(11) % 2 + classes - more
    return net, x, y


@pytest.mark.parametrize("first", [0, 2])
def test_exact_fisher_is_the_sum_over_images_and_classes(first):
    net, x, y = small_net()
    found, params = fisher_diagonal(net, DictData(image=x, label=y), first), list(net.parameters())
    total = [torch.zeros_like(p) for p in params]
    for image in x:
        log_p = net(image[None])[0, first:].log_softmax(-1)
        for c in range(len(log_p)):
            for s, g in zip(total, torch.autograd.grad(log_p[c], params, retain_graph=True)):
                s += log_p[c].exp().detach() * g**2 / len(x)
    for v, s in zip(found.values(), total): assert torch.allclose(v, s, rtol=1e-4, atol=1e-9)
    assert found["head.weight"][4:].eq(0).all()  # rows that are not open are free


def test_empirical_fisher_takes_the_label():
    net, x, y = small_net()
    found, params = fisher_diagonal(net, DictData(image=x, label=y), kind="empirical"), list(net.parameters())
    total = [torch.zeros_like(p) for p in params]
    for image, label in zip(x, y):
        for s, g in zip(total, torch.autograd.grad(-F.cross_entropy(net(image[None]), label[None]), params)):
            s += g**2 / len(x)
    for v, s in zip(found.values(), total): assert torch.allclose(v, s, rtol=1e-4, atol=1e-9)


def test_sampled_fisher_is_unbiased():
    net, x, y = small_net()
    data = DictData(image=x, label=y)
    exact = fisher_diagonal(net, data)["head.weight"]
    draws = torch.stack([fisher_diagonal(net, data, kind="sampled", g=seeded(i))["head.weight"]
                         for i in range(150)])
    error = (draws.mean(0) - exact) / (draws.std(0) / 150**.5 + 1e-12)
    assert error[:4].abs().mean() < 1.2  # in standard errors; 0.8 expected of a normal one


def test_mas_is_the_mean_absolute_gradient():
    net, x, y = small_net()
    mas, params = MAS(1.), list(net.parameters())
    mas.begin(stage_of(net, x, y))
    total = [torch.zeros_like(p) for p in params]
    for image in x:
        for s, g in zip(total, torch.autograd.grad(net(image[None]).square().sum(), params)):
            s += g.abs() / len(x)
    for v, s in zip(mas.measure().values(), total): assert torch.allclose(v, s, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("method,scale,term",
                         [(EWC(4.), 2., "ewc"), (MAS(3.), 3., "mas"), (SI(5.), 5., "si")])
def test_penalties_by_hand(method, scale, term):
    net, x, y = small_net(2)
    method = method.fresh()
    method.begin(stage_of(net, x, y))
    assert set(method.loss(net(x), dict(label=y))) == {"new"}
    train_task(method, method.stage.data, Training("mlp", epochs=2, lr=.05, batch_size=5))
    method.end()
    anchor, importance = ({k: v.clone() for k, v in d.items()} for d in (method.anchor, method.importance))
    assert same(anchor, {k: p.detach() for k, p in net.named_parameters()})
    net.grow(2), method.begin(stage_of(net, x, y + 2, 1))
    with torch.no_grad():
        for i, p in enumerate(net.parameters()): p += torch.randn(p.shape, generator=seeded(i)) * .1
    by_hand = scale * sum((importance[k].double() * (p.detach() - anchor[k]).double()**2).sum()
                          for k, p in net.named_parameters())
    assert method.loss(net(x), dict(label=y + 2))[term].item() == pytest.approx(by_hand.item(), rel=1e-4)
    method.end()
    assert all((method.importance[k] >= importance[k]).all() for k in importance)  # summed over tasks
    assert same(method.anchor, {k: p.detach() for k, p in net.named_parameters()})


def test_si_follows_the_gradient_of_the_new_task_alone():
    """Each step once more by hand: the gradient of the new loss, computed apart, times the step that was
    made."""
    net, x, y = small_net(4)
    si = SI(50.).fresh()
    names = [k for k, _ in net.named_parameters()]
    si.anchor = {k: p.detach() + .05 for k, p in net.named_parameters()}
    si.importance = {k: torch.rand(p.shape, generator=seeded(i))
                     for i, (k, p) in enumerate(net.named_parameters())}
    path = {k: torch.zeros_like(p) for k, p in net.named_parameters()}

    class ByHand:
        def before_batch(self, learner):
            new = F.cross_entropy(net(learner.batch["image"]), learner.batch["label"])
            self.g, self.at = (torch.autograd.grad(new, list(net.parameters())),
                               [p.detach().clone() for p in net.parameters()])

        def after_step(self, learner):
            for k, g, at, p in zip(names, self.g, self.at, net.parameters()): path[k] -= g * (p.detach() - at)

    data = si.begin(stage_of(net, x, y, 1))
    Learner(net, si.loss, batches(data, 4), torch.optim.SGD(net.parameters(), .01, momentum=.9),
            [ByHand(), *si.callbacks()], device="cpu").fit(3)
    assert (all(torch.allclose(path[k], si.path[k], atol=1e-6) for k in names)
            and path["head.weight"].abs().max() > 1e-4)


# ---- GPM and A-GEM

def original_gpm(R, M, threshold):
    """The update of Saha et al. (2021), equations 8 and 9, with an SVD of the inputs (d,n)."""
    hat = R - M @ M.T @ R
    U, s, _ = np.linalg.svd(hat, full_matrices=False)
    total = (R**2).sum()
    have, k = total - (hat**2).sum(), 0
    while have < threshold * total and k < len(s): have, k = have + s[k]**2, k + 1
    return np.concatenate([M, U[:, :k]], 1)


@pytest.mark.parametrize("threshold", [.5, .9, .97, .999])
@pytest.mark.parametrize("seed", range(4))
def test_bases_span_what_the_original_svd_spans(threshold, seed):
    rng = np.random.default_rng(seed)
    mix, M, N = (rng.normal(size=(12, 12)) * np.geomspace(3, .01, 12), np.zeros((12, 0)),
                 torch.zeros(12, 0, dtype=torch.float64))
    for _ in range(3):
        R = mix @ rng.normal(size=(12, 40)) * np.geomspace(1, .1, 12)[:, None]
        M, N = original_gpm(R, M, threshold), extend_basis(torch.from_numpy(R @ R.T), N, threshold)
        assert M.shape == N.shape and np.allclose(N.T @ N, np.eye(N.shape[1]), atol=1e-10)
        assert np.allclose(M @ M.T, N @ N.T, atol=1e-6)  # the same subspace


@pytest.mark.parametrize("layer,shape", [
    (nn.Linear(6, 3), (4, 6)), (nn.Linear(6, 3, bias=False), (4, 6)),
    (nn.Conv2d(2, 5, 3, 2, 1), (2, 2, 9, 7)), (nn.Conv2d(2, 5, (3, 1), 1, (0, 2), bias=False), (2, 2, 6, 6)),
    (nn.Conv2d(2, 5, 3, dilation=2), (2, 2, 8, 8)), (GrowingHead(6, 3).grow(3), (4, 6))])
def test_input_rows_times_weight_rows_is_the_layer(layer, shape):
    x = torch.randn(shape, generator=seeded(0))
    out = layer(x).detach()
    rows = input_rows(layer, x) @ weight_rows(layer).T
    by_hand = out if out.ndim == 2 else out.flatten(2).transpose(1, 2).flatten(0, 1)
    assert torch.allclose(rows, by_hand, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: growing_mlp((1, 8, 8), 4, (12, 12), generator=seeded(0)),
                                  lambda: growing_cnn((1, 8, 8), 4, 3, 10, generator=seeded(0))])
def test_gpm_moves_only_outside_what_old_inputs_span(make):
    net, (x, y) = make().grow(2), small_net(2)[1:]
    gpm = GPM(threshold=1., ce="local").fresh()
    gpm.begin(stage_of(net, x, y)), gpm.end()
    before, z = {k: weight_rows(m).clone() for k, m in gpm.layers().items()}, net(x).detach()
    net.grow(2, seeded(9))
    gpm.begin(stage_of(net, 1 - x, y + 2, 1))
    train_task(gpm, gpm.stage.data, Training("mlp", epochs=4, lr=.05, batch_size=4))
    for k, m in gpm.layers().items():
        rows = slice(0, 2) if isinstance(m, GrowingHead) else slice(None)
        step = (weight_rows(m) - before[k])[rows].double()
        assert (step @ gpm.bases[k]).abs().max() < 1e-6
    head = (weight_rows(net.head) - before["head"])
    assert head[2:].abs().max() > 1e-3 and torch.allclose(net(x)[:, :2], z, atol=1e-4)


def test_agem_projects_on_stored_images_by_hand():
    net, x, y = small_net(4)
    agem = AGEM(per_class=4, batch=3).fresh()
    agem.begin(stage_of(net, x, y - 2)), agem.end()
    assert len(agem.memory) == 8 and agem.memory.tensors["label"].unique().tolist() == [0, 1]
    agem.begin(stage_of(net, x, y, 1))
    params, hits = list(net.parameters()), 0
    class At: iteration = 0
    for At.iteration in range(6):
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
        g = torch.cat([p.grad.flatten() for p in params]).double()
        at = torch.randperm(8, generator=generator(0, "memory", 1, At.iteration))[:3]
        kept = agem.memory[at]
        ref = torch.cat([r.flatten() for r in torch.autograd.grad(
            F.cross_entropy(net(kept["image"]), kept["label"]), params)]).double()
        expected = g - min(0, (g @ ref).item()) / (ref @ ref) * ref
        agem.after_backward(At)
        assert torch.allclose(torch.cat([p.grad.flatten() for p in params]).double(), expected, atol=1e-6)
        hits += (g @ ref).item() < 0
    assert agem.projected == hits > 0


def test_agem_remembers_all_tasks(toy):
    seen = []
    class Watch(AGEM):
        def end(self):
            super().end()
            seen.append(self.memory.tensors["label"].bincount().tolist())
    learn(Watch(per_class=3), toy, SHORT)
    assert seen == [[3] * 2, [3] * 4, [3] * 6]


# ---- the search for λ

def test_images_held_back_are_a_share_of_each_class():
    data = DictData(image=torch.arange(60.).view(60, 1, 1, 1), label=torch.arange(60) % 3)
    train, judges = hold_back(data, .25, 1)
    assert judges.tensors["label"].bincount().tolist() == [5] * 3 and len(train) == 45
    assert sorted(torch.cat([train.tensors["image"], judges.tensors["image"]]).flatten().tolist()) \
        == list(range(60))


@pytest.mark.parametrize("needed,accepted", [(100., 0), (3., 2), (0., 3)])
def test_lambda_shrinks_until_the_task_is_learned(monkeypatch, needed, accepted):
    """Accuracy scripted: 0.5 as soon as λ ≤ needed, else 0.1; fine-tuning has 0.6, of which 0.48 must be
    kept."""
    search = LambdaSearch(start=8., most=4)
    monkeypatch.setattr(search, "score", lambda m, stage, training: (
        .6 if not hasattr(m, "lam") else .5 if m.lam <= needed else .1))
    method = PLwF()
    search(method, Stage(1, (2, 4), None, None, None), Training())
    assert ([r["lam"] for r in search.trials] == [8., 4., 2., 1.][:accepted + 1]
            and method.lam == search.trials[-1]["lam"])
    assert [r["accepted"] for r in search.trials] == [False] * accepted + [needed > 0]


def test_a_trial_leaves_nothing_behind(toy):
    net = SHORT.net(toy, 0).grow(2)
    stage = Stage(0, toy.bounds, net, DictData(image=toy.tasks[0].train.image,
                                               label=toy.tasks[0].train.label), Snapshots(lambda c: net))
    before, method = copy.deepcopy(net.state_dict()), EWC()
    LambdaSearch().score(method, stage, SHORT)
    assert same(net.state_dict(), before) and not method.anchor and not hasattr(method, "stage")


# ---- results

def test_summary_and_table_by_hand(toy):
    found = compare({"LwF": LwF(1.), "PLwF": PLwF(1.)}, toy, model="mlp", model_options=dict(hidden=(16,)),
                    epochs=1, lr=.05, seeds=[4, 5])
    A, B = (found.results[k].accuracy("task").numpy() for k in ("PLwF", "LwF"))
    ends = A[:, -1].mean(-1) - B[:, -1].mean(-1)
    row = found.table().set_index("method").loc["PLwF"]
    assert (row.difference == pytest.approx(ends.mean())
            and row.difference_sd == pytest.approx(ends.std(ddof=1)))
    assert row.wins == f"{(ends > 0).sum()}/2" and row["mean"] == pytest.approx(A[:, -1].mean())
    s = found.results["PLwF"].summary().set_index(["kind", "metric"])["mean"]
    assert s["task", "learning"] == pytest.approx(np.mean([np.diag(a).mean() for a in A]))
    assert s["task", "BWT"] == pytest.approx(np.mean([(a[-1, :-1] - np.diag(a)[:-1]).mean() for a in A]))
    lost = [np.mean([np.nanmax(a[i:-1, i]) - a[-1, i] for i in range(2)]) for a in A]
    assert s["task", "forgetting"] == pytest.approx(np.mean(lost)) and set(METRICS) == {m for _, m in s.index}


def test_pairs_by_hand():
    p = paired(torch.tensor([1., 2., 3.]), torch.tensor([0., 2., 4.]))
    assert (p["difference"], p["sd"], p["wins"], p["seeds"]) == (0., 1., 1, 3)


def test_replicas_differ_in_order_weights_and_batches(toy):
    one, fixed = (run_stream(FineTune(), toy, model="mlp", model_options=dict(hidden=(16,)), epochs=1,
                             seeds=[0, 1], reorder=r) for r in (True, False))
    a, b = (toy.reordered(__import__("visionbench.systems.plwf.results",
                                     fromlist=["order_of"]).order_of(s)).order for s in (0, 1))
    assert a != b and not torch.equal(one.accuracy().nan_to_num(), fixed.accuracy().nan_to_num())


def test_credit_assignment_reports_every_step_but_those_of_the_first_task(toy):
    found = run_stream(PLwF(1., credit=CreditAssignment()), toy, model="mlp",
                       model_options=dict(hidden=(16,)), epochs=2, seeds=[0])
    rows = found.conflicts
    assert (rows.groupby("task").size().to_dict() == {1: 2, 2: 2}
            and {"projected", "coefficient", "norm_new", "norm_old"} <= {*rows})
    first = rows[(rows.task == 1) & (rows.step == 0)].iloc[0]
    assert first.norm_old < 1e-5 * first.norm_new and first.projected == 0  # the student is its teacher


def test_costs_count_teacher_forwards_and_bytes(toy):
    cost = run_stream(PLwF(1.), toy, model="mlp", model_options=dict(hidden=(16,)), epochs=3, seeds=[0]).cost
    # once a task, whatever the epochs
    assert cost.teachers.tolist() == [0, 1, 2] and cost.forwards.tolist() == [0, 32, 64]
    assert cost.steps.tolist() == [3, 3, 3] and cost.cache_bytes.tolist() == [0, 4 * 32 * 3, 4 * 32 * 5]
    assert cost.snapshot_bytes.is_monotonic_increasing


def test_accuracies_of_missing_members():
    class Empty:
        import pandas as pd
        metrics = pd.DataFrame(columns=["stage", "name", "value"])
    assert accuracies(Empty, "mnist5k", "lwf") is None and final(Empty, "mnist5k", "lwf", lam=2.) is None


def test_no_method_owns_a_loop_over_batches():
    """Design §2.3: whatever visits batches of a training set is the Learner.

    No `.backward()`, no `optimizer.step()` in this system."""
    folder = Path(visionbench.systems.plwf.__path__[0])
    calls = [(p.name, n.func.attr) for p in folder.glob("*.py") for n in ast.walk(ast.parse(p.read_text()))
             if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    assert not [c for c in calls if c[1] in ("backward", "step")] and ("stream.py", "fit") in calls
