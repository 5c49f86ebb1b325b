"""Files of a model shape, in a folder where they are found again, or in one that goes away."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path

from ..errors import ConfigError
from .decoders import write_decoder
from .encoders import write_encoder
from .shapes import ModelShape
from .vocabulary import special_tokens

_FORMAT = 1  # of the files; to be raised when their content changes for one and the same shape


@contextlib.contextmanager
def model_files(shape: ModelShape, folder: str | PathLike[str] | None = None) -> Iterator[tuple[Path, Path]]:
    """Text model and mmproj of a shape, written unless `folder` holds them.

    folder: made if need be, and its files stay. None: a temporary folder, removed at the end.

    Raises:
        ConfigError: the folder cannot be written, or has too little room.
    """
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="star-edge-bench-"))
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = _file(
                folder,
                "text",
                repr((_FORMAT, shape.decoder, shape.encoder.kind, shape.dtype)),
                lambda path: _write_text(path, shape),
            )
            mmproj = _file(
                folder,
                "mmproj",
                repr((_FORMAT, shape.encoder, shape.decoder.n_embd)),
                lambda path: write_encoder(path, shape.encoder, shape.decoder.n_embd, "f16"),
            )
        except OSError as error:
            free = f", {shutil.disk_usage(folder).free / 2**30:.1f} GiB are free" if folder.is_dir() else ""
            raise ConfigError(
                f"the model cannot be written to {folder} ({error.strerror or error}{free})",
                "name a folder with more room",
            ) from error
        yield text, mmproj


def _write_text(path: Path, shape: ModelShape) -> None:
    write_decoder(path, shape.decoder, shape.dtype, special=special_tokens(shape.encoder.kind))


def _file(folder: Path, name: str, content: str, write: Callable[[Path], None]) -> Path:
    """The file of that content, whole or not at all: it gets its name when it is finished."""
    path = folder / f"random-{name}-{hashlib.sha256(content.encode()).hexdigest()[:12]}.gguf"
    if not path.exists():
        unfinished = path.with_suffix(f".{os.getpid()}.part")
        try:
            write(unfinished)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    return path
