"""Settings, devices, batches and dict data given wrongly; the hash of settings against one computed by
hand."""
import hashlib
import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from visionbench.core.config import Config, ConfigError, check_value, closest, option, settings_table
from visionbench.core.files import atomic_write
from visionbench.core.tensors import (DictData, EpochBatches, batches, cpu_threads, generator,
                                      pick_device, seed_of)


@dataclass(frozen=True)
class ToyConfig(Config):
    steps: int = option(3, "how often", unit="steps", low=1, high=9)
    rate: float = option(.5, "share", unit="fraction", low=0, high=1)
    free: float = option(1., "any number")
    method: str = option("fast", "how", choices=("fast", "slow"))
    flag: bool = option(False, "whether")
    sizes: tuple[int, ...] = option((1, 2), "list of sizes", low=1)
    shares: tuple[float, ...] = option((.5,), "list of shares", low=0, high=1)
    system: ClassVar[str] = "toy"
    quick = classmethod(lambda cls: cls())
    small = classmethod(lambda cls: cls(steps=5))
    paper = classmethod(lambda cls: cls(steps=9))


def says(*parts):
    return pytest.raises(ConfigError, match="(?s)" + ".*".join(parts))


@pytest.mark.parametrize("name,value,kind", [
    ("steps", True, "bool"), ("steps", 3., "float"), ("steps", "3", "str"), ("steps", None, "NoneType"),
    ("steps", [3], "list"), ("seed", True, "bool"), ("seed", 1.5, "float"), ("limit_batches", "1", "str"),
    ("rate", "0.5", "str"), ("rate", True, "bool"), ("rate", None, "NoneType"), ("rate", (.5,), "tuple"),
    ("free", "nan", "str"), ("method", 1, "int"), ("method", None, "NoneType"), ("out", None, "NoneType"),
    ("data", 3, "int"), ("device", torch.device("cpu"), "device"), ("flag", 1, "int"), ("flag", "yes", "str"),
    ("flag", None, "NoneType"), ("sizes", 3, "int"), ("sizes", "12", "str"), ("sizes", {1: 2}, "dict")])
def test_a_value_of_the_wrong_type_is_named_with_both_types(name, value, kind):
    want = dict(steps="int", seed="int", limit_batches="int", rate="float", free="float", flag="bool",
                sizes="tuple").get(name, "str")
    with says(name, f"is {kind}, expected {want}"): ToyConfig().replace(**{name: value})
    with says(name, f"is {kind}, expected {want}"): ToyConfig(**{name: value})


@pytest.mark.parametrize("name,value",
                         [("sizes", ["a"]), ("sizes", (1, 2.5)), ("sizes", (True,)), ("sizes", (None,)),
                          ("shares", ("0.5",)), ("shares", (.5, None)), ("shares", ([.5],))])
def test_elements_of_a_list_have_types_too(name, value):
    with says(name, "expected"): ToyConfig().replace(**{name: value})


def test_what_is_widened():
    config = ToyConfig(rate=1, sizes=[3, 4], shares=[1, 0])
    assert (config.rate, config.sizes, config.shares) == (1., (3, 4), (1., 0.))
    assert isinstance(config.rate, float) and isinstance(config.sizes, tuple)
    assert all(isinstance(s, float) for s in config.shares)
    assert config.as_dict()["sizes"] == [3, 4] and ToyConfig(**config.as_dict()) == config
    assert config.hash == ToyConfig(rate=1., sizes=(3, 4), shares=(1., 0.)).hash


@pytest.mark.parametrize("name,value",
                         [("steps", 0), ("steps", 10), ("rate", -.01), ("rate", 1.01), ("rate", float("nan")),
                          ("rate", float("inf")), ("sizes", (3, 0)), ("seed", -1),
                          ("shares", (.5, float("nan"))), ("limit_batches", -1), ("threads", -2)])
def test_a_value_out_of_bounds_names_value_bounds_and_unit(name, value):
    meta = ToyConfig.fields()[name][1]
    with says(name, "outside", str(meta["low"]), meta["unit"]): ToyConfig().replace(**{name: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_no_file_can_hold_are_refused_without_bounds_too(value):
    """settings.json is strict JSON: such a run could be started but never written down."""
    with says("free"): ToyConfig(free=value)

    @dataclass(frozen=True)
    class Open(Config):
        lr: float = option(.1, "learning rate", low=0)
    with says("lr"): Open(lr=value)


def test_a_choice_that_does_not_exist():
    with says("method", "unknown choice 'fsat'", "Did you mean 'fast'", "Known: fast, slow"):
        ToyConfig(method="fsat")


@pytest.mark.parametrize("given,near", [("step", "steps"), ("Rate", "rate"), ("limit_batch", "limit_batches"),
                                        ("metod", "method")])
def test_an_unknown_setting_names_the_closest_and_all(given, near):
    with says(f"unknown toy setting '{given}'", f"Did you mean '{near}'",
              "Known: .*data.*device.*flag.*steps.*threads"):
        ToyConfig().replace(**{given: 1})
    with says(f"unknown toy setting '{given}'"): ToyConfig.start("quick", **{given: 1})


def test_an_unknown_setting_far_from_all_gets_no_hint():
    with pytest.raises(ConfigError) as e: ToyConfig().replace(zzzzzz=1)
    assert "Did you mean" not in str(e.value) and "Known:" in str(e.value)


@pytest.mark.parametrize("preset,hint", [("quik", "Did you mean 'quick'"), ("papers", "Did you mean 'paper'"),
                                         ("", "Known: paper, quick, small"),
                                         ("replace", "Known: paper, quick, small"), (None, "Known")])
def test_an_unknown_preset(preset, hint):
    with says("unknown preset", hint): ToyConfig.start(preset)


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(AttributeError): ToyConfig().steps = 4


def test_errors_are_value_errors_and_one_line():
    for bad in (dict(steps=True), dict(steps=99), dict(nosuch=1), dict(method="x")):
        with pytest.raises(ValueError) as e: ToyConfig().replace(**bad)
        assert "\n" not in str(e.value) and str(e.value).endswith(".")


def test_check_value_needs_no_metadata():
    assert check_value("x", 2, float, {}) == 2. and check_value("x", [1], tuple[int, ...], {}) == (1,)
    with says("x = 'a' is str, expected int"): check_value("x", "a", int, {})
    assert closest("b", ["c", "a"]) == "unknown name 'b'. Known: a, c."


def test_hash_equals_one_computed_by_hand():
    text = ('["toy",{"data":"","flag":false,"free":1.0,"limit_batches":0,"method":"fast","rate":0.5,'
            '"shares":[0.5],"sizes":[1,2],"steps":3}]')
    assert ToyConfig().hash == hashlib.sha256(text.encode()).hexdigest()[:8] == "34fbfb26"
    assert ToyConfig(seed=4).name == "quick-34fbfb26-s4"
    changed = text.replace('"rate":0.5', '"rate":0.1')
    changed = changed.replace('"data":""', '"data":"/ä"'.replace("ä", "\\u00e4"))
    assert ToyConfig(rate=.1, data="/ä").hash == hashlib.sha256(changed.encode()).hexdigest()[:8]


def test_hash_depends_on_what_changes_the_result_and_on_nothing_else():
    start = ToyConfig()
    for name, value in dict(preset="small", seed=7, device="cpu", out="elsewhere", threads=3).items():
        assert start.replace(**{name: value}).hash == start.hash, name
    changes = dict(steps=4, rate=.25, free=2., method="slow", flag=True, sizes=(2, 1), shares=(.5, .5),
                   data="x", limit_batches=1)
    hashes = {start.replace(**{k: v}).hash for k, v in changes.items()}
    assert len(hashes) == len(changes) and start.hash not in hashes

    @dataclass(frozen=True)
    class Other(ToyConfig):
        system: ClassVar[str] = "other"
    assert Other().hash != start.hash


def test_hash_does_not_depend_on_the_order_of_changes_or_fields():
    a = ToyConfig().replace(steps=4, rate=.1).replace(flag=True)
    b = ToyConfig().replace(flag=True).replace(rate=.1).replace(steps=4)
    assert a == b and a.hash == b.hash == ToyConfig.start("small", flag=True, rate=.1, steps=4).hash

    @dataclass(frozen=True)
    class Turned(Config):
        shares: tuple[float, ...] = option((.5,), "")
        sizes: tuple[int, ...] = option((1, 2), "")
        flag: bool = option(False, "")
        method: str = option("fast", "")
        free: float = option(1., "")
        rate: float = option(.5, "")
        steps: int = option(3, "")
        system: ClassVar[str] = "toy"
    assert Turned().hash == ToyConfig().hash


def test_settings_survive_json():
    config = ToyConfig(rate=1/3, shares=(.1, .2))
    assert ToyConfig(**json.loads(json.dumps(config.as_dict()))) == config
    assert [r["setting"] for r in settings_table(config)] == list(config.as_dict())


@pytest.mark.parametrize("name", ["gpu", "", "CPU", "cuda0", "auto:1", "tpu"])
def test_a_device_that_is_none(name):
    with pytest.raises(ValueError, match=f"device '{name}' is not one of auto, cpu, cuda, cuda:N, mps"):
        pick_device(name)


def test_a_device_that_is_not_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("cuda", "cuda:0", "cuda:7", "mps"):
        with pytest.raises(ValueError, match=f"device '{name}' is not available here; available: cpu"):
            pick_device(name)
    assert pick_device() == pick_device("auto") == pick_device("cpu") == torch.device("cpu")


def test_devices_of_a_machine_with_two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device() == torch.device("cuda") and pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="device 'cuda:2' does not exist; this machine has cuda:0 … cuda:1"):
        pick_device("cuda:2")


@pytest.mark.parametrize("name", ["cuda:x", "cuda:-1", "cuda:1.5", "cuda:", "cpu:x", "cpu:", "mps:a"])
def test_a_device_with_a_number_that_is_none(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ValueError, match=f"device '{name}'"): pick_device(name)


@pytest.mark.parametrize("n,size", [(0, 1), (-1, 1), (5, 0), (5, -2)])
def test_batches_of_nothing(n, size):
    with pytest.raises(ValueError, match=f"got {n} samples, batch size {size}"): EpochBatches(n, size)


def test_batch_orders_are_a_function_of_seed_and_epoch():
    def epoch(seed, e, **more):
        order = EpochBatches(7, 3, seed, **more)
        order.start(e)
        return list(order)
    digest = hashlib.sha256("5\0epoch\0002".encode()).digest()
    draw = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    by_hand = torch.randperm(7, generator=draw).tolist()
    assert sum(epoch(5, 2), []) == by_hand and epoch(5, 2) == epoch(5, 2) != epoch(5, 3)
    assert epoch(5, 2) != epoch(6, 2)
    assert epoch(5, 9, shuffle=False) == [[0, 1, 2], [3, 4, 5], [6]]
    assert epoch(0, 0, shuffle=False, drop_last=True) == [[0, 1, 2], [3, 4, 5]]
    order = EpochBatches(7, 3, 5)
    order.start(2, skip=1)
    assert list(order) == epoch(5, 2)[1:] and len(order) == 3 and len(EpochBatches(7, 3, drop_last=True)) == 2


@pytest.mark.parametrize("tensors", [{}, dict(image=torch.zeros(3, 1, 2, 2), label=torch.zeros(4)),
                                     dict(a=torch.zeros(0), b=torch.zeros(1))])
def test_tensors_of_different_lengths(tensors):
    with pytest.raises(ValueError, match="tensors must share their first size, got {") as e:
        DictData(**tensors)
    assert all(f"'{k}': {len(v)}" in str(e.value) for k, v in tensors.items())


def test_only_bytes_are_scaled():
    data = DictData(image=torch.tensor([[0, 51], [255, 255]], dtype=torch.uint8), label=torch.tensor([1, 0]),
                    mask=torch.tensor([[200], [100]], dtype=torch.uint8))
    got = next(iter(batches(data, 2, shuffle=False)))
    assert got["image"].tolist() == torch.tensor([[0., .2], [1., 1.]]).tolist()
    assert got["mask"].tolist() == [[200], [100]]
    already = DictData(image=torch.tensor([[.5]]))[[0]]["image"]
    assert already.item() == .5
    with pytest.raises(IndexError): data[[2]]


def test_seeds_do_not_run_into_each_other():
    assert len({seed_of(1, 23), seed_of(12, 3), seed_of("1", "2", "3"), seed_of(123)}) == 4
    assert seed_of(1, "a") == seed_of("1", "a") and 0 <= seed_of("x") < 2**63
    assert torch.equal(torch.rand(3, generator=generator(1, "a")), torch.rand(3, generator=generator(1, "a")))


def test_threads_are_put_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), cpu_threads(before + 1): 1 / 0
    assert torch.get_num_threads() == before


def test_a_write_into_a_file_taken_for_a_folder(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError): atomic_write(tmp_path / "file" / "x.json", "{}")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError): atomic_write(tmp_path / "folder", "{}")
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
