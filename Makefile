# Everything runs inside .venv, made from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test slow torture fuzz lint results tables bench bench-quick docs clean

install: $(BIN)/.installed

# torch first and alone: an open range would take a build with several GB of accelerator libraries.
$(BIN)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: install
	$(BIN)/cairn demo

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

slow: install
	$(BIN)/python -m pytest -m slow

# Two hundred kills at random moments, each run gone on with and compared bit for bit.
torture: install
	$(BIN)/python tests/stress/torture.py --kills 200

# Ten thousand damaged and hostile files, none of which may be let in or cause more than one line.
fuzz: install
	$(BIN)/python tests/stress/fuzz.py --cases 10000

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

# Every stored result that is missing, then the documents' tables.
results: install
	$(BIN)/python experiments/results.py

# All tables anew from what is stored, without running anything.
tables: install
	$(BIN)/python experiments/results.py --tables

# What is done in fewer steps, against its plain form: reports and tables. For figures to quote, leave the machine alone.
bench: install
	$(BIN)/python benchmarks/run.py --out results/benchmarks --into docs

bench-quick: install
	$(BIN)/python benchmarks/run.py --size quick --out runs/bench-quick

# The documents as a site, in build/site; a page that is not in the navigation or a link that leads nowhere is an error.
docs: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
