# make demo   distil the built-in world (one to two minutes after installation, two cores, no network but for packages)
# make test   lint, types and tests
# make test-long   the tests that make test leaves out: docs/ word by word, twenty kills, dying nodes
# make test-faults   all tests of faults, the long ones too (about half an hour)
# make bench  all rows of benchmarks/RESULTS.md side by side with what they are measured against (hours, on an idle machine)
# make fuzz   coverage-guided fuzzing of what strangers' bytes reach, FUZZ_SECONDS for each of four targets
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo
FUZZ_SECONDS := 300

.PHONY: install demo test test-long test-faults lint types bench fuzz clean

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

test-long: install
	$(BIN)/pytest -m long

# the long ones too: twenty kills, dying nodes
test-faults: install
	$(BIN)/pytest tests/faults -m ray

# each side in a process of its own; writes benchmarks/results.json and the marked section of benchmarks/RESULTS.md
bench: install
	$(BIN)/python -m benchmarks all --write

# what reaches new code is kept in runs/fuzz; an input that fails goes to tests/fuzz/found, which `make test` replays
fuzz: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[fuzz]'
	for target in tar record caption image; do \
		mkdir -p runs/fuzz/$$target tests/fuzz/found/$$target && \
		$(BIN)/python tests/fuzz/fuzz.py $$target runs/fuzz/$$target -max_total_time=$(FUZZ_SECONDS) -timeout=20 \
			-rss_limit_mb=3000 -max_len=16384 -artifact_prefix=tests/fuzz/found/$$target/ || exit 1; \
	done

clean:
	rm -rf $(VENV) runs build dist *.egg-info
