"""Bad recordings, predictions, features and images: the message names the argument and what was found."""
import re
import warnings

import numpy as np
import pytest
import torch

from visionbench.metrics.image import mse, psnr, ssim
from visionbench.similarity.predictivity import fold_numbers, linear_predictivity
from visionbench.similarity.reliability import (correlation_ceiling, eve, feve, noise_normalized_r,
                                                oracle_correlation, recording_summary,
                                                response_correlation, split_half)
from visionbench.similarity.trials import explainable_variance, fano, noise_variance, normalized_noise_power

ALONE = [noise_variance, normalized_noise_power, explainable_variance, fano, oracle_correlation, split_half,
         correlation_ceiling, recording_summary]
SCORES = [feve, eve, noise_normalized_r]


def says(text, error=ValueError):
    return pytest.raises(error, match=re.escape(text))


def trials(R=4, I=12, N=3):
    return np.random.default_rng(0).gamma(1., 1., (R, I, N))


def each_score(y):
    """Every function that takes trials, with these."""
    prediction = np.ones(y.shape[1:])
    return [*(lambda f=f: f(y) for f in ALONE), *(lambda f=f: f(prediction, y) for f in SCORES)]


@pytest.mark.parametrize("i", range(len(ALONE) + len(SCORES)))
def test_one_repeat_has_no_ceiling(i):
    with says("trials: 1 repeat(s) in (1, 12, 3), expected at least 2: noise and ceilings need repeats"):
        each_score(trials(R=1))[i]()


@pytest.mark.parametrize("i", range(len(ALONE) + len(SCORES)))
def test_a_neuron_without_data_is_named(i):
    y = trials()
    y[:, :, [0, 2]] = np.nan
    with says("trials: neurons [0, 2] hold only NaN"): each_score(y)[i]()


@pytest.mark.parametrize("i", range(len(ALONE) + len(SCORES)))
def test_a_neuron_without_repeats_is_named(i):
    y = trials()
    y[1:, :, 1] = np.nan
    with says("trials: neurons [1] have no image with 2 trials"): each_score(y)[i]()


def test_what_one_repeat_can_do():
    y = trials(R=1)
    assert np.isfinite(fano(y, "total")).all()
    r = response_correlation(y[0], y)
    np.testing.assert_allclose(r.average, 1)
    np.testing.assert_allclose(r.single, 1)


@pytest.mark.parametrize("shape", [(12, 3), (4, 12, 3, 1), (4, 0, 3), (12,)])
def test_trials_of_another_shape(shape):
    with says(f"trials: shape {shape} given, expected (repeats, images, neurons)"):
        split_half(np.zeros(shape))


def test_infinite_responses():
    y = trials()
    y[0, 0, 0] = np.inf
    with says("trials: 1 entries are infinite"): oracle_correlation(torch.tensor(y))


@pytest.mark.parametrize("score", [feve, eve, noise_normalized_r, response_correlation])
def test_predictions_that_do_not_fit(score):
    y = trials()
    for bad in (y[0].T, y[0, :5], y[:2], y[0, 0]):
        with says(f"prediction: shape {bad.shape} given for trials (4, 12, 3), "
                  "expected (12, 3) (images, neurons)"):
            score(bad, y)
    bad = y[0].copy()
    bad[2, 1] = np.nan
    with says("prediction: 1 entries are NaN or infinite"): score(bad, y)


def test_unknown_names():
    with says("method='loo', expected 'jackknife' or 'conservative'"): oracle_correlation(trials(), "loo")
    with says("of='signal', expected 'noise' or 'total'"): fano(trials(), "signal")
    with says("n=0 splits, expected at least 1"): split_half(trials(), 0)
    x, y = trials()[0], trials()[1]
    with says("method='lasso', expected 'ridge' or 'pls'"): linear_predictivity(x, y, method="lasso")
    with says("score='r2', expected 'relative', 'folds' or 'pooled'"): linear_predictivity(x, y, score="r2")
    with says("window='box', expected 'gaussian' or 'uniform'"):
        ssim(torch.rand(1, 1, 16, 16), torch.rand(1, 1, 16, 16), window="box")


def test_a_silent_neuron_warns_and_the_others_keep_their_values():
    y = trials()
    full, prediction = response_correlation(y[0], y).average, y[0].copy()
    y[:, :, 1] = 0
    with pytest.warns(UserWarning, match=r"neurons \[1\]: responses or predictions do not vary, r counts 0"):
        r = response_correlation(prediction, y).average
    assert r[1] == 0 and np.array_equal(r[[0, 2]], full[[0, 2]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.isnan(noise_normalized_r(prediction, y)[1]) and np.isnan(fano(y)[1])


@pytest.mark.parametrize("x,y", [
    ((12, 5), (11, 3)), ((5,), (5, 2)), ((12, 3, 4, 4), (12, 3)), ((12, 5), (12,)), ((2, 11, 5), (12, 3))])
def test_features_that_do_not_fit(x, y):
    with says(f"x {x} and y {y} given, expected (n,p) or (L,n,p) and (n,N), same n stimuli"):
        linear_predictivity(np.ones(x), np.ones(y))


def test_features_and_responses_without_gaps():
    x, y = trials()[0], trials()[1]
    hole = y.copy()
    hole[0, :2] = np.nan
    with says("y: 2 entries are NaN or infinite"): linear_predictivity(x, hole)
    with says("x: 2 entries are NaN or infinite"): linear_predictivity(hole, y)
    with says("trials (4, 12, 3) given for y (12, 2), expected (R, 12, 2)"):
        linear_predictivity(x, y[:, :2], trials())
    with says("1 repeat(s) in (1, 12, 3), expected at least 2"): linear_predictivity(x, y, trials(R=1))


@pytest.mark.parametrize("folds,text", [
    (1, "folds=1 for 12 stimuli, expected 2 … 12"), (13, "folds=13 for 12 stimuli"),
    (np.zeros(12), "labels (12,) with 1 different values given, expected (12,) with 2 or more"),
    (np.arange(5), "labels (5,) with 5 different values given, expected (12,)")])
def test_folds_that_cannot_be(folds, text):
    with says(text): fold_numbers(12, folds)
    with says(text): linear_predictivity(trials()[0], trials()[1], folds=folds)


def test_settings_out_of_range():
    x, y = trials()[0], trials()[1]
    for bad in ([], [0.], [1., -1.]):
        with says(f"alphas={bad}, expected numbers above 0"): linear_predictivity(x, y, alphas=bad)
    with says("components=25: 10 training stimuli with 3 features allow 1 … 3"):
        linear_predictivity(x, y, method="pls")
    with says("components=0"): linear_predictivity(x, y, method="pls", components=0)
    with says("score='folds': a fold has 1 stimuli, r needs 3; use fewer folds"):
        linear_predictivity(x, y, score="folds")


@pytest.mark.parametrize("score", [mse, psnr, ssim])
def test_images_that_do_not_fit(score):
    x = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    for bad in (x[:1], x[0], x[..., :8], x.expand(2, 3, 16, 16)):
        with says(f"image {tuple(bad.shape)} and reference (2, 1, 16, 16) given, "
                  "expected twice the same (B,C,H,W)"):
            score(bad, x)
    with says("image (0, 1, 16, 16)"): score(x[:0], x[:0])
    with says("reference: torch.uint8 given, expected floats in [0,1]; divide bytes by 255"):
        score(x, (255*x).byte())
    with says("reference: pixels span [-0.4988, 0.4998], expected [0, 1]"): score(x, x - .5)
    with says("image: 1 pixels are NaN"): score(torch.where(x == x.max(), torch.nan, x), x)


def test_images_smaller_than_the_window():
    x = torch.rand(1, 1, 10, 28, generator=torch.Generator().manual_seed(0))
    with says("images (1, 1, 10, 28) are smaller than the 11 × 11 window"): ssim(x, x)
    assert ssim(x, x, window="uniform").item() == pytest.approx(1)
    with says("images (1, 1, 6, 6) are smaller than the 7 × 7 window"):
        ssim(x[..., :6, :6], x[..., :6, :6], window="uniform")
