# make demo          the whole main job on drawn pictures, in about five minutes; nothing is downloaded but packages
#                    DEMO="--source DIR --val annotations.json ..." runs it on your own
# make test          lint, types, and every test under a minute;  make test-slow: the others
#                    TESTS="tests/test_select.py -x" gives pytest other options; two processes otherwise
# make venv, lint    only the installation; only ruff and mypy
# make clean         deletes caches, demo/ and build folders; runs/ (your trainings) stays
# CONSTRAINTS=       install without the pins of constraints-cpu.txt (a machine with a GPU)
PYTHON ?= python3
CONSTRAINTS ?= constraints-cpu.txt
DEMO ?=
TESTS ?= -n 2 --dist loadfile

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(if $(CONSTRAINTS),pinned,latest)

.PHONY: venv demo test test-slow lint clean

venv: $(STAMP)

$(STAMP): setup.cfg pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[test]" $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
	touch $@

demo: $(STAMP)
	$(BIN)/python tools/demo.py $(DEMO)

test: lint
	$(BIN)/python -m pytest -q -m "not slow" $(TESTS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

clean:
	rm -rf demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
