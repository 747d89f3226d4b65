"""Bad input to networks, exits, policies and classification metrics: the message says what was given and
expected."""
import re
import warnings

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from visionbench.core.tensors import DictData
from visionbench.metrics.classify import (accuracy, attack_success_rate, efficacy, exit_histogram,
                                          expected_cost)
from visionbench.nn.adapters import cut
from visionbench.nn.exits import (BudgetedPolicy, ConfidencePolicy, EntropyPolicy, FixedPolicy,
                                  InternalClassifier, MultiExitNet, OraclePolicy, PatienceConfidencePolicy,
                                  PatiencePolicy, calibrate, fit_temperature, run_early_exit, train_exits)
from visionbench.nn.mobilenet import mobilenet_v1_cifar
from visionbench.nn.policies import ExitPolicy
from visionbench.nn.programs import export_stages, load_stages
from visionbench.nn.resnet import Normalize, cifar_resnet
from visionbench.nn.stages import stages_of
from visionbench.nn.vgg import vgg16_bn_cifar

SMALL = (1, 16, 16)


def resnet():
    return cifar_resnet(14, 10, in_chans=1, width=4)


def says(text, error=ValueError):
    return pytest.raises(error, match=re.escape(text))


@pytest.mark.parametrize("depth,near", [(18, "14 or 20"), (55, "50 or 56"), (57, "56 or 62"), (2, "8"),
                                        (0, "8"), (-4, "8")])
def test_depth_names_the_nearest(depth, near):
    with says(f"depth={depth} is not 6n+2; nearest: {near}"): cifar_resnet(depth, 10)


@pytest.mark.parametrize("bad,text", [
    (dict(num_classes=0), "num_classes=0"), (dict(in_chans=0), "in_chans=0"), (dict(width=-1), "width=-1"),
    (dict(stem_stride=0), "stem_stride=0"), (dict(mean=[.5]), "expected both or none"),
    (dict(mean=[.5], std=[.5]), "has 1 values, in_chans=3"),
    (dict(mean=[.5]*3, std=[.5, .5, 0]), "every std > 0")])
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


@pytest.mark.parametrize("exits", ["sdn7", "", None, [], .5, [.15, 3], [True], ["0"], {0, 1}])
def test_exits_of_another_kind(exits):
    with says(f"exits={exits!r}: accepted are 'all', 'sdn6', a list of block indices 0 … 5, or of fractions"):
        MultiExitNet.from_vanilla(resnet(), exits)


@pytest.mark.parametrize("exits", [[.5, .2], [.2, .2], [0., .5], [.5, 1.], [-.1, .5], [float("nan")]])
def test_fractions_out_of_order_or_range(exits):
    with says(f"exits={exits!r}: expected increasing fractions of the cost within 0. and 1., none twice"):
        MultiExitNet.from_vanilla(resnet(), exits, input_shape=SMALL)


def test_fractions_that_share_a_block():
    with says("exits=[0.1, 0.12] fall on blocks [0, 0], one of them twice; the blocks end at [0.198, 0.374"):
        MultiExitNet.from_vanilla(resnet(), [.1, .12], input_shape=SMALL)


@pytest.mark.parametrize("exits", [[3, 1], [1, 1], [0, 6], [-1, 2], [6]])
def test_exits_out_of_order_or_range(exits):
    with says(f"exits={exits!r}: expected increasing block indices within 0 … 5, none twice"):
        MultiExitNet.from_vanilla(resnet(), exits)


class NoStages(nn.Module):
    def __init__(self):
        super().__init__()
        # an attribute of that name is not the method
        self.conv, self.stages = nn.Conv2d(1, 2, 3), nn.Sequential()

    def forward(self, x): return self.conv(x).mean((2, 3))


class WrongStages(nn.Module):
    """The parts forget the ReLU of forward."""
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

    def stages(self): return self.stem, [nn.Identity()], self.head
    def forward(self, x): return self.head(self.stem(x).relu())


def test_networks_that_cannot_be_cut():
    with says("NoStages cannot be cut: give it a method stages() -> (stem, [blocks], head)", TypeError):
        MultiExitNet.from_vanilla(NoStages())
    with says("Sequential cannot be cut: give it a method stages()", TypeError):
        MultiExitNet.from_vanilla(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), input_shape=(1, 2, 2))
    with says("1 layers with weights, expected 2 or more", TypeError):
        stages_of(nn.Sequential(nn.Linear(4, 2)))
    with says("head(blocks(stem(x))) differs from net(x)"): MultiExitNet.from_vanilla(WrongStages())
    with says("expected logits (1,K)"):
        MultiExitNet.from_vanilla(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3)))


class Branching(nn.Module):
    """Its way depends on a pixel: no graph can say who feeds whom."""
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 2, 3), nn.Linear(2, 3)

    def forward(self, x):
        z = self.conv(x).mean((2, 3))
        return self.fc(z if z.sum() > 0 else -z)


def test_networks_that_cannot_be_traced():
    with says("Branching cannot be cut", TypeError): cut(Branching(), input_shape=SMALL)
    with pytest.raises(TypeError, match="its code cannot be traced: .*control flow"):
        MultiExitNet.from_vanilla(Branching(), input_shape=SMALL)


def test_places_that_are_none():
    net = torchvision.models.resnet18(num_classes=4)
    for at, text in [
        (["layer5"], "at: 'layer5' is no module of ResNet; closest: ['layer4', 'layer3', 'layer2']"),
        ([], "at=[]"), ("layer1", "at='layer1': accepted are 'auto' or a list of names"),
        (["layer2", "layer1"], "expected increasing depth"),
        (["layer1", "layer1"], "none twice"), (["layer1.0.conv1"], "other values pass by it (a shortcut)"),
        (["layer1.0.relu"], "is called 2 times"), (["layer1.0.downsample"], "is no module of ResNet")]:
        with says(text): cut(net, at)
    with says("input_shape=(1, 32, 32) does not fit"): MultiExitNet.from_vanilla(net, input_shape=(1, 32, 32))


@pytest.mark.parametrize("make,bad,text", [
    (vgg16_bn_cifar, dict(input_size=16), "input_size=16 is too small for 5 max-pools, expected at least 32"),
    (vgg16_bn_cifar, dict(plan=("M", 8)), "expected channels first"),
    (vgg16_bn_cifar, dict(plan=()), "expected channels first"),
    (vgg16_bn_cifar, dict(width=0.), "width=0.0, expected above 0"),
    (mobilenet_v1_cifar, dict(width=-1), "width=-1, expected at least 1"),
    (mobilenet_v1_cifar, dict(input_size=0), "input_size=0"),
    (mobilenet_v1_cifar, dict(num_classes=0), "num_classes=0"),
    (mobilenet_v1_cifar, dict(mean=[.5], std=[.5]), "has 1 values, in_chans=3"),
    (vgg16_bn_cifar, dict(mean=[.5]*3), "expected both or none")])
def test_vgg_and_mobilenet_arguments(make, bad, text):
    with says(text): make(**{"num_classes": 10, **bad})


@pytest.mark.parametrize("make", [vgg16_bn_cifar, mobilenet_v1_cifar])
def test_images_of_another_size(make):
    net = make(10, width=.1)
    for shape in [(1, 3, 64, 64), (1, 3, 32, 16), (1, 1, 32, 32)]:
        with says(f"images {shape} given, expected (B,3,32,32)"): net(torch.rand(shape))


def test_shapes_that_do_not_fit():
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    with says("give input_shape"): MultiExitNet.from_vanilla(mlp)
    with says("input_shape=(1, 9, 9) does not fit"): MultiExitNet.from_vanilla(mlp, input_shape=(1, 9, 9))
    with says("images (1, 3, 16, 16) given"): MultiExitNet.from_vanilla(resnet(), input_shape=(3, 16, 16))
    mx = MultiExitNet.from_vanilla(resnet(), input_shape=SMALL)
    with says("expected (B,256) for (16, 4, 4): convert with the input_shape"): mx(torch.rand(2, 1, 8, 8))
    with says("features of 2 exits given, this net has 6"):
        mx.classify(mx.features(torch.rand(2, *SMALL))[:2])
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


@pytest.mark.parametrize("bad,text", [(dict(threshold=float("nan")), "threshold is NaN"),
                                      (dict(fallback="best"), "accepted are 'final' and 'max_conf'"),
                                      (dict(temperature=0.), "temperature=0.0, expected above 0"),
                                      (dict(temperature=(1., -1.)), "expected above 0"),
                                      (dict(temperature=float("nan")), "expected above 0")])
def test_senseless_policies(bad, text):
    with says(text): ConfidencePolicy(**{"threshold": .5, **bad})
    if "fallback" not in bad:
        with says(text): EntropyPolicy(**{"threshold": .5, **bad})
        with says(text): PatienceConfidencePolicy(**{"patience": 1, "threshold": .5, **bad})


@pytest.mark.parametrize("patience", [-1, 1.5, None, True])
def test_senseless_patience(patience):
    with says(f"patience={patience!r}, expected a whole number"): PatiencePolicy(patience)
    with says(f"patience={patience!r}, expected a whole number"): PatienceConfidencePolicy(patience, .5)


@pytest.mark.parametrize("share,start,text",
                         [(-1., 0, "share=-1.0 with min_exit=0: expected a ratio above 0"),
                          (0., 1, "expected a ratio above 0"), (float("inf"), 0, "expected a ratio"),
                          (float("nan"), 0, "expected a ratio"), ((.5, .5), 0, "or M=4 shares"),
                          ((.5, .5, .5, .5), 0, "sums to 2, not 1"), ((1.5, -.5, 0, 0), 0, "0 or more"),
                          ((.5, .5, 0, 0), 1, "0 before min_exit")])
def test_senseless_budgets(share, start, text):
    with says(text): BudgetedPolicy(share, start).fit(torch.zeros(4, 5, 3))


def test_calibration_that_cannot_be():
    logits = torch.randn(4, 9, 3, generator=torch.Generator().manual_seed(0))
    label, cost = torch.arange(9) % 3, torch.tensor([.1, .4, .7, 1.])
    with says("ConfidencePolicy: none of 19 settings has cost <= 0.05; the lowest, 0.1, is at 0.05"):
        calibrate(ConfidencePolicy(.5), cost, (logits, label), target_cost=.05)
    with says("none of 2 settings has rad <= -9"):
        calibrate(FixedPolicy(0), cost, (logits, label), max_rad=-9, grid=(0, 1))
    with says("OraclePolicy has nothing to calibrate"): calibrate(OraclePolicy(label), cost, (logits, label))
    with says("3 costs given, logits (4, 9, 3): expected M of each"):
        calibrate(ConfidencePolicy(.5), cost[1:], (logits, label))
    with says("label (8,), expected (M,N,K), (N,)"): fit_temperature(logits, label[1:])
    mx = MultiExitNet.from_vanilla(resnet(), input_shape=SMALL).freeze(False).train()
    with says("backbone in training mode"):
        calibrate(ConfidencePolicy(.5), mx, [dict(image=torch.rand(2, *SMALL), label=label[:2])])


def test_training_that_cannot_be():
    data = DictData(image=torch.rand(9, *SMALL), label=torch.arange(9))
    mx = MultiExitNet.from_vanilla(resnet(), input_shape=SMALL)
    with says("bn='eval': accepted are 'frozen' and 'track'"): train_exits(mx, data, 1, bn="eval")
    for size in (1, 4):
        with says(f"9 images in batches of {size} leave a batch of one"):
            train_exits(mx, data, 1, bn="track", size=size, device="cpu")
    pairs = TensorDataset(torch.rand(8, *SMALL), torch.arange(8))
    with says("batches are list, expected dicts with image and label"):
        train_exits(mx, DataLoader(pairs, 4), 1, device="cpu")
    odd = DataLoader(data, 4, sampler=WeightedRandomSampler(torch.ones(9), 9))
    with says("a loader with a WeightedRandomSampler draws in its own way"):
        train_exits(mx, odd, 1, device="cpu")
    nameless = DataLoader([dict(x=torch.rand(SMALL))]*8, 4)
    with says("batches are ['x'], expected dicts with image and label"):
        train_exits(mx, nameless, 1, device="cpu")


def test_stages_of_another_format(tmp_path):
    mx = MultiExitNet.from_vanilla(cifar_resnet(8, 10, 1, 4), exits=[0], input_shape=SMALL)
    with says("format='engine': accepted are ('pt2', 'onnx')"): export_stages(mx, tmp_path, format="engine")
    with pytest.raises(FileNotFoundError): load_stages(tmp_path)
    programs = load_stages(export_stages(mx, tmp_path).parent)
    for call in (programs, lambda x: programs.run(x, ConfidencePolicy(.5))):
        with says("images (2, 1, 8, 8) given, the stages were exported for (B,1,16,16)"):
            call(torch.rand(2, 1, 8, 8))
    with says("no samples to decide on: B=0"): programs.run(torch.rand(0, *SMALL), ConfidencePolicy(.5))
    with says("output 0: logits of 1 of 2 samples are NaN"):
        programs.run(torch.stack([torch.rand(SMALL), torch.full(SMALL, torch.nan)]), ConfidencePolicy(.5))


@pytest.mark.parametrize("policy,text", [
    (ConfidencePolicy(.5, min_exit=7), "min_exit=7, a net with M=7 outputs has 0 … 6"),
    (ConfidencePolicy(.5, min_exit=-1), "min_exit=-1"),
    (ConfidencePolicy(.5, temperature=(1., 1.)), "2 temperatures given, expected one per output, M=7"),
    (EntropyPolicy(.5, temperature=[1.]), "1 temperatures given"),
    (PatiencePolicy(1, min_exit=9), "min_exit=9"),
    (FixedPolicy(7), "exit=7, a net with M=7 outputs has 0 … 6"), (FixedPolicy(-1), "exit=-1"),
    (BudgetedPolicy(.5), "0 thresholds, M=7 outputs need 6: fit(logits) first"),
    (OraclePolicy(torch.zeros(3, dtype=torch.long)), "3 labels given, expected one per sample, B=2")])
def test_policies_that_do_not_fit_the_net(policy, text):
    with says(text): policy(torch.zeros(7, 2, 10))
    with says(text):
        run_early_exit(MultiExitNet.from_vanilla(resnet(), input_shape=SMALL), torch.rand(2, *SMALL), policy)


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
    (lambda: accuracy(torch.zeros(2, 3), LABEL),
     "given with 3 labels, expected logits (…,3,K) or classes (…,3)"),
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
    (lambda: expected_cost(LABEL, torch.tensor([20., 50., 100.])),
     "expected fractions rising from above 0 to 1"),
    (lambda: expected_cost(LABEL, torch.tensor([.5, .2, 1.])), "expected fractions rising"),
    (lambda: efficacy(LABEL, torch.tensor([.2, 1.])), "exits 0 … 2 given, expected 0 … 1"),
    (lambda: efficacy(LABEL, torch.tensor([])), "expected fractions rising"),])
def test_metrics(call, text):
    with says(text): call()
