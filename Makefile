# kuavo_train: `make` lists what can be done here.
#
# Every target that needs Python makes .venv by itself, once; it is made again only when pyproject.toml or
# constraints.txt change. Everything runs through .venv/bin/python, so nothing has to be activated.

SHELL := /usr/bin/env bash
PY    := .venv/bin/python
TASKS := $(sort $(basename $(notdir $(wildcard configs/tasks/*.yaml))))

# A sourced ROS puts its own packages on PYTHONPATH; they are not for this Python.
unexport PYTHONPATH

.DEFAULT_GOAL := help
.PHONY: help setup data base train-stage train-all-stages study probes report evaluate test test-whole test-full lint format bench docs pictures constraints clean

help:  ## this list
	@echo "kuavo_train: one robot policy, several jobs, one after another"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  ARGS=\"key=value …\" hands settings on:  make train-all-stages ARGS=\"profile=smoke seed=1\""
	@echo "  Strategies and seeds of a study:       make study ARGS=\"strategy=replay,sequential,joint,ewc,distill,merge,merge_replay seed=0,1\""
	@echo "  Several of its runs at a time:         make study ARGS=\"engine=local engine.jobs=4\""
	@echo "  Several GPUs train one policy:         make train-all-stages ARGS=\"processes=2\""
	@echo "  TASK names a task:                     make train-stage TASK=$(firstword $(TASKS) task1_moving_grasp)"

setup: .venv/.ready  ## make .venv with everything in it (the other targets do it when needed)

data: .venv/.ready  ## record the simulated demonstrations that are missing
	$(PY) -m kuavo_train.curriculum data_only=true $(ARGS)

base: .venv/.ready  ## pretrain the small base that simulated runs start from: generic skills, none of the jobs
	$(PY) -m kuavo_train.base $(ARGS)

STAGE_TASK := $(filter $(basename $(notdir $(TASK))),$(TASKS))
ifneq ($(STAGE_TASK),)
train-stage: .venv/.ready
endif
train-stage:  ## train one stage: TASK=… (ARGS="…")
ifneq ($(STAGE_TASK),)
	$(PY) -m kuavo_train task=tasks/$(STAGE_TASK) $(ARGS)
else
	@$(if $(TASK),echo "There is no task '$(TASK)' in configs/tasks/. There are:",echo "Which task? Say one of") >&2
	@$(foreach task,$(TASKS),echo "    make train-stage TASK=$(task)" >&2;)
	@exit 2
endif

train-all-stages: .venv/.ready  ## train all stages in order, then report; skips finished ones, resumes an unfinished one
	$(PY) -m kuavo_train.curriculum $(ARGS)

study: .venv/.ready  ## train strategies × seeds and compare them; goes on where it was cut off
	$(PY) -m kuavo_train.study $(ARGS)

probes: .venv/.ready  ## lost or suppressed? language? memory? of the latest run, or RUN=outputs/…, into its report
	$(PY) -m kuavo_train.probes $(if $(RUN),run=$(RUN)) $(ARGS)

report: .venv/.ready  ## what was learnt and what was lost: the latest run, or RUN=outputs/…
	$(PY) -m kuavo_train.report $(if $(RUN),run=$(RUN)) $(ARGS)

evaluate: .venv/.ready  ## checkpoints side by side in closed loop: ARGS="baseline=outputs/… memory=outputs/… videos=3"
	$(PY) -m kuavo_train.evaluate $(ARGS)

# Two workers with one thread each: torch would otherwise start as many threads as there are cores, in each of them. A file's
# tests stay together, so that the runs they share are trained once; the longest come first (tests/durations.json).
test test-whole test-full: export OMP_NUM_THREADS = 1
test test-whole test-full: export HF_HUB_OFFLINE = 1
test test-whole test-full: export WANDB_MODE = offline
# Python keeps what it compiled: without, each process of a test compiles torch and LeRobot anew, for ten seconds.
test test-whole test-full: export PYTHONDONTWRITEBYTECODE =

PYTEST := $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: .venv/.ready  ## the tests, in minutes (ARGS="-k memory" for a part)
	$(PYTEST) --ignore=tests/whole $(ARGS)

test-whole: .venv/.ready  ## the tests of whole runs, studies and commands in processes of their own
	$(PYTEST) tests/whole $(ARGS)

test-full: .venv/.ready  ## all tests, the slow ones too
	$(PYTEST) -m "" $(ARGS)

lint: .venv/.ready  ## ruff and mypy, changing nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: .venv/.ready  ## let ruff put the code in order
	$(PY) -m ruff check --fix-only --quiet .
	$(PY) -m ruff format .

bench: $(if $(wildcard benchmarks),.venv/.ready)  ## measure speed and memory
	@[ -d benchmarks ] || { echo "There is nothing to measure yet: this checkout has no benchmarks/." >&2; exit 2; }
	$(PY) -m benchmarks $(ARGS)

docs: export NO_MKDOCS_2_WARNING = 1
docs: .venv/.docs  ## build the documentation as a site, outputs/site (a dead link fails)
	$(PY) -m mkdocs build --strict
	@echo "outputs/site/index.html"

# Their packages are for this target alone, so that the set-up stays as quick as it is.
.venv/.docs: .venv/.ready
	.venv/bin/uv pip install --quiet --python $(PY) --constraint constraints.txt --editable '.[docs]'
	@touch $@

pictures: .venv/.ready  ## draw the pictures of the documentation: docs/make_pictures.py says which (ARGS="report=…")
	$(PY) docs/make_pictures.py $(ARGS)

clean:  ## remove caches and build leftovers; keeps .venv, outputs/ and all data
	rm -rf .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -not -path './.venv/*' -not -path './outputs/*' -prune -exec rm -rf {} +
	@echo "Kept: .venv (remove it for a fresh set-up) and outputs/ (your runs and data)."

# Pins already in the file stay unless ARGS="--upgrade" (or "--upgrade-package torch") says otherwise.
constraints: .venv/.ready  ## pin the dependencies anew in constraints.txt (ARGS="--upgrade" for newer ones)
	@cp constraints.txt .venv/constraints.new
	@VIRTUAL_ENV=.venv .venv/bin/uv pip compile --quiet --universal --python-version 3.12 --extra dev --extra docs --no-annotate \
	    --no-header --output-file .venv/constraints.new $(ARGS) pyproject.toml
	@{ sed -n '/^#/!q;p' constraints.txt; cat .venv/constraints.new; } > .venv/constraints.txt
	@cmp -s .venv/constraints.txt constraints.txt || cp .venv/constraints.txt constraints.txt
	@git --no-pager diff --stat -- constraints.txt

.venv/.ready: pyproject.toml setup.py constraints.txt scripts/setup.sh
	@$(SHELL) scripts/setup.sh
