"""RDMs, their comparison and resampling against rsatoolbox 0.3.2, SciPy, hand sums and real recordings."""
import numpy as np
import pytest
import torch
from conftest import ROOT
from rsatoolbox.data import Dataset
from rsatoolbox.data.noise import prec_from_residuals, prec_from_unbalanced
from rsatoolbox.inference import boot_noise_ceiling
from rsatoolbox.rdm import RDMs, calc_rdm, compare
from scipy.spatial.distance import pdist, squareform
from scipy.stats import rankdata

from visionbench.similarity.comparison import METHODS, compare_rdms, ranks
from visionbench.similarity.pairs import (condensed, from_rsatoolbox, gram_distances, inner, square,
                                           to_rsatoolbox)
from visionbench.similarity.precision import checked_precision, shrinkage_precision
from visionbench.similarity.rdm import METRICS, rdm
from visionbench.similarity.resampling import bootstrap_compare, permutation_test, rdm_noise_ceiling

RECORDED = ROOT.parent / "shared" / "data" / "antolik2016_validation.npz"
CLOSE = dict(rtol=1e-10, atol=1e-10)


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def by_rsatoolbox(x, metric, **more):
    """One RDM vector of responses (n,p), or of runs (M,n,p)."""
    if x.ndim == 2:
        return calc_rdm(Dataset(x), method=metric, **more).get_vectors()[0]
    M, n, p = x.shape
    of = {"stimulus": np.tile(np.arange(n), M), "run": np.repeat(np.arange(M), n)}
    data = Dataset(x.reshape(-1, p), obs_descriptors=of)
    return calc_rdm(data, method=metric, descriptor="stimulus", cv_descriptor="run", **more).get_vectors()[0]


def precision(p, seed=1):
    mix = drawn(p, p, seed=seed) / p**.5 + np.eye(p)
    return np.linalg.inv(mix @ mix.T)


# ---- distances

@pytest.mark.parametrize("metric", ["euclidean", "correlation", "poisson"])
@pytest.mark.parametrize("n,p", [(2, 5), (7, 3), (40, 300), (30, 2)])
def test_rdm_is_rsatoolbox(metric, n, p):
    x = abs(drawn(n, p)) * 3 if metric == "poisson" else drawn(n, p) + 2
    np.testing.assert_allclose(rdm(x, metric), by_rsatoolbox(x, metric), **CLOSE)


def test_mahalanobis_is_rsatoolbox_and_scipy():
    x, P = drawn(20, 12), precision(12)
    np.testing.assert_allclose(rdm(x, "mahalanobis", P), by_rsatoolbox(x, "mahalanobis", noise=P), **CLOSE)
    np.testing.assert_allclose(rdm(x, "mahalanobis", P) * 12, pdist(x, "mahalanobis", VI=P)**2, **CLOSE)


@pytest.mark.parametrize("M,n,p", [(2, 2, 1), (2, 6, 4), (5, 9, 30), (10, 50, 103)])
def test_crossnobis_is_rsatoolbox(M, n, p):
    x, P = drawn(M, n, p) + drawn(n, p, seed=2), precision(p)
    np.testing.assert_allclose(rdm(x, "crossnobis"), by_rsatoolbox(x, "crossnobis"), **CLOSE)
    np.testing.assert_allclose(rdm(x, "crossnobis", P), by_rsatoolbox(x, "crossnobis", noise=P), **CLOSE)
    order = np.random.default_rng(3).permutation(M)
    runs = np.repeat(np.array([f"run {k}" for k in range(M)])[order], n)
    np.testing.assert_allclose(rdm(x.reshape(-1, p), "crossnobis", runs=runs), rdm(x, "crossnobis"), **CLOSE)


def test_crossnobis_is_the_mean_over_pairs_of_runs():
    x, P = drawn(4, 6, 5), precision(5)
    diff = x[:, :, None] - x[:, None]                                # (M,n,n,p)
    pairs = [np.einsum("ijp,pq,ijq->ij", diff[a], P, diff[b]) for a in range(4) for b in range(4) if a != b]
    np.testing.assert_allclose(rdm(x, "crossnobis", P), squareform(np.mean(pairs, 0) / 5), **CLOSE)


def test_cosine_is_scipy():
    x = drawn(15, 8)
    np.testing.assert_allclose(rdm(x, "cosine"), pdist(x, "cosine"), **CLOSE)
    np.testing.assert_allclose(rdm(x, "correlation"), pdist(x, "correlation"), **CLOSE)


@pytest.mark.parametrize("metric", METRICS)
def test_layers_are_independent_and_kinds_are_kept(metric):
    x = abs(drawn(2, 3, *[4] * (metric == "crossnobis"), 6, 5))
    P = np.stack([precision(5, k) for k in range(6)]).reshape(2, 3, 5, 5)
    P = {"noise_precision": P} if metric in ("mahalanobis", "crossnobis") else {}
    got = rdm(x, metric, **P)
    assert got.shape == (2, 3, 15) and got.dtype == np.float64
    for k in np.ndindex(2, 3):
        one = {"noise_precision": P["noise_precision"][k]} if P else {}
        np.testing.assert_allclose(got[k], rdm(x[k], metric, **one), **CLOSE)
    there = rdm(torch.tensor(x, dtype=torch.float32), metric, **{k: torch.tensor(v) for k, v in P.items()})
    assert type(there) is torch.Tensor and there.dtype == torch.float64
    np.testing.assert_allclose(there, got, rtol=1e-4, atol=1e-5)


def test_other_layouts_of_numpy_arrays():
    x = drawn(12, 8)
    for same in (x.astype(">f8"), np.asfortranarray(x), x[::-1][::-1],
                 np.broadcast_to(x, (1, 12, 8))[0], x.tolist()):
        np.testing.assert_allclose(rdm(same), rdm(x), **CLOSE)
    frozen = x.copy()
    frozen.flags.writeable = False
    assert np.array_equal(rdm(frozen), rdm(x)) and np.array_equal(frozen, x)


def test_gradients_flow_through_distances_and_comparison():
    x = torch.tensor(drawn(4, 3), requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: rdm(t, "euclidean"), (x,))
    assert torch.autograd.gradcheck(lambda t: compare_rdms(rdm(t, "cosine"), drawn(6), "cosine_cov"), (x,))


def test_nearly_constant_features_keep_their_distances():
    small = drawn(6, 20)
    x = 1e4 + 1e-6 * small                                           # spacing of float64 there: 2e-12
    np.testing.assert_allclose(rdm(x), pdist(x, "sqeuclidean") / 20, rtol=1e-9)
    np.testing.assert_allclose(rdm(np.stack([small, x]))[0], rdm(small), **CLOSE)
    assert (rdm(np.full((4, 7), .1)) == 0).all()


def test_ties_of_a_class_code_are_exact():
    """Rank measures need them; a code of ten classes has two distances, not two clouds of rounding errors."""
    assert len(np.unique(rdm(np.repeat(np.eye(10), 5, 0)))) == 2
    assert len(np.unique(rdm(np.repeat(np.eye(10), 5, 0), "cosine"))) == 2


def test_inner_and_its_distances():
    x = torch.tensor(drawn(3, 5, 4))
    assert torch.allclose(inner(x), x @ x.mT) and torch.allclose(inner(x.requires_grad_()), x @ x.mT)
    y = drawn(5, 5)
    hand = [y[i, i] + y[j, j] - y[i, j] - y[j, i] for i in range(5) for j in range(i + 1, 5)]
    np.testing.assert_allclose(gram_distances(torch.tensor(y)), hand, **CLOSE)


def test_square_and_condensed_are_scipy():
    v = drawn(3, 21)
    assert all(np.array_equal(square(v)[k], squareform(v[k])) for k in range(3))
    assert (np.array_equal(condensed(square(v)), v)
            and torch.equal(condensed(square(torch.tensor(v))), torch.tensor(v)))


def test_rsatoolbox_and_back():
    v = drawn(3, 10)
    there = to_rsatoolbox(torch.tensor(v), "crossnobis", list("abcde"))
    assert isinstance(there, RDMs) and there.n_cond == 5 and there.dissimilarity_measure == "crossnobis"
    assert (np.array_equal(from_rsatoolbox(there), v)
            and there.pattern_descriptors["stimulus"] == list("abcde"))
    from_rsatoolbox(there)[:] = 0
    assert np.array_equal(there.dissimilarities, v) and to_rsatoolbox(v[0]).n_rdm == 1


# ---- noise precision

@pytest.mark.parametrize("target,method", [("diagonal", "shrinkage_diag"), ("identity", "shrinkage_eye")])
@pytest.mark.parametrize("R,n,p", [(2, 5, 20), (8, 30, 12), (3, 4, 2)])
def test_shrinkage_is_rsatoolbox(target, method, R, n, p):
    t = drawn(R, n, p) @ np.linalg.cholesky(precision(p)).T + 3 * drawn(n, p, seed=5)
    got = shrinkage_precision(t, target)
    residuals = (t - t.mean(0)).reshape(-1, p)
    np.testing.assert_allclose(got, prec_from_residuals(residuals, (R - 1) * n, method), rtol=1e-9,
                               atol=1e-10)
    data = Dataset(t.reshape(-1, p).copy(), obs_descriptors={"stimulus": np.tile(np.arange(n), R)})
    np.testing.assert_allclose(got, prec_from_unbalanced(data, "stimulus", method=method), rtol=1e-9,
                               atol=1e-10)
    checked_precision(got, torch.zeros(2, p))


def test_identity_target_is_ledoit_and_wolf():
    from sklearn.covariance import ledoit_wolf
    t = drawn(4, 10, 15)
    residuals = (t - t.mean(0)).reshape(-1, 15)
    reference = np.linalg.inv(ledoit_wolf(residuals, assume_centered=True)[0] * 40 / 30)
    np.testing.assert_allclose(shrinkage_precision(t, "identity"), reference, rtol=1e-9)


def test_crossnobis_estimates_its_precision_when_asked():
    t = drawn(4, 10, 15)
    np.testing.assert_allclose(rdm(t, "crossnobis", "shrinkage"),
                               rdm(t, "crossnobis", shrinkage_precision(t)), **CLOSE)


# ---- comparison

def vectors(L, n, seed=0, ties=False):
    v = rdm(drawn(L, n, 10, seed=seed)) + .1 * drawn(1, n * (n - 1) // 2, seed=9)
    return v.round(0) if ties else v


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_comparison_is_rsatoolbox(method, ties):
    for n in (4, 12, 30):
        a, b = vectors(3, n, 1, ties), vectors(4, n, 2, ties)
        np.testing.assert_allclose(compare_rdms(a, b, method), compare(RDMs(a), RDMs(b), method), **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_any_vectors_and_many_stimuli(method):
    """Not only vectors that are distances; above 100 stimuli rsatoolbox takes another road."""
    a, b = drawn(2, 5050), drawn(2, 5050, seed=1)
    np.testing.assert_allclose(compare_rdms(a, b, method), compare(RDMs(a), RDMs(b), method), **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_missing_pairs_are_left_out_as_in_rsatoolbox(method):
    a, b = vectors(3, 12, 1), vectors(2, 12, 2)
    gone = np.random.default_rng(0).choice(66, 20, replace=False)
    a[:, gone] = b[:, gone] = np.nan
    np.testing.assert_allclose(compare_rdms(a, b, method), compare(RDMs(a), RDMs(b), method), **CLOSE)


@pytest.mark.parametrize("method", ["cosine", "corr", "spearman", "cosine_cov", "corr_cov"])
def test_nothing_to_compare_is_0_as_in_rsatoolbox(method):
    a = np.stack([np.full(10, .1) if method.startswith(("corr", "spear")) else np.zeros(10), drawn(10)])
    got = compare_rdms(a, drawn(3, 10, seed=1), method)
    assert (abs(got[0]) < 1e-12).all() and (abs(got[1]) > 1e-3).all()


@pytest.mark.parametrize("method", METHODS)
def test_torch_and_numpy_agree(method):
    a, b = vectors(3, 8, 1), vectors(2, 8, 2)
    got = compare_rdms(torch.tensor(a), torch.tensor(b), method)
    assert type(got) is torch.Tensor
    np.testing.assert_allclose(got, compare_rdms(a, b, method), **CLOSE)
    assert compare_rdms(a[0], b[1], method).shape == (1, 1)


def test_ranks_are_scipy():
    v = np.random.default_rng(0).integers(0, 20, (5, 60)).astype(float)
    v[0] = np.arange(60)[::-1]
    v[1] = 3
    np.testing.assert_array_equal(ranks(torch.tensor(v)), rankdata(v, axis=1))
    np.testing.assert_array_equal(ranks(torch.tensor(v[:1])), rankdata(v[:1], axis=1))


@pytest.mark.parametrize("kind", ["identity", "variances", "matrix"])
def test_whitened_products_against_the_matrix_of_pairs(kind):
    """The closed form equals aᵀV⁻¹b with V of side n(n-1)/2, written out."""
    n, a, b = 9, vectors(3, 9, 1), vectors(2, 9, 2)
    S = {"identity": np.eye(n), "variances": np.diag(np.arange(1., n + 1)), "matrix": precision(n)}[kind]
    i, j = np.triu_indices(n, 1)
    C = np.eye(n)[i] - np.eye(n)[j]
    W = np.linalg.inv((C @ S @ C.T)**2)
    for method in ("cosine_cov", "corr_cov"):
        x, y = (v - v.mean(1, keepdims=True) * (method == "corr_cov") for v in (a, b))
        hand = x @ W @ y.T / np.sqrt(np.diag(x @ W @ x.T))[:, None] / np.sqrt(np.diag(y @ W @ y.T))
        given = {"identity": None, "variances": np.diag(S), "matrix": S}[kind]
        np.testing.assert_allclose(compare_rdms(a, b, method, given), hand, **CLOSE)
        np.testing.assert_allclose(compare_rdms(a, b, method, S), hand, **CLOSE)
        # rsatoolbox solves the general case by conjugate gradients, to about 1e-5
        np.testing.assert_allclose(compare(RDMs(a), RDMs(b), method, sigma_k=S), hand, atol=1e-4)


def test_whitened_cosine_is_biased_linear_cka():
    for seed in range(3):
        x, y = drawn(25, 40, seed=seed), drawn(25, 7, seed=seed + 10) + drawn(25, 40, seed=seed)[:, :7]
        x, y = x - x.mean(0), y - y.mean(0)
        feature = np.linalg.norm(x.T @ y)**2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
        assert abs(compare_rdms(rdm(x), rdm(y), "cosine_cov").item() - feature) < 1e-12


# ---- resampling

@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_bootstrap_is_rsatoolbox_on_the_same_resamples(method, ties):
    """Pair by pair: 0.3.2 puts similarities into wrong cells where one of several RDMs is constant in a
    resample."""
    n, a, b = 9, vectors(2, 9, 1, ties), vectors(3, 9, 2, ties)
    index = np.random.default_rng(0).integers(0, n, (8 if method.startswith(("tau", "ken")) else 40, n))
    got = bootstrap_compare(a, b, method, resamples=index)
    assert got.shape == (len(index), 2, 3)
    for k, one in zip(index, got):
        x, y = (RDMs(v).subsample_pattern("index", k).dissimilarities for v in (a, b))
        there = [[compare(u, v, method).item() for v in y] for u in x]
        np.testing.assert_allclose(one, there, **CLOSE)


@pytest.mark.parametrize("method", ["cosine", "corr", "spearman", "rho-a"])
def test_bootstrap_by_hand(method):
    a, b = vectors(1, 6, 1), vectors(1, 6, 2)
    index = np.array([5, 5, 0, 2, 2, 2])
    pairs = [(i, j) for x, i in enumerate(index) for j in index[x + 1:] if i != j]
    assert len(pairs) == 11
    x, y = (np.array([squareform(v[0])[i, j] for i, j in pairs]) for v in (a, b))
    if method in ("spearman", "rho-a"):
        x, y = rankdata(x), rankdata(y)
    if method != "cosine":
        x, y = x - x.mean(), y - y.mean()
    scale = (11**3 - 11) / 12 if method == "rho-a" else np.linalg.norm(x) * np.linalg.norm(y)
    np.testing.assert_allclose(bootstrap_compare(a, b, method, resamples=index[None]).item(),
                               x @ y / scale, **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_fewer_than_three_stimuli_give_nan(method):
    a, b = vectors(2, 5, 1), vectors(3, 5, 2)
    index = [[0] * 5, [0, 0, 0, 0, 4], [1, 1, 2, 2, 2], [0, 0, 0, 1, 2], range(5)]
    got = bootstrap_compare(a, b, method, resamples=index)
    assert np.isnan(got).all((1, 2)).tolist() == [True, True, True, False, False]
    assert np.isfinite(got[3:]).all()
    np.testing.assert_allclose(got[4], compare_rdms(a, b, method), **CLOSE)


def test_bootstrap_draws_by_seed_only():
    a, b = vectors(2, 20, 1), vectors(3, 20, 2)
    first = bootstrap_compare(a, b, n=300, seed=4)
    torch.manual_seed(1)
    assert np.array_equal(first, bootstrap_compare(a, b, n=300, seed=4))
    assert not np.allclose(first, bootstrap_compare(a, b, n=300, seed=5))
    # identical distributions: the median of many resamples lies near the similarity itself
    assert abs(np.median(first, 0) - compare_rdms(a, b, "corr")).max() < .15


@pytest.mark.parametrize("method", METHODS)
def test_permutation_test_counts(method):
    """Four stimuli have 24 orders: their similarities are those of the null, and p is counted by hand."""
    import itertools
    a, b = vectors(2, 4, 1), vectors(3, 4, 2)
    n = 60 if method.startswith(("tau", "ken")) else 300
    test = permutation_test(a, b, method, n=n)
    np.testing.assert_allclose(test.observed, compare_rdms(a, b, method), **CLOSE)
    moved = [condensed(square(a)[:, list(o)][:, :, list(o)]) for o in itertools.permutations(range(4))]
    allowed = np.stack([compare_rdms(v, b, method) for v in moved])                         # (24,2,3)
    nearest = abs(test.null[:, None] - allowed).max((2, 3)).min(1)
    assert nearest.max() < 1e-10
    b_count = (test.null >= test.observed - 1e-12).sum(0)
    np.testing.assert_allclose(test.p, (b_count + 1) / (n + 1))
    exact = (allowed >= compare_rdms(a, b, method) - 1e-12).mean(0)
    assert abs(test.p - exact).max() < 4 * .5 / n**.5


def test_p_values_are_uniform_without_a_relation():
    """Share of p <= .1 over 150 unrelated pairs; 0.1 ± 3 standard errors."""
    p = [permutation_test(rdm(drawn(12, 5, seed=2 * k)), rdm(drawn(12, 5, seed=2 * k + 1)), n=99).p.item()
         for k in range(150)]
    assert min(p) >= .01 and abs(np.mean(np.array(p) <= .1) - .1) < 3 * (.09 / 150)**.5


def test_noise_ceiling_by_hand():
    # two repeats: one split, each half one trial
    t = drawn(2, 8, 30) + 2 * drawn(8, 30, seed=3)
    got = rdm_noise_ceiling(t, "euclidean", "spearman", splits=5)
    a, b, both = rdm(t[0]), rdm(t[1]), rdm(t.mean(0))
    r = compare_rdms(a, b, "spearman").item()
    np.testing.assert_allclose(got.splits, [r] * 5, **CLOSE)
    upper = compare_rdms(np.stack([a, b]), both, "spearman").mean()
    np.testing.assert_allclose([got.lower, got.upper, got.reliability], [r, upper, 2 * r / (1 + r)], **CLOSE)
    assert got.halves.shape == (10, 28)
    # rsatoolbox's ceiling over "subjects", here the two halves: its lower bound is the same
    assert abs(boot_noise_ceiling(RDMs(np.stack([a, b])), "spearman")[0] - r) < 1e-10


def test_noise_ceiling_brackets_the_true_representation():
    truth = drawn(30, 60)
    for metric in ("euclidean", "crossnobis"):
        for seed in range(3):
            c = rdm_noise_ceiling(truth + 2 * drawn(8, 30, 60, seed=seed + 1), metric, splits=30)
            assert c.lower < compare_rdms(rdm(truth), c.halves, "corr").mean() < c.upper


# ---- mouse V1 (Antolík et al. 2016, PLoS Comput Biol 12(6): e1004927, CC BY 4.0)

@pytest.fixture(scope="module")
def recorded():
    if not RECORDED.exists():
        pytest.skip(f"the recordings of Antolík et al. 2016 are not there: {RECORDED}")
    data = np.load(RECORDED)
    return {k: (data[f"images_region{k}"], data[f"responses_region{k}"]) for k in (1, 2, 3)}


def in_units_of_noise(y):
    """Trials (R,50,N) over the root of the mean variance over trials."""
    y = y.astype(np.float64)
    return y / (np.sqrt(y.var(0, ddof=1).mean(0)) + 1e-9)


# reference values of the specification, measured before this code was written; crossnobis is checked against
# rsatoolbox too
@pytest.mark.parametrize("region,shape,value", [(1, (10, 50, 103), .309), (2, (8, 50, 55), .269),
                                                (3, (12, 50, 102), .429)])
def test_pixels_and_crossnobis_of_real_neurons(recorded, region, shape, value):
    images, y = recorded[region]
    assert y.shape == shape and images.shape == (50, 31, 31)
    pixels = images.reshape(50, -1) / 255
    pixels = rdm(pixels - pixels.mean(1, keepdims=True))
    neurons = rdm(in_units_of_noise(y), "crossnobis")
    np.testing.assert_allclose(neurons, by_rsatoolbox(in_units_of_noise(y), "crossnobis"), **CLOSE)
    assert abs(compare_rdms(pixels, neurons, "cosine_cov").item() - value) < .001


@pytest.mark.parametrize("region,value,corrected", [(1, .817, .90), (2, .660, .80), (3, .758, .86)])
def test_reliability_of_real_rdms(recorded, region, value, corrected):
    """100 random halves, so near the reference, not equal: over five seeds the mean of 100 had a spread (sd)
    of .004 to .005."""
    got = rdm_noise_ceiling(in_units_of_noise(recorded[region][1]), "crossnobis", "spearman")
    assert abs(got.lower - value) < .012 and abs(got.reliability - corrected) < .012 and got.upper > got.lower


def test_real_pixels_are_above_chance_and_below_the_ceiling(recorded):
    images, y = recorded[1]
    z, pixels = in_units_of_noise(y), rdm(images.reshape(50, -1) / 255)
    assert permutation_test(pixels, rdm(z, "crossnobis"), "cosine_cov", n=199).p.item() == 1 / 200
    c = rdm_noise_ceiling(z, method="cosine_cov", splits=20)
    assert compare_rdms(pixels, c.halves, "cosine_cov").mean() < c.lower < c.upper < 1
