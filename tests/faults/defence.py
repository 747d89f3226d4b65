"""Bad input to the defences: the message says what was given and what was expected."""
import re

import pytest
import torch
from torch import nn

from visionbench.core.tensors import DictData
from visionbench.nn.exits import MultiExitNet
from visionbench.nn.policies import ConfidencePolicy
from visionbench.nn.resnet import cifar_resnet
from visionbench.systems.backdoor.defence import (ANP, CLP, DFTND, IBAU, ActivationClustering, FinePruning,
                                                  FineTune, NeuralCleanse, SpectralSignature, Strip)
from visionbench.systems.backdoor.tune import block_of
from visionbench.systems.backdoor.views import OutputView, defence_data
from visionbench.train.learner import NonFiniteLoss


def says(text, error=ValueError): return pytest.raises(error, match=re.escape(text))


def net(): return cifar_resnet(8, 4, 1, 4).eval()


def converted(): return MultiExitNet.from_vanilla(net(), input_shape=(1, 8, 8)).eval()


def data(n=12): return DictData(image=torch.rand(n, 1, 8, 8), label=torch.arange(n) % 4)


@pytest.mark.parametrize("image,text",
                         [(torch.rand(3, 8, 8), "images (3, 8, 8) given, expected (N,C,H,W) with N ≥ 1"),
                          (torch.rand(0, 1, 8, 8), "images (0, 1, 8, 8) given"),
                          (torch.full((2, 1, 8, 8), 2.), "pixels span 2 … 2, expected 0 … 1"),
                          (torch.full((2, 1, 8, 8), float("nan")), "pixels span nan"),
                          (torch.full((2, 1, 8, 8), -.5), "pixels span -0.5 … -0.5")])
def test_images_of_another_kind(image, text):
    for use in (lambda: defence_data(image, labelled=False), lambda: NeuralCleanse().scan(net(), image),
                lambda: Strip(n=1).fit(net(), image)):
        with says(text): use()


@pytest.mark.parametrize("repair", [FineTune(), FinePruning(), ANP(), IBAU()])
def test_repairs_need_labels(repair):
    with says("this defence needs labels"): repair.apply(net(), torch.rand(8, 1, 8, 8))


@pytest.mark.parametrize("output", [3, -1, True, 1.0, "exit 1", None])
def test_an_output_that_does_not_exist(output):
    with says("this net has 'vanilla', exits 0 … 2 and what a policy chooses"):
        OutputView(converted(), output)


def test_exits_of_a_net_without_exits():
    with says("has one output only", TypeError): OutputView.exit(net(), 0)
    with says("min_exit=9"): OutputView.policy(converted(), ConfidencePolicy(.5, min_exit=9))
    with says("no linear layer", TypeError):
        OutputView.vanilla(nn.Sequential(nn.Flatten())).neurons(torch.rand(1, 1, 2, 2))


def test_nan_logits_are_no_decision():
    mx = converted()
    with torch.no_grad(): mx.heads[0].linear.weight.fill_(float("nan"))
    with says("output 0: logits of 2 of 2 samples are NaN"):
        OutputView.policy(mx, ConfidencePolicy(.5))(torch.rand(2, 1, 8, 8))
    with pytest.raises(NonFiniteLoss):
        NeuralCleanse(epochs=1, device="cpu").scan(OutputView.exit(mx, 0), torch.rand(4, 1, 8, 8))


def test_neural_cleanse_classes():
    with says("classes [0, 4]: this view has 0 … 3"):
        NeuralCleanse(classes=(0, 4)).scan(net(), torch.rand(4, 1, 8, 8))
    with says("2 classes: the median of fewer than 3 norms"):
        NeuralCleanse().scan(cifar_resnet(8, 2, 1, 4), torch.rand(4, 1, 8, 8))


@pytest.mark.parametrize("bad", [dict(n=0), dict(false_alarms=0), dict(false_alarms=1.), dict(size=0)])
def test_strip_settings(bad):
    with says(str(next(iter(bad.values())))): Strip(**bad)


def test_strip_images():
    with says("10 clean images given, STRIP with n = 9 needs 11"):
        Strip(n=9).fit(net(), torch.rand(10, 1, 8, 8))
    with says("images (2, 1, 9, 8) given, fitted on (N,1,8,8)"):
        Strip(n=3).fit(net(), torch.rand(9, 1, 8, 8)).score(torch.rand(2, 1, 9, 8))


def test_dftnd_shape():
    with says("does not say its image size: give shape=(C,H,W)"): DFTND().scan(net())
    with says("iterations = 0"): DFTND(iterations=0)


@pytest.mark.parametrize("method", [SpectralSignature(), ActivationClustering()])
def test_features(method):
    with says("features (5, 2, 2) and labels (5,) given, expected (N,F) and (N,)"):
        method.scan(torch.rand(5, 2, 2), torch.zeros(5))
    with says("features (5, 2) and labels (4,) given"): method.scan(torch.rand(5, 2), torch.zeros(4))
    with says("NaN or infinite"): method.scan(torch.full((5, 2), float("inf")), torch.zeros(5))
    with says("the largest has 1"): method.scan(torch.rand(5, 2), torch.arange(5))
    with says("the largest has 0"): method.scan(torch.rand(0, 2), torch.zeros(0))


def test_features_that_are_all_equal():
    with says("are all equal: nothing to cluster"):
        ActivationClustering().scan(torch.ones(9, 4), torch.zeros(9))
    with says("outside 0 … 1"): SpectralSignature(rate=.8)


@pytest.mark.parametrize("layer", ["exit:3", "exit:-1", "block:0", "", "exit:"])
def test_layers(layer):
    with says(f"layer {layer!r}: this net has 'last' and 'exit:0' … 'exit:2'"): block_of(net(), layer)
    with says(f"layer {layer!r}"): FinePruning(layer).apply(net(), data())


def test_layers_are_numbered_by_exits():
    mx = MultiExitNet.from_vanilla(net(), [1], input_shape=(1, 8, 8))
    assert block_of(mx, "exit:0") is mx.backbone.blocks[1]
    with says("'exit:0' … 'exit:0'"): block_of(mx, "exit:1")


def test_too_few_images_for_norms():
    with says("1 image given: norms in training mode need at least 2"): FineTune().apply(net(), data(1))
    # a last batch of one is left out
    assert FineTune(epochs=1, size=11, device="cpu").apply(net(), data(12)).training is False


@pytest.mark.parametrize("model", [
    nn.Sequential(nn.Flatten(), nn.Linear(64, 4)),
    nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(72, 4))])
def test_nets_without_batch_norm(model):
    with says("no convolution followed by a BatchNorm2d"): CLP().apply(model, data())
    with says("no BatchNorm2d whose channels could be masked"): ANP().apply(model, data())


def test_clp_needs_a_size():
    with says("does not say its image size: give one image as data"): CLP().apply(net())


@pytest.mark.parametrize("bad", [dict(radius=0.), dict(radius=-1.), dict(share=0.), dict(share=1.5)])
def test_ibau_settings(bad):
    with says(str(next(iter(bad.values())))): IBAU(**bad).apply(net(), data())
