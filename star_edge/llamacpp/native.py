"""The C core and the ggml library it works in.

Loads the extension, and refuses a llama-cpp-python other than the one that it was compiled against. Gives the core the
addresses of ggml functions in the library that `llama_cpp` has loaded, so that there is never a second copy of ggml.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import llama_cpp
import llama_cpp.mtmd_cpp

from ..errors import EngineError, LayerWindowError, VersionMismatchError
from . import log_levels

try:
    from .._core import ffi as ffi  # for the modules beside this one
    from .._core import lib as lib
except ImportError as error:  # pragma: no cover - only in a source tree that was never built
    raise ImportError("the star_edge C extension is not built: install the package with `pip install .`") from error

BOUND_FUNCTIONS = (
    "ggml_backend_tensor_get",
    "ggml_backend_tensor_set",
    "ggml_backend_buffer_is_host",
    "ggml_nbytes",
    "ggml_get_type_traits",
    "ggml_backend_buffer_get_type",
    "ggml_backend_buft_get_device",
    "ggml_backend_dev_supports_op",
)


def check_version(compiled: str, installed: str) -> None:
    """Raises VersionMismatchError unless both versions of llama-cpp-python are equal. A local part (+cu128) may differ.

    llama.cpp changes the layout of its structs between patch releases, so only equality is safe. `check_layout` tells
    whether a local version was built from the same headers.
    """
    if compiled.partition("+")[0] != installed.partition("+")[0]:
        raise VersionMismatchError(
            f"star_edge was compiled against llama-cpp-python {compiled}, but {installed} is installed",
            f"run `pip install llama-cpp-python=={compiled}`, or compile star-edge against {installed}: reinstall "
            "star-edge with --no-build-isolation",
        )


def check_layout(layouts: Iterable[tuple[str, str | None, int]], *modules: ModuleType) -> None:
    """Compares llama_cpp's structures with the headers that the core was compiled with.

    Args:
        layouts: (structure, field or None, bytes): the offset of a field, or the size of a structure.
        *modules: Where the structures are.

    Raises:
        VersionMismatchError: A size or an offset differs, as in a fork with the same version number.
    """
    for name, field, expected in layouts:
        structure = next((getattr(m, name) for m in modules if hasattr(m, name)), None)
        described = getattr(structure, field, None) if field else structure
        found = None if described is None else described.offset if field else ctypes.sizeof(described)
        if found != expected:
            what = f"{name}.{field} at byte {expected}" if field else f"{name} of {expected} bytes"
            raise VersionMismatchError(
                f"llama-cpp-python {llama_cpp.__version__} is not the one that star_edge was compiled against: that "
                f"has {what}, and this "
                + ("none" if found is None else f"has it at byte {found}" if field else f"{found} bytes"),
                "reinstall star-edge to compile it against this one, or install llama-cpp-python from PyPI",
            )


def check_llama(compiled: str, loaded: str) -> None:
    """Raises VersionMismatchError unless the loaded llama.cpp has the version of compile time ("": unknown)."""
    if compiled and compiled != loaded:
        raise VersionMismatchError(
            f"star_edge was compiled against llama.cpp {compiled}, but {loaded or 'an unknown version'} is loaded",
            "unset LLAMA_CPP_LIB_PATH, or reinstall star-edge to compile it against this one",
        )


def _layouts() -> Iterator[tuple[str, str | None, int]]:
    entry = lib.se_layouts()
    while entry.structure != ffi.NULL:
        yield (
            ffi.string(entry.structure).decode(),
            None if entry.field == ffi.NULL else ffi.string(entry.field).decode(),
            entry.bytes,
        )
        entry += 1


def open_standard_streams() -> None:
    """Opens the null device as descriptors 1 and 2 if they are closed, as in a daemon.

    llama_cpp duplicates both while it loads, and would fail. Also, the next file to be opened would get the number that
    llama.cpp logs to.
    """
    for number in (1, 2):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            if null != number:
                os.dup2(null, number)
                os.close(null)


def find_ggml() -> ctypes.CDLL:
    """The ggml-base library that llama_cpp loaded, as a ctypes handle.

    Raises:
        EngineError: It is not beside llama_cpp's own libraries.
    """
    folder = Path(llama_cpp.__file__).parent / "lib"
    names = {"win32": ("ggml-base.dll",), "darwin": ("libggml-base.dylib",)}.get(sys.platform, ("libggml-base.so",))
    override = os.environ.get("LLAMA_CPP_LIB_PATH")  # llama_cpp's own variable for another build of the libraries
    for directory in [Path(override)] if override else [folder]:
        for name in names:
            if (directory / name).exists():
                return ctypes.CDLL(str(directory / name))
    raise EngineError(
        f"no {names[0]} in {override or 'llama_cpp/lib'}", "reinstall llama-cpp-python with its shared libraries"
    )


check_version(ffi.string(lib.se_built_against()).decode(), llama_cpp.__version__)
check_layout(_layouts(), llama_cpp, llama_cpp.mtmd_cpp)
check_llama(
    ffi.string(lib.se_built_against_llama()).decode(), (getattr(llama_cpp, "llama_version", bytes)() or b"").decode()
)
log_levels.correct()
GGML = find_ggml()
for _name in BOUND_FUNCTIONS:
    lib.se_bind(_name.encode(), ctypes.cast(getattr(GGML, _name), ctypes.c_void_p).value)


def version_and_features() -> tuple[str, bytes]:
    """Version of llama-cpp-python, and the processor's features as llama.cpp uses them."""
    return llama_cpp.__version__, llama_cpp.llama_print_system_info()


def check(error: int, what: str, remedy: str = "") -> None:
    """Turns an error code of the core into an EngineError, or a LayerWindowError if it concerns the model's graph."""
    if error:
        kind = (
            LayerWindowError
            if error in (lib.SE_ERR_NO_LAYER_OUT, lib.SE_ERR_NO_ATTENTION, lib.SE_ERR_LATE_INPUT)
            else EngineError
        )
        raise kind(f"{what}: {ffi.string(lib.se_error_text(error)).decode()}", remedy)
