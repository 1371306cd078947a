# Every target sets up what it needs: own environment in .venv, versions of requirements.lock, nothing installed twice.
PYTHON ?= python3
JOBS   ?= 2

VENV  := .venv
STAMP := $(VENV)/.installed
RUN   := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help quickstart test stress check bench data clean
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON=python3.11 makes the environment with that Python (3.10 or newer); JOBS=2 is the number of test processes."

quickstart: $(STAMP) ## train a small robust CLIP on the sample data and measure it (minutes, no GPU needed)
	$(RUN) train.py fit -c configs/quickstart.yaml --ckpt_path last
	$(RUN) eval.py evaluate -c configs/eval/quickstart.yaml

# One thread a process: with more, torch's thread pools of the test processes fight for the same cores.
test: $(STAMP) ## all tests, and the examples in the docstrings of the losses
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist loadfile

stress: $(STAMP) ## the tests of kills and of a full disk, many times each, and of a cluster's time limit
	AFT_STRESS=1 $(RUN) -m pytest tests/callbacks/test_safety.py tests/evaluation/test_kill_and_share.py tests/slurm/test_jobs.py \
		-k "kill or full_disk or time_limit"

# No `ruff format --check`: formulas are laid out by hand.
check: $(STAMP) ## ruff (style, common faults) and mypy (strict for aft)
	$(RUN) -m ruff check .
	$(RUN) -m mypy

bench: $(STAMP) ## measure speed as ratios: one table, results/bench.json (about 13 minutes on two idle cores)
	$(RUN) -m bench.speed

data: ## link real data sets for training: make data DATA=FOLDER
	@[ -n "$(DATA)" ] || { echo "Say where the data sets are: make data DATA=FOLDER. FOLDER holds tiny-imagenet-32/ (train.zip, val.zip, classes.json) and cifar10/ (train.zip, test.zip)." >&2; exit 1; }
	@[ -d "$(DATA)" ] || { echo "DATA = $(DATA): there is no such folder. It should hold tiny-imagenet-32/ and cifar10/." >&2; exit 1; }
	@for file in tiny-imagenet-32/train.zip tiny-imagenet-32/val.zip tiny-imagenet-32/classes.json cifar10/train.zip cifar10/test.zip; do \
		[ -f "$(DATA)/$$file" ] || { echo "DATA = $(DATA): $$file is missing." >&2; exit 1; }; \
	done
	@mkdir -p data
	@for name in tiny-imagenet-32 cifar10; do \
		[ ! -e "data/$$name" ] || [ -L "data/$$name" ] || { echo "data/$$name is there already and is not a link; move it away first." >&2; exit 1; }; \
		ln -sfn "$$(cd "$(DATA)/$$name" && pwd -P)" "data/$$name" && echo "data/$$name -> $(DATA)/$$name"; \
	done

clean: ## remove caches and built files; .venv, data and runs stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): requirements.lock setup.cfg
	@command -v "$(PYTHON)" >/dev/null || { echo "There is no $(PYTHON) here. Install Python 3.10 or newer, or name one: make PYTHON=FILE ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "$(PYTHON) is $$("$(PYTHON)" --version 2>&1); aft needs Python 3.10 or newer. Name one: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(RUN) -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV) || { \
		echo "$(PYTHON) cannot make an environment; on Debian and Ubuntu: apt install python3-venv" >&2; rm -rf $(VENV); exit 1; }
	$(RUN) -m pip install --disable-pip-version-check -r requirements.lock
	$(RUN) -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
