# `make demo` and `make test` work on a fresh machine. `make help` lists all targets.
#
# PYTHON=  the interpreter for the environment (3.11 or newer)
# VENV=    the environment's folder; if empty, PYTHON is used without one (an Ascend host has torch and torch_npu)

PYTHON ?= python3
VENV ?= .venv

ifeq ($(strip $(VENV)),)
RUN := $(PYTHON)
INSTALLED :=
INSTALLED_DEV :=
else
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
endif

.PHONY: help demo test test-slow lint python-version
help:
	@echo 'make demo       draw a data set, train, evaluate, print rank@1, mAP and FPS (up to 6 minutes on 2 cores)'
	@echo 'make test       lint, types and fast tests (up to 10 minutes)'
	@echo 'make test-slow  slow tests'
	@echo 'make lint       ruff and mypy only'

demo: python-version $(INSTALLED)
	$(RUN) script/demo.py

test: lint
	$(RUN) -m pytest -m 'not slow'

test-slow: python-version $(INSTALLED_DEV)
	$(RUN) -m pytest -m slow

lint: python-version $(INSTALLED_DEV)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

python-version:
	@$(PYTHON) -c 'import sys, platform; sys.exit(0 if sys.version_info >= (3, 11) else "make: %s is Python %s, \
	but 3.11 or newer is needed: make PYTHON=python3.11 ..." % (sys.executable, platform.python_version()))'

$(VENV)/bin/python: | python-version
	$(PYTHON) -m venv $(VENV) || { echo 'make: cannot create the environment: install python3-venv, then remove $(VENV)' >&2; exit 1; }

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(RUN) -m pip install --disable-pip-version-check --quiet -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(RUN) -m pip install --disable-pip-version-check --quiet -r requirements-dev.txt
	@touch $@
