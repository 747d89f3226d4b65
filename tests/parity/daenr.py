"""DAE-NR against dense kernels, numpy, scipy, scikit-learn and plain autograd.

What must be equal is compared to the last bit.
"""
import math
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.ndimage import map_coordinates
from scipy.signal import convolve2d
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from torch import nn
from torch.nn import functional as F

from visionbench.data.responses import NeuralDataset, simulated_v1_dataset
from visionbench.nn.autoencoder import Standardise, draw_weights, reference_autoencoder, small_autoencoder
from visionbench.systems.daenr.compare import compare_variants, paired_differences, per_seed
from visionbench.systems.daenr.config import DaenrConfig, Member, members
from visionbench.systems.daenr.losses import (NEURAL_LOSSES, JointLoss, anscombe_loss, correlation_loss,
                                              group_sparsity, kl_divergence, mse_loss, poisson_loss,
                                              reconstruction_loss, smoothness)
from visionbench.systems.daenr.nets import member_network
from visionbench.systems.daenr.network import NeuralAutoencoder, build_network
from visionbench.systems.daenr.neurons import (evaluate_dae_nr, judge_neurons, layer_similarity, look,
                                               neuron_table)
from visionbench.systems.daenr.readout import (READOUTS, DenseReadout, FactorizedReadout, GaussianReadout,
                                               inverse_softplus)
from visionbench.systems.daenr.references import (fit_readout, pca_reconstruction, random_network,
                                                  ridge_readout)
from visionbench.systems.daenr.training import (GradientCosineCB, History, SelectCB, held_out_score,
                                                train_dae_nr)
from visionbench.systems.daenr.variants import train_member, train_members
from visionbench.train.callbacks import CheckpointCB

SHAPE, N = (3, 5, 4), 6


def seeded(n):
    return torch.Generator().manual_seed(n)


@pytest.fixture(scope="module")
def ds():
    return simulated_v1_dataset(n_train=48, n_test=6, repeats=4, n_neurons=10, seed=3, n_eval=20)


CONFIG = DaenrConfig.start("quick", images=48, neurons=10, epochs=3, batch=16, latent=8, device="cpu")


def network(ds, config=CONFIG, neural=True, **how):
    return build_network(config, ds.images, ds.responses.nanmean(0) if neural else None, **how)


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


# ---- readouts

@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("output", ["softplus", "linear"])
def test_factorized_readout_equals_its_dense_kernel(positive, output):
    read = FactorizedReadout(SHAPE, N, positive, torch.rand(N, generator=seeded(1)), output, seeded(2))
    with torch.no_grad():  # signs must matter or not, as asked
        read.mask[::2] *= -1
        read.features[1::2] *= -1
    m, f = (w.abs() if positive else w for w in (read.mask, read.features))
    kernel = torch.einsum("nc,nhw->nchw", f, m)
    h = torch.randn(7, *SHAPE, generator=seeded(3))
    u = torch.einsum("bchw,nchw->bn", h, kernel) + read.bias
    assert torch.allclose(read(h), F.softplus(u) if output == "softplus" else u, atol=1e-6)
    assert torch.allclose(read.l1(), kernel.abs().sum((1, 2, 3)).mean(), atol=1e-6)
    dense = DenseReadout(SHAPE, N, False, None, output)
    with torch.no_grad(): dense.kernel.copy_(kernel), dense.bias.copy_(read.bias)
    assert torch.allclose(dense(h), read(h), atol=1e-6) and torch.allclose(dense.l1(), read.l1(), atol=1e-6)


def test_parameters_per_neuron():
    C, H, W = 48, 19, 19
    count = {name: sum(p.numel() for p in kind((C, H, W), 2).parameters()) / 2
             for name, kind in READOUTS.items()}
    assert count == dict(factorized=H * W + C + 1, gaussian=2 + 4 + C + 1, dense=H * W * C + 1)


@pytest.mark.parametrize("kind", READOUTS.values())
def test_zero_weights_predict_the_mean_response(kind):
    mean = torch.tensor([.01, .3, 1., 7., 40., 1e-3])
    read = kind(SHAPE, N, mean_response=mean).eval()
    with torch.no_grad():
        for name, p in read.named_parameters():
            if name in ("mask", "features", "kernel"): p.zero_()
    assert torch.allclose(read(torch.randn(2, *SHAPE)), mean.expand(2, N), rtol=1e-5)


def test_a_silent_neuron_starts_almost_silent():
    assert 0 < F.softplus(FactorizedReadout(SHAPE, 1, mean_response=torch.zeros(1)).bias).item() < 2e-3
    u = torch.linspace(-8, 60, 300, dtype=torch.float64)
    assert torch.allclose(inverse_softplus(F.softplus(u)), u, atol=1e-9)


def test_initial_weights_sum_to_about_one():
    """|m| ~ U(0, 2/HW) and |f| ~ U(0, 2/C), never 0, where an absolute value has no slope."""
    read = FactorizedReadout((16, 16, 16), 400, generator=seeded(0))
    assert abs(read.mask.sum((1, 2)).mean() - 1) < .01 and abs(read.features.sum(1).mean() - 1) < .03
    assert (read.mask.min() > 0 and read.mask.max() <= 2 / 256
            and read.features.min() > 0 and read.features.max() <= 2 / 16)


@pytest.mark.parametrize("covariance", ["isotropic", "diagonal", "full"])
def test_gaussian_readout_reads_bilinearly_at_its_place(covariance):
    read = GaussianReadout(SHAPE, N, mean_response=torch.full((N,), .5), generator=seeded(4),
                           covariance=covariance).eval()
    h = torch.randn(3, *SHAPE, generator=seeded(5))
    x, y = ((read.mu.detach().numpy() + 1) / 2 * [SHAPE[2] - 1, SHAPE[1] - 1]).T
    seen = np.stack([[map_coordinates(c, [y, x], order=1) for c in image] for image in h.numpy()])
    u = np.einsum("bcn,nc->bn", seen, read.features.detach().numpy()) + read.bias.detach().numpy()
    assert np.allclose(read(h).detach().numpy(), np.log1p(np.exp(u)), atol=1e-5)
    assert torch.equal(read(h), read(h)) and torch.allclose(read.where().sum((1, 2)), torch.ones(N))
    with torch.no_grad(): read.root.zero_()
    assert torch.equal(read.train()(h), read.eval()(h))  # Σ → 0: the point itself


def test_gaussian_readout_samples_from_its_covariance():
    read = GaussianReadout((1, 9, 9), 1, covariance="full")
    with torch.no_grad():
        read.mu.zero_()
        read.root.copy_(torch.tensor([[[.1, 0.], [.08, .05]]]))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        places = read.train().places(40_000)[:, 0].detach()
    want = read.root[0] @ read.root[0].T
    assert torch.allclose(places.T.cov(), want.detach(), atol=3e-4) and places.mean(0).abs().max() < 2e-3


@pytest.mark.parametrize("kind", READOUTS)
def test_gradcheck_of_the_readouts(kind):
    read = READOUTS[kind](SHAPE, 2, mean_response=torch.tensor([.3, 2.]), generator=seeded(6)).double().eval()
    h = torch.randn(2, *SHAPE, dtype=torch.float64, generator=seeded(7), requires_grad=True)
    names = [n for n, _ in read.named_parameters() if n != "root"]  # evaluation reads at μ
    def f(h, *ps): return torch.func.functional_call(read, dict(zip(names, ps)), (h,))
    assert torch.autograd.gradcheck(f, (h, *(dict(read.named_parameters())[n].detach().requires_grad_()
                                             for n in names)))


# ---- losses

@pytest.mark.parametrize("name", NEURAL_LOSSES)
def test_gradcheck_of_the_losses(name):
    p = (.1 + torch.rand(5, 3, dtype=torch.float64, generator=seeded(8))).requires_grad_()
    r = torch.poisson(torch.ones(5, 3, dtype=torch.float64), generator=seeded(9))
    assert torch.autograd.gradcheck(lambda p: NEURAL_LOSSES[name](p, r), p)


def test_neural_losses_equal_numpy():
    p, r = (.1 + torch.rand(8, 5, generator=seeded(k), dtype=torch.float64) for k in (1, 2))
    a, b = p.numpy(), r.numpy()
    assert poisson_loss(p, r).item() == pytest.approx((a - b * np.log(a + 1e-5)).mean())
    assert mse_loss(p, r).item() == pytest.approx(((a - b) ** 2).mean())
    assert anscombe_loss(p, r).item() == pytest.approx(
        ((2 * np.sqrt(a + 3 / 8) - 2 * np.sqrt(b + 3 / 8)) ** 2).mean())
    each = [np.corrcoef(a[:, n], b[:, n])[0, 1] for n in range(5)]
    assert correlation_loss(p, r, eps=0.).item() == pytest.approx(1 - np.mean(each))


@pytest.mark.parametrize("rate", [.02, .5, 3., 40.])
def test_poisson_loss_is_lowest_at_the_response(rate):
    grid = torch.linspace(.25, 4, 1501, dtype=torch.float64) * rate
    values = torch.stack([poisson_loss(g.view(1, 1), torch.tensor([[rate]], dtype=torch.float64))
                          for g in grid])
    assert grid[values.argmin()].item() == pytest.approx(rate, rel=4e-3, abs=2e-5)


def test_sum_and_mean_over_neurons_differ_by_lambda_only():
    """λ_mean = N·λ_Klindt with the same γ: gradients agree."""
    read = FactorizedReadout(SHAPE, N, generator=seeded(1)).double()
    h = torch.randn(4, *SHAPE, dtype=torch.float64, generator=seeded(2))
    r = torch.poisson(torch.ones(4, N, dtype=torch.float64), generator=seeded(3))
    p = read(h)
    outer = torch.einsum("nc,nhw->nchw", read.features.abs(), read.mask.abs())
    summed = .3 * ((p - r * torch.log(p + 1e-5)).sum(1).mean() + .02 * outer.sum())
    ours = N * .3 * (poisson_loss(p, r) + .02 * read.l1())
    for a, b in zip(*(torch.autograd.grad(v, [*read.parameters()], retain_graph=True)
                      for v in (summed, ours))):
        assert torch.allclose(a, b, rtol=1e-10)


@pytest.mark.parametrize("name", NEURAL_LOSSES)
def test_missing_responses_count_for_nothing(name):
    loss, p = NEURAL_LOSSES[name], .2 + torch.rand(9, 4, generator=seeded(1))
    r = torch.poisson(torch.full((9, 4), 2.), generator=seeded(2))
    r[6:, 1], r[:, 3] = float("nan"), float("nan")
    p.requires_grad_()
    g, = torch.autograd.grad(loss(p, r), p)
    assert g.isfinite().all() and (g[6:, 1] == 0).all() and (g[:, 3] == 0).all() and (g[:6, 1] != 0).all()
    if name != "corr":  # neurons with fewer trials weigh less
        known = ~r.isnan()
        assert torch.isclose(loss(p, r) * known.sum(),
                             sum(loss(p[:, [n]], r[:, [n]]) * known[:, n].sum() for n in range(3)))


def test_filter_regularisers_equal_numpy():
    w = torch.randn(4, 3, 7, 5, dtype=torch.float64, generator=seeded(1))
    lap = np.array([[.25, .5, .25], [.5, -3, .5], [.25, .5, .25]])
    planes = w.numpy().reshape(-1, 7, 5)
    assert smoothness(w).item() == pytest.approx(sum((convolve2d(k, lap, "same") ** 2).sum() / (k ** 2).sum()
                                                     for k in planes))
    assert group_sparsity(w).item() == pytest.approx(sum(np.sqrt((k ** 2).sum()) for k in planes))
    assert torch.autograd.gradcheck(smoothness, w[:2, :1].clone().requires_grad_())
    assert torch.autograd.grad(group_sparsity(z := torch.zeros(1, 1, 3, 3, requires_grad=True)),
                               z)[0].isfinite().all()


def test_divergence_equals_torch():
    post = torch.randn(6, 2, 5, dtype=torch.float64, generator=seeded(1))
    q = torch.distributions.Normal(post[:, 0], torch.exp(post[:, 1] / 2))
    want = torch.distributions.kl_divergence(q, torch.distributions.Normal(0., 1.)).sum(1).mean()
    assert kl_divergence(post).item() == pytest.approx(want.item())


def test_joint_loss_equals_the_equation(ds):
    net = network(ds, CONFIG.replace(taps=(3,)), tap=3, variational=True).double().eval()
    x, r = ds.images[:9].double(), ds.responses[:9].double()
    out = net(x)
    loss = JointLoss(net, 2., 3., .05, "poisson", smooth=.1, sparse=.2, beta=.4)
    terms, std = loss(out, dict(image=x, response=r)), x.new_tensor(float(net.standardise.std))
    assert list(terms) == ["reconstruction", "neural", "readout_l1", "smoothness", "sparsity", "kl"]
    filters = [net.encoder.stages[f"h{k}"][0].weight for k in (1, 2, 3)]
    want = (2 * ((out.reconstruction - x) / std).square().mean()
            + 3 * (poisson_loss(out.response, r) + .05 * net.readout.l1()))
    want = want + .1 * smoothness(filters[0]) + .2 * (group_sparsity(filters[1]) + group_sparsity(filters[2]))
    assert sum(terms.values()).item() == pytest.approx((want + .4 * kl_divergence(out.posterior)).item(),
                                                       rel=1e-9)


def test_reconstruction_is_compared_in_standardised_units(ds):
    for per in ("scalar", "pixel"):
        net = network(ds, CONFIG.replace(normalize=per), neural=False).eval()
        out, x = net(ds.images), ds.images
        z = net.standardise(x)
        drawn = net.decoder(net.encoder(z))
        assert torch.isclose(reconstruction_loss(out.reconstruction, x, net.standardise.std),
                             (drawn - z).square().mean(), rtol=1e-5)
        assert abs(z.mean()) < 1e-5 and abs(z.std(correction=0) - 1) < 1e-3


# ---- architectures

def test_layers_of_the_specification():
    encoder, decoder = reference_autoencoder(latent=256)
    assert encoder.shapes == dict(h1=(48, 19, 19), h2=(48, 19, 19), h3=(48, 19, 19), h4=(64, 10, 10),
                                  h5=(64, 5, 5))
    kernels = [m.weight.shape for m in encoder.modules() if isinstance(m, nn.Conv2d)]
    assert kernels == [(48, 1, 13, 13), (48, 48, 3, 3), (48, 48, 3, 3), (64, 48, 3, 3), (64, 64, 3, 3)]
    assert (decoder(torch.zeros(2, 256)).shape == (2, 1, 31, 31)
            and encoder.project.weight.shape == (256, 1600))
    x = torch.rand(3, 1, 31, 31, generator=seeded(1))
    h = encoder.eval().layers(x)
    conv, norm, _ = encoder.stages["h3"]
    # Klindt's readout sits before any non-linearity
    assert torch.equal(h["h3"], norm(conv(h["h2"]))) and h["h2"].min() > 0
    assert torch.allclose(h["h4"], encoder.stages["h4"][1:](F.softplus(h["h3"])), atol=1e-6)
    small, _ = small_autoencoder()
    assert small.shapes == dict(h1=(16, 16, 16), h2=(16, 16, 16), h3=(32, 8, 8), h4=(32, 4, 4))
    assert all(m.momentum == .1 for m in encoder.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 40, 5), nn.ConvTranspose2d(40, 8, 5), nn.Linear(200, 40)])
def test_weights_are_drawn_as_torch_does(layer):
    """Same bounds for weights and biases as `reset_parameters`."""
    draw_weights(layer, seeded(1))
    mine = [p.abs().max().item() for p in layer.parameters()]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer.reset_parameters()
    for a, p in zip(mine, layer.parameters()):
        assert a == pytest.approx(p.abs().max().item(), rel=.2 if p.ndim == 1 else .01)


# ---- training: what must be equal, and what must be zero

@pytest.mark.parametrize("arch,taps", [("small", (1, 2, 3, 4)), ("reference", (1, 2, 3, 4, 5))])
@pytest.mark.parametrize("readout", READOUTS)
def test_no_neural_gradient_beyond_the_tap(ds, arch, taps, readout):
    for tap in taps:
        net = network(ds, CONFIG.replace(arch=arch, readout=readout), tap=tap)
        poisson_loss(net(ds.images[:8]).response, ds.responses[:8]).backward()
        for k in range(1, len(taps) + 1):
            grads = [p.grad for p in net.encoder.stages[f"h{k}"].parameters()]
            if k > tap: assert all(g is None or (g == 0).all() for g in grads)
            else: assert any(g.abs().max() > 0 for g in grads)
        beyond = [*net.encoder.project.parameters(), *net.decoder.parameters()]
        assert all(p.grad is None or (p.grad == 0).all() for p in beyond)


def test_members_start_from_the_same_weights(ds):
    config = CONFIG.replace(variants=("ae", "nr", "dae_nr", "dae_nr_shuffled", "dae_nr_pretrained"),
                            taps=(2, 3), neural_weights=(1., 0.))
    nets = {m: member_network(config, ds, m) for m in members(config)}
    for part, count in dict(encoder=8, decoder=6).items():  # two predictors have no decoder
        states = [getattr(n, part).state_dict() for n in nets.values() if getattr(n, part) is not None]
        assert len(states) == count and all(same(states[0], s) for s in states)
    for tap in (2, 3):
        states = [n.readout.state_dict() for m, n in nets.items() if m.tap == tap]
        assert len(states) >= 2 and all(same(states[0], s) for s in states)


def test_same_seed_same_history_to_the_last_bit(ds):
    runs = [(net := network(ds), train_dae_nr(net, ds, CONFIG).table) for _ in range(2)]
    assert runs[0][1].equals(runs[1][1]) and same(*(net.state_dict() for net, _ in runs))
    other = train_dae_nr(network(ds, CONFIG.replace(seed=1)), ds, CONFIG.replace(seed=1)).table
    assert not other.equals(runs[0][1])


@pytest.mark.parametrize("changes", [{}, dict(readout="gaussian"), dict(clip=1e-3),
                                     dict(arch="reference", batch=24, epochs=1)])
def test_lambda_zero_is_the_auto_encoder(ds, changes):
    """Also where clipping acts at every step."""
    config = CONFIG.replace(**changes)
    alone, joint = network(ds, config, neural=False), network(ds, config)
    start = {k: v.clone() for k, v in joint.readout.state_dict().items()}
    tables = [train_dae_nr(net, ds, config, weight=0.).table for net in (alone, joint)]
    assert tables[0].equals(tables[1]) and set(tables[0].name) == {"reconstruction"}
    trained = joint.state_dict()
    assert (all(torch.equal(v, trained[k]) for k, v in alone.state_dict().items())
            and same(joint.readout.state_dict(), start))


def test_variants_see_the_same_batches(ds):
    class Watch:
        def __init__(self): self.seen = []
        def before_batch(self, learner): self.seen.append(learner.batch["image"].sum((1, 2, 3)))
    seen = {}
    for name, how in dict(ae=dict(neural=False), nr=dict(decode=False), dae_nr={}).items():
        train_dae_nr(network(ds, **how), ds, CONFIG, callbacks=[watch := Watch()])
        seen[name] = watch.seen
    assert len(seen["ae"]) == 9 and all(torch.equal(a, b) for v in seen.values()
                                        for a, b in zip(seen["ae"], v))


def test_gradient_cosine_equals_two_backward_passes(ds):
    net = network(ds)
    loss = JointLoss(net, neural=.7)
    batch = {k: v[:16] for k, v in ds.tensors.items()}
    class Step:
        """What the callback needs of a Learner."""
        index, epoch, iteration, model = 0, 4, 20, net
        accelerator = type("A", (), dict(unwrap_model=lambda self, m: m, num_processes=1))()
    record, step = History(), Step()
    step.terms = loss(net(batch["image"]), batch)
    cb = GradientCosineCB(record, "x")
    cb.after_loss(step)
    rec, neu = (torch.cat([g.flatten() for g in torch.autograd.grad(step.terms[k], net.shared(),
                                                                    retain_graph=True)])
                for k in ("reconstruction", "neural"))
    sum(step.terms.values()).backward()
    cb.after_backward(step)
    told = {r["name"]: r["value"] for r in record.rows}
    assert told["gradient_cosine"] == pytest.approx(F.cosine_similarity(rec, neu, 0).item(), abs=1e-4)
    assert told["gradient_ratio"] == pytest.approx((neu.norm() / rec.norm()).item(), rel=1e-3)
    assert {(r["epoch"], r["step"]) for r in record.rows} == {(5, 21)}


def test_telemetry_changes_nothing(ds):
    """Without the callback the weights are the same to the last bit."""
    with_it, without = network(ds), network(ds)
    train_dae_nr(with_it, ds, CONFIG)
    usual = GradientCosineCB.after_loss
    GradientCosineCB.after_loss = lambda self, learner: None
    try: train_dae_nr(without, ds, CONFIG)
    finally: GradientCosineCB.after_loss = usual
    assert same(with_it.state_dict(), without.state_dict())


class Stop(Exception):
    pass


class Die:
    """Ends a fit after an epoch, as a crash would."""
    def __init__(self, epoch): self.epoch = epoch
    def after_epoch(self, learner):
        if learner.epoch == self.epoch: raise Stop


@pytest.mark.parametrize("dies", [1, 3, 4, 7])
def test_a_selected_fit_that_is_interrupted_ends_the_same(ds, tmp_path, dies):
    config = CONFIG.replace(epochs=9, patience=3, lr=.02)
    def fitted(folder, *more):
        net, log = network(ds, config), History()
        def go(*extra): return train_dae_nr(net, ds, config, record=log, folder=folder / "best",
                                            callbacks=[CheckpointCB(folder, "x", epochs=2), *extra])
        try: go(*more)
        except Stop:
            net = network(ds, config)
            go()
        return net, log.table
    (a, whole), (b, again) = fitted(tmp_path / "a"), fitted(tmp_path / "b", Die(dies))
    assert (same(a.state_dict(), b.state_dict())
            and whole.reset_index(drop=True).equals(again.reset_index(drop=True)))
    scores = whole[whole.name == "held_out"].value
    assert held_out_score(JointLoss(a), ds.split(.8, 1)[1])(a) == pytest.approx(scores.min(), rel=1e-5)


def test_klindts_recipe_for_the_predictor(ds):
    """Adam at 1e-3 on 256 images a batch, a constant rate but for the rounds; others keep AdamW with one
    cycle."""
    class Watch:
        def __init__(self): self.rates, self.sizes, self.kind = [], set(), None
        def before_batch(self, learner):
            self.kind = type(learner.optimizer.optimizer)
            self.rates.append(learner.optimizer.param_groups[0]["lr"])
            self.sizes.add(len(learner.batch["image"]))
    watch = {}
    config = CONFIG.replace(nr_recipe="klindt", limit_batches=1)
    for name, decode in dict(nr=False, dae_nr=True).items():
        train_dae_nr(network(ds, config, decode=decode), ds, config, callbacks=[w := Watch()])
        watch[name] = w
    # 38 images: 80 % of 48
    assert (watch["nr"].kind is torch.optim.Adam and set(watch["nr"].rates) == {1e-3}
            and watch["nr"].sizes == {38})
    assert (watch["dae_nr"].kind is torch.optim.AdamW and len(set(watch["dae_nr"].rates)) == 3
            and watch["dae_nr"].sizes == {16})


def test_pretrained_begins_where_the_auto_encoder_ended(ds):
    config = CONFIG.replace(variants=("dae_nr_pretrained",), epochs=1, lr=1e-12, weight_decay=0.)
    nets = train_members(config, ds)
    assert ([*nets] == ["ae", "ae-tap2", "dae_nr_pretrained-tap2-w1"]
            and nets["ae-tap2"].encoder is nets["ae"].encoder)
    parts = (nets[name].encoder.parameters() for name in ("ae", "dae_nr_pretrained-tap2-w1"))
    for a, b in zip(*parts): assert torch.allclose(a, b, atol=1e-8)


def test_shuffled_differs_in_the_pairing_only(ds):
    config = CONFIG.replace(epochs=1, lr=1e-12)
    nets = [train_member(config, ds, Member(v, 2, 1.), {}) for v in ("dae_nr", "dae_nr_shuffled")]
    moved = ds.shuffled(0)
    assert (torch.equal(moved.responses.sort(0).values, ds.responses.sort(0).values)
            and (moved.responses != ds.responses).any(1).all())
    assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(*(n.parameters() for n in nets)))


# ---- evaluation

def test_neural_scores_by_hand():
    """r_avg, r_single and FEVE on a made-up recording, with numpy alone."""
    rng = np.random.default_rng(0)
    signal = rng.gamma(2., 1., (12, 5))
    y = rng.poisson(signal, (7, 12, 5)).astype(np.float32)
    y[:, :, 4] = 2.  # never changes
    p = (signal + rng.normal(0, .5, signal.shape)).astype(np.float32)
    x = torch.rand(12, 1, 31, 31)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = NeuralDataset(x, torch.from_numpy(y[0]), x, torch.from_numpy(y))
    table = neuron_table(ds, torch.from_numpy(p))
    mean = y.mean(0)
    assert table.r_avg[:4].tolist() == pytest.approx([np.corrcoef(p[:, n], mean[:, n])[0, 1]
                                                      for n in range(4)], abs=1e-5)
    assert table.r_single[:4].tolist() == pytest.approx(
        [np.corrcoef(np.tile(p[:, n], 7), y[:, :, n].ravel())[0, 1] for n in range(4)], abs=1e-5)
    assert table.r_avg[4] == table.r_single[4] == 0
    noise = y.var(0, ddof=1).mean(0)
    feve = 1 - (((y - p) ** 2).mean((0, 1)) - noise)[:4] / (y.var((0, 1), ddof=1) - noise)[:4]
    assert table.feve[:4].tolist() == pytest.approx(feve.tolist(), abs=1e-4) and math.isnan(table.feve[4])
    assert "r_true" not in table and table.cc_norm.isna()[4]


def test_means_are_those_of_the_neurons(ds):
    net = network(ds).eval()
    row, table = judge_neurons(net, ds)
    assert row["r_true"] == pytest.approx(np.mean(
        [np.corrcoef(look(net, ds.eval_images).response[:, n], ds.eval_rates[:, n])[0, 1]
         for n in range(10)]), abs=1e-5)
    assert row["reliable_neurons"] == table.cc_norm.notna().sum() == (table.reliability > .1).sum()


def test_similarity_of_layers_by_hand(ds):
    """Debiased CKA from Song's formula and Spearman of correlation distances, in numpy."""
    h = look(network(ds), ds.eval_images).layers["h2"]
    told = layer_similarity(dict(h2=h), ds.eval_rates)
    X, Y = h.flatten(1).double().numpy(), ds.eval_rates.double().numpy()
    def hsic(K, L):
        n = len(K)
        K, L = (M - np.diag(np.diag(M)) for M in (K, L))
        one = np.ones(n)
        return (np.trace(K @ L) + one @ K @ one * (one @ L @ one) / ((n - 1) * (n - 2))
                - 2 * one @ K @ L @ one / (n - 2)) / (n * (n - 3))
    K, L = ((Z - Z.mean(0)) @ (Z - Z.mean(0)).T for Z in (X, Y))
    assert told["cka_h2"] == pytest.approx(hsic(K, L) / np.sqrt(hsic(K, K) * hsic(L, L)), abs=1e-9)
    at = np.triu_indices(len(X), 1)
    ranks = [pd.Series((1 - np.corrcoef(Z))[at]).rank() for Z in (X, Y)]
    assert told["rsa_h2"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-9)
    P = h.double().mean((2, 3)).numpy()
    K = (P - P.mean(0)) @ (P - P.mean(0)).T
    assert told["pooled_h2"] == pytest.approx(hsic(K, L) / np.sqrt(hsic(K, K) * hsic(L, L)), abs=1e-9)


def test_pca_equals_scikit_learn(ds):
    train, images = ds.images.flatten(1).double().numpy(), ds.eval_images
    fit = PCA(12, svd_solver="full").fit(train)
    want = fit.inverse_transform(fit.transform(images.flatten(1).double().numpy())).clip(0, 1)
    assert np.allclose(pca_reconstruction(ds.images, images, 12).flatten(1).numpy(), want, atol=1e-5)


def test_ridge_equals_scikit_learn():
    x, z, y = (torch.randn(*s, generator=seeded(k)) for k, s in enumerate(((40, 90), (15, 90), (40, 3))))
    fit = Ridge(100.).fit(x.double().numpy(), y.double().numpy())
    assert np.allclose(ridge_readout(x, y, z, [100.]).numpy(), fit.predict(z.double().numpy()), atol=1e-5)
    holes = y.clone()
    holes[3, 1] = float("nan")
    filled = torch.where(holes.isnan(), holes.nanmean(0), holes)
    assert torch.allclose(ridge_readout(x, holes, z), ridge_readout(x, filled, z))


def test_the_readout_fitted_after_leaves_the_network_alone(ds):
    net = network(ds, neural=False).eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    log = History()
    fit_readout(net, ds, CONFIG, log, "after")
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    table = log.table.query("name == 'neural'")
    assert len(table) == CONFIG.epochs and table.value.iloc[-1] < table.value.iloc[0] and not net.training
    start = network(ds).readout.state_dict()  # the same initial readout as a joint network's
    fresh = network(ds, neural=False).eval()
    fit_readout(fresh, ds, CONFIG.replace(lr=1e-12, epochs=1))
    assert all(torch.allclose(v, start[k], atol=1e-9) for k, v in fresh.readout.state_dict().items())


def test_the_random_encoder_has_the_initial_weights(ds):
    still, fresh = random_network(CONFIG, ds), network(ds, neural=False)
    assert all(torch.equal(p, q) for p, q in zip(still.parameters(), fresh.parameters()))
    h = still.encoder.stages["h1"][0](still.standardise(ds.images))
    norm = still.encoder.stages["h1"][1]
    assert (torch.allclose(norm.running_mean, h.mean((0, 2, 3)), atol=.15 * h.std().item())
            and not still.training)


def test_missing_entries_train_and_score(ds):
    holes = ds.responses.clone()
    holes[::3, :4] = float("nan")
    gaps = replace(ds, responses=holes)
    net = network(gaps)
    train_dae_nr(net, gaps, CONFIG)
    row = evaluate_dae_nr(net, gaps)
    assert all(math.isfinite(v) for v in row.values()) and all(p.isfinite().all() for p in net.parameters())


# ---- comparison

def test_paired_differences_by_hand():
    rows = [dict(seed=s, variant=v, tap=t, weight=w, neuron=None, name="cka_h2", value=x)
            for v, t, w, xs in (("ae", None, None, (.1, .2, .15)), ("nr", 2, None, (.2, .2, .3)),
                                ("dae_nr", 2, 1., (.3, .25, .1)))
            for s, x in enumerate(xs)]
    found = paired_differences(pd.DataFrame(rows), ["cka_h2", "psnr"])
    assert found[["variant", "against"]].values.tolist() == [["dae_nr", "ae"], ["dae_nr", "nr"]]
    d = np.array([.2, .05, -.05])
    first = found.iloc[0]
    assert ((first["mean"], first["sd"], first.positive, first.seeds)
            == (pytest.approx(d.mean()), pytest.approx(d.std(ddof=1)), 2, 3))


def test_a_given_recording_serves_every_seed(ds):
    config = CONFIG.replace(epochs=1)
    table = compare_variants(ds, ("ae", "dae_nr"), seeds=(0, 1), config=config)
    pca = per_seed(table, "psnr", "pca")
    assert pca[0] == pca[1] and per_seed(table, "psnr", "ae").nunique() == 2
    own = compare_variants(None, ("pca", "ae"), seeds=(0, 1), config=config)
    assert (per_seed(own, "psnr", "pca").nunique() == 2
            and set(own.variant) == {"ae", "pca", "random", "recording"})
