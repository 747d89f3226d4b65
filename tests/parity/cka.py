"""CKA, the CCA family, shape distances and profiles against other computations.

Plain numpy written from the papers, scipy, and recorded values.
"""
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import timm
import torch
import torchvision
from sklearn.cross_decomposition import CCA
from torch import nn

from visionbench import similarity
from visionbench.similarity import activations as activations_module
from visionbench.similarity import (CKAMatrix, cca, cka, compare_rdms, linear_predictivity, procrustes,
                                     pwcca, rdm, similarity_profile, svcca)
from visionbench.similarity.activations import activations
from visionbench.similarity.cca import canonical_correlations
from visionbench.similarity.cka import expected_bias
from visionbench.similarity.intervals import cka_ceiling, cka_interval

RECORDED = Path(__file__).resolve().parents[3] / "shared" / "data" / "antolik2016_validation.npz"


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def rotation(seed, p):
    return np.linalg.qr(normal(seed, p, p))[0]


# ---- references, written from the papers, in loops where that is clearer

def rbf_kernel(x, sigma):
    d = scipy.spatial.distance.pdist(x)
    return np.exp(-scipy.spatial.distance.squareform(d)**2/(2*(sigma*np.median(d))**2))


def kernel(x, name="linear", sigma=1.):
    return x @ x.T if name == "linear" else rbf_kernel(x, sigma)


def hsic_song(K, L):
    """Eq. (5) of Song et al. 2012, summed by hand."""
    n = len(K)
    k, l = (M - np.diag(np.diag(M)) for M in (K, L))
    first = sum(k[i, j]*l[j, i] for i in range(n) for j in range(n))
    third = sum(k[i].sum()*l[i].sum() for i in range(n))
    return (first + k.sum()*l.sum()/((n - 1)*(n - 2)) - 2*third/(n - 2))/(n*(n - 3))


def hsic_biased(K, L):
    n = len(K)
    H = np.eye(n) - 1/n
    return np.trace(K @ H @ L @ H)/(n - 1)**2


def cka_reference(x, y, name="linear", debiased=True, sigma=1.):
    hsic = hsic_song if debiased else hsic_biased
    K, L = kernel(x, name, sigma), kernel(y, name, sigma)
    return hsic(K, L)/np.sqrt(hsic(K, K)*hsic(L, L))


def bases(x, keep=1.):
    U, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    k = (int((s > 1e-10*s[0]).sum()) if keep == 1
         else int(np.searchsorted(np.cumsum(s**2)/np.sum(s**2), keep)) + 1)
    return U[:, :k]


def quiet(f, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return f(*args, **options)


# ---- CKA

@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("name,sigma", [("linear", 1.), ("rbf", .4), ("rbf", 2.)])
@pytest.mark.parametrize("n,p,q", [(4, 3, 5), (5, 2, 2), (17, 40, 3), (30, 6, 200)])
def test_cka_is_the_formula_of_the_papers(n, p, q, name, sigma, debiased):
    x = normal(n, n, p)
    y = x[:, :1] + normal(n + 1, n, q)
    ours = quiet(cka, x, y, name, debiased, sigma)
    assert abs(ours - cka_reference(x, y, name, debiased, sigma)) < 1e-11
    assert abs(quiet(cka, torch.tensor(x), torch.tensor(y), name, debiased, sigma) - ours) < 1e-14


def test_biased_kernel_form_is_the_feature_form():
    x, y = normal(0, 40, 7), normal(1, 40, 9)
    a, b = x - x.mean(0), y - y.mean(0)
    feature = np.linalg.norm(a.T @ b)**2/(np.linalg.norm(a.T @ a)*np.linalg.norm(b.T @ b))
    assert abs(quiet(cka, x, y, debiased=False) - feature) < 1e-10


def test_biased_cka_is_the_whitened_cosine_of_the_rdms():
    for seed in range(5):
        x = normal(seed, 25, 8)
        y = x @ normal(seed + 1, 8, 30) + 3*normal(seed + 2, 25, 30)
        biased = quiet(cka, x, y, debiased=False)
        H = np.eye(25) - 1/25
        centred = [H @ (-.5*scipy.spatial.distance.squareform(rdm(t))) @ H for t in (x, y)]
        assert abs(np.sum(centred[0]*centred[1])/np.prod([np.linalg.norm(c) for c in centred])
                   - biased) < 1e-10
        assert abs(compare_rdms(rdm(x), rdm(y), "cosine_cov")[0, 0] - biased) < 1e-10


@pytest.mark.parametrize("name", ["linear", "rbf"])
@pytest.mark.parametrize("debiased", [True, False])
def test_invariances_of_cka(name, debiased):
    def f(a, b): return quiet(cka, a, b, name, debiased)
    x = normal(0, 40, 10)*np.linspace(.5, 2, 10)
    y = np.tanh(x @ normal(1, 10, 6)) + normal(2, 40, 6)
    value = f(x, y)
    assert abs(f(x + normal(3, 10)*100, y) - value) < 1e-9
    assert abs(f(x @ rotation(4, 10), y) - value) < 1e-11
    assert abs(f(1e4*x, 1e-4*y) - value) < 1e-11
    assert abs(f(y, x) - value) < 1e-14 and abs(f(x, x) - 1) < 1e-13
    order = np.random.default_rng(5).permutation(40)
    assert abs(f(x[order], y[order]) - value) < 1e-12
    assert abs(f(x @ normal(6, 10, 10), y) - value) > .01, "not invariant to general invertible maps"


@pytest.mark.parametrize("n", [16, 50, 100, 200])
def test_bias_with_independent_data(n):
    """Spec: 100 against 1000 features, 20 draws; debiased 0.02 / 0.00 / 0.00 / 0.00, biased
    0.92 / 0.80 / 0.68 / 0.53."""
    x, y = normal(n, 20, n, 100), normal(n + 1, 20, n, 1000)
    recorded = {16: .92, 50: .80, 100: .68, 200: .53}[n]
    assert abs(cka(x, y).mean()) < .03
    with pytest.warns(UserWarning, match=rf"from {n} stimuli: unrelated data would give about 0\.\d\d"):
        biased = cka(x, y, debiased=False).mean()
    assert abs(biased - recorded) < .012 and abs(expected_bias(n, 100, 1000) - biased) < .01


def test_wide_rbf_is_linear():
    x = normal(0, 60, 20)
    y = np.tanh(x @ normal(1, 20, 30))
    for debiased in (True, False):
        linear = quiet(cka, x, y, debiased=debiased)
        assert abs(quiet(cka, x, y, "rbf", debiased, 100) - linear) < 1e-4
        assert abs(quiet(cka, x, y, "rbf", debiased, 1e6) - linear) < 1e-7
    x32, y32 = x.astype("float32"), y.astype("float32")
    assert abs(cka(x32, y32, "rbf", sigma=1e4) - cka(x32, y32)) < 1e-5


def test_leading_axes_are_layers():
    x, y = normal(0, 3, 20, 6), normal(1, 4, 20, 9)
    table = cka(x[:, None], y[None])
    assert table.shape == (3, 4) and cka(x, y[0]).shape == (3,)
    for i in range(3):
        for j in range(4): assert abs(table[i, j] - cka(x[i], y[j])) < 1e-13


def test_gradients_of_cka():
    x = torch.tensor(normal(0, 7, 3), requires_grad=True)
    y = torch.tensor(normal(1, 7, 4))
    assert (torch.autograd.gradcheck(lambda t: cka(t, y), x)
            and torch.autograd.gradcheck(lambda t: cka(t, y, "rbf"), x))


def test_kinds_and_number_types():
    x, y = normal(0, 20, 6), normal(1, 20, 6)
    value = cka(x, y)
    assert isinstance(value, float) and isinstance(cka(torch.tensor(x), y), torch.Tensor)
    for f in (cca, svcca, pwcca, procrustes):
        assert isinstance(f(x, y), float) and torch.is_tensor(f(torch.tensor(x), torch.tensor(y)))
    assert abs(cka(torch.tensor(x).half(), torch.tensor(y).bfloat16()) - value) < .02
    whole = (10*x).astype(int)
    assert abs(cka(whole, y) - cka(whole.astype(float), y)) < 1e-15
    frozen = x.copy()
    frozen.flags.writeable = False
    assert cka(frozen[::-1], y[::-1]) == pytest.approx(value)


def test_recorded_values_of_pytorch_cka():
    """pytorch-cka 1.1.3, `cka_from_features` on these float64 arrays, torch 2.15.

    That library clips below 0, we do not."""
    rng = np.random.default_rng(11)
    x = rng.normal(size=(3, 40, 12))
    y = np.stack([x[0] @ rng.normal(size=(12, 12)), x[1] + rng.normal(size=(40, 12)), np.tanh(x[2]*2)])
    recorded = [[0.679650860346658, 0.026045517740273014, 0.0],
                [0.0, 0.5312777175467079, 0.03905408872665042],
                [0.01012474033045547, 0.041568920854245885, 0.7952904692162973]]
    ours = cka(x[:, None], y[None])
    assert np.abs(ours.clip(0) - recorded).max() < 1e-12 and (ours < 0).sum() == 2
    assert np.abs(cka(x[:, None].astype("float32"), y[None].astype("float32")) - ours).max() < 1e-6


@pytest.mark.skipif(not RECORDED.exists(),
                    reason=f"needs the recordings of Antolík et al. 2016 at {RECORDED}")
def test_real_recordings():
    """Deterministic values of pixels against mean responses scaled by their noise, three regions of
    mouse V1."""
    data = np.load(RECORDED)
    for region, recorded in ((1, .110), (2, .105), (3, .159)):
        images, y = data[f"images_region{region}"]/255, data[f"responses_region{region}"].astype(float)
        pixels = images.reshape(len(images), -1)
        pixels = pixels - pixels.mean(1, keepdims=True)
        scale = np.sqrt(y.var(0, ddof=1).mean(0)) + 1e-9
        value = cka(pixels, (y/scale).mean(0))
        low, high = cka_interval(pixels, (y/scale).mean(0))
        assert abs(value - recorded) < 5e-4 + 1e-9 and low < value < high
        assert value < cka_ceiling(y/scale) < 1


# ---- accumulated over batches

def ten_convs(seed, width=16):
    """The stress case: default initialisation, so that deep features are nearly constant."""
    torch.manual_seed(seed)
    sizes = [3] + [width]*10
    layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def layer_outputs(net, x):
    found = {}
    with torch.no_grad():
        for i, layer in enumerate(net): x = found[str(i)] = layer(x)
    return found


@pytest.mark.parametrize("name", ["linear", "rbf"])
def test_nearly_constant_layers_in_float32(name):
    images = torch.rand(256, 3, 12, 12, generator=torch.Generator().manual_seed(5))
    nets = ten_convs(0), ten_convs(1)
    names = [str(i) for i in range(22)]
    single, double = (CKAMatrix(names, names, kernel=name) for _ in "sd")
    for batch in images.split(64):
        a, b = (layer_outputs(net, batch) for net in nets)
        single.update(a, b)
        double.update(*({k: v.double() for k, v in side.items()} for side in (a, b)))
    deep = a["18"].flatten(1)
    assert deep.std(0).mean()/deep.abs().mean() < .01, "this is no stress case"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s, d = single.compute(), double.compute()
    assert s.isfinite().all() and (s - d).abs().max() < 1e-6 and s.abs().max() <= 1


def test_matrix_is_the_sum_of_hsic_over_batches():
    x, y = normal(0, 60, 5), normal(1, 60, 8)
    y[:, :5] += x
    sizes = [12, 30, 18]
    m = CKAMatrix(["x", "x3"], ["y"])
    sums, at = np.zeros((3, 2, 1)), 0
    for n in sizes:
        a, b = x[at:at + n], y[at:at + n]
        m.update([a, a**3], {"y": b, "not asked for": None})
        for i, t in enumerate((a, a**3)):
            K, L = t @ t.T, b @ b.T
            sums[:, i, 0] += n*np.array([hsic_song(K, L), hsic_song(K, K), hsic_song(L, L)])
        at += n
    expected = sums[0]/np.sqrt(sums[1]*sums[2])
    assert np.abs(m.compute() - expected).max() < 1e-12 and (m.images, m.batches) == (60, 3)
    assert isinstance(m.compute(), np.ndarray)


@pytest.mark.parametrize("debiased", [True, False])
def test_one_batch_is_cka(debiased):
    x, y = torch.tensor(normal(0, 30, 4, 3, 3)), torch.tensor(normal(1, 30, 7))
    m = CKAMatrix(["a"], ["b"], debiased=debiased).update({"a": x}, {"b": y})
    assert abs(quiet(m.compute)[0, 0] - quiet(cka, x.flatten(1), y, debiased=debiased)) < 1e-13
    same = CKAMatrix(["a", "b"]).update({"a": x, "b": y}).compute()
    assert torch.allclose(same, same.T) and torch.allclose(same.diagonal(), torch.ones(2).double())


@pytest.mark.parametrize("batch", [8, 16, 64, 128])
def test_small_batches_do_no_harm_to_the_debiased_estimator(batch):
    x = normal(3, 512, 100)
    y = x @ normal(4, 100, 200)/10 + .8*normal(5, 512, 200)
    whole = cka(x, y)
    assert .3 < whole < .7
    both = {d: CKAMatrix(["x"], ["y"], debiased=d) for d in (True, False)}
    for i in range(0, 512, batch):
        for m in both.values(): m.update([x[i:i + batch]], [y[i:i + batch]])
    assert abs(both[True].compute()[0, 0] - whole) < .03
    with pytest.warns(UserWarning, match=f"biased CKA from {batch} stimuli"):
        assert both[False].compute()[0, 0] > whole + .05


def test_interval_between_batches_holds_the_truth():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 8))
    truth = cka(x, x + 1.5*rng.normal(size=x.shape))
    inside = 0
    for _ in range(100):
        x = rng.normal(size=(160, 8))
        y, m = x + 1.5*rng.normal(size=x.shape), CKAMatrix("x", "y")
        for i in range(0, 160, 16): m.update([x[i:i + 16]], [y[i:i + 16]])
        low, high = m.interval()
        inside += low[0, 0] <= truth <= high[0, 0]
    assert .88 <= inside/100 <= .99, inside/100


def test_interval_is_the_delta_method():
    x, y = normal(0, 5, 20, 6), normal(1, 5, 20, 6) + normal(0, 5, 20, 6)
    h = np.array([[20*hsic_song(a @ a.T, b @ b.T) for a, b in ((p, q), (p, p), (q, q))]
                  for p, q in zip(x, y)])
    f = lambda s: s[0]/np.sqrt(s[1]*s[2])  # noqa: E731
    total, step = h.sum(0), 1e-5
    v = np.array([(f(total + step*total*e) - f(total - step*total*e))/(2*step*total @ e) for e in np.eye(3)])
    error = np.sqrt(5/4*((h @ v)**2).sum())
    m = CKAMatrix("x", "y")
    for p, q in zip(x, y): m.update([p], [q])
    low, high = m.interval()
    assert abs((high - low)[0, 0]/2 - error*scipy.stats.t.ppf(.975, 4)) < 1e-6


@pytest.mark.parametrize("name", ["linear", "rbf"])
def test_jackknife_is_leaving_out_one_by_one(name):
    x = normal(0, 15, 4)
    y = x + normal(1, 15, 4)
    K, L = kernel(x, name), kernel(y, name)
    each = []
    for i in range(15):
        k, l = (np.delete(np.delete(M, i, 0), i, 1) for M in (K, L))
        each.append(hsic_song(k, l)/np.sqrt(hsic_song(k, k)*hsic_song(l, l)))
    error = np.sqrt(14/15*((each - np.mean(each))**2).sum())
    low, high = cka_interval(x, y, name)
    half = error*scipy.stats.t.ppf(.975, 14)
    assert (abs(low - max(cka(x, y, name) - half, -1)) < 1e-11
            and abs(high - min(cka(x, y, name) + half, 1)) < 1e-11)


# ---- CCA family

def test_cca_against_scipy_and_scikit_learn():
    x = normal(0, 80, 5)
    y = np.c_[x[:, :2] + .5*normal(1, 80, 2), normal(2, 80, 4)]
    rho = np.cos(scipy.linalg.subspace_angles(x - x.mean(0), y - y.mean(0)))
    assert np.allclose(canonical_correlations(x, y), np.sort(rho)[::-1], atol=1e-12)
    assert abs(cca(x, y) - rho.mean()) < 1e-12 and abs(cca(x, y, squared=True) - (rho**2).mean()) < 1e-12
    a, b = CCA(2, max_iter=5000, tol=1e-12).fit_transform(x, y)
    assert np.allclose([np.corrcoef(a[:, i], b[:, i])[0, 1] for i in range(2)],
                       canonical_correlations(x, y)[:2], atol=1e-4)


def test_cca_of_independent_gaussians():
    """E[Σρ²] = pq/(n-1): n = 400, p = 20, q = 30, 200 draws; the specification measured 1.516
    against 1.504."""
    total = 20*cca(normal(0, 200, 400, 20), normal(1, 200, 400, 30), squared=True)
    assert abs(total.mean() - 20*30/399) < 4*total.std()/np.sqrt(200) and abs(total.mean() - 1.504) < .03


def test_invariances_of_the_cca_family():
    x, y = normal(0, 60, 6), normal(1, 60, 9)
    y[:, :6] += x
    A, B = normal(2, 6, 6), normal(3, 9, 9)
    for f in (cca, lambda a, b: cca(a, b, squared=True), lambda a, b: procrustes(a, b, 0)):
        assert abs(f(x @ A + 3, y @ B - 1) - f(x, y)) < 1e-10 and abs(f(x, y) - f(y, x)) < 1e-12
    assert abs(svcca(x @ rotation(4, 6), 7*y) - svcca(x, y)) < 1e-12
    assert abs(pwcca(x, x) - 1) < 1e-12 and abs(pwcca(x, x @ A) - 1) < 1e-10
    assert abs(pwcca(x, y @ B) - pwcca(x, y)) < 1e-10, "the second argument counts only by its subspace"
    assert abs(pwcca(x, y) - pwcca(y, x)) > 1e-4


def test_rank_deficient_features_count_by_their_rank():
    x, y = normal(0, 50, 4), normal(1, 50, 5)
    y[:, :4] += x
    wide = np.c_[x @ normal(2, 4, 30), np.full((50, 2), .1)]
    for f in (cca, pwcca, lambda a, b: procrustes(a, b, 0)):
        assert (abs(f(y, wide) - f(y, x)) < 1e-9
                and abs(f(y.astype("float32"), wide.astype("float32")) - f(y, x)) < 1e-4)


@pytest.mark.parametrize("keep", [.5, .9, .99])
def test_svcca_by_hand(keep):
    x, y = normal(0, 70, 20)*np.geomspace(3, .05, 20), normal(1, 70, 12)*np.geomspace(2, .1, 12)
    y[:, :5] += x[:, :5]
    rho = np.linalg.svd(bases(x, keep).T @ bases(y, keep), compute_uv=False)
    assert (abs(svcca(x, y, keep) - rho.mean()) < 1e-12
            and abs(svcca(x, y, keep, True) - (rho**2).mean()) < 1e-12)


def test_pwcca_by_hand():
    x, y = normal(0, 70, 6), normal(1, 70, 9)
    y[:, :6] += x*np.linspace(0, 2, 6)
    for a, b in ((x, y), (y, x)):
        U, V, centred = bases(a), bases(b), a - a.mean(0)
        W, rho, _ = np.linalg.svd(U.T @ V, full_matrices=False)
        alpha = [sum(abs(np.dot(U @ W[:, i], centred[:, j])) for j in range(a.shape[1]))
                 for i in range(len(rho))]
        assert abs(pwcca(a, b) - np.dot(alpha, rho)/np.sum(alpha)) < 1e-12


# ---- shapes

def unit(x):
    c = x - x.mean(0)
    return c/np.linalg.norm(c)


def test_procrustes_against_scipy():
    x = normal(0, 40, 6)
    for y in (x + .1*normal(1, 40, 6), normal(2, 40, 6)):
        R, scale = scipy.linalg.orthogonal_procrustes(unit(y), unit(x))
        assert abs(procrustes(x, y) - np.arccos(scale)) < 1e-10
        assert abs(procrustes(x, y) - 2*np.arcsin(np.linalg.norm(unit(x) - unit(y) @ R)/2)) < 1e-12
    assert abs(scipy.spatial.procrustes(x, y)[2] - (1 - np.cos(procrustes(x, y))**2)) < 1e-12
    assert procrustes(x, -5*x @ rotation(3, 6) + 2) < 1e-12 and procrustes(x, np.c_[x, x*0]) < 1e-12


@pytest.mark.parametrize("alpha", [0., .3, .7, 1.])
def test_partial_whitening_by_hand(alpha):
    """αI + (1-α)C^(-1/2), with C the covariance of the shape of unit norm, then the angle by the nuclear
    norm."""
    x, y = normal(0, 40, 5)*np.linspace(.2, 2, 5), normal(1, 40, 8)
    y[:, :5] += x
    def partly(t):
        t = unit(t)
        w, V = np.linalg.eigh(t.T @ t)
        return unit(t @ (V*(alpha + (1 - alpha)/np.sqrt(w))) @ V.T)
    expected = np.arccos(np.linalg.norm(partly(x).T @ partly(y), "nuc"))
    assert abs(procrustes(x, y, alpha) - expected) < 1e-10
    if alpha == 0: assert abs(expected - np.arccos(canonical_correlations(x, y).sum()/np.sqrt(40))) < 1e-10


@pytest.mark.parametrize("alpha", [0., .5, 1.])
def test_triangle_inequality(alpha):
    rng = np.random.default_rng(0)
    for p, q, r in ((3, 3, 3), (5, 2, 8), (12, 30, 4)):
        x, y, z = (rng.normal(size=(200, 14, k)) for k in (p, q, r))
        z[:, :, :min(p, r)] += x[:, :, :min(p, r)]
        y[:, :, :min(p, q)] += 2*x[:, :, :min(p, q)]
        xy, yz, xz = (quiet(procrustes, x, y, alpha), quiet(procrustes, y, z, alpha),
                      quiet(procrustes, x, z, alpha))
        assert ((xz <= xy + yz + 1e-12).all() and (xy <= xz + yz + 1e-12).all()
                and (yz <= xy + xz + 1e-12).all())


# ---- any network

def test_profile_of_two_networks_is_cka_of_what_the_layers_say():
    nets = [nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(),
                          nn.Linear(144, 5)) for _ in "ab"]
    images = torch.rand(60, 1, 8, 8)
    before = [net.state_dict()["1.running_mean"].clone() for net in nets]
    table = similarity_profile(*nets, [images], ["0", "1", "4"], measures=("cka", "rsa", "procrustes"),
                               resamples=0, stream=False)
    a, b = (layer_outputs(net.eval(), images) for net in nets)
    assert all(torch.equal(net.state_dict()["1.running_mean"], m) for net, m in zip(nets, before))
    # the ReLU overwrites what is before it
    a, b = ({k: nets[i][0](images).detach() if k == "0" else nets[i][:2](images).detach() if k == "1"
             else side[k] for k in ("0", "1", "4")} for i, side in enumerate((a, b)))
    value = table.set_index(["layer_a", "layer_b", "measure"]).value
    for p in ("0", "1", "4"):
        for q in ("0", "1", "4"):
            x, y = a[p].flatten(1), b[q].flatten(1)
            assert abs(value[p, q, "cka"] - cka(x, y)) < 1e-6
            assert abs(value[p, q, "rsa"] - compare_rdms(rdm(x, "correlation"), rdm(y, "correlation"),
                                                         "spearman")[0, 0]) < 1e-4
            assert abs(value[p, q, "procrustes"] - procrustes(x, y)) < 1e-4
    streamed = similarity_profile(*nets, [images], ["0", "1", "4"]).value
    assert np.allclose(streamed, value.unstack().cka.loc[["0", "1", "4"]].to_numpy(), atol=1e-6)


def test_profile_of_torchvision_and_timm_networks():
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18(num_classes=5)
    vit = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=32, num_classes=5)
    swin = torchvision.models.swin_t(num_classes=5)
    images = torch.rand(24, 3, 32, 32)
    table = similarity_profile(resnet, vit, images, ["conv1", "layer?"], ["blocks.?", "norm"], pool="mean")
    assert list(table.layer_a.unique()) == ["conv1", "layer1", "layer2", "layer3", "layer4"]
    assert (list(table.layer_b.unique()) == [f"blocks.{i}" for i in range(10)] + ["norm"]
            and table.value.notna().all())
    norm = activations(vit, images, "norm", pool="mean")["norm"]
    assert torch.allclose(norm, vit.norm(vit.blocks(vit._pos_embed(vit.patch_embed(images)))).mean(1),
                          atol=1e-5)
    channels_last = lambda t: t.flatten(1, -2).mean(1) if t.ndim > 2 else t  # noqa: E731
    inside = similarity_profile(swin, swin, images, ["features.?", "head"], pool=channels_last)
    assert list(inside.layer_a.unique()) == [f"features.{i}" for i in range(8)] + ["head"]
    assert np.allclose(inside[inside.layer_a == inside.layer_b].value, 1)


def test_nested_outputs_and_repeated_calls():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.act, self.head = (nn.LSTM(4, 6, batch_first=True), nn.ReLU(inplace=True),
                                              nn.Linear(6, 6))
            self.alias = self.head
        def forward(self, x):
            h, _ = self.lstm(x)
            return self.head(self.act(self.head(self.act(h[:, -1]))))
    net, x = Recurrent(), torch.randn(9, 5, 4)
    got = activations(net, x, ["lstm", "head", "act"])
    assert list(got) == ["lstm", "act", "head", "act:1", "head:1"] and got["lstm"].shape == (9, 30)
    assert torch.equal(got["head:1"], net(x)) and torch.equal(got["act:1"], got["head"].relu())
    assert (list(activations(net, x, "alias:1")) == ["alias:1"]
            and list(activations(net, x)) == ["lstm", "head", "head:1"])
    assert list(activations(net, x, "*")) == ["lstm", "act", "head", "act:1", "head:1"], "one name a module"


def test_profile_with_neurons_is_each_measure_alone():
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.Tanh(), nn.Linear(12, 8)).double()
    images = torch.tensor(rng.normal(size=(50, 1, 6, 6)))
    features = layer_outputs(net, images)
    trials = rng.poisson(np.exp(features["1"].numpy())[None], size=(6, 50, 12)).astype(float)
    table = similarity_profile(net, trials, images).set_index(["layer_a", "measure"])
    assert set(table.layer_b) == {"neurons"} and list(table.index.get_level_values(0).unique()) == ["1", "3"]
    for layer in ("1", "3"):
        x, y = features[layer].numpy(), trials.mean(0)
        assert abs(table.value[layer, "cka"] - cka(x, y)) < 1e-12
        assert np.allclose(table.loc[(layer, "cka"), ["low", "high"]].astype(float), cka_interval(x, y))
        assert abs(table.value[layer, "predictivity"] - linear_predictivity(x, y).median) < 1e-9
        assert ((table.low[layer] <= table.value[layer]).all()
                and (table.value[layer] <= table.high[layer]).all())
    assert table.ceiling["1", "cka"] == cka_ceiling(trials)
    assert (table.value["1"] > table.value["3"])[["cka", "predictivity"]].all() and (table.ceiling < 1).all()
    mean = similarity_profile(net, trials.mean(0), images.split(10), measures="cka", stream=True)
    batches = CKAMatrix("1", ["n"])
    for i in range(0, 50, 10): batches.update([features["1"][i:i + 10]], [trials.mean(0)[i:i + 10]])
    assert abs(mean.value[0] - batches.compute()[0, 0]) < 1e-12 and mean.ceiling.isna().all()
    missing = trials.copy()
    missing[0, :, 3] = np.nan
    again = similarity_profile(net, missing, images, measures="cka")
    assert (abs(again.value[0] - cka(features["1"].numpy(), np.nanmean(missing, 0))) < 1e-12
            and again.ceiling.isna().all())


def test_ceiling_is_what_the_true_rates_reach():
    rng = np.random.default_rng(0)
    rates = np.exp(rng.normal(size=(60, 5)) @ rng.normal(size=(5, 30))/3)/5
    found, reached = zip(*((cka_ceiling(t, 20), cka(rates, t.mean(0)))
                           for t in rng.poisson(rates, (12, 5, 60, 30))))
    assert np.mean(reached) < .95 and abs(np.mean(found) - np.mean(reached)) < .02


def test_memory_of_streamed_cka_does_not_grow_with_the_images(monkeypatch):
    """Counts the features still held when a batch is asked for."""
    held, alive, pooled = [], weakref.WeakSet(), activations_module.pooled
    monkeypatch.setattr(activations_module, "pooled", lambda *args: (t := pooled(*args), alive.add(t))[0])
    def batches():
        for _ in range(8):
            held.append(len(alive))
            yield torch.rand(16, 1, 6, 6)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    assert len(similarity_profile(net, net, batches(), ["0", "2"])) == 4
    assert held == [0] + [2]*7
    held.clear()
    similarity_profile(net, net, batches(), ["0", "2"], measures="procrustes")
    assert held[-1] >= 14, "this counts what is kept"
    m = CKAMatrix("ab", "abc")
    sizes = []
    for _ in range(3):
        m.update(torch.rand(2, 20, 5), torch.rand(3, 20, 7))
        sizes.append(sum(t.numel() for t in vars(m).values() if torch.is_tensor(t)))
    assert len({*sizes}) == 1


def test_front_page_has_the_fixed_names():
    fixed = {"rdm", "compare_rdms", "cka", "CKAMatrix", "cca", "svcca", "pwcca", "procrustes",
             "linear_predictivity", "bootstrap_compare", "similarity_profile"}
    assert set(similarity.__all__) == fixed and all(callable(getattr(similarity, name)) for name in fixed)
