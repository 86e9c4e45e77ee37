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
.PHONY: help setup data train-stage train-all-stages study probes report evaluate test test-full lint format bench docs constraints clean

help:  ## this list
	@echo "kuavo_train: one robot policy, several jobs, one after another"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  ARGS=\"key=value …\" hands settings on:  make train-all-stages ARGS=\"profile=smoke seed=1\""
	@echo "  Strategies and seeds of a study:       make study ARGS=\"strategy=replay,sequential,joint,ewc,merge seed=0,1\""
	@echo "  TASK names a task:                     make train-stage TASK=$(firstword $(TASKS) task1_moving_grasp)"

setup: .venv/.ready  ## make .venv with everything in it (the other targets do it when needed)

data: .venv/.ready  ## record the simulated demonstrations that are missing
	$(PY) -m kuavo_train.curriculum data_only=true $(ARGS)

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
# tests stay together, so that the runs they share are trained once; tests/conftest.py says which files come first.
test test-full: export OMP_NUM_THREADS = 1
test test-full: export HF_HUB_OFFLINE = 1
test test-full: export WANDB_MODE = offline
# Python keeps what it compiled: without, each process of a test compiles torch and LeRobot anew, for ten seconds.
test test-full: export PYTHONDONTWRITEBYTECODE =

test: .venv/.ready  ## the tests, without the slow ones (minutes; ARGS="-k memory" for a part)
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-full: .venv/.ready  ## all tests
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "" $(ARGS)

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

# --- the set-up -------------------------------------------------------------------------------------------------------

.venv/.ready: pyproject.toml constraints.txt
	@$(SHELL) -euo pipefail -c "$$SET_UP"

# LeRobot needs Python 3.12, and numpy < 2.3, for which there are no wheels beyond 3.13.
define CHECK_PYTHON
import sys
if not (3, 12) <= sys.version_info < (3, 14):
    sys.exit("is Python %d.%d" % sys.version_info[:2])
try:
    import ensurepip, venv
except ImportError:
    if "--uv" not in sys.argv:
        sys.exit("is Python %d.%d without its venv module (Debian, Ubuntu: apt install python%d.%d-venv)" % (sys.version_info[:2] * 2))
print(sys.executable)
endef

define SET_UP
say() { echo "setup: $$*" >&2; }

# What an interrupted set-up left behind may be half a package: start again from nothing.
if [ -e .venv/.installing ]; then
    other=$$(cat .venv/.installing)
    if [ -n "$$other" ] && kill -0 "$$other" 2>/dev/null; then
        say "process $$other is making .venv: wait for it (if it is something else: rm .venv/.installing)"
        exit 1
    fi
    say "the last set-up was interrupted: starting again"
    rm -rf .venv
elif [ -e .venv ] && ! $(PY) -c "$$CHECK_PYTHON" --uv >/dev/null 2>&1; then
    say "the Python in .venv does not work here (any more): making .venv again"
    rm -rf .venv
fi

uv=$$(command -v uv || true)

if [ ! -e .venv ]; then
    names=(python3.12 python3.13 python3 python)
    [ -z "$${PYTHON:-}" ] || names=("$$PYTHON")
    python= tried=
    for name in "$${names[@]}"; do
        # Every one on the PATH: a version manager's stand-in may come first and refuse.
        paths=$$(type -aP "$$name") || tried+="    $$name: not found"$$'\n'
        while read -r path; do
            if [ -z "$$path" ] || [ -n "$$python" ]; then
                continue
            elif answer=$$("$$path" -c "$$CHECK_PYTHON" $${uv:+--uv} 2>&1 </dev/null); then
                python=$$answer
            else
                tried+="    $$path: $$(head -n 1 <<< "$$answer")"$$'\n'
            fi
        done <<< "$$paths"
    done
    if [ -z "$$python" ] && [ -n "$$uv" ] && [ -z "$${PYTHON:-}" ]; then
        say "no Python 3.12 or 3.13 on the PATH: leaving it to uv to find or fetch one"
        python=python3.12
    fi
    if [ -z "$$python" ]; then
        say "kuavo_train needs Python 3.12 or 3.13, and there is none that works. Tried:"
        printf '%s' "$$tried" >&2
        say "install one (apt install python3.12 python3.12-venv, or pyenv install 3.12, or uv), or name it:"
        say "    make setup PYTHON=/path/to/python3.12"
        exit 1
    fi
    say "making .venv with $$python"
    mkdir .venv
    echo $$$$ > .venv/.installing
    make_venv=("$$python" -m venv .venv)
    [ -z "$$uv" ] || make_venv=("$$uv" venv --quiet --allow-existing --python "$$python" .venv)
    if ! "$${make_venv[@]}"; then
        rm -rf .venv
        say "could not make .venv, for the reason above"
        exit 1
    fi
fi
echo $$$$ > .venv/.installing

venv_pip() {
    $(PY) -c 'import pip' 2>/dev/null || $(PY) -m ensurepip >/dev/null  # uv makes environments without it
    $(PY) -m pip --disable-pip-version-check "$$@"
}

# Who has pip but no uv may have named a package index to pip alone, and uv does not read that.
[ -n "$$uv" ] || settings=$$(venv_pip config list)
pip_setting() { sed -n "s/^[^=]*\.$$1='\(.*\)'$$/\1/p" <<< "$$settings" | sed 's/\\n/ /g' | tail -n 1; }

# So that an interrupted set-up never looks like a failed one, whatever the installers make of Ctrl-C.
trap 'exit 130' INT
trap 'exit 143' TERM

if [ -z "$$uv" ] && ! venv_pip install --quiet --constraint constraints.txt uv; then
    say "uv, the fast installer, cannot be had: going on with pip"
elif [ -z "$$uv" ]; then
    uv=.venv/bin/uv
    index=$$(pip_setting index-url) more=$$(pip_setting extra-index-url) links=$$(pip_setting find-links)
    if [ -n "$$index$$more$$links" ] && [ -z "$${UV_DEFAULT_INDEX:-}$${UV_INDEX_URL:-}$${UV_INDEX:-}" ]; then
        say "uv takes over the package index that pip is configured with"
        [ -z "$$index" ] || export UV_DEFAULT_INDEX="$$index"
        [ -z "$$more" ] || export UV_INDEX="$$more"
        [ -z "$$links" ] || export UV_FIND_LINKS="$${links// /,}"
        export UV_INDEX_STRATEGY=unsafe-best-match  # as pip does: the best version in any index
    fi
fi

# uv links packages from its cache; where that is on another disk it has to copy, and warns unless told so.
if [ -n "$$uv" ]; then
    cache=$$("$$uv" cache dir)
    mkdir -p "$$cache"
    one_disk='import os, sys; a, b = map(os.stat, sys.argv[1:]); sys.exit(a.st_dev != b.st_dev)'
    $(PY) -c "$$one_disk" "$$cache" .venv || export UV_LINK_MODE=copy
fi

wanted=(--constraint constraints.txt --editable '.[dev]')
[ -t 2 ] || wanted+=(--quiet)
say "installing the packages (the first time on a machine: some minutes, 6 GB of disk)"
if [ -z "$$uv" ] || ! "$$uv" pip install --python $(PY) "$${wanted[@]}"; then
    [ -z "$$uv" ] || say "uv could not install them, for the reason above: trying pip"
    if ! venv_pip install "$${wanted[@]}"; then
        rm .venv/.installing
        say "the packages could not be installed, for the reason above; when it is gone, make again"
        exit 1
    fi
fi
rm .venv/.installing
touch .venv/.ready
say "done"
endef
export CHECK_PYTHON SET_UP
