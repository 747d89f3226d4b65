"""What has no distance, no comparison or no ceiling is an error that says what was given and expected."""
import re

import numpy as np
import pytest
import torch

from visionbench.similarity.comparison import compare_rdms
from visionbench.similarity.pairs import condensed, square, stimuli_of, to_rsatoolbox
from visionbench.similarity.precision import shrinkage_precision
from visionbench.similarity.rdm import rdm
from visionbench.similarity.resampling import bootstrap_compare, permutation_test, rdm_noise_ceiling

RNG = np.random.default_rng(0)
X, RUNS, V = RNG.normal(size=(5, 4)), RNG.normal(size=(4, 5, 4)), RNG.random((2, 10))


def says(text, error=ValueError):
    return pytest.raises(error, match=re.escape(text))


def with_value(x, value, at=(0, 1)):
    x = x.copy()
    x[at] = value
    return x


SINGULAR = np.linalg.pinv(np.cov(RNG.normal(size=(4, 3))))


@pytest.mark.parametrize("call,text", [
    (lambda: rdm(X, "euclid"),
     "metric='euclid': accepted are euclidean, correlation, cosine, mahalanobis, crossnobis, poisson"),
    (lambda: rdm(X[0]), "euclidean of responses (4,), expected (…,n,p) with n >= 2 stimuli"),
    (lambda: rdm(X[:1]), "euclidean of responses (1, 4)"),
    (lambda: rdm(X[:, :0]), "euclidean of responses (5, 0)"),
    (lambda: rdm(with_value(X, np.nan)), "responses (5, 4): 1 of 20 are NaN or infinite"),
    (lambda: rdm(with_value(X, np.inf), "cosine"), "responses (5, 4): 1 of 20 are NaN or infinite"),
    (lambda: rdm(with_value(abs(X), np.nan), "poisson"), "responses (5, 4): 1 of 20 are NaN or infinite"),
    (lambda: rdm(with_value(RUNS, np.nan, (0, 0, 0)), "crossnobis"), "1 of 80 are NaN or infinite"),
    (lambda: rdm(X * 1e200), "is too large to square"),
    (lambda: rdm(with_value(X, .1, 3), "correlation"),
     "the response to stimulus (3,) of (5,) is constant over channels"),
    (lambda: rdm(np.stack([X, with_value(X, 0, 2)]), "cosine"),
     "the response to stimulus (1, 2) of (2, 5) is zero"),
    (lambda: rdm(X[:, :1], "correlation"), "constant over channels"),
    (lambda: rdm(X, "poisson"), "metric 'poisson' needs rates >= 0"),
    (lambda: rdm(X, "mahalanobis"),
     "mahalanobis needs noise_precision (p,p): shrinkage_precision(trials) estimates one"),
    (lambda: rdm(X, noise_precision=np.eye(4)),
     "metric='euclidean' takes no noise_precision; mahalanobis and crossnobis do"),
    (lambda: rdm(X, "mahalanobis", np.eye(3)), "noise_precision (3, 3) given, responses (5, 4) need (4,4)"),
    (lambda: rdm(X, "mahalanobis", np.ones(4)), "noise_precision (4,) given"),
    (lambda: rdm(X, "mahalanobis", SINGULAR), "noise_precision (4,4) is singular"),
    (lambda: rdm(RUNS, "crossnobis", SINGULAR), "shrinkage_precision(trials) gives one from few repeats"),
    (lambda: rdm(X, "mahalanobis", -np.eye(4)), "is singular or no precision matrix at all"),
    (lambda: rdm(X, "mahalanobis", np.diag([1, 1, 0, 1])), "is singular"),
    (lambda: rdm(X, "mahalanobis", np.eye(4) + np.triu(np.ones((4, 4)), 1) / 2), "symmetric"),
    (lambda: rdm(X, "mahalanobis", np.full((4, 4), np.nan)), "is singular"),
    (lambda: rdm(X, "mahalanobis", "shrinkage"), "'shrinkage' is for crossnobis of one set of runs (M,n,p)"),
    (lambda: rdm(RUNS[None], "crossnobis", "shrinkage"), "'shrinkage' is for crossnobis of one set of runs"),
    (lambda: rdm(RUNS, "crossnobis", "shrunk"), "noise_precision='shrunk'"),
    (lambda: rdm(X, "crossnobis"), "crossnobis of responses (5, 4), expected (…,M,n,p) with M >= 2 runs"),
    (lambda: rdm(RUNS[:1], "crossnobis"),
     "crossnobis of responses (1, 5, 4), expected (…,M,n,p) with M >= 2 runs"),
    (lambda: rdm(X, "crossnobis", runs=[1] * 5), "crossnobis of responses (1, 5, 4)"),
    (lambda: rdm(X, "crossnobis", runs=[0, 0, 1, 1, 1]),
     "runs: 5 labels, [2, 3] rows per run, responses (5, 4)"),
    (lambda: rdm(X, "crossnobis", runs=[0, 1]), "runs: 2 labels"),
    (lambda: rdm(X, runs=[0, 0, 1, 1, 1]), "metric='euclidean' takes no runs; only crossnobis does"),
])
def test_no_distance(call, text):
    with says(text): call()


@pytest.mark.parametrize("call,text", [
    (lambda: stimuli_of(7), "7 entries are no RDM vector"),
    (lambda: square(np.zeros(0)), "0 entries are no RDM vector"),
    (lambda: square(3.), "0 entries are no RDM vector"),
    (lambda: condensed(X), "(5, 4) given, expected square matrices (…,n,n) with n >= 2"),
    (lambda: condensed(np.arange(9.).reshape(3, 3)), "asymmetric by up to 4"),
    (lambda: condensed(np.ones((3, 3))), "diagonal up to 1, expected 0: are these similarities?"),
    (lambda: to_rsatoolbox(V[None]), "RDM vectors (1, 2, 10) given, expected (L,n(n-1)/2)"),
    (lambda: to_rsatoolbox(V, stimuli=["a"]), "1 names given for 5 stimuli"),
    (lambda: shrinkage_precision(X), "trials (5, 4) given, expected (R,n,p) with R >= 2 repeats"),
    (lambda: shrinkage_precision(RUNS[:1]), "trials (1, 5, 4) given, expected (R,n,p) with R >= 2 repeats"),
    (lambda: shrinkage_precision(RUNS, "eye"), "target='eye': accepted are 'diagonal' and 'identity'"),
    (lambda: shrinkage_precision(with_value(RUNS, np.inf, (0, 0, 0))),
     "1 of 80 responses are NaN or infinite"),
    (lambda: shrinkage_precision(with_value(RUNS, .1, (..., 2))),
     "1 of 4 channels, first 2, are the same in all 4 repeats"),
    (lambda: shrinkage_precision(np.ones((3, 5, 4)), "identity"),
     "4 of 4 channels, first 0, are the same in all 3 repeats"),
])
def test_no_matrix_and_no_noise(call, text):
    with says(text): call()


def test_a_silent_channel_is_no_fault_beside_the_identity():
    assert np.isfinite(shrinkage_precision(with_value(RUNS, .1, (..., 2)), "identity")).all()


GONE = with_value(V, np.nan, (slice(None), 0))


@pytest.mark.parametrize("call,text", [
    (lambda: compare_rdms(V, V, "pearson"),
     "method='pearson': accepted are cosine, corr, spearman, rho-a, kendall, tau-b, tau-a"),
    (lambda: compare_rdms(V, V[:, :6]),
     "RDMs (2, 10) and (2, 6) given, expected vectors (L,n(n-1)/2) of the same stimuli"),
    (lambda: compare_rdms(square(V), square(V)), "condensed(m) makes vectors of squares"),
    (lambda: compare_rdms(V[:, :9], V[:, :9]), "9 entries are no RDM vector"),
    (lambda: compare_rdms(GONE, V), "of 10 pairs 1 and 0 are NaN; expected the same ones in both sets"),
    (lambda: compare_rdms(V * np.nan, V * np.nan), "of 10 pairs 10 and 10 are NaN"),
    (lambda: compare_rdms(with_value(V, np.inf), V), "RDMs hold infinite distances"),
    (lambda: compare_rdms(V, V, "corr", np.eye(5)), "covariance is for cosine_cov and corr_cov"),
    (lambda: compare_rdms(GONE, GONE, "corr_cov", np.eye(5)), "of RDMs without missing pairs"),
    (lambda: compare_rdms(V, V, "corr_cov", np.eye(4)),
     "covariance (4, 4) given, 5 stimuli need (5,5) or (5,)"),
    (lambda: compare_rdms(V, V, "corr_cov", -np.ones(5)), "covariance is not positive definite"),
    (lambda: bootstrap_compare(V, V, "pearson"), "method='pearson'"),
    (lambda: bootstrap_compare(V, V, n=0), "n=0, expected 1 or more"),
    (lambda: bootstrap_compare(GONE, GONE), "1 of 10 pairs are NaN"),
    (lambda: bootstrap_compare([1.], [2.]), "RDMs of 2 stimuli given, expected at least 3"),
    (lambda: bootstrap_compare(V, V[:, :6]), "RDMs (2, 10) and (2, 6) given"),
    (lambda: bootstrap_compare(V, V, resamples=[[0, 1, 2]]),
     "resamples (1, 3) given, expected (n,5) of 0 … 4"),
    (lambda: bootstrap_compare(V, V, resamples=[[0, 1, 2, 3, 5]]),
     "resamples (1, 5) given, expected (n,5) of 0 … 4"),
    (lambda: permutation_test(V, V, n=0), "n=0, expected 1 or more"),
    (lambda: permutation_test(GONE, GONE), "1 of 10 pairs are NaN"),
    (lambda: rdm_noise_ceiling(RUNS[:1], "euclidean"),
     "trials (1, 5, 4), splits=100; a ceiling of euclidean needs (R,n,p) with R >= 2"),
    (lambda: rdm_noise_ceiling(RUNS[:3]),
     "trials (3, 5, 4), splits=100; a ceiling of crossnobis needs (R,n,p) with R >= 4"),
    (lambda: rdm_noise_ceiling(X), "a ceiling of crossnobis needs (R,n,p)"),
    (lambda: rdm_noise_ceiling(RUNS, splits=0), "splits=0"),
    (lambda: rdm_noise_ceiling(RUNS, "manhattan"), "metric='manhattan'"),
    (lambda: rdm_noise_ceiling(RUNS, method="pearson"), "method='pearson'"),
])
def test_no_comparison(call, text):
    with says(text): call()


def test_data_that_disagree_have_no_reliability():
    t = (np.stack([X, -X])
         + np.array([[[0, 0, 5, 0]]]) * np.array([[[1]], [[-1]]]) * np.arange(5)[None, :, None])
    opposite = rdm_noise_ceiling(np.stack([X, X[::-1] * np.arange(5)[:, None]]), "euclidean", splits=2)
    assert ((opposite.lower > 0) != np.isnan(opposite.reliability)
            and np.isfinite(rdm_noise_ceiling(t, "euclidean", splits=1).lower))


def test_inputs_stay_as_they_were():
    x, runs, v = X.copy(), RUNS.copy(), V.copy()
    for metric in ("euclidean", "correlation", "cosine"): rdm(x, metric)
    rdm(runs, "crossnobis", "shrinkage")
    for method in ("corr", "spearman", "corr_cov"):
        compare_rdms(v, v, method), bootstrap_compare(v, v, method, n=3), permutation_test(v, v, method, n=3)
    rdm_noise_ceiling(runs, splits=2)
    t = torch.tensor(v)
    compare_rdms(t, t, "corr")
    assert (np.array_equal(x, X) and np.array_equal(runs, RUNS) and np.array_equal(v, V)
            and np.array_equal(t, V))
