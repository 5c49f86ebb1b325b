"""Short hashes that tell whether two runs are about the same: values, files and configs."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from typing import Any

from ..errors import InputFileError
from ..pruning.config import PruneConfig

# Defaults of decoder stages as they were when results were first kept. A run with other defaults does not go on with
# those results.
_FIRST_DEFAULTS = {"decoder_scorer": "text", "decoder_share": 0.5, "seen_below": False}
_PIECES, _PIECE_BYTES = 64, 16384


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits of a hash of plain JSON values. Other values count by their `repr`."""
    content = json.dumps(value, sort_keys=True, default=repr)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def fingerprint_file(path: str | os.PathLike[str]) -> str:
    """A hash of a file's size and of 64 pieces spread over it, head and tail included. It reads 1 MiB at most.

    The file's time does not count. The head has the metadata. Weights that differ nearly everywhere (another
    quantization, a fine-tune) differ in the other pieces.

    Raises:
        InputFileError: The file cannot be read.
    """
    try:
        size = os.path.getsize(path)
        digest = hashlib.sha256(str(size).encode())
        with open(path, "rb") as file:
            for i in range(_PIECES):
                file.seek(max(0, size - _PIECE_BYTES) * i // (_PIECES - 1))
                digest.update(file.read(_PIECE_BYTES))
    except (OSError, ValueError) as error:  # a path with a NUL character is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise InputFileError(f"{os.fspath(path)} cannot be read ({reason})", "check the path") from error
    return digest.hexdigest()[:16]


def changed_fields(prune: PruneConfig) -> dict[str, Any]:
    """Fields of a config that are not at their first defaults: a field that is added later changes no fingerprint, and
    a default that changes does.
    """
    default = asdict(PruneConfig()) | (_FIRST_DEFAULTS if prune.prunes_in_decoder else {})
    return {name: value for name, value in asdict(prune).items() if value != default.get(name)}
