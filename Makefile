# Two commands: `make demo` and `make test`. Each works alone with python3, make and git; a second call installs nothing.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
TESTABLE := $(VENV)/.testable

export PIP_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all lint clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(VENV)/bin/python -m gradlr demo

# File by file: some start processes once for all of their tests.
test: $(TESTABLE)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

# Those marked slow as well: whole products of parameters, long runs of faults, more processes.
test-all: $(TESTABLE)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile -m ""

lint: $(INSTALLED)
	$(VENV)/bin/python -m pip install --quiet ruff
	$(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV) gradlr-demo

$(INSTALLED): setup.cfg setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --use-pep517 --editable '.[demo]'
	touch $@

# The trainers that the tests run in are larger than all the rest.
$(TESTABLE): $(INSTALLED)
	$(VENV)/bin/python -m pip install --quiet --use-pep517 --editable '.[test]'
	touch $@
