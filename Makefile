# Two commands: `make demo` and `make test`. Each works alone with python3, make and git; a second call installs nothing.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
TESTABLE := $(VENV)/.testable

export PIP_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(VENV)/bin/python -m gradlr demo

# Into site/; any warning, such as a link that leads nowhere, is an error.
.PHONY: docs
docs: $(VENV)/.documentable
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

$(VENV)/.documentable: $(INSTALLED)
	$(VENV)/bin/python -m pip install --quiet --use-pep517 --editable '.[docs]'
	touch $@

# File by file: some start processes once for all of their tests.
test: $(TESTABLE)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

lint: $(INSTALLED)
	$(VENV)/bin/python -m pip install --quiet ruff
	$(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV) gradlr-demo site

$(INSTALLED): setup.cfg setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --use-pep517 --editable '.[demo]'
	touch $@

# The trainers that the tests run in are larger than all the rest.
$(TESTABLE): $(INSTALLED)
	$(VENV)/bin/python -m pip install --quiet --use-pep517 --editable '.[test]'
	touch $@
