"""Runs the tests on ggml kernels of other processors than the one that llama-cpp-python was built for (`make
test-processors`).

    python tools/processors.py [--only NAME] [arguments of pytest]

ggml's CPU kernels are a library of their own (libggml-cpu). It is built from the source of the installed
llama-cpp-python with GGML_NATIVE=OFF, once for each set of instructions in VARIANTS that this processor has, and put
beside copies of the other libraries in .processors/NAME. llama_cpp takes its libraries from there with
LLAMA_CPP_LIB_PATH and MTMD_CPP_LIB. The Python packages stay as they are.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import llama_cpp

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".processors"
# name -> what the processor must have (/proc/cpuinfo), and options of ggml's CMakeLists.txt beside AVX2, F16C and FMA,
# which are on by default
VARIANTS = {
    "avx2": ({"avx2", "f16c", "fma"}, []),
    "avx512": ({"avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"}, ["AVX512"]),
    "avx512-bf16": (
        {"avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw", "avx512vbmi", "avx512_vnni", "avx512_bf16"},
        ["AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16"],
    ),
}
LIBRARY = "libggml-cpu.so"


def available() -> list[str]:
    if platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists():
        sys.exit("the variants are those of x86-64 on Linux: run `make test` on this machine")
    line = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    return [name for name, (needed, _) in VARIANTS.items() if needed <= set(line.split())]


def source() -> Path:
    """The unpacked source of the installed llama-cpp-python."""
    version = importlib.metadata.version("llama-cpp-python")
    unpacked = FOLDER / f"llama_cpp_python-{version}"
    if not unpacked.is_dir():
        FOLDER.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as temporary:
            download = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--no-binary",
                "llama-cpp-python",
            ]
            subprocess.run([*download, "--dest", temporary, f"llama-cpp-python=={version}"], check=True)
            with tarfile.open(next(Path(temporary).glob("*.tar.gz"))) as archive:
                archive.extractall(temporary, filter="data")
            (Path(temporary) / unpacked.name).rename(unpacked)
    return unpacked


def build(name: str, target: str, libraries: Sequence[str], options: Sequence[str], cxxflags: str = "") -> Path:
    """A folder of llama_cpp's libraries, some of them built with other options; built if it is not there yet.

    name: of the folder. target: of CMake. libraries: what is taken from the build. options: for CMake. cxxflags: flags
    of the C++ compiler.
    """
    done = FOLDER / name
    if done.is_dir():
        return done
    cmake = shutil.which("cmake")
    if cmake is None:
        sys.exit("cmake is needed to build ggml: install it")
    build_folder = FOLDER / f"build-{name}"
    configure = [cmake, "-S", str(source()), "-B", str(build_folder), "-DCMAKE_BUILD_TYPE=Release", *options]
    # where the package's own CMakeLists.txt would install to; nothing is installed
    configure += [
        f"-DSKBUILD_PLATLIB_DIR={build_folder}/unused",
        *([f"-DCMAKE_CXX_FLAGS={cxxflags}"] if cxxflags else []),
    ]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(
        [cmake, "--build", str(build_folder), "--target", target, "--parallel", str(os.cpu_count())], check=True
    )
    with tempfile.TemporaryDirectory(dir=FOLDER) as temporary:
        copy = Path(temporary) / name
        shutil.copytree(Path(llama_cpp.__file__).parent / "lib", copy, symlinks=True)
        for built in (file for library in libraries for file in build_folder.rglob(f"{library}*")):
            (copy / built.name).unlink(missing_ok=True)
            shutil.copy2(built, copy / built.name, follow_symlinks=False)
        copy.rename(done)
    return done


def build_variant(name: str) -> Path:
    options = [f"-DGGML_{option}=ON" for option in VARIANTS[name][1]]
    return build(name, "ggml-cpu", [LIBRARY], ["-DGGML_NATIVE=OFF", *options])


def environment_of(libraries: Path) -> dict[str, str]:
    """os.environ, with llama_cpp's libraries taken from that folder."""
    return {**os.environ, "LLAMA_CPP_LIB_PATH": str(libraries), "MTMD_CPP_LIB": str(libraries)}


def run(name: str, libraries: Path, arguments: list[str]) -> int:
    """pytest's status. Raises SystemExit unless the variant's kernels are those that are loaded."""
    environment = environment_of(libraries)
    told = "import llama_cpp; print(llama_cpp.llama_print_system_info().decode())"
    info = subprocess.run(
        [sys.executable, "-c", told], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()
    print(f"{name}: {info}", flush=True)
    on = {feature for feature in ("AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16") if f"{feature} = 1" in info}
    if on != set(VARIANTS[name][1]):
        sys.exit(f"{libraries} is not built for {name}: remove it and run again")
    return subprocess.run(
        [sys.executable, "-m", "pytest", *(arguments or ["tests"])], cwd=ROOT, env=environment
    ).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs the tests on ggml kernels of other processors.")
    parser.add_argument("--only", choices=VARIANTS, help="default: every variant that this processor can run")
    options, arguments = parser.parse_known_args()
    names = available()
    if options.only and options.only not in names:
        sys.exit(f"this processor cannot run {options.only}: it can run {', '.join(names)}")
    failed = [name for name in ([options.only] if options.only else names) if run(name, build_variant(name), arguments)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
