# make run    build the environment, then results/quick: layers of DINOv2 and two targets by the shipped inverses, and the page
# make study  the studies of the reference run, with inverses of their own: remakes results/reference; it goes on where it was interrupted
# make test   what is checked, with a pytest summary as the last line; make test-all: the slow tests too
# make explore  the explorer in a browser        make lab     the notebooks in JupyterLab
# make bench  results/bench/*.csv, a quarter of an hour
# make lint   style and types                    make clean   remove what these commands make
#
# Needs Python 3.11 or 3.12, make and the package registry that pip or uv is set up for.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PRESET ?= quick
CORES ?= $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
WORKERS ?= $(shell [ $(CORES) -lt 4 ] && echo $(CORES) || echo 4)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NOTEBOOKS = $(wildcard notebooks/[0-9][0-9]_*.ipynb)

.PHONY: run study test test-all browser lab explore lint bench clean clean-venv install

run: $(INSTALLED)
	$(BIN)/snakemake --config preset=$(PRESET) --cores $(CORES) --rerun-incomplete --nolock --keep-going \
		--show-failed-logs --quiet rules host
	@echo "Open results/$(PRESET)/index.html"

study:
	$(MAKE) run PRESET=reference

# The pages are tested in Chromium. A build machine (CI set, root, Debian's packages) gets it; elsewhere the tests that
# need it are skipped and say how to install it.
browser:
	@if [ -n "$${CI:-}" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& ! command -v chromium chromium-browser google-chrome google-chrome-stable >/dev/null; then \
		echo "Installing Chromium for the tests of the pages."; \
		for attempt in 1 2; do \
			apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
				chromium fonts-dejavu-core >/dev/null && break; done || true; \
	fi

# One process for each file, or notebook, at a time; a test process or a kernel computes with one thread.
test test-all: $(INSTALLED) browser
	OMP_NUM_THREADS=1 TQDM_DISABLE=1 HF_HUB_OFFLINE=1 BACKSIGHT_RESULTS=$(CURDIR)/results/test \
	$(BIN)/python -m pytest tests $(if $(NOTEBOOKS),--nbval $(NOTEBOOKS) --nbval-kernel-name python3 \
		--nbval-sanitize-with tests/nbval.cfg --nbval-cell-timeout 600 --nbval-kernel-startup-timeout 180) \
		-n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 25 $(if $(filter test,$@),-m "not slow") $(PYTEST_OPTIONS)

lab: $(INSTALLED)
	$(BIN)/jupyter lab notebooks

explore: $(INSTALLED)
	$(BIN)/backsight explore

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# SIZE=real: real.py at 384 and 768 channels; SIZE=full: real sizes, and the whole timm zoo; hours.
bench: $(INSTALLED)
	for benchmark in $(sort $(filter-out %/table.py $(if $(filter full,$(SIZE)),,%/zoo.py),$(wildcard benchmarks/[a-z]*.py))); do \
		SIZE=$(SIZE) $(BIN)/python $$benchmark; done
	$(BIN)/python benchmarks/table.py

clean:
	rm -rf results/{quick,smoke,test,bench} .snakemake .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

clean-venv:
	rm -rf $(VENV) .uv

install: $(INSTALLED)

# uv where it is there, else uv from the registry in a place of its own, else plain pip.
$(INSTALLED): requirements.lock pyproject.toml
	@python=""; for candidate in python3.11 python3.12 python3; do \
		if $$candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then \
			python=$$(command -v $$candidate); break; fi; done; \
	if [ -z "$$python" ]; then \
		echo "backsight needs Python 3.11 or 3.12, and none of python3.11, python3.12, python3 is one." >&2; exit 1; fi; \
	uv=uv; \
	if ! uv --version >/dev/null 2>&1; then \
		uv=.uv/bin/uv; \
		[ -x $$uv ] || $$python -m pip install --quiet --target .uv uv || uv=""; fi; \
	if [ -n "$$uv" ] \
		&& { [ -x $(BIN)/python ] || $$uv venv --quiet --python "$$python" $(VENV); } \
		&& $$uv pip sync --quiet --compile-bytecode --python $(BIN)/python requirements.lock \
		&& $$uv pip install --quiet --python $(BIN)/python --no-deps -e .; then \
		echo "Installed requirements.lock into $(VENV) with $$($$uv --version)."; \
	else \
		echo "No uv, or it could not install; going on with plain pip." >&2; \
		$$python -m venv --clear $(VENV); \
		$(BIN)/python -m pip install --quiet --require-hashes -r requirements.lock; \
		$(BIN)/python -m pip install --quiet --no-deps -e .; \
		echo "Installed requirements.lock into $(VENV) with pip."; \
	fi
	@touch $@
