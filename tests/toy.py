"""A small system for tests of runs and of the command line: written as a package into a folder, run by
`visionbench` like any other."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
from conftest import ROOT, code_notebook
from typer.testing import CliRunner

from visionbench import cli
from visionbench.runs import execute

CONFIG = '''
from dataclasses import dataclass
from typing import ClassVar
from visionbench.core.config import Config, option

@dataclass(frozen=True)
class ToyConfig(Config):
    method: str = option("halve", "halve needs no torch, learner trains a small net",
                         choices=("halve", "learner"))
    steps: int = option(3, "how often to halve", low=0)
    lr: float = option(.05, "learning rate", low=0)
    rates: tuple[float, ...] = option((.5, .25), "travels to the notebook and back")
    epochs: int = option(4, "of the learner", unit="epochs", low=1)
    system: ClassVar[str] = "toy"
    title: ClassVar[str] = "Halving"
    description: ClassVar[str] = "How small does one get?"
    quick = classmethod(lambda cls: cls())
    small = classmethod(lambda cls: cls(method="learner"))
    paper = classmethod(lambda cls: cls(steps=9))

CONFIG = ToyConfig
'''

CLAIMS = '''
from visionbench.runs.claims import Bound, Claim

def last(run): return run.metrics.value.iloc[-1] if run.settings["method"] == "halve" else None

CLAIMS = [Claim("small", "by hand", "the last value is at most 0.2", "0.125", last, Bound("≤", .2)),
          Claim("smaller", "by hand", "the last value is at most 0.01", "", last, Bound("≤", .01)),
          Claim("other", "by hand", "something that no toy measures", "", lambda run: None, Bound("≤", 1))]
'''

FIT = '''
import os
import signal
import sys
import time
from visionbench.runs.claims import write_claims
from visionbench.runs.record import Run
from .claims import CLAIMS

class Trouble:
    "What the environment asks for: slow steps, an interrupt."
    def before_fit(self, learner): print("training from step", learner.iteration, file=sys.stderr)

    def after_step(self, learner):
        time.sleep(float(os.environ.get("TOY_SLEEP", 0)))
        if learner.iteration == int(os.environ.get("TOY_INTERRUPT_AT", -1)): raise KeyboardInterrupt

def train(config, run):
    "A regression with dropout, momentum and a schedule: whatever must be restored for a bit-exact resume."
    import torch
    from torch import nn
    from visionbench.core.tensors import DictData, batches, generator
    from visionbench.train.callbacks import CheckpointCB, ProgressCB, RecordCB
    from visionbench.train.learner import Learner
    from visionbench.train.schedule import ScheduleCB, one_cycle
    draw = generator(config.seed, "data")
    x = torch.randn(64, 4, generator=draw)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(.2), nn.Linear(8, 1))
    loader = batches(DictData(x=x, y=x.sum(1, keepdim=True)), 8, seed=config.seed)
    folder = run.path / "checkpoints" / "train"
    sgd = torch.optim.SGD(net.parameters(), config.lr, momentum=.9)
    Learner(net, lambda out, b: dict(mse=(out - b["y"]).square().mean()), loader, sgd,
            [ScheduleCB(one_cycle(config.lr)), RecordCB(run, "train"), ProgressCB("train"),
             CheckpointCB(folder, f"{config.hash}/{config.seed}", every=5, keep=3), Trouble()],
            forward=lambda m, b: m(b["x"]), seed=config.seed, device="cpu").fit(config.epochs)

def fit(config):
    with Run.create(config) as run:
        if run.finished: return run
        if not config.steps: raise ValueError("nothing to halve in 0 steps")
        if config.method == "learner": train(config, run)
        else:
            for step in range(1, config.steps + 1):
                if step == int(os.environ.get("TOY_DIE_AT", -1)): os.kill(os.getpid(), signal.SIGKILL)
                run.log(stage="halve", epoch=1, step=step, name="value", value=.5 ** step)
        write_claims(run, CLAIMS)
    return run
'''

DRIVE = '''
import sys
from pathlib import Path
from visionbench import cli
from visionbench.runs import execute
cli.SYSTEMS = {"toy": "toysystem"}
execute.PLACES.append(Path(__file__).parent)
if __name__ == "__main__": cli.main()
'''

PARAMETERS = '''preset: str = "quick"  # name
seed: int = 0
device: str = "auto"
data: str = ""
out: str = ""
changes: dict = {}'''

CELLS = (
    "import os, sys\nimport matplotlib.pyplot as plt\n"
    "from toysystem.config import ToyConfig\nfrom toysystem.fit import fit",
    'if os.environ.get("TOY_BREAK") == "before": raise LookupError("a cell before fit")\n'
    "config = ToyConfig.start(preset, seed=seed, device=device, data=data, out=out, **changes)",
    "run = fit(config)\nprint(run)",
    "fig, ax = plt.subplots(figsize=(2, 1)); ax.plot(run.metrics.value); plt.show()",
    'if os.environ.get("TOY_BREAK") == "after": raise LookupError("a cell after fit")\nrun.claims',)


class Toy:
    """The toy in a folder; `toy.run()` is `visionbench run toy` in a process of its own, `toy.here("run",
    "toy")` in this one."""

    def __init__(self, folder, monkeypatch=None):
        self.folder, self.out = folder, folder / "runs"
        (folder / "toysystem").mkdir(parents=True)
        for name, text in dict(__init__="", config=CONFIG, claims=CLAIMS, fit=FIT).items():
            (folder / "toysystem" / f"{name}.py").write_text(text)
        (folder / "drive.py").write_text(DRIVE)
        self.write_notebook()
        if monkeypatch:
            self.enter(monkeypatch)

    def enter(self, monkeypatch):
        """Make the toy the only system of this process, until the test ends."""
        monkeypatch.syspath_prepend(self.folder)
        for name in [n for n in sys.modules if n.split(".")[0] == "toysystem"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(cli, "SYSTEMS", {"toy": "toysystem"})
        monkeypatch.setattr(execute, "PLACES", [self.folder, ROOT / "nbs" / "experiments"])
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(self.folder), str(ROOT)]))

    def here(self, *words):
        """Run a command in this process; `run` and `train` write into the toy's own folder of runs."""
        words = [*words, "--out", self.out] if words[0] in ("run", "train") else words
        return CliRunner().invoke(cli.app, [str(w) for w in words])

    def write_notebook(self, *cells, parameters=PARAMETERS, tags=("parameters",)):
        """Write toy.ipynb: parameters, then the usual cells or `cells`."""
        nb = code_notebook(parameters, *(cells or CELLS))
        nb.cells[0].metadata.tags = list(tags)
        nbformat.write(nb, self.folder / "toy.ipynb")

    def start(self, *words, **env):
        """Start a command in a process group of its own."""
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(self.folder), str(ROOT)]),
               "OMP_NUM_THREADS": "1", **env}
        # what a shell without job control starts in the background ignores Ctrl-C, and so do its children
        hear = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen([sys.executable, str(self.folder / "drive.py"), *map(str, words)],
                                cwd=self.folder, env=env, text=True, stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                                preexec_fn=hear)

    def call(self, *words, timeout=120, **env):
        """Run a command to its end; the result has returncode, stdout and stderr."""
        process = self.start(*words, **env)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            kill(process)
            raise
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def run(self, *words, **env):
        """`visionbench run toy …` into the toy's own folder of runs."""
        return self.call("run", "toy", "--out", self.out, *words, **env)

    def one(self):
        """The only run there is."""
        (folder,) = (self.out / "toy").iterdir()
        return folder


def children(pid):
    """Process ids of everything below a process."""
    return [p.pid for p in psutil.Process(pid).children(recursive=True)]


def kill(process, number=signal.SIGKILL):
    """Send a signal to a process and everything below it: kernels have a group of their own."""
    for pid in [process.pid, *children(process.pid)]:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass
    return process.communicate()


def wait_for(condition, seconds=60):
    """Wait until `condition()` is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def status(folder):
    """What status.json says."""
    return json.loads((Path(folder) / "status.json").read_text())
