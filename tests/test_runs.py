"""A run through papermill, from the command line to the folder: kept, made again, resumed after a kill,
shared by two processes."""
import json
import os
import re
import signal
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest
from conftest import ROOT
from toy import Toy, children, kill, status, wait_for

from visionbench.runs import execute
from visionbench.runs.record import Run, RunError

SMALL = ("--preset", "small")  # the toy that trains with the Learner


@pytest.fixture
def toy(tmp_path, monkeypatch):
    return Toy(tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A toy whose small run was never disturbed, and how it was called."""
    toy = Toy(tmp_path_factory.mktemp("finished"))
    return toy, toy.run(*SMALL, TQDM_DISABLE="", MPLBACKEND="agg")


def assert_same_numbers(toy, finished):
    """The toy's only run has the rows of the undisturbed one, to the last bit."""
    pd.testing.assert_frame_equal(Run.open(toy.one()).metrics, Run.open(finished[0].one()).metrics,
                                  check_exact=True)


def test_a_run_prints_its_folder_and_nothing_else(finished):
    toy, done = finished
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{toy.one()}\n" and Path(done.stdout.strip()).is_absolute()
    assert re.fullmatch(r"small-[0-9a-f]{8}-s0", toy.one().name)


def test_a_run_is_a_complete_folder(finished):
    folder = finished[0].one()
    names = {p.name for p in folder.iterdir() if not p.name.startswith(".")}
    assert names == {"settings.json", "environment.json", "metrics.parquet", "claims.json", "status.json",
                     "run.ipynb", "checkpoints", "figures"}
    run = Run.open(folder)
    assert (run.state, run.status["notebook"], run.status["reason"]) == ("done", "done", "")
    assert run.settings["method"] == "learner" and run.settings["out"] == str(folder.parent.parent)
    assert run.checkpoint.is_file()
    assert run.metrics.query("name == 'mse'").epoch.tolist() == [1, 2, 3, 4]
    assert [c["holds"] for c in run.claims] == [None] * 3


def test_progress_is_shown_and_not_saved(finished):
    toy, done = finished
    assert "toy small seed 0" in done.stderr and "train:" in done.stderr
    assert "training from step 0" in done.stderr
    assert "without encryption" not in done.stderr and "Traceback" not in done.stderr
    cells = nbformat.read(toy.one() / "run.ipynb", as_version=4).cells
    stderr = "".join(o.text for c in cells for o in c.get("outputs", []) if o.output_type == "stream"
                     and o.name == "stderr")
    assert stderr == "training from step 0\n"


def test_the_notebook_keeps_figures_and_parameters(finished):
    cells = nbformat.read(finished[0].one() / "run.ipynb", as_version=4).cells
    # although MPLBACKEND was agg
    assert sum("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", [])) == 1
    assert 'preset = "small"' in cells[1].source and f'out = "{finished[0].out}"' in cells[1].source


def test_a_finished_run_is_kept_without_a_kernel(finished):
    toy, _ = finished
    before = (toy.one() / "run.ipynb").stat().st_mtime_ns
    (toy.folder / "toy.ipynb").rename(toy.folder / "away.ipynb")
    toy.write_notebook("raise SystemError('must not run')")
    again = toy.run(*SMALL)
    (toy.folder / "away.ipynb").rename(toy.folder / "toy.ipynb")
    assert again.returncode == 0 and again.stdout == f"{toy.one()}\n" and f"kept: {toy.one()}" in again.stderr
    assert (toy.one() / "run.ipynb").stat().st_mtime_ns == before


def test_another_version_is_told(finished, capsys):
    folder = finished[0].one()
    environment = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps(environment | dict(visionbench="0.0.1")))
    assert execute.keep(Run(folder)) == folder
    said = capsys.readouterr()
    (folder / "environment.json").write_text(json.dumps(environment))
    assert "note: it was made with visionbench 0.0.1 (now " in said.err and said.out == ""


def test_settings_reach_the_notebook_and_fresh_starts_anew(toy, monkeypatch):
    other = toy.folder / "jupyter" / "kernels" / "python3"  # a kernel of another Python under the usual name
    other.mkdir(parents=True)
    (other / "kernel.json").write_text(
        json.dumps(dict(argv=["/bin/false"], display_name="Python 3", language="python")))
    words = ("--set", "rates=[1e-3, 2]", "--set", "steps=2", "--seed", "7")
    first = toy.run(*words, JUPYTER_PATH=str(toy.folder / "jupyter"))
    assert first.returncode == 0, first.stderr
    settings = Run.open(toy.one()).settings
    assert (settings["rates"], settings["steps"], settings["seed"]) == ([0.001, 2.0], 2, 7)
    assert toy.one().name.endswith("-s7")
    metrics = pd.read_parquet(toy.one() / "metrics.parquet")
    started, extra = status(toy.one())["started"], toy.one() / "figures" / "old.png"
    extra.write_text("")
    (toy.one() / "status.json").write_text('{"state": "do')  # damaged: only --fresh gets past it
    second = toy.run(*words, "--fresh")
    assert second.returncode == 0 and second.stdout == first.stdout and "kept" not in second.stderr
    assert status(toy.one())["started"] > started and not extra.exists()
    pd.testing.assert_frame_equal(pd.read_parquet(toy.one() / "metrics.parquet"), metrics, check_exact=True)


@pytest.mark.slow
def test_resume_after_kill_9_equals_an_undisturbed_run(toy, finished):
    process = toy.start("run", "toy", "--out", toy.out, *SMALL, TOY_SLEEP="0.1")
    wait_for(lambda: len([*toy.out.rglob("*.safetensors")]) >= 3)  # steps 5, 8 and 10 of 32
    kernels = children(process.pid)
    kill(process)
    assert kernels and Run.open(toy.one()).state == "interrupted"
    after = toy.run(*SMALL)
    assert after.returncode == 0, after.stderr
    begun = int(re.search(r"training from step (\d+)", after.stderr)[1])
    assert 10 <= begun < 32
    assert_same_numbers(toy, finished)
    assert status(toy.one())["notebook"] == "done"


@pytest.mark.slow
def test_two_processes_share_one_run(toy, finished):
    both = [toy.start("run", "toy", "--out", toy.out, *SMALL, TOY_SLEEP="0.05") for _ in range(2)]
    said = [p.communicate(timeout=180) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert said[0][0] == said[1][0] == f"{toy.one()}\n"
    assert sum("training from step" in err for _, err in said) == 1
    assert sum("waiting: another process" in err and "kept:" in err for _, err in said) == 1
    assert_same_numbers(toy, finished)


@pytest.mark.slow
def test_ctrl_c_ends_the_kernel_and_leaves_a_run_to_resume(toy):
    process = toy.start("run", "toy", "--out", toy.out, *SMALL, TOY_SLEEP="0.2")
    wait_for(lambda: [*toy.out.rglob("*.safetensors")])
    kernels = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and "interrupted; the same command resumes" in err
    assert "Traceback" not in err
    wait_for(lambda: not any(psutil.pid_exists(k) for k in kernels), 20)
    run = Run.open(toy.one())
    assert run.state == "interrupted" and run.status["reason"] == "interrupted by KeyboardInterrupt"
    assert run.checkpoint.is_file()


def test_train_gives_the_same_numbers_without_a_notebook(toy, finished):
    done = toy.here("train", "toy", *SMALL)
    assert done.exit_code == 0 and done.stdout == f"{toy.one()}\n" and not (toy.one() / "run.ipynb").exists()
    assert_same_numbers(toy, finished)


def test_every_system_has_its_notebook():
    from visionbench.cli import SYSTEMS
    for system in SYSTEMS:
        assert execute.find_notebook(system) == ROOT / "nbs" / "experiments" / f"{system}.ipynb"
    with pytest.raises(RunError, match="no notebook nosuch.ipynb in"):
        execute.find_notebook("nosuch")
