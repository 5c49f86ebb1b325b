"""Typed errors. Each names the cause and the remedy, and none leaves the engine unusable.

Every class also derives from the built-in exception that fits (ValueError for bad input, RuntimeError for a failure
while running), so that callers who do not know star_edge still catch them sensibly.
"""

from __future__ import annotations


class StarEdgeError(Exception):
    """Base class of every error that star_edge raises on purpose.

    `str(error)` is one line: what is wrong, then what to do about it.
    """

    def __init__(self, cause: str, remedy: str = "") -> None:
        self.cause = cause
        self.remedy = remedy
        super().__init__(f"{cause}: {remedy}" if remedy else cause)


class VersionMismatchError(StarEdgeError, ImportError):
    """The C extension was compiled against another llama-cpp-python than the one that is installed."""


class ConfigError(StarEdgeError, ValueError):
    """A keep ratio, a count, a layer or a preset that cannot be used."""


class ModelFileError(StarEdgeError, ValueError):
    """A GGUF file that is missing, truncated, or not what it is given as."""


class ModelMismatchError(StarEdgeError, ValueError):
    """A projector (mmproj) that does not belong to the text model."""


class UnsupportedModelError(StarEdgeError, ValueError):
    """A model that lacks what the request needs, for example a text model without vision."""


class ImageError(StarEdgeError, ValueError):
    """An image that cannot be read."""


class ImageTooLargeError(ImageError):
    """An image with more bytes or pixels than allowed, refused before it is decoded."""


class PromptError(StarEdgeError, ValueError):
    """Images and image markers of a prompt do not match."""


class ContextLengthError(StarEdgeError, ValueError):
    """The prompt does not fit the context, or an image that must be processed at once does not fit one ubatch."""


class EngineError(StarEdgeError, RuntimeError):
    """llama.cpp, or the tap inside it, failed while running."""


class LayerWindowError(EngineError):
    """A model whose graph cannot be run in layer windows. The engine answers without a decoder stage instead."""


class EvaluationError(StarEdgeError, ValueError):
    """A file of questions or of results that cannot be used, or a picture of them that cannot be drawn."""


class EngineClosedError(StarEdgeError, RuntimeError):
    """The engine was closed, or is busy with an unfinished streamed answer."""


class RequestCancelledError(StarEdgeError, RuntimeError):
    """Whoever made the request does not want its answer any more."""


class HubError(StarEdgeError, RuntimeError):
    """A model that the Hugging Face hub does not have, does not hand out, or cannot be asked for."""


class MissingDependencyError(StarEdgeError, ImportError):
    """An optional package that is not installed; the remedy names the extra of star-edge that brings it."""


class OutputError(StarEdgeError, ValueError):
    """A file of results that belongs to something else, or cannot be written."""


class WorkerError(StarEdgeError, RuntimeError):
    """Workers of a batch that do not start."""
