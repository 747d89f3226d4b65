# visionbench: `make demo` shows it, `make test` checks it. Each makes the environment it needs in .venv first.
#   PYTHON=python3.12     another interpreter to build .venv with
#   TORCH_BACKEND=cpu     the small CPU build of torch (any name `uv pip install --torch-backend` knows)
#   SERVE=0               `make demo` stops after the claims board
#   SYSTEMS="backdoor"    the systems `make demo` runs (default: all)
#   PARTS="layers docs"   the parts `make test` runs (default: all)

PYTHON ?= python3
BIN    := .venv/bin
READY  := .venv/.ready
export TORCH_BACKEND

help:
	@echo "make demo       run every system on the data that comes with it, check its claims, open the notebooks"
	@echo "make test       all checks, one summary line a part"
	@echo "make setup      the environment only, in .venv"
	@echo "make lab        JupyterLab on nbs/"
	@echo "make docs       the site, in _docs/"
	@echo "make notebooks  run the notebooks again, save their outputs, export and clean"
	@echo "make clean      delete the site and the caches (.venv and runs/ stay)"

$(READY): settings.ini setup.py constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "visionbench: no $(PYTHON) on PATH; install Python 3.11 or later, or give one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) .ci/environment.py setup .venv
	@touch $@

setup: $(READY)

demo: $(READY)
	@systems="$${SYSTEMS:-$$($(BIN)/python -m visionbench.cli list --json | $(BIN)/python -c 'import json, sys; print(*[s["system"] for s in json.load(sys.stdin)])')}" \
	&& $(BIN)/visionbench run $$systems --preset quick
	@$(BIN)/visionbench claims
ifneq ($(SERVE),0)
	@$(BIN)/python .ci/serve.py .
endif

test: $(READY)
	@$(BIN)/python tests/check $(PARTS)

lab: $(READY)
	@$(BIN)/python .ci/serve.py nbs

docs: $(READY)
	@$(BIN)/visionbench docs

notebooks: $(READY)
	@$(BIN)/nbdev_export
	@$(BIN)/python -m visionbench.docs --execute
	@$(BIN)/nbdev_clean

constraints: $(READY)
	@$(BIN)/python .ci/environment.py constraints

clean:
	@rm -rf _docs _proc build dist .pytest_cache tests/.pytest_cache
	@find nbs visionbench tests -name __pycache__ -prune -exec rm -rf {} + -o -name .ipynb_checkpoints -prune -exec rm -rf {} +

.PHONY: help setup demo test lab docs notebooks constraints clean
