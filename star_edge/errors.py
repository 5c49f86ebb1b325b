"""Typed errors. Each names its cause and a remedy, and leaves the engine usable.

Every class also derives from the built-in exception that fits: ValueError for bad input, RuntimeError for a failure
while running. Callers who do not know star_edge can catch those.
"""

from __future__ import annotations

import numbers
from typing import Any

_LONGEST = 60  # characters of a value that a message quotes


def quoted(value: Any) -> str:
    """A value as a message quotes it: as Python writes it, cut where it is long. "..." for one of a type that may print
    anything.
    """
    if not isinstance(value, (str, bytes, numbers.Number, bool, type(None), list, tuple, dict)):
        return "..."
    if isinstance(value, int) and value.bit_length() >= 1000:
        return "a number of more than 300 digits"
    try:
        text = str(value) if isinstance(value, numbers.Number) else repr(value)
    except Exception:  # of something in a list
        return "..."
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


class StarEdgeError(Exception):
    """Base class of every error that star_edge raises on purpose.

    `str(error)` is one line: what is wrong, then what to do about it.

    Attributes:
        cause: What is wrong, with the value.
        remedy: What to do about it, or "".
    """

    def __init__(self, cause: str, remedy: str = "") -> None:
        self.cause = cause
        self.remedy = remedy
        super().__init__(f"{cause}: {remedy}" if remedy else cause)


class VersionMismatchError(StarEdgeError, ImportError):
    """The C extension was compiled against another llama-cpp-python than the installed one."""


class ConfigError(StarEdgeError, ValueError):
    """An argument or option that cannot be used, such as a keep ratio, a layer or a preset."""


class ModelFileError(StarEdgeError, ValueError):
    """A GGUF file that is missing, truncated, damaged, or of another kind than expected."""


class ModelMismatchError(StarEdgeError, ValueError):
    """A projector (mmproj) that does not belong to the text model."""


class UnsupportedModelError(StarEdgeError, ValueError):
    """A model that lacks what the request needs, for example a text model without vision."""


class ImageError(StarEdgeError, ValueError):
    """An image that cannot be read."""


class ImageTooLargeError(ImageError):
    """An image with more bytes or pixels than allowed, refused before it is decoded."""


class PromptError(StarEdgeError, ValueError):
    """A prompt or message that cannot be used, or whose image markers do not match its images."""


class ContextLengthError(StarEdgeError, ValueError):
    """A prompt does not fit the context, or an image that must be processed at once does not fit one ubatch."""


class EngineError(StarEdgeError, RuntimeError):
    """llama.cpp, or the tap inside it, failed while running."""


class LayerWindowError(EngineError):
    """A model's graph cannot run in layer windows. The engine then answers without a decoder stage."""


class EvaluationError(StarEdgeError, ValueError):
    """A file of questions or results cannot be used, or a picture of results cannot be drawn."""


class InputFileError(ConfigError, EvaluationError):
    """A file of questions cannot be used, or a file that a run depends on cannot be read."""


class EngineClosedError(StarEdgeError, RuntimeError):
    """The engine was closed, or is busy with an unfinished streamed answer."""


class RequestCancelledError(StarEdgeError, RuntimeError):
    """The caller cancelled the request."""


class RequestTimeoutError(StarEdgeError, TimeoutError):
    """A request took longer than its `timeout`.

    Attributes:
        text: The answer's text so far, "" while the prompt was read.
    """

    text = ""


class HubError(StarEdgeError, RuntimeError):
    """The Hugging Face hub lacks a model, refuses it, or cannot be reached."""


class MissingDependencyError(StarEdgeError, ImportError):
    """An optional package is not installed. The remedy names the extra of star-edge that brings it."""


class OutputError(StarEdgeError, ValueError):
    """A file of results belongs to something else, or cannot be written."""


class ResultsFileError(OutputError, EvaluationError):
    """A file of results cannot be gone on with: it belongs to something else, is in use, or cannot be written."""


class WorkerError(StarEdgeError, RuntimeError):
    """Workers of a batch do not start."""
