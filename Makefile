# Two commands from a bare machine with Python 3.11, make and g++:
#   make demo    the whole cascade on this machine, about five minutes after the packages are installed
#   make test    lint, types, tests
PYTHON ?= python3.11
PYTHON := $(shell command -v $(PYTHON) || command -v python3)
VENV := .venv
LOWEST := .venv-lowest
BIN := $(VENV)/bin
STORE ?= $(CURDIR)/store

.PHONY: demo test test-lowest env clean

demo: env
	BIN="$(BIN)" STORE="$(STORE)" bash jobs/demo.sh

test: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest tests/unit -n 2
	$(BIN)/pytest tests/integration

env: $(VENV)/.installed

# exact versions from constraints.txt; deepspeed reads the installed torch while it is built, hence two steps
$(VENV)/.installed: constraints.txt pyproject.toml
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt setuptools wheel torch
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

# the tests once more, at the lowest versions that pyproject.toml admits
test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/pytest tests/unit -n 2
	$(LOWEST)/bin/pytest tests/integration

$(LOWEST)/.installed: constraints-lowest.txt pyproject.toml
	"$(PYTHON)" -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet -c constraints-lowest.txt setuptools wheel ninja py-cpuinfo numpy torch
	$(LOWEST)/bin/pip install --quiet -c constraints-lowest.txt --no-build-isolation -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST)
