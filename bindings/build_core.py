"""Build script of the C extension: writes the cffi wrapper of csrc/star_edge.h, and tells CMake where ggml's headers
are.

    python build_core.py wrapper HEADER OUT.c    write the C source of the extension module
    python build_core.py include                 directory of the headers that llama-cpp-python installed
    python build_core.py version                 version of that llama-cpp-python
    python build_core.py llama                   what its llama_version() says, nothing if it cannot be loaded here

The header is the only place where the C interface is declared: its preprocessor lines are dropped and the rest is what
cffi parses.
"""

import ctypes
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import cffi


def wrapper(header: str, out: str) -> None:
    text = Path(header).read_text(encoding="utf-8")
    declarations = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    builder = cffi.FFI()
    builder.cdef(declarations)
    builder.set_source("star_edge._core", '#include "star_edge.h"')
    builder.emit_c_code(out)


def package() -> Path:
    # find_spec, not import: importing llama_cpp would load all of its libraries, which a build does not need
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        sys.exit("llama-cpp-python is not installed: the star_edge extension needs its headers")
    return Path(spec.origin).parent


def llama() -> str:
    for name in ("libllama.so", "libllama.dylib", "llama.dll"):
        try:
            function = ctypes.CDLL(str(package() / "lib" / name)).llama_version
        except (OSError, AttributeError):
            continue
        function.restype = ctypes.c_char_p
        return function().decode()
    return ""  # cross-compiled, or a library that needs a driver that this machine lacks


def include() -> str:
    directory = package().parent / "include"
    if not (directory / "ggml-backend.h").exists():
        sys.exit(f"{directory} has no ggml-backend.h: reinstall llama-cpp-python")
    return directory.as_posix()


if __name__ == "__main__":
    if sys.argv[1] == "wrapper":
        wrapper(sys.argv[2], sys.argv[3])
    elif sys.argv[1] == "include":
        print(include(), end="")
    elif sys.argv[1] == "llama":
        print(llama(), end="")
    elif sys.argv[1] == "version":
        print(importlib.metadata.version("llama-cpp-python"), end="")
    else:
        sys.exit(__doc__)
