# Two commands need to be known: `make demo` and `make test`. Both make the environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TRAIN := $(VENV)/.train
DEV := $(VENV)/.dev
# Python keeps the byte code of what it first imports: without it every process would compile torch again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: env demo study-demo test test-slow bench grade-bench grade-fuzz kill mutate study smollm clean help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env: $(DEV) ## make the environment in .venv (with uv if it is installed, else venv and pip)

$(TRAIN): pyproject.toml constraints/cpu.txt .ci/environment
	@PYTHON=$(PYTHON) sh .ci/environment $(VENV) train
	@touch $@

$(DEV): $(TRAIN)
	@PYTHON=$(PYTHON) sh .ci/environment $(VENV) train,dev
	@touch $@

demo: $(TRAIN) ## base → SFT → RL of the built-in model, under 10 minutes on 2 cores
	@$(BIN)/truestep run recipes/demo.toml --out runs/demo --resume

study-demo: $(TRAIN) ## the demo with its controls, three seeds, as declared in docs/studies/demo.md
	@$(BIN)/truestep study recipes/study/demo.toml --results results/study/demo

test: $(DEV) ## what CI runs: ruff, types, import layers, tests
	@BIN=$(BIN) sh .ci/checks

test-slow: $(DEV) ## the longer versions of the tests
	@$(BIN)/python -m pytest -m slow

bench: $(TRAIN) ## speed and memory against TRL, transformers and vLLM, each in an environment of its own
	@$(BIN)/python benchmarks/bench.py

grade-bench: $(TRAIN) ## the grader against math-verify (PAIRS=file of gold and pred)
	@$(BIN)/python benchmarks/grade_bench.py $(PAIRS) --processes 2

grade-fuzz: $(DEV) ## 100,000 made-up answers by hypothesis, and as many by atheris in an environment of its own
	@$(BIN)/python benchmarks/grade_fuzz.py --engine hypothesis --cases 100000
	@test -x .bench/atheris/bin/python || $(PYTHON) -m venv .bench/atheris
	@.bench/atheris/bin/python -m pip install --quiet --disable-pip-version-check atheris pydantic
	@PYTHONPATH=src .bench/atheris/bin/python benchmarks/grade_fuzz.py --engine atheris --cases 100000

kill: $(TRAIN) ## SIGKILL a tiny run at random moments, 100 times, and compare its final bytes
	@$(BIN)/python benchmarks/kill.py --kills 100

mutate: $(DEV) ## random one-place changes of the code that decides numbers: the share that no test sees (hours; resumable)
	@$(BIN)/python benchmarks/mutate.py $(MUTATE)

STUDIES ?= $(sort $(wildcard recipes/study/*.toml))
study: $(TRAIN) ## every declared study, one after the other (STUDIES=recipes/study/NAME.toml for one)
	@failed=0; for s in $(STUDIES); do \
	  $(BIN)/truestep study $$s --results results/study/$$(basename $$s .toml) || { failed=$$?; [ $$failed = 3 ] || exit $$failed; }; \
	done; exit $$failed

smollm: $(TRAIN) ## SmolLM2-135M on real word problems (DATA=folder with gsm8k/ and benchmarks/)
	@$(BIN)/python benchmarks/smollm_data.py $(DATA) data
	@$(BIN)/truestep run recipes/smollm2-gsm8k.toml --out runs/smollm2-gsm8k --resume

clean: ## remove what was made, but not the environment
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
