"""Builds the C core with sanitizers and runs its tests in it: `make sanitize`.

    python tools/sanitize/sanitize.py                   # AddressSanitizer and UndefinedBehaviorSanitizer, then
    ThreadSanitizer python tools/sanitize/sanitize.py address -k scores # one of them; the rest goes to pytest

The core is compiled a second time, in build/sanitize, and takes the place of the installed one (`-p` below). llama.cpp
is as it is installed. ThreadSanitizer runs a C program (threads.c) on the core alone: ggml's threads are OpenMP's,
which it does not know.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
BUILD = ROOT / "build" / "sanitize"
TESTS = (
    "test_tap.py",
    "test_tap_inputs.py",
    "test_tap_splits.py",
    "test_shrink.py",
    "test_row_window.py",
    "test_scores.py",
    "test_core_threads.py",
    "test_choosing.py",
    "test_scorers.py",
)
ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g")
THREAD = ("-fsanitize=thread", "-fno-omit-frame-pointer", "-g", "-O1")


def run(command: list[str], **variables: str) -> None:
    print("+", " ".join(command), flush=True)
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, **variables})


def library(name: str) -> str:
    """The compiler's own, which must be loaded before everything else."""
    found = subprocess.run(
        [compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return str(Path(found).resolve())


def compiler() -> str:
    return os.environ.get("CC", "cc")


def address(pytest_arguments: list[str]) -> None:
    folder = BUILD / "address"
    flags = " ".join(ADDRESS)
    run(
        [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(folder),
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
            f"-DCMAKE_C_FLAGS={flags}",
            f"-DCMAKE_MODULE_LINKER_FLAGS={flags}",
        ]
    )
    run(["cmake", "--build", str(folder)])
    core = next(folder.glob("_core*.so"))
    run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "sanitized_core",
            *(f"tests/{name}" for name in TESTS),
            *pytest_arguments,
        ],
        # libstdc++ beside it: AddressSanitizer looks for __cxa_throw when it is loaded, and C++ comes later with
        # llama.cpp
        LD_PRELOAD=f"{library('libasan.so')}:{library('libubsan.so')}:{library('libstdc++.so')}",
        ASAN_OPTIONS="detect_leaks=0:abort_on_error=1",  # Python leaves memory to the end of the process
        UBSAN_OPTIONS="print_stacktrace=1",
        PYTHONPATH=str(Path(__file__).parent),
        STAR_EDGE_SANITIZED_CORE=str(core),
    )


def thread(_: list[str]) -> None:
    package = Path(importlib.util.find_spec("llama_cpp").origin).parent
    program = BUILD / "threads"
    BUILD.mkdir(parents=True, exist_ok=True)
    sources = sorted(str(path) for path in (ROOT / "csrc").glob("*.c"))
    run(
        [
            compiler(),
            "-std=c11",
            "-D_GNU_SOURCE",
            *THREAD,
            "-Wno-psabi",
            f"-I{ROOT / 'csrc'}",
            f"-isystem{package.parent / 'include'}",
            '-DSTAR_EDGE_LLAMA_CPP_PYTHON="sanitize"',
            '-DSTAR_EDGE_LLAMA=""',
            *sources,
            str(Path(__file__).parent / "threads.c"),
            "-o",
            str(program),
            f"-L{package / 'lib'}",
            f"-Wl,-rpath,{package / 'lib'}",
            "-lggml-base",
            "-lpthread",
            "-lm",
        ]
    )
    run([str(program)], TSAN_OPTIONS="halt_on_error=1:exitcode=66")


if __name__ == "__main__":
    kinds = {"address": address, "thread": thread}
    chosen = sys.argv[1:2] if sys.argv[1:2] and sys.argv[1] in kinds else []
    for kind in chosen or kinds:
        kinds[kind](sys.argv[2:] if chosen else sys.argv[1:])
