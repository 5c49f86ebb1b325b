# Two commands do all set-up on a fresh machine: `make demo` and `make test`. Both make their own .venv.
# The llama-cpp-python build takes minutes: pip caches its wheel, and the package is built without isolation so that it is not built twice.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
LLAMA  := $(shell sed -n 's/.*"\(llama-cpp-python==[0-9.]*\)".*/\1/p' pyproject.toml | head -n 1)
SOURCES := pyproject.toml CMakeLists.txt $(wildcard csrc/*) $(wildcard bindings/*)

.PHONY: demo test test-slow test-processors support-table bench bench-all clean

demo: $(VENV)/installed
	$(BIN)/star-edge demo

test: $(VENV)/installed-tests
	$(BIN)/python -m pytest tests

# What `make test` leaves out: minutes of it, and a model of 670 MB in a temporary folder
test-slow: $(VENV)/installed-tests
	$(BIN)/python -m pytest tests -m slow

# The tests on ggml kernels built for AVX2, and for AVX-512 where the processor has it: a build of a minute or two for each, then the suite
test-processors: $(VENV)/installed-tests
	$(BIN)/python tools/processors.py

# The README's table of families: what must hold of each; tests/test_families.py shows that it does
support-table: $(VENV)/installed-tests
	$(BIN)/python -m pytest tests/test_families.py -k support_table --write-support-table

# A random 1.1B LLaVA in a temporary folder, minutes
bench: $(VENV)/installed-tests
	$(BIN)/star-edge bench --shape llava-1.1b --configs benchmarks/configs/llava-1.1b.json --idle-hook 256

# Everything in BENCHMARKS.md, hours: on a quiet machine. The models stay in BENCH_MODELS (13 GB) if that is set.
bench-all: $(VENV)/installed-tests
	$(BIN)/python benchmarks/tables.py run $(if $(BENCH_MODELS),--folder $(BENCH_MODELS))

$(VENV)/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(LLAMA)" "scikit-build-core>=0.10" "cffi>=1.16" ninja
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable .
	touch $@

$(VENV)/installed-tests: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist
