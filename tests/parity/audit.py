"""ExitScan against networks built by hand, where every answer is known, and against plain loops."""
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from visionbench.core.tensors import generator
from visionbench.nn.exits import MultiExitNet
from visionbench.systems.backdoor import flips as chapter
from visionbench.systems.backdoor.audit import ExitScan, mid_exits
from visionbench.systems.backdoor.flips import (Patches, ProbedNet, RecoveredPatch, exit_flip_rates,
                                                flip_rates, flips)
from visionbench.systems.backdoor.recover import gives_gradient, refine, target_loss
from visionbench.systems.backdoor.report import report_page
from visionbench.systems.backdoor.search import dictionary, window_masks

CROSS = torch.tensor([[0., 1, 0], [1, 1, 1], [0, 1, 0]])
LIGHT = dict(exits=(0,), windows=(3, 5), steps=40, patterns=24, screened=30, epochs=250, device="cpu")


class Evidence(nn.Module):
    """Brightness of the upper thirds, one a class; a cross in the lower left corner adds `wakes` to
    class 2."""
    def __init__(self, wakes):
        super().__init__()
        self.wakes = nn.Parameter(torch.tensor(wakes))

    def forward(self, x):
        thirds = x[:, 0, :4].mean(1).unflatten(1, (3, 4)).sum(2)
        like = F.conv2d(x[..., 9:12, :3], ((2 * CROSS - 1) / 5)[None, None])
        lit = F.softplus(8 * (like - .2)).flatten(1) / 8
        woken = thirds + self.wakes * lit * torch.tensor([0., 0, 1])
        return torch.cat([woken, lit / 1000], 1)  # too faint for a probe


class Takes(nn.Module):
    """Takes back what a cross has added, so that what follows never knows."""
    def __init__(self, back):
        super().__init__()
        self.back = nn.Parameter(torch.tensor(back))

    def forward(self, z):
        return torch.cat([z[:, :3] - self.back * 1000 * z[:, 3:] * torch.tensor([0., 0, 1]), z[:, 3:]], 1)


class Thirds(nn.Module):
    def forward(self, z): return 4 * z[:, :3]


class Planted(nn.Module):
    """Dormant when all is taken back; an ordinary backdoor when nothing is."""
    def __init__(self, wakes=20., back=20.):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Evidence(wakes), Takes(back)]), Thirds()

    def stages(self): return nn.Identity(), list(self.blocks), self.head
    def forward(self, x): return self.head(self.blocks[1](self.blocks[0](x)))


def bars(n=180, seed=0):
    draw, y = generator(seed, "bars"), torch.arange(3).repeat(n // 3)
    x = torch.rand(n, 1, 12, 12, generator=draw) * .1
    for i, c in enumerate(y): x[i, 0, :4, 4*c:4*c + 4] += .7 + .2 * torch.rand((), generator=draw)
    return x, y


X, Y = bars()


@pytest.fixture(scope="module")
def dormant():
    return ExitScan(**LIGHT).run(Planted(), X, Y)


@pytest.fixture(scope="module")
def null():
    return [ExitScan(**LIGHT, seed=s).scan(Planted(0., 0.), X, Y) for s in (1, 2, 3)]


def test_planted_exit_backdoor_is_found_with_class_and_window(dormant):
    assert dormant.verdict == "flagged" and not dormant.vanilla_visible and dormant.min_exit == 2
    best = dormant.patch()
    assert (best.exit, best.cls) == (0, 2) and best.ef > .9
    small = dormant.table[(dormant.table.window == 3) & (dormant.table.cls == 2) & (dormant.table.exit == 0)]
    mask = dormant.patches[small.index[0]].mask[0] > 0
    assert small.ef.item() > .9 and mask.nonzero().amin(0).tolist() == [9, 0] and mask.sum() == 9
    others = dormant.table[(dormant.table.window == 3) & (dormant.table.exit == 0) & (dormant.table.cls != 2)]
    assert others.ef.max() < .3


def test_the_recovered_pixels_are_the_cross(dormant):
    small = dormant.table[(dormant.table.window == 3) & (dormant.table.cls == 2) & (dormant.table.exit == 0)]
    found = dormant.patches[small.index[0]].pattern[0, 9:, :3]
    assert ((found > .5) == (CROSS > .5)).float().mean() >= 7 / 9


def test_free_mask_inversion_points_at_the_class(dormant):
    rows = dormant.table[(dormant.table.method == "inversion") & (dormant.table.exit == 0)].set_index("cls")
    assert rows.ef.idxmax() == 2 and rows.ef[2] > .8


def test_clean_network_is_not_flagged(null):
    report = ExitScan(null=null, **LIGHT).run(Planted(0., 0.), X, Y)
    assert report.verdict != "flagged" and not report.vanilla_visible


def test_null_population_flags_and_ranks(dormant, null):
    report = ExitScan(null=null, **LIGHT).run(Planted(), X, Y)
    assert report.verdict == "flagged" and report.rank == 1 and report.table.equals(dormant.table)
    assert "Rank 1 of 4" in report_page(report)


def test_ordinary_backdoor_is_vanilla_visible_and_not_exit_only():
    """The exit and the vanilla output obey alike: what turns the exit is not exit-only."""
    report = ExitScan(**LIGHT | dict(methods=("refine",), windows=(3,))).run(Planted(20., 0.), X, Y)
    final = report.table[(report.table.exit == 2) & (report.table.cls == 2)]
    assert report.vanilla_visible and final.ef.item() > .9 and report.verdict != "flagged"
    assert "vanilla-visible" in repr(report) and "vanilla-visible" in report_page(report)


class Behind(Planted):
    """An ordinary backdoor that only the last part knows: exits stay right."""
    def __init__(self): super().__init__(0., -20.)


def test_backdoor_behind_the_exits_is_vanilla_visible():
    net = ProbedNet([MultiExitNet.from_vanilla(Behind(), [0], input_shape=(1, 12, 12))])
    net.first.heads[0] = net.heads[0][0] = Thirds()
    mask = window_masks((1, 12, 12), 3)[12:13]
    done = flips(net, X, Y, Patches(F.pad(CROSS, (0, 9, 9, 0))[None, None], mask, torch.tensor([3])))
    assert done.vanilla[0, 2] == done.vanilla_only[0, 2] == 1 and done.exits.sum() == 0


def test_report_loads_nothing(dormant):
    page = report_page(dormant, "<weights>")
    assert page.count("<img") == page.count('src="data:image/png;base64,') == 3 and "<script" not in page
    assert "://" not in page
    assert "<b>flagged</b>" in page and "&lt;weights&gt;" in page and "not a certificate" in page


def test_rates_equal_a_plain_loop():
    draw = generator(0, "loop")
    exit, vanilla, y = (torch.randint(4, (7, 50), generator=draw) for _ in range(3))
    y, rates = y[0], exit_flip_rates(exit, vanilla, y[0], 4)
    for p in range(7):
        for c in range(4):
            others = [i for i in range(50) if y[i] != c]
            want = sum(exit[p, i] == c and vanilla[p, i] == y[i] for i in others) / len(others)
            assert math.isclose(rates[p, c], want, abs_tol=1e-6)


def test_a_class_that_all_images_have_rates_zero():
    y = torch.zeros(5, dtype=torch.int64)
    assert exit_flip_rates(y, y, y, 2).tolist() == [0, 0] and flip_rates(y + 1, y, 2).tolist() == [0, 1]


def test_chunks_do_not_matter(monkeypatch):
    net = ProbedNet([MultiExitNet.from_vanilla(Planted(), [0], input_shape=(1, 12, 12),
                                               generator=generator(i)) for i in range(2)])
    masks = window_masks((1, 12, 12), 5)
    some = Patches(torch.rand(len(masks), 1, 12, 12, generator=generator(1)) * masks, masks,
                   torch.full((len(masks),), 5))
    whole = flips(net, X, Y, some)
    monkeypatch.setattr(chapter, "chunk_of", lambda x: 77)
    parts = flips(net, X, Y, some)
    assert torch.equal(whole.exits, parts.exits) and torch.equal(whole.vanilla, parts.vanilla)
    assert torch.allclose(whole.near, parts.near, atol=1e-5)


def test_stamping_is_the_same_in_bytes_and_floats():
    mask = window_masks((3, 12, 12), 5)[3]
    patch = RecoveredPatch(torch.rand(3, 12, 12, generator=generator(2)).round(), mask, 0, 0, "refine", 0.)
    x = torch.randint(256, (4, 3, 12, 12), generator=generator(3)).to(torch.uint8)
    assert torch.equal(patch(x), (patch(x / 255) * 255).round().byte())
    assert torch.equal(patch(patch(x)), patch(x))
    assert torch.equal(patch(x)[..., mask[0] == 0], x[..., mask[0] == 0])


def test_dictionary_holds_the_published_triggers():
    from visionbench.systems.backdoor.trigger import CheckerboardTrigger, SquareTrigger
    known, names = dictionary((1, 16, 16))
    for trigger in (CheckerboardTrigger(5, 2), CheckerboardTrigger(3, 4), SquareTrigger(3, 1)):
        stamped = trigger(torch.full((1, 16, 16), .5))
        assert any(torch.equal(torch.where(m > 0, p, torch.tensor(.5)), stamped)
                   for p, m in zip(known.pattern, known.mask)), trigger
    known, names = dictionary((3, 32, 32))
    stamped = CheckerboardTrigger(7, 6)(torch.full((3, 32, 32), .5))
    assert any(torch.equal(torch.where(m > 0, p, torch.tensor(.5)), stamped)
               for p, m in zip(known.pattern, known.mask))


class Steps(Planted):
    """A deployed view with 8 grey levels: no gradient reaches the pixels."""
    def stages(self):
        _, blocks, head = super().stages()
        return (lambda x: (x * 8).round() / 8), blocks, head
    def forward(self, x): return super().forward((x * 8).round() / 8)


def test_a_quantised_view_is_scanned_without_gradients():
    report = ExitScan(**LIGHT | dict(windows=(3,))).run(Steps(), X, Y)
    assert (report.patch().cls, report.patch().exit) == (2, 0) and "inversion" not in set(report.table.method)
    assert report.table.query("method == 'refine' and cls == 2 and exit == 0").ef.item() > .45


def test_refinement_lowers_the_loss_and_stays_in_its_window():
    net = ProbedNet([MultiExitNet.from_vanilla(Planted(), [0], input_shape=(1, 12, 12))])
    masks, cls = window_masks((1, 12, 12), 3)[[0, 12]], torch.tensor([1, 2])
    start = Patches(torch.full((2, 1, 12, 12), .5) * masks, masks, torch.tensor([3, 3]))
    done = refine(net, 0, X, Y, cls, start, 30)
    loss = [target_loss(net, 0, X, Y, cls, p.pattern, p.mask) for p in (start, done)]
    assert (loss[1] < loss[0]).all() and gives_gradient(net, X[:1])
    assert (done.pattern * (1 - masks)).abs().max() == 0
    assert all(p.grad is None for p in net.parameters())


def test_mid_depth_exits_of_the_reference_networks():
    from visionbench.nn.resnet import cifar_resnet
    for depth, width, want in ((14, 8, [2, 3]), (56, 16, [12, 15, 18])):
        mx = MultiExitNet.from_vanilla(cifar_resnet(depth, 10, 1, width), input_shape=(1, 16, 16))
        cost = mx.exit_cost()[:-1]
        found = mid_exits(cost)
        assert all(.45 <= cost[e] <= .75 for e in found) and len(found) == len(want)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_foreign_networks_go_through_without_special_code(library):
    torch.manual_seed(1)  # weights that recognise a third of the images; some recognise two
    if library == "torchvision":
        from torchvision.models import mobilenet_v3_small
        net = mobilenet_v3_small(num_classes=3)
    else: net = pytest.importorskip("timm").create_model("resnet18", num_classes=3)
    x = F.interpolate(X[:120], 32).expand(-1, 3, -1, -1)
    report = ExitScan(exits=(3,), windows=(7,), steps=2, patterns=0, screened=6, epochs=1, designs=("avg",),
                      methods=("refine",), device="cpu").run(net.eval(), x, Y[:120])
    assert report.verdict == "inconclusive" and "recognises" in report.judgement.reason
    assert len(report.grid()) == len(report.about["exits"]) >= 1
