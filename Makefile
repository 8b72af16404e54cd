# make demo | make test | make check | make docs | make bench | make reproduce | make distribution | make setup
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test check docs bench reproduce distribution format clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit("genembed needs Python 3.11 to 3.13, but $(PYTHON) is %d.%d: name another one with make PYTHON=python3.12" % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/genembed demo

test: setup
	$(BIN)/python -m pytest -n auto --dist loadfile

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Needs the package index, and some minutes: what a user gets who installs the package.
distribution: setup
	$(BIN)/python distribution/check.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	$(BIN)/python benchmarks/roofline.py
	$(BIN)/python benchmarks/soft_token.py
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/approximations.py
	$(BIN)/python benchmarks/throughput.py --models mini --check
	$(BIN)/python benchmarks/throughput.py --models qwen qwen-bf16 --check
	$(BIN)/python benchmarks/throughput.py --models mini --kinds queries --texts 512 --rows 1 8 32 128 512 --repeats 1
	$(BIN)/python benchmarks/profitability.py
	$(BIN)/python benchmarks/scifact.py

# Hours: what has a result file is left out, so it can be stopped and given again.
reproduce: setup
	$(BIN)/python benchmarks/reproduce.py
	$(BIN)/python benchmarks/halting.py
	$(BIN)/python benchmarks/instructions.py --untrained runs/reproduction/mini-untrained-seed0
	$(BIN)/python benchmarks/generation_cost.py
	$(BIN)/python benchmarks/report.py

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
