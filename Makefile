# One environment in .venv, made by whichever target needs it first.
#   make quickstart   merge four real fine-tunes and print the table
#   make test         run the tests
#   make check        lint, types, tests: what .ci/run runs
#   make TORCH=...    anything pip takes for torch: a version, a wheel, an index option
PYTHON ?= python3
TORCH ?= $(shell grep '^torch==' constraints.txt)
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: quickstart test lint types check clean

quickstart: $(VENV)/base.stamp
	$(BIN)/python recipes/quickstart/fetch.py
	$(BIN)/mergebench merge recipes/quickstart.yaml --overwrite
	@printf '%s\n' 'next:' "    source '$(BIN)/activate'" '    mergebench report merged/quickstart --open'

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n logical --dist loadfile

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.stamp
	$(BIN)/mypy

check: lint types test

# torch first: a range would let pip choose a build for graphics cards, several gigabytes larger.
$(VENV)/base.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(PIP) -c $(VENV)/constraints.txt -e .
	touch $@

$(VENV)/dev.stamp: $(VENV)/base.stamp
	$(PIP) -c $(VENV)/constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) merged trained banks recipes/*/cache
