# make night     builds .venv, prepares data if there is none, runs the loop; ARGS="..." are its flags
# make test      builds .venv with what development needs, runs the whole test suite
# make lint      ruff and mypy

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: night test lint clean
night: $(VENV)/installed
	@$(BIN)/python loop.py $(ARGS)

test: $(VENV)/developing
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/developing
	$(BIN)/ruff check .
	$(BIN)/mypy

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nightshift needs Python 3.11 or later; \
	this is %d.%d: make night PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/developing: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
