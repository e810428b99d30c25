# make demo   distil the built-in world (about five minutes after installation, two cores, no network but for packages)
# make test   lint, types and tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo

.PHONY: install demo test lint types clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/pds-ray distill --preset demo --out $(RUN)
	$(BIN)/pds-ray show $(RUN) --sheet $(RUN)/contact_sheet.png > /dev/null

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

test: lint types
	$(BIN)/pytest

clean:
	rm -rf $(VENV) runs build dist *.egg-info
