"""Make `.venv` and install visionbench into it with the pinned requirements: what every Makefile target needs first.

    python3 .ci/environment.py setup [.venv]     make or refresh the environment (`make setup`)
    python  .ci/environment.py constraints       pin constraints.txt again from settings.ini (`make constraints`)

Standard library only, and no syntax newer than Python 3.6, so that an old python3 gets a message, not a traceback.
"""
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NO_NETWORK = re.compile(r"dns error|resolve|connection (error|refused|reset|broken)|unreachable|timed? ?out|connecterror"
                        r"|failed to (fetch|download)|could not connect|no matching distribution found for uv", re.I)
ELSEWHERE = re.compile(r"== '(win32|darwin|linux|nt|emscripten)'")  # packages of one platform only
CUDA = re.compile(r"^(nvidia-|cuda-|triton)")  # torch names its own, and a CPU build has none


def stop(line):
    """End with one line on stderr."""
    sys.exit("visionbench: " + line)


def check_python(need=(3, 11)):
    """Stop when this interpreter is too old, or cannot make environments."""
    if sys.version_info < need:
        better = next((n for n in ("python3.13", "python3.12", "python3.11") if works(Path(shutil.which(n) or "none"))), None)
        hint = "try `make PYTHON=%s`" % better if better else "install one, or give its path: `make PYTHON=/path/to/python3`"
        stop("Python %d.%d or later is needed, %s is %d.%d; %s" % (need + (sys.executable,) + sys.version_info[:2] + (hint,)))
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        stop("%s has no venv module; install it (Debian, Ubuntu: apt-get install python3-venv)" % sys.executable)


def check_disk(venv):
    """Stop when the packages cannot fit: 8 GB with the CUDA libraries, 3 GB with the CPU build of torch."""
    if any(venv.glob("lib/python*/site-packages/torch/__init__.py")):
        return
    need = 3 if os.environ.get("TORCH_BACKEND") == "cpu" else 8
    free = shutil.disk_usage(str(ROOT)).free / 1e9
    if free < need:
        hint = "" if need == 3 else " (TORCH_BACKEND=cpu needs 3 GB)"
        stop("%.1f GB free in %s, %d GB needed for the packages%s" % (free, ROOT, need, hint))


def works(python):
    """Is `python` an interpreter that starts and is new enough?"""
    test = "import sys; sys.exit(sys.version_info < (3, 11))"
    return python.exists() and subprocess.call([str(python), "-c", test], stderr=subprocess.DEVNULL) == 0


def make_venv(venv):
    """Make the environment and put uv into it; a broken or outdated one is made anew."""
    python = venv / "bin" / "python"
    if not works(python):
        print("making", venv.name, "with", sys.executable, flush=True)
        if subprocess.call([sys.executable, "-m", "venv", "--clear", str(venv)]):
            stop("`%s -m venv %s` failed, see above" % (sys.executable, venv.name))
    if not (venv / "bin" / "uv").exists():
        pins = str(ROOT / "constraints.txt")
        run([str(python), "-m", "pip", "install", "--quiet", "--retries", "2", "uv", "-c", pins], "installing uv", quiet=True)
    return python


def install(venv, python):
    """Install visionbench, editable, with its development tools."""
    command = [str(venv / "bin" / "uv"), "pip", "install", "--python", str(python), "-e", ".[dev]", "-c", "constraints.txt"]
    if os.environ.get("TORCH_BACKEND"):
        command += ["--torch-backend", os.environ["TORCH_BACKEND"]]
    run(command, "installing visionbench")


def run(command, doing, quiet=False):
    """Run `command` in the checkout; on failure say in one line what went wrong."""
    print(doing, flush=True)
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True) if quiet else {}
    done = subprocess.run(command, cwd=str(ROOT), **pipe)
    if done.returncode == 0:
        return
    if not quiet:  # uv showed its own progress and message; ask once more, without installing, for the reason
        pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
        done = subprocess.run(command + ["--dry-run"], cwd=str(ROOT), **pipe)
    if shutil.disk_usage(str(ROOT)).free < 5e8:
        stop("%s failed: the disk is full" % doing)
    if NO_NETWORK.search(done.stdout or ""):
        stop("%s failed: no network, the package index cannot be reached (a proxy is read from HTTPS_PROXY)" % doing)
    stop("%s failed: %s" % (doing, " ".join((done.stdout or "see above").split())[-400:]))


def git_hooks():
    """Turn on the tracked hooks and the notebook merge driver, where this is a git checkout."""
    if not (shutil.which("git") and (ROOT / ".git").exists()):
        return
    for key, value in (("core.hooksPath", ".githooks"), ("include.path", "../.gitconfig")):
        subprocess.call(["git", "config", "--local", key, value], cwd=str(ROOT))


def setup(folder=".venv"):
    """Make or refresh the environment in `folder`."""
    check_python()
    venv = ROOT / folder
    check_disk(venv)
    install(venv, make_venv(venv))
    git_hooks()


def constraints():
    """Pin every requirement of settings.ini, one version for all Pythons and platforms, without index addresses."""
    ini = ConfigParser(delimiters=["="], interpolation=None)
    ini.read(str(ROOT / "settings.ini"))
    wanted = "\n".join((ini["DEFAULT"]["requirements"] + " " + ini["DEFAULT"]["dev_requirements"]).split() + ["uv"])
    flags = "--universal --fork-strategy fewest --python-version 3.11 --strip-extras --no-annotate --no-header --no-emit-index-url"
    command = [str(Path(sys.executable).with_name("uv")), "pip", "compile", "-", "--quiet", "--upgrade"] + flags.split()
    pins = subprocess.run(command, input=wanted, stdout=subprocess.PIPE, universal_newlines=True, check=True).stdout
    keep = [p.split(" ;")[0] for p in pins.splitlines() if not CUDA.match(p) and not ELSEWHERE.search(p)]
    head = "# Versions this release was tested with; made by `make constraints`, never edited by hand.\n"
    (ROOT / "constraints.txt").write_text(head + "\n".join(keep) + "\n")
    print(len(keep), "pins in constraints.txt")


if __name__ == "__main__":
    {"setup": setup, "constraints": constraints}[sys.argv[1]](*sys.argv[2:])
