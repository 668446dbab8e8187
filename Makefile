# Needs a Python >= 3.10 with pip; everything is installed into $(VENV), at the versions of $(CONSTRAINTS).
# On Linux the default torch brings CUDA (gigabytes); for the CPU build:
#   make test PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON      ?= python3
PIP_ARGS    ?=
VENV        ?= .venv
CONSTRAINTS ?= constraints.txt
LINT        ?= lint
JOBS        ?= 2
PYTEST_ARGS ?=
DEMO_ARGS   ?=
TUNE_ARGS   ?=
GPU_JOBS    ?= $(if $(STAND_IN),$(JOBS),14)
GPU_TEST_ARGS  ?=
GPU_BENCH_ARGS ?=
RECORD      ?=

BIN  := $(abspath $(VENV))/bin
SITE := $(abspath $(VENV))/site
PIP  := $(BIN)/python -m pip --disable-pip-version-check

# A folder changes when a file is added to it or removed.
SOURCES := $(shell find fused_infonce kernels -name __pycache__ -prune -o \( -type d -o -name '*.py' \) -print) \
           pyproject.toml $(wildcard README.md)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo demo-temperature demo-recommender demo-distributed test test-compat lint style types bench plots tiles pipes gpu clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed-demo ## train a text retriever and show what it finds; ASK="..." then asks the saved model
	$(BIN)/python -m examples.retrieval $(DEMO_ARGS)

demo-temperature: $(VENV)/.installed-demo ## train at fixed, learned and fitted temperatures, side by side
	$(BIN)/python -m examples.temperature $(DEMO_ARGS)

demo-recommender: $(VENV)/.recommender ## train a recommender with and without the correction of in-batch negatives
	$(BIN)/python -m examples.recommender $(DEMO_ARGS)

demo-distributed: $(VENV)/.installed-demo ## train the text retriever over two processes and in one, side by side
	OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --nproc-per-node 2 -m examples.distributed $(DEMO_ARGS)

# The tests see the installed layout, ahead of the editable install and of the repository itself.
# Whatever measures time or takes all cores runs alone, first; the rest runs in $(JOBS) processes.
TEST := PYTHONPATH=$(SITE) TRITON_INTERPRET=1 $(BIN)/pytest --timeout 600 --benchmark-disable
PHASES = failed=0; \
	$(1) -m serial $(PYTEST_ARGS) || [ $$? -eq 5 ] || failed=1; \
	OMP_NUM_THREADS=1 $(1) -m "not serial" -n $(JOBS) --dist worksteal --durations 10 $(PYTEST_ARGS) || failed=1; \
	exit $$failed
test: $(LINT) $(VENV)/.peers $(VENV)/.site ## ruff, mypy and all tests that need no GPU
	@$(call PHASES,$(TEST))

test-compat: $(VENV)/.libraries $(VENV)/.peers $(VENV)/.site ## every drop-in against its library, at the versions of constraints.txt
	@$(call PHASES,FUSED_INFONCE_COMPAT=1 $(TEST) tests/compat)

lint: style types ## ruff and mypy

style: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# In the folder of the installed copy, which then comes before the repository's root.
types: $(VENV)/.site
	cd $(SITE) && MYPYPATH=$(CURDIR) $(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache \
	fused_infonce $(abspath $(wildcard tests benchmarks examples))

bench: $(VENV)/.installed-bench $(VENV)/.peers ## microbenchmarks on this machine's CPU, under 10 minutes
	CUDA_VISIBLE_DEVICES= HIP_VISIBLE_DEVICES= \
	$(BIN)/pytest benchmarks --benchmark-only --benchmark-columns median --record results/cpu.csv $(PYTEST_ARGS)

plots: $(VENV)/.installed-bench ## draw time and memory against N from the recorded results, into docs/
	$(BIN)/python -m benchmarks.plot

# On a GPU: with the torch that is there, and no environment is made and nothing is downloaded. The other packages are
# those of $(PYTHON), or the wheels of a folder that `make wheels` fills where there is a network, to be carried along.
# STAND_IN=1 runs it all small, on a CPU, in Triton's interpreter, with what is installed into $(VENV): to see it run to
# its end; nothing is timed or recorded, and of the tests outside of tests/gpu, which make test runs, two files do.
# python -m pytest would put the repository root, where kernels/ is not yet fused_infonce.kernels, ahead of PYTHONPATH.
# python -m benchmarks... does too, and puts it right: see benchmarks/__init__.py.
STAND_IN ?=
WHEELS   ?= .wheels
REPORTS  ?= .gpu-reports
GPU_SITE := $(CURDIR)/.gpu-site
GPU_PYTHON = $(if $(STAND_IN),$(BIN)/python,$(PYTHON))
GPU_ENV   = env $(if $(STAND_IN),TRITON_INTERPRET=1 OMP_NUM_THREADS=1,-u TRITON_INTERPRET) PYTHONPATH=$(GPU_SITE)$${PYTHONPATH:+:$$PYTHONPATH}
GPU_TEST  = $(GPU_ENV) $(1) $(GPU_PYTHON) -c 'import sys; sys.path[:] = filter(None, sys.path); import pytest; sys.exit(pytest.main())'
GPU_NEEDS = pytest pytest_benchmark pytest_reportlog pytest_timeout xdist hypothesis tqdm
SEPARATOR := ,
.PHONY: wheels gpu-site gpu-bench tune
gpu-site: $(if $(STAND_IN),$(VENV)/.installed-test)
	@$(GPU_PYTHON) -c 'import sys, torch; sys.exit(None if "$(STAND_IN)" or torch.cuda.is_available() else "torch sees no GPU; STAND_IN=1 runs it small, on a CPU")'
	rm -rf $(GPU_SITE) && mkdir $(GPU_SITE)
	cp -R fused_infonce $(GPU_SITE)/ && cp -R kernels $(GPU_SITE)/fused_infonce/
	$(if $(wildcard $(WHEELS)/*.whl),$(PIP_OF_GPU) --target $(GPU_SITE) $(wildcard $(WHEELS)/*.whl))
	@$(GPU_ENV) $(GPU_PYTHON) -c 'import $(subst $() ,$(SEPARATOR),$(GPU_NEEDS))' || \
	{ echo "Install it, or carry it along: make wheels" >&2; exit 1; }
PIP_OF_GPU = $(GPU_PYTHON) -m pip --disable-pip-version-check install --quiet --no-index --no-deps --no-compile

# What the tests need, what that needs, and the peers of benchmarks/contestants.py, of which only the losses are used.
CARRIED = pytest iniconfig packaging pluggy pygments pytest-benchmark py-cpuinfo2 pytest-reportlog pytest-timeout \
          pytest-xdist execnet hypothesis sortedcontainers tqdm \
          cut-cross-entropy inf-cl info-nce-pytorch liger-kernel lightly memeff open_clip_torch
CARRIED_FOR = --python-version 3.12 --platform manylinux2014_x86_64
wheels: ## collect wheels for a GPU without a network into .wheels/ (CARRIED_FOR="--python-version 3.12 ...")
	rm -rf $(WHEELS)
	$(PYTHON) -m pip --disable-pip-version-check download --quiet $(PIP_ARGS) -c $(CONSTRAINTS) --no-deps \
	--only-binary :all: $(CARRIED_FOR) -d $(WHEELS) $(CARRIED)

# Under 10 minutes, each part with its own share of seconds; a failure in one keeps no other from running. PYTEST_ARGS are
# for all parts, GPU_TEST_ARGS for tests alone. A line of $(REPORTS)/*.jsonl is written as soon as a test has run. RECORD,
# of one target at a time, is the CSV file to append to, absolute or relative to benchmarks/. Without git,
# FUSED_INFONCE_COMMIT=... in the environment says which commit was measured.
PART = $(call GPU_TEST,$(4)) $(2) --session-timeout $(3) --timeout 60 --timeout-method thread \
       --report-log $(REPORTS)/$(1).jsonl $(PYTEST_ARGS) || [ $$? -eq 5 ] || failed=1
ON_GPU = -m $(if $(STAND_IN),interpreter,gpu) $(GPU_TEST_ARGS)
WORKERS = --numprocesses $(GPU_JOBS) --dist worksteal
OTHERS = $(if $(STAND_IN),tests/backends/test_dense_plan_in_triton.py tests/backends/test_launch_counts.py, \
         tests --ignore tests/gpu)
NO_SANITIZER = $(if $(STAND_IN),it watches a GPU and there is none,it is not on the PATH)
MICRO = benchmarks --benchmark-only \
        $(if $(STAND_IN),-k one-64x64 --benchmark-columns rounds,--record $(or $(RECORD),results/gpu-micro.csv))
gpu: gpu-site ## GPU tests and microbenchmarks, with the torch of $(PYTHON)
	@mkdir -p $(REPORTS); failed=0; \
	$(call PART,gpu,tests/gpu $(ON_GPU) $(WORKERS),240); \
	$(call PART,micro,$(MICRO),100); \
	if $(if $(STAND_IN),false,command -v compute-sanitizer); then \
	$(call PART,sanitizer,tests/gpu $(ON_GPU) -m sanitizer,50,PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1); \
	else echo "Skipped: compute-sanitizer, since $(NO_SANITIZER)"; fi; \
	$(call PART,others,$(OTHERS) $(ON_GPU) $(WORKERS),110); \
	exit $$failed

gpu-bench: gpu-site ## the whole suite on a GPU against every peer that is installed, in 8 minutes
	$(GPU_ENV) $(GPU_PYTHON) -m benchmarks.suites.gpu \
	$(if $(STAND_IN),--stand-in,--record $(or $(RECORD),results/gpu.csv)) $(GPU_BENCH_ARGS)

tune: gpu-site ## time tile configurations on a GPU and propose rows for tiles.py (TUNE_ARGS="--dim 256 ...")
	$(GPU_ENV) $(GPU_PYTHON) -m benchmarks.tiles.tune \
	$(if $(STAND_IN),--stand-in,--record $(or $(RECORD),results/tune.csv)) $(TUNE_ARGS)

tiles: $(VENV)/.installed-test ## compile every tile ahead of time and record registers, spills and instructions
	$(BIN)/python -m benchmarks.tiles.aot --all --record benchmarks/results/tiles.csv

# With the Triton that is installed. Of 3.6.0: pip install --no-deps --target .venv-triton-3.6 triton==3.6.0, then
# make pipes PIPES_PATH=.venv-triton-3.6
pipes: $(VENV)/.installed-test ## count cycles of a tile in the machine code for sm_90, and record the model of a GPU
	PYTHONPATH=$(PIPES_PATH) $(BIN)/python -m benchmarks.tiles.pipes --dim 64 128 256 512 768 1024 --record
	$(BIN)/python -m benchmarks.tiles.model --triton 3.7.1 3.6.0 --record

clean: ## remove what builds and tests leave behind
	rm -rf build dist *.egg-info .gpu-site .gpu-reports .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

distclean: clean ## the same, and the virtual environment and carried wheels
	rm -rf $(VENV) .wheels

# Debian without python3-venv has no ensurepip: pip is then installed from outside.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed: make PYTHON=...") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV) || \
	{ $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install $(PIP_ARGS) pip; } || \
	{ echo "No virtual environment: install python3-venv, or name a Python that has venv: make PYTHON=..." >&2; exit 1; }
	touch $@

# Editable through setuptools' import hook, which shows new files at once and finds the kernels in the repository's root too.
# Type checkers see nothing of it: they resolve a plain install, or an editable one with --config-settings editable_mode=strict.
$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS) | $(VENV)/.made
	$(PIP) install $(PIP_ARGS) -c $(CONSTRAINTS) setuptools
	$(PIP) install $(PIP_ARGS) -c $(CONSTRAINTS) --no-build-isolation -e '.[$*]'
	touch $@

# Only their losses are used, and these need nothing of what the packages depend on, or of FlagEmbedding little.
$(VENV)/.peers: $(CONSTRAINTS) | $(VENV)/.made
	$(PIP) install $(PIP_ARGS) -c $(CONSTRAINTS) --no-deps open_clip_torch lightly
	touch $@

# Only its data are read, and these need nothing of what the package depends on.
$(VENV)/.recommender: $(CONSTRAINTS) | $(VENV)/.installed-demo
	$(PIP) install $(PIP_ARGS) -c $(CONSTRAINTS) --no-deps recbole
	touch $@

$(VENV)/.libraries: $(CONSTRAINTS) | $(VENV)/.installed-compat-trainers
	$(PIP) install $(PIP_ARGS) -c $(CONSTRAINTS) --no-deps FlagEmbedding libauc
	touch $@

# A plain install, as from a wheel; build/lib would keep modules that are gone.
$(VENV)/.site: $(SOURCES) | $(VENV)/.installed-test
	rm -rf build/lib $(SITE)
	$(PIP) install --quiet --no-deps --no-index --no-build-isolation --target $(SITE) .
	touch $@
