"""What goes wrong with runs: folders that cannot be written, cells that fail, numbers that explode, files
that are damaged."""
import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
from toy import Toy, status
from typer.testing import CliRunner

from visionbench import cli
from visionbench.runs.execute import ExecuteError
from visionbench.runs.record import Run, RunError
from visionbench.train.checkpoint import load_checkpoint, save_checkpoint
from visionbench.train.learner import NonFiniteLoss

SMALL = ("--preset", "small")


@pytest.fixture
def toy(tmp_path, monkeypatch):
    return Toy(tmp_path, monkeypatch)


@pytest.fixture
def fit(toy):
    """The toy's `fit` in this process; called with changes on its small preset."""
    from toysystem.config import ToyConfig
    from toysystem.fit import fit as toy_fit
    return lambda **changes: toy_fit(ToyConfig.start("small", out=str(toy.out), **changes))


@pytest.mark.parametrize("out", ["file/runs", "file", "/proc/runs"])
def test_an_output_folder_that_cannot_be_written_starts_nothing(toy, out):
    (toy.folder / "file").write_text("in the way")
    done = toy.call("run", "toy", "--out", out)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert "cannot write the run folder" in done.stderr and str(Path(toy.folder, out)) in done.stderr
    assert not [*toy.folder.rglob("run.ipynb")]
    trained = CliRunner().invoke(cli.app, ["train", "toy", "--out", str(toy.folder / out)])
    assert trained.exit_code == 2 and "cannot write the run folder" in trained.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_starts_nothing(toy):
    toy.out.mkdir(mode=0o555)
    done = toy.run()
    assert done.returncode == 2 and "cannot write the run folder" in done.stderr
    assert "Permission denied" in done.stderr


def test_a_cell_that_fails(toy, monkeypatch):
    monkeypatch.setenv("TOY_BREAK", "before")
    broken = toy.here("run", "toy")
    run = Run.open(toy.one())
    assert broken.exit_code == 1 and broken.stdout == "" and "Traceback" not in broken.stderr
    assert f"visionbench: LookupError: a cell before fit\nsee run.ipynb in {run.path}" in broken.stderr
    assert run.state == "failed" and run.status["reason"] == "LookupError: a cell before fit"
    assert run.settings["system"] == "toy"
    assert "LookupError: a cell before fit" in (run.path / "error.txt").read_text()
    cells = nbformat.read(run.path / "run.ipynb", as_version=4).cells
    assert any(o.output_type == "error" for c in cells for o in c.get("outputs", []))

    # the failed run is redone; now something fails when the training is over
    monkeypatch.setenv("TOY_BREAK", "after")
    broken = toy.here("run", "toy")
    assert broken.exit_code == 1 and "LookupError: a cell after fit" in broken.stderr
    assert run.state == "done" and run.status["notebook"] == "failed: LookupError: a cell after fit"
    assert len(run.metrics) == 3
    assert run.status["history"][0]["reason"] == "LookupError: a cell before fit"

    monkeypatch.delenv("TOY_BREAK")  # which costs no second training
    started, done = run.status["started"], toy.here("run", "toy")
    assert done.exit_code == 0 and done.stdout == f"{run.path}\n"
    assert (run.status["started"], run.status["notebook"]) == (started, "done")
    assert not (run.path / "error.txt").exists()


def test_a_failure_inside_fit_keeps_its_traceback(toy):
    broken = toy.here("run", "toy", "--set", "steps=0")
    assert broken.exit_code == 1 and "ValueError: nothing to halve in 0 steps" in broken.stderr
    assert "Traceback" not in broken.stderr
    assert status(toy.one())["state"] == "failed"
    assert 'raise ValueError("nothing to halve' in (toy.one() / "error.txt").read_text()


def test_one_failure_does_not_stop_the_next_system(fit, monkeypatch):
    def execute(config, fresh):
        if config.system == "bad": raise ExecuteError("NameError: no such name")
        return Path("/runs/toy")
    monkeypatch.setattr("visionbench.runs.execute.execute", execute)
    monkeypatch.setattr(cli, "kind_of", lambda system: SimpleNamespace(system=system))
    monkeypatch.setattr(cli, "configure", lambda kind, *_: kind)
    done = CliRunner().invoke(cli.app, ["run", "bad", "toy"])
    assert (done.exit_code, done.stdout) == (1, "/runs/toy\n")
    assert done.stderr == "visionbench: NameError: no such name\n"


def test_a_notebook_that_takes_no_parameters_starts_nothing(toy):
    toy.write_notebook(tags=())
    done = toy.here("run", "toy")
    assert done.exit_code == 2 and "does not take changes, data, device, out, preset, seed" in done.stderr
    assert not (toy.one() / "run.ipynb").exists()


def test_a_notebook_that_makes_no_run(toy):
    toy.write_notebook("preset")
    done = toy.here("run", "toy")
    assert done.exit_code == 1 and "ended without a finished run" in done.stderr


def test_a_kernel_that_dies(toy, monkeypatch):
    monkeypatch.setenv("TOY_DIE_AT", "2")
    died = toy.here("run", "toy")
    assert died.exit_code == 1 and "Kernel died; run again to resume from the last checkpoint" in died.stderr
    assert "Traceback" not in died.stderr
    assert Run.open(toy.one()).state == "interrupted"


def test_a_truncated_checkpoint_is_passed_over(toy, fit, monkeypatch):
    whole = fit().metrics
    shutil.rmtree(toy.out)
    monkeypatch.setenv("TOY_INTERRUPT_AT", "12")
    with pytest.raises(KeyboardInterrupt):
        fit()
    monkeypatch.delenv("TOY_INTERRUPT_AT")
    *_, older, newest = sorted((toy.one() / "checkpoints" / "train").iterdir())
    assert (older.stem, newest.stem) == ("step-00000008", "step-00000010")
    newest.write_bytes(newest.read_bytes()[:-100])
    resumed = toy.here("run", "toy", *SMALL)
    assert resumed.exit_code == 0, resumed.stderr
    assert "checkpoint refused, trying an older one" in resumed.stderr and newest.name in resumed.stderr
    assert "training from step 8" in resumed.stderr
    nb = nbformat.read(toy.one() / "run.ipynb", as_version=4)
    said = [o.get("text", "") for c in nb.cells for o in c.get("outputs", [])]
    assert any("checkpoint refused" in text for text in said), "the warning must stay in the notebook"
    pd.testing.assert_frame_equal(Run.open(toy.one()).metrics, whole, check_exact=True)


def test_a_foreign_checkpoint_is_passed_over(toy, fit, monkeypatch, capsys):
    whole = fit(seed=1).metrics
    shutil.rmtree(toy.out)
    monkeypatch.setenv("TOY_INTERRUPT_AT", "12")
    with pytest.raises(KeyboardInterrupt):
        fit(seed=1)
    monkeypatch.delenv("TOY_INTERRUPT_AT")
    newest = max((toy.one() / "checkpoints" / "train").iterdir())
    found = load_checkpoint(newest)
    save_checkpoint(newest.with_name("step-00000031.safetensors"), found.tensors,
                    found.state | dict(signature="another/0"))
    with pytest.warns(UserWarning, match="belongs to other settings .'another/0'"):
        again = fit(seed=1).metrics
    assert "training from step 10" in capsys.readouterr().err
    pd.testing.assert_frame_equal(again, whole, check_exact=True)


def test_a_loss_that_explodes_names_step_term_and_rate(toy, fit):
    with pytest.raises(NonFiniteLoss):
        fit(lr=1e20)
    run = Run.open(toy.one())
    assert run.state == "failed" and run.path.is_dir()
    reason = run.status["reason"]
    assert reason.startswith("NonFiniteLoss: loss is not finite at step ") and "mse = " in reason
    assert "learning rate " in reason
    assert "NonFiniteLoss" in (run.path / "error.txt").read_text()
    assert fit(lr=.05).state == "done"


def test_a_full_disk_fails_the_run_and_leaves_no_half_file(toy, fit, monkeypatch):
    fsync, name = os.fsync, "step-00000010"
    def full(handle):
        if name in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)
    if not Path("/proc/self/fd").exists(): pytest.skip("needs /proc to know which file is written")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        fit()
    run = Run.open(toy.one())
    assert run.state == "failed" and "No space left on device" in run.status["reason"]
    kept = sorted(p.name for p in (run.path / "checkpoints" / "train").iterdir())
    assert kept == ["step-00000005.safetensors", "step-00000008.safetensors"]


@pytest.mark.parametrize("text", ['{"state": "do', "", "\x80"])
def test_a_damaged_status_is_named(toy, fit, text):
    file = fit(method="halve").path / "status.json"
    file.write_bytes(text.encode("latin-1"))
    for words in (("run", "toy", *SMALL, "--set", "method=halve"), ("show", file.parent),
                  ("claims", "--runs", toy.out)):
        done = toy.here(*words)
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr.startswith(f"visionbench: {file} is damaged")


def test_damaged_metrics_and_settings_are_named(toy, fit):
    run = Run.open(fit().path)
    for name, read in (("metrics.parquet", lambda: run.metrics), ("settings.json", lambda: run.settings),
                       ("claims.json", lambda: run.claims)):
        kept = (run.path / name).read_bytes()
        (run.path / name).write_bytes(kept[: len(kept) // 2])
        with pytest.raises(RunError, match=f"{name} is damaged"):
            read()
        (run.path / name).write_bytes(kept)
    assert json.loads((run.path / "settings.json").read_text())["system"] == "toy"
