# Two commands: `make sweep` finds something out, `make test` checks everything. Both make .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PARALLEL := -n 2 --dist loadfile

.PHONY: sweep results test slow cluster lint clean

sweep: $(INSTALLED)
	$(BIN)/python sweeps/format_ablation.py $(ARGS)

results: $(INSTALLED)
	$(BIN)/python -m altgrad.results

test: $(INSTALLED) lint
	$(BIN)/python -m pytest $(PARALLEL)

slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow $(PARALLEL)

cluster: $(INSTALLED)
	$(BIN)/python -m pytest -m cluster -rs

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.11"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
