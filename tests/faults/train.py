"""Losses that blow up, checkpoints that are damaged, foreign or cut short, and disks that are full."""
import errno
import json
import os
import re
import warnings
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from visionbench.core.config import Config, option
from visionbench.core.files import atomic_write
from visionbench.core.tensors import DictData, batches, generator
from visionbench.runs.record import Run
from visionbench.train.callbacks import CheckpointCB, RecordCB
from visionbench.train.checkpoint import CheckpointError, load_checkpoint, newest_checkpoint, save_checkpoint
from visionbench.train.learner import Learner, NonFiniteLoss


def network(width=4, kind=nn.Linear):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(kind(3, width), nn.ReLU(), nn.Linear(width, 2))


def learner(folder=None, net=None, optimizer="sgd", signature="", callbacks=(), keep=9, loss=None,
            lr=.1, every=0):
    """A learner of three batches an epoch, with checkpoints in `folder`."""
    x = torch.randn(12, 3, generator=generator("x"))
    net = net or network()
    make = dict(sgd=lambda p: torch.optim.SGD(p, lr, momentum=.9),
                adam=lambda p: torch.optim.Adam(p, lr))[optimizer]
    saving = [CheckpointCB(folder, signature, keep=keep, every=every)] if folder else []
    return Learner(net, loss or (lambda out, b: dict(ce=F.cross_entropy(out, b["label"]))),
                   batches(DictData(image=x, label=(x[:, 0] > 0).long()), 4, seed=1), make(net.parameters()),
                   [*callbacks, *saving], device="cpu")


def weights(l):
    return {k: v.clone() for k, v in l.model.state_dict().items()}


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


class StopAt:
    """Interrupt a fit after some steps, and note where it began."""
    def __init__(self, at=-1): self.at, self.began = at, None

    def before_epoch(self, l): self.began = l.iteration if self.began is None else self.began

    def after_step(self, l):
        if l.iteration == self.at: raise KeyboardInterrupt


@pytest.fixture
def folder(tmp_path):
    """Checkpoints at steps 3, 6 and 9."""
    learner(tmp_path).fit(3)
    assert [p.name for p in sorted(tmp_path.iterdir())] == [f"step-{k:08}.safetensors" for k in (3, 6, 9)]
    return tmp_path


def newest(folder):
    return max(folder.glob("*.safetensors"))


def uses_step(folder, step, *reasons, signature=""):
    """Assert that the checkpoint of `step` is found, and that each newer one is named with its reason."""
    with pytest.warns(UserWarning) as said: found = newest_checkpoint(folder, signature)
    assert found is not None and found.state["iteration"] == step
    said = [str(w.message) for w in said]
    assert len(said) == len(reasons), said
    assert all(re.search(r, s) and "refused" in s for r, s in zip(reasons, said)), said


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_names_step_term_rate_and_epoch(tmp_path, bad):
    def loss(out, b):
        return dict(fine=out.square().mean(), odd=out.mean() * (bad if l.iteration == 4 else 1.))
    l = learner(tmp_path, loss=loss, lr=.025)
    with pytest.raises(NonFiniteLoss) as e: l.fit(5)
    said = str(e.value)
    assert "step 4 (epoch 1, batch 1)" in said and re.search(r"odd = -?(nan|inf)", said)
    assert "fine" not in said and "learning rate 0.025" in said
    assert all(p.isfinite().all() for p in l.model.parameters())
    assert newest_checkpoint(tmp_path).state["iteration"] == 3


def test_two_terms_that_cancel_to_nothing_are_named_too():
    with pytest.raises(NonFiniteLoss, match="up = inf, down = -inf"):
        learner(loss=lambda out, b: dict(up=out.mean() + float("inf"), down=out.mean() - float("inf"))).fit(1)
    huge = torch.tensor(3e38)
    with pytest.raises(NonFiniteLoss, match="total = inf"):
        learner(loss=lambda out, b: dict(a=out.mean() + huge, b=out.mean() + huge)).fit(1)


def test_every_length_of_a_truncated_checkpoint_is_refused(folder):
    whole = newest(folder).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for cut in {0, 1, 7, 8, 9, 100, header // 2, header - 1, header, header + 1, (header + len(whole)) // 2,
                len(whole) - 1}:
        newest(folder).write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="step-00000009.*damaged"): load_checkpoint(newest(folder))
        uses_step(folder, 6, "step-00000009.*damaged")
    newest(folder).write_bytes(whole + b"x")
    with pytest.raises(CheckpointError, match="step-00000009.*damaged"): load_checkpoint(newest(folder))


def test_every_flipped_byte_is_refused(folder):
    path, whole = newest(folder), newest(folder).read_bytes()
    header, kept = 8 + int.from_bytes(whole[:8], "little"), []
    for at in [*range(header), *range(header, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 if at % 2 else 16)]) + whole[at + 1:])
        try:
            load_checkpoint(path)
            kept.append((at, "accepted"))
        except CheckpointError as e: assert "step-00000009" in str(e)
        except Exception as e: kept.append((at, repr(e)))
    assert not kept, f"{len(kept)} flips of {header} in the header: " + "; ".join(
        f"byte {at} in {whole[max(at - 20, 0):at + 5]}: {what}" for at, what in kept[:: len(kept) // 5 + 1])


def test_a_flipped_byte_makes_resuming_use_the_one_before(folder):
    whole, expected = newest(folder).read_bytes(), weights(learner(folder).fit(4))
    max(folder.glob("*")).unlink()
    newest(folder).write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    stop = StopAt()
    with pytest.warns(UserWarning, match="step-00000009.*digest"):
        l = learner(folder, callbacks=[stop]).fit(4)
    assert stop.began == 6 and same(weights(l), expected)


def foreign(path, kind):
    if kind == "no metadata": save_file({"w": torch.ones(2)}, path)
    if kind == "other metadata": save_file({"w": torch.ones(2)}, path, {"format": "pt"})
    if kind == "no digest": save_file({"w": torch.ones(2)}, path, {"format": "visionbench-checkpoint-1"})
    if kind == "text": path.write_text("not a checkpoint at all, but long enough to look like one")
    if kind == "pickle": torch.save({"w": torch.ones(2)}, path)
    if kind == "folder": path.mkdir()


@pytest.mark.parametrize("kind", ["no metadata", "other metadata", "no digest", "text", "pickle", "folder"])
def test_foreign_files_are_refused(folder, kind):
    foreign(folder / "step-00000012.safetensors", kind)
    with pytest.raises(CheckpointError, match="step-00000012"):
        load_checkpoint(folder / "step-00000012.safetensors")
    uses_step(folder, 6 + 3, "step-00000012")


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at .*nothing.safetensors"):
        load_checkpoint(tmp_path / "nothing.safetensors")
    assert newest_checkpoint(tmp_path) is None and newest_checkpoint(tmp_path / "absent") is None


def test_another_signature_is_refused(tmp_path):
    learner(tmp_path, signature="a").fit(1)
    path = newest(tmp_path)
    found = load_checkpoint(path)
    save_checkpoint(tmp_path / "step-00000099.safetensors", found.tensors, found.state | dict(signature="b"))
    uses_step(tmp_path, 3, "step-00000099.*other settings.*'b', expected 'a'", signature="a")
    with pytest.warns(UserWarning, match="expected 'c'"): assert newest_checkpoint(tmp_path, "c") is None


def put_foreign_learner(folder, **kind):
    """Make the newest checkpoint one of another learner; the older ones stay."""
    other = folder.parent / f"{folder.name}-other"
    learner(other, **kind).fit(4)
    newest(other).rename(folder / newest(other).name)


OTHERS = [(dict(net=network(width=5)), "other network|another network"),
          (dict(optimizer="adam"), "optimizer")]


@pytest.mark.parametrize("kind,reason", OTHERS, ids=["network", "optimizer"])
def test_a_checkpoint_of_another_learner_is_refused_and_the_one_before_used(folder, kind, reason):
    expected = weights(learner(folder).fit(5))
    for p in sorted(folder.iterdir())[3:]: p.unlink()
    put_foreign_learner(folder, **kind)
    stop = StopAt()
    with pytest.warns(UserWarning, match=reason): l = learner(folder, callbacks=[stop]).fit(5)
    assert stop.began == 9 and same(weights(l), expected)


@pytest.mark.parametrize("kind,reason", OTHERS, ids=["network", "optimizer"])
def test_only_checkpoints_of_another_learner(tmp_path, kind, reason):
    learner(tmp_path, **kind).fit(1)
    stop = StopAt()
    with pytest.warns(UserWarning, match=reason): l = learner(tmp_path, callbacks=[stop]).fit(2)
    assert stop.began == 0 and same(weights(l), weights(learner().fit(2)))


@dataclass(frozen=True)
class ToyConfig(Config):
    lr: float = option(.1, "learning rate", low=0)
    system: ClassVar[str] = "toy"


def recorded(config, stop=-1, **more):
    """A recorded fit of five epochs; interrupted after `stop` steps."""
    began = StopAt(stop)
    with Run.create(config) as run:
        learner(run.path / "checkpoints", callbacks=[RecordCB(run, "train"), began], **more).fit(5)
    return run.path, began.began


def test_when_all_are_refused_it_starts_afresh_and_rows_are_not_doubled(tmp_path):
    expected = Run.open(recorded(ToyConfig(out=str(tmp_path / "whole")))[0]).metrics
    config = ToyConfig(out=str(tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt): recorded(config, 10)
    path = tmp_path / "cut" / "toy" / config.name
    assert len(Run.open(path).metrics) == 3
    for p in (path / "checkpoints").iterdir(): p.write_bytes(p.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="refused") as said: again, began = recorded(config)
    assert began == 0 and len([w for w in said if "refused" in str(w.message)]) == 3
    pd.testing.assert_frame_equal(Run.open(again).metrics, expected, check_exact=True)


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_newer_files_do_not_push_out_good_ones(tmp_path, keep):
    """A file that was refused must not count among those to keep: the next interruption would find
    nothing."""
    learner(tmp_path, keep=keep).fit(4)
    for p in tmp_path.iterdir(): p.write_bytes(p.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="refused"), pytest.raises(KeyboardInterrupt):
        learner(tmp_path, keep=keep, callbacks=[StopAt(8)]).fit(4)
    stop = StopAt()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        l = learner(tmp_path, keep=keep, callbacks=[stop]).fit(4)
    assert stop.began == 6 and same(weights(l), weights(learner().fit(4)))


def test_rows_of_an_epoch_are_not_doubled_when_its_last_step_was_saved_before_it_ended(tmp_path):
    """`every` divides the epoch: the last step is saved, the rows are written, and the process stops before
    the epoch is saved."""
    expected = Run.open(recorded(ToyConfig(out=str(tmp_path / "whole")), every=3)[0]).metrics

    class Between:
        def after_epoch(self, l):
            if l.epoch == 2: raise KeyboardInterrupt
    config = ToyConfig(out=str(tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt), Run.create(config) as run:
        learner(run.path / "checkpoints", callbacks=[RecordCB(run, "train"), Between()], every=3).fit(5)
    with Run.create(config) as run:
        learner(run.path / "checkpoints", callbacks=[RecordCB(run, "train"), StopAt()], every=3).fit(5)
    pd.testing.assert_frame_equal(Run.open(run.path).metrics, expected, check_exact=True)


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_file_and_leaves_nothing_behind(folder, monkeypatch, call):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    found = load_checkpoint(newest(folder))
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(newest(folder), {"w": torch.ones(9)}, {})
    with pytest.raises(OSError, match="No space left"): atomic_write(folder / "new.json", "{}")
    with pytest.raises(OSError, match="No space left"): learner(folder).fit(4)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    monkeypatch.undo()
    assert load_checkpoint(newest(folder)).state == found.state
    stop = StopAt()
    assert same(weights(learner(folder, callbacks=[stop]).fit(4)), weights(learner().fit(4)))
    assert stop.began == 9


def test_a_full_disk_marks_the_run_failed_with_the_reason(tmp_path, monkeypatch):
    config = ToyConfig(out=str(tmp_path))
    monkeypatch.setattr("visionbench.train.callbacks.save_checkpoint", full)
    with pytest.raises(OSError, match="No space left"): recorded(config)
    status = json.loads((tmp_path / "toy" / config.name / "status.json").read_text())
    assert status["state"] == "failed" and "No space left on device" in status["reason"]


def test_state_that_is_no_json_leaves_the_old_file(folder):
    before = newest(folder).read_bytes()
    with pytest.raises(TypeError): save_checkpoint(newest(folder), {}, dict(net=network()))
    assert newest(folder).read_bytes() == before and len([*folder.iterdir()]) == 3


def test_a_simulated_backdoor_never_loads_silently(tmp_path):
    path = save_checkpoint(tmp_path / "x.safetensors", {"w": torch.ones(1)}, {},
                           dict(warning="SIMULATED BACKDOOR: for testing"))
    with pytest.warns(UserWarning, match="x.safetensors: SIMULATED BACKDOOR"):
        assert load_checkpoint(path).tags["warning"]
    assert load_file(path)["w"] == 1
