# Everything here works on a machine with Python 3.11+ and make; the virtual environment is made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow check docs clean

demo: $(VENV)/core  ## the whole chain in a few minutes: text, tokenizer, training, samples, the bill
	$(BIN)/leanseek demo

test: $(VENV)/dev  ## the proofs that fit into minutes
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow"

test-slow: $(VENV)/dev  ## the long proofs
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "slow and not all_cores"
	$(BIN)/python -m pytest -m all_cores

check: $(VENV)/dev  ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/dev  ## bring help texts and file trees in the documents up to date
	$(BIN)/python -m tests.living_docs

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/core: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[gpu,oracle,gguf,grammar,eval,data,dev]"
	touch $@
