"""Bad input to the audit: the message says what was given and expected, and nothing is scanned."""
import re

import pytest
import torch
from torch import nn

from visionbench.core.tensors import DictData, generator
from visionbench.nn.exits import MultiExitNet
from visionbench.nn.resnet import cifar_resnet
from visionbench.systems.backdoor.audit import ExitScan, unlearn_at_exits
from visionbench.systems.backdoor.checkup import audit_checkpoint, build_network, read_data, read_weights
from visionbench.systems.backdoor.flips import RecoveredPatch
from visionbench.systems.backdoor.verdict import Thresholds, judge

NET = cifar_resnet(8, 4, 1, 4)
X, Y = torch.rand(120, 1, 16, 16, generator=generator(0)), torch.arange(4).repeat(30)
LIGHT = dict(exits=(1,), windows=(3,), steps=2, patterns=1, screened=8, epochs=1,
             methods=("refine",), device="cpu")


def says(text, error=ValueError):
    return pytest.raises(error, match=re.escape(text))


@pytest.mark.parametrize("x,y,text", [
    (X, None, "labels are missing"),
    (X[:40], Y[:40], "40 images given, expected at least 100"),
    (X, Y[:-1], "images (120, 1, 16, 16) and labels (119,) given"),
    (X[:, 0], Y, "images (120, 16, 16)"),
    (X * 255, Y, "expected 0 … 1"),
    (X - .5, Y, "expected 0 … 1"),
    (X.clone().index_fill_(0, torch.tensor([3]), float("nan")), Y, "expected 0 … 1"),
    (X, Y.float(), "expected classes 0 … K-1"),
    (X, Y - 1, "expected classes 0 … K-1"),
    (X, Y + 1, "label 4 given, the net answers classes 0 … 3"),
    (X, Y.clamp_max(2), "classes [3] have fewer than 4 images"),
])
def test_images_and_labels(x, y, text):
    with says(text): ExitScan(**LIGHT).run(NET, x, y)


@pytest.mark.parametrize("exits", [(3,), (-1,), (1, 1), (2, 1), ()])
def test_exits_out_of_range_or_order(exits):
    with says("exits="): ExitScan(**LIGHT | dict(exits=exits)).run(NET, X, Y)


@pytest.mark.parametrize("settings,text", [
    (dict(windows=(5, 3)), "expected sides increasing by even steps"), (dict(windows=(3, 6)), "even steps"),
    (dict(windows=()), "even steps"),
    (dict(methods=("refine", "luck")), "['luck']: accepted are refine, dictionary, inversion")])
def test_settings(settings, text):
    with says(text): ExitScan(**settings)


def test_window_larger_than_the_image():
    with says("a window of 17 pixels does not fit an image of 16"):
        ExitScan(**LIGHT | dict(windows=(17,))).run(NET, X, Y)


def test_a_net_that_cannot_be_cut():
    class Glue(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)
        def forward(self, x): return self.conv(x).mean((2, 3))
    with says("Glue cannot be cut", TypeError): ExitScan(**LIGHT).run(Glue(), X, Y)


def test_null_population_of_other_settings():
    clean = ExitScan(**LIGHT).scan(NET, X, Y)
    with says("null population: windows (3,) there, (5,) here"):
        ExitScan(null=[clean], **LIGHT | dict(windows=(5,))).run(NET, X, Y)
    other = ExitScan(**LIGHT).scan(cifar_resnet(14, 4, 1, 4), X, Y)
    with says("null population: blocks 6 there, 3 here"): ExitScan(null=[other], **LIGHT).run(NET, X, Y)


def test_asking_for_what_was_not_scanned():
    report = ExitScan(**LIGHT).run(NET, X, Y)
    for exit, cls in ((0, 1), (1, 9)):
        with says(f"exit {exit}, class {cls} was not scanned; there are exits [1] and classes 0 … 3"):
            report.patch(exit, cls)


def test_a_net_that_recognises_nothing_is_inconclusive():
    report = ExitScan(**LIGHT).run(NET, X, Y)
    assert report.verdict == "inconclusive" and "check normalisation" in report.judgement.reason
    assert report.min_exit == report.about["blocks"]
    assert judge(report.exits, [], 256, .95, Thresholds(flag=2., doubt=2.)).verdict == "not flagged"


def test_the_network_is_left_as_it_was():
    before, mode = {k: v.clone() for k, v in NET.state_dict().items()}, NET.training
    ExitScan(**LIGHT).run(NET, X, Y)
    assert NET.training == mode and all(torch.equal(v, before[k]) for k, v in NET.state_dict().items())
    assert all(p.requires_grad for p in NET.parameters())


def test_repair_without_labels():
    patch = RecoveredPatch(torch.zeros(1, 16, 16), torch.zeros(1, 16, 16), 0, 0, "refine", 0.)
    with says("expected image and label"):
        unlearn_at_exits(MultiExitNet.from_vanilla(NET, input_shape=(1, 16, 16)), patch, DictData(image=X))


def test_files(tmp_path):
    with says("no checkpoint at", FileNotFoundError): read_weights(tmp_path / "none.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    torch.save(NET, tmp_path / "whole.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, text in (("cut.safetensors", "neither safetensors nor a state dict"),
                       ("whole.pt", "without executing code"),
                       ("list.pt", "holds a list, expected a state dict")):
        with says(text): read_weights(tmp_path / name)
    with says("no folder or .npz file at", FileNotFoundError): read_data(tmp_path / "none")
    with says("holds no class folders", FileNotFoundError): read_data(tmp_path)
    import numpy as np
    np.savez(tmp_path / "other.npz", pixels=X.numpy())
    with says("holds ['pixels'], expected image"): read_data(tmp_path / "other.npz")


def test_weights_and_names_that_do_not_fit():
    with says("the weights do not fit resnet14"): build_network("resnet14", NET.state_dict(), 16)
    with says("arch 'resnext' is unknown"): build_network("resnext", NET.state_dict(), 16)
    with says("the weights do not fit resnet8: no stem.1.weight among ['a']"):
        build_network("resnet8", {"a": torch.zeros(3)}, 16)


@pytest.mark.parametrize("name,kind,size",
                         [("vgg16_bn", "vgg16_bn_cifar", 32), ("mobilenet_v1", "mobilenet_v1_cifar", 32),
                          ("resnet8", "cifar_resnet", 64)])
def test_sizes_are_read_off_the_weights(name, kind, size):
    from visionbench.nn import mobilenet, resnet, vgg
    make = next(getattr(m, kind) for m in (mobilenet, resnet, vgg) if hasattr(m, kind))
    net = (make(8, 7, 1, 4, [.4], [.2], stem_stride=2) if kind == "cifar_resnet"
           else make(7, 1, .125, size, [.4], [.2])).eval()
    shuffled = dict(sorted(net.state_dict().items()))
    x = torch.rand(2, 1, size, size)
    with torch.no_grad(): assert torch.equal(build_network(name, shuffled, size)(x), net(x))


def test_audit_of_an_npz_file_end_to_end(tmp_path):
    import numpy as np
    np.savez(tmp_path / "images.npz", image=(X * 255).byte().numpy(), label=Y.numpy())
    torch.save(NET.state_dict(), tmp_path / "net.pt")
    page = audit_checkpoint(tmp_path / "net.pt", tmp_path / "images.npz", "resnet8", tmp_path / "page.html",
                            [tmp_path / "net.pt"] * 3, size=16, **LIGHT)
    text = page.read_text(encoding="utf-8")
    assert page == tmp_path / "page.html" and "<b>inconclusive</b>" in text and "3 clean networks" in text
    assert str(tmp_path) not in text


def test_command_line(tmp_path):
    import numpy as np
    from typer.testing import CliRunner

    from visionbench.cli import app
    call = lambda *words: CliRunner().invoke(app, ["audit", *map(str, words)])
    np.savez(tmp_path / "images.npz", image=X.numpy(), label=Y.numpy())
    torch.save(NET.state_dict(), tmp_path / "net.pt")
    for words, text in (((tmp_path / "none.pt", "--arch", "resnet8"), "no checkpoint at"),
                        ((tmp_path / "net.pt", "--arch", "resnext"), "arch 'resnext' is unknown"),
                        ((tmp_path / "net.pt", "--arch", "resnet8", "--data", tmp_path / "none"),
                         "no folder or .npz file"),
                        ((tmp_path / "net.pt", "--arch", "resnet8", "--data", tmp_path / "images.npz",
                          "--exit", 7), "exits=[7]"),
                        ((tmp_path / "net.pt", "--arch", "no.such:net"), "No module named")):
        done = call(*words)
        assert done.exit_code == 2 and text in done.stderr and "Traceback" not in done.stderr, done.output
