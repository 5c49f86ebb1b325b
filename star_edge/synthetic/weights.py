"""Random tensors, streamed into a GGUF file one at a time: a model of 4 GB takes the memory of its largest tensor.

Large tensors repeat a random tile, so that a file is written about as fast as the disk takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import gguf
import numpy as np

Q = gguf.GGMLQuantizationType
DTYPES = ("f32", "f16", "q8_0", "q4_k_m")
_TILE_VALUES = 2**20  # random values of a plain matrix before they repeat, in whole rows
_TILE_BLOCKS = 2**16  # and random blocks of a quantized one


@dataclass
class _Tensor:
    name: str
    shape: tuple[int, ...]
    kind: Any
    make: Callable[[], np.ndarray]


@dataclass
class TensorFile:
    """A GGUF file being made: metadata go to `gguf`, tensors through the methods, and `finish` draws and writes them in
    order.

    Arrays have the row-major shape that NumPy has, which is GGUF's reversed.

    Raises:
        ValueError: an unknown dtype, or rows that it cannot hold.
    """

    path: str | PathLike[str]
    arch: str
    dtype: str
    rng: np.random.Generator
    tensors: list[_Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}: use {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
        self.gguf = gguf.GGUFWriter(str(self.path), self.arch)
        self.gguf.add_name(f"random {self.arch}")

    def normal(self, name: str, *shape: int, mean: float = 0.0, std: float = 0.1, dtype: str = "f32") -> None:
        """A tensor that is never quantized."""
        kind, numpy_type = {"f32": (Q.F32, np.float32), "f16": (Q.F16, np.float16)}[dtype]
        self.tensors.append(
            _Tensor(name, shape, kind, lambda: (mean + std * self.rng.standard_normal(shape)).astype(numpy_type))
        )

    def matrix(self, name: str, n_out: int, n_in: int, gain: float = 1.0, more_bits: bool = False) -> None:
        """An (n_out, n_in) matrix with entries of variance gain^2 / n_in, in the file's dtype."""
        std = gain / np.sqrt(n_in)
        if self.dtype == "q4_k_m":
            if n_in % 256:
                raise ValueError(f"{name}: Q4_K needs rows of a multiple of 256 values, not {n_in}")
            kind = Q.Q6_K if more_bits else Q.Q4_K
            self.tensors.append(_Tensor(name, (n_out, n_in), kind, lambda: self._blocks(kind, n_out, n_in, std)))
        elif self.dtype == "q8_0":
            if n_in % 32:
                raise ValueError(f"{name}: Q8_0 needs rows of a multiple of 32 values, not {n_in}")

            def rows() -> np.ndarray:
                return _repeat(gguf.quants.quantize(self._tile(n_out, n_in, std), Q.Q8_0), n_out)

            self.tensors.append(_Tensor(name, (n_out, n_in), Q.Q8_0, rows))
        else:
            kind, numpy_type = (Q.F16, np.float16) if self.dtype == "f16" else (Q.F32, np.float32)
            self.tensors.append(
                _Tensor(
                    name, (n_out, n_in), kind, lambda: _repeat(self._tile(n_out, n_in, std).astype(numpy_type), n_out)
                )
            )

    def finish(self) -> None:
        for t in self.tensors:
            n_bytes = int(np.prod(t.shape)) // gguf.GGML_QUANT_SIZES[t.kind][0] * gguf.GGML_QUANT_SIZES[t.kind][1]
            self.gguf.add_tensor_info(t.name, t.shape, np.dtype(np.float32), n_bytes, raw_dtype=t.kind)
        self.gguf.write_header_to_file()
        self.gguf.write_kv_data_to_file()
        self.gguf.write_ti_data_to_file()
        for t in self.tensors:
            self.gguf.write_tensor_data(t.make())
        self.gguf.close()

    def _tile(self, n_out: int, n_in: int, std: float) -> np.ndarray:
        """The rows of an (n_out, n_in) float32 matrix that are random; the rest repeats them."""
        n = min(n_out, max(1, _TILE_VALUES // n_in))
        return (std * self.rng.standard_normal((n, n_in), dtype=np.float32)).astype(np.float32)

    def _blocks(self, kind: Any, n_out: int, n_in: int, std: float) -> np.ndarray:
        """Q4_K or Q6_K blocks, (n_out, bytes of a row) uint8: random bits, and block scales for the wanted
        deviation.
        """
        n_blocks = n_out * (n_in // 256)
        n = min(n_blocks, _TILE_BLOCKS)
        blocks = self.rng.integers(0, 256, (n, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
        if kind == Q.Q4_K:
            # value = d * scale * q - dmin * min, with 6-bit scale and min and 4-bit q: mean 0 at dmin = 7.5 d,
            # deviation 257 d
            blocks[:, 0:2] = np.full(n, std / 257, np.float16).view(np.uint8).reshape(-1, 2)
            blocks[:, 2:4] = np.full(n, 7.5 * std / 257, np.float16).view(np.uint8).reshape(-1, 2)
        else:
            # value = d * scale * q, with an 8-bit signed scale and a 6-bit signed q: deviation 1366 d
            blocks[:, 208:210] = np.full(n, std / 1366, np.float16).view(np.uint8).reshape(-1, 2)
        return _repeat(blocks, n_blocks).reshape(n_out, -1)


def _repeat(tile: np.ndarray, n: int) -> np.ndarray:
    return tile if len(tile) == n else np.resize(tile, (n, *tile.shape[1:]))
