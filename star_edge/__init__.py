"""star_edge: vision-language GGUF models that do not compute the image tokens that do not matter.

Two-stage pruning (STAR, arXiv 2505.12359) on stock llama.cpp, through llama-cpp-python and one small C extension.
"""

from .chat_handler import StarChatHandler
from .config import PRESETS, PruneConfig
from .engine import Answer, AnswerStream, StarVLM
from .errors import StarEdgeError
from .report import ImageReport, PruneReport
from .vision.encoder import MEDIA_MARKER

__version__ = "0.1.0"
__all__ = [
    "MEDIA_MARKER",
    "PRESETS",
    "Answer",
    "AnswerStream",
    "ImageReport",
    "PruneConfig",
    "PruneReport",
    "StarChatHandler",
    "StarEdgeError",
    "StarVLM",
    "__version__",
]
