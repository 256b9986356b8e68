# make demo                run a real job, traced; read its trace back from the store and draw it
# make test                the whole suite, on the newest MLflow
# make test-oldest         the whole suite, on the oldest Python and MLflow
# make test-newest-python  the whole suite, on the newest Python
# make test-versions       what depends on MLflow, on each minor version from 3.10 to 3.17
# make test-next           the same, on the next MLflow, pre-releases too
# make wheel               build wheel and sdist; install the wheel elsewhere, and try it there
# make lint                ruff, mypy, pyright, and the arrows between the packages
# make bench               what one span costs, beside the raw client and others
# make bench-delivery      how many traces arrive, and how quickly, beside MLflow alone
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

.PHONY: demo test test-oldest test-newest-python test-versions test-next wheel lint bench bench-delivery clean help

demo: $(VENV)/installed
	$(VENV)/bin/spanguard demo

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest $(PYTEST_ARGS)

test-newest-python: .venv-newest/installed
	.venv-newest/bin/python -m pytest $(PYTEST_ARGS)

# MLflow's minor versions. What depends on them is marked so in the tests.
VERSIONS ?= 3.10 3.11 3.12 3.13 3.14 3.15 3.16 3.17
VERSIONS_ARGS ?= -m versions

test-versions: $(VERSIONS:%=test-on-mlflow-%)

test-on-mlflow-%: .venv-mlflow-%/installed
	.venv-mlflow-$*/bin/python -m pytest $(VERSIONS_ARGS) $(PYTEST_ARGS)

test-next: .venv-next/installed
	.venv-next/bin/python -m pip install --quiet --upgrade --pre mlflow
	.venv-next/bin/python -m pytest $(VERSIONS_ARGS) $(PYTEST_ARGS)

# Outside of the checkout: what is tried is what users get.
wheel: $(VENV)/linters
	rm -rf dist
	$(VENV)/bin/python -m build --outdir dist .
	elsewhere=$$(mktemp -d) && trap 'rm -rf '$$elsewhere EXIT && \
	$(PYTHON) -m venv $$elsewhere/venv && \
	$$elsewhere/venv/bin/python -m pip install --quiet dist/*.whl && \
	$$elsewhere/venv/bin/python -m pip check && \
	cp tests/smoke.py $$elsewhere && cd $$elsewhere && \
	venv/bin/python smoke.py && venv/bin/spanguard --version

lint: $(VENV)/linters
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy --strict src tests/typing
	$(VENV)/bin/pyright src tests/typing
	$(VENV)/bin/lint-imports

bench: $(VENV)/installed
	$(VENV)/bin/python benchmarks/record.py
	$(VENV)/bin/python benchmarks/faces.py

bench-delivery: $(VENV)/installed
	$(VENV)/bin/python benchmarks/delivery.py

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-next .venv-mlflow-* dist

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

.venv-next/installed: pyproject.toml
	$(PYTHON) -m venv .venv-next
	.venv-next/bin/python -m pip install --quiet --editable '.[test]'
	@touch $@

.venv-mlflow-%/installed: pyproject.toml
	$(PYTHON) -m venv .venv-mlflow-$*
	.venv-mlflow-$*/bin/python -m pip install --quiet --editable '.[core-test]' 'mlflow==$*.*'
	@touch $@

# Not to be removed as intermediate files.
.PRECIOUS: .venv-mlflow-%/installed
