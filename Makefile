# Each target installs what it needs: a machine with make and Python 3.10, 3.11 or 3.12 (with venv and pip) is enough.
#   PYTHON=python3.12       the interpreter to build the environments with (`make clean` first, to change it)
#   ARGS="-k lora -x"       passed on to the command that a target runs
#   WORKERS=4               processes that run the tests; each imports MindSpore, about 0.5 GB

.DEFAULT_GOAL := help
# Two targets may share an environment, and two pips in one environment break it.
.NOTPARALLEL:

PYTHON ?=
ARGS ?=
WORKERS ?= 2

CANDIDATES := $(if $(PYTHON),"$(PYTHON)",python3 python3.11 python3.12 python3.10 python)
SUITABLE := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
WHOLE := import sys, pip; sys.exit(sys.prefix == sys.base_prefix)
PINS := pyproject.toml $(wildcard requirements/*.txt)
BIN := .venv/bin
ON_MINDNLP := notebooks/05_mindnlp.ipynb
comma := ,

# $(call install,VENV,EXTRA,PINS): make VENV if it is not there or broken; install the project into it, editable, with
# EXTRA, at the versions in requirements/PINS.txt. Candidates are run, not looked up: a shim may exist for no Python.
define install
@if ! $(1)/bin/python -c '$(WHOLE)' >/dev/null 2>&1; then found=; \
  for python in $(CANDIDATES); do \
    if "$$python" -c '$(SUITABLE)' >/dev/null 2>&1; then found=$$python; break; fi; \
  done; \
  if [ -z "$$found" ]; then \
    echo 'error: none of these is a Python 3.10, 3.11 or 3.12 with venv and pip:' $(CANDIDATES) >&2; \
    echo '       install one (Debian, Ubuntu: apt install python3-venv) or say make PYTHON=/path/to/python' >&2; \
    exit 1; \
  fi; \
  echo "Making $(1) with $$("$$found" --version)"; \
  "$$found" -m venv --clear $(1) || exit 1; \
fi
@echo 'Installing msft-peft[$(2)] into $(1) (minutes the first time)'
@$(1)/bin/python -m pip install -qq --disable-pip-version-check --editable '.[$(2)]' --constraint requirements/$(3).txt
@touch $@
endef

.venv/.has-%: $(PINS)
	$(call install,.venv,$*,mindspore-2.10.0)

.venv-2.7.2/.has-%: $(PINS)
	$(call install,.venv-2.7.2,$*,mindspore-2.7.2)

.venv-parity/.has-test: $(PINS)
	$(call install,.venv-parity,test$(comma)parity,parity)

# No environment of its own, but a folder of packages beside another: MindPet's requirements are long out of date.
.venv-mindpet/.done: .venv-2.7.2/.has-test requirements/mindpet.txt
	@rm -rf .venv-mindpet
	@.venv-2.7.2/bin/python -m pip install -qq --disable-pip-version-check --no-deps --target .venv-mindpet \
	  --requirement requirements/mindpet.txt
	@touch $@

# The libraries of models, each with what its models import, in a folder beside that environment; as above.
.venv-mind%/.done: .venv-2.7.2/.has-test requirements/mind%.txt
	@rm -rf .venv-mind$*
	@echo 'Installing mind$* beside .venv-2.7.2 (a minute the first time)'
	@.venv-2.7.2/bin/python -m pip install -qq --disable-pip-version-check --no-deps --target .venv-mind$* \
	  --requirement requirements/mind$*.txt
	@touch $@

.PRECIOUS: .venv/.has-% .venv-2.7.2/.has-%
.PHONY: help quickstart test parity test-2.7.2 test-mindpet test-mindnlp test-mindformers lint fmt types notebooks notebook-mindnlp bench bench-hosts check build clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9.-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' Makefile

quickstart: .venv/.has-examples ## train a small LoRA adapter, save it, load it again
	@$(BIN)/python examples/quickstart.py $(ARGS)

test: .venv/.has-test ## run the tests that need no torch
	$(BIN)/python -m pytest -m "not parity" -n $(WORKERS) $(ARGS)

parity: .venv-parity/.has-test ## compare with HF peft on torch, live
	.venv-parity/bin/python -m pytest -m parity -n $(WORKERS) $(ARGS)

# What MindSpore has a part in; the rest is the same Python.
ON_OLD := tests/contract tests/parity/test_goldens.py tests/delta tests/graph tests/models tests/distributed

test-2.7.2: .venv-2.7.2/.has-test ## run what depends on MindSpore on 2.7.2, on fewer kinds of layers
	FEW_CASES=1 .venv-2.7.2/bin/python -m pytest -m "not parity" -n $(WORKERS) $(ON_OLD) $(ARGS)

test-mindpet: .venv-mindpet/.done ## compare the delta Cells with MindPet's own package
	PYTHONPATH=.venv-mindpet .venv-2.7.2/bin/python -m pytest tests/beside_mindpet -n $(WORKERS) $(ARGS)

test-mindnlp: .venv-mindnlp/.done ## run the tests on mindnlp's models
	PYTHONPATH=.venv-mindnlp .venv-2.7.2/bin/python -m pytest tests/hosts/test_mindnlp.py $(ARGS)

test-mindformers: .venv-mindformers/.done ## run the tests on the models of MindFormers and MindOne
	PYTHONPATH=.venv-mindformers .venv-2.7.2/bin/python -m pytest tests/hosts/test_mindformers.py \
	  tests/hosts/test_mindone.py $(ARGS)

lint: .venv/.has-dev ## check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

fmt: .venv/.has-dev ## format, and fix what can be fixed
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format

types: .venv/.has-dev ## check the types
	$(BIN)/mypy

notebooks: .venv/.has-notebooks ## execute every notebook (ARGS=--inplace keeps the outputs)
	GLOG_v=3 MS_DEV_LAUNCH_BLOCKING=1 $(BIN)/jupyter-execute --timeout=900 $(ARGS) $(filter-out $(ON_MINDNLP),$(wildcard notebooks/*.ipynb))

notebook-mindnlp: .venv-2.7.2/.has-notebooks .venv-mindnlp/.done ## execute the notebook on mindnlp's models
	GLOG_v=3 MS_DEV_LAUNCH_BLOCKING=1 PYTHONPATH=$(CURDIR)/.venv-mindnlp .venv-2.7.2/bin/jupyter-execute --timeout=900 $(ARGS) \
	  $(ON_MINDNLP)

bench-hosts: .venv-parity/.has-test .venv-mindnlp/.done .venv-mindnlp-peft/.done .venv-mindformers/.done ## benchmark on the models of other libraries
	.venv-parity/bin/python -m benchmarks hosts $(ARGS)

bench: .venv-parity/.has-test ## benchmark side by side with HF peft on torch
	.venv-parity/bin/python -m benchmarks $(ARGS)

check: lint types test ## what to run before a commit

build: .venv/.has-dev ## make the wheel and the source archive in dist/
	@rm -rf dist
	$(BIN)/python -m build

clean: ## remove the environments and everything else that was made
	rm -rf .venv .venv-2.7.2 .venv-mindformers .venv-mindnlp .venv-mindnlp-peft .venv-mindpet .venv-parity build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
