# Everything runs in .venv, built from requirements.lock. `make` lists the targets.
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

# The first interpreter that is supported and can make a virtual environment (Debian splits
# ensurepip off into python3-venv). Override: make notebooks PYTHON=/path/to/python3.12
SUPPORTED := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)

.DEFAULT_GOAL := help
.PHONY: help notebooks lab test test-slow test-vllm vllm browser lint figures demo-model lock

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

notebooks: $(READY)  ## run every notebook headlessly; results under runs/demo/
	$(BIN)/amygdala run

lab: $(READY)  ## open JupyterLab on the first notebook
	$(BIN)/jupyter lab notebooks/00_start_here.ipynb

test: $(READY)  ## the fast tests
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(READY) browser  ## the slow tests
	$(BIN)/python -m pytest -m slow

test-vllm: vllm  ## the tests with real vLLM servers
	.venv-vllm/bin/python -m pytest -m vllm tests/vllm

vllm:  ## an environment of its own for vLLM on the CPU (2 GB)
	tools/install_vllm.sh

# Playwright's own browser wants system libraries too; where there is apt, chromium brings them.
browser: $(READY)  ## Chromium for the slow tests, if there is none
	@for b in chromium google-chrome chrome; do command -v $$b >/dev/null && exit 0; done; \
	if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; \
	then apt-get update -qq && apt-get install -y -qq chromium; \
	else $(BIN)/playwright install chromium; fi

lint: $(READY)  ## ruff, and notebooks without output and with the right links
	$(BIN)/ruff check .
	$(BIN)/nbstripout --verify --keep-id notebooks/*.ipynb
	$(BIN)/python -m pytest -q tests/test_notebook_contract.py

figures: notebooks  ## renew the pictures the README shows
	mkdir -p notebooks/figures
	cp runs/demo/figures/00_token_by_token.png notebooks/figures/token_by_token.png

demo-model: $(READY)  ## train the bundled model anew (at most 90 minutes on two cores)
	$(BIN)/python -m amygdala_lib.demo.train
	$(BIN)/python -m amygdala_lib.demo.release

lock: $(READY)  ## resolve requirements.lock anew; UPGRADE=--upgrade moves every pin
	$(BIN)/uv pip compile --quiet pyproject.toml --extra notebooks --extra dev --universal --python-version 3.10 \
		--output-file requirements.lock $(UPGRADE)

$(READY): requirements.lock requirements-nodeps.txt pyproject.toml
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || { \
		echo "amygdala needs Python 3.10 to 3.13 with venv; found $(or $(PYTHON),none)."; \
		echo "Install one (Debian: apt install python3 python3-venv; macOS: brew install python@3.12)"; \
		echo "or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements.lock
	$(BIN)/python -m pip install --no-deps -r requirements-nodeps.txt -e .
	@touch $@
