# Each target makes the environment that it needs, in .venv, so that any of them works on a fresh clone.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# The native extension is built again when one of these changes.
SOURCES := pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/* csrc/*/*)

.PHONY: demo test lint bench clean

demo: .venv/.installed
	$(BIN)/latentmas run

test: .venv/.installed-test
	@# fetched once here, so that the test processes do not each fetch it
	$(BIN)/python -c "from latentmas.default_model import default_model_folder; default_model_folder()"
	$(BIN)/python -m pytest

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.installed-test .venv/.installed-bench
	$(BIN)/python -m pytest benchmarks/bench_realign.py
	$(BIN)/python benchmarks/bench_native.py

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

.venv/.installed-%: .venv/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$*]"
	@touch $@

clean:
	rm -rf .venv build *.egg-info latentmas_kernels/*.so
