"""Serve the notebooks on this machine and print the address: JupyterLab, and Voila where there are dashboards."""
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def free_port(first):
    """The first free port of this machine from `first` on."""
    for port in range(first, first + 100):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)):
                return port
    sys.exit(f"visionbench: no free port between {first} and {first + 99}")


def lab(folder, token):
    """Start JupyterLab on `folder`; its process and the address to open."""
    port = free_port(8888)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--ServerApp.root_dir={folder}", "--ip=127.0.0.1",
               f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", "--log-level=WARN"]
    root = ["--allow-root"] if hasattr(os, "getuid") and os.getuid() == 0 else []
    first = next((p for p in sorted(folder.rglob("experiments/*.ipynb")) if ".venv" not in p.parts), None)
    page = f"/tree/{first.relative_to(folder).as_posix()}" if first else ""
    return subprocess.Popen(command + root), f"http://localhost:{port}/lab{page}?token={token}"


def voila():
    """Start Voila on the dashboards, if there are any; its process and address, or None."""
    folder = ROOT / "nbs" / "dashboards"
    if not any(folder.glob("*.ipynb")) or not shutil.which("voila", path=str(Path(sys.executable).parent)):
        return None
    port = free_port(8866)
    command = [sys.executable, "-m", "voila", str(folder), "--no-browser", f"--port={port}"]
    return subprocess.Popen(command), f"http://localhost:{port}/"


def main():
    folder = (ROOT / (sys.argv[1] if len(sys.argv) > 1 else ".")).resolve()
    servers = [("notebooks", lab(folder, secrets.token_hex(16))), ("dashboards", voila())]
    running = [(name, *server) for name, server in servers if server]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    for name, _, address in running:
        print(f"{name + ':':12}{address}", flush=True)
    print("Ctrl-C ends them", flush=True)
    try:
        for _, process, _ in running:
            process.wait()
    except KeyboardInterrupt:
        pass
    finally:
        for _, process, _ in running:
            process.terminate()


main()
