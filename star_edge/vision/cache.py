"""Outputs of the vision encoder, kept in memory and, if wanted, in a directory.

A key stands for the image's pixels, the mmproj file and every setting that changes the result. A hit is therefore
bit-identical to a miss. Not thread-safe, like the encoder. Several processes may share a directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import numbers
import os
import stat
import struct
import tempfile
import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path

import numpy as np

from ..errors import ConfigError, quoted

DEFAULT_BYTES = 256 * 2**20
DIRECTORY_BYTES = 2 * 2**30  # of all files in a directory together
_KINDS = ("received", "cls")  # kinds of attention, in the order of a file

# A file: header, embeddings, cells, kept tokens and their masses, redundant tokens, scores by kind, and the SHA-256 of
# all before it. Little-endian. The header: magic, key, n_tokens, n, n_embd, 1 if there are cells, a bit for each kind,
# 1 if not all tokens are kept, number of redundant tokens, layer of the encoder stage (0: none)
_HEADER = struct.Struct("<8s32sIIIIIIII")
_MAGIC = b"starimg4"  # to be raised when the format, or how scores or what is left out are computed, changes
_SUFFIX, _TEMPORARY = ".starimg", ".starimg-part"
_CHECKSUM = 32
_ABANDONED_SECONDS = 3600  # no process still writes a temporary file of that age


@dataclass
class CachedImage:
    """The encoder's output for one image of n_tokens tokens, of which it has n. Arrays are read-only.

    Attributes:
        embeddings: (n, n_embd_inp) float32.
        cells: Grid cell of each token, (n_tokens,) int64, or None if not asked for.
        scores: Attention that each of the n receives, (n,) float32, by kind ("received", "cls").
        kept: The n tokens, ascending, (n,) int64. None: all.
        mass: Original tokens that each of them stands for, (n,) float64, if `kept` is there.
        redundant: As in `Encoded`, if `kept` is there.
        layer: As in `Encoded`, 0 for none.
    """

    embeddings: np.ndarray
    cells: np.ndarray | None = None
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    kept: np.ndarray | None = None
    mass: np.ndarray | None = None
    redundant: np.ndarray | None = None
    layer: int = 0

    def __post_init__(self) -> None:
        for array in self._arrays:
            array.setflags(write=False)

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def _arrays(self) -> list[np.ndarray]:
        arrays = (self.embeddings, self.cells, self.kept, self.mass, self.redundant, *self.scores.values())
        return [array for array in arrays if array is not None]

    @property
    def n_bytes(self) -> int:
        return sum(array.nbytes for array in self._arrays)

    def has(self, attention: str | None, cells: bool) -> bool:
        return (attention is None or attention in self.scores) and not (cells and self.cells is None)

    def joined(self, other: CachedImage) -> CachedImage:
        """This image, with what an earlier run had read of it."""
        cells = other.cells if self.cells is None else self.cells
        return replace(self, cells=cells, scores={**other.scores, **self.scores})


class ImageCache:
    """A cache that drops the least recently used image first, in memory and in the directory.

    Args:
        n_bytes: Bytes in memory at most, 0 for none.
        directory: A directory to keep images in as well, or None.
        fingerprint: Stands for everything but the image that changes the encoder's output.

    Attributes:
        ahead: While it is true, images are put in for a request that waits: `is_of_earlier` tells them apart.

    Raises:
        ConfigError: `n_bytes` is not a size, or the directory cannot be used.
    """

    def __init__(self, n_bytes: int, directory: str | PathLike[str] | None, fingerprint: bytes) -> None:
        check_bytes(n_bytes)
        self.n_bytes, self.fingerprint = n_bytes, fingerprint
        self.used = 0
        self.ahead = False
        self._ahead: set[bytes] = set()  # put in ahead, and not used yet
        self._images: OrderedDict[bytes, CachedImage] = OrderedDict()
        self.directory = check_directory(directory)
        if directory is not None and self.directory is not None:
            if not os.fspath(directory):
                raise ConfigError("image_cache_dir is empty", "give a directory, or None")
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except (OSError, ValueError) as error:  # ValueError: a NUL character
                reason = getattr(error, "strerror", None) or str(error)
                raise ConfigError(
                    f"image_cache_dir {str(self.directory)!r} cannot be made ({reason})", "give a directory"
                ) from error

    def key(self, image: str) -> bytes:
        """Key of an image. image: what identifies its pixels (`pixels_id`)."""
        return hashlib.sha256(self.fingerprint + image.encode()).digest()

    def get(self, key: bytes, n_tokens: int, n_embd: int, attention: str | None, cells: bool) -> CachedImage | None:
        """The cached image, or None unless everything that is asked for is there."""
        image = self._images.get(key)
        if image is not None:
            self._images.move_to_end(key)
        if (image is None or not image.has(attention, cells)) and self.directory is not None:
            found = self._read(key, n_tokens, n_embd)
            if found is not None:
                image = found if image is None else found.joined(image)
                self._remember(key, image)
        return image if image is not None and image.has(attention, cells) else None

    def put(self, key: bytes, image: CachedImage, n_tokens: int) -> None:
        """Keeps an image. n_tokens: of the whole image."""
        before = self._images.get(key)
        if before is None and self.directory is not None:
            before = self._read(key, n_tokens, image.embeddings.shape[1])
        image = image if before is None else image.joined(before)
        self._remember(key, image)
        if self.directory is not None:
            with contextlib.suppress(OSError):  # a full disk costs the next request time, and this one nothing
                self._write(key, image, n_tokens)

    def clear(self) -> None:
        """Forgets what is in memory."""
        self._images.clear()
        self._ahead.clear()
        self.used = 0

    def is_of_earlier(self, key: bytes) -> bool:
        """Whether an image that was found comes from an earlier request. Not so the first time after it was put in
        ahead: then it was encoded for this one.
        """
        if self.ahead or key not in self._ahead:
            return True
        self._ahead.discard(key)
        return False

    # ---- memory ----

    def _remember(self, key: bytes, image: CachedImage) -> None:
        before = self._images.pop(key, None)
        self.used += image.n_bytes - (before.n_bytes if before else 0)
        self._images[key] = image
        if self.ahead and before is None:
            self._ahead.add(key)
        while self.used > self.n_bytes:
            gone, old = self._images.popitem(last=False)
            self._ahead.discard(gone)
            self.used -= old.n_bytes

    # ---- directory ----

    def _path(self, key: bytes) -> Path:
        assert self.directory is not None
        return self.directory / (key.hex() + _SUFFIX)

    def _read(self, key: bytes, n_tokens: int, n_embd: int) -> CachedImage | None:
        """Reads a file. None unless it is a complete file of this image."""
        path = self._path(key)
        largest = _HEADER.size + n_tokens * (4 * n_embd + 8 + 24 + 4 * len(_KINDS)) + _CHECKSUM
        try:
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode) or not _HEADER.size + _CHECKSUM <= status.st_size <= largest:
                return None
            data = path.read_bytes()
        except OSError:
            return None
        body = data[:-_CHECKSUM]
        if len(body) < _HEADER.size or hashlib.sha256(body).digest() != data[-_CHECKSUM:]:
            return None
        magic, its_key, its_tokens, n, its_embd, has_cells, bits, has_kept, n_redundant, layer = _HEADER.unpack_from(
            body
        )
        kinds = [kind for i, kind in enumerate(_KINDS) if bits >> i & 1]
        size = _HEADER.size + n * (4 * n_embd + 16 * has_kept + 4 * len(kinds))
        size += 8 * n_tokens * has_cells + 8 * n_redundant
        if (
            (magic, its_key, its_tokens, its_embd) != (_MAGIC, key, n_tokens, n_embd)
            or has_cells > 1
            or has_kept > 1
            or (not has_kept and (n, n_redundant) != (n_tokens, 0))
            or bits >> len(_KINDS)
            or len(body) != size
        ):
            return None
        at = _HEADER.size

        def take(dtype: str, n: int) -> np.ndarray:
            nonlocal at
            array = np.frombuffer(body, dtype, n, at)
            at += array.nbytes
            return array.astype(dtype[1:])  # a copy: aligned, in this machine's byte order

        embeddings = take("<f4", n * n_embd).reshape(n, n_embd)
        cells = take("<i8", n_tokens) if has_cells else None
        kept, mass = (take("<i8", n), take("<f8", n)) if has_kept else (None, None)
        redundant = take("<i8", n_redundant) if has_kept else None
        scores = {kind: take("<f4", n) for kind in kinds}
        if cells is not None and not ((cells >= -1) & (cells < n_tokens)).all():  # they are used as indices
            return None
        if any(t is not None and not _are_tokens(t, n_tokens) for t in (kept, redundant)):
            return None
        if mass is not None and not ((mass >= 1) & (mass <= n_tokens)).all():
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the time of last use: access times are often off
        return CachedImage(embeddings, cells, scores, kept, mass, redundant, layer)

    def _write(self, key: bytes, image: CachedImage, n_tokens: int) -> None:
        assert self.directory is not None
        self.directory.mkdir(parents=True, exist_ok=True)  # somebody may have cleaned up
        bits = sum(1 << i for i, kind in enumerate(_KINDS) if kind in image.scores)
        has_cells, has_kept = image.cells is not None, image.kept is not None
        n_redundant = 0 if image.redundant is None else len(image.redundant)
        shape = image.embeddings.shape
        parts = [_HEADER.pack(_MAGIC, key, n_tokens, *shape, has_cells, bits, has_kept, n_redundant, image.layer)]
        parts.append(np.ascontiguousarray(image.embeddings, "<f4").tobytes())
        for array, dtype in ((image.cells, "<i8"), (image.kept, "<i8"), (image.mass, "<f8"), (image.redundant, "<i8")):
            if array is not None:
                parts.append(np.ascontiguousarray(array, dtype).tobytes())
        parts += [np.ascontiguousarray(image.scores[kind], "<f4").tobytes() for kind in _KINDS if kind in image.scores]
        body = b"".join(parts)
        self._make_room(len(body) + _CHECKSUM)
        # Renamed into place, so that another process sees the whole file or none.
        with tempfile.NamedTemporaryFile(dir=self.directory, suffix=_TEMPORARY, delete=False) as file:
            try:
                file.write(body)
                file.write(hashlib.sha256(body).digest())
                file.close()
                os.replace(file.name, self._path(key))
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(file.name)
                raise

    def _make_room(self, n_bytes: int) -> None:
        files = []
        with os.scandir(self.directory) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # another process may have removed it
                    status = entry.stat(follow_symlinks=False)
                    if entry.name.endswith(_TEMPORARY) and status.st_mtime < time.time() - _ABANDONED_SECONDS:
                        os.unlink(entry.path)
                    elif entry.name.endswith(_SUFFIX) and stat.S_ISREG(status.st_mode):
                        files.append((status.st_mtime_ns, status.st_size, entry.path))
        used = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if used + n_bytes <= DIRECTORY_BYTES:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
                used -= size


def _are_tokens(tokens: np.ndarray, n_tokens: int) -> bool:
    """Whether they are ascending indices of tokens."""
    return bool((np.diff(tokens, prepend=-1) > 0).all() and (tokens < n_tokens).all())


def check_bytes(n_bytes: int) -> None:
    """Raises ConfigError unless `n_bytes` is a whole number >= 0."""
    if isinstance(n_bytes, bool) or not isinstance(n_bytes, numbers.Integral) or n_bytes < 0:
        raise ConfigError(
            f"image_cache_bytes={quoted(n_bytes)} is not a whole number >= 0", "use bytes, or 0 for no cache in memory"
        )


def check_directory(directory: str | PathLike[str] | None) -> Path | None:
    """The directory of a cache, with `~` expanded. Raises ConfigError if it cannot be a path."""
    if directory is None:
        return None
    try:
        name = os.fsdecode(directory)
        name.encode()
    except (TypeError, UnicodeError) as error:
        raise ConfigError(
            f"image_cache_dir={quoted(directory)} is not a path", "give the path of a directory, or None"
        ) from error
    if not name.strip() or "\0" in name:
        raise ConfigError(
            f"image_cache_dir={quoted(directory)} names no directory", "give the path of a directory, or None"
        )
    return Path(os.path.expanduser(name))


def file_digest(path: str | PathLike[str]) -> bytes:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.digest()


def pixels_id(pixels: np.ndarray) -> str:
    """A hash that identifies an image. pixels: (h, w, 3) uint8."""
    digest = hashlib.sha256(np.array(pixels.shape, "<i8").tobytes())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()
