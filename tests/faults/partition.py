"""Streams with bad input: what was given, what was expected."""
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from visionbench.data.arrival import arrival_order, task_sizes
from visionbench.data.fixtures import write_cifar100_fixture
from visionbench.data.folders import read_image_folder
from visionbench.data.glyphs import glyphs
from visionbench.data.images import ImageSet
from visionbench.data.layouts import read_cifar100
from visionbench.data.partition import TaskStream

NAMES = ("cat", "dog", "car", "bus")


def stream(train=range(4), test=range(4), x=None, **changes):
    """Four classes of three images, or those of the labels given."""
    def part(labels): return np.repeat(np.array([*labels]), 3)
    def pixels(y): return np.zeros((len(y), 1, 4, 4), np.uint8) if x is None else x
    y, yt = part(train), part(test)
    return TaskStream.from_arrays(pixels(y), y, pixels(yt), yt, **{"class_order": "natural", **changes})


@pytest.mark.parametrize("changes,message", [
    (dict(tasks=[[0, 1], [1, 2]]), r"class 1 \('1'\) is in task 0 and in task 1"),
    (dict(tasks=[[0], [], [1]]), "task 1 of 3 has no class"), (dict(tasks=[]), "at least one task"),
    (dict(tasks=[[0, 0]]), r"task 0 names a class twice: \[0, 0\]"),
    (dict(tasks=[["cat"], ["dgo"]], classes=NAMES), "class 'dgo' is unknown.*did you mean 'dog'"),
    (dict(tasks=[[0], [4]]), "class 4 is unknown: expected a name, or 0 … 3"),
    (dict(tasks=[[-1]]), "class -1 is unknown"),
    (dict(class_order=[0, 1, 1, 2]), "class 1 .* is in task 0 and in task 1"),
    (dict(class_order=[0, 1, 5]), "class 5 is unknown"),
    (dict(class_order="icarl"), r"class_order='icarl': expected a seed"),
    (dict(class_order=-1), "Seed must be between"), (dict(class_order=[]), "first task of at most 0 classes"),
    (dict(increment=0), "increment=0, base=0: expected at least 1"),
    (dict(increment=-2, base=2), "increment=-2"),
    (dict(increment=5), "increment=5, base=5: .*at most 4 classes"),
    (dict(base=5), "base=5.*at most 4 classes"),
    (dict(base=0), "base=0"),
])
def test_impossible_tasks_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        stream(**changes)


@pytest.mark.parametrize("train,test,message", [
    ([0, 1, 3], [0, 1, 3],
     r"class 2 \('2'\) has 0 training and 0 test images: number the classes 0 … K-1 without gaps"),
    ([0, 1, 2], [0, 1, 2, 3], r"class 3 \('3'\) has 0 training and 3 test images"),
    ([0, 1, 2, 3], [0, 1, 2], r"class 3 \('3'\) has 3 training and 0 test images"),
    ([1, 2], [1, 2], r"class 0 \('0'\) has 0"), ([0, -1], [0, 1], r"labels -1..0 do not fit 2 class names"),
])
def test_gaps_in_the_labels_are_refused(train, test, message):
    with pytest.raises(ValueError, match=message):
        stream(train, test)


def test_a_gap_may_be_left_out_on_purpose():
    assert stream([0, 1, 3], [0, 1, 3], tasks=[[3], [0, 1]]).order == (3, 0, 1)


@pytest.mark.parametrize("x,message", [
    (np.zeros((12, 4, 4)), r"x_train: expected \(N,C,H,W\), got \(12, 4, 4\); grey has C=1"),
    (np.full((12, 1, 4, 4), 255.), "must lie in .* divide bytes by 255"),
    (np.full((12, 1, 4, 4), np.nan), "nan"),
    (np.zeros((12, 1, 4, 4), np.int64), "uint8 or float32, got torch.int64"),
    (np.zeros((9, 1, 4, 4), np.uint8), r"\(9,\) int64"),
    (np.zeros((0, 1, 4, 4), np.uint8), "at least one image"),
])
def test_wrong_pixels_are_refused(x, message):
    with pytest.raises(ValueError, match=message):
        stream(x=x)


@pytest.mark.parametrize("y", [np.zeros(12), np.zeros(12, bool), np.zeros((12, 1), int), np.zeros(0, int)])
def test_wrong_labels_are_refused(y):
    x = np.zeros((12, 1, 4, 4), np.uint8)
    with pytest.raises(ValueError, match=r"y_test: expected whole numbers \(N,\), got"):
        TaskStream.from_arrays(x, np.arange(12) % 4, x, y)


def test_other_classes_or_shapes_in_test_are_refused():
    a = ImageSet(torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]), ("a", "b"), "toy", (.1,), (.1,))
    b = ImageSet(torch.zeros(2, 1, 5, 4), torch.tensor([0, 1]), ("a", "b"), "toy", (.1,), (.1,))
    c = ImageSet(torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]), ("a", "c"), "toy", (.1,), (.1,))
    for other in (b, c):
        with pytest.raises(ValueError, match="toy: training has 2 classes .*same classes and shape"):
            TaskStream.from_sets(a, other, 1)


def test_a_smaller_last_task_warns_and_still_works():
    with pytest.warns(UserWarning, match="increment=3 does not divide 1 classes: the last task has 1"):
        made = stream(increment=3)
    assert made.bounds == (3, 4) and len(made.tasks[1].train) == 3


def test_names_of_streams_orders_and_splits():
    with pytest.raises(ValueError,
                       match=r"stream 'mnist' is unknown: there are \['digits', 'mnist5k', 'glyphs'\]"):
        TaskStream.builtin("mnist")
    with pytest.raises(ValueError, match="increment=0"):
        TaskStream.builtin("digits", increment=0)
    with pytest.raises(ValueError, match="split 'val' is unknown"):
        glyphs("val")
    with pytest.raises(ValueError, match="increment=2, base=11"):
        task_sizes(10, 2, 11)
    with pytest.raises(ValueError, match="expected a seed, a list"):
        arrival_order("random", NAMES)


@pytest.mark.parametrize("fraction,message", [
    (0, "strictly between 0 and 1"), (1, "strictly between"), (.1, "task 0: fraction=0.1 .*without"),
    (.9, "without training or validation")])
def test_a_validation_share_must_leave_both_parts(fraction, message):
    made = stream()
    if fraction == .1:  # a tenth of three images is rounded up to one, so ask of one-image classes
        made = TaskStream.from_arrays(*[np.zeros((4, 1, 2, 2), np.uint8), np.arange(4)] * 2)
    with pytest.raises(ValueError, match=message):
        made.with_validation(fraction)


def test_a_guarded_stream_is_fixed():
    guarded = stream().guarded()
    for change in (lambda: guarded.reordered(1), guarded.with_validation):
        with pytest.raises(ValueError, match="a guarded stream is fixed: .* first, then guard"):
            change()
    assert guarded.guarded() is not None and guarded.guarded().guard is guarded.guard


def test_a_stage_outside_the_stream_is_refused():
    for t in (-1, 2):
        with pytest.raises(IndexError, match=f"stage {t} was asked of 2 tasks"):
            stream().seen(t)


# folders

@pytest.fixture
def tree(tmp_path):
    for split in ("train", "val"):
        for c in ("cat", "dog"):
            (tmp_path / split / c).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / c / "0.png")
    return tmp_path


def test_folders_with_missing_parts(tree):
    assert read_image_folder(tree, "test", 8).counts.tolist() == [1, 1]
    (tree / "val/dog/0.png").unlink()
    with pytest.raises(FileNotFoundError, match="val.*dog"):
        TaskStream.from_folder(tree, 1)
    shutil.rmtree(tree / "val")
    with pytest.raises(FileNotFoundError, match="there is train/, but neither test/ nor val/"):
        TaskStream.from_folder(tree, 1)
    shutil.rmtree(tree / "train")
    with pytest.raises(FileNotFoundError, match="holds no folder of pictures"):
        TaskStream.from_folder(tree, 1)
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        TaskStream.from_folder(tree / "nowhere", 1)


def test_a_class_in_the_test_folder_only_is_refused(tree):
    (tree / "val/bird").mkdir()
    with pytest.raises(ValueError, match=r"holds classes that .* does not: \['bird'\]"):
        read_image_folder(tree, "test", 8)


def test_a_damaged_picture_is_named(tree):
    (tree / "train/cat/0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="0.png is no readable picture"):
        read_image_folder(tree, "train", 8)


def test_one_picture_a_class_leaves_none_to_train(tree):
    with pytest.raises(ValueError, match="at least one image|has 0 training"):
        TaskStream.from_folder(tree / "train", 1)


@pytest.fixture
def cifar(tmp_path):
    return write_cifar100_fixture(tmp_path) / "cifar-100-python"


def test_cifar100_with_missing_files(cifar):
    (cifar / "test").unlink()
    with pytest.raises(FileNotFoundError, match="cifar100: .*test is missing; a set is train, test, meta"):
        TaskStream.from_folder(cifar)
    assert len(read_cifar100(cifar)) == 100
    (cifar / "meta").unlink()
    with pytest.raises(FileNotFoundError,
                       match="cifar100: looked in .*expected meta there or in its cifar-100-python"):
        read_cifar100(cifar)


@pytest.mark.parametrize("content,message", [
    (b"", "EOFError"), (pickle.dumps({b"data": 1}, 2), "fine_labels"),
    (pickle.dumps({b"data": np.zeros((2, 3072)), b"fine_labels": [0, 1]}, 2),
     r"\(2, 3072\) float64 for 2 labels"),
    (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [100]}, 2),
     "labels 100..100 do not fit 100"),
])
def test_cifar100_with_a_damaged_file(cifar, content, message):
    (cifar / "train").write_bytes(content)
    with pytest.raises(ValueError, match=f"cifar100: .*{message}"):
        read_cifar100(cifar)


def test_cifar10_in_place_of_cifar100_is_told(cifar):
    (cifar / "train").write_bytes(pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [1]}, 2))
    with pytest.raises(ValueError, match="no readable batch with .*fine_labels"):
        read_cifar100(cifar)
