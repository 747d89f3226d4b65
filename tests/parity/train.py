"""The learner against plain PyTorch loops, a killed and resumed fit against one that was left alone, two
processes against one."""
import hashlib
import math
import signal
import subprocess

import pandas as pd
import pytest
import torch
from conftest import launch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, OneCycleLR

from visionbench.core.tensors import DictData, batches
from visionbench.train.callbacks import ClipGradientCB
from visionbench.train.checkpoint import digest, load_checkpoint
from visionbench.train.learner import Learner
from visionbench.train.schedule import ScheduleCB, cosine, milestones, one_cycle

N, SIZE, EPOCHS, SEED = 50, 16, 3, 5
STEPS = EPOCHS * math.ceil(N / SIZE)
OPTIMIZERS = dict(sgd=lambda p: torch.optim.SGD(p, .1, momentum=.9, weight_decay=1e-3),
                  adam=lambda p: torch.optim.Adam(p, .01),
                  nesterov=lambda p: torch.optim.SGD(p, .05, momentum=.9, nesterov=True))
SCHEDULES = dict(one_cycle=(one_cycle(.2), lambda o: OneCycleLR(o, .2, total_steps=STEPS)),
                 cosine=(cosine(.003), lambda o: CosineAnnealingLR(o, STEPS, eta_min=.003)),
                 milestones=(milestones((1/3, 2/3)), lambda o: MultiStepLR(o, [4, 8], .1)))


def hashed(*keys):
    """The documented seeding rule, written down once more: 63 bits of the SHA-256 of the keys."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, keys)).encode()).digest()[:8], "little") >> 1


def order(epoch):
    return torch.randperm(N, generator=torch.Generator().manual_seed(hashed(SEED, "epoch", epoch)))


def data():
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(N, 6, generator=draw)
    return x, (x[:, :3].argmax(1) + (torch.rand(N, generator=draw) < .1)) % 3


def network(drop=0.):
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(drop), nn.Linear(16, 3))


class Trace:
    """Keep what each step saw."""
    def __init__(self): self.totals, self.rates, self.momenta = [], [], []

    def after_loss(self, learner):
        group = learner.optimizer.param_groups[0]
        self.totals.append(learner.total.item())
        self.rates.append(group["lr"])
        self.momenta.append(group.get("momentum"))


def ours(net, optimizer, *callbacks, **more):
    x, y = data()
    trace = Trace()
    loader = batches(DictData(x=x, label=y), SIZE, SEED)
    Learner(net, lambda out, b: dict(ce=F.cross_entropy(out, b["label"]), decay=.01 * out.square().mean()),
            loader, optimizer,
            [*callbacks, trace], forward=lambda m, b: m(b["x"]), seed=SEED, device="cpu", **more).fit(EPOCHS)
    return trace


def plain(net, optimizer, scheduler=None, clip=None, dtype=None):
    """The loop that everybody writes."""
    (x, y), trace = data(), Trace()
    torch.manual_seed(hashed(SEED, "fit"))
    net.train()
    for epoch in range(EPOCHS):
        for i in order(epoch).split(SIZE):
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                out = net(x[i])
            out = out.float()
            loss = F.cross_entropy(out, y[i]) + .01 * out.square().mean()
            group = optimizer.param_groups[0]
            trace.totals.append(loss.item())
            trace.rates.append(group["lr"])
            trace.momenta.append(group.get("momentum"))
            loss.backward()
            if clip: nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            if scheduler: scheduler.step()
    return trace


def same_bits(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(p, q) for p, q in zip(a.values(), b.values()))


@pytest.mark.parametrize("drop", [0., .3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_learner_equals_a_plain_loop_to_the_last_bit(optimizer, drop):
    mine, theirs, fresh = network(drop), network(drop), network(drop)
    make = OPTIMIZERS[optimizer]
    a, b = ours(mine, make(mine.parameters())), plain(theirs, make(theirs.parameters()))
    assert len(a.totals) == STEPS and a.totals == b.totals
    assert same_bits(mine, theirs) and not same_bits(mine, fresh)
    assert mine[1].num_batches_tracked == STEPS


def test_dropout_leaves_the_global_random_state_alone():
    torch.manual_seed(9)
    expected = torch.rand(3)
    net = network(.5)
    torch.manual_seed(9)
    ours(net, OPTIMIZERS["sgd"](net.parameters()))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_equal_schedulers_stepped_by_hand(name):
    mine, theirs = network(), network()
    our_optimizer, their_optimizer = (OPTIMIZERS["nesterov"](n.parameters()) for n in (mine, theirs))
    a = ours(mine, our_optimizer, ScheduleCB(SCHEDULES[name][0]))
    b = plain(theirs, their_optimizer, SCHEDULES[name][1](their_optimizer))
    assert a.rates == b.rates and a.momenta == b.momenta and a.totals == b.totals and same_bits(mine, theirs)
    assert len(set(a.rates)) == (3 if name == "milestones" else STEPS)


def test_schedules_equal_their_formulas():
    net = network()
    rates = ours(net, torch.optim.SGD(net.parameters(), .05), ScheduleCB(cosine(.003))).rates
    wanted = [.003 + (.05 - .003) * (1 + math.cos(math.pi * t / STEPS)) / 2 for t in range(STEPS)]
    assert rates == pytest.approx(wanted, rel=1e-9)
    net = network()
    rates = ours(net, torch.optim.SGD(net.parameters(), .05), ScheduleCB(milestones((1/3, 2/3)))).rates
    assert rates == pytest.approx([.05 * .1 ** (t // 4) for t in range(STEPS)], rel=1e-9)


def test_a_dry_run_shortens_the_schedule():
    net = network()
    trace = ours(net, torch.optim.SGD(net.parameters(), .05), ScheduleCB(cosine()), limit_batches=2)
    assert trace.rates == pytest.approx([.025 * (1 + math.cos(math.pi * t / 6)) for t in range(6)], rel=1e-9)
    assert net[1].num_batches_tracked == 6


@pytest.mark.parametrize("largest", [.05, 1e6])
def test_clipping_equals_torch(largest):
    mine, theirs, norms = network(), network(), []

    class Norm:
        def after_backward(self, learner):
            norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in learner.model.parameters())))
    a = ours(mine, OPTIMIZERS["sgd"](mine.parameters()), ClipGradientCB(largest), Norm())
    b = plain(theirs, OPTIMIZERS["sgd"](theirs.parameters()), clip=largest)
    assert a.totals == b.totals and same_bits(mine, theirs)
    assert max(norms) <= largest * (1 + 1e-6)
    assert min(norms) == pytest.approx(largest, rel=1e-3) if largest < 1 else max(norms) > .05


def test_bf16_equals_a_plain_autocast_loop():
    mine, theirs, full, seen = network(.3), network(.3), network(.3), []
    mine[4].register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    a = ours(mine, OPTIMIZERS["sgd"](mine.parameters()), precision="bf16")
    b = plain(theirs, OPTIMIZERS["sgd"](theirs.parameters()), dtype=torch.bfloat16)
    c = plain(full, OPTIMIZERS["sgd"](full.parameters()))
    assert set(seen) == {torch.bfloat16} and {p.dtype for p in mine.parameters()} == {torch.float32}
    assert a.totals == b.totals and same_bits(mine, theirs)
    assert a.totals != c.totals and a.totals == pytest.approx(c.totals, abs=.05)


RESUME = '''
import os, signal, sys
from dataclasses import dataclass
from typing import ClassVar
import torch
from torch import nn
from visionbench.core.config import Config, option
from visionbench.core.tensors import DictData, batches
from visionbench.runs.record import Run
from visionbench.train.callbacks import CheckpointCB, RecordCB
from visionbench.train.learner import Learner
from visionbench.train.schedule import ScheduleCB, one_cycle

@dataclass(frozen=True)
class ToyConfig(Config):
    method: str = option("sgd", "optimizer")
    system: ClassVar[str] = "toy"

class Die:
    "End the process without a word, at a step or at the end of an epoch."
    def __init__(self, event, at): self.event, self.at = event, at
    def after_step(self, learner):
        if self.event == "step" and learner.iteration == self.at: os.kill(os.getpid(), signal.SIGKILL)
    def after_epoch(self, learner):
        if self.event == "epoch" and learner.epoch == self.at: os.kill(os.getpid(), signal.SIGKILL)

def train(out, method, event="", at=0):
    config = ToyConfig(method=method, out=out)
    with Run.create(config) as run:
        torch.manual_seed(3)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(.3), nn.Flatten(),
                            nn.Linear(64, 3))
        x, y = torch.rand(40, 1, 6, 6), torch.randint(3, (40,))
        p = net.parameters()
        optimizer = torch.optim.Adam(p, .01) if method == "adam" else torch.optim.SGD(p, .05, momentum=.9)
        schedule = [ScheduleCB(one_cycle(.1))] if method == "one_cycle" else []
        def loss(out, b):
            return dict(ce=nn.functional.cross_entropy(out, b["label"]), size=.01 * out.square().mean())
        def accuracy(out, b): return (out.argmax(1) == b["label"]).float().mean()
        saving = CheckpointCB(run.path / "checkpoints" / "train", config.hash, every=2)
        Learner(net, loss, batches(DictData(image=x, label=y), 8, seed=4), optimizer,
                [*schedule, RecordCB(run, "train", accuracy=accuracy), Die(event, at), saving],
                seed=6, device="cpu").fit(4)

def killed(*given):
    "`train` in a process of its own, which is to die; the signal that ended it."
    pid = os.fork()
    if pid: return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try: train(*given)
    except BaseException as e: print(repr(e), file=sys.stderr, flush=True)
    os._exit(1)

root, kills = sys.argv[1], [k.split(",") for k in sys.argv[2:]]
once = nn.Linear(1, 1)  # what is imported on first use shall be there before the forks
Learner(once, lambda out, b: dict(out=out.sum()), batches(DictData(image=torch.ones(1, 1)), 1),
        torch.optim.SGD(once.parameters(), .1), device="cpu").fit(1)
print(*[killed(f"{root}/{event}{at}", method, event, int(at)) for method, event, at in kills])
for method, event, at in kills: train(f"{root}/{event}{at}", method)
for method in {k[0] for k in kills}: train(f"{root}/whole", method)
'''
# in the middle of an epoch, before the first checkpoint, and between the rows of an epoch and its checkpoint
KILLS = [("sgd", "step", 13), ("adam", "step", 13), ("one_cycle", "step", 13), ("one_cycle", "step", 1),
         ("one_cycle", "epoch", 2)]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Fits of three kinds, left alone, and killed in a process of their own and resumed."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "resume.py").write_text(RESUME)
    done = launch("resume", folder, *[",".join(map(str, k)) for k in KILLS], cwd=folder, processes=1,
                  stderr=subprocess.PIPE)
    assert list(map(int, done.stdout.split())) == [-signal.SIGKILL] * len(KILLS)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method,event,at", KILLS)
def test_resume_after_sigkill_equals_an_undisturbed_fit_to_the_last_bit(resumed, method, event, at):
    def parts(name):
        (found,) = [p for p in (resumed / name / "toy").iterdir()
                    if f'"method": "{method}"' in (p / "settings.json").read_text()]
        return pd.read_parquet(found / "metrics.parquet"), sorted((found / "checkpoints" / "train").iterdir())
    (expected, checkpoints), (got, others) = parts("whole"), parts(f"{event}{at}")
    assert len(expected) == 4 * 3 and expected.step.tolist() == [s for s in (5, 10, 15, 20) for _ in range(3)]
    pd.testing.assert_frame_equal(got, expected, check_exact=True)
    names = ["step-00000018.safetensors", "step-00000020.safetensors"]
    assert [p.name for p in others] == [p.name for p in checkpoints] == names
    for one, two in zip(map(load_checkpoint, others), map(load_checkpoint, checkpoints)):
        assert digest(one.tensors) == digest(two.tensors) and one.state == two.state
        bits = [{k: v.numpy().tobytes() for k, v in c.tensors.items()} for c in (one, two)]
        assert bits[0] == bits[1]
    assert two.tensors["model/1.num_batches_tracked"] == 20 and "rng/cpu" in two.tensors


PARALLEL = '''
import os, sys
from pathlib import Path
import torch
from torch import nn
from visionbench.core.tensors import DictData, batches
from visionbench.train import callbacks
from visionbench.train.learner import Learner

out, size = Path(sys.argv[1]), int(sys.argv[2])
rank = int(os.environ.get("RANK", 0))
save = callbacks.save_checkpoint
def noted(path, *rest):
    with open(out / f"writer-{rank}", "a") as f: f.write(f"{Path(path).name} ")
    return save(path, *rest)
callbacks.save_checkpoint = noted

def train(folder, epochs=2):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(48, 5)
    loader = batches(DictData(x=x, y=x.sin().sum(1, keepdim=True)), size, seed=1)
    learner = Learner(net, lambda o, b: dict(mse=(o - b["y"]).square().mean()), loader,
                      torch.optim.SGD(net.parameters(), .1, momentum=.9),
                      [callbacks.CheckpointCB(folder, every=4, keep=9)],
                      forward=lambda m, b: m(b["x"]), device="cpu").fit(epochs)
    learner.accelerator.wait_for_everyone()
    return learner, net

learner, net = train(out / "a")
facts = dict(processes=learner.accelerator.num_processes, steps=learner.iteration,
             backend=str(learner.accelerator.distributed_type))
torch.save(dict(facts=facts, net=net.state_dict()), out / f"rank-{rank}.pt")
if rank == 0:
    (out / "b").mkdir()
    name = "step-00000004.safetensors"
    (out / "b" / name).write_bytes((out / "a" / name).read_bytes())
learner.accelerator.wait_for_everyone()
torch.save(train(out / "b")[1].state_dict(), out / f"resumed-{rank}.pt")
'''


@pytest.fixture(scope="module")
def parallel(tmp_path_factory):
    """The same fit by two processes with batches of four, and by one with batches of eight."""
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "party.py").write_text(PARALLEL)
    for name, processes in (("two", 2), ("one", 1)):
        (folder / name).mkdir()
        launch("party", folder / name, 8 // processes, cwd=folder, processes=processes)
    return folder


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights_and_one_writes(parallel):
    one, two = torch.load(parallel / "two/rank-0.pt"), torch.load(parallel / "two/rank-1.pt")
    assert one["facts"] == two["facts"] and one["facts"]["processes"] == 2 and one["facts"]["steps"] == 12
    assert all(torch.equal(one["net"][k], two["net"][k]) for k in one["net"])
    assert (parallel / "two/writer-0").exists() and not (parallel / "two/writer-1").exists()
    names = sorted(p.name for p in (parallel / "two/a").iterdir())
    assert names == [f"step-{k:08}.safetensors" for k in (4, 6, 8, 12)]


@pytest.mark.slow
def test_two_processes_average_to_one_with_double_batches(parallel):
    two, one = torch.load(parallel / "two/rank-0.pt"), torch.load(parallel / "one/rank-0.pt")
    assert one["facts"]["processes"] == 1 and one["facts"]["steps"] == two["facts"]["steps"] == 12
    for k, v in one["net"].items(): torch.testing.assert_close(two["net"][k], v, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "two"])
def test_processes_resume_in_the_middle_of_an_epoch(parallel, name):
    whole = torch.load(parallel / name / "rank-0.pt")["net"]
    again = torch.load(parallel / name / "resumed-0.pt")
    for k, v in whole.items():
        assert torch.equal(again[k], v), f"{k} differs by {(again[k] - v).abs().max():.3g} after resuming"
