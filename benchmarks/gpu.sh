#!/usr/bin/env bash
# star_edge on an NVIDIA GPU: llama-cpp-python with CUDA, the exactness suite and the benchmarks.
#
#   benchmarks/gpu.sh pack     where there is a network, no GPU needed: compiles llama-cpp-python with CUDA (an hour on 2 cores; stopped and
#                              started again it goes on where it was) and packs it with the wheels that a GPU machine lacks into .gpu/pack
#   benchmarks/gpu.sh run      on the GPU machine, without a network, with the working tree and .gpu/pack: all steps below, each within a time of its
#                              own, results after each step
#   benchmarks/gpu.sh install | doctor | test | bench [SHAPE...] | hook      one step. install takes the pack, or compiles where there is none
#
# OUT: folder for results (default benchmarks/results/gpu): doctor.json, tests.txt (each failure with its reason), tests.log, tests.jsonl, SHAPE.json,
#     hook*.json, machine.txt. Some lent machines bring back eight files: leave out steps there.
# SHAPES: what `run` benches. REPEATS (default 5).
# GPU_ARCH: compute capability to compile for (default 90). PACK_PYTHON: Python of the GPU machine (default 3.12). PYTHON: there (default python3).
# CUDA_TOOLKIT: a toolkit that is here already. Default: nvcc and its libraries as packages of the Python registry.
# GPU_FOLDER: in place of .gpu. DRY_RUN=1: `run` without a GPU, on the smallest models: shows that the steps work.
# The GPU machine needs a C compiler, CMake, CUDA's libcudart and libcublas (its driver's major version; the packages of PyTorch are enough), and for
# the tests numpy, pillow, pyyaml, requests, tqdm.
set -euo pipefail
cd "$(dirname "$0")/.."

GPU=$(realpath -m "${GPU_FOLDER:-.gpu}")
PACK=$GPU/pack
VENV=$GPU/venv
PY=$VENV/bin/python
OUT=$(realpath -m "${OUT:-benchmarks/results/gpu}")
VERSION=${LLAMA_VERSION:-$(sed -n 's/.*"llama-cpp-python>=[0-9.]*,<=\([0-9.]*\)".*/\1/p' pyproject.toml | head -n 1)}
SOURCE=$GPU/llama_cpp_python-$VERSION
ARCH=${GPU_ARCH:-90}
PIP=(-m pip --disable-pip-version-check --quiet)
CUDA=13.0
TOOLKIT_PACKAGES=(nvidia-cuda-nvcc==$CUDA.* nvidia-nvvm==$CUDA.* nvidia-cuda-crt==$CUDA.* nvidia-cuda-runtime==$CUDA.* nvidia-cuda-cccl==$CUDA.*
    nvidia-cublas==13.1.*)
# What a machine with a scientific Python is likely to lack
WHEELS=(gguf cffi pycparser diskcache jinja2 markupsafe click rich markdown-it-py mdurl pygments scikit-build-core packaging pathspec
    typing-extensions pytest pluggy iniconfig psutil ninja threadpoolctl platformdirs)

say() { printf '== %s  %s\n' "$(date +%T)" "$*"; }

toolkit() { # nvcc, and what it links against
    CUDA_TOOLKIT=$GPU/toolkit/nvidia/cu13
    if [ ! -x "$CUDA_TOOLKIT/bin/nvcc" ]; then
        say "CUDA $CUDA from the registry"
        "$PY" "${PIP[@]}" install --no-deps --target "$GPU/toolkit" "${TOOLKIT_PACKAGES[@]}"
    fi
    # The packages hold libX.so.13 and lib/; a linker asks for libX.so, and CMake for lib64/
    for name in cudart cublas cublasLt; do ln -sf lib$name.so.13 "$CUDA_TOOLKIT/lib/lib$name.so"; done
    ln -sfn lib "$CUDA_TOOLKIT/lib64"
}

build_wheel() {
    [ -x "$PY" ] || python3 -m venv "$VENV"
    "$PY" "${PIP[@]}" install "scikit-build-core>=0.10" cffi ninja
    [ -n "${CUDA_TOOLKIT:-}" ] || toolkit
    if [ ! -d "$SOURCE" ]; then
        "$PY" "${PIP[@]}" download --no-deps --no-build-isolation --no-binary :all: --dest "$GPU" "llama-cpp-python==$VERSION"
        tar -xzf "$GPU/llama_cpp_python-$VERSION.tar.gz" -C "$GPU"
    fi
    say "llama-cpp-python $VERSION with CUDA for compute capability $ARCH"
    # NO_VMM: linking needs no driver library then. The CPU part runs on any x86 machine with AVX2.
    PATH=$CUDA_TOOLKIT/bin:$VENV/bin:$PATH CUDACXX=$CUDA_TOOLKIT/bin/nvcc CMAKE_GENERATOR=Ninja \
        CMAKE_ARGS="-DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=$ARCH -DCUDAToolkit_ROOT=$CUDA_TOOLKIT -DCMAKE_CUDA_COMPILER=$CUDA_TOOLKIT/bin/nvcc -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF
        -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_CUDA_NCCL=OFF -DGGML_CUDA_NO_VMM=ON -DGGML_CUDA_COMPRESSION_MODE=size
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF" \
        "$PY" "${PIP[@]}" wheel --no-deps --no-build-isolation --wheel-dir "$GPU/wheel" --config-settings=build-dir="$GPU/build" "$SOURCE"
}

pack() {
    mkdir -p "$GPU"
    build_wheel
    rm -rf "$PACK" "$GPU/unpacked"
    mkdir -p "$PACK/wheels"
    "$PY" -m zipfile -e "$GPU/wheel/llama_cpp_python-$VERSION"-*.whl "$GPU/unpacked"
    # One copy of each library: a wheel has no links, and holds libX.so, libX.so.0 and libX.so.0.1 as three files
    (cd "$GPU/unpacked/llama_cpp/lib" && for file in *.so; do
        strip --strip-unneeded "$file"
        for other in "$file".*; do [ -e "$other" ] && ln -sf "$file" "$other"; done
    done)
    rm -rf "$GPU/unpacked/bin" "$GPU/unpacked/lib"
    say "packing"
    XZ_OPT="-9e -T0" tar -cJf "$PACK/llama_cpp_python.tar.xz" -C "$GPU/unpacked" .
    "$PY" "${PIP[@]}" download --no-deps --only-binary=:all: --dest "$PACK/wheels" --python-version "${PACK_PYTHON:-3.12}" \
        --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform any "${WHEELS[@]}"
    say "packed: $(du -sm "$PACK" | cut -f 1) MiB in $PACK; the tracked files are $(git ls-files -z | du -cm --files0-from=- | tail -n 1 | cut -f 1) MiB"
}

# The libraries of CUDA that the pack links against: those of a Python package, or of an installed toolkit
cuda_libraries() {
    "${PYTHON:-python3}" - <<'PYTHON'
import glob, sys
places = [f"{p}/nvidia/cu13/lib" for p in sys.path] + glob.glob("/usr/local/cuda*/lib64")
print(next((p for p in places if glob.glob(f"{p}/libcublas.so.13")), ""))
PYTHON
}

use() { # the environment of an installed pack
    export LD_LIBRARY_PATH=$(cuda_libraries)${CUDA_TOOLKIT:+:$CUDA_TOOLKIT/lib}:${LD_LIBRARY_PATH:-} PATH=$VENV/bin:$PATH
    if [ -z "${DRY_RUN:-}" ]; then
        export STAR_EDGE_TEST_GPU=1
    fi
}

install() {
    local python=${PYTHON:-python3}
    if [ ! -d "$PACK" ]; then
        build_wheel
        "$PY" "${PIP[@]}" install "$GPU/wheel/llama_cpp_python-$VERSION"-*.whl
        "$PY" "${PIP[@]}" install --no-build-isolation --editable . pytest psutil
        return
    fi
    [ -x "$PY" ] || "$python" -m venv --without-pip "$VENV"
    local site
    site=$("$PY" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
    # The packages that this Python has already (it may itself be that of a virtual environment)
    "$python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])" >"$site/zz_base.pth"
    tar -xJf "$PACK/llama_cpp_python.tar.xz" -C "$site"
    for wheel in "$PACK"/wheels/*.whl; do
        name=$(basename "$wheel" | cut -d - -f 1)
        "$PY" -c "import importlib.metadata as m; m.version('$name')" 2>/dev/null || "$PY" -m zipfile -e "$wheel" "$site"
    done
    say "star_edge"
    "$PY" "${PIP[@]}" install --no-index --no-deps --no-build-isolation --editable .
}

machine() {
    mkdir -p "$OUT"
    {
        date -u +%FT%TZ
        nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap --format=csv,noheader 2>/dev/null || echo "no GPU"
        grep -m 1 "model name" /proc/cpuinfo
        nproc
    } >"$OUT/machine.txt"
    cat "$OUT/machine.txt"
}

doctor() {
    mkdir -p "$OUT"
    "$PY" -m star_edge doctor --json >"$OUT/doctor.json"
    "$PY" -c "import llama_cpp; print('GPU offload:', bool(llama_cpp.llama_supports_gpu_offload()))"
}

suite() { # a failure is a result: it is in the journal at once, and the benchmarks are run all the same
    mkdir -p "$OUT"
    local jobs=()
    "$PY" -c "import xdist" 2>/dev/null && jobs=(-n "${JOBS:-4}")
    rm -f "$OUT/tests.jsonl"
    # Within the step's time, and what the journal says is printed after it
    PYTEST_JOURNAL=$OUT/tests.jsonl PYTHONPATH=tools timeout --signal=TERM --kill-after=5 "$((${TEST_SECONDS:-130} - 10))" \
        "$PY" -m pytest -p pytest_journal tests/test_exact.py tests/test_families.py tests/test_faithful.py tests/test_windows.py tests/test_vision.py \
        tests/test_tap_inputs.py tests/test_reuse.py tests/test_shared_decodes.py "${jobs[@]}" -m "not slow" --continue-on-collection-errors --tb=short \
        --deselect tests/test_families.py::test_support_table --deselect tests/test_families.py::test_support_table_is_proven \
        >"$OUT/tests.log" 2>&1 || say "tests ended with status $?"
    "$PY" tools/pytest_journal.py "$OUT/tests.jsonl" | tee "$OUT/tests.txt"
}

model() { # SHAPE: a random model of it in memory, everything on the GPU; in a dry run the reference model
    [ -n "${DRY_RUN:-}" ] || echo "--shape $1 --folder ${MODELS:-/dev/shm/star-edge} -ngl -1"
}

bench() { # SHAPE...: presets at the share that stays at least, and what else the tables show of the shape
    mkdir -p "$OUT"
    local shape files
    for shape in "$@"; do
        files=(benchmarks/configs/encoder-photo.json)
        [ -f "benchmarks/configs/$shape.json" ] && files+=("benchmarks/configs/$shape.json")
        "$PY" -c 'import json, sys; print(json.dumps([c for f in sys.argv[1:] for c in json.load(open(f))]))' "${files[@]}" >"$GPU/configs.json"
        "$PY" -m star_edge bench $(model "$shape") --baseline flash --baseline fewer --fewer-tokens 0.25 --fewer-tokens 0.1 \
            --repeats "${REPEATS:-5}" --max-tokens 33 --no-memory --configs "$GPU/configs.json" --out "$OUT/$shape.json" ||
            say "$shape failed"
    done
}

hook() { # what an idle callback costs a token, with CUDA graphs and without
    mkdir -p "$OUT"
    local graphs
    for graphs in on off; do
        if [ $graphs = off ]; then export GGML_CUDA_DISABLE_GRAPHS=1; fi
        "$PY" -m star_edge bench $(model "${1:-llava-1.5-7b}") --repeats 1 --max-tokens 2 --no-memory --baseline flash --idle-hook 256 --out "$OUT/hook-graphs-$graphs.json" || say "hook failed"
    done
    unset GGML_CUDA_DISABLE_GRAPHS
}

limited() { # SECONDS STEP...: a step within its time; what it has written so far stays
    local seconds=$1
    shift
    say "$* (at most $seconds s)"
    timeout --signal=TERM --kill-after=5 "$seconds" "$0" "$@" || say "$1 did not end well ($?)"
}

run() {
    machine
    say "install"
    install
    use
    limited 30 doctor
    limited "${BENCH_SECONDS:-80}" bench llava-1.5-7b
    limited "${HOOK_SECONDS:-50}" hook
    limited "${TEST_SECONDS:-130}" test
    for shape in ${SHAPES:-llava-next-7b qwen2.5-vl-3b qwen3.5-4b}; do
        limited "${BENCH_SECONDS:-80}" bench "$shape"
    done
    say "done"
    ls -l "$OUT"
}

case ${1:-} in
    pack | install | machine) "$1" ;;
    doctor) use && doctor ;;
    test) use && suite ;;
    bench) use && shift && bench "$@" ;;
    hook) use && shift && hook "$@" ;;
    run) run ;;
    *) sed -n '2,/^set -/p' "$0" | sed '$d; s/^# \{0,1\}//' && exit 2 ;;
esac
