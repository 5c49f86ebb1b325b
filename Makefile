# Two commands do all set-up on a fresh machine: `make demo` and `make test`. Both make their own .venv.
# The llama-cpp-python build takes minutes: pip caches its wheel, and the package is built without isolation so that it is not built twice.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The newest llama-cpp-python of the range that pyproject.toml allows
LLAMA  := $(shell sed -n 's/.*"llama-cpp-python>=[0-9.]*,<=\([0-9.]*\)".*/llama-cpp-python==\1/p' pyproject.toml | head -n 1)
# The pinned tools of the `dev` extra, without the package: style needs no compiler
DEV_TOOLS := $(shell sed -n 's/^dev = \[\(.*\)"star-edge.*/\1/p' pyproject.toml | tr -d '",')
SOURCES := pyproject.toml CMakeLists.txt $(wildcard csrc/*) $(wildcard bindings/*)

.PHONY: demo test test-slow test-processors test-vulkan test-page lint format format-check typecheck sanitize fuzz check-llama test-wheel support-table bench bench-all cross docs clean

demo: $(VENV)/installed
	$(BIN)/star-edge demo

# Two processes, each a file at a time, and each with one thread of OpenMP: threads of tiny models wait for each other
# more than they compute.
JOBS := 2
test: $(VENV)/installed-tests
	OMP_THREAD_LIMIT=1 $(BIN)/python -m pytest tests -n $(JOBS) --dist loadfile

# What `make test` leaves out: minutes of it, and a model of 670 MB in a temporary folder
test-slow: $(VENV)/installed-tests
	$(BIN)/python -m pytest tests -m slow

# Style: ruff checks and formats, mypy is strict on the package. Versions are pinned in the `dev` extra.
PYTHON_FILES := star_edge tests tools benchmarks bindings

lint: $(VENV)/tools
	$(BIN)/ruff check $(PYTHON_FILES)

format: $(VENV)/tools
	$(BIN)/ruff check --select I --fix $(PYTHON_FILES)
	$(BIN)/ruff format $(PYTHON_FILES)

format-check: $(VENV)/tools
	$(BIN)/ruff format --check $(PYTHON_FILES)

typecheck: $(VENV)/installed-tests $(VENV)/tools
	$(BIN)/mypy

# The site: the README, the pages in docs and the reference of the public interface from its docstrings, in build/site.
# A link that leads nowhere fails. Nothing is compiled or imported.
docs: $(VENV)/tools
	$(BIN)/mkdocs build

# The C core under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer (Linux, GCC, CMake)
sanitize: $(VENV)/installed-tests
	$(BIN)/python tools/sanitize/sanitize.py

# Random bad input for everything that takes some, FUZZ_SECONDS in all; what failed stays in build/fuzz
FUZZ_SECONDS ?= 300
fuzz: $(VENV)/installed-tests
	$(BIN)/python tests/fuzz/run.py --seconds $(FUZZ_SECONDS)

# The tests on ggml kernels built for AVX2, and for AVX-512 where the processor has it: a build of a minute or two for each, then the suite
test-processors: $(VENV)/installed-tests
	$(BIN)/python tools/processors.py

# Tests with the models on Mesa's software device: all layers there, half of them, the encoder alone. Builds ggml's Vulkan backend once, in
# .processors/vulkan. PLACEMENT=half: that alone. ALL=1: whole files, not the selection. TESTS: files, ids or -k of pytest in place of the selection.
test-vulkan: $(VENV)/installed-tests
	$(BIN)/python tools/vulkan.py $(if $(PLACEMENT),--placement $(PLACEMENT)) $(if $(ALL),--all) $(TESTS)

# The server's page in a headless Chromium, with axe-core: make test-page PICTURES=folder keeps screenshots. Without a Chromium it says so.
test-page: $(VENV)/installed-tests
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "playwright>=1.50" "axe-playwright-python>=0.1.7"
	$(BIN)/python tools/check_page.py $(if $(PICTURES),--pictures $(PICTURES))

# Which assumptions about llama.cpp hold in another version of llama-cpp-python: make check-llama VERSION=0.3.35
# TESTS: files of the suite to run there too. The environment stays in .check-llama.
check-llama: $(VENV)/installed-tests
	$(BIN)/python tools/check_llama.py $(or $(VERSION),here) $(TESTS)

# The wheel of a release, built into dist/ and tried in environments without compiler and CMake: make test-wheel PYTHONS="python3.10 python3.13"
test-wheel: $(VENV)/installed
	$(BIN)/python tools/test_wheel.py $(PYTHONS)

# The table of families in docs/models.md: what must hold of each; tests/test_families.py shows that it does
support-table: $(VENV)/installed-tests
	$(BIN)/python -m pytest tests/test_families.py -k support_table --write-support-table

# A random 1.1B LLaVA in a temporary folder, minutes
bench: $(VENV)/installed-tests
	$(BIN)/star-edge bench --shape llava-1.1b --configs benchmarks/configs/llava-1.1b.json --idle-hook 256

# Everything in BENCHMARKS.md, hours: on a quiet machine. The models stay in BENCH_MODELS (13 GB) if that is set.
bench-all: $(VENV)/installed-tests
	$(BIN)/python benchmarks/tables.py run $(if $(BENCH_MODELS),--folder $(BENCH_MODELS))

# Whether the C core compiles for Windows, macOS and Linux on ARM, with the compilers that are there
cross: $(VENV)/installed
	PYTHON=$(CURDIR)/$(BIN)/python tools/cross_compile.sh $$($(BIN)/python bindings/build_core.py include)

$(VENV)/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(LLAMA)" "scikit-build-core>=0.10" "cffi>=1.16" ninja
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable .
	touch $@

$(VENV)/installed-tests: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[test]"
	touch $@

$(VENV)/tools: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(DEV_TOOLS)
	touch $@

clean:
	rm -rf $(VENV) build dist
