"""The type that the encoder computes in: that of the mmproj file, or of a converted copy that is kept in a cache.

What is converted are the matrices of the encoder's layers, which are nearly all of its work. ggml rounds what it
multiplies them by to their type too (to 11 bits for f16, 8 for bf16, blocks of 8-bit integers for q8_0), so a type
decides the speed and the rounding of both. Everything else stays: norms, biases, positions, and the patch embedding and
the projector, whose types some graphs depend on.

Time of an encode of Qwen2-VL-2B's encoder (576 patches, one thread of an AMD EPYC, kernels built for these
instructions), in seconds, and how far its features are from those of f32 (relative RMS):

              AVX2    AVX512   AVX512-BF16   from f32
    f32       8.07      6.23          6.29          0
    f16       7.49      4.80          4.92     0.0009
    bf16      8.91      4.57          3.42     0.0060
    q8_0      7.42      6.48          6.05     0.0222
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import platformdirs

from ..errors import ConfigError, ModelFileError, UnsupportedModelError, quoted
from ..llamacpp.devices import cpu_features
from ..llamacpp.gguf import GGUFInfo, read_gguf_info
from ..llamacpp.gguf_check import BF16, F16, F32, type_name
from ..llamacpp.gguf_convert import FLOATS, convert, is_readable
from .cache import file_digest

MMPROJ_TYPES = ("file", "auto", *FLOATS)
CACHE_VARIABLE = "STAR_EDGE_CACHE"
CACHE_BYTES = 8 * 2**30  # of all converted files together
_FORMAT = 1  # of converted files; to be raised when the same source and type give another file
_SUFFIX, _TEMPORARY = ".gguf", ".gguf-part"
_ABANDONED_SECONDS = 3600  # no process still writes a temporary file of that age
# Matrices that every graph of tools/mtmd/models multiplies rows by (build_mm), and does nothing else with
_MATRIX = re.compile(r"v\.blk\.\d+\.(attn_(q|k|v|qkv|out)|ffn_(up|gate|down))\.weight")


def check_type(mmproj_type: object) -> None:
    """Raises ConfigError unless it is in MMPROJ_TYPES."""
    if not isinstance(mmproj_type, str) or mmproj_type not in MMPROJ_TYPES:
        raise ConfigError(f"mmproj_type={quoted(mmproj_type)} is unknown", f"use one of {', '.join(MMPROJ_TYPES)}")


def matrices(info: GGUFInfo) -> dict[str, int]:
    """ggml_type of each matrix of the encoder's layers, by name."""
    return {
        name: tensor.kind for name, tensor in info.tensors.items() if _MATRIX.fullmatch(name) and len(tensor.shape) == 2
    }


def type_of(info: GGUFInfo) -> str:
    """The type that most values of those matrices have, "" if there is none."""
    counts: dict[int, int] = {}
    for name, kind in matrices(info).items():
        n, m = info.tensors[name].shape
        counts[kind] = counts.get(kind, 0) + n * m
    return type_name(max(counts, key=counts.__getitem__)).lower() if counts else ""


def fastest(kind: int, features: str) -> int:
    """The fastest type for matrices that have this one, by the table above. One that was not measured stays.

    Args:
        kind: ggml_type of the matrices.
        features: The processor's, as `cpu_features` has them.
    """
    has = {name.strip() for name, _, on in (entry.partition("=") for entry in features.split("|")) if on.strip() == "1"}
    has = {name.rpartition(":")[2].strip() for name in has}  # the first is behind the device's name
    is_quantized = kind not in (F32, F16, BF16)
    if "AVX512_BF16" in has:
        return BF16
    if "AVX512" in has:
        return kind if kind == BF16 else F16
    if {"AVX2", "F16C"} <= has:
        return kind if is_quantized else F16
    return kind


def fastest_type(info: GGUFInfo) -> str:
    """The type that "auto" gives most of a file's matrices on this processor, "" if there is none."""
    kinds = {type_name(kind).lower(): kind for kind in matrices(info).values() if is_readable(kind)}
    of_file = type_of(info)
    return type_name(fastest(kinds[of_file], cpu_features())).lower() if of_file in kinds else of_file


@dataclass(frozen=True)
class Precision:
    """The file that an encoder is loaded from.

    Attributes:
        info: Its header.
        kind: The type of its matrices.
        of_file: The type that they have in the user's file.
        note: Why they are not converted although that was asked for, or "".
    """

    info: GGUFInfo
    kind: str
    of_file: str
    note: str = ""

    @property
    def is_converted(self) -> bool:
        return self.kind != self.of_file


def with_type(info: GGUFInfo, mmproj_type: str, on_gpu: bool) -> Precision:
    """The file with matrices of that type, converted if it is not in the cache.

    Args:
        info: Header of the user's file.
        mmproj_type: One of MMPROJ_TYPES. "auto": the fastest on this processor; the file's own on a GPU.
        on_gpu: Whether the encoder may use a GPU.

    Raises:
        UnsupportedModelError: The type was named, and the file has matrices that cannot be converted.
        ConfigError: The type was named, and the converted file cannot be kept.
        ModelFileError: The file has changed, or has values that the type cannot hold.
    """
    found, of_file = matrices(info), type_of(info)
    as_is = Precision(info, of_file, of_file)
    is_auto = mmproj_type == "auto"
    if not found and not is_auto and mmproj_type != "file":
        return replace(
            as_is, note=f"mmproj_type={mmproj_type!r}: the encoder has no layers whose matrices are converted"
        )
    if mmproj_type == "file" or not found:
        return as_is
    if is_auto and on_gpu:
        return as_is
    unreadable = sorted({type_name(kind) for kind in found.values() if not is_readable(kind)})
    if unreadable:
        if is_auto:
            return as_is
        raise UnsupportedModelError(
            f"mmproj_type={mmproj_type!r}: {info.path} has matrices of type {', '.join(unreadable)}, which cannot be "
            "converted",
            'use mmproj_type="file"',
        )
    features = cpu_features()
    kinds = {name: fastest(kind, features) if is_auto else FLOATS[mmproj_type] for name, kind in found.items()}
    kinds = {name: kind for name, kind in kinds.items() if kind != found[name]}
    if not kinds:
        return as_is
    try:
        converted = _converted(info, kinds)
    except (OSError, ModelFileError) as error:
        reason = error.cause if isinstance(error, ModelFileError) else f"{_base()}: {error.strerror or error}"
        if is_auto:
            return Precision(info, of_file, of_file, f"the encoder computes in {of_file}: not converted ({reason})")
        if isinstance(error, ModelFileError):
            raise
        raise ConfigError(
            f"mmproj_type={mmproj_type!r}: the converted file cannot be kept ({reason})",
            f'make room there, name another folder in {CACHE_VARIABLE}, or use mmproj_type="file"',
        ) from error
    return Precision(converted, type_of(converted), of_file)


# ---- the cache ----


def _base() -> str:
    return os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("star_edge", appauthor=False)


def _folder() -> Path:
    """Raises FileNotFoundError where "~" stands for no folder."""
    try:
        return Path(_base()).expanduser() / "mmproj"
    except RuntimeError as error:  # an unknown user, or one without a home
        raise FileNotFoundError(errno.ENOENT, "there is no such home folder") from error


def _converted(info: GGUFInfo, kinds: dict[str, int]) -> GGUFInfo:
    """Header of the converted file, which is written unless the cache has it."""
    folder = _folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    types = "-".join(sorted({type_name(kind).lower() for kind in kinds.values()}))
    path = folder / f"{file_digest(info.path).hex()[:32]}-{types}-{_FORMAT}{_SUFFIX}"
    with contextlib.suppress(ModelFileError):  # missing or damaged: it is made again
        found = read_gguf_info(path, tuple(info.values))
        if {name: tensor.shape for name, tensor in found.tensors.items()} == {
            name: tensor.shape for name, tensor in info.tensors.items()
        } and all(found.tensors[name].kind == kind for name, kind in kinds.items()):
            with contextlib.suppress(OSError):
                os.utime(path)  # the time of last use
            return found
    # Renamed into place, so that another process sees the whole file or none.
    with tempfile.NamedTemporaryFile(dir=folder, suffix=_TEMPORARY, delete=False) as file:
        try:
            file.close()
            convert(info, file.name, kinds)
            _make_room(folder, os.path.getsize(file.name))
            os.replace(file.name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise
    return read_gguf_info(path, tuple(info.values))


def _make_room(folder: Path, n_bytes: int) -> None:
    """Removes what was not used for longest, until so many bytes more are within the bound."""
    files = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process may have removed it
            status = path.lstat()
            if path.name.endswith(_TEMPORARY) and status.st_mtime < time.time() - _ABANDONED_SECONDS:
                path.unlink()
            elif path.name.endswith(_SUFFIX) and stat.S_ISREG(status.st_mode):
                files.append((status.st_mtime_ns, status.st_size, path))
    used = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if used + n_bytes <= CACHE_BYTES:
            break
        with contextlib.suppress(OSError):
            path.unlink()
            used -= size
