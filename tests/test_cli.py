"""The command line: fixed names that scripts call, refusals before anything starts, and the installed wheel
outside a checkout."""
import json
import os
import subprocess
import sys
import sysconfig
import time
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, copy_tree
from endtoend import FIELDS
from toy import Toy
from typer.testing import CliRunner

from visionbench import __version__, cli
from visionbench.runs.record import Run


def call(*words):
    return CliRunner().invoke(cli.app, [str(w) for w in words])


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The toy as the only system of this process too, with two seeds of its run."""
    toy = Toy(tmp_path, monkeypatch)
    toy.paths = [Path(toy.here("train", "toy", "--seed", seed).stdout.strip()) for seed in (0, 1)]
    return toy


def test_list_json_has_the_agreed_fields():
    rows = json.loads(call("list", "--json").stdout)
    assert [set(r) for r in rows] == [{"system", "title", "presets", "description"}] * len(cli.SYSTEMS)
    assert [r["system"] for r in rows] == list(cli.SYSTEMS)
    assert rows[0]["presets"] == ["quick", "small", "paper", "released"]
    assert all(r["title"] and r["description"] for r in rows)


def test_module_and_program_are_the_same_and_list_is_fast():
    began = time.monotonic()
    by_module = subprocess.run([sys.executable, "-X", "importtime", "-m", "visionbench.cli", "list",
                                "--json"], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert by_module.returncode == 0 and json.loads(by_module.stdout)[0]["system"] == "backdoor"
    imported = {line.split("|")[-1].strip()
                for line in by_module.stderr.splitlines() if line.startswith("import time:")}
    assert not imported & {"torch", "pandas", "papermill", "matplotlib", "nbdev", "plotly",
                           "visionbench.runs.record"}
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(("words", "hint"), [
    (["run", "backdor"], "unknown system 'backdor'. Did you mean 'backdoor'?"),
    (["run", "backdoor", "--preset", "quik"],
     "unknown preset 'quik'. Did you mean 'quick'? Known: paper, quick, released, small."),
    (["run", "backdoor", "--set", "poisonrate=.1"],
     "unknown backdoor setting 'poisonrate'. Did you mean 'poison_rate'? Known: "),
    (["run", "backdoor", "--set", "poison_rate=10"], "poison_rate = 10.0 is outside 0 … 1 fraction."),
    (["run", "backdoor", "--set", "poison_rate=much"],
     "poison_rate = 'much' is str, expected float (fraction)."),
    (["run", "backdoor", "--set", "poison_rate=NaN"], "poison_rate = nan is outside"),
    (["run", "backdoor", "--set", "trigger=checkerbord"], "Did you mean 'checkerboard'?"),
    (["run", "backdoor", "--set", "poison_rate"], "--set wants key=value, got 'poison_rate'."),
    (["run", "backdoor", "--set", "seed=3"], "'seed' has an option of its own: --seed 3."),
    (["run", "backdoor", "--seed", "-1"], "seed = -1 is outside 0 … ∞."),
    (["run", "backdoor", "--device", "gpu"], "device 'gpu' is not one of auto, cpu, cuda, cuda:N, mps."),
    (["run", "backdoor", "--data", "/no/such"],
     "--data /no/such: no such folder; try `visionbench data backdoor`."),
    (["run", "backdoor", "--preset", "paper"],
     "cifar10 is not part of the install: give your copy as --data FOLDER."),
    (["run", "backdoor", "--data", "/"],
     "mnist5k comes with the install and reads no folder: leave out --data."),
    (["run", "backdoor", "nosuch"], "unknown system 'nosuch'."),
    (["train", "backdor"], "Did you mean 'backdoor'?"),
    (["data", "backdor"], "Did you mean 'backdoor'?"),
    (["show", "/no/such/run"], "no run folder: it has no settings.json."),])
def test_a_refusal_is_one_hint_and_starts_nothing(words, hint, tmp_path, monkeypatch):
    def start(*_, **__): raise AssertionError("something was started")
    monkeypatch.setattr("visionbench.runs.execute.execute", start)
    monkeypatch.chdir(tmp_path)
    done = call(*words)
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    assert done.stderr.startswith("visionbench: ") and hint in done.stderr and "Traceback" not in done.stderr
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("words", [["run"], ["run", "backdoor", "--nosuch"], ["nosuch"],
                                   ["run", "backdoor", "--seed", "one"]])
def test_words_that_are_no_command_are_a_usage_error(words):
    done = call(*words)
    assert done.exit_code == 2 and done.stdout == "" and "Usage:" in done.stderr


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "SYSTEMS", {"toy": "nosuchpackage"})
    assert isinstance(call("list").exception, ModuleNotFoundError)


def test_claims_json_on_an_empty_folder(tmp_path):
    rows = json.loads(call("claims", "--json", "--runs", tmp_path).stdout)
    assert rows and all({*FIELDS} <= {*r} for r in rows) and {r["system"] for r in rows} == set(cli.SYSTEMS)
    assert all(r["holds"] is None and r["measured"] is None and r["seeds"] == [] for r in rows)


def test_claims_over_two_seeds(toy):
    rows = {r["name"]: r for r in json.loads(call("claims", "--json", "--runs", toy.out).stdout)}
    assert {n: r["holds"] for n, r in rows.items()} == dict(small=True, smaller=False, other=None)
    assert (rows["small"]["measured"], rows["small"]["sd"], rows["small"]["seeds"]) == (0.125, 0.0, [0, 1])
    text = call("claims", "--runs", toy.out).stdout
    assert text.splitlines()[-1] == "3 claims: 1 hold, 1 do not, 1 not tested"
    assert "0.125 ± 0 (seeds 0, 1)" in text and "does not hold" in text and "not tested at this scale" in text


def test_a_number_that_is_none_is_null_in_json(toy):
    claims = toy.paths[0] / "claims.json"
    claims.write_text(claims.read_text().replace("0.125", "NaN"))
    text = call("claims", "--json", "--runs", toy.out).stdout
    assert "NaN" not in text and json.loads(text)[0]["measured"] is None


def test_show_tells_what_a_run_is(toy):
    done = call("show", toy.paths[1])
    assert done.exit_code == 0
    assert done.stdout.startswith(f"toy quick, changed: seed=1\n  {toy.paths[1]}\ndone after ")
    for line in ("halve       value                     0.125",
                 "holds                     the last value is at most 0.2", "metrics.parquet",
                 "checkpoints/"):
        assert line in done.stdout
    relative = call("show", os.path.relpath(toy.paths[0]))
    assert f"changed: nothing\n  {toy.paths[0]}" in relative.stdout


def test_data_tells_layout_source_and_licence():
    text = call("data", "backdoor").stdout
    for word in ("mnist5k", "cifar10", "licence", "obtain", "layout", "cifar-10-batches-py", "--data FOLDER"):
        assert word in text


def test_doctor_tells_what_is_here(monkeypatch):
    found = json.loads(call("doctor", "--json").stdout)
    assert found["visionbench"] == __version__ and found["kernel"] == sys.executable
    assert set(found["optional"]) >= {"chromium", "quarto", "nbdev"}
    assert found["devices"][-1].startswith("cpu") and all(found["packages"].values())
    monkeypatch.setattr(cli, "SYSTEMS", {"toy": "toysystem"})
    done = call("doctor")
    assert done.exit_code == 1 and "no notebook of toy" in done.stdout and "torchvision" in done.stdout


def test_docs_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call("docs")
    assert done.exit_code == 1 and done.stdout == ""
    assert "has no settings.ini: run this in a clone" in done.stderr


def test_version():
    assert call("--version").stdout == f"{__version__}\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the checkout."""
    source, dist = copy_tree(tmp_path_factory.mktemp("source")), tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-c",
                    "import sys, setuptools.build_meta as b; b.build_wheel(sys.argv[1])", dist],
                   cwd=source, check=True, capture_output=True, timeout=120)
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def program(wheel, tmp_path_factory):
    """`visionbench`, installed from the wheel into a new environment that sees this one's packages but not
    this checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                               capture_output=True, text=True, check=True).stdout.strip())
    with zipfile.ZipFile(wheel) as z:
        z.extractall(site)
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    # below a .pth, the .pth files of these folders do not count
    (site / "packages.pth").write_text("\n".join(here) + "\n")
    (folder / "bin" / "visionbench").write_text(f"#!{python}\nfrom visionbench.cli import main\nmain()\n")
    (folder / "bin" / "visionbench").chmod(0o755)
    return folder / "bin" / "visionbench"


def outside(program, cwd, *words, timeout=60):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env["OMP_NUM_THREADS"] = "2"
    return subprocess.run([program, *words], cwd=cwd, env=env, capture_output=True, text=True,
                          timeout=timeout, stdin=subprocess.DEVNULL)


def test_the_wheel_holds_every_module_and_notebook(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "visionbench").rglob("*.py")}
    experiments = {f"visionbench/experiments/{p.name}"
                   for p in (ROOT / "nbs" / "experiments").glob("*.ipynb")}
    assert modules | experiments <= names, sorted((modules | experiments) - names)
    entry = next(n for n in names if n.endswith("entry_points.txt"))
    script = zipfile.ZipFile(wheel).read(entry).decode().replace("visionbench=", "visionbench = ")
    assert "visionbench = visionbench.cli:main" in script


def test_the_wheel_works_outside_a_checkout(program, tmp_path):
    done = outside(program, tmp_path, "list", "--json")
    assert done.returncode == 0, done.stderr
    assert [r["system"] for r in json.loads(done.stdout)] == list(cli.SYSTEMS)
    doctor = json.loads(outside(program, tmp_path, "doctor", "--json").stdout)
    assert str(program.parent) in doctor["kernel"] and doctor["problems"] == []


@pytest.mark.slow
def test_the_wheel_runs_the_backdoor_system(program, tmp_path):
    if not (ROOT / "nbs" / "experiments" / "backdoor.ipynb").exists():
        pytest.skip("nbs/experiments/backdoor.ipynb does not exist yet")
    done = outside(program, tmp_path, "run", "backdoor", "--preset", "quick", timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = Path(done.stdout.splitlines()[-1])
    assert folder.is_absolute() and folder.parent == tmp_path / "runs" / "backdoor"
    assert done.stdout == f"{folder}\n"
    run = Run.open(folder)
    assert run.state == "done" and run.status["notebook"] == "done"
    assert all({*FIELDS} <= {*c} for c in run.claims)
    assert any(c["holds"] is not None for c in run.claims) and not list(tmp_path.glob("[!r]*"))
