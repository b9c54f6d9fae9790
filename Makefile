# Everything installs into .venv with pip, on first use and again after an edit of setup.py.
#
# PYTHON chooses the interpreter that .venv is made from: make test PYTHON=python3.12
# The tests need torch, whose default Linux build brings gigabytes of CUDA. Preset PIP_EXTRA_INDEX_URL to an index of
# CPU builds to save them, and PIP_INDEX_URL to use a mirror: pip reads both.

PYTHON ?= python3
# Relative, and only ever run as `python -m …`: scripts in .venv/bin break under a path with spaces.
RUN := .venv/bin/python
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check --editable
# Two processes, a file of tests each, in tests/conftest.py's order: a core each, whose programs JAX compiles on one thread.
WORKERS := --numprocesses=2 --dist=loadfile --no-loadscope-reorder
QUICKSTART := runs/quickstart
MINIATURE := runs/miniature
SWEEP := $(RUN) -m experiments.sweep --config=configs/sweeps
CONVERSIONS := $(RUN) -m experiments.conversion_methods --rows=1024 --results=$(MINIATURE)/conversion_methods
BEST := --method=svd+group+refit --calibrate=embedded_large --calibration_length=128

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart posttraining miniature test test-full test-data notebooks lint format uptrain-full figures docs clean

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /make \1: /p' Makefile

quickstart: .venv/.core  ## convert the shipped model to GQA and MQA, uptrain it, report: minutes on a laptop
	rm -rf $(QUICKSTART)
	$(RUN) -m checkpoints_tools.convert --source=assets/teacher --output=$(QUICKSTART)/gqa2 --kv_heads=2 --method=mean
	$(RUN) -m checkpoints_tools.convert --source=assets/teacher --output=$(QUICKSTART)/mqa --kv_heads=1 --method=mean
	$(RUN) -m checkpoints_tools.convert --source=assets/teacher --output=$(QUICKSTART)/gqa2_best --kv_heads=2 $(BEST)
	$(RUN) -m checkpoints_tools.convert --source=assets/teacher --output=$(QUICKSTART)/mqa_best --kv_heads=1 $(BEST)
	$(RUN) -m gqa.train --config=configs/quickstart.py --workdir=$(QUICKSTART)/uptrain --config.model.checkpoint=$(QUICKSTART)/gqa2
	$(RUN) -m experiments.report --runs=$(QUICKSTART) --output=$(QUICKSTART)/report

posttraining: .venv/.core  ## SFT to PPO and to DPO on the shipped Llama, with a report
	$(RUN) -m experiments.posttraining

miniature: .venv/.eval  ## the paper's sweeps on the shipped teacher, and their figures: 20 to 30 hours, resumable
	mkdir -p $(MINIATURE)
	test -e runs/recall/records/manifest.json || $(RUN) -m experiments.recall
	test -e runs/recall/teacher/finished.json || $(RUN) -m gqa.train --config=configs/recall/teacher.py --workdir=runs/recall/teacher
	-$(SWEEP)/recall.py --workdir=$(MINIATURE)/recall
	-$(SWEEP)/scratch.py --workdir=$(MINIATURE)/scratch
	-$(CONVERSIONS) --teacher=t5 --alphas=0 --methods=mean,first,random,svd+group+refit,svd+group+tune+refit
	-$(CONVERSIONS) --teacher=t5_annealed --alphas=0,0.01,0.05,0.1 --methods=mean,svd+group+tune+refit --uptrained=mean
	-$(CONVERSIONS) --teacher=t5_annealed --alphas=0,0.05 --methods=first,random --uptrained=first,random
	-$(RUN) -m experiments.uptrain_full --results=$(MINIATURE)/uptrain_full
	test -e runs/teacher_small/finished.json || $(RUN) -m gqa.train --config=configs/teacher_t5_small.py --workdir=runs/teacher_small
	-$(SWEEP)/sizes.py --workdir=$(MINIATURE)/sizes
	-for task in docstring long_docstring; do \
	    $(SWEEP)/$$task.py --workdir=$(MINIATURE)/$$task; \
	    $(SWEEP)/$$task.py --workdir=$(MINIATURE)/$${task}_random --config.runs.method=random, --config.runs.kv_heads=1, \
	        --config.runs.alpha=0.0, --config.runs.seed=1,; \
	done
	-for turn in 1 2 3 4; do for size in t5 t5_small; do \
	    $(RUN) -m experiments.timing --config=configs/timing/teacher_$$size.py --output=$(MINIATURE)/timing/$$size --add; \
	done; done
	$(RUN) -m experiments.figures --runs=$(MINIATURE) --output=$(MINIATURE)/figures

test: .venv/.test  ## run the tests
	JAX_PLATFORMS=cpu $(RUN) -m pytest $(WORKERS)

test-full: .venv/.test .venv/.notebooks  ## run the tests, with the notebooks and the long counts of kills and mutilations
	JAX_PLATFORMS=cpu $(RUN) -m pytest $(WORKERS) -m "not tfds"

test-data: .venv/.test  ## run the tests of public datasets, which bring TensorFlow: 2.4 GB
	$(INSTALL) '.[data]'
	JAX_PLATFORMS=cpu $(RUN) -m pytest -m tfds

notebooks: .venv/.notebooks  ## execute the notebooks into build/notebooks: minutes
	JAX_PLATFORMS=cpu $(RUN) -m pytest -m full tests/test_notebooks.py

lint: .venv/.dev  ## check style and formatting
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check

format: .venv/.dev  ## mend style and formatting where that is safe
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

uptrain-full: .venv/.core  ## run the full uptraining experiment
	$(RUN) -m experiments.uptrain_full

figures: .venv/.core  ## draw every committed picture again, from committed results: seconds
	$(RUN) -m experiments.figures --output=experiments/results/figures --redraw

docs: .venv/.docs  ## build the documentation in build/site
	$(RUN) -m mkdocs build --strict --quiet

clean:  ## remove .venv, build files and caches; keep runs/
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.core: setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'error: $(PYTHON) does not run as Python 3.11 or later; choose another with: make PYTHON=python3.11 …' >&2; exit 1; }
	@echo 'Installing gqa into .venv (once, about 1 GB)'
	@$(PYTHON) -m venv .venv
	@$(INSTALL) .
	@touch $@

.venv/.eval: .venv/.core
	@echo 'Installing what scores generated text into .venv'
	@$(INSTALL) '.[eval]'
	@touch $@

.venv/.dev: .venv/.core
	@echo 'Installing the tools of the tests into .venv'
	@$(INSTALL) '.[dev]'
	@touch $@

.venv/.test: .venv/.dev
	@echo 'Installing torch, transformers and what else the tests compare against into .venv'
	@$(INSTALL) '.[dev,parity,eval,clean,docs]'
	@touch $@

.venv/.notebooks: .venv/.dev
	@echo 'Installing what runs the notebooks into .venv'
	@$(INSTALL) '.[notebooks]'
	@touch $@

.venv/.docs: .venv/.core
	@echo 'Installing what builds the documentation into .venv'
	@$(INSTALL) '.[docs]'
	@touch $@
