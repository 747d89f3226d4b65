"""Noise, ceilings and scores of neurons against neuralpredictors 0.3.0 and Klindt's formulas.

Both are written out here; some data have a known reliability.
"""
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr

from visionbench.similarity.reliability import (correlation_ceiling, eve, feve, noise_normalized_r,
                                                 oracle_correlation, recording_summary,
                                                 response_correlation, spearman_brown, split_half)
from visionbench.similarity.trials import (explainable_variance, fano, noise_variance,
                                            normalized_noise_power, pearson, variance)


def recording(R=6, I=40, N=5, seed=0):
    """Prediction (I,N) and gamma-noise trials (R,I,N), as skewed as real responses."""
    rng = np.random.default_rng(seed)
    rate = rng.gamma(1., 1., (I, N))*np.linspace(.5, 3, N)
    return rate*.8 + .3*rng.random((I, N)), rng.gamma(2., rate/2, (R, I, N))


def by_image(trials):
    """The list neuralpredictors wants: (repeats, neurons) of each image."""
    return [trials[:, i] for i in range(trials.shape[1])]


# --- neuralpredictors 0.3.0, measures/np_functions: the formulas, one neuron and image at a time ------------

def jackknife(trials):
    out = []
    for n in range(trials.shape[2]):
        one, other = [], []
        for responses in by_image(trials[..., n:n + 1]):
            for r in range(len(responses)):
                one.append(responses[r, 0])
                other.append(np.mean([responses[q, 0] for q in range(len(responses)) if q != r]))
        one, other = np.array(one), np.array(other)
        z = [(v - v.mean())/(v.std() + 1e-8) for v in (one, other)]
        out.append(np.mean(z[0]*z[1]))
    return np.array(out)


def conservative(trials):
    noise = np.mean([responses.var(0) for responses in by_image(trials)], 0)
    signal = np.var([responses.mean(0) for responses in by_image(trials)], 0)
    return signal/np.sqrt(signal*(signal + noise))


def explainable(trials):
    total = np.concatenate(by_image(trials)).var(0, ddof=1)
    return (total - np.mean([responses.var(0, ddof=1) for responses in by_image(trials)], 0))/(total + 1e-9)


def fraction_explained(trials, prediction):
    noise = np.mean([responses.var(0, ddof=1) for responses in by_image(trials)], 0)
    error = np.mean(np.concatenate([(responses - p)**2
                                    for responses, p in zip(by_image(trials), prediction)]), 0)
    total = np.concatenate(by_image(trials)).var(0, ddof=1)
    return 1 - (error - noise)/(total - noise)


def test_neuralpredictors_formulas():
    prediction, trials = recording()
    # theirs adds 1e-8 to the deviations
    np.testing.assert_allclose(oracle_correlation(trials), jackknife(trials), rtol=1e-6)
    np.testing.assert_allclose(oracle_correlation(trials, "conservative"), conservative(trials), rtol=1e-12)
    # theirs adds 1e-9
    np.testing.assert_allclose(explainable_variance(trials), explainable(trials), rtol=1e-7)
    np.testing.assert_allclose(feve(prediction, trials), fraction_explained(trials, prediction), rtol=1e-11)
    each = np.broadcast_to(prediction, trials.shape)
    np.testing.assert_allclose(feve(each, trials), feve(prediction, trials), rtol=1e-12)


def test_the_values_neuralpredictors_returned():
    """Returned by the published wheel 0.3.0 for these trials: oracle_corr_jackknife,
    oracle_corr_conservative, explainable_var, fev."""
    trials = np.array([[[1., 2], [0, 1], [4, 0]], [[2., 1], [1, 1], [3, 2]], [[0., 2], [1, 0], [5, 3]]])
    prediction = np.array([[1., 2], [1, .5], [3, 2]])
    np.testing.assert_allclose(oracle_correlation(trials), [0.7753298321410065, -0.1889822314696967],
                               atol=1e-6)
    np.testing.assert_allclose(oracle_correlation(trials, "conservative"), [0.9013878188659973, 0.5],
                               atol=1e-12)
    np.testing.assert_allclose(explainable_variance(trials), [0.7499999997589286, 0], atol=1e-8)
    assert feve(prediction, trials)[0] == pytest.approx(0.9523809523809524, abs=1e-12)
    assert np.isnan(feve(prediction, trials)[1])  # theirs is inf: nothing explainable to divide by


# --- code of Klindt et al. 2017, v1data/standalone.py: evaluate ---------------------------------------------

def test_klindt_formulas():
    prediction, trials = recording(seed=1)
    R, _, N = trials.shape
    mean = trials.mean(0)
    error = np.mean((prediction - mean)**2, 0)
    total = mean.var(0, ddof=1)
    noise_of_mean = (trials.var(0, ddof=1)/R).mean(0)
    np.testing.assert_allclose(eve(prediction, trials), (total - error)/(total - noise_of_mean), rtol=1e-11)
    np.testing.assert_allclose(noise_variance(trials), trials.var(0, ddof=1).mean(0), rtol=1e-12)
    np.testing.assert_allclose(normalized_noise_power(trials), trials.var(0, ddof=1).mean(0)
                               / trials.reshape(-1, N).var(0, ddof=1), rtol=1e-12)
    r = [pearsonr(prediction[:, n], mean[:, n])[0] for n in range(N)]
    np.testing.assert_allclose(response_correlation(prediction, trials).average, r, rtol=1e-11)


def test_a_hand_made_array():
    """Two repeats, three images: means 2, 4, 9; variances over repeats 2, 0, 2; all six: mean 5, squares
    16+4+1+1+9+25 = 56."""
    trials = np.array([1., 4, 8, 3, 4, 10]).reshape(2, 3, 1)
    assert noise_variance(trials)[0] == pytest.approx(4/3)
    assert normalized_noise_power(trials)[0] == pytest.approx((4/3)/(56/5))
    assert fano(trials)[0] == pytest.approx((4/3)/5) and fano(trials, "total")[0] == pytest.approx((56/5)/5)
    prediction = np.array([[2.], [4], [6]])  # off by 0, 0, 3
    # var of 2, 4, 9 = 26/2; mean squared error 9/3
    assert eve(prediction, trials)[0] == pytest.approx((13 - 3)/(13 - 2/3))
    single = np.mean([1, 1, 0, 0, 4, 16])  # squared errors of the single trials
    assert feve(prediction, trials)[0] == pytest.approx(1 - (single - 4/3)/(56/5 - 4/3))
    assert split_half(trials)[0] == pytest.approx(spearman_brown(pearsonr([1, 4, 8], [3, 4, 10])[0]))
    assert response_correlation(prediction, trials).single[0] == pytest.approx(
        pearsonr([2, 4, 6]*2, trials.ravel())[0])


def test_variance_is_numpys():
    y = torch.randn(4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert (torch.allclose(variance(y, 0), y.var(0))
            and torch.allclose(variance(y, (0, 1)), y.flatten(0, 1).var(0)))
    assert variance(y[:1], 0).isnan().all()


@pytest.mark.parametrize("R", [2, 3, 7, 10])
def test_split_half_draws_as_said(R):
    _, trials = recording(R=R, seed=2)
    rng, rho = np.random.default_rng(5), []
    for _ in range(20):
        order = rng.permutation(R)
        a, b = trials[order[:R//2]].mean(0), trials[order[R//2:R//2*2]].mean(0)
        rho.append([pearsonr(a[:, n], b[:, n])[0] for n in range(a.shape[1])])
    k = R/(R//2)
    expected = k*np.mean(rho, 0)/(1 + (k - 1)*np.mean(rho, 0))
    np.testing.assert_allclose(split_half(trials, n=20, seed=5), expected, rtol=1e-10)


@pytest.mark.parametrize("R", [2, 5, 10])
def test_spearman_brown_on_known_reliability(R):
    rng, s = np.random.default_rng(R), np.linspace(.3, 1.5, 40)
    signal = s*rng.standard_normal((500, 40))
    trials = signal + rng.standard_normal((R, 500, 40))
    known = s**2/(s**2 + 1/R)
    assert np.abs(split_half(trials) - known).mean() < .03
    assert abs(split_half(trials).mean() - known.mean()) < .03
    r = response_correlation(signal, trials).average
    np.testing.assert_allclose(noise_normalized_r(signal, trials), r/np.sqrt(split_half(trials)), rtol=1e-12)
    assert abs(np.nanmean(noise_normalized_r(signal, trials)) - 1) < .03
    assert (noise_normalized_r(signal, trials) > 1).any()  # never clipped


def test_ceiling_is_nan_for_noise():
    trials = np.random.default_rng(0).standard_normal((8, 200, 30))
    rho = split_half(trials)
    assert np.array_equal(np.isnan(correlation_ceiling(trials)), rho <= .1) and (rho <= .1).sum() > 15
    strict = correlation_ceiling(trials, least=.9)
    assert np.isnan(strict).all() and np.isnan(noise_normalized_r(trials[0], trials, least=.9)).all()


# --- missing trials: the same numbers as dropping them by hand ----------------------------------------------

@pytest.fixture
def gaps():
    prediction, trials = recording(seed=3)
    trials[np.random.default_rng(0).random(trials.shape) < .15] = np.nan
    trials[1:, 0, 2] = np.nan  # one image with a single trial
    trials[:, 7, 3] = np.nan  # one image without any
    return prediction, trials


def test_missing_trials_are_left_out(gaps):
    prediction, trials = gaps
    for n in range(trials.shape[2]):
        y, p = trials[..., n], prediction[:, n]
        lists = [y[~np.isnan(y[:, i]), i] for i in range(y.shape[1])]
        full = [i for i, v in enumerate(lists) if len(v)]
        two = [v for v in lists if len(v) > 1]
        everything = np.concatenate(lists)
        noise = np.mean([v.var(ddof=1) for v in two])
        assert noise_variance(trials)[n] == pytest.approx(noise)
        assert normalized_noise_power(trials)[n] == pytest.approx(noise/everything.var(ddof=1))
        assert fano(trials)[n] == pytest.approx(noise/everything.mean())
        pairs = np.array([(v[r], np.delete(v, r).mean()) for v in two for r in range(len(v))])
        assert oracle_correlation(trials)[n] == pytest.approx(pearsonr(*pairs.T)[0])
        means = np.array([lists[i].mean() for i in full])
        r = response_correlation(prediction, trials)
        assert r.average[n] == pytest.approx(pearsonr(p[full], means)[0])
        repeated = np.concatenate([np.full(len(v), p[i]) for i, v in enumerate(lists)])
        assert r.single[n] == pytest.approx(pearsonr(repeated, everything)[0])
        error = np.mean(np.concatenate([(v - p[i])**2 for i, v in enumerate(lists)]))
        assert feve(prediction, trials)[n] == pytest.approx(
            1 - (error - noise)/(everything.var(ddof=1) - noise))
        noise_of_mean = np.mean([v.var(ddof=1)/len(v) for v in two])
        mse = np.mean((means - p[full])**2)
        assert eve(prediction, trials)[n] == pytest.approx(
            (means.var(ddof=1) - mse)/(means.var(ddof=1) - noise_of_mean))
    assert (np.isfinite(split_half(trials)).all()
            and np.abs(split_half(trials) - split_half(recording(seed=3)[1])).max() < .15)


def test_a_full_recording_with_a_mask_is_unchanged():
    prediction, trials = recording(seed=4)
    more = np.concatenate([trials, np.full_like(trials[:1], np.nan)])
    for score in (noise_variance, normalized_noise_power, fano, oracle_correlation):
        np.testing.assert_allclose(score(more), score(trials), rtol=1e-12)
    for score in (feve, eve):
        np.testing.assert_allclose(score(prediction, more), score(prediction, trials), rtol=1e-12)


# --- kinds, scales and silent neurons -----------------------------------------------------------------------

@pytest.mark.parametrize("score", [noise_variance, normalized_noise_power, explainable_variance, fano,
                                   oracle_correlation, split_half, correlation_ceiling])
def test_what_comes_in_comes_out(score):
    trials = recording(R=4, I=20, N=3)[1].astype(np.float32)
    tensor, array = score(torch.tensor(trials)), score(trials)
    assert (isinstance(array, np.ndarray) and isinstance(tensor, torch.Tensor)
            and array.shape == tensor.shape == (3,))
    assert np.array_equal(array, tensor.numpy(), equal_nan=True) and tensor.dtype == torch.float64


@pytest.mark.parametrize("score", [feve, eve, noise_normalized_r])
def test_predictions_may_be_of_the_other_kind(score):
    prediction, trials = recording(R=4, I=20, N=3)
    grown = torch.tensor(prediction, requires_grad=True)
    results = [score(p, t) for p in (prediction, grown) for t in (trials, torch.tensor(trials))]
    assert [type(r) for r in results] == [np.ndarray, torch.Tensor]*2
    assert all(np.array_equal(results[0], np.asarray(r), equal_nan=True) for r in results)


def test_units_do_not_matter():
    prediction, trials = recording()
    for score in (normalized_noise_power, oracle_correlation, split_half):
        np.testing.assert_allclose(score(1e-7*trials), score(trials), rtol=1e-9)
    for score in (feve, eve, noise_normalized_r):
        np.testing.assert_allclose(score(1e-7*prediction, 1e-7*trials), score(prediction, trials), rtol=1e-9)
    np.testing.assert_allclose(response_correlation(1 - 3*prediction, trials).average,
                               -response_correlation(prediction, trials).average, rtol=1e-9)


def test_a_silent_neuron_counts_nothing_and_is_named():
    prediction, trials = recording()
    trials[..., 1] = .1
    trials = trials.astype(np.float32)  # .1 has no exact mean
    with pytest.warns(UserWarning, match=r"neurons \[1\]"):
        assert response_correlation(prediction, trials).average[1] == 0
    with pytest.warns(UserWarning, match=r"neurons \[1\]"): assert oracle_correlation(trials)[1] == 0
    with pytest.warns(UserWarning, match=r"neurons \[1\] do not vary"):
        assert explainable_variance(trials)[1] == 0
    with pytest.warns(UserWarning, match=r"neurons \[1\]") as seen: assert split_half(trials)[1] == 0
    assert len(seen) == 1  # not once a split
    assert oracle_correlation(trials, "conservative")[1] == pytest.approx(0, abs=1e-6)
    assert np.isnan(feve(prediction, trials)[1]) and np.isfinite(feve(prediction, trials)[[0, 2, 3, 4]]).all()


def test_a_flat_prediction_is_named():
    prediction, trials = recording()
    prediction[:, 4] = 2
    with pytest.warns(UserWarning, match=r"neurons \[4\]"): r = response_correlation(prediction, trials)
    assert r.average[4] == r.single[4] == 0 and (r.average[:4] > 0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        response_correlation(recording()[0], trials)


def test_pearson_keeps_leading_axes_and_small_differences():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 30, 4)), rng.standard_normal((30, 4))
    expected = [[pearsonr(a[layer, :, n], b[:, n])[0] for n in range(4)] for layer in range(3)]
    np.testing.assert_allclose(pearson(a, b), expected, rtol=1e-10)
    np.testing.assert_allclose(pearson(1000 + .01*a, b), expected, rtol=1e-8)


def test_summary_is_the_parts():
    trials = np.random.default_rng(0).poisson(.7, (4, 30, 8)).astype(float)
    row = recording_summary(trials)
    assert (row["mean"] == pytest.approx(trials.mean())
            and row["zeros"] == pytest.approx(np.median((trials == 0).mean((0, 1)))))
    assert (row["fano"] == pytest.approx(np.median(fano(trials, "total")))
            and row["nnp"] == pytest.approx(np.median(normalized_noise_power(trials))))
    assert (row["oracle"] == pytest.approx(oracle_correlation(trials).mean())
            and row["rho_sb"] == pytest.approx(split_half(trials).mean()))
    assert (row["repeats"], row["images"], row["neurons"]) == (4, 30, 8)
