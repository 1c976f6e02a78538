# `make demo` and `make test` need Python 3.11 or newer, and make `.venv` on their first call.
# Another interpreter than python3: `make test PYTHON=python3.12`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet
SOURCES := lightning_eoss tests examples papers benchmarks

# Every installation obeys the pins, those of the build backend included.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint format reproduce clean

demo: $(VENV)/.demo
	$(BIN)/lightning-eoss demo

# Fast things first; those that measure time last, and alone.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --timeout 300
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not alone" -n 2 --dist worksteal --timeout 600
	$(BIN)/python -m pytest -m alone --timeout 600

lint: $(VENV)/.dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# The long tables; the papers' figures are drawn by `python papers/NAME.py`.
reproduce: $(VENV)/.dev
	$(BIN)/python -m benchmarks.reproduce

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache lightning_logs
	find $(SOURCES) -name __pycache__ -exec rm -rf {} +

$(VENV)/.demo: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11+ is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) --editable '.[examples]'
	touch $@

# curvlinops asks for torchvision through backpack, without using it here. Torchvision would replace the pinned torch and
# break Lightning, so these three come without their dependencies; what they really need is in the `dev` extra.
$(VENV)/.dev: $(VENV)/.demo
	$(INSTALL) --editable '.[examples,dev]'
	$(INSTALL) --no-deps backpack-for-pytorch curvlinops-for-pytorch unfoldNd
	touch $@
