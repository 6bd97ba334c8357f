# Two commands need to be known: `make demo` and `make test`. Both make the environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS ?= train,smollm,dev

.PHONY: env demo study-demo test test-slow bench grade-bench grade-fuzz kill study smollm clean help

help: ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env: $(STAMP) ## the environment in .venv (uv when present, else venv and pip)

# uv does not read pip's configuration, so it is told where pip looks for wheels.
$(STAMP): pyproject.toml constraints/cpu.txt
	@if command -v uv >/dev/null 2>&1; then \
	  test -x $(BIN)/python || uv venv --python $(PYTHON) $(VENV); \
	  links=$$($(PYTHON) -m pip config get global.find-links 2>/dev/null || $(PYTHON) -m pip config get :env:.find-links 2>/dev/null || true); \
	  UV_FIND_LINKS="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-$$links}}" uv pip install --python $(BIN)/python -c constraints/cpu.txt -e '.[$(EXTRAS)]'; \
	else \
	  test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints/cpu.txt -e '.[$(EXTRAS)]'; \
	fi
	@touch $(STAMP)

demo: env ## base → SFT → RL of the built-in model, under 10 minutes on 2 cores
	@$(BIN)/truestep run recipes/demo.toml --out runs/demo --resume

study-demo: env ## the demo with its controls, three seeds, as declared in docs/studies/demo.md
	@$(BIN)/truestep study recipes/study/demo.toml --results results/study/demo

test: env ## what CI runs: ruff, types, import layers, tests
	@BIN=$(BIN) sh .ci/checks

test-slow: env ## the longer versions of the tests
	@$(BIN)/python -m pytest -m slow

bench: env ## speed and memory against TRL, transformers and vLLM, each in an environment of its own
	@$(BIN)/python benchmarks/bench.py

grade-bench: env ## the grader against math-verify (PAIRS=file of gold and pred)
	@$(BIN)/python benchmarks/grade_bench.py $(PAIRS) --processes 2

grade-fuzz: env ## 100,000 made-up answers by hypothesis, and as many by atheris in an environment of its own
	@$(BIN)/python benchmarks/grade_fuzz.py --engine hypothesis --cases 100000
	@test -x .bench/atheris/bin/python || $(PYTHON) -m venv .bench/atheris
	@.bench/atheris/bin/python -m pip install --quiet --disable-pip-version-check atheris pydantic
	@PYTHONPATH=src .bench/atheris/bin/python benchmarks/grade_fuzz.py --engine atheris --cases 100000

kill: env ## SIGKILL a tiny run at random moments, 100 times, and compare its final bytes
	@$(BIN)/python benchmarks/kill.py --kills 100

STUDIES ?= $(sort $(wildcard recipes/study/*.toml))
study: env ## every declared study, one after the other (STUDIES=recipes/study/NAME.toml for one)
	@failed=0; for s in $(STUDIES); do \
	  $(BIN)/truestep study $$s --results results/study/$$(basename $$s .toml) || { failed=$$?; [ $$failed = 3 ] || exit $$failed; }; \
	done; exit $$failed

smollm: env ## SmolLM2-135M on real word problems (DATA=folder with gsm8k/ and benchmarks/)
	@$(BIN)/python benchmarks/smollm_data.py $(DATA) data
	@$(BIN)/truestep run recipes/smollm2-gsm8k.toml --out runs/smollm2-gsm8k --resume

clean: ## remove what was made, but not the environment
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
