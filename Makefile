# make demo       distil the built-in world: one to two minutes after installation on two cores,
#                 no network but for packages
# make test       lint, types and the tests of every commit: at most eight minutes on two cores
#                 after installation
# make test-all   those and the long ones: jobs on nodes, faults, docs/ word by word, the browser,
#                 the benchmark (about an hour)
# make test-long  the long ones alone
# make bench      every row of benchmarks/RESULTS.md beside its baseline (hours, on an idle machine)
# make fuzz       coverage-guided fuzzing of the parsers of untrusted bytes, FUZZ_SECONDS per target
# KIND=gpu        with any of them: in .venv-gpu, whose k-means runs on GPUs (Linux on x86-64)
PYTHON ?= python3
KIND ?= cpu
# an environment per kind: what is installed stays, and the two FAISS overwrite each other
VENV := .venv$(patsubst %,-%,$(filter-out cpu,$(KIND)))
BIN := $(VENV)/bin
RUN := runs/demo
# PDS as published is the preset alone; with these an image shows what its caption says
FAITHFUL := --prototypes.center medoid --decode.candidates 2 --real-fallback on \
	--caption.nearest_to both
FUZZ_SECONDS := 300
UNIT := tests/unit tests/fuzz
ON_RAY := tests/distributed tests/end_to_end
PODS := build/pods
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
# small tensors lose by a second thread, above all beside another process of tests
UNIT_TESTS := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal $(UNIT)

.PHONY: install develop demo lint types lint-configs unit test test-all test-long test-faults bench \
	fuzz clean

# Two steps, each with a stamp that is written when it is complete: one stopped half-way runs again.
install: $(VENV)/.installed
develop: $(VENV)/.developed

$(VENV)/.installed: pyproject.toml constraints.txt
	rm -f $(VENV)/.installed $(VENV)/.developed
	$(PYTHON) -m venv $(VENV)
	@echo "Installing what a run needs: about 6.5 GB, most of it PyTorch with CUDA."
	$(PIP) -e '.[$(KIND)]'
	touch $@

$(VENV)/.developed: $(VENV)/.installed
	rm -f $@
	@echo "Installing the tools of the tests: about 0.6 GB."
	$(PIP) -e '.[$(KIND),dev]'
	touch $@

demo: install
	$(BIN)/pds-ray distill --preset demo $(FAITHFUL) --out $(RUN)
	$(BIN)/pds-ray show $(RUN) --sheet $(RUN)/contact_sheet.png > /dev/null

lint: develop
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: develop
	$(BIN)/mypy

lint-configs: develop
	$(BIN)/hadolint cluster_configs/docker/Dockerfile
	$(BIN)/shellcheck .ci/run cluster_configs/slurm/pds_ray.sbatch
	$(BIN)/python -m tests.support.cluster_files $(PODS)
	$(BIN)/kubernetes-validate --strict --quiet -k 1.35 $(PODS)/*.yaml

unit: develop
	$(UNIT_TESTS)

# pytest-xdist and one Ray for all tests do not mix: first the tests without Ray, then those on it;
# the type checker has one thread only, hence runs beside the first
test: lint lint-configs
	$(MAKE) --no-print-directory --jobs=2 types unit
	$(BIN)/pytest $(ON_RAY)

test-all: lint types lint-configs
	$(UNIT_TESTS) -m ''
	$(BIN)/pytest -m '' $(ON_RAY) tests/faults

test-long: develop
	$(BIN)/pytest -m long

test-faults: develop
	$(BIN)/pytest -m '' tests/faults

# each side in a process of its own; writes benchmarks/results.json and the marked section of
# benchmarks/RESULTS.md
bench: develop
	$(BIN)/python -m benchmarks all --write

# inputs that reach new code are kept in runs/fuzz; one that fails goes to tests/fuzz/found, which
# `make test` replays
fuzz: develop
	$(PIP) -e '.[fuzz]'
	for target in tar record caption image; do \
		mkdir -p runs/fuzz/$$target tests/fuzz/found/$$target && \
		$(BIN)/python tests/fuzz/fuzz.py $$target runs/fuzz/$$target \
			-max_total_time=$(FUZZ_SECONDS) -timeout=20 -rss_limit_mb=3000 -max_len=16384 \
			-artifact_prefix=tests/fuzz/found/$$target/ || exit 1; \
	done

clean:
	rm -rf $(VENV) runs build dist *.egg-info
