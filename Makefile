# `make demo`, `make test` and `make check` each work alone with python3, make and git; a second call installs nothing.
# With the newest torch or the oldest: `make test CONSTRAINTS=constraints-newest.txt`, or `constraints-oldest.txt`.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
# An environment for each of them: .venv, .venv-newest, .venv-oldest.
VENV := .venv$(patsubst constraints%.txt,%,$(notdir $(CONSTRAINTS)))
INSTALLED := $(VENV)/.installed
TESTABLE := $(VENV)/.testable
CHECKABLE := $(VENV)/.checkable
# Bytecode is made of what is imported, not of all that is installed: half a minute less.
INSTALL := $(VENV)/bin/python -m pip install --quiet --no-compile --use-pep517 --editable
# File by file: some start processes once for all of their tests.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

# What must not move, the mathematics and the rules of the house: half a minute.
FAST := tests/golden tests/linalg tests/rules tests/params tests/test_house.py tests/test_import.py

export PIP_CONSTRAINT := $(CONSTRAINTS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONDONTWRITEBYTECODE # every process would compile anew what it imports

.PHONY: demo test test-all check lint fast clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(VENV)/bin/python -m gradlr demo

test: $(TESTABLE)
	$(PYTEST)

# Those marked slow as well: whole products of parameters, long runs of faults, more processes.
test-all: $(TESTABLE)
	$(PYTEST) -m ""

check: lint fast

# What reads the code without running it.
lint: $(CHECKABLE)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

fast: $(TESTABLE)
	$(PYTEST) -q $(FAST)

# Into site/; any warning, such as a link that leads nowhere, is an error.
.PHONY: docs
docs: $(VENV)/.documentable
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

$(VENV)/.documentable: $(INSTALLED)
	$(INSTALL) '.[docs]'
	touch $@

clean:
	rm -rf .venv .venv-* gradlr-demo site

$(INSTALLED): setup.cfg setup.py constraints-common.txt $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[demo]'
	touch $@

$(CHECKABLE): $(INSTALLED)
	$(INSTALL) '.[check]'
	touch $@

# The trainers that the tests run in are larger than all the rest.
$(TESTABLE): $(INSTALLED)
	$(INSTALL) '.[test]'
	touch $@
