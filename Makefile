# make demo                run a real job, traced; read its trace back from the store and draw it
# make test                the whole suite, on the newest MLflow
# make test-oldest         the whole suite, on the oldest Python and MLflow
# make test-newest-python  the whole suite, on the newest Python
# make lint                ruff, mypy and pyright
# make bench               what one span costs, beside the raw client and others
# make clean               remove the environments that these have set up
# make help                print this list
# Each sets up what it needs in .venv first; a Python from 3.10 to 3.13 is all it asks for.

PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3.10 python3 python; do \
	  $$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null \
	  && echo $$p && break; done)
PYTHON_OLDEST ?= $(shell for p in python3.10 $(PYTHON); do \
	  $$p -c '' 2>/dev/null && echo $$p && break; done)
PYTHON_NEWEST ?= $(shell for p in python3.13 $(PYTHON); do \
	  $$p -c '' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
PYTEST_ARGS ?= -n 3 -q
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test test-oldest test-newest-python lint bench clean help

demo: $(VENV)/installed
	$(VENV)/bin/spanguard demo

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest $(PYTEST_ARGS)

test-newest-python: .venv-newest/installed
	.venv-newest/bin/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/linters
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy --strict src tests/typing
	$(VENV)/bin/pyright src tests/typing

bench: $(VENV)/installed
	$(VENV)/bin/python benchmarks/record.py

clean:
	rm -rf .venv .venv-oldest .venv-newest

help:
	@sed -n 's/^# //p' Makefile

$(VENV)/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "spanguard needs Python 3.10 to 3.13 on the PATH"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable '.[test]'
	@touch $@

$(VENV)/linters: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet '.[lint]' && \
	$(VENV)/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

.venv-oldest/installed: pyproject.toml
	$(PYTHON_OLDEST) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --editable '.[test]' 'mlflow==3.10.*'
	@touch $@

.venv-newest/installed: pyproject.toml
	$(PYTHON_NEWEST) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --editable '.[test]'
	@touch $@
