"""Every notebook runs from top to bottom, as nbdev runs it: cells marked `eval: false` or with a flag of
settings.ini are left out."""
import os
import sys
import warnings

import pytest
from conftest import ROOT, code_notebook, notebooks

FILES = [pytest.param(path, id=path.relative_to(ROOT / "nbs").with_suffix("").as_posix())
         for path in notebooks()]


@pytest.fixture
def clean_process():
    """Give back the working folder, environment, paths and torch state that a notebook may have changed."""
    import matplotlib.pyplot as plt
    import torch

    cwd, env, paths = os.getcwd(), dict(os.environ), list(sys.path)
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    exact = torch.are_deterministic_algorithms_enabled()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), plt.rc_context():
        yield
    plt.close("all")
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(exact)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:] = paths


@pytest.mark.parametrize("path", FILES)
def test_notebook(path, clean_process, monkeypatch, capfd):
    from nbdev.config import get_config
    from nbdev.test import test_nb as run_notebook

    monkeypatch.chdir(ROOT)
    ran, _ = run_notebook(path, skip_flags=get_config().tst_flags.split(), basepath=ROOT)
    assert ran, f"{path.relative_to(ROOT)} failed:\n{capfd.readouterr().err}"


def test_a_failing_notebook_is_found(tmp_path, clean_process, capfd):
    """The runner above is no rubber stamp: a false assert fails, unless its cell is marked."""
    import nbformat
    from nbdev.test import test_nb as run_notebook

    for source, passes in (("assert 1 == 2", False), ("#| gpu\nassert 1 == 2", True),
                           ("#| eval: false\nassert 1 == 2", True)):
        path = tmp_path / "wrong.ipynb"
        nbformat.write(code_notebook(source), path)
        assert run_notebook(path, skip_flags=["gpu"])[0] is passes, source


def test_state_is_given_back():
    """What the fixture promises, seen after the notebooks have run."""
    import torch

    assert torch.get_default_dtype() is torch.float32 and "IN_TEST" not in os.environ
