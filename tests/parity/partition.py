"""Task streams and glyphs against published orders, independent drawing and counting."""
import io
import pickle
import warnings

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from visionbench.core.tensors import DictData, batches
from visionbench.data.arrival import arrival_order, task_sizes
from visionbench.data.catalogue import CARDS, recognise
from visionbench.data.fixtures import (write_cifar10_fixture, write_cifar100_fixture, write_gtsrb_fixture,
                                       write_svhn_fixture, write_tiny_imagenet_fixture)
from visionbench.data.folders import read_image_folder
from visionbench.data.glyphs import CHARACTERS, FONTS, distorted, glyph, glyphs
from visionbench.data.hygiene import GuardedTensor, RawDataError
from visionbench.data.images import mnist5k
from visionbench.data.layouts import read_cifar100
from visionbench.data.partition import TaskStream
from visionbench.data.synthetic import SynthSigns
from visionbench.train.learner import Learner

# the order of seed 1993 as PyCIL, FACIL and others print it for CIFAR-100: first and last ten of 100
ICARL = [68, 56, 78, 8, 23, 84, 90, 65, 74, 76], [51, 48, 73, 93, 39, 67, 29, 49, 57, 33]


def arrays(K=6, n=5, m=3, seed=0):
    """Images whose pixels tell their class and number; classes mixed."""
    rng = np.random.default_rng(seed)
    made = []
    for part, count in ((0, n), (1, m)):
        y = rng.permutation(np.repeat(np.arange(K), count))
        x = np.zeros((len(y), 2, 3, 3), np.uint8)
        x[:, 0], x[:, 1] = y[:, None, None], (np.arange(len(y)) + 100 * part)[:, None, None]
        made += [x, y]
    return made


def test_the_named_order_is_the_published_one():
    order = arrival_order("icarl-1993", [str(c) for c in range(100)])
    state = np.random.get_state()
    np.random.seed(1993)
    assert order == np.random.permutation(100).tolist() and sorted(order) == list(range(100))
    np.random.set_state(state)
    assert (order[:10], order[-10:]) == ICARL


def test_an_order_leaves_the_global_generator_alone():
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    arrival_order(5, "abcdef")
    assert np.array_equal(before, np.random.get_state()[1])


@pytest.mark.parametrize("K,increment,base,sizes", [
    (10, 2, None, [2] * 5), (100, 10, None, [10] * 10), (100, 20, None, [20] * 5),
    (100, 5, 50, [50] + [5] * 10), (100, 10, 50, [50] + [10] * 5), (50, 5, 25, [25] + [5] * 5),
    (4, 4, None, [4]), (4, 1, 4, [4]), (3, 1, None, [1] * 3)])
def test_published_protocols(K, increment, base, sizes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert task_sizes(K, increment, base) == sizes


@pytest.mark.parametrize("K,increment,base,sizes",
                         [(10, 3, None, [3, 3, 3, 1]), (5, 4, 2, [2, 3]), (7, 9, 2, [2, 5])])
def test_a_smaller_last_task_warns(K, increment, base, sizes):
    with pytest.warns(UserWarning, match=f"the last task has {sizes[-1]}"):
        assert task_sizes(K, increment, base) == sizes


@pytest.mark.parametrize("order",
                         [0, 7, "natural", "icarl-1993", [5, 3, 1, 0, 2, 4], ["4", "0", "1", "5", "3", "2"]])
def test_every_image_is_in_one_task_under_its_new_label(order):
    x, y, xt, yt = arrays()
    stream = TaskStream.from_arrays(x, y, xt, yt, 2, class_order=order)
    assert (stream.bounds == (2, 4, 6) and stream.classes == tuple(map(str, stream.order))
            and stream.name == "arrays")
    seen = []
    for t, task in enumerate(stream):
        assert (task.index, task.first, task.stop) == (t, 2 * t, 2 * t + 2)
        assert task.classes == tuple(str(c) for c in stream.order[task.block])
        for part, data in ((0, task.train), (1, task.test)):
            old = [stream.order[k] for k in data.label.tolist()]
            assert data.image[:, 0, 0, 0].tolist() == old and data.image.dtype == torch.uint8
            numbers = data.image[:, 1, 0, 0].tolist()
            assert numbers == sorted(numbers)  # a task keeps the order of its images
            seen += numbers
    assert sorted(seen) == [*range(30), *range(100, 118)]
    assert stream.test.label.tolist() == sorted(stream.test.label.tolist(), key=lambda k: k // 2)
    assert torch.equal(stream.seen(1).label, torch.cat([t.test.label for t in stream.tasks[:2]]))


def test_named_tasks_may_leave_classes_out():
    x, y, xt, yt = arrays(4)
    names = ["cat", "dog", "car", "bus"]
    stream = TaskStream.from_arrays(x, y, xt, yt, tasks=[["bus"], ["dog", 2]], classes=names)
    assert stream.order == (3, 1, 2) and stream.bounds == (1, 3) and stream.classes == ("bus", "dog", "car")
    assert len(stream.train) == 15 and stream.tasks[1].train.classes == stream.classes
    again = stream.reordered("natural")
    assert again.order == (1, 2, 3) and again.bounds == stream.bounds


def test_numpy_and_torch_and_kinds_of_numbers_give_the_same_stream():
    x, y, xt, yt = arrays()
    first = TaskStream.from_arrays(x, y, xt, yt)
    second = TaskStream.from_arrays(torch.from_numpy(x), y.astype(np.int32), torch.from_numpy(xt),
                                    torch.from_numpy(yt))
    third = TaskStream.from_arrays(x / 255, y.tolist(), (xt / 255).astype(np.float32), yt.astype(np.uint8))
    for a, b, c in zip(first, second, third):
        assert torch.equal(a.train.image, b.train.image) and torch.equal(a.train.label, b.train.label)
        assert c.train.image.dtype == torch.float32 and torch.allclose(c.train.image, a.train.image / 255)
    assert (third.mean == pytest.approx((x / 255).mean((0, 2, 3)))
            and third.std == pytest.approx((x / 255).std((0, 2, 3)), rel=.01))
    assert first.mean == pytest.approx(third.mean)


def test_reordering_depends_on_the_new_order_only():
    stream = TaskStream.from_arrays(*arrays(), increment=4, base=2)
    once, twice = stream.reordered(5), stream.reordered(9).reordered(5)
    direct = TaskStream.from_arrays(*arrays(), increment=4, base=2, class_order=5)
    for other in (twice, direct):
        assert other.order == once.order and other.bounds == once.bounds == (2, 6)
        assert all(torch.equal(a.train.image, b.train.image) for a, b in zip(other, once))


def test_validation_comes_out_of_the_task_s_own_training_images():
    stream = TaskStream.from_arrays(*arrays(n=10))
    held = stream.with_validation(.3, seed=1)
    for task, whole in zip(held, stream):
        assert (task.validation.counts[task.block].tolist() == [3, 3]
                and task.train.counts[task.block].tolist() == [7, 7])
        numbers = torch.cat([task.train.image, task.validation.image])[:, 1, 0, 0]
        assert sorted(numbers.tolist()) == sorted(whole.train.image[:, 1, 0, 0].tolist())
        assert torch.equal(task.test.image, whole.test.image)
    again, other = stream.with_validation(.3, seed=1), stream.with_validation(.3, seed=2)
    assert torch.equal(held.tasks[0].validation.image, again.tasks[0].validation.image)
    assert not torch.equal(held.tasks[0].validation.image, other.tasks[0].validation.image)
    assert [t.validation.counts.sum() for t in held.reordered(3)] == [6, 6, 6]
    assert len(held.with_validation(.5).tasks[0].train) == 10  # of the whole again, not of what was left


@pytest.mark.parametrize("name,shape,counts,bounds", [
    ("digits", (1, 8, 8), (120, 54), (2, 4, 6, 8, 10)),
    ("mnist5k", (1, 14, 14), (400, 100), (2, 4, 6, 8, 10)),
    ("glyphs", (1, 16, 16), (60, 40), tuple(range(5, 51, 5)))])
def test_builtin_streams(name, shape, counts, bounds):
    stream = TaskStream.builtin(name)
    assert (stream.name, stream.shape, stream.bounds) == (name, shape, bounds)
    for task in stream:
        assert (set(task.train.counts[task.block].tolist()) == {counts[0]}
                and len(task.train) == counts[0] * len(task.classes))
        assert set(task.test.counts[task.block].tolist()) == {counts[1]}
        assert task.train.image.dtype == torch.float32
    train, test = ({x.numpy().tobytes() for x in d.image} for d in (stream.train, stream.test))
    assert not train & test
    assert torch.equal(stream.train.image, TaskStream.builtin(name).train.image)
    assert not torch.equal(stream.test.image, TaskStream.builtin(name, seed=1).test.image)


def test_mnist_of_the_stream_is_the_pooled_mnist():
    stream, whole = TaskStream.builtin("mnist5k", class_order="natural"), mnist5k("train", 28)
    pixels = whole.image[whole.label < 2].double().numpy().reshape(-1, 14, 2, 14, 2).mean((2, 4))
    assert np.abs(stream.tasks[0].train.image[:, 0].numpy() - pixels).max() < 1e-6


# folders

WRITERS = {"cifar10": lambda root: write_cifar10_fixture(root, 1), "cifar100": write_cifar100_fixture,
           "svhn": lambda root: write_svhn_fixture(root, 1),
           "gtsrb": lambda root: write_gtsrb_fixture(root, 1),
           "tiny_imagenet": lambda root: write_tiny_imagenet_fixture(root, 1, 2, 4)}


@pytest.mark.parametrize("name", [c.name for c in CARDS.values() if not c.embedded])
def test_every_set_of_the_catalogue_is_recognised(name, tmp_path):
    root = WRITERS[name](tmp_path / "sets")
    inside = root / CARDS[name].mark
    assert recognise(root) == recognise(str(inside.parent)) == name and recognise(tmp_path) == ""


def test_cifar100_in_its_pickles_is_ten_by_ten(tmp_path):
    root = write_cifar100_fixture(tmp_path, per_class=2)
    stream, plain = TaskStream.from_folder(root), read_cifar100(root)
    assert (stream.bounds == tuple(range(10, 101, 10)) and list(stream.order[:10]) == ICARL[0]
            and stream.shape == (3, 32, 32))
    assert torch.equal(stream.tasks[0].train.image[stream.tasks[0].train.label == 0],
                       plain.image[plain.label == 68])
    assert stream.classes[0] == plain.classes[68] and stream.mean == (.5071, .4866, .4409)
    assert TaskStream.from_folder(root / "cifar-100-python", 5, 50).bounds == (50, *range(55, 101, 5))


def test_tiny_imagenet_uses_its_validation_images_as_test(tmp_path):
    root = write_tiny_imagenet_fixture(tmp_path, val=30, per_class=2, classes=30)
    stream = TaskStream.from_folder(root, 10)
    assert (len(stream) == 3 and stream.shape == (3, 64, 64)
            and (len(stream.train), len(stream.test)) == (60, 30))


@pytest.fixture
def tree(tmp_path):
    """Twelve pictures in a folder a class, of several kinds and sizes."""
    for i in range(12):
        path = (tmp_path / "all" / ("cat", "dog", "car")[i % 3]
                / f"{i:02d}.{('png', 'jpg', 'bmp', 'tif')[i // 3]}")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(SynthSigns(3, 24 + i).draw(i)).save(path)
    (tmp_path / "all/cat/notes.txt").write_text("no picture")
    (tmp_path / "all/.hidden").mkdir()
    return tmp_path


@pytest.mark.parametrize("test", ["test", "val"])
def test_a_divided_folder_is_read_as_it_is_divided(tree, test):
    (tree / "set").mkdir()
    (tree / "all").rename(tree / "set/train")
    for c in ("car", "cat", "dog"):
        (tree / f"set/{test}" / c).mkdir(parents=True)
        next((tree / "set/train" / c).glob("*.png")).rename(tree / f"set/{test}" / c / "a.png")
    stream = TaskStream.from_folder(tree / "set", 1, class_order="natural", size=20)
    assert stream.classes == ("car", "cat", "dog") and stream.shape == (3, 20, 20) and stream.name == "set"
    assert len(stream.train) == 9 and len(stream.test) == 3
    with Image.open(tree / f"set/{test}/cat/a.png") as im:
        assert np.array_equal(np.asarray(im.resize((20, 20), Image.Resampling.BILINEAR)).transpose(2, 0, 1),
                              stream.tasks[1].test.image[0])


def test_an_undivided_folder_sets_a_share_of_each_class_aside(tree):
    parts = [read_image_folder(tree / "all", s, 16, .75) for s in ("train", "test")]
    assert [p.counts.tolist() for p in parts] == [[3, 3, 3], [1, 1, 1]]
    whole = {x.numpy().tobytes() for p in parts for x in p.image}
    assert len(whole) == 12
    other = read_image_folder(tree / "all", "test", 16, .75, seed=3)
    assert not torch.equal(other.image.sort(0)[0], parts[1].image.sort(0)[0])


# data hygiene

def test_training_in_its_own_task_sees_the_same_batches():
    stream = TaskStream.from_arrays(*arrays())
    watched = stream.guarded()
    for t, task in enumerate(stream):
        with watched.during(t) as own:
            pairs = zip(batches(DictData(image=task.train.image, label=task.train.label), 4, seed=t),
                        batches(DictData(image=own.train.image, label=own.train.label), 4, seed=t))
            for a, b in pairs:
                assert (all(torch.equal(a[k], torch.as_tensor(b[k])) for k in a)
                        and isinstance(b["image"], GuardedTensor))


@pytest.mark.parametrize("touch", [
    lambda d: d.image[0], lambda d: d.image + 1, lambda d: d.image.numpy(), lambda d: d.label.tolist(),
    lambda d: d.image.sum(), lambda d: torch.cat([d.image, d.image]), lambda d: d.subset([0]),
    lambda d: d.counts, lambda d: d.label == 0, lambda d: next(iter(d.image)), lambda d: d.image.data,
    lambda d: next(iter(batches(DictData(image=d.image), 2))),
    lambda d: torch.zeros(1).copy_(d.label[:1]), lambda d: torch.nn.Conv2d(2, 1, 1)(d.image.float())],
    ids=["index", "add", "numpy", "tolist", "sum", "cat", "subset", "counts", "compare", "iterate", "data",
         "loader", "copy", "forward"])
def test_any_touch_of_another_task_is_found(touch):
    stream = TaskStream.from_arrays(*arrays()).with_validation(.2).guarded()
    for t, task in ((1, 0), (0, 1), (2, 0)):
        for data in (stream.tasks[task].train, stream.tasks[task].validation):
            with stream.during(t), pytest.raises(
                    RawDataError, match=f"data of task {task} was used during task {t}; .*uses_raw_data"):
                touch(data)
    touch(stream.tasks[0].train)  # between tasks everything may be looked at


@pytest.mark.parametrize("keep", [
    lambda x: x[:2].clone(), lambda x: x.float() / 255, lambda x: torch.stack([x[0], x[1]]),
    lambda x: list(x)[0], lambda x: x.to(torch.float64).flatten(1), lambda x: x.split(2)[0],
    lambda x: x.detach()[torch.tensor([1, 0])]],
    ids=["clone", "scale", "stack", "list", "convert", "split", "index"])
def test_a_buffer_of_old_images_is_found(keep):
    stream = TaskStream.from_arrays(*arrays()).guarded()
    with stream.during(0) as task:
        buffer = keep(task.train.image)
    with stream.during(1), pytest.raises(RawDataError, match="task 0 .* during task 1"):
        buffer.mean()


def test_the_learner_gives_the_same_weights_with_and_without_a_guard():
    plain, weights = TaskStream.builtin("digits"), []
    for stream in (plain, plain.guarded()):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        for t in range(2):
            with stream.during(t) as task:
                data = batches(DictData(image=task.train.image, label=task.train.label), 32)
                Learner(net, lambda out, batch: {
                    "new": torch.nn.functional.cross_entropy(out, batch["label"])}, data,
                        torch.optim.SGD(net.parameters(), .1), device="cpu").fit(1)
        weights.append(net[1].weight.detach().clone())
    assert torch.equal(*weights)


def test_what_was_learned_may_be_kept():
    stream = TaskStream.from_arrays(*arrays()).guarded()
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(18, 6))
    with stream.during(0) as task:
        logits = net(task.train.image.float() / 255)
        loss = torch.nn.functional.cross_entropy(logits, task.train.label)
        fisher = torch.autograd.grad(loss, net[1].weight)[0] ** 2
        gram = task.train.image.float().flatten(1).T @ task.train.image.float().flatten(1)
    with stream.during(1):
        for kept in (logits, loss, fisher, gram):
            assert type(kept) is torch.Tensor and kept.sum().isfinite()
        assert (stream.seen(0).label.max() == 1 and len(stream.tasks[0].train) == 10
                and stream.tasks[2].train.shape == (2, 3, 3))


def test_joint_training_must_be_declared():
    stream = TaskStream.from_arrays(*arrays())
    watched = stream.guarded()
    with watched.during(2), pytest.raises(RawDataError, match="task 0"):
        watched.train
    with stream.guarded(uses_raw_data=True).during(2):
        assert len(stream.guarded(uses_raw_data=True).train) == 30


def test_an_error_inside_a_task_ends_the_task():
    stream = TaskStream.from_arrays(*arrays()).guarded()
    with pytest.raises(KeyError), stream.during(0):
        raise KeyError
    with stream.during(1), pytest.raises(RuntimeError, match="task 2 begins while task 1"):
        with stream.during(2):
            pass
    assert stream.guard.current is None


# glyphs

def test_every_typeface_has_every_character_as_pillow_draws_it():
    for font in FONTS[::4]:
        face = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{font}.ttf", 48)
        for c in CHARACTERS[::7]:
            sheet = Image.new("L", (200, 200))
            ImageDraw.Draw(sheet).text((60, 60), c, 255, face)
            box = np.asarray(sheet.crop(sheet.getbbox()), float)
            ours = glyph(c, font)
            ours = np.asarray(ours.crop(ours.getbbox()), float)
            assert (abs(np.subtract(ours.shape, box.shape)).max() <= 1
                    and ours.sum() == pytest.approx(box.sum(), rel=.02))


def test_no_two_characters_of_a_typeface_look_the_same():
    """A typeface without a character draws the same empty box for all that it lacks."""
    for font in FONTS:
        drawn = {np.asarray(glyph(c, font)).tobytes() for c in CHARACTERS}
        assert len(drawn) == 50


@pytest.mark.parametrize("turn,scale,shear,shift",
                         [(15, 1, 0, (0, 0)), (0, 1.2, 0, (0, 0)), (0, 1, -.2, (0, 0)), (0, 1, 0, (4, -3)),
                          (-12, .85, .15, (-2.5, 3.2))])
def test_distortion_against_scipy(turn, scale, shear, shift):
    """ndimage works in (row, column) and maps results to sources, so it gets the inverse of R·S with axes
    swapped."""
    picture = glyph("R", "DejaVuSerif")
    a = np.deg2rad(turn)
    forward = (scale * np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])
               @ np.array([[1, shear], [0, 1]]))
    back = np.linalg.inv(forward)[::-1, ::-1]
    middle = 31.5  # pixel centres
    offset = middle - back @ (middle + np.array(shift)[::-1])
    wide = ndimage.affine_transform(np.asarray(picture, float), back, offset, order=1)
    ours = distorted(picture, turn, scale, shear, shift)
    assert np.abs(ours - wide.reshape(16, 4, 16, 4).mean((1, 3)) / 255).max() < .01


def test_a_turn_is_anticlockwise():
    """The bar of a T swings to the left when the letter is turned anticlockwise about its middle."""
    top = distorted(glyph("T", "DejaVuSans"), 15, 1, 0, (0, 0))[:6].sum(0)
    assert (top * np.arange(16)).sum() / top.sum() < 7


def test_glyphs_use_all_typefaces_contrasts_and_noise():
    d = glyphs("train")
    assert d.shape == (1, 16, 16) and d.classes == tuple(CHARACTERS) and float(d.image.max()) <= 1
    corner = d.image[:, 0, 0, 0]  # never ink: noise clipped at zero
    assert abs(float((corner == 0).float().mean()) - .5) < .05
    assert abs(float(corner[corner > 0].square().mean().sqrt()) - .1) < .01
    assert len(set(d.label[:200].tolist())) > 40  # classes are mixed


def test_glyphs_do_not_depend_on_global_state():
    np.random.seed(0), torch.manual_seed(0)
    first = glyphs("test", 3)
    np.random.seed(1), torch.manual_seed(1)
    second = glyphs("test", 3)
    assert torch.equal(first.image, second.image) and torch.equal(first.label, second.label)


def test_the_pickles_of_the_fixture_hold_bytes_as_python_two_wrote_them(tmp_path):
    raw = (write_cifar100_fixture(tmp_path) / "cifar-100-python/train").read_bytes()
    assert set(pickle.load(io.BytesIO(raw), encoding="bytes")) == {
        b"data", b"fine_labels", b"coarse_labels", b"batch_label", b"filenames"}
