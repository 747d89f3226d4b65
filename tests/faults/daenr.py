"""Bad input to DAE-NR: the message says what was given and what was expected."""
import json
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from visionbench.core.config import ConfigError
from visionbench.data.neural_fixtures import write_antolik2016_fixture
from visionbench.data.responses import NeuralDataset, simulated_v1_dataset
from visionbench.nn.autoencoder import Encoder, Standardise, small_autoencoder
from visionbench.runs.record import Run, RunError
from visionbench.systems.daenr.compare import compare_variants, per_seed
from visionbench.systems.daenr.config import DaenrConfig
from visionbench.systems.daenr.fit import check_settings, fit
from visionbench.systems.daenr.losses import NEURAL_LOSSES, JointLoss, poisson_loss
from visionbench.systems.daenr.nets import load_recording, networks
from visionbench.systems.daenr.network import NeuralAutoencoder, build_network
from visionbench.systems.daenr.neurons import (evaluate_dae_nr, judge_layers, judge_neurons, neuron_table,
                                               similarity_target)
from visionbench.systems.daenr.readout import READOUTS, FactorizedReadout, GaussianReadout
from visionbench.systems.daenr.references import pca_reconstruction
from visionbench.systems.daenr.training import train_dae_nr

SMALL = dict(images=24, neurons=6, unseen=8, test_images=6, repeats=3, epochs=1, batch=8, latent=8,
             device="cpu")
CONFIG = DaenrConfig.start("quick", **SMALL)


@pytest.fixture(scope="module")
def ds():
    return load_recording(CONFIG)


def net(ds, config=CONFIG, **how):
    return build_network(config, ds.images, ds.responses.nanmean(0).clamp_min(0), **how)


def says(text, error=ValueError):
    return pytest.raises(error, match=re.escape(text))


# ---- networks

def test_a_tap_that_does_not_exist(ds):
    with says("unknown tap 'h7'"): NeuralAutoencoder(*small_autoencoder(), tap="h7")
    with says("Known: h1, h2, h3, h4."): build_network(CONFIG, ds.images, tap=9)
    with says("unknown tap 'h5'"): check_settings(CONFIG.replace(taps=(5,)), ds)
    check_settings(CONFIG.replace(taps=(5,), arch="reference"), ds)  # which has five


def test_a_readout_of_another_stage():
    encoder, decoder = small_autoencoder()
    with says("readout for (16, 16, 16) given, stage h3 is (32, 8, 8)"):
        NeuralAutoencoder(encoder, decoder, "h3", FactorizedReadout((16, 16, 16), 5))


@pytest.mark.parametrize("kind", READOUTS.values())
def test_readout_arguments(kind):
    with says("n_neurons = 0: expected (C,H,W) and at least one neuron"): kind((3, 4, 4), 0)
    with says("in_shape = (3, 16)"): kind((3, 16), 5)
    with says("mean_response (4,) given, expected (5,): one per neuron"):
        kind((3, 4, 4), 5, mean_response=torch.ones(4))
    with says("mean response -0.5 of neuron 1 is negative, which no softplus gives: output='linear'"):
        kind((3, 4, 4), 2, mean_response=torch.tensor([1., -.5]))
    assert kind((3, 4, 4), 2, mean_response=torch.tensor([1., -.5]), output="linear").bias[1] == -.5
    with says("output = 'relu': expected 'softplus' or 'linear'"): kind((3, 4, 4), 2, output="relu")
    with says("features (2, 3, 4, 5) given, this readout expects (B,3,4,4)"):
        kind((3, 4, 4), 2)(torch.zeros(2, 3, 4, 5))
    with says("features (3, 4, 4) given"): kind((3, 4, 4), 2)(torch.zeros(3, 4, 4))


def test_covariance_of_another_kind():
    with says("covariance = 'round': expected 'isotropic', 'diagonal' or 'full'"):
        GaussianReadout((3, 4, 4), 2, covariance="round")


def test_images_of_another_shape(ds):
    model = net(ds)
    with says("images (2, 1, 30, 31) given, expected (B,1,31,31)"): model(torch.rand(2, 1, 30, 31))
    with says("images (2, 3, 31, 31) given"): model(torch.rand(2, 3, 31, 31))
    with says("images (1, 31, 31) given"): model(torch.rand(1, 31, 31))
    other = simulated_v1_dataset(n_train=8, n_test=4, repeats=2, n_neurons=6, n_eval=0, size=40)
    with says("images are (1, 40, 40), the network expects (1, 31, 31)"): train_dae_nr(model, other, CONFIG)


def test_pixels_outside_0_1():
    for wrong in (torch.full((3, 1, 8, 8), 1.2), torch.full((3, 1, 8, 8), -.1)):
        with says("expected (I,C,H,W) in [0, 1]"): Standardise.of(wrong)
    with says("per = 'channel': expected 'scalar' or 'pixel'"):
        Standardise.of(torch.rand(3, 1, 8, 8), "channel")
    with says("expected one shape, every std > 0"): Standardise(.5, 0.)
    with pytest.raises(ValueError, match=r"images must lie in \[0,1\]"):
        NeuralDataset(255 * torch.rand(3, 8, 8), torch.rand(3, 2))


def test_a_pixel_that_never_changes_does_not_divide_by_zero():
    x = torch.rand(5, 1, 4, 4)
    x[:, :, 0, 0] = .5
    assert Standardise.of(x, "pixel")(x).isfinite().all()


def test_an_image_too_small_for_the_network():
    with pytest.raises(RuntimeError): Encoder([nn.Conv2d(1, 2, 13)], 4, (1, 8, 8))


# ---- responses

def test_negative_responses_under_poisson(ds):
    below = replace(ds, responses=ds.responses - .5)
    for name in ("poisson", "anscombe"):
        with says("use the loss 'mse'"): NEURAL_LOSSES[name](torch.ones(2, 3), torch.full((2, 3), -.1))
        with says(f"responses down to -0.5 given, neural_loss='{name}' wants r ≥ 0: use neural_loss='mse'"):
            train_dae_nr(net(ds), below, CONFIG.replace(neural_loss=name))
    config = CONFIG.replace(neural_loss="mse", output="linear")
    model = build_network(config, below.images, below.responses.mean(0))
    train_dae_nr(model, below, config)
    assert model(below.images).response.isfinite().all()


def test_another_number_of_neurons(ds):
    few = replace(ds, responses=ds.responses[:, :4], test_trials=None, test_rates=None, eval_rates=None,
                  neuron_ids=())
    with says("responses of 4 neurons given, the readout has 6"): train_dae_nr(net(ds), few, CONFIG)
    with says("responses (2, 4) given, the readout predicts (2, 6) (images, neurons)"):
        poisson_loss(torch.ones(2, 6), torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"shape \(6, 6\) given for trials \(3, 6, 4\)"):
        neuron_table(replace(few, test_trials=ds.test_trials[:, :, :4]), torch.ones(6, 6))


def test_unequal_numbers_of_images(ds):
    with says("responses"): replace(ds, responses=ds.responses[:-1])
    with says("responses (3, 6) given, the readout predicts (2, 6)"):
        poisson_loss(torch.ones(2, 6), torch.ones(3, 6))


def test_a_constant_neuron_is_named_and_counts_zero(ds):
    trials = ds.test_trials.clone()
    trials[..., 2] = 1.
    with pytest.warns(UserWarning, match=r"neurons \[2\]"): flat = replace(ds, test_trials=trials)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        row, table = judge_neurons(net(ds), flat)
    assert table.r_avg[2] == table.r_single[2] == 0 and np.isfinite(row["r_avg"])


def test_a_neuron_without_any_response(ds):
    lost = ds.responses.clone()
    lost[:, 3] = float("nan")
    with pytest.raises(ValueError, match=r"neurons \[3\]"): replace(ds, responses=lost)


def test_one_repeat_has_no_ceiling(ds):
    once = replace(ds, test_trials=ds.test_trials[:1], eval_images=None, eval_rates=None)
    table = neuron_table(once, torch.rand(6, 6))
    assert {"r_avg", "r_single"} < set(table) and not {"cc_norm", "feve", "reliability"} & set(table)
    with says("neither noise-free rates nor repeats: no response to compare layers with"):
        similarity_target(once)
    with says("neither noise-free rates nor repeats"): judge_layers(net(ds), once)
    with says("neither noise-free rates nor repeats"): check_settings(CONFIG, once)


def test_too_few_stimuli_for_debiased_similarity(ds):
    few = replace(ds, eval_images=ds.eval_images[:3], eval_rates=ds.eval_rates[:3])
    with pytest.raises(ValueError, match="4 stimuli|at least 4|expected 4|n ≥ 4|3 stimuli"):
        evaluate_dae_nr(net(ds), few)


# ---- losses and settings

def test_nothing_to_train(ds):
    for how in (dict(decode=False), {}):
        model = net(ds, **how)
        with says("nothing to train"): JointLoss(model, 0., 0.)
    with pytest.raises(KeyError): JointLoss(net(ds), neural_loss="l1")


@pytest.mark.parametrize("wrong,text", [
    (dict(variants=("dae",)), "unknown choice 'dae'"),
    (dict(taps=()), "taps = (): expected at least one value"),
    (dict(taps=(2, 2)), "none twice"), (dict(neural_weights=(-1.,)), "outside 0"),
    (dict(readout="factorised"), "Did you mean 'factorized'?"),
    (dict(output="linear"), "needs predictions ≥ 0"), (dict(kernels=(13, 3)), "expected three"),
    (dict(region=4), "outside 1 … 3"), (dict(epoch=3), "Did you mean 'epochs'?"),
    (dict(test_images=3), "outside 4"), (dict(repeats=1), "outside 2"), (dict(batch=1), "outside 2")])
def test_settings(wrong, text):
    with says(text, ConfigError): DaenrConfig.start("quick", **wrong)


def test_components():
    with says("components = 0: expected at least 1"):
        pca_reconstruction(torch.rand(5, 1, 4, 4), torch.rand(2, 1, 4, 4), 0)


def test_recordings_that_are_not_there(tmp_path):
    for name in ("antolik2016", "sensorium", "npz"):
        with says(f"recording = '{name}' needs its files: set `data`"):
            load_recording(CONFIG.replace(recording=name))
        with pytest.raises(FileNotFoundError):
            load_recording(CONFIG.replace(recording=name, data=str(tmp_path / "none")))
    root = write_antolik2016_fixture(tmp_path / "part", n_train=20)
    (root / "Data/region1/training_inputs.npy").unlink()  # as in the public copy of the set
    with pytest.raises(FileNotFoundError, match="training_inputs.npy is missing"):
        load_recording(CONFIG.replace(recording="antolik2016", data=str(root)))


def test_a_failed_fit_leaves_no_result(tmp_path):
    """A wrong tap is refused before anything is trained, and the folder says why."""
    config = CONFIG.replace(taps=(9,), out=str(tmp_path))
    with says("unknown tap 'h9'"): fit(config)
    run = Run.open(tmp_path / "daenr" / config.name)
    assert (run.state == "failed" and "h9" in run.status["reason"] and run.checkpoints == {}
            and not len(run.metrics))


# ---- comparisons and runs

def test_unknown_variants_and_missing_rows(ds):
    with says("unknown variant 'dea_nr'. Did you mean 'dae_nr'?"):
        compare_variants(ds, ("dea_nr",), seeds=(0,), config=CONFIG)
    table = compare_variants(ds, ("nr",), seeds=(0,), config=CONFIG)
    with says("psnr of nr (tap None, weight None): no row"): per_seed(table, "psnr", "nr")
    both = compare_variants(ds, ("nr",), taps=(1, 2), seeds=(0,), config=CONFIG)
    with says("several rows a seed; taps and weights found"): per_seed(both, "r_true", "nr")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fit(CONFIG.replace(variants=("ae", "nr"), out=str(tmp_path_factory.mktemp("runs"))))


def altered(run, tmp_path, **settings):
    """A copy of a run whose settings say something else."""
    import shutil
    shutil.copytree(run.path, tmp_path / "run")
    said = json.loads((tmp_path / "run/settings.json").read_text())
    (tmp_path / "run/settings.json").write_text(json.dumps(
        {k: v for k, v in {**said, **settings}.items() if v is not None}))
    return Run.open(tmp_path / "run")


def test_networks_of_another_system(run, tmp_path):
    with says("is a run of 'plwf', expected 'daenr'", RunError):
        altered(run, tmp_path, system="plwf").settings_as(DaenrConfig)


def test_settings_of_another_version(run, tmp_path):
    with says("settings this version does not know: colour", RunError):
        networks(altered(run, tmp_path, colour=1))


def test_weights_that_do_not_fit(run, tmp_path):
    with says("the weights of ae do not fit the settings", RunError):
        networks(altered(run, tmp_path, latent=16))


def test_a_run_without_checkpoints(run, tmp_path):
    short = altered(run, tmp_path)
    for file in (short.path / "checkpoints/nr-tap2").iterdir(): file.unlink()
    with says("no usable checkpoint of nr-tap2", RunError): networks(short)
