# `make demo` and `make test` each work as the first command on a fresh clone.
PYTHON ?= python3
BIN := .venv/bin

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec

.PHONY: install demo test grids proof clean
.DELETE_ON_ERROR:

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

install: .venv/installed

# Train a classifier on digits with and without adversarial training, evaluate both, put both into one report.
demo: .venv/installed
	rm -rf runs/demo
	$(BIN)/python train.py adv=none name=clean-trained run_dir=runs/demo/clean-trained
	$(BIN)/python train.py adv=pgd name=adversarially-trained run_dir=runs/demo/adversarially-trained
	$(BIN)/python -m ares_lightning.evaluation.report runs/demo --output runs/demo/report.html --figure docs/demo.png
	mkdir -p docs/results
	for run in clean-trained adversarially-trained; do cp runs/demo/$$run/summary.json docs/results/demo-$$run.json; done

# Lint, types, and every claim on a reduced grid.
test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m 'not proof'

# All that can be shown; what is printed is kept once it has passed.
proof: .venv/installed-dev
	@mkdir -p docs/results
	{ $(BIN)/python benchmarks/provenance.py; time PYTEST_ADDOPTS=--disable-warnings $(MAKE) --no-print-directory test grids; } 2>&1 \
		| sed --unbuffered "s|$(CURDIR)/||g" | tee docs/results/proof.tmp
	mv docs/results/proof.tmp docs/results/proof.txt

# The full grid of invariants; then the README's claims on the real thing, one at a time since they are timed.
grids: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m proof -k combination
	$(BIN)/python -m pytest -m proof -k 'not combination'

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
