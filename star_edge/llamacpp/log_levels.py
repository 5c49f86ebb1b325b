"""llama.cpp's log through llama_cpp, at its true levels.

llama_cpp's logger (`llama_cpp._logger`) has ggml's levels in another order than ggml.h: it takes a warning (3) for an
error, and prints llama.cpp's warnings where `verbose=False` asks for silence. "n_ctx_seq (4096) > n_ctx_train (1024)"
is one. Its other mistakes print nothing that was not asked for, and stay.
"""

from __future__ import annotations

import logging

from llama_cpp import _logger

WARN = 3  # GGML_LOG_LEVEL_WARN


def correct() -> None:
    """Puts the level of warnings right, for the whole process."""
    if _logger.GGML_LOG_LEVEL_TO_LOGGING_LEVEL[WARN] == logging.ERROR:
        _logger.GGML_LOG_LEVEL_TO_LOGGING_LEVEL[WARN] = logging.WARNING
