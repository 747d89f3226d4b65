"""Bad input to networks, exits, policies and classification metrics: the message says what was given and expected."""
import re
import warnings

import pytest
import torch
from torch import nn

from visionbench.metrics.classify import accuracy, attack_success_rate, efficacy, exit_histogram, expected_cost
from visionbench.nn.exits import InternalClassifier, MultiExitNet, run_early_exit
from visionbench.nn.policies import ConfidencePolicy, ExitPolicy
from visionbench.nn.resnet import Normalize, cifar_resnet

SMALL = (1, 16, 16)


def resnet():
    return cifar_resnet(14, 10, in_chans=1, width=4)


def says(text, error=ValueError):
    return pytest.raises(error, match=re.escape(text))


@pytest.mark.parametrize("depth,near", [(18, "14 or 20"), (55, "50 or 56"), (57, "56 or 62"), (2, "8"), (0, "8"), (-4, "8")])
def test_depth_names_the_nearest(depth, near):
    with says(f"depth={depth} is not 6n+2; nearest: {near}"): cifar_resnet(depth, 10)


@pytest.mark.parametrize("bad,text", [
    (dict(num_classes=0), "num_classes=0"), (dict(in_chans=0), "in_chans=0"), (dict(width=-1), "width=-1"),
    (dict(stem_stride=0), "stem_stride=0"), (dict(mean=[.5]), "expected both or none"),
    (dict(mean=[.5], std=[.5]), "has 1 values, in_chans=3"), (dict(mean=[.5]*3, std=[.5, .5, 0]), "every std > 0")])
def test_resnet_arguments(bad, text):
    with says(text): cifar_resnet(8, **{"num_classes": 10, **bad})


def test_images_of_another_shape():
    with says("images (2, 3, 16, 16) given, expected (B,1,H,W)"): resnet()(torch.rand(2, 3, 16, 16))
    with says("images (16, 16) given"): resnet()(torch.rand(16, 16))


def test_pixels_outside_0_1_warn_once():
    mx = MultiExitNet.from_vanilla(cifar_resnet(8, 10, 1, 4, mean=[.1], std=[.3]), input_shape=SMALL)
    with pytest.warns(UserWarning, match=r"pixels span \[.*expected \[0, 1\]"): mx(255*torch.rand(2, *SMALL))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mx(255*torch.rand(2, *SMALL))
        Normalize([.1], [.3])(torch.tensor([0., 1.]).view(1, 1, 1, 2))
        Normalize()(255*torch.rand(2, *SMALL))


@pytest.mark.parametrize("exits", ["sdn6", "", None, [], .5, [.15, .3], [True], ["0"], {0, 1}])
def test_exits_of_another_kind(exits):
    with says(f"exits={exits!r}: accepted are 'all' or a list of block indices 0 … 5"):
        MultiExitNet.from_vanilla(resnet(), exits)


@pytest.mark.parametrize("exits", [[3, 1], [1, 1], [0, 6], [-1, 2], [6]])
def test_exits_out_of_order_or_range(exits):
    with says(f"exits={exits!r}: expected increasing block indices within 0 … 5, none twice"):
        MultiExitNet.from_vanilla(resnet(), exits)


class NoStages(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.stages = nn.Conv2d(1, 2, 3), nn.Sequential()      # an attribute of that name is not the method

    def forward(self, x): return self.conv(x).mean((2, 3))


class WrongStages(nn.Module):
    """The parts forget the ReLU of forward."""
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 4, 3), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

    def stages(self): return self.stem, [nn.Identity()], self.head
    def forward(self, x): return self.head(self.stem(x).relu())


def test_networks_that_cannot_be_cut():
    with says("NoStages cannot be cut: give it a method stages() -> (stem, [blocks], head)", TypeError):
        MultiExitNet.from_vanilla(NoStages())
    with says("nn.Sequential: 1 layers with weights", TypeError):
        MultiExitNet.from_vanilla(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), input_shape=(1, 2, 2))
    with says("head(blocks(stem(x))) differs from net(x)"): MultiExitNet.from_vanilla(WrongStages())
    with says("expected logits (1,K)"):
        MultiExitNet.from_vanilla(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3)))


def test_shapes_that_do_not_fit():
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    with says("give input_shape"): MultiExitNet.from_vanilla(mlp)
    with says("input_shape=(1, 9, 9) does not fit"): MultiExitNet.from_vanilla(mlp, input_shape=(1, 9, 9))
    with says("images (1, 3, 16, 16) given"): MultiExitNet.from_vanilla(resnet(), input_shape=(3, 16, 16))
    mx = MultiExitNet.from_vanilla(resnet(), input_shape=SMALL)
    with says("expected (B,256) for (16, 4, 4): convert with the input_shape"): mx(torch.rand(2, 1, 8, 8))
    with says("features of 2 exits given, this net has 6"): mx.classify(mx.features(torch.rand(2, *SMALL))[:2])
    with says("pool='max': accepted are 'avg' and 'mixed'"): MultiExitNet.from_vanilla(resnet(), pool="max")
    with says("pooled features (2, 64) given, expected (B,128)"):
        InternalClassifier((4, 8, 8), 3, "mixed").classify(torch.rand(2, 64))


def test_a_backbone_in_training_mode_is_neither_cached_nor_compacted():
    mx = MultiExitNet.from_vanilla(resnet(), input_shape=SMALL).freeze(False).train()
    with says("backbone in training mode"): mx.features(torch.rand(2, *SMALL))
    with says("backbone in training mode"): run_early_exit(mx, torch.rand(2, *SMALL), ConfidencePolicy(.5))
    frozen = mx.freeze().train()                                     # frozen: allowed though the exits train
    assert len(frozen.features(torch.rand(1, *SMALL))) == 6
    assert len(run_early_exit(frozen, torch.rand(1, *SMALL), ConfidencePolicy(.5)).exit) == 1


@pytest.mark.parametrize("bad,text", [
    (dict(threshold=float("nan")), "threshold is NaN"), (dict(fallback="best"), "accepted are 'final' and 'max_conf'"),
    (dict(temperature=0.), "temperature=0.0, expected above 0"), (dict(temperature=(1., -1.)), "expected above 0"),
    (dict(temperature=float("nan")), "expected above 0")])
def test_senseless_policies(bad, text):
    with says(text): ConfidencePolicy(**{"threshold": .5, **bad})


@pytest.mark.parametrize("policy,text", [
    (ConfidencePolicy(.5, min_exit=7), "min_exit=7, a net with M=7 outputs has 0 … 6"),
    (ConfidencePolicy(.5, min_exit=-1), "min_exit=-1"),
    (ConfidencePolicy(.5, temperature=(1., 1.)), "2 temperatures given, expected one per output, M=7")])
def test_policies_that_do_not_fit_the_net(policy, text):
    with says(text): policy(torch.zeros(7, 2, 10))
    with says(text): run_early_exit(MultiExitNet.from_vanilla(resnet(), input_shape=SMALL), torch.rand(2, *SMALL), policy)


def test_no_samples():
    mx = MultiExitNet.from_vanilla(resnet(), input_shape=SMALL)
    with says("no samples to decide on: B=0"): run_early_exit(mx, torch.rand(0, *SMALL), ConfidencePolicy(.5))
    with says("no samples to decide on: B=0"): ConfidencePolicy(.5)(torch.zeros(7, 0, 10))
    with says("logits (3, 10) given, expected (M,B,K)"): ConfidencePolicy(.5)(torch.zeros(3, 10))
    with says("ExitPolicy does not define step", NotImplementedError): ExitPolicy()(torch.zeros(3, 2, 10))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("i", [0, 4, 6])
def test_nan_is_an_error_that_names_the_output(i, value):
    logits = torch.zeros(7, 3, 10)
    logits[i, 1, 2] = value
    for T in (0, 1):                                                 # also where all would have left before
        with says(f"output {i}: logits of 1 of 3 samples are NaN or infinite"): ConfidencePolicy(T)(logits)
    mx = MultiExitNet.from_vanilla(resnet(), input_shape=SMALL)
    (mx.heads[i].linear if i < 6 else mx.backbone.head[-1]).bias.data[0] = value
    with says(f"output {i}: logits of 3 of 3"): run_early_exit(mx, torch.rand(3, *SMALL), ConfidencePolicy(1))


def test_masked_classes_are_no_fault():
    logits = torch.zeros(2, 3, 10)
    logits[..., 5:] = -torch.inf                                     # a class that may not be named
    assert (ConfidencePolicy(.19)(logits).exit == 0).all() and (ConfidencePolicy(.21)(logits).exit == 1).all()


LABEL = torch.tensor([0, 1, 2])


@pytest.mark.parametrize("call,text", [
    (lambda: accuracy(torch.zeros(2, 3), LABEL), "given with 3 labels, expected logits (…,3,K) or classes (…,3)"),
    (lambda: accuracy(torch.tensor(1), LABEL), "given with 3 labels"),
    (lambda: accuracy(torch.zeros(0, 3), LABEL[:0]), "B=0"),
    (lambda: accuracy(torch.zeros(3, 3), LABEL.float()), "expected whole numbers (B,)"),
    (lambda: accuracy(torch.zeros(3, 3), LABEL[:, None]), "expected whole numbers (B,)"),
    (lambda: accuracy(torch.full((3, 3), torch.nan), LABEL), "3 of 3 rows of logits hold NaN"),
    (lambda: attack_success_rate(torch.zeros(3, 3), LABEL, 3), "target=3, expected a class 0 … 2"),
    (lambda: attack_success_rate(LABEL, LABEL, -1), "target=-1"),
    (lambda: attack_success_rate(LABEL, 0*LABEL, 0), "all 3 images are of the target class 0"),
    (lambda: exit_histogram(torch.tensor([0, 3]), 3), "exits 0 … 3 given, expected 0 … 2"),
    (lambda: exit_histogram(torch.tensor([-1, 2]), 3), "exits -1 … 2 given"),
    (lambda: exit_histogram(torch.tensor([], dtype=torch.long), 3), "B > 0"),
    (lambda: exit_histogram(torch.tensor([.5]), 3), "expected whole numbers"),
    (lambda: expected_cost(LABEL, torch.tensor([20., 50., 100.])), "expected fractions rising from above 0 to 1"),
    (lambda: expected_cost(LABEL, torch.tensor([.5, .2, 1.])), "expected fractions rising"),
    (lambda: efficacy(LABEL, torch.tensor([.2, 1.])), "exits 0 … 2 given, expected 0 … 1"),
    (lambda: efficacy(LABEL, torch.tensor([])), "expected fractions rising"),
])
def test_metrics(call, text):
    with says(text): call()
