"""The C core and the ggml library it works in.

Loads the extension, refuses to run beside another llama-cpp-python than it was compiled against, and hands the core the
addresses of the ggml functions in the library that `llama_cpp` itself loaded, so that there is never a second copy of ggml.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import llama_cpp

from .errors import EngineError, LayerWindowError, VersionMismatchError

try:
    from ._core import ffi, lib
except ImportError as error:  # pragma: no cover - only in a source tree that was never built
    raise ImportError("the star_edge C extension is not built: install the package with `pip install .`") from error

BOUND_FUNCTIONS = (
    "ggml_backend_tensor_get",
    "ggml_backend_tensor_set",
    "ggml_backend_buffer_is_host",
    "ggml_nbytes",
    "ggml_get_type_traits",
)


def check_version(compiled: str, installed: str) -> None:
    """Raises VersionMismatchError unless both versions of llama-cpp-python are the same.

    llama.cpp changes the layout of its structs between patch releases, so only equality is safe.
    """
    if compiled != installed:
        raise VersionMismatchError(
            f"star_edge was compiled against llama-cpp-python {compiled}, but {installed} is installed",
            f"run `pip install llama-cpp-python=={compiled}`, or reinstall star-edge to compile it against {installed}",
        )


def find_ggml() -> ctypes.CDLL:
    """The ggml-base library that llama_cpp loaded, as a ctypes handle.

    Raises:
        EngineError: when it is not beside llama_cpp's own libraries.
    """
    folder = Path(llama_cpp.__file__).parent / "lib"
    names = {"win32": ("ggml-base.dll",), "darwin": ("libggml-base.dylib",)}.get(sys.platform, ("libggml-base.so",))
    override = os.environ.get("LLAMA_CPP_LIB_PATH")  # llama_cpp's own variable for another build of the libraries
    for directory in [Path(override)] if override else [folder]:
        for name in names:
            if (directory / name).exists():
                return ctypes.CDLL(str(directory / name))
    raise EngineError(f"no {names[0]} in {override or 'llama_cpp/lib'}", "reinstall llama-cpp-python with its shared libraries")


check_version(ffi.string(lib.se_built_against()).decode(), llama_cpp.__version__)
GGML = find_ggml()
for _name in BOUND_FUNCTIONS:
    lib.se_bind(_name.encode(), ctypes.cast(getattr(GGML, _name), ctypes.c_void_p).value)


def check(error: int, what: str, remedy: str = "") -> None:
    """Turns an error code of the core into an EngineError, or a LayerWindowError when it is about the model's graph."""
    if error:
        kind = LayerWindowError if error in (lib.SE_ERR_NO_LAYER_OUT, lib.SE_ERR_NO_ATTENTION, lib.SE_ERR_LATE_INPUT) else EngineError
        raise kind(f"{what}: {ffi.string(lib.se_error_text(error)).decode()}", remedy)
