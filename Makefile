# Everything a developer does. `make` alone prints this interface.
# A fresh machine needs only Python >= 3.11 and make: every target sets up what it uses.

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
# Continuous integration also runs the tests that compare with other libraries.
WITH_PEERS := $(VENV)/.setup-peers
SETUP := $(if $(CI),$(WITH_PEERS),$(VENV)/.setup)
ON_GPU := $(firstword $(wildcard $(BIN)/python) $(PYTHON))
comma := ,
# KaTeX's script travels in this wheel; its own dependencies are not wanted.
KATEX := pelican-katex==1.8.9
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export OMP_NUM_THREADS ?= 1
# Chapters have 60 s on two idle cores; a shared machine may take three times as long.
export BOOK_SLOWNESS ?= 3
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help setup chapter book serve test check fmt fmt-check lint types imports \
	map golden golden-check vectors matrix mutants results bench fuzz devices cuda12 \
	gpu test-gpu ci-deps clean

help:  ## print this table
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

setup: $(SETUP)  ## create .venv and install the package with all it needs

$(VENV)/.setup $(WITH_PEERS): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "minipeft needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing minipeft into $(VENV) (once; some minutes on a slow line) ..."
	@$(BIN)/pip install -q -e '.[$(if $(findstring peers,$@),dev$(comma)peers,dev)]' -c constraints.txt
	@$(BIN)/pip install -q --no-deps $(KATEX)
	@touch $@
	@echo "installed; '. $(BIN)/activate' makes python and minipeft those of this folder"

chapter: $(SETUP)  ## run one chapter: make chapter N=01 [ARGS="--steps 50"]
	@$(BIN)/python chapters/$(N)_*.py $(ARGS)

book: $(SETUP)  ## run every chapter and build the book
	@$(BIN)/mkdocs build --strict
	@echo "The book is built. Open it here: file://$(CURDIR)/build/site/index.html"

serve: $(SETUP)  ## show the book while you write
	@$(BIN)/mkdocs serve

test: $(SETUP)  ## run the tests (without a GPU; see test-gpu)
	@$(BIN)/pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder tests

check: fmt-check lint types imports test  ## all that must be clean before a commit

fmt: $(SETUP)  ## format the code
	@$(BIN)/ruff format . && $(BIN)/ruff check -q --fix .

fmt-check: $(SETUP)
	@$(BIN)/ruff format --check -q .

lint: $(SETUP)  ## ruff, spelling, and tolerances only where they are derived
	@$(BIN)/ruff check -q .
	@$(BIN)/typos
	@! grep -rnE '\b(atol|rtol) ?= ?[0-9.]' --include='*.py' minipeft tests chapters site \
	  | grep -v '^tests/tolerance.py' || { \
	  echo "a tolerance is written outside tests/tolerance.py: derive it there" >&2; exit 1; }

types: $(SETUP)  ## mypy --strict
	@$(BIN)/mypy

imports: $(SETUP)  ## the arrows between modules
	@$(BIN)/lint-imports

map: $(SETUP)  ## draw the map in the README
	@$(BIN)/python site/hooks/book/methods.py --write

golden: $(SETUP)  ## write the golden vectors
	@$(BIN)/python -m minipeft.golden.generate

golden-check: $(SETUP)  ## write them elsewhere and compare
	@mkdir -p build && rm -rf build/golden && $(BIN)/python -m minipeft.golden.generate --out build/golden
	@diff -r minipeft/golden/v1 build/golden && echo "golden vectors: regenerated, identical"

vectors: $(SETUP)  ## pack the vectors for other languages, with checksums
	@$(BIN)/python -m minipeft.golden.archive --out build

matrix: $(SETUP)  ## run the vectors on other libraries (installs each apart; takes long)
	@$(BIN)/python tools/matrix.py

results: $(SETUP)  ## recompute chapters/results: seeds, sweeps, sizes (takes long)
	@for script in $$(grep -l 'chapter\.full' chapters/[0-9]*.py); do \
	  echo "$$script --full" && $(BIN)/python $$script --full || exit; done
	@$(BIN)/python chapters/01_lora.py --out build/results
	@cp build/results/loss.svg chapters/results/01_lora_loss.svg
	@sed 's/#24292f/#e6edf3/g; s/#d0d7de/#444c56/g' build/results/loss.svg \
	  > chapters/results/01_lora_loss_dark.svg

bench: $(WITH_PEERS)  ## time against peft and bitsandbytes, in pairs, as ratios
	@$(BIN)/python -m minipeft.lab.bench

mutants: $(SETUP)  ## change the code in one place, and see the vectors notice
	@$(BIN)/python -W ignore tools/mutants.py $(ARGS)

fuzz: $(SETUP)  ## damage files at random, ten minutes a parser: make fuzz [ARGS="--seed 1 gguf"]
	@$(BIN)/python tools/fuzz.py $(ARGS)

devices: $(SETUP)  ## run every chapter on a pretended device (takes minutes)
	@$(BIN)/python -W ignore -m tests.book.on_a_device build/devices

cuda12: $(SETUP)  ## compile the kernels with NVRTC 12 (gets 93 MB)
	@$(BIN)/pip install -q --no-deps --upgrade --target build/cuda12 -c constraints.txt \
	  nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12
	@$(BIN)/python -m tests.cuda.compile_12 build/cuda12

# These two install nothing: a machine with a GPU has its own torch and CuPy.
gpu:  ## all that only a CUDA device can show: make gpu [STAGE=bench-kernels]
	@$(ON_GPU) tools/gpu.py $(STAGE)

test-gpu:  ## the tests, the vectors, compute-sanitizer on a CUDA device
	@$(ON_GPU) tools/gpu.py tests vectors sanitizers

ci-deps:  ## Debian packages that the full test run uses
	@if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  missing=""; for p in chromium nodejs g++ rustc; do dpkg -s $$p >/dev/null 2>&1 || missing="$$missing $$p"; done; \
	  if [ -n "$$missing" ]; then apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$missing >/dev/null; fi; \
	else echo "ci-deps: not root on Debian; install chromium, nodejs, g++ and rustc yourself"; fi

clean:  ## remove what was built (not .venv)
	@rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
