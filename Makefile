# `make demo`, `make demo-smollm2` and `make test` need nothing but Python 3.11 or newer with pip,
# and make.
PYTHON ?= python3
VENV ?= .venv
# Apart, since JAX would look for accelerators there.
AHEAD ?= $(VENV)-ahead
BIN = $(VENV)/bin

.PHONY: demo demo-smollm2 test test-all faults ahead lint

demo: $(VENV)/run-ready
	$(BIN)/python scripts/run_pa.py --input_texts examples/passkey_2048.txt --max_output_length 16 \
	  --rope_scaling '{"rope_type": "yarn", "factor": 4.5, "original_max_position_embeddings": 512}'

demo-smollm2: $(VENV)/gguf-ready
	$(BIN)/python scripts/demo.py

test: $(VENV)/test-ready
	$(BIN)/python -m pytest -q -m "not slow"

test-all: $(VENV)/test-ready
	$(BIN)/python -m pytest -q

faults: $(VENV)/test-ready
	$(BIN)/python tests/faults.py

ahead: $(AHEAD)/ahead-ready
	$(AHEAD)/bin/python -m pytest -q --dist worksteal tests/ahead

lint: $(VENV)/test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

%/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lsjax needs Python 3.11 or newer; say PYTHON=/path/to/it")'
	$(PYTHON) -m venv $*

$(VENV)/run-ready: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/gguf-ready: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet --editable '.[gguf]'
	touch $@

$(VENV)/test-ready: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

$(AHEAD)/ahead-ready: $(AHEAD)/bin/python pyproject.toml
	$(AHEAD)/bin/pip install --quiet --editable '.[test,ahead]'
	touch $@
