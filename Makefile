# Every target sets up .venv first; the set-up runs once, and again when what it depends on changes.
# Variables: PYTHON  the interpreter that makes .venv (3.10 or newer)
#            VENV    where it lies
#            TORCH_INDEX  options for pip that say where torch comes from: on Linux the package
#                     index has only builds with gigabytes of CUDA libraries, and PyTorch's own
#                     index of CPU builds spares them a machine without a GPU
#            WORKERS  processes that share the tests; auto is one for each core

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= auto

python := $(VENV)/bin/python
pip := $(python) -m pip --disable-pip-version-check install --constraint constraints.txt
# A worker gets whole modules and classes, so that what their tests share is made once.
pytest := $(python) -m pytest --numprocesses $(WORKERS) --maxprocesses 8 \
	--dist loadscope --no-loadscope-reorder
torch := $(VENV)/.deco-torch
runtime := $(VENV)/.deco-runtime
development := $(VENV)/.deco-development

.PHONY: help sample train test test-quick soak sanitize bench lint format clean

help:
	@echo "make sample      draw images with the shipped checkpoint"
	@echo "make train       train the digits preset (10 minutes on 2 cores)"
	@echo "make test        all tests but the soak tests"
	@echo "make test-quick  the tests that take seconds"
	@echo "make soak        the tests that take many minutes"
	@echo "make sanitize    the C++ kernels' tests under ASan and UBSan"
	@echo "make bench       the benchmarks"
	@echo "make lint        formatting, lint and types"
	@echo "make format      apply the formatting"
	@echo "make clean       remove builds and caches, keep runs and .venv"

sample: $(runtime)
	$(python) sample.py --steps 100

train: $(runtime)
	$(python) train.py

test: $(development)
	$(pytest) -m "not soak"

test-quick: $(development)
	$(pytest) -m "not slow and not soak"

soak: $(development)
	$(python) -m pytest -m soak

# A build of its own, found before the one in place. Python itself leaks, so leaks are not looked for.
sanitize: $(development)
	DECO_SANITIZE=1 DECO_REQUIRE_EXTENSION=1 $(python) setup.py --quiet build --build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$(foreach library,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(library).so))" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	PYTHONPATH=build/sanitize/lib $(VENV)/bin/pytest -m "not slow" -p no:cacheprovider \
	tests/kernels/test_flow_matching_loss.py tests/kernels/test_matmul.py \
	tests/kernels/test_packed_linear.py tests/kernels/test_pixel_decoder.py \
	tests/kernels/test_registration.py

bench: $(development)
	$(python) -m pytest benchmarks --benchmark-only

lint: $(development)
	$(python) -m ruff format --check .
	$(python) -m ruff check .
	$(python) -m mypy

format: $(development)
	$(python) -m ruff format .
	$(python) -m ruff check --fix .

clean:
	rm -rf build dist *.egg-info deco_fast/_C.*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
	rm -f $(torch) $(runtime) $(development)

# torch comes before the package, whose C++ extension is built against the one that is installed.
$(torch): constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'error: Python 3.10 or newer is needed: make PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); this takes some minutes, once."
	$(pip) $(TORCH_INDEX) torch
	$(pip) "setuptools>=77" pybind11 ninja
	touch $@

$(runtime): $(torch) pyproject.toml setup.py $(wildcard csrc/*)
	$(pip) --no-build-isolation --editable .
	touch $@

$(development): $(torch) pyproject.toml setup.py $(wildcard csrc/*)
	$(pip) --no-build-isolation --editable ".[test,dev]"
	@# Without torchvision, of which the package index has no build for a torch without CUDA.
	$(pip) --no-deps torch-fidelity
	touch $(runtime) $@
