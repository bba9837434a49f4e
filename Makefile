# Each target shows the plain pip and python lines that it runs; they can as well be typed by hand.
# Another interpreter: make demo PYTHON=python3.12. Another environment: make test VENV=/some/where.

PYTHON ?= python3
VENV ?= .venv
MODEL ?= smollm2-135m
PROMPT ?= Explain in three sentences why the sky is blue.
PYTEST_ARGS ?= -n auto --dist loadfile --no-loadscope-reorder
ASV_ARGS ?=

BIN := $(VENV)/bin
export NO_MKDOCS_2_WARNING = 1

.PHONY: help demo test test-lowest test-aarch64 check docs dist bench bench-history clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/make \1\t\2/' | expand -t 22

demo: $(VENV)/.installed ## install, fetch a small model (93 MB, once) and let it answer a question
	$(BIN)/ruvllm pull $(MODEL)
	$(BIN)/ruvllm generate $(MODEL) --prompt "$(PROMPT)" --max-tokens 120

test: $(VENV)/.installed-test ## install with the test extra and run the whole suite
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-lowest: ## kernels and models with the lowest versions of what ruvllm depends on (tests/lowest.txt)
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --editable '.[test]' --constraint tests/lowest.txt
	$(VENV)-lowest/bin/python -m pytest $(PYTEST_ARGS) tests/kernels tests/model

test-aarch64: $(VENV)/.installed-test ## kernels and models on an emulated ARM processor (needs qemu-user-static)
	$(BIN)/python -m tests.aarch64

check: $(VENV)/.installed-check ## lint, types, documentation, and whether asv understands the benchmarks
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/asv check -E existing:$(BIN)/python
	$(BIN)/mkdocs build --strict --quiet

docs: $(VENV)/.installed-docs ## build the documentation: site/index.html
	$(BIN)/mkdocs build --strict

dist: $(VENV)/.installed-test ## build sdist and wheel into dist/, and check them
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

bench: $(VENV)/.installed-bench ## asv: measure this commit
	$(BIN)/asv run $(ASV_ARGS) HEAD^!

bench-history: $(VENV)/.installed-bench ## asv: measure the last five commits and make a page of them, .asv/html
	$(BIN)/asv run $(ASV_ARGS) HEAD~5..HEAD
	$(BIN)/asv publish

clean: ## remove the environment and what the tools left behind (not the model cache)
	rm -rf $(VENV) $(VENV)-lowest .venv-aarch64 .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist site

# Editable installs follow the sources; only changed metadata, or another Python, asks for a new one.
$(VENV)/.installed: pyproject.toml $(BIN)/python
	$(BIN)/python -m pip install --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml $(BIN)/python
	$(BIN)/python -m pip install --editable '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: pyproject.toml $(BIN)/python
	$(BIN)/python -m pip install --editable '.[docs]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-check: pyproject.toml $(BIN)/python
	$(BIN)/python -m pip install --editable '.[test,docs]'
	@touch $@ $(VENV)/.installed-test $(VENV)/.installed-docs $(VENV)/.installed

$(VENV)/.installed-bench: pyproject.toml $(BIN)/python
	$(BIN)/python -m pip install --editable '.[bench]'
	$(BIN)/asv machine --yes
	@touch $@ $(VENV)/.installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("ruvllm needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": name another with PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
