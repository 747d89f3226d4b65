"""Neural data with bad input: every message names what was given and what was expected."""
import re
import warnings

import numpy as np
import pytest
import torch

from visionbench.data import photographs
from visionbench.data.antolik import antolik_bytes
from visionbench.data.neural_fixtures import write_antolik2016_fixture, write_sensorium_fixture
from visionbench.data.photographs import natural_patches, photograph
from visionbench.data.recordings import (from_trials, group_trials, read_array, read_assembly, read_npz,
                                         shrink_images)
from visionbench.data.responses import (NeuralDataset, SimulatedV1, load_antolik2016, load_antolik2016_test,
                                        load_sensorium, simulated_v1_dataset)

NAN, INF = float("nan"), float("inf")


def says(text, kind=ValueError):
    return pytest.raises(kind, match=re.escape(text))


def record(**changes):
    """Four images, three neurons, two test images in two repeats, with changes."""
    rng = np.random.default_rng(0)
    good = dict(images=rng.random((4, 1, 5, 5)), responses=rng.random((4, 3)),
                test_images=rng.random((2, 1, 5, 5)), test_trials=rng.random((2, 2, 3)))
    return NeuralDataset(**{**good, **changes})


# photographs

@pytest.mark.parametrize("bad,text", [
    (dict(n=0), "n must be at least 1, got 0"), (dict(n=3, size=301), "a size of 2 to 300 pixels, got 301"),
    (dict(n=3, size=1), "2 to 300 pixels, got 1"), (dict(n=3, split="valid"), "split 'valid' is unknown")])
def test_wrong_patches(bad, text):
    with says(text): natural_patches(**bad)


def test_the_largest_patches_fit_every_split():
    assert natural_patches(4, 300, "test").shape == (4, 1, 300, 300)


def test_packages_and_files_that_are_missing():
    with says("nosuchpackage is not installed; a.png comes with it", FileNotFoundError):
        photograph("nosuchpackage", "a.png")
    with says("skimage is installed without data/nosuch.png", FileNotFoundError):
        photograph("skimage", "data/nosuch.png")


def test_a_photograph_cannot_be_changed():
    with says("read-only"): photograph("skimage", "data/camera.png")[0, 0] = 1


# simulator

@pytest.mark.parametrize("bad", [dict(n_neurons=0), dict(size=7)])
def test_impossible_populations(bad):
    with says("need at least 1 neuron and 8 pixels a side, got"): SimulatedV1(**bad)


def test_rates_before_calibration():
    x = torch.rand(2, 1, 31, 31)
    for ask in (lambda v: v.rates(x), lambda v: v.trials(x, 2)):
        with says("calibrate(images) comes before rates", RuntimeError): ask(SimulatedV1(3))


@pytest.mark.parametrize("shape", [(2, 31, 31), (2, 3, 31, 31), (2, 1, 32, 31), (961,)])
def test_images_of_another_shape(shape):
    with says(f"images {shape} given, expected (B,1,31,31)"): SimulatedV1(3).drive(torch.rand(shape))


def test_images_that_drive_nobody():
    v1 = SimulatedV1(3)
    with says("fewer than a fifth of 10 images drive neurons [0, 1, 2]"):
        v1.calibrate(torch.full((10, 1, 31, 31), .5))
    with says("comes before rates", RuntimeError):
        v1.rates(torch.rand(1, 1, 31, 31))      # not half calibrated


def test_no_repeats():
    v1 = SimulatedV1(3).calibrate(natural_patches(20))
    with says("repeats must be at least 1, got 0"): v1.trials(natural_patches(2), 0)


@pytest.mark.parametrize("bad,text", [
    (dict(n_train=0), "n must be at least 1, got 0"), (dict(n_test=0), "n_test ≥ 1, n_eval ≥ 0, got 0, 400"),
    (dict(n_eval=-1), "n_eval ≥ 0, got 50, -1"), (dict(repeats=0), "repeats must be at least 1"),
    (dict(n_neurons=0), "at least 1 neuron")])
def test_impossible_data_sets(bad, text):
    with says(text): simulated_v1_dataset(**{"n_train": 20, "n_neurons": 4, **bad})


# the record

@pytest.mark.parametrize("bad,text", [
    (dict(images=np.zeros((4, 25))), "images must be (I,C,H,W) or (I,H,W), got shape (4, 25)"),
    (dict(images=np.full((4, 1, 5, 5), 200.)), "images must lie in [0,1] or be uint8, got 200…200"),
    (dict(images=np.full((4, 1, 5, 5), -.1)), "got -0.1…-0.1"),
    (dict(images=np.full((4, 1, 5, 5), NAN)), "got nan…nan"),
    (dict(images=np.zeros((5, 1, 5, 5))), "responses must be (5,N), a row for each image, got shape (4, 3)"),
    (dict(responses=np.ones(4)), "responses must be (4,N), a row for each image, got shape (4,)"),
    (dict(responses=np.full((4, 3), INF)),
     "responses holds 12 infinite values; NaN stands for a missing one"),
    (dict(responses=np.array([[1, NAN, 0], [2, NAN, 1], [3, NAN, 2], [1, NAN, 4]])),
     "responses: neurons [1] have only NaN"),
    (dict(test_images=np.zeros((2, 1, 6, 6))), "test_images are (1, 6, 6) each, images (1, 5, 5)"),
    (dict(test_images=np.full((2, 1, 5, 5), 7.)), "test_images must lie in [0,1]"),
    (dict(test_images=None), "test_trials given without test_images"),
    (dict(test_trials=np.zeros((2, 3, 3))),
     "test_trials must be (R,2,3), for 2 test_images and 3 neurons, got shape (2, 3, 3)"),
    (dict(test_trials=np.zeros((2, 2, 4))), "for 2 test_images and 3 neurons, got shape (2, 2, 4)"),
    (dict(test_trials=np.zeros((2, 3))), "got shape (2, 3)"),
    (dict(test_trials=np.full((2, 2, 3), NAN)), "test_trials: neurons [0, 1, 2] have only NaN"),
    (dict(test_rates=np.zeros((3, 3))), "test_rates must be (2,3)"),
    (dict(eval_rates=np.zeros((2, 3))), "eval_rates given without eval_images"),
    (dict(eval_images=np.zeros((2, 1, 5, 5)), eval_rates=np.zeros((2, 4))), "eval_rates must be (2,3)"),
    (dict(neuron_ids=("a",)), "1 neuron_ids given for 3 neurons")])
def test_records_that_do_not_fit(bad, text):
    with says(text): record(**bad)


def test_no_images_at_all():
    with says("neither training nor test images"): NeuralDataset(torch.zeros(0, 1, 5, 5), torch.zeros(0, 3))


def test_constant_neurons_warn_by_number_once_and_here():
    y = np.random.default_rng(0).random((4, 3))
    y[:, 1] = .5
    with pytest.warns(UserWarning, match=r"responses: neurons \[1\] always respond the same") as said:
        ds = NeuralDataset(np.zeros((4, 1, 5, 5)), y)
    assert len(said) == 1 and said[0].filename == __file__
    y = np.ones((4, 30))
    with pytest.warns(UserWarning, match=r"neurons \[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …\] \(30 in all\)"):
        NeuralDataset(np.zeros((4, 1, 5, 5)), y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ds.split(.5), ds.shuffled(), ds.subset([0])                   # known data warn no second time


def test_missing_values_and_negative_responses_are_kept():
    y = np.array([[-1., 2, NAN], [0, 1, 3], [1, 0, 2], [2, 5, NAN]])
    ds = record(responses=y)
    assert np.array_equal(ds.responses.numpy(), y.astype(np.float32), equal_nan=True)
    assert ds.subset([0, 3]).responses[:, 2].isnan().all()            # a part without any is no error


def test_the_record_is_frozen():
    with pytest.raises(AttributeError): record().images = None


@pytest.mark.parametrize("fraction", [0., 1., .01, -1.])
def test_splits_that_leave_nothing(fraction):
    with says(f"fraction={fraction} of 4 images leaves one part empty"): record().split(fraction)


def test_positions_outside_and_single_images():
    with pytest.raises(IndexError): record().subset([4])
    with says("needs 2 images or more, got 1"): record().subset([0]).shuffled()


# readers

def test_trials_that_do_not_fit():
    with says("expected responses (T,N) and stimulus (T,), got (3, 2) and (2,)"):
        group_trials(np.zeros((3, 2)), [0, 1])
    with says("got (3,) and (3,)"): group_trials(np.zeros(3), [0, 1, 1])
    with says("got (0, 2) and (0,)"): group_trials(np.zeros((0, 2)), [])
    for stimulus in ([0, 3], [-1, 0], [.5, 1.]):
        with says("stimulus must hold whole positions 0…2 in images, got"):
            from_trials(np.zeros((3, 4, 4)), np.zeros((2, 1)), stimulus)


def test_npz_files(tmp_path):
    path = tmp_path/"x.npz"
    with says(f"{path} is missing; it should hold images, responses", FileNotFoundError): read_npz(path)
    path.write_bytes(b"no zip")
    with says(f"{path} is no readable npz"): read_npz(path)
    np.savez(path, images=np.zeros(3), spikes=np.zeros(3))
    with says("lacks responses; it holds images, spikes"): read_npz(path)
    np.save(tmp_path/"y.npy", np.zeros(3))
    with says("lacks images, responses; it holds a single array"): read_npz(tmp_path/"y.npy")
    with says(f"toy: {path} holds images, spikes, expected a single array (npy)"): read_array(path, "toy")
    np.savez(path, images=np.array([{}], dtype=object), responses=np.zeros(3))
    with pytest.raises(ValueError): read_npz(path)                    # pickles are never loaded


def test_antolik_files(tmp_path):
    with says("antolik2016: looked in", FileNotFoundError): load_antolik2016(tmp_path)
    for region in (0, 4, "1"):
        with says(f"region must be 1, 2 or 3, got {region!r}"): load_antolik2016(tmp_path, region)
    folder = write_antolik2016_fixture(tmp_path, n_train=20)/"Data/region1"
    np.save(folder/"training_set.npy", np.zeros((19, 12)))
    with says("responses must be (20,N), a row for each image, got shape (19, 12)"):
        load_antolik2016(tmp_path)
    (folder/"training_set.npy").write_bytes(b"?")
    with says("training_set.npy is no readable array"): load_antolik2016(tmp_path)
    (folder/"training_inputs.npy").unlink()
    with says("training_inputs.npy is missing: without training images nothing can be trained; "
              "load_antolik2016_test", FileNotFoundError):
        load_antolik2016(tmp_path)
    assert load_antolik2016_test(tmp_path).repeats == 10
    (folder/"raw_validation_set.npy").unlink()
    with says("raw_validation_set.npy is missing", FileNotFoundError): load_antolik2016_test(tmp_path)
    np.savez(tmp_path/"packed.npz", images_region1=np.zeros((2, 31, 31)))
    with says("lacks responses_region1; it holds images_region1"):
        load_antolik2016_test(tmp_path/"packed.npz")


@pytest.mark.parametrize("x", [
    np.zeros((3, 960)), np.zeros((961,)), np.full((1, 961), .5), np.full((1, 961), 256e-6),
    np.full((1, 961), -1e-6), np.full((1, 961), 1.5e-6), np.zeros((0, 961))])
def test_pixels_that_are_no_bytes(x):
    with says(f"antolik2016: here holds {x.shape}"): antolik_bytes(x, "here")


def test_sensorium_files(tmp_path):
    with says("sensorium: looked in", FileNotFoundError): load_sensorium(tmp_path)
    write_sensorium_fixture(tmp_path)
    with says("tier must be 'train' or 'validation' of test, train, validation, got 'test'"):
        load_sensorium(tmp_path, tier="test")
    with says("shrink=5 does not divide images of 36×64 pixels"): load_sensorium(tmp_path, shrink=5)
    with says("shrink=0 does not divide"): shrink_images(np.zeros((4, 4)), 0)
    at = np.flatnonzero(np.load(tmp_path/"meta/trials/tiers.npy") == "train")[3]
    np.save(tmp_path/f"data/responses/{at}.npy", np.zeros(5, np.float32))
    with says("responses differ in shape: [(5,), (12,)]"): load_sensorium(tmp_path)
    (tmp_path/f"data/responses/{at}.npy").unlink()
    with says(f"{at}.npy is missing", FileNotFoundError): load_sensorium(tmp_path)


class Assembly:
    """What the reader uses of an xarray.DataArray."""
    def __init__(self, dims, shape, names):
        self.dims, self.shape, self.values, self.coords = (
            dims, shape, np.zeros(shape), {"image_id": np.array([*names])})
    def __getitem__(self, name): return type("Coordinate", (), {"values": self.coords[name]})
    def transpose(self, *dims): return self


def test_assemblies_that_do_not_fit():
    pictures = {"a": np.zeros((2, 2))}
    with says("expected presentation, neuroid, and others only of size 1"):
        read_assembly(Assembly(("presentation", "neuroid", "time_bin"), (2, 3, 4), "aa"), pictures)
    with says("expected presentation, neuroid"):
        read_assembly(Assembly(("presentation", "unit"), (2, 3), "aa"), pictures)
    with says("no picture for 1 stimuli: ['b']; images has 1"):
        read_assembly(Assembly(("presentation", "neuroid"), (2, 3), "ab"), pictures)


def test_sources_too_small_for_a_scale_are_passed_over(monkeypatch):
    monkeypatch.setattr(photographs, "photograph", lambda p, f: np.random.default_rng(0).random((70, 90)))
    assert natural_patches(30).shape == (30, 1, 31, 31)               # scales 3 and more do not fit
