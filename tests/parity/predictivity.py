"""Linear predictivity against scikit-learn on the same folds, and against what a null model must score."""
import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from sklearn.cross_decomposition import PLSRegression
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.model_selection import KFold, LeaveOneGroupOut, cross_val_predict

from visionbench.similarity.predictivity import GRID, fold_numbers, linear_predictivity
from visionbench.similarity.reliability import correlation_ceiling

ONCE = dict(score="pooled", folds=5)


def features(n=60, p=20, N=6, seed=0):
    """Features with an offset, and responses that depend on five of them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p))*np.linspace(2, .2, p) + 3
    return x, x[:, :5] @ rng.standard_normal((5, N)) + np.linspace(.3, 3, N)*rng.standard_normal((n, N)) - 1


def predict(estimator, x, y, fold):
    return cross_val_predict(estimator, x, y, cv=LeaveOneGroupOut(), groups=fold)


@pytest.mark.parametrize("p", [8, 60, 300])  # fewer features than stimuli, as many, and the dual form
@pytest.mark.parametrize("alpha", [.01, 1., 100.])
def test_ridge_is_scikit_learns(p, alpha):
    x, y = features(p=p)
    got = linear_predictivity(x, y, alphas=[alpha], **ONCE)
    expected = predict(Ridge(alpha=alpha), x, y, np.arange(60) % 5)
    np.testing.assert_allclose(got.prediction, expected, atol=1e-8)
    np.testing.assert_allclose(got.r, [pearsonr(expected[:, n], y[:, n])[0] for n in range(6)], atol=1e-8)
    assert got.median == pytest.approx(np.median(got.r)) and (got.alpha == alpha).all()
    assert got.alpha.shape == (5, 6)


@pytest.mark.parametrize("p", [8, 200])
def test_inner_choice_is_ridgecvs(p):
    """RidgeCV without cv leaves one out, as we do; with alpha_per_target each neuron has its own."""
    x, y = features(p=p)
    grid, fold = 10.**np.arange(-3, 5), np.arange(60) % 5
    got = linear_predictivity(x, y, alphas=grid, per_neuron=True, **ONCE)
    for k in range(5):
        fit = RidgeCV(grid, alpha_per_target=True).fit(x[fold != k], y[fold != k])
        np.testing.assert_allclose(got.alpha[k], fit.alpha_, rtol=1e-12)
        np.testing.assert_allclose(got.prediction[fold == k], fit.predict(x[fold == k]), atol=1e-8)
    assert len(np.unique(got.alpha)) > 1
    one = linear_predictivity(x, y[:, :1], alphas=grid, **ONCE)
    np.testing.assert_allclose(one.alpha, got.alpha[:, :1])


def test_the_common_penalty_weighs_neurons_by_their_variance():
    x, y = features(n=30)
    grid, fold = np.array([.1, 3., 100.]), np.arange(30) % 5
    # one neuron in other units
    got = linear_predictivity(x, y*np.array([1, 1, 1, 1, 1, 1e4]), alphas=grid, **ONCE)
    for k in range(5):
        X, Y = x[fold != k], y[fold != k]
        guesses = [cross_val_predict(Ridge(alpha=a), X, Y, cv=KFold(len(X))) for a in grid]
        loss = [np.mean(np.mean((Y - guess)**2, 0)/Y.var(0)) for guess in guesses]
        assert (got.alpha[k] == grid[np.argmin(loss)]).all()


def test_the_default_grid_is_relative_to_the_features():
    x, y = features()
    default, scaled = linear_predictivity(x, y), linear_predictivity(1000*x - 5, y)
    np.testing.assert_allclose(default.r, scaled.r, atol=1e-8)
    np.testing.assert_allclose(scaled.alpha/default.alpha, 1e6, rtol=1e-8)
    assert len(GRID) == 17 and GRID[0] == 1e-4 and GRID[-1] == 1e4
    train = x[np.arange(60) % 10 != 0]
    unit = ((train - train.mean(0))**2).sum(1).mean()
    assert np.isclose(default.alpha[0, 0]/unit, GRID).any()


@pytest.mark.parametrize("p", [30, 150])
def test_pls_is_scikit_learns(p):
    x, y = features(p=p)
    got = linear_predictivity(x, y, method="pls", components=10, **ONCE)
    expected = predict(PLSRegression(10, scale=False), x, y, np.arange(60) % 5)
    # its inner iteration stops at 1e-6
    np.testing.assert_allclose(got.prediction, expected, atol=2e-3*y.std())
    assert np.isnan(got.alpha).all()


def test_scores_on_the_same_predictions():
    x, y = features()
    fold = np.arange(60) % 5
    runs = {score: linear_predictivity(x, y, folds=5, score=score)
            for score in ("pooled", "folds", "relative")}
    predicted = runs["pooled"].prediction
    assert all(np.array_equal(run.prediction, predicted) for run in runs.values())
    within = [[pearsonr(predicted[fold == k, n], y[fold == k, n])[0] for n in range(6)] for k in range(5)]
    np.testing.assert_allclose(runs["folds"].r, np.mean(within, 0), rtol=1e-9)
    trained = np.stack([y[fold != k].mean(0) for k in fold])
    relative = [pearsonr((predicted - trained)[:, n], (y - trained)[:, n])[0] for n in range(6)]
    np.testing.assert_allclose(runs["relative"].r, relative, rtol=1e-9)


def test_chance_is_zero_unless_pooled():
    """50 stimuli, 200 neurons without any relation to the features: what plain correlation makes of that."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((50, 100)), rng.standard_normal((50, 200))
    mean = {score: linear_predictivity(x, y, score=score).r.mean()
            for score in ("relative", "folds", "pooled")}
    assert abs(mean["relative"]) < .03 and abs(mean["folds"]) < .05 and mean["pooled"] < -.15


def test_folds():
    assert fold_numbers(7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    shuffled = fold_numbers(100, 10, seed=3)
    assert np.array_equal(shuffled, fold_numbers(100, 10, seed=3))
    assert not np.array_equal(shuffled, fold_numbers(100, 10))
    assert np.bincount(shuffled).tolist() == [10]*10
    x, y = features()
    named = linear_predictivity(x, y, folds=np.array(["a", "b", "c"])[np.arange(60) % 3])
    np.testing.assert_array_equal(named.r, linear_predictivity(x, y, folds=3).r)
    assert not np.array_equal(linear_predictivity(x, y, folds=3, seed=0).r, named.r)
    np.testing.assert_array_equal(linear_predictivity(x, y, folds=3, seed=0).fold,
                                  fold_numbers(60, 3, seed=0))


def test_no_test_response_is_looked_at():
    """Changing the responses of one fold changes no prediction for that fold."""
    x, y = features()
    other = y.copy()
    other[::5] = 100
    before, after = linear_predictivity(x, y, folds=5), linear_predictivity(x, other, folds=5)
    np.testing.assert_array_equal(before.prediction[::5], after.prediction[::5])
    assert np.abs(before.prediction[1::5] - after.prediction[1::5]).max() > 1


def test_rotations_of_the_features_change_nothing():
    x, y = features(p=100)
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((100, 100)))[0]
    np.testing.assert_allclose(linear_predictivity(x @ Q, y).r, linear_predictivity(x, y).r, atol=1e-8)


def test_ceiling_and_kinds():
    x, y = features(N=8)
    trials = y + np.linspace(.1, 30, 8)*np.random.default_rng(1).standard_normal((4, 60, 8))
    mean = trials.mean(0)
    got = linear_predictivity(x, mean, trials)
    np.testing.assert_array_equal(got.ceiling, correlation_ceiling(trials))
    np.testing.assert_array_equal(got.corrected, got.r/got.ceiling)
    assert np.isnan(got.corrected).any()
    assert got.median_corrected == pytest.approx(np.nanmedian(got.corrected))
    tensor = linear_predictivity(torch.tensor(x), torch.tensor(mean), torch.tensor(trials))
    for name in ("r", "prediction", "alpha", "ceiling", "corrected", "median", "median_corrected"):
        value = getattr(tensor, name)
        assert isinstance(value, torch.Tensor), name
        np.testing.assert_array_equal(value.numpy(), getattr(got, name))
    plain = linear_predictivity(torch.tensor(x), mean)
    assert plain.ceiling is plain.corrected is plain.median_corrected is None
    assert isinstance(plain.r, np.ndarray)


def test_layers_lead():
    x, y = features()
    layers = np.stack([x, x[::-1], np.roll(x, 2, 1)*3])
    got = linear_predictivity(layers, y)
    assert got.r.shape == (3, 6) and got.prediction.shape == (3, 60, 6) and got.alpha.shape == (3, 10, 6)
    assert got.median.shape == (3,)
    for i in range(3): np.testing.assert_array_equal(got.r[i], linear_predictivity(layers[i], y).r)
    np.testing.assert_allclose(got.r[0], got.r[2], atol=1e-8)


@pytest.mark.parametrize("method", ["ridge", "pls"])
def test_a_silent_neuron_counts_zero(method):
    x, y = features()
    y[:, 2] = .1
    with pytest.warns(UserWarning, match=r"neurons \[2\]"):
        got = linear_predictivity(x, y, method=method, components=3)
    assert got.r[2] == 0 and np.isfinite(got.r).all()
    alone = linear_predictivity(x, np.delete(y, 2, 1), method=method, components=3)
    # it has no vote on the penalty
    if method == "ridge": np.testing.assert_allclose(np.delete(got.alpha, 2, 1), alone.alpha)


def test_features_without_variation_predict_nothing():
    """A dead layer is no error: every neuron scores 0."""
    with pytest.warns(UserWarning, match="do not vary"):
        got = linear_predictivity(np.ones((60, 4)), features()[1])
    assert (got.r == 0).all() and got.median == 0
    with pytest.warns(UserWarning, match="do not vary"):
        got = linear_predictivity(np.zeros((60, 200)), features()[1])
    assert (got.r == 0).all()


@pytest.mark.gpu
def test_a_cuda_tensor_stays_there():
    x, y = features(p=100)
    got = linear_predictivity(torch.tensor(x).cuda(), torch.tensor(y).cuda())
    assert got.r.is_cuda
    np.testing.assert_allclose(got.r.cpu().numpy(), linear_predictivity(x, y).r, atol=1e-6)
