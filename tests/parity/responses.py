"""Photographs, simulated V1 and recordings against closed forms, hand formulas and the published files."""
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from visionbench.data import photographs, recordings
from visionbench.data.antolik import read_antolik2016
from visionbench.data.neural_fixtures import write_antolik2016_fixture, write_sensorium_fixture
from visionbench.data.photographs import PHOTOGRAPHS, natural_patches
from visionbench.data.recordings import group_trials, read_sensorium
from visionbench.data.responses import (NeuralDataset, SimulatedV1, load_antolik2016,
                                         load_antolik2016_test, load_sensorium, simulated_v1_dataset)
from visionbench.data.simulated_v1 import draw_neurons, gabor_pairs

PACKED = ROOT.parent / "shared" / "data" / "antolik2016_validation.npz"
real = pytest.mark.skipif(not PACKED.is_file(),
                          reason=f"the test sets of Antolík et al. 2016 are not at {PACKED}")


def correlation(a, b):
    """Pearson over the first axis, neuron by neuron, in double precision; 0 for a constant one."""
    a, b = a - a.mean(0), b - b.mean(0)
    norm = np.sqrt((a**2).sum(0)*(b**2).sum(0))
    return np.divide((a*b).sum(0), norm, out=np.zeros(norm.shape), where=norm > 0)


def noise_numbers(y):
    """Median noise power NNP and mean single-trial oracle (all trials pooled) of trials (R,J,N)."""
    y = np.asarray(y, float)
    nnp = y.var(0, ddof=1).mean(0)/y.reshape(-1, y.shape[2]).var(0, ddof=1)
    others = np.stack([np.delete(y, r, 0).mean(0) for r in range(len(y))])
    return np.median(nnp), correlation(y.reshape(-1, y.shape[2]), others.reshape(-1, y.shape[2])).mean()


# photographs

def test_block_means_of_a_plane_wave():
    """A wave of period 50 keeps its phase and loses amplitude by the closed form of a box filter, at each
    scale."""
    x = .5 + .5*np.cos(2*np.pi*np.arange(600)/50)[None].repeat(600, 0).astype(np.float32)
    for scale in photographs.SCALES:
        small = photographs.block_mean(x, scale)
        keep = np.sin(np.pi*scale/50)/(scale*np.sin(np.pi/50))
        at = np.arange(600//scale)*scale + (scale - 1)/2
        assert np.abs(small - (.5 + .5*keep*np.cos(2*np.pi*at/50))).max() < 1e-5


def test_contrast_is_normalised_then_clipped():
    x = natural_patches(500)[:, 0].double()
    inside = ((x > 0) & (x < 1)).flatten(1).all(1)
    assert 20 < inside.sum() < 500                                    # both kinds occur
    assert ((x[inside].mean((1, 2)) - .45).abs().max() < 1e-6
            and (x[inside].std((1, 2), correction=0) - .25).abs().max() < 1e-6)
    assert abs(natural_patches(1800).std() - .222) < .01              # spec 5.3, measured on the prototype


def test_patches_come_from_their_own_photographs(monkeypatch):
    """Each split opens its own files and no others; of the stereo pair only the left picture."""
    asked = []
    monkeypatch.setattr(photographs, "photograph", lambda p, f: (
        asked.append(f) or np.random.default_rng(1).random((400, 400))))
    natural_patches(5, split="test")
    assert sorted(asked) == ["data/camera.png", "data/coins.png", "data/motorcycle_left.png"]
    asked.clear()
    natural_patches(5)
    assert len(asked) == 12 and not {"data/motorcycle_right.png", "data/camera.png"} & {*asked}


def test_scales_and_mirrors_are_drawn_evenly():
    rng, sources, seen = np.random.default_rng(0), [np.random.default_rng(1).random((400, 400))], []
    original = photographs.block_mean
    try:
        photographs.block_mean = lambda x, s: seen.append(s) or original(x, s)
        patches = [photographs._draw(rng, sources, 31) for _ in range(600)]
    finally:
        photographs.block_mean = original
    # flat patches of white noise at scale 8 are drawn again
    assert min(seen.count(s) for s in photographs.SCALES) > 70
    mirrored = sum(p.strides[1] < 0 for p in patches)
    assert 240 < mirrored < 360


def test_flat_patches_are_rejected(monkeypatch):
    half = np.zeros((400, 400), np.float32)
    half[:, 200:] = np.random.default_rng(0).random((400, 200)) > .5
    monkeypatch.setattr(photographs, "photograph", lambda p, f: half)
    assert (natural_patches(200).flatten(1).std(1) > .1).all()


def test_a_longer_request_begins_with_the_shorter_one_and_is_quick():
    natural_patches(1)
    start = time.process_time()
    x = natural_patches(1800, seed=3)
    assert time.process_time() - start < 2
    assert (torch.equal(natural_patches(100, seed=3), x[:100])
            and not torch.equal(natural_patches(100, seed=4), x[:100]))


def test_nothing_is_fetched(monkeypatch):
    """scikit-image's data module, which can download, is never imported and no socket is opened."""
    import socket
    import sys
    monkeypatch.setattr(socket, "socket", lambda *a, **k: pytest.fail("a socket was opened"))
    monkeypatch.setitem(sys.modules, "skimage.data", None)            # importing it would raise
    monkeypatch.setitem(sys.modules, "pooch", None)
    photographs.photograph.cache_clear()
    assert (natural_patches(3).shape == (3, 1, 31, 31)
            and natural_patches(3, split="test").shape == (3, 1, 31, 31))


def test_photographs_are_the_files_of_the_wheels():
    import skimage
    import sklearn
    for split in PHOTOGRAPHS.values():
        for package, file in split:
            base = {"skimage": skimage, "sklearn": sklearn}[package].__path__[0]
            with Image.open(f"{base}/{file}") as f:
                assert np.array_equal(photographs.photograph(package, file)*255, np.asarray(f.convert("L")))


# simulated V1

def test_gabor_pair_equals_the_formula_pixel_by_pixel():
    par = draw_neurons(6, 31, 4)
    w = gabor_pairs(31, *[par[k] for k in ("centre", "orientation", "wavelength", "sigma", "aspect")]).numpy()
    for n in range(6):
        cx, cy = par["centre"][n].tolist()
        t, lam, s, g = (float(par[k][n]) for k in ("orientation", "wavelength", "sigma", "aspect"))
        pair = np.zeros((2, 31, 31))
        weight = np.zeros((31, 31))
        for i in range(31):
            for j in range(31):
                x, y = j - 15 - cx, i - 15 - cy
                u, v = x*np.cos(t) + y*np.sin(t), -x*np.sin(t) + y*np.cos(t)
                weight[i, j] = np.exp(-(u*u + g*g*v*v)/(2*s*s))
                pair[:, i, j] = np.cos(2*np.pi*u/lam), np.cos(2*np.pi*u/lam + np.pi/2)
        for k in range(2):
            f = weight*(pair[k] - (weight*pair[k]).sum()/weight.sum())
            assert np.abs(w[n, k] - f/np.sqrt((f**2).sum())).max() < 1e-12


def test_rates_equal_the_formula_neuron_by_neuron():
    """Spec 5.3 written out with loops in double precision."""
    x = natural_patches(40)
    v1 = SimulatedV1(8, seed=2).calibrate(x)
    p = {k: v.numpy() for k, v in v1.neurons.items()}
    z = x[:, 0].double().numpy()
    z = z - z.mean((1, 2), keepdims=True)
    yy, xx = np.mgrid[:31, :31] - 15.
    for n in range(8):
        even, odd = ((z*v1.filters[n, k].double().numpy()).sum((1, 2)) for k in (0, 1))
        k = p["complexity"][n]
        d = (1 - k)*np.maximum(even, 0) + k*np.sqrt((even**2 + odd**2)/2)
        window = np.exp(-((xx - p["centre"][n, 0])**2 + (yy - p["centre"][n, 1])**2)
                        / (2*(1.5*p["sigma"][n])**2))
        u = d/(.1 + np.sqrt((window*z**2).sum((1, 2))/window.sum()))
        c, e = np.quantile(u, .8), p["exponent"][n]
        q = u**e/(u**e + c**e)
        rate = p["mean_rate"][n]*(.15 + .85*q/q.mean())
        assert np.allclose(v1.rates(x)[:, n], rate, rtol=2e-4, atol=1e-5)


def test_trials_have_the_moments_of_a_doubly_gained_poisson():
    x = natural_patches(4)
    v1 = SimulatedV1(5).calibrate(natural_patches(100))
    rate, y = v1.rates(x).double(), v1.trials(x, 20000, seed=1).double()
    a, b = 1 + .3**2, 1 + .6**2
    assert ((y.mean(0) - rate)/rate).abs().max() < .06
    assert (y.var(0)/(rate + rate**2*(a*b - 1)) - 1).abs().max() < .15
    covariance = torch.stack([(y[:, i].T.cov()/(rate[i][:, None]*rate[i])) for i in range(4)])
    off = covariance[:, ~torch.eye(5, dtype=bool)]
    # only the shared gain correlates neurons
    assert abs(off.mean() - .3**2) < .02
    across = ((y[:, 0] - rate[0])*(y[:, 1] - rate[1])).mean(0)/(rate[0]*rate[1])
    assert across.abs().mean() < .03                                  # and not across images


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_that_of_mouse_v1(seed):
    """Acceptance bands of spec 9.1.7; mean, zeros and Fano of the training trials, NNP and oracle of the
    test trials."""
    ds = simulated_v1_dataset(seed=seed, n_eval=0)
    y, trials = ds.responses.double().numpy(), ds.test_trials.double().numpy()
    assert .50 <= y.mean() <= .70
    assert .60 <= np.median((y == 0).mean(0)) <= .75
    assert 1.6 <= np.median(y.var(0, ddof=1)/y.mean(0)) <= 2.3
    nnp, oracle = noise_numbers(trials)
    assert .72 <= nnp <= .86 and .30 <= oracle <= .46
    assert correlation(ds.test_rates.double().numpy(), trials.mean(0)).mean() >= .80


def test_simulated_sets_are_reproducible_and_have_no_common_noise():
    a, b = (simulated_v1_dataset(60, 20, 3, 7, seed=5, n_eval=10),
            simulated_v1_dataset(60, 20, 3, 7, seed=5, n_eval=10))
    for k in ("images", "responses", "test_images", "test_trials", "test_rates", "eval_images", "eval_rates"):
        assert torch.equal(getattr(a, k), getattr(b, k)), k
    assert not torch.equal(a.responses, simulated_v1_dataset(60, 20, 3, 7, seed=6, n_eval=10).responses)
    assert torch.equal(a.population.rates(a.eval_images), a.eval_rates)
    v1, x = a.population, a.test_images
    assert not torch.equal(v1.trials(x, 3, 0), v1.trials(x, 3, 1))
    assert (a.population.drive(a.images).quantile(.8, 0) == a.population.half_drive).all()


# the record

def test_split_is_a_partition_and_shuffling_leaves_no_pair():
    ds = simulated_v1_dataset(50, 5, 2, 6, n_eval=0)
    train, validation = ds.split(.8, seed=1)
    assert (len(train), len(validation)) == (40, 10) and train.test_trials is ds.test_trials
    rows = {tuple(x.flatten().tolist()) for x in ds.images}
    assert {tuple(x.flatten().tolist()) for part in (train, validation) for x in part.images} == rows
    assert torch.equal(ds.split(.8, seed=1)[1].responses, validation.responses)
    labelled = NeuralDataset(ds.images, torch.arange(50.)[:, None].expand(50, 2))
    for seed in range(20):
        moved = labelled.shuffled(seed).responses[:, 0]
        assert (moved != torch.arange(50)).all() and moved.unique().numel() == 50


def test_missing_repeats_are_left_out_of_the_mean():
    trials = torch.tensor([[[1., 2.], [3., 4.]], [[3., float("nan")], [5., 8.]]])
    ds = NeuralDataset(torch.zeros(0, 1, 2, 2), torch.zeros(0, 2), torch.zeros(2, 1, 2, 2), trials)
    assert ds.test_mean.tolist() == [[2., 2.], [4., 6.]] and ds.repeats == 2 and len(ds) == 0


def test_group_trials_equals_a_loop():
    rng = np.random.default_rng(0)
    y, s = rng.normal(size=(60, 3)).astype(np.float32), rng.integers(0, 9, 60)
    shown, trials = group_trials(y, s)
    for j, k in enumerate(shown):
        mine = y[s == k]
        assert np.array_equal(trials[:len(mine), j], mine) and np.isnan(trials[len(mine):, j]).all()


# readers

def test_antolik_layout_round_trip(tmp_path):
    write_antolik2016_fixture(tmp_path, n_train=30)
    for region, repeats in ((1, 10), (2, 8), (3, 12)):
        ds, only = load_antolik2016(tmp_path, region), load_antolik2016_test(tmp_path/"Data", region)
        folder = tmp_path/f"Data/region{region}"
        raw = np.load(folder/"training_inputs.npy")
        assert np.abs(ds.images.numpy().reshape(30, 961)*255 - raw*1e6).max() < 1e-4
        assert np.array_equal(ds.responses, np.load(folder/"training_set.npy").astype(np.float32))
        assert np.allclose(ds.test_mean, np.load(folder/"validation_set.npy"), atol=1e-6)
        assert ds.repeats == repeats and torch.equal(only.test_trials, ds.test_trials) and len(only) == 0
    assert torch.equal(load_antolik2016(tmp_path, 1).test_images, load_antolik2016(tmp_path, 2).test_images)
    assert read_antolik2016(tmp_path, 1)["images"].dtype == np.uint8


@real
@pytest.mark.parametrize("region,neurons,repeats,nnp,oracle",
                         [(1, 103, 10, .781, .388), (2, 55, 8, .834, .296), (3, 102, 12, .802, .355)])
def test_published_test_sets(region, neurons, repeats, nnp, oracle):
    """The table of spec 4.1, measured from supporting file S1 of Antolík et al. 2016 (CC BY 4.0)."""
    ds = load_antolik2016_test(PACKED, region)
    assert ds.test_trials.shape == (repeats, 50, neurons) and ds.test_images.shape == (50, 1, 31, 31)
    assert noise_numbers(ds.test_trials) == pytest.approx((nnp, oracle), abs=6e-4)
    assert "CC BY 4.0" in ds.note and "pcbi.1004927" in ds.note
    same = torch.equal(ds.test_images, load_antolik2016_test(PACKED, 1).test_images)
    assert same == (region in (1, 2))


@pytest.mark.filterwarnings("ignore:.*always respond the same")       # ten validation images, quiet neurons
def test_sensorium_layout_round_trip(tmp_path):
    write_sensorium_fixture(tmp_path, repeats=4, size=(36, 64))
    tier, image = (np.load(tmp_path/f"meta/trials/{k}.npy") for k in ("tiers", "frame_image_id"))
    ds = load_sensorium(tmp_path, standardize=False)
    for row, trial in enumerate(np.flatnonzero(tier == "train")):
        assert np.array_equal(ds.responses[row], np.load(tmp_path/f"data/responses/{trial}.npy"))
        assert np.allclose(ds.images[row]*255, np.load(tmp_path/f"data/images/{trial}.npy"), atol=1e-3)
    for j, i in enumerate(sorted(set(image[tier == "test"]))):
        trials = np.flatnonzero(image == i)
        assert np.array_equal(ds.test_trials[:, j],
                              [np.load(tmp_path/f"data/responses/{t}.npy") for t in trials])
        assert np.allclose(ds.test_images[j]*255, np.load(tmp_path/f"data/images/{trials[0]}.npy"), atol=1e-3)
    validation = load_sensorium(tmp_path, tier="validation")
    assert len(validation) == 10 and validation.repeats == 4
    scale = ds.responses.numpy().std(0)                               # of the training tier, for every tier
    at = np.flatnonzero(tier == "validation")[0]
    assert np.allclose(validation.responses[0]*scale, np.load(tmp_path/f"data/responses/{at}.npy"), atol=1e-5)


def test_nearly_silent_neurons_are_not_blown_up():
    y = np.ones((10, 3))
    y[0] += [10, 1e-6, 5]
    s = recordings._deviation(y)
    assert s[0] == y[:, 0].std() and s[1] == pytest.approx(.01*y.std(0).mean())


def test_withheld_test_responses_are_left_out(tmp_path):
    write_sensorium_fixture(tmp_path, withheld=True)
    ds = load_sensorium(tmp_path)
    assert ds.repeats == 0 and "withheld" in ds.note and len(ds) == 40


def test_shrinking_is_the_block_mean(tmp_path):
    write_sensorium_fixture(tmp_path, size=(72, 128))
    full, small = (read_sensorium(tmp_path, shrink=s)["images"] for s in (1, 2))
    assert np.allclose(small, torch.nn.functional.avg_pool2d(torch.tensor(full), 2), atol=1e-6)


def test_xarray_assembly():
    xr = pytest.importorskip("xarray",
                             reason="xarray is not installed; the notebook shows the reader on a stand-in")
    values = np.arange(12.).reshape(2, 6, 1)
    one = xr.DataArray(values, dims=("neuroid", "presentation", "time_bin"),
                       coords={"stimulus_id": ("presentation", ["b", "a", "b", "c", "b", "a"]),
                               "neuroid_id": ("neuroid", ["x", "y"])})
    pictures = {k: np.full((4, 4), i/4) for i, k in enumerate("abc")}
    ds = NeuralDataset.from_xarray(one, pictures)
    assert (ds.responses.tolist() == [[3, 9]] and ds.images.unique().tolist() == [.5]
            and ds.neuron_ids == ("x", "y"))
    assert ds.test_trials[:, 0, 0].tolist()[:2] == [1, 5] and ds.test_trials[:, 1, 1].tolist() == [6, 8, 10]
