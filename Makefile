# Everything runs inside .venv, made from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test slow lint results clean

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
	$(BIN)/python -m pytest -n 2

slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# The methods on the drawn world, three seeds each (five of the two that are compared), then the table in the README.
results: install
	for method in zero-shot simplecil finetune joint dmc dmc-ot; do \
		case $$method in dmc*) seeds=1,2,3,4,5;; *) seeds=1,2,3;; esac; \
		$(BIN)/cairn run $$method --data shapes --seeds $$seeds --out results/shapes/$$method || exit 1; \
	done
	$(BIN)/cairn table results/shapes --into README.md --name shapes

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
