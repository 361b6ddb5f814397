# `make demo` and `make test` each do all their set-up in .venv; a fresh machine needs Python 3.11 to 3.13, no GPU.
# The CUDA extension is built where nvcc is found; WAM_CUDA=0 leaves it out, WAM_CUDA=1 insists (see setup.py).

PYTHON ?= python3
PYTHON312 ?= python3.12
VENV := .venv
LEROBOT := .venv-lerobot
TORCH27 := .venv-torch27
DOCS := .venv-docs
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# what the installed package is made of, beside the Python files, which an editable install reads in place
PACKAGE := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)

.DEFAULT_GOAL := help
.PHONY: help demo docs wheel lint test test-slow test-triton test-lerobot test-torch27 mutation bench clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       set up .venv and run the demo"
	@echo "make lint       set up .venv and check Python with ruff, mypy and tools/lint.py, csrc with clang-format"
	@echo "make test       set up .venv and run the whole test suite"
	@echo "make test-slow  set up .venv and run the tests that take long, which make test leaves out"
	@echo "make test-triton  compile every Triton kernel under Triton 3.3 to 3.7 for five GPUs (downloads 0.7 GB) and print a table"
	@echo "make test-lerobot  patch the policies of lerobot 0.6.1 in .venv-lerobot (Python 3.12, downloads 4 GB)"
	@echo "make test-torch27  run the integrations' tests under PyTorch 2.7.1 in .venv-torch27 (downloads 3 GB)"
	@echo "make mutation   set up .venv and plant bugs in the CUDA kernels, of which each must be found"
	@echo "make docs       build the documentation in .venv-docs into build/site; a warning is an error"
	@echo "make wheel      build wheels in dist, with and without the CUDA extension, and try each in an empty environment"
	@echo "make bench      set up .venv and time every op on one CPU thread beside the saved baseline"
	@echo "make clean      remove the environments and what was built"

demo: $(VENV)/installed
	$(BIN)/wam demo

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tools.lint
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.cpp csrc/*/*.c* csrc/*/*.h tests/csrc/*.c*)

# Two suites: Triton's interpreter, switched on at import by TRITON_INTERPRET=1, and its compiler do not share a process.
# Both run whatever the first says; either failing fails make. A file's tests run in one of two workers, each on one
# thread: most of a test is Python, and OpenMP threads collapse when anything else runs.
WORKERS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
test: $(VENV)/installed-test
	@status=0; \
	env -u TRITON_INTERPRET $(WORKERS) tests --ignore=tests/interpreter -m "not slow" || status=1; \
	TRITON_INTERPRET=1 $(WORKERS) tests/interpreter || status=1; \
	exit $$status

# every version in a folder of its own below .venv/triton; no GPU
test-triton: $(VENV)/installed-test
	$(BIN)/python -m tests.aot.versions

# environments of their own, which no other target touches
test-lerobot: $(LEROBOT)/installed
	OMP_NUM_THREADS=1 PYTHONPATH=. $(LEROBOT)/bin/python -m pytest tests/integrations/with_lerobot.py

test-torch27: $(TORCH27)/installed
	env -u TRITON_INTERPRET OMP_NUM_THREADS=1 PYTHONPATH=. $(TORCH27)/bin/python -m pytest tests/integrations \
	  --ignore=tests/integrations/test_openwam.py -m "not slow"

docs: $(DOCS)/installed
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(DOCS)/bin/python -m mkdocs build --strict
	@echo "build/site/index.html"

# downloads torch for every Python that there is; minutes of nvcc each for the extension
wheel:
	$(PYTHON) -m tools.wheels

$(LEROBOT)/installed: OWN_PYTHON = $(PYTHON312)
$(TORCH27)/installed $(DOCS)/installed: OWN_PYTHON = $(PYTHON)
$(LEROBOT)/installed $(TORCH27)/installed $(DOCS)/installed: .venv-%/installed: requirements/%.txt
	$(OWN_PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install --quiet -r $<
	touch $@

test-slow: $(VENV)/installed-test
	env -u TRITON_INTERPRET $(WORKERS) tests --ignore=tests/interpreter -m slow

# Five to twelve CPU minutes; less where only some sources have changed. The table is tests/mutation/README.md.
mutation: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutation

# The baseline is of another machine; the yardstick rows say how this one compares. More: `wam bench --help`.
bench: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest bench/micro -q --benchmark-storage=bench/micro/baseline \
	  --benchmark-compare --benchmark-columns=min,median,iqr,rounds --benchmark-sort=name --benchmark-max-time=0.5

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "make: Python 3.11, 3.12 or 3.13 is needed, but PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>&1);" \
	    "name another, for example: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

# --no-deps: the pinned requirements are all there is to install
$(VENV)/installed: $(VENV)/created requirements/runtime.txt $(PACKAGE)
	$(PIP) install --quiet -r requirements/runtime.txt
	$(PIP) install --quiet --no-deps --editable .
	@ls wam_kernels/_C*.so >/dev/null 2>&1 || echo "The CUDA extension was left out (no nvcc, or WAM_CUDA=0)."
	touch $@

$(VENV)/installed-test: $(VENV)/installed requirements/test.txt requirements/openpi_client.txt
	$(PIP) install --quiet -r requirements/test.txt
	$(PIP) install --quiet --no-deps -r requirements/openpi_client.txt
	touch $@

clean:
	rm -rf $(VENV) $(LEROBOT) $(TORCH27) $(DOCS) build dist *.egg-info wam_kernels/_C*.so
