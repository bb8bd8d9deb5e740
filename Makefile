PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
export OMP_NUM_THREADS ?= 1
# The tests start many processes: each module is compiled once.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint types tests docs clean

demo: $(VENV)/.demo
	OMP_NUM_THREADS=2 $(BIN)/regard compare --out demo
	@echo "report: $(CURDIR)/demo/report.html"

test: lint types docs tests

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests docs
	$(BIN)/ruff format --check src tests docs

types: $(VENV)/.dev
	$(BIN)/mypy

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

tests: docs
	REGARD_SITE=$(CURDIR)/site $(BIN)/pytest -n $(WORKERS)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[compare]'
	touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) site demo .pytest_cache .mypy_cache .ruff_cache
