# Everything a fresh machine needs is Python 3.11+; each target makes its own environment first.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
# pytest-xdist workers: as many as cores, at most 8.
JOBS ?= $(shell $(PYTHON) -c "import os; print(min(os.cpu_count() or 1, 8))")

.PHONY: help setup demo test test-slow test-aot test-reference lint lock clean

help:
	@echo "make demo       train, kill, resume, evaluate and sample a small language model on 8 virtual devices (about 2 minutes)"
	@echo "make test       all quick tests (about 10 minutes on 2 cores)"
	@echo "make test-slow  the slow tests too;  make test-aot  tests that compile for TPUs with no TPU"
	@echo "make test-reference  models and weights against transformers and torch"
	@echo "make lint       ruff and pyright;    make lock      pin the newest versions in requirements.lock"

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed, this is ' + sys.version.split()[0] + '; say which with PYTHON=')"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[dev]'
	@touch $(STAMP)

setup: $(STAMP)

demo: $(STAMP)
	$(VENV)/bin/python examples/lm.py --demo

test: $(STAMP)
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadgroup


test-slow: $(STAMP)
	$(VENV)/bin/python -m pytest -n $(JOBS) -m "slow and not aot and not gpu and not reference"

test-aot: $(STAMP)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[dev,tpu-aot]'
	$(VENV)/bin/python -m pytest -m "aot and not slow"

test-reference: $(STAMP)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[dev,reference]'
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadgroup -m "reference and not slow"

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

lock: $(STAMP)
	$(VENV)/bin/python -m pip install --quiet uv
	$(VENV)/bin/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-emit-index-url \
		--no-annotate --no-header -o requirements.lock

clean:
	rm -rf $(VENV) runs
