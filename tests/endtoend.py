"""What the end-to-end tests of the systems share: the form of a claim's record, and runs that are killed in
the middle and started again.

`resumed` is for tests; it runs a script, in a process of its own, that calls `kill_and_resume`."""
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run
from safetensors.torch import load_file

from visionbench.core.tensors import DictData, batches
from visionbench.runs.record import Run
from visionbench.train.checkpoint import digest
from visionbench.train.learner import Learner

FIELDS = ["system", "name", "source", "statement", "published", "measured", "sd", "seeds", "holds"]


def check_records(run, claims):
    """The records of a run are those of its system's claims, and measured again from the folder they are the
    same."""
    assert [c["name"] for c in run.claims] == [c.name for c in claims]
    assert len({c.name for c in claims}) == len(claims)
    system, seed = run.settings["system"], run.settings["seed"]
    for record, claim in zip(run.claims, claims):
        assert list(record) == FIELDS and record["system"] == system and record["source"]
        assert record["statement"] == claim.statement
        assert record["holds"] in (True, False, None) and record["sd"] is None
        assert record["seeds"] == ([] if record["holds"] is None else [seed])
        again = claim.record(system, {seed: claim.measure(run)})
        if claim.name == "quick_time":
            assert again["measured"] == pytest.approx(record["measured"], abs=1)
            assert again["holds"] in (True, False)
            again |= {k: record[k] for k in ("measured", "holds")}
        assert again == record


def resumed(script, folder, kills, timeout=240):
    """The runs that a script with `kill_and_resume` leaves in a folder, by their name; `kills` are pairs of a
    name and a step."""
    (folder / "resume.py").write_text(script)
    done = run(sys.executable, folder / "resume.py", folder, *[f"{name},{step}" for name, step in kills],
               cwd=ROOT, timeout=timeout, stderr=subprocess.PIPE, OMP_NUM_THREADS="1", TQDM_DISABLE="1",
               PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    signals, *paths = done.stdout.splitlines()
    assert signals.split() == [str(-signal.SIGKILL)] * len(kills), done.stderr
    return {name: Run.open(path) for name, path in zip(dict.fromkeys(["whole", *dict(kills)]), paths)}


def same_tensors(one, two):
    """The tensor files of two runs, below their folders: the same, to the last bit."""
    files, others = ({p.relative_to(r.path) for p in r.path.rglob("*.safetensors")} for r in (one, two))
    assert files == others and one.path.name == two.path.name
    for p in files:
        assert digest(load_file(one.path / p)) == digest(load_file(two.path / p)), p
    return files


def die():
    """End this process without a word."""
    os.kill(os.getpid(), signal.SIGKILL)


class Die:
    """A callback that ends the process at a step."""

    def __init__(self, step):
        self.step = step

    def after_step(self, learner):
        if learner.iteration == self.step:
            die()


def killed(fit, config, doom, name, step):
    """`fit` in a process of its own, which is to die; the signal that ended it."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        doom(name, int(step))
        fit(config)
    except BaseException as e:
        print(repr(e), file=sys.stderr, flush=True)
    os._exit(1)


def kill_and_resume(fit, config, doom):
    """For each `name,step` of the command line, kill `fit` where `doom(name, step)` says, in a folder of that
    name; print the signals, then the runs: one in a folder where nothing died, and those that go on."""
    root, kills = sys.argv[1], [k.split(",") for k in sys.argv[2:]]
    once = torch.nn.Linear(1, 1)  # what is imported on first use shall be there before the forks
    Learner(once, lambda out, b: dict(out=out.sum()), batches(DictData(image=torch.ones(1, 1)), 1),
            torch.optim.Adam(once.parameters(), .1), device="cpu").fit(1)
    print(*[killed(fit, config.replace(out=f"{root}/{name}"), doom, name, step) for name, step in kills])
    for name in dict.fromkeys(["whole", *dict(kills)]):
        print(fit(config.replace(out=f"{root}/{name}")).path)
