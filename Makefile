# From a bare Python 3.11 or newer and make: `make quickstart`, `make cascade`, `make test`. Another Python: make quickstart PYTHON=python3.12
# Another place for the virtual environment: VENV=...; a GPU: EXTRAS=cuda12 (or cuda13).
VENV ?= .venv
EXTRAS ?=
PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11 python,$(if \
	$(shell $(name) -c 'import sys; print(sys.version_info >= (3, 11) or "")' 2>/dev/null),$(name))))

comma := ,
BIN := $(VENV)/bin

.PHONY: help quickstart cascade test clean

help:
	@echo "make quickstart  train a small New-LLM on text that Python itself carries, and print its report"
	@echo "make cascade     train a small CASCADE stage on the real SmolLM2-135M, and print their report"
	@echo "make test        run the whole test suite"
	@echo "make clean       delete $(VENV)"

quickstart: $(BIN)/.newllm
	@mkdir -p runs
	$(BIN)/python train.py --config quickstart
	@echo
	@cat "$$(ls -td runs/quickstart-*/ | head -n 1)report.md"

cascade: $(BIN)/.newllm-gguf
	@mkdir -p runs
	$(BIN)/python cascade.py --config quickstart
	@echo
	@cat "$$(ls -td runs/cascade-quickstart*/ | head -n 1)report.md"

test: $(BIN)/.newllm-test
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV)

# The marks are made anew when the dependencies change; until then the environment is used as it is.
$(BIN)/.newllm: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e '.$(if $(EXTRAS),[$(EXTRAS)])'
	@touch $@

$(BIN)/.newllm-gguf: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e '.[gguf$(if $(EXTRAS),$(comma)$(EXTRAS))]'
	@touch $@ $(BIN)/.newllm

$(BIN)/.newllm-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e '.[test$(if $(EXTRAS),$(comma)$(EXTRAS))]'
	@touch $@ $(BIN)/.newllm

$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { echo "error: no Python 3.11 or newer found; name one: make PYTHON=/path/to/python3" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=/path/to/python3" >&2; exit 2; }
	"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) cannot make virtual environments (on Debian: apt install python3-venv)" >&2; exit 2; }
