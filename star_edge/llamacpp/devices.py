"""Devices that the loaded ggml can compute on."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import llama_cpp


def list_devices() -> list[dict[str, Any]]:
    """Name, description, and free and total memory in bytes of each device, including the CPU."""
    folder = Path(os.environ.get("LLAMA_CPP_LIB_PATH") or Path(llama_cpp.__file__).parent / "lib")
    name = {"win32": "ggml.dll", "darwin": "libggml.dylib"}.get(sys.platform, "libggml.so")
    ggml = ctypes.CDLL(str(folder / name))
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    ggml.ggml_backend_dev_get.restype, ggml.ggml_backend_dev_get.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    for function in (ggml.ggml_backend_dev_name, ggml.ggml_backend_dev_description):
        function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    ggml.ggml_backend_dev_memory.restype = None
    ggml.ggml_backend_dev_memory.argtypes = [
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_size_t),
        ctypes.POINTER(ctypes.c_size_t),
    ]
    devices = []
    for i in range(ggml.ggml_backend_dev_count()):
        device = ggml.ggml_backend_dev_get(i)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        ggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        devices.append(
            {
                "name": ggml.ggml_backend_dev_name(device).decode(),
                "description": ggml.ggml_backend_dev_description(device).decode(),
                "free_bytes": free.value,
                "total_bytes": total.value,
            }
        )
    return devices


def can_offload() -> bool:
    """Whether this build computes on a GPU."""
    return bool(llama_cpp.llama_supports_gpu_offload())


def cpu_features() -> str:
    """The processor's features, as llama.cpp uses them."""
    return str(llama_cpp.llama_print_system_info().decode().strip())


def openmp_waits() -> str | None:
    """How llama.cpp's threads wait for each other, as the environment says: "spinning" or "sleeping".

    None: its threads are not OpenMP's. libgomp reads the variables when it is loaded, so a later change does nothing.
    Threads that spin take the time of a processor from the very thread that they wait for, if other work runs there.
    """
    if "OPENMP = 1" not in cpu_features():
        return None
    spins = os.environ.get("GOMP_SPINCOUNT", "").strip()  # which libgomp takes before the policy
    if spins:
        return "sleeping" if spins == "0" else "spinning"
    return "sleeping" if os.environ.get("OMP_WAIT_POLICY", "").strip().lower() == "passive" else "spinning"
