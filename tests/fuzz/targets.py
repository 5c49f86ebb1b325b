"""What is fuzzed: for each target a function from a seed to a case. The same seed is the same case everywhere."""

from __future__ import annotations

from collections.abc import Callable

from cases import Case
from file_targets import gguf, images, lora, results, videos
from request_targets import configs, grammars, http

TARGETS: dict[str, Callable[[int], Case]] = {
    "gguf": gguf,
    "lora": lora,
    "images": images,
    "videos": videos,
    "grammars": grammars,
    "configs": configs,
    "results": results,
    "http": http,
}
