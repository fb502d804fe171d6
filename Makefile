# Every target sets up what it needs: .venv holds fastdiff (editable) and its tools, fastdiff/_native*.so is the native
# engine, and each is rebuilt when its inputs change. FASTDIFF_NATIVE=OFF in the environment leaves the engine out.

# Many processes are started: what is compiled is kept, even where the environment says otherwise.
export PYTHONDONTWRITEBYTECODE :=

PYTHON ?= python3
BIN := .venv/bin
VENV := .venv/.installed
READY := .venv/.ready
CSRC := $(shell find csrc -type f -not -path 'csrc/inplace/*')
CXX_FILES := $(filter %.cpp %.hpp %.inc,$(CSRC))

.PHONY: help sample native test test-all kernel-check figures gpu sanitize sanitize-python sanitize-threads arm-check lint format docs examples bulk-check wheel-check clean
.DEFAULT_GOAL := help

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The engine is not built here: pip would do it in an environment that it then deletes, so always from nothing.
$(VENV): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	FASTDIFF_NATIVE=OFF $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@rm -rf build/native
	@touch $@

ifeq ($(FASTDIFF_NATIVE),OFF)
BUILD_NATIVE = @echo 'the native engine is left out: FASTDIFF_NATIVE=OFF'
else
define BUILD_NATIVE
@test -f build/native/build.ninja || PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S csrc -B build/native -G Ninja \
	-D FASTDIFF_INPLACE=ON -D Python_EXECUTABLE="$(CURDIR)/$(BIN)/python" --log-level=NOTICE
@$(BIN)/cmake --build build/native
endef
endif

$(READY): $(VENV) $(CSRC)
	$(BUILD_NATIVE)
	@touch $@

native: $(VENV)  ## build the native engine: after a change, only what depends on it
	$(BUILD_NATIVE)

sample: $(READY)  ## draw 80 images with the built-in model into out/samples.png
	@mkdir -p out
	$(BIN)/fastdiff sample fashion-mnist --per-class 8 --guidance 2 --out out/samples.png

# Each test has one thread (tests/conftest.py), so two processes fill two cores; what compares times runs after them.
# tests/docs, tests/kernels and examples of help texts are left to the targets docs, kernel-check and examples:
# tests/test_stages.py checks that no test is left to none.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest
marked = $(shell grep -rl --include='test_*.py' 'mark\.$(1)' tests)

test: $(READY)  ## run the tests that take minutes at most, but for those of docs, kernel-check and examples
	$(PYTEST) -n $(JOBS) --dist worksteal --ignore=tests/docs --ignore=tests/kernels \
		-m 'not slow and not alone and not example'
	$(PYTEST) $(call marked,alone) -m 'not slow and alone'

test-all: $(READY)  ## run every test
	$(PYTEST) -n $(JOBS) --dist loadgroup -m 'not alone'
	$(PYTEST) $(call marked,alone) -m alone

kernel-check: $(READY)  ## interpret the Triton kernels, and compile them for six architectures: no spills in loops
	$(PYTEST) -p no:cacheprovider -q -n $(JOBS) --dist loadgroup tests/kernels -m 'not slow or compiles'

figures: $(READY)  ## measure every figure of the README and docs/ here, into out/figures: hours, on a machine that does nothing else
	benchmarks/figures.sh

# The Python that has torch for the card, not .venv, whose torch is for CPUs.
gpu:  ## on an NVIDIA GPU: check, tune and measure all that needs one (GPU_ARGS='--parts kernels'; PYTHON=that of torch)
	$(PYTHON) benchmarks/gpu $(GPU_ARGS)

SANITIZE ?= address;undefined
# Compiled with sanitizers, the kernels of AVX-512 take minutes: they are left out where no processor could run them.
QUICK = $(shell test -f /proc/cpuinfo && ! grep -q -m 1 avx512f /proc/cpuinfo && echo ON || echo OFF)

sanitize: $(VENV)  ## run the engine's C++ tests under sanitizers (SANITIZE=thread: that one)
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S csrc -B "build/sanitize-$(firstword $(subst ;, ,$(SANITIZE)))" -G Ninja \
		-D FASTDIFF_TESTS=ON -D FASTDIFF_QUICK=$(QUICK) -D FASTDIFF_SANITIZE="$(SANITIZE)" --log-level=NOTICE
	@$(BIN)/cmake --build "build/sanitize-$(firstword $(subst ;, ,$(SANITIZE)))"
	@"build/sanitize-$(firstword $(subst ;, ,$(SANITIZE)))/fastdiff_tests"

# Python itself has no sanitizer, so GCC's libraries are loaded first. ThreadSanitizer needs addresses that are not random.
# What an error is reported for ends the process.
SANITIZER = $(firstword $(subst ;, ,$(SANITIZE)))
SANITIZE_PYTHON = build/sanitize-python-$(SANITIZER)
gcc-library = $(shell $(CXX) -print-file-name=lib$(1).so)
ifeq ($(SANITIZE),thread)
SANITIZED = TSAN_OPTIONS=ignore_noninstrumented_modules=1 LD_PRELOAD="$(call gcc-library,tsan) $(call gcc-library,stdc++)" \
	setarch -R
SANITIZED_TESTS := -k threads
else
SANITIZED = ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(call gcc-library,asan) $(call gcc-library,stdc++)" env
endif

sanitize-python: $(VENV)  ## run the Python tests of the engine's bounds, memory and threads under sanitizers (as sanitize)
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S csrc -B $(SANITIZE_PYTHON) -G Ninja -D FASTDIFF_PYTHON=ON \
		-D FASTDIFF_QUICK=ON -D CMAKE_BUILD_TYPE=Debug -D FASTDIFF_SANITIZE="$(SANITIZE)" --log-level=NOTICE \
		-D Python_EXECUTABLE="$(CURDIR)/$(BIN)/python"
	@$(BIN)/cmake --build $(SANITIZE_PYTHON) --target _native
	FASTDIFF_NATIVE_FOLDER=$(SANITIZE_PYTHON) $(SANITIZED) $(BIN)/python -m pytest --capture=sys -q -p no:cacheprovider \
		-p tests.support.sanitized tests/backends/test_bounds.py tests/backends/test_weights.py $(SANITIZED_TESTS)

sanitize-threads: $(VENV)  ## run sanitize-python with ThreadSanitizer, where addresses may be fixed
	@if setarch -R true; then $(MAKE) --no-print-directory sanitize-python SANITIZE=thread; \
		else echo 'ThreadSanitizer needs fixed addresses, which are not permitted here: skipped'; fi

arm-check: $(VENV)  ## run the engine's C++ tests for arm64 in an emulator, where a cross compiler is installed
	tests/arm_check.sh

lint: $(READY)  ## check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(READY)  ## fix style and formatting where a tool can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

docs: $(READY)  ## build the documentation into build/docs, where a broken link is an error, and run its blocks of code
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	$(PYTEST) -n $(JOBS) -q tests/docs -m 'not slow'

examples: $(READY)  ## run every script of examples/ in an empty folder, and the examples of the command line's help
	tests/examples_check.sh
	$(PYTEST) -n $(JOBS) -q $(call marked,example) -m 'not slow and example'

# Ray, and what its data sets need, are 150 MB, which few need: not in .venv until this is run.
bulk-check: $(READY)  ## install Ray into .venv; run bulk jobs on it and under torchrun, with processes that are killed
	$(BIN)/python -m pip install --quiet -c constraints.txt 'ray[data]>=2.40'
	$(PYTEST) -m slow tests/bulk/test_ray.py tests/bulk/test_workers.py tests/training/test_processes.py
	tests/examples_check.sh ray_data

wheel-check: $(READY)  ## build the wheel, install it elsewhere and use it there
	tests/wheel_check.sh

clean:  ## remove build products and caches (out/, runs/ and .venv stay)
	rm -rf build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
	rm -f fastdiff/_native*.so $(READY)
	find csrc/inplace -mindepth 1 -not -name CMakeLists.txt -delete
	find fastdiff kernels recipes tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
