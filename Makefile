# Two commands: `make demo` and `make test`. Each makes its own virtual environment on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test fuzz docs lint bench clean

demo: $(READY)
	$(BIN)/python examples/reward_model.py $(ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile $(ARGS)

# A million random problems, each proved feasible and optimal; about a minute.
fuzz: $(READY)
	$(BIN)/python tests/fuzz.py $(ARGS)

# The documentation as a site, every warning an error; open site/index.html.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/everything.py $(ARGS)

# Models and trainers whose dependencies the tests do not need are listed apart.
$(READY): setup.cfg pyproject.toml constraints.txt tests/no-deps.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[trl,plot,dev]"
	$(BIN)/python -m pip install --quiet --no-deps --requirement tests/no-deps.txt
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info runs site
