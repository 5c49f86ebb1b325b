"""star_edge: vision-language GGUF models that do not compute the image tokens that do not matter.

Two-stage pruning (STAR, arXiv 2505.12359) on stock llama.cpp, through llama-cpp-python and one small C extension.
"""

import importlib
from typing import Any

from .answers import Answer, AnswerStream, AsyncAnswerStream
from .chat_handler import StarChatHandler
from .engine import StarVLM
from .errors import StarEdgeError
from .io.video import Video
from .llamacpp.mtmd import MEDIA_MARKER
from .progress import Progress
from .pruning.config import PruneConfig
from .pruning.presets import PRESETS
from .report import ImageReport, PruneReport

__version__ = "0.1.0"
_MODULES = {
    "batch": ".batch",
    "hub": ".io.hub",
    "refvlm": ".refvlm",
}  # imported when they are named: few programs need them
__all__ = [
    "MEDIA_MARKER",
    "PRESETS",
    "Answer",
    "AnswerStream",
    "AsyncAnswerStream",
    "ImageReport",
    "Progress",
    "PruneConfig",
    "PruneReport",
    "StarChatHandler",
    "StarEdgeError",
    "StarVLM",
    "Video",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name], __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
