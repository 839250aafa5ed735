# momentum_ext. `make demo` and `make test` do all of their own set-up, in .venv; what is up to date is not done again.
#
#   PYTHON=python3.12     the interpreter that .venv is made with
#   VENV=path             another environment; it may have a torch already, which is then used
#   TESTS=path            the tests to run (make test, test-all, soak); all of them by default
#   ARGS="..."            more arguments for pytest (make test, test-all, soak), bench_step.py (make bench), gpu_check.py (make
#                         gpu-check) or train_char_gpt.py (make char-gpt)
#   CC= CXX= FORCE_CPU= FORCE_CUDA=   for the build, see setup.py

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
VENV_CUDA ?= .venv-cuda
TORCH_CUDA ?= torch==2.11.0
JOBS ?= 2
TESTS ?= tests

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -qq
CPP := $(shell find csrc tests/native tests/emulated_cuda benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
NATIVE := $(filter csrc/%,$(CPP))
PYTHON_CODE := momentum_ext benchmarks examples

.DEFAULT_GOAL := help
.PHONY: help demo gallery char-gpt test test-all soak bench build lint format house clean cuda-check cuda-build gpu-check
.DELETE_ON_ERROR:

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: build $(VENV)/.demo $(VENV)/.bench  ## train on handwritten digits with torch's SGD and with FusedMomentum, then the quick benchmark
	$(BIN)/python examples/digits.py
	$(BIN)/python benchmarks/bench_step.py --quick

gallery: build $(VENV)/.demo  ## draw what momentum does on small landscapes, into docs/gallery/ (under two minutes)
	$(BIN)/python examples/gallery.py

char-gpt: build $(VENV)/.demo  ## train a small GPT with each form of momentum (minutes; goes on where it was interrupted)
	$(BIN)/python examples/train_char_gpt.py $(ARGS)

test test-all soak: build $(VENV)/.test $(VENV)/.demo $(VENV)/.bench
test-all: $(VENV)/.trainers

PYTEST = $(BIN)/python -m pytest $(TESTS) -q -n $(JOBS) --dist worksteal

test:  ## the tests, in six minutes on two cores
	$(PYTEST) $(ARGS)

test-all:  ## the long tests, after make test: native programs, the emulated devices, installations, trainings, 2,000 sequences
	$(PYTEST) -m slow $(ARGS)

soak:  ## what takes hours: 20,000 new sequences of random actions, then make test with the oldest torch, in .venv-oldest
	$(PYTEST) -m soak $(ARGS)
	@.ci/oldest-torch .venv-oldest

bench: build $(VENV)/.bench  ## the benchmark
	$(BIN)/python benchmarks/bench_step.py $(ARGS)

build: $(VENV)/.built  ## compile the extension into momentum_ext/ and install it in .venv, editable

lint: $(VENV)/.dev $(VENV)/.demo $(VENV)/.bench  ## clang-format, ruff and mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(PYTHON_CODE)

format: $(VENV)/.dev  ## let clang-format and ruff rewrite the sources
	$(BIN)/clang-format -i $(CPP)
	$(BIN)/ruff check --fix --exit-zero --quiet .
	$(BIN)/ruff format .

house: ## the rules of the house that a machine can check (CONTRIBUTING.md)
	@.ci/house

cuda-check: $(VENV)/.cuda  ## the CUDA kernels without a GPU: what nvcc says, and the machine code (make test-all runs them on the host)
	$(BIN)/python tests/native/cuda_check.py $(ARGS)

cuda-build:  ## the whole extension for a torch with CUDA, in $(VENV_CUDA), which needs 5 GB: compiles, links, imports, passes tests
	@.ci/cuda-build $(VENV_CUDA) $(TORCH_CUDA)

gpu-check: $(VENV)/.test $(VENV)/.bench  ## on a machine with a GPU: build, tests, sanitizers, profiler, benchmark; ARGS=--quick: in 6 minutes
	@$(BIN)/python benchmarks/gpu_check.py $(ARGS)

clean:  ## remove the environment and everything that was built
	rm -rf $(VENV) $(VENV_CUDA) .venv-oldest build dist momentum_ext.egg-info momentum_ext/_C.*.so momentum_ext/_build_info.py
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- set-up: one stamp file per step --------------------------------------------------------------------------------

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "momentum_ext needs Python 3.10 or newer; $(PYTHON) is older or missing. Name another: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments. On Debian or Ubuntu: apt-get install python3-venv python3-dev"; exit 1; }
	@test -x $(BIN)/python || { echo "[set-up] virtual environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "[set-up] build tools"
	@$(PIP) install "setuptools>=65" wheel ninja
	@$(BIN)/python -c 'import torch' 2>/dev/null || { echo "[set-up] $(TORCH)"; $(PIP) install $(TORCH); }
	@touch $@

# A torch that was installed after the build makes the build out of date.
$(VENV)/.built: $(VENV)/.torch setup.py pyproject.toml $(NATIVE) $(wildcard $(VENV)/lib/python3*/site-packages/torch/version.py)
	@echo "[set-up] momentum_ext, compiled for $$($(BIN)/python -W ignore -c 'import torch; print("torch", torch.__version__)') (about two minutes)"
	@$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

# The lists of packages stand in pyproject.toml, as extras.
define EXTRA
import sys
try:
    import tomllib
except ImportError:
    from pip._vendor import tomli as tomllib
with open("pyproject.toml", "rb") as file:
    print("\n".join(tomllib.load(file)["project"]["optional-dependencies"][sys.argv[1]]))
endef
export EXTRA

# None of them may bring another torch.
$(VENV)/.demo $(VENV)/.bench $(VENV)/.test $(VENV)/.dev $(VENV)/.cuda $(VENV)/.trainers: $(VENV)/.%: $(VENV)/.torch pyproject.toml
	@echo "[set-up] packages for $*"
	@$(BIN)/python -c "$$EXTRA" $* > $@.txt
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >> $@.txt
	@$(PIP) install -r $@.txt
	@touch $@
