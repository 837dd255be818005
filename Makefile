# `make demo` and `make test` set up .venv by themselves; the rest works in it.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
# DVC runs `python`: it must be the one of .venv.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PARALLEL := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo results studies test suite nightly coverage check lint types soak cluster-test mutate readme \
	bench clean-data

demo: $(READY)  ## the default experiment, its table and its report
	taskvec run
	taskvec results

results: $(READY)  ## the default experiment over all seeds, into docs/results/ and the README
	taskvec run results
	python docs/copy_results.py

studies: $(READY)  ## the paper's image experiments on data below $TASKVEC_DATA, into docs/results.md
	python -m flows.studies

test: lint  ## everything that CI runs
	$(MAKE) --no-print-directory -j2 types suite

suite: $(READY)
	python -m pytest -q $(PARALLEL)

nightly: $(READY)  ## tests of schedules, of a cluster and of the benchmarks, which take minutes
	python -m pytest -q -m nightly

coverage: $(READY)  ## the tests, and which lines of taskvec/ they do not reach; half as long again
	python -m pytest -q $(PARALLEL) --cov=taskvec --cov-report=term:skip-covered

check: lint types  ## lint, types, import contracts, rendered files

lint: $(READY)
	ruff check .
	ruff format --check .
	lint-imports
	python -m flows.plan --check

types: $(READY)
	mypy

soak: $(READY)  ## faults by the thousand, into docs/reliability.md; ROW=bytes MINUTES=60; it goes on
	python -m tests.soak $(ROW) --minutes $(or $(MINUTES),60)

cluster-test: $(READY)  ## one experiment on a Ray cluster whose hosts, network and database fail
	python -m tests.cluster

mutate: $(READY)  ## change the code on purpose, see what the tests miss; MODULES=taskvec.vectors
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[mutation]'
	python -m tests.mutate $(MODULES)

readme: $(READY)  ## copy docs/results/default.md into the README
	python docs/copy_results.py

bench: $(READY)  ## measure, into docs/benchmarks.md
	python -m benchmarks

$(READY): constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[demo,dev]'
	touch $@
