# Two commands: `make demo` and `make test`. Each makes its own virtual environment on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-oldest fuzz mutate docs lint bench evidence clean

demo: $(READY)
	$(BIN)/python examples/reward_model.py $(ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile $(ARGS)

# The trainers with the lowest versions of other people's packages.
OLDEST := $(VENV)-oldest
TRAINER_TESTS := $(addprefix tests/test_,hf_trainer.py trainers.py trainers_on_ranks.py rollouts.py \
	experimental_trainers.py dpo_loss_types.py trl_scripts.py accelerate.py capture.py)
test-oldest:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints.txt --constraint tests/oldest.txt \
		--editable ".[trl]" pytest hypothesis expecttest
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest $(TRAINER_TESTS) $(ARGS)

# A million random problems, each proved feasible and optimal; about a minute.
fuzz: $(READY)
	$(BIN)/python tests/fuzz.py $(ARGS)

# Breaks solvers and pools one operator or constant at a time: what do the tests miss? Half an hour or more.
mutate: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "cosmic-ray==8.7.*"
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py $(ARGS)

# The documentation as a site, every warning an error; open site/index.html.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/everything.py $(ARGS)

# The page docs/evidence.md from the committed runs; benchmarks/ood_protocol.py makes runs.
evidence: $(READY)
	$(BIN)/python benchmarks/evidence_page.py $(ARGS)

# Models and trainers whose dependencies the tests do not need are listed apart.
$(READY): setup.cfg pyproject.toml constraints.txt tests/no-deps.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[trl,plot,dev]"
	$(BIN)/python -m pip install --quiet --no-deps --requirement tests/no-deps.txt
	touch $(READY)

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info runs site
