"""Two processes train what one does with batches twice as large. Skipped where torch has no gloo."""
import pytest
import torch
from conftest import launch
from safetensors.torch import load_file

from visionbench.runs.record import Run

pytestmark = pytest.mark.slow
SMALL = {
    "plwf": ("streams=digits", "networks=mlp", "hidden=16", "epochs=1", "replicas=1", "limit_batches=2",
             "methods=lwf,plwf+credit", "local_methods="),
    "daenr": ("images=48", "neurons=10", "test_images=16", "repeats=4", "unseen=24", "epochs=2", "latent=16",
              "limit_batches=2", "variants=nr,dae_nr"),
    "backdoor": ("depth=8", "width=4", "limit_batches=1", "pretrain_epochs=1", "attacker_epochs=1",
                 "inject_epochs=1", "victim_epochs=1"),
}


def train(system, out, processes, *more):
    """A run made by some processes, as a user would start it."""
    settings = [word for pair in (*SMALL[system], *more) for word in ("--set", pair)]
    out.mkdir(exist_ok=True)
    launch("visionbench.cli", "train", system, "--device", "cpu", "--out", out, *settings, cwd=out,
           processes=processes)
    folder, = out.glob(f"{system}/*")
    return Run.open(folder)


@pytest.mark.parametrize("system", ["daenr", "backdoor"])
def test_a_system_trains_in_two_processes(system, tmp_path):
    done = train(system, tmp_path, 2)
    assert done.state == "done" and done.checkpoints and len(done.claims) > 5
    assert not done.metrics.drop(columns="value").duplicated().any()             # one process writes


def test_continual_learning_in_two_processes_is_that_of_twice_the_batch(tmp_path):
    two, one = (train("plwf", tmp_path / str(n), n, f"batch={32 // n}") for n in (2, 1))
    files = sorted(p.relative_to(one.path) for p in one.path.rglob("task-*.safetensors"))
    assert len(files) == 10 and files == sorted(p.relative_to(two.path) for p in
                                                two.path.rglob("task-*.safetensors"))
    for file in files:
        a, b = load_file(one.path / file), load_file(two.path / file)
        assert all(torch.allclose(a[k].float(), b[k].float(), atol=1e-5) for k in a), file
    cosine = [r.metrics.query("name == 'cosine'").value for r in (one, two)]
    assert len(cosine[0]) > 5 and abs(cosine[0].array - cosine[1].array).max() < 1e-3
