#!/usr/bin/env bash
# star_edge on an NVIDIA GPU: builds llama-cpp-python with CUDA, runs the exactness suite and the benchmarks there, all in one go.
#
#   benchmarks/gpu.sh                with a network: build, test, bench
#   benchmarks/gpu.sh pack           where there is a network, for a GPU machine without one: sources and wheels into .gpu/ (about 10 MB), to be copied along with
#                                    the working tree. PACK_PYTHON names that machine's Python (default 3.12)
#   benchmarks/gpu.sh build          a virtual environment and the CUDA build, in .gpu/. Stopped and started again it goes on where it was (ninja)
#   benchmarks/gpu.sh test           the exactness suite with all layers and the encoder on the GPU
#   benchmarks/gpu.sh bench [SHAPE...]    star-edge bench for the shapes, default all, with the cost of an idle hook
#
# OUT: folder for results (default benchmarks/results): gpu-SHAPE.json, bench-gpu-SHAPE.png, gpu-tests.xml, gpu-machine.txt.
#     Put the .json files into benchmarks/results and the .png into docs, and run `python benchmarks/tables.py write`.
# GPU_ARCH: compute capability such as 90 (default: that of the first GPU). JOBS: compiler processes (default: one for each core).
# CMAKE_EXTRA: more CMake arguments; CMAKE_EXTRA=-DGGML_CUDA=OFF tries the script without a GPU.
# Needs nvcc, CMake, a C++ compiler, and Python >= 3.10 with venv. Without a network that Python must have numpy, pillow, pyyaml, requests and tqdm.
set -euo pipefail
cd "$(dirname "$0")/.."

GPU=$PWD/.gpu
OUT=${OUT:-benchmarks/results}
JOBS=${JOBS:-$(nproc)}
VERSION=$(sed -n 's/.*"llama-cpp-python==\([0-9.]*\)".*/\1/p' pyproject.toml | head -n 1)
SOURCE=$GPU/llama_cpp_python-$VERSION
BUNDLE=$GPU/llama-cpp-python-$VERSION-cuda.tar.xz
PY=$GPU/venv/bin/python
# Pure Python, or small: what a machine with a scientific Python is likely to lack
WHEELS=(gguf cffi pycparser diskcache jinja2 markupsafe click rich markdown-it-py mdurl pygments scikit-build-core packaging pathspec
    typing-extensions pytest pluggy iniconfig psutil ninja)

say() { printf '== %s\n' "$*"; }

unpack_sdist() { # the full source of llama-cpp-python, from the index that pip uses
    rm -rf "$GPU/sdist" "$SOURCE"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
        --dest "$GPU/sdist" "llama-cpp-python==$VERSION"
    tar -xf "$GPU/sdist/"llama_cpp_python-*.tar.gz -C "$GPU"
}

prune_source() { # only what the libraries are made of
    local vendor=$SOURCE/vendor/llama.cpp
    rm -rf "$SOURCE"/{.git,.github,docs,examples,tests,docker,scripts}
    find "$vendor" -mindepth 1 -maxdepth 1 \
        ! -name ggml ! -name src ! -name include ! -name common ! -name vendor ! -name cmake ! -name tools ! -name licenses \
        ! -name LICENSE ! -name CMakeLists.txt -exec rm -rf {} +
    find "$vendor/tools" -mindepth 1 -maxdepth 1 ! -name mtmd ! -name CMakeLists.txt -exec rm -rf {} +
    rm -rf "$vendor/tools/mtmd"/{tests,legacy-models,test-*}
    find "$vendor/ggml/src" -mindepth 1 -maxdepth 1 -type d ! -name ggml-cpu ! -name ggml-cuda -exec rm -rf {} +
}

pack() {
    mkdir -p "$GPU/wheels"
    say "source of llama-cpp-python $VERSION"
    unpack_sdist
    prune_source
    tar -cJf "$BUNDLE" -C "$GPU" "llama_cpp_python-$VERSION"
    rm -rf "$GPU/sdist" "$SOURCE"
    say "wheels for Python ${PACK_PYTHON:-3.12}"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest "$GPU/wheels" \
        --python-version "${PACK_PYTHON:-3.12}" --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 --platform any "${WHEELS[@]}"
    du -sh "$GPU" | cut -f 1
}

build() {
    mkdir -p "$GPU"
    local arch=${GPU_ARCH:-} offline=()
    if [ -z "$arch" ]; then
        arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '. ') || true
    fi
    if [ -z "$arch" ] && [[ ${CMAKE_EXTRA:-} != *GGML_CUDA=OFF* ]]; then
        echo "error: no GPU was found: install the driver, or set GPU_ARCH (such as 90)" >&2
        exit 2
    fi
    [ -x "$PY" ] || python3 -m venv --system-site-packages "$GPU/venv"
    if [ -f "$BUNDLE" ]; then
        offline=(--no-index --find-links "$GPU/wheels")
        [ -d "$SOURCE" ] || tar -xJf "$BUNDLE" -C "$GPU"
    elif [ ! -d "$SOURCE" ]; then
        unpack_sdist
    fi
    local install=("$PY" -m pip install --quiet --disable-pip-version-check)
    say "build tools"
    "${install[@]}" "${offline[@]}" "scikit-build-core>=0.10" "cffi>=1.16" ninja
    say "llama-cpp-python $VERSION with CUDA for compute capability ${arch:-none}, $JOBS jobs"
    # A build folder that stays: a build that was stopped goes on. PATH: the ninja of the environment.
    PATH=$GPU/venv/bin:$PATH CMAKE_BUILD_PARALLEL_LEVEL=$JOBS \
        CMAKE_ARGS="-DGGML_CUDA=ON ${arch:+-DCMAKE_CUDA_ARCHITECTURES=$arch} -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF ${CMAKE_EXTRA:-}" \
        "${install[@]}" "${offline[@]}" --no-build-isolation --config-settings=build-dir="$GPU/build" "$SOURCE"
    say "star_edge"
    PATH=$GPU/venv/bin:$PATH "${install[@]}" "${offline[@]}" --no-build-isolation --editable .
    "${install[@]}" "${offline[@]}" "pytest>=8" "psutil>=5.9"
    "$PY" -c "import llama_cpp; print('GPU offload:', bool(llama_cpp.llama_supports_gpu_offload()))"
}

machine() {
    mkdir -p "$OUT"
    {
        date +%F
        nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap --format=csv,noheader 2>/dev/null || echo "no GPU"
        nvcc --version 2>/dev/null | tail -n 2 || true
        "$GPU/venv/bin/star-edge" doctor --no-check --json 2>/dev/null | head -n 40 || true
    } >"$OUT/gpu-machine.txt"
}

suite() {
    mkdir -p "$OUT"
    say "exactness suite on the GPU"
    # A failure is a result here: it is in the .xml, and the benchmarks are run all the same.
    STAR_EDGE_TEST_GPU=1 "$PY" -m pytest tests/test_exact.py tests/test_windows.py tests/test_tap.py tests/test_tap_inputs.py tests/test_faithful.py \
        tests/test_vision.py tests/test_reuse.py --junitxml "$OUT/gpu-tests.xml" || say "some tests failed: see $OUT/gpu-tests.xml"
}

bench() {
    mkdir -p "$OUT" "$GPU/models"
    local shapes=("$@") shape configs plot
    [ ${#shapes[@]} -gt 0 ] || shapes=(llava-1.5-7b llava-next-7b qwen2.5-vl-3b gemma-3-4b smolvlm-500m)
    for shape in "${shapes[@]}"; do
        say "$shape"
        configs=() plot=()
        [ -f "benchmarks/configs/$shape.json" ] && configs=(--configs "benchmarks/configs/$shape.json" --preset balanced --preset fast)
        "$PY" -c "import matplotlib" 2>/dev/null && plot=(--plot "$OUT/bench-gpu-$shape.png")
        "$GPU/venv/bin/star-edge" bench --shape "$shape" --folder "$GPU/models" -ngl -1 --repeats 7 --max-tokens 65 --idle-hook 512 \
            "${configs[@]}" "${plot[@]}" --out "$OUT/gpu-$shape.json" || say "$shape failed"
    done
}

case ${1:-all} in
    pack) pack ;;
    build) build ;;
    test) machine && suite ;;
    bench) shift && machine && bench "$@" ;;
    all) build && machine && suite && bench ;;
    *) sed -n '2,/^set -/p' "$0" | sed '$d; s/^# \{0,1\}//' && exit 2 ;;
esac
