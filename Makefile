# make demo       train a small ParScale model on Python code and read what it writes
# make test       lint, types, and every test that takes seconds
# make test-slow  the tests that take minutes
# make test-gpu-kernels  the GPU kernels, interpreted: they need jax 0.11, and so Python 3.12
# make clean      remove the virtual environments and all caches
#
# PYTHON=python3.12 chooses the interpreter of a new environment; JOBS=4 the test processes.

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# Compiled programs are kept from run to run.
PYTEST := HACKLE_TEST_CACHE=$(VENV)/.jax_cache $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test lint types test-fast test-slow test-gpu-kernels clean

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed-demo
	@JAX_PLATFORMS=cpu $(BIN)/python scripts/demo.py

test: lint types test-fast

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check --quiet

types: $(VENV)/.installed-dev
	@$(BIN)/mypy --no-error-summary --cache-dir $(VENV)/.mypy_cache

test-fast: $(VENV)/.installed-dev
	@$(PYTEST) -q -m "not slow"

test-slow: $(VENV)/.installed-dev
	@$(PYTEST) -q -m slow

# An environment of its own, without the oracles.
test-gpu-kernels: $(VENV)-gpu-kernels/.installed
	@HACKLE_TEST_CACHE=$(VENV)/.jax_cache $(VENV)-gpu-kernels/bin/python -m pytest -q -n $(JOBS) \
	  tests/layers/*/test_*gpu*.py tests/layers/attention/test_siblings.py

clean:
	rm -rf $(VENV) $(VENV)-gpu-kernels build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# The stamps make a second call install nothing, unless pyproject.toml changed since.
$(VENV)/.installed-demo: pyproject.toml
	@$(call install,cpu$(comma)train$(comma)hf)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml
	@$(call install,dev)
	@touch $@ $(VENV)/.installed-demo

$(VENV)-gpu-kernels/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "needs PYTHON=python3.12")'
	@$(PYTHON) -m venv --clear $(@D)
	@echo "installing hackle and jax 0.11 into $(@D) ..."
	@$(@D)/bin/python -m pip --disable-pip-version-check -qq install --editable . 'jax>=0.11' \
	  'pytest>=9' pytest-xdist
	@touch $@

comma := ,
define install
$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) \
&& echo "installing hackle[$(1)] into $(VENV) ..." && $(PIP) install --editable '.[$(1)]'
endef
